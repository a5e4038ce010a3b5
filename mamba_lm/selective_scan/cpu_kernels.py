"""The CPU backend's kernels, compiled by Numba: float32, vectorised over channels.

A job is one row of the batch and one tile of `TILE` channels, read in chunks of `CHUNK` steps, so
that all it touches stays in the processor's nearest cache. Every inner loop runs over the channels
of a tile, which LLVM turns into vector instructions; the loop over the state's n stands outside
that over the steps, for one i's part of the state is then all that moves. The forward pass keeps
the state at the start of every chunk; the backward pass replays a chunk from there and then walks
it in reverse (the recomputation of Gu & Dao 2023, section 3.3.2).

Arrays come flat and in float32: the tokens of a row of the batch stand together, `lengths` of them
from `starts` on, both int64. `?s` is the distance between the tokens of `?`, d where it is not
given. A kernel does jobs [start, stop), tile after tile, of each all rows.

All that is compiled stands in this file: Numba's cache on disk looks at no other to see whether a
kernel has changed.
"""

import functools
import math

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

TILE = 128
CHUNK = 32

# What a kernel is called with, as packed by `cpu_threads.run`: the next share of each phase, the
# number of shares, that of jobs, the function that waits for the team, and then its arguments.
PHASES = 4
_SHARES, _JOBS, _BARRIER, HEADER = range(PHASES, PHASES + 4)
_PACKED = types.CPointer(types.int64)
SIGNATURE = types.void(_PACKED)

f32 = np.float32
_LOG2E, _LN2 = f32(1.4426950408889634), f32(0.6931471805599453)
_LOWEST, _HIGHEST = f32(-125.0), f32(126.0)
# Adding 1.5 * 2^23 rounds a float32 to an integer that stands in its lowest mantissa bits.
_ROUND = f32(12582912.0)


@intrinsic
def _float_bits(typing_context, value):
    """The 32 bits of a float as an integer."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.int32(types.float32), generate


@intrinsic
def _bits_float(typing_context, value):
    """The float whose 32 bits are the given integer."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), generate


def _float(value):
    """A float32, or the 16 bits of a bfloat16, as float32."""
    raise NotImplementedError("for use in kernels")


@overload(_float, inline="always")
def _to_float(value):
    if value == types.uint16:
        return lambda value: _bits_float(numba.int32(value) << numba.int32(16))
    return lambda value: value


def _put(array, at, value):
    """Store a float32 in an array of them or of bfloat16s, rounded to the nearest."""
    raise NotImplementedError("for use in kernels")


@overload(_put, inline="always")
def _put_rounded(array, at, value):
    def put_bfloat16(array, at, value):
        bits = _float_bits(value)
        odd = (bits >> numba.int32(16)) & numba.int32(1)  # ties go to even
        array[at] = numba.uint16((bits + numba.int32(0x7FFF) + odd) >> numba.int32(16))

    def put_float(array, at, value):
        array[at] = value

    return put_bfloat16 if array.dtype == types.uint16 else put_float


# The rounding trick below does not survive reassociation: these functions allow contraction alone.
@numba.njit(fastmath={"contract"}, error_model="numpy", cache=True)
def _exp2(x):
    """2^x for x <= 126 within 2 ulp, branch-free so that it vectorises; NaN stays NaN.

    The polynomial is the minimax one of 2^r - 1 on [-1/2, 1/2]: 9e-8 off at most. Below 2^-125 it
    stays there, since subnormal numbers are slow.
    """
    clamped = _LOWEST if x < _LOWEST else x
    shifted = clamped + _ROUND
    r = clamped - (shifted - _ROUND)
    p = f32(1.3264727e-3)
    p = p * r + f32(9.6715130e-3)
    p = p * r + f32(5.5507336e-2)
    p = p * r + f32(2.4022242e-1)
    p = p * r + f32(6.9314700e-1)
    p = p * r + f32(1.0)
    return _bits_float(_float_bits(p) + (_float_bits(shifted) << numba.int32(23)))


@numba.njit(fastmath={"contract"}, error_model="numpy", cache=True)
def _sigmoid(x):
    exponent = -_LOG2E * x
    return f32(1.0) / (f32(1.0) + _exp2(_HIGHEST if exponent > _HIGHEST else exponent))


