"""The triton backend: the scan and the convolution for any GPU that Triton supports.

Nothing is compiled at installation. Supports states and gradients through them, rows of different
lengths, padded or packed, and any n and d. Computes in float32 for inputs of any dtype. No sum
depends on the order in which programs run, so that results are the same bits in every run.
"""

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from mamba_lm.selective_scan.common import locate_rows, needs_grad, with_stride
from mamba_lm.selective_scan.triton.conv_kernels import (
    conv_backward,
    conv_forward,
    conv_gradients,
)
from mamba_lm.selective_scan.triton.scan_kernels import (
    scan_backward,
    scan_carry,
    scan_forward,
    scan_gradients,
)
from mamba_lm.selective_scan.triton.step import fused_layers

__all__ = ["PACKED", "causal_conv1d", "fused_layers", "selective_scan"]

PACKED = True  # rows of different lengths may be packed without padding

STEPS = 8  # tokens in a tile of the scan
TILE = 128  # states times channels in a warp; with 8 steps, the backward pass uses all registers
CONV_STEPS, CONV_CHANNELS = 16, 128
LEAST_SPAN = 64  # the fewest steps in a span
PROGRAMS = 1024  # enough programs to fill a GPU: eight warps on each of 132 multiprocessors


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, delta, A, B, C, D, z, initial_state, starts, lengths):
        (d, n), tokens = A.shape, x.shape[:-1].numel()
        saved = A.new_empty(_slots(tokens, len(lengths), STEPS), n, d)
        y, final_state = _scan(x, delta, A, B, C, D, z, initial_state, starts, lengths, saved)
        ctx.save_for_backward(x, delta, A, B, C, D, z, starts, lengths, saved)
        ctx.has_initial_state = initial_state is not None
        return y, final_state

    @staticmethod
    @once_differentiable
    def backward(ctx, gy, gfinal):
        x, delta, A, B, C, D, z, starts, lengths, saved = ctx.saved_tensors
        (d, n), b, tokens, slots = A.shape, len(lengths), x.shape[:-1].numel(), len(saved)
        A, gy, tiles = A.T.contiguous(), gy.contiguous(), _tiles(n, d)
        behind, ginitial = _walk_back(delta, A, C, z, gy, gfinal, starts, lengths, slots, tiles)

        channels = tiles["CHANNELS"]
        # Four times what fits at once: with slightly more than fits, the time would double.
        groups = min(triton.cdiv(4 * PROGRAMS, max(slots, 1)), triton.cdiv(d, channels))
        group = triton.cdiv(d, groups * channels) * channels  # channels in a program
        groups = triton.cdiv(d, group)
        gx, gdelta, gz = _outputs(x), _outputs(delta), None if z is None else _outputs(z)
        gA, gD = torch.empty_like(saved), saved.new_empty(slots, d)
        gB, gC = saved.new_zeros(2, groups, *B.shape)
        scan_backward[(slots * groups,)](
            *with_stride(x), *with_stride(delta), A, *with_stride(B), *with_stride(C), D,
            *with_stride(z), gy, starts, lengths, saved, behind, gx, gdelta, gz, gA, gB, gC, gD, b,
            tokens, d, group, n, **tiles, ROWS=_round_up(b),
        )  # fmt: skip
        gA, gD, gB, gC = (g.sum(0) for g in (gA, gD, gB, gC))
        ginitial = ginitial if ctx.has_initial_state else None
        return gx, gdelta, gA.T, gB.to(B.dtype), gC.to(C.dtype), gD, gz, ginitial, None, None


class _CausalConv1d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, taps, bias, tail, starts, lengths):
        ctx.save_for_backward(x, taps, bias, tail, starts, lengths)
        return _convolution(x, taps, bias, tail, starts, lengths)

    @staticmethod
    @once_differentiable
    def backward(ctx, gy):
        x, taps, bias, tail, starts, lengths = ctx.saved_tensors
        grid, settings = _conv_grid(x, taps, lengths)
        (w, d), slots = taps.shape, _slots(x.shape[:-1].numel(), len(lengths), CONV_STEPS)
        gsum = taps.new_empty(x.shape)  # the gradient before the SiLU
        gtaps, gbias = taps.new_zeros(slots, w, d), taps.new_zeros(slots, d)
        conv_gradients[grid](
            *with_stride(x), taps, bias, tail, starts, lengths, gy.contiguous(), gsum, gtaps, gbias,
            **settings,
        )  # fmt: skip
        gx, gtail = _outputs(x), None if tail is None else torch.zeros_like(tail)
        conv_backward[grid](
            taps, starts, lengths, gsum, gx, gtail, **settings,
            TAIL=triton.next_power_of_2(max(w - 1, 1)),
        )  # fmt: skip
        return gx, gtaps.sum(0), gbias.sum(0), gtail, None, None


def selective_scan(
    x, delta, A, B, C, D, z=None, initial_state=None, lengths=None, return_state=True
):
    """Arguments and results: `mamba_lm.selective_scan.selective_scan`. Computes in float32."""
    A, D = A.float(), D.float().contiguous()
    h0 = None if initial_state is None else initial_state.float().contiguous()
    inputs = (x, delta, A, B, C, D, z, h0)
    scan = _SelectiveScan.apply if needs_grad(inputs) else _scan
    with torch.cuda.device_of(x):  # Triton launches on the current device
        y, final_state = scan(*inputs, *locate_rows(x, lengths))
    return y, final_state if return_state else None


