"""Whatever kills an evaluation, running it again ends in the file of a run that nothing disturbed;
and so do several processes."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest

import eval_mamba_with_context
from context_qa.results.reading import read_results
from context_qa.results.summary import read_summary, summary_path

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[1]
SETTINGS = ("--max_new_tokens", "12", "--max_batch_tokens", "400", "--negatives", "random")
KILLS = [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 21))]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Demo questions, some of them twice, as in dev-v1.1."""
    lines = (ROOT / "data/demo/validation.jsonl").read_text("utf-8").splitlines(keepends=True)
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    path.write_text("".join([*lines[:240], *lines[200:210], *lines[:10]]), "utf-8")
    return path


def command(data: Path, results: Path) -> list[str]:
    return ["eval_mamba_with_context.py", "models/demo", str(data), str(results), *SETTINGS]


def start(*words: str) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, *words], cwd=ROOT, env=environment, **silent)


def finish(data: Path, results: Path) -> None:
    """Run the command in this process, to its end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(sys, "argv", command(data, results))
        eval_mamba_with_context.main(eval_mamba_with_context.parse_args())


def outcome(results: Path) -> tuple[list[dict], dict]:
    """All that must not depend on what happened on the way."""
    rows = [
        {k: v for k, v in row.items() if k not in ("time", "tokens_per_sec")}
        for row in read_results(str(results))
    ]
    summary = read_summary(results)
    kept = (
        "complete",
        "scores",
        "intervals",
        "abstention",
        "abstention_with_negatives",
        "settings",
    )
    return rows, {name: summary[name] for name in kept}


@pytest.fixture(scope="module")
def undisturbed(data, one_thread) -> Path:
    """Results of a run that nothing disturbed."""
    results = data.with_name("undisturbed.jsonl")
    finish(data, results)
    rows, summary = outcome(results)
    assert [row["idx"] for row in rows] == list(range(len(rows))) and summary["complete"]
    assert len(rows) > 400  # negatives included
    return results


@pytest.mark.parametrize("seed", KILLS)
def test_a_killed_run_resumes(data, tmp_path, undisturbed, seed):
    rng = random.Random(seed)
    results = tmp_path / "results.jsonl"
    whole = undisturbed.stat().st_size
    killed_at = sorted(rng.uniform(0, 0.9 * whole) for _ in range(rng.choice([1, 1, 2])))
    for size in killed_at:
        process = start(*command(data, results))
        while process.poll() is None and (not results.exists() or results.stat().st_size <= size):
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.02))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert read_summary(results)["complete"] is False
        lines = results.read_bytes().split(b"\n")
        assert all(json.loads(line)["context"] for line in lines[:-1])
        assert len(lines) > 1
    finish(data, results)
    assert outcome(results) == outcome(undisturbed)
    assert read_summary(results)["rows_of_earlier_runs"] >= len(lines) - 1


def test_a_line_torn_anywhere_is_answered_again(data, tmp_path, undisturbed):
    whole, summary = undisturbed.read_bytes(), summary_path(undisturbed).read_bytes()
    rng = random.Random(0)
    results = tmp_path / "results.jsonl"
    for cut in (1, rng.randrange(len(whole)), len(whole) - 1):
        results.write_bytes(whole[:cut])
        summary_path(results).write_bytes(summary)
        finish(data, results)
        assert outcome(results) == outcome(undisturbed)


def test_a_complete_run_is_only_read_again(data, undisturbed, monkeypatch):
    files = [undisturbed, summary_path(undisturbed)]
    before = [path.read_bytes() for path in files]
    monkeypatch.setattr("context_qa.evaluation.load_model_and_tokenizer", None)  # not needed
    finish(data, undisturbed)
    assert [path.read_bytes() for path in files] == before


def test_an_evaluation_ends_its_connections(data, undisturbed):
    with mock.patch("context_qa.evaluation.disconnect") as disconnecting:
        finish(data, undisturbed)
    disconnecting.assert_called_once_with()


def test_two_processes_write_the_file_of_one(data, tmp_path, undisturbed):
    results = tmp_path / "results.jsonl"
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    process = start(*launcher, *command(data, results))
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err.decode()[-3000:]
    assert outcome(results) == outcome(undisturbed)
    assert read_summary(results)["processes"] == 2
