"""Every AMD instruction of arithmetic that the virtual GPU accepts, against Python's integers and fractions."""

import functools
import itertools
import math

import exact_numbers as exact
import numpy as np
import pytest
from amd_programs import NUM_THREADS, run_amd
from exact_numbers import SPECIAL, decode, encode

from virtual_gpu.amd.instructions import COMPARISONS, SCALAR, VECTOR

pytestmark = pytest.mark.thorough

WORD = (1 << 32) - 1
KINDS = {"u4": "u32", "i4": "s32", "f4": "f32", "u8": "u64", "h": "f16", "u2": "u16", "i2": "s16", "f2": "f16"}
KINDS |= {"i8": "s64", "f8": "f64"}


def signed(bits, width=32):
    return decode(bits, f"s{width}") if width in (8, 16, 32, 64) else (bits ^ 1 << width - 1) - (1 << width - 1)


def low24(bits):
    return bits & 0xFFFFFF


def field(bits, position, length):
    return bits >> (position & 31) & ((1 << (length & 31)) - 1)


def signed_field(bits, position, length):
    value, length = field(signed(bits), position, length), length & 31
    return value - (1 << length) if length and value >> (length - 1) else value


def bytes_of(upper, lower, selector):
    eight = (upper << 32 | lower).to_bytes(8, "little")
    choices = selector.to_bytes(4, "little")
    return int.from_bytes(bytes(eight[c] if c < 8 else 0 if c == 12 else 255 for c in choices), "little")


def table(a, b, c, entries=0x6A):
    return sum((entries >> ((a >> i & 1) * 4 + (b >> i & 1) * 2 + (c >> i & 1)) & 1) << i for i in range(32))


def fused(a, b, c):
    return exact.combined(lambda x, y, z: x * y + z, (a, b, c), "f32")


def two(operation):
    return lambda a, b: exact.combined(operation, (a, b), "f32")


def pair(low, upper, kind):
    """Return two numbers rounded to halves of a word; any NaN as 0x7FC0."""
    halves = [encode(rounded(value, kind), kind) for value in (low, upper)]
    low, upper = (0x7FC0 if bits is None else bits for bits in halves)
    return low | upper << 16


FNUZ = "e4m3fnuz"
SATURATES = "s_setreg_imm32_b32 hwreg(HW_REG_MODE, 23, 1), 1"


def codes(low, upper, kind=FNUZ):
    """Return two numbers as codes of 8 bits; any NaN as one."""
    first, second = (encode(exact.saturated(value, kind), kind) for value in (low, upper))
    nan = 0x80 if kind == FNUZ else 0x7F
    return (nan if first is None else first) | (nan if second is None else second) << 8


def halves_of(word):
    return [decode(word << 16 & WORD, "f32"), decode(word & 0xFFFF0000, "f32")]


def values_of(word, kind=FNUZ):
    return [exact.of_8_bits(word >> shift & 255, kind) for shift in (0, 8)]


def bits_of(values, kind):
    """Return the bits of two numbers side by side, NaN as NumPy has it."""
    first, second = (encode(value, kind) for value in values)
    nan = 0x7FC00000 >> (32 - exact.width_of(kind))
    return (nan if first is None else first) | (nan if second is None else second) << exact.width_of(kind)


def rounded(value, kind):
    return exact.rounded(exact.Fraction(value), kind) if math.isfinite(value) and value else value


