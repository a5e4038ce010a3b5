"""The cpu and triton backends against the float64 reference: outputs, states and gradients.

The Triton kernels run in its interpreter, which tests that they are correct; test_triton.py tests
that they compile.
"""

import importlib
import itertools
import math
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

import mamba_lm.selective_scan as selective_scan_module
from common.errors import UserError
from mamba_lm.selective_scan import backend_name, cpu, load_backend, reference
from mamba_lm.selective_scan.cpu import products
from mamba_lm.selective_scan.cpu import threads as cpu_threads

# (l, d, n): lengths around the kernels' chunks of 32 steps, widths around their tiles of 128.
SHAPES = [
    (1, 1, 1), (1, 96, 16), (3, 63, 7), (3, 130, 1), (63, 130, 16), (63, 1, 7), (33, 128, 4),
    (100, 63, 16), (100, 96, 1), (257, 63, 7), (257, 1, 16), (257, 130, 1),
]  # fmt: skip
# Around Triton's tiles of 8 steps and 128 states times channels.
TRITON_SHAPES = [
    (1, 5, 16), (3, 1, 16), (3, 13, 7), (33, 5, 16), (66, 1, 16), (9, 40, 1), (17, 3, 50),
    (8, 2, 200),
]  # fmt: skip
# gate, state, padded
PLAIN, FULL = (False, False, False), (True, True, True)
OPTIONS = [PLAIN, (True, False, False), (False, True, True), FULL]
SCANS = [
    *(("cpu", *case) for case in itertools.product(SHAPES, OPTIONS)),
    *(("triton", shape, FULL) for shape in TRITON_SHAPES),
    *(("triton", shape, PLAIN) for shape in TRITON_SHAPES if shape[0] < 66),
]
NAMES = ("x", "delta", "A", "B", "C", "D", "z", "initial_state")


