"""The definition of every operation: a plain loop over time, in any dtype, float64 too.

Every other backend is tested against this one. It never reads packed rows.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


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
    """Arguments and results: `mamba_lm.selective_scan.selective_scan` (Gu & Dao 2023, algorithm 2).

    Computes in x's dtype, but at least in float32.
    """
    b, l = x.shape[:2]
    real = torch.ones(b, l, 1, dtype=torch.bool, device=x.device)
    if lengths is not None:
        real = (torch.arange(l, device=x.device) < lengths[:, None]).unsqueeze(-1)  # (b, l, 1)
        # 0 times the content of the padding may be NaN, which would reach the gradients.
        x, delta, B, C = (torch.where(real, tensor, 0) for tensor in (x, delta, B, C))
        z = None if z is None else torch.where(real, z, 0)
    state_dtype = torch.promote_types(x.dtype, torch.float32)
    output_dtype = x.dtype
    x, delta, A, B, C, D = (tensor.to(state_dtype) for tensor in (x, delta, A, B, C, D))
    A = A.T  # (n, d), the state's layout
    h = x.new_zeros(b, *A.shape) if initial_state is None else initial_state.to(state_dtype)

    outputs = []
    for t in range(l):
        delta_t = delta[:, t].unsqueeze(1)  # (b, 1, d)
        decay = torch.exp(delta_t * A)  # (b, n, d)
        update = delta_t * B[:, t].unsqueeze(2) * x[:, t].unsqueeze(1)  # (b, n, d)
        h = torch.where(real[:, t].unsqueeze(-1), decay * h + update, h)
        outputs.append(torch.einsum("bnd,bn->bd", h, C[:, t]) + D * x[:, t])
    y = torch.stack(outputs, dim=1) if outputs else torch.zeros_like(x)  # (b, l, d)
    if z is not None:
        y = y * F.silu(z.to(state_dtype))
    return torch.where(real, y, 0).to(output_dtype), h if return_state else None


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_tail: Tensor | None = None
) -> Tensor:
    """Arguments and result: `mamba_lm.selective_scan.causal_conv1d`."""
    if x.shape[1] == 0:
        return x
    width = weight.shape[1]
    if initial_tail is None:
        initial_tail = x.new_zeros(x.shape[0], width - 1, x.shape[2])
    window = torch.cat([initial_tail.to(x.dtype), x], dim=1).transpose(1, 2)  # (b, d, w - 1 + l)
    weight = weight.to(x.dtype).unsqueeze(1)  # (d, 1, w)
    bias = None if bias is None else bias.to(x.dtype)
    return F.silu(F.conv1d(window, weight, bias, groups=x.shape[2])).transpose(1, 2)  # (b, l, d)


linear = F.linear


def softplus_linear(x, weight, bias):
    """Arguments and result: `mamba_lm.selective_scan.softplus_linear`."""
    return F.softplus(F.linear(x, weight, bias))


def rms_norm(x, weight, eps):
    """Arguments and result: `mamba_lm.selective_scan.rms_norm`."""
    return F.rms_norm(x, x.shape[-1:], eps=eps).to(weight.dtype) * weight


def fused_mixer(u, weights):
    """No fused kernel: None, so that the model computes the mixer operation by operation."""
    return None


def fused_layers(weights):
    """No fused kernel: None, so that the model computes the layers operation by operation."""
    return None
