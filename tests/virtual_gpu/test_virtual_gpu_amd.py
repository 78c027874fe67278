"""The machine that executes AMDGCN, on hand-written programs: layouts, waits, barriers, bounds and branches."""

import numpy as np
import pytest
from amd_programs import NUM_THREADS, run_amd

from virtual_gpu.amd import fragments
from virtual_gpu.faults import Deadlock, MemoryFault

# v1 is four times the thread, s[4:5] the input, s[6:7] the output.
LOAD = "global_load_dword v2, v1, s[4:5]"
STORE = "global_store_dword v1, v2, s[6:7]"


def run(*code):
    """Run two wavefronts on the inputs 1000, 1001, ...; give their outputs."""
    source, output = np.arange(1000, 1000 + NUM_THREADS, dtype=np.uint32), np.zeros(NUM_THREADS, np.uint32)
    run_amd(code, source, output)
    return output


@pytest.mark.parametrize(("size", "depth", "element"), [(32, 8, "u2"), (32, 16, "u2"), (16, 16, "u2"), (16, 4, "u4")])
def test_matrix_layouts(size, depth, element):
    """A lane holds neighbours along K of one row; of a result, four rows of one column at a time."""
    matrix = np.arange(2 * size * depth, dtype=element).reshape(2, size, depth)
    num_elements = size * depth // 64
    lanes = np.empty((2, 64, num_elements), element)
    for lane in range(64):
        first = lane // size * num_elements
        lanes[:, lane] = matrix[:, lane % size, first : first + num_elements]
    words = np.ascontiguousarray(lanes.view(np.uint32).transpose(2, 0, 1))
    assert (fragments.operand_matrix(words, element, size) == matrix).all()

    result = np.arange(2 * size * size, dtype=np.float32).reshape(2, size, size)
    registers = fragments.accumulator_registers(result)
    for register in range(size * size // 64):
        for lane in range(64):
            row = register // 4 * 4 * (64 // size) + lane // size * 4 + register % 4
            assert (registers[register, :, lane] == result[:, row, lane % size]).all()


def test_transposed_read():
    """Sixteen lanes read four rows of 16 elements, four lanes a row; each gets a column."""
    rows = np.arange(64 * 4, dtype=np.uint16).reshape(1, 64, 4)
    columns = fragments.transposed(rows)
    for lane in range(64):
        first = lane // 16 * 64 + lane % 16
        assert columns[0, lane].tolist() == [first, first + 16, first + 32, first + 48]


@pytest.mark.parametrize(
    ("control", "expected"),
    [
        ("quad_perm:[1,0,3,2]", {0: 1, 1: 0, 62: 63}),
        ("row_shr:4", {3: None, 4: 0, 31: 27, 16: None}),
        ("row_ror:8", {0: 8, 8: 0, 40: 32}),
        ("row_half_mirror", {0: 7, 9: 14}),
        ("row_bcast:15", {15: None, 16: 15, 40: 31}),
        ("row_bcast:31", {31: None, 32: 31, 63: 31}),
    ],
)
def test_lanes_that_dpp_reads(control, expected):
    sources, exist = fragments.dpp_sources(control)
    assert {lane: int(sources[lane]) if exist[lane] else None for lane in expected} == expected


def test_what_a_load_brings_is_there_after_the_wait_for_it():
    expected = np.arange(1000, 1000 + NUM_THREADS)
    assert (run(LOAD, "s_waitcnt vmcnt(0)", STORE) == expected).all()
    assert (run("v_mov_b32_e32 v2, 0", LOAD, STORE) == 0xFFFFFFFF).all()
    second = "global_load_dword v3, v1, s[4:5]"
    assert (run(LOAD, second, "s_waitcnt vmcnt(1)", STORE) == expected).all()
    assert (run(second, LOAD, "s_waitcnt vmcnt(1)", STORE) == 0xFFFFFFFF).all()


SHARED = [
    "ds_write_b32 v1, v0",
    "s_waitcnt lgkmcnt(0)",
    "s_barrier",
    "v_xor_b32_e32 v3, 0x100, v1",  # the other wavefront's
    "ds_read_b32 v2, v3",
    "s_waitcnt lgkmcnt(0)",
    STORE,
]


def test_shared_memory_between_wavefronts():
    assert (run(*SHARED) == np.arange(NUM_THREADS) ^ 64).all()


@pytest.mark.parametrize("missing", [1, 2])
def test_shared_memory_without_a_wait_or_a_barrier(missing):
    with pytest.raises(MemoryFault, match="line 11 of its assembly: a warp reads shared memory that another wrote"):
        run(*SHARED[:missing], "s_nop 0", *SHARED[missing + 1 :])


def test_a_barrier_waits_for_a_wavefront_on_another_path():
    condition = ["v_readfirstlane_b32 s8, v0", "s_cmp_lg_u32 s8, 0"]
    paths = ["s_cbranch_scc1 .LBB0_1", "v_mov_b32_e32 v2, 5", "s_barrier", "s_branch .LBB0_2"]
    others = [".LBB0_1:", "v_mov_b32_e32 v2, 7", "s_barrier", "v_add_u32_e32 v2, 1, v2", ".LBB0_2:"]
    output = run(*condition, *paths, *others, STORE)
    assert output[:64].tolist() == [5] * 64
    assert output[64:].tolist() == [8] * 64


def test_wavefronts_that_go_through_a_loop_a_different_number_of_times():
    code = ["v_mov_b32_e32 v2, 0", "v_readfirstlane_b32 s8, v0", "s_lshr_b32 s8, s8, 5"]
    loop = [".LBB0_1:", "v_add_u32_e32 v2, 1, v2", "s_cmp_eq_u32 s8, 0", "s_cbranch_scc1 .LBB0_2"]
    output = run(*code, *loop, "s_sub_i32 s8, s8, 1", "s_branch .LBB0_1", ".LBB0_2:", STORE)
    assert output.tolist() == [1] * 64 + [3] * 64


def test_lanes_that_are_off_keep_what_they_have():
    code = ["v_mov_b32_e32 v2, 1", "v_cmp_gt_u32_e32 vcc, 3, v0", "s_and_saveexec_b64 s[8:9], vcc"]
    output = run(*code, "v_mov_b32_e32 v2, 2", "s_or_b64 exec, exec, s[8:9]", STORE)
    assert output.tolist() == [2] * 3 + [1] * (NUM_THREADS - 3)


BUFFERS = ["s_mov_b32 s8, s4", "s_mov_b32 s9, s5", "s_mov_b32 s10, 40", "s_mov_b32 s11, 0x27000"]


def test_a_buffer_ends_after_its_bytes():
    load = ["buffer_load_dword v2, v1, s[8:11], 0 offen", "s_waitcnt vmcnt(0)"]
    assert run(*BUFFERS, *load, STORE).tolist() == [*range(1000, 1010), *[0] * (NUM_THREADS - 10)]
    output = ["s_mov_b32 s8, s6", "s_mov_b32 s9, s7", "buffer_store_dword v0, v1, s[8:11], 0 offen"]
    assert run(*BUFFERS, *output).tolist() == [*range(10), *[0] * (NUM_THREADS - 10)]


def test_a_load_outside_the_tensor_raises():
    with pytest.raises(MemoryFault, match=r"line 8 .* of the 512 bytes of a global tensor"):
        run("v_add_u32_e32 v1, 64, v1", LOAD)


def test_a_loop_without_end_and_an_unknown_instruction(monkeypatch):
    monkeypatch.setattr("virtual_gpu.amd.machine.MAX_STEPS", 100)
    with pytest.raises(Deadlock, match="doesn't end"):
        run(".LBB0_1:", "s_branch .LBB0_1")
    with pytest.raises(NotImplementedError, match="line 7: the machine doesn't know v_sin_f32 v2, v1"):
        run("v_sin_f32 v2, v1")


CLASSES = (0x7F800001, 0x7FC00000, 0xFF800000, 0xBF800000, 0x80000001, 0x80000000, 0, 1, 0x3F800000, 0x7F800000)
"""A float32 of each class, in the order of the bits."""


def test_classes_of_floats():
    for place, bits in enumerate(CLASSES):
        for mask, expected in ((1 << place, 1), (0x3FF ^ (1 << place), 0)):
            found = run(
                f"v_mov_b32_e32 v2, {bits:#x}",
                f"s_movk_i32 s8, {mask:#x}",
                "v_cmp_class_f32_e64 s[10:11], v2, s8",
                "v_cndmask_b32_e64 v2, 0, 1, s[10:11]",
                STORE,
            )
            assert set(found.tolist()) == {expected}, (place, mask)


def test_less_or_greater_is_false_of_nan():
    for bits, expected in ((0x7FC00000, 0), (0x3F800000, 0), (0x40000000, 1)):
        found = run(
            f"v_mov_b32_e32 v2, {bits:#x}",
            "v_cmp_lg_f32_e64 s[10:11], v2, 1.0",
            "v_cndmask_b32_e64 v2, 0, 1, s[10:11]",
            STORE,
        )
        assert set(found.tolist()) == {expected}


def test_halves_of_a_word_are_added_apart():
    found = run(
        "v_mov_b32_e32 v2, 0x1ffff",
        "v_mov_b32_e32 v3, 0x20002",
        "v_pk_add_u16 v2, v2, v3",
        STORE,
    )
    assert set(found.tolist()) == {0x30001}


def test_a_sum_of_64_bits():
    """The carry of the lower words goes into the sum of the upper ones, whatever name the carry register has."""
    found = run(
        "v_mov_b32_e32 v2, -1",
        "v_add_co_u32_e64 v2, s[10:11], 1, v2",
        "v_mov_b32_e32 v3, 5",
        "v_addc_co_u32_e64 v2, s[12:13], 0, v3, s[10:11]",
        STORE,
    )
    assert set(found.tolist()) == {6}
