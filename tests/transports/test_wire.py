"""Wire formats: what arrives, how many bytes it took, and that nothing non-finite is lost."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tritonmoe.config.overlap import OverlapConfig
from tritonmoe.config.precision import ExpertPrecision, rounded_rows
from tritonmoe.transports.wire import BLOCK_COLUMNS, LARGEST_FINITE, WireFormat

FP8 = torch.float8_e4m3fn


def over_the_wire(rows: torch.Tensor, wire_dtype: torch.dtype | None) -> torch.Tensor:
    """Encode, check the bytes, decode into memory that was NaN."""
    wire = WireFormat(rows.dtype, wire_dtype)
    sent = wire.encode(rows)
    received = wire.empty(*rows.shape, rows.device)
    assert received.shape == sent.shape
    assert received.dtype == sent.dtype
    assert sent.numel() * sent.itemsize == rows.shape[0] * wire.row_bytes(rows.shape[1])
    received.copy_(sent)
    out = torch.full_like(rows, torch.nan)
    wire.decode(received, out)
    return out


@pytest.mark.parametrize("form", ["fp8_block", "mxfp8"])
@pytest.mark.parametrize("shape", [(0, 5), (3, 1), (7, 300), (5, 256)])
def test_rows_in_a_precision_keep_their_bits(form, shape):
    precision = ExpertPrecision(form)
    rows = rounded_rows(torch.randn(shape).exp().bfloat16(), precision)
    rows[:1, :1] = torch.nan
    rows = rounded_rows(rows, precision)
    wire = WireFormat(torch.bfloat16, None, precision)
    sent = wire.encode(rows)
    assert sent.dtype == torch.uint8
    assert sent.shape == wire.empty(*shape, rows.device).shape == (shape[0], wire.row_bytes(shape[1]))
    out = torch.full_like(rows, 1.0)
    wire.decode(sent, out)
    assert torch.equal(out.isnan(), rows.isnan())
    assert torch.equal(out.nan_to_num(), rows.nan_to_num())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_rows_as_they_are_keep_their_bits(dtype):
    rows = torch.randn(5, 7, dtype=dtype)
    assert torch.equal(over_the_wire(rows, None), rows)


def test_bf16_rounds_fp32_once():
    rows = torch.randn(9, 33)
    assert torch.equal(over_the_wire(rows, torch.bfloat16), rows.to(torch.bfloat16).float())


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    num_rows=st.integers(0, 5),
    width=st.sampled_from([1, 2, 127, 128, 129, 300, 512]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    magnitude=st.sampled_from([1e-4, 1.0, 1e4]),
    seed=st.integers(0, 99),
)
def test_fp8_is_within_half_a_step_of_every_value(num_rows, width, dtype, magnitude, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = (torch.randn(num_rows, width, generator=generator) * magnitude).to(dtype)
    arrived = over_the_wire(rows, FP8).double()
    for first in range(0, width, BLOCK_COLUMNS):
        block, got = rows[:, first : first + BLOCK_COLUMNS].double(), arrived[:, first : first + BLOCK_COLUMNS]
        largest = block.abs().amax(1, keepdim=True) if num_rows else block.new_zeros(0, 1)
        # e4m3: 3 fraction bits, and steps of 2^-9 below 2^-6; then one rounding to the rows' own dtype.
        step = torch.maximum(block.abs() * 2.0**-4, largest / LARGEST_FINITE * 2.0**-10)
        eps, smallest = torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal
        assert ((got - block).abs() <= step + eps * (block.abs() + smallest)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wire_dtype", [torch.bfloat16, FP8])
def test_nan_and_infinities_arrive_as_they_were(dtype, wire_dtype):
    if wire_dtype == torch.bfloat16 and dtype != torch.float32:
        dtype = torch.float32
    rows = torch.ones(3, 200, dtype=dtype)
    rows[0, 3], rows[0, 199], rows[1, 0], rows[1, 1], rows[2] = torch.nan, torch.inf, -torch.inf, -1e-3, torch.inf
    arrived = over_the_wire(rows, wire_dtype)
    assert torch.equal(arrived.isnan(), rows.isnan())
    assert torch.equal(arrived == torch.inf, rows == torch.inf)
    assert torch.equal(arrived == -torch.inf, rows == -torch.inf)
    assert (arrived[0, :3] == 1).all()


def test_the_largest_values_of_each_dtype_stay_finite():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        rows = torch.tensor([[torch.finfo(dtype).max, 1.0], [torch.finfo(dtype).min, 0.0]], dtype=dtype)
        arrived = over_the_wire(rows, FP8)
        assert arrived.isfinite().all()
        assert torch.allclose(arrived[:, 0].double(), rows[:, 0].double(), rtol=0.04)


def test_zeros_stay_zeros_and_keep_their_blocks_apart():
    rows = torch.zeros(2, 256)
    rows[0, 130] = 1e-6  # its block has a scale of its own
    arrived = over_the_wire(rows, FP8)
    assert (arrived[:, :128] == 0).all()
    assert arrived[0, 130].item() == pytest.approx(1e-6, rel=0.04)


def test_an_example_of_bytes():
    assert WireFormat(torch.float32, FP8).row_bytes(300) == 312
    assert WireFormat(torch.float32, torch.bfloat16).row_bytes(300) == 600
    assert WireFormat(torch.bfloat16).row_bytes(300) == 600


def test_formats_that_do_not_fit_are_refused():
    with pytest.raises(TypeError, match=r"can carry rows of torch.float32, got torch.bfloat16"):
        WireFormat(torch.bfloat16, torch.bfloat16)
    with pytest.raises(TypeError, match=r"got torch\.float64"):
        WireFormat(torch.float64, FP8)
    with pytest.raises(ValueError, match="wire_dtype must be one of"):
        OverlapConfig(wire_dtype=torch.int8)


def test_what_rounding_did_is_counted():
    rows = torch.ones(2, 4)
    rows[0] = torch.tensor([1000, 1e-3, 0, 3e38])
    wire = WireFormat(torch.float32, torch.bfloat16)
    assert wire.rounding_sums(rows, wire.encode(rows))[2:].tolist() == [0, 0, 8]
    rows[0, 3] = 3.4e38  # bf16 rounds it up
    assert wire.rounding_sums(rows, wire.encode(rows))[2:].tolist() == [0, 1, 8]
    wire = WireFormat(torch.float32, FP8)
    rows[0, 3] = 1
    assert wire.rounding_sums(rows, wire.encode(rows))[2:].tolist() == [1, 0, 8]


def test_the_error_is_of_what_stayed_finite():
    rows = torch.tensor([[1e25, -1e25, 3.4e38, torch.nan, 1.0]])
    wire = WireFormat(torch.float32, torch.bfloat16)
    changed, total, *others = wire.rounding_sums(rows, wire.encode(rows)).tolist()
    assert total == pytest.approx(2e50)
    assert 0 < (changed / total) ** 0.5 < 2**-8
    assert others == [0, 1, 5]