REFERENCE = {
    "v_mov_b32": lambda a: a,
    "v_accvgpr_read_b32": lambda a: a,
    "v_accvgpr_write_b32": lambda a: a,
    "v_accvgpr_mov_b32": lambda a: a,
    "v_mov_b64": lambda a: a,
    "v_add_u32": lambda a, b: a + b,
    "v_sub_u32": lambda a, b: a - b,
    "v_subrev_u32": lambda a, b: b - a,
    "v_mul_lo_u32": lambda a, b: a * b,
    "v_mul_hi_u32": lambda a, b: a * b >> 32,
    "v_mul_u32_u24": lambda a, b: low24(a) * low24(b),
    "v_mad_u32_u24": lambda a, b, c: low24(a) * low24(b) + c,
    "v_mul_i32_i24": lambda a, b: signed(low24(a), 24) * signed(low24(b), 24),
    "v_mad_i32_i24": lambda a, b, c: signed(low24(a), 24) * signed(low24(b), 24) + c,
    "v_min_i32": min,
    "v_max_i32": max,
    "v_max_u32": max,
    "v_min3_u32": min,
    "v_min3_i32": min,
    "v_max3_u32": max,
    "v_max3_i32": max,
    "v_and_b32": lambda a, b: a & b,
    "v_or_b32": lambda a, b: a | b,
    "v_xor_b32": lambda a, b: a ^ b,
    "v_not_b32": lambda a: ~a,
    "v_lshlrev_b32": lambda a, b: b << (a & 31),
    "v_lshrrev_b32": lambda a, b: b >> (a & 31),
    "v_ashrrev_i32": lambda a, b: b >> (a & 31),
    "v_lshrrev_b16": lambda a, b: (b & 0xFFFF) >> (a & 15),
    "v_ashrrev_i16": lambda a, b: ((b & 0xFFFF ^ 0x8000) - 0x8000) >> (a & 15) & 0xFFFF,
    "v_add_u16": lambda a, b: a + b & 0xFFFF,
    "v_max_u16": lambda a, b: max(a & 0xFFFF, b & 0xFFFF),
    "v_sub_u16": lambda a, b: (a - b) & 0xFFFF,
    "v_lshlrev_b16": lambda a, b: b << (a & 15) & 0xFFFF,
    "v_lshlrev_b64": lambda a, b: b << (a & 63),
    "v_lshrrev_b64": lambda a, b: b >> (a & 63),
    "v_add3_u32": lambda a, b, c: a + b + c,
    "v_lshl_add_u32": lambda a, b, c: (a << (b & 31)) + c,
    "v_add_lshl_u32": lambda a, b, c: (a + b & WORD) << (c & 31),
    "v_lshl_or_b32": lambda a, b, c: (a << (b & 31)) | c,
    "v_and_or_b32": lambda a, b, c: a & b | c,
    "v_or3_b32": lambda a, b, c: a | b | c,
    "v_xad_u32": lambda a, b, c: (a ^ b) + c,
    "v_bfi_b32": lambda a, b, c: a & b | ~a & c,
    "v_bfe_u32": field,
    "v_bfe_i32": lambda a, b, c: signed_field(a & WORD, b, c),
    "v_bfrev_b32": lambda a: int(f"{a:032b}"[::-1], 2),
    "v_bcnt_u32_b32": lambda a, b: a.bit_count() + b,
    "v_alignbit_b32": lambda a, b, c: (a << 32 | b) >> (c & 31),
    "v_perm_b32": bytes_of,
    "v_bitop3_b32": table,
    "v_bitop3_b16": lambda a, b, c: table(a, b, c) & 0xFFFF,
    "v_lshl_add_u64": lambda a, b, c: (a << (b & 63)) + c,
    "v_add_f32": two(lambda a, b: a + b),
    "v_sub_f32": two(lambda a, b: a - b),
    "v_subrev_f32": two(lambda a, b: b - a),
    "v_mul_f32": two(lambda a, b: a * b),
    "v_min_f32": lambda a, b: exact.extreme(a, b, largest=False, nan=False),
    "v_max_f32": lambda a, b: exact.extreme(a, b, largest=True, nan=False),
    "v_max3_f32": lambda *numbers: functools.reduce(REFERENCE["v_max_f32"], numbers),
    "v_minimum3_f32": lambda *numbers: functools.reduce(
        lambda a, b: exact.extreme(a, b, largest=False, nan=True), numbers
    ),
    "v_maximum3_f32": lambda *numbers: functools.reduce(
        lambda a, b: exact.extreme(a, b, largest=True, nan=True), numbers
    ),
    "v_fma_f32": fused,
    "v_fmac_f32": fused,
    "v_fmaak_f32": fused,
    "v_fmamk_f32": fused,
    "v_exp_f32": lambda a: 2.0**a if a < 1000 else math.inf if a == a else a,
    "v_log_f32": lambda a: math.log2(a) if 0 < a < math.inf else -math.inf if a == 0 else a if a > 0 else math.nan,
    "v_sqrt_f32": lambda a: math.sqrt(a) if a >= 0 else math.nan,
    "v_rcp_f32": lambda a: exact.divided(1.0, a, "f32"),
    "v_rcp_iflag_f32": lambda a: exact.divided(1.0, a, "f32"),
    "v_rndne_f32": lambda a: exact.whole(a, "rni"),
    "v_ldexp_f32": lambda a, b: rounded(math.ldexp(a, max(-2000, min(b, 800))), "f32") if math.isfinite(a) else a,
    "v_add_f64": lambda a, b: exact.combined(lambda x, y: x + y, (a, b), "f64"),
    "v_cvt_f64_f32": lambda a: a,
    "v_cvt_f32_u32": lambda a: rounded(float(a), "f32"),
    "v_cvt_u32_f32": lambda a: exact.to_integer(exact.whole(a, "rzi"), "u32", "f32"),
    "v_cvt_i32_f32": lambda a: exact.to_integer(exact.whole(a, "rzi"), "s32", "f32"),
    "v_cvt_f32_f16": lambda a: a,
    "v_cvt_f16_f32": lambda a: pair(a, 0.0, "f16"),
    "v_cvt_pk_bf16_f32": lambda a, b: pair(a, b, "bf16"),
    "v_cvt_pk_f16_f32": lambda a, b: pair(a, b, "f16"),
    "v_cvt_pk_fp8_f32": codes,
    "v_cvt_pk_f32_fp8": lambda a: bits_of(values_of(a), "f32"),
    "v_cvt_f32_fp8": lambda a: values_of(a)[0],
    "v_cvt_scalef32_pk_fp8_f32": lambda a, b, scale: codes(a, b, "e4m3"),
    "v_cvt_scalef32_pk_fp8_bf16": lambda a, scale: codes(*halves_of(a), "e4m3"),
    "v_cvt_scalef32_pk_f32_fp8": lambda a, scale: bits_of(values_of(a, "e4m3"), "f32"),
    "v_cvt_scalef32_pk_bf16_fp8": lambda a, scale: bits_of(values_of(a, "e4m3"), "bf16"),
    "v_pk_add_u16": lambda a, b: (a + b & 0xFFFF) | ((a >> 16) + (b >> 16) << 16 & WORD),
    "v_pk_max_u16": lambda a, b: max(a & 0xFFFF, b & 0xFFFF) | max(a >> 16, b >> 16) << 16,
    "v_pack_b32_f16": lambda a, b: a & 0xFFFF | (b & 0xFFFF) << 16,
}
APPROXIMATE = {"v_exp_f32", "v_log_f32", "v_sqrt_f32"}
"""Instructions whose results may be a few units in the last place from the number."""
DIVISION = {"v_div_fixup_f32", "v_div_fmas_f32"}
"""Steps of a division, which `test_division` runs together."""


