"""The virtual GPU by itself: a few instructions at a time."""

import ctypes

import numpy as np
import pytest
from ptx_programs import view_of

from virtual_gpu import arithmetic, deletions, support
from virtual_gpu.faults import Deadlock, MemoryFault
from virtual_gpu.memory import GlobalMemory, View
from virtual_gpu.nvidia import fragments
from virtual_gpu.nvidia.machine import run_grid
from virtual_gpu.nvidia.parser import Address, parse
from virtual_gpu.nvidia.tensor_map import TensorMap
from virtual_gpu.nvidia.translation import translate
from virtual_gpu.shared_memory import SharedMemory

HEAD = """
.visible .entry kernel(
	.param .u64 .ptr .global .align 1 kernel_param_0
)
.reqntid 64
{
	.reg .pred 	%p<9>;
	ld.param.b64 	%rd1, [kernel_param_0];
	mov.u32 	%r1, %tid.x;
	mov.u32 	%r9, %ctaid.x;
	mul.wide.u32 	%rd2, %r1, 4;
	add.s64 	%rd3, %rd1, %rd2;
	shl.b32 	%r2, %r1, 2;
	xor.b32 	%r3, %r2, 252;
"""
"""%rd3: this thread's word of the array; %r2: that of shared memory; %r3: a word of shared memory of the other warp."""


def run(body, words=64, grid=1, shared_bytes=256):
    """Run 64 threads a program on an array of words that counts from 100, and give it."""
    array = np.arange(100, 100 + words, dtype=np.uint32)
    memory = GlobalMemory([view_of(array)])
    code = translate(parse(HEAD + "\n".join(f"\t{line}" for line in body.strip().splitlines()) + "\n\tret;\n}\n"))
    run_grid(code, [array.ctypes.data], memory, shared_bytes, (grid, 1, 1), True)
    return array


def test_words_go_through_shared_memory():
    found = run(
        """
        ld.global.b32 %r4, [%rd3];
        st.shared.b32 [%r2], %r4;
        bar.sync 0;
        ld.shared.b32 %r5, [%r3];
        st.global.b32 [%rd3], %r5;
        """
    )
    assert found.tolist() == list(range(163, 99, -1))


def test_branches_that_separate_threads():
    """Odd threads go another way, and a loop runs as often as a thread's number modulo 4 says."""
    found = run(
        """
        and.b32 %r4, %r1, 1;
        setp.eq.b32 %p1, %r4, 1;
        mov.b32 %r5, 7;
        @%p1 bra $L__odd;
        mov.b32 %r5, 1000;
        $L__odd:
        and.b32 %r6, %r1, 3;
        $L__loop:
        setp.eq.b32 %p2, %r6, 0;
        @%p2 bra $L__end;
        add.s32 %r5, %r5, 1;
        add.s32 %r6, %r6, -1;
        bra.uni $L__loop;
        $L__end:
        bar.sync 0;
        st.global.b32 [%rd3], %r5;
        """
    )
    assert found[:4].tolist() == [1000, 8, 1002, 10]


def test_a_warp_s_maximum_leaves_nan_out_unless_it_is_asked_for():
    for name, expected in (("max", 0x40000000), ("max.NaN", 0x7FC00000)):
        body = "setp.eq.u32 %p1, %r1, 3;\nsetp.eq.u32 %p2, %r1, 40;\nmov.b32 %r4, 0f3F800000;"
        body += "\n@%p1 mov.b32 %r4, 0f7FC00000;\n@%p2 mov.b32 %r4, 0f7FC00000;\nsetp.eq.u32 %p1, %r1, 5;"
        body += "\nsetp.eq.u32 %p2, %r1, 50;\n@%p1 mov.b32 %r4, 0f40000000;\n@%p2 mov.b32 %r4, 0f40000000;"
        found = run(f"{body}\nmov.b32 %r6, -1;\nredux.sync.{name}.f32 %r5, %r4, %r6;\nst.global.b32 [%rd3], %r5;")
        assert set(found.tolist()) == {expected}


