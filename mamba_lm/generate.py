"""Prefill, fork, decode: everything that reads or writes tokens with a trained model."""

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from common.errors import UserError
from mamba_lm.cuda_graphs import StepGraph, graph_size, graphs_of
from mamba_lm.models.interface import LanguageModel
from mamba_lm.models.state import MambaState
from mamba_lm.tensors import at_least_float32, right_pad

GRAPH_STEPS, GRAPH_ROWS = 4, 128  # tokens of a graph, and rows at most
NO_TOKEN = -1


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
    model: LanguageModel,
    sequences: Sequence[Sequence[int]],
    max_tokens: int | None = None,
    on_read: Callable[[int], object] = lambda length: None,
) -> MambaState:
    """The state after each sequence, one per row, of any lengths, 0 included.

    max_tokens bounds what is read at once, rows times length; longer ones are read in pieces.
    on_read is told the length of each.
    """
    input_ids, lengths = right_pad(sequences)
    input_ids = input_ids.to(_device(model))
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
    """Read one sequence per row, of any lengths, from `state` on. UserError for an empty one: a
    tokenizer can have no token for any part of a text.

    vocab_size, the tokenizer's length, bars the padded rows of the embedding from the output.
    """
    _require_tokens(sequences)
    input_ids, lengths = right_pad(sequences)
    hidden, state = model.encode(input_ids.to(_device(model)), state, lengths)
    lengths = lengths.to(hidden.device)
    last = hidden[torch.arange(len(sequences), device=hidden.device), lengths - 1]  # (b, m)
    return Reading(token_log_probs(model, last, vocab_size), state)


class _Rows(NamedTuple):
    """Rows that are being continued, between the choice of a token and reading it."""

    token_ids: Tensor  # (b,) int64, chosen
    going: Tensor  # (b,) bool: that is a new token; False from a stop or the last token on
    log_probs: Tensor  # (b,) float64, of all that was chosen and counts
    left: Tensor  # (), the tokens that may still be chosen, this one included
    stops: Tensor  # (s,) int64, the tokens that end a row
    state: MambaState

    def fork(self, index: Tensor) -> "_Rows":
        rows = (v.index_select(0, index) for v in self[:3])
        return _Rows(*rows, self.left, self.stops, self.state.fork(index))

    def tensors(self) -> list[Tensor]:
        return [*self[:5], *self.state.tensors]

    @staticmethod
    def of(tensors: Sequence[Tensor]) -> "_Rows":
        """From what `tensors` gives."""
        return _Rows(*tensors[:5], MambaState(tuple(tensors[5:])))


@torch.no_grad()
def decode(
    model: LanguageModel,
    reading: Reading,
    stop_ids: Collection[int],
    max_new_tokens: int,
    vocab_size: int | None = None,
) -> list[Generation]:
    """Greedy continuations, one a row; finished rows leave the batch.

    A row stops before the first token of `stop_ids`, whose probabilities count as one: that of
    stopping. On a GPU the steps are CUDA graphs, kept for as long as the model's weights stay where
    they are, and the host looks every GRAPH_STEPS tokens only.
    """
    device = _device(model)
    stops = torch.tensor(sorted(stop_ids), dtype=torch.long, device=device)
    b = len(reading.log_probs)
    tokens = torch.full((b, max_new_tokens), NO_TOKEN, device=device)
    log_probs = torch.zeros(b, dtype=torch.float64, device=device)
    step = model.stepper()

    def choose(next_log_probs: Tensor, going, total, left, stops, state) -> _Rows:
        best, choice = next_log_probs.max(dim=1)  # (b,)
        stopping = (choice[:, None] == stops).any(dim=1)  # (b,)
        gained = torch.where(stopping, next_log_probs[:, stops].logsumexp(dim=1), best)
        is_token = ~stopping & (left > 0)
        # After the last token only a stop still counts.
        total = total + torch.where(going & (stopping | is_token), gained, 0).double()
        return _Rows(choice, going & is_token, total, left, stops, state)

    def advance(rows: _Rows) -> _Rows:
        hidden, state = step(rows.token_ids, rows.state)
        next_log_probs = token_log_probs(model, hidden, vocab_size)
        _, going, total, left, stops, _ = rows
        return choose(next_log_probs, going, total, left - 1, stops, state)

    if is_captured(model):
        batch = _Graphed(advance, graphs_of(model, (vocab_size, len(stops))))
    else:
        batch = _Eager(advance)
    everywhere = torch.ones(b, dtype=torch.bool, device=device)
    left = torch.tensor(max_new_tokens, device=device)
    rows = choose(reading.log_probs, everywhere, log_probs, left, stops, reading.state)
    places = torch.arange(b, device=device)  # of rows in the answer; what follows them is padding
    count = 0
    while len(going := rows.going.nonzero().squeeze(1)) > 0:  # here the host waits for a GPU
        kept = batch.shrink(rows, going)
        if kept is not None:
            log_probs[places] = rows.log_probs[: len(places)]
            rows, places = kept, places[going]
        chosen, rows = batch.run(rows)
        chosen = chosen[: max_new_tokens - count, : len(places)]
        tokens[places, count : count + len(chosen)] = chosen.T
        count += len(chosen)
    log_probs[places] = rows.log_probs[: len(places)]
    counts = (tokens != NO_TOKEN).sum(dim=1)
    rows_of_tokens = zip(tokens.tolist(), counts.tolist(), log_probs.tolist(), strict=True)
    return [Generation(ids[:count], log_prob) for ids, count, log_prob in rows_of_tokens]


