"""Read and write the two public Mamba checkpoint formats; atomically, and never by pickled code.

    transformers    config.json with model_type mamba or falcon_mamba, model.safetensors
    state_spaces    config.json with d_model, n_layer, ...; pytorch_model.bin (mamba_ssm's own)

A model's name is a local folder, a Hub name such as state-spaces/mamba-130m, or a config file
(models/configs/*.json, in either layout), which gives random weights. `formats` has the details.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from common.atomic_files import MODEL_FILES, atomic_folder
from common.errors import UserError, warn
from common.provenance import sha256_of
from mamba_lm.folders import find_folder
from mamba_lm.foreign_files import read_foreign_object
from mamba_lm.formats import state_spaces, transformers
from mamba_lm.formats.weights import WeightFiles, find_weights, model_names, read_weights
from mamba_lm.models.mamba import MambaConfig, MambaLM
from mamba_lm.tokenizer import (
    DEFAULT_TOKENIZER,
    SAVED_FILES,
    find_tokenizer,
    has_tokenizer,
    load_tokenizer_at,
    tokenizer_files,
    vocabulary_bound,
)

FORMATS = ("transformers", "state_spaces")
NOTE = "NOTE.txt"  # in a model's folder: what its user should know first
GENERATION = "generation_config.json"


class ModelFiles(NamedTuple):
    """The files that loading a model reads; weights: None for a config file, which has none."""

    config: Path
    weights: WeightFiles | None = None
    generation: Path | None = None

    @property
    def is_random(self) -> bool:
        return self.weights is None

    def paths(self) -> list[Path]:
        index = self.weights and self.weights.index
        tensors = self.weights.tensors if self.weights else ()
        return [path for path in (self.config, *tensors, index, self.generation) if path]


def find_model(name: str) -> ModelFiles:
    """The files of the model of this name, downloaded from the Hub if need be. UserError says what
    is missing."""
    if name.endswith(".json"):
        return ModelFiles(Path(name))
    folder = find_folder(name)
    if (folder / "adapter_config.json").exists():
        raise UserError(
            f"{folder / 'adapter_config.json'}: an adapter, not a whole model; merge it into its "
            "base model and save that"
        )
    read_config(folder / "config.json")  # a folder of something else is refused by this, first
    generation = folder / GENERATION
    generation = generation if os.path.lexists(generation) else None
    return ModelFiles(folder / "config.json", find_weights(folder), generation)


def load_model(
    name: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> MambaLM:
    """The model of this name, in evaluation mode. UserError says what is missing or unfit."""
    files = find_model(name)
    config = read_config(files.config, files.is_random)
    if files.is_random:
        _require_memory(config, files.config)
        return MambaLM(config).to(device, dtype).eval()
    folder = files.config.parent
    weights, config = read_model_weights(folder, config)
    _require_size(config, weights, files.config)
    with torch.device("meta"):
        model = MambaLM(config)
    _require_fit(model, weights, folder)
    model.to_empty(device="cpu")
    if config.tie_embeddings:  # to_empty gave each name a parameter of its own
        model.lm_head.weight = model.backbone.embeddings.weight
    load_weights(model, weights, source=folder)
    model.generation = _read_generation(files)
    return model.to(device, dtype).eval()


def read_model_weights(folder: Path, config: MambaConfig) -> tuple[dict[str, Tensor], MambaConfig]:
    """The weights in a folder by the names of `MambaLM`, and the config, untied where they are.
    Raises UserError."""
    weights = model_names(read_weights(find_weights(folder)), folder)
    return weights, _tie(config, weights, folder / "config.json")


def _tie(config: MambaConfig, weights: dict[str, Tensor], path: Path) -> MambaConfig:
    """Weights that are tied get both of their names. Where a tied head differs from the embedding,
    both are kept, as by `transformers`, and the config that is returned says so."""
    if not config.tie_embeddings:
        return config
    names = ("backbone.embeddings.weight", "lm_head.weight")
    embedding, head = map(weights.get, names)
    if embedding is None or head is None:
        found = head if embedding is None else embedding
        weights.update(dict.fromkeys(names, found) if found is not None else {})
        return config
    if head.data_ptr() == embedding.data_ptr() or _are_equal(head, embedding):
        return config
    if not _is_transformers(_read_json(path)):
        raise UserError(
            f"{path}: tie_embeddings is true, but the weights of lm_head and of the embedding "
            "differ; set it to false to keep both"
        )
    warn(
        f"{path}: tie_word_embeddings is true, but the weights of lm_head and of the embedding "
        "differ; both are kept, untied"
    )
    return dataclasses.replace(config, tie_embeddings=False)


def _are_equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same numbers, NaN in the same places."""
    return one.shape == other.shape and bool(((one == other) | (one.isnan() & other.isnan())).all())