def words(generator, kind):
    """Return 64 bits for each thread: random ones, small ones, and numbers near 1 and special where they are floats."""
    bits = generator.integers(0, 1 << 64, NUM_THREADS, dtype=np.uint64)
    bits[:30] = generator.integers(0, 40, 30)
    if kind == "f8":
        bits[:60] = generator.normal(0, 2, 60).view(np.uint64)
        bits[60:69] = SPECIAL["f64"]
    elif kind in ("f4", "h"):
        bits[:60] = generator.normal(0, 2, 60).astype(np.float32).view(np.uint32)
        bits[60:71] = SPECIAL["f32"]
    else:
        bits[30:34] = [0, WORD, 1 << 31, (1 << 31) - 1]
    return [int(one) for one in bits[generator.permutation(NUM_THREADS)]]


def run_vector(lines, sources, rows, target="gfx942"):
    """Run lines whose sources are in v[10:11], v[12:13], ...; give `rows` words of each thread from v20 on."""
    source = np.zeros((8, NUM_THREADS), np.uint32)
    code = ["s_mov_b64 vcc, 0"]
    for index, values in enumerate(sources):
        source[2 * index] = [value & WORD for value in values]
        source[2 * index + 1] = [value >> 32 & WORD for value in values]
        for half in range(2):
            row = 2 * index + half
            code.append(f"global_load_dword v{10 + row}, v1, s[4:5] offset:{4 * NUM_THREADS * row}")
    output = np.zeros((2, NUM_THREADS), np.uint32)
    stores = [f"global_store_dword v1, v{20 + row}, s[6:7] offset:{4 * NUM_THREADS * row}" for row in range(rows)]
    run_amd([*code, "s_waitcnt vmcnt(0)", *lines, *stores], source, output, target)
    return [int(low) | int(high) << 32 for low, high in zip(*output, strict=True)]


