"""Steps of a loop as one CUDA graph: the GPU runs several without the host."""

from collections.abc import Callable, Hashable, Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn


class StepGraph:
    """Several steps of a loop over tensors, run as one.

    step: from the loop's tensors to their next values, of the same shapes, and tensors to show of
    each step. It does not wait for the GPU and changes nothing in place. Whatever else it reads on
    the GPU must live as long as the graph, which knows addresses only. start: tensors of the loop's
    shapes. beside: a graph that never runs at the same time, whose memory this one shares.
    """

    def __init__(
        self,
        step: Callable[[list[Tensor]], tuple[Sequence[Tensor], Sequence[Tensor]]],
        start: Sequence[Tensor],
        steps: int,
        beside: "StepGraph | None" = None,
    ):
        with torch.inference_mode(False):  # an inference tensor could not be written outside it
            self.tensors = [torch.empty_like(tensor) for tensor in start]
        self.load(start)

        def run() -> None:
            tensors, shown = self.tensors, []
            for _ in range(steps):
                tensors, values = step(tensors)
                shown.append(values)
            # Stacked before the loop's tensors, which they may be, are overwritten.
            self.shown = [torch.stack(values) for values in zip(*shown, strict=True)]
            for own, new in zip(self.tensors, tensors, strict=True):
                own.copy_(new)

        with torch.cuda.device_of(start[0]):
            self._replay, self._pool = capture(run, beside and beside._pool)

    def load(self, tensors: Sequence[Tensor]) -> None:
        """Let the loop continue from these."""
        for own, given in zip(self.tensors, tensors, strict=True):
            own.copy_(given)

    def __call__(self) -> list[Tensor]:
        """Run the steps, after which `tensors` are the loop's. Returns what each step showed,
        stacked; the next call overwrites both."""
        self._replay()
        return self.shown


def capture(
    run: Callable[[], None], pool: tuple[int, int] | None = None
) -> tuple[Callable[[], None], tuple[int, int]]:
    """A function by which the GPU repeats what `run` launched, as one launch, and its pool of
    memory, which is `pool` where one is given."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()  # what is compiled or loaded at the first run cannot be captured
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        run()
    return graph.replay, graph.pool()


def graph_size(rows: int) -> int:
    """The batch that a graph for so many rows has: 1, 2, 3, 4, 6, 8, 12, 16, 24 ..."""
    power = 1 << (rows - 1).bit_length()
    return power * 3 // 4 if rows <= power * 3 // 4 else power


_graphs: WeakKeyDictionary[nn.Module, tuple[tuple[int, ...], dict]] = WeakKeyDictionary()


def graphs_of(model: nn.Module, purpose: Hashable) -> dict[int, StepGraph]:
    """A model's graphs for a purpose, by size of batch; none when its weights have moved, or are
    more or fewer than before. Only a model that `is_plain` may use them: a graph calls no hook."""
    addresses = tuple(parameter.data_ptr() for parameter in model.parameters())
    known_addresses, graphs = _graphs.get(model, (None, {}))
    if addresses != known_addresses:
        graphs = {}
        _graphs[model] = addresses, graphs
    return graphs.setdefault(purpose, {})
