"""Run Numba kernels on the threads of torch.

Threads of another pool would wait for a core, because torch's threads keep theirs busy: they spin
after a matrix product until the next one. So kernels are compiled to C functions that need neither
Python nor the GIL, and run in a team of torch's OpenMP runtime. Their arguments are packed into one
array of integers, tensors as addresses. Threads take shares of the jobs until none is left.
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

# With fewer operations than this, a second thread costs more than it saves.
_PARALLEL_THRESHOLD = 200_000
_SHARES_PER_THREAD = 4  # if a thread is delayed, the others take its shares
_DTYPES = (torch.float32, torch.bfloat16, torch.int64)
_PROCESS = os.getpid()  # a forked process does not have OpenMP's threads


def run_kernel(
    kernel: Callable,
    *values: Tensor | float | None,
    jobs: int,
    work: int,
    keep_alive: object = None,
) -> None:
    """Run all jobs of a kernel, on as many threads as the work justifies.

    Args:
        kernel: a function of the packed array, from one of the kernel modules.
        values: its arguments. Tensors are float32, bfloat16 or int64 on the CPU, contiguous or with
            strides that are among the arguments.
        jobs: the number of jobs.
        work: the approximate number of operations of all jobs together.
        keep_alive: the tensors that the kernel reads through a table of addresses.

    Raises:
        TypeError: if a tensor has another dtype or is on another device.
    """
    if jobs == 0:
        return
    threads = min(torch.get_num_threads(), jobs) if work >= _PARALLEL_THRESHOLD else 1
    shares = min(jobs, threads * _SHARES_PER_THREAD) if threads > 1 else 1
    packed = (ctypes.c_int64 * (HEADER + len(values)))(0, shares, jobs, *map(_to_integer, values))
    function = _compile(kernel)
    if threads == 1:
        function(packed)
    elif _load_openmp() is not None and os.getpid() == _PROCESS:
        _load_openmp().GOMP_parallel(function, packed, threads, 0)
    else:
        pool = _make_pool(os.getpid(), torch.get_num_threads())
        # The threads keep their tensors alive: Ctrl-C ends the waiting, not the work.
        kept = (values, keep_alive)
        for future in [pool.submit(_run_shares, function, packed, kept) for _ in range(threads)]:
            future.result()


def _to_integer(value: Tensor | float | None) -> int:
    """Convert a kernel's argument to an integer: the address of a tensor, the bits of a double, an
    integer itself, 0 for None."""
    if isinstance(value, Tensor):
        if value.dtype not in _DTYPES or not value.is_cpu:  # kernels see addresses only
            raise TypeError(f"the CPU kernels do not take {value.dtype} on {value.device}")
        return value.data_ptr()
    if isinstance(value, float):
        return ctypes.c_int64.from_buffer(ctypes.c_double(value)).value
    return value or 0


def _run_shares(function: Callable, packed, kept: object) -> None:
    function(packed)


@functools.cache
def _compile(kernel: Callable) -> Callable:
    """Compile a kernel to a C function, or load it from Numba's cache. Reports that it compiles if
    that takes more than two seconds."""
    # Numba's cache checks only the kernel's own source file. The kernel's name contains a hash of
    # all files, so that a change in any of them gives another kernel.
    kernel.__qualname__ = f"{kernel.__name__}_{_hash_sources()}"
    timer = threading.Timer(2.0, _report_compiling)
    timer.daemon = True
    timer.start()
    try:
        return _compile_cached(kernel).ctypes
    finally:
        timer.cancel()


def _compile_cached(kernel: Callable) -> Callable:
    """Compile with Numba's cache on disk; if it cannot be written, warn and compile without."""
    try:
        return numba.cfunc(SIGNATURE, cache=True)(kernel)
    except OSError as error:  # a full disk, a limit on the size of files
        _warn_not_cached(error.strerror)
    except RuntimeError as error:  # neither the clone nor the home folder can be written
        if "cannot cache function" not in str(error):
            raise
        _warn_not_cached("no folder for them can be written")
    return numba.cfunc(SIGNATURE)(kernel)


@functools.cache
def _warn_not_cached(reason: str) -> None:
    warn(f"the compiled CPU kernels are not cached ({reason}); set NUMBA_CACHE_DIR to a folder")


@functools.cache
def _hash_sources() -> str:
    sources = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]


@functools.cache
def _report_compiling() -> None:
    message = "compiling the CPU kernels: a minute or two, once per clone"
    tqdm.write(message, file=sys.stderr)  # above a progress bar, if there is one


@functools.cache
def _load_openmp() -> ctypes.CDLL | None:
    """Load the GNU OpenMP runtime that torch contains; None if torch uses another runtime."""
    libraries = sorted(Path(torch.__file__).parent.glob("lib/libgomp*.so*"))
    return ctypes.CDLL(str(libraries[0])) if libraries else None


@functools.cache
def yield_core_address() -> int:
    """Return the address of the C function that lets other threads use the core; 0 without one."""
    function = getattr(ctypes.CDLL(None), "sched_yield", None) if os.name == "posix" else None
    return ctypes.cast(function, ctypes.c_void_p).value if function is not None else 0


@functools.lru_cache(maxsize=1)
def _make_pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Create the pool that is used without torch's threads. A forked process does not have the
    threads of its parent, so that the process id is part of the cache's key."""
    return ThreadPoolExecutor(threads, thread_name_prefix="selective-scan")


def keep_freed_memory() -> None:
    """Make glibc keep the memory that one layer frees for the next one. By default it returns large
    tensors to the system, and each new one costs a page fault for every 4 kB: 3 to 8 % of all
    time."""
    m_trim_threshold, m_mmap_threshold = -1, -3
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None and mallopt(m_mmap_threshold, 1 << 30):  # older versions of glibc refuse
        mallopt(m_trim_threshold, 1 << 30)
