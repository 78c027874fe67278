"""Every PTX instruction of arithmetic that the virtual GPU accepts, against Python's integers and fractions."""

import functools
import itertools
import math
import re

import exact_numbers as exact
import numpy as np
import pytest
from exact_numbers import SPECIAL, decode, encode, width_of
from ptx_programs import THREADS, run_ptx

from virtual_gpu.nvidia.instruction_set import ARITHMETIC

pytestmark = pytest.mark.thorough

LOAD = {
    16: "ld.global.b16 %rs{0}, [%rd{1}];",
    32: "ld.global.b32 %r{0}, [%rd{1}];",
    64: "ld.global.b64 %rd{0}, [%rd{1}];",
}
REGISTERS = {8: "%rs", 16: "%rs", 32: "%r", 64: "%rd", 1: "%p"}


def operands_of(kind, generator):
    """Return random bits, numbers near 1, and special numbers, in an order of their own."""
    width = max(width_of(kind.removesuffix("x2")), 8)
    if kind.endswith("x2"):
        low, high = (operands_of(kind.removesuffix("x2"), generator) for _ in range(2))
        return [one | two << width for one, two in zip(low, high, strict=True)]
    bits = [
        int(generator.integers(0, 1 << width, dtype=np.uint64, endpoint=False))
        if width < 64
        else int(generator.integers(0, (1 << 64) - 1, dtype=np.uint64, endpoint=True))
        for _ in range(THREADS)
    ]
    if kind in SPECIAL:
        near = np.float32(generator.normal(0, 2, 30)).tolist()
        near = [encode(exact.rounded(exact.Fraction(value), kind) if kind == "e4m3" else value, kind) for value in near]
        bits[: len(near)] = (
            near if kind != "f16" else [encode(float(np.float16(decode(b, "f16"))), "f16") for b in near]
        )
        bits[30:41] = (SPECIAL[kind] * 2)[:11]
    else:
        small = [int(value) % (1 << width) for value in generator.integers(-20, 70, 24)]
        bits[:24] = small
        bits[24:29] = [0, 1, (1 << width) - 1, 1 << (width - 1), (1 << (width - 1)) - 1]
    return [bits[index] for index in generator.permutation(THREADS)]


def written(name):
    """Return the instruction's own name: of three sources it is no other one."""
    return name.replace("3", "", 1) if name.startswith(("min3.", "max3.")) else name


def outputs(name, sources):
    """Run an instruction with a value of each source in every thread, and give the result's bits."""
    formula = ARITHMETIC[name]
    lines, texts = [], []
    for index, kind in enumerate(formula.sources):
        width = max(width_of(kind.removesuffix("x2")) << kind.endswith("x2"), 16)
        number = 20 + index
        lines += [f"add.s64 %rd{10 + index}, %rd3, {8 * THREADS * index};", LOAD[width].format(number, 10 + index)]
        text = f"{REGISTERS[width]}{number}"
        if kind == "pred":
            lines.append(f"setp.ne.b16 %p{index}, {text}, 0;")
            text = f"%p{index}"
        texts.append(text)
    result = formula.result
    width = width_of(result.removesuffix("x2")) << result.endswith("x2")
    register = f"{REGISTERS[width]}9"
    lines.append(f"{written(name)} {register}, {', '.join(texts)};")
    if result == "pred":
        lines.append("selp.b64 %rd9, 1, 0, %p9;")
    elif width < 64:
        lines.append(f"cvt.u64.u{max(width, 16)} %rd9, {register};")
    lines.append(f"st.global.b64 [%rd3+{8 * THREADS * 3}], %rd9;")
    memory = np.zeros((4, THREADS), np.uint64)
    memory[: len(sources)] = np.array(sources, np.uint64) & np.uint64(0xFFFFFFFFFFFFFFFF)
    if "pred" in formula.sources:
        memory[:3] &= np.uint64(1)
    run_ptx("\n".join(lines), memory)
    return [int(value) for value in memory[3]], [[int(value) for value in row] for row in memory[: len(sources)]]


