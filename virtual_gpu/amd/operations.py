"""What AMD's instructions on registers compute where NumPy has no operator for it; the translated code calls these."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from virtual_gpu.arithmetic import to_bfloat16
from virtual_gpu.floats import from_fp8, fused, larger, smaller, to_fp8, with_nan

__all__ = [
    "add_halves",
    "bf16_of_fp8",
    "bits_of_mask",
    "bitwise_table",
    "carries",
    "count_bits",
    "divide_fixup",
    "divide_scale",
    "divide_scaled_up",
    "field",
    "floats_of_fp8",
    "fp8_pair",
    "from_fp8",
    "fused",
    "halves",
    "high",
    "is_of_class",
    "larger",
    "largest_halves",
    "mask_of_bits",
    "overflows",
    "pair",
    "permute_bytes",
    "reverse_bits",
    "round_pair",
    "smaller",
    "subtract_to_zero",
    "to_integer",
    "with_nan",
]

Array = NDArray


def mask_of_bits(words: Array) -> Array:
    """Return the lanes (waves, 64) whose bit is set, from bytes (waves, 8)."""
    return np.unpackbits(words, axis=1, bitorder="little").view(np.bool_)


def bits_of_mask(mask: Array) -> Array:
    """Return (waves, 8) bytes, from lanes (waves, 64)."""
    return np.packbits(mask, axis=1, bitorder="little")


def pair(low: Array, high: Array) -> Array:
    """Join 32-bit words to 64-bit ones."""
    return low.astype(np.uint64) | (high.astype(np.uint64) << np.uint64(32))


def high(left: Array, right: Array) -> Array:
    """Return the upper 32 bits of the product of unsigned integers."""
    return ((left.astype(np.uint64) * right.astype(np.uint64)) >> np.uint64(32)).astype(np.uint32)


def carries(left: Array, right: Array, carry: Array | int = 0) -> Array:
    """Return whether left + right + carry is more than 32 bits hold."""
    return (left.astype(np.uint64) + right + carry) >> np.uint64(32) != 0


def overflows(exact: Array) -> Array:
    """Return whether a sum or difference computed in int64 is outside int32."""
    return exact != exact.astype(np.int32)


def subtract_to_zero(left: Array, right: Array) -> Array:
    """Return left - right of unsigned integers, 0 where that is negative."""
    return np.where(left < right, np.uint32(0), left - right)


def field(values: Array, position: Array, length: Array) -> Array:
    """Return `length` bits from `position` on; of signed integers with the field's sign."""
    length = np.asarray(length & 31).astype(np.int64)
    bits = (values.astype(np.int64) >> (position & 31)) & ((np.int64(1) << length) - 1)
    if values.dtype.kind == "i":
        sign = (np.int64(1) << length) >> 1
        bits = (bits ^ sign) - sign
    return bits.astype(values.dtype)


def is_of_class(values: Array, classes: Array) -> Array:
    """Return whether float32 are of one of the classes whose bits are set.

    Upwards from the third bit these are -inf, negative, below zero and denormal, -0, 0, denormal, positive, inf; the
    lowest two are NaN, signaling or quiet.
    """
    bits = np.ascontiguousarray(values).view(np.uint32)
    exponent, fraction = bits >> np.uint32(23) & np.uint32(0xFF), bits & np.uint32(0x7FFFFF)
    size = np.where(exponent == 0xFF, 3, np.where(exponent > 0, 2, np.where(fraction > 0, 1, 0)))
    number = np.where(bits >> np.uint32(31) != 0, 5 - size, 6 + size)
    is_quiet = fraction >> np.uint32(22) != 0
    number = np.where((exponent == 0xFF) & (fraction > 0), is_quiet, number)
    return (classes >> number.astype(np.uint32)) & np.uint32(1) != 0


def count_bits(values: Array) -> Array:
    """Return the number of bits that are set."""
    return np.unpackbits(np.ascontiguousarray(values)[..., None].view(np.uint8), axis=-1).sum(-1, dtype=np.uint32)


def reverse_bits(values: Array) -> Array:
    """Exchange the lowest bit with the highest, and so on."""
    values = np.asarray(values)
    for shift, mask in ((1, 0x55555555), (2, 0x33333333), (4, 0x0F0F0F0F), (8, 0x00FF00FF), (16, 0x0000FFFF)):
        values = ((values >> np.uint32(shift)) & np.uint32(mask)) | ((values & np.uint32(mask)) << np.uint32(shift))
    return values


def bitwise_table(a: Array, b: Array, c: Array, table: int) -> Array:
    """Look every bit up in an eight-entry table by the bits of a (4), b (2) and c (1)."""
    result = np.zeros(np.broadcast_shapes(np.shape(a), np.shape(b), np.shape(c)), np.uint32)
    for entry in range(8):
        if table >> entry & 1:
            result |= (a if entry & 4 else ~a) & (b if entry & 2 else ~b) & (c if entry & 1 else ~c)
    return result


def permute_bytes(upper: Array, lower: Array, selector: Array) -> Array:
    """Choose each byte among the eight of (upper, lower) by a byte of the selector; 12 gives 0, more gives 255."""
    eight = pair(lower, upper)
    result = np.zeros(np.broadcast_shapes(eight.shape, np.shape(selector)), np.uint32)
    for byte in range(4):
        choice = (selector >> np.uint32(8 * byte)) & np.uint32(255)
        if ((choice >= 8) & (choice < 12)).any():
            raise NotImplementedError("a byte of signs")
        chosen = (eight >> (np.minimum(choice, 7).astype(np.uint64) * np.uint64(8))) & np.uint64(255)
        chosen = np.where(choice < 8, chosen, np.where(choice == 12, 0, 255)).astype(np.uint32)
        result |= chosen << np.uint32(8 * byte)
    return result


