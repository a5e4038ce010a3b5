"""The cuda backend: the kernels of mamba-ssm 2.3 and causal-conv1d 1.7, extended to carry a state.

mamba-ssm's Mamba-1 scan starts from zero, has no padding, and gives no gradient through its last
state. These exact identities add all three (h0 is the initial state, e_i a unit vector):

    in         n steps in front with Δ = ε. With B = e_i, step i adds ε u_i to column i of h, which
               then decays by exp(ε A_i) in each of the n - 1 - i later steps. So u_i is column i of
               h0, times exp(-ε A_i (n - 1 - i)) / ε.
    out        n steps at the end with Δ = 0 do not change h. With C = e_i, the output of step i,
               which is differentiable, is column i of h.
    padding    Δ = 0 does not change h.

Limits of the kernels: n <= 256, float32, float16 or bfloat16. Tensors come as (b, l, d) and states
as (b, n, d); inside, they are (b, d, l) and (b, d, n).
"""

import torch
import torch.nn.functional as F
from causal_conv1d import causal_conv1d_fn
from mamba_ssm.ops.selective_scan_interface import mamba_inner_fn, selective_scan_fn
from mamba_ssm.ops.triton.selective_state_update import selective_state_update
from torch import Tensor

from mamba_lm.selective_scan import reference
from mamba_lm.selective_scan.common import needs_grad
from mamba_lm.selective_scan.triton.step import fused_layers

__all__ = ["causal_conv1d", "fused_layers", "fused_mixer", "selective_scan"]

# A power of two, so that dividing u and multiplying Δ B by it are exact. It is so small that
# exp(-ε A n) overflows only below A = -88 / (ε n), -5e6 for n = 16.
_EPSILON = 2.0**-20


def selective_scan(
    x, delta, A, B, C, D, z=None, initial_state=None, lengths=None, return_state=True
):
    """Arguments and results: `mamba_lm.selective_scan.selective_scan`. Padding must be finite.

    Without an initial state and without a gradient through the final one, the scan runs in x's
    dtype, else in float32: in bfloat16 a state would lose 5e-3 of its value.
    """
    b, l = x.shape[:2]
    A, D = A.float(), D.float()
    h0 = None if initial_state is None else initial_state.float().transpose(1, 2)  # (b, d, n)
    if x.numel() == 0:
        state = A.new_zeros(b, *A.T.shape) if h0 is None else initial_state.float()
        return x, state if return_state else None
    padding = None
    if lengths is not None:
        padding = (torch.arange(l, device=x.device) >= lengths[:, None]).unsqueeze(-1)  # (b, l, 1)
        delta = delta.masked_fill(padding, 0)

    inputs = (x, delta, A, B, C, D, z, h0)
    has_grad = needs_grad(inputs)
    if l == 1 and not has_grad:
        y, final_state = _step(*inputs)
    elif h0 is None and not (has_grad and return_state):
        y, final_state = _scan_from_zero(x, delta, A, B, C, D, z)
    else:
        y, final_state = _scan_with_state(*inputs, has_grad and return_state)
    y = y.to(x.dtype) if padding is None else y.to(x.dtype).masked_fill(padding, 0)
    return y, final_state.transpose(1, 2).contiguous() if return_state else None  # (b, n, d)


def _step(x, delta, A, B, C, D, z, h0):
    """Compute one step without gradients. The kernel overwrites its state, so that it gets a
    copy."""
    h = x.new_zeros(x.shape[0], *A.shape, dtype=torch.float32) if h0 is None else h0.clone()
    y = selective_state_update(
        h, x[:, 0], delta[:, 0], A, B[:, 0], C[:, 0], D,
        z=None if z is None else z[:, 0],
        dt_bias=torch.zeros_like(D),  # mamba-ssm 2.3.2 fails on None
    )  # fmt: skip
    return y.unsqueeze(1), h


def _scan_from_zero(x, delta, A, B, C, D, z):
    """Run the scan and its gate in one kernel, in x's dtype; the last state has no gradient."""
    u, delta, B, C = (v.to(x.dtype).transpose(1, 2) for v in (x, delta, B, C))  # (b, d or n, l)
    z = None if z is None else z.to(x.dtype).transpose(1, 2)  # (b, d, l)
    y, h = selective_scan_fn(u, delta, A, B, C, D, z, return_last_state=True)
    return y.transpose(1, 2), h


