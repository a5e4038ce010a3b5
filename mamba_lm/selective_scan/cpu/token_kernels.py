"""Operations on each token alone: RMS norm and softplus, forward and backward, in float32.

They read main memory once, where torch's operations read it several times. A job is `BLOCK` tokens;
arrays are flat.
"""

import math

import numpy as np

from mamba_lm.selective_scan.cpu.elementary import (
    f32,
    kernel,
    reduction_kernel,
    sigmoid_of_softplus,
    slice_row,
    softplus,
)
from mamba_lm.selective_scan.cpu.packing import next_jobs, unpack

BLOCK = 32


@reduction_kernel()
def normalize(x, eps, y):
    """Divide x by the root of its mean square, into y; return the factor."""
    total = f32(0.0)
    for c in range(y.size):
        total += x[c] * x[c]
    scale = f32(1.0 / math.sqrt(total / y.size + eps))
    for c in range(y.size):
        y[c] = x[c] * scale
    return scale


@kernel()
def _norm_forward(jobs, tokens, m, eps, x, weight, y):
    for t in range(jobs[0] * BLOCK, min(jobs[1] * BLOCK, tokens)):
        y_t = slice_row(y, t, m, 0, m)
        normalize(slice_row(x, t, m, 0, m), eps, y_t)
        for c in range(m):
            y_t[c] *= weight[c]


@reduction_kernel()
def _norm_backward(jobs, tokens, m, eps, x, weight, gy, gx, gweight):
    """gweight (blocks, m) are terms of a sum, so that the result does not depend on the threads."""
    normed = np.empty(m, f32)
    for job in range(jobs[0], jobs[1]):
        gweight_j = slice_row(gweight, job, m, 0, m)
        gweight_j[:] = f32(0.0)
        for t in range(job * BLOCK, min((job + 1) * BLOCK, tokens)):
            gy_t, gx_t = slice_row(gy, t, m, 0, m), slice_row(gx, t, m, 0, m)
            scale, along = normalize(slice_row(x, t, m, 0, m), eps, normed), f32(0.0)
            for c in range(m):
                gweight_j[c] += gy_t[c] * normed[c]
                along += gy_t[c] * weight[c] * normed[c]
            along /= f32(m)
            for c in range(m):
                gx_t[c] = scale * (gy_t[c] * weight[c] - along * normed[c])


@kernel()
def _softplus_forward(jobs, tokens, d, x, bias, y):
    for t in range(jobs[0] * BLOCK, min(jobs[1] * BLOCK, tokens)):
        x_t, y_t = slice_row(x, t, d, 0, d), slice_row(y, t, d, 0, d)
        for c in range(d):
            y_t[c] = softplus(x_t[c] + bias[c])


@kernel()
def _softplus_backward(jobs, tokens, d, y, gy, gx, gbias):
    """gbias (blocks, d) are terms of a sum."""
    for job in range(jobs[0], jobs[1]):
        gbias_j = slice_row(gbias, job, d, 0, d)
        gbias_j[:] = f32(0.0)
        for t in range(job * BLOCK, min((job + 1) * BLOCK, tokens)):
            y_t, gy_t, gx_t = (
                slice_row(y, t, d, 0, d),
                slice_row(gy, t, d, 0, d),
                slice_row(gx, t, d, 0, d),
            )
            for c in range(d):
                gx_t[c] = gy_t[c] * sigmoid_of_softplus(y_t[c])
                gbias_j[c] += gx_t[c]


def norm_forward(packed):
    jobs = next_jobs(packed)
    while jobs[0] < jobs[1]:
        _norm_forward(jobs, *unpack(packed, "ii e f f f"))
        jobs = next_jobs(packed)


def norm_backward(packed):
    jobs = next_jobs(packed)
    while jobs[0] < jobs[1]:
        _norm_backward(jobs, *unpack(packed, "ii e f f f f f"))
        jobs = next_jobs(packed)


def softplus_forward(packed):
    jobs = next_jobs(packed)
    while jobs[0] < jobs[1]:
        _softplus_forward(jobs, *unpack(packed, "ii f f f"))
        jobs = next_jobs(packed)


def softplus_backward(packed):
    jobs = next_jobs(packed)
    while jobs[0] < jobs[1]:
        _softplus_backward(jobs, *unpack(packed, "ii f f f f"))
        jobs = next_jobs(packed)
