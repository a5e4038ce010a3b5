"""Contexts -> states -> questions -> answers with confidence: the one answering loop."""

import itertools
import math
import time
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch

from common.errors import UserError
from context_qa.arguments import MAX_BATCH_TOKENS, MAX_NEW_TOKENS
from context_qa.prompts import PromptTokens
from context_qa.results.rows import Answer
from context_qa.spans import SPAN_BORDERS, Spans, require_pieces
from mamba_lm.choosers import Constrained, TokenSequence
from mamba_lm.generate import Reading, continuation_log_prob, decode, prefill, read
from mamba_lm.models.mamba import MambaLM, MambaState
from squad_utils import NO_ANSWER, is_scored_as_empty

WINDOW = 512  # prompts: what is answered out of order

Key = TypeVar("Key", bound=Hashable)


class _Guess(NamedTuple):
    text: str
    log_prob: float
    num_tokens: int


class Answerer:
    """Answers questions with a model, greedily, each context read once for its questions.

    A guess ends before the first token that holds a newline or is end-of-text. max_batch_tokens
    bounds memory: the tokens, padding included, of contexts that are read together, and those of
    questions that are answered together, each with max_new_tokens for its answer.

    With a no_answer_threshold T the guess is NO_ANSWER where that has a probability above T. Where
    it has not and the greedy guess is scored as the empty answer, the guess is what the model says
    if it may neither stop at once nor begin as NO_ANSWER does: now and then "the I don't know", or
    another text that is scored so. Spans never are, but for a context without any.

    span_borders: where guesses end that are spans of their contexts, see `spans.Spans`.
    """

    def __init__(
        self,
        model: MambaLM,
        tokenizer,
        max_new_tokens: int = MAX_NEW_TOKENS,
        max_batch_tokens: int = MAX_BATCH_TOKENS,
        no_answer_threshold: float | None = None,
        span_borders: str = SPAN_BORDERS[0],
    ):
        self.span_borders = span_borders
        self.model, self.tokenizer = model, tokenizer
        self.max_new_tokens, self.max_batch_tokens = max_new_tokens, max_batch_tokens
        self.no_answer_threshold = no_answer_threshold
        self.tokens = PromptTokens(tokenizer)
        self.vocab_size = self.tokens.vocab_size
        self.stop_ids, self.no_answer_ids = self.tokens.stop_ids, self.tokens.no_answer_ids

    def answer(
        self,
        prompts: Sequence[tuple[str, str]],
        contexts: Sequence[str] | None = None,
        done: Collection[int] = (),
        part: int = 0,
        parts: int = 1,
        on_state: Callable[[dict[int, list[int]], MambaState], object] | None = None,
    ) -> Iterator[dict[int, Answer]]:
        """Answers to prompts, (prefix, suffix) texts, by their place, a batch at a time.

        They come window after window of WINDOW prompts. Inside one, each prefix is read once, with
        others of its length. With `contexts`, one a prompt, guesses are spans of these, or
        NO_ANSWER. Batches depend on the prompts alone, and so, to the last bit, do answers: batches
        whose places are all `done` are left out, and of the others this part of `parts` gets its
        share. on_state is called with the suffixes of a batch, token ids by place, and the state
        after their prefixes, a row each.
        """
        if contexts is not None:
            require_pieces(self.tokenizer)
        done = frozenset(done)
        kept: tuple[list[list[int]], MambaState] | None = None
        for unit, (prefixes, rows) in enumerate(self._units(prompts)):
            if unit % parts != part:
                continue
            suffixes = dict(
                zip(rows, self.tokens.encode([prompts[p][1] for p in rows]), strict=True)
            )
            costs = {place: len(ids) + self.max_new_tokens for place, ids in suffixes.items()}
            batches = _batches(costs, self.max_batch_tokens)
            batches = [batch for batch in batches if not done.issuperset(batch)]
            if not batches:
                continue
            started = time.perf_counter()
            # What all prompts begin with is a unit of every window, and read once in all.
            state = kept[1] if kept and kept[0] == prefixes else self.read_prefixes(prefixes)
            kept = (prefixes, state) if len(prefixes) == 1 else None
            seconds = (time.perf_counter() - started) / len(rows)
            for batch in batches:
                index = [rows[place] for place in batch]
                forked = state.fork(torch.tensor(index, device=state.device))
                asked = {place: suffixes[place] for place in batch}
                if on_state is not None:
                    on_state(asked, forked)
                answers = self.ask(
                    forked,
                    list(asked.values()),
                    [len(prefixes[row]) for row in index],
                    seconds,
                    contexts and [contexts[place] for place in batch],
                )
                yield dict(zip(batch, answers, strict=True))

    def _units(
        self, prompts: Sequence[tuple[str, str]]
    ) -> Iterator[tuple[list[list[int]], dict[int, int]]]:
        """Token ids of prefixes that are read together, and the row of each prompt that has one, by
        its place."""
        for window in _windows(prompts):
            ids = dict(zip(window, self.tokens.encode(list(window)), strict=True))
            lengths = {prefix: len(tokens) for prefix, tokens in ids.items()}
            for prefixes in _batches(lengths, self.max_batch_tokens):
                rows = {p: row for row, prefix in enumerate(prefixes) for p in window[prefix]}
                yield [ids[prefix] for prefix in prefixes], rows

    @torch.inference_mode()
    def read_prefixes(
        self,
        prefixes: Sequence[Sequence[int]],
        on_read: Callable[[int], object] = lambda length: None,
    ) -> MambaState:
        """The state after each prefix, token ids as `tokens.encode` gives them, a row each. on_read
        is called with the number of tokens of the longest that have been read, piece by piece."""
        return prefill(self.model, prefixes, self.max_batch_tokens, on_read)

    @torch.inference_mode()
    def ask(
        self,
        state: MambaState,
        suffixes: Sequence[Sequence[int]],
        prefix_lengths: Sequence[int],
        reading_seconds: float = 0.0,
        contexts: Sequence[str] | None = None,
    ) -> list[Answer]:
        """Answers to suffixes, token ids as `tokens.encode` gives them, each asked from its own row
        of the state; with `contexts`, each a span of its own one, or NO_ANSWER.

        reading_seconds, a prefix's share of the time that it took to read it, is added to theirs.
        """
        started = time.perf_counter()
        reading = read(self.model, suffixes, state, self.vocab_size)
        no_answer = continuation_log_prob(
            self.model, reading, self.no_answer_ids, self.stop_ids, self.vocab_size
        ).tolist()
        guesses = self._guess(reading, contexts)
        if self.no_answer_threshold is not None:
            guesses = self._apply_threshold(reading, contexts, guesses, no_answer)
        seconds = reading_seconds + (time.perf_counter() - started) / len(suffixes)
        return [
            Answer(
                text=guess.text,
                confidence=as_probability(guess.log_prob),
                no_answer_probability=as_probability(no_answer[row]),
                seconds=seconds,
                num_tokens=prefix_lengths[row] + len(suffixes[row]),
                num_new_tokens=guess.num_tokens,
            )
            for row, guess in enumerate(guesses)
        ]

    def _apply_threshold(
        self,
        reading: Reading,
        contexts: Sequence[str] | None,
        guesses: list[_Guess],
        no_answer: list[float],
    ) -> list[_Guess]:
        abstention = [
            _Guess(NO_ANSWER, log_prob, len(self.no_answer_ids)) for log_prob in no_answer
        ]
        is_above = [as_probability(log_prob) > self.no_answer_threshold for log_prob in no_answer]
        again = [
            r
            for r, guess in enumerate(guesses)
            if is_scored_as_empty(guess.text) and not is_above[r]
        ]
        if again:
            forked = reading.fork(torch.tensor(again, device=reading.log_probs.device))
            others = contexts and [contexts[row] for row in again]
            replaced = dict(zip(again, self._guess(forked, others, False), strict=True))
            guesses = [replaced.get(row, guess) for row, guess in enumerate(guesses)]
        return [
            one if above else other
            for one, other, above in zip(abstention, guesses, is_above, strict=True)
        ]

    def _guess(
        self, reading: Reading, contexts: Sequence[str] | None, may_abstain: bool = True
    ) -> list[_Guess]:
        """What the model says, greedily; if it may not abstain, it says something else."""
        if contexts is not None:
            return self._guess_spans(reading, contexts, may_abstain)
        if not may_abstain:
            barred = torch.tensor([*self.stop_ids, self.no_answer_ids[0]])
            log_probs = reading.log_probs.index_fill(
                1, barred.to(reading.log_probs.device), -math.inf
            )
            reading = reading._replace(log_probs=log_probs)
        generations = decode(
            self.model, reading, self.stop_ids, self.max_new_tokens, self.vocab_size
        )
        texts = self.tokenizer.batch_decode([generation.token_ids for generation in generations])
        return [
            _Guess(text.strip(), generation.log_prob, len(generation.token_ids))
            for text, generation in zip(texts, generations, strict=True)
        ]

    def _guess_spans(
        self, reading: Reading, contexts: Sequence[str], may_abstain: bool
    ) -> list[_Guess]:
        ends_after = [False] * (len(self.no_answer_ids) - 1) + [True]
        abstention = TokenSequence(self.no_answer_ids, ends_after)
        by_context = {
            context: Spans(
                self.tokenizer, context, self.max_new_tokens, self.stop_ids, self.span_borders
            )
            for context in dict.fromkeys(contexts)
        }
        spans = [by_context[context] for context in contexts]
        choices = [
            [*one.choices, abstention] if may_abstain or not one.choices else one.choices
            for one in spans
        ]
        chooser = Constrained(choices)
        generations = decode(
            self.model, reading, self.stop_ids, chooser.max_new_tokens, self.vocab_size, chooser
        )
        return [
            _Guess(one.text(token_ids) or NO_ANSWER, log_prob, len(token_ids))
            for one, (token_ids, log_prob) in zip(spans, generations, strict=True)
        ]