def _require_memory(config: MambaConfig, path: Path) -> None:
    """UserError where random weights need more memory than the machine has."""
    needed, there = 4 * config.num_parameters, memory_bytes()
    if needed > there:
        raise UserError(
            f"{path}: {config.num_parameters:,} random weights need {needed / 1e9:,.1f} GB of "
            f"memory; this machine has {there / 1e9:,.1f} GB"
        )


def memory_bytes() -> int:
    """Of the machine's main memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _require_size(config: MambaConfig, weights: dict[str, Tensor], path: Path) -> None:
    """UserError where a config tells of a model far larger than its weights, before there is one:
    what differs by less is told by the weights' names and shapes."""
    found = sum(value.numel() for value in weights.values())
    if config.n_layer > len(weights) or config.num_parameters > 2 * found + 2**20:
        raise UserError(
            f"{path}: a model of {config.n_layer:,} layers and {config.num_parameters:,} parameters"
            f"; the weights beside it are {len(weights):,} tensors of {found:,} numbers"
        )


def load_weights(model: MambaLM, weights: dict[str, Tensor], source: Path) -> None:
    """Copy weights into the model; UserError unless names and shapes are exactly the model's."""
    _require_fit(model, weights, source)
    model.load_state_dict(weights)


def _require_fit(model: MambaLM, weights: dict[str, Tensor], source: Path) -> None:
    expected = model.state_dict()
    missing, extra = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected)
    if missing or extra:
        raise UserError(
            f"{source}: weights do not fit config.json: missing {missing[:3]}, unknown {extra[:3]}"
        )
    for key, value in weights.items():
        if value.shape != expected[key].shape:
            raise UserError(
                f"{source}: {key} has shape {tuple(value.shape)}, config.json wants "
                f"{tuple(expected[key].shape)}"
            )


def read_config(path: Path, is_random: bool = False) -> MambaConfig:
    """The config in either layout, each recognised by its own keys. UserError for a field that is
    not understood or has a value that is not supported; is_random: weights are to be drawn, so that
    fields on how they start count too."""
    raw = _read_json(path)
    try:
        if _is_transformers(raw):
            return transformers.read_config(raw, path, is_random)
        if "d_model" in raw and "model_type" not in raw:
            return state_spaces.read_config(raw, path, is_random)
    except (ValueError, OverflowError) as error:  # sizes that do not fit together
        raise UserError(f"{path}: {error}") from error
    raise UserError(f"{path}: not a Mamba-1 model (model_type {raw.get('model_type')!r:.40})")


def _is_transformers(raw: dict) -> bool:
    return raw.get("model_type") in ("mamba", "falcon_mamba")


def _read_json(path: Path) -> dict:
    if not os.path.lexists(path):
        raise UserError(f"{path}: no such file; a model folder contains a config.json")
    return read_foreign_object(path)


def _read_generation(files: ModelFiles) -> dict:
    """What a checkpoint says on generation: token ids, over which generation_config.json goes. It
    decides nothing here, and is written again when the model is saved."""
    config = _read_json(files.config)
    ids = {name: config[name] for name in transformers.TOKEN_IDS if name in config}
    return ids | (_read_json(files.generation) if files.generation else {})


