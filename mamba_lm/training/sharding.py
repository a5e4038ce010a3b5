"""Sharding by torch's fully_shard: every process keeps a shard of each parameter, of its gradient
and of its optimizer state, and gathers a layer only while that computes."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def shard(module: nn.Module, layers: list[nn.Module], device_type: str) -> None:
    """Shard a module over all processes: each of these layers by itself, then the rest."""
    mesh = init_device_mesh(device_type, (torch.distributed.get_world_size(),))
    for each in [*layers, module]:
        fully_shard(each, mesh=mesh)


def gather_shards(value: Any, keep: bool = True) -> Any:
    """A value, or nested dictionaries and lists, with full tensors on the CPU instead of sharded
    ones; other tensors as they are.

    Every process must call it, in the same order. A process without `keep` gets None for each
    sharded tensor, and has no more than one full tensor in memory.
    """
    if isinstance(value, DTensor):
        full = value.full_tensor()
        return full.cpu() if keep else None
    if isinstance(value, dict):
        return {key: gather_shards(item, keep) for key, item in value.items()}
    if isinstance(value, list):
        return [gather_shards(item, keep) for item in value]
    return value


def shard_like(value: Tensor, own: Tensor) -> Tensor:
    """A full tensor, sharded as `own` is, if it is."""
    if not isinstance(own, DTensor):
        return value
    return distribute_tensor(value.to(own.device), own.device_mesh, own.placements)


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Load a full state into an optimizer whose parameters may be sharded."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    states = {
        index: {
            # Steps are numbers, and some optimizers' moments have shapes of their own.
            key: shard_like(value, parameters[index])
            if getattr(value, "shape", None) == parameters[index].shape
            else value
            for key, value in moments.items()
        }
        for index, moments in state["state"].items()
    }
    optimizer.load_state_dict(state | {"state": states})