def _scan(x, delta, A, B, C, D, z, h0, starts, lengths, saved=None):
    """Return y, shaped as x, and the final state (b, n, d). The state before each tile goes into
    `saved`."""
    (d, n), b = A.shape, len(lengths)
    A, y = A.T.contiguous(), _outputs(x)
    tiles = _tiles(n, d)
    programs, span, spans = _spans(x, b, d, tiles)
    inputs = (
        *with_stride(x),
        *with_stride(delta),
        A,
        *with_stride(B),
        *with_stride(C),
        D,
        *with_stride(z),
    )

    def walk(before, y, saved, elapsed):
        after = A.new_empty(b, spans, n, d)
        scan_forward[(programs * spans,)](
            *inputs, before, starts, lengths, y, saved, after, elapsed, d, span, spans, n, **tiles
        )
        return after

    if spans > 1:
        elapsed, before = A.new_empty(b, spans, d), A.new_empty(b, spans, n, d)
        added = walk(None, None, None, elapsed)
        _carry(A, elapsed, h0, added, before, tiles, reverse=False)
        h0 = before
    return y, walk(h0, y, saved, None)[:, -1].contiguous()


def _walk_back(delta, A, C, z, gy, gfinal, starts, lengths, slots, tiles):
    """Return the gradients of the state: after each tile, (slots, n, d), and before each row,
    (b, n, d)."""
    (n, d), b = A.shape, len(lengths)
    programs, span, spans = _spans(gy, b, d, tiles)
    inputs = (*with_stride(delta), A, *with_stride(C), *with_stride(z), gy)

    def walk(behind, saved, elapsed):
        before = A.new_empty(b, spans, n, d)
        scan_gradients[(programs * spans,)](
            *inputs, behind, starts, lengths, saved, before, elapsed, d, span, spans, n, **tiles
        )
        return before

    gfinal = gfinal.contiguous()
    if spans > 1:
        elapsed, behind = A.new_empty(b, spans, d), A.new_empty(b, spans, n, d)
        added = walk(None, None, elapsed)
        _carry(A, elapsed, gfinal, added, behind, tiles, reverse=True)
        gfinal = behind
    saved = A.new_empty(slots, n, d)
    return saved, walk(gfinal, saved, None)[:, 0]


def _carry(A, elapsed, first, added, carried, tiles, reverse):
    (n, d), (b, spans) = A.shape, elapsed.shape[:2]
    states, channels = tiles["STATES"], tiles["CHANNELS"]
    scan_carry[(b * triton.cdiv(d, channels),)](
        A, elapsed, first, added, carried, d, spans, n, states, channels, reverse
    )


def _tiles(n: int, d: int) -> dict[str, int]:
    """Choose the constants of the scan's kernels."""
    states = triton.next_power_of_2(n)
    channels = min(max(TILE // states, 1), triton.next_power_of_2(d))
    warps = max(states * channels // TILE, 1)
    return {"STEPS": STEPS, "STATES": states, "CHANNELS": channels, "num_warps": warps}


def _spans(x: Tensor, b: int, d: int, tiles: dict[str, int]) -> tuple[int, int, int]:
    """Return the number of programs for one span of every row, of steps in a span and of spans in a
    row."""
    programs = b * triton.cdiv(d, tiles["CHANNELS"])
    longest = x.shape[-2]  # no row is longer
    span = max(triton.cdiv(longest * programs, PROGRAMS), LEAST_SPAN)
    span = triton.cdiv(span, STEPS) * STEPS
    return programs, span, max(triton.cdiv(longest, span), 1)


def causal_conv1d(x, weight, bias, initial_tail=None, lengths=None):
    """Arguments and result: `mamba_lm.selective_scan.causal_conv1d`. Computes in float32."""
    taps = weight.float().T.contiguous()
    bias = taps.new_zeros(len(weight)) if bias is None else bias.float().contiguous()
    tail = None if initial_tail is None else initial_tail.contiguous()
    inputs = (x, taps, bias, tail)
    convolve = _CausalConv1d.apply if needs_grad(inputs) else _convolution
    with torch.cuda.device_of(x):
        return convolve(*inputs, *locate_rows(x, lengths))


def _convolution(x, taps, bias, tail, starts, lengths):
    y = _outputs(x)
    grid, settings = _conv_grid(x, taps, lengths)
    conv_forward[grid](*with_stride(x), taps, bias, tail, starts, lengths, y, **settings)
    return y


def _conv_grid(x: Tensor, taps: Tensor, lengths: Tensor) -> tuple[tuple[int], dict[str, int]]:
    (w, d), b, tokens = taps.shape, len(lengths), x.shape[:-1].numel()
    channels = min(CONV_CHANNELS, triton.next_power_of_2(d))
    settings = {
        "rows": b, "tokens_of_all": tokens, "d": d, "WIDTH": w, "STEPS": CONV_STEPS,
        "CHANNELS": channels, "ROWS": _round_up(b),
    }  # fmt: skip
    return (_slots(tokens, b, CONV_STEPS) * triton.cdiv(d, channels),), settings


def _round_up(rows: int) -> int:
    """Round up to a power of two, at least 64: each value compiles a kernel."""
    return max(triton.next_power_of_2(rows), 64)


def _slots(tokens: int, b: int, steps: int) -> int:
    """Compute `tiles.num_slots` on the host."""
    return tokens // steps + b


def _outputs(x: Tensor) -> Tensor:
    """Allocate a result shaped as x. Kernels write the tokens only; the padding stays zero."""
    return x.new_zeros(x.shape) if x.dim() == 3 else x.new_empty(x.shape)