def test_registers_of_inner_braces_are_known_there_alone():
    found = run(
        """
        {
        .reg .b16 a<2>;
        .reg .b32 b;
        mov.b32 b, 0x20001;
        mov.b32 {a0, a1}, b;
        mov.b32 %r4, {a1, a0};
        }
        {
        .reg .b32 a0;
        mov.b32 a0, 0x30000;
        add.s32 %r5, %r4, a0;
        }
        st.global.b32 [%rd3], %r5;
        """
    )
    assert set(found.tolist()) == {0x40002}


def test_a_maximum_of_three_numbers():
    for numbers in ("%r4, %r5, %r6", "%r5, %r6, %r4", "%r6, %r4, %r5"):
        found = run(
            f"""
            mov.b32 %r4, 0f3F800000;
            mov.b32 %r5, 0f40000000;
            mov.b32 %r6, 0fFF800000;
            max.f32 %r7, {numbers};
            st.global.b32 [%rd3], %r7;
            """
        )
        assert set(found.tolist()) == {0x40000000}


def test_a_signed_load_keeps_its_sign_in_a_wider_register():
    found = run(
        """
        st.shared.b32 [%r2], -3;
        ld.shared.s32 %rd5, [%r2];
        shr.u64 %rd6, %rd5, 32;
        cvt.u32.u64 %r4, %rd6;
        st.global.b32 [%rd3], %r4;
        """
    )
    assert set(found.tolist()) == {0xFFFFFFFF}


def test_only_unordered_comparisons_are_true_of_nan():
    names = ("eq", "ne", "lt", "equ", "neu", "num", "nan")
    for value, expected in (("0f7FC00000", (0, 0, 0, 1, 1, 0, 1)), ("0f3F800000", (0, 1, 1, 0, 1, 1, 0))):
        for name, is_true in zip(names, expected, strict=True):
            body = f"mov.b32 %r4, {value};\nsetp.{name}.f32 %p1, %r4, 0f7F800000;\nselp.b32 %r5, 1, 0, %p1;"
            assert set(run(f"{body}\nst.global.b32 [%rd3], %r5;").tolist()) == {is_true}, name


@pytest.mark.parametrize(
    ("body", "fault", "message"),
    [
        ("st.shared.b32 [%r2], %r1;\nld.shared.b32 %r5, [%r3];", MemoryFault, "that another wrote, with no barrier"),
        ("ld.shared.b32 %r5, [%r3];\nst.shared.b32 [%r2], %r1;", MemoryFault, "that another read, with no barrier"),
        ("st.shared.b32 [%r2+4], %r1;", MemoryFault, "byte 259 of 256"),
        ("st.shared.b32 [%r2+2], %r1;", MemoryFault, "misaligned"),
        ("ld.global.b32 %r5, [%rd3+4];", MemoryFault, "of the 256 bytes of a global tensor"),
        ("ld.global.b64 %rd5, [%rd3];", MemoryFault, "misaligned"),
        ("setp.eq.b32 %p1, %r1, 3;\n@%p1 bra $L__end;\nbar.sync 0;\n$L__end:", Deadlock, "only some threads"),
        ("$L__forever:\nbra.uni $L__forever;", Deadlock, "doesn't end"),
        (
            "st.shared.b32 [%r2], 0;\nmov.b32 %r4, 0;\natom.relaxed.sys.shared.add.u32 %r5, [%r4], 1;",
            MemoryFault,
            "atomic operation on shared memory that another warp touched",
        ),
        (
            "setp.eq.b32 %p1, %r1, 0;\n@%p1 mbarrier.init.shared::cta.b64 [%r2], 2;\nmov.b32 %r4, 0;\n"
            "setp.eq.b32 %p2, %r1, 40;\n@%p2 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r4], 0;",
            MemoryFault,
            "that another wrote, with no barrier",
        ),
        ("mbarrier.try_wait.parity.shared::cta.b64 %p1, [%r2], 0;", MemoryFault, "no initialised mbarrier"),
    ],
)
def test_faults(body, fault, message, monkeypatch):
    monkeypatch.setattr("virtual_gpu.nvidia.machine.MAX_STEPS", 100)
    with pytest.raises(fault, match=rf"kernel, line \d+ of its PTX: .*{message}"):
        run(body)


