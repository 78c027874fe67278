"""Kernels that make codes and scales, against the pure functions of config/precision.py: equal bytes."""

import pytest
import torch
from kernel_cases import DEVICE, random_ids
from uninitialised import nan_filled_memory

from tritonmoe.config import precision as grid
from tritonmoe.config.precision import ExpertPrecision
from tritonmoe.ops.backends import triton as kernels
from tritonmoe.ops.grouping import RowSources
from tritonmoe.ops.kernels.encode import encode_rows, encode_weight, round_rows
from tritonmoe.ops.kernels.launch import gpu_of

FORMATS = tuple(grid.BLOCKS)


@pytest.fixture(autouse=True)
def instruction():
    """Skip where a GPU, or a virtual one, has no instruction for codes."""
    gpu = gpu_of(torch.device(DEVICE))
    if not gpu.precisions:
        pytest.skip(f"{gpu.name} has no such instruction")


def numbers(*shape, seed=0):
    """Return bf16 numbers of all sizes, with blocks of zeros, and some with infinities, NaN and the largest numbers."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(-(2**15), 2**15, shape, generator=generator, dtype=torch.int16)
    exponent = torch.randint(0, 250, (*shape[:-1], 1), generator=generator)
    sizes = (exponent - torch.randint(0, 12, shape, generator=generator)).clamp(0, 254) << 7
    values = (bits & -32641) | sizes.to(torch.int16)  # sign and mantissa of one, the exponent of the other
    values[..., ::7, :] = bits[..., ::7, :]
    values[..., 3::11, :] = 0
    values[..., 3::22, ::5] = -(2**15)
    return values.view(torch.bfloat16).to(DEVICE)


def same_bytes(found, codes, scales):
    depth, of_depth = codes.shape[-1], scales.shape[-1]
    assert torch.equal(found.codes[..., :depth].view(torch.uint8), codes.view(torch.uint8))
    assert not found.codes[..., depth:].view(torch.uint8).any()
    assert torch.equal(found.scales[..., :of_depth], scales)
    assert not found.scales[..., of_depth:].any()


@pytest.mark.parametrize("name", FORMATS)
def test_rows(name):
    precision = ExpertPrecision(name)
    rows = numbers(51, 300)
    same_bytes(encode_rows(rows, precision), *grid.encode(rows, (1, precision.block)))
    assert torch.equal(round_rows(rows, precision).nan_to_num(9.0), grid.rounded_rows(rows, precision).nan_to_num(9.0))
    columns = numbers(130, 20).T
    same_bytes(encode_rows(columns, precision), *grid.encode(columns, (1, precision.block)))
    for empty in (rows[:0], rows[:0, :64]):
        assert encode_rows(empty, precision).codes.numel() == round_rows(empty, precision).numel() == 0


@pytest.mark.parametrize("name", ["mxfp8", pytest.param("fp8_block", marks=pytest.mark.thorough)])
def test_every_number(name):
    """Each of the 65,536 numbers among its neighbours, among others of a few sizes, and alone in its block."""
    precision = ExpertPrecision(name)
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    neighbours, mixed = every.view(128, 512), every.view(-1, 128).roll(64, 0).T.contiguous().view(512, 128)
    alone = every.new_zeros(2**15, 32)
    alone[:, 5], alone[:, 6] = every[: 2**15], every[2**15 :]
    for rows in (neighbours, mixed, alone.view(256, -1)):
        rows = rows.to(DEVICE)
        same_bytes(encode_rows(rows, precision), *grid.encode(rows, (1, precision.block)))
        wanted = grid.rounded_rows(rows, precision)
        assert torch.equal(round_rows(rows, precision).nan_to_num(9.0), wanted.nan_to_num(9.0))


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("name", FORMATS)
def test_weights(name, depth):
    precision = ExpertPrecision(name)
    weight = numbers(2, 140, 150)
    found = encode_weight(weight, precision, depth)
    for e, matrix in enumerate(weight if depth == 2 else weight.mT):
        codes, scales = grid.encode(matrix, (precision.block_rows, precision.block))
        same_bytes(grid.Encoded(found.codes[e], found.scales[e]), codes, scales)


def test_rows_of_a_chunk():
    precision = ExpertPrecision("mxfp8")
    rows = numbers(33, 40)
    with nan_filled_memory():
        found = encode_rows(rows, precision, (5, 29))
    codes, scales = grid.encode(rows, (1, 32))
    used = slice(5, 29)
    same_bytes(grid.Encoded(found.codes[used], found.scales[used]), codes[used], scales[used])
    assert (found.scales[[*range(5), *range(29, 33)]] == found.scales[0, 0]).all()  # nobody has written there
    chunks = kernels.group(
        random_ids(33, 2, 4),
        4,
        chunk_row_offsets=(0, 5, 33),
        chunk_pair_offsets=(0, 10, 66),
        row_sources=RowSources((0,), torch.tensor([[5], [28]])),
    )
    assert [chunks.chunk(c).gathered_rows for c in range(2)] == [(0, 5), (5, 33)]
    assert chunks.chunk(1).by_pair.gathered_rows is None
