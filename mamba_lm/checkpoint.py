"""Read and write the two public Mamba checkpoint formats; atomically, and never by pickled code.

    transformers    config.json with model_type mamba or falcon_mamba, model.safetensors
    state_spaces    config.json with d_model, n_layer, ...; pytorch_model.bin (mamba_ssm's own)

A model's name is a local folder, a Hub name such as state-spaces/mamba-130m, or a config file
(models/configs/*.json, in the state_spaces layout), which gives random weights.
"""

import contextlib
import json
import os
import pickle
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from errors import UserError
from files import atomic_folder
from mamba_lm.model import MambaConfig, MambaLM

FORMATS = ("transformers", "state_spaces")
NOTE = "NOTE.txt"  # in a model's folder: what its user should know first
DEFAULT_TOKENIZER = "EleutherAI/gpt-neox-20b"
_HUB_FILES = ["*.json", "*.safetensors", "pytorch_model*.bin", "tokenizer*", "merges.txt"]
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
_HUB_TOKENIZER_FILES = ["*.json", "*.model", "tokenizer*", "vocab*", "merges.txt"]
_UNREADABLE = (
    SafetensorError, RuntimeError, EOFError, OSError, pickle.UnpicklingError, zipfile.BadZipFile
)  # fmt: skip


def load_model(
    name: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> MambaLM:
    """The model of this name, in evaluation mode. UserError says what is missing or unfit."""
    if name.endswith(".json"):
        config = read_config(Path(name))
        return MambaLM(config).to(device, dtype).eval()
    folder = find_folder(name)
    config = read_config(folder / "config.json")
    with torch.device("meta"):
        model = MambaLM(config)
    model.to_empty(device="cpu")
    if config.tie_embeddings:  # to_empty gave each name a parameter of its own
        model.lm_head.weight = model.backbone.embeddings.weight
    weights = {_our_name(key): value for key, value in read_weights(folder).items()}
    load_weights(model, weights, source=folder)
    return model.to(device, dtype).eval()


def load_weights(model: MambaLM, weights: dict[str, Tensor], source: Path) -> None:
    """Copy weights into the model; UserError unless names and shapes are exactly the model's."""
    expected = model.state_dict()
    if model.config.tie_embeddings:
        weights.setdefault("lm_head.weight", weights.get("backbone.embeddings.weight"))
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
    model.load_state_dict(weights)


def find_folder(name: str) -> Path:
    """The local folder of a model, downloaded from the Hub if need be."""
    if Path(name).is_dir():
        return Path(name)
    if Path(name).exists() or name.count("/") != 1 or name.startswith((".", "/")):
        raise UserError(f"{name}: no such model folder; give a folder, a Hub name or a config file")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES))
    except Exception as error:  # the Hub client raises many kinds, all of them about reaching it
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{name}: no such folder here, and the Hub cannot give it ({reason[:120]}); "
            "check the name and the network, or give a local folder"
        ) from error


