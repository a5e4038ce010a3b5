"""What scripts do before they import anything heavy: help, usage errors, wrong paths and values."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from common.errors import UserError

ROOT = Path(__file__).parents[1]
HEAVY = {
    *("torch", "transformers", "datasets", "accelerate", "safetensors", "numba", "pandas", "scipy"),
    *("matplotlib", "duckdb", "prompt_toolkit"),
}
MODEL, DATA = "models/demo", "data/demo/validation.jsonl"
TRAIN = ("--data_path", DATA, "--output", "{}/new", "--model")
TYPOS = {  # arguments of which one is a wrong path, and the end of the error message
    "prompt_mamba": [
        (["models/dmeo"], "models/dmeo"),
        ([MODEL, "--tokenizer", "data/demo/tokenzier"], "data/demo/tokenzier"),
        ([MODEL, "--shots", "{}/nope"], "nope"),
    ],
    "prompt_mamba_with_context": [
        (["models/dmeo"], "models/dmeo"),
        ([MODEL, "--context_file", "{}/nope"], "nope"),
    ],
    "eval_n_shot_mamba": [
        (["models/dmeo", DATA, "{}/out.jsonl"], "models/dmeo"),
        ([MODEL, "{}/nope", "{}/out.jsonl"], "nope"),
        ([MODEL, DATA, "{}/file/out.jsonl"], "file/out.jsonl: cannot be written"),
    ],
    "eval_mamba_with_context": [
        (["models/dmeo", DATA, "{}/out.jsonl"], "models/dmeo"),
        ([MODEL, "{}/nope", "{}/out.jsonl"], "nope"),
        ([MODEL, DATA, "{}/file/out.jsonl"], "file/out.jsonl: cannot be written"),
        ([MODEL, DATA, "{}/out.jsonl", "--tune_on", "{}/nope"], "nope"),
        ([MODEL, DATA, "{}/out.jsonl", "--tokenizer", "data/demo/tokenzier"], "tokenzier"),
    ],
    "train_mamba_with_context": [
        ([*TRAIN, "models/dmeo"], "models/dmeo"),
        ([*TRAIN, "models/configs/nope.json"], "nope.json"),
        ([*TRAIN, MODEL, "--data_path", "{}/nope"], "nope"),
        ([*TRAIN, MODEL, "--eval_data", "{}/nope"], "nope"),
        ([*TRAIN, MODEL, "--output", "{}/file/new"], "file/new: cannot be written"),
        ([*TRAIN, MODEL, "--tokenizer", "data/demo/tokenzier"], "tokenzier"),
    ],
    "compare_results": [(["{}/nope", "{}/file"], "nope")],
    "report_results": [(["{}/nope"], "nope")],
    "data.prepare_squad": [(["{}/nope", "{}/out"], "nope")],
    "data.make_recall": [(["{}/nope", "{}/out"], "nope")],
    "data.make_negatives": [(["{}/nope", "{}/out"], "nope")],
}
HUGE = "9" * 30
EVALUATE = [MODEL, DATA, "out.jsonl"]
OUT_OF_RANGE = [
    *(("eval_mamba_with_context", [*EVALUATE, "--max_new_tokens", n]) for n in (HUGE, "0")),
    ("eval_mamba_with_context", [*EVALUATE, "--max_batch_tokens", HUGE]),
    ("eval_mamba_with_context", [*EVALUATE, "--limit", HUGE]),
    ("eval_mamba_with_context", [*EVALUATE, "--limit", "9" * 5000]),
    ("eval_mamba_with_context", [*EVALUATE, "--no_answer_threshold", "nan"]),
    ("prompt_mamba", [MODEL, "--temperature", "1e-320"]),
    ("prompt_mamba", [MODEL, "--temperature", "1e300"]),
    ("prompt_mamba", [MODEL, "--temperature", "nan"]),
    ("prompt_mamba", [MODEL, "--top_k", HUGE]),
    ("prompt_mamba", [MODEL, "--seed", HUGE]),
    ("prompt_mamba", [MODEL, "--question", " "]),
    *(
        ("train_mamba_with_context", [*TRAIN, MODEL, f"--{name}", value])
        for name, value in [
            *(("batch_size", HUGE), ("gradient_accumulation_steps", HUGE), ("seed", "-1")),
            *(("num_epochs", "1e300"), ("num_epochs", "nan"), ("learning_rate", "1e39")),
            *(("max_length", HUGE), ("max_steps", HUGE), ("negative_ratio", "1e300")),
            ("patience", HUGE),
        ]
    ),
    ("data.prepare_squad", [DATA, "out.jsonl", "--limit", "0"]),
    ("data.prepare_squad", [DATA, "out.jsonl", "--limit", HUGE]),
    ("data.make_recall", ["README.md", "out.jsonl", "--seed", HUGE]),
    ("data.make_negatives", [DATA, "out.jsonl", "--seed", HUGE]),
]
EMPTY = {  # arguments of which one is empty
    "prompt_mamba": [[""], [MODEL, "--shots", ""], [MODEL, "--tokenizer", ""]],
    "prompt_mamba_with_context": [[""], [MODEL, "--context_file", ""], [MODEL, "--question", ""]],
    "eval_n_shot_mamba": [[MODEL, DATA, ""], ["", DATA, "{}/out.jsonl"]],
    "eval_mamba_with_context": [
        *([MODEL, DATA, ""], [MODEL, "", "{}/out.jsonl"]),
        [MODEL, DATA, "{}/out.jsonl", "--tune_on", ""],
    ],
    "train_mamba_with_context": [
        *([*TRAIN, ""], [*TRAIN, MODEL, "--eval_data", ""], [*TRAIN, MODEL, "--trainer", ""]),
    ],
    "compare_results": [["", ""]],
    "report_results": [[""], ["{}/results.jsonl", "--output", ""]],
    "query_results": [["", "SELECT 1"], ["{}/results.jsonl", "", "SELECT 1"], [DATA, ""]],
    "data.prepare_squad": [[DATA, "{}/out.jsonl", "--ids", ""], [DATA, ""]],
    "data.make_recall": [["README.md", ""]],
    "data.make_negatives": [[DATA, "{}/out.jsonl", "--contexts", ""]],
}
SCRIPTS = [*TYPOS, "query_results"]
HELP, USAGE = ["--help"], ["--no_such_flag"]

# Runs a script once for each list of arguments, in one process: a process for each would take most
# of the time of these tests. Modules are those imported up to the end of a run.
DRIVER = """
import json, os, runpy, sys, tempfile
script, cases = sys.argv[1], json.loads(sys.argv[2])
outcomes, shown = [], os.dup(1)
for arguments in cases:
    files = [tempfile.TemporaryFile("w+", encoding="utf-8") for _ in (1, 2)]
    for descriptor, file in enumerate(files, start=1):
        os.dup2(file.fileno(), descriptor)
    sys.argv, code = [script, *arguments], 0
    try:
        runpy.run_module(script, run_name="__main__", alter_sys=True)
    except SystemExit as error:
        code = error.code or 0
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    texts = [file.seek(0) or file.read() for file in files]
    outcomes.append([code, *texts, sorted(sys.modules)])
