"""Untrusted files of a model's folder: what is not a file, too deep, too large or inconsistent is
refused with the file's name, before memory is allocated."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers

from common.errors import UserError
from mamba_lm import checkpoint, foreign_files
from mamba_lm.checkpoint import find_model, load_model, load_model_and_tokenizer, save_model
from mamba_lm.delta import LAYERS, delta_layers
from mamba_lm.foreign_files import parsing
from mamba_lm.generate import prefill, read, read_and_score
from mamba_lm.models.mamba import MambaConfig, MambaLM
from mamba_lm.tokenizer import encode, encode_with_offsets, load_tokenizer_at

ROOT = Path(__file__).parents[2]
TOKENIZER = ROOT / "data/demo/tokenizer"
DEEP = "[" * 100_000 + "]" * 100_000
EOS = "<|endoftext|>"


@pytest.fixture
def folder(make_model, tmp_path) -> Path:
    save_model(make_model(vocab_size=2156), tmp_path / "model")
    shutil.copytree(TOKENIZER, tmp_path / "model", dirs_exist_ok=True)
    return tmp_path / "model"


def refusal(read, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        read(*arguments)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500
    return message


def change(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


# Paths that are not files


READ = {  # the files that are read when a model and its tokenizer are loaded
    **dict.fromkeys(("config.json", "model.safetensors", "tokenizer.json"), None),
    "generation_config.json": "{}",
    "tokenizer_config.json": "{}",
    "special_tokens_map.json": "{}",
    "added_tokens.json": "{}",
    "chat_template.jinja": "",
    "additional_chat_templates/x.jinja": "",
}


def pipe(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def link_cycle(path: Path) -> None:
    path.symlink_to(path)


@pytest.mark.parametrize("make", [pipe, device, link_cycle, Path.mkdir])
@pytest.mark.parametrize("name", READ)
def test_a_path_that_is_not_a_file_is_refused(name, make, folder):
    if "/" in name and make in (link_cycle, Path.mkdir):
        pytest.skip("this is not read")
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    make(path)
    assert str(path) in refusal(load_model_and_tokenizer, str(folder))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors.index.json", LAYERS])
def test_a_pipe_in_place_of_other_files_is_refused(name, folder):
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / name)
    read = load_model if name != LAYERS else (lambda name: delta_layers(name, 2))
    assert f"{folder / name}: not a file" in refusal(read, str(folder))


def test_a_pipe_that_a_tokenizer_class_may_read_is_refused(folder):
    """Without a tokenizer.json, a field of a config decides which files are read."""
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text("{}")
    os.mkfifo(folder / "tiktoken.model")
    assert f"{folder}/tiktoken.model: not a file" in refusal(load_tokenizer_at, folder)


def test_links_out_of_the_folder_are_followed_as_the_hub_cache_needs(folder, tmp_path):
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / str(number))
        path.symlink_to(f"../blobs/{number}")
    load_model_and_tokenizer(str(folder))


# JSON


@pytest.mark.parametrize("text", [DEEP, '{"":' * 100_000, "", "[1]", "7", "\ud800", "9" * 5000])
@pytest.mark.parametrize("name", [name for name in READ if name.endswith(".json")])
def test_json_that_is_too_deep_or_of_another_type_is_refused(name, text, folder):
    (folder / name).write_bytes(text.encode(errors="surrogatepass"))
    assert str(folder / name) in refusal(load_model_and_tokenizer, str(folder))


def test_json_that_is_too_large_is_refused(folder, monkeypatch):
    monkeypatch.setattr(foreign_files, "MAX_JSON_BYTES", 1000)
    assert "tokenizer.json: has 131," in refusal(load_tokenizer_at, folder)


def test_delta_layers_that_are_nested_too_deep_are_refused(folder):
    (folder / LAYERS).write_text(DEEP)
    assert f"{LAYERS}: is nested too deep" in refusal(delta_layers, str(folder), 2)


# Sizes, before memory is allocated


SIZES = [2**31 - 1, 2**31, 2**62, 10**400, 0, -1, 1.5, True, "8", None, [8], {}]


@pytest.mark.parametrize("size", SIZES, ids=lambda size: str(size)[:9])
@pytest.mark.parametrize(
    "name",
    ["vocab_size", "hidden_size", "num_hidden_layers", "state_size", "conv_kernel",
     "intermediate_size", "time_step_rank"],
)  # fmt: skip
def test_sizes_that_differ_from_the_weights_are_refused(name, size, folder):
    if (name, size) == ("intermediate_size", None):
        return  # null means expand * hidden_size
    change(folder / "config.json", **{name: size})
    found = refusal(load_model, str(folder))
    assert str(folder) in found and "config.json" in found
    assert f"{folder}/config.json: " in refusal(load_model, str(folder / "config.json"))


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": False}, {"proj_bias": True},
    {"conv_bias": False}, {"d_inner": 40}, {"bcdt_rms_eps": 1e-6}], ids=str)  # fmt: skip
def test_the_number_of_parameters_is_that_of_the_model(changes, make_model):
    model = make_model(**changes)
    assert model.config.num_parameters == sum(p.numel() for p in model.parameters())


def test_random_weights_that_do_not_fit_into_memory_are_refused(monkeypatch):
    path = str(ROOT / "models/configs/mamba-130m.json")
    monkeypatch.setattr(checkpoint, "memory_bytes", lambda: 4 * 129_135_359)
    assert "129,135,360 random weights need 0.5 GB of memory; this machine" in refusal(
        load_model, path
    )


def test_no_memory_is_allocated_for_expanded_tensors(folder, tmp_path):
    """The tensor has 2**28 elements (1 GiB) and its file one number; loading has half of that."""
    (folder / "model.safetensors").unlink()
    weights, size = MambaLM(MambaConfig(64, 16, 1)).state_dict(), 2**28
    expanded = weights | {"backbone.norm_f.weight": torch.ones(1).expand(size)}
    path = folder / "pytorch_model.bin"
    torch.save(expanded, path)
    code = f"""