def read_config(path: Path) -> MambaConfig:
    """The config in either layout, each told by its own keys."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; a model folder holds a config.json") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from error
    try:
        if raw.get("model_type") in ("mamba", "falcon_mamba"):
            return _from_transformers(raw)
        if "d_model" in raw:
            return _from_state_spaces(raw, path)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: not a whole Mamba config ({error!r})") from error
    raise UserError(f"{path}: not a Mamba-1 model (model_type {raw.get('model_type')!r})")


def _from_transformers(raw: dict) -> MambaConfig:
    falcon = raw["model_type"] == "falcon_mamba"
    hidden, expand = raw["hidden_size"], raw.get("expand", 2)
    rank = raw.get("time_step_rank", "auto")
    return MambaConfig(
        vocab_size=raw["vocab_size"],
        d_model=hidden,
        n_layer=raw["num_hidden_layers"],
        d_state=raw.get("state_size", 16),
        d_conv=raw.get("conv_kernel", 4),
        expand=expand,
        d_inner=raw.get("intermediate_size") or int(expand * hidden),
        dt_rank=None if rank == "auto" else rank,
        norm_eps=raw.get("layer_norm_epsilon", 1e-5),
        bcdt_rms_eps=raw.get("mixer_rms_eps", 1e-6) if falcon else None,
        proj_bias=raw.get("use_bias", False),
        conv_bias=raw.get("use_conv_bias", True),
        tie_embeddings=raw.get("tie_word_embeddings", True),
        residual_in_fp32=raw.get("residual_in_fp32", True),
        pad_vocab_size_multiple=1,
        initializer_range=raw.get("initializer_range", 0.02),
    )


def _from_state_spaces(raw: dict, path: Path) -> MambaConfig:
    ssm = raw.get("ssm_cfg") or {}
    if ssm.get("layer", "Mamba1") != "Mamba1" or raw.get("attn_layer_idx"):
        raise UserError(f"{path}: a {ssm.get('layer', 'hybrid')} model; this project runs Mamba-1")
    rank = ssm.get("dt_rank", "auto")
    return MambaConfig(
        vocab_size=raw["vocab_size"],
        d_model=raw["d_model"],
        n_layer=raw["n_layer"],
        d_state=ssm.get("d_state", 16),
        d_conv=ssm.get("d_conv", 4),
        expand=ssm.get("expand", 2),
        dt_rank=None if rank == "auto" else rank,
        proj_bias=ssm.get("bias", False),
        conv_bias=ssm.get("conv_bias", True),
        tie_embeddings=raw.get("tie_embeddings", True),
        residual_in_fp32=raw.get("residual_in_fp32", True),
        pad_vocab_size_multiple=raw.get("pad_vocab_size_multiple", 8),
        initializer_range=(raw.get("initializer_cfg") or {}).get("initializer_range", 0.02),
    )


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint folder, by their names in its files."""
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if (folder / index).exists():
            try:
                shards = json.loads((folder / index).read_text())["weight_map"].values()
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(f"{folder / index}: not an index of weights ({error!r})") from error
            tensors: dict[str, Tensor] = {}
            for shard in sorted(set(shards)):
                tensors |= _read_tensors(folder / shard)
            return tensors
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).exists():
            return _read_tensors(folder / name)
    raise UserError(f"{folder}: no model.safetensors or pytorch_model.bin in this folder")


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(tensors, dict):
            raise EOFError(f"it holds a {type(tensors).__name__}")
        return tensors
    except FileNotFoundError as error:
        raise UserError(f"{path}: named by the index, but missing") from error
    except _UNREADABLE as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: truncated or not a weights file ({reason[:120]})") from error


def _our_name(key: str) -> str:
    return key.replace("backbone.embedding.", "backbone.embeddings.")


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
    with atomic_folder(folder) as partial:
        if format == "state_spaces":
            if model.config.bcdt_rms_eps is not None:
                raise UserError("the state_spaces format cannot hold Falcon-Mamba's RMS norms")
            if model.config.d_inner != model.config.expand * model.config.d_model:
                raise UserError("the state_spaces format cannot hold an inner width of its own")
            if model.config.norm_eps != 1e-5:
                raise UserError("the state_spaces format cannot hold a norm epsilon but 1e-5")
            config = _to_state_spaces(model.config)
            renamed = {k.replace(".embeddings.", ".embedding."): v for k, v in weights.items()}
            with writing_tensors():
                torch.save(renamed, partial / "pytorch_model.bin")
        else:
            config = _to_transformers(model.config, weights["lm_head.weight"].dtype, tokenizer)
            if model.config.tie_embeddings:
                del weights["lm_head.weight"]
            with writing_tensors():
                save_file(weights, partial / "model.safetensors", metadata={"format": "pt"})
            (partial / "model.safetensors").chmod(0o644)  # safetensors makes files private
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)


