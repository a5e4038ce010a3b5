"""Tiny random models whose every parameter matters, and the same as `transformers`' models."""

import copy

import pytest
import torch
from huggingface_hub import constants
from transformers import FalconMambaConfig, FalconMambaForCausalLM, MambaForCausalLM
from transformers import MambaConfig as TransformersMambaConfig

from mamba_lm.adapters import add_adapter
from mamba_lm.generate import Decoder, decode, read, read_and_score
from mamba_lm.models.mamba import MambaConfig, MambaLM
from mamba_lm.tensors import right_pad
from mamba_lm.training.prefix_suffix import Item, PrefixSuffixLM, collate


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


@pytest.fixture(scope="session")
def read_all_ways():
    """What a model computes on each of the ways on which it reads tokens, by the way's name.

    Two models are one function where these are equal: none of them can pass over a module.
    """
    prompts, stops = [[3, 1, 4, 1, 5], [9], [2, 6, 5]], [13]
    examples = [
        Item.with_target([3, 1, 4], [1, 5], [9, 2]),
        Item.with_target([3, 1, 4], [6], [5]),
        Item.with_target([7], [3, 5, 8], [9, 7, 9]),
    ]

    @torch.no_grad()
    def read_all(model: MambaLM, max_new_tokens: int = 3) -> dict[str, torch.Tensor]:
        ids, lengths = right_pad(prompts)
        hidden, state = model.encode(ids, lengths=lengths)
        is_real = torch.arange(ids.shape[1]) < lengths[:, None]
        stateless, _ = model.encode(ids, lengths=lengths, keep_state=False)
        carried, _ = model.encode(ids, state, lengths)
        stepped, after = model.stepper()(torch.tensor([1, 2, 3]), state)
        reading = read(model, prompts)
        answers = decode(model, reading, stops, max_new_tokens)
        first = reading.fork(torch.tensor([0]))
        decoder = Decoder(model, first, stops, max_new_tokens)
        streamed = list(decoder.stream())
        scored, score = read_and_score(model, [1, 2], first.state, [3, 4], stops)
        losses, _ = PrefixSuffixLM(model).token_losses(**collate(examples))
        return {
            "a batch": model(ids)[0],
            "a batch of mixed lengths": hidden[is_real],
            "the state": torch.cat([tensor.flatten() for tensor in state.tensors]),
            "without a state": stateless[is_real],
            "from a state": carried[is_real],
            "one token": stepped,
            "the state after one token": torch.cat([t.flatten() for t in after.tensors]),
            "decoded": torch.tensor([t for answer in answers for t in (*answer.token_ids, -1)]),
            "decoded, log_probs": torch.tensor([answer.log_prob for answer in answers]),
            "streamed": torch.tensor(streamed),
            "streamed, log_prob": decoder.log_probs[0],
            "read and scored": scored.log_probs,
            "score": torch.tensor(score),
            "losses": losses,
        }

    return read_all


@pytest.fixture(scope="session")
def add_lora():
    """Add LoRA of rank d_inner, so that conv1d takes it, far from its start: the model moves."""

    def add(model: MambaLM, *targets: str) -> None:
        peft, r = pytest.importorskip("peft"), model.config.d_inner
        config = peft.LoraConfig(r=r, lora_alpha=r / 2, target_modules=list(targets))
        add_adapter(model, config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.2 * torch.randn_like(parameter)

    return add


@pytest.fixture(scope="session")
def merge_by_hand():
    """The plain model with scaling * B @ A added to each weight that has LoRA, not by peft. The
    convolution's LoRA mixes channels, so that there a dense convolution takes its place."""

    def merge(model: MambaLM, plain: MambaLM) -> MambaLM:
        merged = copy.deepcopy(plain)
        for name, module in model.named_modules():
            if not hasattr(module, "lora_A"):
                continue
            A = module.lora_A["default"].weight.detach()
            B = module.lora_B["default"].weight.detach()
            own = merged.get_submodule(name)
            if isinstance(own, torch.nn.Conv1d):
                d, _, w = own.weight.shape
                dense = torch.nn.Conv1d(d, d, w, bias=own.bias is not None)
                dense.bias = own.bias
                # B is depthwise too: channel o reads component o of A, of which there are d.
                weight = torch.diag_embed(own.weight[:, 0].T).permute(1, 2, 0)
                dense.weight = torch.nn.Parameter(weight + 0.5 * B * A)
                parent, _, child = name.rpartition(".")
                setattr(merged.get_submodule(parent), child, dense)
            else:
                own.weight = torch.nn.Parameter(own.weight + 0.5 * B @ A)
        return merged

    return merge
