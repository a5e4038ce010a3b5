"""Checkpoints by the clock, and signals that end a training run."""

import signal
import time
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerControl

from mamba_lm.training import stopping
from mamba_lm.training.checkpoints import list_checkpoints
from mamba_lm.training.stopping import SAVE_SECONDS, SAVE_SHARE, SafeStop
from tests.mamba_lm.training.test_progress import trainer

# Checkpoints by the clock


def step_end(stop: SafeStop, **changes) -> TrainerControl:
    control = TrainerControl()
    args = SimpleNamespace(world_size=1, save_strategy="steps", **changes)
    stop.on_step_end(args, None, control)
    return control


def test_a_checkpoint_is_saved_when_it_is_time(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now[0])
    stop = SafeStop()
    now[0] += SAVE_SECONDS
    assert not step_end(stop).should_save
    now[0] += 1
    assert step_end(stop).should_save
    stop.note_save(seconds=1.0)
    assert not step_end(stop).should_save
    # One that takes long is not saved as often.
    stop.note_save(seconds=100.0)
    now[0] += SAVE_SECONDS + 1
    assert not step_end(stop).should_save
    now[0] += 100.0 / SAVE_SHARE
    assert step_end(stop).should_save


def test_the_clock_saves_checkpoints(tmp_path, monkeypatch):
    monkeypatch.setattr(stopping, "SAVE_SECONDS", -1)
    monkeypatch.setattr(stopping, "SAVE_SHARE", 1e9)
    trainer(tmp_path).train()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-12", "checkpoint-11"]


# Signals


def test_no_signal_waits_outside_training():
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = list(map(signal.getsignal, numbers))
    with SafeStop():
        assert not set(map(signal.getsignal, numbers)) & set(before)
    assert list(map(signal.getsignal, numbers)) == before


def test_a_signal_in_the_first_step_does_not_wait():
    reached = []
    with pytest.raises(KeyboardInterrupt), SafeStop():
        reached.append(1)
        signal.raise_signal(signal.SIGINT)
        reached.append(2)
    assert reached == [1]


def test_of_several_processes_a_signal_waits_in_the_first_step_too(monkeypatch):
    monkeypatch.setattr(stopping, "_is_distributed", lambda: True)
    reached = []
    with pytest.raises(KeyboardInterrupt), SafeStop():
        signal.raise_signal(signal.SIGINT)
        reached.append(1)
    assert reached == [1]


def test_a_signal_is_delivered_after_the_step():
    stop, reached = SafeStop(), []
    with pytest.raises(KeyboardInterrupt):
        with stop:
            step_end(stop)
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)  # as torchrun repeats a terminal's
            reached.append(step_end(stop).should_save)
        reached.append("never")
    assert reached == [True]


def test_a_second_signal_does_not_wait(monkeypatch):
    stop, reached = SafeStop(), []
    with pytest.raises(KeyboardInterrupt), stop:
        step_end(stop)
        signal.raise_signal(signal.SIGINT)
        monkeypatch.setattr(stopping, "_REPEAT_SECONDS", 0.0)
        time.sleep(0.001)
        reached.append(1)
        signal.raise_signal(signal.SIGINT)
        reached.append(2)
    assert reached == [1]


def test_a_signal_that_is_ignored_stays_so():
    """As Ctrl-C is in what a shell runs in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with SafeStop() as stop:
            signal.raise_signal(signal.SIGINT)
            assert not step_end(stop).should_save
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_error_is_not_hidden_by_a_signal():
    with pytest.raises(ZeroDivisionError), SafeStop() as stop:
        step_end(stop)
        signal.raise_signal(signal.SIGINT)
        raise ZeroDivisionError


def test_a_run_without_checkpoints_stops_after_the_step(tmp_path):
    run = trainer(tmp_path, save_strategy="no")
    step = run.training_step

    def interrupted(*args, **kwargs):
        if run.state.global_step == 5:
            signal.raise_signal(signal.SIGINT)
        return step(*args, **kwargs)

    run.training_step = interrupted
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert run.state.global_step == 6 and list_checkpoints(tmp_path) == []


def test_a_signal_is_neither_lost_nor_doubled_between_processes(monkeypatch):
    """One comes here while processes tell each other of theirs, by a stand-in for all_reduce."""
    stop = SafeStop()
    monkeypatch.setattr(stopping, "_is_distributed", lambda: True)

    def interrupted(shared, operation):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(torch.distributed, "all_reduce", interrupted)
    with pytest.raises(KeyboardInterrupt), stop:
        assert not step_end(stop).should_save, "the others do not know of it"
        monkeypatch.setattr(torch.distributed, "all_reduce", lambda shared, operation: None)
        assert step_end(stop).should_save


def test_a_signal_to_another_process_counts_as_the_first(monkeypatch):
    stop, reached = SafeStop(), []
    monkeypatch.setattr(stopping, "_is_distributed", lambda: True)
    monkeypatch.setattr(
        torch.distributed, "all_reduce", lambda shared, operation: shared[0].fill_(signal.SIGINT)
    )
    with pytest.raises(KeyboardInterrupt), stop:
        reached.append(step_end(stop).should_save)
        signal.raise_signal(signal.SIGINT)  # torchrun's, to this one a moment later
        reached.append("still saving")
    assert reached == [True, "still saving"]
