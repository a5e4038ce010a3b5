"""Numba kernels on the threads that torch computes on.

Threads of any other pool would wait for a core: torch's own keep it busy, spinning after a matrix
product until the next one. So kernels are compiled to C functions that need neither Python nor its
lock, and run in a team of torch's OpenMP runtime. What they are called with is packed into one
array of integers, tensors as addresses; threads draw shares of the jobs until none is left.
"""

import ctypes
import functools
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import numba
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload
from torch import Tensor

# Below this many operations a second thread costs more than it brings.
_PARALLEL_THRESHOLD = 200_000
_SHARES_A_THREAD = 4  # where a thread is held up, the others take over its part
_HEADER = 3  # next share, shares, jobs
_PACKED = types.CPointer(types.int64)
_PROCESS = os.getpid()  # OpenMP's threads do not survive a fork


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
    values = ", ".join(forms[kind].format(_HEADER + i) for i, kind in enumerate(kinds))
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
    header = numba.carray(packed, (_HEADER,))
    share = min(_fetch_add(packed), header[1])
    return header[2] * share // header[1], header[2] * min(share + 1, header[1]) // header[1]


def run(kernel: Callable, *values: Tensor | int | None, jobs: int, work: int) -> None:
    """Let a kernel do `jobs` jobs, of `work` operations in all, on as many threads as is worth it.

    Tensors must be contiguous, or strided in a way that other values tell the kernel.
    """
    if jobs == 0:
        return
    threads = min(torch.get_num_threads(), jobs) if work >= _PARALLEL_THRESHOLD else 1
    shares = min(jobs, threads * _SHARES_A_THREAD) if threads > 1 else 1
    addresses = (v.data_ptr() if isinstance(v, Tensor) else v or 0 for v in values)
    packed = (ctypes.c_int64 * (_HEADER + len(values)))(0, shares, jobs, *addresses)
    function = _compiled(kernel)
    if threads == 1:
        function(packed)
    elif _openmp() is not None and os.getpid() == _PROCESS:
        _openmp().GOMP_parallel(function, packed, threads, 0)
    else:
        pool = _pool(os.getpid(), threads)
        wait([pool.submit(function, packed) for _ in range(threads)])


@functools.cache
def _compiled(kernel: Callable) -> Callable:
    """The kernel as a C function. Numba keeps what it compiles on disk; if it has to compile, and
    that takes long, say so."""
    timer = threading.Timer(2.0, _say_compiling)
    timer.daemon = True
    timer.start()
    try:
        return numba.cfunc(types.void(_PACKED), cache=True)(kernel).ctypes
    finally:
        timer.cancel()


@functools.cache
def _say_compiling() -> None:
    print("compiling the CPU kernels: some seconds, once per machine", file=sys.stderr)


@functools.cache
def _openmp() -> ctypes.CDLL | None:
    """The GNU OpenMP runtime that torch brought along; None where it has another."""
    libraries = sorted(Path(torch.__file__).parent.glob("lib/libgomp*.so*"))
    return ctypes.CDLL(str(libraries[0])) if libraries else None


@functools.lru_cache(maxsize=1)
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """A pool where torch's threads cannot be had, one per process: threads do not survive a fork,
    so the process id is part of the key."""
    return ThreadPoolExecutor(threads, thread_name_prefix="selective-scan")


def keep_freed_memory() -> None:
    """Let glibc keep what one layer frees for the next. By default it hands large tensors back to
    the system, and each new one then costs a page fault for every 4 kB: 3 to 8 % of all time."""
    m_trim_threshold, m_mmap_threshold = -1, -3
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(m_mmap_threshold, 1 << 30)
        mallopt(m_trim_threshold, 1 << 30)
