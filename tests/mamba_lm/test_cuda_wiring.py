"""The CUDA backend around stand-ins for the kernels, against the float64 reference.

The stand-ins keep the kernels' contract and no more: their signatures, the layouts and dtypes that
they refuse, no initial state in the scan, no padding, no gradient through the last state. What a
GPU alone can show, that the real kernels compute what the stand-ins do, is not shown here.
"""

import copy
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from common.errors import UserError
from mamba_lm.models.mamba import MambaConfig, MambaLM
from mamba_lm.selective_scan import load_backend, reference

CUDA = "mamba_lm.selective_scan.cuda"
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SCAN_NAMES = ("x", "delta", "A", "B", "C", "D", "z", "initial_state")


def scan_kernel(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False,
    return_last_state=False,
):  # fmt: skip
    """selective_scan_fn as a sum over all pairs of steps: no recurrence, unlike the reference."""
    (b, d, l), n = u.shape, A.shape[1]
    assert l > 0 and n <= 256
    assert delta_bias is None and not delta_softplus
    assert u.dtype in KERNEL_DTYPES
    assert all(v.dtype == u.dtype for v in (delta, B, C, z) if v is not None)
    assert A.dtype == D.dtype == torch.float32
    assert delta.shape == u.shape and (z is None or z.shape == u.shape)
    assert A.shape == (d, n) and D.shape == (d,) and B.shape == C.shape == (b, n, l)
    elapsed = delta.float().cumsum(2)
    since = (elapsed.unsqueeze(3) - elapsed.unsqueeze(2)).tril()  # (b, d, t, s)
    decay = torch.exp(since.unsqueeze(-1) * A[:, None, None]) * torch.ones(l, l).tril().unsqueeze(
        -1
    )
    h = torch.einsum("bdtsn,bns,bds->bdtn", decay, B.float(), delta.float() * u.float())
    y = torch.einsum("bdtn,bnt->bdt", h, C.float()) + D[:, None] * u.float()
    y = (y if z is None else y * F.silu(z.float())).to(u.dtype)
    return (y, h[:, :, -1].detach()) if return_last_state else y


def step_kernel(
    state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False,
    state_batch_indices=None,
):  # fmt: skip
    """selective_state_update: writes the new state over the old one, without gradients."""
    assert not torch.is_grad_enabled() or not any(v.requires_grad for v in (state, x, dt, A, B, C))
    assert dt_bias is not None and D is not None  # 2.3.2.post1 raises TypeError on None
    assert not dt_softplus and state_batch_indices is None
    (b, d), n = x.shape, A.shape[1]
    assert state.shape == (b, d, n) and dt.shape == x.shape and A.shape == (d, n)
    assert B.shape == C.shape == (b, n) and D.shape == dt_bias.shape == (d,)
    dt = dt.float() + dt_bias
    state.mul_(torch.exp(dt[:, :, None] * A)).add_(
        (dt * x.float())[:, :, None] * B[:, None].float()
    )
    y = (state * C[:, None].float()).sum(2) + D * x.float()
    return (y if z is None else y * F.silu(z.float())).to(x.dtype)


def conv_kernel(
    x, weight, bias=None, seq_idx=None, initial_states=None, return_final_states=False,
    final_states_out=None, activation=None,
):  # fmt: skip
    """causal_conv1d_fn as a sum over shifted windows."""
    (b, d, l), w = x.shape, weight.shape[1]
    assert l > 0 and 2 <= w <= 4 and weight.shape == (d, w)
    assert x.dtype in KERNEL_DTYPES and weight.dtype in KERNEL_DTYPES
    assert bias is None or (bias.dtype == weight.dtype and bias.shape == (d,))
    assert seq_idx is None and not return_final_states and activation == "silu"
    channel_last = x.stride(1) == 1 and x.stride(2) > 1
    assert channel_last or x.stride(2) == 1
    if channel_last:
        assert d % 8 == 0 and x.stride(0) % 8 == 0 and x.stride(2) % 8 == 0
    before = x.new_zeros(b, d, w - 1)
    if initial_states is not None:
        assert channel_last and initial_states.dtype == x.dtype and initial_states.stride(1) == 1
        assert initial_states.shape == before.shape
        before = initial_states
    window = torch.cat([before, x], dim=2).float()
    y = sum(weight[:, k, None].float() * window[:, :, k : k + l] for k in range(w))
    return F.silu(y if bias is None else y + bias[:, None].float()).to(x.dtype)


