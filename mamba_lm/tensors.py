"""Batches of rows of different lengths, and a cast."""

from collections.abc import Sequence

import torch
from torch import Tensor


def right_pad(sequences: Sequence[Sequence[int]], value: int = 0) -> tuple[Tensor, Tensor]:
    """Token sequences as one (b, l) int64 tensor, padded at the end, and their lengths (b,)."""
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    padded = torch.full((len(sequences), max(map(len, sequences))), value)
    for row, sequence in enumerate(sequences):
        padded[row, : len(sequence)] = torch.tensor(sequence, dtype=torch.long)
    return padded, lengths


def find_tokens(lengths: Tensor, l: int) -> Tensor:
    """Where the real tokens of right-padded rows are in the flattened (b * l) batch: (tokens,)."""
    is_real = torch.arange(l, device=lengths.device) < lengths[:, None]  # (b, l)
    return is_real.flatten().nonzero().squeeze(1)


def unpack(packed: Tensor, places: Tensor, shape: tuple[int, int]) -> Tensor:
    """Rows that are back to back, (tokens, k), as (b, l, k) of this shape, zeros in the padding.

    places: those that `find_tokens` gave for the rows.
    """
    b, l = shape
    padded = packed.new_zeros(b * l, packed.shape[-1])
    return padded.index_copy(0, places, packed).view(b, l, packed.shape[-1])


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32, or in float64 if it is that already."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
