"""One token through all layers in one kernel: against float64, hooks, threads, what it is given."""

import copy
import os

import pytest
import torch
from torch import nn

from mamba_lm.models import mamba as model_module
from mamba_lm.selective_scan import cpu
from mamba_lm.selective_scan.cpu import threads as cpu_threads

VARIANTS = {
    "mamba": {},
    "odd widths": {"d_model": 33, "expand": 3},
    "several tiles": {"d_model": 150, "n_layer": 1},
    "biases": {"proj_bias": True, "conv_bias": False, "norm_eps": 0.1},
    "falcon": {"bcdt_rms_eps": 0.5},
    "convolution of two": {"d_conv": 2},
    "no convolution": {"d_conv": 1},
}
variants = pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)


@pytest.fixture
def steps(monkeypatch):
    """Whether the kernel took each token that it was asked to while a test runs."""
    taken = []

    def fused_layers(weights):
        step = actual(weights)
        return step and (lambda *args, **settings: seen(step(*args, **settings)))

    def seen(stepped):
        taken.append(stepped is not None)
        return stepped

    actual = model_module.fused_layers
    monkeypatch.setattr(model_module, "fused_layers", fused_layers)
    return taken


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def halves(state) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """The convolution's tails and h of each layer: what a Mamba-1 state consists of."""
    n_layer = len(state.tensors) // 2
    return state.tensors[:n_layer], state.tensors[n_layer:]


def tensors(state) -> dict[str, torch.Tensor]:
    return {str(place): tensor for place, tensor in enumerate(state.tensors) if tensor.numel()}


def one_more(model, token: torch.Tensor, state) -> tuple[torch.Tensor, object]:
    """The logits that follow one token more, token (b, 1), and the state."""
    hidden, state = model.stepper()(token[:, 0], state)
    return model.lm_head(hidden), state