@pytest.mark.parametrize("name", ["atom.relaxed.sys.shared.add.u32", "atom.shared.add.u32"])
def test_threads_add_in_any_order(name):
    """Each gets what was there before, and all 64 sums are different."""
    found = run(
        f"""
        mov.b32 %r4, 0;
        st.shared.b32 [%r2], 0;
        bar.sync 0;
        {name} %r5, [%r4], 2;
        bar.sync 0;
        ld.shared.b32 %r6, [%r4];
        add.u32 %r6, %r6, %r5;
        st.global.b32 [%rd3], %r6;
        """
    )
    assert sorted(found.tolist()) == list(range(128, 256, 2))


@pytest.mark.parametrize("kept", ["all", "wait", "barrier"])
def test_asynchronous_copies(kept):
    """Without the wait the bytes aren't there; without the barrier another warp's aren't."""
    lines = [
        "cp.async.ca.shared.global [ %r2 + 0 ], [ %rd3 + 0 ], 0x4;",
        "cp.async.commit_group;",
        "cp.async.wait_group 0;",
        "bar.sync 0;",
        "ld.shared.b32 %r5, [%r3];",
        "cp.async.wait_group 0;",
        "st.global.b32 [%rd3], %r5;",
    ]
    if kept == "all":
        assert run("\n".join(lines)).tolist() == list(range(163, 99, -1))
        return
    del lines[{"wait": 3, "barrier": 2}[kept]]
    with pytest.raises(MemoryFault, match="with no barrier" if kept == "wait" else "still writes"):
        run("\n".join(lines))


def test_programs_have_no_order():
    with pytest.raises(MemoryFault, match="program 1 writes global memory that another program wrote"):
        run("st.global.b32 [%rd3], %r1;", grid=2)
    with pytest.raises(MemoryFault, match="program 1 reads global memory that another program wrote"):
        run("setp.eq.b32 %p1, %r9, 0;\n@%p1 st.global.b32 [%rd3], %r1;\nld.global.b32 %r5, [%rd3];", grid=2)


def test_a_barrier_waits_for_its_bytes():
    begin = "setp.eq.b32 %p1, %r1, 0;\n@%p1 mbarrier.init.shared::cta.b64 [%r2], 1;\nbar.sync 0;\nmov.b32 %r4, 0;\n"
    arrive = "@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r2], {};\n"
    wait = "mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r4], 0;"
    run(begin + arrive.format(0) + wait)
    with pytest.raises(Deadlock, match="16 bytes that never come"):
        run(begin + arrive.format(16) + wait)
    with pytest.raises(Deadlock, match="1 arrivals"):
        run(begin + wait)


def test_unknown_instructions_are_named():
    with pytest.raises(NotImplementedError, match=r"line \d+: the machine doesn't know sin.approx.f32"):
        run("sin.approx.f32 %r5, %r1;")


def test_operands_are_parsed():
    kernel = parse(HEAD + "\t@!%p1 st.global.v2.b32 [ %rd3 + 8 ], { %r1, %r2 };\n\tret;\n}\n")
    instruction = kernel.blocks[0][-2]
    assert instruction.parts == ("st", "global", "v2", "b32")
    assert instruction.operands == (Address("%rd3", 8), ("%r1", "%r2"))
    assert (instruction.guard, instruction.guard_negated) == ("%p1", True)
    assert (kernel.name, kernel.num_threads, kernel.parameters[0].num_bytes) == ("kernel", 64, 8)


def test_matrix_fragments():
    """Matrices that go to registers and back stay what they were."""
    rows = np.arange(4 * 8 * 16, dtype=np.uint64).astype(np.uint8).reshape(32, 16)
    for transposed in (False, True):
        registers = fragments.load_matrices(rows, 4, transposed)
        assert (fragments.store_matrices(list(registers), transposed) == rows).all()
    places = np.arange(1024)
    for width in (0, 32, 64, 128):
        assert (np.sort(fragments.swizzled(places, width)) == places).all()
    rows, columns = fragments.accumulator_rows_and_columns(128)
    assert len(set(zip(rows.ravel().tolist(), columns.ravel().tolist(), strict=True))) == 16 * 256