import resource, sys
sys.path.insert(0, {str(ROOT)!r})
from mamba_lm.checkpoint import load_model
from common.errors import UserError
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**29,) * 2)
try:
    load_model({str(folder)!r})
except UserError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8")
    assert f"{path}: backbone.norm_f.weight of shape ({size},) repeats numbers" in done.stdout


# Weights


def put_pickle(folder: Path, weights: object, **settings) -> Path:
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin", **settings)
    return folder / "pytorch_model.bin"


D = "backbone.layers.0.mixer.D"


@pytest.mark.parametrize(
    "value",
    [torch.ones(48).to_sparse(), torch.ones(48, device="meta"), torch.ones(48, dtype=torch.cfloat),
     torch.ones(48).int()],
    ids=["sparse", "meta", "complex", "integer"],
)  # fmt: skip
def test_tensors_of_unsupported_kinds_are_refused(value, folder):
    weights = load_file(folder / "model.safetensors") | {D: value}
    path = put_pickle(folder, weights)
    assert f"{path}: " in refusal(load_model, str(folder))


def test_tensors_that_share_memory_are_refused(make_model, tmp_path):
    """A small file would become a large model."""
    model = make_model(n_layer=40, d_model=64)
    weights = model.state_dict()
    shared = torch.zeros(max(value.numel() for value in weights.values()))
    for name, value in weights.items():
        weights[name] = shared[: value.numel()].view(value.shape)
    save_model(model, tmp_path / "model")
    path = put_pickle(tmp_path / "model", weights)
    assert path.stat().st_size < 200_000
    assert "repeats numbers" in refusal(load_model, str(tmp_path / "model"))


def test_a_compressed_weights_file_is_refused(folder):
    """Decompressed, it could take a thousand times its size."""
    path = put_pickle(folder, {"a": torch.zeros(10_000)})
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    assert f"{path}: a compressed weights file" in refusal(load_model, str(folder))


def repickled(path: Path, pickled: bytes) -> None:
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    [name] = [name for name in entries if name.endswith("/data.pkl")]
    with zipfile.ZipFile(path, "w") as archive:
        for entry, data in (entries | {name: pickled}).items():
            archive.writestr(entry, data)


