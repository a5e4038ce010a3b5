"""Checkpoints that anybody may have written: no code of theirs runs, and what is none is told in a
line."""

import copy
import json
import math
import os
import pickle
import random

import numpy as np
import pytest
import torch

from common.errors import UserError
from mamba_lm.models.mamba import MambaConfig, MambaLM
from mamba_lm.training.arguments import training_arguments
from mamba_lm.training.checkpoints import (
    MANIFEST,
    describe_files,
    find_damage,
    find_newest_checkpoint,
)
from mamba_lm.training.prefix_suffix import Item
from mamba_lm.training.trainer import PrefixSuffixTrainer
from mamba_lm.training.trainer_state import find_best_evaluation, fits_optimizer, has_form_of

BATCHES = [[Item.with_target([1, 2], [3], [4, 5], f"{i}")] for i in range(4)]


class Batches(list):
    """A sampler of batches."""


def trainer(output, **settings) -> PrefixSuffixTrainer:
    torch.manual_seed(0)
    model = MambaLM(MambaConfig(vocab_size=7, d_model=8, n_layer=1, d_state=4))
    defaults = {"save_steps": 2, "num_train_epochs": 1, "disable_tqdm": True, "logging_steps": 1}
    arguments = training_arguments(str(output), torch.device("cpu"), **defaults | settings)
    return PrefixSuffixTrainer(model, arguments, Batches(BATCHES), lambda e: e, None)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    output = tmp_path_factory.mktemp("original")
    trainer(output).train()
    return output / "checkpoint-2"


@pytest.fixture
def checkpoint(original, tmp_path):
    """A copy of the original to be changed."""
    copied = tmp_path / "run/checkpoint-2"
    copied.mkdir(parents=True)
    for path in original.iterdir():
        (copied / path.name).write_bytes(path.read_bytes())
    return copied


def reseal(checkpoint) -> None:
    """As one does who wants it to be taken."""
    names = [path for path in sorted(checkpoint.iterdir()) if path.name != MANIFEST]
    (checkpoint / MANIFEST).write_text(json.dumps({"files": describe_files(names)}))


def assert_refused(checkpoint, tmp_path, *said: str) -> None:
    """In a line, before anything is written."""
    begun = []
    with pytest.raises(UserError) as caught:
        trainer(tmp_path / "more").train(checkpoint, lambda: begun.append(True))
    for text in (str(checkpoint), *said):
        assert text in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not begun


NESTED = "[" * 100_000


@pytest.mark.parametrize("text", [
    "", "{", "[]", "{}", "null", "7", NESTED, "[" * 70 + "]" * 70, "1" * 5000, '{"files": null}',
    '{"files": []}', '{"files": {}}', '{"files": {"optimizer.pt": 7}}', "\xff",
    '{"files": {"optimizer.pt": {}}}', '{"files": {"optimizer.pt": {"bytes": "x"}}}',
    '{"files": {"../../secret": {"bytes": 1}}}', '{"files": {"": {"bytes": 1}}}',
    '{"files": {"a\\u0000": {"bytes": 1}}}', '{"files": {"\\ud800": {"bytes": 1}}}',
], ids=lambda text: text[:20])  # fmt: skip
def test_a_foreign_manifest_is_reported_and_skipped(text, checkpoint, tmp_path, capsys):
    (checkpoint / MANIFEST).write_bytes(text.encode("latin-1"))
    assert_refused(checkpoint, tmp_path)
    assert find_newest_checkpoint(checkpoint.parent) is None
    err = capsys.readouterr().err
    assert err.startswith(f"warning: {checkpoint} is skipped: ") and err.count("\n") == 1


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", "null", NESTED, '{"x": 1}'], ids=str.__repr__
)
def test_a_file_that_is_not_a_state_is_reported_and_skipped(text, checkpoint, tmp_path):
    (checkpoint / "trainer_state.json").write_text(text)
    reseal(checkpoint)
    assert_refused(checkpoint, tmp_path, "trainer_state.json")
    assert find_newest_checkpoint(checkpoint.parent) is None


