"""Contexts -> states -> questions -> answers with confidence: the one answering loop."""

import math
import time
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from context_qa.dataset import token_ids
from mamba_lm.generate import continuation_log_prob, decode, prefill, read
from mamba_lm.model import MambaLM, MambaState
from squad_utils import NO_ANSWER, answer_text

WINDOW = 512  # prompts: what is answered out of order, and so the most that a crash can lose
MAX_BATCH_TOKENS = 8192

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Answer:
    """A guess and what the model thinks of it.

    confidence and no_answer_probability are products of token probabilities, the stop included: of
    the guess, and of NO_ANSWER in its place. seconds: wall time of the batch over its rows.
    num_tokens: those of the prompt, context included; num_new_tokens: those of the guess.
    """

    text: str
    confidence: float
    no_answer_probability: float
    seconds: float
    num_tokens: int
    num_new_tokens: int


class Answerer:
    """Answers questions with a model, greedily, each context read once for its questions.

    A guess ends before the first token that holds a newline or is end-of-text. max_batch_tokens
    bounds memory: the tokens, padding included, of contexts that are read together, and those of
    questions that are answered together, each with max_new_tokens for its answer.
    """

    def __init__(
        self,
        model: MambaLM,
        tokenizer,
        max_new_tokens: int = 64,
        max_batch_tokens: int = MAX_BATCH_TOKENS,
    ):
        self.model, self.tokenizer = model, tokenizer
        self.max_new_tokens, self.max_batch_tokens = max_new_tokens, max_batch_tokens
        self.vocab_size = len(tokenizer)
        texts = tokenizer.batch_decode([[i] for i in range(self.vocab_size)])
        self.stop_ids = {i for i, text in enumerate(texts) if "\n" in text}
        self.stop_ids.add(tokenizer.eos_token_id)
        self.no_answer_ids = token_ids(tokenizer, answer_text(NO_ANSWER))

    def answer(self, prompts: Sequence[tuple[str, str]]) -> Iterator[dict[int, Answer]]:
        """Answers to prompts, (prefix, suffix) texts, by their place, a batch at a time.

        They come window after window of WINDOW prompts. Inside one, each prefix is read once, with
        others of its length. The last one is kept, since the next window may go on with it: a
        prefix that all prompts share is read once in all.
        """
        kept: dict[str, tuple[MambaState, list[int]]] = {}
        for start in range(0, len(prompts), WINDOW):
            places: dict[str, list[int]] = {}
            for place in range(start, min(start + WINDOW, len(prompts))):
                places.setdefault(prompts[place][0], []).append(place)
            last = prompts[place][0]
            lengths = {p: len(token_ids(self.tokenizer, p)) for p in places if p not in kept}
            known = [[prefix] for prefix in kept if prefix in places]
            for prefixes in (*known, *_batches(lengths, self.max_batch_tokens)):
                started = time.perf_counter()
                read = kept.get(prefixes[0]) or self.read_prefixes(prefixes)
                rows = {p: row for row, prefix in enumerate(prefixes) for p in places[prefix]}
                seconds = (time.perf_counter() - started) / len(rows)
                yield from self._ask_in_batches(read, rows, prompts, seconds)
                if last in prefixes:
                    kept_next = {last: self._rows(*read, [prefixes.index(last)])}
            kept = kept_next

    def _ask_in_batches(
        self,
        read: tuple[MambaState, list[int]],
        rows: dict[int, int],
        prompts: Sequence[tuple[str, str]],
        seconds: float,
    ) -> Iterator[dict[int, Answer]]:
        """Answers to prompts by place, each from its row of what was read."""
        lengths = {place: len(token_ids(self.tokenizer, prompts[place][1])) for place in rows}
        costs = {place: length + self.max_new_tokens for place, length in lengths.items()}
        for batch in _batches(costs, self.max_batch_tokens):
            state, prefix_lengths = self._rows(*read, [rows[place] for place in batch])
            suffixes = [prompts[place][1] for place in batch]
            answers = self.ask(state, suffixes, prefix_lengths, seconds)
            yield dict(zip(batch, answers, strict=True))

    @staticmethod
    def _rows(
        state: MambaState, lengths: list[int], rows: list[int]
    ) -> tuple[MambaState, list[int]]:
        index = torch.tensor(rows, device=state.ssm[0].device)
        return state.fork(index), [lengths[row] for row in rows]

    @torch.inference_mode()
    def read_prefixes(self, prefixes: Sequence[str]) -> tuple[MambaState, list[int]]:
        """The state after each prefix, a row each, and the prefixes' lengths in tokens."""
        ids = [token_ids(self.tokenizer, prefix) for prefix in prefixes]
        state = prefill(self.model, ids, self.max_batch_tokens)
        return state, [len(row) for row in ids]

    @torch.inference_mode()
    def ask(
        self,
        state: MambaState,
        suffixes: Sequence[str],
        prefix_lengths: Sequence[int],
        reading_seconds: float = 0.0,
    ) -> list[Answer]:
        """Answers to suffixes, each asked from its own row of the state.

        reading_seconds, a prefix's share of the time that it took to read it, is added to theirs.
        """
        started = time.perf_counter()
        ids = [token_ids(self.tokenizer, suffix) for suffix in suffixes]
        reading = read(self.model, ids, state, self.vocab_size)
        no_answer = continuation_log_prob(
            self.model, reading, self.no_answer_ids, self.stop_ids, self.vocab_size
        ).tolist()
        generations = decode(
            self.model, reading, self.stop_ids, self.max_new_tokens, self.vocab_size
        )
        texts = self.tokenizer.batch_decode([generation.token_ids for generation in generations])
        seconds = reading_seconds + (time.perf_counter() - started) / len(suffixes)
        return [
            Answer(
                text=text.strip(),
                confidence=math.exp(generation.log_prob),
                no_answer_probability=math.exp(no_answer[row]),
                seconds=seconds,
                num_tokens=prefix_lengths[row] + len(ids[row]),
                num_new_tokens=len(generation.token_ids),
            )
            for row, (text, generation) in enumerate(zip(texts, generations, strict=True))
        ]


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
