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
from common.output_files import write_output
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
    answer_start: int | None = field(default=None, compare=False)  # of the target, if known

    @property
    def is_answerable(self) -> bool:
        return bool(self.answers)

    @property
    def target(self) -> str:
        """The answer to train on: the first reference, or NO_ANSWER."""
        return self.answers[0] if self.answers else NO_ANSWER


def read_examples(source: str) -> list[Example]:
    """Read all questions of a local file or of a Hub data set, `owner/name:split`.

    A file is JSONL with `context, prompt, response` (Oxen layout) or `context, question, answers`
    (Hugging Face layout), `id` and `title` optional, or SQuAD v1.1/v2.0 JSON; the layout is
    recognised by the content. The answer NO_ANSWER means unanswerable. A missing id becomes a hash
    of the content. Raises UserError with the file, the line and what to do.
    """
    is_hub_name = re.fullmatch(r"[\w.-]+/[\w.-]+:.+", source) and not Path(source).exists()
    rows = _hub_rows(source) if is_hub_name else _file_rows(source)
    examples = [_example(row, place) for place, row in rows]
    if not examples:
        raise UserError(f"{source}: contains no questions; give {ACCEPTED}")
    return examples


def _hub_rows(source: str) -> Iterator[tuple[str, object]]:
    import datasets

    name, split = source.split(":", maxsplit=1)
    try:
        rows = datasets.load_dataset(name, split=split)
    except (OSError, ValueError, RuntimeError) as error:
        reason = "no network" if isinstance(error, ConnectionError) else str(error).split("\n")[0]
        raise UserError(
            f"{source}: cannot be loaded from the Hugging Face Hub ({reason}); "
            "check the network and the name, or give a local file"
        ) from error
    yield from ((f"{source} row {number}", row) for number, row in enumerate(rows, start=1))


def _file_rows(source: str) -> Iterator[tuple[str, object]]:
    """Yield (place, row): the place is for error messages, the row is not checked yet."""
    if re.fullmatch(r"[\w.-]+/[\w-]+", source) and not Path(source).exists():
        splits = f"{source}:train or {source}:validation"
        raise UserError(f"{source}: no such file; for a Hub data set give a split, as in {splits}")
    text = read_text(source, ACCEPTED)
    try:
        document = parse_json(text, source)
    except UserError:  # it is JSONL, or the error is reported with its line below
        document = None
    if isinstance(document, dict) and "data" in document:
        yield from _squad_rows(document, source)
    else:
        yield from json_lines(text, source)


def json_lines(text: str, source: str) -> Iterator[tuple[str, object]]:
    """Yield (place, value) of each line that is not blank: the place is for error messages. Raises
    UserError with the line if one is not JSON."""
    for number, line in enumerate(text.split("\n"), start=1):  # a JSON string may contain U+2028
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
        raise UserError(
            f"{place}: this place or the next is not SQuAD JSON; give {ACCEPTED}"
        ) from error


def _example(row: object, place: str) -> Example:
    if not isinstance(row, dict):
        raise UserError(f"{place}: not a JSON object; correct or remove it, a row needs {ROW_KEYS}")
    context = checked_text(row.get("context"), "context", place)
    if "question" in row:
        question = checked_text(row["question"], "question", place)
        answers = row.get("answers")
        answers = answers.get("text") if isinstance(answers, dict) else answers
        if not isinstance(answers, list):
            raise UserError(f"{place}: 'answers' is missing or not a list; a row needs {ROW_KEYS}")
        answers = [answer.get("text") if isinstance(answer, dict) else answer for answer in answers]
    else:
        question = checked_text(row.get("prompt"), "prompt", place)
        answers = [checked_text(row.get("response"), "response", place)]
    answers = [a for a in answers if not abstains(checked_text(a, "answers", place))]
    flag = row.get("is_impossible")
    if flag is not None and type(flag) is not bool:
        raise UserError(f"{place}: 'is_impossible' is {flag!r:.40}; it must be true or false")
    if flag is False and not answers:
        raise UserError(
            f"{place}: 'is_impossible' is false, but there is no answer; correct one of them"
        )
    answers = [] if flag else answers  # those are plausible, not correct
    start = _answer_start(row["answers"], answers[0]) if answers and "question" in row else None
    name = _label(row, "id", place) or made_id(context, question, answers)
    return Example(name, context, question, tuple(answers), _label(row, "title", place), start)


