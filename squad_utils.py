"""Question answering on SQuAD: examples, prompts, negatives, scoring. Imports nothing heavy."""

import functools
import hashlib
import json
import random
import re
import string
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from errors import UserError
from files import read_text

NO_ANSWER = "I don't know."
NORMALIZED_NO_ANSWER = "i dont know"
ACCEPTED = "a JSONL or SQuAD JSON file, or a Hub data set such as rajpurkar/squad:validation"
ROW_KEYS = "context, prompt, response or context, question, answers"
PROMPT_ORDERS = ("context_first", "question_first", "read_twice", "question_only")
PUNCTUATION = str.maketrans("", "", string.punctuation)
NEGATIVE_KINDS = ("random", "same_article", "hard")
# Han, kana, Thai, Lao, Burmese and Khmer are written without blanks between words.
UNSPACED = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]")


@dataclass(frozen=True)
class Example:
    """A question on a context, with its reference answers: () means unanswerable."""

    id: str
    context: str
    question: str
    answers: tuple[str, ...]
    article: str | None = None

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
        raise UserError(
            f"{source}: cannot be loaded from the Hugging Face Hub ({reason}); "
            "check the network and the name, or give a local file"
        ) from error
    yield from ((f"{source} row {number}", row) for number, row in enumerate(rows, start=1))


def _file_rows(source: str) -> Iterator[tuple[str, object]]:
    """Yield (place, row): the place is for error messages, the row is still to be checked."""
    text = read_text(source, ACCEPTED)
    document = _parsed(text)
    if isinstance(document, dict) and "data" in document:
        yield from _squad_rows(document, source)
    else:
        yield from json_lines(text, source)


def json_lines(text: str, source: str) -> Iterator[tuple[str, object]]:
    """(place, value) of each line that is not blank: the place is for error messages, the value
    None where a line is not JSON."""
    for number, line in enumerate(text.split("\n"), start=1):  # a JSON string may hold U+2028
        if line.strip():
            yield f"{source} line {number}", _parsed(line)


