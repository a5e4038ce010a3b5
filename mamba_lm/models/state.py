"""The state of a language model as a value: what `encode` returns and reads on from."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class MambaState:
    """Everything a model remembers of what it has read. A value: no call changes one in place.

    tensors: the first dimension of each is the batch. What they are is known to the model's own
    file alone.
    """

    tensors: tuple[Tensor, ...]

    @property
    def batch_size(self) -> int:
        return self.tensors[0].shape[0]

    @property
    def device(self) -> torch.device:
        return self.tensors[0].device

    @property
    def num_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors)

    def map(self, function: Callable[[Tensor], Tensor]) -> "MambaState":
        """The state of what `function` makes of each tensor."""
        return MambaState(tuple(function(tensor) for tensor in self.tensors))

    def fork(self, index: Tensor) -> "MambaState":
        """Rows `index` (int64, (k,)) of this state, each as often as it is named.

        By index_select, whose gradient is bit-reproducible on CPU (that of h[index] is not).
        """
        return self.map(lambda tensor: tensor.index_select(0, index))

    def detach(self) -> "MambaState":
        return self.map(Tensor.detach)

    def to(self, *args, **kwargs) -> "MambaState":
        """As `Tensor.to`, of every tensor."""
        return self.map(lambda tensor: tensor.to(*args, **kwargs))

    @staticmethod
    def concatenate(states: "Sequence[MambaState]") -> "MambaState":
        """The rows of all states, in order."""
        tensors = zip(*(state.tensors for state in states), strict=True)
        return MambaState(tuple(map(torch.cat, tensors)))
