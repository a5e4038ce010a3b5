"""The CPU backend's kernels, compiled by Numba: float32, vectorised over tiles of channels.

A job is one row of the batch and one tile of `TILE` channels; what it needs at a time step lives in
small contiguous arrays, so that LLVM turns each inner loop over the tile into vector instructions.
The forward pass keeps the state at the start of every `CHUNK` steps; the backward pass replays a
chunk from there and then walks it in reverse (the recomputation of Gu & Dao 2023, section 3.3.2).

Arrays come flat and in float32, lengths in int64. A kernel does jobs [start, stop), rows first.
"""

import functools

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

TILE = 64
CHUNK = 16

f32 = np.float32
_LOG2E, _LN2_HIGH, _LN2_LOW = f32(1.4426950408889634), f32(0.693359375), f32(-2.12194440e-4)
_EXP_LOWEST, _EXP_HIGHEST = f32(-86.6), f32(88.72)
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


# The rounding trick below does not survive reassociation: this function allows contraction alone.
@numba.njit(fastmath={"contract"}, error_model="numpy", cache=True)
def _exp(x):
    """exp(x) within 2 ulp, branch-free so that it vectorises (Cephes expf's polynomial).

    NaN stays NaN; exp(x) < 2.5e-38 gives 0, an overflow the largest float.
    """
    clamped = min(max(x, _EXP_LOWEST), _EXP_HIGHEST)
    shifted = clamped * _LOG2E + _ROUND
    k = shifted - _ROUND
    r = (clamped - k * _LN2_HIGH) - k * _LN2_LOW
    p = f32(1.9875691500e-4)
    p = p * r + f32(1.3981999507e-3)
    p = p * r + f32(8.3334519073e-3)
    p = p * r + f32(4.1665795894e-2)
    p = p * r + f32(1.6666665459e-1)
    p = p * r + f32(5.0000001201e-1)
    p = p * r * r + r + f32(1.0)
    # 2^128 is not a float32: scale by 2^(k - 1), then by 2.
    scale = _bits_float((_float_bits(shifted) + numba.int32(126)) << numba.int32(23))
    result = p * scale * f32(2.0)
    return result if x >= _EXP_LOWEST else (f32(0.0) if x < _EXP_LOWEST else x)


@numba.njit(fastmath={"contract"}, error_model="numpy", cache=True)
def _sigmoid(x):
    return f32(1.0) / (f32(1.0) + _exp(-x))


_kernel = functools.partial(
    numba.njit, nogil=True, cache=True, error_model="numpy", fastmath={"contract"}
)
# Sums over a tile vectorise only where the order of addition is free.
_reduction_kernel = functools.partial(
    numba.njit, nogil=True, cache=True, error_model="numpy", fastmath={"contract", "reassoc", "nsz"}
)


@_kernel()
def _load(tiled, position, source, row_stride, step, steps, tiles, d):
    """Copy `steps` rows of a flat (rows, d) array from `step` on into tiled (tiles, ..., TILE)
    from `position` on.

    Whole rows in order, so that the processor prefetches them; read tile by tile, they would come
    from main memory a quarter of a kilobyte at a time. Lanes past channel d become zero: a NaN of
    another row would stay in them, and sums over a tile would spread it.
    """
    for s in range(steps):
        at = (step + s) * row_stride
        for tile in range(tiles[0], tiles[1]):
            first = tile * TILE
            for c in range(min(TILE, d - first)):
                tiled[tile, position + s, c] = source[at + first + c]
            for c in range(d - first, TILE):
                tiled[tile, position + s, c] = f32(0.0)


@_kernel()
def _store(tiled, target, step, steps, tiles, d):
    """The reverse of `_load`, into a flat (rows, d) array."""
    for s in range(steps):
        at = (step + s) * d
        for tile in range(tiles[0], tiles[1]):
            first = tile * TILE
            for c in range(min(TILE, d - first)):
                target[at + first + c] = tiled[tile, s, c]


