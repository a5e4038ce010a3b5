"""Folders of models and tokenizers that want to run code or read what is not theirs, all scripts:
nothing runs, standard input is not read, and there is an answer or a refusal in one line."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.pre_tokenizers import Whitespace

from mamba_lm.checkpoint import save_model
from mamba_lm.models.mamba import MambaConfig, MambaLM

ROOT = Path(__file__).parents[1]
TOKENIZER = ROOT / "data/demo/tokenizer"
TYPED = "y\nyes\n"

# Runs a script on one model after the other in one process, as if each were a process of its own.
DRIVER = """
import contextlib, io, json, os, runpy, sys, tempfile

_, script, root, runs = sys.argv
opened = []
def watch(event, arguments):
    if event == "open" and str(arguments[0]).startswith(root) and str(arguments[0]).endswith(".py"):
        opened.append(str(arguments[0]))
    if event in ("os.system", "os.exec") or event == "subprocess.Popen" and arguments[0] != "git":
        opened.append(f"{event} {arguments}")
sys.addaudithook(watch)
results = []
for arguments in json.loads(runs):
    sys.argv = [script, *arguments]
    code, out, err = 0, io.StringIO(), tempfile.TemporaryFile("w+", encoding="utf-8")
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as error:
            code = error.code
        sys.stderr.flush()
    err.seek(0)
    results.append([code, out.getvalue(), err.read()])
