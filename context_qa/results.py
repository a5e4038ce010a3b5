"""The format of results: a JSON object a line for each question, and the summary beside them."""

import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from errors import UserError
from squad_utils import Example, exact_match, f1_score, is_correct

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
NULLABLE = ("confidence", "no_answer_probability")  # of a baseline that has no probabilities
SHARES = ("exact_match", "f1", *NULLABLE)  # from 0 to 1


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
    values = (
        idx,
        example.id,
        example.context,
        example.question,
        example.target,
        list(example.answers),
        answer.text,
        is_correct(answer.text, example.target),
        exact_match(answer.text, example.answers),
        f1_score(answer.text, example.answers),
        answer.confidence,
        answer.no_answer_probability,
        answer.seconds,
        answer.num_tokens,
        answer.num_new_tokens,
        answer.num_new_tokens / answer.seconds,
    )
    return dict(zip(FIELDS, values, strict=True))


def read_results(path: str) -> list[dict]:
    """The rows of a results file. A kill can tear its last line, which is then left out; UserError
    names any other line that is no row."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    rows, size = whole_rows(data, path)
    last = _parsed_row(data[size:])
    if last is not None:
        rows.append(last)
    if not rows:
        raise UserError(f"{path} line 1: no results row; an evaluation writes such a file")
    return rows


def whole_rows(data: bytes, path: str) -> tuple[list[dict], int]:
    """Rows of the lines that end in a newline, and the size of these lines in bytes."""
    *lines, torn = data.split(b"\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        row = _parsed_row(line)
        if row is None:
            needed = ", ".join(FIELDS)
            complaint = (
                f"{path} line {number}: no results row; mend or remove it, it needs {needed}"
            )
            raise UserError(complaint)
        rows.append(row)
    return rows, len(data) - len(torn)


def _parsed_row(line: bytes) -> dict | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    is_row = isinstance(row, dict) and all(
        name in row and _fits(row[name], kind, name) for name, kind in FIELDS.items()
    )
    return row if is_row else None


def _fits(value: object, kind: type, name: str) -> bool:
    if value is None:
        return name in NULLABLE
    if kind is list:
        return type(value) is list and all(_is_text(text) for text in value)
    if kind is str:
        return _is_text(value)
    if name in SHARES:
        return type(value) in (float, int) and 0 <= value <= 1
    if kind is float and type(value) is float:
        return math.isfinite(value)
    is_whole = type(value) is int and abs(value) < 2**63
    return type(value) is bool if kind is bool else is_whole


def _is_text(value: object) -> bool:
    """Whether it is a string that UTF-8 can hold: half a surrogate pair is none."""
    if type(value) is not str:
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def summary_path(path: str | Path) -> Path:
    """Where the summary of a results file stands."""
    return Path(path).with_name(f"{Path(path).name}.summary.json")


def read_summary(path: str | Path) -> dict:
    """The summary beside a results file; without what a hand has put out of shape, and empty where
    there is none that can be read."""
    try:
        summary = json.loads(summary_path(path).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    shapes = {"settings": dict, "arguments": dict, "articles": list}
    items = summary.items() if isinstance(summary, dict) else ()
    return {name: v for name, v in items if isinstance(v, shapes.get(name, object))}


def articles_by_idx(summary: Mapping) -> dict[int, str]:
    """Each question's article, of those that have one, from a summary's run lengths."""
    runs = summary.get("articles", [])
    if not all(isinstance(run, list) and [type(x) for x in run[1:]] == [int] for run in runs):
        return {}
    every = itertools.chain.from_iterable([article] * count for article, count in runs)
    return {idx: article for idx, article in enumerate(every) if isinstance(article, str)}