@numba.njit(fastmath={"contract"}, error_model="numpy", cache=True)
def _softplus(x):
    """log(1 + e^x) = max(x, 0) + log(1 + t), t = e^-|x|, within some ulp also where it is small.

    log(1 + t) = 2 atanh(s), s = t / (2 + t) <= 1/3, by a minimax polynomial in s^2: 4e-9 off.
    """
    t = _exp2(-_LOG2E * abs(x))
    s = t / (f32(2.0) + t)
    square = s * s
    p = f32(0.28178344)
    p = p * square + f32(0.27960611)
    p = p * square + f32(0.40024909)
    p = p * square + f32(0.66666315)
    p = p * square + f32(2.0)
    return max(x, f32(0.0)) + s * p


_kernel = functools.partial(
    numba.njit, nogil=True, cache=True, error_model="numpy", fastmath={"contract"}
)
# Sums over a tile vectorise only where the order of addition is free.
_reduction_kernel = functools.partial(
    numba.njit, nogil=True, cache=True, error_model="numpy", fastmath={"contract", "reassoc", "nsz"}
)


@numba.njit(inline="always")
def _part(source, row, row_stride, first, width):
    """Channels [first, first + width) of one row of a flat array."""
    at = row * row_stride + first
    return source[at : at + width]


# Rows of work space. Before it enters an inner loop, LLVM compares all its pointers with each
# other, except those at fixed distances in one array: with two arrays for all, loops start sooner.
_A, _H, _GA = 0, 1, 2
_UPDATE, _OUT, _GOUT, _GINPUT, _GEXPONENT, _STATE, _DECAY = range(7)


@_kernel()
def _load_decay_rates(own, A, n, first, width):
    """A (d, n) in powers of two: exp(Δ A) is then exp2(Δ a)."""
    for i in range(n):
        a_i = own[i, _A]
        for c in range(width):
            a_i[c] = A[(first + c) * n + i] * _LOG2E


