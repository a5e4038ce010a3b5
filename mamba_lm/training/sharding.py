"""Sharding by torch's fully_shard: every process keeps a part of each parameter, of its gradient
and of its optimiser state, and puts a layer together only while that computes."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def shard(module: nn.Module, layers: list[nn.Module], device_type: str) -> None:
    """Shard a module over all processes: each of these layers by itself, then what is left."""
    mesh = init_device_mesh(device_type, (torch.distributed.get_world_size(),))
    for part in [*layers, module]:
        fully_shard(part, mesh=mesh)


def whole(value: Any, keep: bool = True) -> Any:
    """A value, or a nest of dictionaries and lists, with sharded tensors put together, on the CPU.

    Every process has to call it, in the same order; one that does not keep them gets None in their
    places, and never holds more than one.
    """
    if isinstance(value, DTensor):
        put_together = value.full_tensor()
        return put_together.cpu() if keep else None
    if isinstance(value, dict):
        return {key: whole(item, keep) for key, item in value.items()}
    if isinstance(value, list):
        return [whole(item, keep) for item in value]
    return value


def like(own: Tensor, value: Tensor) -> Tensor:
    """A whole tensor, sharded as `own` is, if it is."""
    if not isinstance(own, DTensor):
        return value
    return distribute_tensor(value.to(own.device), own.device_mesh, own.placements)


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Load a whole state into an optimiser whose parameters may be sharded."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    of_parameters = {
        index: {
            # Steps are numbers, and some optimisers' moments have shapes of their own.
            key: like(parameters[index], value)
            if getattr(value, "shape", None) == parameters[index].shape
            else value
            for key, value in moments.items()
        }
        for index, moments in state["state"].items()
    }
    optimizer.load_state_dict(state | {"state": of_parameters})
