"""The arithmetic of kernels on numbers of the whole range: sigmoid, rounding, widening, zeros, pieces of a tile."""

import pytest
import torch
import triton
import triton.language as tl

from tritonmoe.ops.kernels import activations
from tritonmoe.ops.kernels.arithmetic import rounded, sigmoid_of, split_columns, widened, zeros
from tritonmoe.ops.kernels.launch import launch
from tritonmoe.ops.kernels.row_tiles import first_tile

SIZE = 1024


@triton.jit
def _sigmoid_kernel(x, out, SIZE: tl.constexpr):
    places = tl.arange(0, SIZE)
    tl.store(out + places, sigmoid_of(tl.load(x + places)))


@triton.jit
def _silu_kernel(gate, up, out, SIZE: tl.constexpr):
    places = tl.arange(0, SIZE)
    numbers = (0.0, 0.0, 0.0)
    found = activations.silu(tl.load(gate + places), tl.load(up + places), numbers, True)
    for part in tl.static_range(3):
        tl.store(out + part * SIZE + places, found[part])


@triton.jit
def _stored_dtype_kernel(x, out, wide, SIZE: tl.constexpr):
    places = tl.arange(0, SIZE)
    values = tl.load(x + places)
    tl.store(out + places, rounded(values, wide.dtype.element_ty))
    tl.store(out + SIZE + places, widened(tl.load(wide + places)))


@triton.jit(do_not_specialize=["count"])
def _zeros_kernel(out, count, FLATTEN: tl.constexpr):
    places = tl.arange(0, 16)[:, None] * 64 + tl.arange(0, 64)[None, :]
    tl.store(out + places, zeros(count, 16, 64, FLATTEN))


@triton.jit
def _split_kernel(tile, out, PARTS: tl.constexpr):
    rows, columns = tl.arange(0, 16)[:, None], tl.arange(0, 128)[None, :]
    pieces = split_columns(tl.load(tile + rows * 128 + columns), 16, 128, PARTS)
    WIDTH: tl.constexpr = 128 // PARTS
    for part in tl.static_range(PARTS):
        tl.store(out + part * 16 * WIDTH + rows * WIDTH + tl.arange(0, WIDTH)[None, :], pieces[part])


@triton.jit
def _first_tile_kernel(out):
    tl.store(out + first_tile(), tl.program_id(0))


def numbers_of_the_whole_range():
    """Return SIZE fp32 numbers: powers of two of both signs, denormal ones among them, and what lies around a limit."""
    powers = torch.tensor([2.0**exponent for exponent in range(-149, 128)], dtype=torch.float64)
    limits = torch.tensor([0.0, 1.0, 16.6, 17.4, 87.0, 87.33, 88.0, 88.7, 88.72, 88.8, 103.0, 104.0, 3.4028e38])
    special = torch.tensor([torch.inf, torch.nan])
    positive = torch.cat([powers.float(), limits, special])
    ordinary = torch.linspace(-30, 30, SIZE - 2 * len(positive))
    return torch.cat([positive, -positive, ordinary])


def test_sigmoid_over_the_whole_range():
    x = numbers_of_the_whole_range()
    found = torch.full_like(x, torch.nan)
    launch(_sigmoid_kernel, (1,), x, found, SIZE=SIZE)
    exact = x.double().sigmoid()
    assert torch.equal(found.isnan(), x.isnan())
    error = (found.double() - exact).abs()
    # The power of two has its argument's rounding; denormal results may be zero.
    allowed = 2e-7 * (1 + x.double().abs()) * exact + 2.0**-126
    assert (error[~x.isnan()] <= allowed.nan_to_num(2.0**-126)[~x.isnan()]).all()


def test_silu_is_as_right_as_pytorch():
    gate = numbers_of_the_whole_range()
    gate = gate[gate.isfinite() & (gate.abs() < 1e18)]
    gate = torch.cat([gate, torch.linspace(-3, 3, SIZE - len(gate))])
    up = torch.linspace(-2, 2, SIZE)
    found = torch.full((3, SIZE), torch.nan)
    launch(_silu_kernel, (1,), gate, up, found, SIZE=SIZE)

    def plain(dtype):
        operands = [tensor.to(dtype).requires_grad_() for tensor in (gate, up)]
        value = torch.nn.functional.silu(operands[0]) * operands[1]
        return torch.stack([value, *torch.autograd.grad(value.sum(), operands)]).detach()

    exact = plain(torch.float64)
    errors = [(values.double() - exact).abs() for values in (found, plain(torch.float32))]
    # Twice PyTorch's, and four units in the last place of the value or, where a slope is a difference, of one.
    allowed = 2 * errors[1] + 4 * torch.finfo(torch.float32).eps * exact.abs().clamp(min=1.0)
    assert (errors[0] <= allowed).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stored_dtypes_are_rounded_and_widened_as_pytorch_does(dtype):
    x = numbers_of_the_whole_range()
    halfway = torch.arange(1, 9, dtype=torch.float32) * torch.finfo(dtype).eps / 2 + 1  # to even
    x[-8:] = halfway
    found = torch.full((2, SIZE), 7.0)
    launch(_stored_dtype_kernel, (1,), x, found, x.to(dtype), SIZE=SIZE)
    expected = x.to(dtype).float()
    for values in found:  # the interpreter has no denormal numbers in bf16
        torch.testing.assert_close(values, expected, rtol=0, atol=2.0**-126, equal_nan=True)


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("count", [0, 1, 2**31 - 1])
def test_zeros_of_any_count(flatten, count):
    found = torch.full((16, 64), torch.nan)
    launch(_zeros_kernel, (1,), found, count, FLATTEN=flatten)
    assert torch.equal(found, torch.zeros(16, 64))


@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_columns_are_split_from_left_to_right(parts):
    tile = torch.arange(16 * 128, dtype=torch.float32).view(16, 128)
    found = torch.full((parts, 16, 128 // parts), torch.nan)
    launch(_split_kernel, (1,), tile, found, PARTS=parts)
    assert torch.equal(found, tile.view(16, parts, -1).transpose(0, 1))


@pytest.mark.parametrize("num_programs", [1, 7, 8, 21])
def test_every_tile_is_the_first_of_one_program(num_programs):
    found = torch.full((num_programs,), -1, dtype=torch.int32)
    launch(_first_tile_kernel, (num_programs,), found)
    assert found.sort().values.tolist() == list(range(num_programs))
