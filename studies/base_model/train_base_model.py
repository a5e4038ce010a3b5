"""Train a base language model on a token file: the loss is on every token.

    python -m studies.base_model.train_base_model --config studies/base_model/base-10m.json \\
        --tokenizer models/tokenizer-8k --tokens data/wikipedia13k --output models/base --minutes 5

Batches are windows of --length tokens that begin anywhere: a document's end is a token like others,
and the state passes it. The same command resumes a run from its last checkpoint. On a GPU, products
are computed in bfloat16 (autocast); weights and optimiser state stay in float32.
"""

from common.script import run_script

import argparse
import json
import math
import os
import time
from pathlib import Path
from typing import BinaryIO

import torch

from common.command_line import Parser, positive_float, positive_int, seed
from common.errors import UserError
from common.json_text import parse_json
from common.output_files import Kind, check_output
from mamba_lm.checkpoint import find_tokenizer_of, load_model, save_model
from mamba_lm.device import choose_device
from mamba_lm.models.mamba import MambaLM
from mamba_lm.tokenizer import load_tokenizer_at, vocabulary_bound
from studies.base_model.language_loss import bits_per_byte, next_token_loss
from studies.base_model.pack import read_all
from studies.base_model.windows import Windows, split_held_out

LOG, CHECKPOINT = "log.jsonl", "checkpoint.pt"
LEAST_WARMUP = 100  # steps, where the schedule follows the clock
WITHOUT_EFFECT = ("save_minutes", "log_every", "device")  # on what is learnt, but for rounding


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    # fmt: off
    add("--config", required=True, metavar="MODEL", help="config file, or model to train further")
    add("--tokenizer", metavar="DIR", help="saved with the model (default: that of --config)")
    add("--tokens", required=True, nargs="+", metavar="NAME",
        help="token files of pack.py, without .bin")
    add("--output", required=True, metavar="DIR", help="folder of the new model and its run")
    end = parser.add_mutually_exclusive_group(required=True)
    end.add_argument("--minutes", type=positive_float, metavar="N",
        help="of training, those of interrupted runs included; the schedule follows the clock")
    end.add_argument("--max_steps", type=positive_int, metavar="N", help="the same steps each time")
    add("--length", type=positive_int, default=512, metavar="N", help="of a window (default: 512)")
    add("--batch_size", type=positive_int, default=64, metavar="N", help="windows (default: 64)")
    add("--learning_rate", type=positive_float, default=2e-3, metavar="RATE", help="default: 2e-3")
    add("--warmup", type=positive_float, default=0.03, metavar="SHARE",
        help="of the schedule, before its cosine to a twentieth (default: 0.03)")
    add("--weight_decay", type=positive_float, default=0.1, metavar="X", help="default: 0.1")
    add("--held_out", type=positive_int, default=200_000, metavar="N",
        help="tokens: the last documents, read for bits per byte only (default: 200000)")
    add("--evaluations", type=positive_int, default=8, metavar="N", help="default: 8")
    add("--log_every", type=positive_int, default=50, metavar="STEPS", help="default: 50")
    add("--save_minutes", type=positive_float, default=5.0, metavar="N",
        help="between checkpoints (default: 5)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    add("--seed", type=seed, default=0, metavar="N", help="default: 0")
    # fmt: on
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    device = choose_device(args.device)
    torch.manual_seed(args.seed)
    model = load_model(args.config).to(device).train()
    tokenizer = load_tokenizer_at(find_tokenizer_of(args.config, args.tokenizer))
    if vocabulary_bound(tokenizer) > model.config.vocab_rows:
        raise UserError(f"{args.config}: fewer vocabulary rows than the tokenizer has ids")
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters on {device}")
    run = Run(args, model, tokenizer, device)
    run.train()
    save_model(model.eval(), args.output, tokenizer)
    print(f"model written to {args.output}")


def _is_log(stream: BinaryIO) -> bool:
    try:
        rows = [parse_json(line, LOG) for line in stream if line.endswith(b"\n")]
    except UserError:
        return False
    are_steps = (
        isinstance(row, dict) and {"step", "tokens", "seconds"} <= row.keys() for row in rows
    )
    return bool(rows) and all(are_steps)


STEPS = Kind("the log of such a run", _is_log)


class Run:
    """A training run and all that its checkpoints hold."""

    def __init__(self, args: argparse.Namespace, model: MambaLM, tokenizer, device: torch.device):
        self.args, self.model, self.device = args, model, device
        packed = read_all(args.tokens)
        if packed.tokens.max() >= model.config.vocab_rows:
            raise UserError(f"{args.tokens}: token ids beyond the model's vocabulary")
        tokens, self.held_out = split_held_out(packed, args.held_out)
        self.windows = Windows(tokens, args.length, args.seed, device)
        self.optimizer = torch.optim.AdamW(
            parameter_groups(model, args.weight_decay),
            lr=args.learning_rate,
            betas=(0.9, 0.95),
            fused=device.type == "cuda",
        )
        self.folder = Path(args.output)
        self._partial = self.folder / f"{CHECKPOINT}.partial"
        self.step, self.seconds, self.evaluated = 0, 0.0, 0
        self.settings = {k: v for k, v in vars(args).items() if k not in WITHOUT_EFFECT}
        self.settings["tokens_read"] = self.windows.num_tokens
        self.folder.mkdir(parents=True, exist_ok=True)
        self._resume()

    @property
    def progress(self) -> float:
        """The share of the run that is done, by its clock or its steps."""
        args = self.args
        return self.step / args.max_steps if args.max_steps else self.seconds / (60 * args.minutes)

    def train(self) -> None:
        """To the end; writes the log and checkpoints. UserError where the loss is not finite."""
        before, saved_at = time.monotonic() - self.seconds, self.seconds
        losses: list[torch.Tensor] = []
        while self.progress < 1:
            losses.append(self._train_step())
            self.step += 1
            is_due = self.progress >= (self.evaluated + 1) / self.args.evaluations
            if self.step % self.args.log_every == 0 or is_due or self.step == 1:
                loss = torch.stack(losses).mean().item()  # waits for the GPU
                losses.clear()
                self.seconds = time.monotonic() - before
                self._log(loss=loss, learning_rate=self.optimizer.param_groups[0]["lr"])
                if not math.isfinite(loss):
                    raise UserError(f"step {self.step}: the loss is {loss}; lower --learning_rate")
            if is_due:
                self._evaluate()
            self.seconds = time.monotonic() - before
            if self.seconds - saved_at > 60 * self.args.save_minutes:
                self.save()
                saved_at = self.seconds
        if not self.evaluated or self.evaluated < self.args.evaluations:
            self._evaluate()
        self.save()

    def _train_step(self) -> torch.Tensor:
        share = schedule(self.progress, self.args.warmup)
        if self.args.minutes:  # kernels are compiled while the clock runs
            share = min(share, (self.step + 1) / LEAST_WARMUP)
        for group in self.optimizer.param_groups:
            group["lr"] = self.args.learning_rate * share
        batch = self.windows.batch(self.step, self.args.batch_size)
        loss = next_token_loss(self.model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def _evaluate(self) -> None:
        self.evaluated = math.floor(self.progress * self.args.evaluations + 1e-9)
        size = self.args.batch_size
        bits = bits_per_byte(self.model.eval(), self.held_out, self.args.length, size, self.device)
        self.model.train()
        self._log(held_out_bits_per_byte=bits)

    def _log(self, **values: float) -> None:
        tokens = self.step * self.args.batch_size * self.args.length
        row = {"step": self.step, "tokens": tokens, "seconds": round(self.seconds, 2)}
        row |= {name: float(f"{value:.6g}") for name, value in values.items()}
        print(json.dumps(row), flush=True)
        with open(self.folder / LOG, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    # Checkpoints

    def save(self) -> None:
        """Replace the checkpoint in one step."""
        counts = {"step": self.step, "seconds": self.seconds, "evaluated": self.evaluated}
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save({"settings": self.settings, **counts, **state}, self._partial)
        os.replace(self._partial, self.folder / CHECKPOINT)

    def _begin(self) -> None:
        """UserError where the folder holds more than a run leaves that was killed before its first
        checkpoint: that goes."""
        left = (self.folder / LOG, self._partial)
        others = sorted(path.name for path in self.folder.iterdir() if path not in left)
        if others:
            raise UserError(f"{self.folder}: contains other files ({others[0]}); give another one")
        check_output(self.folder / LOG, STEPS, overwrite=True)
        for path in left:
            path.unlink(missing_ok=True)

    def _resume(self) -> None:
        path = self.folder / CHECKPOINT
        if not path.exists():
            self._begin()
            return
        state = torch.load(path, map_location=self.device, weights_only=True)
        for name, value in self.settings.items():
            if state["settings"].get(name) != value:
                before = state["settings"].get(name)
                raise UserError(
                    f"{self.folder}: a run with {name} {before}, not {value}: give the same "
                    "settings to resume it, or another folder"
                )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]
        self.evaluated = state["evaluated"]
        keep_log_until(self.folder / LOG, self.step)
        print(f"resumed from step {self.step}")


def keep_log_until(path: Path, step: int) -> None:
    """Remove what a log says on steps that a resumed run does again."""
    rows = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    kept = [row for row in rows if row.endswith("\n") and json.loads(row)["step"] <= step]
    path.write_text("".join(kept), encoding="utf-8")


def parameter_groups(model: MambaLM, weight_decay: float) -> list[dict]:
    """No decay of A_log, D, norms and biases."""
    named = list(model.named_parameters())
    decayed = [p for name, p in named if p.dim() >= 2 and not name.endswith("A_log")]
    others = [p for name, p in named if p.dim() < 2 or name.endswith("A_log")]
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0},
    ]


def schedule(progress: float, warmup: float) -> float:
    """The share of the learning rate: linear warm-up, then a cosine from 1 to 0.05."""
    if progress < warmup:
        return max(progress / warmup, 1e-3)
    return 0.05 + 0.95 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup))) / 2


if __name__ == "__main__":
    run_script(main, parse_args)
