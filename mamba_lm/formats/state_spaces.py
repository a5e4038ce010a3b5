"""The format of `mamba_ssm`, in which the models of state-spaces are published.

config.json with d_model, n_layer, ...; pytorch_model.bin. Models that are not Mamba-1 with RMS
norms are refused.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from common.errors import UserError
from mamba_lm.formats import fields
from mamba_lm.formats.fields import BOOL, RANK, SIZE, Role, Table, describes, only, used
from mamba_lm.formats.format import Format
from mamba_lm.formats.weights import rename_embedding
from mamba_lm.models.mamba import MambaConfig

# mamba_ssm.models.config_mamba.MambaConfig; initializer_cfg is MambaLMHeadModel's own argument.
CONFIG = {
    "d_model": SIZE,
    "d_intermediate": only(0, remark="no MLP between the mixers"),
    "n_layer": SIZE,
    "vocab_size": SIZE,
    "ssm_cfg": used("null or an object", lambda v: v is None or isinstance(v, dict)),
    "attn_layer_idx": only([], None, remark="no attention"),
    "rms_norm": only(True, remark="no layer norm"),
    "residual_in_fp32": BOOL,
    "pad_vocab_size_multiple": SIZE,
    "tie_embeddings": BOOL,
    "initializer_cfg": used("null or an object", lambda v: v is None or isinstance(v, dict)),
    **describes("attn_cfg", remark="of attention, which there is none of"),
    **describes("fused_add_norm", remark="how fast, not what"),
}
# ssm_cfg: what mamba_ssm.modules.mamba_simple.Mamba takes, and the name of that class.
SSM = {
    "layer": only("Mamba1"),
    "d_state": SIZE,
    "d_conv": SIZE,
    "expand": used("a number above 0", fields.is_positive),
    "dt_rank": RANK,
    "bias": BOOL,
    "conv_bias": BOOL,
    "dt_min": only(0.001, role=Role.INITIAL),
    "dt_max": only(0.1, role=Role.INITIAL),
    "dt_init": only("random", role=Role.INITIAL),
    "dt_scale": only(1.0, role=Role.INITIAL),
    "dt_init_floor": only(0.0001, role=Role.INITIAL),
    **describes("use_fast_path", remark="how fast, not what"),
}
INITIALIZER = {  # mamba_ssm's _init_weights
    "initializer_range": fields.DEVIATION,
    "rescale_prenorm_residual": BOOL,
    "n_residuals_per_layer": only(1, role=Role.INITIAL),
}
TABLES: dict[str, Table] = {"": CONFIG, "ssm_cfg.": SSM, "initializer_cfg.": INITIALIZER}


class StateSpaces(Format):
    """config.json with d_model, n_layer, ...; pytorch_model.bin."""

    name = "state_spaces"
    weights_file = "pytorch_model.bin"
    config_class = MambaConfig

    def recognises(self, raw: Mapping) -> bool:
        return "d_model" in raw and "model_type" not in raw

    def read_config(self, raw: Mapping, path: Path, is_random: bool) -> MambaConfig:
        fields.check_fields(raw, CONFIG, path, is_random)
        ssm, initializer = raw.get("ssm_cfg") or {}, raw.get("initializer_cfg") or {}
        fields.check_fields(ssm, SSM, path, is_random, "ssm_cfg.")
        fields.check_fields(initializer, INITIALIZER, path, is_random, "initializer_cfg.")
        fields.require(raw, ("d_model", "n_layer", "vocab_size"), path)
        expand, rank = ssm.get("expand", 2), ssm.get("dt_rank", "auto")
        return MambaConfig(
            vocab_size=raw["vocab_size"],
            d_model=raw["d_model"],
            n_layer=raw["n_layer"],
            d_state=ssm.get("d_state", 16),
            d_conv=ssm.get("d_conv", 4),
            expand=expand,
            d_inner=int(expand * raw["d_model"]),
            dt_rank=None if rank == "auto" else rank,
            proj_bias=ssm.get("bias", False),
            conv_bias=ssm.get("conv_bias", True),
            tie_embeddings=raw.get("tie_embeddings", True),
            residual_in_fp32=raw.get("residual_in_fp32", True),
            pad_vocab_size_multiple=raw.get("pad_vocab_size_multiple", 8),
            initializer_range=initializer.get("initializer_range", 0.02),
            rescale_prenorm_residual=initializer.get("rescale_prenorm_residual", True),
        )

    def write_config(
        self, config: MambaConfig, dtype: torch.dtype, generation: Mapping[str, object]
    ) -> dict:
        if config.bcdt_rms_eps is not None:
            raise UserError("the state_spaces format cannot express Falcon-Mamba's RMS norms")
        if config.d_inner != int(config.expand * config.d_model):
            raise UserError(
                "the state_spaces format cannot express an inner width other than expand * d_model"
            )
        if config.norm_eps != 1e-5:
            raise UserError("the state_spaces format cannot express a norm epsilon other than 1e-5")
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

    def read_weights(self, weights: Mapping[str, Tensor], source: Path) -> dict[str, Tensor]:
        return rename_embedding(super().read_weights(weights, source), source)

    def write_weights(
        self, weights: Mapping[str, Tensor], config: MambaConfig
    ) -> dict[str, Tensor]:
        return {
            name.replace(".embeddings.", ".embedding."): value for name, value in weights.items()
        }

    def untie(self, config: MambaConfig, path: Path) -> MambaConfig:
        # mamba_ssm would let the head overwrite the embedding.
        raise UserError(
            f"{path}: tie_embeddings is true, but the weights of lm_head and of the embedding "
            "differ; set it to false to keep both"
        )
