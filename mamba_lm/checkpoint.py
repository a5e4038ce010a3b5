"""Read and write the two public Mamba checkpoint formats: atomically, and without pickled code.

    transformers    config.json with model_type mamba or falcon_mamba, model.safetensors
    state_spaces    config.json with d_model, n_layer, ...; pytorch_model.bin (mamba_ssm's own)

A model's name is a local folder, a Hub name such as state-spaces/mamba-130m, or a config file
(models/configs/*.json, in either format), which gives random weights. The formats are in `formats`.
"""

import json
import os
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from common.atomic_files import MODEL_FILES, atomic_folder
from common.errors import UserError, warn
from common.provenance import sha256_of
from mamba_lm.adapters import merged_weights
from mamba_lm.folders import find_folder
from mamba_lm.foreign_files import read_foreign_object
from mamba_lm.formats import find_format, recognise_format
from mamba_lm.formats.format import TOKEN_IDS, Format
from mamba_lm.formats.weights import WeightFiles, find_weights, read_weights, write_tensors
from mamba_lm.models.interface import LanguageModel, ModelConfig
from mamba_lm.tokenizer import (
    DEFAULT_TOKENIZER,
    SAVED_FILES,
    find_tokenizer,
    has_tokenizer,
    load_tokenizer_at,
    tokenizer_files,
    vocabulary_bound,
)

NOTE = "NOTE.txt"  # in a model's folder: what a user should know first
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
    """The files of the model of this name, downloaded from the Hub if need be. Raises UserError."""
    if name.endswith(".json"):
        return ModelFiles(Path(name))
    folder = find_folder(name)
    if (folder / "adapter_config.json").exists():
        raise UserError(
            f"{folder / 'adapter_config.json'}: an adapter, not a whole model; merge it into its "
            "base model and save that: see mamba_lm/adapters.py"
        )
    read_config(folder / "config.json")  # a folder of something else is refused by this, first
    generation = folder / GENERATION
    generation = generation if os.path.lexists(generation) else None
    return ModelFiles(folder / "config.json", find_weights(folder), generation)


