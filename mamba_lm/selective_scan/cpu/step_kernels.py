"""The CPU backend's kernels for decoding: products of few rows, and one token through all layers.

Their limit is the bandwidth of main memory, so that each weight is read once for all rows.
Parameters and the convolution's tail are float32 or bfloat16, everything else is float32. Arrays
are flat.
"""

import numpy as np
import torch

from mamba_lm.selective_scan.cpu.elementary import (
    HIGHEST,
    LOG2E,
    exp2,
    f32,
    kernel,
    reduction_kernel,
    sigmoid,
    slice_row,
    softplus,
    store_rounded,
    to_float,
)
from mamba_lm.selective_scan.cpu.packing import (
    mark_share_done,
    next_jobs,
    next_phase_jobs,
    num_shares,
    unpack,
    wait_for_phase,
)
from mamba_lm.selective_scan.cpu.token_kernels import normalize


@reduction_kernel()
def _multiply(weight, first, stop, k, bias, b, x, y, ys):
    """Multiply rows [first, stop) of weight (?, k) by x (b, k), add bias, write y (b, ys).

    The weight is read from main memory once. With few rows of x, memory is the limit, and reading
    two rows of the weight at a time is faster than one after the other. With more rows, arithmetic
    is the limit, and blocks of four rows by four need the fewest loads.
    """
    if b < 4:
        half = (stop - first + 1) // 2
        for r in range(first, first + half):
            s = min(r + half, stop - 1)  # with an odd number of rows, one is computed twice
            w_r, w_s = slice_row(weight, r, k, 0, k), slice_row(weight, s, k, 0, k)
            for row in range(b):
                x0, r0, s0 = slice_row(x, row, k, 0, k), f32(0.0), f32(0.0)
                for c in range(k):
                    r0 += to_float(w_r[c]) * x0[c]
                    s0 += to_float(w_s[c]) * x0[c]
                y[row * ys + r], y[row * ys + s] = r0, s0
    else:
        quarter = (stop - first + 3) // 4
        for r in range(first, first + quarter):
            s, t = min(r + quarter, stop - 1), min(r + 2 * quarter, stop - 1)
            u = min(r + 3 * quarter, stop - 1)
            w_r, w_s = slice_row(weight, r, k, 0, k), slice_row(weight, s, k, 0, k)
            w_t, w_u = slice_row(weight, t, k, 0, k), slice_row(weight, u, k, 0, k)
            for row in range(0, b - 3, 4):
                x0, x1 = slice_row(x, row, k, 0, k), slice_row(x, row + 1, k, 0, k)
                x2, x3 = slice_row(x, row + 2, k, 0, k), slice_row(x, row + 3, k, 0, k)
                r0, r1, r2, r3 = f32(0.0), f32(0.0), f32(0.0), f32(0.0)
                s0, s1, s2, s3 = f32(0.0), f32(0.0), f32(0.0), f32(0.0)
                t0, t1, t2, t3 = f32(0.0), f32(0.0), f32(0.0), f32(0.0)
                u0, u1, u2, u3 = f32(0.0), f32(0.0), f32(0.0), f32(0.0)
                for c in range(k):
                    r_c, s_c = to_float(w_r[c]), to_float(w_s[c])
                    t_c, u_c = to_float(w_t[c]), to_float(w_u[c])
                    r0 += r_c * x0[c]
                    r1 += r_c * x1[c]
                    r2 += r_c * x2[c]
                    r3 += r_c * x3[c]
                    s0 += s_c * x0[c]
                    s1 += s_c * x1[c]
                    s2 += s_c * x2[c]
                    s3 += s_c * x3[c]
                    t0 += t_c * x0[c]
                    t1 += t_c * x1[c]
                    t2 += t_c * x2[c]
                    t3 += t_c * x3[c]
                    u0 += u_c * x0[c]
                    u1 += u_c * x1[c]
                    u2 += u_c * x2[c]
                    u3 += u_c * x3[c]
                y0, y1 = slice_row(y, row, ys, 0, ys), slice_row(y, row + 1, ys, 0, ys)
                y2, y3 = slice_row(y, row + 2, ys, 0, ys), slice_row(y, row + 3, ys, 0, ys)
                y0[r], y0[s], y0[t], y0[u] = r0, s0, t0, u0
                y1[r], y1[s], y1[t], y1[u] = r1, s1, t1, u1
                y2[r], y2[s], y2[t], y2[u] = r2, s2, t2, u2
                y3[r], y3[s], y3[t], y3[u] = r3, s3, t3, u3
            for row in range(b - b % 4, b):
                x0, y0 = slice_row(x, row, k, 0, k), slice_row(y, row, ys, 0, ys)
                r0, s0, t0, u0 = f32(0.0), f32(0.0), f32(0.0), f32(0.0)
                for c in range(k):
                    r0 += to_float(w_r[c]) * x0[c]
                    s0 += to_float(w_s[c]) * x0[c]
                    t0 += to_float(w_t[c]) * x0[c]
                    u0 += to_float(w_u[c]) * x0[c]
                y0[r], y0[s], y0[t], y0[u] = r0, s0, t0, u0
    if bias.size > 0:
        for row in range(b):
            for r in range(first, stop):
                y[row * ys + r] += to_float(bias[r])


