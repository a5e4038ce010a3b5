"""Adapters are exact on every way of reading, and are saved merged or alone."""

import copy
import importlib.util
import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.utils import parametrizations, parametrize

from common.errors import UserError
from mamba_lm import generate
from mamba_lm.adapters import (
    add_adapter,
    has_adapter,
    load_adapter,
    merge_adapter,
    merged_weights,
    save_adapter,
)
from mamba_lm.checkpoint import load_model, save_model
from mamba_lm.cuda_graphs import graphs_of
from mamba_lm.models.mamba import MambaLM
from mamba_lm.training.prefix_suffix import Item, PrefixSuffixLM, collate

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings(
    "ignore:LoRA adapter added to ConvNd layer:UserWarning",
    "ignore:aLoRA is currently only supported:UserWarning",
    "ignore:Adapter 'default'. . LoRA tensor:UserWarning",
)
PROJECTIONS = ("in_proj", "x_proj", "dt_proj", "out_proj")
TARGETS = [*((name,) for name in (*PROJECTIONS, "conv1d")), PROJECTIONS]
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3]])


BACKENDS = ["cpu", "reference", pytest.param("triton", marks=pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"))]  # fmt: skip
# On Triton, single projections are read in the test of training alone.
WAYS = [
    *((backend, targets) for backend in BACKENDS[:2] for targets in TARGETS),
    *(pytest.param("triton", targets, marks=BACKENDS[2].marks) for targets in TARGETS[-2:]),
]


@pytest.fixture
def plain(make_model):
    """A small model, since Triton's interpreter is slow, in which every projection matters."""
    model = make_model(n_layer=1, d_model=8, d_state=3, dt_rank=2)
    mixer = model.backbone.layers[0].mixer
    with torch.no_grad():
        mixer.dt_proj.bias.zero_()
        for module in (mixer.in_proj, mixer.conv1d, mixer.x_proj):
            module.weight.mul_(2)
    return model


def assert_same_function(got: dict, wanted: dict, tolerance: float = 1e-5) -> None:
    for way, value in wanted.items():
        assert got[way].shape == value.shape, way
        error = (got[way].double() - value.double()).abs().max()
        assert error <= tolerance * value.abs().max(), f"{way}: {error:.2g} off"


def forward(model: MambaLM) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS)[0]


# Exact


@pytest.mark.parametrize("backend, targets", WAYS, ids=str)
def test_every_way_of_reading_sees_the_adapter(
    backend, targets, plain, add_lora, merge_by_hand, read_all_ways, monkeypatch
):
    model = copy.deepcopy(plain)
    add_lora(model, *targets)
    wanted, base = read_all_ways(merge_by_hand(model, plain), 1), read_all_ways(plain, 1)
    for way in wanted.keys() - {"decoded", "streamed", "the state", "the state after one token"}:
        assert (wanted[way] - base[way]).abs().max() > 1e-3, way
    monkeypatch.setenv("MAMBA_SCAN_BACKEND", backend)
    assert_same_function(read_all_ways(model, 1), wanted)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("targets", TARGETS, ids=" ".join)
def test_training_reaches_every_weight_of_the_adapter(
    targets, backend, plain, add_lora, merge_by_hand, assert_near, monkeypatch
):
    model = copy.deepcopy(plain)
    add_lora(model, *targets)
    examples = [Item.with_target([3, 1, 4], [1, 5], [9, 2]), Item.with_target([3, 1, 4], [6], [5])]
    merged = merge_by_hand(model, plain)
    PrefixSuffixLM(merged)(**collate(examples))["loss"].backward()
    monkeypatch.setenv("MAMBA_SCAN_BACKEND", backend)
    PrefixSuffixLM(model)(**collate(examples))["loss"].backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * len(targets) and all("lora_" in name for name in trained)
    assert all(gradient.abs().max() > 0 for gradient in trained.values())

    for target in targets:
        name = f"backbone.layers.0.mixer.{target}"
        wrapper, gradient = model.get_submodule(name), merged.get_submodule(name).weight.grad
        A, B = wrapper.lora_A["default"].weight, wrapper.lora_B["default"].weight
        if target == "conv1d":
            wanted = {"A": 0.5 * B * gradient, "B": 0.5 * (A * gradient).sum((1, 2), keepdim=True)}
        else:
            wanted = {"A": 0.5 * B.T @ gradient, "B": 0.5 * gradient @ A.T}
        assert_near({"A": A.grad, "B": B.grad}, wanted, 1e-4)


def scale_weight(module: torch.nn.Module) -> None:
    class Scale(torch.nn.Module):
        def forward(self, weight):
            return 1.5 * weight

    parametrize.register_parametrization(module, "weight", Scale())


def scale_output(module: torch.nn.Module) -> None:
    module.register_forward_hook(lambda module, inputs, output: 1.5 * output)


def scale_forward(module: torch.nn.Module) -> None:
    forward = module.forward
    module.forward = lambda x: 1.5 * forward(x)


def scale_input(module: torch.nn.Module) -> None:
    module.register_forward_pre_hook(lambda module, inputs: (1.5 * inputs[0],))


@pytest.mark.parametrize("change", [scale_weight, scale_output, scale_forward, scale_input])
@pytest.mark.parametrize("name", [*PROJECTIONS, "conv1d"])
def test_every_way_of_reading_sees_what_changes_a_module(name, change, make_model, read_all_ways):
    """Parametrizations, hooks and replaced forwards, as well as adapters."""
    plain = make_model(n_layer=1, conv_bias=False)
    with torch.no_grad():
        plain.backbone.layers[0].mixer.dt_proj.bias.zero_()
    model, scaled = copy.deepcopy(plain), copy.deepcopy(plain)
    change(model.backbone.layers[0].mixer.get_submodule(name))
    with torch.no_grad():
        scaled.backbone.layers[0].mixer.get_submodule(name).weight.mul_(1.5)
    assert not model.is_plain()
    assert_same_function(read_all_ways(model), read_all_ways(scaled))


@pytest.mark.parametrize("name", ["in_proj", "conv1d", "dt_proj", "delta", "out_proj"])
def test_hooks_of_the_backward_pass_leave_the_kernels_too(name, make_model):
    model = make_model(n_layer=1)
    handle = (
        model.backbone.layers[0]
        .mixer.get_submodule(name)
        .register_full_backward_hook(lambda *args: None)
    )
    assert not model.is_plain()
    handle.remove()
    assert model.is_plain()


def test_a_weight_norm_on_the_convolution_is_seen(make_model, read_all_ways):
    plain = make_model(n_layer=1)
    model = copy.deepcopy(plain)
    parametrizations.weight_norm(model.backbone.layers[0].mixer.conv1d)
    assert_same_function(read_all_ways(model), read_all_ways(plain))
    assert not model.is_plain() and not model.can_pack()


def test_a_convolution_of_another_shape_is_refused_by_name(make_model):
    model = make_model(n_layer=1)
    model.backbone.layers[0].mixer.conv1d = torch.nn.Conv1d(48, 48, 4, padding=3, groups=48)
    assert not model.is_plain() and not model.can_pack()
    with pytest.raises(UserError, match=r"conv1d: .* expected \(2, 8, 48\)"):
        model(IDS)


# Merged equals unmerged


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": list(PROJECTIONS)},
        {"target_modules": ["in_proj", "dt_proj"], "use_dora": True},
        {"target_modules": ["dt_proj"], "lora_bias": True},
        {"target_modules": ["dt_proj"], "bias": "all"},
        {"target_modules": r".*layers\.1\..*_proj"},
        {"target_modules": ["embeddings"]},
        {"target_modules": ["lm_head", "out_proj"]},
        {"target_modules": ["in_proj"], "modules_to_save": ["lm_head", "norm_f", "conv1d"]},
        {"target_modules": ["in_proj"], "trainable_token_indices": {"embeddings": [3, 4]}},
        {"target_parameters": ["mixer.A_log"]},
        {"target_parameters": ["conv1d.weight", "dt_proj.weight"]},
    ],
    ids=str,
)
def test_merged_equals_unmerged(settings, tied, make_model, read_all_ways, tmp_path):
    model = make_model(tie_embeddings=tied)
    before = forward(model)
    add_adapter(model, peft.LoraConfig(r=4, **settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    unmerged, names = read_all_ways(model), set(model.state_dict())
    assert (forward(model) - before).abs().max() > 1e-3
    save_model(model, tmp_path / "merged")
    assert set(model.state_dict()) == names and torch.equal(
        read_all_ways(model)["a batch"], unmerged["a batch"]
    )
    saved = load_model(str(tmp_path / "merged"))
    assert saved.is_plain()
    assert_same_function(read_all_ways(saved), unmerged, 1e-4)
    assert (forward(saved) - forward(model)).abs().max() < 1e-5 * forward(model).abs().max()
    save_adapter(model, tmp_path / "adapter")
    merge_adapter(model)
    assert model.is_plain() and not has_adapter(model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.state_dict().keys() == saved.state_dict().keys()
    assert_same_function(read_all_ways(model), unmerged, 1e-4)
    again = make_model(tie_embeddings=tied)
    load_adapter(again, tmp_path / "adapter")
    assert_same_function(read_all_ways(again), unmerged)


def test_lora_on_the_convolution_is_saved_alone(make_model, add_lora, tmp_path):
    """It mixes channels, which no depthwise convolution does."""
    model = make_model()
    add_lora(model, "conv1d", "in_proj")
    before, names = forward(model), set(model.state_dict())
    for merge in (merge_adapter, merged_weights, lambda model: save_model(model, tmp_path / "m")):
        with pytest.raises(UserError, match=r"mixer\.conv1d: peft cannot merge .* alone"):
            merge(model)
        assert set(model.state_dict()) == names and torch.equal(forward(model), before)
    save_adapter(model, tmp_path / "adapter")
    again = make_model()
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(forward(again), before)


# Nothing is stale


def test_what_was_made_before_an_adapter_is_not_used_after_it(make_model, add_lora, assert_near):
    model = make_model()
    state = model.encode(IDS)[1].detach()
    token = torch.tensor([1, 2])
    with torch.no_grad():
        base, _ = model.stepper()(token, state)
        graphs_of(model, "a test")[1] = "a graph"
        add_lora(model, *PROJECTIONS)
        assert not model.is_plain() and not generate.is_captured(model)
        assert graphs_of(model, "a test") == {}
        step = model.stepper()
        adapted, _ = step(token, state)
        assert (adapted - base).abs().max() > 1e-3
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter *= 1.1
        assert_near(step(token, state)[0], model.encode(token[:, None], state)[0][:, 0], 1e-5)
        updated, _ = step(token, state)
        assert (updated - adapted).abs().max() > 1e-4
        merge_adapter(model)
        merged, _ = model.stepper()(token, state)
        assert_near(merged, updated, 1e-5)
        assert_near(step(token, state)[0], merged, 1e-5)  # it calls the modules that are there


def test_a_stepper_reads_weights_that_are_updated_in_place(make_model):
    model = make_model()
    state, token = model.encode(IDS)[1].detach(), torch.tensor([1, 2])
    with torch.no_grad():
        step = model.stepper()
        before, _ = step(token, state)
        model.backbone.layers[0].mixer.out_proj.weight.mul_(1.5)
        after, _ = step(token, state)
        assert torch.equal(after, model.stepper()(token, state)[0])
        assert not torch.equal(after, before)


def test_a_disabled_adapter_does_nothing(make_model, add_lora, tmp_path):
    model = make_model()
    before = forward(model)
    add_lora(model, *PROJECTIONS)
    adapted = forward(model)
    for is_enabled, wanted in ((False, before), (True, adapted)):
        for module in model.modules():
            if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer):
                module.enable_adapters(is_enabled)
        assert (forward(model) - wanted).abs().max() < 1e-6
        save_model(model, tmp_path / str(is_enabled))
        assert (forward(load_model(str(tmp_path / str(is_enabled)))) - wanted).abs().max() < 1e-5


# Files


def test_a_checkpoint_never_has_weights_of_an_adapter(make_model, add_lora, tmp_path):
    model = make_model()
    add_lora(model, "in_proj")
    with pytest.raises(UserError, match=r"weights that a checkpoint cannot have .*base_layer"):
        save_model(model, tmp_path / "model", weights=model.state_dict())
    assert not (tmp_path / "model").exists()
    save_model(model, tmp_path / "model", format="state_spaces")
    names = torch.load(tmp_path / "model/pytorch_model.bin", weights_only=True).keys()
    assert not any("lora" in name or "base_layer" in name for name in names)


def test_peft_reads_our_files_and_we_read_its(make_model, add_lora, tmp_path):
    model = make_model()
    add_lora(model, *PROJECTIONS)
    save_adapter(model, tmp_path / "ours")
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    theirs = peft.PeftModel.from_pretrained(make_model(), tmp_path / "ours")
    assert torch.equal(forward(theirs.get_base_model()), forward(model))
    theirs.save_pretrained(tmp_path / "theirs")
    again = make_model()
    load_adapter(again, tmp_path / "theirs", is_trainable=True)
    assert torch.equal(forward(again), forward(model))
    assert {name for name, p in again.named_parameters() if p.requires_grad} == {
        name for name, _ in again.named_parameters() if "lora_" in name
    }
    with pytest.raises(UserError, match="an adapter, not a whole model"):
        load_model(str(tmp_path / "ours"))


def test_a_model_that_peft_wrapped_itself_is_saved_merged(make_model, tmp_path):
    """The config names no model_type, for which peft would refuse out_proj."""
    wrapped = peft.get_peft_model(
        make_model(), peft.LoraConfig(target_modules=["out_proj"], init_lora_weights=False)
    )
    model = wrapped.get_base_model()
    save_model(model, tmp_path / "merged")
    assert (forward(load_model(str(tmp_path / "merged"))) - forward(model)).abs().max() < 1e-5


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"target_modules": ["in_proj", "q_proj"]}, "target_modules: 'q_proj' matches nothing"),
        ({"target_modules": ["q_proj"]}, "target_modules: 'q_proj' matches nothing"),
        ({"target_modules": "q_.*"}, "peft refuses the adapter: Target modules q_"),
        ({"target_modules": ["in_proj"], "modules_to_save": ["head"]}, "modules_to_save: 'head'"),
        ({"target_parameters": ["mixer.E"]}, r"target_parameters: 'mixer\.E' matches nothing"),
        ({"target_parameters": ["mixer.D"]}, "peft refuses the adapter: .* 1 dimensional"),
        ({}, "config has no target_modules"),
        ({"target_modules": ["in_proj", "conv1d"]}, "peft refuses the adapter: .*groups=48"),
        ({"target_modules": ["delta"]}, r"peft refuses the adapter: .*DeltaSoftplus\(\)"),
        ({"target_modules": ["in_proj"], "alora_invocation_tokens": [1]}, "alora_invocation_tok"),
    ],
    ids=str,
)
def test_a_refusal_leaves_the_model_as_it_was(settings, message, make_model):
    model = make_model()
    before, config = forward(model), peft.LoraConfig(**settings)
    with pytest.raises(UserError, match=message):
        add_adapter(model, config)
    assert model.is_plain() and torch.equal(forward(model), before)
    assert not has_adapter(model) and not hasattr(model, "peft_config")
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_weight_without_effect_is_refused_by_name(make_model, monkeypatch):
    """As if the model read the raw weights of a module that is wrapped."""
    model = make_model()
    layer = peft.tuners.lora.Linear
    monkeypatch.setattr(layer, "forward", lambda self, x: self.base_layer(x))
    with pytest.raises(UserError, match=r"weights .*in_proj\.lora_A\.default\.weight.* no effect"):
        add_adapter(model, peft.LoraConfig(target_modules=["in_proj"]))
    assert model.is_plain()


