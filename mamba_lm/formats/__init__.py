"""The public checkpoint formats: one module for each, with its config fields and weight names."""

from collections.abc import Mapping
from pathlib import Path

from common.errors import UserError
from mamba_lm.formats.format import Format
from mamba_lm.formats.state_spaces import StateSpaces
from mamba_lm.formats.transformers import Transformers
from mamba_lm.models.interface import ModelConfig

FORMATS: tuple[Format, ...] = (Transformers(), StateSpaces())
FORMAT_NAMES = tuple(dict.fromkeys(format.name for format in FORMATS))


def recognise_format(raw: Mapping, path: Path) -> Format:
    """The format of a config.json by its content. Raises UserError where it is of none."""
    for format in FORMATS:
        if format.recognises(raw):
            return format
    raise UserError(f"{path}: not a Mamba-1 model (model_type {raw.get('model_type')!r:.40})")


def find_format(name: str, config: ModelConfig) -> Format:
    """The format of this name for the family that has this config. Raises ValueError."""
    for format in FORMATS:
        if format.name == name and isinstance(config, format.config_class):
            return format
    raise ValueError(f"no format {name!r} for {type(config).__name__}: use one of {FORMAT_NAMES}")
