"""Rules by which decoding chooses the next token: greedy, sampled, or constrained to sequences."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from common.errors import UserError
from mamba_lm.models.mamba import right_pad


class Choice(NamedTuple):
    """What is chosen for each row: a token, or the end of the row."""

    token_ids: Tensor  # (b,) int64
    log_probs: Tensor  # (b,) of the token, or of ending
    ends: Tensor  # (b,) bool, whether the row ends before this token


class Chooser(Protocol):
    """A decoding rule. Changing how tokens are chosen means changing or adding one of these."""

    is_capturable: bool  # whether `choose` consists of tensor operations that wait for no GPU

    def choose(self, log_probs: Tensor, stops: Tensor, places: Tensor | None) -> Choice:
        """The next token of rows with log_probs (b, v). stops (s,) int64 are the tokens that end a
        row; their probabilities count as one: that of ending. places (b,) are the rows' numbers in
        the first batch, which rows leave as they end; None where the choice is captured. A row
        whose log_probs are NaN ends, with a log-probability of NaN."""


class Greedy:
    """The most probable token."""

    is_capturable = True

    def choose(self, log_probs: Tensor, stops: Tensor, places: Tensor | None) -> Choice:
        best, token_ids = log_probs.max(dim=1)  # (b,)
        is_stop = (token_ids[:, None] == stops).any(dim=1)  # (b,)
        gained = torch.where(is_stop, log_probs[:, stops].logsumexp(dim=1), best)
        return Choice(token_ids, gained, is_stop | best.isnan())


class Sampler:
    """A token drawn at a temperature above 0 from what top_k and top_p leave ("The Curious Case of
    Neural Text Degeneration", Holtzman et al. 2020), by `transformers`' processors in their order.
    Equal seeds draw equal tokens. The log-probability of a token is the model's own, at temperature
    1."""

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
        """A token drawn from log_probs (v,)."""
        # The best becomes 0: no temperature, however low, takes it to minus infinity.
        scores = (log_probs - log_probs.max()).double().cpu()[None]
        probs = self._processors(None, scores).softmax(dim=1)
        return int(torch.multinomial(probs, 1, generator=self._generator))


def make_chooser(
    temperature: float = 0.0, top_k: int | None = None, top_p: float | None = None, seed: int = 0
) -> Greedy | Sampler:
    """Greedy at temperature 0, else a sampler. UserError where top_k or top_p is given at
    temperature 0."""
    if temperature > 0:
        return Sampler(temperature, top_k, top_p, seed)
    if top_k is not None or top_p is not None:
        raise UserError("top_k and top_p apply to sampling: give a temperature above 0")
    return Greedy()


class TokenSequence(NamedTuple):
    """A sequence that may be generated, and whether it may end after each of its tokens."""

    token_ids: Sequence[int]
    may_end: Sequence[bool]

    def contains(self, token_ids: Sequence[int]) -> bool:
        """Whether token_ids, one at least, is this sequence up to a place where it may end."""
        n = len(token_ids)
        return list(self.token_ids[:n]) == list(token_ids) and self.may_end[n - 1]


class Constrained:
    """Greedy choice among token sequences, each row among its own: candidates are the tokens that
    one of the row's sequences has next, and the stops where one may end.

    Log-probabilities are the model's own, over all tokens. Used for one decoding: it follows what
    each row has generated. Raises ValueError where a row has no sequence, or one that may not end
    after its last token.
    """

    is_capturable = False

    def __init__(self, sequences: Sequence[Sequence[TokenSequence]]):
        if not all(row and all(one.may_end[-1:] == [True] for one in row) for row in sequences):
            raise ValueError("each row needs sequences, which may each end after their last token")
        self._remaining = [list(row) for row in sequences]  # those that begin as the row does
        self._length = 0  # of what each row that has not ended has generated
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
        ends = may_end & ~(best > at_stops.max(dim=1).values)  # NaN too ends it
        for place, tokens, token in zip(places, following, token_ids.tolist(), strict=True):
            self._remaining[place] = tokens.get(token, [])
        self._length += 1
        return Choice(token_ids, torch.where(ends, at_stops.logsumexp(dim=1), best), ends)


def _by_next_token(sequences: Sequence[TokenSequence], n: int) -> dict[int, list[TokenSequence]]:
    """The sequences longer than n tokens, by the next token."""
    following: dict[int, list[TokenSequence]] = {}
    for sequence in sequences:
        if len(sequence.token_ids) > n:
            following.setdefault(sequence.token_ids[n], []).append(sequence)
    return following


def _best(candidates: Sequence[Sequence[int]], log_probs: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row of log_probs (b, v): the highest among its candidates, and that candidate; -inf
    and token 0 where it has none."""
    ids, counts = right_pad([[*row, 0] for row in candidates])  # (b, k + 1): one place at least
    is_padding = torch.arange(ids.shape[1]) >= counts[:, None] - 1
    ids, is_padding = ids.to(log_probs.device), is_padding.to(log_probs.device)
    best, which = log_probs.gather(1, ids).masked_fill(is_padding, -torch.inf).max(dim=1)
    return best, ids.gather(1, which[:, None]).squeeze(1)
