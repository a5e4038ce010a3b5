"""One row continued a token at a time, each told as it is chosen: greedily or by sampling."""

import math
from collections.abc import Callable, Collection, Iterator, Sequence

import torch
from torch import Tensor

from common.errors import UserError
from mamba_lm.cuda_graphs import StepGraph, graphs_of
from mamba_lm.generate import Reading, is_captured, token_log_probs
from mamba_lm.models.interface import LanguageModel
from mamba_lm.models.state import MambaState


class Sampler:
    """Chooses the next token from log-probabilities (v,): the likeliest at temperature 0, else one
    drawn from what top_k and top_p leave ("The Curious Case of Neural Text Degeneration", Holtzman
    et al. 2020), by `transformers`' processors in its order. Equal seeds draw equally. UserError
    where top_k or top_p is given and there is nothing to draw."""

    def __init__(
        self,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
    ):
        self._processors = None
        if temperature == 0:
            if top_k is not None or top_p is not None:
                raise UserError("--top_k and --top_p choose what is drawn: give a --temperature")
            return
        from transformers.generation import (
            LogitsProcessorList,
            TemperatureLogitsWarper,
            TopKLogitsWarper,
            TopPLogitsWarper,
        )

        self._processors = LogitsProcessorList([TemperatureLogitsWarper(float(temperature))])
        if top_k is not None:
            self._processors.append(TopKLogitsWarper(top_k))
        if top_p is not None:
            self._processors.append(TopPLogitsWarper(float(top_p)))
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, log_probs: Tensor) -> int:
        if self._processors is None:
            return int(log_probs.argmax())
        # The best is 0: no temperature, however low, takes it to minus infinity.
        scores = (log_probs - log_probs.max()).double().cpu()[None]
        probs = self._processors(None, scores).softmax(dim=1)
        return int(torch.multinomial(probs, 1, generator=self._generator))


class Stream:
    """What follows one row, token by token.

    Iterate once for the new tokens, each as soon as it is chosen. Then `log_prob` is that of these
    tokens and, if it came, of the stop, by the model's own probabilities, as `generate.decode`
    counts them; NaN if the model computes that. One stream of a model at a time: on a GPU they
    share their steps' memory.
    """

    def __init__(
        self,
        model: LanguageModel,
        reading: Reading,
        stop_ids: Collection[int],
        max_new_tokens: int,
        vocab_size: int | None = None,
        sampler: Callable[[Tensor], int] | None = None,
    ):
        self.model, self.reading, self.vocab_size = model, reading, vocab_size
        self.max_new_tokens, self.stop_ids = max_new_tokens, sorted(stop_ids)
        self.sampler = sampler or Sampler()
        self.log_prob = 0.0

    @torch.no_grad()
    def __iter__(self) -> Iterator[int]:
        step = _stepper(self.model, self.vocab_size)
        log_probs, state = self.reading
        for left in range(self.max_new_tokens, -1, -1):
            if log_probs[0, 0].isnan():
                self.log_prob = math.nan
                return
            token = self.sampler(log_probs[0])
            if token in self.stop_ids:
                self.log_prob += log_probs[0, self.stop_ids].logsumexp(dim=0).item()
                return
            if left == 0:  # only a stop would still have counted
                return
            self.log_prob += log_probs[0, token].item()
            yield token
            log_probs, state = step(torch.tensor([token], device=log_probs.device), state)


def _stepper(
    model: LanguageModel, vocab_size: int | None
) -> Callable[[Tensor, MambaState], tuple[Tensor, MambaState]]:
    """What reads one token more of one row: (token_ids (1,), state) to the log-probabilities (1, v)
    of the next one and a state, good until the next call. On a GPU a step is one CUDA graph."""
    step = model.stepper()

    def read_one(token_ids: Tensor, state: MambaState) -> tuple[Tensor, MambaState]:
        hidden, state = step(token_ids, state)
        return token_log_probs(model, hidden, vocab_size), state

    if not is_captured(model):
        return read_one
    graphs = graphs_of(model, ("one token", vocab_size))

    def captured(tensors: Sequence[Tensor]) -> tuple[list[Tensor], Sequence[Tensor]]:
        token_ids, *parts = tensors
        log_probs, state = read_one(token_ids, MambaState(tuple(parts)))
        return [token_ids, *state.tensors], (log_probs,)

    def replay(token_ids: Tensor, state: MambaState) -> tuple[Tensor, MambaState]:
        start = [token_ids, *state.tensors]
        graph = graphs.get(1) or graphs.setdefault(1, StepGraph(captured, start, 1))
        graph.load(start)
        [[log_probs]] = graph()
        return log_probs, MambaState(tuple(graph.tensors[1:]))

    return replay
