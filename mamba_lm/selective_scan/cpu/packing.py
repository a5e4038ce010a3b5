"""What a kernel is called with: one array of integers, tensors in it as addresses.

`threads.run` packs it, `unpacked` takes it apart, `next_jobs` draws the caller's share of the work.
What threads run is a function of that array, which does shares of a kernel's jobs until none is
left. Those functions are written out: Numba would keep no closure on disk that made them.
"""

import numba
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

from mamba_lm.selective_scan.cpu.elementary import reinterpreted

# The next share, the number of shares, that of jobs, and then what `run` was given.
_NEXT, _SHARES, _JOBS, HEADER = range(4)
_PACKED = types.CPointer(types.int64)
SIGNATURE = types.void(_PACKED)

_ENDLESS = 1 << 60  # arrays do not know their length


def _pointer_to(element):
    """A function for kernels: an address as a pointer."""

    @intrinsic
    def pointer(typing_context, address):
        def generate(context, builder, signature, arguments):
            return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

        return types.CPointer(element)(types.int64), generate

    return pointer


_KINDS = {
    "i": "{0}",
    "e": "to_double({0})",
    "f": "carray(to_float32s({0}), (ENDLESS if {0} != 0 else 0,))",
    "h": "carray(to_bfloat16s({0}), (ENDLESS if {0} != 0 else 0,))",
    "l": "carray(to_int64s({0}), (ENDLESS,))",
    "p": "to_int64s({0})",
}
_NAMES = {
    "carray": numba.carray,
    "to_double": reinterpreted(types.int64, types.float64),
    "to_float32s": _pointer_to(types.float32),
    "to_bfloat16s": _pointer_to(types.uint16),  # their bits
    "to_int64s": _pointer_to(types.int64),
    "ENDLESS": _ENDLESS,
}


def unpacked(packed, kinds):
    """The values that `run` was given, by a literal of their kinds: i an integer, e a double, f an
    array of float32, h one of bfloat16, l one of int64, empty where None was given, and p a pointer
    to int64. Of an array of int64, all values are taken.
    """
    raise NotImplementedError("for use in kernels")


@overload(unpacked, prefer_literal=True)
def _unpacked(packed, kinds):
    is_pointer = isinstance(packed, types.CPointer)
    first, array = (HEADER, "carray(packed, (64,))") if is_pointer else (0, "packed")
    kinds = kinds.literal_value.replace(" ", "")
    values = ", ".join(_KINDS[kind].format(f"p[{first + i}]") for i, kind in enumerate(kinds))
    source = f"def unpack(packed, kinds):\n p = {array}\n return ({values},)"
    names = dict(_NAMES)
    exec(source, names)  # Numba has no other way to make a tuple of several types
    return names["unpack"]


@intrinsic
def _fetch_add(typing_context, numbers, place):
    """Add one to the integer at a place and return what it was; what the thread wrote before, those
    see that read the integer with _acquire."""

    def generate(context, builder, signature, arguments):
        at, one = builder.gep(arguments[0], [arguments[1]]), ir.Constant(ir.IntType(64), 1)
        return builder.atomic_rmw("add", at, one, "acq_rel")

    return types.int64(_PACKED, types.int64), generate


@intrinsic
def _acquire(typing_context, numbers, place):
    """The integer at a place, read anew."""

    def generate(context, builder, signature, arguments):
        at = builder.gep(arguments[0], [arguments[1]])
        return builder.load_atomic(at, "acquire", 8)

    return types.int64(_PACKED, types.int64), generate


@intrinsic
def _call(typing_context, address):
    """Call the C function without arguments at an address."""

    def generate(context, builder, signature, arguments):
        function = ir.FunctionType(ir.VoidType(), [])
        builder.call(builder.inttoptr(arguments[0], function.as_pointer()), [])
        return context.get_dummy_value()

    return types.none(types.int64), generate


@numba.njit(inline="always")
def next_jobs(packed):
    """The next share [start, stop) of the jobs; an empty one where none is left."""
    header = numba.carray(packed, (HEADER,))
    return _share(_fetch_add(packed, _NEXT), header[_SHARES], header[_JOBS])


@numba.njit(inline="always")
def _share(share, shares, jobs):
    share = min(share, shares)
    return jobs * share // shares, jobs * min(share + 1, shares) // shares


# Kernels of several phases. Each waits until the shares of the one before are done, not until all
# threads have come: one that another process keeps from its core holds up no more than its share.
# progress counts for every phase the shares that have been drawn and those that are done.


@numba.njit(inline="always")
def num_shares(packed):
    return numba.carray(packed, (HEADER,))[_SHARES]


@numba.njit(inline="always")
def next_of_phase(progress, phase, shares, jobs):
    """The next share [start, stop) of a phase's jobs, at least as many as shares."""
    return _share(_fetch_add(progress, 2 * phase), shares, jobs)


@numba.njit(inline="always")
def share_is_done(progress, phase):
    _fetch_add(progress, 2 * phase + 1)


@numba.njit(inline="always")
def wait_for_phase(progress, phase, shares, give_way):
    """give_way: the address of a function that offers the core to another thread, or 0."""
    tries = 0
    while _acquire(progress, 2 * phase + 1) < shares:
        tries += 1
        if tries % 1024 == 0 and give_way != 0:
            _call(give_way)
