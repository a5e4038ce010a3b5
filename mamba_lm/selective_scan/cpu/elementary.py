"""What kernels are made of: compiler settings, rows of flat arrays, bfloat16, exp2 and its kin."""

import functools

import numba
import numpy as np
from numba import types
from numba.extending import intrinsic, overload

f32 = np.float32
LOG2E, LN2 = f32(1.4426950408889634), f32(0.6931471805599453)
_LOWEST, HIGHEST = f32(-125.0), f32(126.0)
# Adding 1.5 * 2^23 rounds a float32 to an integer that stands in its lowest mantissa bits.
_ROUND = f32(12582912.0)

kernel = functools.partial(numba.njit, nogil=True, error_model="numpy", fastmath={"contract"})
# Sums over a tile vectorise only where the order of addition is free.
reduction_kernel = functools.partial(
    numba.njit, nogil=True, error_model="numpy", fastmath={"contract", "reassoc", "nsz"}
)


@numba.njit(inline="always")
def part(source, row, row_stride, first, width):
    """Channels [first, first + width) of one row of a flat array."""
    at = row * row_stride + first
    return source[at : at + width]


def reinterpreted(source, target):
    """A function for kernels: the value of type `target` that has the bits of one of `source`."""

    @intrinsic
    def reinterpret(typing_context, value):
        def generate(context, builder, signature, arguments):
            return builder.bitcast(arguments[0], context.get_value_type(signature.return_type))

        return target(source), generate

    return reinterpret


_float_bits = reinterpreted(types.float32, types.int32)
_bits_float = reinterpreted(types.int32, types.float32)


def to_float(value):
    """A float32, or the 16 bits of a bfloat16, as float32."""
    raise NotImplementedError("for use in kernels")


@overload(to_float, inline="always")
def _to_float(value):
    if value == types.uint16:
        return lambda value: _bits_float(numba.int32(value) << numba.int32(16))
    return lambda value: value


def put(array, at, value):
    """Store a float32 in an array of them or of bfloat16s, rounded to the nearest."""
    raise NotImplementedError("for use in kernels")


@overload(put, inline="always")
def _put_rounded(array, at, value):
    def put_bfloat16(array, at, value):
        bits = _float_bits(value)
        odd = (bits >> numba.int32(16)) & numba.int32(1)  # ties go to even
        if value == value:
            bits += numba.int32(0x7FFF) + odd
        else:
            bits |= numba.int32(0x400000)  # whatever its lower half: NaN
        array[at] = numba.uint16(bits >> numba.int32(16))

    def put_float(array, at, value):
        array[at] = value

    return put_bfloat16 if array.dtype == types.uint16 else put_float


# The rounding trick does not survive reassociation: no reduction_kernel here.
@kernel()
def exp2(x):
    """2^x for x <= 126 within 2 ulp, branch-free so that it vectorises; NaN stays NaN.

    The polynomial is the minimax one of 2^r - 1 on [-1/2, 1/2]: 9e-8 off at most. Below 2^-125 it
    stays there, since subnormal numbers are slow.
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
    exponent = -LOG2E * x
    return f32(1.0) / (f32(1.0) + exp2(HIGHEST if exponent > HIGHEST else exponent))


@kernel()
def softplus(x):
    """log(1 + e^x) = max(x, 0) + log(1 + t), t = e^-|x|, within some ulp also where it is small.

    log(1 + t) = 2 atanh(s), s = t / (2 + t) <= 1/3, by a minimax polynomial in s^2: 4e-9 off.
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
    """sigmoid(x), the derivative of softplus, where y = softplus(x): 1 - e^-y, within some ulp.

    Where y is small that difference would have few digits left: there by its Taylor polynomial.
    """
    p = f32(1 / 720)
    p = p * -y + f32(1 / 120)
    p = p * -y + f32(1 / 24)
    p = p * -y + f32(1 / 6)
    p = p * -y + f32(1 / 2)
    p = p * -y + f32(1.0)
    return p * y if y < f32(0.25) else f32(1.0) - exp2(-LOG2E * y)
