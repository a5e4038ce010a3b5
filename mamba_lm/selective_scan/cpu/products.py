"""The CPU backend's matrix products: for each size, the fastest implementation."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mamba_lm.selective_scan.common import needs_grad
from mamba_lm.selective_scan.cpu import step_kernels
from mamba_lm.selective_scan.cpu.threads import run_kernel

FEW_ROWS = 32  # up to this number of rows, our kernel is faster than torch

# With this many elements in the weight, oneDNN is faster than the BLAS of F.linear: by 25 to 50 %
# with 64 to 256 rows, by 10 % with more (compared with MKL, on an AMD processor).
_LARGE = 1 << 19
# oneDNN never frees what it compiles for a number of rows, and the heap grows to gigabytes after
# hundreds of different numbers. So it gets only sixteen: multiples of 16 up to 256, with padding;
# more rows are computed in blocks.
_BLOCK, _STEP = 256, 16
_onednn_linear = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def linear(x, weight, bias=None):
    """Arguments and result: `mamba_lm.selective_scan.linear`."""
    rows, (out, k) = x.shape[:-1].numel(), weight.shape
    given = [v for v in (x, weight, bias) if v is not None]
    is_plain = (
        rows > 0
        and have_kernel_dtype(given)
        and x.shape[-1] == k
        and (bias is None or bias.shape == (out,))
        and not torch.is_autocast_enabled("cpu")
    )
    if is_plain and rows <= FEW_ROWS and not needs_grad(given):
        return _few_rows_linear(x, weight, bias)
    is_large = rows > FEW_ROWS and weight.numel() >= _LARGE and x.dtype == torch.float32
    if is_plain and is_large and _onednn_linear is not None:
        y = _LargeProduct.apply(x.reshape(rows, k), weight)
        return (y if bias is None else y + bias).view(*x.shape[:-1], out)
    return F.linear(x, weight, bias)


def _few_rows_linear(x, weight, bias):
    """Multiply with the kernel for decoding: torch reaches half of the memory bandwidth at best."""
    rows, (out, k) = x.shape[:-1].numel(), weight.shape
    y = x.new_empty(*x.shape[:-1], out, dtype=torch.float32)
    bias = bias if bias is None else bias.contiguous()
    values = (x.float().contiguous(), weight.contiguous(), bias, y)
    kernel = step_kernels.few_rows_linear[x.dtype]
    run_kernel(kernel, rows, k, out, *values, jobs=out, work=rows * out * k)
    return y.to(x.dtype)


class _LargeProduct(torch.autograd.Function):
    """x (rows, k) times weight (out, k) transposed. For the weight's gradient torch is as fast."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return _multiply_in_blocks(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, gy):
        x, weight = ctx.saved_tensors
        needs_gx, needs_gweight = ctx.needs_input_grad
        gx = _multiply_in_blocks(gy, weight.T) if needs_gx else None
        return gx, gy.T @ x if needs_gweight else None


def _multiply_in_blocks(x: Tensor, weight: Tensor) -> Tensor:
    if len(x) <= _BLOCK:
        return _multiply_by_onednn(x, weight)
    y = x.new_empty(len(x), len(weight))
    for x_block, y_block in zip(x.split(_BLOCK), y.split(_BLOCK), strict=True):
        y_block.copy_(_multiply_by_onednn(x_block, weight))
    return y


def _multiply_by_onednn(x: Tensor, weight: Tensor) -> Tensor:
    rows = len(x)
    if rows % _STEP:
        x = F.pad(x, (0, 0, 0, -rows % _STEP))
    return _onednn_linear(x, weight, None, "none", [], "")[:rows]


def have_kernel_dtype(tensors: list[Tensor]) -> bool:
    """Whether all tensors are on the CPU and have one dtype that the kernels for few rows read."""
    dtype = tensors[0].dtype
    return dtype in (torch.float32, torch.bfloat16) and all(
        v.dtype == dtype and v.is_cpu for v in tensors
    )
