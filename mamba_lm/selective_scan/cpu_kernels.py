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

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

TILE = 128
CHUNK = 32

# What a kernel is called with, as packed by `cpu_threads.run`: the next share, the number of
# shares, that of jobs, and then its arguments.
HEADER = 3
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
def _few_rows_linear(jobs, b, k, out, x, weight, bias, y):
    """Rows [start, stop) of weight (out, k), each times all rows of x (b, k), into y (b, out).

    The weight is read once, from main memory, whatever b is; four rows of x share a load of it.
    """
    for r in range(jobs[0], jobs[1]):
        w = _part(weight, r, k, 0, k)
        start = bias[r] if bias.size > 0 else f32(0.0)
        for row in range(0, b - 3, 4):
            x0, x1 = _part(x, row, k, 0, k), _part(x, row + 1, k, 0, k)
            x2, x3 = _part(x, row + 2, k, 0, k), _part(x, row + 3, k, 0, k)
            y0, y1, y2, y3 = start, start, start, start
            for c in range(k):
                y0 += w[c] * x0[c]
                y1 += w[c] * x1[c]
                y2 += w[c] * x2[c]
                y3 += w[c] * x3[c]
            y[row * out + r], y[(row + 1) * out + r] = y0, y1
            y[(row + 2) * out + r], y[(row + 3) * out + r] = y2, y3
        for row in range(b - b % 4, b):
            x0, y0 = _part(x, row, k, 0, k), start
            for c in range(k):
                y0 += w[c] * x0[c]
            y[row * out + r] = y0


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
def _fetch_add(typing_context, packed):
    """Add one to the integer at a pointer and return what it was, atomically."""

    def generate(context, builder, signature, arguments):
        one = ir.Constant(ir.IntType(64), 1)
        return builder.atomic_rmw("add", arguments[0], one, "monotonic")

    return types.int64(_PACKED), generate


def unpacked(packed, kinds):
    """The values that `run` was given, by a literal of their kinds: i an integer, f an array of
    float32 and l one of int64, of unknown length, empty where None was given."""
    raise NotImplementedError("for use in kernels")


@overload(unpacked, prefer_literal=True)
def _unpacked(packed, kinds):
    forms = {"i": "p[{}]", "f": "floats(p[{}])", "l": "ints(p[{}])"}
    kinds = kinds.literal_value.replace(" ", "")
    values = ", ".join(forms[kind].format(HEADER + i) for i, kind in enumerate(kinds))
    source = f"def unpack(packed, kinds):\n p = carray(packed, (64,))\n return ({values},)"
    names = {"carray": numba.carray, "floats": _floats, "ints": _ints}
    exec(source, names)  # Numba has no other way to make a tuple of several types
    return names["unpack"]


@numba.njit(inline="always")
def _floats(address):
    return numba.carray(_pointer(address), ((1 << 60) if address != 0 else 0,))


@numba.njit(inline="always")
def _ints(address):
    return numba.carray(_pointer_to_ints(address), (1 << 60,))


@numba.njit(inline="always")
def next_jobs(packed):
    """The next share [start, stop) of the jobs; an empty one where none is left."""
    header = numba.carray(packed, (HEADER,))
    share = min(_fetch_add(packed), header[1])
    return header[2] * share // header[1], header[2] * min(share + 1, header[1]) // header[1]


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


def few_rows_linear(packed):
    jobs = next_jobs(packed)
    while jobs[0] < jobs[1]:
        _few_rows_linear(jobs, *unpacked(packed, "i i i f f f f"))
        jobs = next_jobs(packed)
