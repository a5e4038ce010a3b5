"""The selective scan and the operations around it in a layer: one signature, several backends.

    reference.py   the definition: a plain loop in any dtype. Every backend is tested against it;
                   operations that a backend lacks come from here.
    cpu/           fused Numba kernels that never materialise a (b, l, d, n) tensor
    triton/        our own kernels for a GPU; nothing is compiled at installation
    cuda.py        the kernels of mamba-ssm and causal-conv1d, called directly

`backend_name` chooses by device and dtype: the CPU uses cpu, float64 uses reference. A GPU uses
triton with gradients; without, cuda if its packages are installed, else triton. (On an H200, triton
trained on forked states in 0.62 to 0.81 of cuda's time, and read long rows without gradients in 1.1
to 1.7 of it.) The environment variable `MAMBA_SCAN_BACKEND` overrides the choice. The first call
reports the backend on standard error.

A new backend is a module here. It needs `selective_scan` and `causal_conv1d`, and may have
`linear`, `softplus_linear`, `rms_norm`, `fused_mixer`, `fused_layers` and `PACKED`. It is added to
`BACKENDS`, `_INSTALL`, `backend_name` and tests/mamba_lm/test_selective_scan.py.

Letters: b batch, l length, d d_inner, n d_state, w d_conv, m d_model, r dt_rank.
"""

import functools
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from common.errors import UserError, warn
from mamba_lm.selective_scan import reference

BACKENDS = ("reference", "cpu", "cuda", "triton")
_INSTALL = {
    "cpu": "pip install numba",
    "cuda": "see the commands in requirements-cuda.txt, or use triton, which needs none",
    "triton": "pip install triton, of the version that torch's CUDA build asks for",
}


class LayerWeights(NamedTuple):
    """All weights of a pre-norm layer, for `fused_layers` and `fused_mixer`."""

    norm_eps: float
    bcdt_rms_eps: float | None  # of Falcon-Mamba's RMS norm on B, C and dt; None without it
    norm: Tensor  # (m,)
    in_proj: Tensor  # (2 d, m)
    in_proj_bias: Tensor | None  # (2 d,)
    conv: Tensor  # (d, 1, w)
    conv_bias: Tensor | None  # (d,)
    x_proj: Tensor  # (r + 2 n, d)
    dt_proj: Tensor  # (d, r)
    dt_proj_bias: Tensor  # (d,)
    A_log: Tensor  # (d, n)
    D: Tensor  # (d,)
    out_proj: Tensor  # (m, d)
    out_proj_bias: Tensor | None  # (m,)


