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
from mamba_lm.models.interface import LanguageModel

LAYERS = "delta_layers.json"  # in a model's folder: the layers whose Δ shows best what matters


class DeltaNorms:
    """While open (`with`), records the L2 norm over channels of Δ at each token that is read, in
    one row, by each of `layers`: from 0 to n_layer - 1."""

    def __init__(self, model: LanguageModel, layers: Sequence[int]):
        self._modules = [model.delta_modules[layer] for layer in layers]

    def __enter__(self) -> "DeltaNorms":
        self._norms: list[list[Tensor]] = [[] for _ in self._modules]
        self._hooks = [
            module.register_forward_hook(
                lambda module, args, delta, norms=norms: norms.append(
                    delta.detach().float().norm(dim=-1).flatten()
                )
            )
            for module, norms in zip(self._modules, self._norms, strict=True)
        ]
        return self

    def __exit__(self, *error) -> None:
        for hook in self._hooks:
            hook.remove()

    def by_layer(self) -> Tensor:
        """Norms (layers, tokens), in the order of `layers` and of reading, on the CPU."""
        return torch.stack([torch.cat(norms) for norms in self._norms]).cpu()


def delta_layers(name: str, n_layer: int) -> list[int]:
    """The layers that the file `LAYERS` in a model's folder lists, all where there is no such file.
    UserError where it is not a list of layers that the model has."""
    path = None if name.endswith(".json") else Path(find_folder(name)) / LAYERS
    if path is None or not os.path.lexists(path):
        return list(range(n_layer))
    layers = read_foreign_json(path)
    is_list = isinstance(layers, list) and layers and len(set(map(str, layers))) == len(layers)
    if not is_list or not all(type(n) is int and 0 <= n < n_layer for n in layers):
        raise UserError(f"{path}: give a list of layers, each from 0 to {n_layer - 1}")
    return layers
