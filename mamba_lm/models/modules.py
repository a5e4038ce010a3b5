"""The modules that model families share, the causal convolution of a layer, and the test whether a
module is still plain.

Fused kernels read raw weights. They are used where the weights say everything: no adapter, no hook.

Letters: b batch, l length, d channels, w width of the convolution.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as every_module

from common.errors import UserError
from mamba_lm.selective_scan import causal_conv1d, linear, rms_norm


class Linear(nn.Linear):
    """The linear map of torch, by the backend's kernel."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class DeltaSoftplus(nn.Module):
    """Δ = softplus(x), of any shape. A module, so that a forward hook reads or replaces Δ."""

    def forward(self, x: Tensor) -> Tensor:
        return F.softplus(x)


def convolve(
    conv1d: nn.Module, x: Tensor, tail: Tensor | None, width: int, lengths: Tensor | None
) -> Tensor:
    """SiLU of the causal convolution of x (b, l, d) of this width.

    conv1d: a plain convolution, or what an adapter has put in its place, which is then called.
    tail (b, w - 1, d): the inputs before x, zeros by default. A plain convolution alone reads
    packed rows too, (tokens, d) of these lengths. UserError where what is in its place is no
    convolution of this width.
    """
    if is_plain_convolution(conv1d):
        return causal_conv1d(x, conv1d.weight.squeeze(1), conv1d.bias, tail, lengths)
    if x.numel() == 0:
        return x
    if tail is None:
        window = F.pad(x, (0, 0, width - 1, 0))
    else:
        window = torch.cat([tail.to(x.dtype), x], dim=1)  # (b, w - 1 + l, d)
    y = F.silu(conv1d(window.transpose(1, 2)).transpose(1, 2))
    if y.shape != x.shape:
        raise UserError(
            f"conv1d: the {type(conv1d).__name__} in its place returns {tuple(y.shape)}, expected "
            f"{tuple(x.shape)}; it must keep the kernel size and add no padding"
        )
    return y


def is_plain_convolution(conv1d: nn.Module) -> bool:
    """Whether it is an untouched nn.Conv1d, depthwise and without padding, as kernels are."""
    return (
        is_untouched(conv1d, nn.Conv1d)
        and conv1d.groups == conv1d.in_channels == conv1d.out_channels
        and conv1d.stride == conv1d.dilation == (1,)
        and conv1d.padding == (0,)
    )


def last_inputs(x: Tensor, before: Tensor | None, count: int, lengths: Tensor | None) -> Tensor:
    """The last `count` real inputs (b, count, d) of x (b, l, d), those in `before` included.

    `lengths` (b,) counts each row's real inputs, all l by default and at most; zeros come before
    the first. x may be (tokens, d), rows of these lengths back to back.
    """
    d = x.shape[-1]
    if before is None:
        before = x.new_zeros(len(x) if x.dim() == 3 else len(lengths), count, d)
    if x.numel() == 0:
        return before
    if lengths is None:
        # A copy in either case: a view would keep all of x alive as long as the state.
        return torch.cat([before[:, x.shape[1] :], x[:, max(x.shape[1] - count, 0) :]], dim=1)
    if x.dim() == 3:
        starts = torch.arange(len(x), device=x.device) * x.shape[1]
        lengths = lengths.clamp(0, x.shape[1])
    else:
        # Empty rows at the end start behind the last token.
        starts = (lengths.cumsum(0) - lengths).clamp(max=len(x) - 1)
    at = lengths[:, None] + torch.arange(-count, 0, device=x.device)  # (b, count), < 0: in `before`
    places = starts[:, None] + at.clamp(min=0)
    in_x = x.reshape(-1, d).index_select(0, places.flatten()).view_as(before)
    in_before = (at + count).clamp(max=count - 1).unsqueeze(-1).expand_as(before)
    return torch.where((at >= 0).unsqueeze(-1), in_x, before.gather(1, in_before))


def is_untouched(module: nn.Module, expected: type[nn.Module]) -> bool:
    """Whether a call of the module does what the class `expected` says and no more.

    It does not where an adapter wraps the module, a parametrization has changed its class, it has a
    hook of any kind, or its `forward` is replaced.
    """
    return type(module) is expected and not has_hooks(module) and "forward" not in vars(module)


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of the module calls hooks, its own or those of every module."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or every_module._global_forward_hooks
        or every_module._global_forward_pre_hooks
        or every_module._global_backward_hooks
        or every_module._global_backward_pre_hooks
    )