def add_halves(left: Array, right: Array) -> Array:
    """Add unsigned integers of 16 bits, two in each word."""
    upper = np.uint32(0xFFFF0000)
    return ((left & upper) + (right & upper)) | ((left + right) & ~upper)


def largest_halves(left: Array, right: Array) -> Array:
    """Return the larger of unsigned integers of 16 bits, two in each word."""
    upper, lower = np.uint32(0xFFFF0000), np.uint32(0xFFFF)
    return np.maximum(left & upper, right & upper) | np.maximum(left & lower, right & lower)


def halves(values: Array, half: int) -> Array:
    """Return the float16 values in the lower (0) or upper (1) half of words, as float32."""
    words = (np.asarray(values) >> np.uint32(16 * half)).astype(np.uint16)
    return words.view(np.float16).astype(np.float32)


def round_pair(low: Array, upper: Array, kind: str) -> Array:
    """Round two float32 to the halves of a word: "bf16" or "f16"."""
    pairs = np.stack(np.broadcast_arrays(low, upper), -1)
    rounded = to_bfloat16(pairs) if kind == "bf16" else pairs.astype(np.float16)
    return np.ascontiguousarray(rounded).view(np.uint32)[..., 0]


def _require_no_scale(scale: Any) -> None:
    if (np.asarray(scale) != 1).any():
        raise NotImplementedError("a conversion of fp8 with a scale other than 1")


def fp8_pair(low: Array, upper: Array, kind: str, scale: Any = 1) -> Array:
    """Round two float32 to the lower two bytes of a word, the largest number where they are larger."""
    _require_no_scale(scale)
    first, second = (to_fp8(np.asarray(values), kind).astype(np.uint32) for values in (low, upper))
    return first | second << np.uint32(8)


def floats_of_fp8(words: Array, kind: str, scale: Any = 1) -> Array:
    """Return the two float32 whose codes are the lower two bytes of words, as words of 64 bits."""
    _require_no_scale(scale)
    first, second = (from_fp8(np.asarray(words) >> shift & 0xFF, kind).view(np.uint32) for shift in (0, 8))
    return pair(first, second)


def bf16_of_fp8(words: Array, kind: str, scale: Any) -> Array:
    """Return the two bfloat16 whose codes are the lower two bytes of words."""
    floats = floats_of_fp8(words, kind, scale)
    return (floats >> np.uint64(16)).astype(np.uint32) & 0xFFFF | (floats >> np.uint64(32)).astype(
        np.uint32
    ) & 0xFFFF0000


def to_integer(values: Array, kind: str) -> Array:
    """Cut float32 towards zero, to the nearest integer that `kind` has; NaN gives 0."""
    limits = np.iinfo(kind)
    whole = np.trunc(np.nan_to_num(values.astype(np.float64), nan=0.0))
    return np.clip(whole, limits.min, limits.max).astype(kind)


def _exponent(values: Array) -> Array:
    return (np.asarray(values).view(np.uint32) >> np.uint32(23)).astype(np.int64) & 255


def divide_scale(value: Array, denominator: Array, numerator: Array) -> tuple[Array, Array]:
    """Scale one side of a division so that its steps stay normal: (V_DIV_SCALE's result, its mask)."""
    value, denominator, numerator = (np.array(item) for item in np.broadcast_arrays(value, denominator, numerator))
    up, down = (np.ldexp(value, 64), np.ldexp(value, -64))
    difference = _exponent(numerator) - _exponent(denominator)
    is_denominator, is_numerator = value == denominator, value == numerator
    tiny = np.float32(np.finfo(np.float32).tiny)
    small_reciprocal, small_quotient = abs(1 / denominator) < tiny, abs(numerator / denominator) < tiny
    cases = [
        (numerator == 0) | (denominator == 0),
        difference >= 96,
        _exponent(denominator) == 0,
        small_reciprocal & small_quotient,
        small_reciprocal,
        small_quotient,
        _exponent(numerator) <= 23,
    ]
    results = [
        np.full_like(value, np.nan),
        np.where(is_denominator, up, value),
        up,
        np.where(is_denominator, down, value),  # the manual has up here, which no denominator so large can take
        down,
        np.where(is_numerator, up, value),
        up,
    ]
    flags = [False, True, False, True, False, True, False]
    return np.select(cases, results, value), np.select(cases, flags, False).astype(np.bool_)


def divide_scaled_up(a: Array, b: Array, c: Array, scaled: Array) -> Array:
    """Return a * b + c, with what V_DIV_SCALE put in or took away made up for."""
    result = fused(a, b, c)
    return np.where(scaled, np.where(_exponent(c) > 127, np.ldexp(result, 64), np.ldexp(result, -64)), result)


def divide_fixup(quotient: Array, denominator: Array, numerator: Array) -> Array:
    """Return a quotient with the sign and the special values of numerator / denominator."""
    exact = numerator / denominator
    special = ~np.isfinite(exact) | (exact == 0) | ~np.isfinite(denominator)
    return np.where(special, exact, np.copysign(abs(quotient), exact))