def selective_scan(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor | None = None,
    initial_state: Tensor | None = None,
    lengths: Tensor | None = None,
    return_state: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Discretise and run the recurrence of Gu & Dao 2023 (section 3.2, algorithm 2).

        h_t = exp(Δ_t A) ∘ h_{t-1} + Δ_t B_t x_t        y_t = (C_t h_t + D x_t) ∘ SiLU(z_t)

    Differentiable in every tensor; gradients pass through the initial and the final state. The
    recurrence runs in float32, for float64 inputs in float64. (The cuda backend reads all inputs in
    x's dtype if no state is given and no gradient passes through the final one.)

    Args:
        x: (b, l, d) the input.
        delta: (b, l, d) the step size Δ, after the softplus.
        A: (d, n) the decay rates, negative.
        B: (b, l, n) the input matrix.
        C: (b, l, n) the output matrix.
        D: (d,) the skip connection.
        z: (b, l, d) the gate; None without a gate.
        initial_state: (b, n, d) the state before the first position; None is zeros.
        lengths: (b,) int64, the number of real positions of each row, padded on the right; clamped
            to 0..l; None if no row is padded. Padding does not change the state and gives y = 0.
        return_state: False if the final state is not needed, which saves work in some backends.

    If the backend reads packed rows (`reads_packed`), they may follow each other without padding:
    x, delta, z (tokens, d) and B, C (tokens, n), with lengths that add up to tokens.

    Returns:
        y, in x's shape and dtype, and the final state (b, n, d) in float32, or in float64 for
        float64 inputs; None instead of the state if `return_state` is False.

    Raises:
        ValueError: if shapes do not fit. The kernels do not check them.
        UserError: if `MAMBA_SCAN_BACKEND` asks for a backend that cannot run, or the chosen backend
            is not installed.
    """
    (*tokens, d), n = x.shape, A.shape[-1]
    b = _rows(x, lengths)
    _check_shapes(
        delta=(delta, (*tokens, d)),
        A=(A, (d, n)),
        B=(B, (*tokens, n)),
        C=(C, (*tokens, n)),
        D=(D, (d,)),
        z=(z, (*tokens, d)),
        initial_state=(initial_state, (b, n, d)),
        lengths=(lengths, (b,)),
    )
    scan = _backend(x).selective_scan
    return scan(x, delta, A, B, C, D, z, initial_state, lengths, return_state)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_tail: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """SiLU of the depthwise causal convolution of x (b, l, d) with weight (d, w), bias (d,).

    initial_tail (b, w - 1, d) are the inputs before x, zeros by default. If the backend reads
    packed rows (`reads_packed`), x may be (tokens, d), with the rows' lengths (b,). Returns a
    tensor of x's shape and dtype, differentiable in every tensor. Raises ValueError if shapes do
    not fit.
    """
    d, w, b = x.shape[-1], weight.shape[-1], _rows(x, lengths)
    _check_shapes(
        weight=(weight, (d, w)),
        bias=(bias, (d,)),
        initial_tail=(initial_tail, (b, w - 1, d)),
        lengths=(lengths, (b,)),
    )
    packed = {"lengths": lengths} if x.dim() == 2 else {}
    return _backend(x).causal_conv1d(x, weight, bias, initial_tail, **packed)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x (..., k) times weight (out, k) transposed, plus bias (out,) if given: (..., out)."""
    return _operation("linear", x)(x, weight, bias)


def softplus_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return softplus(y) = log(1 + e^y) of y = `linear(x, weight, bias)`."""
    return _operation("softplus_linear", x)(x, weight, bias)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return the RMS norm of x (..., m): x over the root of its mean square, computed in x's dtype,
    then times weight (m,) in weight's dtype."""
    return _operation("rms_norm", x)(x, weight, eps)


def fused_mixer(u: Tensor, weights: Callable[[], LayerWeights | None]) -> Tensor | None:
    """Compute the output (b, l, m) of a layer's mixer from its normed input u, without a state, in
    one kernel. Returns None if the backend has no such kernel, or if `weights` returns None because
    the weights do not say everything (adapters, hooks)."""
    return _operation("fused_mixer", u)(u, weights)


def fused_layers(weights: Sequence[LayerWeights]) -> Callable | None:
    """Make a function that computes one token through all layers; None if the backend has none.

    The function takes residual (b, 1, m) and, for each layer, conv (b, w - 1, d) and ssm (b, n, d),
    and returns them after the token; or None if it does not support its arguments. With
    in_sequence=True the b tokens are consecutive tokens of one row: the given states are
    (1, w - 1, d) and (1, n, d), the returned ones are those after each token. The function is valid
    until the weights are moved to other memory.
    """
    return _operation("fused_layers", weights[0].in_proj)(weights)


def reads_packed(x: Tensor) -> bool:
    """Whether the backend of x reads packed rows: of different lengths, without padding."""
    return getattr(_backend(x), "PACKED", False)


def backend_name(device: torch.device, dtype: torch.dtype) -> str:
    """Choose the backend for tensors of this device and dtype.

    Raises:
        UserError: if `MAMBA_SCAN_BACKEND` is not one of `BACKENDS` or does not support the tensors.
    """
    asked = os.environ.get("MAMBA_SCAN_BACKEND")
    if asked:
        if asked not in BACKENDS:
            raise UserError(f"MAMBA_SCAN_BACKEND={asked}: use one of {', '.join(BACKENDS)}")
        misplaced = {
            "cpu": device.type != "cpu",
            "triton": device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1",
        }
        if misplaced.get(asked) or (asked != "reference" and dtype == torch.float64):
            raise UserError(f"MAMBA_SCAN_BACKEND={asked}: not for {dtype} on {device.type}")
        return asked
    if dtype == torch.float64:
        return "reference"
    if device.type != "cuda":
        return "cpu"
    return "triton" if torch.is_grad_enabled() else _inference_backend()


@functools.cache
def _inference_backend() -> str:
    """Choose the backend for a GPU without gradients: cuda if its packages work, else triton."""
    if all(importlib.util.find_spec(name) for name in ("mamba_ssm", "causal_conv1d")):
        try:
            load_backend("cuda")
            return "cuda"
        except UserError as error:
            warn(str(error))
    return "triton"


@functools.cache
def load_backend(name: str) -> ModuleType:
    """Import a backend and report it on standard error.

    Raises:
        UserError: if it is not installed; the message names the install command.
    """
    try:
        module = importlib.import_module(f"mamba_lm.selective_scan.{name}")
    except ImportError as error:
        raise UserError(
            f"the {name} selective scan is not installed ({error}): {_INSTALL[name]}"
        ) from error
    tqdm.write(f"selective scan: {name} backend", file=sys.stderr)  # above a progress bar
    return module


def _rows(x: Tensor, lengths: Tensor | None) -> int:
    if x.dim() == 3:
        return x.shape[0]
    if not reads_packed(x):
        raise ValueError("this backend does not read packed rows; give x as (b, l, d)")
    # Not checked on a GPU, where the host would have to wait for the sum.
    if lengths is None or (
        x.device.type == "cpu" and (lengths.sum() != x.shape[0] or (lengths < 0).any())
    ):
        raise ValueError(f"lengths do not add up to the {x.shape[0]} packed tokens")
    return len(lengths)


def _check_shapes(**tensors: tuple[Tensor | None, tuple[int, ...]]) -> None:
    for name, (tensor, shape) in tensors.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")


def _operation(name: str, x: Tensor) -> Callable:
    """The backend's implementation, or the reference's if it has none."""
    return getattr(_backend(x), name, None) or getattr(reference, name)


def _backend(x: Tensor) -> ModuleType:
    return load_backend(backend_name(x.device, x.dtype))
