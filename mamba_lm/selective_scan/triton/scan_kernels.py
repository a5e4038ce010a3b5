"""The scan in Triton, forward and backward, in float32: any length, any d, a state in and out.

A program is one warp with a tile of STEPS tokens, STATES >= n states and CHANNELS channels. Lanes
are along states and channels, so that a thread has all steps of its own (state, channel) pairs and
the recurrence stays in its registers. `_select_step` reads a step of a tile and `tl.where` writes
one at no cost, because the compiler knows the register of each step.

    scan_forward     reads rows forward; writes y and, for the backward pass, the state before every
                     tile
    scan_gradients   reads rows backward; writes the state's gradient after every tile
    scan_backward    computes all other gradients. Tiles are now independent, so that a program
                     computes one tile of tokens for many channels and sums the gradients of B and C
                     over them in registers, without atomics
    scan_carry       computes the state before each span

If there are too few rows to fill the GPU, each row is split into `spans` spans of `span` steps,
which are read in parallel, twice: first from zero, to compute the state that a span adds and the
decay over it; then, after `scan_carry`, from the right state. This is the chunked scan of Dao & Gu
2024 ("Transformers are SSMs", section 6) for Mamba-1, where each state has its own decay.

Rows of the batch are `lengths` tokens from `starts` on. `xs`, `ds`, `bs`, ... are the strides
between tokens of x, delta, B, ... States are (rows, spans, n, d), or (slots, n, d) with one for
each tile (`slot_of`). Nothing is read or written beyond a row's length.
"""

import triton
import triton.language as tl

from mamba_lm.selective_scan.triton.tiles import (
    in_state,
    load,
    num_slots,
    slot_of,
    store,
    tile_in,
)

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _select_step(tile, here):
    """Select the step of a tile (STEPS, ...) where `here`, (STEPS, 1, ...), is true. The sum is
    over integers, because compilers may not remove the addition of a 0.0."""
    bits = tl.where(here, tile.to(tl.int32, bitcast=True), 0)
    return tl.sum(bits, axis=0).to(tl.float32, bitcast=True)


@triton.jit
def _decays(delta, A):
    """Compute exp(Δ A) of a tile: delta (STEPS, CHANNELS), A (STATES, CHANNELS)."""
    return tl.exp2(delta[:, None, :] * (A * LOG2E)[None])


@triton.jit
def _place(starts, lengths, d, span, spans, CHANNELS: tl.constexpr):
    """Return a program's channels, its row and the row's first token; then the index of its span
    among the spans of all rows, the span's first step and its end."""
    tiles = tl.cdiv(d, CHANNELS)
    channels = tl.program_id(0) % tiles * CHANNELS + tl.arange(0, CHANNELS)
    place = tl.program_id(0) // tiles
    row = place // spans
    first = place % spans * span
    length = tl.load(lengths + row).to(tl.int32)
    return channels, row, tl.load(starts + row), place, first, tl.minimum(first + span, length)


