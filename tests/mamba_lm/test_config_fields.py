"""Config fields: all are known, and none that changes the computation is ignored."""

import dataclasses
import json
import random
from pathlib import Path

import pytest
import torch
from transformers import (
    FalconMambaConfig,
    FalconMambaForCausalLM,
    GenerationConfig,
    MambaForCausalLM,
    PretrainedConfig,
)
from transformers import MambaConfig as TransformersMambaConfig

from common.errors import UserError
from mamba_lm.checkpoint import load_model, load_tokenizer, save_model
from mamba_lm.formats import state_spaces, transformers
from mamba_lm.formats.__main__ import page
from mamba_lm.formats.fields import Role

ROOT = Path(__file__).parents[2]
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
# mamba_ssm 2.3: models/config_mamba.py, modules/mamba_simple.py (Mamba.__init__ but for the
# arguments that MambaLMHeadModel passes itself), models/mixer_seq_simple.py (_init_weights)
MAMBA_SSM = {
    "": "d_model d_intermediate n_layer vocab_size ssm_cfg attn_layer_idx attn_cfg rms_norm "
    "residual_in_fp32 fused_add_norm pad_vocab_size_multiple tie_embeddings",
    "ssm_cfg.": "layer d_state d_conv expand dt_rank dt_min dt_max dt_init dt_scale dt_init_floor "
    "conv_bias bias use_fast_path",
    "initializer_cfg.": "initializer_range rescale_prenorm_residual n_residuals_per_layer",
}
HF = {"model_type": "mamba", "vocab_size": 31, "hidden_size": 24, "num_hidden_layers": 1}
SSM = {"d_model": 24, "n_layer": 1, "vocab_size": 31}


@pytest.mark.parametrize(
    "config_class, table",
    [(TransformersMambaConfig, "MAMBA"), (FalconMambaConfig, "FALCON_MAMBA")],
)
def test_every_field_of_transformers_is_known(config_class, table):
    """Those that the class declares, those that it writes, and those of generation in old files."""
    names = {field.name for field in dataclasses.fields(config_class)}
    names |= {field.name for field in dataclasses.fields(PretrainedConfig)}
    names |= config_class().to_dict().keys()
    names |= GenerationConfig._get_default_generation_params().keys()
    assert len(names) > 60
    assert names - vars(transformers)[table].keys() == set()


@pytest.mark.parametrize("place", MAMBA_SSM)
def test_every_field_of_mamba_ssm_is_known(place):
    assert set(MAMBA_SSM[place].split()) - state_spaces.TABLES[place].keys() == set()


def test_the_page_is_that_of_the_tables():
    text = (ROOT / "docs/config_fields.md").read_text("utf-8")
    assert text == page()
    for table in (transformers.FALCON_MAMBA, *state_spaces.TABLES.values()):
        assert all(f"| `{name}` | {field.role} |" in text for name, field in table.items())


def refusal(path: Path, config: dict) -> str:
    path.write_text(json.dumps(config))
    with pytest.raises(UserError) as caught:
        load_model(str(path))
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    return message


CHANGES = [  # that would change the computation, or how random weights start
    *({"hidden_act": name} for name in ("gelu", "relu", "tanh", "SiLU", None, 3)),
    *({name: 0} for name in ("vocab_size", "hidden_size", "num_hidden_layers", "state_size")),
    *({"conv_kernel": value} for value in (0, -1, 4.0, True, "4", None)),
    *({"expand": value} for value in (0, -2, "2", float("inf"))),
    *({"time_step_rank": value} for value in (0, None, "full", 1.5)),
    *({"intermediate_size": value} for value in (0, 12.5, "48")),
    *({name: "true"} for name in ("use_bias", "use_conv_bias", "tie_word_embeddings")),
    *({"residual_in_fp32": value} for value in (1, None)),
    *({"layer_norm_epsilon": value} for value in (-1e-5, "1e-5", float("nan"))),
    {"quantization_config": {"quant_method": "bitsandbytes"}},
    {"per_layer_config": {"0": {}}},
    {"transformers_weights": "other.safetensors"},
    {"rms_norm": False},
    {"ssm_cfg": {"d_state": 32}},
    *({name: 25} for name in ("n_layer", "d_model", "d_inner")),
    {"time_step_min": 0.01},
    {"time_step_init_scheme": "constant"},
    {"rescale_prenorm_residual": 1},
    {"initializer_range": -1},
    {"mixer_rms_eps": 1e-6},  # of Falcon-Mamba alone
    {"layer_types": ["linear_attention"]},
    {"num_heads": 4},
    {"surprise": 1},
]


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_transformers_fields_that_are_refused(change, tmp_path):
    [name] = change
    assert name in refusal(tmp_path / "config.json", HF | change)


