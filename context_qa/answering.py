"""The answering loop: contexts -> states -> questions -> answers with confidence."""

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
from mamba_lm.models.interface import LanguageModel
from mamba_lm.models.state import MambaState
from squad_utils import NO_ANSWER, is_scored_as_empty

WINDOW = 512  # prompts that are answered in any order

Key = TypeVar("Key", bound=Hashable)


class _Guess(NamedTuple):
    text: str
    log_prob: float
    num_tokens: int


class Answerer:
    """Answers questions with a model, greedily. Each context is read once for all its questions.

    A guess ends before the first token that contains a newline or is end-of-text. max_batch_tokens
    limits memory: the tokens, padding included, of contexts that are read together, and those of
    questions that are answered together, each plus max_new_tokens for its answer.

    With a no_answer_threshold T, the guess is NO_ANSWER if its probability is above T. If it is
    not, and the greedy guess is scored as the empty answer, the model guesses again and may neither
    stop at once nor start with the first token of NO_ANSWER. The new guess is rarely scored as the
    empty answer too, for example "the I don't know". A span never is, unless the context has none.

    span_borders: where spans may end if guesses are spans of their contexts, see `spans.Spans`.
    """

    def __init__(
        self,
        model: LanguageModel,
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
        rank: int = 0,
        world_size: int = 1,
        on_state: Callable[[dict[int, list[int]], MambaState], object] | None = None,
    ) -> Iterator[dict[int, Answer]]:
        """Yield answers to prompts, (prefix, suffix) texts, by their index, one batch at a time.

        Windows of WINDOW prompts are answered one after the other. Within a window, each prefix is
        read once, together with others of similar length. With `contexts`, one per prompt, guesses
        are spans of these, or NO_ANSWER.

        Batches depend only on the prompts, so that answers have the same bits in every run. Batches
        whose indices are all in `done` are skipped; the others are shared among ranks. on_state is
        called with the suffixes of a batch, token ids by index, and the state after their prefixes,
        one row each.
        """
        if contexts is not None:
            require_pieces(self.tokenizer)
        done = frozenset(done)
        kept: tuple[list[list[int]], MambaState] | None = None
        for unit, (prefixes, rows) in enumerate(self._units(prompts)):
            if unit % world_size != rank:
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
            # A prefix that all prompts share is a unit of every window: it is read only once.
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
        """Yield the token ids of prefixes that are read together, and the rows of their prompts, by
        index."""
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
        """The state after each prefix, one per row. Prefixes are token ids from `tokens.encode`.
        on_read is called after each piece with the number of tokens of the longest prefix in it."""
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
        """Answer suffixes, token ids from `tokens.encode`, one for each row of the state. With
        `contexts`, each guess is a span of its row's context, or NO_ANSWER.

        reading_seconds, the share of each suffix in the time for reading the prefixes, is added to
        the time of its answer.
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
        rows = [
            row
            for row, guess in enumerate(guesses)
            if is_scored_as_empty(guess.text) and not is_above[row]
        ]
        if rows:
            forked = reading.fork(torch.tensor(rows, device=reading.log_probs.device))
            own_contexts = contexts and [contexts[row] for row in rows]
            others = self._guess(forked, own_contexts, may_abstain=False)
            replaced = dict(zip(rows, others, strict=True))
            guesses = [replaced.get(row, guess) for row, guess in enumerate(guesses)]
        return [abstention[row] if is_above[row] else guess for row, guess in enumerate(guesses)]

    def _guess(
        self, reading: Reading, contexts: Sequence[str] | None, may_abstain: bool = True
    ) -> list[_Guess]:
        """Greedy guesses; without may_abstain, the first token is neither a stop nor that of
        NO_ANSWER."""
        if contexts is not None:
            return self._guess_spans(reading, contexts, may_abstain)
        if not may_abstain:
            log_probs = reading.log_probs
            excluded = torch.tensor(
                [*self.stop_ids, self.no_answer_ids[0]], device=log_probs.device
            )
            reading = reading._replace(log_probs=log_probs.index_fill(1, excluded, -math.inf))
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
        chooser = Constrained(
            [
                [*one.sequences, abstention] if may_abstain or not one.sequences else one.sequences
                for one in spans
            ]
        )
        generations = decode(
            self.model, reading, self.stop_ids, chooser.max_new_tokens, self.vocab_size, chooser
        )
        return [
            _Guess(one.text(token_ids) or NO_ANSWER, log_prob, len(token_ids))
            for one, (token_ids, log_prob) in zip(spans, generations, strict=True)
        ]


def as_probability(log_prob: float) -> float:
    """The probability, at most 1. Raises UserError if the model computed NaN."""
    if math.isnan(log_prob):
        raise UserError("the model computes NaN: its weights are broken; train it again")
    return min(math.exp(log_prob), 1.0)  # a sum of logarithms can be rounded to more than 0


def _windows(prompts: Sequence[tuple[str, str]]) -> Iterator[dict[str, list[int]]]:
    """Yield windows of at most WINDOW prompts: their indices by prefix. Adjacent prompts with the
    same prefix are in one window, unless they are more than WINDOW."""
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
    """Yield batches of keys in order of size, each as large as max_tokens allows with padding, and
    of at least one key."""
    batch: list[Key] = []
    for key in sorted(sizes, key=sizes.__getitem__):
        if batch and sizes[key] * (len(batch) + 1) > max_tokens:
            yield batch
            batch = []
        batch.append(key)
    if batch:
        yield batch