def register(index, kind):
    return f"v[{10 + 2 * index}:{11 + 2 * index}]" if kind[1:] == "8" else f"v{10 + 2 * index}"


def agree(found, wanted, kind, shown):
    got = decode(found, kind)
    if kind in exact.FORMATS:
        bits = encode(wanted, kind)
        assert math.isnan(got) if bits is None else found & ((1 << exact.width_of(kind)) - 1) == bits, shown
    else:
        assert got == decode(int(wanted) & ((1 << 64) - 1), kind), shown


def test_every_instruction_has_a_reference():
    assert set(VECTOR) == set(REFERENCE) | DIVISION
    assert set(SCALAR) == set(SCALARS)


@pytest.mark.parametrize("name", sorted(REFERENCE))
def test_vector_instruction(name):
    kind, kinds, _ = VECTOR[name]
    generator = np.random.default_rng(len(name))
    sources = [words(generator, one) for one in kinds]
    if name == "v_perm_b32":
        sources[2] = [sum((index * 7 + byte * 3) % 8 << 8 * byte for byte in range(4)) for index in range(NUM_THREADS)]
        sources[2][:3] = [0x0C00FF07, 0x0D0C0102, 0x0C0C0C0C]
    if name == "v_cvt_f32_f16":
        sources[0] = [int(bits) for bits in generator.integers(0, 1 << 16, NUM_THREADS)]
    operands = [register(index, one) for index, one in enumerate(kinds)]
    is_pair = kind[1] == "8"
    result = "v[20:21]" if is_pair else "v20"
    lines = [f"{name} {result}, {', '.join(operands)}{' bitop3:0x6a' * ('bitop3' in name)}"]
    if name == "v_fmac_f32":
        lines = ["v_mov_b32 v20, v14", f"{name} v20, v10, v12"]
    if "_fp8" in name:
        lines = [SATURATES, *(["v_mov_b32 v20, 0"] * (not is_pair)), *lines]
    if "scalef32" in name:
        sources[-1] = [encode(1.0, "f32")] * NUM_THREADS
    found = run_vector(lines, sources, 1 + is_pair, "gfx950" if "scalef32" in name else "gfx942")
    for thread in range(NUM_THREADS):
        values = [decode(row[thread], KINDS[one]) for row, one in zip(sources, kinds, strict=True)]
        wanted = REFERENCE[name](*values)
        shown = f"{name} of {values} in thread {thread}: {found[thread]:#x} is not {wanted}"
        if name in APPROXIMATE:
            got = decode(found[thread], "f32")
            tiny = abs(wanted) < 2.0**-120
            assert (
                math.isclose(got, wanted, rel_tol=2**-21, abs_tol=2.0**-140 * tiny)
                or (math.isnan(got) and math.isnan(wanted))
                or (got > 3.4e38 and wanted > 3.4e38)
            ), shown
        elif "_fp8" in name:
            if name == "v_cvt_f32_fp8":
                agree(found[thread], wanted, "f32", shown)
            else:
                assert found[thread] == wanted, shown
        elif name.startswith("v_cvt_pk") or name == "v_cvt_f16_f32":
            nans = [index for index, value in enumerate(values) if math.isnan(value)]
            mask = sum(0xFFFF << 16 * index for index in range(2) if index not in nans)
            assert found[thread] & mask == wanted & mask, shown
        else:
            agree(found[thread], wanted, KINDS[kind], shown)


