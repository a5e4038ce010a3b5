"""Negatives: unanswerable examples, made by pairing a question with another context."""

import functools
import itertools
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import regex

from common.errors import UserError
from common.text import UNSPACED, fold
from squad_utils import Example, normalize_answer

NEGATIVE_KINDS = ("random", "same_article", "hard")
NEAREST = 10  # contexts that `hard` draws from
# Stop words of questions that are not in the list of bm25s.
_ASKING_WORDS = ("could", "give", "many", "may", "might", "much", "name", "tell", "whose", "would")
_WORD = regex.compile(r"[\p{L}\p{N}\p{M}]+")
_BETWEEN_WORDS = regex.compile(r"[^\p{L}\p{N}\p{M}]+")
_INVISIBLE = regex.compile(r"[\p{Cf}\p{Default_Ignorable_Code_Point}]+")
_UNSPACED = regex.compile(rf"{UNSPACED.pattern}\p{{M}}*")  # a letter with its marks is one

Sentence = tuple[set[str], dict[str, list[str]]]  # words, and words by their beginnings


def make_negatives(examples: Sequence[Example], kind: str, seed: int = 0) -> list[Example]:
    """A negative of each answerable question. An unanswerable one has none: nothing is known that
    could rule a context out.

    Negatives on one context are next to each other, contexts in the order of the examples', so that
    each is read once. A question for which no context is fit is skipped; see NegativeSampler. The
    id ends in #KIND, for people: programs know negatives by their place after all of the examples.
    """
    contexts = NegativeSampler(examples, kind, seed).draw_contexts(epoch=0)
    negatives = [
        replace(make_negative(example, context), id=f"{example.id}#{kind}")
        for example, context in zip(examples, contexts, strict=True)
        if example.is_answerable and context
    ]
    order = {example.context: place for place, example in enumerate(examples)}
    return sorted(negatives, key=lambda negative: order[negative.context])


def make_negative(example: Example, context: str) -> Example:
    """The example's question on another context, unanswerable."""
    return replace(example, context=context, answers=(), answer_start=None)


class NegativeSampler:
    """Draws for each example a context that does not answer its question, so that on this context
    NO_ANSWER is right.

    `random` draws from all contexts (`contexts`, by default the examples' own), `same_article` from
    those of the example's article, `hard` from the ten nearest to the question (BM25); the last two
    draw as `random` does where none of these is fit. A fit context contains no answer of the
    example, and is none on which the data asks the same question; for `same_article` and `hard` no
    sentence of it `seems_to_answer` the question. A draw is a function of the seed, the epoch, the
    example's id, how often this id occurred before, and the examples.
    """

    def __init__(self, examples: Sequence[Example], kind="random", seed=0, contexts=()):
        if kind not in NEGATIVE_KINDS:
            raise UserError(f"negatives {kind!r}: choose from {', '.join(NEGATIVE_KINDS)}")
        self.examples, self.kind, self.seed = examples, kind, seed
        self.pool = sorted(set(contexts) or {example.context for example in examples})
        self._word_forms = functools.cache(_word_forms)
        self._folded = functools.cache(fold)
        self._sentences = functools.cache(_sentences)
        self._asked = {self._question_on(example.context, example) for example in examples}
        self._repeats = _repeats(examples)
        self.preferred: list[list[str]] = [[] for _ in examples]
        if kind == "same_article":
            self.preferred = self._same_article()
        elif kind == "hard":
            self.preferred = self._nearest()

    def draw_contexts(self, epoch: int) -> list[str | None]:
        """One context per example, in their order; None where no context is fit."""
        return [self._draw(place, epoch) for place in range(len(self.examples))]

    def _draw(self, place: int, epoch: int) -> str | None:
        example, preferred = self.examples[place], self.preferred[place]
        # A string seed is hashed by SHA-512: the same draw in every process, on every machine.
        rng = random.Random(f"{self.seed}/{epoch}/{example.id}{self._repeats[place]}")
        likely = rng.sample(preferred, len(preferred))
        # `_nearest` has filtered those of `hard`.
        fit = likely if self.kind == "hard" else self._without_answers(likely, example)
        drawn = next(iter(fit), None)
        drawn = drawn or next(self._fit(rng.choices(self.pool, k=8), example), None)
        # Shuffling the whole pool is slow, and rarely needed.
        return drawn or next(self._fit(rng.sample(self.pool, len(self.pool)), example), None)

    def _fit(self, contexts: Iterable[str], example: Example) -> Iterator[str]:
        forms = [self._word_forms(answer) for answer in example.answers]
        forms = [(one, other) for one, other in forms if one.strip() or other.strip()]
        # "+" and "A" normalize to nothing: they are searched as they are written. Beside other
        # references such a reference, for instance ".", is taken for an error in the data.
        found = () if forms else map(_as_written, example.answers)
        patterns = [pattern for pattern in found if pattern]
        for context in contexts:
            joined, parted = self._word_forms(context)
            is_answer_in = any(one in joined or other in parted for one, other in forms)
            is_answer_in |= any(pattern.search(self._folded(context)) for pattern in patterns)
            if not is_answer_in and self._question_on(context, example) not in self._asked:
                yield context

    def _without_answers(self, contexts: Iterable[str], example: Example) -> Iterator[str]:
        """The fit contexts of which no sentence seems to answer the example's question."""
        words = question_words(example.question)
        fit = self._fit(contexts, example)
        return (c for c in fit if not seems_to_answer(self._sentences(c), *words))

    def _question_on(self, context: str, example: Example) -> tuple[str, str]:
        return self._word_forms(context)[0], self._word_forms(example.question)[0]

    def _same_article(self) -> list[list[str]]:
        contexts: dict[str, list[str]] = {}
        for context, article in sorted({(e.context, e.article or "") for e in self.examples}):
            contexts.setdefault(article, []).append(context)
        if set(contexts) <= {""}:
            raise UserError(
                "negatives same_article need the articles' titles: give SQuAD JSON, a Hub data "
                "set, or JSONL with a column title"
            )
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
        nearest = []
        for example, ranks in zip(self.examples, ranking, strict=True):
            fit = self._without_answers((self.pool[i] for i in ranks), example)
            nearest.append(list(itertools.islice(fit, NEAREST)))
        return nearest