@kernel()
def _few_rows_linear(jobs, b, k, out, x, weight, bias, y):
    """Compute rows [start, stop) of weight (out, k) times x (b, k), into y (b, out)."""
    _multiply(weight, jobs[0], jobs[1], k, bias, b, x, y, out)


# The four phases of a layer for b rows of one token. A job is one row of the weight of the phase's
# product, which is one channel of the result.


@kernel()
def _phase_in(
    jobs, b, m, d, w, residual, norm, norm_eps, in_proj, in_bias, conv, conv_bias, tail, new_tail,
    xz, x,
):  # fmt: skip
    """Compute the norm, the input projection xz (b, 2 d) and x (b, d), the convolution of its first
    half."""
    first, width = jobs[0], jobs[1] - jobs[0]
    u, total = np.empty(b * m, f32), np.empty(width, f32)
    for row in range(b):
        u_r = slice_row(u, row, m, 0, m)
        normalize(slice_row(residual, row, m, 0, m), norm_eps, u_r)
        for c in range(m):
            u_r[c] *= to_float(norm[c])
    _multiply(in_proj, first, first + width, m, in_bias, b, u, xz, 2 * d)
    _multiply(in_proj, d + first, d + first + width, m, in_bias, b, u, xz, 2 * d)
    for row in range(b):
        now = slice_row(xz, row, 2 * d, first, width)
        for c in range(width):
            total[c] = to_float(conv[(first + c) * w + w - 1]) * now[c]
            if conv_bias.size > 0:
                total[c] += to_float(conv_bias[first + c])
        for k in range(w - 1):
            before = slice_row(tail, row * (w - 1) + k, d, first, width)
            after = slice_row(new_tail, row * (w - 1) + k, d, first, width)
            if k < w - 2:
                after[:] = slice_row(tail, row * (w - 1) + k + 1, d, first, width)
            for c in range(width):
                total[c] += to_float(conv[(first + c) * w + k]) * to_float(before[c])
                if k == w - 2:
                    store_rounded(after, c, now[c])
        x_r = slice_row(x, row, d, first, width)
        for c in range(width):
            x_r[c] = total[c] * sigmoid(total[c])


@kernel()
def _phase_select(jobs, b, d, k, x_proj, x, selected):
    """Compute dt, B and C of each row, concatenated: selected (b, k)."""
    _multiply(x_proj, jobs[0], jobs[1], d, x_proj[:0], b, x, selected, k)


