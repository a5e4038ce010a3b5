"""What is shown and written of a training run: the progress bar, the log and its plot."""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tqdm import tqdm
from transformers import TrainerCallback

from common.atomic_files import report_write_errors, write_atomically

LOG = "training_log.jsonl"
PLOT = "training_log.png"


class Progress(TrainerCallback):
    """A bar with the time left and the last loss and speed; scores are lines above it.

    It starts after the first step, in which kernels are loaded or compiled: the duration of that
    step says nothing about the others.
    """

    _bar: tqdm | None = None

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if state.is_world_process_zero and state.global_step < state.max_steps:
            first = f"step {state.global_step + 1} of {state.max_steps}"
            tqdm.write(f"{first}: takes longer, kernels are loaded", file=sys.stderr)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if self._bar is None:
            self._bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                disable=not state.is_world_process_zero,
                dynamic_ncols=True,
                bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} "
                "[{elapsed}<{remaining}{postfix}]",
                smoothing=0,  # evaluations count as part of the average step
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
        """Leave the bar as it is; what follows is printed below it."""
        if self._bar is not None:
            self._bar.close()


class TrainingLog(TrainerCallback):
    """Writes training_log.jsonl beside the model, a line for each log, and its plot at the end.

    A resumed run starts from the lines in its checkpoint: the file is the log of one run.
    """

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if state.is_world_process_zero:
            write_log(state.log_history, Path(args.output_dir) / LOG)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step >= state.max_steps:  # for the steps since the last log
            control.should_log = True

    def on_log(self, args, state, control, **kwargs) -> None:
        if state.is_world_process_zero:
            path = Path(args.output_dir) / LOG
            with report_write_errors(path), path.open("a", encoding="utf-8") as file:
                file.write(_line(state.log_history[-1]))

    def on_train_end(self, args, state, control, **kwargs) -> None:
        if state.is_world_process_zero:
            plot(state.log_history, Path(args.output_dir) / PLOT)


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
