"""What the backends with kernels of their own share."""

from collections.abc import Iterable

import torch
from torch import Tensor


def needs_grad(tensors: Iterable[Tensor | None]) -> bool:
    return torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in tensors)


def places(x: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """Where each row's tokens start, x taken as (tokens, d), and how many they are, (b,) each."""
    if lengths is not None:
        lengths = lengths.to(torch.int64).contiguous()
    if x.dim() == 2:
        return lengths.cumsum(0) - lengths, lengths
    b, l = x.shape[:2]
    lengths = torch.full((b,), l, device=x.device) if lengths is None else lengths.clamp(0, l)
    return torch.arange(b, device=x.device) * l, lengths


def as_tokens(tensor: Tensor | None) -> tuple[Tensor | None, int]:
    """A (b, l, k) or (tokens, k) tensor and the distance between its tokens, copied only if it must
    be: a half of a projection's output, say, stays where it is."""
    if tensor is None:
        return None, 0
    regular = tensor.stride(-1) == 1 and (
        tensor.dim() == 2 or tensor.stride(0) == tensor.shape[1] * tensor.stride(1)
    )
    return (tensor, tensor.stride(-2)) if regular else (tensor.contiguous(), tensor.shape[-1])
