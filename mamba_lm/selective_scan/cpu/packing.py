"""The argument of a kernel: one array of integers, in which tensors are addresses.

`threads.run_kernel` packs the array, `unpack` reads it inside a kernel, `next_jobs` takes the next
share of the work. Threads run a function of this array, which takes shares of a kernel's jobs until
none is left. These functions are written out one by one, because Numba does not cache closures on
disk.
"""

import numba
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

from mamba_lm.selective_scan.cpu.elementary import make_bitcast

# The next share, the number of shares, the number of jobs; then the values given to `run_kernel`.
_NEXT, _SHARES, _JOBS, HEADER = range(4)
_PACKED = types.CPointer(types.int64)
SIGNATURE = types.void(_PACKED)

_UNBOUNDED = 1 << 60  # the length of arrays inside kernels: it is not passed


def _pointer_to(element):
    """Make a function for kernels that converts an address to a pointer."""

    @intrinsic
    def pointer(typing_context, address):
        def generate(context, builder, signature, arguments):
            return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

        return types.CPointer(element)(types.int64), generate

    return pointer


_KINDS = {
    "i": "{0}",
    "e": "to_double({0})",
    "f": "carray(to_float32s({0}), (UNBOUNDED if {0} != 0 else 0,))",
    "h": "carray(to_bfloat16s({0}), (UNBOUNDED if {0} != 0 else 0,))",
    "l": "carray(to_int64s({0}), (UNBOUNDED,))",
    "p": "to_int64s({0})",
}
_NAMES = {
    "carray": numba.carray,
    "to_double": make_bitcast(types.int64, types.float64),
    "to_float32s": _pointer_to(types.float32),
    "to_bfloat16s": _pointer_to(types.uint16),  # their bits
    "to_int64s": _pointer_to(types.int64),
    "UNBOUNDED": _UNBOUNDED,
}


def unpack(packed, kinds):
    """Unpack the values given to `run_kernel` (from a pointer), or all values of an int64 array.

    `kinds` is a literal with a letter for each value: i an integer, e a double, f an array of
    float32, h an array of bfloat16, l an array of int64, p a pointer to int64. For None, arrays of
    float32 and bfloat16 are empty.
    """
    raise NotImplementedError("for use in kernels")


@overload(unpack, prefer_literal=True)
def _generate_unpack(packed, kinds):
    is_pointer = isinstance(packed, types.CPointer)
    first, array = (HEADER, "carray(packed, (64,))") if is_pointer else (0, "packed")
    kinds = kinds.literal_value.replace(" ", "")
    values = ", ".join(_KINDS[kind].format(f"p[{first + i}]") for i, kind in enumerate(kinds))
    source = f"def generated(packed, kinds):\n p = {array}\n return ({values},)"
    names = dict(_NAMES)
    exec(source, names)  # Numba has no other way to make a tuple of several types
    return names["generated"]


@intrinsic
def _fetch_add(typing_context, numbers, place):
    """Add one to the integer at an index and return its old value. Threads that then read it with
    _acquire see everything that this thread has written."""

    def generate(context, builder, signature, arguments):
        at, one = builder.gep(arguments[0], [arguments[1]]), ir.Constant(ir.IntType(64), 1)
        return builder.atomic_rmw("add", at, one, "acq_rel")

    return types.int64(_PACKED, types.int64), generate


@intrinsic
def _acquire(typing_context, numbers, place):
    """Read the integer at an index from memory."""

    def generate(context, builder, signature, arguments):
        at = builder.gep(arguments[0], [arguments[1]])
        return builder.load_atomic(at, "acquire", 8)

    return types.int64(_PACKED, types.int64), generate


@intrinsic
def _call(typing_context, address):
    """Call the C function at an address, without arguments."""

    def generate(context, builder, signature, arguments):
        function = ir.FunctionType(ir.VoidType(), [])
        builder.call(builder.inttoptr(arguments[0], function.as_pointer()), [])
        return context.get_dummy_value()

    return types.none(types.int64), generate


@numba.njit(inline="always")
def next_jobs(packed):
    """Take the next share [start, stop) of the jobs; empty if none is left."""
    header = numba.carray(packed, (HEADER,))
    return _share(_fetch_add(packed, _NEXT), header[_SHARES], header[_JOBS])


@numba.njit(inline="always")
def _share(share, shares, jobs):
    share = min(share, shares)
    return jobs * share // shares, jobs * min(share + 1, shares) // shares


# Kernels of several phases. A phase waits until all shares of the phase before are done, not until
# all threads have arrived: a thread that another process keeps from its core delays only its share.
# progress counts, for each phase, the shares that were taken and the shares that are done.


@numba.njit(inline="always")
def num_shares(packed):
    return numba.carray(packed, (HEADER,))[_SHARES]


@numba.njit(inline="always")
def next_phase_jobs(progress, phase, shares, jobs):
    """Take the next share [start, stop) of a phase's jobs, which are at least as many as shares."""
    return _share(_fetch_add(progress, 2 * phase), shares, jobs)


@numba.njit(inline="always")
def mark_share_done(progress, phase):
    _fetch_add(progress, 2 * phase + 1)


@numba.njit(inline="always")
def wait_for_phase(progress, phase, shares, yield_core):
    """Wait until all shares of a phase are done. yield_core is the address of a function that lets
    another thread use the core, or 0."""
    tries = 0
    while _acquire(progress, 2 * phase + 1) < shares:
        tries += 1
        if tries % 1024 == 0 and yield_core != 0:
            _call(yield_core)