def new_folder(name: str) -> Path:
    """The output folder, made now: a run must not end in a path that cannot be written."""
    folder = Path(name)
    if os.path.exists(folder / "config.json"):
        raise UserError(f"{name}: holds a model already; give another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"{name}: cannot be written ({error.strerror})") from error
    return folder


@contextlib.contextmanager
def writing_tensors() -> Iterator[None]:
    """What torch and safetensors make of a full disk becomes an OSError."""
    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        raise OSError(str(error).splitlines()[0]) from error


def _to_transformers(config: MambaConfig, dtype: torch.dtype, tokenizer) -> dict:
    falcon = config.bcdt_rms_eps is not None
    raw = {
        "architectures": ["FalconMambaForCausalLM" if falcon else "MambaForCausalLM"],
        "model_type": "falcon_mamba" if falcon else "mamba",
        "dtype": str(dtype).removeprefix("torch."),
        "vocab_size": config.vocab_rows,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layer,
        "state_size": config.d_state,
        "conv_kernel": config.d_conv,
        "expand": config.expand,
        "intermediate_size": config.d_inner,
        "time_step_rank": config.dt_rank,
        "layer_norm_epsilon": config.norm_eps,
        "use_bias": config.proj_bias,
        "use_conv_bias": config.conv_bias,
        "tie_word_embeddings": config.tie_embeddings,
        "residual_in_fp32": config.residual_in_fp32,
        "initializer_range": config.initializer_range,
    }
    for name in ("bos_token_id", "eos_token_id", "pad_token_id") if tokenizer else ():
        raw[name] = getattr(tokenizer, name)
    return raw | ({"mixer_rms_eps": config.bcdt_rms_eps} if falcon else {})


def _to_state_spaces(config: MambaConfig) -> dict:
    return {
        "d_model": config.d_model,
        "d_intermediate": 0,
        "n_layer": config.n_layer,
        "vocab_size": config.vocab_size,
        "ssm_cfg": {
            "layer": "Mamba1",
            "d_state": config.d_state,
            "d_conv": config.d_conv,
            "expand": config.expand,
            "dt_rank": config.dt_rank,
            "bias": config.proj_bias,
            "conv_bias": config.conv_bias,
        },
        "attn_layer_idx": [],
        "attn_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": config.residual_in_fp32,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": config.pad_vocab_size_multiple,
        "tie_embeddings": config.tie_embeddings,
    }


def load_tokenizer(model: str, tokenizer: str | None = None):
    """The tokenizer named by `tokenizer` (folder, tokenizer.json file or Hub name), else the one in
    the model's folder, local or on the Hub, else GPT-NeoX-20B's, as for state-spaces' models."""
    from huggingface_hub import snapshot_download
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if tokenizer is None:
        folder = Path(model) if model.endswith(".json") else find_folder(model)
        has_own = any((folder / name).exists() for name in _TOKENIZER_FILES)
        tokenizer = str(folder) if has_own else DEFAULT_TOKENIZER
    path = Path(tokenizer)
    try:
        if not path.exists():  # not by AutoTokenizer, which asks for a wrong name for a minute
            path = Path(snapshot_download(tokenizer, allow_patterns=_HUB_TOKENIZER_FILES))
        if path.is_file():
            loaded = PreTrainedTokenizerFast(tokenizer_file=str(path), eos_token="<|endoftext|>")
        else:
            loaded = AutoTokenizer.from_pretrained(path)
    except Exception as error:  # OSError, ValueError, KeyError, ... for one cause
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{tokenizer}: no tokenizer can be loaded from it ({reason[:120]}); "
            "give --tokenizer a folder, a tokenizer.json file or a Hub name"
        ) from error
    if loaded.eos_token_id is None:
        raise UserError(f"{tokenizer}: the tokenizer has no end-of-text token")
    return loaded


def load_model_and_tokenizer(
    name: str,
    tokenizer: str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
):
    """Both, as `load_model` and `load_tokenizer` find them; UserError where they do not fit."""
    model = load_model(name, device, dtype)
    loaded = load_tokenizer(name, tokenizer)
    if len(loaded) > model.config.vocab_rows:
        raise UserError(
            f"{name}: has {model.config.vocab_rows} vocabulary rows, the tokenizer "
            f"{loaded.name_or_path} {len(loaded)} tokens; give --tokenizer the model's own"
        )
    return model, loaded