with open(shown, "w") as file:
    json.dump(outcomes, file)
"""


class Outcome(NamedTuple):
    code: int
    out: str
    err: str
    modules: list[str]
    folder: Path  # in place of {} in the arguments


def run_cases(script: str, cases: list[list[str]], make_folder) -> list[Outcome]:
    folders = [make_folder() for _ in cases]
    filled = [
        [argument.replace("{}", str(folder)) for argument in arguments]
        for arguments, folder in zip(cases, folders, strict=True)
    ]
    process = subprocess.run(
        [sys.executable, "-c", DRIVER, script, json.dumps(filled)],
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    outcomes = json.loads(process.stdout)
    return [Outcome(*found, folder) for found, folder in zip(outcomes, folders, strict=True)]


def assert_refused(outcome: Outcome, message: str) -> None:
    """One line on standard error, exit code 2, nothing heavy imported and nothing written."""
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("error: ") and outcome.err.count("\n") == 1
    assert message in outcome.err
    assert not {*outcome.modules} & HEAVY
    assert [path.name for path in outcome.folder.iterdir()] == ["file"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return the outcome of a script with arguments; all its cases are run the first time."""
    outcomes = {}

    def make_folder() -> Path:
        folder = tmp_path_factory.mktemp("folder")
        (folder / "file").touch()
        return folder

    def find(script: str, arguments: list[str]) -> Outcome:
        if script not in outcomes:
            cases = [HELP, USAGE, *(case for case, _ in TYPOS.get(script, ())), *EMPTY[script]]
            cases += [case for name, case in OUT_OF_RANGE if name == script]
            found = run_cases(script, cases, make_folder)
            outcomes[script] = list(zip(cases, found, strict=True))
        return next(outcome for case, outcome in outcomes[script] if case == arguments)

    return find


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_imports_nothing_heavy(script, run):
    outcome = run(script, HELP)
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.startswith("usage: ")
    assert not {*outcome.modules} & HEAVY


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_usage_error_is_one_line(script, run):
    assert_refused(run(script, USAGE), "--help")


