"""Δ as a measure: how much of each token a model lets into its state (Gu & Dao 2023, section 3.5.2:
a large Δ focuses on the current input, a small one ignores it)."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from common.errors import UserError
from mamba_lm.folders import find_folder
from mamba_lm.foreign_files import read_foreign_json
from mamba_lm.models.mamba import MambaLM

LAYERS = "delta_layers.json"  # in a model's folder: a list of the layers whose Δ tells most


class DeltaNorms:
    """While open (`with`), records the L2 norm over channels of Δ at each token that is read, in
    one row, by each of `layers`: from 0 to n_layer - 1."""

    def __init__(self, model: MambaLM, layers: Sequence[int]):
        self._projections = [model.backbone.layers[layer].mixer.dt_proj for layer in layers]

    def __enter__(self) -> "DeltaNorms":
        self._norms: list[list[Tensor]] = [[] for _ in self._projections]
        self._hooks = [
            projection.register_forward_hook(
                lambda module, args, delta, norms=norms: norms.append(
                    delta.detach().float().norm(dim=-1).flatten()
                )
            )
            for projection, norms in zip(self._projections, self._norms, strict=True)
        ]
        return self

    def __exit__(self, *error) -> None:
        for hook in self._hooks:
            hook.remove()

    def by_layer(self) -> Tensor:
        """Norms (layers, tokens), in the order in which both came, on the CPU."""
        return torch.stack([torch.cat(norms) for norms in self._norms]).cpu()


def delta_layers(name: str, n_layer: int) -> list[int]:
    """The layers that a model's folder names in `LAYERS`, else all; UserError if it has others."""
    path = None if name.endswith(".json") else Path(find_folder(name)) / LAYERS
    if path is None or not os.path.lexists(path):
        return list(range(n_layer))
    layers = read_foreign_json(path)
    is_list = isinstance(layers, list) and layers and len(set(map(str, layers))) == len(layers)
    if not is_list or not all(type(n) is int and 0 <= n < n_layer for n in layers):
        raise UserError(f"{path}: give a list of layers, each from 0 to {n_layer - 1}")
    return layers