@pytest.mark.parametrize(
    "change",
    [
        {"rms_norm": False},
        {"d_intermediate": 64},
        {"attn_layer_idx": [1]},
        {"pad_vocab_size_multiple": 0},
        {"hidden_act": "gelu"},
        {"n_layer": True},
        {"fused": True},
        *({"ssm_cfg": {name: 0}} for name in ("d_state", "d_conv", "expand", "dt_rank")),
        {"ssm_cfg": {"layer": "Mamba2"}},
        {"ssm_cfg": {"headdim": 64}},
        {"ssm_cfg": {"dt_min": 0.01}},
        {"ssm_cfg": [1]},
        {"initializer_cfg": {"rescale_prenorm_residual": 1}},
        {"initializer_cfg": {"std": 1}},
    ],
    ids=str,
)
def test_state_spaces_fields_that_are_refused(change, tmp_path):
    [(name, value)] = change.items()
    inner = next(iter(value)) if isinstance(value, dict) else ""
    assert f"{name}.{inner}".rstrip(".") in refusal(tmp_path / "config.json", SSM | change)


@pytest.mark.parametrize("name", ["vocab_size", "hidden_size", "num_hidden_layers"])
def test_a_size_that_is_missing_is_named(name, tmp_path):
    config = {key: value for key, value in HF.items() if key != name}
    assert f"the field {name} is missing" in refusal(tmp_path / "config.json", config)


def test_fields_of_initial_weights_do_not_matter_to_weights_in_files(make_model, tmp_path):
    save_model(make_model(), tmp_path / "model")
    before, path = load_model(str(tmp_path / "model")).config, tmp_path / "model/config.json"
    initial = {n: "any" for n, f in transformers.MAMBA.items() if f.role is Role.INITIAL}
    path.write_text(json.dumps(json.loads(path.read_text()) | initial))
    assert load_model(str(tmp_path / "model")).config == before


def test_the_config_of_a_converted_public_model_is_read(tmp_path):
    """The fields of the state-spaces models that were converted for transformers."""
    path = tmp_path / "config.json"
    converted = HF | {
        "architectures": ["MambaForCausalLM"], "bos_token_id": 0, "conv_kernel": 4, "d_inner": 48,
        "d_model": 24, "eos_token_id": 0, "expand": 2, "fused_add_norm": True,
        "hidden_act": "silu", "initializer_range": 0.1, "intermediate_size": 48,
        "layer_norm_epsilon": 1e-05, "n_layer": 1, "pad_token_id": 0,
        "rescale_prenorm_residual": False,
        "pad_vocab_size_multiple": 8, "residual_in_fp32": True, "rms_norm": True, "ssm_cfg": {},
        "state_size": 16, "time_step_floor": 0.0001, "time_step_init_scheme": "random",
        "time_step_max": 0.1, "time_step_min": 0.001, "time_step_rank": 2,
        "time_step_scale": 1.0, "torch_dtype": "float32", "transformers_version": "4.39.0.dev0",
        "use_bias": False, "use_cache": True, "use_conv_bias": True,
    }  # fmt: skip
    path.write_text(json.dumps(converted))
    assert load_model(str(path)).config.d_inner == 48


# Random models over the config space