START = b"\x80\x02}"
BOMBS = {  # pickles that torch accepts, and that take unlimited time or memory
    "tuples": START
    + b"K\x01\x85q\x00"
    + b"".join(b"h%c\x86q%c" % (n, n + 1) for n in range(60))
    + b"K\x01s.",
    "bytearray": START + b"K\x01cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85Rs.",
    "tensor": START + b"K\x01ctorch\nTensor\nJ\xff\xff\xff\x7f\x85Rs.",
    "storage": START + b"X\x01\0\0\0actorch\nFloatStorage\nq\1J\xff\xff\xff\x7f\x85Rs.",
}


@pytest.mark.parametrize("name", BOMBS)
def test_pickles_that_take_unlimited_time_or_memory_are_refused(name, folder):
    path = put_pickle(folder, {"a": torch.ones(1)})
    repickled(path, BOMBS[name])
    assert f"{path}: contains " in refusal(load_model, str(folder))


def test_a_tensor_with_two_names_is_read(make_model, tmp_path):
    """Converted checkpoints contain the same object under two names."""
    save_model(make_model(), tmp_path / "model")
    weights = load_file(tmp_path / "model/model.safetensors")
    weights["lm_head.weight"] = weights["backbone.embeddings.weight"]
    before = load_model(str(tmp_path / "model")).state_dict()
    put_pickle(tmp_path / "model", {name: torch.nn.Parameter(w) for name, w in weights.items()})
    after = load_model(str(tmp_path / "model")).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    (tmp_path / "model/pytorch_model.bin").unlink()
    torch.save(weights, tmp_path / "model/pytorch_model.bin")
    after = load_model(str(tmp_path / "model")).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_weights_from_before_torch_1_6_are_refused(folder):
    """This format allocates memory before the size of the file is known to suffice."""
    path = put_pickle(folder, {"a": torch.ones(1)}, _use_new_zipfile_serialization=False)
    assert f"{path}: truncated or not a weights file of torch 1.6" in refusal(
        load_model, str(folder)
    )


@pytest.mark.parametrize("name", ["../w.safetensors", "/w.safetensors", "..", ".", "", "a/b", 3,
    None, ["w"], "w\0.safetensors", "\ud800.safetensors", "w" * 5000 + ".safetensors", "w.bin",
    "config.json"])  # fmt: skip
def test_an_index_that_names_other_files_is_refused(name, folder):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder.parent / "w.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(weights, name)}))
    assert str(folder) in refusal(load_model, str(folder))
    if isinstance(name, str) and not name.startswith(("w", "\ud800")):
        refusal(find_model, str(folder))


# Tokenizers


def words(model, unknown: str | None = None, **parts) -> Tokenizer:
    vocabulary = {EOS: 0, "who": 1, "is": 2, "it": 3}
    if unknown:
        vocabulary[unknown] = 4
    settings = {"unk_token": unknown} if unknown else {}
    if model is models.BPE:
        tokenizer = Tokenizer(models.BPE({c: n for n, c in enumerate("whoist", 1)} | {EOS: 0}, []))
    else:
        tokenizer = Tokenizer(model(vocabulary, **settings))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    tokenizer.add_special_tokens([EOS])
    return tokenizer


def put_tokenizer(tokenizer: Tokenizer | str, folder: Path) -> Path:
    folder.mkdir()
    text = tokenizer if isinstance(tokenizer, str) else tokenizer.to_str()
    (folder / "tokenizer.json").write_text(text)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": EOS}))
    return folder


@pytest.mark.parametrize("model", [models.WordLevel, models.WordPiece])
def test_unknown_words_become_the_unknown_token_or_are_refused(model, tmp_path, capsys):
    """A tokenizer without an unknown token refuses a text with unknown words, in one line."""
    written = words(model, "[UNK]")
    written.add_special_tokens(["[UNK]"])  # in no config, and not a control token
    known = load_tokenizer_at(put_tokenizer(written, tmp_path / "a"))
    assert encode(known, ["who is\nshe", "\n", ""]) == [[1, 2, 4], [], []]
    assert "the tokenizer drops newlines: it has no token" in capsys.readouterr().err
    found = load_tokenizer_at(put_tokenizer(words(model), tmp_path / "b"))
    assert encode(found, ["who is"]) == [[1, 2]]
    for write in (encode, encode_with_offsets):
        assert "has no tokens for 'who is she' (Word" in refusal(write, found, ["who is she"])
        assert "for one of 2 texts" in refusal(write, found, ["who", "who is she"])


