"""What is done to each token by itself: RMS norm and softplus, forward and backward, in float32.

One pass over main memory, where torch's own operations take several.

A job is `BLOCK` tokens; arrays come flat.
"""

import math

import numpy as np

from mamba_lm.selective_scan.cpu.elementary import (
    f32,
    kernel,
    part,
    reduction_kernel,
    sigmoid_of_softplus,
    softplus,
)
from mamba_lm.selective_scan.cpu.packing import next_jobs, unpacked

BLOCK = 32


@reduction_kernel()
def normalize(x, eps, y):
    """x over the root of its mean square, into y, and that scale."""
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
        y_t = part(y, t, m, 0, m)
        normalize(part(x, t, m, 0, m), eps, y_t)
        for c in range(m):
            y_t[c] *= weight[c]


@reduction_kernel()
def _norm_backward(jobs, tokens, m, eps, x, weight, gy, gx, gweight):
    """gweight (blocks, m) are partial sums, so that the result does not depend on threads."""
    normed = np.empty(m, f32)
    for job in range(jobs[0], jobs[1]):
        gweight_j = part(gweight, job, m, 0, m)
        gweight_j[:] = f32(0.0)
        for t in range(job * BLOCK, min((job + 1) * BLOCK, tokens)):
            gy_t, gx_t = part(gy, t, m, 0, m), part(gx, t, m, 0, m)
            scale, along = normalize(part(x, t, m, 0, m), eps, normed), f32(0.0)
            for c in range(m):
                gweight_j[c] += gy_t[c] * normed[c]
                along += gy_t[c] * weight[c] * normed[c]
            along /= f32(m)
            for c in range(m):
                gx_t[c] = scale * (gy_t[c] * weight[c] - along * normed[c])


@kernel()
def _softplus_forward(jobs, tokens, d, x, bias, y):
    for t in range(jobs[0] * BLOCK, min(jobs[1] * BLOCK, tokens)):
        x_t, y_t = part(x, t, d, 0, d), part(y, t, d, 0, d)
        for c in range(d):
            y_t[c] = softplus(x_t[c] + bias[c])


@kernel()
def _softplus_backward(jobs, tokens, d, y, gy, gx, gbias):
    """gbias (blocks, d) are partial sums."""
    for job in range(jobs[0], jobs[1]):
        gbias_j = part(gbias, job, d, 0, d)
        gbias_j[:] = f32(0.0)
        for t in range(job * BLOCK, min((job + 1) * BLOCK, tokens)):
            y_t, gy_t, gx_t = part(y, t, d, 0, d), part(gy, t, d, 0, d), part(gx, t, d, 0, d)
            for c in range(d):
                gx_t[c] = gy_t[c] * sigmoid_of_softplus(y_t[c])
                gbias_j[c] += gx_t[c]


def norm_forward(packed):
    jobs = next_jobs(packed)
    while jobs[0] < jobs[1]:
        _norm_forward(jobs, *unpacked(packed, "ii e f f f"))
        jobs = next_jobs(packed)


def norm_backward(packed):
    jobs = next_jobs(packed)
    while jobs[0] < jobs[1]:
        _norm_backward(jobs, *unpacked(packed, "ii e f f f f f"))
        jobs = next_jobs(packed)


def softplus_forward(packed):
    jobs = next_jobs(packed)
    while jobs[0] < jobs[1]:
        _softplus_forward(jobs, *unpacked(packed, "ii f f f"))
        jobs = next_jobs(packed)


def softplus_backward(packed):
    jobs = next_jobs(packed)
    while jobs[0] < jobs[1]:
        _softplus_backward(jobs, *unpacked(packed, "ii f f f f"))
        jobs = next_jobs(packed)
