"""Both checkpoint formats, there and back; what bad folders get; nothing half-written."""

import json
import resource
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from common.errors import UserError
from mamba_lm.checkpoint import load_model, load_tokenizer, read_config, save_model
from mamba_lm.formats import FORMAT_NAMES
from mamba_lm.models.mamba import MambaLM

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "models/configs"
TOKENIZER = ROOT / "data/demo/tokenizer"

VARIANTS = {
    "mamba": {},
    "untied": {"tie_embeddings": False},
    "biases": {"proj_bias": True, "conv_bias": False},
    "epsilon": {"norm_eps": 0.1},
    "shape": {"d_model": 33, "expand": 3, "d_conv": 2, "residual_in_fp32": False},
    "falcon": {"bcdt_rms_eps": 0.1},
    "untied falcon": {"bcdt_rms_eps": 1e-6, "tie_embeddings": False},
}
variants = pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
# mamba_ssm's config has no place for Falcon-Mamba's norms nor for an epsilon.
storable = pytest.mark.parametrize(
    "format, changes",
    [
        pytest.param(format, changes, id=f"{format}-{name}")
        for format in FORMAT_NAMES
        for name, changes in VARIANTS.items()
        if format == "transformers" or not changes.keys() & {"bcdt_rms_eps", "norm_eps"}
    ],
)
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8, 1, 8]])


def logits(model) -> torch.Tensor:
    with torch.inference_mode():
        if isinstance(model, MambaLM):
            return model(IDS)[0]
        return model(IDS, use_cache=False).logits


def write_state_spaces(folder: Path, model, vocab_size: int | None = None, **config) -> None:
    """A folder as `mamba_ssm`'s save_pretrained writes it, from `transformers`' model."""
    rename = {"backbone.embeddings.weight": "backbone.embedding.weight"}
    folder.mkdir(parents=True)
    weights = {rename.get(name, name): value for name, value in model.state_dict().items()}
    torch.save(weights, folder / "pytorch_model.bin")
    theirs = {
        "d_model": model.config.hidden_size,
        "n_layer": model.config.num_hidden_layers,
        "vocab_size": vocab_size or model.config.vocab_size,
        "ssm_cfg": {"d_state": 7, "dt_rank": 5},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 8,
    }
    (folder / "config.json").write_text(json.dumps(theirs | config))


def state_spaces_names(n_layer: int) -> set[str]:
    """The state dict of `mamba_ssm` 2.3's MambaLMHeadModel without projection biases."""
    mixer = ["A_log", "D", "in_proj.weight", "conv1d.weight", "conv1d.bias", "x_proj.weight"]
    mixer += ["dt_proj.weight", "dt_proj.bias", "out_proj.weight"]
    layers = [f"backbone.layers.{layer}." for layer in range(n_layer)]
    return {
        "backbone.embedding.weight",
        "backbone.norm_f.weight",
        "lm_head.weight",
        *(f"{layer}norm.weight" for layer in layers),
        *(f"{layer}mixer.{name}" for layer in layers for name in mixer),
    }


# There and back


@variants
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_transformers_reads_what_we_write(changes, dtype, make_model, assert_near, tmp_path):
    model = make_model(**changes).to(dtype)
    save_model(model, tmp_path / "model")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert theirs.dtype == dtype
    for name, weight in theirs.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name])
    assert_near(logits(theirs.float()), logits(model.float()), 1e-5)
    assert theirs.config.tie_word_embeddings == model.config.tie_embeddings


