"""Weights of a checkpoint folder: which files they are in, reading, writing, their names."""

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import Parameter

from common.errors import UserError
from mamba_lm.foreign_files import parsing, read_foreign_object, require_file, require_plain

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Modules that torch and training frameworks wrap around a model, and so into its weights' names.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


class WeightFiles(NamedTuple):
    """The files that contain a model's weights, and their index, if there are several."""

    tensors: tuple[Path, ...]
    index: Path | None = None
    place_of: Mapping[str, Path] = {}


def find_weights(folder: Path) -> WeightFiles:
    """The files that loading reads: the first of these that is there, as `transformers` chooses.

    Raises UserError where there are none, an index is broken or a name is not that of a file.
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
    for weights that are not real floating-point numbers, or more of them than fit into a file."""
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
    """The content of a file, mapped into memory, so that no tensor can be larger than the file."""
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


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write named tensors, contiguous and on the CPU, to a *.safetensors or a *.bin file. Raises
    OSError."""
    with writing_tensors():
        if path.suffix != ".safetensors":
            torch.save(dict(tensors), path)
            return
        save_file(dict(tensors), path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors makes files private


@contextlib.contextmanager
def writing_tensors() -> Iterator[None]:
    """Errors that torch and safetensors raise when a disk is full become an OSError."""
    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        raise OSError(str(error).splitlines()[0]) from error


def unwrap_names(weights: Mapping[str, Tensor], source: Path) -> dict[str, Tensor]:
    """Weights without the prefixes of wrapped modules in their names. A base model's weights, saved
    without its head, get their `backbone.`. UserError where two get one name."""
    names = {
        key: ".".join(part for part in key.split(".") if part not in _WRAPPERS) for key in weights
    }
    is_base = not any(name.startswith("backbone.") for name in names.values())
    if is_base:
        names = {
            key: name if name.startswith("lm_head.") else f"backbone.{name}"
            for key, name in names.items()
        }
    return rename(weights, names, source)


def rename_embedding(weights: Mapping[str, Tensor], source: Path) -> dict[str, Tensor]:
    """Weights with mamba_ssm's `embedding` as `embeddings`. UserError where two get one name."""
    names = {key: re.sub(r"^backbone\.embedding\.", "backbone.embeddings.", key) for key in weights}
    return rename(weights, names, source)


def rename(
    weights: Mapping[str, Tensor], names: Mapping[str, str], source: Path
) -> dict[str, Tensor]:
    """Weights by other names: names[key] for each key. UserError where two get one name."""
    renamed: dict[str, Tensor] = {}
    origins: dict[str, str] = {}
    for key, name in names.items():
        if name in renamed:
            raise UserError(f"{source}: {origins[name]} and {key} are both weights of {name}")
        renamed[name], origins[name] = weights[key], key
    return renamed
