"""What instructions on registers compute, on all threads at once; the translated code calls these functions."""

import numpy as np
from numpy.typing import NDArray

from virtual_gpu.floats import (
    flushed,
    from_fp8,
    fused,
    fused64,
    larger,
    saturated,
    smaller,
    to_fp8,
    unordered,
    with_nan,
)

__all__ = [
    "ballot",
    "bits_of_field",
    "bits_of_scalar",
    "byte_permutation",
    "flushed",
    "from_bfloat16",
    "from_fp8",
    "fused",
    "fused64",
    "interleaved",
    "larger",
    "pick",
    "population",
    "quotient",
    "reduce_warps",
    "remainder",
    "resized",
    "saturated",
    "shift_left",
    "shift_right",
    "shuffle",
    "smaller",
    "to_bfloat16",
    "to_fp8",
    "unordered",
    "upper_half",
    "widened",
    "with_nan",
]

Array = NDArray


def bits_of_scalar(value: float | int, kind: str) -> int:
    """Return an argument's bits, in the type that the kernel's signature has for it."""
    if kind == "bf16":
        return int(to_bfloat16(np.array([value], np.float32))[0])
    if kind in ("fp16", "fp32", "fp64"):
        size = int(kind[2:]) // 8
        return int(np.array([value], f"f{size}").view(f"u{size}")[0])
    if kind.startswith(("i", "u")):
        return int(value)
    raise NotImplementedError(f"an argument of type {kind}")


def pick(mask: Array, new: Array, old: Array) -> Array:
    """Return `new` in the threads of `mask` and `old` in the others."""
    return np.where(mask, new, old)


def from_bfloat16(bits: Array) -> Array:
    """Return the float32 values of bfloat16 bits (uint16)."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bfloat16(values: Array) -> Array:
    """Round float32 to the bits of bfloat16 (uint16), to nearest even; NaN stays NaN."""
    bits = values.view(np.uint32)
    rounded = ((bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), rounded)


def interleaved(first: Array, second: Array) -> Array:
    """Return first[0], second[0], first[1], ...: the low and the high half of each register."""
    return np.stack(np.broadcast_arrays(np.atleast_1d(first), second), 1).reshape(-1)


def _double(dtype: np.dtype[np.generic]) -> str:
    return f"{dtype.kind}{2 * dtype.itemsize}"


def widened(values: Array) -> Array:
    """Return integers in twice the width."""
    return values.astype(_double(values.dtype))


def upper_half(left: Array, right: Array) -> Array:
    """Return the upper half of a product of integers."""
    return ((widened(left) * widened(right)) >> (8 * left.dtype.itemsize)).astype(left.dtype)


def resized(values: Array, kind: str) -> Array:
    """Cut or extend integers to the width of `kind` ("s16"), with their sign where they have one."""
    width = int(kind[1:]) // 8
    return values.astype(f"{values.dtype.kind}{width}").view(f"{'i' if kind[0] == 's' else 'u'}{width}")


def population(values: Array) -> Array:
    """Count the bits that are set in each of (n,) uint32."""
    return np.unpackbits(np.ascontiguousarray(values).view(np.uint8)).reshape(-1, 32).sum(1, dtype=np.uint32)


def quotient(left: Array, right: Array) -> Array:
    """Divide integers and cut towards zero, exactly."""
    safe = np.where(right == 0, 1, right)
    whole = left // safe
    return np.where((whole < 0) & (whole * safe != left), whole + 1, whole).astype(left.dtype)


def remainder(left: Array, right: Array) -> Array:
    """Return what `quotient` leaves."""
    return (left - quotient(left, right) * right).astype(left.dtype)


def shift_left(values: Array, amount: Array) -> Array:
    """Shift unsigned integers; by their width or more gives 0."""
    width = values.dtype.itemsize * 8
    return np.where(amount < width, values << np.minimum(amount, width - 1).astype(values.dtype), 0).astype(
        values.dtype
    )


def shift_right(values: Array, amount: Array) -> Array:
    """Shift integers; by their width or more gives 0, or the sign in every bit."""
    width = values.dtype.itemsize * 8
    if values.dtype.kind == "i":
        return values >> np.minimum(amount, width - 1).astype(values.dtype)
    return np.where(amount < width, values >> np.minimum(amount, width - 1).astype(values.dtype), 0).astype(
        values.dtype
    )


def bits_of_field(values: Array, position: Array, length: Array) -> Array:
    """Return `length` bits from `position` on (both taken modulo 256), with the field's sign where the type has one."""
    width = values.dtype.itemsize * 8
    unsigned = values.view(f"u{width // 8}")
    position, length = np.asarray(position) & np.uint32(255), np.asarray(length) & np.uint32(255)
    ones = np.array(2**width - 1, unsigned.dtype)
    inside = ~shift_left(np.broadcast_to(ones, np.broadcast_shapes(length.shape, unsigned.shape)), length)
    inside = inside & shift_right(np.broadcast_to(ones, inside.shape), position)
    field = shift_right(unsigned, position) & inside
    if values.dtype.kind == "i":
        top = np.minimum(position + length - np.uint32(1), np.uint32(width - 1))
        negative = (length > 0) & (shift_right(unsigned, top) & 1 == 1)
        return np.where(negative, field | ~inside, field).view(values.dtype)
    return field


def byte_permutation(low: Array, high: Array, selector: Array) -> Array:
    """Choose each of four bytes among the eight of (low, high) (uint32), by a nibble of the selector."""
    source = np.broadcast_arrays(np.atleast_1d(low), high, selector)
    eight = source[0].astype(np.uint64) | (source[1].astype(np.uint64) << np.uint64(32))
    result = np.zeros(len(eight), np.uint32)
    for byte in range(4):
        nibble = (source[2] >> np.uint32(4 * byte)) & np.uint32(15)
        chosen = ((eight >> (np.uint64(8) * (nibble & 7).astype(np.uint64))) & np.uint64(255)).astype(np.uint32)
        sign = np.where(chosen & 128, np.uint32(255), np.uint32(0))
        result |= np.where(nibble & 8, sign, chosen) << np.uint32(8 * byte)
    return result


def shuffle(mode: str, values: Array, amount: Array) -> tuple[Array, Array]:
    """Return each thread the value of another one of its warp, and whether there is such a one."""
    lanes = np.arange(len(values))
    lane, offset = lanes % 32, np.broadcast_to(amount, values.shape).astype(np.int64) & 31
    source = {"bfly": lane ^ offset, "up": lane - offset, "down": lane + offset, "idx": offset}[mode]
    inside = (source >= 0) & (source < 32)
    return values[np.where(inside, lanes - lane + source, lanes)], inside


def reduce_warps(operation: str, values: Array) -> Array:
    """Return every thread the sum, minimum, maximum, ... of its warp; fmin and fmax leave NaN out."""
    function = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or}
    function |= {"xor": np.bitwise_xor, "fmin": np.fmin, "fmax": np.fmax}
    rows = values.reshape(-1, 32)
    return np.repeat(function[operation].reduce(rows, 1, dtype=values.dtype), 32)


def ballot(predicate: Array) -> Array:
    """Return every thread the predicates of its warp, a bit for each lane."""
    bits = predicate.reshape(-1, 32).astype(np.uint32) << np.arange(32, dtype=np.uint32)
    return np.repeat(np.bitwise_or.reduce(bits, 1), 32)
