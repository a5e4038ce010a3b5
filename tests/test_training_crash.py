"""Whatever interrupts a training run, the same command resumes it, to the weights of a run that
nothing interrupted."""

import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train_mamba_with_context
from common.atomic_files import try_lock
from common.errors import UserError
from context_qa.training import train as training
from mamba_lm.checkpoint import load_tokenizer
from mamba_lm.training.checkpoints import find_damage, list_checkpoints
from mamba_lm.training.prefix_suffix import PrefixSuffixLM
from mamba_lm.training.trainer import PrefixSuffixTrainer

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[1]
KILLS = [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 11))]
STEPS = 30  # of two epochs and a half
HANGS = 900  # seconds, however slow the machine is
# Sends itself a signal the moment before it touches a file for the n-th time whose path has a text
# in it; says at its end how often it did.
SIGNALLED = """
import atexit, os, runpy, sys
sent, number, text = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
touched = 0
def count(event, args):
    global touched
    if event in ("open", "os.mkdir", "os.remove", "os.rename", "os.rmdir") and text in str(args[0]):
        touched += 1
        if touched == number:
            os.kill(os.getpid(), sent)
atexit.register(lambda: print("touched", touched, file=sys.stderr))
sys.addaudithook(count)
sys.argv = sys.argv[4:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
TINY = {"d_model": 64, "n_layer": 2, "vocab_size": 2156, "ssm_cfg": {"d_state": 4}}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """A folder with a tiny model's config, and demo data to train on and to score."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "tiny.json").write_text(json.dumps(TINY))
    for name, count in (("train", 150), ("validation", 12)):
        lines = (ROOT / f"data/demo/{name}.jsonl").read_text("utf-8").splitlines(keepends=True)
        (folder / f"{name}.jsonl").write_text("".join(lines[:count]), "utf-8")
    return folder


def command(inputs: Path, output: Path, *more: str) -> list[str]:
    settings = {"save_steps": 4, "eval_strategy": "steps", "eval_steps": 4, "logging_steps": 1}
    return [
        *("train_mamba_with_context.py", "--model", str(inputs / "tiny.json")),
        *("--data_path", str(inputs / "train.jsonl"), "--tokenizer", "data/demo/tokenizer"),
        *("--eval_data", str(inputs / "validation.jsonl"), "--output", str(output)),
        *("--max_steps", str(STEPS), "--learning_rate", "1e-2", "--batch_size", "8"),
        *("--gradient_accumulation_steps", "2", "--patience", "99"),
        *(word for pair in settings.items() for word in ("--trainer", "{}={}".format(*pair))),
        *more,
    ]


def run_apart(*words: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, timeout=HANGS,
                          capture_output=True, text=True)  # fmt: skip


def signalled(sent: int, number: int, text: str, words: list[str]) -> subprocess.CompletedProcess:
    return run_apart("-c", SIGNALLED, str(int(sent)), str(number), text, *words)