def draw_config(rng: random.Random) -> dict:
    """Settings of a transformers config, ours or not."""
    settings = {
        "vocab_size": rng.choice((11, 17, 40)),
        "hidden_size": rng.choice((8, 12, 24, 33)),
        "state_size": rng.choice((1, 3, 5, 8, 16)),
        "num_hidden_layers": rng.choice((1, 2, 3)),
        "layer_norm_epsilon": rng.choice((1e-5, 1e-2, 0.1)),
        "expand": rng.choice((1, 2, 3)),
        "conv_kernel": rng.choice((1, 2, 4, 5)),
        "use_bias": rng.random() < 0.5,
        "use_conv_bias": rng.random() < 0.5,
        "hidden_act": rng.choice(("silu", "silu", "swish", "gelu", "relu", "tanh", "sigmoid")),
        "residual_in_fp32": rng.random() < 0.5,
        "time_step_rank": rng.choice(("auto", 1, 3, 7)),
        "tie_word_embeddings": rng.random() < 0.5,
        "initializer_range": rng.choice((0.1, 0.5, 1.0)),
        "time_step_scale": rng.choice((1.0, 4.0)),
        "time_step_init_scheme": rng.choice(("random", "constant")),
        "rescale_prenorm_residual": rng.random() < 0.5,
        "use_mambapy": rng.random() < 0.5,
        "eos_token_id": rng.choice((0, 3, [1, 2])),
    }
    if rng.random() < 0.3:
        settings["intermediate_size"] = rng.choice((10, 40))
    return settings


@pytest.mark.parametrize("seed", range(200))
def test_a_random_model_of_transformers_gives_its_logits_or_is_refused(seed, tmp_path):
    rng, settings = random.Random(seed), draw_config(random.Random(seed))
    torch.manual_seed(seed)
    if rng.random() < 0.4:
        settings["mixer_rms_eps"] = rng.choice((1e-6, 0.1))
        theirs = FalconMambaForCausalLM(FalconMambaConfig(**settings)).eval()
    else:
        theirs = MambaForCausalLM(TransformersMambaConfig(**settings)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path / "model")
    if settings["hidden_act"] not in ("silu", "swish"):
        with pytest.raises(UserError, match=f"hidden_act is .{settings['hidden_act']}"):
            load_model(str(tmp_path / "model"))
        return
    model = load_model(str(tmp_path / "model"))
    with torch.inference_mode():
        wanted, got = theirs(IDS, use_cache=False).logits, model(IDS)[0]
    assert (got - wanted).abs().max() <= 2e-5 * wanted.abs().max()
    save_model(model, tmp_path / "again")
    written = json.loads((tmp_path / "again/config.json").read_text())
    assert written["hidden_act"] == "silu" and written["eos_token_id"] == settings["eos_token_id"]
    with torch.inference_mode():
        assert torch.equal(load_model(str(tmp_path / "again"))(IDS)[0], got)


