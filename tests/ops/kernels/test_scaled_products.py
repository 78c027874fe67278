"""Kernels that multiply codes and scales, product by product, against fp64 of the same operands."""

from itertools import pairwise

import pytest
import torch
from kernel_cases import LAYOUTS, Layer, random_ids
from uninitialised import nan_filled_memory

from tritonmoe.config.layer import ExpertLayout, KernelOptions
from tritonmoe.config.precision import BLOCKS, ExpertPrecision, rounded_rows, rounded_weight
from tritonmoe.ops.backends.encoded import EncodedOperations
from tritonmoe.ops.kernels.tiles import measured_tiles

SIZES = [(51, 70), *(pytest.param(sizes, marks=pytest.mark.thorough) for sizes in ((160, 96), (256, 129)))]
"""D and F: ending inside a block, and of odd lengths."""


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
    """Return the sums of `down` and `up_grad` in fp32, and those of fp64, of rounded operands.

    The kernels store sums as the addend's dtype says: here they are asked for in fp32.
    """
    ops = EncodedOperations(precision)
    grouping = ops.group(layer.ids, layer.num_experts)
    num_pairs, offsets = grouping.num_pairs, grouping.host_expert_offsets
    a, dh = layer.draw(num_pairs, layer.intermediate), layer.draw(num_pairs, layer.width)
    a[offsets[-1] :], dh[offsets[-1] :] = torch.nan, torch.nan
    found, exact = [], []
    for name, rows, projection, depth in (("down", a, layer.down, 2), ("up_grad", dh, layer.gate_up, 1)):
        depth = 3 - depth if layer.layout.transposed else depth
        weight = rounded_weight(projection.weight, precision, depth).double()
        weight = weight if depth == 1 else weight.mT
        out = torch.full((num_pairs, weight.shape[2]), torch.nan, device=rows.device)
        of_codes = ops.projection(projection._replace(bias=None), "both")
        found.append(getattr(ops, name)(rows, of_codes, grouping, out=out, options=options)[: offsets[-1]])
        values = rounded_rows(rows, precision).double()
        parts = [values[first:end] @ weight[e] for e, (first, end) in enumerate(pairwise(offsets))]
        exact.append(torch.cat(parts))
    return list(zip(found, exact, strict=True))


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


@pytest.mark.thorough
@pytest.mark.parametrize("name", BLOCKS)
def test_scales_are_as_different_as_they_can_be(name):
    """Neighbouring blocks have sizes that are far apart, along the rows, along the depth and along the columns."""
    precision = ExpertPrecision(name)
    layer = layer_of(20, (300, 140), bias=False)
    for weight in (layer.w1, layer.w2):
        sizes = torch.randint(-20, 21, (5, -(-weight.shape[1] // 32), -(-weight.shape[2] // 32)))
        sizes = sizes.repeat_interleave(32, 1).repeat_interleave(32, 2)[:, : weight.shape[1], : weight.shape[2]]
        weight *= 2.0**sizes
    for value, exact in fp32_sums(layer, precision):
        assert decibels(value, exact) >= 100


@pytest.mark.thorough
@pytest.mark.parametrize("tile", [{"block_k": 128}, {"block_k": 32, "block_m": 16}, {"tma": False}], ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_other_tiles(name, tile):
    layer, precision = layer_of(20, (160, 96)), ExpertPrecision(name)
    with measured_tiles.asked() as asked:
        fp32_sums(layer, precision)
    assert len(asked) == 2
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