@variants
@pytest.mark.parametrize("shard", ["5GB", "10KB"], ids=["one file", "shards"])
def test_we_read_what_transformers_writes(
    changes, shard, make_model, as_transformers, assert_near, tmp_path
):
    theirs = as_transformers(make_model(**changes))
    theirs.save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "10KB")
    assert_near(logits(load_model(str(tmp_path))), logits(theirs), 1e-5)


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "shards"])
def test_we_read_transformers_weights_in_pickles(
    sharded, make_model, as_transformers, assert_near, tmp_path
):
    theirs = as_transformers(make_model())
    theirs.config.save_pretrained(tmp_path)
    weights = theirs.state_dict()
    if sharded:
        places = {name: f"pytorch_model-{i % 3}.bin" for i, name in enumerate(weights)}
        for shard in set(places.values()):
            part = {name: weights[name] for name in weights if places[name] == shard}
            torch.save(part, tmp_path / shard)
        index = {"metadata": {}, "weight_map": places}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    else:
        torch.save(weights, tmp_path / "pytorch_model.bin")
    assert_near(logits(load_model(str(tmp_path))), logits(theirs), 1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_we_read_what_mamba_ssm_writes(tied, make_model, as_transformers, assert_near, tmp_path):
    """With the vocabulary of the state-spaces models: 50277 tokens in 50280 rows."""
    model = make_model(vocab_size=50277, d_model=8, n_layer=3, tie_embeddings=tied)
    theirs = as_transformers(model)
    config = {} if tied else {"tie_embeddings": False}
    write_state_spaces(tmp_path / "model", theirs, vocab_size=50277, **config)
    weights = torch.load(tmp_path / "model/pytorch_model.bin", weights_only=True)
    assert weights.keys() == state_spaces_names(3)
    got = load_model(str(tmp_path / "model"))
    assert got.lm_head.weight.shape == (50280, 8)
    assert_near(logits(got), logits(theirs), 1e-5)


@pytest.mark.parametrize("keep", ["pytorch_model.bin", "model.safetensors"])
def test_a_tied_head_may_be_missing(keep, make_model, as_transformers, assert_near, tmp_path):
    theirs = as_transformers(make_model())
    write_state_spaces(tmp_path / "model", theirs)
    path = tmp_path / "model/pytorch_model.bin"
    weights = torch.load(path)
    del weights["lm_head.weight"]
    path.unlink()
    write = torch.save if keep.endswith(".bin") else save_file
    write(weights, tmp_path / "model" / keep)
    assert_near(logits(load_model(str(tmp_path / "model"))), logits(theirs), 1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_mamba_ssm_can_load_what_we_write(tied, make_model, tmp_path):
    """It asks for exactly its own names and the fields of mamba_ssm/models/config_mamba.py."""
    model = make_model(n_layer=3, tie_embeddings=tied)
    save_model(model, tmp_path / "model", format="state_spaces")
    weights = torch.load(tmp_path / "model/pytorch_model.bin", weights_only=True)
    assert weights.keys() == state_spaces_names(3)
    for name, weight in weights.items():
        assert torch.equal(weight, model.state_dict()[name.replace("embedding.", "embeddings.")])
    config = json.loads((tmp_path / "model/config.json").read_text())
    assert config.keys() <= {
        "d_model", "d_intermediate", "n_layer", "vocab_size", "ssm_cfg", "attn_layer_idx",
        "attn_cfg", "rms_norm", "residual_in_fp32", "fused_add_norm", "pad_vocab_size_multiple",
        "tie_embeddings",
    }  # fmt: skip
    # Keyword arguments of Mamba.__init__, but for `layer`, which names the class.
    assert config["ssm_cfg"] == {
        "layer": "Mamba1", "d_state": 7, "d_conv": 4, "expand": 2, "dt_rank": 5, "bias": False,
        "conv_bias": True,
    }  # fmt: skip
    padded = config["vocab_size"] + -config["vocab_size"] % config["pad_vocab_size_multiple"]
    assert (config["vocab_size"], padded) == (31, 32) == (31, len(weights["lm_head.weight"]))


@storable
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_we_read_what_we_write(format, changes, dtype, make_model, tmp_path):
    model = make_model(**changes).to(dtype)
    save_model(model, tmp_path / "model", format=format)
    got = load_model(str(tmp_path / "model"), dtype=dtype)
    assert not got.training
    assert {parameter.dtype for parameter in got.parameters()} == {dtype}
    assert got.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(w, model.state_dict()[name]) for name, w in got.state_dict().items())
    assert torch.equal(logits(got), logits(model))


@pytest.mark.parametrize("changes", [VARIANTS["untied"], VARIANTS["shape"]], ids=str)
def test_a_model_goes_from_format_to_format(changes, make_model, as_transformers, tmp_path):
    wanted = as_transformers(make_model(**changes))
    wanted.save_pretrained(tmp_path / "0")
    for step, format in enumerate(["state_spaces", "transformers", "state_spaces", "transformers"]):
        save_model(load_model(str(tmp_path / f"{step}")), tmp_path / f"{step + 1}", format=format)
    got = AutoModelForCausalLM.from_pretrained(tmp_path / "4")
    assert torch.equal(logits(got), logits(wanted))
    for name in ("vocab_size", "expand", "tie_word_embeddings", "residual_in_fp32"):
        assert getattr(got.config, name) == getattr(wanted.config, name)


def test_weights_are_read_in_float32_unless_asked_otherwise(make_model, tmp_path):
    save_model(make_model().bfloat16(), tmp_path / "model")
    assert load_model(str(tmp_path / "model")).lm_head.weight.dtype == torch.float32


@pytest.mark.parametrize("format", FORMAT_NAMES)
@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_stay_one_parameter(tied, format, make_model, tmp_path):
    """Else training would move them apart, and saving would lose the head."""
    save_model(make_model(tie_embeddings=tied), tmp_path / "model", format=format)
    model = load_model(str(tmp_path / "model"))
    assert (model.lm_head.weight is model.backbone.embeddings.weight) == tied


def test_inner_width_is_its_own_setting(make_model, tmp_path):
    """Falcon-Mamba-7B says expand 16 and intermediate_size 8192 at hidden_size 4096."""
    model = make_model(bcdt_rms_eps=1e-6, expand=16, d_inner=40)
    save_model(model, tmp_path / "model")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert theirs.config.intermediate_size == 40
    assert torch.equal(logits(load_model(str(tmp_path / "model"))), logits(model))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"bcdt_rms_eps": 1e-6}, "Falcon"),
        ({"d_inner": 40}, "inner width"),
        ({"norm_eps": 0.1}, "epsilon"),
    ],
    ids=["falcon", "inner width", "epsilon"],
)
def test_state_spaces_refuses_what_it_cannot_hold(changes, words, make_model, tmp_path):
    with pytest.raises(UserError, match=words):
        save_model(make_model(**changes), tmp_path / "model", format="state_spaces")
    assert not any(tmp_path.iterdir())


