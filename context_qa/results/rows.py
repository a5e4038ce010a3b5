"""The format of results: a JSON object a line for each question, and the summary beside them."""

import bisect
import itertools
import json
import math
import os
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import BinaryIO

from common.errors import UserError, warn
from common.input_files import read_bytes
from common.json_text import is_nested_too_deep, parse_json, read_json
from common.output_files import Kind
from squad_utils import Example, abstains, exact_match, f1_score, is_correct, made_id

# A row's fields in the order that readers rely on, as what JSON gives; None only in `NULLABLE`.
FIELDS = {
    "idx": int,
    "id": str,
    "context": str,
    "question": str,
    "answer": str,
    "answers": list,
    "guess": str,
    "is_correct": bool,
    "exact_match": float,
    "f1": float,
    "confidence": float,
    "no_answer_probability": float,
    "time": float,
    "num_tokens": int,
    "num_new_tokens": int,
    "tokens_per_sec": float,
}
KINDS = {
    int: "a whole number",
    str: "text",
    list: "a list of texts",
    bool: "true or false",
    float: "a number",
}
NULLABLE = ("confidence", "no_answer_probability")  # of a baseline that has no probabilities
SHARES = ("exact_match", "f1", *NULLABLE)  # from 0 to 1
AMOUNTS = ("idx", "time", "num_tokens", "num_new_tokens", "tokens_per_sec")  # from 0 to LARGEST
LARGEST = 10**15
OLDER_NAMES = {"prompt": "question", "response": "answer"}  # those of the Oxen data


@dataclass(frozen=True)
class Answer:
    """A guess and what the model thinks of it.

    confidence and no_answer_probability are products of token probabilities, the stop included: of
    the guess, and of NO_ANSWER in its place. seconds: wall time of the batch over its rows.
    num_tokens: those of the prompt, context included; num_new_tokens: those of the guess.
    """

    text: str
    confidence: float | None
    no_answer_probability: float | None
    seconds: float
    num_tokens: int
    num_new_tokens: int


def result_row(idx: int, example: Example, answer: Answer) -> dict:
    """One line of the results file."""
    return {
        "idx": idx,
        **_reference(example),
        "guess": answer.text,
        **_scores(answer.text, example),
        "confidence": answer.confidence,
        "no_answer_probability": answer.no_answer_probability,
        "time": answer.seconds,
        "num_tokens": answer.num_tokens,
        "num_new_tokens": answer.num_new_tokens,
        "tokens_per_sec": answer.num_new_tokens / answer.seconds,
    }


def _reference(example: Example) -> dict:
    return {
        "id": example.id,
        "context": example.context,
        "question": example.question,
        "answer": example.target,
        "answers": list(example.answers),
    }


def _scores(guess: str, example: Example) -> dict:
    return {
        "is_correct": is_correct(guess, example.target),
        "exact_match": exact_match(guess, example.answers),
        "f1": f1_score(guess, example.answers),
    }


# Reading: any JSON objects, then rows of this layout or of an older one, or of this layout alone.


def read_results(path: str, warn: bool = False) -> list[dict]:
    """The rows of a results file: see `read_objects`, `results_rows` and, where `warn` is true,
    `warn_if_incomplete`."""
    objects, is_torn = read_objects(path)
    rows = results_rows(objects, path)
    if warn:
        warn_if_incomplete(path, len(rows), is_torn)
    return rows


def read_objects(path: str) -> tuple[dict[int, dict], bool]:
    """The JSON objects of a JSONL file by line, from 1 on, and whether its last line is torn.

    A kill can tear the last line, which is then skipped, as blank ones are. UserError names any
    other line that is not a JSON object, and a file without any.
    """
    *lines, last = read_bytes(path, "JSONL, as an evaluation writes it").split(b"\n")
    numbered = {number: line for number, line in enumerate(lines, start=1) if line.strip()}
    objects = {number: _object(line, f"{path} line {number}") for number, line in numbered.items()}
    found = _parsed(last)
    if found is not None:
        objects[len(lines) + 1] = found
    if not objects:
        wanted = "give JSONL, as an evaluation writes it"
        if last.strip():
            raise _no_object(last, f"{path} line {len(lines) + 1}", wanted)
        raise UserError(f"{path}: the file is empty; {wanted}")
    return objects, found is None and bool(last.strip())