@kernel()
def _phase_scan(
    jobs, b, d, n, r, selected, bcdt_eps, dt_proj, dt_bias, A_log, D, h, xz, x, new_h, delta, y
):  # fmt: skip
    """Compute Δ, the recurrence and the gate: the state new_h (b, n, d) and y (b, d)."""
    first, width = jobs[0], jobs[1] - jobs[0]
    dt, B, C = np.empty(b * r, f32), np.empty(b * n, f32), np.empty(b * n, f32)
    for row in range(b):
        selected_r = slice_row(selected, row, r + 2 * n, 0, r + 2 * n)
        dt_r, B_r, C_r = (
            slice_row(dt, row, r, 0, r),
            slice_row(B, row, n, 0, n),
            slice_row(C, row, n, 0, n),
        )
        dt_r[:], B_r[:], C_r[:] = selected_r[:r], selected_r[r : r + n], selected_r[r + n :]
        if bcdt_eps >= 0.0:
            normalize(dt_r, bcdt_eps, dt_r)
            normalize(B_r, bcdt_eps, B_r)
            normalize(C_r, bcdt_eps, C_r)
    _multiply(dt_proj, first, first + width, r, dt_bias, b, dt, delta, d)
    a, update = np.empty(width, f32), np.empty(b * width, f32)
    for row in range(b):
        x_r, y_r = slice_row(x, row, d, first, width), slice_row(y, row, d, first, width)
        delta_r, update_r = (
            slice_row(delta, row, d, first, width),
            slice_row(update, row, width, 0, width),
        )
        for c in range(width):
            delta_r[c] = softplus(delta_r[c])
            update_r[c] = delta_r[c] * x_r[c]
            y_r[c] = to_float(D[first + c]) * x_r[c]
    for i in range(n):
        for c in range(width):
            exponent = LOG2E * to_float(A_log[(first + c) * n + i])
            a[c] = -LOG2E * exp2(HIGHEST if exponent > HIGHEST else exponent)
        for row in range(b):
            before = slice_row(h, row * n + i, d, first, width)
            after = slice_row(new_h, row * n + i, d, first, width)
            delta_r, y_r = (
                slice_row(delta, row, d, first, width),
                slice_row(y, row, d, first, width),
            )
            update_r = slice_row(update, row, width, 0, width)
            b_i, c_i = B[row * n + i], C[row * n + i]
            for c in range(width):
                state = exp2(delta_r[c] * a[c]) * before[c] + update_r[c] * b_i
                after[c] = state
                y_r[c] += state * c_i
    for row in range(b):
        z_r, y_r = slice_row(xz, row, 2 * d, d + first, width), slice_row(y, row, d, first, width)
        for c in range(width):
            y_r[c] *= z_r[c] * sigmoid(z_r[c])


@kernel()
def _phase_out(jobs, b, m, d, out_proj, out_bias, y, added, residual):
    """Compute the output projection and add it to residual (b, m)."""
    first, width = jobs[0], jobs[1] - jobs[0]
    _multiply(out_proj, first, first + width, d, out_bias, b, y, added, m)
    for row in range(b):
        added_r, residual_r = (
            slice_row(added, row, m, first, width),
            slice_row(residual, row, m, first, width),
        )
        for c in range(width):
            residual_r[c] += added_r[c]


