"""The results file as it is written: whatever kills the run, its whole lines are valid and stay."""

import itertools
import json
import os
import resource
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from context_qa.metrics import summarize
from context_qa.provenance import differences
from context_qa.results import (
    Answer,
    articles_by_idx,
    read_summary,
    result_row,
    summary_path,
    whole_rows,
)
from errors import UserError
from files import is_at, locked, named_errors, replaced, write_at, write_whole
from squad_utils import Example


class ResultsFile:
    """The results of one run over `examples`, which goes on where it was cut off.

    record["settings"] is what decides the rows, in words: the file of a run with others is refused,
    by a UserError that says what differs, as are a path that cannot be written and one that another
    process is writing. Rows come in any order; `finish` puts them in that of the examples.
    """

    def __init__(
        self, path: str, examples: Sequence[Example], record: dict, overwrite: bool = False
    ):
        self.path, self.examples, self.started = Path(path), examples, time.time()
        runs = itertools.groupby(example.article for example in examples)
        articles = [[article, len(list(run))] for article, run in runs]
        self.record = record | {"num_questions": len(examples), "articles": articles}
        self.rows: list[dict] = []
        self.size = 0  # of the whole lines, in bytes
        self.descriptor = self._open()
        try:
            if not overwrite:
                self._go_on()
        except BaseException:
            os.close(self.descriptor)
            raise
        self.num_resumed = len(self.rows)

    @property
    def done(self) -> set[int]:
        """The idx of every row there is."""
        return {row["idx"] for row in self.rows}

    def __enter__(self) -> "ResultsFile":
        return self

    def __exit__(self, *exception) -> None:
        is_empty = os.fstat(self.descriptor).st_size == 0
        if self.is_new and is_empty and is_at(self.descriptor, self.path):
            self.path.unlink()
        os.close(self.descriptor)

    def _open(self) -> int:
        if os.path.isdir(summary_path(self.path)):  # else told only after all is computed
            raise UserError(f"{summary_path(self.path)}: cannot be written (a folder)")
        with named_errors(self.path):
            if self.path.exists() and not self.path.is_file():
                raise UserError(f"{self.path}: cannot be written (not a plain file)")
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.is_new = not self.path.exists()
            for _ in range(100):  # a run that ends can put another file there
                descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
                is_ours = locked(descriptor)
                if is_ours and is_at(descriptor, self.path):
                    return descriptor
                os.close(descriptor)
                if not is_ours:
                    raise UserError(f"{self.path}: another run is writing it; give another path")
            raise UserError(f"{self.path}: does not stay in its place; give another path")

    def _go_on(self) -> None:
        """Take over the rows that are there, if they are this run's."""
        data = self.path.read_bytes()
        try:
            rows, size = whole_rows(data, str(self.path))
        except UserError as error:
            raise UserError(f"{error}; to start again, give another path or --overwrite") from error
        if not rows:
            begun = b'{"idx": '
            if data[: len(begun)] != begun[: len(data)]:
                raise self._refusal("something else than results")
            return
        other = read_summary(self.path).get("settings")
        if not isinstance(other, dict):
            raise self._refusal(f"results of an unknown run: no {summary_path(self.path).name}")
        different = differences(other, self.record["settings"])
        if different:
            raise self._refusal(f"results of another run ({'; '.join(different)})")
        seen = set()
        for line, row in enumerate(rows, start=1):
            idx = row["idx"]
            if idx in seen or idx not in range(len(self.examples)):
                raise self._refusal(
                    f"in line {line} an idx, {idx}, that is there twice or too high"
                )
            if not _is_of(row, self.examples[idx]):
                raise self._refusal(
                    f"in line {line} what is not of the data's idx {idx}, or edited"
                )
            seen.add(idx)
        self.rows, self.size = rows, size
        with named_errors(self.path):
            os.ftruncate(self.descriptor, size)

    def _refusal(self, reason: str) -> UserError:
        return UserError(f"{self.path}: holds {reason}; give another path or --overwrite")

    def write(self, rows: Iterable[dict]) -> None:
        """Append rows; when it returns they are on the disk, and if it raises none of them is."""
        rows = list(rows)
        if not rows:
            return
        data = _lines(rows).encode()
        with named_errors(self.path):
            self._check_place()
            if not self.rows:  # what was there goes now that there are new results
                summary_path(self.path).unlink(missing_ok=True)
                os.ftruncate(self.descriptor, 0)
                self._write_summary({"complete": False} | self.record)
            try:
                write_at(self.descriptor, data, self.size)
            except BaseException:
                os.ftruncate(self.descriptor, self.size)
                raise
        self.size += len(data)
        self.rows += rows

    def _check_place(self) -> None:
        if not is_at(self.descriptor, self.path):
            raise UserError(
                f"{self.path}: was removed or replaced while it was written; run it again"
            )

    def finish(self, **measured: object) -> dict:
        """Put the rows in order and write OUTPUT.summary.json: scores, and all one needs to make
        them again. `measured`, the time and the memory go into it where this run was needed."""
        with named_errors(self.path):
            self._check_place()
            if any(one["idx"] > other["idx"] for one, other in itertools.pairwise(self.rows)):
                self.rows.sort(key=lambda row: row["idx"])
                before, self.descriptor = self.descriptor, replaced(self.path, _lines(self.rows))
                os.close(before)
        about = read_summary(self.path)
        if self.num_resumed < len(self.rows) or not about.get("complete"):
            about = {
                **self.record,
                "rows_of_earlier_runs": self.num_resumed,
                "wall_seconds": time.time() - self.started,
                "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
                * (1 if sys.platform == "darwin" else 1024),
                **measured,
            }
        found = summarize(self.rows, articles_by_idx(self.record))
        others = {name: value for name, value in about.items() if name not in found}
        summary = {"complete": True, **found, **others}
        self._write_summary(summary)
        return summary

    def _write_summary(self, summary: dict) -> None:
        write_whole(summary_path(self.path), json.dumps(summary, indent=2) + "\n")


def _lines(rows: Iterable[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)


def _is_of(row: Mapping, example: Example) -> bool:
    """Whether the row is the example's, with the scores of its guess."""
    names = ("confidence", "no_answer_probability", "time", "num_tokens", "num_new_tokens")
    if row["time"] <= 0:
        return False
    written = result_row(row["idx"], example, Answer(row["guess"], *(row[n] for n in names)))
    return written == {name: row[name] for name in written}
