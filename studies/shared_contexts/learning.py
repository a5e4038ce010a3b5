"""Does training on shared contexts learn as well? Held-out answer loss of batches that group the
questions of a context against batches of examples drawn one by one, along examples and minutes.

    python -m studies.shared_contexts.learning TRAIN HELD_OUT results/learning.jsonl \\
        --seeds 0 1 2 --conditions shuffled:32 grouped:32 grouped:64

A condition is the kind of batch and its number of questions. Runs of a seed start from the same
weights and are trained on the same questions and negatives, each on one thread. Minutes are those
of its processor: what else the machine does moves them little.
Adds a line to the file for every look at the held-out loss; prints the table of all its lines on
these conditions.
"""

from common.script import run_script

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from transformers import TrainerCallback, set_seed

from common.command_line import Parser, positive_float, positive_int
from common.errors import UserError
from common.json_text import parse_json
from common.output_files import Kind, check_inputs_not_overwritten, check_output
from context_qa.batches import GroupedBatches, continuation
from mamba_lm.checkpoint import load_model_and_tokenizer
from mamba_lm.training.arguments import training_arguments
from mamba_lm.training.prefix_suffix import PrefixSuffixLM
from mamba_lm.training.trainer import PrefixSuffixTrainer
from squad_utils import PROMPT_ORDERS, read_examples
from studies.shared_contexts.answer_loss import answer_losses