def _scan_with_state(x, delta, A, B, C, D, z, h0, differentiable_state):
    """Run the scan in float32 with a state in, out, or both; z also gates the initial state's
    part."""
    (b, l), n = x.shape[:2], A.shape[1]
    u, delta, B, C = (v.float().transpose(1, 2) for v in (x, delta, B, C))  # (b, d or n, l)
    columns = torch.eye(n, device=x.device).expand(b, n, n)
    inner = (u, delta, B, C)
    before, behind = 0, 0
    if h0 is not None:
        before = n
        steps_left = torch.arange(n - 1, -1, -1, device=x.device)
        entering = h0 * torch.exp(-_EPSILON * steps_left * A) / _EPSILON  # (b, d, n)
        steps = (entering, torch.full_like(entering, _EPSILON), columns, torch.zeros_like(columns))
        inner = [torch.cat(pair, dim=2) for pair in zip(steps, inner, strict=True)]
    if differentiable_state:
        behind = n
        *inner, C_inner = inner
        inner = [*(F.pad(v, (0, n)) for v in inner), torch.cat([C_inner, columns], dim=2)]
    u_all, delta_all, B_all, C_all = inner
    y, h = selective_scan_fn(u_all, delta_all, A, B_all, C_all, D, return_last_state=True)
    _, y, last = y.split((before, l, behind), dim=2)  # (b, d, l), (b, d, n)
    h = last if differentiable_state else h
    if z is not None:
        y = y * F.silu(z.float().transpose(1, 2))
    return y.transpose(1, 2), h


def causal_conv1d(x, weight, bias, initial_tail=None):
    """Arguments and result: `mamba_lm.selective_scan.causal_conv1d`.

    The kernel accepts an initial tail only in channel-last memory, and there only multiples of
    eight channels and windows of two to four inputs. Other shapes use torch's convolution.
    """
    d, w = weight.shape
    if x.numel() == 0:
        return x
    if d % 8 != 0 or not 2 <= w <= 4:
        return reference.causal_conv1d(x, weight, bias, initial_tail)
    tail = None if initial_tail is None else _channel_last(initial_tail.to(x.dtype))
    bias = None if bias is None else bias.to(weight.dtype)
    y = causal_conv1d_fn(_channel_last(x), weight, bias, initial_states=tail, activation="silu")
    return y.transpose(1, 2)


def _channel_last(x: Tensor) -> Tensor:
    """View x (b, l, d) as (b, d, l). It is copied only if its rows do not start at multiples of
    eight elements: one half of a projection's output is not copied."""
    aligned = x.stride(2) == 1 and x.stride(0) % 8 == 0 and x.stride(1) % 8 == 0
    return (x if aligned else x.clone(memory_format=torch.contiguous_format)).transpose(1, 2)


def fused_mixer(u, weights):
    """Arguments and result: `mamba_lm.selective_scan.fused_mixer`, computed by `mamba_inner_fn`.

    This kernel reads raw weights, so that layers with adapters or hooks cannot use it. Its backward
    is wrong with Falcon-Mamba's RMS norm and for the output's bias (mamba-ssm 2.3.2).
    """
    w = weights()
    if w is None or w.bcdt_rms_eps is not None or not 2 <= w.conv.shape[2] <= 4 or not u.numel():
        return None
    b, l, m = u.shape
    # The kernel's layout: (b, 2 d, l), with l innermost and d outermost in memory.
    xz = (w.in_proj @ u.reshape(b * l, m).T).view(-1, b, l).transpose(0, 1)
    if w.in_proj_bias is not None:
        xz = xz + w.in_proj_bias.to(xz.dtype)[:, None]
    y = mamba_inner_fn(
        xz, w.conv, w.conv_bias, w.x_proj, w.dt_proj, w.out_proj, None,
        -torch.exp(w.A_log.float()), D=w.D.float(), delta_bias=w.dt_proj_bias.float(),
    )  # fmt: skip
    return y if w.out_proj_bias is None else y + w.out_proj_bias.to(y.dtype)