def expected_number(name, values):
    """Return the value of an instruction's result from the values of its sources."""
    operation, *modifiers = name.split(".")
    kind = ARITHMETIC[name].result.removesuffix("x2")
    source = ARITHMETIC[name].sources[0].removesuffix("x2")
    floating = source in exact.FORMATS
    if "ftz" in modifiers:
        values = [exact.flushed(value, source) for value in values]
    if operation == "setp":
        return compared(modifiers[0], *values)
    if operation == "cvt":
        return converted(modifiers, kind, source, *values)
    if operation in ("add", "sub", "mul", "mad", "fma"):
        function = {
            "add": lambda a, b: a + b,
            "sub": lambda a, b: a - b,
            "mul": lambda a, b: a * b,
        }.get(operation, lambda a, b, c: a * b + c)
        if floating:
            return exact.combined(function, values, kind)
        return function(*values) >> (width_of(kind) if "hi" in modifiers else 0)
    if operation in ("min", "max", "min3", "max3"):
        if floating:
            return functools.reduce(
                lambda a, b: exact.extreme(a, b, operation.startswith("max"), "NaN" in modifiers), values
            )
        return {"min": min, "max": max}[operation](values)
    if operation in ("div", "rem") and not floating:
        left, right = values
        whole = abs(left) // abs(right) * (1 if (left < 0) == (right < 0) else -1)
        return whole if operation == "div" else left - whole * right
    if operation == "div":
        return exact.divided(*values, kind)
    if operation == "rcp":
        return exact.divided(1.0, *values, kind)
    return other_number(operation, values, source)


def other_number(operation, values, kind):
    width = width_of(kind)
    first, *rest = values
    if operation in ("neg", "abs"):
        return (
            math.copysign(first, 1 if operation == "abs" else -math.copysign(1, first))
            if kind in exact.FORMATS
            else (abs(first) if operation == "abs" else -first)
        )
    if operation == "shl":
        return first << rest[0] if rest[0] < width else 0
    if operation == "shr":
        return first >> min(rest[0], width)
    if operation == "bfe":
        position, length = rest[0] & 255, rest[1] & 255
        bits = first & ((1 << width) - 1)
        found = 0
        top = bits >> min(position + length - 1, width - 1) & 1 if kind[0] == "s" and length else 0
        for index in range(width):
            found |= (bits >> (position + index) & 1 if index < length and position + index < width else top) << index
        return found
    if operation == "prmt":
        eight = [(first | rest[0] << 32) >> (8 * index) & 255 for index in range(8)]
        nibbles = [rest[1] >> (4 * index) & 15 for index in range(4)]
        chosen = [(eight[n & 7] >> 7) * 255 if n & 8 else eight[n & 7] for n in nibbles]
        return sum(byte << (8 * index) for index, byte in enumerate(chosen))
    return {
        "and": lambda: first & rest[0],
        "or": lambda: first | rest[0],
        "xor": lambda: first ^ rest[0],
        "not": lambda: ~first,
        "popc": lambda: first.bit_count(),
        "ex2": lambda: 2.0**first if first < 1024 else math.inf,
        "lg2": lambda: math.log2(first) if first > 0 else -math.inf if first == 0 else math.nan,
        "sqrt": lambda: math.sqrt(first) if first >= 0 else math.nan,
        "rsqrt": lambda: (
            1 / math.sqrt(first) if first > 0 else math.copysign(math.inf, first) if first == 0 else math.nan
        ),
        "tanh": lambda: math.tanh(first),
    }[operation]()


def compared(comparison, left, right):
    unordered = left != left or right != right
    if comparison in ("num", "nan"):
        return unordered == (comparison == "nan")
    if unordered:
        return comparison.endswith("u") and len(comparison) == 3
    return {
        "eq": left == right,
        "ne": left != right,
        "lt": left < right,
        "lo": left < right,
        "le": left <= right,
        "ls": left <= right,
        "gt": left > right,
        "hi": left > right,
        "ge": left >= right,
        "hs": left >= right,
    }[comparison[:2]]