def test_a_text_without_tokens_is_refused(make_model):
    """Neither a row of a batch nor a single row is continued from padding."""
    model = make_model()
    state = prefill(model, [[3], []])
    assert "no token for any part" in refusal(read, model, [[1], []], state)
    one = prefill(model, [[3]])
    assert "no token for any part" in refusal(read_and_score, model, [], one, [1, 2], {0})


def test_characters_that_a_tokenizer_drops_give_a_warning(tmp_path, capsys):
    found = load_tokenizer_at(put_tokenizer(words(models.BPE), tmp_path / "a"))
    assert encode(found, ["who?!"]) == [[1, 2, 3]]
    warning = (
        "a: the tokenizer drops newlines and characters that it does not know: it has no token"
    )
    assert warning in capsys.readouterr().err
    load_tokenizer_at(TOKENIZER)
    assert capsys.readouterr().err == ""


PANICS = {  # panics in Rust are not an Exception and print lines on standard error
    "charsmap": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "//////////8="}},
    "charsmap of text": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAAAA=="}},
    "pieces": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    "model": {"model": {"type": "Newest", "vocab": {}}},
    "surrogate": {"model": {"type": "BPE", "vocab": {"\ud800": 1}, "merges": []}},
    "ids": {"model": {"type": "BPE", "vocab": {EOS: 0, "a": 1, "b": 1}, "merges": []}},
    "id": {"model": {"type": "BPE", "vocab": {EOS: 0, "a": -1}, "merges": []}},
    "empty": {"model": {"type": "BPE", "vocab": {}, "merges": []}, "added_tokens": []},
    "added": {"added_tokens": [{"content": EOS}]},
    "no added": {"added_tokens": None},
}


@pytest.mark.parametrize("name", PANICS)
def test_invalid_tokenizers_are_refused_in_one_line(name, tmp_path, capfd):
    written = json.loads(words(models.BPE).to_str()) | PANICS[name]
    folder = put_tokenizer(json.dumps(written), tmp_path / "a")
    if name in ("charsmap of text", "pieces"):
        tokenizer = load_tokenizer_at(folder)
        assert "panicked" not in capfd.readouterr().err
        assert "has no tokens for 'who'" in refusal(encode, tokenizer, ["who"])
    else:
        assert str(folder) in refusal(load_tokenizer_at, folder)
        assert capfd.readouterr() == ("", "")


def test_a_tokenizer_that_needs_code_is_refused(folder):
    change(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["x.X", None]})
    load_tokenizer_at(folder)  # its tokenizer.json needs no code
    (folder / "tokenizer.json").rename(folder / "vocab.json")
    assert "tokenizer_config.json: the field auto_map" in refusal(load_tokenizer_at, folder)


def test_output_of_the_library_does_not_reach_standard_output(folder, capfd):
    (folder / "special_tokens_map.json").write_text('{"x_token": {"content": "x", "odd": 1}}')
    load_tokenizer_at(folder)
    assert capfd.readouterr().out == ""


# Errors of libraries and our own


def test_an_error_of_a_library_becomes_a_user_error():
    def fail(error):
        with parsing(lambda reason: f"x: {reason}"):
            raise error

    assert refusal(fail, ValueError("a\nb\n\nc")) == "x: a b"
    assert refusal(fail, KeyError()) == "x: KeyError"
    for error in (KeyboardInterrupt(), SystemExit(3)):
        with pytest.raises(type(error)):
            fail(error)


def test_a_bug_of_our_own_stays_a_traceback(folder, monkeypatch):
    monkeypatch.setattr("mamba_lm.tokenizer._read_added_tokens", lambda file: {}[file])
    with pytest.raises(KeyError):
        load_tokenizer_at(folder)
