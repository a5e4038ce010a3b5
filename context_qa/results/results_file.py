"""The results file that a run writes. If the run is killed, the file's complete lines are valid and
are kept. If another program changes the file, the run writes its rows again."""

import hashlib
import itertools
import json
import os
import resource
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from common.atomic_files import (
    is_current_file,
    replace_file,
    report_write_errors,
    try_lock,
    write_at,
)
from common.errors import UserError, printable
from common.json_text import json_text
from common.output_files import check_output, write_output
from common.provenance import differences
from context_qa.results.metrics import summarize
from context_qa.results.reading import RESULTS, is_complete_row, read_complete_rows
from context_qa.results.rows import answer_of, result_row
from context_qa.results.summary import (
    SUMMARY,
    articles_by_idx,
    incompleteness,
    read_summary,
    summary_path,
)
from squad_utils import Example

VERSIONS = ("git_commit", "python", "packages")  # of the code that made a row


class ResultsFile:
    """The results of one run over `examples`, which resumes an interrupted run.

    record["settings"] contains all that decides the rows. A UserError refuses the file of a run
    with other settings and says what differs; it also refuses a path that cannot be written and one
    that another process is writing. With `overwrite`, the first row replaces such results. A file
    that is not results, or not a summary where the summary is written, is always refused. Rows may
    be written in any order; `finish` sorts them into the order of the examples.

    The rows are kept in memory too. If another program changes, removes or replaces the file during
    the run, a warning reports it, the other content is kept under another name, and all rows are
    written again. Size and time of the file are compared at each write and at the end of the `with`
    block, its content before the first row and in `finish`.
    """

    def __init__(
        self, path: str, examples: Sequence[Example], record: dict, overwrite: bool = False
    ):
        self.path, self.examples, self.started = Path(path), examples, time.monotonic()
        runs = itertools.groupby(example.article for example in examples)
        articles = [[article, len(list(run))] for article, run in runs]
        self.record = record | {"num_questions": len(examples), "articles": articles}
        self.rows: list[dict] = []
        self.record["made_by"] = []  # the rows of earlier runs
        self.descriptor = self._open()
        try:
            with report_write_errors(self.path):
                data = self.path.read_bytes()
            self._note_content(data)
            if overwrite:
                check_output(self.path, RESULTS, overwrite)
            else:
                self._resume(data)
        except BaseException:
            self.__exit__()
            raise
        self.num_resumed = len(self.rows)

    @property
    def done(self) -> set[int]:
        """The idx of each row."""
        return {row["idx"] for row in self.rows}

    def _note_content(self, data: bytes) -> None:
        """Note what the file contains: this run's lines or, before its first row, those it
        found."""
        self.size, self.hash = len(data), hashlib.sha256(data)
        self.written_at = self._status().st_mtime_ns

    def __enter__(self) -> "ResultsFile":
        return self

    def __exit__(self, *exception) -> None:
        try:
            with report_write_errors(self.path):
                if self.rows:
                    self._write_again_if_changed()
                elif self.is_new and self._is_in_place() and self._status().st_size == 0:
                    self.path.unlink()
        finally:
            os.close(self.descriptor)

    def _open(self) -> int:
        # Checked now, since it is written only after all is computed.
        check_output(summary_path(self.path), SUMMARY, overwrite=True)
        with report_write_errors(self.path):
            if self.path.exists() and not self.path.is_file():
                raise UserError(f"{self.path}: cannot be written (not a plain file)")
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.is_new = not self.path.exists()
            for _ in range(100):  # a run that ends can put another file there
                descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
                is_ours = try_lock(descriptor)
                if is_ours and is_current_file(descriptor, self.path):
                    return descriptor
                os.close(descriptor)
                if not is_ours:
                    raise self._is_of_another_run()
            raise UserError(f"{self.path}: is replaced again and again; give another path")

    def _is_of_another_run(self) -> UserError:
        return UserError(f"{self.path}: another run is writing it; give another path")

    def _resume(self, data: bytes) -> None:
        """Resume with the rows in the file, if they are this run's."""
        try:
            rows, size = read_complete_rows(data, str(self.path))
        except UserError as error:
            raise UserError(f"{error}; give another path or move the file away") from error
        check_output(self.path, RESULTS, overwrite=True)
        summary = read_summary(self.path)
        if not rows and not is_complete_row(data):
            has_ended = summary and summary.get("complete") is not False
            if has_ended and summary.get("settings") != self.record["settings"]:
                name = summary_path(self.path).name
                raise self._refusal(f"no results, and {name} is of another run")
            return
        other = summary.get("settings")
        if not isinstance(other, dict):
            raise self._refusal(f"results of an unknown run: no {summary_path(self.path).name}")
        different = differences(other, self.record["settings"])
        if different:
            raise self._refusal(f"results of another run ({'; '.join(different)})")
        seen = set()
        for line, row in enumerate(rows, start=1):
            idx = row["idx"]
            if idx in seen or idx not in range(len(self.examples)):
                raise self._refusal(f"an idx, {idx}, in line {line} that is too high or not unique")
            if not _is_of(row, self.examples[idx]):
                raise self._refusal(
                    f"a row in line {line} that is edited, or not of the data's idx {idx}"
                )
            seen.add(idx)
        if rows:  # the last line of a killed run may be torn
            self.rows = rows
            if size < len(data):
                with report_write_errors(self.path):
                    os.ftruncate(self.descriptor, size)
                self._note_content(data[:size])
        self.record["made_by"] = _made_by(summary, len(rows))
        if len(rows) < len(self.examples):
            self._warn_of_other_versions()

    def _warn_of_other_versions(self) -> None:
        found = (
            difference
            for entry in self.record["made_by"]
            for difference in differences(_flat(entry), _flat(self.record))
        )
        different = "; ".join(dict.fromkeys(found))
        if different:
            self._warn(f"continues rows that other versions made ({different})")

    def _warn(self, message: str) -> None:
        tqdm.write(
            f"warning: {printable(f'{self.path}: {message}')}", file=sys.stderr
        )  # above a progress bar

    def _refusal(self, reason: str) -> UserError:
        return UserError(f"{self.path}: contains {reason}; give another path or set overwrite")

    def write(self, rows: Iterable[dict]) -> None:
        """Append rows. On return they are on the disk; if it raises, none of them is."""
        rows = list(rows)
        if not rows:
            return
        data = _lines(rows).encode()
        with report_write_errors(self.path):
            self._write_again_if_changed(compare_content=not self.rows)
            self._write_first_summary()
            try:
                write_at(self.descriptor, data, self.size)
            except BaseException:
                os.ftruncate(self.descriptor, self.size)
                raise
        self.size += len(data)
        self.hash.update(data)
        self.written_at = self._status().st_mtime_ns
        self.rows += rows

    def _write_first_summary(self) -> None:
        """Write the summary of an incomplete run, with this run's first row or where it is
        missing."""
        summary = summary_path(self.path)
        if not self.rows:  # new results replace what was there
            check_output(summary, SUMMARY, overwrite=True)
            summary.unlink(missing_ok=True)
            os.ftruncate(self.descriptor, 0)
            self._note_content(b"")
        if len(self.rows) == self.num_resumed or not summary.exists():
            self._write_summary({"complete": False} | self.record)

    def _write_again_if_changed(self, compare_content: bool = False) -> None:
        """Write all rows again if the file is not the one that this run has written, or found."""
        is_in_place = self._is_in_place()
        if is_in_place and self._is_unchanged(compare_content):
            return
        what = "changed" if is_in_place else "removed"
        if is_in_place and not self._is_cut():
            what = f"changed (what was there is now {self._set_aside()})"
        elif not is_in_place and os.path.lexists(os.path.realpath(self.path)):
            what = f"replaced (by what is now {self._set_aside()})"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._write_all()
        self._warn(f"was {what} during the run; its {len(self.rows):,} rows are written again")

    def _is_cut(self) -> bool:
        """Whether the file contains only some of this run's rows."""
        return _lines(self.rows).encode().startswith(self.path.read_bytes())

    def _is_in_place(self) -> bool:
        return is_current_file(self.descriptor, self.path)

    def _status(self) -> os.stat_result:
        return os.fstat(self.descriptor)

    def _is_unchanged(self, compare_content: bool) -> bool:
        status = self._status()
        if status.st_size != self.size:
            return False
        if status.st_mtime_ns == self.written_at and not compare_content:
            return True
        return hashlib.sha256(self.path.read_bytes()).digest() == self.hash.digest()

    def _set_aside(self) -> Path:
        """Rename the file that another program has changed or put in this one's place, and return
        its new path. UserError if another run is writing it."""
        path = Path(os.path.realpath(self.path))
        names = (f"{path.name}.replaced{number or ''}" for number in itertools.count())
        aside = next(path.with_name(name) for name in names if not path.with_name(name).exists())
        if self._is_in_place():
            return path.rename(aside)
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe does not block it
        try:
            if not try_lock(descriptor):
                raise self._is_of_another_run()
            return path.rename(aside)
        finally:
            os.close(descriptor)

    def _write_all(self) -> None:
        text = _lines(self.rows)
        before, self.descriptor = self.descriptor, replace_file(self.path, text)
        os.fchmod(self.descriptor, os.fstat(before).st_mode)
        os.close(before)
        self._note_content(text.encode())

    def finish(self, **measured: object) -> dict:
        """Sort the rows and write the summary: the scores, and all that is needed to reproduce
        them. It contains `measured`, the time and the memory if this run computed anything."""
        with report_write_errors(self.path):
            self._write_again_if_changed(compare_content=True)
            if any(one["idx"] > other["idx"] for one, other in itertools.pairwise(self.rows)):
                self.rows.sort(key=lambda row: row["idx"])
                self._write_all()
        about = read_summary(self.path)
        if self.num_resumed < len(self.rows) or about.get("complete") is not True:
            about = {
                **self.record,
                "rows_of_earlier_runs": self.num_resumed,
                "wall_seconds": time.monotonic() - self.started,
                "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
                * (1 if sys.platform == "darwin" else 1024),
                **measured,
            }
        own = {"rows": len(self.rows) - self.num_resumed} | _versions(self.record)
        about["made_by"] = _merged([*self.record["made_by"], own])
        first_negative = about["first_negative"] = self.record.get("first_negative")
        missing = incompleteness(len(self.rows), {"num_questions": len(self.examples)})
        if missing:
            self._warn(missing)
        found = {"complete": not missing} | summarize(
            self.rows, articles_by_idx(self.record, self.rows), first_negative
        )
        summary = found | {name: value for name, value in about.items() if name not in found}
        self._write_summary(summary)
        return summary

    def _write_summary(self, summary: dict) -> None:
        text = json_text(summary, indent=2) + "\n"
        write_output(summary_path(self.path), text, SUMMARY, overwrite=True)