def converted(modifiers, kind, source, *values):
    value = values[0]
    mode = next((one for one in modifiers if one in ("rni", "rzi", "rmi", "rpi")), None)
    if mode:
        value = exact.whole(value, mode)
        return value if kind in exact.FORMATS else exact.to_integer(value, kind, source)
    if "satfinite" in modifiers:
        return exact.saturated(value, kind)
    if kind in exact.FORMATS and value and math.isfinite(value):
        return exact.rounded(exact.Fraction(value), kind)
    return value


APPROXIMATE = {"ex2", "lg2", "sqrt", "rsqrt", "tanh"}
BY_OPERATION = {}
for instruction in ARITHMETIC:
    BY_OPERATION.setdefault(instruction.split(".")[0], []).append(instruction)


def check(name, seed):
    formula = ARITHMETIC[name]
    generator = np.random.default_rng(seed)
    sources = [operands_of(kind, generator) for kind in formula.sources]
    operation = name.split(".")[0]
    if operation in ("div", "rem") and formula.sources[1] not in exact.FORMATS:
        bits = width_of(formula.sources[1])
        sources[1] = [value if value & ((1 << bits) - 1) else 3 for value in sources[1]]
    if operation in ("shl", "shr", "bfe"):
        sources[1:] = [[value % 80 for value in row] for row in sources[1:]]
    found, sources = outputs(name, sources)
    packed = formula.result.endswith("x2")
    result = formula.result.removesuffix("x2")
    width = width_of(result)
    for thread in range(THREADS):
        for half in range(1 + packed):
            if operation == "cvt" and len(sources) == 2:  # the first source is the upper half
                raw = [(sources[1 - half][thread], formula.sources[0])]
            else:
                raw = [
                    (row[thread] >> (width_of(kind.removesuffix("x2")) * half), kind.removesuffix("x2"))
                    for row, kind in zip(sources, formula.sources, strict=True)
                ]
            values = [decode(bits, kind) for bits, kind in raw]
            wanted = expected_number(name, values)
            if result in exact.FORMATS and "ftz" in name.split(".") and operation != "cvt":
                wanted = exact.flushed(wanted, result)
            bits = found[thread] >> (width * half) & ((1 << width) - 1)
            shown = f"{name} of {values} in thread {thread}: {decode(bits, result)} is not {wanted}"
            if operation in APPROXIMATE:
                got = decode(bits, result)
                small = abs(wanted) < 2.0**-126 or abs(got) < 2.0**-126
                close = math.isclose(got, wanted, rel_tol=2**-21, abs_tol=2.0**-126 * small) or abs(wanted) > 3.4e38
                assert close or (math.isnan(got) and math.isnan(wanted)), shown
                continue
            wanted_bits = encode(wanted, result)
            assert math.isnan(decode(bits, result)) if wanted_bits is None else bits == wanted_bits, shown
            if width == 8 and not packed:  # the register holds the number with its sign
                assert found[thread] == decode(bits, result) & 0xFFFF, shown


@pytest.mark.parametrize("operation", sorted(BY_OPERATION))
def test_operation(operation):
    for seed, name in enumerate(BY_OPERATION[operation]):
        check(name, seed)


def test_every_number_near_the_middle_of_two_codes():
    """Numbers of 8 bits, the middles between them, their neighbours, and what is above the largest."""
    values = [decode(bits, "e4m3") for bits in range(0x7F)] + [480.0, 500.0, 1e5, 3e38, math.inf]
    values += [(one + two) / 2 for one, two in itertools.pairwise(values)]
    with np.errstate(all="ignore"):
        near = [float(np.nextafter(np.float32(value), np.float32(to))) for value in values for to in (0, math.inf)]
    values = [sign * value for value in (*values, *near) for sign in (1, -1)]
    values += [1e-40] * (-len(values) % THREADS)
    for first in range(0, len(values), THREADS):
        some = values[first : first + THREADS]
        bits = [encode(value, "f32") for value in some]
        found, _ = outputs("cvt.rn.satfinite.e4m3x2.f32", [bits, bits[::-1]])
        wanted = [encode(exact.saturated(value, "e4m3"), "e4m3") for value in some]
        assert found == [low | upper << 8 for low, upper in zip(wanted[::-1], wanted, strict=True)]
    codes = [[code + 4 * thread for thread in range(THREADS)] for code in range(4)]
    for row in codes:
        found, _ = outputs("cvt.rn.f16x2.e4m3x2", [row])
        for code, bits in zip(row, found, strict=True):
            value = decode(bits, "f16")
            assert math.isnan(value) if code & 127 == 127 else encode(value, "e4m3") == code
            assert bits >> 16 == 0


