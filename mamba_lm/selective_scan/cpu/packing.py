"""What a kernel is called with: one array of integers, tensors in it as addresses.

`threads.run` packs it, `unpacked` takes it apart, `next_jobs` draws the caller's share of the work.
"""

import numba
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

from mamba_lm.selective_scan.cpu.elementary import reinterpreted

# The next share of each phase, the number of shares, that of jobs, the address of the function that
# waits for the team, and then what `run` was given.
PHASES = 4
_SHARES, _JOBS, _BARRIER, HEADER = range(PHASES, PHASES + 4)
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
    array of float32, h one of bfloat16 and l one of int64, empty where None was given."""
    raise NotImplementedError("for use in kernels")


@overload(unpacked, prefer_literal=True)
def _unpacked(packed, kinds):
    kinds = kinds.literal_value.replace(" ", "")
    values = ", ".join(_KINDS[kind].format(f"p[{HEADER + i}]") for i, kind in enumerate(kinds))
    source = f"def unpack(packed, kinds):\n p = carray(packed, (64,))\n return ({values},)"
    names = dict(_NAMES)
    exec(source, names)  # Numba has no other way to make a tuple of several types
    return names["unpack"]


@intrinsic
def _fetch_add(typing_context, packed, place):
    """Add one to an integer of those packed and return what it was, atomically."""

    def generate(context, builder, signature, arguments):
        at, one = builder.gep(arguments[0], [arguments[1]]), ir.Constant(ir.IntType(64), 1)
        return builder.atomic_rmw("add", at, one, "monotonic")

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
def next_jobs(packed, phase=0, jobs=0):
    """The next share [start, stop) of all jobs or of a phase's; an empty one where none is left."""
    header = numba.carray(packed, (HEADER,))
    shares, jobs = header[_SHARES], jobs if jobs > 0 else header[_JOBS]
    share = min(_fetch_add(packed, phase), shares)
    return jobs * share // shares, jobs * min(share + 1, shares) // shares


@numba.njit(inline="always")
def wait_for_team(packed):
    """Go on when all threads have come here: what they wrote can be read."""
    barrier = numba.carray(packed, (HEADER,))[_BARRIER]
    if barrier != 0:
        _call(barrier)
