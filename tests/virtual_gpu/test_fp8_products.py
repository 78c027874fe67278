"""Products and conversions of 8-bit floats as Triton compiles them for each GPU, against float64: equal to the bit."""

import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.tools.tensor_descriptor import TensorDescriptor

from bench.conformance_cases import e4m3_of, exact_operands, factors_of, random_scales
from tritonmoe.ops.kernels.gpus import ARCHITECTURES
from tritonmoe.ops.kernels.launch import Launch
from virtual_gpu.launcher import run_launch
from virtual_gpu.nvidia import matrix_unit

pytestmark = pytest.mark.thorough

GPUS = {"sm_89": GPUTarget("cuda", 89, 32)}
GPUS |= {gpu: ARCHITECTURES[gpu].target for gpu in ("sm_90", "sm_100", "sm_120", "gfx942", "gfx950")}


def products(
    x, xs, w, ws, out, depth, x_row, x_depth, w_row, w_depth, width,
    SCALED: tl.constexpr, TMA: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Multiply x (BLOCK_M, depth) by w (BLOCK_N, depth); scales (rows, depth / 32)."""
    m, n, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    sums = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    for start in range(0, depth, BLOCK_K):
        if TMA:
            left = x.load([0, start])
            right = w.load([0, start]).T
        else:
            left = tl.load(x + m[:, None] * x_row + (start + k)[None, :] * x_depth)
            right = tl.load(w + n[None, :] * w_row + (start + k)[:, None] * w_depth)
        if SCALED:
            blocks = start // 32 + tl.arange(0, BLOCK_K // 32)
            x_scales = tl.load(xs + m[:, None] * (depth // 32) + blocks[None, :])
            w_scales = tl.load(ws + n[:, None] * (depth // 32) + blocks[None, :])
            sums = tl.dot_scaled(left, x_scales, "e4m3", right, w_scales, "e4m3", sums)
        else:
            sums = tl.dot(left, right, sums)
    tl.store(out + m[:, None] * width + n[None, :], sums)


def conversions(x, codes, back, SIZE: tl.constexpr):
    place = tl.arange(0, SIZE)
    rounded = tl.load(x + place).to(codes.dtype.element_ty)
    tl.store(codes + place, rounded)
    tl.store(back + place, rounded.to(back.dtype.element_ty))


PRODUCTS, CONVERSIONS = triton.JITFunction(products), triton.JITFunction(conversions)


def operands(gpu, rows, columns, depth):
    dtype = e4m3_of(gpu)
    every = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    return exact_operands(rows, columns, depth, dtype, every[every.isfinite()])


def laid_out(matrix, depth_last):
    return matrix if depth_last else matrix.T.contiguous().T


CASES = [
    ("sm_89", (32, 32, 64), 4, "rows"),
    ("sm_89", (128, 64, 128), 8, "rows"),
    ("sm_90", (64, 64, 32), 4, "rows"),
    ("sm_90", (128, 64, 128), 8, "TMA"),
    ("sm_100", (128, 32, 64), 4, "rows"),
    ("sm_100", (128, 64, 128), 8, "TMA"),
    ("sm_100", (128, 64, 64), 4, "columns"),
    ("sm_120", (32, 64, 64), 4, "rows"),
    ("sm_120", (128, 64, 128), 8, "rows"),
    ("gfx942", (32, 64, 32), 4, "rows"),
    ("gfx942", (64, 64, 128), 8, "rows"),
    ("gfx942", (16, 16, 64), 1, "rows"),
    ("gfx950", (64, 32, 64), 4, "rows"),
    ("gfx950", (128, 64, 128), 8, "rows"),
    ("gfx950", (16, 16, 128), 1, "rows"),
]


def run(gpu, tile, warps, layout, scaled):
    rows, columns, block = tile
    depth = 2 * block
    x, w = (laid_out(one, layout != "columns") for one in operands(gpu, rows, columns, depth))
    generator = torch.Generator().manual_seed(1)
    scales = [random_scales(generator, n, depth // 32) for n in tile[:2]]
    scales[1][columns - 1, 1] = 255
    out = torch.empty(rows, columns)
    sources = [x, w]
    if layout == "TMA":
        sources = [TensorDescriptor.from_tensor(one, [len(one), block]) for one in (x, w)]
    args = (sources[0], scales[0], sources[1], scales[1], out, depth, *x.stride(), *w.stride(), columns)
    constants = {"SCALED": scaled, "TMA": layout == "TMA"}
    constants |= {f"BLOCK_{name}": size for name, size in zip("MNK", tile, strict=True)}
    names = []

    def keep(assembly):
        names.append(assembly)
        return assembly

    options = {"num_warps": warps, "num_stages": 2}
    options |= {"matrix_instr_nonkdim": 16} if layout == "small instructions" else {}
    run_launch(Launch(PRODUCTS, (1,), args, constants, options), GPUS[gpu], keep)
    left, right = x.double(), w.double()
    if scaled:
        left, right = (one * factors_of(bytes_) for one, bytes_ in zip((left, right), scales, strict=True))
    wanted = left @ right.T
    assert torch.equal(out.double().nan_to_num(1e9), wanted.nan_to_num(1e9))
    assert wanted.isnan().sum() == (columns + rows - 1 if scaled else columns)
    return names[0]


@pytest.mark.parametrize(("gpu", "tile", "warps", "layout"), CASES)
def test_products(gpu, tile, warps, layout):
    text = run(gpu, tile, warps, layout, scaled=False)
    native = {
        "sm_89": "mma.sync.aligned.m16n8k32.row.col.f32.e4m3",
        "sm_90": "k32.f32.e4m3.e4m3",
        "sm_100": "kind::f8f6f4",
        "sm_120": "mma.sync.aligned.m16n8k32.row.col.f32.e4m3",
        "gfx942": "_fp8_fp8",
        "gfx950": "_f8f6f4",
    }
    assert native[gpu] in text


SCALED_CASES = [
    ("sm_100", (128, 16, 128), 4, "rows"),
    ("sm_100", (128, 128, 128), 8, "TMA"),
    ("sm_100", (128, 64, 256), 4, "rows"),
    ("sm_120", (32, 64, 64), 4, "rows"),
    ("sm_120", (128, 64, 128), 8, "rows"),
    ("gfx950", (64, 32, 64), 4, "rows"),
    ("gfx950", (128, 128, 128), 4, "rows"),
    ("gfx950", (32, 32, 128), 4, "small instructions"),
]


@pytest.mark.parametrize(("gpu", "tile", "warps", "layout"), SCALED_CASES)
def test_products_with_scales(gpu, tile, warps, layout):
    """Each row, each column and each 32 of the depth has a scale of its own; one of them is NaN."""
    text = run(gpu, tile, warps, layout, scaled=True)
    assert {"sm_100": "block_scale", "sm_120": "block_scale", "gfx950": "v_mfma_scale_f32"}[gpu] in text
    assert layout != "small instructions" or "v_mfma_scale_f32_16x16x128" in text


@pytest.mark.parametrize("bits", [None, 14])
def test_short_sums_of_hopper(bits, monkeypatch):
    """4096 and 64 times 0.75: beside the larger number 14 bits have room for 0.5 of each."""
    monkeypatch.setattr(matrix_unit, "SHORT_SUMS", bits)
    x, w, out = torch.full((64, 128), 0.75), torch.ones(32, 128), torch.empty(64, 32)
    x[:, :64] = 64
    x, w = x.to(torch.float8_e4m3fn), w.to(torch.float8_e4m3fn)
    args = (x, None, w, None, out, 128, *x.stride(), *w.stride(), 32)
    constants = {"SCALED": False, "TMA": False, "BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 64}
    run_launch(Launch(PRODUCTS, (1,), args, constants, {"num_warps": 4, "num_stages": 2}), GPUS["sm_90"])
    assert (out == 4096 + 64 * (0.75 if bits is None else 0.5)).all()


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_conversions(gpu, dtype):
    """Every number of 8 bits, random ones, and what is too large; NaN stays NaN."""
    codes_of = e4m3_of(gpu)
    largest = torch.finfo(codes_of).max
    x = torch.randn(1024, generator=torch.Generator().manual_seed(2)).exp2().exp2()
    x[::2] *= -1
    x[:256] = torch.arange(256, dtype=torch.uint8).view(codes_of).float()
    x[256:260] = torch.tensor([1e30, -largest * 1.5, -0.0, 2e-3])
    x = x.to(dtype)
    codes, back = torch.empty(1024, dtype=codes_of), torch.empty(1024, dtype=dtype)
    run_launch(Launch(CONVERSIONS, (1,), (x, codes, back), {"SIZE": 1024}, {"num_warps": 4}), GPUS[gpu])
    wanted = x.float().clamp(-largest, largest).to(codes_of)
    assert torch.equal(codes.float().nan_to_num(1e9), wanted.float().nan_to_num(1e9))
    assert torch.equal(codes.float().signbit() & (codes.float() == 0), wanted.float().signbit() & (wanted.float() == 0))
    assert torch.equal(back.float().nan_to_num(1e9), wanted.float().nan_to_num(1e9))