def results_rows(objects: Mapping[int, dict], path: str) -> list[dict]:
    """The rows that the objects of a results file are, each with all of FIELDS.

    A row of an older layout needs a question, a guess and a reference. It gets its place in the
    file as idx, an id as `read_examples` makes them, scores as a run computes them, and None for
    what is not known. UserError names a line without these columns, or with a value that does not
    fit its column.
    """
    rows = []
    for idx, (line, found) in enumerate(objects.items()):
        place = f"{path} line {line}"
        if found.keys() >= FIELDS.keys():
            _check_values(found, place)
            rows.append(found)
        else:
            rows.append(_older_row(found, idx, place))
    return rows


def whole_rows(data: bytes, path: str) -> tuple[list[dict], int]:
    """Rows of the lines that end in a newline, and the size of these lines in bytes. UserError
    names a line that is not a row of exactly this layout."""
    *lines, torn = data.split(b"\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        place = f"{path} line {number}"
        row = _object(line, place)
        if row.keys() != FIELDS.keys():
            raise _other_layout(row, place, ", ".join(FIELDS))
        _check_values(row, place)
        rows.append(row)
    return rows, len(data) - len(torn)


def is_whole_row(line: bytes) -> bool:
    """Whether a line is a row as `result_row` makes them, column by column."""
    row = _parsed(line)
    return row is not None and list(row) == list(FIELDS) and not _wrong_values(row)


def is_torn_row(line: bytes) -> bool:
    """Whether a line is the beginning of a row, as a run that is killed leaves it; a crash of the
    system can leave zeros."""
    line, begun = line.rstrip(b"\0"), b'{"idx": '
    if len(line) <= len(begun):
        return begun.startswith(line)
    if _begins_with_a_value(line):
        return False
    names = [name.encode() for name in FIELDS]
    found = re.findall(rb'"(\w+)": ', line)
    is_begun = re.fullmatch(rb'{"idx": \d+(, "id": ".*|, "id": ?|, ("(id?"?)?)?|,)?', line, re.S)
    return is_begun is not None and found == names[: len(found)]


def _begins_with_a_value(line: bytes) -> bool:
    """Whether a whole JSON value comes first in a line, whatever follows."""
    try:
        json.JSONDecoder().raw_decode(line.decode(errors="replace"))
    except (ValueError, RecursionError):
        return False
    return True


def _is_results(stream: BinaryIO) -> bool:
    lines = iter(lambda: stream.readline(_MOST_BYTES), b"")
    return all(
        is_whole_row(line) or (not line.endswith(b"\n") and is_torn_row(line)) for line in lines
    )


RESULTS = Kind("results", _is_results)
_MOST_BYTES = 1 << 28  # of a row, of a summary: what is longer is not ours


def _object(line: bytes, place: str) -> dict:
    found = _parsed(line)
    if found is None:
        raise _no_object(line, place)
    return found


def _no_object(line: bytes, place: str, remedy: str = "correct or remove the line") -> UserError:
    try:
        line.decode()
    except UnicodeDecodeError:
        return UserError(f"{place}: not UTF-8; convert the file to UTF-8")
    return UserError(f"{place}: not a JSON object; {remedy}")


def _parsed(line: bytes) -> dict | None:
    try:
        value = json.loads(
            line.decode("utf-8-sig"), parse_float=_finite_number, parse_constant=_finite_number
        )
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) and not is_nested_too_deep(value) else None


def _finite_number(text: str) -> float:
    """The number; ValueError for NaN, Infinity and what is too large, which JSON does not have."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


def _older_row(found: Mapping, idx: int, place: str) -> dict:
    renamed = {name: found[older] for older, name in OLDER_NAMES.items() if older in found}
    values = {**renamed, **found}
    row = {name: values[name] for name in FIELDS if values.get(name) is not None}
    if "answer" in row:
        row.setdefault("answers", [row["answer"]])
    if not row.keys() >= {"question", "answers", "guess"}:
        raise _other_layout(found, place, "question, guess, and answers or answer")
    if type(row.get("id")) is int:
        row["id"] = str(row["id"])
    for name in ("is_correct", "exact_match", "f1"):  # defined in another way, perhaps
        row.pop(name, None)
    _check_values(row, place)
    context, question = row.get("context"), row["question"]
    answers = [answer for answer in row["answers"] if not abstains(answer)]
    identifier = row.get("id", made_id(context, question, answers))
    example = Example(identifier, context, question, tuple(answers))
    known = {"idx": idx} | row | _reference(example) | _scores(row["guess"], example)
    return dict.fromkeys(FIELDS) | known


def has_made_id(row: Mapping) -> bool:
    """Whether the data gave no id, so that the row's is a hash of context, question and answers."""
    return row["id"] == made_id(row["context"], row["question"], row["answers"])