@pytest.mark.parametrize("name, value", [
    ("global_step", -1), ("global_step", "2"), ("global_step", 10**300), ("global_step", 2.5),
    ("global_step", True), ("max_steps", None), ("num_train_epochs", "many"), ("epoch", math.nan),
    ("epoch", None), ("epoch", []), ("logging_steps", 0), ("save_steps", 0), ("eval_steps", 0),
    ("eval_steps", None), ("train_batch_size", None), ("total_flos", "x"), ("log_history", {}),
    ("log_history", [7]), ("log_history", [{"loss": 1.0}]), ("log_history", [{"step": "1"}]),
    ("log_history", [{"step": 1, "loss": "high"}]), ("log_history", [{"step": 1, "loss": [1]}]),
    ("log_history", [{"step": 1, "eval_$\\frac$": 1.0}]),
    ("log_history", [{"step": 1, "x\n": 1.0}]), ("log_history", [{"step": 1, "eval_\ud800": 1.0}]),
    ("log_history", [{"step": 1, "x" * 999: 1}]), ("log_history", [{"step": 1, "loss": 1e308}]),
    ("best_metric", "x"), ("best_global_step", "../../x"), ("best_global_step", -1),
    ("best_model_checkpoint", 7), ("stateful_callbacks", None), ("stateful_callbacks", {}),
    ("stateful_callbacks", {"TrainerControl": []}), ("num_input_tokens_seen", -1),
    ("stateful_callbacks", {"TrainerControl": {"args": {"should_training_stop": "no"}}}),
    ("unheard_of", 1),
])  # fmt: skip
def test_a_state_with_a_value_that_cannot_be_is_refused(name, value, checkpoint, tmp_path):
    path = checkpoint / "trainer_state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    reseal(checkpoint)
    assert_refused(checkpoint, tmp_path, "trainer_state.json")
    assert find_damage(checkpoint)


@pytest.mark.parametrize("callback", ["SafeStop", "Progress", "TrainingLog", "DefaultFlowCallback"])
def test_callbacks_of_a_checkpoint_are_not_taken(callback, checkpoint, tmp_path):
    """Their attributes, and so their methods, would be the stranger's."""
    path = checkpoint / "trainer_state.json"
    state = json.loads(path.read_text())
    spoilt = {"args": {}, "attributes": {"on_step_end": "x", "on_save": "x"}}
    state["stateful_callbacks"] |= {callback: spoilt}
    state["stateful_callbacks"]["TrainerControl"]["attributes"] = {"_new_step": "x"}
    path.write_text(json.dumps(state))
    reseal(checkpoint)
    run = trainer(tmp_path / "more", restore_callback_states_from_checkpoint=True)
    run.train(checkpoint)
    assert run.state.global_step == 4


@pytest.mark.parametrize(
    "text", ["", "7", "[]", "[1]", '["a", 1]', "[1.0, -1]", "[1, 2, 3]", NESTED]
)
def test_unlogged_losses_that_are_none_are_refused(text, checkpoint, tmp_path):
    (checkpoint / "loss_0.json").write_text(text)
    reseal(checkpoint)
    assert_refused(checkpoint, tmp_path, "loss_0.json")


class Harmful:
    def __reduce__(self):
        return os.mkdir, (HARM,)