def _answer_start(found: object, target: str) -> int | None:
    """The start of the target in its context, in characters, if the data gives it."""
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
    """`value`, if it is a string that is not blank and can be encoded as UTF-8. Raises UserError
    otherwise."""
    if isinstance(value, str) and value.strip() and not re.search("[\ud800-\udfff]", value):
        return value
    found = "missing" if value is None else f"{value!r:.40}"
    raise UserError(f"{place}: {key!r} is {found}; a row needs text in {keys}")


def write_examples(examples: Sequence[Example], output: str) -> None:
    """Write a JSONL file of `context, prompt, response`, complete or not at all.

    It is byte for byte as those of the data set `ox/Mamba-Fine-Tune`: it cannot be distinguished
    from anybody's data, so an existing file is never replaced.

    Raises:
        UserError: if the file exists or cannot be written.
    """
    rows = (
        {"context": example.context, "prompt": example.question, "response": example.target}
        for example in examples
    )
    lines = (json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n" for row in rows)
    write_output(output, "".join(lines))


def prompt_parts(
    context: str, question: str, prompt_order: str = "context_first"
) -> tuple[str, str]:
    """The prompt as (prefix, suffix), which are tokenised separately. read_twice is from "Just Read
    Twice" (Arora et al. 2024)."""
    suffix = f"\n\n{question_text(question)}"
    if prompt_order == "context_first":
        return context, suffix
    if prompt_order == "question_first":
        return f"Q: {question}\n\n{context}", "\n\nA:"
    if prompt_order == "read_twice":
        return f"{context}\n\nQ: {question}\n\n{context}", suffix
    if prompt_order == "question_only":  # a baseline: what can be guessed without the context
        return "", suffix
    raise UserError(f"prompt order {prompt_order!r}: choose from {', '.join(PROMPT_ORDERS)}")


def question_text(question: str) -> str:
    """A question in a prompt, before its answer."""
    return f"Q: {question}\nA:"


def answer_text(answer: str) -> str:
    """An answer after its prompt."""
    return f" {answer}"


def normalize_answer(text: str) -> str:
    """Lowercase, no ASCII punctuation, articles or extra spaces (the official SQuAD script)."""
    text = text.lower().translate(PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def folded_answer(text: str) -> str:
    """The normalised form of a folded text: equal forms are the same answer."""
    return normalize_answer(fold(text))


def abstains(text: str) -> bool:
    """Whether a text is NO_ANSWER, in any case, with any quotes, spaces and outer punctuation."""
    folded = "".join(folded_answer(text).split())
    before, found, after = folded.partition(NORMALIZED_NO_ANSWER.replace(" ", ""))
    return bool(found) and not any(map(str.isalnum, before + after))


def same_question(context: str, question: str) -> tuple[str, str]:
    """A key that is equal for the same question on the same context, in any Unicode form."""
    return folded_answer(context), folded_answer(question)


def exact_match(guess: str, answers: Sequence[str]) -> float:
    """1.0 if the normalised guess is one of the normalised references, else 0.0; see `_scored`."""
    return float(_scored(guess) in _references(answers))


def f1_score(guess: str, answers: Sequence[str]) -> float:
    """The best word-overlap F1 over the references, 0.0 to 1.0; see `_scored`."""
    return max(_word_f1(_scored(guess).split(), answer.split()) for answer in _references(answers))


def is_correct(guess: str, answer: str) -> bool:
    """Whether a guess equals the first reference (else NO_ANSWER) but for case and outer spaces."""
    return guess.strip().lower() == answer.strip().lower()


def is_scored_as_empty(guess: str) -> bool:
    """Whether a guess is scored as the empty answer: NO_ANSWER, or empty once normalised."""
    return not _scored(guess)


def _scored(text: str) -> str:
    """The normalised text; "" for NO_ANSWER, which is the empty answer."""
    return "" if abstains(text) else normalize_answer(text)


def _references(answers: Sequence[str]) -> list[str]:
    """Normalised references without empty ones; if none is left, the empty answer is correct."""
    return [reference for answer in answers if (reference := _scored(answer))] or [""]


def _word_f1(guess: list[str], answer: list[str]) -> float:
    common = (Counter(guess) & Counter(answer)).total()
    return 2 * common / (len(guess) + len(answer)) if guess or answer else 1.0
