"""Question answering on SQuAD: examples, prompts, scoring. Imports nothing heavy."""

import hashlib
import json
import re
import string
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from common.errors import UserError
from common.input_files import read_text
from common.json_text import parse_json
from common.text import fold

NO_ANSWER = "I don't know."
NORMALIZED_NO_ANSWER = "i dont know"
ACCEPTED = "a JSONL or SQuAD JSON file, or a Hub data set such as rajpurkar/squad:validation"
ROW_KEYS = "context, prompt, response or context, question, answers"
PROMPT_ORDERS = ("context_first", "question_first", "read_twice", "question_only")
PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class Example:
    """A question on a context, with its reference answers: () means unanswerable."""

    id: str
    context: str
    question: str
    answers: tuple[str, ...]
    article: str | None = None
    answer_start: int | None = field(default=None, compare=False)  # of the target, if data says it

    @property
    def is_answerable(self) -> bool:
        return bool(self.answers)

    @property
    def target(self) -> str:
        """What a model should say: the first reference, or NO_ANSWER."""
        return self.answers[0] if self.answers else NO_ANSWER


def read_examples(source: str) -> list[Example]:
    """Read all questions of a local file or of a Hub data set, `owner/name:split`.

    A file is JSONL with `context, prompt, response` (Oxen layout) or `context, question, answers`
    (Hugging Face layout), `id` and `title` optional, or SQuAD v1.1/v2.0 JSON: its content tells.
    The answer NO_ANSWER means unanswerable. A missing id becomes a hash of the content.
    Raises UserError naming the file, the place in it and the mend.
    """
    is_hub_name = re.fullmatch(r"[\w.-]+/[\w.-]+:.+", source) and not Path(source).exists()
    rows = _hub_rows(source) if is_hub_name else _file_rows(source)
    examples = [_example(row, place) for place, row in rows]
    if not examples:
        raise UserError(f"{source}: no question in it; give {ACCEPTED}")
    return examples


def _hub_rows(source: str) -> Iterator[tuple[str, object]]:
    import datasets

    name, split = source.split(":", maxsplit=1)
    try:
        rows = datasets.load_dataset(name, split=split)
    except (OSError, ValueError, RuntimeError) as error:
        reason = "no network" if isinstance(error, ConnectionError) else str(error).split("\n")[0]
        said = f"{source}: cannot be loaded from the Hugging Face Hub ({reason}); "
        said += "check the network and the name, or give a local file"
        raise UserError(said) from error
    yield from ((f"{source} row {number}", row) for number, row in enumerate(rows, start=1))


def _file_rows(source: str) -> Iterator[tuple[str, object]]:
    """Yield (place, row): the place is for error messages, the row is still to be checked."""
    if re.fullmatch(r"[\w.-]+/[\w-]+", source) and not Path(source).exists():
        splits = f"{source}:train or {source}:validation"
        raise UserError(f"{source}: no such file; of a Hub data set name a split, as in {splits}")
    text = read_text(source, ACCEPTED)
    try:
        document = parse_json(text, source)
    except UserError:  # it is JSONL, or the line that is wrong will be named
        document = None
    if isinstance(document, dict) and "data" in document:
        yield from _squad_rows(document, source)
    else:
        yield from json_lines(text, source)


def json_lines(text: str, source: str) -> Iterator[tuple[str, object]]:
    """(place, value) of each line that is not blank: the place is for error messages. UserError
    names a line that is not JSON."""
    for number, line in enumerate(text.split("\n"), start=1):  # a JSON string may hold U+2028
        if line.strip():
            place = f"{source} line {number}"
            yield place, parse_json(line, place)


def _squad_rows(document: dict, source: str) -> Iterator[tuple[str, dict]]:
    place = f"{source} data"
    try:
        for a, article in enumerate(document["data"]):
            for p, paragraph in enumerate(article["paragraphs"]):
                shared = {"title": article.get("title"), "context": paragraph.get("context")}
                for q, qa in enumerate(paragraph["qas"]):
                    place = f"{source} data[{a}].paragraphs[{p}].qas[{q}]"
                    yield place, {"question": None} | qa | shared
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{place}: not SQuAD JSON here or next to it; give {ACCEPTED}") from error


def _example(row: object, place: str) -> Example:
    if not isinstance(row, dict):
        raise UserError(f"{place}: no JSON object; mend or remove it, a row needs {ROW_KEYS}")
    context = checked_text(row.get("context"), "context", place)
    if "question" in row:
        question = checked_text(row["question"], "question", place)
        answers = row.get("answers")
        answers = answers.get("text") if isinstance(answers, dict) else answers
        if not isinstance(answers, list):
            raise UserError(f"{place}: 'answers' is missing or no list; a row needs {ROW_KEYS}")
        answers = [answer.get("text") if isinstance(answer, dict) else answer for answer in answers]
    else:
        question = checked_text(row.get("prompt"), "prompt", place)
        answers = [checked_text(row.get("response"), "response", place)]
    answers = [a for a in answers if not abstains(checked_text(a, "answers", place))]
    flag = row.get("is_impossible")
    if flag is not None and type(flag) is not bool:
        raise UserError(f"{place}: 'is_impossible' is {flag!r:.40}; it must be true or false")
    if flag is False and not answers:
        raise UserError(f"{place}: 'is_impossible' is false, but there is no answer")
    answers = [] if flag else answers  # they are plausible, not right
    start = _answer_start(row["answers"], answers[0]) if answers and "question" in row else None
    name = _label(row, "id", place) or made_id(context, question, answers)
    return Example(name, context, question, tuple(answers), _label(row, "title", place), start)


