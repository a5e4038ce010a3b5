"""Δ's norms as the model computes them, and which layers a model's folder names."""

import json

import pytest
import torch

from common.errors import UserError
from mamba_lm.checkpoint import save_model
from mamba_lm.delta import LAYERS, DeltaNorms, delta_layers
from mamba_lm.generate import prefill

IDS = [3, 1, 4, 1, 5, 9, 2, 6]


def by_hand(model, layer: int) -> torch.Tensor:
    """Norms (l,) by the paper's formula, from what goes into the projection."""
    inputs = []
    projection = model.backbone.layers[layer].mixer.dt_proj
    hook = projection.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    model(torch.tensor([IDS]))
    hook.remove()
    dt = inputs[0].reshape(len(IDS), -1).double()
    delta = torch.log1p((dt @ projection.weight.double().T + projection.bias.double()).exp())
    return delta.square().sum(dim=-1).sqrt()


@pytest.mark.parametrize("max_tokens", [None, 3, 1])
@pytest.mark.parametrize("layers", [[0, 1], [1], [1, 0]], ids=str)
def test_norms_of_what_is_read_in_pieces_or_at_once(make_model, layers, max_tokens):
    model = make_model()
    with torch.inference_mode(), DeltaNorms(model, layers) as norms:
        state = prefill(model, [IDS], max_tokens)
    got = norms.by_layer()
    assert got.shape == (len(layers), len(IDS)) and got.dtype == torch.float32
    for row, layer in zip(got, layers, strict=True):
        torch.testing.assert_close(row.double(), by_hand(model, layer), rtol=1e-4, atol=0)
    assert len(set(got.flatten().tolist())) == got.numel()
    again = prefill(model, [IDS], max_tokens)
    assert norms.by_layer().shape == got.shape, "recorded while it is open alone"
    for one, other in zip(state.tensors, again.tensors, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    assert model.is_plain()


def test_nothing_is_left_behind_after_an_error(make_model):
    model = make_model()
    with pytest.raises(KeyboardInterrupt), DeltaNorms(model, [0]):
        raise KeyboardInterrupt
    assert model.is_plain()


@pytest.mark.parametrize(
    ("content", "layers"), [(None, [0, 1]), ("[1]", [1]), ("[1, 0]\n", [1, 0])]
)
def test_layers_that_a_folder_names(make_model, tmp_path, content, layers):
    folder = tmp_path / "model"
    save_model(make_model(), folder)
    if content is not None:
        (folder / LAYERS).write_text(content)
    assert delta_layers(str(folder), 2) == layers


def test_a_config_file_names_none():
    assert delta_layers("models/configs/mamba-130m.json", 3) == [0, 1, 2]


@pytest.mark.parametrize("layers", [[], [2], [-1], [0, 0], [True], ["0"], [0.5], {"0": 1}, 0, None])
def test_layers_that_there_are_not(make_model, tmp_path, layers):
    folder = tmp_path / "model"
    save_model(make_model(), folder)
    (folder / LAYERS).write_text(json.dumps(layers))
    with pytest.raises(UserError, match=r"delta_layers.json: give a list .* from 0 to 1"):
        delta_layers(str(folder), 2)


def test_a_file_of_layers_that_is_no_json(make_model, tmp_path):
    folder = tmp_path / "model"
    save_model(make_model(), folder)
    (folder / LAYERS).write_text("[0, 1")
    with pytest.raises(UserError, match=r"delta_layers.json: not JSON"):
        delta_layers(str(folder), 2)
