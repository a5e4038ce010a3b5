"""Prefill, fork, decode: reading and generating tokens with a trained model."""

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from common.errors import UserError
from mamba_lm.choosers import Chooser, Greedy
from mamba_lm.cuda_graphs import StepGraph, graph_size, graphs_of
from mamba_lm.models.interface import LanguageModel
from mamba_lm.models.state import MambaState
from mamba_lm.stepper import is_captured, make_captured_step, make_step, token_log_probs
from mamba_lm.tensors import at_least_float32, right_pad

GRAPH_STEPS, GRAPH_ROWS = 4, 128  # tokens per graph, and the most rows of one
NO_TOKEN = -1


class Reading(NamedTuple):
    """What follows rows that have been read: log-probabilities (b, v) of the next token, and the
    state."""

    log_probs: Tensor
    state: MambaState

    def fork(self, index: Tensor) -> "Reading":
        return Reading(self.log_probs.index_select(0, index), self.state.fork(index))


class Generation(NamedTuple):
    """New tokens of one row, without the stop, and the log-probability of them and of the stop."""

    token_ids: list[int]
    log_prob: float


def prefill(
    model: LanguageModel,
    sequences: Sequence[Sequence[int]],
    max_tokens: int | None = None,
    on_read: Callable[[int], object] = lambda length: None,
) -> MambaState:
    """The state after each sequence, one per row. Sequences may differ in length and be empty.

    max_tokens limits memory: batches of more tokens (rows times longest) are read in pieces.
    on_read is called with the number of columns of each piece.
    """
    input_ids, lengths = right_pad(sequences)
    input_ids = input_ids.to(model.device)
    rows, longest = input_ids.shape
    size = max(longest if max_tokens is None else max_tokens // rows, 1)
    state = None
    for start in range(0, max(longest, 1), size):
        piece = input_ids[:, start : start + size]
        state = model.encode(piece, state, (lengths - start).clamp(0, piece.shape[1]))[1]
        on_read(piece.shape[1])
    return state


def read(
    model: LanguageModel,
    sequences: Sequence[Sequence[int]],
    state: MambaState | None = None,
    vocab_size: int | None = None,
) -> Reading:
    """Read one sequence per row, starting from `state`. Sequences may differ in length.

    vocab_size, the tokenizer's length, excludes the padded rows of the embedding. Raises UserError
    if a sequence is empty: a tokenizer may have no token for any part of a text.
    """
    _require_tokens(sequences)
    input_ids, lengths = right_pad(sequences)
    hidden, state = model.encode(input_ids.to(model.device), state, lengths)
    lengths = lengths.to(hidden.device)
    last = hidden[torch.arange(len(sequences), device=hidden.device), lengths - 1]  # (b, m)
    return Reading(token_log_probs(model, last, vocab_size), state)


class _Rows(NamedTuple):
    """Rows during decoding, after a token has been chosen and before it is read."""

    token_ids: Tensor  # (b,) int64, chosen
    is_active: Tensor  # (b,) bool: token_ids is a new token; False once the row has ended
    log_probs: Tensor  # (b,) float64, of all tokens and the stop so far
    left: Tensor  # (), how many tokens may still be chosen, this one included
    stops: Tensor  # (s,) int64, the tokens that end a row
    state: MambaState

    def fork(self, index: Tensor) -> "_Rows":
        rows = (v.index_select(0, index) for v in self[:3])
        return _Rows(*rows, self.left, self.stops, self.state.fork(index))

    def to_tensors(self) -> list[Tensor]:
        return [*self[:5], *self.state.tensors]

    @staticmethod
    def from_tensors(tensors: Sequence[Tensor]) -> "_Rows":
        return _Rows(*tensors[:5], MambaState(tuple(tensors[5:])))


class Decoder:
    """The decoding loop: generates tokens for each row of a reading by a chooser, greedily by
    default.

    A row ends before the first token of `stop_ids`, or after max_new_tokens. The probability that
    it ends is the sum of those of all stops; it counts after the last of max_new_tokens too. Rows
    that have ended are removed from the batch. After the loop, `log_probs` (b,) float64 are the
    log-probabilities of each row's tokens and its stop; NaN if the model computes NaN. vocab_size,
    the tokenizer's length, excludes the padded rows of the embedding.

    On a GPU, steps run as CUDA graphs if the chooser can be captured. Run one decoder of a model at
    a time: graphs share memory.
    """

    def __init__(
        self,
        model: LanguageModel,
        reading: Reading,
        stop_ids: Collection[int],
        max_new_tokens: int,
        vocab_size: int | None = None,
        chooser: Chooser | None = None,
    ):
        self.model, self.reading, self.vocab_size = model, reading, vocab_size
        self.chooser, self.max_new_tokens = chooser or Greedy(), max_new_tokens
        device = reading.log_probs.device
        self.stops = torch.tensor(sorted(stop_ids), dtype=torch.long, device=device)
        self.log_probs = torch.zeros(len(reading.log_probs), dtype=torch.float64, device=device)

    def stream(self) -> Iterator[int]:
        """Yield the new tokens of a batch of one, each before the next one is computed."""
        for _, token_ids in self.steps(streams=True):
            yield token_ids.item()

    @torch.no_grad()
    def steps(self, streams: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (places (r,), token_ids (steps, r)): the indices in the reading of the rows that
        have not ended, and their new tokens; NO_TOKEN after the end of a row. token_ids are valid
        until the next step.

        streams: yield each token before the next one is computed. Otherwise CUDA graphs make
        GRAPH_STEPS tokens at a time, and the host waits for the GPU only once for all of them.
        """
        model, chooser = self.model, self.chooser
        is_on_graphs = is_captured(model)
        has_loop_graph = is_on_graphs and chooser.is_capturable and not streams
        has_step_graph = is_on_graphs and not has_loop_graph and len(self.log_probs) == 1
        step = (make_captured_step if has_step_graph else make_step)(model, self.vocab_size)

        def choose(log_probs, is_active, total, left, stops, state, places) -> _Rows:
            token_ids, gained, ends = chooser.choose(log_probs, stops, places)
            is_token = ~ends & (left > 0)
            total = total + torch.where(is_active & (ends | is_token), gained, 0).double()
            return _Rows(token_ids, is_active & is_token, total, left, stops, state)

        def advance(rows: _Rows, places: Tensor | None) -> _Rows:
            log_probs, state = step(rows.token_ids, rows.state)
            _, is_active, total, left, stops, _ = rows
            return choose(log_probs, is_active, total, left - 1, stops, state, places)

        batch = _Batch(advance)
        if has_loop_graph:
            batch = _GraphBatch(advance, graphs_of(model, (self.vocab_size, len(self.stops))))
        device = self.log_probs.device
        places = torch.arange(len(self.log_probs), device=device)  # rows after these are padding
        everywhere = torch.ones_like(places, dtype=torch.bool)
        totals = torch.zeros_like(self.log_probs)
        left = torch.tensor(self.max_new_tokens, device=device)
        log_probs, state = self.reading
        rows = choose(log_probs, everywhere, totals, left, self.stops, state, places)
        while len(active := rows.is_active.nonzero().squeeze(1)) > 0:  # here the host waits
            kept = batch.shrink(rows, active)
            if kept is not None:
                self.log_probs[places] = rows.log_probs[: len(places)]
                rows, places = kept, places[active]
            token_ids, read_next = batch.run(rows, places)
            yield places, token_ids[:, : len(places)]
            rows = read_next()
        self.log_probs[places] = rows.log_probs[: len(places)]


class _Batch:
    """Advances one token at a time; a row is removed as soon as it ends."""

    def __init__(self, advance: Callable[[_Rows, Tensor | None], _Rows]):
        self.advance = advance

    def shrink(self, rows: _Rows, active: Tensor) -> _Rows | None:
        """The rows `active`, perhaps with padding; None if the batch would not be smaller."""
        return rows.fork(active) if len(active) < len(rows.is_active) else None

    def run(self, rows: _Rows, places: Tensor) -> tuple[Tensor, Callable[[], _Rows]]:
        """The new token of each row at each step (steps, b), or NO_TOKEN, and a function that
        returns the rows after these steps."""
        return rows.token_ids[None], lambda: self.advance(rows, places)


class _GraphBatch(_Batch):
    """Advances GRAPH_STEPS tokens at a time by CUDA graphs, one for each of a few batch sizes.
    Advances one token at a time while there are more than GRAPH_ROWS rows: the cost of launches is
    then small, and graphs would fill the memory.
    """

    def __init__(
        self, advance: Callable[[_Rows, Tensor | None], _Rows], graphs: dict[int, StepGraph]
    ):
        super().__init__(advance)
        self.graphs = graphs
        self.graph: StepGraph | None = None

    def shrink(self, rows: _Rows, active: Tensor) -> _Rows | None:
        size = graph_size(len(active))
        if size > GRAPH_ROWS:
            return super().shrink(rows, active)
        if self.graph is not None and size >= len(rows.is_active):
            return None
        padding = active[:1].expand(size - len(active))
        rows = rows.fork(torch.cat([active, padding]))
        is_row = torch.arange(size, device=active.device) < len(active)
        rows = rows._replace(is_active=is_row)
        if size not in self.graphs:
            beside = next(iter(self.graphs.values()), None)
            start = rows.to_tensors()
            self.graphs[size] = StepGraph(self._step, start, GRAPH_STEPS, beside)
        self.graph = self.graphs[size]
        self.graph.load(rows.to_tensors())
        return rows

    def _step(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], Sequence[Tensor]]:
        rows = _Rows.from_tensors(tensors)
        new = torch.where(rows.is_active, rows.token_ids, NO_TOKEN)
        return self.advance(rows, None).to_tensors(), (new,)

    def run(self, rows: _Rows, places: Tensor) -> tuple[Tensor, Callable[[], _Rows]]:
        if self.graph is None:
            return super().run(rows, places)
        (token_ids,) = self.graph()
        return token_ids, lambda: _Rows.from_tensors(self.graph.tensors)


def decode(
    model: LanguageModel,
    reading: Reading,
    stop_ids: Collection[int],
    max_new_tokens: int,
    vocab_size: int | None = None,
    chooser: Chooser | None = None,
) -> list[Generation]:
    """Generate tokens for all rows, see `Decoder`."""
    decoder = Decoder(model, reading, stop_ids, max_new_tokens, vocab_size, chooser)
    device = decoder.log_probs.device
    tokens = torch.full((len(decoder.log_probs), max_new_tokens), NO_TOKEN, device=device)
    count = 0
    for places, token_ids in decoder.steps():
        token_ids = token_ids[: max_new_tokens - count]
        tokens[places, count : count + len(token_ids)] = token_ids.T
        count += len(token_ids)
    counts = (tokens != NO_TOKEN).sum(dim=1)
    rows = zip(tokens.tolist(), counts.tolist(), decoder.log_probs.tolist(), strict=True)
    return [Generation(ids[:count], log_prob) for ids, count, log_prob in rows]


def continuation_log_prob(
    model: LanguageModel,
    reading: Reading,
    token_ids: Sequence[int],
    stop_ids: Collection[int],
    vocab_size: int | None = None,
) -> Tensor:
    """Log-probability (b,) that each row continues with token_ids and then stops."""
    stops = torch.tensor(sorted(stop_ids), dtype=torch.long, device=model.device)
    ids = torch.tensor([list(token_ids)], device=stops.device).expand(len(reading.log_probs), -1)
    hidden, _ = model.encode(ids, reading.state, keep_state=False)
    logits = at_least_float32(model.lm_head(hidden)[..., :vocab_size])  # (b, l, v)
    totals = logits.logsumexp(dim=2)  # (b, l)
    first = reading.log_probs[:, token_ids[0]]
    rest = (logits[:, :-1].gather(2, ids[:, 1:, None]).squeeze(2) - totals[:, :-1]).sum(dim=1)
    return first + rest + logits[:, -1, stops].logsumexp(dim=1) - totals[:, -1]


def read_and_score(
    model: LanguageModel,
    token_ids: Sequence[int],
    state: MambaState,
    continuation: Sequence[int],
    stop_ids: Collection[int],
    vocab_size: int | None = None,
) -> tuple[Reading, float]:
    """`read` of one row, and the `continuation_log_prob` of `continuation` after it: in one pass
    over the weights if the model can return the state after every token."""
    _require_tokens([token_ids])
    device = model.device
    each = model.encode_each(torch.tensor([*token_ids, *continuation], device=device), state)
    if each is None:
        reading = read(model, [token_ids], state, vocab_size)
        score = continuation_log_prob(model, reading, continuation, stop_ids, vocab_size)
        return reading, score.item()
    last = len(token_ids) - 1
    hidden, states = each
    log_probs = token_log_probs(model, hidden[last:], vocab_size)  # (continuation + 1, v)
    score = sum(log_probs[n, token].item() for n, token in enumerate(continuation))
    score += log_probs[-1, sorted(stop_ids)].logsumexp(dim=0).item()
    return Reading(log_probs[:1], states.fork(torch.tensor([last], device=device))), score


def _require_tokens(sequences: Sequence[Sequence[int]]) -> None:
    if not all(sequences):
        raise UserError("the tokenizer has no token for any part of a text; use another tokenizer")