def test_fused_where_two_roundings_differ():
    """1 + 2**-24 + 2**-60 is just above the middle of two float32."""
    one, tiny = encode(1.0, "f32"), encode(2.0**-30, "f32")
    small, middle = encode(2.0**-30 + 2.0**-53, "f32"), encode(1 + 2.0**-23, "f32")
    for a, b, c in (
        (tiny, small, one),
        (encode(1 + 2.0**-12, "f32"), encode(1 + 2.0**-12, "f32"), encode(2.0**-60, "f32")),
        (middle, middle, tiny),
    ):
        found, _ = outputs("fma.rn.f32", [[bits] * THREADS for bits in (a, b, c)])
        values = [decode(bits, "f32") for bits in (a, b, c)]
        assert found[0] == encode(exact.combined(lambda x, y, z: x * y + z, values, "f32"), "f32")


@pytest.mark.parametrize(
    "instruction",
    [
        "add.sat.s32 %r4, %r1, %r1;",
        "add.rz.f32 %r4, %r1, %r1;",
        "cvt.rz.bf16.f32 %rs4, %r1;",
        "cvt.rn.satfinite.f16.f32 %rs4, %r1;",
        "min.xorsign.abs.f32 %r4, %r1, %r1;",
        "setp.lt.and.s32 %p1, %r1, %r1, %p2;",
        "setp.lt.s32 %p1|%p2, %r1, %r1;",
        "max.f16 %rs4, %rs1, %rs1, %rs1;",
        "ld.acquire.gpu.global.b32 %r4, [%rd3];",
        "ld.b32 %r4, [%rd3];",
        "ld.global.s8 %r4, [%rd3];",
        "st.volatile.shared.b32 [%r2], %r1;",
        "atom.relaxed.gpu.shared.max.u32 %r4, [%r2], %r1;",
        "bar.sync 1, 32;",
        "bar.sync %r1;",
        "bar.red.popc.u32 %r4, 0, %p1;",
        "barrier.cluster.arrive;",
        "shfl.sync.bfly.b32 %r4, %r1, 1, 7, -1;",
        "shfl.sync.bfly.b32 %r4, %r1, 1, 31, 255;",
        "mov.u32 %r4, %clock;",
        "mov.b32 %r4;",
        "ldmatrix.sync.aligned.m16n16.x1.trans.shared.b8 {%r4}, [%r2];",
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%r4, %r5, %r6, %r7}, {%r1}, {%r1}, {%r1};",
        "tcgen05.mma.cta_group::1.kind::f16 [%r1], [%r1], %rd1, %r1, %p1;",
        "tcgen05.mma.cta_group::2.kind::f16 [%r1], %rd1, %rd1, %r1, %p1;",
        "cp.async.ca.shared.global.L2::128B [%r2], [%rd3], 4;",
        "cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.bulk_group [%rd1, {%r1, %r1}], [%r2];",
        "fence.proxy.async.global;",
        "membar.gl;",
    ],
)
def test_what_is_unknown_is_refused(instruction):
    name = re.escape(instruction.split()[0].removesuffix(";"))
    with pytest.raises(NotImplementedError, match=rf"line \d+: the machine doesn't know {name}"):
        run_ptx(instruction, np.zeros((4, THREADS), np.uint64))