@pytest.mark.parametrize(("target", "kind"), [("gfx942", "e4m3fnuz"), ("gfx950", "e4m3")])
def test_every_number_near_the_middle_of_two_codes(target, kind):
    """Numbers of 8 bits, the middles between them, their neighbours, and larger ones, in both halves of words."""
    numbers = [exact.of_8_bits(bits, kind) for bits in range(0x7F)] + [240.0, 248.0, 256.0, 480.0, 1e5, 3e38, math.inf]
    numbers += [(one + two) / 2 for one, two in itertools.pairwise(numbers)]
    with np.errstate(all="ignore"):
        numbers += [float(np.nextafter(np.float32(one), np.float32(to))) for one in numbers for to in (0, math.inf)]
    numbers = [sign * number for number in numbers for sign in (1, -1)]
    numbers += [math.nan] * (-len(numbers) % NUM_THREADS)
    word = encode(1.0, "f32")
    convert = {"gfx942": "v_cvt_pk_fp8_f32 v20, v10, v12", "gfx950": "v_cvt_scalef32_pk_fp8_f32 v20, v10, v12, v14"}
    upper = convert[target].replace("v10, v12", "v12, v10") + {"gfx942": " op_sel:[0,0,1]"}.get(
        target, " op_sel:[0,0,0,1]"
    )
    back = {"gfx942": "v_cvt_pk_f32_fp8_sdwa v[22:23], v20 src0_sel:WORD_1"}.get(
        target, "v_cvt_scalef32_pk_f32_fp8 v[22:23], v20, v14 op_sel:[1,0,0]"
    )
    for first in range(0, len(numbers), NUM_THREADS):
        some = numbers[first : first + NUM_THREADS]
        bits = [0x7FC00000 if one is None else one for one in (encode(number, "f32") for number in some)]
        sources = [bits, bits[::-1], [word] * NUM_THREADS]
        lines = [SATURATES, convert[target], upper, back, "v_mov_b32 v21, v23"]
        found = run_vector(lines, sources, 2, target)
        for one, two, result in zip(some, some[::-1], found, strict=True):
            assert result & WORD == codes(one, two, kind) | codes(two, one, kind) << 16
            wanted = encode(exact.saturated(one, kind), "f32")
            assert result >> 32 == (0x7FC00000 if wanted is None else wanted if wanted & (WORD >> 1) else result >> 32)
    with pytest.raises(NotImplementedError, match="doesn't saturate"):
        run_vector(convert[target].splitlines(), sources, 1, target)