HARM = "harmed"


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
@pytest.mark.parametrize("kind", ["torch", "pickle", "in a state"])
def test_no_code_of_a_checkpoint_runs(kind, name, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if kind == "pickle":
        (checkpoint / name).write_bytes(pickle.dumps(Harmful()))
    else:
        state = torch.load(checkpoint / name, weights_only=False)
        torch.save(Harmful() if kind == "torch" else state | {"x": Harmful()}, checkpoint / name)
    reseal(checkpoint)
    assert_refused(checkpoint, tmp_path)
    assert not (tmp_path / HARM).exists()


class Large:
    def __reduce__(self):
        return bytearray, (10**9,)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoint_takes_no_memory_that_its_files_do_not_have(name, checkpoint, tmp_path):
    """Which `weights_only` would allow."""
    state = torch.load(checkpoint / name, weights_only=False)
    torch.save(state | {"x": Large()}, checkpoint / name)
    reseal(checkpoint)
    assert_refused(checkpoint, tmp_path, "contains __builtin__ bytearray")


def test_files_that_nothing_reads_are_not_read(checkpoint, tmp_path, monkeypatch):
    """training_args.bin, which the Trainer writes, and the state of a scaler."""
    monkeypatch.chdir(tmp_path)
    for name in ("training_args.bin", "scaler.pt", "pytorch_model.bin", "rng_state_0.pth"):
        (checkpoint / name).write_bytes(pickle.dumps(Harmful()))
    reseal(checkpoint)
    trainer(tmp_path / "more").train(checkpoint)
    assert not (tmp_path / HARM).exists()


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
@pytest.mark.parametrize(
    "value", [b"", b"\x80", b"PK\x03\x04", None, 7, [], {}, {"state": {}}, {"cpu": "x"}], ids=repr
)
def test_a_state_of_something_else_is_refused(value, name, checkpoint, tmp_path):
    if isinstance(value, bytes):
        (checkpoint / name).write_bytes(value)
    else:
        torch.save(value, checkpoint / name)
    reseal(checkpoint)
    assert_refused(checkpoint, tmp_path)


def changes_of_optimizer(state: dict):
    def changed(path, value):
        *places, last = path
        found = copy.deepcopy(state)
        inner = found
        for place in places:
            inner = inner[place]
        inner[last] = value
        return found

    shape = state["state"][0]["exp_avg"].shape
    yield changed(["state"], [])
    yield changed(["state"], {"0": {}})
    yield changed(["state"], {99: state["state"][0]})
    yield changed(["state", 0], {})
    yield changed(["state", 0], [])
    yield changed(["state", 0, "exp_avg"], torch.zeros(3))
    yield changed(["state", 0, "exp_avg"], torch.zeros(shape, dtype=torch.int64))
    yield changed(["state", 0, "exp_avg"], torch.zeros(1).expand(shape))
    yield changed(["state", 0, "exp_avg"], torch.zeros(shape).to_sparse())
    yield changed(["state", 0, "exp_avg"], None)
    yield changed(["state", 0, "step"], "x")
    yield changed(["param_groups"], [])
    yield changed(["param_groups", 0], {})
    yield changed(["param_groups", 0, "lr"], "x")
    yield changed(["param_groups", 0, "lr"], None)
    yield changed(["param_groups", 0, "betas"], 0.9)
    yield changed(["param_groups", 0, "params"], [])


@pytest.mark.parametrize("number", range(17))
def test_an_optimizer_state_that_does_not_fit_is_refused(number, checkpoint, tmp_path):
    path = checkpoint / "optimizer.pt"
    state = torch.load(path, weights_only=True)
    changed = list(changes_of_optimizer(state))
    assert len(changed) == 17
    torch.save(changed[number], path)
    reseal(checkpoint)
    assert_refused(checkpoint, tmp_path, "optimizer.pt")


OPTIMIZERS = ("adamw_torch", "adafactor", "sgd", "rmsprop", "adagrad")
SCHEDULES = ("linear", "constant_with_warmup", "inverse_sqrt", "polynomial")


@pytest.mark.parametrize(
    "optim, schedule",
    [*((name, "cosine") for name in OPTIMIZERS), *(("adamw_torch", name) for name in SCHEDULES)],
)
def test_states_of_all_kinds_of_runs_fit(optim, schedule, tmp_path):
    settings = {"optim": optim, "lr_scheduler_type": schedule}
    trainer(tmp_path / "run", **settings).train()
    run = trainer(tmp_path / "more", **settings)
    run.train(tmp_path / "run/checkpoint-2")
    assert run.state.global_step == 4


@pytest.mark.parametrize("change", [
    {"last_epoch": "x"}, {"base_lrs": 7}, {"base_lrs": []}, {"step": 7}, {"get_lr": None},
    {"optimizer": 7}, {"_last_lr": ["x", "y"]},
], ids=str)  # fmt: skip
def test_a_scheduler_state_that_does_not_fit_is_refused(change, checkpoint, tmp_path):
    path = checkpoint / "scheduler.pt"
    torch.save(torch.load(path, weights_only=True) | change, path)
    reseal(checkpoint)
    assert_refused(checkpoint, tmp_path, "scheduler.pt")


@pytest.mark.parametrize("change", [
    {"python": (3, (1, 2), None)}, {"python": None}, {"numpy": ("MT19937", np.zeros(2), 1, 0, 0.0)},
    {"cpu": torch.zeros(3)}, {"cpu": torch.zeros(3, dtype=torch.uint8)}, {"cpu": 1},
], ids=str)  # fmt: skip
def test_a_state_of_random_numbers_that_is_none_is_refused(change, checkpoint, tmp_path):
    path = checkpoint / "rng_state.pth"
    torch.save(torch.load(path, weights_only=False) | change, path)
    reseal(checkpoint)
    before = random.getstate()
    assert_refused(checkpoint, tmp_path, "random numbers")
    random.setstate(before)


# Which evaluation is best


def rows(*pairs: tuple[float, float | None]) -> list[dict]:
    return [
        {"step": 10 * n, "eval_f1": score} | ({} if loss is None else {"eval_loss": loss})
        for n, (score, loss) in enumerate(pairs, start=1)
    ]


@pytest.mark.parametrize("pairs, step, since", [
    ([], None, None),
    ([(5.0, 1.0)], 10, 0),
    ([(5.0, 1.0), (6.0, 9.0)], 20, 0),
    ([(5.0, 1.0), (4.0, 0.1)], 10, 1),
    ([(5.0, 1.0), (5.0, 0.9), (5.0, 0.95)], 20, 1),
    ([(5.0, 1.0), (5.0, 1.0), (5.0, 1.0)], 30, 2),
    ([(5.0, None), (5.0, None)], 20, 1),  # of a version that had no loss
    ([(5.0, None), (5.0, 3.0)], 20, 0),
    ([(5.0, math.nan), (5.0, 3.0), (math.nan, 1.0)], 20, 1),
    ([(math.nan, 1.0), (0.0, 3.0)], 20, 0),
])  # fmt: skip
def test_the_best_evaluation(pairs, step, since):
    assert find_best_evaluation(rows(*pairs), "eval_f1", True) == (step and (step, since))


def test_the_lowest_is_best_of_what_is_not_to_be_great():
    log = rows((5.0, 1.0), (6.0, 0.5), (7.0, 0.5))
    assert find_best_evaluation(log, "eval_f1", False).step == 10
    assert find_best_evaluation(log, "eval_loss", False).step == 30


def test_the_evaluation_before_training_is_not_the_best():
    before = [{"step": 0, "eval_f1": 99.0}]
    assert find_best_evaluation(before, "eval_f1", True) is None
    assert find_best_evaluation([*before, *rows((1.0, 1.0))], "eval_f1", True) == (10, 0)


def test_states_are_alike_by_kind_and_shape():
    own = {"a": [1.0, (2, None)], "t": torch.zeros(2), "s": "x", "b": True}
    assert has_form_of({"a": [2, [3, False]], "t": torch.ones(2), "s": "y", "b": False}, own)
    assert not has_form_of(own | {"t": torch.zeros(3)}, own)
    assert not has_form_of(own | {"b": 1}, own)
    assert not has_form_of(own | {"s": 1}, own)
    assert not fits_optimizer(own, torch.optim.SGD([torch.zeros(1)]))