def as_probability(log_prob: float) -> float:
    """UserError if the model computed NaN."""
    if math.isnan(log_prob):
        raise UserError("the model computes NaN: its weights are broken; train it anew")
    return min(math.exp(log_prob), 1.0)  # rounding can lift a sum of logarithms above 0


def _windows(prompts: Sequence[tuple[str, str]]) -> Iterator[dict[str, list[int]]]:
    """The places of WINDOW prompts or fewer by prefix, window after window. Neighbours of one
    prefix are in one window, unless they alone fill several."""
    window: dict[str, list[int]] = {}
    room = WINDOW
    runs = itertools.groupby(range(len(prompts)), key=lambda place: prompts[place][0])
    for prefix, run in runs:
        places = list(run)
        for start in range(0, len(places), WINDOW):
            piece = places[start : start + WINDOW]
            if len(piece) > room:
                yield window
                window, room = {}, WINDOW
            window.setdefault(prefix, []).extend(piece)
            room -= len(piece)
    if window:
        yield window


def _batches(sizes: Mapping[Key, int], max_tokens: int) -> Iterator[list[Key]]:
    """Keys in order of size, as many together as fit when padded to the largest; one at least."""
    batch: list[Key] = []
    for key in sorted(sizes, key=sizes.__getitem__):
        if batch and sizes[key] * (len(batch) + 1) > max_tokens:
            yield batch
            batch = []
        batch.append(key)
    if batch:
        yield batch
