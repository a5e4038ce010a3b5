"""Tiny random models whose every parameter matters, and the same as `transformers`' models."""

import pytest
import torch
from huggingface_hub import constants
from transformers import FalconMambaConfig, FalconMambaForCausalLM, MambaForCausalLM
from transformers import MambaConfig as TransformersMambaConfig

from mamba_lm.models.mamba import MambaConfig, MambaLM


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_hub(monkeypatch, tmp_path_factory):
    """No test reaches the network, nor what an earlier run left in the Hub's cache."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path_factory.mktemp("hub")))


@pytest.fixture(scope="session")
def make_model():
    """A model of the tiny config with `changes`, in evaluation mode, far from its initialisation.

    At the start norms and D are ones, Δ is small and logits are near zero: much could be wrong
    unseen. Here every parameter is moved by noise and embeddings are large.
    """

    def make(seed: int = 0, **changes) -> MambaLM:
        settings = {"vocab_size": 31, "d_model": 24, "n_layer": 2, "d_state": 7, "dt_rank": 5}
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(seed)
            model = MambaLM(MambaConfig(**settings | changes))
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
            for block in model.backbone.layers:
                block.mixer.dt_proj.bias += 3.0
        return model.eval()

    return make


@pytest.fixture(scope="session")
def as_transformers():
    """`transformers`' own model of the same config, weights and dtype."""

    def convert(model: MambaLM):
        config = model.config
        settings = {
            "vocab_size": config.vocab_rows,
            "hidden_size": config.d_model,
            "num_hidden_layers": config.n_layer,
            "state_size": config.d_state,
            "conv_kernel": config.d_conv,
            "expand": config.expand,
            "time_step_rank": config.dt_rank,
            "layer_norm_epsilon": config.norm_eps,
            "use_bias": config.proj_bias,
            "use_conv_bias": config.conv_bias,
            "tie_word_embeddings": config.tie_embeddings,
            "residual_in_fp32": config.residual_in_fp32,
        }
        if config.bcdt_rms_eps is None:
            theirs = MambaForCausalLM(TransformersMambaConfig(**settings))
        else:
            settings["mixer_rms_eps"] = config.bcdt_rms_eps
            theirs = FalconMambaForCausalLM(FalconMambaConfig(**settings))
        theirs.load_state_dict(model.state_dict())
        return theirs.to(model.lm_head.weight.dtype).eval()

    return convert


@pytest.fixture
def float64_throughout(monkeypatch):
    """Casts to float32 give float64: `transformers`' models have several in their forward."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(torch, "float32", torch.float64)


@pytest.fixture(scope="session")
def assert_near():
    """Tensors, or dicts of them, that differ by at most `tolerance` of their largest entry."""

    def check(got, wanted, tolerance: float) -> None:
        if not isinstance(wanted, dict):
            got, wanted = {"": got}, {"": wanted}
        assert got.keys() == wanted.keys()
        for name, value in wanted.items():
            assert got[name].shape == value.shape, name
            error = (got[name].double() - value.double()).abs().max()
            assert error <= tolerance * value.abs().max(), f"{name}: {error:.2g} off"

    return check


@pytest.fixture(scope="session")
def gradients():
    """Gradients of a loss by parameter name; every parameter has one."""

    def compute(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
        names, parameters = zip(*model.named_parameters(), strict=True)
        return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))

    return compute
