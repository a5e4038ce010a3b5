"""The scan over complete rows and over one step, forward and backward, in float32.

A job is one row of the batch and one tile of `TILE` channels, in chunks of `CHUNK` steps, so that
its data stays in the caches of one core. Every inner loop runs over the channels of a tile and is
vectorised by LLVM. The loop over the n values of the state is outside the loop over the steps, so
that a loop over steps changes only a small part of the state. It handles `GROUP` values at a time,
which share their loads. The forward pass saves the state at the start of every chunk; the backward
pass recomputes a chunk from there and then reads it in reverse (Gu & Dao 2023, section 3.3.2).

Arrays are flat and in float32. The tokens of a row of the batch are contiguous: `lengths` tokens
from `starts` on, both int64. `xs`, `ds`, `bs`, ... are the strides between tokens of x, delta, B,
...; without a stride it is d. B and C are padded with zeros from n values to a multiple of `GROUP`.
A kernel computes jobs [start, stop); the jobs of one tile, one for each row, are consecutive.
"""

import numba
import numpy as np

from mamba_lm.selective_scan.cpu.elementary import (
    LN2,
    LOG2E,
    exp2,
    f32,
    kernel,
    reduction_kernel,
    sigmoid,
    slice_row,
)
from mamba_lm.selective_scan.cpu.packing import next_jobs, unpack

TILE = 128
CHUNK = 32
# Values of the state in one loop. Those beyond n are 0 at the start of every job and stay 0, except
# for inputs that are not finite: 0 times them is NaN, which must not reach the next row.
GROUP = 4

# Rows of the work space. Before an inner loop, LLVM's code compares all pointers with each other,
# except those at fixed distances in one array: with two arrays for everything, loops start faster.
# own (groups, ?, GROUP, TILE) belongs to the states, w (CHUNK, ?, TILE) to the steps.
_A, _H, _GA = range(3)
_DELTA, _UPDATE, _OUT, _GOUT, _GINPUT, _GEXPONENT, _STATE = range(7)
_DECAY = _STATE + GROUP
_FORWARD_ROWS, _BACKWARD_ROWS = _OUT + 1, _DECAY + GROUP


@numba.njit(inline="always")
def _load_four(source, first):
    """Load four rows or values, from `first` on."""
    return source[first], source[first + 1], source[first + 2], source[first + 3]