def test_one_adapter_at_a_time(make_model, add_lora):
    model = make_model()
    add_lora(model, "in_proj")
    with pytest.raises(UserError, match="has an adapter already: merge it first"):
        add_lora(model, "out_proj")
    assert has_adapter(model)


def test_an_adapter_is_not_saved_into_a_models_folder(make_model, add_lora, tmp_path):
    save_model(make_model(), tmp_path / "model")
    with pytest.raises(UserError, match="the model has 0 adapters"):
        save_adapter(make_model(), tmp_path / "adapter")
    model = make_model()
    add_lora(model, "in_proj")
    with pytest.raises(UserError, match="contains a model"):
        save_adapter(model, tmp_path / "model")
    load_model(str(tmp_path / "model"))


def drop_weights(folder):
    (folder / "adapter_model.safetensors").unlink()


def rename_weight(folder):
    weights = load_file(folder / "adapter_model.safetensors")
    name = next(iter(weights))
    weights[name.replace("in_proj", "q_proj")] = weights.pop(name)
    save_file(weights, folder / "adapter_model.safetensors")


def cut_weight(folder):
    weights = load_file(folder / "adapter_model.safetensors")
    name = next(iter(weights))
    save_file(weights | {name: weights[name][:-1]}, folder / "adapter_model.safetensors")