@pytest.mark.parametrize(
    "script, arguments, message",
    [(script, *typo) for script, typos in TYPOS.items() for typo in typos],
)
def test_a_wrong_path_is_reported_before_anything_heavy_is_imported(
    script, arguments, message, run
):
    assert_refused(run(script, arguments), message)


@pytest.mark.parametrize("script, arguments", OUT_OF_RANGE)
def test_values_out_of_range_are_refused(script, arguments, run):
    outcome = run(script, arguments)
    assert_refused(outcome, arguments[-2])
    assert len(outcome.err) < 200


@pytest.mark.parametrize(
    "script, arguments", [(script, case) for script, cases in EMPTY.items() for case in cases]
)
def test_an_empty_argument_is_refused(script, arguments, run):
    assert_refused(run(script, arguments), "is empty; ")


LATE = """
import json, sys
import {script} as script
{block}
before = set(sys.modules)
sys.argv = ["x", *json.loads(sys.argv[1])]
script.main(script.parse_args())
print(json.dumps(sorted(set(sys.modules) - before)))
"""
EVALUATION = "from context_qa.evaluation import evaluate"


@pytest.mark.parametrize(
    "script, block, arguments",
    [
        ("eval_mamba_with_context", EVALUATION, [MODEL, DATA, "{}/out.jsonl", "--limit", "2"]),
        pytest.param(
            "train_mamba_with_context",
            "from context_qa.training.train import train",
            [*TRAIN, MODEL, "--max_steps", "1", "--eval_data", DATA],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_nothing_heavy_is_imported_during_a_run(script, block, arguments, tmp_path):
    """A signal is handled only after an import has ended."""
    arguments = [argument.replace("{}", str(tmp_path)) for argument in arguments]
    process = subprocess.run(
        [sys.executable, "-c", LATE.format(script=script, block=block), json.dumps(arguments)],
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    late = json.loads(process.stdout.splitlines()[-1])
    assert len([name for name in late if name.startswith(("torch.", "transformers."))]) < 50


def test_loading_a_model_does_not_import_the_compiler_of_torch():
    """It would take a third of the time in which a console starts."""
    code = (
        "import sys; from mamba_lm.checkpoint import load_model_and_tokenizer as load; "
        f"load({MODEL!r}); print({{'torch._dynamo', 'sympy'}} & {{*sys.modules}})"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("set()\n", "")


def test_a_folder_as_results_file_is_refused(tmp_path):
    evaluate = [["sliding-window", DATA, output, "--limit", "1"] for output in ("/", "results/")]
    for outcome in run_cases("eval_mamba_with_context", evaluate, lambda: tmp_path):
        assert (outcome.code, outcome.out) == (2, "")
        assert outcome.err.startswith("error: ") and outcome.err.count("\n") == 1
        assert "cannot be written (not a plain file)" in outcome.err


@pytest.mark.parametrize("workers", ["-1", "65", "999999"])
def test_an_unusable_number_of_workers_is_refused(workers, tmp_path):
    import torch

    from mamba_lm.training.arguments import training_arguments

    with pytest.raises(UserError, match=f"dataloader_num_workers={workers}: give 0 to 64"):
        settings = [f"dataloader_num_workers={workers}"]
        training_arguments(str(tmp_path), torch.device("cpu"), settings)


def test_workers_without_shared_memory_are_refused(tmp_path, monkeypatch):
    import multiprocessing

    from context_qa.training import TrainingSettings
    from context_qa.training.train import make_arguments
    from train_mamba_with_context import parse_args

    def no_semaphore():
        raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))

    monkeypatch.setattr(multiprocessing, "Lock", no_semaphore)
    arguments = ["--model", MODEL, "--data_path", DATA, "--output", str(tmp_path / "new")]
    arguments += ["--trainer", "use_cpu=true", "--trainer"]
    monkeypatch.setattr(sys, "argv", ["x", *arguments, "dataloader_num_workers=2"])
    with pytest.raises(UserError, match=r"dataloader_num_workers: .*No such file"):
        make_arguments(TrainingSettings(**vars(parse_args())))
    monkeypatch.setattr(sys, "argv", ["x", *arguments, "dataloader_num_workers=0"])
    assert make_arguments(TrainingSettings(**vars(parse_args()))).dataloader_num_workers == 0
