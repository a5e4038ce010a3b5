"""The format of `transformers`: MambaForCausalLM and FalconMambaForCausalLM.

config.json with model_type mamba or falcon_mamba; weights in safetensors, or pickled.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from common.errors import UserError, warn
from mamba_lm.formats import fields
from mamba_lm.formats.fields import BOOL, EPSILON, RANK, SIZE, Role, describes, only, refused, used
from mamba_lm.formats.format import TOKEN_IDS, Format
from mamba_lm.formats.weights import rename_embedding
from mamba_lm.models.mamba import MambaConfig

_REQUIRED = ("vocab_size", "hidden_size", "num_hidden_layers")
_MAMBA, _FALCON = "mamba", "falcon_mamba"

_COMPUTATION = {
    "model_type": only(_MAMBA, _FALCON),
    "vocab_size": SIZE,
    "hidden_size": SIZE,
    "num_hidden_layers": SIZE,
    "state_size": SIZE,
    "conv_kernel": SIZE,
    "expand": used("a number above 0", fields.is_positive),
    "intermediate_size": used(
        "null or an integer of 1 or more", lambda v: v is None or fields.is_size(v)
    ),
    "time_step_rank": RANK,
    "layer_norm_epsilon": EPSILON,
    "use_bias": BOOL,
    "use_conv_bias": BOOL,
    "hidden_act": only("silu", "swish", remark="two names of one function"),
    "tie_word_embeddings": BOOL,
    "residual_in_fp32": BOOL,
    "quantization_config": refused("quantised weights; convert them to float32 or bfloat16"),
    "transformers_weights": refused("weights in a file of another name"),
    "per_layer_config": refused("layers that differ from each other"),
}
_INITIAL = {
    "initializer_range": fields.DEVIATION,
    "time_step_scale": only(1.0, role=Role.INITIAL),
    "time_step_min": only(0.001, role=Role.INITIAL),
    "time_step_max": only(0.1, role=Role.INITIAL),
    "time_step_init_scheme": only("random", role=Role.INITIAL),
    "time_step_floor": only(0.0001, role=Role.INITIAL),
    "rescale_prenorm_residual": used(
        "true or false", fields.is_bool, "of random weights; true if it is not there"
    ),
}
# What the conversion of a state-spaces model has left in its config: it must agree.
_REMAINS = {
    "rms_norm": only(True),
    "ssm_cfg": only({}, None),
    "n_layer": used("num_hidden_layers", fields.is_size),
    "d_model": used("hidden_size", fields.is_size),
    "d_inner": used("intermediate_size", fields.is_size),
    **describes("fused_add_norm", "pad_vocab_size_multiple"),
}
_DESCRIPTION = {
    **describes(*TOKEN_IDS, remark="kept when the model is saved"),
    **describes(
        "use_cache", "use_mambapy", "use_falcon_mambapy", "use_associative_scan",
        remark="how fast, not what",
    ),
    **describes("dtype", "torch_dtype", remark="the setting dtype decides"),
    **describes("auto_map", "custom_pipelines", remark="no code from a model's folder is run"),
    **describes(
        "_attn_implementation", "_attn_implementation_autoset", "_commit_hash",
        "_name_or_path", "add_cross_attention", "architectures", "attn_implementation",
        "chunk_size_feed_forward", "cls_token_id", "cross_attention_hidden_size",
        "finetuning_task", "id2label", "is_decoder",
        "is_encoder_decoder", "label2id", "name_or_path", "num_labels", "output_attentions",
        "output_hidden_states", "prefix", "problem_type", "pruned_heads", "return_dict",
        "task_specific_params", "tf_legacy_loss", "tie_encoder_decoder", "tokenizer_class",
        "torchscript", "transformers.js_config", "transformers_version", "unsloth_fixed",
        "unsloth_version", "use_bfloat16",
    ),
    **describes(  # of generation, which older versions wrote into this file
        "assistant_confidence_threshold", "assistant_lookbehind", "bad_words_ids",
        "begin_suppress_tokens", "decoder_start_token_id", "diversity_penalty", "do_sample",
        "early_stopping", "encoder_no_repeat_ngram_size", "encoder_repetition_penalty",
        "epsilon_cutoff", "eta_cutoff", "exponential_decay_length_penalty",
        "forced_bos_token_id", "forced_eos_token_id", "length_penalty", "max_length",
        "min_length", "no_repeat_ngram_size", "num_assistant_tokens",
        "num_assistant_tokens_schedule", "num_beam_groups", "num_beams", "num_return_sequences",
        "output_scores", "remove_invalid_values", "repetition_penalty",
        "return_dict_in_generate", "sep_token_id", "suppress_tokens", "target_lookbehind",
        "temperature", "top_k", "top_p", "typical_p",
        remark="generation; this project's scripts have flags for it",
    ),
}  # fmt: skip
MAMBA = _COMPUTATION | _INITIAL | _REMAINS | _DESCRIPTION
FALCON_MAMBA = MAMBA | {"mixer_rms_eps": EPSILON}


class Transformers(Format):
    """config.json with model_type mamba or falcon_mamba; model.safetensors."""

    name = "transformers"
    weights_file = "model.safetensors"
    config_class = MambaConfig

    def recognises(self, raw: Mapping) -> bool:
        return raw.get("model_type") in (_MAMBA, _FALCON)

    def read_config(self, raw: Mapping, path: Path, is_random: bool) -> MambaConfig:
        falcon = raw["model_type"] == _FALCON
        fields.check_fields(raw, FALCON_MAMBA if falcon else MAMBA, path, is_random)
        fields.require(raw, _REQUIRED, path)
        hidden, expand = raw["hidden_size"], raw.get("expand", 2)
        d_inner, rank = raw.get("intermediate_size"), raw.get("time_step_rank", "auto")
        config = MambaConfig(
            vocab_size=raw["vocab_size"],
            d_model=hidden,
            n_layer=raw["num_hidden_layers"],
            d_state=raw.get("state_size", 16),
            d_conv=raw.get("conv_kernel", 4),
            expand=expand,
            d_inner=int(expand * hidden) if d_inner is None else d_inner,
            dt_rank=None if rank == "auto" else rank,
            norm_eps=raw.get("layer_norm_epsilon", 1e-5),
            bcdt_rms_eps=raw.get("mixer_rms_eps", 1e-6) if falcon else None,
            proj_bias=raw.get("use_bias", False),
            conv_bias=raw.get("use_conv_bias", True),
            tie_embeddings=raw.get("tie_word_embeddings", True),
            residual_in_fp32=raw.get("residual_in_fp32", True),
            pad_vocab_size_multiple=1,
            initializer_range=raw.get("initializer_range", 0.1),
            rescale_prenorm_residual=raw.get("rescale_prenorm_residual", True),
        )
        remains = {"n_layer": config.n_layer, "d_model": config.d_model, "d_inner": config.d_inner}
        for name, value in remains.items():
            if raw.get(name, value) != value:
                other = _REMAINS[name].accepted
                raise UserError(f"{path}: {name} is {raw[name]}, but {other} gives {value}")
        return config

    def write_config(
        self, config: MambaConfig, dtype: torch.dtype, generation: Mapping[str, object]
    ) -> dict:
        falcon = config.bcdt_rms_eps is not None
        raw = {
            "architectures": ["FalconMambaForCausalLM" if falcon else "MambaForCausalLM"],
            "model_type": _FALCON if falcon else _MAMBA,
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
            "hidden_act": "silu",
            "tie_word_embeddings": config.tie_embeddings,
            "residual_in_fp32": config.residual_in_fp32,
            "initializer_range": config.initializer_range,
        }
        if falcon:
            raw["mixer_rms_eps"] = config.bcdt_rms_eps
        return raw | {name: generation[name] for name in TOKEN_IDS if name in generation}

    def read_weights(self, weights: Mapping[str, Tensor], source: Path) -> dict[str, Tensor]:
        # Conversions of state-spaces models have kept its name of the embedding.
        return rename_embedding(super().read_weights(weights, source), source)

    def write_weights(
        self, weights: Mapping[str, Tensor], config: MambaConfig
    ) -> dict[str, Tensor]:
        is_skipped = {"lm_head.weight"} if config.tie_embeddings else set()
        return {name: value for name, value in weights.items() if name not in is_skipped}

    def untie(self, config: MambaConfig, path: Path) -> MambaConfig:
        warn(
            f"{path}: tie_word_embeddings is true, but the weights of lm_head and of the embedding "
            "differ; both are kept, untied"
        )
        return dataclasses.replace(config, tie_embeddings=False)

    def has_default_tokenizer(self, raw: Mapping) -> bool:
        return raw["model_type"] != _FALCON
