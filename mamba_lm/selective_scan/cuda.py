"""The CUDA kernels of mamba-ssm 2.3 and causal-conv1d 1.7, taught to carry a state.

mamba-ssm's Mamba-1 scan starts from zero, knows no padding, and gives no gradient through its last
state. Three exact identities make up for that (h0 the initial state, S_t the sum of Δ_1 .. Δ_t):

    in        the recurrence is linear in h: y_t grows by C_t (exp(A S_t) ∘ h0), before the gate,
              and the last state by exp(A S_l) ∘ h0
    out       n further steps with Δ = 0 leave h alone; with C = e_i, one step's ordinary,
              differentiable output is column i of h
    padding   Δ = 0 leaves h alone

Limits of the kernels: n <= 256, float32, float16 or bfloat16. Tensors come as (b, l, d) and states
as (b, n, d); inside, they are (b, d, l) and (b, d, n).
"""

import torch
import torch.nn.functional as F
from causal_conv1d import causal_conv1d_fn
from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
from mamba_ssm.ops.triton.selective_state_update import selective_state_update
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mamba_lm.selective_scan import reference

# Steps of (b, d, n, steps) that exist at once where an initial state is added in.
_STEPS = 32


def selective_scan(x, delta, A, B, C, D, z=None, initial_state=None, lengths=None):
    """Arguments and results as `mamba_lm.selective_scan.selective_scan`; padded inputs are finite.

    Without a state to carry or a gradient to give, the scan runs in x's dtype; else in float32,
    since a state that passes through bfloat16 loses 5e-3 of itself.
    """
    b, l = x.shape[:2]
    A, D = A.float(), D.float()
    h0 = None if initial_state is None else initial_state.float().transpose(1, 2)  # (b, d, n)
    if x.numel() == 0:
        return x, A.new_zeros(b, *A.T.shape) if h0 is None else initial_state.float()
    padding = None
    if lengths is not None:
        padding = (torch.arange(l, device=x.device) >= lengths[:, None]).unsqueeze(-1)  # (b, l, 1)
        delta = delta.masked_fill(padding, 0)

    inputs = (x, delta, A, B, C, D, z, h0)
    needs_grad = torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in inputs)
    if l == 1 and not needs_grad:
        y, final_state = _step(*inputs)
    elif h0 is None and not needs_grad:
        y, final_state = _scan_from_zero(x, delta, A, B, C, D, z)
    else:
        y, final_state = _scan_with_state(*inputs, needs_grad)
    y = y.to(x.dtype)
    final_state = final_state.transpose(1, 2).contiguous()  # (b, n, d)
    return y if padding is None else y.masked_fill(padding, 0), final_state


def _step(x, delta, A, B, C, D, z, h0):
    """One step without gradients; the kernel overwrites the state it is given."""
    h = x.new_zeros(x.shape[0], *A.shape, dtype=torch.float32) if h0 is None else h0.clone()
    y = selective_state_update(
        h, x[:, 0], delta[:, 0], A, B[:, 0], C[:, 0], D,
        z=None if z is None else z[:, 0],
        dt_bias=torch.zeros_like(D),  # mamba-ssm 2.3.2 fails on None
    )  # fmt: skip
    return y.unsqueeze(1), h


def _scan_from_zero(x, delta, A, B, C, D, z):
    """The whole layer in one kernel, without gradients."""
    u, delta, B, C = (v.to(x.dtype).transpose(1, 2) for v in (x, delta, B, C))  # (b, d or n, l)
    z = None if z is None else z.to(x.dtype).transpose(1, 2)  # (b, d, l)
    y, h = selective_scan_fn(u, delta, A, B, C, D, z, return_last_state=True)
    return y.transpose(1, 2), h


def _scan_with_state(x, delta, A, B, C, D, z, h0, needs_grad):
    """The scan in float32 with a state in, out, or both; z gates what the state adds as well."""
    l, n = x.shape[1], A.shape[1]
    u, delta, B, C = (v.float().transpose(1, 2) for v in (x, delta, B, C))  # (b, d or n, l)
    if needs_grad:
        columns = torch.eye(n, device=x.device).expand(x.shape[0], n, n)
        longer = [F.pad(v, (0, n)) for v in (u, delta)]  # (b, d, l + n)
        y = selective_scan_fn(*longer, A, F.pad(B, (0, n)), torch.cat([C, columns], dim=2), D)
        y, h = y.split((l, n), dim=2)  # (b, d, l), (b, d, n)
    else:
        y, h = selective_scan_fn(u, delta, A, B, C, D, return_last_state=True)
    if h0 is not None:
        elapsed = delta.cumsum(2)  # (b, d, l)
        # Recomputed in the backward: its (b, d, n, l) intermediates are far larger than its inputs.
        carried = [
            checkpoint(_carried, *piece, A, h0, use_reentrant=False, preserve_rng_state=False)
            for piece in zip(elapsed.split(_STEPS, dim=2), C.split(_STEPS, dim=2), strict=True)
        ]
        y = y + torch.cat(carried, dim=2)
        h = h + torch.exp(elapsed[:, :, -1:] * A) * h0
    if z is not None:
        y = y * F.silu(z.float().transpose(1, 2))
    return y.transpose(1, 2), h


def _carried(elapsed: Tensor, C: Tensor, A: Tensor, h0: Tensor) -> Tensor:
    """What h0 (b, d, n) adds to y: C_t (exp(A S_t) ∘ h0), for elapsed S (b, d, s) -> (b, d, s).

    No matrix product: autocast or TF32 would run it in low precision.
    """
    decayed = torch.exp(elapsed.unsqueeze(2) * A.unsqueeze(2)) * h0.unsqueeze(3)  # (b, d, n, s)
    return (decayed * C.unsqueeze(1)).sum(2)


def causal_conv1d(x, weight, bias, initial_tail=None):
    """Arguments and result as `mamba_lm.selective_scan.causal_conv1d`.

    The kernel takes an initial tail in channel-last memory only, and there whole vectors of eight
    channels and windows of two to four inputs. Other shapes go to torch's own convolution.
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
    """x (b, l, d) as (b, d, l), copied only where its rows do not start at multiples of eight: a
    half of a projection's output stays where it is."""
    aligned = x.stride(2) == 1 and x.stride(0) % 8 == 0 and x.stride(1) % 8 == 0
    return (x if aligned else x.clone(memory_format=torch.contiguous_format)).transpose(1, 2)
