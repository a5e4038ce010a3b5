"""The CPU backend: fused Numba kernels that compute in float32.

The scan never materialises a (b, l, d, n) tensor. The kernels are in the modules of this folder;
here are the autograd functions and the operations of `mamba_lm.selective_scan`.
"""

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mamba_lm.selective_scan import reference
from mamba_lm.selective_scan.common import (
    layers_fit,
    locate_rows,
    needs_grad,
    states_fit,
    with_stride,
)
from mamba_lm.selective_scan.cpu import step_kernels
from mamba_lm.selective_scan.cpu.conv_kernels import TILE as CONV_TILE
from mamba_lm.selective_scan.cpu.conv_kernels import conv_backward, conv_forward
from mamba_lm.selective_scan.cpu.products import FEW_ROWS, have_kernel_dtype, linear
from mamba_lm.selective_scan.cpu.scan_kernels import (
    CHUNK,
    GROUP,
    TILE,
    scan_backward,
    scan_forward,
    scan_step,
)
from mamba_lm.selective_scan.cpu.threads import keep_freed_memory, run_kernel, yield_core_address
from mamba_lm.selective_scan.cpu.token_kernels import (
    BLOCK,
    norm_backward,
    norm_forward,
    softplus_backward,
    softplus_forward,
)

PACKED = True  # rows of different lengths may be packed without padding

SEQUENCE_BYTES = 1 << 28  # the largest size of the states after each token of a sequence

