"""The sliding-window baseline of the SQuAD paper (Rajpurkar et al. 2016, section 5), which learns
nothing and never abstains: what a score is to be read against.

Candidates are the phrases of the context between stop words and punctuation, where the paper takes
the constituents of a parse. Those in the sentence with the greatest overlap with the question, in
unigrams and bigrams, themselves left out, are kept; among them decides the sliding window with
the distance-based extension (Richardson et al. 2013, algorithms 1 and 2) over their sentence.
"""

import functools
import itertools
import math
import re
import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import regex

from context_qa.results import Answer
from squad_utils import Example, fold

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


def sliding_window_answers(
    examples: Sequence[Example], done: Collection[int] = ()
) -> Iterator[dict[int, Answer]]:
    """Answers by place, a context's at a time; `done` places are left out. Their tokens are words;
    there are no probabilities."""
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
    """The phrase of the context that the baseline answers with."""
    sentences, information = _parsed(context)
    asked = [fold(token) for token in _TOKEN.findall(question) if token[0].isalnum()]
    overlaps = [
        (_overlap(sentence.words, candidate, asked), sentence, candidate)
        for sentence in sentences
        for candidate in sentence.candidates
    ]
    most = max((overlap for overlap, _, _ in overlaps), default=0)
    kept = [(sentence, candidate) for overlap, sentence, candidate in overlaps if overlap == most]
    if not kept:
        return context.strip()
    _, best = max(kept, key=lambda pair: _score(*pair, set(asked), information))
    return best.text


@functools.cache
def _stop_words() -> frozenset[str]:
    from bm25s.stopwords import STOPWORDS_EN_PLUS

    return frozenset(STOPWORDS_EN_PLUS)


@functools.lru_cache(maxsize=1)
def _parsed(context: str) -> tuple[list[_Sentence], dict[str, float]]:
    """Its sentences with their candidates, and the information of each word (algorithm 1's IC)."""
    sentences = [_sentence(text) for text in _SENTENCE_END.split(context)]
    counts = Counter(word for sentence in sentences for word in sentence.words)
    return sentences, {word: math.log(1 + 1 / count) for word, count in counts.items()}


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
    return _Sentence(words, candidates)


def _overlap(words: list[str], candidate: _Candidate, asked: list[str]) -> int:
    before, after = words[: candidate.start], words[candidate.end :]
    unigrams = {*before, *after} & set(asked)
    bigrams = {*itertools.pairwise(before), *itertools.pairwise(after)}
    return len(unigrams) + len(bigrams & set(itertools.pairwise(asked)))


def _score(
    sentence: _Sentence, candidate: _Candidate, asked: set[str], information: dict[str, float]
) -> float:
    words = sentence.words
    wanted = asked | set(words[candidate.start : candidate.end])
    gains = [information[word] if word in wanted else 0.0 for word in words]
    window = sum(gains[: len(wanted)])
    best = window
    for left, entered in itertools.zip_longest(gains, gains[len(wanted) :], fillvalue=0.0):
        window += entered - left
        best = max(best, window)
    return best - _distance(words, candidate, asked)


def _distance(words: list[str], candidate: _Candidate, asked: set[str]) -> float:
    """Between a question's word and one of the candidate's, as a share of the sentence."""
    in_question = [i for i, w in enumerate(words) if w in asked and w not in _stop_words()]
    own = set(words[candidate.start : candidate.end]) - asked
    in_answer = [i for i, w in enumerate(words) if w in own]
    if not in_question or not in_answer:
        return 1.0
    return min(abs(i - j) for i in in_question for j in in_answer) / max(len(words) - 1, 1)
