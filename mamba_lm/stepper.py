"""Read one more token per row: log-probabilities of the next token, and the state."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mamba_lm.cuda_graphs import StepGraph, graphs_of
from mamba_lm.models.interface import LanguageModel
from mamba_lm.models.state import MambaState
from mamba_lm.tensors import at_least_float32

Step = Callable[[Tensor, MambaState], tuple[Tensor, MambaState]]


def make_step(model: LanguageModel, vocab_size: int | None = None) -> Step:
    """Return a function (token_ids (b,), state) -> (log-probabilities (b, v) of the next token,
    state). It is valid until weights are moved or replaced, or hooks are added."""
    step = model.stepper()

    def read_one(token_ids: Tensor, state: MambaState) -> tuple[Tensor, MambaState]:
        hidden, state = step(token_ids, state)
        return token_log_probs(model, hidden, vocab_size), state

    return read_one


def make_captured_step(model: LanguageModel, vocab_size: int | None = None) -> Step:
    """As `make_step`, for one row, as a CUDA graph. Results are valid until the next call."""
    read_one = make_step(model, vocab_size)
    graphs = graphs_of(model, ("one token", vocab_size))

    def step(tensors: Sequence[Tensor]) -> tuple[list[Tensor], Sequence[Tensor]]:
        token_ids, *state_tensors = tensors
        log_probs, state = read_one(token_ids, MambaState(tuple(state_tensors)))
        return [token_ids, *state.tensors], (log_probs,)

    def replay(token_ids: Tensor, state: MambaState) -> tuple[Tensor, MambaState]:
        start = [token_ids, *state.tensors]
        graph = graphs.get(1) or graphs.setdefault(1, StepGraph(step, start, 1))
        graph.load(start)
        [[log_probs]] = graph()
        return log_probs, MambaState(tuple(graph.tensors[1:]))

    return replay


def token_log_probs(model: LanguageModel, hidden: Tensor, vocab_size: int | None) -> Tensor:
    """Log-probabilities (b, v) of the next token, from hidden states (b, m). vocab_size, the
    tokenizer's length, excludes the padded rows of the embedding."""
    return at_least_float32(model.lm_head(hidden)[..., :vocab_size]).log_softmax(dim=-1)


def is_captured(model: LanguageModel) -> bool:
    """Whether steps run as CUDA graphs: on a GPU, but not with hooks, which a graph does not call,
    and not under autocast, whose casts a graph does not keep."""
    is_on_gpu = model.device.type == "cuda"
    return is_on_gpu and model.is_plain() and not torch.is_autocast_enabled("cuda")
