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


def prefill(
    model: MambaLM, sequences: Sequence[Sequence[int]], max_tokens: int | None = None
) -> MambaState:
    """The state after each sequence, one per row, of any lengths, 0 included.

    max_tokens bounds what is read at once, rows times length; longer ones are read in pieces.
    """
    input_ids, lengths = (t.to(_device(model)) for t in right_pad(sequences))
    rows, longest = input_ids.shape
    size = max(longest if max_tokens is None else max_tokens // rows, 1)
    state = None
    for start in range(0, max(longest, 1), size):
        piece = input_ids[:, start : start + size]
        state = model.encode(piece, state, (lengths - start).clamp(0, piece.shape[1]))[1]
    return state


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
    device = _device(model)
    stops = torch.tensor(sorted(stop_ids), dtype=torch.long, device=device)
    b = len(reading.log_probs)
    tokens = torch.zeros(b, max_new_tokens, dtype=torch.long, device=device)
    counts = torch.zeros(b, dtype=torch.long, device=device)
    log_probs = torch.zeros(b, dtype=torch.float64, device=device)
    step = model.stepper()
    rows = torch.arange(b, device=device)  # the batch's rows, by their place in the answer
    for count in range(max_new_tokens + 1):
        best, choice = reading.log_probs.max(dim=1)  # (b,)
        stopping = torch.isin(choice, stops)  # (b,)
        gained = torch.where(stopping, reading.log_probs[:, stops].logsumexp(dim=1), best)
        # At the last step only a stop still counts.
        counted = stopping if count == max_new_tokens else torch.ones_like(stopping)
        log_probs.index_add_(0, rows, torch.where(counted, gained, 0).double())
        if count == max_new_tokens or stopping.all():
            break
        if stopping.any():
            going = (~stopping).nonzero().squeeze(1)
            rows, choice = rows[going], choice[going]
            reading = reading.fork(going)
        tokens[rows, count] = choice
        counts[rows] += 1
        hidden, state = step(choice, reading.state)
        reading = Reading(_log_probs(model, hidden, vocab_size), state)
    rows_of_tokens = zip(tokens.tolist(), counts.tolist(), log_probs.tolist(), strict=True)
    return [Generation(ids[:count], log_prob) for ids, count, log_prob in rows_of_tokens]


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
    hidden, _ = model.encode(ids, reading.state, keep_state=False)
    logits = at_least_float32(model.lm_head(hidden)[..., :vocab_size])  # (b, l, v)
    totals = logits.logsumexp(dim=2)  # (b, l)
    first = reading.log_probs[:, token_ids[0]]
    rest = (logits[:, :-1].gather(2, ids[:, 1:, None]).squeeze(2) - totals[:, :-1]).sum(dim=1)
    return first + rest + logits[:, -1, stops].logsumexp(dim=1) - totals[:, -1]


def _log_probs(model: MambaLM, hidden: Tensor, vocab_size: int | None) -> Tensor:
    return at_least_float32(model.lm_head(hidden)[..., :vocab_size]).log_softmax(dim=-1)


def _device(model: MambaLM) -> torch.device:
    return model.lm_head.weight.device
