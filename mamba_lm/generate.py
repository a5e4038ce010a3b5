"""Prefill, fork, decode: everything that reads or writes tokens with a trained model."""

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mamba_lm.model import MambaLM, MambaState, at_least_float32, right_pad


class Reading(NamedTuple):
    """Where rows of a batch stand: the log-probabilities (b, v) of what comes next, and a state."""

    log_probs: Tensor
    state: MambaState

    def fork(self, index: Tensor) -> "Reading":
        return Reading(self.log_probs.index_select(0, index), self.state.fork(index))


class Generation(NamedTuple):
    """New tokens of one row, the stop left out, and the log-probability of them and the stop."""

    token_ids: list[int]
    log_prob: float


def prefill(model: MambaLM, sequences: Sequence[Sequence[int]]) -> MambaState:
    """The state after each sequence, one per row, of any lengths, 0 included."""
    input_ids, lengths = (t.to(_device(model)) for t in right_pad(sequences))
    return model.encode(input_ids, lengths=lengths)[1]


def read(
    model: MambaLM,
    sequences: Sequence[Sequence[int]],
    state: MambaState | None = None,
    vocab_size: int | None = None,
) -> Reading:
    """Read one sequence per row, of any lengths >= 1, from `state` on.

    vocab_size, the tokenizer's length, bars the padded rows of the embedding from the output.
    """
    input_ids, lengths = (t.to(_device(model)) for t in right_pad(sequences))
    hidden, state = model.encode(input_ids, state, lengths)
    last = hidden[torch.arange(len(sequences), device=hidden.device), lengths - 1]  # (b, m)
    return Reading(_log_probs(model, last, vocab_size), state)


def decode(
    model: MambaLM,
    reading: Reading,
    stop_ids: Collection[int],
    max_new_tokens: int,
    vocab_size: int | None = None,
) -> list[Generation]:
    """Greedy continuations, one a row; finished rows leave the batch.

    A row stops before the first token of `stop_ids`, whose probabilities count as one: that of
    stopping.
    """
    stops = torch.tensor(sorted(stop_ids), dtype=torch.long, device=_device(model))
    tokens: list[list[int]] = [[] for _ in range(len(reading.log_probs))]
    log_probs = [0.0] * len(tokens)
    rows = list(range(len(tokens)))  # the batch's rows, by their place in the answer
    for count in range(max_new_tokens + 1):
        best, choice = reading.log_probs.max(dim=1)  # (b,)
        stopping = torch.isin(choice, stops)  # (b,)
        stop_log_prob = reading.log_probs[:, stops].logsumexp(dim=1)
        gained = torch.where(stopping, stop_log_prob, best).tolist()
        stopped = stopping.tolist()
        going = [i for i in range(len(rows)) if not stopped[i]]
        for i, row in enumerate(rows):
            if stopped[i] or count < max_new_tokens:
                log_probs[row] += gained[i]
        if not going or count == max_new_tokens:
            break
        if len(going) < len(rows):
            index = torch.tensor(going, device=choice.device)
            reading, choice = reading.fork(index), choice[index]
            rows = [rows[i] for i in going]
        for row, token in zip(rows, choice.tolist(), strict=True):
            tokens[row].append(token)
        hidden, state = model.encode(choice.unsqueeze(1), reading.state)
        reading = Reading(_log_probs(model, hidden[:, 0], vocab_size), state)
    return [Generation(*pair) for pair in zip(tokens, log_probs, strict=True)]


def continuation_log_prob(
    model: MambaLM,
    reading: Reading,
    token_ids: Sequence[int],
    stop_ids: Collection[int],
    vocab_size: int | None = None,
) -> Tensor:
    """Log-probability (b,) that each row goes on with token_ids and then stops."""
    stops = torch.tensor(sorted(stop_ids), dtype=torch.long, device=_device(model))
    ids = torch.tensor([list(token_ids)], device=stops.device).expand(len(reading.log_probs), -1)
    hidden, _ = model.encode(ids, reading.state)
    following = _log_probs(model, hidden, vocab_size)  # (b, l, v)
    first = reading.log_probs[:, token_ids[0]]
    rest = following[:, :-1].gather(2, ids[:, 1:, None]).sum(dim=(1, 2))
    return first + rest + following[:, -1, stops].logsumexp(dim=1)


def _log_probs(model: MambaLM, hidden: Tensor, vocab_size: int | None) -> Tensor:
    return at_least_float32(model.lm_head(hidden)[..., :vocab_size]).log_softmax(dim=-1)


def _device(model: MambaLM) -> torch.device:
    return model.lm_head.weight.device