def prompt(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(0, 31, (rows, 6))
    return ids[:, :5], ids[:, 5:]


@variants
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7, 32, "triton"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
@torch.no_grad()
def test_equals_float64(
    changes, rows, dtype, tolerance, make_model, assert_near, steps, monkeypatch
):
    model = make_model(**changes).to(dtype)
    exact = copy.deepcopy(model).double()
    on_triton = rows == "triton"  # rows are alike there
    if on_triton:
        pytest.importorskip("triton")
    prefix, token = prompt(3 if on_triton else rows)
    _, state = model(prefix)
    if on_triton:
        monkeypatch.setenv("MAMBA_SCAN_BACKEND", "triton")
    logits, after = one_more(model, token, state)
    monkeypatch.delenv("MAMBA_SCAN_BACKEND", raising=False)
    wanted, wanted_after = exact(token, state.to(torch.float64))
    wanted = wanted[:, 0]
    assert steps == [True]
    assert_near(logits, wanted, tolerance)
    assert_near(tensors(after), tensors(wanted_after), tolerance)
    tails, hs = halves(after)
    assert {t.dtype for t in tails} == {dtype}
    assert {t.dtype for t in hs} == {torch.float32}


@torch.no_grad()
def test_many_rows_take_the_general_path(make_model, steps):
    prefix, token = prompt(33)
    model = make_model()
    _, state = model(prefix)
    logits, _ = one_more(model, token, state)
    assert torch.equal(logits, model(token, state)[0][:, 0])
    assert steps == [False]


def test_gradients_take_the_general_path(make_model, steps):
    prefix, token = prompt(2)
    model = make_model()
    logits, _ = one_more(model, token, model(prefix)[1])
    logits.sum().backward()
    assert steps == [False]
    assert model.backbone.layers[0].mixer.A_log.grad.abs().max() > 0


@torch.no_grad()
def test_formats_that_it_does_not_know_take_the_general_path(make_model, assert_near, steps):
    prefix, token = prompt(2)
    model = make_model()
    _, state = model(prefix)
    wanted, _ = one_more(model, token, state)
    model.backbone.layers[0].mixer.A_log.data = model.backbone.layers[0].mixer.A_log.double()
    assert_near(one_more(model, token, state)[0], wanted, 1e-5)
    assert steps == [True]  # none for the second: its layers have no such kernel
    residuals_in_bfloat16 = make_model(residual_in_fp32=False).bfloat16()
    _, state = residuals_in_bfloat16(prefix)
    one_more(residuals_in_bfloat16, token, state)
    assert steps == [True, False]


@torch.no_grad()
def test_hooks_and_replaced_modules_are_called(make_model, assert_near, steps):
    """What reads Δ, and what LoRA puts in a projection's place, sees every token."""
    prefix, token = prompt(2)
    model = make_model()
    _, state = model(prefix)
    wanted, _ = one_more(model, token, state)
    seen = []
    mixer = model.backbone.layers[0].mixer
    handle = mixer.delta.register_forward_hook(lambda m, i, delta: seen.append(delta))
    assert_near(one_more(model, token, state)[0], wanted, 1e-5)
    assert seen[0].shape == (2, 1, 48)
    handle.remove()
    with model.backbone.layers[1].register_forward_hook(lambda m, i, output: seen.append(output)):
        one_more(model, token, state)
    assert seen[1][0].shape == (2, 1, 24)
    hook = nn.modules.module.register_module_forward_hook
    with hook(lambda module, inputs, output: seen.append(module)):
        one_more(model, token, state)
    assert mixer.out_proj in seen
    kept = mixer.forward
    mixer.forward = lambda *args: kept(
        *args[:1], None, None, *args[3:]
    )  # as accelerate replaces it
    assert (one_more(model, token, state)[0] - wanted).abs().max() > 0.01
    del mixer.forward
    mixer.out_proj = nn.Sequential(mixer.out_proj, nn.Hardtanh(-0.1, 0.1))
    changed, _ = one_more(model, token, state)
    assert (changed - wanted).abs().max() > 0.01
    assert steps == [True]  # before the hook


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@torch.no_grad()
def test_shapes_that_do_not_fit_are_errors_not_other_memory(
    backend, make_model, steps, monkeypatch
):
    if backend == "triton":
        pytest.importorskip("triton")
    prefix, token = prompt(2)
    model = make_model()
    _, state = model(prefix)
    others = [
        model(prompt(3)[0])[1], model(prompt(1)[0])[1], make_model(d_state=4)(prefix)[1],
    ]  # fmt: skip
    monkeypatch.setenv("MAMBA_SCAN_BACKEND", backend)
    for other in others:
        with pytest.raises((RuntimeError, ValueError)):
            one_more(model, token, other)
    mixer = model.backbone.layers[1].mixer
    mixer.x_proj.weight = nn.Parameter(mixer.x_proj.weight[:-1])
    with pytest.raises((RuntimeError, ValueError)):
        one_more(model, token, state)
    assert not any(steps)


@torch.no_grad()
def test_leaves_the_given_state_as_it_was(make_model, assert_near, steps):
    prefix, token = prompt(3)
    model = make_model()
    _, state = model(prefix)
    before = {name: tensor.clone() for name, tensor in tensors(state).items()}
    first, _ = one_more(model, token, state)
    assert_near(tensors(state), before, 0)
    assert torch.equal(one_more(model, token, state)[0], first) and steps == [True, True]


@torch.no_grad()
def test_rows_know_nothing_of_each_other(make_model, steps):
    prefix, token = prompt(6)
    model = make_model()
    _, state = model(prefix)
    wanted, _ = one_more(model, token, state)
    tails, hs = halves(state)
    hs[0][2], tails[1][4] = float("nan"), float("inf")
    got, _ = one_more(model, token, state)
    others = [0, 1, 3, 5]
    assert torch.equal(got[others], wanted[others])
    assert got[2].isnan().all() and not got[4].isfinite().any()
    assert steps == [True, True]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("team", [True, False])
def test_same_bits_on_any_number_of_threads(dtype, team, make_model, threads, monkeypatch, steps):
    """On torch's threads and, where its OpenMP cannot be had, on a pool of our own, with more of
    them than there are cores, so that some come late."""
    if not team:
        monkeypatch.setattr(cpu_threads, "_load_openmp", lambda: None)
    elif cpu_threads._load_openmp() is None:
        pytest.skip("torch has no GNU OpenMP here")
    monkeypatch.setattr(cpu_threads, "_PARALLEL_THRESHOLD", 0)
    model = make_model(d_model=90, d_state=40, dt_rank=80).to(dtype)  # much in every phase
    prefix, token = prompt(5)
    threads(1)
    _, state = model(prefix)
    wanted, wanted_after = one_more(model, token, state)
    for count in (2, 3, os.cpu_count() + 3) * 30:
        threads(count)
        got, after = one_more(model, token, state)
        assert torch.equal(got, wanted)
        for name, tensor in tensors(after).items():
            assert torch.equal(tensor, tensors(wanted_after)[name]), name
    assert all(steps) and len(steps) == 91


@torch.no_grad()
def test_extreme_delta_and_gates_stay_exact(make_model, assert_near, steps):
    model = make_model()
    for block in model.backbone.layers:
        block.mixer.dt_proj.bias += torch.linspace(-60, 60, 48)
        block.mixer.in_proj.weight *= 30
        block.mixer.A_log[:, 0] = torch.linspace(-100, 100, 48)
    prefix, token = prompt(4)
    _, state = model(prefix)
    exact = copy.deepcopy(model).double()
    wanted, wanted_after = exact(token, state.to(torch.float64))
    wanted = wanted[:, 0]
    got, after = one_more(model, token, state)
    assert_near(got, wanted, 1e-4)
    assert_near(tensors(after), tensors(wanted_after), 1e-4)
    assert steps == [True]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, -1])
