"""The selective scan and the other operations of a layer: one signature, several backends.

    reference   a plain loop in any dtype: the definition, and operations that other backends lack
    cpu         fused Numba kernels that never make a (b, l, d, n) tensor
    cuda        the kernels of mamba-ssm and causal-conv1d, called directly
    triton      kernels of our own for a GPU, with nothing to compile at installation

A tensor's device chooses the backend. On a GPU it is triton; without gradients cuda, where those
packages are installed. (On an H200, triton trained on forked states in 0.62 to 0.81 of cuda's time,
and read long rows without gradients in 1.1 to 1.7 of it.) `MAMBA_SCAN_BACKEND` overrides the
choice. The first call reports on stderr which
backend runs. Letters: b batch, l length, d d_inner, n d_state, w d_conv.
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
    """All of a pre-norm layer, for `fused_layers`; m is the residual's width, r dt's rank."""

    norm_eps: float
    bcdt_rms_eps: float | None  # Falcon-Mamba's RMS norm on B, C and dt; None: no such norm
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

    Shapes: x, delta, z (b, l, d); A (d, n), negative; B, C (b, l, n); D (d,); initial_state
    (b, n, d); lengths (b,) int64, the number of real positions of each right-padded row: l where it
    is more, 0 where it is less. Positions from a row's length on leave the state alone and give
    y = 0. Where the backend `reads_packed`, rows may also be back to back: x, delta, z
    (tokens, d) and B, C (tokens, n), where lengths sum to tokens.

    Returns y in x's shape and dtype and the final state (b, n, d), in float32 or float64; None in
    its place without return_state, which spares some backends work.
    Differentiable in every tensor, the initial and the final state included. Raises ValueError on
    shapes that do not fit: the kernels trust them.
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

    initial_tail (b, w - 1, d): the inputs that came before x, zeros by default. Where the
    backend `reads_packed`, x may be (tokens, d), rows of `lengths` (b,) back to back. Returns what
    has x's shape, differentiable in every tensor. Raises ValueError on shapes that do not fit.
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
    """x (..., k) times weight (out, k), plus bias (out,), if any."""
    return _operation("linear", x)(x, weight, bias)


def softplus_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """log(1 + e^y) of y = `linear(x, weight, bias)`."""
    return _operation("softplus_linear", x)(x, weight, bias)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (..., m) over the root of its mean square, computed in x's dtype, times weight (m,), in
    weight's dtype."""
    return _operation("rms_norm", x)(x, weight, eps)


def fused_mixer(u: Tensor, weights: Callable[[], LayerWeights | None]) -> Tensor | None:
    """The output (b, l, m) of a layer's mixer for its normed input u, read from no state and with
    none kept, if the backend has one kernel for that. `weights` gives the layer's, if they say all.
    """
    return _operation("fused_mixer", u)(u, weights)


def fused_layers(weights: Sequence[LayerWeights]) -> Callable | None:
    """A function that takes one token through all layers in one kernel, if the backend has it.

    From residual (b, 1, m) and, of each layer, conv (b, w - 1, d) and ssm (b, n, d), it returns
    their values after the token, or None where it cannot read them. With in_sequence=True the
    tokens are those of one row, each read after the one before it; given states are (1, w - 1, d)
    and (1, n, d), returned ones those after each token. It may be used until weights are moved.
    """
    return _operation("fused_layers", weights[0].in_proj)(weights)


def reads_packed(x: Tensor) -> bool:
    """Whether the backend of x reads rows of unlike lengths back to back, without padding."""
    return getattr(_backend(x), "PACKED", False)


def backend_name(device: torch.device, dtype: torch.dtype) -> str:
    """The backend that serves tensors of this device and dtype.

    Raises UserError where `MAMBA_SCAN_BACKEND` names none of `BACKENDS` or one that cannot serve.
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
    """On a GPU: cuda where its packages are installed, and work; triton where they are not."""
    if all(importlib.util.find_spec(name) for name in ("mamba_ssm", "causal_conv1d")):
        try:
            load_backend("cuda")
            return "cuda"
        except UserError as error:
            warn(str(error))
    return "triton"


@functools.cache
def load_backend(name: str) -> ModuleType:
    """Import a backend and report it on stderr. UserError names the command that installs it."""
    try:
        module = importlib.import_module(f"mamba_lm.selective_scan.{name}")
    except ImportError as error:
        raise UserError(
            f"the {name} selective scan is not installed ({error}): {_INSTALL[name]}"
        ) from error
    tqdm.write(f"selective scan: {name} backend", file=sys.stderr)  # above a bar, if there is one
    return module


def _rows(x: Tensor, lengths: Tensor | None) -> int:
    if x.dim() == 3:
        return x.shape[0]
    if not reads_packed(x):
        raise ValueError("this backend reads (b, l, d) only")
    # On a GPU, the host would have to wait for the sum.
    if lengths is None or (
        x.device.type == "cpu" and (lengths.sum() != x.shape[0] or (lengths < 0).any())
    ):
        raise ValueError(f"lengths do not make up the {x.shape[0]} packed tokens")
    return len(lengths)


def _check_shapes(**tensors: tuple[Tensor | None, tuple[int, ...]]) -> None:
    for name, (tensor, shape) in tensors.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")


def _operation(name: str, x: Tensor) -> Callable:
    """The backend's own, where it has one."""
    return getattr(_backend(x), name, None) or getattr(reference, name)


def _backend(x: Tensor) -> ModuleType:
    return load_backend(backend_name(x.device, x.dtype))
