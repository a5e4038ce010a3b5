"""One token through all layers without gradients: three Triton kernels per layer and four products.

A launch takes as long as such a kernel runs. So each kernel computes, in float32, everything
between two matrix products: residual and norm; convolution; Δ, the scan's step and the gate.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from mamba_lm.selective_scan.common import layers_fit, states_fit
from mamba_lm.selective_scan.triton.tiles import load, store

CONV_CHANNELS, SCAN_TILE = 256, 2048  # in a program: channels; channels times states


@triton.jit
def norm_step(residual, added, weight, summed, normed, eps, m, WIDTH: tl.constexpr):
    """Compute summed = residual + added and normed = its RMS norm, one row (m,) per program. Rounds
    as `reference.rms_norm`."""
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    in_m = at < m
    x = load(residual + row * m + at, in_m)
    if added is not None:
        x += load(added + row * m + at, in_m)
    tl.store(summed + row * m + at, x, mask=in_m)
    normal = x * tl.rsqrt(tl.sum(x * x, axis=0) / m + eps)
    normal = normal.to(normed.dtype.element_ty).to(tl.float32)
    store(normed + row * m + at, normal * load(weight + at, in_m), in_m)


@triton.jit
def conv_step(
    x, xs, weight, bias, tail, y, new_tail, d, WIDTH: tl.constexpr, CHANNELS: tl.constexpr
):
    """Compute y (b, d) and the new tail (b, WIDTH - 1, d), which ends with x (b, d), from weight
    (d, WIDTH)."""
    row = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    in_d = channels < d
    newest = load(x + row * xs + channels, in_d)
    total = newest * load(weight + channels * WIDTH + WIDTH - 1, in_d)
    if bias is not None:
        total += load(bias + channels, in_d)
    for k in tl.static_range(WIDTH - 1):
        at = row * (WIDTH - 1) + k
        value = load(tail + at * d + channels, in_d)
        total += value * load(weight + channels * WIDTH + k, in_d)
        if k > 0:
            store(new_tail + (at - 1) * d + channels, value, in_d)
    if WIDTH > 1:
        store(new_tail + (row * (WIDTH - 1) + WIDTH - 2) * d + channels, newest, in_d)
    store(y + row * d + channels, total * tl.sigmoid(total), in_d)


@triton.jit
def _log1p(x):
    """log(1 + x) with full precision for small x too (Goldberg 1991, theorem 4)."""
    more = 1.0 + x
    return tl.where(more == 1.0, x, tl.log(more) * (x / (more - 1.0)))


@triton.jit
def scan_step(
    x, dt, dt_bias, A_log, B, C, bcs, D, z, zs, h, y, new_h, d, n: tl.constexpr,
    STATES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Compute Δ = softplus(dt + dt_bias), the step from h to new_h (b, n, d), and y (b, d) with its
    gate."""
    row = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    states = tl.arange(0, STATES)
    in_d, in_n = channels < d, states < n
    is_own = in_n[:, None] & in_d[None]
    own = row * n * d + states[:, None] * d + channels[None]
    delta = load(dt + row * d + channels, in_d) + load(dt_bias + channels, in_d)
    delta = tl.where(delta > 20.0, delta, _log1p(tl.exp(tl.minimum(delta, 20.0))))
    x_t, z_t = load(x + row * d + channels, in_d), load(z + row * zs + channels, in_d)
    A = -tl.exp(load(A_log + channels[None] * n + states[:, None], is_own))
    state = tl.exp(delta[None] * A) * load(h + own, is_own)
    state += (delta * x_t)[None] * load(B + row * bcs + states, in_n)[:, None]
    tl.store(new_h + own, state, mask=is_own)
    total = tl.sum(state * load(C + row * bcs + states, in_n)[:, None], axis=0)
    total += load(D + channels, in_d) * x_t
    store(y + row * d + channels, total * z_t * tl.sigmoid(z_t), in_d)


def fused_layers(weights):
    """Argument and result: `mamba_lm.selective_scan.fused_layers`.

    Without gradients and sequences; for weights of one dtype and a residual in float32.
    """
    dtype = weights[0].in_proj.dtype
    given = [v for layer in weights for v in layer[2:] if v is not None]
    if not layers_fit(weights) or any(v.dtype != dtype or not v.is_contiguous() for v in given):
        return None

    def step(residual, convs, ssms, in_sequence=False):
        if (
            in_sequence
            or torch.is_grad_enabled()
            or torch.is_autocast_enabled(residual.device.type)
            or residual.dtype != torch.float32
            or len(residual) == 0
            or not states_fit(weights, len(residual), convs, ssms)
        ):
            return None
        residual, output, new_convs, new_ssms = residual[:, 0].contiguous(), None, [], []
        with torch.cuda.device_of(residual):  # Triton launches on the current device
            for layer, conv, ssm in zip(weights, convs, ssms, strict=True):
                residual, u = _add_and_norm(residual, output, layer)
                output, conv, ssm = _mix(u, layer, conv, ssm)
                new_convs.append(conv)
                new_ssms.append(ssm)
        return (residual + output)[:, None], tuple(new_convs), tuple(new_ssms)

    return step


def _add_and_norm(residual, output, layer):
    """Return residual + output, and its norm in the dtype of the weights."""
    b, m = residual.shape
    summed, normed = torch.empty_like(residual), residual.new_empty(b, m, dtype=layer.norm.dtype)
    width = triton.next_power_of_2(m)
    norm_step[(b,)](
        residual, output, layer.norm, summed, normed, layer.norm_eps, m, width, num_warps=4
    )
    return summed, normed


def _mix(u, layer, conv, ssm):
    """Return the mixer's output (b, m), the new conv (b, w - 1, d) and the new ssm (b, n, d)."""
    (d, _, w), n, r = layer.conv.shape, layer.A_log.shape[1], layer.dt_proj.shape[1]
    b, conv, ssm = len(u), conv.contiguous(), ssm.contiguous()
    xz = F.linear(u, layer.in_proj, layer.in_proj_bias)
    x, z = xz.chunk(2, dim=1)  # (b, d) each
    mixed, new_conv = u.new_empty(b, d), torch.empty_like(conv)
    conv_step[(b, triton.cdiv(d, CONV_CHANNELS))](
        x, x.stride(0), layer.conv, layer.conv_bias, conv, mixed, new_conv, d, w, CONV_CHANNELS
    )
    parts = F.linear(mixed, layer.x_proj).split((r, n, n), dim=1)
    if layer.bcdt_rms_eps is not None:
        parts = [F.rms_norm(v, v.shape[-1:], eps=layer.bcdt_rms_eps) for v in parts]
    dt, B, C = parts
    y, new_ssm = torch.empty_like(mixed), torch.empty_like(ssm)
    states = triton.next_power_of_2(n)
    channels = max(SCAN_TILE // states, 1)
    scan_step[(b, triton.cdiv(d, channels))](
        mixed, F.linear(dt, layer.dt_proj), layer.dt_proj_bias, layer.A_log, B, C, B.stride(0),
        layer.D, z, z.stride(0), ssm, y, new_ssm, d, n, states, channels,
    )  # fmt: skip
    return F.linear(y, layer.out_proj, layer.out_proj_bias), new_conv, new_ssm
