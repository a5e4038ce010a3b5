"""A row of results: its columns, defined once for files, checks, SQL types and documentation."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, NamedTuple, get_type_hints

from common.errors import UserError
from squad_utils import Example, exact_match, f1_score, is_correct

LARGEST = 10**15  # of numbers without a bound of their own


class About(NamedTuple):
    """What a column means, and the largest of its numbers; the least is 0."""

    meaning: str
    most: int | None = None


@dataclass
class ResultRow:
    """One line of a results file, in the order of its columns.

    To add a column: add it here, fill it in `result_row`, and name it in results/README.md.
    """

    idx: Annotated[int, About("the question's place in the data, from 0", LARGEST)]
    id: Annotated[str, About("the question's id in the data, or a hash of its content")]
    context: Annotated[str, About("the context")]
    question: Annotated[str, About("the question")]
    answer: Annotated[str, About('the first reference, or "I don\'t know."')]
    answers: Annotated[list[str], About("all references; empty if the question is unanswerable")]
    guess: Annotated[str, About("new tokens up to the first newline or end-of-text")]
    is_correct: Annotated[
        bool, About("`strip().lower()` equality of guess and answer: the raw match")
    ]
    exact_match: Annotated[
        float, About("as the official SQuAD 2.0 script; best over references", 1)
    ]
    f1: Annotated[float, About("as the official SQuAD 2.0 script; best over references", 1)]
    confidence: Annotated[float | None, About("product of the guess's token probabilities", 1)]
    no_answer_probability: Annotated[
        float | None, About('the same product for "I don\'t know."', 1)
    ]
    time: Annotated[float, About("seconds of its batch divided by the batch's rows", LARGEST)]
    num_tokens: Annotated[int, About("tokens of the prompt, context included", LARGEST)]
    num_new_tokens: Annotated[int, About("tokens of the guess", LARGEST)]
    tokens_per_sec: Annotated[float, About("num_new_tokens / time", LARGEST)]


class Column(NamedTuple):
    """What a column's JSON values may be."""

    kind: type  # int, str, list (of texts), bool or float
    meaning: str
    most: int | None
    is_nullable: bool


def columns_of(row: type) -> dict[str, Column]:
    """The columns that a row's dataclass defines, by name, in order."""
    kinds = {list[str]: list, float | None: float}
    found = {}
    for name, hint in get_type_hints(row, include_extras=True).items():
        kind, (about,) = hint.__origin__, hint.__metadata__
        is_nullable = kind == float | None
        found[name] = Column(kinds.get(kind, kind), about.meaning, about.most, is_nullable)
    return found


COLUMNS = columns_of(ResultRow)
_KINDS = {
    int: "a whole number",
    str: "text",
    list: "a list of texts",
    bool: "true or false",
    float: "a number",
}


@dataclass(frozen=True)
class Answer:
    """A guess and what the model computed of it.

    confidence and no_answer_probability are products of token probabilities, the stop included: of
    the guess, and of NO_ANSWER in its place; None for a baseline without probabilities. seconds:
    wall time of the batch over its rows. num_tokens: those of the prompt, context included;
    num_new_tokens: those of the guess.
    """

    text: str
    confidence: float | None
    no_answer_probability: float | None
    seconds: float
    num_tokens: int
    num_new_tokens: int


def result_row(idx: int, example: Example, answer: Answer) -> dict:
    """A ResultRow as the JSON object that is written."""
    row = ResultRow(
        idx=idx,
        **reference_values(example),
        guess=answer.text,
        **score_values(answer.text, example),
        confidence=answer.confidence,
        no_answer_probability=answer.no_answer_probability,
        time=answer.seconds,
        num_tokens=answer.num_tokens,
        num_new_tokens=answer.num_new_tokens,
        tokens_per_sec=answer.num_new_tokens / answer.seconds,
    )
    return vars(row)


def answer_of(row: Mapping) -> Answer:
    """The answer that a row was made from."""
    return Answer(
        text=row["guess"],
        confidence=row["confidence"],
        no_answer_probability=row["no_answer_probability"],
        seconds=row["time"],
        num_tokens=row["num_tokens"],
        num_new_tokens=row["num_new_tokens"],
    )


def reference_values(example: Example) -> dict:
    """The columns that an example decides."""
    return {
        "id": example.id,
        "context": example.context,
        "question": example.question,
        "answer": example.target,
        "answers": list(example.answers),
    }


def score_values(guess: str, example: Example) -> dict:
    """The columns that score a guess."""
    return {
        "is_correct": is_correct(guess, example.target),
        "exact_match": exact_match(guess, example.answers),
        "f1": f1_score(guess, example.answers),
    }


def check_values(row: Mapping, place: str) -> None:
    """Raise a UserError that names the place where a value does not fit its column."""
    for name in find_wrong_values(row):
        column = COLUMNS[name]
        wanted = _KINDS[column.kind]
        if column.most is not None:
            wanted += f" from 0 to {column.most if column.most == 1 else f'{column.most:.0e}'}"
        raise UserError(f"{place}: {name!r} is {row[name]!r:.40}; it must be {wanted}")


def find_wrong_values(row: Mapping) -> list[str]:
    """The columns of a row whose value does not fit."""
    return [n for n, column in COLUMNS.items() if n in row and not _fits(row[n], column)]


def _fits(value: object, column: Column) -> bool:
    if value is None:
        return column.is_nullable
    if not is_kind(value, column.kind):
        return False
    if column.kind in (str, list):
        return _is_text("".join(value))
    return column.most is None or 0 <= value <= column.most


def is_kind(value: object, kind: type) -> bool:
    """Whether a JSON value is of a column's kind without loss: a list is one of texts, a float may
    be written without a decimal point, an int has 64 bits."""
    if kind is list:
        return type(value) is list and all(type(text) is str for text in value)
    if kind is float and type(value) is int:
        return abs(value) <= 2**53
    return type(value) is kind and (kind is not int or -(2**63) <= value < 2**63)


def _is_text(value: str) -> bool:
    """Whether UTF-8 can encode it: half a surrogate pair it cannot."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