def inner_kernel(
    xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight,
    out_proj_bias, A, B=None, C=None, D=None, delta_bias=None, B_proj_bias=None, C_proj_bias=None,
    delta_softplus=True, checkpoint_lvl=1, b_rms_weight=None, c_rms_weight=None, dt_rms_weight=None,
    b_c_dt_rms_eps=1e-6,
):  # fmt: skip
    """mamba_inner_fn by the stand-ins of the kernels that it fuses."""
    assert out_proj_bias is None  # 2.3.2.post1 gives it a gradient of the wrong shape
    assert all(v is None for v in (B, C, B_proj_bias, C_proj_bias))
    assert all(v is None for v in (b_rms_weight, c_rms_weight, dt_rms_weight))
    assert delta_softplus and A.dtype == D.dtype == delta_bias.dtype == torch.float32
    assert xz.dim() == 3 and xz.stride(-1) == 1
    assert conv1d_weight.dim() == 3 and conv1d_weight.shape[1] == 1
    x, z = xz.chunk(2, dim=1)
    x = conv_kernel(x, conv1d_weight.squeeze(1), conv1d_bias, activation="silu")  # (b, d, l)
    r, n = delta_proj_weight.shape[1], A.shape[1]
    dt, B, C = F.linear(x.transpose(1, 2), x_proj_weight).split((r, n, n), dim=2)
    delta = F.softplus(F.linear(dt, delta_proj_weight) + delta_bias).transpose(1, 2)
    y = scan_kernel(x, delta.to(x.dtype), A, B.transpose(1, 2), C.transpose(1, 2), D, z)
    return F.linear(y.transpose(1, 2), out_proj_weight)


@pytest.fixture
def kernels(monkeypatch):
    """Stand-ins in sys.modules, a fresh cuda module, and the arguments of every kernel call."""
    torch.manual_seed(0)
    calls = SimpleNamespace(scan=[], step=[], conv=[], inner=[])

    def recorded(kernel, log):
        def call(*args, **kwargs):
            log.append((args, kwargs))
            return kernel(*args, **kwargs)

        return call

    interface = "mamba_ssm.ops.selective_scan_interface"
    update = "mamba_ssm.ops.triton.selective_state_update"
    for name in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton", interface, update):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules[interface].selective_scan_fn = recorded(scan_kernel, calls.scan)
    sys.modules[interface].mamba_inner_fn = recorded(inner_kernel, calls.inner)
    sys.modules[update].selective_state_update = recorded(step_kernel, calls.step)
    monkeypatch.setitem(sys.modules, "causal_conv1d", ModuleType("causal_conv1d"))
    sys.modules["causal_conv1d"].causal_conv1d_fn = recorded(conv_kernel, calls.conv)
    monkeypatch.setitem(sys.modules, CUDA, None)  # restored, or removed, after the test
    del sys.modules[CUDA]
    load_backend.cache_clear()
    yield calls
    load_backend.cache_clear()


def scan_inputs(l, b=3, d=8, n=5, gate=True, state=True, dtype=torch.float32):
    """Random arguments of selective_scan, leaves that require gradients."""
    torch.manual_seed(l)
    inputs = {
        "x": torch.randn(b, l, d),
        "delta": F.softplus(torch.randn(b, l, d) - 2),
        "A": -torch.exp(torch.randn(d, n)),
        "B": torch.randn(b, l, n),
        "C": torch.randn(b, l, n),
        "D": torch.randn(d),
        "z": torch.randn(b, l, d) if gate else None,
        "initial_state": torch.randn(b, n, d) if state else None,
    }
    keep = ("A", "D", "initial_state")
    return {
        name: None if v is None else v.to(torch.float32 if name in keep else dtype).requires_grad_()
        for name, v in inputs.items()
    }