@kernel()
def _layer(
    phase, shares, yield_core, progress, b, m, d, n, r, w, norm_eps, bcdt_eps, residual, space,
    tail, h, new_tail, new_h, norm, in_proj, in_bias, conv, conv_bias, x_proj, dt_proj, dt_bias,
    A_log, D, out_proj, out_bias,
):  # fmt: skip
    """Compute one layer, whose first phase is number `phase`. Weights as in `LayerWeights`."""
    xz, x, delta, y, selected, added = (
        space[: 2 * b * d], space[2 * b * d :], space[3 * b * d :], space[4 * b * d :],
        space[5 * b * d :], space[5 * b * d + b * (r + 2 * n) :],
    )  # fmt: skip
    jobs = next_phase_jobs(progress, phase, shares, d)
    while jobs[0] < jobs[1]:
        _phase_in(
            jobs, b, m, d, w, residual, norm, norm_eps, in_proj, in_bias, conv, conv_bias, tail,
            new_tail, xz, x,
        )  # fmt: skip
        mark_share_done(progress, phase)
        jobs = next_phase_jobs(progress, phase, shares, d)
    wait_for_phase(progress, phase, shares, yield_core)
    jobs = next_phase_jobs(progress, phase + 1, shares, r + 2 * n)
    while jobs[0] < jobs[1]:
        _phase_select(jobs, b, d, r + 2 * n, x_proj, x, selected)
        mark_share_done(progress, phase + 1)
        jobs = next_phase_jobs(progress, phase + 1, shares, r + 2 * n)
    wait_for_phase(progress, phase + 1, shares, yield_core)
    jobs = next_phase_jobs(progress, phase + 2, shares, d)
    while jobs[0] < jobs[1]:
        _phase_scan(
            jobs, b, d, n, r, selected, bcdt_eps, dt_proj, dt_bias, A_log, D, h, xz, x, new_h,
            delta, y,
        )  # fmt: skip
        mark_share_done(progress, phase + 2)
        jobs = next_phase_jobs(progress, phase + 2, shares, d)
    wait_for_phase(progress, phase + 2, shares, yield_core)
    jobs = next_phase_jobs(progress, phase + 3, shares, m)
    while jobs[0] < jobs[1]:
        _phase_out(jobs, b, m, d, out_proj, out_bias, y, added, residual)
        mark_share_done(progress, phase + 3)
        jobs = next_phase_jobs(progress, phase + 3, shares, m)
    wait_for_phase(progress, phase + 3, shares, yield_core)


# The functions that threads run, for parameters in float32 and in bfloat16.

_LINEAR_FLOAT32, _LINEAR_BFLOAT16 = "iii f f f f", "iii f h h f"
# Shapes and numbers, arrays that all layers share, tables of addresses; then, for each layer, the
# states and the weights.
_STEP = "iiiiiii ee i p f f l l"
_STATES_FLOAT32, _STATES_BFLOAT16 = "f f f f", "h f h f"
_WEIGHTS_FLOAT32 = "f ff ff f ff f f ff"
_WEIGHTS_BFLOAT16 = "h hh hh h hh h h hh"
NUM_STATES, NUM_WEIGHTS, PHASES = 4, 12, 4  # for each layer


def _linear_float32(packed):
    jobs = next_jobs(packed)
    while jobs[0] < jobs[1]:
        _few_rows_linear(jobs, *unpack(packed, _LINEAR_FLOAT32))
        jobs = next_jobs(packed)


def _linear_bfloat16(packed):
    jobs = next_jobs(packed)
    while jobs[0] < jobs[1]:
        _few_rows_linear(jobs, *unpack(packed, _LINEAR_BFLOAT16))
        jobs = next_jobs(packed)


def _step_float32(packed):
    n_layer, b, m, d, n, r, w, norm_eps, bcdt_eps, yield_core, progress, residual, space, states, \
        weights = unpack(packed, _STEP)  # fmt: skip
    for layer in range(n_layer):
        _layer(
            layer * PHASES, num_shares(packed), yield_core, progress, b, m, d, n, r, w, norm_eps,
            bcdt_eps, residual, space,
            *unpack(states[layer * NUM_STATES :], _STATES_FLOAT32),
            *unpack(weights[layer * NUM_WEIGHTS :], _WEIGHTS_FLOAT32),
        )  # fmt: skip


def _step_bfloat16(packed):
    n_layer, b, m, d, n, r, w, norm_eps, bcdt_eps, yield_core, progress, residual, space, states, \
        weights = unpack(packed, _STEP)  # fmt: skip
    for layer in range(n_layer):
        _layer(
            layer * PHASES, num_shares(packed), yield_core, progress, b, m, d, n, r, w, norm_eps,
            bcdt_eps, residual, space,
            *unpack(states[layer * NUM_STATES :], _STATES_BFLOAT16),
            *unpack(weights[layer * NUM_WEIGHTS :], _WEIGHTS_BFLOAT16),
        )  # fmt: skip


few_rows_linear = {torch.float32: _linear_float32, torch.bfloat16: _linear_bfloat16}
step = {torch.float32: _step_float32, torch.bfloat16: _step_bfloat16}