def _lines(rows: Iterable[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)


def _is_of(row: Mapping, example: Example) -> bool:
    """Whether a row is of this example and has the scores of its guess."""
    if row["time"] <= 0:
        return False
    written = result_row(row["idx"], example, answer_of(row))
    return written == {name: row[name] for name in written}


def _versions(record: Mapping) -> dict:
    return {name: record.get(name) for name in VERSIONS}


def _flat(record: Mapping) -> dict:
    """The versions, with each package on the level of the others."""
    versions = _versions(record)
    packages = versions.pop("packages")
    return versions | (packages if isinstance(packages, dict) else {})


def _made_by(summary: Mapping, num_rows: int) -> list[dict]:
    """The number of rows that each commit, with its versions, has made, in the order of the runs.

    A summary's `made_by` counts the rows of its own run only once that has ended: rows that are not
    counted are those of the run that wrote the summary.
    """
    counted = summary.get("made_by", [])
    entries, left = [], num_rows
    for entry in counted if all(map(_is_count, counted)) else ():
        rows = min(entry["rows"], left)
        entries.append({"rows": rows} | _versions(entry))
        left -= rows
    return _merged([*entries, {"rows": left} | _versions(summary)])


def _is_count(entry: object) -> bool:
    return isinstance(entry, dict) and type(entry.get("rows")) is int and entry["rows"] >= 0


def _merged(entries: Iterable[dict]) -> list[dict]:
    """The entries that have rows; consecutive ones of the same versions are added up."""
    found = []
    filled = (entry for entry in entries if entry["rows"])
    for versions, group in itertools.groupby(filled, key=_versions):
        found.append({"rows": sum(entry["rows"] for entry in group)} | versions)
    return found
