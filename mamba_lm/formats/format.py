"""What a public checkpoint format offers: its config fields and weight names, both directions."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from mamba_lm.formats.weights import unwrap_names
from mamba_lm.models.interface import ModelConfig

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")  # in a config or a generation config


class Format(ABC):
    """One public checkpoint format, for one family of models."""

    name: ClassVar[str]  # as `save_model` takes it; formats of several families may share it
    weights_file: ClassVar[str]  # that is written: *.safetensors or *.bin
    config_class: ClassVar[type]  # the family's

    @abstractmethod
    def recognises(self, raw: Mapping) -> bool:
        """Whether a config.json is of this format, by its content."""

    @abstractmethod
    def read_config(self, raw: Mapping, path: Path, is_random: bool) -> ModelConfig:
        """The config in a config.json, which is at `path`. is_random: weights are to be drawn, so
        that fields about how they start count too. Raises UserError where a field is missing, not
        understood or not supported, ValueError where sizes do not fit together."""

    @abstractmethod
    def write_config(
        self, config: ModelConfig, dtype: torch.dtype, generation: Mapping[str, object]
    ) -> dict:
        """config.json of a model whose weights are of this dtype. generation: a checkpoint's
        settings of it. Raises UserError for a model that the format cannot express."""

    def read_weights(self, weights: Mapping[str, Tensor], source: Path) -> dict[str, Tensor]:
        """Weights by the names of `LanguageModel`, from those in files. Raises UserError where two
        get one name."""
        return unwrap_names(weights, source)

    @abstractmethod
    def write_weights(
        self, weights: Mapping[str, Tensor], config: ModelConfig
    ) -> dict[str, Tensor]:
        """Weights by the names of this format, from those of `LanguageModel`."""

    @abstractmethod
    def untie(self, config: ModelConfig, path: Path) -> ModelConfig:
        """The config where it ties lm_head and the embedding, but their weights differ. Raises
        UserError, or warns."""

    def has_default_tokenizer(self, raw: Mapping) -> bool:
        """Whether a model without a tokenizer in its folder reads GPT-NeoX-20B's tokens."""
        return True
