"""Kernels that multiply codes and scales, product by product, against fp64 of the same operands."""

from itertools import pairwise

import pytest
import torch
from kernel_cases import DEVICE, LAYOUTS, Layer, random_ids
from uninitialised import nan_filled_memory

from tritonmoe.config.layer import ExpertLayout, KernelOptions
from tritonmoe.config.precision import BLOCKS, ExpertPrecision, rounded_rows
from tritonmoe.ops.backends.encoded import EncodedOperations
from tritonmoe.ops.backends.rounded import rounded_weight
from tritonmoe.ops.kernels.launch import gpu_of
from tritonmoe.ops.kernels.tiles import measured_tiles

SIZES = [(51, 40), *(pytest.param(sizes, marks=pytest.mark.thorough) for sizes in ((160, 96), (256, 129)))]
"""D and F: ending inside a block, and of odd lengths."""


@pytest.fixture(autouse=True)
def instruction(request):
    """Skip where a GPU, or a virtual one, has no instruction for the format."""
    gpu = gpu_of(torch.device(DEVICE))
    if request.node.callspec.params["name"] not in gpu.precisions:
        pytest.skip(f"{gpu.name} has no such instruction")


def decibels(value, exact):
    noise = (value.double() - exact).square().sum()
    return float(10 * torch.log10(exact.square().sum() / noise)) if noise else float("inf")


def layer_of(num_rows, sizes, layout="concatenated", **others):
    """Return a layer with an empty expert, a hot one and skipped pairs, whose rows are rounded."""
    ids = random_ids(num_rows, 2, 4)
    ids[: num_rows // 3 + 1, 0] = 1
    hidden, intermediate = sizes
    return Layer(ids, 5, LAYOUTS[layout], torch.bfloat16, hidden=hidden, intermediate=intermediate, **others)


def fp32_sums(layer, precision, options=KernelOptions()):
    """Return the sums of all four products, stored in fp32, and those of fp64, of rounded operands."""
    ops, offsets_of = EncodedOperations(precision), (1, 2) if layer.layout.transposed else (2, 1)
    grouping = ops.group(layer.ids, layer.num_experts)
    offsets = grouping.host_expert_offsets
    num_pairs, num_active = grouping.num_pairs, offsets[-1]
    a, dh = layer.draw(num_pairs, layer.intermediate), layer.draw(num_pairs, layer.width)
    a[num_active:], dh[num_active:] = torch.nan, torch.nan
    of_pairs = grouping.row_index[:num_active].long()
    up, down = (ops.projection(of._replace(bias=None), "both") for of in (layer.gate_up, layer.down))

    def out(columns):
        return torch.full((num_pairs, columns), torch.nan, device=a.device)

    h, _ = ops.up(layer.x, up, grouping, None, out_h=out(layer.width), options=options)
    y = ops.down(a, down, grouping, out=out(layer.hidden), options=options)
    outs, ones = (out(layer.intermediate), out(layer.intermediate)), torch.ones_like(layer.weights)
    g, _, _ = ops.down_grad(layer.dout, down, a, ones, grouping, None, out=outs, options=options)
    dx = ops.up_grad(dh, up, grouping, out=out(layer.hidden), options=options)
    inward, outward = offsets_of
    products = (
        (h, layer.x[of_pairs], layer.w1, inward),
        (y, a[:num_active], layer.w2, inward),
        (g, layer.dout[of_pairs], layer.w2, outward),
        (dx, dh[:num_active], layer.w1, outward),
    )
    pairs = []
    for found, rows, weight, depth in products:
        exact_weight = rounded_weight(weight, precision, depth).double()
        exact_weight = exact_weight if depth == 1 else exact_weight.mT
        values = rounded_rows(rows, precision).double()
        parts = [values[first:end] @ exact_weight[e] for e, (first, end) in enumerate(pairwise(offsets))]
        pairs.append((found[:num_active], torch.cat(parts)))
    return pairs


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_sums(name, sizes):
    with nan_filled_memory():
        for value, exact in fp32_sums(layer_of(40, sizes), ExpertPrecision(name)):
            assert decibels(value, exact) >= 100


@pytest.mark.thorough
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "concatenated"])
@pytest.mark.parametrize("name", BLOCKS)
def test_sums_of_other_layouts(name, layout):
    for value, exact in fp32_sums(layer_of(20, (51, 70), layout), ExpertPrecision(name)):
        assert decibels(value, exact) >= 100


@pytest.mark.parametrize("name", ["fp8_block", pytest.param("mxfp8", marks=pytest.mark.thorough)])
def test_scales_are_as_different_as_they_can_be(name):
    """Neighbouring blocks have sizes that are far apart, along the rows, along the depth and along the columns."""
    precision = ExpertPrecision(name)
    layer = layer_of(20, (160, 140), bias=False)
    for weight in (layer.w1, layer.w2):
        sizes = torch.randint(-20, 21, (5, -(-weight.shape[1] // 32), -(-weight.shape[2] // 32)))
        sizes = sizes.repeat_interleave(32, 1).repeat_interleave(32, 2)[:, : weight.shape[1], : weight.shape[2]]
        weight *= (2.0**sizes).to(weight)
    for value, exact in fp32_sums(layer, precision):
        assert decibels(value, exact) >= 100


@pytest.mark.thorough
@pytest.mark.parametrize("tile", [{"block_k": 128}, {"block_k": 32, "block_m": 16}, {"tma": False}], ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_other_tiles(name, tile):
    layer, precision = layer_of(20, (160, 96)), ExpertPrecision(name)
    with measured_tiles.asked() as asked:
        fp32_sums(layer, precision)
    assert len(asked) == 4
    assert all(name in key and "float8_e4m3fn" in key for key in asked)
    with measured_tiles.using(dict.fromkeys(asked, tile)):
        for value, exact in fp32_sums(layer, precision):
            assert decibels(value, exact) >= 100


@pytest.mark.parametrize("name", BLOCKS)
def test_what_is_not_finite_stays_in_its_row(name):
    precision = ExpertPrecision(name)
    ops = EncodedOperations(precision)
    layer = Layer(torch.tensor([[0], [0], [1]]), 2, ExpertLayout(), torch.bfloat16, hidden=150, intermediate=40)
    grouping = ops.group(layer.ids, 2)
    layer.x[1, 140] = torch.inf
    h, _ = ops.up(layer.x, ops.projection(layer.gate_up, "forward"), grouping, "silu")
    assert h.isnan().all(1).tolist() == [False, True, False]
    assert h[[0, 2]].isfinite().all()
