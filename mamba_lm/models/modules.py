"""The modules that model families share, and the test whether one is still plain.

Fused kernels read raw weights. They are used where the weights say everything: no adapter, no hook.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as every_module

from mamba_lm.selective_scan import linear, rms_norm


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