def test_a_box_outside_its_tensor_is_zero():
    """Rows 1 to 4 of (3, 8) fp32, of which the last two are outside; a swizzle of 32 bytes exchanges 16-byte pieces."""
    tensor = np.arange(24, dtype=np.float32).reshape(3, 8)
    storage = (ctypes.c_float * 28)()
    base = -(-ctypes.addressof(storage) // 16) * 16
    ctypes.memmove(base, tensor.ctypes.data, tensor.nbytes)
    box = TensorMap(base, (3, 8), (8, 1), (4, 8), 4, 32)
    memory = GlobalMemory([View(base, (tensor.nbytes,), (1,), 1)])
    places, values = box.places(128), box.read(memory, 1, [0, 1])
    shared = SharedMemory(256)
    shared.write(np.array([128]), np.zeros((1, 4), np.uint8), np.array([0]))
    with pytest.raises(MemoryFault, match="a bulk copy writes shared memory that threads wrote without a proxy fence"):
        shared.begin_bulk_copy(places, np.array(0))
    shared.fence()
    shared.read(np.array([252]), 4, np.array([0]))
    with pytest.raises(MemoryFault, match="a bulk copy writes shared memory that threads read without a proxy fence"):
        shared.begin_bulk_copy(places, np.array(0))
    shared.fence()
    shared.begin_bulk_copy(places, np.array(0))
    shared.land_bulk_copy(places, values, None)
    found = shared.data[128:].view(np.float32).reshape(4, 8)
    assert found[0].tolist() == np.roll(tensor[1], 4).tolist()  # bytes 128 to 255 of every 256 are exchanged
    assert found[1].tolist() == np.roll(tensor[2], 4).tolist()
    assert (found[2:] == 0).all()
    with pytest.raises(MemoryFault, match="multiple of 128 bytes"):
        box.places(64)
    tensor[:] = np.nan
    ctypes.memmove(base, tensor.ctypes.data, tensor.nbytes)
    box.write(memory, 1, [4, 1], values)  # the first half of each row goes to the second half of rows 1 and 2
    ctypes.memmove(tensor.ctypes.data, base, tensor.nbytes)
    assert tensor[1:, 4:].tolist() == [[8, 9, 10, 11], [16, 17, 18, 19]]
    assert np.isnan(tensor[0]).all()
    assert np.isnan(tensor[:, :4]).all()


def test_arithmetic():
    bits = np.array([0x3F808000, 0x3F818000, 0x7FC00000, 0x7F7FFFFF], np.uint32)
    rounded = arithmetic.to_bfloat16(bits.view(np.float32))
    assert rounded.tolist() == [0x3F80, 0x3F82, 0x7FFF, 0x7F80]  # to even, to even, NaN, infinity
    dividend = np.array([7, -7, 7, -7], np.int32)
    divisor = np.array([2, 2, -2, -2], np.int32)
    assert arithmetic.quotient(dividend, divisor).tolist() == [3, -3, -3, 3]
    assert arithmetic.remainder(dividend, divisor).tolist() == [1, -1, 1, -1]
    word = np.array([0x80F0], np.uint32)
    assert arithmetic.bits_of_field(word, np.int32(4), np.int32(4)).tolist() == [15]
    assert arithmetic.bits_of_field(word.view(np.int32), np.int32(4), np.int32(4)).tolist() == [-1]
    low, high = np.array([0x33221100], np.uint32), np.array([0x77665544], np.uint32)
    assert arithmetic.byte_permutation(low, high, np.array([0x7410], np.uint32)).tolist() == [0x77441100]
    lanes = np.arange(64, dtype=np.uint32)
    assert arithmetic.shuffle("up", lanes, np.uint32(1))[0][[0, 1, 32, 33]].tolist() == [0, 0, 32, 32]
    assert arithmetic.reduce_warps("add", lanes)[[0, 63]].tolist() == [496, 1520]
    assert arithmetic.ballot(lanes % 32 == 5)[[0, 63]].tolist() == [32, 32]


def test_a_view_is_not_its_storage():
    """Columns 0 and 1 of rows of four words may be touched, and nothing between them nor behind them."""
    array = np.arange(32, dtype=np.uint32).reshape(8, 4)
    memory = GlobalMemory([View(array.ctypes.data, (6, 2), (4, 1), 4)])
    base = np.uint64(array.ctypes.data)
    inside = np.array([0, 4, 16, 84], np.uint64)
    assert memory.read(base + inside, 4, 1).view(np.uint32)[:, 0].tolist() == [0, 1, 4, 21]
    for outside, message in ((8, "between the elements of a view"), (88, "of the 88 bytes"), (-4, "of the 88 bytes")):
        with pytest.raises(MemoryFault, match=message):
            memory.read(np.array([array.ctypes.data + outside], np.uint64), 4, 1)
    with pytest.raises(MemoryFault, match="between the elements"):
        memory.read(np.array([array.ctypes.data], np.uint64), 16, 1, 4)
    for outside in (8, 88):
        with pytest.raises(MemoryFault):
            memory.write(np.array([array.ctypes.data + outside], np.uint64), np.zeros((1, 4), np.uint8), 1)


def test_views_that_overlap_and_neighbours():
    array = np.arange(24, dtype=np.uint8)
    base = array.ctypes.data
    memory = GlobalMemory([View(base, (8,), (1,), 1), View(base + 4, (8,), (1,), 1), View(base + 16, (8,), (1,), 1)])
    assert memory.read(np.array([base + 4], np.uint64), 8, 1, 4).tolist() == [[4, 5, 6, 7, 8, 9, 10, 11]]
    places = np.array([base + 16, base, base + 20], np.uint64)
    assert memory.read(places, 4, 1)[:, 0].tolist() == [16, 0, 20]
    with pytest.raises(MemoryFault, match="of the 12 bytes"):
        memory.read(np.array([base + 12], np.uint64), 4, 1)


@pytest.mark.parametrize(
    ("value", "kind", "bits"),
    [
        (1.1, "fp64", 0x3FF199999999999A),
        (1.1, "fp32", 0x3F8CCCCD),
        (1.1, "fp16", 0x3C66),
        (1.1, "bf16", 0x3F8D),
        (-3, "i32", -3),
        (True, "i1", 1),
    ],
)
def test_scalars_have_the_bits_of_their_type(value, kind, bits):
    assert arithmetic.bits_of_scalar(value, kind) == bits


def test_what_goes_wrong_inside_the_machine_has_a_line():
    with pytest.raises(NotImplementedError, match=r"line \d+: the machine doesn't know ld.param.b64 \(ValueError"):
        run("ld.param.b64 %rd5, [kernel_param_9];")
    copy = "cp.async.bulk.tensor.1d.shared::cta.global.mbarrier::complete_tx::bytes"
    with pytest.raises(NotImplementedError, match=r"line \d+ of its PTX: the machine can't run this: AssertionError"):
        run(f"{copy} [%r2], [kernel_param_0, {{%r1}}], [%r2];")  # the parameter is no descriptor


def test_every_wait_is_found_and_deleted():
    """An s_waitcnt of two counters is two waits; what is left stays on its line."""
    ptx = "\t.reqntid 64\n\tbar.sync \t0;\n\tcp.async.wait_group \t1;\n{\nmbarrier.try_wait.x complete, [%r1], %r2;\n"
    ptx += "@!complete bra.uni waitLoop;\n}\n\tcp.async.bulk.wait_group.read \t0;\n\twgmma.fence.sync.aligned;\n"
    sites = list(deletions.sites_of(ptx))
    assert [(site.kind, site.line) for site in sites] == [
        ("barrier", 2),
        ("wait for copies", 3),
        ("wait for an mbarrier", 5),
        ("wait for bulk stores", 8),
        ("fence of registers", 9),
    ]
    left = deletions.without(sites)(ptx)
    assert left.split() == [".reqntid", "64", "{", "}"]
    assert left.count("\n") == ptx.count("\n")
    amd = "\ts_waitcnt vmcnt(0) lgkmcnt(1)\n\ts_barrier\n"
    first, second, barrier = deletions.sites_of(amd)
    assert deletions.without([first])(amd).split() == ["s_waitcnt", "lgkmcnt(1)", "s_barrier"]
    assert deletions.without([first, second, barrier])(amd).split() == ["s_nop", "0"]


def test_the_readme_lists_what_is_run():
    text = support.README.read_text()
    assert support.render(text) == text, "stale: run python -m virtual_gpu.support"
