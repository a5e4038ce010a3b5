"""Fused selective scan and causal convolution for the CPU, in float32; no (b, l, d, n) tensor.

The kernels' jobs run on the threads that torch computes on, the interpreter lock released. Threads
of any other pool would wait for a core: torch's own keep it busy, spinning after a matrix product
until the next one.
"""

import ctypes
import functools
import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mamba_lm.selective_scan.cpu_kernels import (
    CHUNK,
    TILE,
    conv_backward,
    conv_forward,
    few_rows_linear,
    scan_backward,
    scan_forward,
    scan_step,
)

# Up to here the kernel for few rows is faster than torch's matrix product.
_FEW_ROWS = 8

# Below this many (row, step, channel, state) updates a second thread costs more than it brings.
_PARALLEL_THRESHOLD = 200_000


def _keep_freed_memory() -> None:
    """Let glibc keep what one layer frees for the next. By default it hands large tensors back to
    the system, and each new one then costs a page fault for every 4 kB: 3 to 8 % of all time."""
    m_trim_threshold, m_mmap_threshold = -1, -3
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(m_mmap_threshold, 1 << 30)
        mallopt(m_trim_threshold, 1 << 30)


_keep_freed_memory()


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, delta, A, B, C, D, z, initial_state, lengths, keep):
        b, l, d = x.shape
        n = A.shape[1]
        y = torch.empty(b, l, d)
        final_state = torch.empty(b, n, d)
        saved = torch.empty(b, -(-l // CHUNK), n, d) if keep else torch.empty(0)
        if lengths is None:
            lengths = torch.full((b,), l)
        inputs = (*_rows(x), *_rows(delta), _flat(A), *_rows(B), *_rows(C), _flat(D), *_rows(z))
        outputs = (_flat(y), _flat(final_state), _flat(saved))
        _run(
            scan_forward,
            ((b, l, d, n), *inputs, _flat(initial_state), _flat(lengths), *outputs),
            jobs=b * -(-d // TILE),
            work=b * l * d * n,
        )
        ctx.save_for_backward(x, delta, A, B, C, D, z, initial_state, lengths, saved)
        return y, final_state

    @staticmethod
    @once_differentiable
    def backward(ctx, gy, gfinal):
        x, delta, A, B, C, D, z, initial_state, lengths, saved = ctx.saved_tensors
        b, l, d = x.shape
        n = A.shape[1]
        tiles = -(-d // TILE)
        gx, gdelta = torch.empty(b, l, d), torch.empty(b, l, d)
        gz = torch.empty(b, l, d) if z is not None else torch.empty(0)
        gB, gC = torch.zeros(tiles, b, l, n), torch.zeros(tiles, b, l, n)
        gA, gD, ginitial = torch.empty(b, n, d), torch.empty(b, d), torch.empty(b, n, d)
        inputs = (*_rows(x), *_rows(delta), _flat(A), *_rows(B), *_rows(C), _flat(D), *_rows(z))
        gradients = [_flat(g) for g in (gx, gdelta, gz, gA, gB, gC, gD, ginitial)]
        _run(
            scan_backward,
            ((b, l, d, n), *inputs, *map(_flat, (lengths, saved, gy, gfinal)), *gradients),
            jobs=b * tiles,
            work=b * l * d * n,
        )
        return (
            gx, gdelta, gA.sum(0).T, gB.sum(0), gC.sum(0), gD.sum(0),
            gz if z is not None else None,
            ginitial if initial_state is not None else None,
            None, None,
        )  # fmt: skip


class _CausalConv1d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, tail):
        b, l, d = x.shape
        w = weight.shape[1]
        y = torch.empty(b, l, d)
        weight_t = weight.T.contiguous()
        arrays = (*_rows(x), _flat(weight_t), _flat(bias), _flat(tail), _flat(y))
        _run(
            conv_forward,
            ((b, l, d, w), *arrays),
            jobs=b * -(-d // TILE),
            work=b * l * d * w,
        )
        ctx.save_for_backward(x, weight_t, bias, tail)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, gy):
        x, weight_t, bias, tail = ctx.saved_tensors
        b, l, d = x.shape
        w = weight_t.shape[0]
        gx, gweight, gbias = torch.empty(b, l, d), torch.empty(b, w, d), torch.empty(b, d)
        gtail = torch.empty(b, w - 1, d) if tail is not None else torch.empty(0)
        arrays = (
            *_rows(x), _flat(weight_t), _flat(bias), _flat(tail), _flat(gy.contiguous()),
            _flat(gx), _flat(gweight), _flat(gbias), _flat(gtail),
        )  # fmt: skip
        _run(
            conv_backward,
            ((b, l, d, w), *arrays),
            jobs=b * -(-d // TILE),
            work=b * l * d * w,
        )
        return gx, gweight.sum(0).T, gbias.sum(0), gtail if tail is not None else None


def selective_scan(x, delta, A, B, C, D, z=None, initial_state=None, lengths=None):
    """Arguments and results as `mamba_lm.selective_scan.selective_scan`; computes in float32."""
    floats = [None if v is None else v.float() for v in (x, delta, A, B, C, D, z, initial_state)]
    if x.shape[1] == 1 and lengths is None and initial_state is not None:
        needs_grad = torch.is_grad_enabled() and any(
            v is not None and v.requires_grad for v in floats
        )
        if not needs_grad:
            y, final_state = _step(*floats)
            return y.to(x.dtype), final_state
    if lengths is not None:
        lengths = lengths.clamp(0, x.shape[1])
    y, final_state = _SelectiveScan.apply(*floats, lengths, torch.is_grad_enabled())
    return y.to(x.dtype), final_state


def _step(x, delta, A, B, C, D, z, h0):
    """One step without gradients."""
    (b, _, d), n = x.shape, A.shape[1]
    y, h1 = torch.empty(b, 1, d), torch.empty(b, n, d)
    inputs = (*_rows(x), *_rows(delta), _flat(A), *_rows(B), *_rows(C), _flat(D), *_rows(z))
    _run(
        scan_step,
        ((b, d, n), *inputs, _flat(h0), _flat(y), _flat(h1)),
        jobs=b * -(-d // TILE),
        work=b * d * n,
    )
    return y, h1


def causal_conv1d(x, weight, bias, initial_tail=None):
    """Arguments and result as `mamba_lm.selective_scan.causal_conv1d`; computes in float32."""
    bias = torch.zeros(x.shape[2]) if bias is None else bias.float()
    tail = None if initial_tail is None else initial_tail.float().contiguous()
    return _CausalConv1d.apply(x.float(), weight.float(), bias, tail).to(x.dtype)


def linear(x, weight, bias=None):
    """Arguments and result as `mamba_lm.selective_scan.linear`.

    torch's products of a few rows reach half the memory's bandwidth at best.
    """
    rows = x.shape[:-1].numel()
    dtypes = {v.dtype for v in (x, weight, bias) if v is not None}
    if torch.is_grad_enabled() or not 0 < rows <= _FEW_ROWS or dtypes != {torch.float32}:
        return F.linear(x, weight, bias)
    out, k = weight.shape
    y = torch.empty(*x.shape[:-1], out)
    arrays = (_flat(x), _flat(weight), _flat(bias), _flat(y))
    _run(few_rows_linear, ((rows, k, out), *arrays), jobs=out, work=rows * out * k)
    return y


def _flat(tensor: Tensor | None) -> np.ndarray:
    """The tensor's memory as one contiguous array; empty for None, which kernels read as absent."""
    if tensor is None:
        return np.empty(0, np.float32)
    return tensor.detach().contiguous().view(-1).numpy()


def _rows(tensor: Tensor | None) -> tuple[np.ndarray, int]:
    """A (b, l, k) tensor as a flat array and the distance between its rows, copied only if it must
    be: a half of a projection's output, say, stays where it is."""
    if tensor is None:
        return np.empty(0, np.float32), 0
    b, l, k = tensor.shape
    regular = tensor.stride(2) == 1 and tensor.stride(0) == l * tensor.stride(1)
    if not regular or tensor.numel() == 0:
        return _flat(tensor), k
    stride = tensor.stride(1)
    span = (b * l - 1) * stride + k
    return torch.as_strided(tensor.detach(), (span,), (1,)).numpy(), stride


def _run(kernel, arguments: tuple, jobs: int, work: int) -> None:
    """Spread jobs over the threads; small work stays on this one."""
    threads = min(torch.get_num_threads(), jobs) if work >= _PARALLEL_THRESHOLD else 1
    with nullcontext() if kernel.signatures else _announced():
        if threads <= 1:
            kernel((0, jobs), *arguments)
            return
        bounds = pairwise(jobs * i // threads for i in range(threads + 1))
        shares = [functools.partial(kernel, bound, *arguments) for bound in bounds]
        if _openmp() is not None and os.getpid() == _PROCESS:
            _run_on_openmp(shares)
        else:
            list(_pool(os.getpid(), threads).map(lambda share: share(), shares))


_PROCESS = os.getpid()  # OpenMP's threads do not survive a fork


@functools.cache
def _openmp() -> ctypes.CDLL | None:
    """The GNU OpenMP runtime that torch brought along; None where it has another."""
    libraries = sorted(Path(torch.__file__).parent.glob("lib/libgomp*.so*"))
    return ctypes.CDLL(str(libraries[0])) if libraries else None


def _run_on_openmp(shares: list[Callable[[], None]]) -> None:
    """Run functions on torch's own threads, in any order; the first error is raised at the end."""
    waiting, errors = list(shares), []

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    def work(_):
        # A team may be smaller than asked for: whoever is here works until nothing is left.
        while waiting:
            with suppress(IndexError):  # another thread has taken the last one
                share = waiting.pop()
                try:
                    share()
                except BaseException as error:  # no Python above this frame would see it
                    errors.append(error)

    _openmp().GOMP_parallel(work, None, len(shares), 0)
    if errors:
        raise errors[0]


@functools.lru_cache(maxsize=1)
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """A pool where torch's threads cannot be had, one per process: threads do not survive a fork,
    so the process id is part of the key."""
    return ThreadPoolExecutor(threads, thread_name_prefix="selective-scan")


@contextmanager
def _announced() -> Iterator[None]:
    """Say so if a kernel's first call takes long: Numba then compiles it, once per machine."""
    timer = threading.Timer(2.0, _say_compiling)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@functools.cache
def _say_compiling() -> None:
    print("compiling the CPU kernels: some seconds, once per machine", file=sys.stderr)