class _Eager:
    """A token at a time; a row leaves as soon as it ends."""

    def __init__(self, advance: Callable[[_Rows], _Rows]):
        self.advance = advance

    def shrink(self, rows: _Rows, going: Tensor) -> _Rows | None:
        """The rows `going`, perhaps with padding behind them, if the batch gets smaller by it."""
        return rows.fork(going) if len(going) < len(rows.going) else None

    def run(self, rows: _Rows) -> tuple[Tensor, _Rows]:
        """The new token of each row at each step (steps, b), or NO_TOKEN, and what follows."""
        return rows.token_ids[None], self.advance(rows)


class _Graphed(_Eager):
    """GRAPH_STEPS tokens at a time, in a few sizes of batch, each a graph of its own. But a token
    at a time while rows are so many that launches do not count and graphs would fill the memory.
    """

    def __init__(self, advance: Callable[[_Rows], _Rows], graphs: dict[int, StepGraph]):
        super().__init__(advance)
        self.graphs, self.graph = graphs, None

    def shrink(self, rows: _Rows, going: Tensor) -> _Rows | None:
        size = graph_size(len(going))
        if size > GRAPH_ROWS:
            return super().shrink(rows, going)
        if self.graph is not None and size >= len(rows.going):
            return None
        padding = going[:1].expand(size - len(going))
        rows = rows.fork(torch.cat([going, padding]))
        is_row = torch.arange(size, device=going.device) < len(going)
        rows = rows._replace(going=is_row)
        if size not in self.graphs:
            beside = next(iter(self.graphs.values()), None)
            self.graphs[size] = StepGraph(self._step, rows.tensors(), GRAPH_STEPS, beside)
        self.graph = self.graphs[size]
        self.graph.load(rows.tensors())
        return rows

    def _step(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], Sequence[Tensor]]:
        rows = _Rows.of(tensors)
        new = torch.where(rows.going, rows.token_ids, NO_TOKEN)
        return self.advance(rows).tensors(), (new,)

    def run(self, rows: _Rows) -> tuple[Tensor, _Rows]:
        if self.graph is None:
            return super().run(rows)
        (chosen,) = self.graph()
        return chosen, _Rows.of(self.graph.tensors)


def continuation_log_prob(
    model: LanguageModel,
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


def read_and_score(
    model: LanguageModel,
    token_ids: Sequence[int],
    state: MambaState,
    continuation: Sequence[int],
    stop_ids: Collection[int],
    vocab_size: int | None = None,
) -> tuple[Reading, float]:
    """`read` of one row, and the `continuation_log_prob` of what might follow: in one pass over the
    weights where the model gives the states on the way."""
    _require_tokens([token_ids])
    device = _device(model)
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
        raise UserError("the tokenizer has no token for any part of a text that is to be continued")


def token_log_probs(model: LanguageModel, hidden: Tensor, vocab_size: int | None) -> Tensor:
    """Log-probabilities (b, v) of what follows each row of hidden (b, m), without padded rows."""
    return at_least_float32(model.lm_head(hidden)[..., :vocab_size]).log_softmax(dim=-1)


def _device(model: LanguageModel) -> torch.device:
    return model.lm_head.weight.device


def is_captured(model: LanguageModel) -> bool:
    """Whether steps are CUDA graphs, in which no hook would be called and no cast be kept."""
    return (
        _device(model).type == "cuda" and model.is_plain() and not torch.is_autocast_enabled("cuda")
    )