def _repeats(examples: Sequence[Example]) -> list[str]:
    """For each example a suffix that differs between examples of one id; empty for the first."""
    seen: Counter[str] = Counter()
    repeats = []
    for example in examples:
        repeats.append(f"/repeat {seen[example.id]}" if seen[example.id] else "")
        seen[example.id] += 1
    return repeats


def _word_forms(text: str) -> tuple[str, str]:
    """The folded and normalised words of a text between blanks, in two forms, since either can
    match: "U.S." gives "us" and "u s". A zero-width space is removed in the first form and is a
    blank in the second."""
    joined, parted = fold(text), fold(text.replace("\u200b", " "))
    if not text.isascii():
        joined, parted = (_UNSPACED.sub(r" \g<0> ", form) for form in (joined, parted))
    parted = _BETWEEN_WORDS.sub(" ", parted)
    return f" {normalize_answer(joined)} ", f" {normalize_answer(parted)} "


def _as_written(answer: str) -> re.Pattern | None:
    """A pattern that finds the folded answer as a whole word; None if the answer is blank."""
    folded = fold(answer).strip()
    before = r"(?<!\w)" if folded[:1].isalnum() else ""
    after = r"(?!\w)" if folded[-1:].isalnum() else ""
    return re.compile(before + re.escape(folded) + after) if folded else None


@functools.cache
def _function_words() -> frozenset[str]:
    from bm25s.stopwords import STOPWORDS_EN_PLUS

    return frozenset((*STOPWORDS_EN_PLUS, *_ASKING_WORDS))


def question_words(question: str) -> tuple[set[str], set[str]]:
    """The folded content words of a question: its names and numbers, and the other ones."""
    names, others = set(), set()
    question = _INVISIBLE.sub("", unicodedata.normalize("NFC", question))
    for place, word in enumerate(_WORD.findall(question)):
        is_name = (word[0].isupper() and place > 0) or any(map(str.isdigit, word))
        content = set(_WORD.findall(fold(word))) - _function_words()
        (names if is_name else others).update(content)
    return names, others


def seems_to_answer(sentences: Iterable[Sentence], names: set[str], others: set[str]) -> bool:
    """Whether one sentence seems to state what a question asks, judged by words alone: it contains
    all names of the question and half of its other content words, in some form ("owner", "owned").
    For a question without names it contains four fifths of them, and at least three.

    sentences: as `_sentences` gives them; names, others: as `question_words` does. Paraphrases
    ("who runs", "its manager is") and pronouns in place of names are not recognised.
    """
    needed = max(1, round(len(others) / 2)) if names else max(3, round(0.8 * len(others)))
    needed = min(needed, len(others)) if names else needed
    asked = [(_beginning(word), word) for word in others]
    for words, by_beginning in sentences:
        if not names <= words:
            continue
        alike = [(word, by_beginning[start]) for start, word in asked if start in by_beginning]
        if len(alike) < needed:  # usually so: comparing forms is slow
            continue
        stated = (any(_is_form(word, one) for one in found) for word, found in alike)
        if sum(stated) >= needed:
            return True
    return False


def _sentences(context: str) -> list[Sentence]:
    found = []
    for sentence in re.split(r"(?<=[.!?])\s+|\n+", context):
        words = set(_WORD.findall(fold(sentence)))
        by_beginning: dict[str, list[str]] = {}
        for word in words:
            by_beginning.setdefault(_beginning(word), []).append(word)
        found.append((words, by_beginning))
    return found


def _beginning(word: str) -> str:
    return word[:3]


def _is_form(word: str, other: str) -> bool:
    """Whether two words begin alike: in all but the last two letters of the shorter one, and in at
    least three. "meet" and "meeting" do, "capital" and "captain" do not."""
    length = max(3, min(len(word), len(other)) - 2)
    return word[:length] == other[:length]