def change_config(**changes):
    def change(folder):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


@pytest.mark.parametrize(
    "spoil, message",
    [
        (drop_weights, r"adapter_model\.safetensors: no such file"),
        (rename_weight, r"does not fit the model and adapter_config\.json: .*_proj\.lora_"),
        (cut_weight, r"does not fit the model and adapter_config\.json: .*in_proj\.lora_"),
        (change_config(r=7), "does not fit the model"),
        (change_config(target_modules=["q_proj"]), "'q_proj' matches nothing"),
        (change_config(peft_type="NOTHING"), r"adapter_config\.json: not an adapter's config"),
        (
            lambda folder: (folder / "adapter_config.json").write_text("[]"),
            "must contain a JSON object",
        ),
    ],
)
def test_files_that_do_not_fit_leave_the_model_as_it_was(
    spoil, message, make_model, add_lora, tmp_path
):
    model = make_model()
    add_lora(model, "in_proj")
    save_adapter(model, tmp_path / "adapter")
    spoil(tmp_path / "adapter")
    again = make_model()
    before = forward(again)
    with pytest.raises(UserError) as refused:
        load_adapter(again, tmp_path / "adapter")
    assert re.search(message, str(refused.value)), refused.value
    assert again.is_plain() and torch.equal(forward(again), before)
