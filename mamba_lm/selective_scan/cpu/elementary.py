"""Building blocks of the kernels: compiler settings, slices of rows, bfloat16, exp2 and others."""

import functools

import numba
import numpy as np
from numba import types
from numba.extending import intrinsic, overload

f32 = np.float32
LOG2E, LN2 = f32(1.4426950408889634), f32(0.6931471805599453)
_LOWEST, HIGHEST = f32(-125.0), f32(126.0)
# Adding 1.5 * 2^23 rounds a float32 to an integer, which is then in its lowest mantissa bits.
_ROUND = f32(12582912.0)

kernel = functools.partial(numba.njit, nogil=True, error_model="numpy", fastmath={"contract"})
# Sums over a tile are vectorised only if the compiler may change the order of addition.
reduction_kernel = functools.partial(
    numba.njit, nogil=True, error_model="numpy", fastmath={"contract", "reassoc", "nsz"}
)


@numba.njit(inline="always")
def slice_row(source, row, row_stride, first, width):
    """Slice channels [first, first + width) of one row of a flat array."""
    at = row * row_stride + first
    return source[at : at + width]


def make_bitcast(source, target):
    """Make a function for kernels that reads the bits of a `source` value as a `target` value."""

    @intrinsic
    def reinterpret(typing_context, value):
        def generate(context, builder, signature, arguments):
            return builder.bitcast(arguments[0], context.get_value_type(signature.return_type))

        return target(source), generate

    return reinterpret


_float_bits = make_bitcast(types.float32, types.int32)
_bits_float = make_bitcast(types.int32, types.float32)


def to_float(value):
    """Convert a float32, or the 16 bits of a bfloat16, to float32."""
    raise NotImplementedError("for use in kernels")


@overload(to_float, inline="always")
def _to_float(value):
    if value == types.uint16:
        return lambda value: _bits_float(numba.int32(value) << numba.int32(16))
    return lambda value: value


def store_rounded(array, at, value):
    """Store a float32 in an array of float32 or of bfloat16, rounded to the nearest value."""
    raise NotImplementedError("for use in kernels")


@overload(store_rounded, inline="always")
def _store_rounded(array, at, value):
    def store_bfloat16(array, at, value):
        bits = _float_bits(value)
        odd = (bits >> numba.int32(16)) & numba.int32(1)  # ties go to even
        if value == value:
            bits += numba.int32(0x7FFF) + odd
        else:
            bits |= numba.int32(0x400000)  # stays NaN when its lower half is dropped
        array[at] = numba.uint16(bits >> numba.int32(16))

    def store_float(array, at, value):
        array[at] = value

    return store_bfloat16 if array.dtype == types.uint16 else store_float


# Not a reduction_kernel: the rounding fails if the compiler reorders the additions.
@kernel()
def exp2(x):
    """2^x for x <= 126 within 2 ulp, without branches so that it is vectorised; NaN stays NaN.

    The minimax polynomial of 2^r - 1 on [-1/2, 1/2] has an error of at most 9e-8. Results are at
    least 2^-125, because subnormal numbers are slow.
    """
    clamped = _LOWEST if x < _LOWEST else x
    shifted = clamped + _ROUND
    r = clamped - (shifted - _ROUND)
    p = f32(1.3264727e-3)
    p = p * r + f32(9.6715130e-3)
    p = p * r + f32(5.5507336e-2)
    p = p * r + f32(2.4022242e-1)
    p = p * r + f32(6.9314700e-1)
    p = p * r + f32(1.0)
    scale = _bits_float((_float_bits(shifted) << numba.int32(23)) + numba.int32(0x3F800000))
    return p * scale


@kernel()
def sigmoid(x):
    """1 / (1 + e^-x)."""
    exponent = -LOG2E * x
    return f32(1.0) / (f32(1.0) + exp2(HIGHEST if exponent > HIGHEST else exponent))


@kernel()
def softplus(x):
    """log(1 + e^x) = max(x, 0) + log(1 + t) with t = e^-|x|, within a few ulp, small results too.

    log(1 + t) = 2 atanh(s) with s = t / (2 + t) <= 1/3, by a minimax polynomial in s^2 whose error
    is at most 4e-9.
    """
    t = exp2(-LOG2E * abs(x))
    s = t / (f32(2.0) + t)
    square = s * s
    p = f32(0.28178344)
    p = p * square + f32(0.27960611)
    p = p * square + f32(0.40024909)
    p = p * square + f32(0.66666315)
    p = p * square + f32(2.0)
    return max(x, f32(0.0)) + s * p


@kernel()
def sigmoid_of_softplus(y):
    """The derivative of softplus at x, sigmoid(x), from y = softplus(x): 1 - e^-y within a few ulp.

    For small y the difference would lose its digits; there it is computed by a Taylor polynomial.
    """
    p = f32(1 / 720)
    p = p * -y + f32(1 / 120)
    p = p * -y + f32(1 / 24)
    p = p * -y + f32(1 / 6)
    p = p * -y + f32(1 / 2)
    p = p * -y + f32(1.0)
    return p * y if y < f32(0.25) else f32(1.0) - exp2(-LOG2E * y)