@triton.jit(do_not_specialize=["span", "spans"])
def scan_forward(
    x, xs, delta, ds, A, B, bs, C, cs, D, z, zs, initial, starts, lengths, y, saved, final, elapsed,
    d, span, spans, n: tl.constexpr, STEPS: tl.constexpr, STATES: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """Write the state after each span, and y (tokens, d); without y, the sum of each span's Δ."""
    channels, row, start, place, first, end = _place(starts, lengths, d, span, spans, CHANNELS)
    steps, states = tl.arange(0, STEPS), tl.arange(0, STATES)
    own = in_state(states, channels, d)
    is_own = (states < n)[:, None] & (channels < d)[None]
    A_own = load(A + own, is_own)
    skip = load(D + channels, channels < d)
    h = tl.zeros((STATES, CHANNELS), tl.float32)
    if initial is not None:
        h = load(initial + place.to(tl.int64) * n * d + own, is_own)
    total = tl.zeros((CHANNELS,), tl.float32)
    slot = slot_of(start, row, first, STEPS)
    for at in tl.range(first, end, STEPS):
        if saved is not None:
            tl.store(saved + slot * n * d + own, h, mask=is_own)
            slot += 1
        is_real = at + steps < end
        tokens = (start + at + steps)[:, None]
        in_d, in_n = is_real[:, None] & (channels < d)[None], is_real[:, None] & (states < n)[None]
        x_t = load(x + tokens * xs + channels[None], in_d)
        delta_t = load(delta + tokens * ds + channels[None], in_d)
        B_t = load(B + tokens * bs + states[None], in_n)
        decay = _decays(delta_t, A_own)
        update = (delta_t * x_t)[:, None, :] * B_t[:, :, None]
        hs = update
        for step in tl.static_range(STEPS):
            here = (steps == step)[:, None, None]
            h = _select_step(decay, here) * h + _select_step(update, here)
            hs = tl.where(here, h[None], hs)
        if y is not None:
            C_t = load(C + tokens * cs + states[None], in_n)
            y_t = tl.sum(hs * C_t[:, :, None], axis=1) + skip[None] * x_t
            if z is not None:
                z_t = load(z + tokens * zs + channels[None], in_d)
                y_t *= z_t * tl.sigmoid(z_t)
            store(y + tokens * d + channels[None], y_t, in_d)
        else:
            total += tl.sum(delta_t, axis=0)
    tl.store(final + place.to(tl.int64) * n * d + own, h, mask=is_own)
    if y is None:
        tl.store(elapsed + place * d + channels, total, mask=channels < d)


@triton.jit(do_not_specialize=["span", "spans"])
def scan_gradients(
    delta, ds, A, C, cs, z, zs, gy, gfinal, starts, lengths, saved, ginitial, elapsed,
    d, span, spans, n: tl.constexpr, STEPS: tl.constexpr, STATES: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of the state before each span from gfinal, the one after it, and gy
    (tokens, d). Writes the gradient after each tile to `saved`, or, without it, the sum of a span's
    Δ to `elapsed`."""
    channels, row, start, place, first, end = _place(starts, lengths, d, span, spans, CHANNELS)
    steps, states = tl.arange(0, STEPS), tl.arange(0, STATES)
    own = in_state(states, channels, d)
    is_own = (states < n)[:, None] & (channels < d)[None]
    A_own = load(A + own, is_own)
    g = tl.zeros((STATES, CHANNELS), tl.float32)
    if gfinal is not None:
        g = load(gfinal + place.to(tl.int64) * n * d + own, is_own)
    total = tl.zeros((CHANNELS,), tl.float32)
    tiles = tl.cdiv(tl.maximum(end - first, 0), STEPS)
    slot = slot_of(start, row, first, STEPS) + tiles
    for k in tl.range(0, tiles):
        at = first + (tiles - 1 - k) * STEPS
        if saved is not None:
            slot -= 1
            tl.store(saved + slot * n * d + own, g, mask=is_own)
        is_real = at + steps < end
        tokens = (start + at + steps)[:, None]
        in_d, in_n = is_real[:, None] & (channels < d)[None], is_real[:, None] & (states < n)[None]
        delta_t = load(delta + tokens * ds + channels[None], in_d)
        gy_t = load(gy + tokens * d + channels[None], in_d)
        if z is not None:
            z_t = load(z + tokens * zs + channels[None], in_d)
            gy_t *= z_t * tl.sigmoid(z_t)
        C_t = load(C + tokens * cs + states[None], in_n)
        decay = _decays(delta_t, A_own)
        from_y = gy_t[:, None, :] * C_t[:, :, None]
        for k_step in tl.static_range(STEPS):
            here = (steps == STEPS - 1 - k_step)[:, None, None]
            g = _select_step(decay, here) * (g + _select_step(from_y, here))
        if saved is None:
            total += tl.sum(delta_t, axis=0)
    tl.store(ginitial + place.to(tl.int64) * n * d + own, g, mask=is_own)
    if saved is None:
        tl.store(elapsed + place * d + channels, total, mask=channels < d)


@triton.jit(do_not_specialize=["spans"])
def scan_carry(
    A, elapsed, first, added, carried, d, spans, n: tl.constexpr, STATES: tl.constexpr,
    CHANNELS: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Compute `carried`, the state before each span: before the first span it is `first`
    (rows, n, d), or zeros for None; then the state before the previous span, decayed over it, plus
    the state that it has `added`. With REVERSE, the same for gradients, from the last span on."""
    tiles = tl.cdiv(d, CHANNELS)
    channels = tl.program_id(0) % tiles * CHANNELS + tl.arange(0, CHANNELS)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    states = tl.arange(0, STATES)
    own = in_state(states, channels, d)
    is_own = (states < n)[:, None] & (channels < d)[None]
    A_own = load(A + own, is_own)
    h = tl.zeros((STATES, CHANNELS), tl.float32)
    if first is not None:
        h = load(first + row * n * d + own, is_own)
    for k in tl.range(0, spans):
        place = row * spans + (spans - 1 - k if REVERSE else k)
        tl.store(carried + place * n * d + own, h, mask=is_own)
        total = load(elapsed + place * d + channels, channels < d)
        h = tl.exp2(total[None] * (A_own * LOG2E)) * h
        h += load(added + place * n * d + own, is_own)


@triton.jit(do_not_specialize=["rows", "tokens_of_all", "group"])
def scan_backward(
    x, xs, delta, ds, A, B, bs, C, cs, D, z, zs, gy, starts, lengths, before, behind, gx, gdelta,
    gz, gA, gB, gC, gD, rows, tokens_of_all, d, group, n: tl.constexpr, STEPS: tl.constexpr,
    STATES: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of one tile of tokens for a group of channels.

    before and behind (slots, n, d) are the state before each tile and the state's gradient after
    it. gA (slots, n, d), gD (slots, d), gB and gC (groups, tokens, n) are terms of sums.
    """
    slots = num_slots(tokens_of_all, rows, STEPS)
    slot, first_channel = tl.program_id(0) % slots, tl.program_id(0) // slots * group
    _, start, length, at = tile_in(slot, starts, lengths, rows, STEPS, ROWS)
    if at < length:
        steps, states = tl.arange(0, STEPS), tl.arange(0, STATES)
        is_real = at + steps < length
        tokens = (start + at + steps)[:, None]
        in_n = is_real[:, None] & (states < n)[None]
        B_t = load(B + tokens * bs + states[None], in_n)
        C_t = load(C + tokens * cs + states[None], in_n)
        gB_t = tl.zeros((STEPS, STATES, CHANNELS), tl.float32)
        gC_t = tl.zeros((STEPS, STATES, CHANNELS), tl.float32)
        of_slot = slot.to(tl.int64) * d
        for channel in tl.range(first_channel, tl.minimum(first_channel + group, d), CHANNELS):
            channels = channel + tl.arange(0, CHANNELS)
            own = in_state(states, channels, d)
            is_own = (states < n)[:, None] & (channels < d)[None]
            in_d = is_real[:, None] & (channels < d)[None]
            A_own = load(A + own, is_own)
            skip = load(D + channels, channels < d)
            h = load(before + of_slot * n + own, is_own)
            g = load(behind + of_slot * n + own, is_own)
            x_t = load(x + tokens * xs + channels[None], in_d)
            delta_t = load(delta + tokens * ds + channels[None], in_d)
            gy_t = load(gy + tokens * d + channels[None], in_d)

            decay = _decays(delta_t, A_own)
            update = (delta_t * x_t)[:, None, :] * B_t[:, :, None]
            hs, kept = update, update  # the states, and the decayed states of the steps before
            for step in tl.static_range(STEPS):
                here = (steps == step)[:, None, None]
                h = _select_step(decay, here) * h
                kept = tl.where(here, h[None], kept)
                h += _select_step(update, here)
                hs = tl.where(here, h[None], hs)

            if z is not None:
                z_t = load(z + tokens * zs + channels[None], in_d)
                sigmoid = tl.sigmoid(z_t)
                y_t = tl.sum(hs * C_t[:, :, None], axis=1) + skip[None] * x_t
                gz_t = gy_t * y_t * sigmoid * (1 + z_t * (1 - sigmoid))
                store(gz + tokens * d + channels[None], gz_t, in_d)
                gy_t *= z_t * sigmoid
            gC_t += gy_t[:, None, :] * hs
            tl.store(gD + of_slot + channels, tl.sum(gy_t * x_t, axis=0), mask=channels < d)

            from_y = gy_t[:, None, :] * C_t[:, :, None]
            gs = from_y
            for k_step in tl.static_range(STEPS):
                here = (steps == STEPS - 1 - k_step)[:, None, None]
                g += _select_step(from_y, here)
                gs = tl.where(here, g[None], gs)
                g = _select_step(decay, here) * g

            gB_t += gs * (delta_t * x_t)[:, None, :]
            gupdate = tl.sum(gs * B_t[:, :, None], axis=1)
            gexponent = gs * kept
            gA_own = tl.sum(gexponent * delta_t[:, None, :], axis=0)
            tl.store(gA + of_slot * n + own, gA_own, mask=is_own)
            gdelta_t = x_t * gupdate + tl.sum(gexponent * A_own[None], axis=1)
            store(gdelta + tokens * d + channels[None], gdelta_t, in_d)
            gx_t = delta_t * gupdate + skip[None] * gy_t
            store(gx + tokens * d + channels[None], gx_t, in_d)
        part = (tl.program_id(0) // slots).to(tl.int64) * tokens_of_all + tokens
        tl.store(gB + part * n + states[None], tl.sum(gB_t, axis=2), mask=in_n)
        tl.store(gC + part * n + states[None], tl.sum(gC_t, axis=2), mask=in_n)
    else:  # a slot without a tile adds zeros
        for channel in tl.range(first_channel, tl.minimum(first_channel + group, d), CHANNELS):
            channels, states = channel + tl.arange(0, CHANNELS), tl.arange(0, STATES)
            is_own = (states < n)[:, None] & (channels < d)[None]
            nothing = tl.zeros((STATES, CHANNELS), tl.float32)
            own = slot.to(tl.int64) * n * d + in_state(states, channels, d)
            tl.store(gA + own, nothing, mask=is_own)
            none = tl.zeros((CHANNELS,), tl.float32)
            tl.store(gD + slot.to(tl.int64) * d + channels, none, mask=channels < d)