@pytest.mark.parametrize("seed", range(60))
def test_a_random_model_in_mamba_ssms_layout_gives_its_logits(seed, tmp_path):
    """Weights of a transformers model of the same settings, by mamba_ssm's names."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    ssm = {
        "d_state": rng.choice((1, 3, 5, 16)),
        "d_conv": rng.choice((2, 4)),
        "expand": rng.choice((1, 2, 3)),
        "dt_rank": rng.choice(("auto", 3)),
        "bias": rng.random() < 0.5,
        "conv_bias": rng.random() < 0.5,
    }
    ssm = {name: value for name, value in ssm.items() if rng.random() < 0.7}
    config = {"d_model": rng.choice((8, 24)), "n_layer": rng.choice((1, 2)), "vocab_size": 11}
    config |= {"ssm_cfg": ssm, "pad_vocab_size_multiple": rng.choice((1, 4, 8))}
    config["tie_embeddings"] = rng.random() < 0.5
    rows = -(-11 // config["pad_vocab_size_multiple"]) * config["pad_vocab_size_multiple"]
    names = {"d_state": "state_size", "d_conv": "conv_kernel", "dt_rank": "time_step_rank"}
    names |= {"bias": "use_bias", "conv_bias": "use_conv_bias"}
    theirs = MambaForCausalLM(
        TransformersMambaConfig(
            vocab_size=rows,
            hidden_size=config["d_model"],
            num_hidden_layers=config["n_layer"],
            tie_word_embeddings=config["tie_embeddings"],
            **{names.get(name, name): value for name, value in ssm.items()},
        )
    ).eval()
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = {n.replace("embeddings", "embedding"): w for n, w in theirs.state_dict().items()}
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with torch.inference_mode():
        wanted, got = theirs(IDS, use_cache=False).logits, load_model(str(tmp_path))(IDS)[0]
    assert (got - wanted).abs().max() <= 2e-5 * wanted.abs().max()


# What a checkpoint says on generation


@pytest.mark.parametrize("format", ["transformers", "state_spaces"])
def test_settings_of_generation_are_kept(format, make_model, tmp_path):
    save_model(make_model(), tmp_path / "0")
    path = tmp_path / "0/config.json"
    ids = {"eos_token_id": [5, 7], "bos_token_id": 3, "pad_token_id": 2}
    path.write_text(json.dumps(json.loads(path.read_text()) | ids))
    generation = {"eos_token_id": [5, 7], "max_new_tokens": 99, "temperature": 0.3}
    (tmp_path / "0/generation_config.json").write_text(json.dumps(generation))
    save_model(load_model(str(tmp_path / "0")), tmp_path / "1", format=format)
    save_model(load_model(str(tmp_path / "1")), tmp_path / "2")
    again = GenerationConfig.from_pretrained(tmp_path / "2")
    assert (again.eos_token_id, again.max_new_tokens, again.temperature) == ([5, 7], 99, 0.3)
    config = TransformersMambaConfig.from_pretrained(tmp_path / "2")
    assert {name: getattr(config, name) for name in ids} == ids


def test_a_tokenizer_that_travels_along_gives_the_token_ids(make_model, tmp_path):
    tokenizer = load_tokenizer("", str(ROOT / "data/demo/tokenizer"))
    model = make_model(vocab_size=len(tokenizer))
    model.generation = {"eos_token_id": 9, "max_new_tokens": 99}
    save_model(model, tmp_path / "model", tokenizer)
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "model" / name).read_text())["eos_token_id"] == 0


def test_token_ids_that_agree_with_the_tokenizer_are_kept(make_model, tmp_path):
    """A checkpoint may list several ends of a text, and pad with another token."""
    tokenizer = load_tokenizer("", str(ROOT / "data/demo/tokenizer"))
    model = make_model(vocab_size=len(tokenizer))
    model.generation = {"eos_token_id": [0, 5], "pad_token_id": 1}
    save_model(model, tmp_path / "model", tokenizer)
    for name in ("config.json", "generation_config.json"):
        written = json.loads((tmp_path / "model" / name).read_text())
        assert (written["eos_token_id"], written["pad_token_id"]) == ([0, 5], 1)


def test_output_projections_are_rescaled_only_if_asked(tmp_path):
    weights = {}
    for rescale in (True, False):
        torch.manual_seed(0)
        path = tmp_path / "config.json"
        config = HF | {"num_hidden_layers": 4, "rescale_prenorm_residual": rescale}
        path.write_text(json.dumps(config))
        weights[rescale] = load_model(str(path)).backbone.layers[0].mixer.out_proj.weight
    assert torch.allclose(weights[True] * 2, weights[False])


@pytest.mark.parametrize("value", [1e308, 10**400], ids=["float", "integer"])
@pytest.mark.parametrize("name", ["expand", "layer_norm_epsilon", "hidden_size"])
def test_numbers_beyond_floats_are_refused(name, value, tmp_path):
    if name != "layer_norm_epsilon" or value != 1e308:
        assert refusal(tmp_path / "config.json", HF | {"expand": 1.5, name: value})


def test_settings_of_an_older_model_in_the_folder_are_not_kept(make_model, tmp_path):
    model = make_model()
    model.generation = {"max_new_tokens": 99}
    save_model(model, tmp_path / "model")
    save_model(make_model(seed=1), tmp_path / "model")
    assert not (tmp_path / "model/generation_config.json").exists()
