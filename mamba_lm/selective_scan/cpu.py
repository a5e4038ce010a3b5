"""Fused selective scan and causal convolution for the CPU, in float32; no (b, l, d, n) tensor."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mamba_lm.selective_scan.cpu_kernels import (
    CHUNK,
    TILE,
    conv_backward,
    conv_forward,
    few_rows_linear,
    scan_backward,
    scan_forward,
    scan_step,
)
from mamba_lm.selective_scan.cpu_threads import keep_freed_memory, run

# Up to here the kernel for few rows is faster than torch's matrix product.
_FEW_ROWS = 8

keep_freed_memory()


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, delta, A, B, C, D, z, initial_state, lengths):
        b, l, d = x.shape
        saved = torch.empty(b, -(-l // CHUNK), A.shape[1], d)
        y, final_state = _scan(x, delta, A, B, C, D, z, initial_state, lengths, saved)
        ctx.save_for_backward(x, delta, A, B, C, D, z, initial_state, lengths, saved)
        return y, final_state

    @staticmethod
    @once_differentiable
    def backward(ctx, gy, gfinal):
        x, delta, A, B, C, D, z, initial_state, lengths, saved = ctx.saved_tensors
        (b, l, d), n = x.shape, A.shape[1]
        tiles = -(-d // TILE)
        gx, gdelta = torch.empty(b, l, d), torch.empty(b, l, d)
        gz = torch.empty(b, l, d) if z is not None else None
        gB, gC = torch.zeros(tiles, b, l, n), torch.zeros(tiles, b, l, n)
        gA, gD, ginitial = torch.empty(b, n, d), torch.empty(b, d), torch.empty(b, n, d)
        run(
            scan_backward,
            *(b, l, d, n, *_scan_inputs(x, delta, A, B, C, D, z), lengths, saved),
            *(gy.contiguous(), gfinal.contiguous(), gx, gdelta, gz, gA, gB, gC, gD, ginitial),
            jobs=b * tiles,
            work=b * l * d * n,
        )
        ginitial = ginitial if initial_state is not None else None
        return gx, gdelta, gA.sum(0).T, gB.sum(0), gC.sum(0), gD.sum(0), gz, ginitial, None


class _CausalConv1d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, tail):
        weight = weight.T.contiguous()  # (w, d)
        ctx.save_for_backward(x, weight, bias, tail)
        return _convolution(x, weight, bias, tail)

    @staticmethod
    @once_differentiable
    def backward(ctx, gy):
        x, weight, bias, tail = ctx.saved_tensors
        (b, l, d), w = x.shape, weight.shape[0]
        gx, gweight, gbias = torch.empty(b, l, d), torch.empty(b, w, d), torch.empty(b, d)
        gtail = torch.empty(b, w - 1, d) if tail is not None else None
        run(
            conv_backward,
            *(b, l, d, w, *_rows(x), weight, bias, tail),
            *(gy.contiguous(), gx, gweight, gbias, gtail),
            jobs=b * -(-d // TILE),
            work=b * l * d * w,
        )
        return gx, gweight.sum(0).T, gbias.sum(0), gtail


def selective_scan(x, delta, A, B, C, D, z=None, initial_state=None, lengths=None):
    """Arguments and results as `mamba_lm.selective_scan.selective_scan`; computes in float32."""
    floats = [None if v is None else v.float() for v in (x, delta, A, B, C, D, z, initial_state)]
    if (
        x.shape[1] == 1
        and lengths is None
        and initial_state is not None
        and not _needs_grad(floats)
    ):
        y, final_state = _step(*floats)
    else:
        b, l = x.shape[:2]
        lengths = torch.full((b,), l) if lengths is None else lengths.clamp(0, l).contiguous()
        scan = _SelectiveScan.apply if _needs_grad(floats) else _scan
        y, final_state = scan(*floats, lengths)
    return y.to(x.dtype), final_state


def _scan(x, delta, A, B, C, D, z, initial_state, lengths, saved=None):
    """y (b, l, d) and the final state (b, n, d); the state before each chunk goes to `saved`."""
    (b, l, d), n = x.shape, A.shape[1]
    y, final_state = torch.empty(b, l, d), torch.empty(b, n, d)
    h0 = None if initial_state is None else initial_state.contiguous()
    run(
        scan_forward,
        *(b, l, d, n, *_scan_inputs(x, delta, A, B, C, D, z), h0, lengths, y, final_state, saved),
        jobs=b * -(-d // TILE),
        work=b * l * d * n,
    )
    return y, final_state


def _step(x, delta, A, B, C, D, z, h0):
    """One step without gradients: y (b, 1, d) and the new state (b, n, d)."""
    (b, _, d), n = x.shape, A.shape[1]
    y, h1 = torch.empty(b, 1, d), torch.empty(b, n, d)
    run(
        scan_step,
        *(b, d, n, *_scan_inputs(x, delta, A, B, C, D, z), h0.contiguous(), y, h1),
        jobs=b * -(-d // TILE),
        work=b * d * n,
    )
    return y, h1


def causal_conv1d(x, weight, bias, initial_tail=None):
    """Arguments and result as `mamba_lm.selective_scan.causal_conv1d`; computes in float32."""
    bias = torch.zeros(x.shape[2]) if bias is None else bias.float()
    tail = None if initial_tail is None else initial_tail.float().contiguous()
    inputs = x.float(), weight.float(), bias, tail
    if _needs_grad(inputs):
        y = _CausalConv1d.apply(*inputs)
    else:
        y = _convolution(inputs[0], inputs[1].T.contiguous(), bias, tail)
    return y.to(x.dtype)


def _convolution(x, weight, bias, tail):
    """SiLU of the convolution of x (b, l, d) with weight (w, d)."""
    (b, l, d), w = x.shape, weight.shape[0]
    y = torch.empty(b, l, d)
    run(
        conv_forward,
        *(b, l, d, w, *_rows(x), weight, bias.contiguous(), tail, y),
        jobs=b * -(-d // TILE),
        work=b * l * d * w,
    )
    return y


def linear(x, weight, bias=None):
    """Arguments and result as `mamba_lm.selective_scan.linear`.

    torch's products of a few rows reach half the memory's bandwidth at best.
    """
    rows = x.shape[:-1].numel()
    dtypes = {v.dtype for v in (x, weight, bias) if v is not None}
    if not 0 < rows <= _FEW_ROWS or dtypes != {torch.float32} or _needs_grad((x, weight, bias)):
        return F.linear(x, weight, bias)
    out, k = weight.shape
    y = torch.empty(*x.shape[:-1], out)
    values = (x.contiguous(), weight.contiguous(), bias if bias is None else bias.contiguous(), y)
    run(few_rows_linear, rows, k, out, *values, jobs=out, work=rows * out * k)
    return y


def _needs_grad(tensors: Iterable[Tensor | None]) -> bool:
    return torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in tensors)


def _scan_inputs(x, delta, A, B, C, D, z) -> tuple[Tensor | int | None, ...]:
    return (
        *_rows(x), *_rows(delta), A.contiguous(), *_rows(B), *_rows(C), D.contiguous(), *_rows(z),
    )  # fmt: skip


def _rows(tensor: Tensor | None) -> tuple[Tensor | None, int]:
    """A (b, l, k) tensor and the distance between its rows, copied only if it must be: a half of a
    projection's output, say, stays where it is."""
    if tensor is None:
        return None, 0
    _, l, k = tensor.shape
    regular = tensor.stride(2) == 1 and tensor.stride(0) == l * tensor.stride(1)
    return (tensor, tensor.stride(1)) if regular else (tensor.contiguous(), k)
