"""What is shown and written of a training run, and which model it keeps."""

import contextlib
import itertools
import json
import math
import re
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import matplotlib.image
import pexpect
import pyte
import pytest
import torch
import tqdm.std

from common.errors import UserError
from mamba_lm.models.mamba import MambaConfig, MambaLM
from mamba_lm.training import trainer as training
from mamba_lm.training.arguments import training_arguments
from mamba_lm.training.checkpoints import list_checkpoints
from mamba_lm.training.prefix_suffix import Item
from mamba_lm.training.progress import LOG, PLOT, plot
from mamba_lm.training.trainer import PrefixSuffixTrainer

BATCHES = [[Item.with_target([1, 2, 3], [4], [5 + i, 6], f"{i}")] * 4 for i in range(12)]


SCORES = {"exact_match": 12.5, "f1": 50.0, "loss": 1.234}
ROOT = Path(__file__).parents[3]


class Batches(list):
    """A sampler of batches."""


def trainer(output, score=None, batches=BATCHES, patience=2, **settings) -> PrefixSuffixTrainer:
    torch.manual_seed(0)
    model = MambaLM(MambaConfig(vocab_size=31, d_model=16, n_layer=1, d_state=4))
    if score is not None:
        settings = {
            "eval_strategy": "steps",
            "eval_steps": 4,
            "metric_for_best_model": "f1",
        } | settings
    settings = {
        "num_train_epochs": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.01,
    } | settings
    keeps_best = settings.pop("load_best_model_at_end", "true")
    arguments = training_arguments(
        str(output), torch.device("cpu"), [f"load_best_model_at_end={keeps_best}"], **settings
    )
    return PrefixSuffixTrainer(model, arguments, Batches(batches), lambda e: e, None, score,
                               patience)  # fmt: skip


def read_log(output) -> list[dict]:
    return [json.loads(line) for line in (output / LOG).read_text().splitlines()]


def test_the_log_has_loss_speed_and_scores(tmp_path):
    scores = iter([10.0, 30.0, 20.0])
    run = trainer(tmp_path, lambda model, poll: {"f1": next(scores)}, logging_steps=3)
    run.train()
    rows = read_log(tmp_path)
    assert [row["step"] for row in rows if "loss" in row] == [1, 3, 6, 9, 12]
    assert [(row["step"], row["eval_f1"]) for row in rows if "eval_f1" in row] == [
        (4, 10.0), (8, 30.0), (12, 20.0)
    ]  # fmt: skip
    for row in rows:
        if "loss" in row:
            assert row["loss"] > 0 and row["grad_norm"] > 0 and row["learning_rate"] >= 0
            # Four examples a step, that read one prefix of three tokens and two tokens each.
            assert row["tokens_per_second"] / row["examples_per_second"] == pytest.approx(11 / 4)
    picture = matplotlib.image.imread(tmp_path / PLOT)
    assert picture.shape[1] > 500 and picture.std() > 0.05


