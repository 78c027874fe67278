"""Matrix products of AMD's wavefronts, and lanes that see each other's registers, against NumPy."""

import numpy as np
import pytest
from amd_programs import NUM_THREADS, run_amd

pytestmark = pytest.mark.thorough

LANES = np.arange(64)


def run_lines(lines, source, rows):
    """Run lines on words (rows, threads) that are in v10, v11, ...; give `rows` words of each thread from v20 on."""
    loads = [f"global_load_dword v{10 + row}, v1, s[4:5] offset:{4 * NUM_THREADS * row}" for row in range(len(source))]
    output = np.zeros((rows, NUM_THREADS), np.uint32)
    stores = []
    for row in range(rows):
        if row and row % 4 == 0:
            stores.append(f"v_add_u32 v1, {16 * NUM_THREADS}, v1")
        stores.append(f"global_store_dword v1, v{20 + row}, s[6:7] offset:{4 * NUM_THREADS * (row % 4)}")
    run_amd([*loads, "s_waitcnt vmcnt(0)", *lines, *stores], source, output)
    return output


@pytest.mark.parametrize(
    ("size", "depth", "kind"),
    [
        (32, 8, "bf16"),
        (32, 8, "f16"),
        (16, 16, "bf16"),
        (16, 16, "f16"),
        (32, 16, "bf16"),
        (32, 16, "f16"),
        (16, 32, "bf16"),
        (32, 2, "f32"),
        (16, 4, "f32"),
    ],
)
@pytest.mark.parametrize("adds", [False, True])
def test_matrix_products(size, depth, kind, adds):
    """A lane holds neighbours along K of one row; of a result, four rows of one column, then the next four."""
    generator = np.random.default_rng(depth)
    a, b = (generator.integers(-8, 9, (2, size, depth)).astype(np.float32) for _ in range(2))
    groups, elements = 64 // size, size * depth // 64
    operands = []
    for matrix in (a, b):
        lanes = matrix[:, LANES % size][:, LANES[:, None], (LANES // size)[:, None] * elements + np.arange(elements)]
        bits = {"f32": lanes, "f16": lanes.astype(np.float16), "bf16": lanes.view(np.uint32) >> 16}[kind]
        bits = bits.astype(np.uint16) if kind == "bf16" else bits
        operands.append(np.ascontiguousarray(bits).view(np.uint32).reshape(NUM_THREADS, -1).T)
    count, results = len(operands[0]), size * size // 64
    first, last = (f"v[{start}:{start + count - 1}]" if count > 1 else f"v{start}" for start in (10, 10 + count))
    result = f"v[20:{19 + results}]"
    lines = [f"v_mov_b32 v{20 + index}, 3.0" for index in range(results)]
    lines.append(f"v_mfma_f32_{size}x{size}x{depth}_{kind} {result}, {first}, {last}, {result if adds else '0'}")
    source = np.ascontiguousarray(np.concatenate(operands))
    found = run_lines(lines, source, results).view(np.float32).reshape(results, 2, 64)
    wanted = a @ b.transpose(0, 2, 1) + 3 * adds
    for index in range(results):
        rows = index // 4 * 4 * groups + LANES // size * 4 + index % 4
        assert (found[index] == wanted[:, rows, LANES % size]).all()


def random_rows(rows):
    return np.random.default_rng(rows).integers(0, 1 << 32, (rows, NUM_THREADS), dtype=np.uint32)


ROW, PLACE = LANES // 16, LANES % 16
SOURCES = {
    "quad_perm:[1,0,3,2]": LANES ^ 1,
    "row_shr:3": np.where(PLACE >= 3, LANES - 3, -1),
    "row_shl:2": np.where(PLACE < 14, LANES + 2, -1),
    "row_ror:4": ROW * 16 + (PLACE - 4) % 16,
    "row_half_mirror": LANES ^ 7,
    "row_bcast:15": np.where(ROW > 0, ROW * 16 - 1, -1),
    "row_bcast:31": np.where(LANES >= 32, 31, -1),
}


@pytest.mark.parametrize("bound", [False, True])
@pytest.mark.parametrize("mask", [0xF, 0xA])
@pytest.mark.parametrize("control", SOURCES)
def test_lanes_of_dpp(control, mask, bound):
    """Lanes with none to read keep their value, or with bound_ctrl read 0; so do the rows outside the mask."""
    source = random_rows(3)
    line = f"v_add_u32_dpp v20, v10, v11 {control} row_mask:{mask:#x} bank_mask:0xf{' bound_ctrl:1' * bound}"
    found = run_lines(["v_mov_b32 v20, v12", line], source, 1)[0].reshape(2, 64)
    values, addend, before = source.reshape(3, 2, 64)
    lanes = SOURCES[control]
    read = np.where(lanes >= 0, values[:, lanes], 0)
    written = (mask >> ROW & 1 == 1) & ((lanes >= 0) | bound)
    assert (found == np.where(written, read + addend, before)).all()


def test_lanes_by_number():
    source = random_rows(2)
    values, others = source.reshape(2, 2, 64)
    assert (
        run_lines(["v_readlane_b32 s8, v10, 5", "v_mov_b32 v20, s8"], source, 1)[0].reshape(2, 64) == values[:, 5:6]
    ).all()
    lines = ["v_readfirstlane_b32 s8, v10", "v_mov_b32 v20, v11", "v_writelane_b32 v20, s8, 9"]
    found = run_lines(lines, source, 1)[0].reshape(2, 64)
    assert (found == np.where(LANES == 9, values[:, :1], others)).all()


@pytest.mark.parametrize("width", [16, 32])
def test_lanes_that_are_swapped(width):
    """The odd groups of lanes of one register change places with the even groups of the other."""
    source = random_rows(2)
    lines = ["v_mov_b32 v20, v10", "v_mov_b32 v21, v11", f"v_permlane{width}_swap_b32 v20, v21"]
    first, second = run_lines(lines, source, 2).reshape(2, 2, 64)
    one, two = source.reshape(2, 2, 64)
    odd = LANES // width % 2 == 1
    assert (first == np.where(odd, two[:, LANES - width * odd], one)).all()
    assert (second == np.where(odd, two, one[:, np.minimum(LANES + width, 63)])).all()


def test_lanes_through_shared_memorys_wires():
    source = random_rows(1)
    lines = ["v_xor_b32 v2, 0x24, v1", "ds_bpermute_b32 v20, v2, v10", "s_waitcnt lgkmcnt(0)"]
    values = source.reshape(2, 64)
    assert (run_lines(lines, source, 1)[0].reshape(2, 64) == values[:, LANES ^ 9]).all()
    lines = ["ds_swizzle_b32 v20, v10 offset:swizzle(SWAP,4)", "s_waitcnt lgkmcnt(0)"]
    assert (run_lines(lines, source, 1)[0].reshape(2, 64) == values[:, LANES ^ 4]).all()


def test_parts_of_registers():
    """SDWA takes a byte or a half; op_sel of packed instructions takes either word of a pair, and neg its negative."""
    source = random_rows(2)
    for part, (shift, bits) in {"BYTE_1": (8, 8), "BYTE_3": (24, 8), "WORD_1": (16, 16), "WORD_0": (0, 16)}.items():
        line = f"v_and_b32_sdwa v20, v10, v11 dst_sel:DWORD dst_unused:UNUSED_PAD src0_sel:{part} src1_sel:DWORD"
        taken = source[0] >> shift & (1 << bits) - 1
        assert (run_lines([line], source, 1)[0] == taken & source[1]).all()
        signed = taken.astype(f"u{bits // 8}").view(f"i{bits // 8}").astype("i4").view("u4")
        assert (run_lines([line.replace("v10", "sext(v10)")], source, 1)[0] == signed & source[1]).all()
        line = f"v_add_u32_sdwa v20, v10, v11 dst_sel:{part} dst_unused:UNUSED_PAD src0_sel:DWORD src1_sel:DWORD"
        sums = (source[0] + source[1] & (1 << bits) - 1) << shift
        assert (run_lines([line], source, 1)[0] == sums).all()
    numbers = np.random.default_rng(1).integers(-9, 9, (4, NUM_THREADS)).astype(np.float32)
    line = "v_pk_fma_f32 v[20:21], v[10:11], v[12:13], v[12:13] op_sel:[1,0,1] op_sel_hi:[0,1,1]"
    line += " neg_lo:[1,0,0] neg_hi:[0,0,1]"
    found = run_lines([line], numbers.view(np.uint32), 2).view(np.float32)
    assert (found[0] == -numbers[1] * numbers[2] + numbers[3]).all()
    assert (found[1] == numbers[0] * numbers[3] - numbers[3]).all()
    for name, operation in {"add": np.add, "mul": np.multiply}.items():
        found = run_lines([f"v_pk_{name}_f32 v[20:21], v[10:11], v[12:13]"], numbers.view(np.uint32), 2)
        assert (found.view(np.float32) == operation(numbers[:2], numbers[2:])).all()


@pytest.mark.parametrize("chosen", [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_words_that_move_keep_their_bits(chosen):
    """Also those that are no numbers."""
    source = random_rows(4)
    source[0, :4] = 0x7F800001, 0xFFC12345, 0x80000000, 1
    line = f"v_pk_mov_b32 v[20:21], v[10:11], v[12:13] op_sel:[{chosen[0]},{chosen[1]}]"
    assert (run_lines([line], source, 2) == source[[chosen[0], 2 + chosen[1]]]).all()
    found = run_lines(["v_pk_mov_b32 v[20:21], 1.0, v[12:13]"], source, 2)
    assert (found[0] == 0x3F800000).all()
    assert (found[1] == source[2]).all()


def test_sums_of_64_bits():
    source = random_rows(4)
    a, b, low, high = source.astype(np.uint64)
    found = run_lines(["v_mad_u64_u32 v[20:21], s[8:9], v10, v11, v[12:13]"], source, 2).astype(np.uint64)
    assert (found[0] | found[1] << np.uint64(32) == a * b + (low | high << np.uint64(32))).all()
    lines = ["v_add_co_u32 v20, s[10:11], v10, v11", "v_addc_co_u32 v21, s[12:13], v12, v13, s[10:11]"]
    found = run_lines(lines, source, 2)
    total = a + b + (low + high << np.uint64(32))
    assert (found[0] | found[1].astype(np.uint64) << np.uint64(32) == total).all()
    lines = [
        "v_cmp_lt_u32 vcc, v12, v13",
        "v_addc_co_u32 v20, vcc, v10, v11, vcc",
        "v_mov_b32 v14, 0",
        "v_mov_b32 v15, 1",
    ]
    lines.append("v_cndmask_b32 v21, v14, v15, vcc")
    total = a + b + (low < high)
    found = run_lines(lines, source, 2)
    assert (found[0] == (total & np.uint64(0xFFFFFFFF))).all()
    assert (found[1] == total >> np.uint64(32)).all()


@pytest.mark.parametrize("size", [1, 2, 4, 8, 12, 16])
def test_loads_and_stores_of_every_width(size):
    """Global memory to registers, through shared memory where there is such an access, and back."""
    name = {1: "u8", 2: "u16"}.get(size, f"b{8 * size}")
    load = {1: "ubyte", 2: "ushort", 4: "dword"}.get(size, f"dwordx{size // 4}")
    store = {1: "byte", 2: "short"}.get(size, load)
    registers = "v10" if size <= 4 else f"v[10:{9 + size // 4}]"
    source = np.random.default_rng(2).integers(0, 256, (NUM_THREADS, size), dtype=np.uint8)
    output = np.zeros((NUM_THREADS, size), np.uint8)
    lines = [f"v_mul_lo_u32 v2, {size}, v0", f"global_load_{load} {registers}, v2, s[4:5]", "s_waitcnt vmcnt(0)"]
    if size * NUM_THREADS <= 1024:
        lines += [f"ds_write_{name.replace('u', 'b')} v2, {registers}", "s_waitcnt lgkmcnt(0)", "s_barrier"]
        lines += [f"v_xor_b32 v3, {127}, v0", f"v_mul_lo_u32 v3, {size}, v3", f"ds_read_{name} {registers}, v3"]
        lines += ["s_waitcnt lgkmcnt(0)"]
    lines.append(f"global_store_{store} v2, {registers}, s[6:7]")
    run_amd(lines, source, output)
    assert (output == (source[::-1] if size * NUM_THREADS <= 1024 else source)).all()


@pytest.mark.parametrize("size", [1, 2])
def test_shared_bytes_with_a_sign(size):
    source = random_rows(1)
    lines = [f"v_mul_lo_u32 v2, {size}, v0", f"ds_write_b{8 * size} v2, v10", "s_waitcnt lgkmcnt(0)", "s_barrier"]
    lines += [f"ds_read_i{8 * size} v20, v2", "s_waitcnt lgkmcnt(0)"]
    expected = source[0].view(f"i{size}")[:: 4 // size].astype("i4").view("u4")
    assert (run_lines(lines, source, 1)[0] == expected).all()


def test_pairs_of_shared_words():
    source = random_rows(2)
    lines = ["v_lshlrev_b32 v2, 2, v0", "ds_write2st64_b32 v2, v10, v11 offset1:2", "s_waitcnt lgkmcnt(0)", "s_barrier"]
    lines += ["v_xor_b32 v3, 0x1fc, v2", "ds_read2st64_b32 v[20:21], v3 offset1:2", "s_waitcnt lgkmcnt(0)"]
    assert (run_lines(lines, source, 2) == source[:, ::-1]).all()
    lines = ["v_lshlrev_b32 v2, 3, v0", "ds_write2_b32 v2, v10, v11 offset1:1", "s_waitcnt lgkmcnt(0)", "s_barrier"]
    lines += ["v_xor_b32 v3, 0x3f8, v2", "ds_read2_b32 v[20:21], v3 offset1:1", "s_waitcnt lgkmcnt(0)"]
    assert (run_lines(lines, source, 2) == source[:, ::-1]).all()
