"""Decoding rules: greedy, sampled, or constrained to given token sequences."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from common.errors import UserError
from mamba_lm.tensors import right_pad


class Choice(NamedTuple):
    """The choice for each row: a token, or the end of the row."""

    token_ids: Tensor  # (b,) int64
    log_probs: Tensor  # (b,) of the token, or of ending
    ends: Tensor  # (b,) bool, whether the row ends before this token


class Chooser(Protocol):
    """A decoding rule. Changing how tokens are chosen means changing or adding one of these."""

    is_capturable: bool  # whether `choose` can be part of a CUDA graph

    def choose(self, log_probs: Tensor, stops: Tensor, places: Tensor | None) -> Choice:
        """Choose the next token of each row.

        log_probs (b, v): log-probabilities of the next token. stops (s,) int64: the tokens that end
        a row; the probability that it ends is the sum of theirs. places (b,) int64: the index of
        each row in the batch at the start, before finished rows were removed; None in a CUDA graph.
        A row whose log_probs are NaN ends, with a log-probability of NaN.
        """


class Greedy:
    """The most probable token."""

    is_capturable = True

    def choose(self, log_probs: Tensor, stops: Tensor, places: Tensor | None) -> Choice:
        best, token_ids = log_probs.max(dim=1)  # (b,)
        is_stop = (token_ids[:, None] == stops).any(dim=1)  # (b,)
        gained = torch.where(is_stop, log_probs[:, stops].logsumexp(dim=1), best)
        return Choice(token_ids, gained, is_stop | best.isnan())


class Sampler:
    """A token sampled at a temperature above 0, with top-k and top-p filtering ("The Curious Case
    of Neural Text Degeneration", Holtzman et al. 2020). The filters are those of `transformers`, in
    the same order. Equal seeds give equal tokens. The reported log-probability of a token is the
    model's own: at temperature 1, unfiltered."""

    is_capturable = False

    def __init__(
        self,
        temperature: float,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
    ):
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

    def choose(self, log_probs: Tensor, stops: Tensor, places: Tensor | None) -> Choice:
        is_nan = log_probs.isnan().any(dim=1)
        drawn = [0 if nan else self.draw(row) for row, nan in zip(log_probs, is_nan, strict=True)]
        token_ids = torch.tensor(drawn, device=log_probs.device)
        gained = log_probs.gather(1, token_ids[:, None]).squeeze(1)
        is_stop = (token_ids[:, None] == stops).any(dim=1)
        gained = torch.where(is_stop, log_probs[:, stops].logsumexp(dim=1), gained)
        return Choice(token_ids, gained.masked_fill(is_nan, torch.nan), is_stop | is_nan)

    def draw(self, log_probs: Tensor) -> int:
        """Sample a token from log_probs (v,)."""
        # The maximum becomes 0, so that no temperature, however low, turns it into -inf.
        scores = (log_probs - log_probs.max()).double().cpu()[None]
        probs = self._processors(None, scores).softmax(dim=1)
        return int(torch.multinomial(probs, 1, generator=self._generator))


def make_chooser(
    temperature: float = 0.0, top_k: int | None = None, top_p: float | None = None, seed: int = 0
) -> Greedy | Sampler:
    """Greedy at temperature 0, else a sampler. Raises UserError if top_k or top_p is given at
    temperature 0."""
    if temperature > 0:
        return Sampler(temperature, top_k, top_p, seed)
    if top_k is not None or top_p is not None:
        raise UserError("top_k and top_p apply to sampling: give a temperature above 0")
    return Greedy()


class TokenSequence(NamedTuple):
    """A sequence that may be generated, and after which of its tokens it may end."""

    token_ids: Sequence[int]
    may_end: Sequence[bool]

    def contains(self, token_ids: Sequence[int]) -> bool:
        """Whether token_ids (not empty) is this sequence up to a token after which it may end."""
        n = len(token_ids)
        return list(self.token_ids[:n]) == list(token_ids) and self.may_end[n - 1]


class Constrained:
    """Greedy choice among token sequences; each row has its own list. Candidates are the next
    tokens of the sequences that start with what the row has generated, and the stops where such a
    sequence may end.

    Log-probabilities are the model's own, over all tokens. Use an instance for one decoding only:
    it keeps what each row has generated. Raises ValueError if a row has no sequence, or has one
    that may not end after its last token.
    """

    is_capturable = False

    def __init__(self, sequences: Sequence[Sequence[TokenSequence]]):
        if not all(row and all(one.may_end[-1:] == [True] for one in row) for row in sequences):
            raise ValueError("each row needs sequences, and each may end after its last token")
        self._remaining = [list(row) for row in sequences]  # those that start as the row does
        self._length = 0  # tokens generated in each row that has not ended
        self.max_new_tokens = max(len(one.token_ids) for row in sequences for one in row)

    def choose(self, log_probs: Tensor, stops: Tensor, places: Tensor | None) -> Choice:
        places, n = places.tolist(), self._length
        following = [_by_next_token(self._remaining[place], n) for place in places]
        best, token_ids = _best([list(tokens) for tokens in following], log_probs)
        at_stops = log_probs[:, stops]  # (b, s)
        may_end = torch.tensor(
            [
                n > 0 and any(one.may_end[n - 1] for one in self._remaining[place])
                for place in places
            ],
            device=log_probs.device,
        )
        ends = may_end & ~(best > at_stops.max(dim=1).values)  # NaN ends a row too
        for place, tokens, token in zip(places, following, token_ids.tolist(), strict=True):
            self._remaining[place] = tokens.get(token, [])
        self._length += 1
        return Choice(token_ids, torch.where(ends, at_stops.logsumexp(dim=1), best), ends)


def _by_next_token(sequences: Sequence[TokenSequence], n: int) -> dict[int, list[TokenSequence]]:
    """The sequences of more than n tokens, by token n."""
    following: dict[int, list[TokenSequence]] = {}
    for sequence in sequences:
        if len(sequence.token_ids) > n:
            following.setdefault(sequence.token_ids[n], []).append(sequence)
    return following


def _best(candidates: Sequence[Sequence[int]], log_probs: Tensor) -> tuple[Tensor, Tensor]:
    """For each row of log_probs (b, v), the highest log-probability among its candidates, and that
    candidate; -inf and token 0 if it has no candidate."""
    ids, counts = right_pad([[*row, 0] for row in candidates])  # (b, k + 1): never empty
    is_padding = torch.arange(ids.shape[1]) >= counts[:, None] - 1
    ids, is_padding = ids.to(log_probs.device), is_padding.to(log_probs.device)
    best, which = log_probs.gather(1, ids).masked_fill(is_padding, -torch.inf).max(dim=1)
    return best, ids.gather(1, which[:, None]).squeeze(1)
