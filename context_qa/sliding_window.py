"""The sliding-window baseline of the SQuAD paper (Rajpurkar et al. 2016, section 5). It learns
nothing and never abstains; a model's scores should exceed its scores.

Candidates are the phrases of the context between stop words and punctuation; the paper takes the
constituents of a parse. Of each candidate, the overlap of its sentence, without the candidate, with
the question is counted in unigrams and bigrams. Among the candidates with the greatest overlap, the
sliding window with the distance-based extension (Richardson et al. 2013, algorithms 1 and 2) over
their sentence chooses the answer.
"""

import functools
import itertools
import math
import re
import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import regex

from common.text import fold
from context_qa.results.rows import Answer
from squad_utils import Example

_UNIT = 2**32  # information in whole numbers: sums do not depend on their order, so ties are ties
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[^a-z\s])")
# A letter's marks are part of its word, and so are the joiners and soft hyphens between letters.
_LETTER = r"[\w\p{M}\u00ad\u200b-\u200d\u2060]"
_TOKEN = regex.compile(rf"\w{_LETTER}*(?:[-'’.,]{_LETTER}+)*|[^\w\s]")


class _Candidate(NamedTuple):
    text: str
    start: int  # in words of its sentence
    end: int


class _Sentence(NamedTuple):
    words: list[str]  # folded
    candidates: list[_Candidate]
    places: dict[str, list[int]]  # of each word


def sliding_window_answers(
    examples: Sequence[Example], done: Collection[int] = ()
) -> Iterator[dict[int, Answer]]:
    """Answers by place, those of one context at a time; `done` places are skipped. Numbers of
    tokens are numbers of words; there are no probabilities."""
    for context, run in itertools.groupby(
        (place for place in range(len(examples)) if place not in done),
        key=lambda place: examples[place].context,
    ):
        answers = {}
        for place in run:
            started = time.perf_counter()
            guess = best_phrase(context, examples[place].question)
            words = len(context.split()) + len(examples[place].question.split())
            seconds = time.perf_counter() - started
            answers[place] = Answer(guess, None, None, seconds, words, len(guess.split()))
        yield answers


def best_phrase(context: str, question: str) -> str:
    """The answer of the baseline, a phrase of the context. The time is about linear in both
    lengths: the cost of a candidate depends on its own words and their places, not on its
    sentence."""
    sentences, information = _parse(context)
    asked = [fold(token) for token in _TOKEN.findall(question) if token[0].isalnum()]
    overlaps = [_overlaps(sentence, asked) for sentence in sentences]
    most = max(map(max, filter(None, overlaps)), default=None)
    best, best_score = context.strip(), -math.inf
    for sentence, found in zip(sentences, overlaps, strict=True):
        if most not in found:
            continue
        scores = _Scores(sentence, set(asked), information)
        for candidate, overlap in zip(sentence.candidates, found, strict=True):
            if overlap == most and (score := scores.score(candidate)) > best_score:
                best, best_score = candidate.text, score
    return best


@functools.cache
def _stop_words() -> frozenset[str]:
    from bm25s.stopwords import STOPWORDS_EN_PLUS

    return frozenset(STOPWORDS_EN_PLUS)


@functools.lru_cache(maxsize=1)
def _parse(context: str) -> tuple[list[_Sentence], dict[str, int]]:
    """The sentences of a context with their candidates, and the information of each word (IC in
    algorithm 1), in units of 1 / _UNIT."""
    sentences = [_sentence(text) for text in _SENTENCE_END.split(context)]
    counts = Counter(word for sentence in sentences for word in sentence.words)
    return sentences, {w: round(_UNIT * math.log(1 + 1 / count)) for w, count in counts.items()}


def _sentence(text: str) -> _Sentence:
    tokens = list(_TOKEN.finditer(text))
    words = [fold(token.group()) for token in tokens]
    is_inside = [
        token.group()[0].isalnum() and word not in _stop_words()
        for token, word in zip(tokens, words, strict=True)
    ]
    candidates = []
    for inside, run in itertools.groupby(range(len(words)), key=is_inside.__getitem__):
        if inside:
            places = list(run)
            first, last = places[0], places[-1]
            span = text[tokens[first].start() : tokens[last].end()]
            candidates.append(_Candidate(span, first, last + 1))
    places: dict[str, list[int]] = {}
    for place, word in enumerate(words):
        places.setdefault(word, []).append(place)
    return _Sentence(words, candidates, places)