def load_model(
    name: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> LanguageModel:
    """The model of this name, in evaluation mode. UserError where a file is missing or unfit."""
    files = find_model(name)
    config = read_config(files.config, files.is_random)
    if files.is_random:
        _require_memory(config, files.config)
        return config.build().to(device, dtype).eval()
    folder = files.config.parent
    weights, config = read_model_weights(folder, config)
    _require_size(config, weights, files.config)
    model = _build_empty(config)
    _require_fit(model, weights, folder)
    _allocate(model)
    if config.tie_embeddings:  # each name has a parameter of its own now
        model.lm_head.weight = model.backbone.embeddings.weight
    load_weights(model, weights, source=folder)
    model.generation = _read_generation(files)
    return model.to(device, dtype).eval()


class _NoInit(TorchFunctionMode):
    """In this block, `torch.nn.init` leaves tensors as they are: to fill one on the meta device,
    torch imports its compiler, which takes a third of the time in which a console starts."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"]
        return function(*args, **(kwargs or {}))


def _build_empty(config: ModelConfig) -> LanguageModel:
    """A model of this shape on the meta device, where tensors have no values."""
    with torch.device("meta"), _NoInit():
        return config.build()


def _allocate(model: LanguageModel) -> None:
    """Give a model of the meta device parameters on the CPU; `to_empty` would import sympy."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(torch.empty(parameter.shape)))


def read_model_weights(folder: Path, config: ModelConfig) -> tuple[dict[str, Tensor], ModelConfig]:
    """The weights in a folder by the names of `LanguageModel`, and the config, untied where they
    are. Raises UserError."""
    path = folder / "config.json"
    format = recognise_format(_read_json(path), path)
    weights = format.read_weights(read_weights(find_weights(folder)), folder)
    return weights, _tie(config, weights, format, path)


def _tie(
    config: ModelConfig, weights: dict[str, Tensor], format: Format, path: Path
) -> ModelConfig:
    """Weights that are tied get both of their names. Where a tied head differs from the embedding,
    the format decides."""
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
    return format.untie(config, path)


def _are_equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same numbers, NaN in the same places."""
    return one.shape == other.shape and bool(((one == other) | (one.isnan() & other.isnan())).all())


def _require_memory(config: ModelConfig, path: Path) -> None:
    """UserError where random weights need more memory than the machine has."""
    needed, there = 4 * config.num_parameters, memory_bytes()
    if needed > there:
        raise UserError(
            f"{path}: {config.num_parameters:,} random weights need {needed / 1e9:,.1f} GB of "
            f"memory; this machine has {there / 1e9:,.1f} GB"
        )


def memory_bytes() -> int:
    """The size of the machine's main memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _require_size(config: ModelConfig, weights: dict[str, Tensor], path: Path) -> None:
    """UserError where a config describes a model far larger than its weights, before it is built:
    smaller differences are found by the weights' names and shapes."""
    found = sum(value.numel() for value in weights.values())
    if config.n_layer > len(weights) or config.num_parameters > 2 * found + 2**20:
        raise UserError(
            f"{path}: a model of {config.n_layer:,} layers and {config.num_parameters:,} parameters"
            f"; the weights beside it are {len(weights):,} tensors of {found:,} numbers"
        )


def load_weights(model: LanguageModel, weights: dict[str, Tensor], source: Path) -> None:
    """Copy weights into the model; UserError unless names and shapes are exactly the model's."""
    _require_fit(model, weights, source)
    model.load_state_dict(weights)


def _require_fit(model: LanguageModel, weights: dict[str, Tensor], source: Path) -> None:
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


def read_config(path: Path, is_random: bool = False) -> ModelConfig:
    """The config in any format, each recognised by its own keys. is_random: weights are to be
    drawn, so that fields about how they start count too. Raises UserError for a field that is not
    understood or has a value that is not supported."""
    raw = _read_json(path)
    try:
        return recognise_format(raw, path).read_config(raw, path, is_random)
    except (ValueError, OverflowError) as error:  # sizes that do not fit together
        raise UserError(f"{path}: {error}") from error


def _read_json(path: Path) -> dict:
    if not os.path.lexists(path):
        raise UserError(f"{path}: no such file; a model folder contains a config.json")
    return read_foreign_object(path)


def _read_generation(files: ModelFiles) -> dict:
    """A checkpoint's settings of generation: token ids of config.json, then those of
    generation_config.json. They decide nothing here, and are written when the model is saved."""
    config = _read_json(files.config)
    ids = {name: config[name] for name in TOKEN_IDS if name in config}
    return ids | (_read_json(files.generation) if files.generation else {})


def save_model(
    model: LanguageModel,
    folder: str | Path,
    tokenizer=None,
    format: str = "transformers",
    weights: dict[str, Tensor] | None = None,
) -> None:
    """Write a checkpoint folder, complete or not at all, with the tokenizer if one is given.

    A model with adapters is written with their weights merged, and stays as it is. weights: those
    of the model by name, where its own are sharded; they are written as they are. Raises UserError
    where they are not the weights of a plain model, such as those of adapters.
    """
    config = model.config
    if weights is None:
        weights, config = merged_weights(model)
    _require_plain_names(weights, config, folder)
    weights = {k: v.detach().cpu().contiguous() for k, v in weights.items()}
    writer = find_format(format, config)
    generation = _generation_with(model.generation, tokenizer)
    replaced = (*MODEL_FILES, *(SAVED_FILES if tokenizer is not None else ()))
    with atomic_folder(folder, replaced) as partial:
        raw = writer.write_config(config, weights["lm_head.weight"].dtype, generation)
        write_tensors(writer.write_weights(weights, config), partial / writer.weights_file)
        if model.generation:
            (partial / GENERATION).write_text(json.dumps(generation, indent=2) + "\n")
        (partial / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)


def _generation_with(generation: dict, tokenizer) -> dict:
    """A checkpoint's settings of generation with the token ids of its tokenizer, unless both have
    the same end-of-text: a checkpoint may list several, and its own padding."""
    if tokenizer is None:
        return generation
    ends = generation.get("eos_token_id")
    if tokenizer.eos_token_id in (ends if isinstance(ends, list) else [ends]):
        return generation
    return generation | {name: getattr(tokenizer, name) for name in TOKEN_IDS}


def _require_plain_names(
    weights: dict[str, Tensor], config: ModelConfig, folder: str | Path
) -> None:
    """UserError where there are weights of modules that a plain model has not: adapters, mostly."""
    expected = _build_empty(config).state_dict().keys()
    extra, missing = sorted(weights.keys() - expected), sorted(expected - weights.keys())
    if extra or missing:
        raise UserError(
            f"{folder}: weights that a checkpoint cannot have {extra[:3]}, missing {missing[:3]}; "
            "merge the model's adapters first, or save them alone: see mamba_lm/adapters.py"
        )


def find_tokenizer_of(model: str, tokenizer: str | None = None) -> Path:
    """Where the tokenizer `tokenizer` is (folder, tokenizer.json file or Hub name). By default the
    one in the model's folder, local or on the Hub, else GPT-NeoX-20B's, as for state-spaces'
    models. Raises UserError where the model cannot have that one."""
    if tokenizer is None:
        folder = Path(model) if model.endswith(".json") else find_folder(model)
        if has_tokenizer(folder):
            return folder
        path = folder / "config.json" if folder.is_dir() else folder
        read_config(path)
        raw = _read_json(path)
        if not recognise_format(raw, path).has_default_tokenizer(raw):
            raise UserError(
                f"{model}: has no tokenizer, and its family has no default one; give its tokenizer"
            )
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
        raise UserError(f"{fit}token ids up to {ids - 1:,}; give the model's own tokenizer")
    if rows - ids > max(64, rows // 20):
        warn(f"{fit}only {ids:,} token ids: is it the model's own tokenizer?")
    return model, loaded
