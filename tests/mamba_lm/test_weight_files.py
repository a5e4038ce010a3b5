"""Which weights a folder has: as transformers chooses and names them, or refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from common.errors import UserError
from mamba_lm.checkpoint import (
    files_read,
    find_model,
    load_model,
    load_tokenizer,
    save_model,
)

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
SINGLE, PICKLE = "model.safetensors", "pytorch_model.bin"


def logits(folder: Path) -> torch.Tensor:
    with torch.inference_mode():
        return load_model(str(folder))(IDS)[0]


def their_logits(folder: Path) -> torch.Tensor:
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        return theirs(IDS, use_cache=False).logits


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_model(str(folder))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def folder(make_model, tmp_path) -> Path:
    save_model(make_model(), tmp_path / "model")
    return tmp_path / "model"


def write(folder: Path, kind: str, weights: dict[str, torch.Tensor]) -> None:
    """Weights in one of the four ways: one file or two shards, safetensors or pickled."""
    ending = SINGLE if SINGLE in kind else PICKLE
    save = save_file if ending == SINGLE else torch.save
    if "index" not in kind:
        return save(weights, folder / ending)
    stem, suffix = ending.split(".")
    names, place_of = sorted(weights), {}
    for n in (1, 2):
        shard = f"{stem}-0000{n}-of-00002.{suffix}"
        part = {name: weights[name] for name in names[n - 1 :: 2]}
        save(part, folder / shard)
        place_of |= dict.fromkeys(part, shard)
    index = {"metadata": {}, "weight_map": place_of}
    (folder / f"{ending}.index.json").write_text(json.dumps(index))


ORDER = (SINGLE, f"{SINGLE}.index", PICKLE, f"{PICKLE}.index")


@pytest.mark.parametrize("first", range(4), ids=ORDER)
def test_of_several_files_the_same_wins_as_in_transformers(first, make_model, tmp_path):
    """Each way holds another model's weights; those before it in the order are not there."""
    folder = tmp_path / "model"
    save_model(make_model(), folder)
    (folder / SINGLE).unlink()
    for seed, kind in list(enumerate(ORDER))[first:]:
        weights = make_model(seed=seed).state_dict()
        weights.pop("lm_head.weight")
        write(folder, kind, {name: value.clone() for name, value in weights.items()})
    wanted = make_model(seed=first)
    with torch.inference_mode():
        assert torch.equal(logits(folder), wanted(IDS)[0])
    assert (their_logits(folder) - logits(folder)).abs().max() < 1e-4
    read = {path.name for path in find_model(str(folder)).paths()}
    kind = ORDER[first]
    assert len(read) == (4 if "index" in kind else 2)
    assert all(name.startswith(("config", kind.split(".")[0])) for name in read)


def test_an_index_that_is_left_over_is_not_read(folder):
    wanted = logits(folder)
    index = {"weight_map": {"backbone.norm_f.weight": "model-00001-of-00001.safetensors"}}
    (folder / f"{SINGLE}.index.json").write_text(json.dumps(index))
    save_file(
        {"backbone.norm_f.weight": torch.ones(3)}, folder / "model-00001-of-00001.safetensors"
    )
    assert torch.equal(logits(folder), wanted)


def test_a_weight_that_the_index_places_elsewhere_is_not_taken(folder):
    weights, wanted = load_file(folder / SINGLE), logits(folder)
    (folder / SINGLE).unlink()
    write(folder, f"{SINGLE}.index", weights)
    path = folder / "model-00002-of-00002.safetensors"
    name = sorted(weights)[0]  # of the first shard
    save_file(load_file(path) | {name: torch.zeros_like(weights[name])}, path)
    assert torch.equal(logits(folder), wanted)
    save_file({"x": torch.ones(1)}, path)
    assert f"{path}: lacks {sorted(weights)[1]}" in refusal(folder)


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name.removeprefix("backbone."),
        lambda name: f"module.{name}",
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: f"_orig_mod.{name.removeprefix('backbone.')}",
        lambda name: name.replace(".mixer.", "._orig_mod.mixer._fsdp_wrapped_module."),
        lambda name: name.replace("embeddings", "embedding"),
    ],
    ids=["base", "module", "compiled", "both", "compiled base", "inner", "mamba_ssm"],
)
@pytest.mark.parametrize("tied", [True, False])
def test_prefixes_of_wrapped_and_base_models(tied, rename, make_model, tmp_path):
    save_model(make_model(tie_embeddings=tied), tmp_path / "model")
    wanted, path = logits(tmp_path / "model"), tmp_path / "model" / SINGLE
    save_file({rename(name): value for name, value in load_file(path).items()}, path)
    assert torch.equal(logits(tmp_path / "model"), wanted)


def test_two_weights_of_one_name_are_refused(folder):
    weights = load_file(folder / SINGLE)
    weights["module.backbone.norm_f.weight"] = weights["backbone.norm_f.weight"] + 1
    save_file(weights, folder / SINGLE)
    assert "both weights of backbone.norm_f.weight" in refusal(folder)


# Tied embeddings