def finish(inputs: Path, output: Path, *more: str) -> None:
    """Run the command in this process, to its end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(sys, "argv", command(inputs, output, *more))
        train_mamba_with_context.main(train_mamba_with_context.parse_args())


def finish_apart(inputs: Path, output: Path) -> int:
    """Run it in a process of its own, as those are that are cut off; how often it touched a file of
    the output folder."""
    run = signalled(0, 0, str(output), command(inputs, output))
    assert run.returncode == 0, run.stderr
    return int(re.search(r"touched (\d+)", run.stderr)[1])


def outcome(output: Path) -> tuple[bytes, list[dict], dict]:
    """All that must not depend on what happened on the way."""
    log = [json.loads(line) for line in (output / "training_log.jsonl").read_text().splitlines()]
    timed = ("examples_per_second", "tokens_per_second")
    rows = [{k: v for k, v in row.items() if k not in timed} for row in log]
    record = json.loads((output / "training_args.json").read_text())
    kept = {name: record[name] for name in ("settings", "complete", "steps", "data", "scores")}
    return (output / "model.safetensors").read_bytes(), rows, kept


@pytest.fixture(scope="module")
def undisturbed(inputs, one_thread) -> Path:
    output = inputs / "undisturbed"
    finish(inputs, output)
    _, rows, record = outcome(output)
    assert record["complete"] and record["steps"] == STEPS
    assert [row["step"] for row in rows if "loss" in row] == [*range(1, STEPS + 1)]
    assert len([row for row in rows if "eval_f1" in row]) == 8  # the last step's too
    return output


@pytest.fixture(scope="module")
def undisturbed_apart(inputs) -> tuple[Path, int]:
    """Its folder, and how often it touched a file of it."""
    output = inputs / "undisturbed apart"
    return output, finish_apart(inputs, output)


@pytest.mark.parametrize("seed", KILLS)
def test_a_killed_run_resumes(inputs, undisturbed_apart, tmp_path, seed):
    """Wherever it is: between steps, in a checkpoint that is half written, at the model's card."""
    rng = random.Random(seed)
    output = tmp_path / "run"
    undisturbed, touched = undisturbed_apart
    kills = rng.choice([1, 1, 2])
    for _ in range(kills):
        number = rng.randint(1, touched // kills**2)  # what a resumed run still has to do
        run = signalled(signal.SIGKILL, number, str(output), command(inputs, output))
        assert run.returncode == -signal.SIGKILL, run.stderr
        if (output / "training_args.json").exists():
            assert json.loads((output / "training_args.json").read_text())["complete"] is False
        assert all(find_damage(checkpoint) is None for checkpoint in list_checkpoints(output))
    finish_apart(inputs, output)
    assert outcome(output) == outcome(undisturbed)
    assert not list(output.glob(".*"))


@pytest.mark.parametrize(
    "sent, code",
    [
        (signal.SIGTERM, 143),
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, 129, marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_a_checkpoint(inputs, undisturbed_apart, tmp_path, sent, code):
    output = tmp_path / "run"
    # The log's seventh line, between two checkpoints.
    run = signalled(sent, 8, "training_log.jsonl", command(inputs, output))
    assert run.returncode == code, run.stderr
    assert "Traceback" not in run.stderr
    newest = list_checkpoints(output)[0]
    last = json.loads((output / "training_log.jsonl").read_text().splitlines()[-1])
    assert newest.name == f"checkpoint-{last['step']}" and last["step"] % 4 and last["step"] < STEPS
    assert find_damage(newest) is None
    finish_apart(inputs, output)
    assert outcome(output) == outcome(undisturbed_apart[0])


def test_a_complete_run_is_left_alone(inputs, undisturbed, capsys, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*")}
    finish(inputs, undisturbed)
    assert "this run is complete" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*")} == before


def test_a_run_killed_before_its_model_was_written_needs_no_further_step(
    inputs, undisturbed, tmp_path, monkeypatch
):
    output = tmp_path / "run"
    save_model = PrefixSuffixTrainer.save_model

    def interrupted(self, output_dir=None, _internal_call=False):
        if not _internal_call:
            raise KeyboardInterrupt
        save_model(self, output_dir, _internal_call)

    with monkeypatch.context() as patch:
        patch.setattr(PrefixSuffixTrainer, "save_model", interrupted)
        with pytest.raises(KeyboardInterrupt):
            finish(inputs, output)
    assert not (output / "model.safetensors").exists()
    monkeypatch.setattr(PrefixSuffixTrainer, "training_step", None)
    finish(inputs, output)
    assert outcome(output) == outcome(undisturbed)


def test_a_damaged_checkpoint_is_skipped(inputs, undisturbed, tmp_path, capsys):
    """Truncated weights in the newest: the run resumes from the one before."""
    output = tmp_path / "run"
    shutil.copytree(undisturbed, output)
    record = json.loads((output / "training_args.json").read_text())
    (output / "training_args.json").write_text(json.dumps(record | {"complete": False}))
    newest, before = list_checkpoints(output)
    weights = newest / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 1)
    finish(inputs, output)
    said = capsys.readouterr()
    assert f"warning: {newest} is skipped: model.safetensors has" in said.err
    assert f"resuming from {before}" in said.out
    assert find_damage(newest) is None, "written again"
    assert outcome(output) == outcome(undisturbed)


@pytest.mark.parametrize(
    "flag, value, said",
    [
        ("--learning_rate", "2e-2", "learning rate: 0.01 there, 0.02 now"),
        ("--seed", "1", "seed: 0 there, 1 now"),
        ("--eval_data", "data/demo/handwritten.jsonl", "eval data: "),
        ("--trainer", "weight_decay=0", "trainer: "),
    ],
)
def test_another_run_is_refused(flag, value, said, inputs, undisturbed):
    with pytest.raises(UserError, match=f"contains another run .*{said}.*set overwrite") as caught:
        finish(inputs, undisturbed, flag, value)
    assert "\n" not in str(caught.value)


def test_overwrite_restarts_and_keeps_other_files(inputs, undisturbed, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(undisturbed, output)
    (output / "notes.txt").write_text("mine")
    finish(inputs, output, "--overwrite", "--seed", "1", "--max_steps", "8")
    weights, rows, record = outcome(output)
    assert record["settings"]["seed"] == 1 and record["steps"] == 8
    assert weights != outcome(undisturbed)[0] and rows[0]["step"] == 1
    assert {path.name for path in output.glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-8"}
    assert (output / "notes.txt").read_text() == "mine"


def test_a_folder_of_other_things_is_refused(inputs, tmp_path):
    (tmp_path / "README.md").write_text("a project")
    for more in ([], ["--overwrite"]):
        with pytest.raises(UserError, match=r"contains other things \(README.md\)"):
            finish(inputs, tmp_path, *more)
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_two_runs_do_not_share_a_folder(inputs, undisturbed):
    lock = os.open(undisturbed, os.O_RDONLY)
    assert try_lock(lock)
    try:
        with pytest.raises(UserError, match="another run is writing it"):
            finish(inputs, undisturbed)
    finally:
        os.close(lock)


def test_a_full_disk_keeps_the_checkpoint_before(inputs, undisturbed, tmp_path, monkeypatch):
    output = tmp_path / "run"
    save = torch.save
    left = [7]  # two checkpoints of three such files, and one more file

    def full(*args):
        left[0] -= 1
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if left[0] < 0:
            resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
        try:
            save(*args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(UserError, match=r"checkpoint-12: cannot be written \(") as caught:
            finish(inputs, output)
    [newest, _] = list_checkpoints(output)
    assert f"the last good checkpoint is {newest}" in str(caught.value)
    assert find_damage(newest) is None and not list(output.glob(".*"))
    finish(inputs, output)
    assert outcome(output) == outcome(undisturbed)


def test_a_poisoned_example_stops_the_run(inputs, tmp_path, monkeypatch, capsys):
    """One question alone holds a token, and where that is read the loss is no number."""
    rows = [json.loads(line) for line in (inputs / "train.jsonl").read_text("utf-8").splitlines()]
    rows = [row | {"id": f"row-{number}"} for number, row in enumerate(rows)]
    rows[77]["prompt"] = "Wh#?"
    data, output = tmp_path / "data.jsonl", tmp_path / "run"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    token = load_tokenizer("data/demo/tokenizer").convert_tokens_to_ids("#")
    token_losses = PrefixSuffixLM.token_losses

    def poisoned(self, suffixes, **batch):
        losses, rows = token_losses(self, suffixes=suffixes, **batch)
        return losses / (suffixes != token).all(), rows

    monkeypatch.setattr(PrefixSuffixLM, "token_losses", poisoned)
    with pytest.raises(UserError, match="the loss became inf at step ") as caught:
        finish(inputs, output, "--data_path", str(data), "--seed", "3")
    assert capsys.readouterr().err.endswith("\n"), "what is said of it does not follow the bar"
    step = int(re.search(r"at step (\d+)", str(caught.value))[1])
    named = re.search(r"on the examples (.*?);", str(caught.value))[1].split(", ")
    assert "row-77" in named and len(named) <= 8, "of that batch alone"
    newest = list_checkpoints(output)[0]
    assert step - 4 <= int(newest.name.split("-")[1]) < step
    assert str(caught.value).endswith(f"the last good checkpoint is {newest}")
    assert not (output / "model.safetensors").exists()


@pytest.mark.parametrize("at", [4, 16, STEPS])
def test_a_signal_while_answers_are_scored_saves_a_checkpoint(
    at, inputs, undisturbed, tmp_path, monkeypatch
):
    """What was to be scored then is scored when the run resumes; also at its end."""
    output = tmp_path / "run"
    score = training.make_scorer
    steps = iter(range(4, 99, 4))

    def stopping_scorer(*args, **kwargs):
        def stopping(model, poll):
            if next(steps) >= at:
                signal.raise_signal(signal.SIGINT)
            return score(*args, **kwargs)(model)

        return stopping

    with monkeypatch.context() as patch:
        patch.setattr(training, "make_scorer", stopping_scorer)
        with pytest.raises(KeyboardInterrupt):
            finish(inputs, output)
    assert list_checkpoints(output)[0].name == f"checkpoint-{at}"
    assert not (output / "model.safetensors").exists()
    finish(inputs, output)
    assert outcome(output) == outcome(undisturbed)