# Config files


PUBLIC_SIZES = {
    "mamba-130m": 129_135_360,
    "mamba-370m": 371_516_416,
    "mamba-790m": 793_204_224,
    "mamba-1.4b": 1_372_178_432,
    "mamba-2.8b": 2_768_345_600,
}


@pytest.mark.parametrize("name, parameters", PUBLIC_SIZES.items())
def test_public_configs_have_the_public_sizes(name, parameters):
    with torch.device("meta"):
        model = MambaLM(read_config(CONFIGS / f"{name}.json"))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert len(model.lm_head.weight) == 50280


OWN_CONFIGS = sorted(path for path in CONFIGS.glob("*.json") if path.stem not in PUBLIC_SIZES)


@pytest.mark.parametrize("path", OWN_CONFIGS, ids=lambda path: path.stem)
def test_a_config_file_gives_random_weights(path):
    first = load_model(str(path))
    second = load_model(str(path), dtype=torch.bfloat16)
    assert logits(first).isfinite().all() and not first.training
    assert not torch.equal(first.lm_head.weight.bfloat16(), second.lm_head.weight)
    assert second.lm_head.weight.dtype == torch.bfloat16
    assert len(first.lm_head.weight) >= len(load_tokenizer(str(TOKENIZER)))


# Bad input


@pytest.fixture
def folder(make_model, tmp_path) -> Path:
    save_model(make_model(), tmp_path / "model")
    return tmp_path / "model"


