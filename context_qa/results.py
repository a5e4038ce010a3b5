"""The results file, one JSON object a line as it is computed, and the summary beside it."""

import argparse
import contextlib
import json
import os
import resource
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from context_qa.answering import Answer
from context_qa.provenance import run_record
from errors import UserError
from squad_utils import Example, exact_match, f1_score, is_correct, score_summary


def result_row(idx: int, example: Example, answer: Answer) -> dict:
    """One line of the results file, in the order that readers rely on."""
    return {
        "idx": idx,
        "id": example.id,
        "context": example.context,
        "question": example.question,
        "answer": example.target,
        "answers": list(example.answers),
        "guess": answer.text,
        "is_correct": is_correct(answer.text, example.target),
        "exact_match": exact_match(answer.text, example.answers),
        "f1": f1_score(answer.text, example.answers),
        "confidence": answer.confidence,
        "no_answer_probability": answer.no_answer_probability,
        "time": answer.seconds,
        "num_tokens": answer.num_tokens,
        "num_new_tokens": answer.num_new_tokens,
        "tokens_per_sec": answer.num_new_tokens / answer.seconds,
    }


class ResultsFile:
    """A new JSONL file at `path`, its parents made; each `write` reaches the disk whole.

    UserError where the path cannot be written or holds results already.
    """

    def __init__(self, path: str, overwrite: bool = False):
        self.path = Path(path)
        self.summary_path = self.path.with_name(f"{self.path.name}.summary.json")
        self.started = time.time()
        self.rows: list[dict] = []
        if os.path.isdir(self.summary_path):  # else told only after all is computed
            raise UserError(f"{self.summary_path}: cannot be written (a folder)")
        if not overwrite and os.path.isfile(path) and os.path.getsize(path) > 0:
            raise UserError(f"{path}: holds results already; give another path or --overwrite")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = self.path.open("a", encoding="utf-8")
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror})") from error

    def __enter__(self) -> "ResultsFile":
        return self

    def __exit__(self, *exception) -> None:
        with contextlib.suppress(OSError):  # told by write, which flushes
            self.file.close()

    def write(self, rows: Iterable[dict]) -> None:
        rows = list(rows)
        if not rows:
            return
        try:
            if not self.rows and self.path.stat().st_size:  # now that there are new results
                self.file.truncate(0)
                self.summary_path.unlink(missing_ok=True)
            self.file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
            self.rows += rows
            self.file.flush()
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror})") from error

    def summarize(self, args: argparse.Namespace, device: str) -> dict:
        """Write OUTPUT.summary.json: scores, and all one needs to make them again."""
        summary = {
            "scores": score_summary(self.rows),
            **run_record(args, args.model, args.data),
            "device": device,
            "wall_seconds": time.time() - self.started,
            "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            * (1 if sys.platform == "darwin" else 1024),
        }
        try:
            self.summary_path.write_text(json.dumps(summary, indent=2) + "\n")
        except OSError as error:
            raise UserError(f"{self.summary_path}: cannot be written ({error.strerror})") from error
        return summary


def print_scores(scores: dict) -> None:
    """The scores as lines of a table on standard output."""
    for name, value in scores.items():
        shown = f"{value:6.2f} %" if isinstance(value, float) else f"{value:6d}"
        print(f"{name.replace('_', ' '):30}{shown}")