@pytest.fixture(autouse=True)
def threads():
    """Set one thread, so that the reference's many small steps are fast; a test may set more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(params=["cpu", "triton"])
def kernels(request):
    """A backend with its own kernels."""
    if request.param == "triton":
        pytest.importorskip("triton")
    return importlib.import_module(f"mamba_lm.selective_scan.{request.param}")


@pytest.fixture
def d(kernels):
    """A number of channels that is not a multiple of a tile; small for the slow interpreter."""
    return 70 if kernels is cpu else 11


@pytest.fixture(name="l")
def steps(kernels):
    """A number of steps that is not a multiple of a tile."""
    return 20 if kernels is cpu else 11


def scan_inputs(b, l, d, n, gate=True, state=True):
    torch.manual_seed(1000 * l + 10 * d + n)
    return {
        "x": torch.randn(b, l, d),
        "delta": F.softplus(3 * torch.randn(b, l, d) - 2),
        "A": -torch.exp(torch.randn(d, n)),
        "B": torch.randn(b, l, n),
        "C": torch.randn(b, l, n),
        "D": torch.randn(d),
        "z": 3 * torch.randn(b, l, d) if gate else None,
        "initial_state": torch.randn(b, n, d) if state else None,
    }


def conv_inputs(b, l, d, w, bias=True, tail=True):
    torch.manual_seed(1000 * l + 10 * d + w)
    return {
        "x": torch.randn(b, l, d),
        "weight": torch.randn(d, w),
        "bias": torch.randn(d) if bias else None,
        "initial_tail": torch.randn(b, w - 1, d) if tail else None,
    }


def leaves(inputs, dtype):
    """Copies of the inputs that require gradients."""
    return {
        name: None if v is None else v.detach().clone().to(dtype).requires_grad_()
        for name, v in inputs.items()
    }


def gradients(function, inputs, *, dtype=torch.float32, **others):
    """The results of function(**inputs), and the gradients of all inputs for random gradients of
    the results."""
    inputs = leaves(inputs, dtype)
    results = function(**inputs, **others)
    results = results if isinstance(results, tuple) else (results,)
    generator = torch.Generator().manual_seed(7)
    grads = [torch.randn(result.shape, generator=generator).to(result) for result in results]
    torch.autograd.backward(results, grads)
    found = {f"result {i}": result.detach() for i, result in enumerate(results)}
    return found | {name: v.grad for name, v in inputs.items() if v is not None}


def assert_close(got, want, name="", tolerance=2e-5):
    """Check that the largest error is at most `tolerance` times the largest entry."""
    assert got.shape == want.shape, name
    if want.numel():
        error, scale = (got.double() - want).abs().max().item(), want.abs().max().item()
        assert error <= tolerance * scale, f"{name}: {error:.2e} of {scale:.2e}"


def assert_all_close(got, want, tolerance=2e-5):
    assert got.keys() == want.keys()
    for name in want:
        assert_close(got[name], want[name], name, tolerance)


def assert_all_equal(got, want):
    assert got.keys() == want.keys()
    for name in want:
        assert torch.equal(got[name], want[name]), name


@pytest.mark.parametrize("kernels, shape, options", SCANS, indirect=["kernels"], ids=str)
def test_scan_matches_the_reference(kernels, shape, options):
    (l, d, n), (gate, state, padded) = shape, options
    inputs = scan_inputs(3, l, d, n, gate, state)
    lengths = torch.tensor([l, l // 2, 0]) if padded else None
    got = gradients(kernels.selective_scan, inputs, lengths=lengths)
    want = gradients(reference.selective_scan, inputs, lengths=lengths, dtype=torch.float64)
    assert_all_close(got, want)
    assert got["result 1"].dtype == torch.float32
    with torch.no_grad():
        y, final_state = kernels.selective_scan(**inputs, lengths=lengths)
    assert torch.equal(y, got["result 0"]) and torch.equal(final_state, got["result 1"])


@pytest.mark.parametrize("lengths", [None, [30, 9, 0]], ids=str)
def test_few_rows_are_split_into_spans(lengths, monkeypatch):
    """The Triton kernels read the spans of a row in parallel if the rows do not fill a GPU."""
    triton = pytest.importorskip("mamba_lm.selective_scan.triton")
    inputs = scan_inputs(3, 30, 11, 5)
    lengths = None if lengths is None else torch.tensor(lengths)
    want = gradients(reference.selective_scan, inputs, lengths=lengths, dtype=torch.float64)
    monkeypatch.setattr(triton, "PROGRAMS", 12)
    monkeypatch.setattr(triton, "LEAST_SPAN", 8)
    carries, carry = [], triton._carry
    monkeypatch.setattr(triton, "_carry", lambda *a, **k: carries.append(a) or carry(*a, **k))
    assert_all_close(gradients(triton.selective_scan, inputs, lengths=lengths), want)
    assert [elapsed.shape[1] for _, elapsed, *_ in carries] == [4, 4]  # spans, there and back


CONV_SHAPES = [  # (l, d, w)
    (1, 63, 4), (2, 96, 4), (3, 1, 4), (100, 400, 4), (17, 130, 3), (33, 64, 1), (20, 70, 2),
    (9, 50, 5), (30, 33, 8),
]  # fmt: skip
CONVOLUTIONS = [
    *(("cpu", *case) for case in itertools.product(CONV_SHAPES, [False, True], [False, True])),
    *(("triton", shape, both, both) for shape in CONV_SHAPES for both in (False, True)),
]


@pytest.mark.parametrize("kernels, shape, bias, tail", CONVOLUTIONS, indirect=["kernels"], ids=str)
def test_convolution_matches_the_reference(kernels, shape, bias, tail):
    l, d, w = shape
    if kernels is not cpu:  # the interpreter is slow
        l, d = min(l, 40), min(d, 140)
    inputs = conv_inputs(3, l, d, w, bias, tail)
    got = gradients(kernels.causal_conv1d, inputs)
    assert_all_close(got, gradients(reference.causal_conv1d, inputs, dtype=torch.float64))


PACKED = ("x", "delta", "B", "C", "z")  # the inputs with values for every token


def one_by_one(function, lengths, d):
    """Apply `function` to each row of packed inputs separately, for comparison."""

    def apply(**inputs):
        parts = {
            name: inputs.pop(name).split(lengths) for name in PACKED if inputs.get(name) is not None
        }
        state = inputs.pop("initial_state", None), inputs.pop("initial_tail", None)
        results = []
        for row, length in enumerate(lengths):
            part = {name: values[row].unsqueeze(0) for name, values in parts.items()}
            for name, value in zip(("initial_state", "initial_tail"), state, strict=True):
                if value is not None:
                    part[name] = value[row : row + 1]
            result = function(**part, **inputs)
            results.append(result if isinstance(result, tuple) else (result,))
            assert results[-1][0].shape == (1, length, d)
        first, *others = zip(*results, strict=True)
        return torch.cat(first, dim=1).squeeze(0), *(torch.cat(other) for other in others)

    return apply


PACKED_ROWS = [  # lengths around the tiles of 32 and of 8 steps
    *(("cpu", lengths) for lengths in ([5], [1, 33, 0, 70, 2], [0, 0, 3], [32, 31, 33, 64])),
    *(("triton", lengths) for lengths in ([5], [1, 9, 0, 17, 2], [0, 0, 3], [8, 7, 9, 16])),
]


@pytest.mark.parametrize("gate, state", [(False, False), (True, True)])
@pytest.mark.parametrize("kernels, lengths", PACKED_ROWS, indirect=["kernels"], ids=str)
def test_packed_rows_match_the_reference_row_by_row(kernels, lengths, gate, state):
    d, n = 130 if kernels is cpu else 11, 5
    inputs = scan_inputs(1, sum(lengths), d, n, gate, state=False)
    inputs = {name: v[0] if name in PACKED and v is not None else v for name, v in inputs.items()}
    inputs["initial_state"] = torch.randn(len(lengths), n, d) if state else None
    want = gradients(one_by_one(reference.selective_scan, lengths, d), inputs, dtype=torch.float64)
    assert_all_close(gradients(kernels.selective_scan, inputs, lengths=torch.tensor(lengths)), want)

    inputs = conv_inputs(1, sum(lengths), d, 4, tail=False)
    inputs |= {"x": inputs["x"][0]}
    inputs["initial_tail"] = torch.randn(len(lengths), 3, d) if state else None
    want = gradients(one_by_one(reference.causal_conv1d, lengths, d), inputs, dtype=torch.float64)
    assert_all_close(gradients(kernels.causal_conv1d, inputs, lengths=torch.tensor(lengths)), want)


def test_packed_rows_need_lengths_whose_sum_fits(monkeypatch):
    inputs = scan_inputs(1, 9, 4, 2, state=False)
    packed = {name: v[0] if name in PACKED and v is not None else v for name, v in inputs.items()}
    for lengths in (None, torch.tensor([4, 4]), torch.tensor([10, -1])):
        with pytest.raises(ValueError, match="lengths do not add up to the 9 packed tokens"):
            selective_scan_module.selective_scan(**packed, lengths=lengths)
    monkeypatch.setenv("MAMBA_SCAN_BACKEND", "reference")
    with pytest.raises(ValueError, match=r"does not read packed rows"):
        selective_scan_module.selective_scan(**packed, lengths=torch.tensor([4, 5]))


def test_reference_passes_gradcheck():
    inputs = leaves(scan_inputs(2, 3, 2, 2), torch.float64)
    lengths = torch.tensor([3, 1])
    assert torch.autograd.gradcheck(
        lambda *values: reference.selective_scan(*values, lengths), tuple(inputs.values())
    )
    conv = leaves(conv_inputs(2, 3, 2, 4), torch.float64)
    assert torch.autograd.gradcheck(reference.causal_conv1d, tuple(conv.values()))


def test_reference_is_the_recurrence():
    """Two steps of one channel with one state, by hand."""

    def steps(*values):
        return torch.tensor(values, dtype=torch.float64).view(1, -1, 1)

    x, delta, B, C, z = steps(1, 3), steps(0.5, 2), steps(2, 2), steps(3, 3), steps(-1, 0.5)
    A, D, h0 = steps(-1)[0], steps(10)[0, 0], steps(4)
    h1 = math.exp(-0.5) * 4 + 0.5 * 2 * 1
    h2 = math.exp(-2.0) * h1 + 2 * 2 * 3
    y, h = reference.selective_scan(x, delta, A, B, C, D, None, h0)
    assert y.flatten().tolist() == pytest.approx([3 * h1 + 10 * 1, 3 * h2 + 10 * 3])
    assert h.item() == pytest.approx(h2)
    y, _ = reference.selective_scan(x, delta, A, B, C, D, z, h0)
    gates = [-1 / (1 + math.exp(1)), 0.5 / (1 + math.exp(-0.5))]
    assert y.flatten().tolist() == pytest.approx(
        [(3 * h1 + 10) * gates[0], (3 * h2 + 30) * gates[1]]
    )


@pytest.mark.parametrize("pieces", [[1] * 4 + [9], [8, 5], [3, 0, 10], [12, 1]], ids=str)
def test_a_scan_in_pieces_equals_one_scan(kernels, d, pieces):
    inputs = scan_inputs(2, 13, d, 5)

    def in_pieces(A, D, initial_state, **sequences):
        outputs, h = [], initial_state
        for part in zip(*(v.split(pieces, dim=1) for v in sequences.values()), strict=True):
            part = dict(zip(sequences, part, strict=True))
            y, h = kernels.selective_scan(**part, A=A, D=D, initial_state=h)
            outputs.append(y)
        return torch.cat(outputs, dim=1), h

    assert_all_close(gradients(in_pieces, inputs), gradients(kernels.selective_scan, inputs))


@pytest.mark.parametrize("pieces", [[1] * 4 + [16], [17, 3], [2, 18]], ids=str)
def test_a_convolution_in_pieces_equals_one_convolution(kernels, d, pieces):
    inputs = conv_inputs(2, 20, d, 4)

    def in_pieces(x, weight, bias, initial_tail):
        outputs, tail = [], initial_tail
        for piece in x.split(pieces, dim=1):
            outputs.append(kernels.causal_conv1d(piece, weight, bias, tail))
            tail = torch.cat([tail, piece], dim=1)[:, -3:]
        return torch.cat(outputs, dim=1)

    assert_all_close(gradients(in_pieces, inputs), gradients(kernels.causal_conv1d, inputs))


def test_empty_inputs(kernels, d):
    """Zero steps do not change the state, zero rows give zero rows; gradients pass through both."""
    inputs = scan_inputs(2, 0, d, 3)
    found = gradients(kernels.selective_scan, inputs)
    assert found["result 0"].shape == (2, 0, d)
    assert torch.equal(found["result 1"], inputs["initial_state"])
    assert found["initial_state"].any() and not found["A"].any()
    _, h = kernels.selective_scan(**scan_inputs(2, 0, d, 3, state=False))
    assert h.shape == (2, 3, d) and not h.any()
    found = gradients(kernels.selective_scan, scan_inputs(0, 5, d, 3))
    assert found["result 0"].shape == (0, 5, d) and not found["D"].any()
    found = gradients(kernels.causal_conv1d, conv_inputs(2, 0, d, 4))
    assert found["result 0"].shape == (2, 0, d) and not found["weight"].any()


def with_nan_in_padding(inputs, lengths):
    dirty = {name: v.clone() for name, v in inputs.items()}
    for name in PACKED:
        for row, length in enumerate(lengths):
            dirty[name][row, length:] = float("nan")
    return dirty


def test_padding_does_not_change_results(kernels, d, l):
    inputs, half = scan_inputs(3, l, d, 4), l // 2 + 1
    lengths = torch.tensor([l, half, 0])
    clean = gradients(kernels.selective_scan, inputs, lengths=lengths)
    dirty = with_nan_in_padding(inputs, lengths)
    assert_all_equal(gradients(kernels.selective_scan, dirty, lengths=lengths), clean)
    assert not clean["result 0"][1, half:].any()
    assert not clean["x"][1, half:].any()
    assert torch.equal(clean["result 1"][2], inputs["initial_state"][2])
    for name in ("x", "delta", "B", "C", "z"):
        inputs[name] = inputs[name][1:2, :half]
    inputs["initial_state"] = inputs["initial_state"][1:2]
    y, h = kernels.selective_scan(**inputs)
    assert torch.equal(y[0], clean["result 0"][1, :half]) and torch.equal(
        h[0], clean["result 1"][1]
    )


def test_padding_does_not_change_results_of_the_reference():
    inputs, lengths = scan_inputs(3, 20, 11, 4), torch.tensor([20, 11, 0])
    clean = gradients(reference.selective_scan, inputs, lengths=lengths)
    dirty = with_nan_in_padding(inputs, lengths)
    assert_all_equal(gradients(reference.selective_scan, dirty, lengths=lengths), clean)


def test_no_memory_is_read_before_it_is_written(kernels, d, l):
    """In deterministic mode, torch.empty fills its memory with NaN."""
    inputs, conv = scan_inputs(3, l, d, 4), conv_inputs(3, l, d, 4)
    lengths = torch.tensor([l, l // 2, 0])

    def run():
        padded = gradients(kernels.selective_scan, inputs, lengths=lengths)
        return padded, gradients(kernels.causal_conv1d, conv)

    want = run()
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(1).isnan()
        got = run()
    finally:
        torch.use_deterministic_algorithms(False)
    for found, expected in zip(got, want, strict=True):
        assert_all_equal(found, expected)


def test_views_give_the_results_of_copies(kernels, d, l):
    """Halves of one projection, parts of another, and layouts that the kernels cannot read."""
    torch.manual_seed(0)
    b, n = 2, 5
    inputs = scan_inputs(b, l, d, n, gate=False)
    projected = {
        "xz": torch.randn(b, l, 2 * d),
        "bc": torch.randn(b, l, 3 + 2 * n),
        "delta": inputs["delta"].transpose(1, 2).contiguous(),
        "A": inputs["A"],
        "D": inputs["D"],
        "h": torch.randn(d, n, b),
    }

    def from_views(backend, copy):
        def function(xz, bc, delta, A, D, h):
            (x, z), (_, B, C) = xz.chunk(2, dim=2), bc.split((3, n, n), dim=2)
            delta, h = delta.transpose(1, 2), h.permute(2, 1, 0)
            x, z, B, C, delta, h = (copy(v) for v in (x, z, B, C, delta, h))
            return backend.selective_scan(x, delta, A, B, C, D, z, h)

        return function

    got = gradients(from_views(kernels, lambda v: v), projected)
    assert_all_equal(got, gradients(from_views(kernels, torch.Tensor.contiguous), projected))
    exact = from_views(reference, lambda v: v)
    assert_all_close(got, gradients(exact, projected, dtype=torch.float64))

    def conv(xz, weight):
        x, z = xz.chunk(2, dim=2)
        return (
            kernels.causal_conv1d(x, weight, None)
            + kernels.causal_conv1d(z[:, ::2], weight, None)[:, :1]
        )

    def copied_conv(xz, weight):
        x, z = (v.contiguous() for v in xz.chunk(2, dim=2))
        z = z[:, ::2].contiguous()
        return (
            kernels.causal_conv1d(x, weight, None) + kernels.causal_conv1d(z, weight, None)[:, :1]
        )

    projected = {"xz": projected["xz"], "weight": torch.randn(d, 4)}
    assert_all_equal(gradients(conv, projected), gradients(copied_conv, projected))


def test_expanded_tensors(kernels, d):
    inputs = scan_inputs(2, 9, d, 3)
    for name in ("x", "delta", "B", "C", "z"):
        inputs[name] = inputs[name][:1, :1]
    inputs["initial_state"] = inputs["initial_state"][:1]

    def expanded(x, delta, A, B, C, D, z, initial_state):
        x, delta, B, C, z = (v.expand(2, 9, -1) for v in (x, delta, B, C, z))
        return kernels.selective_scan(x, delta, A, B, C, D, z, initial_state.expand(2, -1, -1))

    def copied(x, delta, A, B, C, D, z, initial_state):
        x, delta, B, C, z = (v.expand(2, 9, -1).contiguous() for v in (x, delta, B, C, z))
        h0 = initial_state.expand(2, -1, -1).contiguous()
        return kernels.selective_scan(x, delta, A, B, C, D, z, h0)

    assert_all_equal(gradients(expanded, inputs), gradients(copied, inputs))


@pytest.mark.parametrize("name", NAMES)
def test_nan_reaches_the_same_entries_as_in_the_reference(kernels, d, l, name):
    if kernels is not cpu and name == "A":
        pytest.skip("Triton's tiles extend beyond the row, where Δ is 0 and 0 times NaN is NaN")
    inputs = scan_inputs(3, l, d, 4)
    inputs[name].view(-1)[inputs[name].numel() // 2] = float("nan")
    got = gradients(kernels.selective_scan, inputs)
    want = gradients(reference.selective_scan, inputs, dtype=torch.float64)
    assert got["result 0"].isnan().any()
    assert_all_equal(
        {k: v.isnan() for k, v in got.items()}, {k: v.isnan() for k, v in want.items()}
    )


@pytest.mark.parametrize("w", [2, 4, 5])
@pytest.mark.parametrize("name", ["x", "weight", "bias", "initial_tail"])
def test_nan_passes_the_convolution(kernels, d, l, name, w):
    inputs = conv_inputs(3, l, d, w)
    at = d + 5 if name == "initial_tail" else inputs[name].numel() // 2
    inputs[name].view(-1)[at] = float("nan")
    got = gradients(kernels.causal_conv1d, inputs)
    want = gradients(reference.causal_conv1d, inputs, dtype=torch.float64)
    assert got["result 0"].isnan().any()
    assert_all_equal(
        {k: v.isnan() for k, v in got.items()}, {k: v.isnan() for k, v in want.items()}
    )


# Rows of a batch share weights and work space, and lanes beyond n or d are multiplied by zeros: 0
# times NaN or infinity is NaN.

SHARED = ("A", "D", "weight", "bias")


def assert_rows_are_independent(function, inputs, names, layout="full", grad=True, together=False):
    """Check that NaN or infinity in one of four rows does not change a bit of the results and
    gradients of the other rows.

    The value is put into an input of `names`, or into the factor that multiplies the output;
    `together`, for the slow interpreter, puts it into all of them at the same time, and skips -inf.
    """
    inputs = {name: v for name, v in inputs.items() if v is not None}
    l = inputs["x"].shape[1]
    inputs["factor"] = torch.ones(4, l, 1)
    settings, real = {}, None
    if layout == "padded":
        settings["lengths"] = torch.tensor([l, l - 1, 0, l // 2])
    elif layout == "packed":
        settings["lengths"] = torch.tensor([l // 2, l, 0, l - 1])
        real = torch.arange(l) < settings["lengths"][:, None]

    def apply(factor, **inputs):
        if real is not None:
            inputs = {name: v[real] if name in PACKED else v for name, v in inputs.items()}
        results = function(**inputs, **settings)
        y, *state = results if isinstance(results, tuple) else (results,)
        if real is not None:
            y = y.new_zeros(4, l, y.shape[1]).index_put(real.nonzero(as_tuple=True), y)
        return y * factor, *state

    def found(inputs):
        if grad:
            return gradients(apply, inputs)
        with torch.no_grad():
            return dict(enumerate(apply(**inputs)))

    want, names = found(inputs), [*names, "factor"]
    groups = [names] if together else [[name] for name in names]
    values = [math.nan, math.inf] if together else [math.nan, math.inf, -math.inf]
    for changed, value in itertools.product(groups, values):
        dirty = inputs | {name: inputs[name].clone() for name in changed}
        for name in changed:
            dirty[name][1, 7 % dirty[name].shape[1], 0] = value
        for key, got in found(dirty).items():
            same = key in SHARED or torch.equal(got[[0, 2, 3]], want[key][[0, 2, 3]])
            assert same, f"{value} in {changed} changes {key}"


ROW_INPUTS = ("x", "delta", "B", "C", "z", "initial_state")
INDEPENDENT = [
    *itertools.product(["cpu"], [1, 3, 5, 7, 16, 17, 33], [131, 130], ["full", "padded", "packed"]),
    *itertools.product(["triton"], [5], [3, 4], ["full", "padded", "packed"]),
    *itertools.product(["reference"], [5], [3, 4], ["full", "padded"]),
]
quiet = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # Triton's interpreter


@quiet
@pytest.mark.parametrize("kernels, n, d, layout", INDEPENDENT, indirect=["kernels"])
def test_rows_of_a_scan_are_independent(kernels, n, d, layout):
    inputs = scan_inputs(4, 36 if kernels is cpu else 9, d, n)
    together = kernels is not cpu  # the interpreter is slow
    assert_rows_are_independent(
        kernels.selective_scan, inputs, ROW_INPUTS, layout, together=together
    )


@quiet
@pytest.mark.parametrize("n", [1, 3, 5, 7, 16, 17, 33])
@pytest.mark.parametrize("kernels", ["reference", "cpu", "triton"], indirect=True)
def test_rows_of_a_step_are_independent(kernels, d, n):
    inputs = scan_inputs(4, 1, d, n)
    together = kernels is not cpu
    assert_rows_are_independent(
        kernels.selective_scan, inputs, ROW_INPUTS, grad=False, together=together
    )


@quiet
def test_rows_in_spans_are_independent(monkeypatch):
    triton = pytest.importorskip("mamba_lm.selective_scan.triton")
    monkeypatch.setattr(triton, "PROGRAMS", 12)
    monkeypatch.setattr(triton, "LEAST_SPAN", 8)
    assert_rows_are_independent(
        triton.selective_scan, scan_inputs(4, 17, 3, 5), ROW_INPUTS, together=True
    )


@quiet
@pytest.mark.parametrize("w", [2, 4, 5])
@pytest.mark.parametrize(
    "kernels, d, layout",
    [
        *itertools.product(["cpu"], [385, 64], ["full", "packed"]),
        *itertools.product(["triton"], [19], ["full", "packed"]),
        ("reference", 19, "full"),
    ],
    indirect=["kernels"],
)
def test_rows_of_a_convolution_are_independent(kernels, w, d, layout):
    inputs = conv_inputs(4, 12, d, w)
    names, together = ("x", "initial_tail"), kernels is not cpu
    assert_rows_are_independent(kernels.causal_conv1d, inputs, names, layout, together=together)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("l, k, out", [(1, 33, 7), (8, 33, 7), (9, 33, 130), (20, 768, 768)])
def test_rows_of_products_and_norms_are_independent(l, k, out, grad):
    torch.manual_seed(0)
    inputs = {"x": torch.randn(4, l, k), "weight": torch.randn(out, k), "bias": torch.randn(out)}
    assert_rows_are_independent(cpu.linear, inputs, ["x"], grad=grad)
    assert_rows_are_independent(cpu.softplus_linear, inputs, ["x"], grad=grad)
    norm = {"x": inputs["x"], "weight": torch.randn(k)}
    assert_rows_are_independent(lambda **v: cpu.rms_norm(**v, eps=1e-5), norm, ["x"], grad=grad)


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_lengths_are_clamped_to_the_row(backend, monkeypatch):
    if backend == "triton":
        pytest.importorskip("triton")
    monkeypatch.setenv("MAMBA_SCAN_BACKEND", backend)
    inputs, scan = scan_inputs(3, 9, 5, 3), selective_scan_module.selective_scan
    got = gradients(scan, inputs, lengths=torch.tensor([14, -3, 5]))
    assert_all_equal(got, gradients(scan, inputs, lengths=torch.tensor([9, 0, 5])))


def test_lengths_of_another_shape_are_an_error():
    conv = conv_inputs(2, 9, 5, 4)
    for x in (conv["x"], conv["x"][0]):
        with pytest.raises(ValueError, match=r"lengths has shape \(2, 1\), expected \(2,\)"):
            selective_scan_module.causal_conv1d(**conv | {"x": x}, lengths=torch.tensor([[4], [5]]))


EXTREMES = [
    {"delta": 1e4}, {"delta": 1e30}, {"delta": 1e-30}, {"delta": 0.0},
    {"A": -1e30}, {"A": -1e-30}, {"A": -1e30, "delta": 1e-30}, {"A": -1e30, "delta": 1e30},
    {"z": 100.0}, {"z": -100.0}, {"z": 1e30}, {"z": -1e30},
    {"x": 1e30}, {"x": -1e30}, {"x": 1e-30}, {"B": 1e30}, {"C": 1e30}, {"D": 1e30},
    {"initial_state": 1e30}, {"initial_state": -1e30, "A": -1e30},
]  # fmt: skip


@pytest.mark.parametrize("extremes", EXTREMES, ids=str)
def test_extreme_inputs_stay_finite(kernels, d, l, extremes):
    """If the float64 result fits into float32, the kernels' result is finite and correct."""
    inputs = scan_inputs(2, l, d, 4)
    for name, value in extremes.items():
        inputs[name] = torch.where(torch.rand_like(inputs[name]) < 0.3, value, inputs[name])
    got = gradients(kernels.selective_scan, inputs)
    want = gradients(reference.selective_scan, inputs, dtype=torch.float64)
    for name, exact in want.items():
        fits = exact.abs() < 1e37
        assert got[name][fits].isfinite().all(), name
        assert_close(got[name][fits], exact[fits], name, tolerance=1e-4)