def refused(name: str | Path, *words: str) -> None:
    """Loading ends in one line that holds the words."""
    with pytest.raises(UserError) as caught:
        load_model(str(name))
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    "name", ["nowhere", "/no/such/folder", "./models/x", "a/b/c", "state-spaces/mamba-130m", ""]
)
def test_no_such_model(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(name, name)


def test_a_file_is_no_folder(folder):
    refused(folder / "model.safetensors", "model.safetensors")


@pytest.mark.parametrize(
    "text",
    [
        b"{",
        b"",
        b"[1, 2]",
        b"7",
        b"null",
        b'{"model_type": "mamba"}',
        b'{"d_model": 24}',
        b'{"model_type": "llama", "hidden_size": 24}',
        b'{"name": "caf\xe9"}',
        b'{"model_type": "mamba2", "hidden_size": 24, "vocab_size": 31, "num_hidden_layers": 1}',
        b'{"d_model": 24, "n_layer": 1, "vocab_size": 31, "ssm_cfg": {"layer": "Mamba2"}}',
        b'{"d_model": 24, "n_layer": 1, "vocab_size": 31, "attn_layer_idx": [1]}',
        b'{"d_model": 24, "n_layer": 1, "vocab_size": 31, "ssm_cfg": [1]}',
        b'{"d_model": 24, "n_layer": "1", "vocab_size": 31}',
        b'{"d_model": 24, "n_layer": 1, "vocab_size": null}',
        b'{"d_model": 24.5, "n_layer": 1, "vocab_size": 31}',
        b'{"d_model": -24, "n_layer": 1, "vocab_size": 31}',
        b'{"d_model": 24, "n_layer": 0, "vocab_size": 31}',
    ],
    ids=lambda text: text.decode("latin-1"),
)
@pytest.mark.parametrize("as_file", [False, True], ids=["folder", "config file"])
def test_bad_config(text, as_file, folder):
    (folder / "config.json").write_bytes(text)
    refused(folder / "config.json" if as_file else folder, str(folder / "config.json"))


def test_no_config(folder):
    (folder / "config.json").unlink()
    refused(folder, str(folder / "config.json"), "no such file")
    refused(folder / "other.json", str(folder / "other.json"), "no such file")


def change_weights(path: Path, change) -> None:
    weights = load_file(path)
    change(weights)
    save_file(weights, path)


def test_no_weights(folder):
    (folder / "model.safetensors").unlink()
    refused(folder, str(folder), "model.safetensors")


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda w: w.pop("backbone.layers.1.mixer.D"), "missing ['backbone.layers.1.mixer.D']"),
        (lambda w: w.pop("backbone.embeddings.weight"), "missing ['backbone.embeddings.weight'"),
        (lambda w: w.update({"extra.weight": torch.ones(2)}), "unknown ['extra.weight']"),
        (
            lambda w: w.update({"backbone.norm_f.weight": torch.ones(25)}),
            "backbone.norm_f.weight has shape (25,), config.json wants (24,)",
        ),
    ],
    ids=["missing", "no embeddings", "extra", "shape"],
)
def test_weights_that_do_not_fit_the_config(change, words, folder):
    change_weights(folder / "model.safetensors", change)
    refused(folder, str(folder), words)


@pytest.mark.parametrize("format", FORMAT_NAMES)
@pytest.mark.parametrize("left", [0, 5, 100, -1])
def test_truncated_weights(format, left, make_model, tmp_path):
    save_model(make_model(), tmp_path / "model", format=format)
    (path,) = [p for p in (tmp_path / "model").iterdir() if p.name != "config.json"]
    path.write_bytes(path.read_bytes()[:left])
    refused(tmp_path / "model", str(path))


@pytest.mark.parametrize("content", [[1, 2], {"a": 3}, torch.ones(3)], ids=str)
def test_a_pickle_that_holds_no_weights(content, folder):
    (folder / "model.safetensors").unlink()
    torch.save(content, folder / "pytorch_model.bin")
    refused(folder, str(folder))