def test_speed_is_that_of_training_alone(tmp_path, monkeypatch):
    """Four examples every two seconds, however long it takes to begin and to evaluate."""
    now = [0.0]
    monkeypatch.setattr(training, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def score(model, poll):
        now[0] += 100.0
        return {"f1": now[0]}

    run = trainer(tmp_path, score, logging_steps=3, max_steps=11)
    step = run.training_step

    def timed(*args, **kwargs):
        loss = step(*args, **kwargs)
        now[0] += 2.0
        return loss

    run.training_step = timed
    now[0] += 50.0
    run.train()
    rows = [row for row in read_log(tmp_path) if "loss" in row]
    assert [row["step"] for row in rows] == [1, 3, 6, 9, 11], "the last one too"
    assert {row["examples_per_second"] for row in rows} == {2.0}


def test_the_best_model_is_kept_and_patience_ends(tmp_path):
    """The scores fall from the second on: after two more of them it is enough."""
    weights = []
    scores = iter([(10.0, 5.0), (30.0, 4.0), (20.0, 3.0), (30.0, 4.5), (99.0, 1.0)])

    def score(model, poll):
        weights.append(model.lm_head.weight.detach().clone())
        return dict(zip(("f1", "loss"), next(scores), strict=True))

    run = trainer(tmp_path, score, batches=BATCHES * 4)
    run.train()
    assert run.state.global_step == 16 and run.state.best_global_step == 8
    assert torch.equal(run.language_model.lm_head.weight, weights[1])
    assert not torch.equal(weights[1], weights[3])
    assert {path.name for path in list_checkpoints(tmp_path)} == {"checkpoint-8", "checkpoint-16"}


@pytest.mark.parametrize(
    "metric, losses, best, end",
    [
        ("f1", [5.0, 4.0, 3.0, 2.0, 1.0, 0.5], 24, 24),
        ("f1", [5.0, 3.0, 4.0, 4.5, 1.0, 0.5], 8, 16),
        ("f1", [5.0, 5.0, 5.0, 4.0, 3.0, 2.0], 12, 12),  # equal evaluations are none better
        ("f1", [math.nan, 3.0, math.nan, 2.0, 4.0, 3.0], 16, 24),
        ("eval_loss", [5.0, 3.0, 4.0, 4.5, 1.0, 0.5], 8, 16),
        ("loss", [math.nan, 3.0, math.nan, 2.0, 4.0, 3.0], 16, 24),
    ],
)
def test_on_a_plateau_the_loss_decides(metric, losses, best, end, tmp_path):
    """The metric is 0 throughout, as that of a model that always abstains, or the loss itself; the
    same after a resume from each checkpoint."""
    found = iter(losses)

    def score(model, poll):
        return {"f1": 0.0, "loss": next(found)}

    settings = {"batches": BATCHES * 2, "save_total_limit": 9, "metric_for_best_model": metric}
    run = trainer(tmp_path, score, **settings)
    run.train()
    assert (run.kept_step, run.state.global_step) == (best, end)
    for checkpoint in list_checkpoints(tmp_path)[::2]:
        step = int(checkpoint.name.split("-")[1])
        found = iter(losses[step // 4 :])
        run = trainer(tmp_path, score, **settings)
        run.train(checkpoint)
        assert (run.kept_step, run.state.global_step) == (best, end)


def test_with_neither_score_nor_loss_better_the_last_model_is_kept(tmp_path):
    run = trainer(tmp_path, lambda model, poll: {"f1": 0.0, "loss": 1.0}, patience=9)
    run.train()
    assert run.kept_step == 12


@pytest.mark.parametrize("sent", [False, True])
@pytest.mark.parametrize("keeps_best", [False, True])
def test_the_newest_checkpoint_is_never_removed(keeps_best, sent, tmp_path, capsys):
    """By the Trainer's clean-up at the end of a run or of a part of it, with a limit of one."""
    scores = itertools.count(99.0, -1.0)
    run = trainer(tmp_path, lambda model, poll: {"f1": next(scores)}, patience=9,
                  save_total_limit=1, load_best_model_at_end=str(keeps_best).lower())  # fmt: skip
    step = run.training_step

    def interrupted(*args, **kwargs):
        if sent and run.state.global_step == 5:
            signal.raise_signal(signal.SIGINT)
        return step(*args, **kwargs)

    run.training_step = interrupted
    with pytest.raises(KeyboardInterrupt) if sent else contextlib.nullcontext():
        run.train()
    newest = "checkpoint-6" if sent else "checkpoint-12"
    assert [path.name for path in list_checkpoints(tmp_path)] == [newest, "checkpoint-4"]
    assert ("checkpoint-6 is saved" in capsys.readouterr().err) == sent


def test_a_signal_at_an_evaluation_saves_also_where_the_best_alone_is_saved(tmp_path):
    scores = itertools.count(99.0, -1.0)
    run = trainer(tmp_path, lambda model, poll: {"f1": next(scores)}, patience=9,
                  save_strategy="best", eval_steps=1)  # fmt: skip
    step = run.training_step

    def interrupted(*args, **kwargs):
        if run.state.global_step == 5:
            signal.raise_signal(signal.SIGINT)
        return step(*args, **kwargs)

    run.training_step = interrupted
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-6", "checkpoint-1"]


def test_a_run_that_resumes_from_another_has_its_own_patience(tmp_path):
    scores = itertools.count(99, -1)

    def falling(model, poll):
        return {"f1": next(scores)}

    trainer(tmp_path / "first", falling, batches=BATCHES * 4, max_steps=4).train()
    run = trainer(tmp_path / "second", falling, batches=BATCHES * 4, patience=1)
    run.train(tmp_path / "first/checkpoint-4")
    assert run.state.global_step == 8, "not after another two"


def test_the_bar_shows_progress_and_speed(tmp_path, capsys):
    run = trainer(tmp_path, lambda model, poll: SCORES, logging_steps=4)
    run.train()
    err = capsys.readouterr().err
    assert "12/12" in err and "loss " in err and " tokens/s]" in err
    assert "step 4: exact match 12.5, f1 50.0, loss 1.234" in err


@pytest.mark.parametrize("step_before", [0, 4])
def test_the_time_left_does_not_count_the_first_step(step_before, tmp_path, monkeypatch, capsys):
    """The first takes an hour, kernels are compiled; the others a minute each, and an evaluation,
    every fourth step, as much."""
    now = [1e6]

    def score(model, poll):
        now[0] += 60.0
        return {"f1": 1.0}

    if step_before:
        trainer(tmp_path / "before", score, max_steps=step_before).train()
    monkeypatch.setattr(tqdm.std, "time", lambda: now[0])
    run = trainer(tmp_path, score, patience=9, logging_steps=1)
    capsys.readouterr()
    training_step, first = run.training_step, step_before

    def timed(*args, **kwargs):
        now[0] += 3600.0 if run.state.global_step == first else 60.0
        return training_step(*args, **kwargs)

    run.training_step = timed
    run.train(tmp_path / f"before/checkpoint-{first}" if first else None)
    shown = re.findall(r"(\d+)/12 \[(\S+)<([^\s,\]]+)", capsys.readouterr().err)
    left = {int(step): left for step, _, left in shown}
    if step_before:
        assert left[5] == "?" and left[6] == "06:00" and left[7] == "05:00"
    else:
        assert left[1] == "?" and left[2] == "10:00" and left[3] == "09:00"
        assert left[6] == "07:12", "six steps and an evaluation in six minutes"


def test_a_bar_has_room_at_80_columns(tmp_path):
    """A line says which backend runs, and the bar is another one, wide enough to see it move."""
    program = (
        "import sys; from tests.mamba_lm.training.test_progress import BATCHES, trainer\n"
        "score = lambda model, poll: {'exact_match': 12.5, 'f1': 50.0, 'loss': 1.234}\n"
        "trainer(sys.argv[1], score, BATCHES * 200, max_steps=200, eval_steps=100).train()\n"
    )
    screen = pyte.HistoryScreen(80, 50, history=1000)
    stream = pyte.ByteStream(screen)
    process = pexpect.spawn(
        sys.executable, ["-c", program, str(tmp_path)], cwd=ROOT, dimensions=(50, 80), timeout=600
    )
    widest = ""
    while True:
        try:
            stream.feed(process.read_nonblocking(4096, timeout=600))
        except pexpect.EOF:
            break
        for line in screen.display:
            if "tokens/s" in line:
                widest = max(widest, line.rstrip(), key=len)
    lines = [line.rstrip() for line in screen.display if line.strip()]
    assert "selective scan: cpu backend" in lines
    assert lines[0] == "step 1 of 200: takes longer, kernels are loaded"
    assert "step 100: exact match 12.5, f1 50.0, loss 1.234" in lines
    [bar] = [line for line in lines if "200/200" in line]
    assert len(bar) <= len(widest) <= 80
    assert widest.rindex("|") - widest.index("|") > 15, widest


def test_without_a_bar_logs_are_printed(tmp_path, capsys):
    trainer(tmp_path, disable_tqdm=True, logging_steps=4).train()
    said = capsys.readouterr()
    assert "12/12" not in said.err and "'loss'" in said.out


def test_a_log_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / LOG).mkdir()
    with pytest.raises(UserError, match=LOG):
        trainer(tmp_path).train()


def test_a_plot_of_no_rows_and_of_one(tmp_path):
    for name, rows in (("none.png", []), ("one.png", [{"step": 1, "loss": 2.0}])):
        plot(rows, tmp_path / name)
        assert matplotlib.image.imread(tmp_path / name).shape[1] > 500
    assert len(list(tmp_path.iterdir())) == 2