@pytest.mark.parametrize("kind", ["i2", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8"])
def test_comparisons(kind):
    """Of integers, and of floats, NaN among them."""
    floats = kind[0] == "f"
    generator = np.random.default_rng(3)
    sources = [words(generator, kind) for _ in range(2)]
    if kind == "f2":
        sources = [[int(value) for value in generator.integers(0, 1 << 16, NUM_THREADS)] for _ in range(2)]
        sources[0][0] = sources[1][1] = 0x7E00
    sources[1][5:20] = sources[0][5:20]
    names = set(COMPARISONS) - {"ne"} if floats else {"eq", "ne", "lt", "le", "gt", "ge"}
    for name in sorted(names):
        text = f"v_cmp_{name}_{kind[0]}{8 * int(kind[1])} s[8:9], {register(0, kind)}, {register(1, kind)}"
        found = run_vector(
            [text, "v_mov_b32 v14, 0", "v_mov_b32 v15, 1", "v_cndmask_b32 v20, v14, v15, s[8:9]"], sources, 1
        )
        for thread in range(NUM_THREADS):
            left, right = (decode(row[thread], KINDS[kind]) for row in sources)
            assert bool(found[thread]) == compared(name, left, right), f"{text} of {left} and {right}"


def compared(name, left, right):
    unordered = left != left or right != right
    if name in ("o", "u"):
        return unordered == (name == "u")
    negated = name.startswith("n") and name != "ne"
    name = name[1:] if negated else name
    holds = {
        "eq": left == right,
        "ne": left != right,
        "lg": left < right or left > right,
        "lt": left < right,
        "le": left <= right,
        "gt": left > right,
        "ge": left >= right,
    }[name]
    return holds != negated


def test_division():
    """The steps into which compilers cut a division give the quotient, rounded once."""
    generator = np.random.default_rng(5)
    sources = [words(generator, "f4") for _ in range(2)]
    lines = """
        v_div_scale_f32 v22, s[8:9], v12, v12, v10
        v_div_scale_f32 v23, vcc, v10, v12, v10
        v_rcp_f32 v24, v22
        v_mov_b32 v30, 1.0
        v_fma_f32 v25, -v22, v24, v30
        v_fma_f32 v24, v25, v24, v24
        v_mul_f32 v26, v23, v24
        v_fma_f32 v27, -v22, v26, v23
        v_fma_f32 v26, v27, v24, v26
        v_fma_f32 v22, -v22, v26, v23
        v_div_fmas_f32 v22, v22, v24, v26
        v_div_fixup_f32 v20, v22, v12, v10
    """.strip().splitlines()
    found = run_vector([line.strip() for line in lines], sources, 1)
    for thread in range(NUM_THREADS):
        numerator, denominator = (decode(row[thread], "f32") for row in sources)
        wanted = exact.divided(numerator, denominator, "f32")
        agree(
            found[thread], wanted, "f32", f"{numerator} / {denominator}: {decode(found[thread], 'f32')}, not {wanted}"
        )


def full(value):
    return value & ((1 << 64) - 1)


def carry(value):
    return value >> 32 != 0


def outside(value):
    return not -(1 << 31) <= value < 1 << 31


def nonzero(value):
    return full(value) != 0


def scalar(function, condition=None):
    """Return the reference of an instruction: its value, and SCC after it (None: as before)."""
    return lambda scc, *values: (function(*values), None if condition is None else bool(condition(*values)))


def logical(function):
    return lambda scc, *values: (function(*values), nonzero(function(*values)))


def word(function):
    return lambda scc, *values: (function(*values), function(*values) & WORD != 0)


SCALARS = {
    "s_mov_b32": scalar(lambda a: a),
    "s_movk_i32": scalar(lambda a: signed(a & 0xFFFF, 16)),
    "s_mov_b64": scalar(lambda a: a),
    "s_add_i32": scalar(lambda a, b: a + b, lambda a, b: outside(a + b)),
    "s_addk_i32": scalar(lambda a, b: a + b, lambda a, b: outside(a + b)),
    "s_sub_i32": scalar(lambda a, b: a - b, lambda a, b: outside(a - b)),
    "s_add_u32": scalar(lambda a, b: a + b, lambda a, b: carry(a + b)),
    "s_sub_u32": scalar(lambda a, b: a - b, lambda a, b: a < b),
    "s_subb_u32": lambda scc, a, b: (a - b - scc, a < b + scc),
    "s_addc_u32": lambda scc, a, b: (a + b + scc, carry(a + b + scc)),
    "s_mul_i32": scalar(lambda a, b: a * b),
    "s_mulk_i32": scalar(lambda a, b: a * b),
    "s_mul_hi_u32": scalar(lambda a, b: a * b >> 32),
    "s_mul_hi_i32": scalar(lambda a, b: a * b >> 32),
    "s_abs_i32": scalar(abs, lambda a: a != 0),
    "s_min_i32": scalar(min, lambda a, b: a < b),
    "s_max_i32": scalar(max, lambda a, b: a > b),
    "s_and_b32": word(lambda a, b: a & b),
    "s_or_b32": word(lambda a, b: a | b),
    "s_xor_b32": word(lambda a, b: a ^ b),
    "s_lshl_b32": word(lambda a, b: a << (b & 31)),
    "s_lshr_b32": word(lambda a, b: a >> (b & 31)),
    "s_ashr_i32": word(lambda a, b: a >> (b & 31)),
    "s_bfe_u32": word(lambda a, b: field(a, b, b >> 16)),
    "s_bfe_i32": word(lambda a, b: signed_field(a & WORD, b, b >> 16)),
    "s_brev_b32": scalar(lambda a: int(f"{a:032b}"[::-1], 2)),
    "s_sext_i32_i16": scalar(lambda a: (a & 0xFFFF ^ 0x8000) - 0x8000),
    **{
        f"s_lshl{n}_add_u32": scalar(lambda a, b, n=n: (a << n) + b, lambda a, b, n=n: carry((a << n) + b))
        for n in (1, 2, 3, 4)
    },
    "s_cselect_b32": lambda scc, a, b: (a if scc else b, None),
    "s_cselect_b64": lambda scc, a, b: (a if scc else b, None),
    "s_bitcmp0_b32": lambda scc, a, b: (None, a >> (b & 31) & 1 == 0),
    "s_bitcmp1_b32": lambda scc, a, b: (None, a >> (b & 31) & 1 == 1),
    "s_and_b64": logical(lambda a, b: a & b),
    "s_or_b64": logical(lambda a, b: a | b),
    "s_xor_b64": logical(lambda a, b: a ^ b),
    "s_andn2_b64": logical(lambda a, b: a & ~b),
    "s_orn2_b64": logical(lambda a, b: a | ~b),
    "s_not_b64": logical(lambda a: ~a),
    "s_lshl_b64": logical(lambda a, b: a << (b & 63)),
    "s_and_saveexec_b64": logical(lambda a, b: a & b),
    "s_or_saveexec_b64": logical(lambda a, b: a | b),
    "s_andn2_saveexec_b64": logical(lambda a, b: a & ~b),
}


@pytest.mark.parametrize("name", sorted(SCALARS))
def test_scalar_instruction(name):
    kind, kinds, _, _ = SCALAR[name]
    generator = np.random.default_rng(7)
    for trial in range(12):
        scc = trial % 2
        values = [int(one) for one in generator.integers(0, 1 << 63, 2, dtype=np.uint64)]
        values = [value & WORD if one != "u8" else value for value, one in zip(values, kinds, strict=False)]
        if trial in (2, 3):
            values[-1] = trial * 7
        if trial in (4, 5):
            values = [WORD if trial == 4 else 1 << 31] * len(values)
        found, condition = run_scalar(name, kind, kinds, values, scc)
        if name.endswith("saveexec_b64"):
            values = [values[0], full(-1)]
        if name in ("s_movk_i32", "s_addk_i32", "s_mulk_i32"):
            values[-1] = signed(values[-1] & 0xFFFF, 16)
        values = [decode(value & ((1 << 64) - 1), KINDS[one]) for value, one in zip(values, kinds, strict=True)]
        wanted, wanted_condition = SCALARS[name](scc, *values)
        shown = f"{name} of {values}: {found:#x}, {condition} is not {wanted}, {wanted_condition}"
        assert condition == (scc if wanted_condition is None else wanted_condition), shown
        if kind:
            mask = full(-1) if kind == "u8" else WORD
            assert found == wanted & mask, shown


def run_scalar(name, kind, kinds, values, scc):
    """Return an instruction's result (of ...saveexec: what exec became), and SCC after it."""
    code = []
    for index, value in enumerate(values):
        code += [f"s_mov_b32 s{10 + 2 * index}, {value & WORD:#x}", f"s_mov_b32 s{11 + 2 * index}, {value >> 32:#x}"]
    operands = [
        f"s[{10 + 2 * index}:{11 + 2 * index}]" if one == "u8" else f"s{10 + 2 * index}"
        for index, one in enumerate(kinds)
    ]
    code += ["s_mov_b32 s20, 0", "s_mov_b32 s21, 0", f"s_cmp_eq_u32 s20, {1 - scc}"]
    result = ["s[20:21]" if kind == "u8" else "s20"] if kind else []
    if name.endswith("saveexec_b64"):
        operands = operands[:1]
    if name in ("s_addk_i32", "s_mulk_i32"):
        code.insert(-1, "s_mov_b32 s20, s10")
        code[-1] = f"s_cmp_eq_u32 s21, {1 - scc}"
        operands = [f"{values[1] & 0xFFFF:#x}"]
    if name == "s_movk_i32":
        operands = [f"{values[0] & 0xFFFF:#x}"]
    code.append(f"{name} {', '.join([*result, *operands])}")
    code += ["s_cselect_b32 s22, 1, 0"]
    if name.endswith("saveexec_b64"):
        code += ["s_mov_b64 s[20:21], exec", "s_mov_b64 exec, -1"]
    for row, number in enumerate((20, 21, 22)):
        code += [f"v_mov_b32 v2, s{number}", f"global_store_dword v1, v2, s[6:7] offset:{4 * NUM_THREADS * row}"]
    output = np.zeros((3, NUM_THREADS), np.uint32)
    run_amd(code, np.zeros(NUM_THREADS, np.uint32), output)
    low, high, condition = (int(row[0]) for row in output)
    return low | high << 32 * (kind == "u8") if kind == "u8" else low, condition


@pytest.mark.parametrize(
    "instruction",
    [
        "v_add_f32 v2, v1, v1 mul:2",
        "v_add_u32 v2, v1, v1 clamp",
        "v_fma_f32 v2, v1, v1, v1 div:2",
        "v_mov_b32_sdwa v2, v1 dst_sel:WORD_1 dst_unused:UNUSED_PRESERVE src0_sel:DWORD",
        "v_cvt_f32_u32_sdwa v2, v1 dst_sel:WORD_1 dst_unused:UNUSED_SEXT src0_sel:DWORD",
        "v_readfirstlane_b32_sdwa s8, v1 dst_sel:WORD_1 dst_unused:UNUSED_PAD",
        "v_pk_add_f16 v2, v1, v1",
        "v_pk_add_u16 v2, v1, v1 op_sel_hi:[1,0]",
        "v_pk_add_f32 v[2:3], v[4:5], v[4:5] clamp",
        "v_pk_mov_b32 v[2:3], v[4:5], v[4:5] neg_lo:[1,0]",
        "v_mfma_f32_32x32x8_bf16 v[2:17], v[2:3], v[2:3], 0 cbsz:1",
        "ds_read_i8_d16 v2, v1",
        "ds_read_u16_d16_hi v2, v1",
        "ds_add_f32 v1, v2",
        "ds_read_b32 v2, v1 gds",
        "global_load_dword v2, v1, s[4:5] sc0 sc1",
        "global_load_short_d16 v2, v1, s[4:5]",
        "global_load_sbyte v2, v1, s[4:5]",
        "buffer_load_dword v2, v1, s[8:11], 0 idxen",
        "s_load_dword s8, s[4:5], 0x0 glc",
        "s_waitcnt_depctr 0",
        "v_addc_co_u32_dpp v2, vcc, v1, v1, vcc quad_perm:[0,1,2,3] row_mask:0xf bank_mask:0xf",
    ],
)
def test_what_is_unknown_is_refused(instruction):
    name = instruction.split()[0].removesuffix("_dpp").removesuffix("_sdwa")
    with pytest.raises(NotImplementedError, match=rf"line \d+: the machine doesn't know {name}"):
        run_amd([instruction], np.zeros(NUM_THREADS, np.uint32), np.zeros(NUM_THREADS, np.uint32))