@_kernel()
def _scan_forward(
    jobs, rows, d, n, x, xs, delta, ds, A, B, bs, C, cs, D, z, zs, h0, starts, lengths, y, hT, saved
):  # fmt: skip
    """Jobs [start, stop) of the scan."""
    own = np.empty((n, 2, TILE), f32)
    w = np.empty((CHUNK, 2, TILE), f32)
    for job in range(jobs[0], jobs[1]):
        row, first = job % rows, job // rows * TILE
        width = min(TILE, d - first)
        skip = D[first : first + width]
        if row == 0 or job == jobs[0]:
            _load_decay_rates(own, A, n, first, width)
        for i in range(n):
            if h0.size > 0:
                own[i, _H, :width] = _part(h0, row * n + i, d, first, width)
            else:
                own[i, _H] = f32(0.0)
        for chunk in range((lengths[row] + CHUNK - 1) // CHUNK):
            step = starts[row] + chunk * CHUNK
            steps = min(CHUNK, lengths[row] - chunk * CHUNK)
            if saved.size > 0:
                for i in range(n):
                    at = (starts[row] // CHUNK + row + chunk) * n + i
                    _part(saved, at, d, first, width)[:] = own[i, _H, :width]
            for s in range(steps):
                x_s, delta_s = (
                    _part(x, step + s, xs, first, width),
                    _part(delta, step + s, ds, first, width),
                )
                update_s, out_s = w[s, _UPDATE], w[s, _OUT]
                for c in range(width):
                    update_s[c] = delta_s[c] * x_s[c]
                    out_s[c] = skip[c] * x_s[c]
            for i in range(n):
                a_i, h_i = own[i, _A], own[i, _H]
                for s in range(steps):
                    delta_s = _part(delta, step + s, ds, first, width)
                    update_s, out_s = w[s, _UPDATE], w[s, _OUT]
                    b_i, c_i = B[(step + s) * bs + i], C[(step + s) * cs + i]
                    for c in range(width):
                        state = _exp2(delta_s[c] * a_i[c]) * h_i[c] + update_s[c] * b_i
                        h_i[c] = state
                        out_s[c] += state * c_i
            for s in range(steps):
                y_s, out_s = _part(y, step + s, d, first, width), w[s, _OUT]
                if z.size > 0:
                    z_s = _part(z, step + s, zs, first, width)
                    for c in range(width):
                        y_s[c] = out_s[c] * z_s[c] * _sigmoid(z_s[c])
                else:
                    y_s[:] = out_s[:width]
        for i in range(n):
            _part(hT, row * n + i, d, first, width)[:] = own[i, _H, :width]


@_kernel()
def _scan_step(jobs, rows, d, n, x, xs, delta, ds, A, B, bs, C, cs, D, z, zs, h0, y, h1):
    """Jobs [start, stop) of one step: the state goes from h0 to h1 without a stop on the way."""
    own, update = np.empty((n, 1, TILE), f32), np.empty(TILE, f32)
    for job in range(jobs[0], jobs[1]):
        row, first = job % rows, job // rows * TILE
        width = min(TILE, d - first)
        if row == 0 or job == jobs[0]:
            _load_decay_rates(own, A, n, first, width)
        skip, y_s = D[first : first + width], _part(y, row, d, first, width)
        x_s, delta_s = _part(x, row, xs, first, width), _part(delta, row, ds, first, width)
        for c in range(width):
            update[c] = delta_s[c] * x_s[c]
            y_s[c] = skip[c] * x_s[c]
        for i in range(n):
            before = _part(h0, row * n + i, d, first, width)
            after = _part(h1, row * n + i, d, first, width)
            a_i, b_i, c_i = own[i, _A], B[row * bs + i], C[row * cs + i]
            for c in range(width):
                state = _exp2(delta_s[c] * a_i[c]) * before[c] + update[c] * b_i
                after[c] = state
                y_s[c] += state * c_i
        if z.size > 0:
            z_s = _part(z, row, zs, first, width)
            for c in range(width):
                y_s[c] *= z_s[c] * _sigmoid(z_s[c])


@_reduction_kernel()
def _scan_backward(
    jobs, rows, tokens, d, n, x, xs, delta, ds, A, B, bs, C, cs, D, z, zs, starts, lengths, saved,
    gy, ghT, gx, gdelta, gz, gA, gB, gC, gD, gh0,
):  # fmt: skip
    """Jobs [start, stop) of the scan's gradient. gA (rows, n, d), gD (rows, d) and gB, gC
    (tiles, tokens, n) are partial sums, so that threads share nothing and the result does not
    depend on their number; the latter two come as zeros."""
    own = np.empty((n, 3, TILE), f32)
    w = np.empty((CHUNK + 1, 7, TILE), f32)
    for job in range(jobs[0], jobs[1]):
        row, tile = job % rows, job // rows
        first = tile * TILE
        width = min(TILE, d - first)
        skip, gskip = D[first : first + width], _part(gD, row, d, first, width)
        gskip[:] = f32(0.0)
        if row == 0 or job == jobs[0]:
            _load_decay_rates(own, A, n, first, width)
        for i in range(n):
            own[i, _GA] = f32(0.0)
            own[i, _H, :width] = _part(ghT, row * n + i, d, first, width)
        for chunk in range((lengths[row] + CHUNK - 1) // CHUNK - 1, -1, -1):
            step = starts[row] + chunk * CHUNK
            steps = min(CHUNK, lengths[row] - chunk * CHUNK)
            for s in range(steps):
                x_s, delta_s, gy_s = (
                    _part(x, step + s, xs, first, width),
                    _part(delta, step + s, ds, first, width),
                    _part(gy, step + s, d, first, width),
                )
                update_s, out_s, gout_s = w[s, _UPDATE], w[s, _OUT], w[s, _GOUT]
                for c in range(width):
                    update_s[c] = delta_s[c] * x_s[c]
                    out_s[c] = skip[c] * x_s[c]
                if z.size > 0:
                    z_s = _part(z, step + s, zs, first, width)
                    gz_s = _part(gz, step + s, d, first, width)
                    for c in range(width):
                        sigmoid = _sigmoid(z_s[c])
                        silu = z_s[c] * sigmoid
                        gz_s[c] = gy_s[c] * (sigmoid + silu * (f32(1.0) - sigmoid))
                        gout_s[c] = gy_s[c] * silu
                else:
                    gout_s[:width] = gy_s
                w[s, _GINPUT], w[s, _GEXPONENT] = f32(0.0), f32(0.0)
            for i in range(n):
                a_i, ga_i, gh_i = own[i, _A], own[i, _GA], own[i, _H]
                w[0, _STATE, :width] = _part(
                    saved, (starts[row] // CHUNK + row + chunk) * n + i, d, first, width
                )
                for s in range(steps):
                    delta_s, w_s = _part(delta, step + s, ds, first, width), w[s]
                    update_s, out_s, gout_s = w_s[_UPDATE], w_s[_OUT], w_s[_GOUT]
                    h_s, h_after, decay_s = w_s[_STATE], w[s + 1, _STATE], w_s[_DECAY]
                    b_i, c_i, gc_i = B[(step + s) * bs + i], C[(step + s) * cs + i], f32(0.0)
                    for c in range(width):
                        decay = _exp2(delta_s[c] * a_i[c])
                        state = decay * h_s[c] + update_s[c] * b_i
                        decay_s[c] = decay
                        h_after[c] = state
                        out_s[c] += state * c_i
                        gc_i += gout_s[c] * state
                    gC[(tile * tokens + step + s) * n + i] = gc_i
                for s in range(steps - 1, -1, -1):
                    delta_s, w_s = _part(delta, step + s, ds, first, width), w[s]
                    update_s, gout_s, h_s = w_s[_UPDATE], w_s[_GOUT], w_s[_STATE]
                    decay_s, ginput_s, gexponent_s = w_s[_DECAY], w_s[_GINPUT], w_s[_GEXPONENT]
                    b_i, c_i, gb_i = B[(step + s) * bs + i], C[(step + s) * cs + i], f32(0.0)
                    for c in range(width):
                        g = gh_i[c] + gout_s[c] * c_i
                        decayed = g * decay_s[c]
                        exponent = decayed * h_s[c]
                        gh_i[c] = decayed
                        gexponent_s[c] += exponent * a_i[c]
                        ga_i[c] += exponent * delta_s[c]
                        ginput_s[c] += g * b_i
                        gb_i += g * update_s[c]
                    gB[(tile * tokens + step + s) * n + i] = gb_i
            for s in range(steps):
                x_s, delta_s = (
                    _part(x, step + s, xs, first, width),
                    _part(delta, step + s, ds, first, width),
                )
                gx_s, gdelta_s = (
                    _part(gx, step + s, d, first, width),
                    _part(gdelta, step + s, d, first, width),
                )
                gout_s, ginput_s, gexponent_s = w[s, _GOUT], w[s, _GINPUT], w[s, _GEXPONENT]
                for c in range(width):
                    gskip[c] += gout_s[c] * x_s[c]
                    gx_s[c] = ginput_s[c] * delta_s[c] + gout_s[c] * skip[c]
                    gdelta_s[c] = _LN2 * gexponent_s[c] + ginput_s[c] * x_s[c]
                if z.size > 0:
                    gz_s, out_s = _part(gz, step + s, d, first, width), w[s, _OUT]
                    for c in range(width):
                        gz_s[c] *= out_s[c]
        for i in range(n):
            _part(gA, row * n + i, d, first, width)[:] = own[i, _GA, :width]
            _part(gh0, row * n + i, d, first, width)[:] = own[i, _H, :width]


@_kernel()
def _conv_forward(jobs, rows, d, w, x, xs, weight, bias, tail, starts, lengths, y):
    """Jobs [start, stop) of SiLU(conv(x)). weight (w, d) and tail (rows, w - 1, d), all flat."""
    zeros, total = np.zeros(TILE, f32), np.empty(TILE, f32)
    for job in range(jobs[0], jobs[1]):
        row, first = job % rows, job // rows * TILE
        width, start = min(TILE, d - first), starts[row]
        bias_t = bias[first : first + width]
        for t in range(lengths[row]):
            total[:width] = bias_t
            for k in range(w):
                tap = _part(weight, k, d, first, width)
                before = _input_at(
                    t + k - (w - 1), row, start, x, xs, tail, w, zeros, d, first, width
                )
                for c in range(width):
                    total[c] += tap[c] * before[c]
            y_t = _part(y, start + t, d, first, width)
            for c in range(width):
                y_t[c] = total[c] * _sigmoid(total[c])


@numba.njit(inline="always")
def _input_at(t, row, start, x, xs, tail, w, zeros, d, first, width):
    """The convolution's input at step t >= -(w - 1) of a row: from x, the tail before it, or 0."""
    if t >= 0:
        return _part(x, start + t, xs, first, width)
    if tail.size > 0:
        return _part(tail, row * (w - 1) + t + w - 1, d, first, width)
    return zeros[:width]


@_kernel()
def _conv_backward(
    jobs, rows, d, w, x, xs, weight, bias, tail, starts, lengths, gy, gx, gweight, gbias, gtail
):
    """Jobs [start, stop) of the convolution's gradient; gweight (rows, w, d), gbias (rows, d) are
    partial sums over the rows."""
    zeros, total = np.zeros(TILE, f32), np.empty(TILE, f32)
    gtaps = np.empty((w, TILE), f32)
    # The gradients of the w inputs that end at the present step, by step modulo w.
    ginput = np.empty((w, TILE), f32)
    for job in range(jobs[0], jobs[1]):
        row, first = job % rows, job // rows * TILE
        width, start = min(TILE, d - first), starts[row]
        bias_t, gbias_t = bias[first : first + width], _part(gbias, row, d, first, width)
        gbias_t[:], gtaps[:], ginput[:] = f32(0.0), f32(0.0), f32(0.0)
        for t in range(lengths[row] - 1, -w, -1):
            if t >= 0:
                total[:width] = bias_t
                for k in range(w):
                    tap = _part(weight, k, d, first, width)
                    before = _input_at(
                        t + k - (w - 1), row, start, x, xs, tail, w, zeros, d, first, width
                    )
                    for c in range(width):
                        total[c] += tap[c] * before[c]
                gy_t = _part(gy, start + t, d, first, width)
                for c in range(width):
                    sigmoid = _sigmoid(total[c])
                    slope = sigmoid + total[c] * sigmoid * (f32(1.0) - sigmoid)
                    total[c] = gy_t[c] * slope
                    gbias_t[c] += total[c]
                for k in range(w):
                    tap, gtap = _part(weight, k, d, first, width), gtaps[k]
                    at = t + k - (w - 1)
                    before = _input_at(at, row, start, x, xs, tail, w, zeros, d, first, width)
                    gbefore = ginput[at % w]
                    for c in range(width):
                        gtap[c] += total[c] * before[c]
                        gbefore[c] += total[c] * tap[c]
                _part(gx, start + t, d, first, width)[:] = ginput[t % w, :width]
            elif tail.size > 0:
                at = row * (w - 1) + t + w - 1
                _part(gtail, at, d, first, width)[:] = ginput[t % w, :width]
            ginput[t % w] = f32(0.0)
        for k in range(w):
            _part(gweight, row * w + k, d, first, width)[:] = gtaps[k, :width]


@_reduction_kernel()
def _multiply(weight, first, stop, k, bias, b, x, y, ys):
    """Rows [first, stop) of weight (?, k) times all rows of x (b, k), plus bias, into y (b, ys).

    The weight is read once, from main memory, whatever b is: two of its rows at a time, far from
    each other, which the memory serves faster than one, and four of x.
    """
    half = (stop - first + 1) // 2
    for r in range(first, first + half):
        s = min(r + half, stop - 1)  # of an odd number of rows one comes twice
        w_r, w_s = _part(weight, r, k, 0, k), _part(weight, s, k, 0, k)
        for row in range(0, b - 3, 4):
            x0, x1 = _part(x, row, k, 0, k), _part(x, row + 1, k, 0, k)
            x2, x3 = _part(x, row + 2, k, 0, k), _part(x, row + 3, k, 0, k)
            r0, r1, r2, r3 = f32(0.0), f32(0.0), f32(0.0), f32(0.0)
            s0, s1, s2, s3 = f32(0.0), f32(0.0), f32(0.0), f32(0.0)
            for c in range(k):
                r_c, s_c = _float(w_r[c]), _float(w_s[c])
                r0 += r_c * x0[c]
                r1 += r_c * x1[c]
                r2 += r_c * x2[c]
                r3 += r_c * x3[c]
                s0 += s_c * x0[c]
                s1 += s_c * x1[c]
                s2 += s_c * x2[c]
                s3 += s_c * x3[c]
            y[row * ys + r], y[row * ys + s] = r0, s0
            y[(row + 1) * ys + r], y[(row + 1) * ys + s] = r1, s1
            y[(row + 2) * ys + r], y[(row + 2) * ys + s] = r2, s2
            y[(row + 3) * ys + r], y[(row + 3) * ys + s] = r3, s3
        for row in range(b - b % 4, b):
            x0, r0, s0 = _part(x, row, k, 0, k), f32(0.0), f32(0.0)
            for c in range(k):
                r0 += _float(w_r[c]) * x0[c]
                s0 += _float(w_s[c]) * x0[c]
            y[row * ys + r], y[row * ys + s] = r0, s0
    if bias.size > 0:
        for row in range(b):
            for r in range(first, stop):
                y[row * ys + r] += _float(bias[r])


@_kernel()
def _few_rows_linear(jobs, b, k, out, x, weight, bias, y):
    """Rows [start, stop) of weight (out, k) times x (b, k), into y (b, out)."""
    _multiply(weight, jobs[0], jobs[1], k, bias, b, x, y, out)


# The four phases of a layer's step: b tokens, one a row, from residual (b, m) to residual_out.
# Parameters and the convolution's tail are float32 or bfloat16, all else is float32. A job is one
# row of the phase's product, and so one channel; each phase waits for all of the one before.


@_reduction_kernel()
def _rms_norm(x, eps, y):
    """x over the root of its mean square, into y."""
    total = f32(0.0)
    for c in range(y.size):
        total += x[c] * x[c]
    scale = f32(1.0 / math.sqrt(total / y.size + eps))
    for c in range(y.size):
        y[c] = x[c] * scale


@_kernel()
def _step_in(
    jobs, b, m, d, w, residual, norm, norm_eps, in_proj, in_bias, conv, conv_bias, tail, new_tail,
    xz, x,
):  # fmt: skip
    """Norm, input projection xz (b, 2 d) and the convolution x (b, d) of its first half."""
    first, width = jobs[0], jobs[1] - jobs[0]
    u, total = np.empty(b * m, f32), np.empty(width, f32)
    for row in range(b):
        u_r = _part(u, row, m, 0, m)
        _rms_norm(_part(residual, row, m, 0, m), norm_eps, u_r)
        for c in range(m):
            u_r[c] *= _float(norm[c])
    _multiply(in_proj, first, first + width, m, in_bias, b, u, xz, 2 * d)
    _multiply(in_proj, d + first, d + first + width, m, in_bias, b, u, xz, 2 * d)
    for row in range(b):
        now = _part(xz, row, 2 * d, first, width)
        for c in range(width):
            total[c] = _float(conv[(first + c) * w + w - 1]) * now[c]
            if conv_bias.size > 0:
                total[c] += _float(conv_bias[first + c])
        for k in range(w - 1):
            before = _part(tail, row * (w - 1) + k, d, first, width)
            after = _part(new_tail, row * (w - 1) + k, d, first, width)
            if k < w - 2:
                after[:] = _part(tail, row * (w - 1) + k + 1, d, first, width)
            for c in range(width):
                total[c] += _float(conv[(first + c) * w + k]) * _float(before[c])
                if k == w - 2:
                    _put(after, c, now[c])
        x_r = _part(x, row, d, first, width)
        for c in range(width):
            x_r[c] = total[c] * _sigmoid(total[c])


@_kernel()
def _step_select(jobs, b, d, k, x_proj, x, selected):
    """dt, B and C of each row, side by side: selected (b, k)."""
    _multiply(x_proj, jobs[0], jobs[1], d, x_proj[:0], b, x, selected, k)


@_kernel()
def _step_scan(
    jobs, b, d, n, r, selected, bcdt_eps, dt_proj, dt_bias, A_log, D, h, xz, x, new_h, delta, y
):  # fmt: skip
    """Δ, the recurrence and the gate: the state new_h (b, n, d) and y (b, d)."""
    first, width = jobs[0], jobs[1] - jobs[0]
    dt, B, C = np.empty(b * r, f32), np.empty(b * n, f32), np.empty(b * n, f32)
    for row in range(b):
        of_row = _part(selected, row, r + 2 * n, 0, r + 2 * n)
        dt_r, B_r, C_r = _part(dt, row, r, 0, r), _part(B, row, n, 0, n), _part(C, row, n, 0, n)
        dt_r[:], B_r[:], C_r[:] = of_row[:r], of_row[r : r + n], of_row[r + n :]
        if bcdt_eps >= 0.0:
            _rms_norm(dt_r, bcdt_eps, dt_r)
            _rms_norm(B_r, bcdt_eps, B_r)
            _rms_norm(C_r, bcdt_eps, C_r)
    _multiply(dt_proj, first, first + width, r, dt_bias, b, dt, delta, d)
    a, update = np.empty(width, f32), np.empty(b * width, f32)
    for row in range(b):
        x_r, y_r = _part(x, row, d, first, width), _part(y, row, d, first, width)
        delta_r, update_r = _part(delta, row, d, first, width), _part(update, row, width, 0, width)
        for c in range(width):
            delta_r[c] = _softplus(delta_r[c])
            update_r[c] = delta_r[c] * x_r[c]
            y_r[c] = _float(D[first + c]) * x_r[c]
    for i in range(n):
        for c in range(width):
            a[c] = -_LOG2E * _exp2(_LOG2E * _float(A_log[(first + c) * n + i]))
        for row in range(b):
            before = _part(h, row * n + i, d, first, width)
            after = _part(new_h, row * n + i, d, first, width)
            delta_r, y_r = _part(delta, row, d, first, width), _part(y, row, d, first, width)
            update_r = _part(update, row, width, 0, width)
            b_i, c_i = B[row * n + i], C[row * n + i]
            for c in range(width):
                state = _exp2(delta_r[c] * a[c]) * before[c] + update_r[c] * b_i
                after[c] = state
                y_r[c] += state * c_i
    for row in range(b):
        z_r, y_r = _part(xz, row, 2 * d, d + first, width), _part(y, row, d, first, width)
        for c in range(width):
            y_r[c] *= z_r[c] * _sigmoid(z_r[c])


@_kernel()
def _step_out(jobs, b, m, d, residual, out_proj, out_bias, y, new_residual):
    """Output projection, added to the residual."""
    first, width = jobs[0], jobs[1] - jobs[0]
    _multiply(out_proj, first, first + width, d, out_bias, b, y, new_residual, m)
    for row in range(b):
        before, after = (
            _part(residual, row, m, first, width),
            _part(new_residual, row, m, first, width),
        )
        for c in range(width):
            after[c] += before[c]


@intrinsic
def _pointer(typing_context, address):
    """The address of float32s as a pointer."""

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.float32)(types.int64), generate


@intrinsic
def _pointer_to_ints(typing_context, address):
    """The address of int64s as a pointer."""

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.int64)(types.int64), generate


@intrinsic
def _pointer_to_bfloat16s(typing_context, address):
    """The address of bfloat16s as a pointer to their bits."""

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.uint16)(types.int64), generate


@intrinsic
def _bits_double(typing_context, value):
    """The double whose 64 bits are the given integer."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.DoubleType())

    return types.float64(types.int64), generate


@intrinsic
def _fetch_add(typing_context, packed, place):
    """Add one to an integer of those packed and return what it was, atomically."""

    def generate(context, builder, signature, arguments):
        one = ir.Constant(ir.IntType(64), 1)
        return builder.atomic_rmw(
            "add", builder.gep(arguments[0], [arguments[1]]), one, "monotonic"
        )

    return types.int64(_PACKED, types.int64), generate


@intrinsic
def _call(typing_context, address):
    """Call the C function without arguments at an address."""

    def generate(context, builder, signature, arguments):
        function = ir.FunctionType(ir.VoidType(), [])
        builder.call(builder.inttoptr(arguments[0], function.as_pointer()), [])
        return context.get_dummy_value()

    return types.none(types.int64), generate


def unpacked(packed, kinds):
    """The values that `run` was given, by a literal of their kinds: i an integer, e a double, f an
    array of float32, h one of bfloat16 and l one of int64, of unknown length, empty where None was
    given."""
    raise NotImplementedError("for use in kernels")


@overload(unpacked, prefer_literal=True)
def _unpacked(packed, kinds):
    forms = {"i": "p[{}]", "e": "double(p[{}])"}
    forms |= {"f": "floats(p[{}])", "h": "bfloat16s(p[{}])", "l": "ints(p[{}])"}
    kinds = kinds.literal_value.replace(" ", "")
    values = ", ".join(forms[kind].format(HEADER + i) for i, kind in enumerate(kinds))
    source = f"def unpack(packed, kinds):\n p = carray(packed, (64,))\n return ({values},)"
    names = {"carray": numba.carray, "double": _bits_double}
    names |= {"floats": _floats, "bfloat16s": _bfloat16s, "ints": _ints}
    exec(source, names)  # Numba has no other way to make a tuple of several types
    return names["unpack"]


@numba.njit(inline="always")
def _floats(address):
    return numba.carray(_pointer(address), ((1 << 60) if address != 0 else 0,))


@numba.njit(inline="always")
def _bfloat16s(address):
    return numba.carray(_pointer_to_bfloat16s(address), ((1 << 60) if address != 0 else 0,))


@numba.njit(inline="always")
def _ints(address):
    return numba.carray(_pointer_to_ints(address), (1 << 60,))


@numba.njit(inline="always")
def next_jobs(packed, phase=0, jobs=0):
    """The next share [start, stop) of the jobs, or of a phase's; an empty one where none is left."""
    header = numba.carray(packed, (HEADER,))
    if jobs == 0:
        jobs = header[_JOBS]
    share = min(_fetch_add(packed, phase), header[_SHARES])
    return jobs * share // header[_SHARES], jobs * min(share + 1, header[_SHARES]) // header[
        _SHARES
    ]


