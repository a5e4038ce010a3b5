"""The summary beside a results file: what made the results, and whether they are complete."""

import bisect
import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import BinaryIO

from common.errors import UserError, warn
from common.json_text import parse_json, read_json
from common.output_files import Kind
from context_qa.results.rows import LARGEST

_MOST_BYTES = 1 << 28  # a longer summary is not ours


def summary_path(path: str | Path) -> Path:
    """The path of a results file's summary."""
    return Path(f"{Path(path)}.summary.json")


def read_summary(path: str | Path, warns: bool = False) -> dict:
    """The summary beside a results file, without values of a wrong type; empty if it cannot be
    read. warns: warn on stderr of what is ignored."""
    where = summary_path(path)
    try:
        summary = read_json(where)
    except UserError as error:
        if warns and os.path.lexists(where):
            warn(f"{error}; the summary is ignored")
        return {}
    shapes = {
        "settings": dict,
        "arguments": dict,
        "articles": list,
        "num_questions": int,
        "first_negative": int | None,
        "made_by": list,
        "warnings": list,
    }
    values = summary if isinstance(summary, dict) else {}
    found = {name: v for name, v in values.items() if _has_shape(v, shapes.get(name, object))}
    if warns and values is not summary:
        warn(f"{where}: not the summary of a run; it is ignored")
    elif warns and len(found) < len(values):
        names = ", ".join(name for name in values if name not in found)
        warn(f"{where}: values of a wrong type are ignored: {names}")
    return found


def _has_shape(value: object, kind: type | UnionType) -> bool:
    if kind is object:
        return True
    if isinstance(value, int):
        return type(value) is int and 0 <= value <= LARGEST and isinstance(value, kind)
    return isinstance(value, kind)


def _is_summary(stream: BinaryIO) -> bool:
    try:
        summary = parse_json(stream.read(_MOST_BYTES), "summary")
    except UserError:
        return False
    is_object = isinstance(summary, dict) and summary.keys() >= {"settings", "articles"}
    return is_object and isinstance(summary["settings"], dict)


SUMMARY = Kind("the summary of a run", _is_summary)


def incompleteness(num_rows: int, summary: Mapping, is_torn: bool = False) -> str | None:
    """Why a results file is not that of a complete run, such as "is incomplete: 12 of 100
    questions". None if it is, and if no summary says otherwise."""
    asked = summary.get("num_questions")
    has_ended = summary.get("complete", True) is True
    if has_ended and not is_torn and asked in (None, num_rows):
        return None
    if asked is not None and num_rows > asked:
        return f"has more rows, {num_rows:,}, than its run has questions, {asked:,}"
    share = f"{num_rows:,} questions" if asked is None else f"{num_rows:,} of {asked:,} questions"
    if is_torn:
        return f"is incomplete: {share}; its last line is torn"
    if num_rows == asked:
        return f"has all of its run's {asked:,} questions, but the run has not ended"
    return f"is incomplete: {share}"


def find_first_negative(summary: Mapping, rows: Sequence[Mapping]) -> int | None:
    """The idx of the first negative, which is after all of the data's own questions; None without
    negatives, and where no summary says so."""
    kind = summary.get("settings", {}).get("negatives")
    if kind is None or "first_negative" in summary:
        return summary.get("first_negative")
    # Summaries of earlier versions contain the kind only: negatives are the last rows, with ids
    # that end in it, of questions that are there with an answer too.
    ordered = sorted(rows, key=lambda row: row["idx"], reverse=True)
    answerable = {(f"{row['id']}#{kind}", row["question"]) for row in rows if row["answers"]}
    is_negative = (not r["answers"] and (r["id"], r["question"]) in answerable for r in ordered)
    count = sum(itertools.takewhile(bool, is_negative))
    return ordered[count - 1]["idx"] if count else None


def articles_by_idx(summary: Mapping, rows: Iterable[Mapping]) -> dict[int, str]:
    """The article of each row that has one, by idx, from a summary's run lengths; nothing if
    these are impossible."""
    runs = summary.get("articles", [])
    if not all(isinstance(run, list) and [type(x) for x in run[1:]] == [int] for run in runs):
        return {}
    ends = list(itertools.accumulate(count for _, count in runs))
    total = ends[-1] if ends else 0
    if any(count < 0 for _, count in runs) or total > summary.get("num_questions", total):
        return {}
    places = {row["idx"]: bisect.bisect_right(ends, row["idx"]) for row in rows}
    found = {idx: runs[place][0] for idx, place in places.items() if place < len(runs)}
    return {idx: article for idx, article in found.items() if isinstance(article, str)}
