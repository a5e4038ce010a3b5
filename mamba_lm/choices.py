"""Greedy decoding among given token sequences, each row among its own."""

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mamba_lm.generate import Generation, Reading, token_log_probs
from mamba_lm.models.interface import LanguageModel
from mamba_lm.tensors import right_pad


class Choice(NamedTuple):
    """A token sequence that may be said, and whether it may end after each of its tokens."""

    token_ids: Sequence[int]
    may_end: Sequence[bool]

    def says(self, token_ids: Sequence[int]) -> bool:
        """Whether token_ids, one at least, is this sequence up to a place where it may end."""
        n = len(token_ids)
        return list(self.token_ids[:n]) == list(token_ids) and self.may_end[n - 1]


@torch.no_grad()
def decode_choices(
    model: LanguageModel,
    reading: Reading,
    choices: Sequence[Sequence[Choice]],
    stop_ids: Collection[int],
    vocab_size: int | None = None,
) -> list[Generation]:
    """Greedy continuations, each by one of its row's choices.

    As `generate.decode`, but the candidates are those tokens alone that a choice has next, and the
    stops where one may end. Log-probabilities are the model's own, over all tokens. ValueError
    where a row has no choice, or one that may not end after its last token.
    """
    log_probs, state = reading
    stops = torch.tensor(sorted(stop_ids), device=log_probs.device)
    step = model.stepper()
    if not all(row and all(choice.may_end[-1:] == [True] for choice in row) for row in choices):
        raise ValueError("each row needs a choice, and each choice may end after its last token")
    going = list(enumerate(choices))  # rows that are being continued, and what they may still say
    said: list[list[int]] = [[] for _ in choices]
    totals = [0.0] * len(choices)
    for n in range(max(len(choice.token_ids) for row in choices for choice in row) + 1):
        following = [_by_token(remaining, n) for _, remaining in going]
        best, which = _best([list(tokens) for tokens in following], log_probs)
        at_stops = log_probs[:, stops]  # (r, s)
        best_stop, stop = at_stops.max(dim=1).values.tolist(), at_stops.logsumexp(dim=1).tolist()
        kept, continued = [], []
        for i, (row, remaining) in enumerate(going):
            may_end = n > 0 and any(choice.may_end[n - 1] for choice in remaining)
            if may_end and not best[i] > best_stop[i]:  # NaN too ends it
                totals[row] += stop[i]
            else:
                token = list(following[i])[which[i]]
                said[row].append(token)
                totals[row] += best[i]
                kept.append(i)
                continued.append((row, following[i][token]))
        going = continued
        if not going:
            break
        chosen = torch.tensor([said[row][-1] for row, _ in going], device=stops.device)
        hidden, state = step(chosen, state.fork(torch.tensor(kept, device=stops.device)))
        log_probs = token_log_probs(model, hidden, vocab_size)
    return [Generation(*pair) for pair in zip(said, totals, strict=True)]


def _by_token(choices: Sequence[Choice], n: int) -> dict[int, list[Choice]]:
    """Those that go on after n tokens, by the next one."""
    following: dict[int, list[Choice]] = {}
    for choice in choices:
        if len(choice.token_ids) > n:
            following.setdefault(choice.token_ids[n], []).append(choice)
    return following


def _best(candidates: Sequence[Sequence[int]], log_probs: Tensor) -> tuple[list, list]:
    """Of each row (r, v): the highest log-probability among its candidates and its place there;
    -inf where it has none."""
    ids, counts = right_pad([[*row, 0] for row in candidates])  # (r, k + 1): one place at least
    gains = log_probs.gather(1, ids.to(log_probs.device))
    is_padding = torch.arange(ids.shape[1]) >= counts[:, None] - 1
    best, which = gains.masked_fill(is_padding.to(gains.device), -torch.inf).max(dim=1)
    return best.tolist(), which.tolist()