def _overlaps(sentence: _Sentence, asked: list[str]) -> list[int]:
    """For each candidate, the number of unigrams and bigrams of the question that its sentence has
    outside of the candidate."""
    words = sentence.words
    unigrams = _ends({w: sentence.places[w] for w in set(asked) if w in sentence.places})
    pairs = dict.fromkeys(itertools.pairwise(asked))
    places = {
        pair: [p for p in sentence.places.get(pair[0], ()) if tuple(words[p : p + 2]) == pair]
        for pair in pairs
    }
    bigrams = _ends({pair: found for pair, found in places.items() if found})
    overlaps = []
    for _, start, end in sentence.candidates:
        own = {*words[start:end]}
        # A bigram is outside if neither of its words is inside.
        touching = {*itertools.pairwise(words[max(start - 1, 0) : end + 1])}
        lost = sum(start <= unigrams[w][0] and unigrams[w][1] < end for w in own & unigrams.keys())
        lost += sum(
            start - 1 <= bigrams[pair][0] and bigrams[pair][1] < end
            for pair in touching & bigrams.keys()
        )
        overlaps.append(len(unigrams) + len(bigrams) - lost)
    return overlaps


def _ends(places: dict) -> dict:
    """The first and the last place of each."""
    return {key: (found[0], found[-1]) for key, found in places.items()}


class _Scores:
    """The scores of one sentence's candidates. Candidates of the same words have the same one."""

    def __init__(self, sentence: _Sentence, asked: set[str], information: dict[str, int]):
        self._sentence, self._asked, self._information = sentence, asked, information
        found = asked & sentence.places.keys()
        gains = np.zeros(len(sentence.words), dtype=np.int64)
        for word in found:
            gains[sentence.places[word]] = information[word]
        self._gained = np.concatenate([[0], gains.cumsum()])  # by the words up to each place
        self._in_question = self._places(found - _stop_words())
        self._known: dict[frozenset[str], float] = {}
        self._plain: dict[int, int] = {}  # the best window of each size, by question words alone

    def score(self, candidate: _Candidate) -> float:
        """The gain of the best window minus the distance. A window has as many words as the
        question and the candidate together."""
        own = frozenset(self._sentence.words[candidate.start : candidate.end]) - self._asked
        if own not in self._known:
            in_answer = self._places(own)
            window = self._window(in_answer, len(self._asked) + len(own))
            self._known[own] = window / _UNIT - self._distance(in_answer)
        return self._known[own]

    def _places(self, words: Collection[str]) -> np.ndarray:
        places = itertools.chain.from_iterable(self._sentence.places[word] for word in words)
        return np.array(sorted(places), dtype=np.int64)

    def _window(self, in_answer: np.ndarray, size: int) -> int:
        """The largest gain of a window of this size: by words of the question alone, or with a word
        of the candidate."""
        length, words = len(self._sentence.words), self._sentence.words
        if size not in self._plain:
            self._plain[size] = self._most(np.arange(length), size)
        if not len(in_answer):
            return self._plain[size]
        gains = [self._information[words[place]] for place in in_answer]
        gained = np.concatenate([[0], np.cumsum(gains)])
        if len(in_answer) * size < length:
            starts = (in_answer[:, None] - np.arange(size)).ravel().clip(0)
        else:
            starts = np.arange(length)
        before, within = np.searchsorted(in_answer, [starts, starts + size])
        return max(self._plain[size], self._most(starts, size, gained[within] - gained[before]))

    def _most(self, starts: np.ndarray, size: int, more: np.ndarray | int = 0) -> int:
        ends = np.minimum(starts + size, len(self._sentence.words))
        return int((self._gained[ends] - self._gained[starts] + more).max())

    def _distance(self, in_answer: np.ndarray) -> float:
        """The least distance between a word of the question and one of the candidate, as a share of
        the sentence's length."""
        asked = self._in_question
        if not len(asked) or not len(in_answer):
            return 1.0
        right = np.searchsorted(asked, in_answer)
        nearest = min(
            np.abs(asked[right.clip(max=len(asked) - 1)] - in_answer).min(),
            np.abs(asked[(right - 1).clip(0)] - in_answer).min(),
        )
        return int(nearest) / max(len(self._sentence.words) - 1, 1)
