"""Numba kernels on the threads that torch computes on.

Threads of any other pool would wait for a core: torch's own keep it busy, spinning after a matrix
product until the next one. So kernels are compiled to C functions that need neither Python nor its
lock, and run in a team of torch's OpenMP runtime. What they are called with is packed into one
array of integers, tensors as addresses; threads draw shares of the jobs until none is left.
"""

import ctypes
import functools
import hashlib
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numba
import torch
from torch import Tensor
from tqdm import tqdm

from common.errors import warn
from mamba_lm.selective_scan.cpu.packing import HEADER, SIGNATURE

# Below this many operations a second thread costs more than it brings.
_PARALLEL_THRESHOLD = 200_000
_SHARES_A_THREAD = 4  # where a thread is held up, the others take over its part
_DTYPES = (torch.float32, torch.bfloat16, torch.int64)
_PROCESS = os.getpid()  # OpenMP's threads do not survive a fork


def run(
    kernel: Callable, *values: Tensor | float | None, jobs: int, work: int, holding: object = None
) -> None:
    """Let a kernel do `jobs` jobs, of `work` operations in all, on as many threads as is worth it.

    Tensors must be contiguous, or strided in a way that other values tell the kernel; `holding` has
    those that it reaches through a table of addresses.
    """
    if jobs == 0:
        return
    threads = min(torch.get_num_threads(), jobs) if work >= _PARALLEL_THRESHOLD else 1
    shares = min(jobs, threads * _SHARES_A_THREAD) if threads > 1 else 1
    packed = (ctypes.c_int64 * (HEADER + len(values)))(0, shares, jobs, *map(_packed, values))
    function = _compiled(kernel)
    if threads == 1:
        function(packed)
    elif _openmp() is not None and os.getpid() == _PROCESS:
        _openmp().GOMP_parallel(function, packed, threads, 0)
    else:
        pool = _pool(os.getpid(), torch.get_num_threads())
        # They hold what they work on: Ctrl-C ends the waiting, not the work.
        held = (values, holding)
        for future in [pool.submit(_run_share, function, packed, held) for _ in range(threads)]:
            future.result()


def _packed(value: Tensor | float | None) -> int:
    """A tensor's address, the bits of a float as a double, an integer, 0 for None."""
    if isinstance(value, Tensor):
        if value.dtype not in _DTYPES or not value.is_cpu:  # kernels see addresses only
            raise TypeError(f"the CPU kernels take no {value.dtype} on {value.device}")
        return value.data_ptr()
    if isinstance(value, float):
        return ctypes.c_int64.from_buffer(ctypes.c_double(value)).value
    return value or 0


def _run_share(function: Callable, packed, held: object) -> None:
    function(packed)


@functools.cache
def _compiled(kernel: Callable) -> Callable:
    """The kernel as a C function. Numba keeps what it compiles on disk; if it has to compile, and
    that takes long, say so."""
    # Numba looks at the kernel's own file alone to see whether what it kept is still right: with
    # what all files say in its name, a kernel is another one when any of them changes.
    kernel.__qualname__ = f"{kernel.__name__}_{_digest_of_sources()}"
    timer = threading.Timer(2.0, _say_compiling)
    timer.daemon = True
    timer.start()
    try:
        return _cached(kernel).ctypes
    finally:
        timer.cancel()


def _cached(kernel: Callable) -> Callable:
    """The kernel as Numba kept it, or now keeps it, if it can."""
    try:
        return numba.cfunc(SIGNATURE, cache=True)(kernel)
    except OSError as error:  # a full disk, a limit on the size of files
        _say_not_kept(error.strerror)
    except RuntimeError as error:  # neither the clone nor the home can be written
        if "cannot cache function" not in str(error):
            raise
        _say_not_kept("no folder for it can be written")
    return numba.cfunc(SIGNATURE)(kernel)


@functools.cache
def _say_not_kept(reason: str) -> None:
    warn(f"the compiled CPU kernels are not kept ({reason}); NUMBA_CACHE_DIR names a folder for it")


@functools.cache
def _digest_of_sources() -> str:
    sources = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]


@functools.cache
def _say_compiling() -> None:
    said = "compiling the CPU kernels: a minute or two, once per clone"
    tqdm.write(said, file=sys.stderr)  # above a bar, if there is one


@functools.cache
def _openmp() -> ctypes.CDLL | None:
    """The GNU OpenMP runtime that torch brought along; None where it has another."""
    libraries = sorted(Path(torch.__file__).parent.glob("lib/libgomp*.so*"))
    return ctypes.CDLL(str(libraries[0])) if libraries else None


@functools.cache
def give_way() -> int:
    """The address of the C function that offers the core to other threads, 0 if there is none."""
    function = getattr(ctypes.CDLL(None), "sched_yield", None) if os.name == "posix" else None
    return ctypes.cast(function, ctypes.c_void_p).value if function is not None else 0


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
    if mallopt is not None and mallopt(m_mmap_threshold, 1 << 30):  # older ones refuse
        mallopt(m_trim_threshold, 1 << 30)