def _answer_start(found: object, target: str) -> int | None:
    """Where in its context the data says that the target begins, in characters."""
    if isinstance(found, dict):
        starts = found.get("answer_start")
        pairs = zip(found["text"], starts if isinstance(starts, list) else (), strict=False)
    else:
        pairs = ((a.get("text"), a.get("answer_start")) for a in found if isinstance(a, dict))
    return next((start for text, start in pairs if text == target and type(start) is int), None)


def made_id(context: str | None, question: str, answers: Sequence[str]) -> str:
    """The id of a row that has none: a hash of its content."""
    return hashlib.sha256(json.dumps([context, question, *answers]).encode()).hexdigest()[:16]


def _label(row: dict, key: str, place: str) -> str | None:
    value = row.get(key)
    value = str(value) if key == "id" and type(value) is int else value
    return None if value is None else checked_text(value, key, place, f"{key}, or no {key}")


def checked_text(value: object, key: str, place: str, keys: str = ROW_KEYS) -> str:
    """`value`, if it is a string that is not blank and that UTF-8 can hold; else a UserError."""
    if isinstance(value, str) and value.strip() and not re.search("[\ud800-\udfff]", value):
        return value
    found = "missing" if value is None else f"{value!r:.40}"
    raise UserError(f"{place}: {key!r} is {found}; a row needs text in {keys}")


def prompt_parts(
    context: str, question: str, prompt_order: str = "context_first"
) -> tuple[str, str]:
    """The prompt as (prefix, suffix), to be tokenised apart; read_twice: Arora et al. 2024."""
    asked = f"\n\n{question_text(question)}"
    if prompt_order == "context_first":
        return context, asked
    if prompt_order == "question_first":
        return f"Q: {question}\n\n{context}", "\n\nA:"
    if prompt_order == "read_twice":
        return f"{context}\n\nQ: {question}\n\n{context}", asked
    if prompt_order == "question_only":  # a baseline: what can be guessed without the context
        return "", asked
    raise UserError(f"prompt order {prompt_order!r}: choose from {', '.join(PROMPT_ORDERS)}")


def question_text(question: str) -> str:
    """A question as it stands in a prompt, before its answer."""
    return f"Q: {question}\nA:"


def answer_text(answer: str) -> str:
    """An answer as it follows its prompt."""
    return f" {answer}"


def normalize_answer(text: str) -> str:
    """Lowercase, no ASCII punctuation, articles or surplus blanks (the official SQuAD script)."""
    text = text.lower().translate(PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def folded_answer(text: str) -> str:
    """The normalised form of a folded text: what is equal by this is the same answer."""
    return normalize_answer(fold(text))


def abstains(text: str) -> bool:
    """Whether a text is NO_ANSWER, whatever its case, quotes, blanks and the marks around it."""
    said = "".join(folded_answer(text).split())
    before, found, after = said.partition(NORMALIZED_NO_ANSWER.replace(" ", ""))
    return bool(found) and not any(map(str.isalnum, before + after))


def same_question(context: str, question: str) -> tuple[str, str]:
    """Equal for one question on one context, in whatever form they are written."""
    return folded_answer(context), folded_answer(question)


def exact_match(guess: str, answers: Sequence[str]) -> float:
    """1.0 if the guess is one of the references, normalised, else 0.0; see `_scored`."""
    return float(_scored(guess) in _references(answers))


def f1_score(guess: str, answers: Sequence[str]) -> float:
    """The best word-overlap F1 over the references, 0.0 to 1.0; see `_scored`."""
    return max(_word_f1(_scored(guess).split(), answer.split()) for answer in _references(answers))


def is_correct(guess: str, answer: str) -> bool:
    """The raw match with the first reference (NO_ANSWER if none), but for case and outer blanks."""
    return guess.strip().lower() == answer.strip().lower()


def is_scored_as_empty(guess: str) -> bool:
    """Whether a guess is scored as empty: NO_ANSWER, and what normalises to nothing, as "The"."""
    return not _scored(guess)


def _scored(text: str) -> str:
    """The normalised text, "" for NO_ANSWER: to say it is to give the empty answer."""
    return "" if abstains(text) else normalize_answer(text)


def _references(answers: Sequence[str]) -> list[str]:
    """References as scored, without empty ones; where none is left, the empty answer is right."""
    return [reference for answer in answers if (reference := _scored(answer))] or [""]


def _word_f1(guess: list[str], answer: list[str]) -> float:
    common = (Counter(guess) & Counter(answer)).total()
    return 2 * common / (len(guess) + len(answer)) if guess or answer else 1.0
