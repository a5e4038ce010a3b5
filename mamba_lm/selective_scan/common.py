"""Helpers that the backends with kernels share: row positions, strides and shape checks."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def needs_grad(tensors: Iterable[Tensor | None]) -> bool:
    """Whether autograd has to record an operation on these tensors."""
    return torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in tensors)


def locate_rows(x: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """Find the rows of the batch in x, viewed as (tokens, d).

    Args:
        x: (b, l, d), rows padded on the right, or (tokens, d), rows packed without padding.
        lengths: (b,) the number of tokens of each row; None if all rows have l. Required for packed
            rows.

    Returns:
        The index of each row's first token and the row's length, both (b,) int64.
    """
    if lengths is not None:
        lengths = lengths.to(torch.int64).contiguous()
    if x.dim() == 2:
        return lengths.cumsum(0) - lengths, lengths
    b, l = x.shape[:2]
    lengths = torch.full((b,), l, device=x.device) if lengths is None else lengths.clamp(0, l)
    return torch.arange(b, device=x.device) * l, lengths


def with_stride(tensor: Tensor | None) -> tuple[Tensor | None, int]:
    """Return a (b, l, k) or (tokens, k) tensor with one stride between all its tokens, and that
    stride in elements. It is copied only if it has no such stride: one half of a projection's
    output, for example, is not copied."""
    if tensor is None:
        return None, 0
    regular = tensor.stride(-1) == 1 and (
        tensor.dim() == 2 or tensor.stride(0) == tensor.shape[1] * tensor.stride(1)
    )
    return (tensor, tensor.stride(-2)) if regular else (tensor.contiguous(), tensor.shape[-1])


def layers_fit(weights: Sequence) -> bool:
    """Whether all `LayerWeights` have the shapes and the norm settings of the first layer."""
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
    parameters = [p for layer in weights for p in layer[2:]]
    pairs = zip(parameters, shapes * len(weights), strict=True)
    return all(p is None or p.shape == shape for p, shape in pairs) and all(
        layer[:2] == weights[0][:2] for layer in weights
    )


def states_fit(
    weights: Sequence, rows: int, convs: Sequence[Tensor], ssms: Sequence[Tensor]
) -> bool:
    """Whether these are the states of all layers for this number of rows. The kernels do not check:
    with smaller tensors they would read beyond their end."""
    (d, _, w), n = weights[0].conv.shape, weights[0].A_log.shape[1]
    return (
        len(convs) == len(ssms) == len(weights)
        and all(conv.shape == (rows, w - 1, d) for conv in convs)
        and all(ssm.shape == (rows, n, d) for ssm in ssms)
    )