@numba.njit(inline="always")
def wait_for_team(packed):
    """Go on when all threads have come here: what they wrote can be read."""
    barrier = numba.carray(packed, (HEADER,))[_BARRIER]
    if barrier != 0:
        _call(barrier)


# What threads run: shares of the jobs until none is left. A word is an argument of the kernel or
# two: i an integer, f an array of floats, l one of integers. Written out, since Numba would keep no
# closure on disk that made them.


def scan_forward(packed):
    jobs = next_jobs(packed)
    while jobs[0] < jobs[1]:
        _scan_forward(jobs, *unpacked(packed, "i i i fi fi f fi fi f fi f l l f f f"))
        jobs = next_jobs(packed)


def scan_backward(packed):
    jobs = next_jobs(packed)
    while jobs[0] < jobs[1]:
        _scan_backward(
            jobs, *unpacked(packed, "i i i i fi fi f fi fi f fi l l f f f f f f f f f f f")
        )
        jobs = next_jobs(packed)


def scan_step(packed):
    jobs = next_jobs(packed)
    while jobs[0] < jobs[1]:
        _scan_step(jobs, *unpacked(packed, "i i i fi fi f fi fi f fi f f f"))
        jobs = next_jobs(packed)


def conv_forward(packed):
    jobs = next_jobs(packed)
    while jobs[0] < jobs[1]:
        _conv_forward(jobs, *unpacked(packed, "i i i fi f f f l l f"))
        jobs = next_jobs(packed)