class Evil:
    """Writes a file when unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_code_in_a_pickle_does_not_run(zipped, folder):
    (folder / "model.safetensors").unlink()
    path, proof = folder / "pytorch_model.bin", folder / "was_run"
    torch.save({"w": Evil(proof)}, path, _use_new_zipfile_serialization=zipped)
    refused(folder, str(path))
    assert not proof.exists()
    torch.load(path, weights_only=False)
    assert proof.exists()  # the trap was armed


BAD_INDEXES = [
    *("{", "[]", '{"metadata": {}}', '{"weight_map": 3}', '{"weight_map": {}}'),
    *('{"weight_map": {"w": 3}}', '{"weight_map": {"w": "../model.safetensors"}}'),
]


@pytest.mark.parametrize("text", BAD_INDEXES)
def test_bad_shard_index(text, folder):
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    index.write_text(text)
    refused(folder, str(index))


def test_missing_shard(make_model, as_transformers, tmp_path):
    as_transformers(make_model()).save_pretrained(tmp_path, max_shard_size="10KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    refused(tmp_path, str(shard))


# Writing


class Tokenizer:
    """Stands for one: its save_pretrained does as told."""

    bos_token_id = eos_token_id = pad_token_id = 0

    def __init__(self, save_pretrained):
        self.save_pretrained = save_pretrained


def full_disk(folder):
    raise OSError(28, "No space left on device")


def interrupted(folder):
    raise KeyboardInterrupt


def tree(folder: Path) -> dict[str, bytes]:
    paths = sorted(folder.rglob("*"))
    return {str(p.relative_to(folder)): p.read_bytes() for p in paths if p.is_file()}


def test_parents_are_made(make_model, tmp_path):
    save_model(make_model(), tmp_path / "a/b/model")
    load_model(str(tmp_path / "a/b/model"))
    assert [path.name for path in (tmp_path / "a/b").iterdir()] == ["model"]


def test_a_relative_folder_is_one_too(make_model, tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path / "model")
    save_model(make_model(), ".")
    load_model(".")
    assert sorted(tree(tmp_path)) == ["model/config.json", "model/model.safetensors"]


def test_saving_into_a_folder_keeps_what_else_is_there(make_model, tmp_path):
    folder = tmp_path / "model"
    (folder / "checkpoint-5").mkdir(parents=True)
    (folder / "checkpoint-5/model.safetensors").write_bytes(b"weights of step 5")
    (folder / "training_args.json").write_text("{}")
    before = tree(folder)
    save_model(make_model(), folder)
    assert tree(folder).items() >= before.items()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    first = logits(load_model(str(folder)))
    save_model(make_model(seed=1), folder)
    assert not torch.equal(logits(load_model(str(folder))), first)


@pytest.mark.parametrize("before", ["transformers", "state_spaces", "shards", "pickle shards"])
@pytest.mark.parametrize("format", FORMAT_NAMES)
def test_saving_over_a_model_leaves_none_of_its_weights(
    format, before, make_model, as_transformers, tmp_path
):
    if before == "shards":
        as_transformers(make_model()).save_pretrained(tmp_path, max_shard_size="10KB")
    elif before == "pickle shards":
        save_model(make_model(), tmp_path, format="state_spaces")
        index = {"weight_map": {"backbone.norm_f.weight": "pytorch_model.bin"}}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    else:
        save_model(make_model(), tmp_path, format=before)
    model = make_model(seed=1)
    save_model(model, tmp_path, format=format)
    assert torch.equal(logits(load_model(str(tmp_path))), logits(model))
    if format == "transformers":
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(theirs.lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize("format", FORMAT_NAMES)
@pytest.mark.parametrize("fails, error", [(full_disk, UserError), (interrupted, KeyboardInterrupt)])
@pytest.mark.parametrize("existed", [False, True], ids=["new", "over a model"])
def test_a_write_that_fails_changes_nothing(existed, fails, error, format, make_model, tmp_path):
    folder = tmp_path / "parent/model"
    folder.parent.mkdir()
    if existed:
        save_model(make_model(seed=1), folder)
    before = tree(tmp_path)
    with pytest.raises(error, match=str(folder) if error is UserError else None):
        save_model(make_model(), folder, tokenizer=Tokenizer(fails), format=format)
    assert tree(tmp_path) == before
    assert folder.exists() == existed and len(list(folder.parent.iterdir())) == existed


@pytest.mark.parametrize("format", FORMAT_NAMES)
def test_a_full_disk_is_a_user_error(format, make_model, tmp_path):
    """Weights are written by libraries that raise other kinds than OSError."""
    model = make_model()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        with pytest.raises(UserError, match=f"{tmp_path}/model: cannot be written"):
            save_model(model, tmp_path / "model", format=format)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not any(tmp_path.iterdir())


def test_a_new_folder_appears_whole_by_one_rename(make_model, tmp_path, monkeypatch):
    seen = []

    def failing_rename(self, target):
        seen.append((sorted(path.name for path in self.iterdir()), Path(target).exists()))
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "rename", failing_rename)
    with pytest.raises(UserError, match=f"{tmp_path}/model: cannot be written"):
        save_model(make_model(), tmp_path / "model")
    assert seen == [(["config.json", "model.safetensors"], False)]
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("moves", [0, 1])
def test_a_move_that_fails_leaves_no_mixture(moves, make_model, tmp_path, monkeypatch):
    """A folder with files of two models must not load."""
    folder = tmp_path / "model"
    save_model(make_model(seed=1), folder)
    replace, count = Path.replace, iter(range(10))

    def failing_replace(self, target):
        if next(count) == moves:
            raise OSError(5, "Input/output error")
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", failing_replace)
        with pytest.raises(UserError, match=f"{folder}: cannot be written"):
            save_model(make_model(), folder)
    refused(folder, str(folder / "config.json"))
    save_model(make_model(), folder)
    assert torch.equal(logits(load_model(str(folder))), logits(make_model()))


def test_a_folder_that_cannot_be_made(make_model, tmp_path):
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path / "file", tmp_path / "file/model"):
        with pytest.raises(UserError, match=str(folder)):
            save_model(make_model(), folder)
    assert tree(tmp_path) == {"file": b"in the way"}


# Tokenizers


TEXT = "Who leads the team?\n Ana does."


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(str(TOKENIZER))


@pytest.mark.parametrize("format", FORMAT_NAMES)
def test_the_tokenizer_travels_along(format, tokenizer, make_model, tmp_path):
    save_model(make_model(), tmp_path / "model", tokenizer=tokenizer, format=format)
    load_model(str(tmp_path / "model"))
    got = load_tokenizer(str(tmp_path / "model"))
    assert got(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]
    assert (got.eos_token_id, len(got)) == (tokenizer.eos_token_id, len(tokenizer))


def test_a_tokenizer_may_be_a_folder_a_file_or_in_the_models_folder(tokenizer, folder):
    wanted = tokenizer(TEXT)["input_ids"]
    assert len(wanted) > 5 and tokenizer.decode(wanted) == TEXT
    for name in (TOKENIZER, TOKENIZER / "tokenizer.json"):
        got = load_tokenizer(str(folder), str(name))
        assert got(TEXT)["input_ids"] == wanted
        assert got.eos_token_id == tokenizer.eos_token_id
    for path in TOKENIZER.iterdir():
        shutil.copy(path, folder)
    assert load_tokenizer(str(folder))(TEXT)["input_ids"] == wanted


def test_an_asked_for_tokenizer_goes_before_the_models_own(tokenizer, make_model, tmp_path):
    save_model(make_model(), tmp_path / "model", tokenizer=tokenizer)
    with pytest.raises(UserError, match="some/other"):
        load_tokenizer(str(tmp_path / "model"), "some/other")


def test_without_a_tokenizer_of_its_own_a_model_gets_that_of_gpt_neox(folder):
    for model in (str(folder), str(CONFIGS / "mamba-130m.json")):
        with pytest.raises(UserError, match=r"EleutherAI/gpt-neox-20b.*a tokenizer\.json file"):
            load_tokenizer(model)


def test_a_hub_tokenizer_is_read_from_its_download(tokenizer, monkeypatch):
    asked = []

    def download(name, allow_patterns):
        asked.append(name)
        return str(TOKENIZER)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert load_tokenizer("any", "some/other")(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]
    assert asked == ["some/other"]


@pytest.mark.parametrize("text", [b"{", b"", b"[]", b"\xe9"], ids=str)
@pytest.mark.parametrize("as_file", [False, True], ids=["folder", "file"])
def test_a_broken_tokenizer(text, as_file, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(text)
    with pytest.raises(UserError, match=str(path if as_file else tmp_path)) as caught:
        load_tokenizer("any", str(path if as_file else tmp_path))
    assert "\n" not in str(caught.value)


def test_a_tokenizer_needs_an_end_of_text(tmp_path):
    shutil.copy(TOKENIZER / "tokenizer.json", tmp_path)
    with pytest.raises(UserError, match=f"{tmp_path}.*end-of-text"):
        load_tokenizer("any", str(tmp_path))