def _parsed(text: str) -> object:
    """The JSON value, None if the text is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _squad_rows(document: dict, source: str) -> Iterator[tuple[str, dict]]:
    place = f"{source} data"
    try:
        for a, article in enumerate(document["data"]):
            for p, paragraph in enumerate(article["paragraphs"]):
                shared = {"title": article.get("title"), "context": paragraph.get("context")}
                for q, qa in enumerate(paragraph["qas"]):
                    place = f"{source} data[{a}].paragraphs[{p}].qas[{q}]"
                    answers = {"answers": []} if qa.get("is_impossible") else {}
                    yield place, {"question": None} | qa | shared | answers
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
    answers = [checked_text(answer, "answers", place) for answer in answers]
    answers = [answer for answer in answers if normalize_answer(answer) != NORMALIZED_NO_ANSWER]
    digest = hashlib.sha256(json.dumps([context, question, *answers]).encode()).hexdigest()
    identifier = digest[:16] if row.get("id") is None else checked_text(str(row["id"]), "id", place)
    article = None if row.get("title") is None else checked_text(row["title"], "title", place)
    return Example(identifier, context, question, tuple(answers), article)


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
    asked = f"\n\nQ: {question}\nA:"
    if prompt_order == "context_first":
        return context, asked
    if prompt_order == "question_first":
        return f"Q: {question}\n\n{context}", "\n\nA:"
    if prompt_order == "read_twice":
        return f"{context}\n\nQ: {question}\n\n{context}", asked
    if prompt_order == "question_only":  # a baseline: what can be guessed without the context
        return "", asked
    raise UserError(f"prompt order {prompt_order!r}: choose from {', '.join(PROMPT_ORDERS)}")


def answer_text(answer: str) -> str:
    """An answer as it follows its prompt."""
    return f" {answer}"


class NegativeSampler:
    """Draws for each example a context that does not answer it: asked there, NO_ANSWER is right.

    `random` draws from all (`contexts`, else the examples'), `same_article` from the article's,
    `hard` from the ten nearest to the question (BM25); both as `random` where none is fit: without
    its answers, and without the same question there. Seed, epoch, id and the examples decide alone.
    """

    def __init__(self, examples: Sequence[Example], kind="random", seed=0, contexts=()):
        if kind not in NEGATIVE_KINDS:
            raise UserError(f"negatives {kind!r}: choose from {', '.join(NEGATIVE_KINDS)}")
        self.examples, self.seed = examples, seed
        self.pool = sorted(set(contexts) or {example.context for example in examples})
        self._asked = {(example.context, example.question) for example in examples}
        self._word_forms = functools.cache(_word_forms)
        self.preferred: list[list[str]] = [[] for _ in examples]
        if kind == "same_article":
            self.preferred = self._same_article()
        elif kind == "hard":
            self.preferred = self._nearest()

    def contexts(self, epoch: int) -> list[str | None]:
        """One context per example, in their order; None where no context at all is fit."""
        pairs = zip(self.examples, self.preferred, strict=True)
        return [self._draw(example, preferred, epoch) for example, preferred in pairs]

    def _draw(self, example: Example, preferred: list[str], epoch: int) -> str | None:
        # A string seed is hashed by SHA-512: the same draw in every process, on every machine.
        rng = random.Random(f"{self.seed}/{epoch}/{example.id}")
        likely = rng.sample(preferred, len(preferred)) + rng.choices(self.pool, k=8)
        drawn = next(self._fit(likely, example), None)
        # Rarely none of them is fit: only then is shuffling the whole pool worth it.
        return drawn or next(self._fit(rng.sample(self.pool, len(self.pool)), example), None)

    def _fit(self, contexts: Iterable[str], example: Example) -> Iterator[str]:
        answers = [self._word_forms(answer) for answer in example.answers]
        for context in contexts:
            joined, parted = self._word_forms(context)
            is_answer_in = any(one in joined or other in parted for one, other in answers)
            if not is_answer_in and (context, example.question) not in self._asked:
                yield context

    def _same_article(self) -> list[list[str]]:
        contexts: dict[str, list[str]] = {}
        for context, article in sorted({(e.context, e.article or "") for e in self.examples}):
            contexts.setdefault(article, []).append(context)
        if set(contexts) <= {""}:
            raise UserError("negatives same_article need titles: give SQuAD JSON or a Hub data set")
        return [contexts[example.article or ""] for example in self.examples]

    def _nearest(self) -> list[list[str]]:
        import bm25s

        index, words = bm25s.BM25(), bm25s.tokenize(self.pool, show_progress=False)
        if not words.vocab:
            return self.preferred
        index.index(words, show_progress=False)
        questions = [example.question for example in self.examples]
        queries = bm25s.tokenize(questions, return_ids=False, show_progress=False)
        ranking = index.retrieve(queries, k=min(50, len(self.pool))).documents  # shows an ETA
        return [
            list(self._fit((self.pool[i] for i in ranks), example))[:10]
            for example, ranks in zip(self.examples, ranking, strict=True)
        ]


def _word_forms(text: str) -> tuple[str, str]:
    """Normalised words between blanks, twice ("U.S.": us, u s), since either reading may match."""
    text = UNSPACED.sub(r" \g<0> ", text)
    parted = re.sub(r"[\W_]+", " ", text)
    return f" {normalize_answer(text)} ", f" {normalize_answer(parted)} "


def normalize_answer(text: str) -> str:
    """Lowercase, no ASCII punctuation, articles or surplus blanks (the official SQuAD script)."""
    text = text.lower().translate(PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(guess: str, answers: Sequence[str]) -> float:
    """1.0 if the guess is one of the references, normalised, else 0.0; see `_scored`."""
    return float(_scored(guess) in _references(answers))


def f1_score(guess: str, answers: Sequence[str]) -> float:
    """The best word-overlap F1 over the references, 0.0 to 1.0; see `_scored`."""
    return max(_word_f1(_scored(guess).split(), answer.split()) for answer in _references(answers))


def is_correct(guess: str, answer: str) -> bool:
    """The raw match with the first reference (NO_ANSWER if none), but for case and outer blanks."""
    return guess.strip().lower() == answer.strip().lower()


def abstains(guess: str) -> bool:
    """Whether a guess is NO_ANSWER, or empty, once normalised."""
    return not _scored(guess)


def _scored(text: str) -> str:
    """The normalised text, "" for NO_ANSWER: to say it is to give the empty answer."""
    normalized = normalize_answer(text)
    return "" if normalized == NORMALIZED_NO_ANSWER else normalized


def _references(answers: Sequence[str]) -> list[str]:
    """References as scored, without empty ones; where none is left, the empty answer is right."""
    return [reference for answer in answers if (reference := _scored(answer))] or [""]


def _word_f1(guess: list[str], answer: list[str]) -> float:
    common = (Counter(guess) & Counter(answer)).total()
    return 2 * common / (len(guess) + len(answer)) if guess or answer else 1.0
