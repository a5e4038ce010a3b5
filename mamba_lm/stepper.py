"""One more token a row: its log-probabilities and the state after it."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mamba_lm.cuda_graphs import StepGraph, graphs_of
from mamba_lm.models.mamba import MambaLM, MambaState, at_least_float32

Step = Callable[[Tensor, MambaState], tuple[Tensor, MambaState]]


def make_step(model: MambaLM, vocab_size: int | None = None) -> Step:
    """A function (token_ids (b,), state) -> the log-probabilities (b, v) of the next token, and the
    state. It is valid until weights are moved or replaced, or modules are hooked."""
    step = model.stepper()

    def read_one(token_ids: Tensor, state: MambaState) -> tuple[Tensor, MambaState]:
        hidden, state = step(token_ids, state)
        return token_log_probs(model, hidden, vocab_size), state

    return read_one


def make_captured_step(model: MambaLM, vocab_size: int | None = None) -> Step:
    """As `make_step`, for one row, by a CUDA graph: results are valid until the next call."""
    read_one = make_step(model, vocab_size)
    graphs = graphs_of(model, ("one token", vocab_size))

    def step(tensors: Sequence[Tensor]) -> tuple[list[Tensor], Sequence[Tensor]]:
        token_ids, *state_tensors = tensors
        log_probs, state = read_one(token_ids, MambaState.of(state_tensors))
        return [token_ids, *state.tensors()], (log_probs,)

    def replay(token_ids: Tensor, state: MambaState) -> tuple[Tensor, MambaState]:
        start = [token_ids, *state.tensors()]
        graph = graphs.get(1) or graphs.setdefault(1, StepGraph(step, start, 1))
        graph.load(start)
        [[log_probs]] = graph()
        return log_probs, MambaState.of(graph.tensors[1:])

    return replay


def token_log_probs(model: MambaLM, hidden: Tensor, vocab_size: int | None) -> Tensor:
    """Log-probabilities (b, v) of what follows each row of hidden (b, m). vocab_size, the
    tokenizer's length, excludes the padded rows of the embedding."""
    return at_least_float32(model.lm_head(hidden)[..., :vocab_size]).log_softmax(dim=-1)


def is_captured(model: MambaLM) -> bool:
    """Whether steps are CUDA graphs, in which hooks are not called and casts are not kept."""
    is_on_gpu = _device(model).type == "cuda"
    return is_on_gpu and model.is_plain() and not torch.is_autocast_enabled("cuda")


def _device(model: MambaLM) -> torch.device:
    return model.lm_head.weight.device
