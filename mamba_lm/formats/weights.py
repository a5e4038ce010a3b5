"""Weights of a checkpoint folder: which files they are in, what is read from them, their names."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import Parameter

from common.errors import UserError
from mamba_lm.foreign_files import parsing, read_foreign_object, require_file
from mamba_lm.formats.pickles import require_plain

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Modules that torch and training frameworks wrap around a model, and so into its weights' names.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


class WeightFiles(NamedTuple):
    """The files that hold a model's weights, and the index of them, if there are several."""

    tensors: tuple[Path, ...]
    index: Path | None = None
    place_of: Mapping[str, Path] = {}


def find_weights(folder: Path) -> WeightFiles:
    """The files that loading reads: the first of these that is there, as `transformers` chooses.

    Raises UserError where there are none, an index is broken or what has the name is no file.
    """
    for ending in ("model.safetensors", "pytorch_model.bin"):
        if os.path.lexists(folder / ending):
            require_file(folder / ending)
            return WeightFiles((folder / ending,))
        index = folder / f"{ending}.index.json"
        if os.path.lexists(index):
            place_of = _read_index(index, Path(ending).suffix)
            return WeightFiles(tuple(sorted(set(place_of.values()))), index, place_of)
    raise UserError(f"{folder}: no model.safetensors or pytorch_model.bin in this folder")


def _read_index(index: Path, suffix: str) -> dict[str, Path]:
    """The file of each weight: a link may lead out of the folder, as those of the Hub's cache do,
    a name may not."""
    shards = read_foreign_object(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise UserError(f"{index}: not an index of weights; it needs a weight_map")
    for key, name in shards.items():
        if not isinstance(name, str) or Path(name).name != name or Path(name).suffix != suffix:
            raise UserError(
                f"{index}: weight_map gives {name!r:.60} for {key:.60}; each weight must be in a "
                f"*{suffix} file of this folder"
            )
    return {key: index.parent / name for key, name in shards.items()}


def read_weights(files: WeightFiles) -> dict[str, Tensor]:
    """All tensors by their names in the files. UserError for a file that is missing or broken and
    for weights that are no real floating-point numbers, or more of them than a file holds."""
    tensors: dict[str, Tensor] = {}
    for path in files.tensors:
        read = _read_file(path)
        _check_tensors(read, path)
        tensors |= {
            key: value
            for key, value in read.items()
            if files.place_of.get(key, path) == path  # others: left over from another index
        }
    for key, path in files.place_of.items():
        if key not in tensors:
            raise UserError(f"{path}: lacks {key}, which {files.index.name} places there")
    return tensors


def _read_file(path: Path) -> Mapping:
    """What a file holds, mapped into memory, so that no tensor can be larger than it says."""
    require_file(path)
    with parsing(lambda reason: f"{path}: truncated or not a weights file ({reason})"):
        if path.suffix == ".safetensors":
            return load_file(path)
    require_plain(path, "weights")
    with parsing(lambda reason: f"{path}: truncated or not a weights file ({reason})"):
        read = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(read, dict):
        raise UserError(f"{path}: not a weights file (it contains a {type(read).__name__})")
    return read


def _check_tensors(tensors: Mapping, path: Path) -> None:
    accepted = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
    size = room = path.stat().st_size
    for key, value in tensors.items():
        if not isinstance(key, str) or type(value) not in (Tensor, Parameter):
            name = repr(key) if isinstance(key, str) else f"a {type(key).__name__}"
            raise UserError(
                f"{path}: {name:.60} is not a named tensor; give a state dict of weights"
            )
        if value.dtype not in DTYPES or value.layout != torch.strided or value.is_meta:
            kind = str(value.dtype).removeprefix("torch.")
            raise UserError(f"{path}: {key} is {kind}; weights must be dense and one of {accepted}")
        needed = value.numel() * value.element_size()
        is_head = key.endswith("lm_head.weight")  # which may be the embedding once more
        if needed > (size if is_head else room):
            raise UserError(
                f"{path}: {key} of shape {tuple(value.shape)} repeats numbers: the tensors have "
                f"more bytes than the file, {size:,}"
            )
        room -= 0 if is_head else needed


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
