"""Contexts -> states -> questions -> answers with confidence: the one answering loop."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from context_qa.dataset import token_ids
from mamba_lm.generate import continuation_log_prob, decode, prefill, read
from mamba_lm.model import MambaLM, MambaState
from squad_utils import NO_ANSWER, answer_text


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

    A guess ends before the first token that holds a newline or is end-of-text.
    """

    def __init__(self, model: MambaLM, tokenizer, max_new_tokens: int = 64, batch_size: int = 32):
        self.model, self.tokenizer = model, tokenizer
        self.max_new_tokens, self.batch_size = max_new_tokens, batch_size
        self.vocab_size = len(tokenizer)
        texts = tokenizer.batch_decode([[i] for i in range(self.vocab_size)])
        self.stop_ids = {i for i, text in enumerate(texts) if "\n" in text}
        self.stop_ids.add(tokenizer.eos_token_id)
        self.no_answer_ids = token_ids(tokenizer, answer_text(NO_ANSWER))

    def answer(self, prompts: Sequence[tuple[str, str]]) -> Iterator[dict[int, Answer]]:
        """Answers to prompts, (prefix, suffix) texts, by their place, a batch at a time.

        Equal prefixes stand side by side in batches of `batch_size` prompts, and prefixes of like
        length too, so that little is padding.
        """
        order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i][0]), prompts[i]))
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            answers = self._answer_batch([prompts[i] for i in batch])
            yield dict(zip(batch, answers, strict=True))

    def _answer_batch(self, prompts: Sequence[tuple[str, str]]) -> list[Answer]:
        started = time.perf_counter()
        distinct = dict.fromkeys(prefix for prefix, _ in prompts)
        places = {prefix: place for place, prefix in enumerate(distinct)}
        state, lengths = self.read_prefixes(list(places))
        index = [places[prefix] for prefix, _ in prompts]
        state = state.fork(torch.tensor(index, device=state.ssm[0].device))
        suffixes = [suffix for _, suffix in prompts]
        return self.ask(state, suffixes, [lengths[place] for place in index], started)

    @torch.inference_mode()
    def read_prefixes(self, prefixes: Sequence[str]) -> tuple[MambaState, list[int]]:
        """The state after each prefix, a row each, and the prefixes' lengths in tokens."""
        ids = [token_ids(self.tokenizer, prefix) for prefix in prefixes]
        return prefill(self.model, ids), [len(row) for row in ids]

    @torch.inference_mode()
    def ask(
        self,
        state: MambaState,
        suffixes: Sequence[str],
        prefix_lengths: Sequence[int],
        started: float | None = None,
    ) -> list[Answer]:
        """Answers to suffixes, each asked from its own row of the state."""
        started = time.perf_counter() if started is None else started
        ids = [token_ids(self.tokenizer, suffix) for suffix in suffixes]
        reading = read(self.model, ids, state, self.vocab_size)
        no_answer = continuation_log_prob(
            self.model, reading, self.no_answer_ids, self.stop_ids, self.vocab_size
        ).tolist()
        generations = decode(
            self.model, reading, self.stop_ids, self.max_new_tokens, self.vocab_size
        )
        texts = self.tokenizer.batch_decode([generation.token_ids for generation in generations])
        seconds = (time.perf_counter() - started) / len(suffixes)
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
