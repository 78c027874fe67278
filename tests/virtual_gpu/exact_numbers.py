"""What arithmetic instructions give, computed with Python's integers and fractions: nothing of the virtual GPU."""

import functools
import math
from fractions import Fraction

import numpy as np

FORMATS = {"f16": (11, -14), "bf16": (8, -126), "f32": (24, -126), "f64": (53, -1022)}
FORMATS |= {"e4m3": (4, -6), "e4m3fnuz": (4, -7)}
"""Bits of the significand, and the exponent of the smallest normal number."""
LARGEST = {"f16": 65504.0, "bf16": float.fromhex("0x1.fep127"), "f32": float.fromhex("0x1.fffffep127")}
LARGEST |= {"e4m3": 448.0, "e4m3fnuz": 240.0}
SPECIAL = {
    "f16": (0x0000, 0x8000, 0x7C00, 0xFC00, 0x7E00, 0x0001, 0x83FF, 0x7BFF, 0x3C00, 0x4100, 0xC100),
    "bf16": (0x0000, 0x8000, 0x7F80, 0xFF80, 0x7FC0, 0x0001, 0x807F, 0x7F7F, 0x3F80, 0x4020, 0xC020),
    "f32": (
        0,
        1 << 31,
        0x7F800000,
        0xFF800000,
        0x7FC00000,
        1,
        0x807FFFFF,
        0x7F7FFFFF,
        0x3FC00000,
        0xC0200000,
        0x4F32D05E,
    ),
    "e4m3": (0x00, 0x80, 0x7F, 0xFF, 0x01, 0x87, 0x08, 0x7E, 0xFE, 0x38, 0x44),
    "f64": (0, 1 << 63, 0x7FF << 52, 0xFFF << 52, 0x7FF8 << 48, 1, 0x3FF8 << 48, 0xC004 << 48, 0x41E65A0BC0000000),
}
"""The bits of zeros, infinities, NaN, denormals and large numbers, and of a few halves."""


def width_of(kind):
    return 1 if kind == "pred" else 8 if kind.startswith("e4m3") else int(kind.lstrip("bfsu"))


def decode(bits, kind):
    """Return a number's value: an int, or a float, which holds every format exactly."""
    width = width_of(kind)
    bits &= (1 << width) - 1
    if kind in FORMATS:
        if width == 8:
            return of_8_bits(bits, kind)
        if kind == "bf16":
            return float(np.uint32(bits << 16).view(np.float32))
        return float(np.array(bits, f"u{width // 8}").view(f"f{width // 8}"))
    return bits - (1 << width) if kind[0] == "s" and bits >> (width - 1) else bits


def of_8_bits(bits, kind):
    """Return the value of a sign, 4 bits of exponent and 3 of fraction."""
    if bits == 0x80 if kind == "e4m3fnuz" else bits & 0x7F == 0x7F:
        return math.nan
    exponent, fraction = bits >> 3 & 15, bits & 7
    size = (fraction + 8 * (exponent > 0)) * 2.0 ** (max(exponent, 1) + FORMATS[kind][1] - 4)
    return -size if bits >> 7 else size


@functools.cache
def codes_of(kind):
    """Return the codes of 8 bits by their value."""
    codes = {}
    for bits in range(256):
        codes.setdefault(of_8_bits(bits, kind), []).append(bits)
    return codes


def encode(value, kind):
    """Return a value's bits; None for NaN, of which there are many."""
    width = width_of(kind)
    if kind not in FORMATS:
        return int(value) & ((1 << width) - 1)
    if math.isnan(value):
        return None
    if width == 8:  # of -0, which e4m3fnuz hasn't, 0
        found = codes_of(kind)[value]
        return found[-1] if math.copysign(1, value) < 0 else found[0]
    if kind == "bf16":
        return int(np.float32(value).view(np.uint32)) >> 16
    return int(np.array(value, f"f{width // 8}").view(f"u{width // 8}"))


def rounded(exact, kind):
    """Round a fraction to nearest even, as a float."""
    precision, smallest = FORMATS[kind]
    if exact == 0:
        return 0.0
    exponent = exact.numerator.bit_length() if exact > 0 else (-exact.numerator).bit_length()
    exponent -= exact.denominator.bit_length()
    exponent -= abs(exact) < Fraction(2) ** exponent
    quantum = Fraction(2) ** (max(exponent, smallest) - precision + 1)
    result = round(exact / quantum) * quantum
    if abs(result) > Fraction(LARGEST.get(kind, math.nextafter(math.inf, 0))):
        return math.inf if exact > 0 else -math.inf
    return float(result) if result else math.copysign(0.0, exact > 0 or -1)


def saturated(value, kind):
    """Round a float to nearest even, one beyond the largest (infinities too) to that."""
    if not math.isfinite(value):
        return value if math.isnan(value) else math.copysign(LARGEST[kind], value)
    return max(-LARGEST[kind], min(LARGEST[kind], rounded(Fraction(value), kind))) if value else value


def flushed(value, kind):
    """Return zero of the same sign for what is too small to be normal."""
    return math.copysign(0.0, value) if abs(value) < 2.0 ** FORMATS[kind][1] else value


def combined(function, values, kind):
    """Return a function of sums and products, rounded once to `kind`."""
    with np.errstate(all="ignore"):
        plain = float(function(*map(np.float64, values)))  # right where something is infinite, NaN, or exactly zero
    if not all(map(math.isfinite, values)):
        return plain
    exact = function(*map(Fraction, values))
    return plain if exact == 0 else rounded(exact, kind)


def divided(left, right, kind):
    if right == 0 or left == 0 or not (math.isfinite(left) and math.isfinite(right)):
        with np.errstate(all="ignore"):
            return float(np.float64(left) / np.float64(right))
    return rounded(Fraction(left) / Fraction(right), kind)


def extreme(left, right, largest, nan):
    """Return the smaller or larger number; of NaN and a number the number, or NaN."""
    if math.isnan(left) or math.isnan(right):
        return math.nan if nan else right if math.isnan(left) else left
    order = sorted((left, right), key=lambda value: (value, math.copysign(1, value)))
    return order[largest]


def whole(value, mode):
    """Round to a whole number, with its sign."""
    if not math.isfinite(value):
        return value
    result = {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}[mode](value)
    return math.copysign(float(result), value)


def to_integer(value, kind, from_kind):
    """Convert a whole number to an integer that exists; NaN as PTX has it."""
    width = width_of(kind)
    low, high = (-(1 << (width - 1)), (1 << (width - 1)) - 1) if kind[0] == "s" else (0, (1 << width) - 1)
    if math.isnan(value):
        return 1 << (width - 1) if 64 in (width, width_of(from_kind)) else 0
    return max(low, min(high, int(value) if math.isfinite(value) else math.copysign(1 << 80, value)))