print(json.dumps({"results": results, "opened": opened, "left": sys.stdin.read()}))
"""


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("hostile")


@pytest.fixture(scope="module")
def marker(root) -> Path:
    return root / "was_run"


@pytest.fixture(scope="module")
def models(root, marker) -> dict[str, tuple[str, ...]]:
    """The arguments that give a script each model, by its name: MODEL, or MODEL and a tokenizer."""
    torch.manual_seed(0)
    model = MambaLM(MambaConfig(vocab_size=2156, d_model=16, n_layer=1, d_state=4))
    code = f"import os\nos.mkdir({str(marker)!r})\nclass Evil: pass\n"

    def make(name: str, tokenizer: bool = True) -> Path:
        """A whole model with code beside it, which every file names that can."""
        folder = root / name
        save_model(model, folder)
        shutil.copytree(TOKENIZER, folder, dirs_exist_ok=True)
        refers = {"auto_map": dict.fromkeys(AUTO, "evil.Evil"), "trust_remote_code": True}
        refers["auto_map"]["AutoTokenizer"] = ["evil.Evil", "evil.Evil"]
        refers |= {"custom_generate": "evil.py", "custom_pipelines": {"x": {"impl": "evil.Evil"}}}
        for file in (*PROCESSORS, "tokenizer_config.json", "generation_config.json"):
            add(folder / file, **refers, tokenizer_class="Evil", processor_class="Evil")
        add(folder / "config.json", auto_map=refers["auto_map"], tokenizer_class="Evil")
        for file in ("evil.py", "custom_generate/generate.py", "__init__.py", "tokenizers.py"):
            (folder / file).parent.mkdir(exist_ok=True)
            (folder / file).write_text(code)
        template = "{{ cycler.__init__.__globals__.os.mkdir('" + str(marker) + "') }}"
        (folder / "chat_template.jinja").write_text(template)
        (folder / "NOTE.txt").write_text("\x1b]0;mine\x07 note \x9b31m")
        if not tokenizer:
            (folder / "tokenizer.json").unlink()
            (folder / "vocab.json").write_text('{"a": 0, "<|endoftext|>": 1}')
            (folder / "merges.txt").write_text("#version: 0.2\n")
        return folder

    found = {"known": make("known")}
    found["words"] = make("words")  # whose tokenizer has no newline, and few words
    words = Tokenizer(WordPiece({"<|endoftext|>": 0, "[UNK]": 1, "in": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    words.add_special_tokens(["<|endoftext|>", "[UNK]"])
    words.save(str(found["words"] / "tokenizer.json"))
    for name in ("tokenizer", "type", "pickle", "legacy", "script", "index"):
        found[name] = make(name, tokenizer=name != "tokenizer")
        if name not in ("tokenizer", "type"):
            weights = load_file(found[name] / "model.safetensors")
            (found[name] / "model.safetensors").unlink()
    add(found["type"] / "config.json", model_type="evil")
    for name in ("pickle", "legacy"):
        path = found[name] / "pytorch_model.bin"
        torch.save(
            weights | {"x": Evil(marker)}, path, _use_new_zipfile_serialization=name == "pickle"
        )
    archive = found["script"] / "pytorch_model.bin"
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), archive)
    with zipfile.ZipFile(archive, "a") as opened:
        opened.writestr("archive/code/evil.py", code)
    save_file(weights, root / "secret.safetensors")
    place_of = dict.fromkeys(weights, "../secret.safetensors")
    add(found["index"] / "model.safetensors.index.json", weight_map=place_of)
    given = {name: (str(folder),) for name, folder in found.items()}
    typeless = root / "typeless"  # a tokenizer's folder, whose class nothing but its code gives
    shutil.copytree(found["tokenizer"], typeless)
    for file in ("config.json", "tokenizer_config.json"):
        (typeless / file).write_text(json.dumps({"auto_map": {"AutoTokenizer": ["evil.Evil"] * 2}}))
    bare = root / "bare"
    shutil.copytree(typeless, bare)
    (bare / "tokenizer_config.json").write_text("{}")
    (bare / "config.json").write_text('{"auto_map": {"AutoConfig": "evil.Evil"}}')
    return given | {name: (given["known"][0], "--tokenizer", str(root / name))
                    for name in ("typeless", "bare")}  # fmt: skip


AUTO = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoProcessor", "AutoImageProcessor")
PROCESSORS = ("processor_config.json", "preprocessor_config.json", "special_tokens_map.json")
ANSWERED = {"known", "words"}  # the rest is refused


def add(path: Path, **fields: object) -> None:
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(before | fields))


def arguments(script: str, name: str, model: tuple[str, ...], folder: Path) -> list[str]:
    data = folder / "data.jsonl"
    data.write_text(
        json.dumps({"context": "Ann is in Oslo.", "prompt": "Where?", "response": "Oslo"})
    )
    output, (first, *more) = str(folder / f"{script}.{name}"), model
    if script.startswith("train"):
        given = ["--model", first, "--data_path", data, "--output", output, "--max_steps", 1]
        return list(map(str, (*given, "--negatives", "none", *more)))
    if script.startswith("eval"):
        return [first, str(data), f"{output}.jsonl", "--max_new_tokens", "1", *more]
    context = ["--context_file", str(data)] if script.endswith("context") else []
    return [first, *context, "--question", "Who?", "--json", "--max_new_tokens", "1", *more]


SCRIPTS = ("train_mamba_with_context", "eval_mamba_with_context", "eval_n_shot_mamba",
           "prompt_mamba_with_context", "prompt_mamba")  # fmt: skip


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_script_runs_what_a_models_folder_holds(script, models, root, marker, tmp_path):
    runs = [arguments(script, name, model, tmp_path) for name, model in models.items()]
    done = python("-c", DRIVER, f"{script}.py", str(root), json.dumps(runs))
    told = json.loads(done.stdout)
    assert told["opened"] == [] and told["left"] == TYPED
    assert not marker.exists()
    for name, (code, out, err) in zip(models, told["results"], strict=True):
        assert "Traceback" not in err and not {"\x1b", "\x9b"} & {*err, *out}, name
        assert code == (0 if name in ANSWERED else 2), (name, err)
        lines = [line for line in err.splitlines() if line.startswith("error: ")]
        assert len(lines) == (name not in ANSWERED), (name, err)


def python(*arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, input=TYPED,
                          capture_output=True, encoding="utf-8")  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done


def test_a_console_takes_what_is_typed_as_questions(models, marker):
    """Not as an answer to whether the folder's code may run."""
    done = python("prompt_mamba.py", *models["known"], "--json", "--max_new_tokens", "1")
    asked = [json.loads(line)["question"] for line in done.stdout.splitlines()]
    assert asked == TYPED.split() and not marker.exists()


def test_the_traps_are_armed(models, marker):
    torch.load(Path(models["pickle"][0]) / "pytorch_model.bin", weights_only=False)
    assert marker.exists()
    marker.rmdir()
    exec((Path(models["known"][0]) / "evil.py").read_text(), {})
    assert marker.exists()
    marker.rmdir()
