"""Read results: any JSON objects, rows of this layout or of an older one, or rows of this alone."""

import json
import math
import re
import textwrap
from collections.abc import Mapping
from typing import BinaryIO

from common.errors import UserError, warn
from common.input_files import read_bytes
from common.json_text import is_nested_too_deep
from common.output_files import Kind
from context_qa.results.rows import (
    COLUMNS,
    check_values,
    find_wrong_values,
    reference_values,
    score_values,
)
from context_qa.results.summary import incompleteness, read_summary
from squad_utils import Example, abstains, made_id

OLDER_NAMES = {"prompt": "question", "response": "answer"}  # those of the Oxen data


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
    """The rows of a results file from its objects, each with all of COLUMNS.

    A row of an older layout needs a question, a guess and a reference. It gets its place in the
    file as idx, an id as `read_examples` makes them, scores as a run computes them, and None for
    unknown values. UserError names a line without these columns, or with a value that does not
    fit its column.
    """
    rows = []
    for idx, (line, found) in enumerate(objects.items()):
        place = f"{path} line {line}"
        if found.keys() >= COLUMNS.keys():
            check_values(found, place)
            rows.append(found)
        else:
            rows.append(_older_row(found, idx, place))
    return rows


def read_complete_rows(data: bytes, path: str) -> tuple[list[dict], int]:
    """Rows of the lines that end in a newline, and the size of these lines in bytes. UserError
    names a line that is not a row of exactly this layout."""
    *lines, torn = data.split(b"\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        place = f"{path} line {number}"
        row = _object(line, place)
        if row.keys() != COLUMNS.keys():
            raise _other_layout(row, place, ", ".join(COLUMNS))
        check_values(row, place)
        rows.append(row)
    return rows, len(data) - len(torn)


def is_complete_row(line: bytes) -> bool:
    """Whether a line is a complete row, with the columns of `result_row` in their order."""
    row = _parsed(line)
    return row is not None and list(row) == list(COLUMNS) and not find_wrong_values(row)


def is_torn_row(line: bytes) -> bool:
    """Whether a line is the beginning of a row, as a killed run leaves it; a crash of the system
    can leave zeros after it."""
    line, begun = line.rstrip(b"\0"), b'{"idx": '
    if len(line) <= len(begun):
        return begun.startswith(line)
    if _begins_with_a_value(line):
        return False
    names = [name.encode() for name in COLUMNS]
    found = re.findall(rb'"(\w+)": ', line)
    is_begun = re.fullmatch(rb'{"idx": \d+(, "id": ".*|, "id": ?|, ("(id?"?)?)?|,)?', line, re.S)
    return is_begun is not None and found == names[: len(found)]


def _begins_with_a_value(line: bytes) -> bool:
    """Whether a line begins with a complete JSON value."""
    try:
        json.JSONDecoder().raw_decode(line.decode(errors="replace"))
    except (ValueError, RecursionError):
        return False
    return True


def _is_results(stream: BinaryIO) -> bool:
    lines = iter(lambda: stream.readline(_MOST_BYTES), b"")
    return all(
        is_complete_row(line) or (not line.endswith(b"\n") and is_torn_row(line)) for line in lines
    )


RESULTS = Kind("results", _is_results)


_MOST_BYTES = 1 << 28  # of a row: a longer line is not ours


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
    """The number; ValueError for NaN, Infinity and numbers that are too large for a float."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


def _older_row(found: Mapping, idx: int, place: str) -> dict:
    renamed = {name: found[older] for older, name in OLDER_NAMES.items() if older in found}
    values = {**renamed, **found}
    row = {name: values[name] for name in COLUMNS if values.get(name) is not None}
    if "answer" in row:
        row.setdefault("answers", [row["answer"]])
    if not row.keys() >= {"question", "answers", "guess"}:
        raise _other_layout(found, place, "question, guess, and answers or answer")
    if type(row.get("id")) is int:
        row["id"] = str(row["id"])
    for name in ("is_correct", "exact_match", "f1"):  # perhaps of another definition
        row.pop(name, None)
    check_values(row, place)
    context, question = row.get("context"), row["question"]
    answers = [answer for answer in row["answers"] if not abstains(answer)]
    identifier = row.get("id", made_id(context, question, answers))
    example = Example(identifier, context, question, tuple(answers))
    known = {"idx": idx} | row | reference_values(example) | score_values(row["guess"], example)
    return dict.fromkeys(COLUMNS) | known


def has_made_id(row: Mapping) -> bool:
    """Whether the data gave no id, so that the row's is a hash of context, question and answers."""
    return row["id"] == made_id(row["context"], row["question"], row["answers"])


def _other_layout(row: Mapping, place: str, needed: str) -> UserError:
    columns = ", ".join(name for name, value in row.items() if value is not None)
    columns = textwrap.shorten(columns, 200, placeholder=" ...") or "none"
    return UserError(f"{place}: another layout (columns: {columns}); needed: {needed}")


def warn_if_incomplete(path: str, num_rows: int, is_torn: bool) -> None:
    """Warn on stderr if a results file does not contain all rows of its run."""
    found = incompleteness(num_rows, read_summary(path, warns=True), is_torn)
    if found:
        warn(f"{path} {found}")
