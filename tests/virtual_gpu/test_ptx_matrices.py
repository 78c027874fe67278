"""Matrix instructions and exchanges between threads against NumPy, with layouts as the PTX manual has them."""

import numpy as np
import pytest
from ptx_programs import run_ptx

from virtual_gpu.faults import MemoryFault
from virtual_gpu.nvidia.matrix_unit import _decode
from virtual_gpu.nvidia.tensor_memory import TensorMemory
from virtual_gpu.shared_memory import SharedMemory

pytestmark = pytest.mark.thorough

LANES = np.arange(32)


def bits_of(values, kind):
    """Return small whole numbers, which both types hold exactly, as 16 bits."""
    if kind == "f16":
        return values.astype(np.float16).view(np.uint16)
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def whole_numbers(generator, *shape):
    return generator.integers(-8, 9, shape).astype(np.float64)


def run_on(body, inputs, output_words, shared_bytes, threads):
    """Run threads that find `inputs` (bytes) at %rd1, and give the words of `output_words` a thread, at %rd9."""
    begin = -(-len(inputs) // 8)
    memory = np.zeros(begin + (threads * output_words + 1) // 2, np.uint64)
    memory.view(np.uint8)[: len(inputs)] = inputs
    run_ptx(
        f"mul.lo.s32 %r90, %r1, {4 * output_words};\ncvt.u64.u32 %rd8, %r90;\nadd.s64 %rd9, %rd1, %rd8;\n"
        f"add.s64 %rd9, %rd9, {8 * begin};\n{body}",
        memory,
        shared_bytes,
        threads,
    )
    return memory[begin:].view(np.uint32)[: threads * output_words].reshape(threads, output_words)


def stores(num_words, first=100):
    return "\n".join(f"st.global.b32 [%rd9+{4 * word}], %r{first + word};" for word in range(num_words))


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_mma(kind):
    generator = np.random.default_rng(0)
    a, b, c = (whole_numbers(generator, 2, *shape) for shape in ((16, 16), (16, 8), (16, 8)))
    words = np.zeros((64, 10), np.uint32)
    group, member = LANES // 4, LANES % 4
    for warp in range(2):
        rows = words[32 * warp : 32 * warp + 32]
        for index in range(8):
            row, column = group + 8 * (index // 2 % 2), 2 * member + index % 2 + 8 * (index // 4)
            rows[:, index // 2] |= bits_of(a[warp, row, column], kind).astype(np.uint32) << 16 * (index % 2)
        for index in range(4):
            row = 2 * member + index % 2 + 8 * (index // 2)
            rows[:, 4 + index // 2] |= bits_of(b[warp, row, group], kind).astype(np.uint32) << 16 * (index % 2)
            rows[:, 6 + index] = c[warp, group + 8 * (index // 2), 2 * member + index % 2].astype("f4").view("u4")
    loads = "\n".join(f"ld.global.b32 %r{20 + word}, [%rd5+{4 * word}];" for word in range(10))
    found = run_on(
        f"mul.wide.u32 %rd4, %r1, 40;\nadd.s64 %rd5, %rd1, %rd4;\n{loads}\n"
        f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 {{%r100, %r101, %r102, %r103}}, "
        "{%r20, %r21, %r22, %r23}, {%r24, %r25}, {%r26, %r27, %r28, %r29};\n" + stores(4),
        words.view(np.uint8).reshape(-1),
        4,
        0,
        64,
    ).view(np.float32)
    for warp in range(2):
        wanted = a[warp] @ b[warp] + c[warp]
        for index in range(4):
            expected = wanted[group + 8 * (index // 2), 2 * member + index % 2]
            assert (found[32 * warp : 32 * warp + 32, index] == expected).all()


@pytest.mark.parametrize(("a_byte", "a_pair", "b_byte", "b_member"), [(0, 0, 0, 0), (3, 1, 1, 2), (1, 0, 2, 3)])
def test_mma_of_8_bits_with_scales(a_byte, a_pair, b_byte, b_member):
    """A byte of two threads of each four has the scales of rows g and g + 8, of one thread that of column g."""
    generator = np.random.default_rng(6)
    a, b = (generator.integers(0, 2, shape) for shape in ((16, 32), (32, 8)))  # ones have the code 0x38
    words = generator.integers(0, 1 << 32, (64, 8), dtype=np.uint32)
    words[:, :6] = 0
    group, member = LANES // 4, LANES % 4
    for index in range(16):
        codes = 0x38 * a[group + 8 * (index // 4 % 2), 4 * member + index % 4 + 16 * (index // 8)]
        words[:, index // 4] |= np.tile(codes, 2).astype(np.uint32) << 8 * (index % 4)
    for index in range(8):
        codes = 0x38 * b[4 * member + index % 4 + 16 * (index // 4), group]
        words[:, 4 + index // 4] |= np.tile(codes, 2).astype(np.uint32) << 8 * (index % 4)
    words[:, 6:] = words[:, 6:] & 0x03030303 | 0x7C7C7C7C
    row, column = np.arange(16), np.arange(8)
    a_scales = 2.0 ** ((words[row % 8 * 4 + 2 * a_pair + row // 8, 6] >> 8 * a_byte & 255).astype(float) - 127)
    b_scales = 2.0 ** ((words[column * 4 + b_member, 7] >> 8 * b_byte & 255).astype(float) - 127)
    words[32:] = words[:32]
    loads = "\n".join(f"ld.global.b32 %r{20 + word}, [%rd5+{4 * word}];" for word in range(8))
    found = run_on(
        f"mul.wide.u32 %rd4, %r1, 32;\nadd.s64 %rd5, %rd1, %rd4;\n{loads}\nmov.b32 %r29, 0;\n"
        "mma.sync.aligned.m16n8k32.row.col.kind::mxf8f6f4.block_scale.scale_vec::1X.f32.e4m3.e4m3.f32.ue8m0 "
        "{%r100, %r101, %r102, %r103}, {%r20, %r21, %r22, %r23}, {%r24, %r25}, {%r29, %r29, %r29, %r29}, "
        f"%r26, {{{a_byte}, {a_pair}}}, %r27, {{{b_byte}, {b_member}}};\n" + stores(4),
        words.view(np.uint8).reshape(-1),
        4,
        0,
        64,
    ).view(np.float32)
    wanted = a_scales[:, None] * (a @ b) * b_scales
    for index in range(4):
        expected = wanted[group + 8 * (index // 2), 2 * member + index % 2]
        assert (found[:, index].reshape(2, 32) == expected).all()


def test_mma_of_4_bits_with_scales():
    """Two bytes of a thread have the scales of both halves of the depth; a byte of a fragment has two depths."""
    generator = np.random.default_rng(7)
    values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    values = np.concatenate([values, -values])
    a, b = (generator.integers(0, 16, shape) for shape in ((16, 64), (64, 8)))
    words = generator.integers(0, 1 << 32, (64, 8), dtype=np.uint32)
    words[:, :6] = 0
    group, member = LANES // 4, LANES % 4
    for index in range(32):
        codes = a[group + 8 * (index // 8 % 2), 8 * member + index % 8 + 32 * (index // 16)]
        words[:, index // 8] |= np.tile(codes, 2).astype(np.uint32) << 4 * (index % 8)
    for index in range(16):
        codes = b[8 * member + index % 8 + 32 * (index // 8), group]
        words[:, 4 + index // 8] |= np.tile(codes, 2).astype(np.uint32) << 4 * (index % 8)
    words[:, 6:] = words[:, 6:] & 0x03030303 | 0x7C7C7C7C
    words[32:] = words[:32]
    row, column = np.arange(16), np.arange(8)
    a_words, b_words = words[row % 8 * 4 + 2 + row // 8, 6], words[column * 4 + 3, 7]
    depth = np.arange(64)
    a_scales = 2.0 ** ((a_words[:, None] >> 8 * (depth // 32) & 255).astype(float) - 127)
    b_scales = 2.0 ** ((b_words >> 8 * (2 + depth[:, None] // 32) & 255).astype(float) - 127)
    loads = "\n".join(f"ld.global.b32 %r{20 + word}, [%rd5+{4 * word}];" for word in range(8))
    found = run_on(
        f"mul.wide.u32 %rd4, %r1, 32;\nadd.s64 %rd5, %rd1, %rd4;\n{loads}\nmov.b32 %r29, 0;\n"
        "mma.sync.aligned.m16n8k64.row.col.kind::mxf4nvf4.block_scale.scale_vec::2X.f32.e2m1.e2m1.f32.ue8m0 "
        "{%r100, %r101, %r102, %r103}, {%r20, %r21, %r22, %r23}, {%r24, %r25}, {%r29, %r29, %r29, %r29}, "
        "%r26, {0, 1}, %r27, {2, 3};\n" + stores(4),
        words.view(np.uint8).reshape(-1),
        4,
        0,
        64,
    ).view(np.float32)
    wanted = (values[a] * a_scales) @ (values[b] * b_scales)
    for index in range(4):
        expected = wanted[group + 8 * (index // 2), 2 * member + index % 2]
        assert (found[:, index].reshape(2, 32) == expected).all()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("matrices", [1, 2, 4])
def test_ldmatrix_and_stmatrix(matrices, transposed):
    """Lane 8 m + i holds the address of row i of matrix m; lane l gets elements 2 l and 2 l + 1 of each matrix."""
    generator = np.random.default_rng(1)
    elements = generator.integers(0, 1 << 16, (matrices, 8, 8), dtype=np.uint16)
    registers = ", ".join(f"%r{100 + index}" for index in range(matrices))
    suffix = ".trans" * transposed
    body = f"""
    and.b32 %r3, %r1, {8 * matrices - 1};
    shl.b32 %r4, %r3, 4;
    mul.wide.u32 %rd4, %r3, 16;
    add.s64 %rd5, %rd1, %rd4;
    ld.global.v4.b32 {{%r5, %r6, %r7, %r8}}, [%rd5];
    st.shared.v4.b32 [%r4], {{%r5, %r6, %r7, %r8}};
    bar.sync 0;
    ldmatrix.sync.aligned.m8n8.x{matrices}{suffix}.shared.b16 {{{registers}}}, [%r4];
    add.s32 %r9, %r4, {128 * matrices};
    stmatrix.sync.aligned.m8n8.x{matrices}{suffix}.shared.b16 [%r9], {{{registers}}};
    bar.sync 0;
    ld.shared.v4.b32 {{%r{100 + matrices}, %r{101 + matrices}, %r{102 + matrices}, %r{103 + matrices}}}, [%r9];
    {stores(matrices + 4)}
    """
    found = run_on(body, elements.view(np.uint8).reshape(-1), matrices + 4, 256 * matrices, 32)
    for index in range(matrices):
        matrix = elements[index].T if transposed else elements[index]
        assert (found[:, index].copy().view(np.uint16).reshape(8, 8) == matrix).all()
    back = found[: 8 * matrices, matrices:].copy().view(np.uint16).reshape(matrices, 8, 8)
    assert (back == elements).all()


def k_major(matrix, width):
    """Return the bytes of (rows, 64): rows of `width` bytes whose 16-byte pieces are exchanged; 0: core matrices."""
    rows, columns = np.indices(matrix.shape)
    if width == 0:
        place = rows // 8 * 128 + columns // 8 * (16 * len(matrix)) + rows % 8 * 16 + columns % 8 * 2
    else:
        slab = columns * 2 // width * (len(matrix) * width)
        place = slab + rows * width + columns * 2 % width
        place ^= (place >> 7 & (width // 16 - 1)) << 4
    return place


def mn_major(matrix):
    """Return where (columns, depth) lies, whose rows of 64 columns (128 bytes) are exchanged by depth modulo 8."""
    column, depth = np.indices(matrix.shape)
    place = column // 64 * (128 * matrix.shape[1]) + depth * 128 + column % 64 * 2
    return place ^ (place >> 7 & 7) << 4


def filled(places, matrix, kind):
    data = np.zeros(matrix.size, np.uint16)
    data[places // 2] = bits_of(matrix, kind)
    return data


COPY = """
mul.wide.u32 %rd4, %r1, 16;
add.s64 %rd5, %rd1, %rd4;
shl.b32 %r3, %r1, 4;
"""


def copied(num_bytes, threads):
    """Write lines that bring the inputs to shared memory and order them before matrix instructions."""
    lines = [COPY]
    for offset in range(0, num_bytes, 16 * threads):
        lines.append(f"ld.global.v4.b32 {{%r4, %r5, %r6, %r7}}, [%rd5+{offset}];")
        lines.append(f"st.shared.v4.b32 [%r3+{offset}], {{%r4, %r5, %r6, %r7}};")
    return "\n".join([*lines, "fence.proxy.async.shared::cta;", "bar.sync 0;"])


def descriptor(start, leading, stride, mode):
    return start >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | mode << 61


LAYOUTS = {
    "no swizzle": (0, False),
    "32 bytes": (32, False),
    "64 bytes": (64, False),
    "128 bytes": (128, False),
    "MN-major": (128, True),
}


def slices(layout, base, size):
    """Return descriptors (modes left out) of the four slices of 16 along K of a matrix of `size` rows or columns."""
    width, transposed = LAYOUTS[layout]
    for step in range(4):
        if transposed:
            yield base + step * 2048, 128 * 64, 1024
        elif width == 0:
            yield base + step * 32 * size, 16 * size, 128
        else:
            yield base + step * 32 % width + step * 32 // width * size * width, 0, 8 * width


@pytest.mark.parametrize("kind", ["bf16", "f16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_wgmma(layout, kind):
    """Two warpgroups, each with the same B; the first of four steps along K doesn't add."""
    width, transposed = LAYOUTS[layout]
    generator, n = np.random.default_rng(2), 64
    a, b = whole_numbers(generator, 64, 64), whole_numbers(generator, n, 64)
    places = (mn_major(a), mn_major(b)) if transposed else (k_major(a, width), k_major(b, width))
    data = np.concatenate([filled(place, one, kind) for place, one in zip(places, (a, b), strict=True)])
    mode = {0: 0, 128: 1, 64: 2, 32: 3}[width] << 1
    registers = ", ".join(f"%r{100 + index}" for index in range(n // 2))
    lines = [copied(data.nbytes, 256), *(f"mov.b32 %r{100 + index}, 0f7FC00000;" for index in range(n // 2))]
    lines.append("wgmma.fence.sync.aligned;")
    for step, (one, two) in enumerate(zip(slices(layout, 0, 64), slices(layout, a.size * 2, n), strict=True)):
        lines += [f"mov.b64 %rd20, {descriptor(*one, mode)};", f"mov.b64 %rd21, {descriptor(*two, mode)};"]
        lines.append(f"mov.pred %p1, {int(step > 0)};")
        name = f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{kind}.{kind}"
        majors = f"{int(transposed)}, {int(transposed)}"
        lines.append(f"{name} {{{registers}}}, %rd20, %rd21, %p1, 1, 1, {majors};")
    lines += ["wgmma.commit_group.sync.aligned;", "wgmma.wait_group.sync.aligned 0;", stores(n // 2)]
    found = run_on("\n".join(lines), data.view(np.uint8), n // 2, data.nbytes, 256).view(np.float32)
    wanted = a @ b.T
    register = np.arange(n // 2)
    for thread in range(256):
        row = 16 * (thread // 32 % 4) + thread % 32 // 4 + 8 * (register // 2 % 2)
        assert (found[thread] == wanted[row, 8 * (register // 4) + 2 * (thread % 4) + register % 2]).all()


@pytest.mark.parametrize("kind", ["bf16", "f16"])
@pytest.mark.parametrize("layout", ["no swizzle", "32 bytes", "64 bytes", "128 bytes"])
def test_tcgen05(layout, kind):
    """A product of 128 x 32 that adds to what the warps stored in tensor memory."""
    width, _ = LAYOUTS[layout]
    generator, n = np.random.default_rng(3), 32
    a, b = whole_numbers(generator, 128, 64), whole_numbers(generator, n, 64)
    data = np.concatenate([filled(k_major(one, width), one, kind) for one in (a, b)])
    mode = {0: 0, 128: 2, 64: 4, 32: 6}[width]
    code = {"f16": 0, "bf16": 1}[kind]
    instruction = 1 << 4 | code << 7 | code << 10 | n // 8 << 17 | 128 // 16 << 24
    registers = ", ".join(f"%r{100 + index}" for index in range(n))
    barrier = data.nbytes + 16
    lines = [
        "setp.lt.u32 %p1, %r1, 32;",
        "setp.eq.s32 %p2, %r1, 0;",
        f"mov.b32 %r80, {data.nbytes};",
        f"mov.b32 %r81, {barrier};",
        "@%p1 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r80], 32;",
        "@%p2 mbarrier.init.shared::cta.b64 [%r81], 1;",
        copied(data.nbytes, 128),
        "ld.shared.b32 %r82, [%r80];",
        "and.b32 %r83, %r1, 96;",
        "shl.b32 %r84, %r83, 16;",
        "add.s32 %r85, %r82, %r84;",
        *(f"mov.b32 %r{100 + index}, 0f40A00000;" for index in range(n)),
        f"tcgen05.st.sync.aligned.32x32b.x{n}.b32 [%r85], {{{registers}}};",
        "tcgen05.wait::st.sync.aligned;",
        "bar.sync 0;",
        f"mov.b32 %r86, {instruction};",
        "mov.pred %p3, 1;",
    ]
    for one, two in zip(slices(layout, 0, 128), slices(layout, a.size * 2, n), strict=True):
        lines += [f"mov.b64 %rd20, {descriptor(*one, mode)};", f"mov.b64 %rd21, {descriptor(*two, mode)};"]
        lines.append("@%p2 tcgen05.mma.cta_group::1.kind::f16 [%r82], %rd20, %rd21, %r86, %p3;")
    lines += [
        "@%p2 tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r81];",
        "mbarrier.try_wait.parity.shared::cta.b64 %p4, [%r81], 0;",
        f"tcgen05.ld.sync.aligned.32x32b.x{n}.b32 {{{registers}}}, [%r85];",
        "tcgen05.wait::ld.sync.aligned;",
        "bar.sync 0;",
        "@%p1 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r82, 32;",
        stores(n),
    ]
    found = run_on("\n".join(lines), data.view(np.uint8), n, barrier + 8, 128).view(np.float32)
    assert (found == a @ b.T + 5).all()


def test_warps_that_use_the_same_tensor_memory_need_a_barrier():
    shared = SharedMemory(16)
    memory = TensorMemory(shared, lambda kind: lambda bits: bits.astype(np.float32))
    address = memory.allocate(32)
    places = memory.places(address, "32x32b", 4, 0)
    memory.write(places, np.arange(128, dtype=np.uint32).reshape(4, 32), 0)
    memory.wait_for_stores()
    with pytest.raises(MemoryFault, match="another warp loads or stores is used, with no barrier between"):
        memory.read(places, 4)
    with pytest.raises(MemoryFault, match="another warp loads or stores is used"):
        memory.free(address, 32, 1)
    shared.barrier()
    assert (memory.read(places, 4) == np.arange(128).reshape(4, 32)).all()


@pytest.mark.parametrize("missing", ["", "wait", "barrier", "copy", "columns"])
def test_scales_in_tensor_memory_need_their_order_and_four_copies(missing):
    """A product of 128 x 32 with one scale for each row and column, which four warps store in 32 lanes each."""
    shared = SharedMemory(8192)
    shared.data[:] = 0x38  # 1.0
    memory = TensorMemory(shared, _decode)
    sums, scales = memory.allocate(32), memory.allocate(32)
    for warp in range(4):
        places = memory.places(scales | 32 * warp << 16, "32x32b", 5, 0)
        words = np.full((5, 32), 0x7F7E8180, np.uint32)  # of A 4.0 in byte 1
        words[4] = 0x80808080  # of B 2.0
        words[4, 3] += (missing == "copy" and warp == 2) << 16
        memory.write(places, words, warp)
    if missing != "wait":
        memory.wait_for_stores()
    if missing != "barrier":
        shared.barrier()
    instruction = 1 << 29 | 2 << 4 | 1 << 23 | 32 // 8 << 17 | 128 // 16 << 24
    places = scales, scales + (4 if missing != "columns" else 32)

    def multiply():
        left, right = descriptor(0, 128, 256, 0), descriptor(4096, 128, 256, 0)
        memory.start(sums, left, right, instruction, 0, 0, "kind::mxf8f6f4", places)
        memory.finish(1, None)

    messages = {
        "wait": "not waited for",
        "barrier": "no barrier",
        "copy": "all four quarters",
        "columns": "not allocated",
    }
    if missing:
        with pytest.raises(MemoryFault, match=messages[missing]):
            multiply()
        return
    multiply()
    assert (memory.read(memory.places(sums, "32x32b", 32, 0), 0).view(np.float32) == 32 * 4 * 2).all()


@pytest.mark.parametrize("missing", ["fence of registers", "barrier before the refill"])
def test_wgmma_without_its_order(missing):
    """Its accumulators were written before a fence, and a finished product has read what another warp then writes."""
    n = 8
    registers = ", ".join(f"%r{100 + index}" for index in range(n // 2))
    lines = [
        copied(4096, 128),
        *(f"mov.b32 %r{100 + index}, 0;" for index in range(n // 2)),
        "wgmma.fence.sync.aligned;",
        f"mov.b64 %rd20, {descriptor(0, 1024, 128, 0)};",
        f"mov.b64 %rd21, {descriptor(2048, 128, 128, 0)};",
        "mov.pred %p1, 1;",
        f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.f16.f16 {{{registers}}}, %rd20, %rd21, %p1, 1, 1, 0, 0;",
        "wgmma.commit_group.sync.aligned;",
        "wgmma.wait_group.sync.aligned 0;",
        "bar.sync 0;",
        "st.shared.v4.b32 [%r3], {%r4, %r5, %r6, %r7};",
    ]
    inputs = np.zeros(4096, np.uint8)
    run_on("\n".join(lines), inputs, 1, 4096, 128)
    del lines[lines.index("wgmma.fence.sync.aligned;" if missing == "fence of registers" else "bar.sync 0;")]
    message = "no wgmma.fence since" if missing == "fence of registers" else "that another read, with no barrier"
    with pytest.raises(MemoryFault, match=message):
        run_on("\n".join(lines), inputs, 1, 4096, 128)


@pytest.mark.parametrize("waits", [True, False])
def test_wgmma_reads_its_registers_until_the_wait(waits):
    """A is all ones in registers, which threads write behind the product: before its wait that is no order."""
    n = 8
    registers = ", ".join(f"%r{100 + index}" for index in range(n // 2))
    wait, write = "wgmma.wait_group.sync.aligned 0;", "mov.b32 %r90, 0;"
    lines = [
        copied(4096, 128),
        *(f"mov.b32 %r{100 + index}, 0;" for index in range(n // 2)),
        *(f"mov.b32 %r{90 + index}, 0x3C003C00;" for index in range(4)),
        "wgmma.fence.sync.aligned;",
        f"mov.b64 %rd21, {descriptor(2048, 128, 128, 0)};",
        "mov.pred %p1, 1;",
        f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.f16.f16 {{{registers}}}, {{%r90, %r91, %r92, %r93}}, %rd21, "
        "%p1, 1, 1, 0;",
        "wgmma.commit_group.sync.aligned;",
        *((wait, write) if waits else (write, wait)),
        stores(n // 2),
    ]
    ones = np.full(2048, 1, np.float16).view(np.uint8)
    if waits:
        assert (run_on("\n".join(lines), ones, n // 2, 4096, 128).view(np.float32) == 16).all()
    else:
        with pytest.raises(MemoryFault, match="registers that threads wrote before they waited for it"):
            run_on("\n".join(lines), ones, n // 2, 4096, 128)


def exchanged(instruction, result="%r100"):
    generator = np.random.default_rng(4)
    values = generator.integers(0, 1 << 32, 64, dtype=np.uint32)
    body = f"mul.wide.u32 %rd4, %r1, 4;\nadd.s64 %rd5, %rd1, %rd4;\nld.global.b32 %r20, [%rd5];\n{instruction}\n"
    body += f"st.global.b32 [%rd9], {result};"
    return values.reshape(2, 32), run_on(body, values.view(np.uint8), 1, 0, 64).reshape(2, 32)


@pytest.mark.parametrize("amount", [1, 5, 16])
@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
def test_shuffles(mode, amount):
    source = {"up": LANES - amount, "down": LANES + amount, "bfly": LANES ^ amount, "idx": 0 * LANES + amount}[mode]
    exists = (source >= 0) & (source < 32)
    clamp = 0 if mode == "up" else 31
    values, found = exchanged(f"shfl.sync.{mode}.b32 %r100|%p1, %r20, {amount}, {clamp}, -1;")
    assert (found == values[:, np.where(exists, source, LANES)]).all()
    _, found = exchanged(f"shfl.sync.{mode}.b32 %r21|%p1, %r20, {amount}, {clamp}, -1;\nselp.b32 %r100, 1, 0, %p1;")
    assert (found == exists).all()


def test_reductions_and_votes_of_warps():
    functions = {"add": np.add, "min": np.minimum, "max": np.maximum}
    for name, function in functions.items():
        for kind in ("s32", "u32"):
            values, found = exchanged(f"redux.sync.{name}.{kind} %r100, %r20, -1;")
            typed = values.view("i4" if kind == "s32" else "u4")
            assert (found.view(typed.dtype) == function.reduce(typed, 1, keepdims=True, dtype=typed.dtype)).all()
    for name, function in {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}.items():
        values, found = exchanged(f"redux.sync.{name}.b32 %r100, %r20, -1;")
        assert (found == function.reduce(values, 1, keepdims=True)).all()
    values, found = exchanged("setp.lt.s32 %p1, %r20, 0;\nvote.sync.ballot.b32 %r100, %p1, -1;")
    bits = ((values >> 31).astype(np.uint64) << LANES.astype(np.uint64)).sum(1, keepdims=True)
    assert (found == bits).all()
    _, found = exchanged("elect.sync %r21|%p1, -1;\nselp.b32 %r22, 7, 0, %p1;\nadd.s32 %r100, %r21, %r22;")
    assert (found == np.where(LANES == 0, 7, 0)).all()


@pytest.mark.parametrize("name", ["shfl.sync.bfly.b32 %r100, %r20, 1, 31, -1;", "redux.sync.add.s32 %r100, %r20, %r1;"])
def test_an_exchange_of_some_threads_is_refused(name):
    with pytest.raises(NotImplementedError, match="some"):
        exchanged(f"setp.lt.u32 %p1, %r1, 5;\n@%p1 {name}")


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("width", [8, 16, 32, 64])
def test_loads_and_stores_of_every_width(width, count):
    """Through registers and shared memory and back."""
    if width * count < 8 or width * count > 128:
        return
    letter = {8: "%rs", 16: "%rs", 32: "%r", 64: "%rd"}[width]
    names = [f"{letter}{50 + index}" for index in range(count)]
    operand = f"{{{', '.join(names)}}}" if count > 1 else names[0]
    vector = f".v{count}" * (count > 1)
    size = width * count // 8
    values = np.random.default_rng(5).integers(0, 256, 64 * size, dtype=np.uint8)
    memory = np.zeros(2 * 64 * size // 8, np.uint64)
    memory.view(np.uint8)[: len(values)] = values
    run_ptx(
        f"""
        mul.wide.u32 %rd4, %r1, {size};
        add.s64 %rd5, %rd1, %rd4;
        mul.lo.s32 %r4, %r1, {size};
        ld.global{vector}.b{width} {operand}, [%rd5];
        st.shared{vector}.b{width} [%r4], {operand};
        bar.sync 0;
        xor.b32 %r5, %r1, 63;
        mul.lo.s32 %r6, %r5, {size};
        ld.shared{vector}.b{width} {operand}, [%r6];
        st.global.L1::no_allocate{vector}.b{width} [%rd5+{len(values)}], {operand};
        """,
        memory,
        len(values),
    )
    found = memory.view(np.uint8)[len(values) :].reshape(64, size)
    assert (found == values.reshape(64, size)[::-1]).all()
