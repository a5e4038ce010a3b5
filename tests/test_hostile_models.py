"""Models and tokenizers that try to run code or to read other files. With every script, no code
runs, standard input is not read, and the script answers or refuses in one line."""

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

# Runs every script on every model in one process: importing torch takes most of the time of a run.
DRIVER = """
import contextlib, io, json, os, runpy, sys, tempfile

_, root, runs_of_scripts = sys.argv
opened, found = [], {}
def watch(event, arguments):
    if event == "open" and str(arguments[0]).startswith(root) and str(arguments[0]).endswith(".py"):
        opened.append(str(arguments[0]))
    if event in ("os.system", "os.exec") or event == "subprocess.Popen" and arguments[0] != "git":
        opened.append(f"{event} {arguments}")
sys.addaudithook(watch)
for script, runs in json.loads(runs_of_scripts).items():
    opened, results = [], []
    for arguments in runs:
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
    found[script] = {"results": results, "opened": opened}
print(json.dumps({"scripts": found, "left": sys.stdin.read()}))
"""


class Evil:
    """Creates a folder when it is unpickled."""

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
    """The arguments for each model, by its name: MODEL, or MODEL and a tokenizer."""
    torch.manual_seed(0)
    model = MambaLM(MambaConfig(vocab_size=2156, d_model=16, n_layer=1, d_state=4))
    code = f"import os\nos.mkdir({str(marker)!r})\nclass Evil: pass\n"

    def make(name: str, tokenizer: bool = True) -> Path:
        """Save a model with code beside it, which every file that can do so refers to."""
        folder = root / name
        save_model(model, folder)
        shutil.copytree(TOKENIZER, folder, dirs_exist_ok=True)
        references = {"auto_map": dict.fromkeys(AUTO, "evil.Evil"), "trust_remote_code": True}
        references["auto_map"]["AutoTokenizer"] = ["evil.Evil", "evil.Evil"]
        references |= {
            "custom_generate": "evil.py",
            "custom_pipelines": {"x": {"impl": "evil.Evil"}},
        }
        for file in (*PROCESSORS, "tokenizer_config.json", "generation_config.json"):
            add(folder / file, **references, tokenizer_class="Evil", processor_class="Evil")
        add(folder / "config.json", auto_map=references["auto_map"], tokenizer_class="Evil")
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
    found["words"] = make("words")  # its tokenizer has no newline and few words
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
    weight_map = dict.fromkeys(weights, "../secret.safetensors")
    add(found["index"] / "model.safetensors.index.json", weight_map=weight_map)
    given = {name: (str(folder),) for name, folder in found.items()}
    typeless = root / "typeless"  # a tokenizer's folder whose class only its code defines
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
ANSWERED = {"known", "words"}  # all others are refused


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


@pytest.fixture(scope="module")
def outcome(models, root, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("outputs")
    runs = {
        f"{script}.py": [arguments(script, name, model, folder) for name, model in models.items()]
        for script in SCRIPTS
    }
    return json.loads(python("-c", DRIVER, str(root), json.dumps(runs)).stdout)


def test_no_code_runs_and_nothing_is_read_from_standard_input(outcome, marker):
    assert outcome["left"] == TYPED
    assert not marker.exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_answers_or_refuses_every_model(script, models, outcome):
    found = outcome["scripts"][f"{script}.py"]
    assert found["opened"] == []
    for name, (code, out, err) in zip(models, found["results"], strict=True):
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


def test_a_console_reads_its_input_as_questions(models, marker):
    """It is not the answer to whether the folder's code may run."""
    done = python("prompt_mamba.py", *models["known"], "--json", "--max_new_tokens", "1")
    asked = [json.loads(line)["question"] for line in done.stdout.splitlines()]
    assert asked == TYPED.split() and not marker.exists()


def test_the_code_of_the_models_would_create_the_marker(models, marker):
    torch.load(Path(models["pickle"][0]) / "pytorch_model.bin", weights_only=False)
    assert marker.exists()
    marker.rmdir()
    exec((Path(models["known"][0]) / "evil.py").read_text(), {})
    assert marker.exists()
    marker.rmdir()