keep_freed_memory()


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, delta, A, B, C, D, z, initial_state, starts, lengths):
        d, n = A.shape
        saved = x.new_empty(x.numel() // d // CHUNK + len(lengths), n, d)
        y, final_state = _scan(x, delta, A, B, C, D, z, initial_state, starts, lengths, saved)
        ctx.save_for_backward(x, delta, A, B, C, D, z, initial_state, starts, lengths, saved)
        return y, final_state

    @staticmethod
    @once_differentiable
    def backward(ctx, gy, gfinal):
        x, delta, A, B, C, D, z, initial_state, starts, lengths, saved = ctx.saved_tensors
        (d, n), b, tokens = A.shape, len(lengths), x.shape[:-1].numel()
        tiles = -(-d // TILE)
        gx, gdelta = _outputs(x, lengths), _outputs(x, lengths)
        gz = _outputs(x, lengths) if z is not None else None
        gB, gC = x.new_zeros(2, tiles, *B.shape[:-1], n + -n % GROUP)
        gA, gD, ginitial = x.new_empty(b, n, d), x.new_empty(b, d), x.new_empty(b, n, d)
        run_kernel(
            scan_backward,
            *(b, tokens, d, n, *_scan_inputs(x, delta, A, B, C, D, z), starts, lengths, saved),
            *(gy.contiguous(), gfinal.contiguous(), gx, gdelta, gz, gA, gB, gC, gD, ginitial),
            jobs=b * tiles,
            work=tokens * d * n,
        )
        ginitial = ginitial if initial_state is not None else None
        gB, gC = gB.sum(0)[..., :n], gC.sum(0)[..., :n]
        return gx, gdelta, gA.sum(0).T, gB, gC, gD.sum(0), gz, ginitial, None, None


class _CausalConv1d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, tail, starts, lengths):
        ctx.save_for_backward(x, weight, bias, tail, starts, lengths)
        return _convolution(x, weight, bias, tail, starts, lengths)

    @staticmethod
    @once_differentiable
    def backward(ctx, gy):
        x, weight, bias, tail, starts, lengths = ctx.saved_tensors
        (d, w), b = weight.shape, len(lengths)
        gx, gweight, gbias = x.new_empty(x.shape), x.new_empty(b, w, d), x.new_empty(b, d)
        gtail = x.new_empty(b, w - 1, d) if tail is not None else None
        run_kernel(
            conv_backward,
            *(b, d, w, *with_stride(x), _taps(weight), bias, tail, starts, lengths),
            *(gy.contiguous(), gx, gweight, gbias, gtail),
            jobs=b * -(-d // CONV_TILE),
            work=x.numel() * w,
        )
        return gx, gweight.sum(0).T, gbias.sum(0), gtail, None, None


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        m, y = len(weight), torch.empty_like(x)
        tokens = x.numel() // m
        run_kernel(
            norm_forward, tokens, m, eps, x, weight, y, jobs=-(-tokens // BLOCK), work=8 * x.numel()
        )
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, gy):
        x, weight = ctx.saved_tensors
        m, gx = len(weight), torch.empty_like(x)
        tokens = x.numel() // m
        blocks = -(-tokens // BLOCK)
        gweight = x.new_empty(blocks, m)
        values = (x, weight, gy.contiguous(), gx, gweight)
        run_kernel(norm_backward, tokens, m, ctx.eps, *values, jobs=blocks, work=8 * x.numel())
        return gx, gweight.sum(0), None


class _Softplus(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias):
        d, y = len(bias), torch.empty_like(x)
        tokens = x.numel() // d
        run_kernel(
            softplus_forward, tokens, d, x, bias, y, jobs=-(-tokens // BLOCK), work=16 * x.numel()
        )
        ctx.save_for_backward(y)  # the scan saves the same tensor
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, gy):
        (y,) = ctx.saved_tensors
        d, gx = y.shape[-1], torch.empty_like(y)
        tokens = y.numel() // d
        blocks = -(-tokens // BLOCK)
        gbias = y.new_empty(blocks, d)
        values = (y, gy.contiguous(), gx, gbias)
        run_kernel(softplus_backward, tokens, d, *values, jobs=blocks, work=16 * y.numel())
        return gx, gbias.sum(0)


def selective_scan(
    x, delta, A, B, C, D, z=None, initial_state=None, lengths=None, return_state=True
):
    """Arguments and results: `mamba_lm.selective_scan.selective_scan`. Computes in float32."""
    floats = [None if v is None else v.float() for v in (x, delta, A, B, C, D, z, initial_state)]
    is_step = x.dim() == 3 and x.shape[1] == 1 and lengths is None and initial_state is not None
    if is_step and not needs_grad(floats):
        y, final_state = _one_step(*floats)
    else:
        scan = _SelectiveScan.apply if needs_grad(floats) else _scan
        y, final_state = scan(*floats, *locate_rows(x, lengths))
    return y.to(x.dtype), final_state if return_state else None


def _scan(x, delta, A, B, C, D, z, initial_state, starts, lengths, saved=None):
    """Return y, shaped as x, and the final state (b, n, d). The state before each chunk goes into
    `saved`."""
    (d, n), b = A.shape, len(lengths)
    y, final_state = _outputs(x, lengths), x.new_empty(b, n, d)
    h0 = None if initial_state is None else initial_state.contiguous()
    inputs = _scan_inputs(x, delta, A, B, C, D, z)
    run_kernel(
        scan_forward,
        *(b, d, n, *inputs, h0, starts, lengths, y, final_state, saved),
        jobs=b * -(-d // TILE),
        work=x.numel() * n,
    )
    return y, final_state


def _one_step(x, delta, A, B, C, D, z, h0):
    """Compute one step without gradients: y (b, 1, d) and the new state (b, n, d)."""
    (b, _, d), n = x.shape, A.shape[1]
    y, h1 = x.new_empty(b, 1, d), x.new_empty(b, n, d)
    run_kernel(
        scan_step,
        *(b, d, n, *_scan_inputs(x, delta, A, B, C, D, z), h0.contiguous(), y, h1),
        jobs=b * -(-d // TILE),
        work=b * d * n,
    )
    return y, h1


def causal_conv1d(x, weight, bias, initial_tail=None, lengths=None):
    """Arguments and result: `mamba_lm.selective_scan.causal_conv1d`. Computes in float32."""
    bias = (
        x.new_zeros(x.shape[-1], dtype=torch.float32) if bias is None else bias.float().contiguous()
    )
    tail = None if initial_tail is None else initial_tail.float().contiguous()
    inputs = (x.float(), weight.float(), bias, tail)
    convolve = _CausalConv1d.apply if needs_grad(inputs) else _convolution
    y = convolve(*inputs, *locate_rows(x, lengths))
    return y.to(x.dtype)


def _convolution(x, weight, bias, tail, starts, lengths):
    (d, w), b = weight.shape, len(lengths)
    y = x.new_empty(x.shape)
    run_kernel(
        conv_forward,
        *(b, d, w, *with_stride(x), _taps(weight), bias, tail, starts, lengths, y),
        jobs=b * -(-d // CONV_TILE),
        work=x.numel() * w,
    )
    return y


def _taps(weight: Tensor) -> Tensor:
    """Transpose weight (d, w) for the kernels: (w, d), with rows of zeros in front up to a multiple
    of four."""
    return F.pad(weight.T, (0, 0, -weight.shape[1] % 4, 0)).contiguous()


def rms_norm(x, weight, eps):
    """Arguments and result: `mamba_lm.selective_scan.rms_norm`."""
    if x.dtype == weight.dtype == torch.float32 and x.shape[-1:] == weight.shape:
        return _RMSNorm.apply(x.contiguous(), weight.contiguous(), eps)
    return reference.rms_norm(x, weight, eps)


def softplus_linear(x, weight, bias):
    """Arguments and result: `mamba_lm.selective_scan.softplus_linear`."""
    y = linear(x, weight)
    if y.dtype == bias.dtype == torch.float32 and bias.shape == y.shape[-1:]:
        return _Softplus.apply(y.contiguous(), bias.contiguous())
    return F.softplus(y + bias)


def fused_layers(weights):
    """Argument and result: `mamba_lm.selective_scan.fused_layers`.

    For at most `FEW_ROWS` rows, without gradients; for a sequence, if its states fit into
    `SEQUENCE_BYTES`.
    """
    (m, d), (_, r), w = (
        weights[0].out_proj.shape,
        weights[0].dt_proj.shape,
        weights[0].conv.shape[2],
    )
    n, n_layer, dtype = weights[0].A_log.shape[1], len(weights), weights[0].out_proj.dtype
    norm_eps, bcdt_rms_eps = weights[0][:2]
    parameters = [p for layer in weights for p in layer[2:]]
    if not layers_fit(weights) or not have_kernel_dtype([p for p in parameters if p is not None]):
        return None
    parameters = [None if p is None else p.contiguous() for p in parameters]
    weight_table = _addresses(parameters)

    def step(residual, convs, ssms, in_sequence=False):
        b = len(residual)
        rows = 1 if in_sequence else b
        if (
            not 0 < b <= FEW_ROWS
            or residual.dtype != torch.float32
            or torch.is_grad_enabled()
            or torch.is_autocast_enabled("cpu")
            or not states_fit(weights, rows, convs, ssms)
            or not have_kernel_dtype([*convs, parameters[0]])
            or not have_kernel_dtype([*ssms, residual])
            or (in_sequence and n_layer * b * n * d * 4 > SEQUENCE_BYTES)
        ):
            return None
        if in_sequence:
            # The state after a token is the memory from which the kernel reads for the next token.
            convs, new_convs = _allocate_chain(convs, b)
            ssms, new_ssms = _allocate_chain(ssms, b)
        else:
            convs, ssms = [v.contiguous() for v in convs], [v.contiguous() for v in ssms]
            new_convs = convs[0].new_empty(n_layer, b, w - 1, d).unbind()
            new_ssms = ssms[0].new_empty(n_layer, b, n, d).unbind()
        states = [v for layer in zip(convs, ssms, new_convs, new_ssms, strict=True) for v in layer]
        residual = residual.clone(memory_format=torch.contiguous_format)
        progress = residual.new_zeros(n_layer, step_kernels.PHASES, 2, dtype=torch.int64)
        space = residual.new_empty(b * (5 * d + r + 2 * n + m))
        run_kernel(
            step_kernels.step[dtype],
            *(n_layer, b, m, d, n, r, w, norm_eps, -1.0 if bcdt_rms_eps is None else bcdt_rms_eps),
            *(yield_core_address(), progress, residual, space, _addresses(states), weight_table),
            jobs=min(d, m, r + 2 * n),  # of the smallest phase: all phases have as many shares
            work=n_layer * b * m * d,
            keep_alive=[parameters, states],
        )
        return residual, new_convs, new_ssms

    return step


def _allocate_chain(
    states: Sequence[Tensor], length: int
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Allocate the states before and after each of `length` tokens, (length, ...) for each layer.

    They overlap: the state after a token is the state before the next one. The first state is
    copied from `states`, (1, ...) for each layer.
    """
    chain = states[0].new_empty(len(states), length + 1, *states[0].shape[1:])
    chain[:, 0] = torch.cat(list(states))
    return chain[:, :-1].unbind(), chain[:, 1:].unbind()


def _addresses(tensors: Iterable[Tensor | None]) -> Tensor:
    """Make the table of addresses through which kernels read these tensors. The caller keeps the
    tensors alive while a kernel runs."""
    addresses = [0 if v is None else v.data_ptr() for v in tensors]
    return torch.tensor(addresses, dtype=torch.int64, device="cpu")


def _outputs(x: Tensor, lengths: Tensor) -> Tensor:
    """Allocate a result shaped as x. Kernels write the tokens only; the padding stays zero."""
    is_padded = int(lengths.sum()) < x.shape[:-1].numel()
    return x.new_zeros(x.shape) if is_padded else x.new_empty(x.shape)


def _scan_inputs(x, delta, A, B, C, D, z) -> tuple[Tensor | int | None, ...]:
    if A.shape[1] % GROUP:
        B, C = (F.pad(v, (0, -A.shape[1] % GROUP)) for v in (B, C))
    return (
        *with_stride(x), *with_stride(delta), A.contiguous(), *with_stride(B), *with_stride(C),
        D.contiguous(), *with_stride(z),
    )  # fmt: skip