@pytest.mark.parametrize("openmp", [True, False])
def test_same_bits_on_any_number_of_threads(openmp, threads, monkeypatch):
    """On torch's OpenMP threads, and on our own pool if torch has another runtime."""
    if not openmp:
        monkeypatch.setattr(cpu_threads, "_load_openmp", lambda: None)
    elif cpu_threads._load_openmp() is None:
        pytest.skip("this torch has no GNU OpenMP")
    lengths = torch.tensor([40] * 15 + [3])
    scan, conv = scan_inputs(16, 40, 130, 16), conv_inputs(16, 40, 130, 4)

    def run(count):
        threads(count)
        conv_found = gradients(cpu.causal_conv1d, conv)
        return gradients(cpu.selective_scan, scan, lengths=lengths), conv_found

    first = run(1)
    for count in (1, 2, 2, 3):
        for got, want in zip(run(count), first, strict=True):
            assert_all_equal(got, want)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 4e-3)])
@pytest.mark.parametrize("rows", [(1,), (2, 1), (3,), (4,), (1, 7), (32,), (33,)])
@pytest.mark.parametrize("out, k", [(1, 1), (80, 96), (301, 768)])
@pytest.mark.parametrize("bias", [True, False])
def test_products_of_few_rows(rows, out, k, bias, dtype, tolerance, threads):
    threads(2)
    torch.manual_seed(0)
    wide = torch.randn(*rows, 2 * k, dtype=dtype)
    weight = torch.randn(out, k, dtype=dtype)
    offset = torch.randn(out, dtype=dtype) if bias else None
    for x in (wide[..., :k], wide[..., k:].contiguous()):
        with torch.no_grad():
            got = cpu.linear(x, weight, offset)
        exact = F.linear(x.double(), weight.double(), offset.double() if bias else None)
        assert got.shape == (*rows, out) and got.dtype == dtype
        assert_close(got.double(), exact, tolerance=tolerance)
    weight.requires_grad_()
    assert torch.equal(cpu.linear(x, weight, offset), F.linear(x, weight, offset))
    assert cpu.linear(x, weight, offset).requires_grad


