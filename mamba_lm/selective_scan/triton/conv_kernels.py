"""The depthwise causal convolution and its SiLU in Triton, forward and backward, in float32.

A program computes a tile of STEPS tokens of one row and CHANNELS channels. Rows are `lengths`
tokens from `starts` on; `xs` is the stride between tokens of x. taps (WIDTH, d) are the weights,
oldest input first; tail (rows, WIDTH - 1, d) are the inputs before each row, or None for zeros.
"""

import triton
import triton.language as tl

from mamba_lm.selective_scan.triton.tiles import load, num_slots, store, tile_in


@triton.jit
def _place(
    starts, lengths, rows, tokens_of_all, STEPS: tl.constexpr, CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Return a program's slot and channels, and the values of `tile_in` for the slot."""
    slots = num_slots(tokens_of_all, rows, STEPS)
    slot = tl.program_id(0) % slots
    channels = tl.program_id(0) // slots * CHANNELS + tl.arange(0, CHANNELS)
    row, start, length, step = tile_in(slot, starts, lengths, rows, STEPS, ROWS)
    return slot, channels, row, start, length, step


@triton.jit
def _window(x, xs, tail, row, start, step, channels, d, in_row, WIDTH: tl.constexpr):
    """Load the inputs at `step` (STEPS,) of a row; negative steps are in its tail."""
    in_d = (channels < d)[None]
    inputs = load(x + (start + step)[:, None] * xs + channels[None],
                  (in_row & (step >= 0))[:, None] & in_d)  # fmt: skip
    if tail is not None:
        at = row * (WIDTH - 1) + step + WIDTH - 1
        inputs += load(tail + at[:, None] * d + channels[None], (step < 0)[:, None] & in_d)
    return inputs


@triton.jit
def _convolution(
    x, xs, taps, bias, tail, row, start, steps, channels, d, is_real, WIDTH: tl.constexpr,
    STEPS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    y = tl.zeros((STEPS, CHANNELS), tl.float32) + load(bias + channels, channels < d)[None]
    for k in tl.static_range(WIDTH):
        tap = load(taps + k * d + channels, channels < d)
        at = steps - (WIDTH - 1) + k
        y += tap[None] * _window(x, xs, tail, row, start, at, channels, d, is_real, WIDTH)
    return y


@triton.jit(do_not_specialize=["rows", "tokens_of_all"])
def conv_forward(
    x, xs, taps, bias, tail, starts, lengths, y, rows, tokens_of_all, d, WIDTH: tl.constexpr,
    STEPS: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Write y (tokens, d)."""
    _slot, channels, row, start, length, step = _place(
        starts, lengths, rows, tokens_of_all, STEPS, CHANNELS, ROWS
    )
    if step < length:
        steps = step + tl.arange(0, STEPS)
        is_real = steps < length
        y_t = _convolution(x, xs, taps, bias, tail, row, start, steps, channels, d, is_real,
                           WIDTH, STEPS, CHANNELS)  # fmt: skip
        store(y + (start + steps)[:, None] * d + channels[None], y_t * tl.sigmoid(y_t),
              is_real[:, None] & (channels < d)[None])  # fmt: skip


@triton.jit(do_not_specialize=["rows", "tokens_of_all"])
def conv_gradients(
    x, xs, taps, bias, tail, starts, lengths, gy, gsum, gtaps, gbias, rows, tokens_of_all, d,
    WIDTH: tl.constexpr, STEPS: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Write gsum (tokens, d), the gradient before the SiLU, and gtaps (slots, WIDTH, d) and gbias
    (slots, d), which are terms of sums."""
    slot, channels, row, start, length, step = _place(
        starts, lengths, rows, tokens_of_all, STEPS, CHANNELS, ROWS
    )
    if step < length:
        steps = step + tl.arange(0, STEPS)
        is_real = steps < length
        y_t = _convolution(x, xs, taps, bias, tail, row, start, steps, channels, d, is_real,
                           WIDTH, STEPS, CHANNELS)  # fmt: skip
        in_d = is_real[:, None] & (channels < d)[None]
        at = (start + steps)[:, None] * d + channels[None]
        sigmoid = tl.sigmoid(y_t)
        g = load(gy + at, in_d) * sigmoid * (1 + y_t * (1 - sigmoid))
        tl.store(gsum + at, g, mask=in_d)
        of_slot = slot.to(tl.int64) * d + channels
        tl.store(gbias + of_slot, tl.sum(g, axis=0), mask=channels < d)
        for k in tl.static_range(WIDTH):
            inputs = _window(x, xs, tail, row, start, steps - (WIDTH - 1) + k, channels, d, is_real,
                             WIDTH)  # fmt: skip
            of_tap = (slot.to(tl.int64) * WIDTH + k) * d + channels
            tl.store(gtaps + of_tap, tl.sum(g * inputs, axis=0), mask=channels < d)


@triton.jit(do_not_specialize=["rows", "tokens_of_all"])
def conv_backward(
    taps, starts, lengths, gsum, gx, gtail, rows, tokens_of_all, d, WIDTH: tl.constexpr,
    STEPS: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Compute gx (tokens, d) from gsum, and gtail (rows, WIDTH - 1, d) in each row's first tile.
    TAIL is at least WIDTH - 1."""
    _slot, channels, row, start, length, step = _place(
        starts, lengths, rows, tokens_of_all, STEPS, CHANNELS, ROWS
    )
    if step < length:
        steps = step + tl.arange(0, STEPS)
        in_d = (channels < d)[None]
        gx_t = tl.zeros((STEPS, CHANNELS), tl.float32)
        for k in tl.static_range(WIDTH):
            later = steps + (WIDTH - 1 - k)
            g = load(gsum + (start + later)[:, None] * d + channels[None],
                     (later < length)[:, None] & in_d)  # fmt: skip
            gx_t += load(taps + k * d + channels, channels < d)[None] * g
        store(gx + (start + steps)[:, None] * d + channels[None], gx_t,
              (steps < length)[:, None] & in_d)  # fmt: skip
        if gtail is not None:
            tail_steps = tl.arange(0, TAIL)
            gtail_t = tl.zeros((TAIL, CHANNELS), tl.float32)
            for k in tl.static_range(WIDTH):
                later = tail_steps - k
                g = load(gsum + (start + later)[:, None] * d + channels[None],
                         ((later >= 0) & (later < length))[:, None] & in_d)  # fmt: skip
                gtail_t += load(taps + k * d + channels, channels < d)[None] * g
            at = row * (WIDTH - 1) + tail_steps
            tl.store(gtail + at[:, None] * d + channels[None], gtail_t,
                     mask=((tail_steps < WIDTH - 1) & (step == 0))[:, None] & in_d)  # fmt: skip
