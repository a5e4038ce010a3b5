"""The causal convolution and its SiLU over complete rows, forward and backward, in float32.

A job is one row of the batch and one tile of channels; arrays are as in `scan_kernels`. Taps (the
weights of one channel) are added four at a time, so that a sum stays in registers: weight
(pad + w, d) begins with pad = -w % 4 rows of zeros, which are multiplied by zeros. At step t, tap k
is multiplied by the input at step t - (w - 1) + k.
"""

import numba
import numpy as np

from mamba_lm.selective_scan.cpu.elementary import f32, kernel, sigmoid, slice_row
from mamba_lm.selective_scan.cpu.packing import next_jobs, unpack

TILE = 384  # wider than the scan's: memory is the limit, and longer reads are faster


@kernel()
def _conv_forward(jobs, rows, d, w, x, xs, weight, bias, tail, starts, lengths, y):
    """Compute jobs [start, stop) of SiLU(conv(x)); tail is (rows, w - 1, d), flat."""
    zeros, total = np.zeros(TILE, f32), np.empty(TILE, f32)
    for job in range(jobs[0], jobs[1]):
        row, first = job % rows, job // rows * TILE
        width, start = min(TILE, d - first), starts[row]
        for t in range(lengths[row]):
            _convolve(total, t, row, start, x, xs, weight, bias, tail, w, zeros, d, first, width)
            y_t = slice_row(y, start + t, d, first, width)
            for c in range(width):
                y_t[c] = total[c] * sigmoid(total[c])


@kernel()
def _convolve(total, t, row, start, x, xs, weight, bias, tail, w, zeros, d, first, width):
    """Write the convolution at step t of a row, bias included, to total."""
    pad = -w % 4
    total[:width] = bias[first : first + width]
    for k in range(-pad, w, 4):
        x0 = _load_input(t, k, row, start, x, xs, tail, w, zeros, d, first, width)
        x1 = _load_input(t, k + 1, row, start, x, xs, tail, w, zeros, d, first, width)
        x2 = _load_input(t, k + 2, row, start, x, xs, tail, w, zeros, d, first, width)
        x3 = _load_input(t, k + 3, row, start, x, xs, tail, w, zeros, d, first, width)
        _add_four_products(total, weight, k + pad, x0, x1, x2, x3, d, first, width)


@numba.njit(inline="always")
def _load_input(t, k, row, start, x, xs, tail, w, zeros, d, first, width):
    """Load the input of tap k at step t of a row: from x, from the tail before it, or zeros."""
    at = t + k - (w - 1)
    if k >= 0 and at >= 0:
        return slice_row(x, start + at, xs, first, width)
    if k >= 0 and tail.size > 0:
        return slice_row(tail, row * (w - 1) + at + w - 1, d, first, width)
    return zeros[:width]


@kernel()
def _add_four_products(total, weight, k, x0, x1, x2, x3, d, first, width):
    tap0, tap1 = slice_row(weight, k, d, first, width), slice_row(weight, k + 1, d, first, width)
    tap2, tap3 = (
        slice_row(weight, k + 2, d, first, width),
        slice_row(weight, k + 3, d, first, width),
    )
    for c in range(width):
        total[c] += tap0[c] * x0[c] + tap1[c] * x1[c] + tap2[c] * x2[c] + tap3[c] * x3[c]


@kernel()
def _conv_backward(
    jobs, rows, d, w, x, xs, weight, bias, tail, starts, lengths, gy, gx, gweight, gbias, gtail
):
    """Compute jobs [start, stop) of the convolution's gradients. gweight (rows, w, d) and gbias
    (rows, d) are one term of a sum for each row."""
    pad = -w % 4
    zeros, total = np.zeros(TILE, f32), np.empty(TILE, f32)
    gtaps = np.empty((pad + w, TILE), f32)
    # The gradients of the convolution at this step and at the later ones, by step modulo w.
    later = np.empty((w, TILE), f32)
    for job in range(jobs[0], jobs[1]):
        row, first = job % rows, job // rows * TILE
        width, start = min(TILE, d - first), starts[row]
        gbias_t = slice_row(gbias, row, d, first, width)
        gbias_t[:], gtaps[:], later[:] = f32(0.0), f32(0.0), f32(0.0)
        for t in range(lengths[row] - 1, -w if tail.size > 0 else -1, -1):
            g = later[t % w]
            if t >= 0:
                _convolve(
                    total, t, row, start, x, xs, weight, bias, tail, w, zeros, d, first, width
                )
                gy_t = slice_row(gy, start + t, d, first, width)
                for c in range(width):
                    gate = sigmoid(total[c])
                    g[c] = gy_t[c] * (gate + total[c] * gate * (f32(1.0) - gate))
                    gbias_t[c] += g[c]
                for k in range(-pad, w, 4):
                    x0 = _load_input(t, k, row, start, x, xs, tail, w, zeros, d, first, width)
                    x1 = _load_input(t, k + 1, row, start, x, xs, tail, w, zeros, d, first, width)
                    x2 = _load_input(t, k + 2, row, start, x, xs, tail, w, zeros, d, first, width)
                    x3 = _load_input(t, k + 3, row, start, x, xs, tail, w, zeros, d, first, width)
                    gtap = gtaps[k + pad : k + pad + 4]
                    for c in range(width):
                        gtap[0, c] += g[c] * x0[c]
                        gtap[1, c] += g[c] * x1[c]
                        gtap[2, c] += g[c] * x2[c]
                        gtap[3, c] += g[c] * x3[c]
            else:
                g[:] = f32(0.0)
            total[:] = f32(0.0)
            for k in range(-pad, w, 4):
                # Tap k was multiplied by the input at step t when it computed step t + w - 1 - k.
                g0 = later[(t + w - 1 - k) % w] if k >= 0 else zeros
                g1 = later[(t + w - 2 - k) % w] if k >= -1 else zeros
                g2 = later[(t + w - 3 - k) % w] if k >= -2 else zeros
                g3 = later[(t + w - 4 - k) % w]
                _add_four_products(total, weight, k + pad, g0, g1, g2, g3, d, first, width)
            if t >= 0:
                slice_row(gx, start + t, d, first, width)[:] = total[:width]
            else:
                slice_row(gtail, row * (w - 1) + t + w - 1, d, first, width)[:] = total[:width]
        for k in range(w):
            slice_row(gweight, row * w + k, d, first, width)[:] = gtaps[pad + k, :width]


def conv_forward(packed):
    jobs = next_jobs(packed)
    while jobs[0] < jobs[1]:
        _conv_forward(jobs, *unpack(packed, "i i i fi f f f l l f"))
        jobs = next_jobs(packed)


def conv_backward(packed):
    jobs = next_jobs(packed)
    while jobs[0] < jobs[1]:
        _conv_backward(jobs, *unpack(packed, "i i i fi f f f l l f f f f f"))
        jobs = next_jobs(packed)