@pytest.mark.skipif(products._onednn_linear is None, reason="this torch was built without oneDNN")
@pytest.mark.parametrize("rows", [(33,), (48,), (256,), (257,), (3, 181)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_products_with_a_large_weight(rows, bias, monkeypatch):
    """Outputs and gradients against float64; oneDNN, which caches every size, gets few sizes."""
    torch.manual_seed(0)
    inputs = {"x": torch.randn(*rows, 768), "weight": torch.randn(768, 768)}
    if bias:
        inputs["bias"] = torch.randn(768)
    sizes = []

    def counted(x, *others, product=products._onednn_linear):
        sizes.append(len(x))
        return product(x, *others)

    monkeypatch.setattr(products, "_onednn_linear", counted)
    got = gradients(cpu.linear, inputs)
    assert_all_close(got, gradients(reference.linear, inputs, dtype=torch.float64))
    assert sizes and all(size in range(16, 257, 16) for size in sizes)
    assert_all_equal(gradients(cpu.linear, inputs), got)

    wide = torch.randn(*rows, 2 * 768)
    frozen = {"weight": inputs["weight"], "bias": inputs.get("bias")}
    half = gradients(lambda wide: cpu.linear(wide[..., 768:], **frozen), {"wide": wide})
    want = cpu.linear(wide[..., 768:].contiguous(), **frozen)
    assert torch.equal(half["result 0"], want)
    assert not half["wide"][..., :768].any()
    assert torch.equal(half["wide"][..., 768:], got["x"])  # from the same random gradients


def test_products_without_onednn(monkeypatch):
    x, weight = torch.randn(40, 768), torch.randn(768, 768)
    monkeypatch.setattr(products, "_onednn_linear", None)
    assert torch.equal(cpu.linear(x, weight), F.linear(x, weight))


@pytest.mark.parametrize("shape", [(1, 1, 5), (3, 11, 33), (70, 768), (0, 4)], ids=str)
def test_rms_norm(shape, threads, monkeypatch):
    """Against the reference in float64; the same bits on any number of threads."""
    monkeypatch.setattr(cpu_threads, "_PARALLEL_THRESHOLD", 0)
    torch.manual_seed(0)
    x, weight = torch.randn(shape) * torch.logspace(-3, 2, shape[-1]), torch.randn(shape[-1])
    inputs = {"x": x, "weight": weight}
    got = gradients(cpu.rms_norm, inputs, eps=1e-5)
    assert_all_close(got, gradients(reference.rms_norm, inputs, eps=1e-5, dtype=torch.float64))
    threads(3)
    assert_all_equal(gradients(cpu.rms_norm, inputs, eps=1e-5), got)
    mixed = cpu.rms_norm(x, weight.bfloat16(), 1e-5)
    assert torch.equal(mixed, reference.rms_norm(x, weight.bfloat16(), 1e-5))


@pytest.mark.parametrize("shape", [(1, 1, 5), (3, 11, 33), (70, 400), (0, 4)], ids=str)
def test_softplus_linear(shape, threads, monkeypatch):
    """Every entry against the reference in float64; the same bits on any number of threads."""
    monkeypatch.setattr(cpu_threads, "_PARALLEL_THRESHOLD", 0)
    torch.manual_seed(0)
    d = shape[-1]
    x, weight = torch.randn(*shape[:-1], 3), torch.randn(d, 3)
    inputs = {"x": x, "weight": weight, "bias": torch.linspace(-30, 30, d)}
    got = gradients(cpu.softplus_linear, inputs)
    want = gradients(reference.softplus_linear, inputs, dtype=torch.float64)
    assert_all_close(got, want)
    y = want["result 0"]
    torch.testing.assert_close(got["result 0"].double(), y, rtol=3e-5, atol=0)  # small values too
    threads(3)
    assert_all_equal(gradients(cpu.softplus_linear, inputs), got)
    half = cpu.softplus_linear(**{name: v.bfloat16() for name, v in inputs.items()})
    assert half.dtype == torch.bfloat16
    assert_close(half, y, tolerance=2e-2)


@pytest.mark.parametrize("x", [-80.0, -20.0, -7.0, -1.3, -1.2, 0.0, 3.0, 30.0, 200.0])
def test_the_derivative_of_softplus_is_precise(x):
    """It is computed from y = softplus(x) as 1 - e^-y, which loses digits for small y."""
    bias, x = torch.tensor([x], requires_grad=True), torch.tensor([x], dtype=torch.float64)
    cpu.softplus_linear(torch.zeros(1, 1), torch.zeros(1, 1), bias).backward(torch.ones(1, 1))
    torch.testing.assert_close(bias.grad.double(), x.sigmoid(), rtol=2e-6, atol=0)


def test_kernels_check_types():
    """Kernels get addresses: another dtype or device would be read wrongly."""
    inputs = scan_inputs(3, 7, 5, 2)
    lengths = torch.tensor([2, 7, 4])
    want = cpu.selective_scan(**inputs, lengths=lengths)
    got = cpu.selective_scan(**inputs, lengths=lengths.int())
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    for dtype in (torch.float64, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            got = cpu.selective_scan(**inputs, lengths=lengths)
        finally:
            torch.set_default_dtype(torch.float32)
        assert got[1].dtype == torch.float32 and torch.equal(got[0], want[0])
    with pytest.raises(TypeError, match=r"do not take torch\.float64"):
        cpu_threads.run_kernel(cpu.scan_step, torch.ones(2, dtype=torch.float64), jobs=1, work=1)


def test_products_of_wrong_shapes_raise_the_errors_of_torch():
    weight = torch.ones(3, 4)
    with torch.no_grad():
        for x, bias in ((torch.ones(1, 5), None), (torch.ones(1, 4), torch.ones(2))):
            with pytest.raises(RuntimeError):
                cpu.linear(x, weight, bias)
        with torch.autocast("cpu", torch.bfloat16):
            assert cpu.linear(torch.ones(1, 4), weight).dtype == torch.bfloat16


def test_two_python_threads_in_parallel(threads):
    threads(2)
    jobs = [scan_inputs(4, 50 + i, 130, 16) for i in range(6)]
    want = [gradients(cpu.selective_scan, inputs) for inputs in jobs]
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(gradients, cpu.selective_scan, inputs) for inputs in jobs]
        for future, expected in zip(futures, want, strict=True):
            assert_all_equal(future.result(timeout=60), expected)


class ScanInWorker(Dataset):
    """Scans in a worker. The inputs are made before, because torch's threads hang after a fork."""

    def __init__(self, inputs):
        self.inputs = inputs

    def __len__(self):
        return 2

    def __getitem__(self, index):
        torch.set_num_threads(1 + index)
        return cpu.selective_scan(**self.inputs)


@pytest.mark.skipif(sys.platform != "linux", reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_worker(threads):
    """A forked process does not have its parent's threads: the parent's pool would never finish."""
    threads(2)
    inputs = scan_inputs(4, 50, 130, 16)
    want_y, want_h = cpu.selective_scan(**inputs)
    loader = DataLoader(
        ScanInWorker(inputs), batch_size=None, num_workers=1, multiprocessing_context="fork",
        timeout=30,
    )  # fmt: skip
    found = list(loader)
    assert len(found) == 2
    for y, h in found:
        assert torch.equal(y, want_y) and torch.equal(h, want_h)


def test_bfloat16_inputs_give_bfloat16_outputs_and_a_float32_state(kernels, d):
    inputs = scan_inputs(2, 30, d, 5)
    keep = ("A", "initial_state")
    low = {name: v if name in keep else v.bfloat16() for name, v in inputs.items()}
    low = {name: v.requires_grad_() for name, v in low.items()}
    y, h = kernels.selective_scan(**low)
    assert y.dtype == torch.bfloat16 and h.dtype == torch.float32
    want_y, want_h = reference.selective_scan(**{name: v.double() for name, v in low.items()})
    assert_close(y, want_y.detach(), "y", tolerance=5e-3)
    assert_close(h, want_h.detach(), "final state")
    (y.float().sum() + h.sum()).backward()
    assert all(v.grad.dtype == v.dtype for v in low.values())

    conv = {name: v.bfloat16() for name, v in conv_inputs(2, 30, d, 4).items()}
    y = kernels.causal_conv1d(**conv)
    assert y.dtype == torch.bfloat16
    want = reference.causal_conv1d(**{name: v.double() for name, v in conv.items()})
    assert_close(y, want, "convolution", tolerance=1e-2)


@pytest.fixture
def no_backend_chosen(monkeypatch):
    monkeypatch.delenv("MAMBA_SCAN_BACKEND", raising=False)
    selective_scan_module._inference_backend.cache_clear()
    yield
    selective_scan_module._inference_backend.cache_clear()


def test_the_backend_follows_device_and_dtype(no_backend_chosen, monkeypatch):
    assert backend_name(torch.device("cpu"), torch.float32) == "cpu"
    assert backend_name(torch.device("cuda"), torch.float64) == "reference"
    monkeypatch.setenv("MAMBA_SCAN_BACKEND", "reference")
    assert backend_name(torch.device("cuda"), torch.float32) == "reference"


@pytest.mark.parametrize(
    "mamba_ssm, backend, warning",
    [
        ("absent", "triton", ""),
        ("works", "cuda", ""),
        (
            "broken",
            "triton",
            "warning: the cuda selective scan is not installed (undefined symbol)",
        ),
    ],
)
def test_the_backend_for_a_gpu(no_backend_chosen, monkeypatch, capsys, mamba_ssm, backend, warning):
    """cuda for inference if mamba-ssm is installed and works, else triton."""

    def load(name):
        assert name == "cuda"
        if mamba_ssm == "broken":
            raise UserError("the cuda selective scan is not installed (undefined symbol): see")

    found = None if mamba_ssm == "absent" else object()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    monkeypatch.setattr(selective_scan_module, "load_backend", load)
    for _ in range(2):
        with torch.no_grad():
            assert backend_name(torch.device("cuda", 1), torch.bfloat16) == backend
        assert backend_name(torch.device("cuda", 1), torch.bfloat16) == "triton"  # with gradients
    assert capsys.readouterr().err.startswith(warning)


def test_triton_on_the_cpu_is_an_error_without_its_interpreter(monkeypatch):
    monkeypatch.setenv("MAMBA_SCAN_BACKEND", "triton")
    assert backend_name(torch.device("cpu"), torch.float32) == "triton"  # in its interpreter
    with pytest.raises(UserError, match=r"triton: not for torch\.float64"):
        backend_name(torch.device("cpu"), torch.float64)
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(UserError, match=r"triton: not for torch\.float32 on cpu"):
        backend_name(torch.device("cpu"), torch.float32)


def test_one_line_reports_the_backend(monkeypatch, capsys):
    monkeypatch.setenv("MAMBA_SCAN_BACKEND", "reference")
    load_backend.cache_clear()
    for _ in range(3):
        y, h = selective_scan_module.selective_scan(**scan_inputs(1, 3, 2, 2))
    assert capsys.readouterr().err == "selective scan: reference backend\n"
    want_y, want_h = reference.selective_scan(**scan_inputs(1, 3, 2, 2))
    assert torch.equal(y, want_y) and torch.equal(h, want_h)


def test_the_error_for_an_unknown_backend_lists_the_known_ones(monkeypatch):
    monkeypatch.setenv("MAMBA_SCAN_BACKEND", "tpu")
    with pytest.raises(UserError, match="use one of reference, cpu, cuda, triton"):
        selective_scan_module.causal_conv1d(torch.ones(1, 2, 3), torch.ones(3, 4), None)


def test_the_error_for_a_missing_backend_names_the_install_command(monkeypatch):
    monkeypatch.setenv("MAMBA_SCAN_BACKEND", "cpu")
    monkeypatch.setitem(sys.modules, "numba", None)
    for name in [name for name in sys.modules if name.startswith(cpu.__name__)]:
        monkeypatch.delitem(sys.modules, name)
    load_backend.cache_clear()
    with pytest.raises(UserError, match=r"cpu selective scan is not installed.*pip install numba"):
        selective_scan_module.selective_scan(**scan_inputs(1, 3, 2, 2))