def test_a_tied_head_that_differs_is_kept(folder, capsys, tmp_path):
    weights = load_file(folder / SINGLE)
    weights["lm_head.weight"] = torch.randn_like(weights["backbone.embeddings.weight"])
    save_file(weights, folder / SINGLE)
    model = load_model(str(folder))
    assert "tie_word_embeddings is true" in capsys.readouterr().err
    for name in ("lm_head.weight", "backbone.embeddings.weight"):
        assert torch.equal(model.state_dict()[name], weights[name])
    assert (their_logits(folder) - logits(folder)).abs().max() < 1e-4
    save_model(model, tmp_path / "again")
    assert json.loads((tmp_path / "again/config.json").read_text())["tie_word_embeddings"] is False
    assert torch.equal(logits(tmp_path / "again"), logits(folder))


@pytest.mark.parametrize("number", [1.0, float("nan")])
def test_an_equal_head_stays_tied(number, folder, capsys):
    weights = load_file(folder / SINGLE)
    weights["backbone.embeddings.weight"][3, 4] = number
    save_file(weights | {"lm_head.weight": weights["backbone.embeddings.weight"].clone()},
              folder / SINGLE)  # fmt: skip
    model = load_model(str(folder))
    assert model.lm_head.weight is model.backbone.embeddings.weight
    assert capsys.readouterr().err == ""


def test_a_head_alone_is_the_embedding_too(folder):
    weights, wanted = load_file(folder / SINGLE), logits(folder)
    weights["lm_head.weight"] = weights.pop("backbone.embeddings.weight")
    save_file(weights, folder / SINGLE)
    assert torch.equal(logits(folder), wanted)


def test_a_head_that_differs_is_refused_where_the_formats_disagree(make_model, tmp_path):
    """mamba_ssm would let the head overwrite the embedding."""
    save_model(make_model(), tmp_path / "model", format="state_spaces")
    path = tmp_path / "model" / PICKLE
    weights = torch.load(path, weights_only=True)
    torch.save(weights | {"lm_head.weight": weights["lm_head.weight"] + 1}, path)
    assert "tie_embeddings is true, but" in refusal(tmp_path / "model")


def test_a_missing_head_of_an_untied_model_is_refused(make_model, tmp_path):
    save_model(make_model(tie_embeddings=False), tmp_path / "model")
    path = tmp_path / "model" / SINGLE
    weights = load_file(path)
    del weights["lm_head.weight"]
    save_file(weights, path)
    assert "missing ['lm_head.weight']" in refusal(tmp_path / "model")


# What is no weights of a whole model


@pytest.mark.parametrize(
    "dtype",
    [torch.int64, torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.uint8],
    ids=str,
)
@pytest.mark.parametrize("pickled", [False, True])
def test_weights_of_another_kind_are_refused(dtype, pickled, folder):
    weights = load_file(folder / SINGLE)
    name = "backbone.layers.0.mixer.D"
    weights[name] = weights[name].to(dtype)
    (folder / SINGLE).unlink()
    write(folder, PICKLE if pickled else SINGLE, weights)
    assert f"{name} is {str(dtype).removeprefix('torch.')}" in refusal(folder)


@pytest.mark.parametrize("value", [3, "x", None, [1.0], {"a": torch.ones(1)}], ids=str)
def test_values_that_are_no_tensors_are_refused(value, folder):
    weights = load_file(folder / SINGLE) | {"extra": value}
    (folder / SINGLE).unlink()
    torch.save(weights, folder / PICKLE)
    assert f"{folder / PICKLE}: 'extra' is not a named tensor" in refusal(folder)


@pytest.mark.parametrize("alone", [True, False])
def test_an_adapter_is_named(alone, folder):
    (folder / "adapter_config.json").write_text("{}")
    if alone:  # as peft writes it
        (folder / SINGLE).rename(folder / "adapter_model.safetensors")
        (folder / "config.json").unlink()
    assert f"{folder}/adapter_config.json: an adapter" in refusal(folder)


# What loading reads is what a record hashes


def test_the_files_that_decide_what_is_loaded_are_those_that_are_read(folder):
    """Without all others the model and its tokenizer load as before."""
    weights = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    write(folder, f"{SINGLE}.index", weights)
    write(folder, PICKLE, weights)  # not read
    (folder / "generation_config.json").write_text('{"max_new_tokens": 7}')
    tokenizer = Path(__file__).parents[2] / "data/demo/tokenizer"
    for path in tokenizer.iterdir():
        shutil.copy(path, folder)
    (folder / "added_tokens.json").write_text("{}")
    model, others = files_read(str(folder))
    assert others == [] and [path.name for path in model] == [
        "added_tokens.json", "config.json", "generation_config.json",
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
        f"{SINGLE}.index.json", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    names = {path.name for path in model}
    for path in folder.iterdir():
        if path.name not in names:
            path.unlink()
    load_model(str(folder))  # nothing else is needed
    load_tokenizer(str(folder))
    model, others = files_read(str(folder), str(tokenizer))
    assert {path.parent for path in others} == {tokenizer} and len(others) == 2
    assert not {"tokenizer.json", "tokenizer_config.json"} & {path.name for path in model}