def test_every_nan_stays_one(bits, dtype, make_model, steps):
    """0x7FFFFFFF is the one that CUDA makes; adding to its bits gives minus zero."""
    nan = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    model = make_model().to(dtype)
    prefix, token = prompt(2)
    _, state = model(prefix)
    model.backbone.layers[0].norm.weight.copy_(nan)
    logits, after = one_more(model, token, state)
    assert logits.isnan().all() and halves(after)[0][0][:, -1].isnan().all() and steps == [True]


@torch.no_grad()
def test_other_default_formats_do_not_matter(make_model, steps):
    model = make_model()
    prefix, token = prompt(2)
    _, state = model(prefix)
    wanted, _ = one_more(model, token, state)
    for dtype in (torch.float64, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            got, _ = one_more(model, token, state)
        finally:
            torch.set_default_dtype(torch.float32)
        assert torch.equal(got, wanted)
    assert steps == [True] * 3


@torch.no_grad()
def test_an_epsilon_of_one_is_one(make_model, assert_near, steps):
    """As JSON writes it: an integer."""
    model = make_model(norm_eps=1, bcdt_rms_eps=1)
    prefix, token = prompt(2)
    _, state = model(prefix)
    wanted, _ = copy.deepcopy(model).double()(token, state.to(torch.float64))
    assert_near(one_more(model, token, state)[0], wanted[:, 0], 1e-5)
    assert steps == [True]


# Tokens of one row, one after the other


@variants
@pytest.mark.parametrize("length", [1, 2, 5, 32])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
@torch.no_grad()
def test_states_after_each_token_equal_float64(
    changes, length, dtype, tolerance, make_model, assert_near, steps
):
    model = make_model(**changes).to(dtype)
    exact = copy.deepcopy(model).double()
    state = model(prompt(1)[0])[1]
    given = {name: tensor.clone() for name, tensor in tensors(state).items()}
    ids = torch.randint(0, 31, (1, length))
    hidden, states = model.encode_each(ids[0], state)
    assert steps == [True] and states.batch_size == length
    wanted, _ = exact(ids, state.to(torch.float64))
    assert_near(model.lm_head(hidden), wanted[0], tolerance)
    for n in {1, length // 2 + 1, length}:
        _, after = exact(ids[:, :n], state.to(torch.float64))
        assert_near(tensors(states.fork(torch.tensor([n - 1]))), tensors(after), tolerance)
    assert_near(tensors(state), given, 0)
    assert {t.dtype for t in halves(states)[0]} == {dtype}


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_sequence_has_the_same_bits_on_any_number_of_threads(
    count, make_model, threads, monkeypatch, steps
):
    monkeypatch.setattr(cpu_threads, "_PARALLEL_THRESHOLD", 0)
    model = make_model(d_model=90, d_state=40, dt_rank=80)
    state, ids = model(prompt(1)[0])[1], torch.randint(0, 31, (20,))
    threads(1)
    wanted, wanted_states = model.encode_each(ids, state)
    threads(count)
    for _ in range(10):
        got, states = model.encode_each(ids, state)
        assert torch.equal(got, wanted)
        for name, tensor in tensors(states).items():
            assert torch.equal(tensor, tensors(wanted_states)[name]), name
    assert all(steps)


@torch.no_grad()
def test_sequences_that_it_does_not_take(make_model, monkeypatch, steps):
    model, ids = make_model(), torch.randint(0, 31, (40,))
    state = model(prompt(1)[0])[1]
    assert model.encode_each(ids[:33], state) is None
    assert model.encode_each(ids[:0], state) is None
    assert model.encode_each(ids[:5], model(prompt(2)[0])[1]) is None, "states of two rows"
    with torch.enable_grad():
        assert model.encode_each(ids[:5], state) is None
    states = 5 * sum(h[0].numel() * 4 for h in halves(state)[1])
    monkeypatch.setattr(cpu, "SEQUENCE_BYTES", states)
    assert model.encode_each(ids[:5], state) is not None
    monkeypatch.setattr(cpu, "SEQUENCE_BYTES", states - 1)
    assert model.encode_each(ids[:5], state) is None
    assert steps == [False] * 4 + [True, False]
    with model.backbone.layers[1].register_forward_hook(lambda *args: None):
        assert model.encode_each(ids[:5], state) is None


@torch.no_grad()
def test_triton_takes_no_sequence(make_model, monkeypatch, steps):
    pytest.importorskip("triton")
    model = make_model()
    state = model(prompt(1)[0])[1]
    monkeypatch.setenv("MAMBA_SCAN_BACKEND", "triton")
    assert model.encode_each(torch.tensor([1, 2]), state) is None and steps == [False]