KINDS = ("shuffled", "grouped")
LOOKS = 8  # at the held-out loss in a run


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("train", metavar="TRAIN", help="JSONL or SQuAD JSON file")
    parser.add_argument("held_out", metavar="HELD_OUT", help="the same; its first 600 questions")
    parser.add_argument("output", metavar="OUTPUT", help="JSONL, appended to")
    parser.add_argument("--model", default="models/configs/mamba-small.json", help="or a folder")
    parser.add_argument("--tokenizer", help="folder, file or Hub name (default: the model's)")
    parser.add_argument("--conditions", nargs="+", default=["shuffled:32", "grouped:32"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--num_epochs", type=positive_float, default=1.0, help="default: 1")
    parser.add_argument("--learning_rate", type=positive_float, default=1e-3, help="default: 1e-3")
    parser.add_argument("--processes", type=positive_int, default=2, help="default: 2")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    for condition in args.conditions:
        kind, _, size = condition.partition(":")
        if kind not in KINDS or not size.isdecimal() or int(size) < 1:
            raise UserError(f"--conditions {condition}: give shuffled:N or grouped:N")
    if "LEARNING_RUN" in os.environ:
        train_one(args)
        return
    check_inputs_not_overwritten(
        [args.output], [args.train, args.held_out, args.model, args.tokenizer]
    )
    check_output(args.output, ROWS, overwrite=True)  # to which rows are added
    try:  # now, rather than after the first minutes of training
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        Path(args.output).open("a").close()
    except OSError as error:
        raise UserError(f"{args.output}: cannot be written ({error.strerror})") from error
    runs = [(condition, seed) for seed in args.seeds for condition in args.conditions]
    started: list[subprocess.Popen] = []
    with ThreadPoolExecutor(args.processes) as pool:
        try:
            list(pool.map(lambda run: train_elsewhere(*run, started), runs))
        except BaseException:  # the pool waits for what has been started
            pool.shutdown(wait=False, cancel_futures=True)
            for process in started:
                process.terminate()
            raise
    rows = [json.loads(line) for line in Path(args.output).read_text().splitlines()]
    print_table([row for row in rows if row["condition"] in args.conditions])


def _has_rows(stream: BinaryIO) -> bool:
    """Whether every line is a row, and no line is torn."""
    lines = stream.readlines()
    try:
        rows = [parse_json(line, "row") for line in lines]
    except UserError:
        return False
    are_rows = (isinstance(row, dict) and {"condition", "loss"} <= row.keys() for row in rows)
    return all(are_rows) and lines[-1].endswith(b"\n")


ROWS = Kind("rows of this benchmark", _has_rows)


def train_elsewhere(condition: str, seed: int, started: list[subprocess.Popen]) -> None:
    """This script again, as one run in a process of its own, which is added to `started`."""
    environment = {**os.environ, "LEARNING_RUN": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "studies.shared_contexts.learning", *sys.argv[1:]]
    command += ["--conditions", condition, "--seeds", str(seed)]
    run = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    started.append(run)
    _, said = run.communicate()
    if run.returncode != 0:
        said = said.strip().splitlines() or [f"ended with {run.returncode}"]
        raise UserError(f"{condition}, seed {seed}: {said[-1]}")


def train_one(args) -> None:
    [condition], [seed] = args.conditions, args.seeds
    kind, _, size = condition.partition(":")
    set_seed(seed)
    model, tokenizer = load_model_and_tokenizer(args.model, args.tokenizer)
    examples = read_examples(args.train)
    batches = GroupedBatches(examples, int(size), "random", seed, grouped=kind == "grouped")
    steps = int(len(batches) * args.num_epochs)
    scratch = tempfile.TemporaryDirectory()  # for the log that every training writes
    arguments = training_arguments(
        scratch.name, torch.device("cpu"), max_steps=steps, seed=seed, save_strategy="no",
        learning_rate=args.learning_rate, disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    tokenize = functools.partial(continuation, tokenizer=tokenizer, prompt_order=PROMPT_ORDERS[0])
    trainer = PrefixSuffixTrainer(model, arguments, batches, tokenize, tokenizer)
    looks = Looks(args, model, tokenizer, {"condition": condition, "seed": seed}, int(size), steps)
    trainer.add_callback(looks)
    with scratch:
        trainer.train()


class Looks(TrainerCallback):
    """Measures the held-out loss LOOKS times a run; the clock is stopped meanwhile."""

    def __init__(self, args, model, tokenizer, row: dict, batch_size: int, steps: int):
        self.examples = [e for e in read_examples(args.held_out) if e.is_answerable][:600]
        self.model, self.tokenizer = PrefixSuffixLM(model), tokenizer
        self.path, self.row, self.batch_size = args.output, row, batch_size
        self.at = {round(steps * look / LOOKS) for look in range(1, LOOKS + 1)}
        self.seconds, self.started = 0.0, time.process_time()

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.started = time.process_time()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step not in self.at:
            return
        self.seconds += time.process_time() - self.started
        sums, counts = answer_losses(self.model, self.tokenizer, self.examples, 32)
        row = self.row | {
            "examples": state.global_step * self.batch_size,
            "seconds": self.seconds,
            "loss": float(sums.sum() / counts.sum()),
        }
        with open(self.path, "a") as file:
            file.write(json.dumps(row) + "\n")
        self.started = time.process_time()


def print_table(rows: list[dict]) -> None:
    """Means over seeds with standard deviations: the loss at the end, that at the minutes which the
    fastest run took in all, and the minutes to the lowest loss that all runs reach."""
    runs: dict[tuple[str, int], list] = {}
    for row in rows:
        seen = (row["examples"], row["seconds"] / 60, row["loss"])
        runs.setdefault((row["condition"], row["seed"]), []).append(seen)
    curves = {run: np.array(looks).T for run, looks in runs.items()}
    least = min(minutes[-1] for _, minutes, _ in curves.values())
    common = max(loss.min() for *_, loss in curves.values())
    print(f"{'condition':16}{'seeds':>6}{'minutes':>9}{'loss at the end':>22}"
          f"{f'at {least:.1f} minutes':>22}{f'minutes to {common:.3f}':>22}")  # fmt: skip
    for condition in dict.fromkeys(name for name, _ in curves):
        of = [curve for (name, _), curve in curves.items() if name == condition]
        end = [loss[-1] for *_, loss in of]
        early = [np.interp(least, minutes, loss) for _, minutes, loss in of]
        until = [np.interp(-common, -np.minimum.accumulate(loss), at) for _, at, loss in of]
        spans = "".join(f"{np.mean(v):14.4f} ± {np.std(v):.3f}" for v in (end, early))
        print(f"{condition:16}{len(of):6d}{np.mean([minutes[-1] for _, minutes, _ in of]):9.1f}"
              f"{spans}{np.mean(until):14.2f} ± {np.std(until):.2f}")  # fmt: skip


if __name__ == "__main__":
    run_script(main, parse_args)