def save_model(
    model: MambaLM,
    folder: str | Path,
    tokenizer=None,
    format: str = "transformers",
    weights: dict[str, Tensor] | None = None,
) -> None:
    """Write a checkpoint folder, complete or not at all; the tokenizer travels along if given.
    weights: those of the model by name, where it does not hold them whole."""
    weights = model.state_dict() if weights is None else weights
    weights = {k: v.detach().cpu().contiguous() for k, v in weights.items()}
    generation = _generation_with(model.generation, tokenizer)
    replaced = (*MODEL_FILES, *(SAVED_FILES if tokenizer is not None else ()))
    with atomic_folder(folder, replaced) as partial:
        if format == "state_spaces":
            config = state_spaces.write_config(model.config)
            with writing_tensors():
                torch.save(state_spaces.write_weights(weights), partial / "pytorch_model.bin")
        else:
            config = transformers.write_config(model.config, weights["lm_head.weight"].dtype)
            config |= {
                name: generation[name] for name in transformers.TOKEN_IDS if name in generation
            }
            weights = transformers.write_weights(weights, model.config)
            with writing_tensors():
                save_file(weights, partial / "model.safetensors", metadata={"format": "pt"})
            (partial / "model.safetensors").chmod(0o644)  # safetensors makes files private
        if model.generation:
            (partial / GENERATION).write_text(json.dumps(generation, indent=2) + "\n")
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)


def _generation_with(generation: dict, tokenizer) -> dict:
    """A checkpoint's settings of generation with the token ids of its tokenizer, unless they agree
    on what ends a text: a checkpoint may list several ends, and a padding of its own."""
    if tokenizer is None:
        return generation
    ends = generation.get("eos_token_id")
    if tokenizer.eos_token_id in (ends if isinstance(ends, list) else [ends]):
        return generation
    return generation | {name: getattr(tokenizer, name) for name in transformers.TOKEN_IDS}


@contextlib.contextmanager
def writing_tensors() -> Iterator[None]:
    """What torch and safetensors make of a full disk becomes an OSError."""
    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        raise OSError(str(error).splitlines()[0]) from error


def find_tokenizer_of(model: str, tokenizer: str | None = None) -> Path:
    """Where the tokenizer named by `tokenizer` is (folder, tokenizer.json file or Hub name), else
    the one in the model's folder, local or on the Hub, else GPT-NeoX-20B's, as for state-spaces'
    models. UserError where that cannot be a model's."""
    if tokenizer is None:
        folder = Path(model) if model.endswith(".json") else find_folder(model)
        if has_tokenizer(folder):
            return folder
        config = read_config(folder / "config.json" if folder.is_dir() else folder)
        if config.bcdt_rms_eps is not None:
            raise UserError(f"{model}: a Falcon-Mamba model without a tokenizer; give --tokenizer")
        tokenizer = DEFAULT_TOKENIZER
    return find_tokenizer(tokenizer)


def load_tokenizer(model: str, tokenizer: str | None = None):
    """The tokenizer that `find_tokenizer_of` finds. Raises UserError."""
    return load_tokenizer_at(find_tokenizer_of(model, tokenizer))


def files_read(model: str, tokenizer: str | None = None) -> tuple[list[Path], list[Path]]:
    """The files that loading a model and its tokenizer reads. A tokenizer in the model's folder
    belongs to the model; the second list is that of another one. Raises UserError."""
    files = find_model(model)
    path = find_tokenizer_of(model, tokenizer)
    others = tokenizer_files(path)
    if not files.is_random and path == files.config.parent:
        return sorted({*files.paths(), *others}), []
    return sorted(files.paths()), sorted(others)


def model_hashes(model: str, tokenizer: str | None = None) -> dict[str, str | None]:
    """SHA-256 of all files that loading a model and its tokenizer reads. The tokenizer's is None
    where it belongs to the model's files. Raises UserError."""
    files, others = files_read(model, tokenizer)
    return {"model_sha256": sha256_of(files), "tokenizer_sha256": sha256_of(others)}


def load_model_and_tokenizer(
    name: str,
    tokenizer: str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
):
    """Both, as `load_model` and `load_tokenizer` find them; UserError where they do not fit."""
    model = load_model(name, device, dtype)
    loaded = load_tokenizer(name, tokenizer)
    rows, ids = model.config.vocab_rows, vocabulary_bound(loaded)
    fit = f"{name}: has {rows:,} vocabulary rows, the tokenizer {loaded.name_or_path} has "
    if ids > rows:
        raise UserError(f"{fit}token ids up to {ids - 1:,}; give --tokenizer the model's own")
    if rows - ids > max(64, rows // 20):
        warn(f"{fit}only {ids:,} token ids: is it the model's own? --tokenizer names another")
    return model, loaded
