"""What every script does before its work: help, usage and a wrong path are told at once."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import UserError

ROOT = Path(__file__).parents[1]
HEAVY = {
    *("torch", "transformers", "datasets", "accelerate", "safetensors", "numba", "pandas", "scipy"),
    *("matplotlib", "duckdb", "prompt_toolkit"),
}
MODEL, DATA = "models/demo", "data/demo/validation.jsonl"
TRAIN = ("--data_path", DATA, "--output", "{}/new", "--model")
TYPOS = {  # arguments of which one is a path that is not there, the last word of the complaint
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
SCRIPTS = [*TYPOS, "query_results"]
WATCHED = """
import atexit, json, os, runpy, sys
sys.argv = json.loads(sys.argv[1])
noted = os.dup(2)
atexit.register(lambda: os.write(noted, ("\\n" + json.dumps(sorted(sys.modules))).encode()))
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def run_watched(script: str, *arguments: str) -> tuple[int, str, str, set[str]]:
    """Run a script; its exit code, what it printed, and the packages that it has imported."""
    process = subprocess.run(
        [sys.executable, "-c", WATCHED, json.dumps([script, *arguments])],
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    err, modules = process.stderr.rsplit("\n", maxsplit=1)
    return process.returncode, process.stdout, err, set(json.loads(modules))


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_imports_nothing_heavy(script):
    code, out, err, modules = run_watched(script, "--help")
    assert (code, err) == (0, "")
    assert out.startswith("usage: ")
    assert not modules & HEAVY


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_usage_error_is_one_line(script):
    code, out, err, modules = run_watched(script, "--no_such_flag")
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and "--help" in err
    assert not modules & HEAVY


@pytest.mark.parametrize(
    "script, arguments, complaint",
    [(script, *typo) for script, typos in TYPOS.items() for typo in typos],
)
def test_a_wrong_path_is_told_before_anything_heavy_is_imported(
    script, arguments, complaint, tmp_path
):
    (tmp_path / "file").touch()
    arguments = [argument.replace("{}", str(tmp_path)) for argument in arguments]
    code, out, err, modules = run_watched(script, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and complaint in err
    assert not modules & HEAVY
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


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
def test_nothing_that_takes_long_is_imported_during_a_run(script, block, arguments, tmp_path):
    """A signal waits until an import has ended."""
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


HUGE = "9" * 30
EVALUATE = [MODEL, DATA, "out.jsonl"]


@pytest.mark.parametrize(
    "script, arguments",
    [
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
    ],
)
def test_flags_out_of_range_are_refused(script, arguments):
    code, out, err, modules = run_watched(script, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and len(err) < 200
    assert arguments[-2] in err
    assert not modules & HEAVY


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


@pytest.mark.parametrize(
    "script, arguments", [(script, case) for script, cases in EMPTY.items() for case in cases]
)
def test_an_empty_argument_is_refused(script, arguments, tmp_path):
    arguments = [argument.replace("{}", str(tmp_path)) for argument in arguments]
    code, out, err, modules = run_watched(script, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and "is empty; " in err
    assert not modules & HEAVY and not any(tmp_path.iterdir())


@pytest.mark.parametrize("output", ["/", "results/"])
def test_a_folder_where_results_are_to_be_is_refused(output):
    evaluate = ["eval_mamba_with_context.py", "sliding-window", DATA, output, "--limit", "1"]
    process = subprocess.run([sys.executable, *evaluate], cwd=ROOT, capture_output=True, text=True)
    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr.startswith("error: ") and process.stderr.count("\n") == 1
    assert "cannot be written (not a plain file)" in process.stderr


@pytest.mark.parametrize("workers", ["-1", "65", "999999"])
def test_workers_that_no_machine_has_are_refused(workers, tmp_path):
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