@_kernel()
def scan_forward(
    jobs, shape, x, xs, delta, ds, A, B, bs, C, cs, D, z, zs, h0, lengths, y, hT, saved
):  # fmt: skip
    """Jobs [start, stop) of the scan. Flat arrays; `?s` is the distance between rows of `?`."""
    start, stop = jobs
    l, d, n = shape
    num_tiles = (d + TILE - 1) // TILE
    chunks = (l + CHUNK - 1) // CHUNK
    gated, keep = z.size > 0, saved.size > 0
    a = np.zeros((num_tiles, n, TILE), f32)
    h = np.zeros((num_tiles, n, TILE), f32)
    skip = np.zeros((num_tiles, 1, TILE), f32)
    x_c = np.zeros((num_tiles, CHUNK, TILE), f32)
    delta_c = np.zeros((num_tiles, CHUNK, TILE), f32)
    z_c = np.zeros((num_tiles, CHUNK, TILE), f32)
    y_c = np.zeros((num_tiles, CHUNK, TILE), f32)
    update = np.zeros(TILE, f32)
    _load(skip, 0, D, 0, 0, 1, (0, num_tiles), d)
    for channel in range(d):
        for i in range(n):
            a[channel // TILE, i, channel % TILE] = A[channel * n + i]
    for row in range(start // num_tiles, (stop + num_tiles - 1) // num_tiles):
        tiles = max(start - row * num_tiles, 0), min(stop - row * num_tiles, num_tiles)
        for channel in range(tiles[0] * TILE, min(tiles[1] * TILE, d)):
            for i in range(n):
                value = h0[(row * d + channel) * n + i] if h0.size > 0 else f32(0.0)
                h[channel // TILE, i, channel % TILE] = value
        for t0 in range(0, lengths[row], CHUNK):
            step, steps = row * l + t0, min(CHUNK, lengths[row] - t0)
            _load(x_c, 0, x, xs, step, steps, tiles, d)
            _load(delta_c, 0, delta, ds, step, steps, tiles, d)
            if gated:
                _load(z_c, 0, z, zs, step, steps, tiles, d)
            if keep:
                _store(h, saved, (row * chunks + t0 // CHUNK) * n, n, tiles, d)
            for tile in range(tiles[0], tiles[1]):
                a_t, h_t = a[tile], h[tile]
                for s in range(steps):
                    delta_s, x_s = delta_c[tile, s], x_c[tile, s]
                    y_s, z_s = y_c[tile, s], z_c[tile, s]
                    for c in range(TILE):
                        update[c] = delta_s[c] * x_s[c]
                        y_s[c] = skip[tile, 0, c] * x_s[c]
                    for i in range(n):
                        b_i, c_i = B[(step + s) * bs + i], C[(step + s) * cs + i]
                        for c in range(TILE):
                            state = _exp(delta_s[c] * a_t[i, c]) * h_t[i, c] + update[c] * b_i
                            h_t[i, c] = state
                            y_s[c] += state * c_i
                    if gated:
                        for c in range(TILE):
                            y_s[c] *= z_s[c] * _sigmoid(z_s[c])
            _store(y_c, y, step, steps, tiles, d)
        for channel in range(tiles[0] * TILE, min(tiles[1] * TILE, d)):
            for i in range(n):
                hT[(row * d + channel) * n + i] = h[channel // TILE, i, channel % TILE]


@_reduction_kernel()
def scan_backward(
    jobs, shape, x, xs, delta, ds, A, B, bs, C, cs, D, z, zs, lengths, saved,
    gy, ghT, gx, gdelta, gz, gA, gB, gC, gD, gh0,
):  # fmt: skip
    """Jobs [start, stop) of the scan's gradient. gA (rows, d, n), gD (rows, d) and gB, gC
    (tiles, rows, l, n) are partial sums, so that threads share nothing and the result does not
    depend on their number."""
    start, stop = jobs
    rows, l, d, n = shape
    num_tiles = (d + TILE - 1) // TILE
    chunks = (l + CHUNK - 1) // CHUNK
    gated = z.size > 0
    a = np.zeros((num_tiles, n, TILE), f32)
    ga = np.zeros((num_tiles, n, TILE), f32)
    gh = np.zeros((num_tiles, n, TILE), f32)
    h0_c = np.zeros((num_tiles, n, TILE), f32)
    skip = np.zeros((num_tiles, 1, TILE), f32)
    gskip = np.zeros((num_tiles, 1, TILE), f32)
    x_c = np.zeros((num_tiles, CHUNK, TILE), f32)
    delta_c = np.zeros((num_tiles, CHUNK, TILE), f32)
    z_c = np.zeros((num_tiles, CHUNK, TILE), f32)
    gy_c = np.zeros((num_tiles, CHUNK, TILE), f32)
    history = np.zeros((CHUNK + 1, n, TILE), f32)
    decays = np.zeros((CHUNK, n, TILE), f32)
    update, out, ginput, gdelta_s = (
        np.zeros(TILE, f32), np.zeros(TILE, f32), np.zeros(TILE, f32), np.zeros(TILE, f32),
    )  # fmt: skip
    _load(skip, 0, D, 0, 0, 1, (0, num_tiles), d)
    for channel in range(d):
        for i in range(n):
            a[channel // TILE, i, channel % TILE] = A[channel * n + i]
    for row in range(start // num_tiles, (stop + num_tiles - 1) // num_tiles):
        tiles = max(start - row * num_tiles, 0), min(stop - row * num_tiles, num_tiles)
        ga[:], gh[:], gskip[:] = f32(0.0), f32(0.0), f32(0.0)
        for channel in range(tiles[0] * TILE, min(tiles[1] * TILE, d)):
            for i in range(n):
                gh[channel // TILE, i, channel % TILE] = ghT[(row * d + channel) * n + i]
        for chunk in range((lengths[row] + CHUNK - 1) // CHUNK - 1, -1, -1):
            step, steps = row * l + chunk * CHUNK, min(CHUNK, lengths[row] - chunk * CHUNK)
            _load(x_c, 0, x, xs, step, steps, tiles, d)
            _load(delta_c, 0, delta, ds, step, steps, tiles, d)
            _load(gy_c, 0, gy, d, step, steps, tiles, d)
            _load(h0_c, 0, saved, d, (row * chunks + chunk) * n, n, tiles, d)
            if gated:
                _load(z_c, 0, z, zs, step, steps, tiles, d)
            for tile in range(tiles[0], tiles[1]):
                a_t, ga_t, gh_t = a[tile], ga[tile], gh[tile]
                history[0] = h0_c[tile]
                for s in range(steps):
                    delta_s, x_s = delta_c[tile, s], x_c[tile, s]
                    gy_s, z_s = gy_c[tile, s], z_c[tile, s]
                    h_before, h_after, decay_s = history[s], history[s + 1], decays[s]
                    for c in range(TILE):
                        update[c] = delta_s[c] * x_s[c]
                        out[c] = skip[tile, 0, c] * x_s[c]
                    for i in range(n):
                        b_i, c_i = B[(step + s) * bs + i], C[(step + s) * cs + i]
                        for c in range(TILE):
                            decay = _exp(delta_s[c] * a_t[i, c])
                            state = decay * h_before[i, c] + update[c] * b_i
                            decay_s[i, c] = decay
                            h_after[i, c] = state
                            out[c] += state * c_i
                    if gated:
                        for c in range(TILE):
                            sigmoid = _sigmoid(z_s[c])
                            silu = z_s[c] * sigmoid
                            z_s[c] = out[c] * gy_s[c] * (sigmoid + silu * (f32(1.0) - sigmoid))
                            gy_s[c] *= silu
                for s in range(steps - 1, -1, -1):
                    delta_s, x_s, gy_s = delta_c[tile, s], x_c[tile, s], gy_c[tile, s]
                    h_before, h_after, decay_s = history[s], history[s + 1], decays[s]
                    for c in range(TILE):
                        update[c] = delta_s[c] * x_s[c]
                        ginput[c] = f32(0.0)
                        gdelta_s[c] = f32(0.0)
                    for i in range(n):
                        b_i, c_i = B[(step + s) * bs + i], C[(step + s) * cs + i]
                        gb_i = f32(0.0)
                        gc_i = f32(0.0)
                        for c in range(TILE):
                            g = gh_t[i, c] + gy_s[c] * c_i
                            decayed = g * decay_s[i, c]
                            exponent = decayed * h_before[i, c]
                            gh_t[i, c] = decayed
                            gdelta_s[c] += exponent * a_t[i, c]
                            ga_t[i, c] += exponent * delta_s[c]
                            ginput[c] += g * b_i
                            gb_i += g * update[c]
                            gc_i += gy_s[c] * h_after[i, c]
                        gB[((tile * rows) * l + step + s) * n + i] = gb_i
                        gC[((tile * rows) * l + step + s) * n + i] = gc_i
                    for c in range(TILE):  # x and Δ have been read: gradients take their place
                        gskip[tile, 0, c] += gy_s[c] * x_s[c]
                        gdelta_s[c] += ginput[c] * x_s[c]
                        x_s[c] = ginput[c] * delta_s[c] + gy_s[c] * skip[tile, 0, c]
                        delta_s[c] = gdelta_s[c]
            _store(x_c, gx, step, steps, tiles, d)
            _store(delta_c, gdelta, step, steps, tiles, d)
            if gated:
                _store(z_c, gz, step, steps, tiles, d)
        _store(gskip, gD, row, 1, tiles, d)
        for channel in range(tiles[0] * TILE, min(tiles[1] * TILE, d)):
            tile, c = channel // TILE, channel % TILE
            for i in range(n):
                gA[(row * d + channel) * n + i] = ga[tile, i, c]
                gh0[(row * d + channel) * n + i] = gh[tile, i, c]


@_kernel()
def conv_forward(jobs, shape, x, xs, weight, bias, tail, y):
    """Jobs [start, stop) of SiLU(conv(x)). weight (w, d) and tail (rows, w - 1, d), all flat."""
    start, stop = jobs
    l, d, w = shape
    num_tiles = (d + TILE - 1) // TILE
    taps = np.zeros((num_tiles, w, TILE), f32)
    offset = np.zeros((num_tiles, 1, TILE), f32)
    window = np.zeros((num_tiles, CHUNK + w - 1, TILE), f32)  # w - 1 steps back, then the chunk
    y_c = np.zeros((num_tiles, CHUNK, TILE), f32)
    _load(taps, 0, weight, d, 0, w, (0, num_tiles), d)
    _load(offset, 0, bias, 0, 0, 1, (0, num_tiles), d)
    for row in range(start // num_tiles, (stop + num_tiles - 1) // num_tiles):
        tiles = max(start - row * num_tiles, 0), min(stop - row * num_tiles, num_tiles)
        if tail.size > 0:
            _load(window, 0, tail, d, row * (w - 1), w - 1, tiles, d)
        else:
            window[:, : w - 1] = f32(0.0)
        for t0 in range(0, l, CHUNK):
            steps = min(CHUNK, l - t0)
            _load(window, w - 1, x, xs, row * l + t0, steps, tiles, d)
            for tile in range(tiles[0], tiles[1]):
                for s in range(steps):
                    total = y_c[tile, s]
                    for c in range(TILE):
                        total[c] = offset[tile, 0, c]
                    for k in range(w):
                        for c in range(TILE):
                            total[c] += taps[tile, k, c] * window[tile, s + k, c]
                    for c in range(TILE):
                        total[c] *= _sigmoid(total[c])
                for k in range(w - 1):
                    for c in range(TILE):
                        window[tile, k, c] = window[tile, steps + k, c]
            _store(y_c, y, row * l + t0, steps, tiles, d)


@_kernel()
def conv_backward(jobs, shape, x, xs, weight, bias, tail, gy, gx, gweight, gbias, gtail):
    """Jobs [start, stop) of the convolution's gradient; gweight (rows, w, d), gbias (rows, d) are
    partial sums over the rows."""
    start, stop = jobs
    l, d, w = shape
    num_tiles = (d + TILE - 1) // TILE
    taps = np.zeros((num_tiles, w, TILE), f32)
    offset = np.zeros((num_tiles, 1, TILE), f32)
    window = np.zeros((num_tiles, CHUNK + w - 1, TILE), f32)  # w - 1 steps back, then the chunk
    gtotal = np.zeros((num_tiles, CHUNK + w - 1, TILE), f32)  # the chunk, then w - 1 steps ahead
    gy_c = np.zeros((num_tiles, CHUNK, TILE), f32)
    gtaps = np.zeros((num_tiles, w, TILE), f32)
    goffset = np.zeros((num_tiles, 1, TILE), f32)
    total = np.zeros(TILE, f32)
    _load(taps, 0, weight, d, 0, w, (0, num_tiles), d)
    _load(offset, 0, bias, 0, 0, 1, (0, num_tiles), d)
    for row in range(start // num_tiles, (stop + num_tiles - 1) // num_tiles):
        tiles = max(start - row * num_tiles, 0), min(stop - row * num_tiles, num_tiles)
        gtaps[:], goffset[:], gtotal[:] = f32(0.0), f32(0.0), f32(0.0)
        for t0 in range((l - 1) // CHUNK * CHUNK, -1, -CHUNK):
            steps = min(CHUNK, l - t0)
            if t0 > 0:
                _load(window, 0, x, xs, row * l + t0 - (w - 1), steps + w - 1, tiles, d)
            else:
                if tail.size > 0:
                    _load(window, 0, tail, d, row * (w - 1), w - 1, tiles, d)
                else:
                    window[:, : w - 1] = f32(0.0)
                _load(window, w - 1, x, xs, row * l, steps, tiles, d)
            _load(gy_c, 0, gy, d, row * l + t0, steps, tiles, d)
            for tile in range(tiles[0], tiles[1]):
                for k in range(w - 2, -1, -1):
                    for c in range(TILE):
                        gtotal[tile, steps + k, c] = gtotal[tile, k, c]
                for s in range(steps):
                    for c in range(TILE):
                        total[c] = offset[tile, 0, c]
                    for k in range(w):
                        for c in range(TILE):
                            total[c] += taps[tile, k, c] * window[tile, s + k, c]
                    for c in range(TILE):
                        sigmoid = _sigmoid(total[c])
                        slope = sigmoid + total[c] * sigmoid * (f32(1.0) - sigmoid)
                        total[c] = gy_c[tile, s, c] * slope
                        gtotal[tile, s, c] = total[c]
                        goffset[tile, 0, c] += total[c]
                    for k in range(w):
                        for c in range(TILE):
                            gtaps[tile, k, c] += total[c] * window[tile, s + k, c]
                for s in range(steps):
                    for c in range(TILE):
                        gy_c[tile, s, c] = f32(0.0)
                    for k in range(w):
                        for c in range(TILE):
                            gy_c[tile, s, c] += taps[tile, k, c] * gtotal[tile, s + w - 1 - k, c]
                if t0 == 0 and tail.size > 0:
                    for s in range(w - 1):
                        for c in range(TILE):
                            window[tile, s, c] = f32(0.0)
                        for k in range(s + 1):
                            for c in range(TILE):
                                window[tile, s, c] += taps[tile, k, c] * gtotal[tile, s - k, c]
            _store(gy_c, gx, row * l + t0, steps, tiles, d)
        if tail.size > 0:
            _store(window, gtail, row * (w - 1), w - 1, tiles, d)
        _store(gtaps, gweight, row * w, w, tiles, d)
        _store(goffset, gbias, row, 1, tiles, d)