def _other_layout(row: Mapping, place: str, needed: str) -> UserError:
    columns = ", ".join(name for name, value in row.items() if value is not None)
    columns = textwrap.shorten(columns, 200, placeholder=" ...") or "none"
    return UserError(f"{place}: another layout (columns: {columns}); needed: {needed}")


def _check_values(row: Mapping, place: str) -> None:
    for name in _wrong_values(row):
        wanted = KINDS[FIELDS[name]]
        if name in SHARES:
            wanted += " from 0 to 1"
        elif name in AMOUNTS:
            wanted += f" from 0 to {LARGEST:.0e}"
        raise UserError(f"{place}: {name!r} is {row[name]!r:.40}; it must be {wanted}")


def _wrong_values(row: Mapping) -> list[str]:
    return [
        name for name, kind in FIELDS.items() if name in row and not _fits(row[name], kind, name)
    ]


def _fits(value: object, kind: type, name: str) -> bool:
    if value is None:
        return name in NULLABLE
    if not is_kind(value, kind):
        return False
    if kind in (str, list):
        return _is_text("".join(value))
    if name in AMOUNTS:
        return 0 <= value <= LARGEST
    return name not in SHARES or 0 <= value <= 1


def is_kind(value: object, kind: type) -> bool:
    """Whether a JSON value is of a kind of FIELDS without loss: a list is one of texts, a float may
    be written without a decimal point, an int has 64 bits."""
    if kind is list:
        return type(value) is list and all(type(text) is str for text in value)
    if kind is float and type(value) is int:
        return abs(value) <= 2**53
    return type(value) is kind and (kind is not int or -(2**63) <= value < 2**63)


def _is_text(value: str) -> bool:
    """Whether UTF-8 can hold it: half a surrogate pair it cannot."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


# The summary


def summary_path(path: str | Path) -> Path:
    """The path of a results file's summary."""
    return Path(f"{Path(path)}.summary.json")


def read_summary(path: str | Path, warns: bool = False) -> dict:
    """The summary beside a results file; without what a hand has put out of shape, and empty where
    there is none that can be read. warns: a line on stderr says what is ignored."""
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
    """How a results file differs from that of a run that has ended, such as "is incomplete: 12 of
    100 questions". None if it does not, or where a summary does not say."""
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


def warn_if_incomplete(path: str, num_rows: int, is_torn: bool) -> None:
    """One line on stderr where a results file that is read is not the whole of its run."""
    found = incompleteness(num_rows, read_summary(path, warns=True), is_torn)
    if found:
        warn(f"{path} {found}")


def find_first_negative(summary: Mapping, rows: Sequence[Mapping]) -> int | None:
    """The idx of the first unanswerable copy, which is after all of the data's own questions; None
    where there is no copy, or no summary that says so."""
    kind = summary.get("settings", {}).get("negatives")
    if kind is None or "first_negative" in summary:
        return summary.get("first_negative")
    # Summaries of earlier versions name the kind alone: copies are the last rows, with ids that end
    # in it, of questions that are there with an answer too.
    ordered = sorted(rows, key=lambda row: row["idx"], reverse=True)
    answerable = {(f"{row['id']}#{kind}", row["question"]) for row in rows if row["answers"]}
    is_copy = (not r["answers"] and (r["id"], r["question"]) in answerable for r in ordered)
    copies = list(itertools.takewhile(bool, is_copy))
    return ordered[len(copies) - 1]["idx"] if copies else None


def articles_by_idx(summary: Mapping, rows: Iterable[Mapping]) -> dict[int, str]:
    """The article of each row that has one, by idx, from a summary's run lengths; nothing where
    these cannot be right."""
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
