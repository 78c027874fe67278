"""Floating-point numbers as GPUs compute with them, where NumPy has no operation of the same result."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

__all__ = [
    *("flushed", "from_e2m1", "from_e8m0", "from_fp8", "fused", "fused64", "larger", "saturated", "smaller", "to_fp8"),
    *("unordered", "with_nan"),
]

Array = NDArray
_FP8 = {"e4m3": (-6, 0x7E, 0x7F), "e4m3fnuz": (-7, 0x7F, 0x80)}
"""Of 8 bits, 3 for the fraction: the exponent of the smallest normal number, and the codes of the largest and of NaN.

"e4m3" is the Open Compute Project's, up to 448. MI300's "e4m3fnuz" has half its values, up to 240, one NaN and no -0.
"""


def to_fp8(values: Array, kind: str) -> Array:
    """Round float32 to the codes of `kind` (uint8), to nearest even; what is beyond the largest, to that."""
    smallest, largest, nan = _FP8[kind]
    size = abs(values)
    exponent = np.maximum(np.where(size > 0, np.frexp(size)[1] - 1, smallest), smallest)
    code = np.rint(np.ldexp(np.where(size < 2**10, size, 0), 3 - exponent)).astype(np.int32)
    code = np.where(size < 2**10, np.minimum(code + (exponent - smallest) * 8, largest), largest)
    code = np.where(np.signbit(values) & ((code != 0) | (kind == "e4m3")), code | 0x80, code)
    return np.where(np.isnan(values), nan, code).astype(np.uint8)


def _fp8_values(kind: str) -> Array:
    smallest, _, nan = _FP8[kind]
    code = np.arange(256)
    exponent, fraction = code >> 3 & 15, code & 7
    size = np.ldexp(np.where(exponent > 0, 8 + fraction, fraction), np.maximum(exponent, 1) + smallest - 4)
    values = np.where(code >> 7, -size, size)
    values[nan | (0x80 if kind == "e4m3" else 0)] = values[nan] = np.nan
    return values.astype(np.float32)


_VALUES = {kind: _fp8_values(kind) for kind in _FP8}


def from_fp8(codes: Array, kind: str) -> Array:
    """Return the float32 values of codes (integers below 256) of `kind`."""
    return _VALUES[kind][codes]


def from_e2m1(codes: Array) -> Array:
    """Return the float32 values of numbers of 4 bits: two for each byte of the last axis, its low half first."""
    halves = (codes[..., None] >> np.array([0, 4], np.uint8)).reshape(*codes.shape[:-1], -1)
    size = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)[halves & 7]
    return np.where(halves & 8, -size, size)


def from_e8m0(codes: Array) -> Array:
    """Return the powers of two (float64) that codes (integers below 256) of scales stand for; NaN for 255."""
    codes = np.asarray(codes).astype(np.int64)
    return np.where(codes == 255, np.nan, np.ldexp(1.0, codes - 127))


def flushed(values: Array) -> Array:
    """Return zeros of the same sign for numbers too small to be normal (FTZ)."""
    return np.where(abs(values) < np.finfo(values.dtype).tiny, np.copysign(values.dtype.type(0), values), values)


def unordered(left: Array, right: Array) -> Array:
    """Return where either is NaN."""
    return np.isnan(left) | np.isnan(right)


def smaller(left: Array, right: Array) -> Array:
    """Return the minimum; of a number and NaN the number, and -0 is less than 0."""
    return np.where(left == right, np.where(np.signbit(left), left, right), np.fmin(left, right))


def larger(left: Array, right: Array) -> Array:
    """Return the maximum; of a number and NaN the number, and 0 is more than -0."""
    return np.where(left == right, np.where(np.signbit(left), right, left), np.fmax(left, right))


def with_nan(function: Callable[[Array, Array], Array], left: Array, right: Array) -> Array:
    """Return NaN wherever either is NaN."""
    return np.where(unordered(left, right), left.dtype.type(np.nan), function(left, right))


def _sum(left: Array, right: Array) -> tuple[Array, Array]:
    """Return a sum of float64, rounded, and what was rounded away (Knuth's TwoSum)."""
    total = left + right
    part = total - left
    return total, (left - (total - part)) + (right - part)


def _sum_to_odd(left: Array, right: Array) -> Array:
    """Add float64 and round what isn't exact to the neighbour with an odd last bit.

    Such a sum can be rounded once more, to fewer bits, as if it were exact (Boldo and Melquiond).
    """
    total, error = _sum(left, right)
    bits = np.atleast_1d(total).view(np.int64)
    wrong = (error != 0) & (bits & 1 == 0) & np.isfinite(total)
    return (bits + np.where(wrong, np.where((error > 0) == (total > 0), 1, -1), 0)).view(np.float64)


def fused(a: Array, b: Array, c: Array, kind: str = "") -> Array:
    """Return a * b + c in the type of c, rounded once; kind "bf16": float32 to round to that.

    The product of two float32 is exact in float64.
    """
    exact = _sum_to_odd(a.astype(np.float64) * b, c.astype(np.float64))
    result = exact.astype(c.dtype)
    if kind == "bf16":
        bits = result.view(np.int32)
        wrong = (result != exact) & (bits & 1 == 0) & np.isfinite(result)
        step = np.where(wrong, np.where(abs(exact) > abs(result), 1, -1), 0).astype(np.int32)
        return (bits + step).view(np.float32)
    return result


def fused64(a: Array, b: Array, c: Array) -> Array:
    """Return a * b + c of float64, rounded once (Boldo and Melquiond), where no part of it overflows or vanishes."""
    upper, lower = _product(a, b)
    total, rest = _sum(c, lower)
    first, second = _sum(upper, total)
    result = first + _sum_to_odd(rest, second)
    return np.where(np.isfinite(result), result, a * b + c)


def _product(a: Array, b: Array) -> tuple[Array, Array]:
    """Return a product of float64, rounded, and what was rounded away (Dekker and Veltkamp)."""
    product = a * b
    (a_upper, a_lower), (b_upper, b_lower) = _halves(a), _halves(b)
    return product, ((a_upper * b_upper - product) + a_upper * b_lower + a_lower * b_upper) + a_lower * b_lower


def _halves(values: Array) -> tuple[Array, Array]:
    scaled = values * 134217729.0  # 2**27 + 1
    upper = scaled - (scaled - values)
    return upper, values - upper


def saturated(values: Array, kind: str) -> Array:
    """Return whole numbers as integers ("s32"), the nearest that there are; NaN as cvt gives it.

    NaN is 0, or the sign's bit alone where float64 or an integer of 64 bits is converted.
    """
    target = np.dtype(f"{'i' if kind[0] == 's' else 'u'}{int(kind[1:]) // 8}")
    limits, wide = np.iinfo(target), np.asarray(values, np.float64)
    inside = (wide > limits.min) & (wide < limits.max)  # the largest of 64 bits is none of float64
    result = np.where(inside, wide, 0).astype(target)
    result = np.where(wide >= limits.max, limits.max, np.where(wide <= limits.min, limits.min, result)).astype(target)
    for_nan = np.array(0, target)
    if values.dtype.itemsize == 8 or target.itemsize == 8:
        for_nan = np.array(1 << (8 * target.itemsize - 1), f"u{target.itemsize}").view(target)
    return np.where(np.isnan(wide), for_nan, result)