@kernel()
def _load_decay_rates(own, A, n, first, width):
    """Load a tile of A (d, n), times log2(e): exp(Δ A) is then exp2(Δ a)."""
    for i in range(n):
        a_i = own[i // GROUP, _A, i % GROUP]
        for c in range(width):
            a_i[c] = A[(first + c) * n + i] * LOG2E


@numba.njit(inline="always")
def _load_step(w_s, x, xs, delta, ds, D, t, first, width):
    """Load what all states share at step t: Δ, Δ x and D x."""
    x_t, delta_t = slice_row(x, t, xs, first, width), slice_row(delta, t, ds, first, width)
    skip, delta_s, update_s, out_s = D[first : first + width], w_s[_DELTA], w_s[_UPDATE], w_s[_OUT]
    for c in range(width):
        delta_s[c] = delta_t[c]
        update_s[c] = delta_t[c] * x_t[c]
        out_s[c] = skip[c] * x_t[c]


@numba.njit(inline="always")
def _find_saved(starts, row, chunk, n):
    """Find the first row in `saved` of the state at the start of a chunk, which has n rows."""
    return (starts[row] // CHUNK + row + chunk) * n


@kernel()
def _scan_forward(
    jobs, rows, d, n, x, xs, delta, ds, A, B, bs, C, cs, D, z, zs, initial, starts, lengths, y,
    final, saved,
):  # fmt: skip
    """Compute jobs [start, stop) of the scan."""
    groups = -(-n // GROUP)
    own = np.zeros((groups, 2, GROUP, TILE), f32)
    w = np.empty((CHUNK, _FORWARD_ROWS, TILE), f32)
    for job in range(jobs[0], jobs[1]):
        row, first = job % rows, job // rows * TILE
        width = min(TILE, d - first)
        if row == 0 or job == jobs[0]:
            _load_decay_rates(own, A, n, first, width)
        for i in range(groups * GROUP):
            h_i = own[i // GROUP, _H, i % GROUP]
            if initial.size > 0 and i < n:
                h_i[:width] = slice_row(initial, row * n + i, d, first, width)
            else:
                h_i[:] = f32(0.0)
        for chunk in range((lengths[row] + CHUNK - 1) // CHUNK):
            step = starts[row] + chunk * CHUNK
            steps = min(CHUNK, lengths[row] - chunk * CHUNK)
            if saved.size > 0:
                for i in range(n):
                    at = _find_saved(starts, row, chunk, n) + i
                    slice_row(saved, at, d, first, width)[:] = own[
                        i // GROUP, _H, i % GROUP, :width
                    ]
            for s in range(steps):
                _load_step(w[s], x, xs, delta, ds, D, step + s, first, width)
            for g in range(groups):
                B_g, C_g = B[step * bs + GROUP * g :], C[step * cs + GROUP * g :]
                _advance(own[g], w, B_g, bs, C_g, cs, steps, width)
            for s in range(steps):
                y_s, out_s = slice_row(y, step + s, d, first, width), w[s, _OUT]
                if z.size > 0:
                    z_s = slice_row(z, step + s, zs, first, width)
                    for c in range(width):
                        y_s[c] = out_s[c] * z_s[c] * sigmoid(z_s[c])
                else:
                    y_s[:] = out_s[:width]
        for i in range(n):
            slice_row(final, row * n + i, d, first, width)[:] = own[
                i // GROUP, _H, i % GROUP, :width
            ]


@numba.njit(inline="always")
def _advance(own_g, w, B, bs, C, cs, steps, width):
    """Advance the states of a group over the steps of a chunk, and add their part of y. B and C
    begin with the group's values at the first step."""
    a0, a1, a2, a3 = _load_four(own_g[_A], 0)
    h0, h1, h2, h3 = _load_four(own_g[_H], 0)
    for s in range(steps):
        delta_s, update_s, out_s = w[s, _DELTA], w[s, _UPDATE], w[s, _OUT]
        b0, b1, b2, b3 = _load_four(B, s * bs)
        c0, c1, c2, c3 = _load_four(C, s * cs)
        for c in range(width):
            delta, update = delta_s[c], update_s[c]
            next0 = exp2(delta * a0[c]) * h0[c] + update * b0
            next1 = exp2(delta * a1[c]) * h1[c] + update * b1
            next2 = exp2(delta * a2[c]) * h2[c] + update * b2
            next3 = exp2(delta * a3[c]) * h3[c] + update * b3
            h0[c], h1[c], h2[c], h3[c] = next0, next1, next2, next3
            out_s[c] += next0 * c0 + next1 * c1 + next2 * c2 + next3 * c3


@kernel()
def _scan_step(jobs, rows, d, n, x, xs, delta, ds, A, B, bs, C, cs, D, z, zs, h0, y, h1):
    """Compute jobs [start, stop) of one step, from the state h0 to the state h1."""
    own, update = np.empty((-(-n // GROUP), 1, GROUP, TILE), f32), np.empty(TILE, f32)
    for job in range(jobs[0], jobs[1]):
        row, first = job % rows, job // rows * TILE
        width = min(TILE, d - first)
        if row == 0 or job == jobs[0]:
            _load_decay_rates(own, A, n, first, width)
        skip, y_s = D[first : first + width], slice_row(y, row, d, first, width)
        x_s, delta_s = slice_row(x, row, xs, first, width), slice_row(delta, row, ds, first, width)
        for c in range(width):
            update[c] = delta_s[c] * x_s[c]
            y_s[c] = skip[c] * x_s[c]
        for i in range(n):
            before = slice_row(h0, row * n + i, d, first, width)
            after = slice_row(h1, row * n + i, d, first, width)
            a_i, b_i, c_i = own[i // GROUP, _A, i % GROUP], B[row * bs + i], C[row * cs + i]
            for c in range(width):
                state = exp2(delta_s[c] * a_i[c]) * before[c] + update[c] * b_i
                after[c] = state
                y_s[c] += state * c_i
        if z.size > 0:
            z_s = slice_row(z, row, zs, first, width)
            for c in range(width):
                y_s[c] *= z_s[c] * sigmoid(z_s[c])


@reduction_kernel()
def _scan_backward(
    jobs, rows, tokens, d, n, x, xs, delta, ds, A, B, bs, C, cs, D, z, zs, starts, lengths, saved,
    gy, gfinal, gx, gdelta, gz, gA, gB, gC, gD, ginitial,
):  # fmt: skip
    """Compute jobs [start, stop) of the scan's gradients.

    gA (rows, n, d), gD (rows, d) and gB, gC (tiles, tokens, gs) are terms of sums, so that threads
    share no memory and the result does not depend on their number. gB and gC are zeros at first.
    """
    groups = -(-n // GROUP)
    gs = groups * GROUP
    own = np.zeros((groups, 3, GROUP, TILE), f32)
    w = np.empty((CHUNK + 1, _BACKWARD_ROWS, TILE), f32)
    for job in range(jobs[0], jobs[1]):
        row, tile = job % rows, job // rows
        first = tile * TILE
        width = min(TILE, d - first)
        skip, gskip = D[first : first + width], slice_row(gD, row, d, first, width)
        gskip[:] = f32(0.0)
        if row == 0 or job == jobs[0]:
            _load_decay_rates(own, A, n, first, width)
        for i in range(gs):
            own[i // GROUP, _GA, i % GROUP] = f32(0.0)
            if i < n:
                own[i // GROUP, _H, i % GROUP, :width] = slice_row(
                    gfinal, row * n + i, d, first, width
                )
            else:
                own[i // GROUP, _H, i % GROUP] = f32(0.0)
        for chunk in range((lengths[row] + CHUNK - 1) // CHUNK - 1, -1, -1):
            step = starts[row] + chunk * CHUNK
            steps = min(CHUNK, lengths[row] - chunk * CHUNK)
            for s in range(steps):
                _load_step(w[s], x, xs, delta, ds, D, step + s, first, width)
                gy_s, gout_s = slice_row(gy, step + s, d, first, width), w[s, _GOUT]
                if z.size > 0:
                    z_s = slice_row(z, step + s, zs, first, width)
                    gz_s = slice_row(gz, step + s, d, first, width)
                    for c in range(width):
                        gate = sigmoid(z_s[c])
                        silu = z_s[c] * gate
                        gz_s[c] = gy_s[c] * (gate + silu * (f32(1.0) - gate))
                        gout_s[c] = gy_s[c] * silu
                else:
                    gout_s[:width] = gy_s
                w[s, _GINPUT], w[s, _GEXPONENT] = f32(0.0), f32(0.0)
            for g in range(groups):
                for k in range(GROUP):
                    if GROUP * g + k < n:
                        at = _find_saved(starts, row, chunk, n) + GROUP * g + k
                        w[0, _STATE + k, :width] = slice_row(saved, at, d, first, width)
                    else:
                        w[0, _STATE + k] = f32(0.0)
                B_g, C_g = B[step * bs + GROUP * g :], C[step * cs + GROUP * g :]
                at = (tile * tokens + step) * gs + GROUP * g
                _replay(own[g], w, B_g, bs, C_g, cs, gC[at:], gs, steps, width)
                _reverse(own[g], w, B_g, bs, C_g, cs, gB[at:], gs, steps, width)
            for s in range(steps):
                x_s, delta_s = slice_row(x, step + s, xs, first, width), w[s, _DELTA]
                gx_s, gdelta_s = (
                    slice_row(gx, step + s, d, first, width),
                    slice_row(gdelta, step + s, d, first, width),
                )
                gout_s, ginput_s, gexponent_s = w[s, _GOUT], w[s, _GINPUT], w[s, _GEXPONENT]
                for c in range(width):
                    gskip[c] += gout_s[c] * x_s[c]
                    gx_s[c] = ginput_s[c] * delta_s[c] + gout_s[c] * skip[c]
                    gdelta_s[c] = LN2 * gexponent_s[c] + ginput_s[c] * x_s[c]
                if z.size > 0:
                    gz_s, out_s = slice_row(gz, step + s, d, first, width), w[s, _OUT]
                    for c in range(width):
                        gz_s[c] *= out_s[c]
        for i in range(n):
            slice_row(gA, row * n + i, d, first, width)[:] = own[i // GROUP, _GA, i % GROUP, :width]
            slice_row(ginitial, row * n + i, d, first, width)[:] = own[
                i // GROUP, _H, i % GROUP, :width
            ]


@numba.njit(inline="always")
def _replay(own_g, w, B, bs, C, cs, gC, gs, steps, width):
    """As _advance, but keep each step's states and decays in w, and compute the gradient of C."""
    a0, a1, a2, a3 = _load_four(own_g[_A], 0)
    for s in range(steps):
        w_s = w[s]
        delta_s, update_s, out_s, gout_s = w_s[_DELTA], w_s[_UPDATE], w_s[_OUT], w_s[_GOUT]
        h0, h1, h2, h3 = _load_four(w_s, _STATE)
        after0, after1, after2, after3 = _load_four(w[s + 1], _STATE)
        kept0, kept1, kept2, kept3 = _load_four(w_s, _DECAY)
        b0, b1, b2, b3 = _load_four(B, s * bs)
        c0, c1, c2, c3 = _load_four(C, s * cs)
        gc0, gc1, gc2, gc3 = f32(0.0), f32(0.0), f32(0.0), f32(0.0)
        for c in range(width):
            delta, update, gout = delta_s[c], update_s[c], gout_s[c]
            decay0, decay1 = exp2(delta * a0[c]), exp2(delta * a1[c])
            decay2, decay3 = exp2(delta * a2[c]), exp2(delta * a3[c])
            next0, next1 = decay0 * h0[c] + update * b0, decay1 * h1[c] + update * b1
            next2, next3 = decay2 * h2[c] + update * b2, decay3 * h3[c] + update * b3
            kept0[c], kept1[c], kept2[c], kept3[c] = decay0, decay1, decay2, decay3
            after0[c], after1[c], after2[c], after3[c] = next0, next1, next2, next3
            out_s[c] += next0 * c0 + next1 * c1 + next2 * c2 + next3 * c3
            gc0 += gout * next0
            gc1 += gout * next1
            gc2 += gout * next2
            gc3 += gout * next3
        gC[s * gs], gC[s * gs + 1], gC[s * gs + 2], gC[s * gs + 3] = gc0, gc1, gc2, gc3


@numba.njit(inline="always")
def _reverse(own_g, w, B, bs, C, cs, gB, gs, steps, width):
    """Compute a group's gradients over a chunk in reverse, from what _replay kept."""
    a0, a1, a2, a3 = _load_four(own_g[_A], 0)
    gh0, gh1, gh2, gh3 = _load_four(own_g[_H], 0)
    ga0, ga1, ga2, ga3 = _load_four(own_g[_GA], 0)
    for s in range(steps - 1, -1, -1):
        w_s = w[s]
        delta_s, update_s, gout_s = w_s[_DELTA], w_s[_UPDATE], w_s[_GOUT]
        ginput_s, gexponent_s = w_s[_GINPUT], w_s[_GEXPONENT]
        h0, h1, h2, h3 = _load_four(w_s, _STATE)
        decay0, decay1, decay2, decay3 = _load_four(w_s, _DECAY)
        b0, b1, b2, b3 = _load_four(B, s * bs)
        c0, c1, c2, c3 = _load_four(C, s * cs)
        gb0, gb1, gb2, gb3 = f32(0.0), f32(0.0), f32(0.0), f32(0.0)
        for c in range(width):
            delta, update, gout = delta_s[c], update_s[c], gout_s[c]
            g0, g1 = gh0[c] + gout * c0, gh1[c] + gout * c1
            g2, g3 = gh2[c] + gout * c2, gh3[c] + gout * c3
            before0, before1 = g0 * decay0[c], g1 * decay1[c]
            before2, before3 = g2 * decay2[c], g3 * decay3[c]
            gh0[c], gh1[c], gh2[c], gh3[c] = before0, before1, before2, before3
            exponent0, exponent1 = before0 * h0[c], before1 * h1[c]
            exponent2, exponent3 = before2 * h2[c], before3 * h3[c]
            gexponent_s[c] += (
                exponent0 * a0[c] + exponent1 * a1[c] + exponent2 * a2[c] + exponent3 * a3[c]
            )
            ga0[c] += exponent0 * delta
            ga1[c] += exponent1 * delta
            ga2[c] += exponent2 * delta
            ga3[c] += exponent3 * delta
            ginput_s[c] += g0 * b0 + g1 * b1 + g2 * b2 + g3 * b3
            gb0 += g0 * update
            gb1 += g1 * update
            gb2 += g2 * update
            gb3 += g3 * update
        gB[s * gs], gB[s * gs + 1], gB[s * gs + 2], gB[s * gs + 3] = gb0, gb1, gb2, gb3


def scan_forward(packed):
    jobs = next_jobs(packed)
    while jobs[0] < jobs[1]:
        _scan_forward(jobs, *unpack(packed, "i i i fi fi f fi fi f fi f l l f f f"))
        jobs = next_jobs(packed)


def scan_backward(packed):
    jobs = next_jobs(packed)
    while jobs[0] < jobs[1]:
        _scan_backward(
            jobs, *unpack(packed, "i i i i fi fi f fi fi f fi l l f f f f f f f f f f f")
        )
        jobs = next_jobs(packed)


def scan_step(packed):
    jobs = next_jobs(packed)
    while jobs[0] < jobs[1]:
        _scan_step(jobs, *unpack(packed, "i i i fi fi f fi fi f fi f f f"))
        jobs = next_jobs(packed)
