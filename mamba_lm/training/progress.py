"""What is seen of a training run, and how it ends early: bar, log, plot, signals."""

import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import TrainerCallback
from transformers.trainer_utils import SaveStrategy

from common.atomic_files import report_write_errors, write_atomically

LOG = "training_log.jsonl"
PLOT = "training_log.png"
SAVE_SECONDS = 600  # between two checkpoints, at most
SAVE_SHARE = 0.05  # of the time, at most, goes to checkpoints that this asks for
_ANEW_SECONDS = 2.0  # torchrun and a terminal both send what one Ctrl-C is: within this, once


class SafeStop(TrainerCallback):
    """Checkpoints by the clock and at the end that a signal asks for.

    While it is in force (`with`), SIGINT, SIGTERM and SIGHUP wait for the step to end and for a
    checkpoint; then the signal is delivered as ever. A second one does not wait, and none in the
    first step: it may compile kernels for minutes, and nothing is lost with it. All processes of a
    run stop at the same step, whichever of them got the signal.
    """

    def __init__(self, device: torch.device | str = "cpu"):
        """device: where processes exchange what they know."""
        self._device = device
        self._caught: int | None = None
        self._caught_at = 0.0
        self._stops = self._waits = False
        self._before: dict[int, object] = {}
        self._interval, self._saved_at = SAVE_SECONDS, time.monotonic()

    @property
    def is_asked(self) -> bool:
        return self._caught is not None

    def __enter__(self) -> "SafeStop":
        self._saved_at = time.monotonic()
        self._waits = _is_distributed()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # a shell's, of what it runs with "&"
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind, error, traceback) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if kind is None and self.is_asked:
            signal.raise_signal(self._caught)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Signals do not wait in this block: what it does can be done again. Of several processes
        it has to call `poll`."""
        if not _is_distributed():
            self._waits = False
        self.poll()
        try:
            yield
        finally:
            self._waits = True

    def poll(self) -> None:
        """End by the signal that any of the processes got, in all of them at once."""
        if self._agree()[1]:
            self._deliver()

    def _agree(self, wanted: bool = False) -> tuple[bool, bool]:
        """Whether any process wants something, and whether any has got a signal: the same answer in
        all of them, also if a signal comes meanwhile."""
        if not _is_distributed():
            return wanted, self.is_asked
        shared = torch.tensor([self._caught or 0, wanted], dtype=torch.int32, device=self._device)
        torch.distributed.all_reduce(shared, torch.distributed.ReduceOp.MAX)
        caught, wanted = shared.tolist()
        if caught and not self.is_asked:  # one may have come here meanwhile
            self._caught, self._caught_at = caught, time.monotonic()
        return bool(wanted), bool(caught)

    def saved(self, seconds: float) -> None:
        """A checkpoint has been saved, in so many seconds."""
        self._interval = max(SAVE_SECONDS, seconds / SAVE_SHARE)
        self._saved_at = time.monotonic()

    def _note(self, number: int, frame) -> None:
        again = self.is_asked and time.monotonic() - self._caught_at > _ANEW_SECONDS
        if not self.is_asked:
            self._caught, self._caught_at = number, time.monotonic()
        if again or not self._waits:
            self._deliver()

    def _deliver(self) -> None:
        """As the handler would that was there before."""
        handler = self._before.get(self._caught)
        if callable(handler):
            handler(self._caught, None)
        else:
            signal.signal(self._caught, handler or signal.SIG_DFL)
            signal.raise_signal(self._caught)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self._waits = True
        is_time, self._stops = self._agree(time.monotonic() - self._saved_at > self._interval)
        if args.save_strategy == SaveStrategy.NO:
            control.should_training_stop |= self._stops
        elif self._stops or is_time:
            control.should_save = True

    def on_save(self, args, state, control, **kwargs) -> None:
        # Now and not before: a checkpoint tells whether the run had come to its own end.
        if self._stops:
            control.should_training_stop = True
            if state.is_world_process_zero:
                saved = f"checkpoint-{state.global_step} is saved; the same command goes on from it"
                tqdm.write(saved, file=sys.stderr)

    def on_epoch_end(self, args, state, control, **kwargs) -> None:
        if self._stops:
            control.should_evaluate = control.should_save = False


class Progress(TrainerCallback):
    """A bar with the time that is left and the figures of the last log; scores as lines above.

    It begins after the first step, in which kernels are loaded or compiled: what that takes says
    nothing about the steps to come.
    """

    _bar: tqdm | None = None

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if state.is_world_process_zero and state.global_step < state.max_steps:
            first = f"step {state.global_step + 1} of {state.max_steps}"
            tqdm.write(f"{first}: longer than the others, kernels are loaded", file=sys.stderr)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if self._bar is None:
            self._bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                disable=not state.is_world_process_zero,
                dynamic_ncols=True,
                bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} "
                "[{elapsed}<{remaining}{postfix}]",
                smoothing=0,  # evaluations are a part of the average step
                # To a file, a line now and then is enough.
                mininterval=0.1 if sys.stderr.isatty() else 20.0,
            )
        self._bar.update(state.global_step - self._bar.n)

    def on_log(self, args, state, control, logs: Mapping, **kwargs) -> None:
        if "loss" in logs and self._bar is not None:
            self._bar.set_postfix_str(
                f"loss {logs['loss']:.3f}, {logs['tokens_per_second']:,.0f} tokens/s"
            )
        scores = {k.removeprefix("eval_"): v for k, v in logs.items() if k.startswith("eval_")}
        if scores and state.is_world_process_zero:
            listed = ", ".join(
                f"{name.replace('_', ' ')} {value:.{3 if name == 'loss' else 1}f}"
                for name, value in scores.items()
            )
            tqdm.write(f"step {state.global_step}: {listed}", file=sys.stderr)

    def close(self) -> None:
        """Leave the bar as it is, the next line below it."""
        if self._bar is not None:
            self._bar.close()


class TrainingLog(TrainerCallback):
    """training_log.jsonl beside the model, a line a log as it comes, and its plot.

    A resumed run goes on from the lines of its checkpoint: the file tells of one run.
    """

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if state.is_world_process_zero:
            self._path = Path(args.output_dir) / LOG
            write_log(state.log_history, self._path)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step >= state.max_steps:  # the last steps too
            control.should_log = True

    def on_log(self, args, state, control, **kwargs) -> None:
        if state.is_world_process_zero:
            with report_write_errors(self._path), self._path.open("a", encoding="utf-8") as file:
                file.write(_line(state.log_history[-1]))

    def on_train_end(self, args, state, control, **kwargs) -> None:
        if state.is_world_process_zero:
            plot(state.log_history, self._path.with_name(PLOT))


def _is_distributed() -> bool:
    return torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1


def write_log(rows: Sequence[Mapping], path: Path) -> None:
    write_atomically(path, "".join(map(_line, rows)))


def _line(row: Mapping) -> str:
    return json.dumps(row) + "\n"


def plot(rows: Sequence[Mapping], path: Path) -> None:
    """Draw the loss and, where there are any, the scores of a log along its steps."""
    from matplotlib.figure import Figure

    curves = {"loss": [(row["step"], row["loss"]) for row in rows if "loss" in row]}
    for row in rows:
        for name, value in row.items():
            if name.startswith("eval_"):
                curves.setdefault(name, []).append((row["step"], value))
    losses = curves.keys() & {"loss", "eval_loss"}
    scores = curves.keys() - losses
    figure = Figure(figsize=(8, 6 if scores else 3.5), layout="constrained")
    axes = figure.subplots(2 if scores else 1, sharex=True, squeeze=False)[:, 0]
    for name, points in curves.items():
        at = axes[0] if name in losses else axes[1]
        label = "evaluation loss" if name == "eval_loss" else name.removeprefix("eval_")
        at.plot(*zip(*points, strict=True), label=label.replace("_", " "),
                marker=None if name == "loss" else "o")  # fmt: skip
    axes[0].set_ylabel("loss (nats a token)")
    if len(losses) > 1:
        axes[0].legend()
    if scores:
        axes[1].set_ylabel("per cent")
        figure.legend(*axes[1].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    axes[-1].set_xlabel("optimiser steps")
    for at in axes:
        at.grid(alpha=0.3)
    with report_write_errors(path):
        partial = path.with_name(f".{path.name}.partial")
        figure.savefig(partial, format="png", dpi=120)
        os.replace(partial, path)