def conv_backward(packed):
    jobs = next_jobs(packed)
    while jobs[0] < jobs[1]:
        _conv_backward(jobs, *unpacked(packed, "i i i fi f f f l l f f f f f"))
        jobs = next_jobs(packed)


@_kernel()
def _linear(packed, b, k, out, x, weight, bias, y):
    jobs = next_jobs(packed)
    while jobs[0] < jobs[1]:
        _few_rows_linear(jobs, b, k, out, x, weight, bias, y)
        jobs = next_jobs(packed)


@_kernel()
def _step(
    packed, b, m, d, n, r, w, norm_eps, bcdt_eps, norm, in_proj, in_bias, conv, conv_bias, x_proj,
    dt_proj, dt_bias, A_log, D, out_proj, out_bias, residual, tail, h, new_residual, new_tail,
    new_h, space,
):  # fmt: skip
    xz, x, delta, y, selected = (
        space[: 2 * b * d], space[2 * b * d :], space[3 * b * d :], space[4 * b * d :],
        space[5 * b * d :],
    )  # fmt: skip
    jobs = next_jobs(packed, 0, d)
    while jobs[0] < jobs[1]:
        _step_in(
            jobs, b, m, d, w, residual, norm, norm_eps, in_proj, in_bias, conv, conv_bias, tail,
            new_tail, xz, x,
        )  # fmt: skip
        jobs = next_jobs(packed, 0, d)
    wait_for_team(packed)
    jobs = next_jobs(packed, 1, r + 2 * n)
    while jobs[0] < jobs[1]:
        _step_select(jobs, b, d, r + 2 * n, x_proj, x, selected)
        jobs = next_jobs(packed, 1, r + 2 * n)
    wait_for_team(packed)
    jobs = next_jobs(packed, 2, d)
    while jobs[0] < jobs[1]:
        _step_scan(
            jobs, b, d, n, r, selected, bcdt_eps, dt_proj, dt_bias, A_log, D, h, xz, x, new_h,
            delta, y,
        )  # fmt: skip
        jobs = next_jobs(packed, 2, d)
    wait_for_team(packed)
    jobs = next_jobs(packed, 3, m)
    while jobs[0] < jobs[1]:
        _step_out(jobs, b, m, d, residual, out_proj, out_bias, y, new_residual)
        jobs = next_jobs(packed, 3, m)


_LINEAR = "iii f p p f"
_STEP = "iiiiii ee p pp pp p pp p p pp f p f f p f f"
_LINEAR_FLOAT32, _STEP_FLOAT32 = _LINEAR.replace("p", "f"), _STEP.replace("p", "f")
_LINEAR_BFLOAT16, _STEP_BFLOAT16 = _LINEAR.replace("p", "h"), _STEP.replace("p", "h")


def few_rows_linear(packed):
    _linear(packed, *unpacked(packed, _LINEAR_FLOAT32))


def few_rows_linear_bfloat16(packed):
    _linear(packed, *unpacked(packed, _LINEAR_BFLOAT16))


def layer_step(packed):
    _step(packed, *unpacked(packed, _STEP_FLOAT32))


def layer_step_bfloat16(packed):
    _step(packed, *unpacked(packed, _STEP_BFLOAT16))
