"""Greedy decoding among given token sequences, each row among its own."""

from collections.abc import Collection, Iterable, Sequence

import torch
from torch import Tensor

from mamba_lm.generate import Generation, Reading
from mamba_lm.model import MambaLM, at_least_float32, right_pad


class Choice:
    """A place in a tree of token sequences: what may follow it, and what is said if it ends here;
    None where it may not."""

    __slots__ = ("following", "text")

    def __init__(self, text: str | None = None):
        self.following: dict[int, Choice] = {}
        self.text = text

    def add(self, token_ids: Iterable[int], texts: Iterable[str | None]) -> None:
        """A sequence from here on, and what is said if it ends after each of its tokens. Where
        another said something already, that stays."""
        place = self
        for token, text in zip(token_ids, texts, strict=True):
            place = place.following.setdefault(token, Choice())
            place.text = text if place.text is None else place.text

    def text_of(self, token_ids: Iterable[int]) -> str | None:
        """What the sequence says."""
        place = self
        for token in token_ids:
            place = place.following[token]
        return place.text


@torch.no_grad()
def decode_choices(
    model: MambaLM,
    reading: Reading,
    choices: Sequence[Choice],
    stop_ids: Collection[int],
    vocab_size: int | None = None,
) -> list[Generation]:
    """Greedy continuations, each a sequence of its row's tree that may end where it does.

    As `generate.decode`, of whose tokens only those are candidates that the tree allows, and the
    stops where the sequence may end. Log-probabilities are the model's own, over all tokens.
    ValueError where a tree has a place at which nothing may follow and nothing is said.
    """
    log_probs, state = reading
    stops = torch.tensor(sorted(stop_ids), device=log_probs.device)
    step = model.stepper()
    going = list(enumerate(choices))  # the rows that are being continued, and where they stand
    token_ids: list[list[int]] = [[] for _ in choices]
    totals = [0.0] * len(choices)
    while going:
        best, which = _best([list(place.following) for _, place in going], log_probs)
        at_stops = log_probs[:, stops]  # (r, s)
        best_stop, stop = at_stops.max(dim=1).values.tolist(), at_stops.logsumexp(dim=1).tolist()
        kept, continued = [], []
        for i, (row, place) in enumerate(going):
            may_end = place.text is not None
            if may_end and best_stop[i] >= best[i]:
                totals[row] += stop[i]
            elif place.following:
                token, following = list(place.following.items())[which[i]]
                totals[row] += best[i]
                token_ids[row].append(token)
                kept.append(i)
                continued.append((row, following))
            else:
                raise ValueError(f"row {row}: nothing may follow, and nothing is said")
        going = continued
        if going:
            chosen = torch.tensor([token_ids[row][-1] for row, _ in going], device=stops.device)
            index = torch.tensor(kept, device=stops.device)
            hidden, state = step(chosen, state.fork(index))
            logits = at_least_float32(model.lm_head(hidden)[..., :vocab_size])
            log_probs = logits.log_softmax(dim=-1)
    return [Generation(*pair) for pair in zip(token_ids, totals, strict=True)]


def _best(candidates: Sequence[Sequence[int]], log_probs: Tensor) -> tuple[list, list]:
    """Of each row (r, v): the highest log-probability among its candidates and its place there;
    -inf where it has none."""
    ids, counts = right_pad([[*row, 0] for row in candidates])  # (r, k + 1): one place at least
    gains = log_probs.gather(1, ids.to(log_probs.device))
    is_padding = torch.arange(ids.shape[1]) >= counts[:, None] - 1
    best, which = gains.masked_fill(is_padding.to(gains.device), -torch.inf).max(dim=1)
    return best.tolist(), which.tolist()
