"""What the backends with kernels of their own share."""

from collections.abc import Iterable, Sequence

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


def layers_fit(weights: Sequence) -> bool:
    """Whether all `LayerWeights` have the shapes that the first's imply, and its norms."""
    (m, d), (_, r), w = (
        weights[0].out_proj.shape,
        weights[0].dt_proj.shape,
        weights[0].conv.shape[2],
    )
    n = weights[0].A_log.shape[1]
    shapes = [
        (m,), (2 * d, m), (2 * d,), (d, 1, w), (d,), (r + 2 * n, d), (d, r), (d,), (d, n), (d,),
        (m, d), (m,),
    ]  # fmt: skip
    parameters = [p for of_layer in weights for p in of_layer[2:]]
    pairs = zip(parameters, shapes * len(weights), strict=True)
    return all(p is None or p.shape == shape for p, shape in pairs) and all(
        of_layer[:2] == weights[0][:2] for of_layer in weights
    )


def states_fit(
    weights: Sequence, rows: int, convs: Sequence[Tensor], ssms: Sequence[Tensor]
) -> bool:
    """Whether these are the states of so many rows, of each layer: kernels would read on."""
    (d, _, w), n = weights[0].conv.shape, weights[0].A_log.shape[1]
    return (
        len(convs) == len(ssms) == len(weights)
        and all(conv.shape == (rows, w - 1, d) for conv in convs)
        and all(ssm.shape == (rows, n, d) for ssm in ssms)
    )