def doubled(inputs):
    """The same values in float64, as leaves of their own."""
    return {
        name: None if v is None else v.detach().double().requires_grad_()
        for name, v in inputs.items()
    }


def assert_close(got, want, name, tolerance=2e-5):
    assert got.shape == want.shape, name
    error = (got.double() - want).abs().max().item() if want.numel() else 0.0
    scale = want.abs().max().item() if want.numel() else 0.0
    assert error <= tolerance * scale + 1e-30, f"{name}: {error:.2e} of {scale:.2e}"


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("state", [False, True], ids=["fresh", "carried"])
@pytest.mark.parametrize("gate", [False, True], ids=["ungated", "gated"])
@pytest.mark.parametrize("l", [1, 3, 40, 70])
def test_outputs_state_and_every_gradient(kernels, l, gate, state, padded):
    backend = load_backend("cuda")
    inputs = scan_inputs(l, gate=gate, state=state)
    exact = doubled(inputs)
    lengths = torch.tensor([l, l // 2, 0]) if padded else None

    want_y, want_h = reference.selective_scan(**exact, lengths=lengths)
    y, h = backend.selective_scan(**inputs, lengths=lengths)
    assert_close(y, want_y, "y")
    assert_close(h, want_h, "final state")

    gy, gh = torch.randn_like(y), torch.randn_like(h)
    torch.autograd.backward([want_y, want_h], [gy.double(), gh.double()])
    torch.autograd.backward([y, h], [gy, gh])
    for name in SCAN_NAMES:
        if inputs[name] is not None:
            assert_close(inputs[name].grad, exact[name].grad, f"gradient of {name}")


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("state", [False, True], ids=["fresh", "carried"])
@pytest.mark.parametrize("gate", [False, True], ids=["ungated", "gated"])
@pytest.mark.parametrize("l", [1, 3, 70])
def test_without_gradients(kernels, l, gate, state, padded):
    backend = load_backend("cuda")
    inputs = scan_inputs(l, gate=gate, state=state)
    before = inputs["initial_state"].detach().clone() if state else None
    lengths = torch.tensor([l, l // 2, 0]) if padded else None
    want_y, want_h = reference.selective_scan(**doubled(inputs), lengths=lengths)
    with torch.no_grad():
        y, h = backend.selective_scan(**inputs, lengths=lengths)
    assert_close(y, want_y, "y")
    assert_close(h, want_h, "final state")
    assert state is False or torch.equal(inputs["initial_state"], before)
    assert (len(kernels.step), len(kernels.scan)) == ((1, 0) if l == 1 else (0, 1))


def test_no_gradient_is_lost_where_only_one_input_needs_it(kernels):
    backend = load_backend("cuda")
    for name in SCAN_NAMES:
        inputs = {k: v.detach() for k, v in scan_inputs(5).items()}
        exact = {k: v.double() for k, v in inputs.items()}
        for values, scan in ((inputs, backend.selective_scan), (exact, reference.selective_scan)):
            values[name].requires_grad_()
            y, h = scan(**values)
            (y.sum() + h.square().sum()).backward()
        assert_close(inputs[name].grad, exact[name].grad, f"gradient of {name}")


def test_a_scan_without_state_runs_whole_in_low_precision(kernels):
    inputs = scan_inputs(6, state=False, dtype=torch.bfloat16)
    with torch.no_grad():
        y, h = load_backend("cuda").selective_scan(**inputs)
    (u, *_, z), kwargs = kernels.scan[0]
    assert u.dtype == torch.bfloat16 and z is not None and kwargs == {"return_last_state": True}
    assert y.dtype == torch.bfloat16 and h.dtype == torch.float32
    want_y, want_h = reference.selective_scan(**doubled(inputs))
    assert_close(y, want_y, "y", tolerance=1e-2)
    assert_close(h, want_h, "final state")


@pytest.mark.parametrize("state, grad", [(True, False), (True, True), (False, True)])
def test_a_state_passes_in_float32(kernels, state, grad):
    inputs = scan_inputs(6, state=state, dtype=torch.bfloat16)
    with torch.set_grad_enabled(grad):
        y, h = load_backend("cuda").selective_scan(**inputs)
    assert kernels.scan[0][0][0].dtype == torch.float32
    assert y.dtype == torch.bfloat16 and h.dtype == torch.float32
    _, want_h = reference.selective_scan(**doubled(inputs))
    assert_close(h, want_h, "final state")
    if grad:
        (y.float().sum() + h.sum()).backward()
        assert all(v.grad.dtype == v.dtype for v in inputs.values() if v is not None)


def test_token_by_token_equals_whole(kernels):
    backend = load_backend("cuda")
    inputs = {k: v.detach() for k, v in scan_inputs(9).items()}
    want_y, want_h = reference.selective_scan(**{k: v.double() for k, v in inputs.items()})
    outputs, h = [], inputs.pop("initial_state")
    for t in range(9):
        step = {k: v[:, t : t + 1] if v.dim() == 3 else v for k, v in inputs.items()}
        y, h = backend.selective_scan(**step, initial_state=h)
        outputs.append(y)
    assert_close(torch.cat(outputs, dim=1), want_y, "y")
    assert_close(h, want_h, "final state")


def test_no_steps_and_no_rows(kernels):
    backend = load_backend("cuda")
    inputs = scan_inputs(0)
    y, h = backend.selective_scan(**inputs)
    assert y.shape == (3, 0, 8) and torch.equal(h, inputs["initial_state"])
    _, h = backend.selective_scan(**scan_inputs(0, state=False))
    assert h.shape == (3, 5, 8) and not h.any()
    assert backend.selective_scan(**inputs, return_state=False)[1] is None
    y, h = backend.selective_scan(**scan_inputs(4, b=0, state=False))
    assert y.shape == (0, 4, 8) and h.shape == (0, 5, 8)
    assert backend.causal_conv1d(torch.ones(2, 0, 8), torch.ones(8, 4), None).shape == (2, 0, 8)


@pytest.mark.parametrize("tail", [False, True], ids=["fresh", "carried"])
@pytest.mark.parametrize("bias", [False, True], ids=["unbiased", "biased"])
@pytest.mark.parametrize("l, d, w", [(1, 8, 4), (2, 16, 4), (9, 8, 3), (50, 24, 2)])
def test_convolution_and_every_gradient(kernels, l, d, w, bias, tail):
    torch.manual_seed(l)
    inputs = {
        "x": torch.randn(3, l, d),
        "weight": torch.randn(d, w),
        "bias": torch.randn(d) if bias else None,
        "initial_tail": torch.randn(3, w - 1, d) if tail else None,
    }
    inputs = {name: None if v is None else v.requires_grad_() for name, v in inputs.items()}
    exact = doubled(inputs)
    want = reference.causal_conv1d(**exact)
    y = load_backend("cuda").causal_conv1d(**inputs)
    assert_close(y, want, "y")
    gy = torch.randn_like(y)
    want.backward(gy.double())
    y.backward(gy)
    for name, value in inputs.items():
        if value is not None:
            assert_close(value.grad, exact[name].grad, f"gradient of {name}")
    assert len(kernels.conv) == 1


def test_convolution_takes_half_of_a_projection_where_it_lies(kernels):
    x, _z = torch.randn(2, 6, 32).chunk(2, dim=2)
    tail = torch.randn(2, 9, 16)[:, 3:6].to(torch.bfloat16)  # another dtype, not contiguous
    weight = torch.randn(16, 4)
    y = load_backend("cuda").causal_conv1d(x, weight, None, tail)
    assert kernels.conv[0][0][0].data_ptr() == x.data_ptr()
    assert_close(y, reference.causal_conv1d(x.double(), weight, None, tail), "y")


@pytest.mark.parametrize("l", [1, 6])
def test_convolution_moves_what_the_kernel_refuses(kernels, l):
    tail, weight = torch.randn(2, 3, 16), torch.randn(16, 4)
    transposed, unaligned = torch.randn(2, 16, l).transpose(1, 2), torch.randn(2, l, 21)[..., 2:18]
    for x in (transposed, unaligned):
        y = load_backend("cuda").causal_conv1d(x, weight, None, tail)
        assert_close(y, reference.causal_conv1d(x.double(), weight, None, tail), "y")


@pytest.mark.parametrize("d, w", [(12, 4), (8, 5), (8, 1)])
def test_convolution_of_shapes_without_a_kernel(kernels, d, w):
    x, weight, tail = torch.randn(2, 6, d), torch.randn(d, w), torch.randn(2, w - 1, d)
    y = load_backend("cuda").causal_conv1d(x, weight, None, tail)
    assert_close(y, reference.causal_conv1d(x.double(), weight, None, tail), "y")
    assert not kernels.conv


def test_a_forked_state_trains_the_model_as_the_reference_does(kernels, monkeypatch):
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=32, d_model=16, n_layer=2, d_state=4)
    model = MambaLM(config)
    contexts, questions = torch.randint(0, 32, (2, 7)), torch.randint(0, 32, (5, 4))
    mask = torch.arange(7) < torch.tensor([[7], [2]])

    def loss_and_gradients(backend):
        monkeypatch.setenv("MAMBA_SCAN_BACKEND", backend)
        model.zero_grad()
        _, state = model(contexts, mask=mask, logits_at=torch.zeros(2, 7, dtype=torch.bool))
        forked = state.fork(torch.tensor([0, 1, 1, 0, 1]))
        hidden, _ = model.encode(questions, forked, keep_state=False)
        logits = model.lm_head(hidden)
        loss = F.cross_entropy(logits.flatten(0, 1), questions.flatten())
        loss.backward()
        return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}

    loss, gradients = loss_and_gradients("cuda")
    want_loss, want_gradients = loss_and_gradients("reference")
    assert kernels.scan and kernels.conv
    assert_close(loss, want_loss.double(), "loss")
    for name, gradient in gradients.items():
        assert_close(gradient, want_gradients[name].double(), name, tolerance=1e-4)


@pytest.mark.parametrize("state", [False, True], ids=["fresh", "carried"])
def test_without_a_state_to_return(kernels, state):
    """Then no steps are added behind, and without a state that goes in the scan stays as it is."""
    inputs = scan_inputs(6, state=state)
    exact = doubled(inputs)
    lengths = torch.tensor([6, 3, 0])
    want, _ = reference.selective_scan(**exact, lengths=lengths)
    y, h = load_backend("cuda").selective_scan(**inputs, lengths=lengths, return_state=False)
    assert h is None
    assert_close(y, want, "y")
    gy = torch.randn_like(y)
    want.backward(gy.double())
    y.backward(gy)
    for name in SCAN_NAMES:
        if inputs[name] is not None:
            assert_close(inputs[name].grad, exact[name].grad, f"gradient of {name}")
    u = kernels.scan[0][0][0]
    assert u.shape[2] == 6 + (5 if state else 0)


@pytest.mark.parametrize("A", [-1e-3, -16.0, -1e4, -1e6])
def test_a_state_enters_by_steps_whatever_its_decay(kernels, A):
    """What the steps take from it on the way is given before: rounded, not lost or overflown."""
    inputs = scan_inputs(2, d=4, n=16)
    inputs["A"] = torch.full_like(inputs["A"], A).requires_grad_()
    inputs["delta"] = (inputs["delta"].detach() / -A).requires_grad_()
    exact = doubled(inputs)
    y, h = load_backend("cuda").selective_scan(**inputs)
    want_y, want_h = reference.selective_scan(**exact)
    (y.sum() + h.sum()).backward()
    (want_y.sum() + want_h.sum()).backward()
    assert_close(y, want_y, "y")
    assert_close(h, want_h, "final state")
    for name in SCAN_NAMES:
        assert_close(inputs[name].grad, exact[name].grad, f"gradient of {name}")


def trained_weights(model, ids, backend, monkeypatch):
    """Loss and gradients of next-token prediction, read without a state."""
    monkeypatch.setenv("MAMBA_SCAN_BACKEND", backend)
    model.zero_grad()
    hidden, state = model.encode(ids, lengths=torch.tensor([9, 9, 4]), keep_state=False)
    assert state is None
    loss = F.cross_entropy(model.lm_head(hidden)[:, :3].flatten(0, 1), ids[:, 1:4].flatten())
    loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return loss.detach(), {name: p.grad.clone() for name, p in trained.items()}


@pytest.mark.parametrize("biased", [False, True])
def test_the_fused_mixer_where_no_state_is_wanted(kernels, monkeypatch, biased):
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=32, d_model=16, n_layer=2, d_state=4, proj_bias=biased)
    model, ids = MambaLM(config), torch.randint(0, 32, (3, 9))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    loss, gradients = trained_weights(model, ids, "cuda", monkeypatch)
    assert len(kernels.inner) == 2 and not kernels.scan and not kernels.conv
    want_loss, want_gradients = trained_weights(model, ids, "reference", monkeypatch)
    assert_close(loss, want_loss.double(), "loss")
    for name, gradient in gradients.items():
        assert_close(gradient, want_gradients[name].double(), name, tolerance=1e-4)


@pytest.mark.parametrize("why", ["hook on Δ", "adapter", "RMS norm", "wide convolution"])
def test_the_fused_mixer_is_left_where_it_would_be_wrong(kernels, monkeypatch, why):
    torch.manual_seed(0)
    changes = {"RMS norm": {"bcdt_rms_eps": 1e-6}, "wide convolution": {"d_conv": 5}}
    config = MambaConfig(vocab_size=32, d_model=16, n_layer=1, d_state=4, **changes.get(why, {}))
    model, ids, seen = MambaLM(config), torch.randint(0, 32, (3, 9)), []
    mixer = model.backbone.layers[0].mixer
    if why == "hook on Δ":
        mixer.delta.register_forward_hook(lambda *args: seen.append(args[2]))
    if why == "adapter":
        mixer.x_proj = torch.nn.Sequential(mixer.x_proj)
    loss, gradients = trained_weights(model, ids, "cuda", monkeypatch)
    want_loss, _ = trained_weights(model, ids, "reference", monkeypatch)
    assert not kernels.inner and kernels.scan
    assert_close(loss, want_loss.double(), "loss")
    assert bool(seen) == (why == "hook on Δ")
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer:UserWarning")
@pytest.mark.parametrize(
    "targets",
    [
        *([name] for name in ("in_proj", "x_proj", "dt_proj", "out_proj", "conv1d")),
        ["in_proj", "x_proj", "dt_proj", "out_proj"],
    ],
    ids=" ".join,
)
def test_an_adapter_is_seen_on_every_way_of_reading(
    kernels, monkeypatch, targets, make_model, add_lora, merge_by_hand, read_all_ways
):
    """The kernels of whole layers read raw weights: they are left, and the scan's own are not."""
    plain = make_model(n_layer=1, d_model=8, d_state=4, dt_rank=2)
    model = copy.deepcopy(plain)
    add_lora(model, *targets)
    merged = merge_by_hand(model, plain)
    wanted = read_all_ways(merged, 1)
    monkeypatch.setenv("MAMBA_SCAN_BACKEND", "cuda")
    got = read_all_ways(model, 1)
    for way, value in wanted.items():
        assert_close(got[way], value.double(), way)
    assert not kernels.inner and kernels.scan and kernels.step
    ids = torch.randint(0, 31, (3, 9))
    loss, gradients = trained_weights(model, ids, "cuda", monkeypatch)
    want_loss, want_gradients = trained_weights(model, ids, "reference", monkeypatch)
    assert_close(loss, want_loss.double(), "loss")
    assert len(gradients) == 2 * len(targets)
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 0
        assert_close(gradient, want_gradients[name].double(), name, tolerance=1e-4)


@pytest.mark.parametrize("missing", ["mamba_ssm", "causal_conv1d"])
def test_a_missing_package_names_the_requirements_file(kernels, monkeypatch, missing):
    for name in [name for name in sys.modules if name.split(".")[0] == missing]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=rf"cuda selective scan.*{missing}.*requirements-cuda\.txt"):
        load_backend("cuda")
