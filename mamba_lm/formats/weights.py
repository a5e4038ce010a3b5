"""Weights of a checkpoint folder: which files they are in, what is read from them, their names."""

import json
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from errors import UserError

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Modules that torch and training frameworks wrap around a model, and so into its weights' names.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_UNREADABLE = (
    SafetensorError, RuntimeError, EOFError, OSError, pickle.UnpicklingError, zipfile.BadZipFile
)  # fmt: skip


class WeightFiles(NamedTuple):
    """The files that hold a model's weights, and the index of them, if there are several."""

    tensors: tuple[Path, ...]
    index: Path | None = None
    place_of: Mapping[str, Path] = {}


def find_weights(folder: Path) -> WeightFiles:
    """The files that loading reads: the first of these that is there, as `transformers` chooses.

    Raises UserError where there are none or an index is broken.
    """
    for ending in ("model.safetensors", "pytorch_model.bin"):
        if (folder / ending).is_file():
            return WeightFiles((folder / ending,))
        index = folder / f"{ending}.index.json"
        if index.is_file():
            place_of = _read_index(index)
            return WeightFiles(tuple(sorted(set(place_of.values()))), index, place_of)
    raise UserError(f"{folder}: no model.safetensors or pytorch_model.bin in this folder")


def _read_index(index: Path) -> dict[str, Path]:
    try:
        shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = {key: name for key, name in shards.items() if Path(name).name == name and name}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: not an index of weights ({error!r})") from error
    if len(names) < len(shards) or not names:
        raise UserError(f"{index}: weight_map must give a file of this folder for each weight")
    return {key: index.parent / name for key, name in names.items()}


def read_weights(files: WeightFiles) -> dict[str, Tensor]:
    """All tensors by their names in the files. UserError for a file that is missing or broken and
    for weights that are no real floating-point numbers."""
    tensors: dict[str, Tensor] = {}
    for path in files.tensors:
        for key, value in _read_file(path).items():
            if files.place_of.get(key, path) != path:
                continue  # left over in another shard than the index names
            _check_tensor(key, value, path)
            tensors[key] = value
    for key, path in files.place_of.items():
        if key not in tensors:
            raise UserError(f"{path}: lacks {key}, which {files.index.name} places there")
    return tensors


def _read_file(path: Path) -> dict[str, object]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(tensors, dict):
            raise EOFError(f"it contains a {type(tensors).__name__}")
        return tensors
    except FileNotFoundError as error:
        raise UserError(f"{path}: named by the index, but missing") from error
    except _UNREADABLE as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: truncated or not a weights file ({reason[:120]})") from error


def _check_tensor(key: object, value: object, path: Path) -> None:
    if not isinstance(key, str) or not isinstance(value, Tensor):
        raise UserError(f"{path}: {key!r:.60} is not a named tensor; give a state dict of weights")
    if value.dtype not in DTYPES or value.layout != torch.strided or value.is_meta:
        kind = str(value.dtype).removeprefix("torch.")
        accepted = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise UserError(f"{path}: {key} is {kind}; weights must be dense and one of {accepted}")


def model_names(weights: Mapping[str, Tensor], source: Path) -> dict[str, Tensor]:
    """Weights by the names of `MambaLM`.

    Prefixes of wrapped modules go; a base model's weights, saved without its head, get their
    `backbone.`; mamba_ssm's `embedding` becomes `embeddings`. UserError where two get one name.
    """
    unwrapped = [
        (key, ".".join(part for part in key.split(".") if part not in _WRAPPERS)) for key in weights
    ]
    is_base = not any(name.startswith("backbone.") for _, name in unwrapped)
    named: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    for key, name in unwrapped:
        if is_base and not name.startswith("lm_head."):
            name = f"backbone.{name}"
        name = re.sub(r"^backbone\.embedding\.", "backbone.embeddings.", name)
        if name in named:
            raise UserError(f"{source}: {origin[name]} and {key} are both weights of {name}")
        named[name], origin[name] = weights[key], key
    return named
