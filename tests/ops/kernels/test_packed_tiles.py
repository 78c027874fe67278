"""Packed weights, decoded where a product loads them: the bits are those of a plain weight with the same values."""

import math

import pytest
import torch
from kernel_cases import DEVICE, GPT_OSS, LAYOUTS, Layer, random_ids
from packed_weights import PackedCase
from same_bits import assert_same_bits
from uninitialised import nan_filled_memory

from tritonmoe.config import formats
from tritonmoe.config.formats import FORMATS, LARGEST_MXFP4_SCALE
from tritonmoe.config.layer import ExpertLayout, KernelOptions, Projection
from tritonmoe.ops import backends
from tritonmoe.ops.backends import reference
from tritonmoe.ops.backends import torch as torch_backend
from tritonmoe.ops.backends import triton as kernels
from tritonmoe.ops.backends.decoding import DECODERS, decoded
from tritonmoe.ops.kernels import packed_tiles
from tritonmoe.ops.kernels.tiles import measured_tiles
from tritonmoe.ops.kernels.tiles.config import TileConfig

SIZES = {"mxfp4": (96, 32), "fp8": (40, 128), "nf4": (96, 32)}
"""D and F: depths and widths that end inside a tile."""


def packed_layer(weight_format, layout="concatenated", *, num_rows=33, sizes=None, formats=None, **others):
    """Return a layer with an empty expert, a hot one and skipped pairs."""
    ids = random_ids(num_rows, 2, 4)
    ids[: num_rows // 3 + 1, 0] = 1
    hidden, intermediate = sizes or SIZES[weight_format]
    formats = formats or (weight_format, weight_format)
    layer = Layer(ids, 5, LAYOUTS[layout], torch.bfloat16, hidden=hidden, intermediate=intermediate, **others)
    return layer.packed(formats)


def products(layer, given, activation="silu", options=KernelOptions()):
    """Return the results of the four products; given: what `down` and `up_grad` multiply."""
    a, dh = given
    with nan_filled_memory():
        grouping = kernels.group(layer.ids, layer.num_experts)
        addends = {name: addend[: grouping.num_pairs].clone() for name, addend in layer.addends.items()}
        up, down = layer.gate_up, layer.down
        h, activated = kernels.up(layer.x, up._replace(addend=addends.get("h")), grouping, activation, options=options)
        found = {"h": h, "a": activated}
        found["y"] = kernels.down(a, down._replace(addend=addends.get("y")), grouping, options=options)
        hidden = a if activation is None else dh
        down = down._replace(addend=addends.get("g"))
        results = kernels.down_grad(layer.dout, down, hidden, layer.weights, grouping, activation, options=options)
        found |= dict(zip(("dh", "s*a", "dweights"), results, strict=True))
        up = up._replace(addend=addends.get("dx"))
        found["dx"] = kernels.up_grad(dh, up, grouping, options=options)
    num_active = int(grouping.expert_offsets[-1])
    return {name: value[:num_active] for name, value in found.items() if value is not None}


def given_rows(layer):
    num_pairs = layer.ids.numel()
    return layer.draw(num_pairs, layer.intermediate), layer.draw(num_pairs, layer.width)


def check(layer, activation="silu", options=KernelOptions()):
    given = given_rows(layer)
    packed, plain = (products(one, given, activation, options) for one in (layer, layer.decoded()))
    assert all(torch.isfinite(value).all() and value.any() for value in packed.values())
    assert_same_bits(packed, plain)


EACH_PAIR = [
    pytest.param(
        *(weight_format, layout, (1, 33, 150)[(first + second) % 3]),
        marks=() if second < 3 and (first + second) % 3 == 1 else pytest.mark.thorough,
    )
    for first, weight_format in enumerate(FORMATS)
    for second, layout in enumerate(LAYOUTS)
]
"""Formats, layouts and numbers of rows: every two of them meet once; in the first tier, each format has one layout."""


@pytest.mark.parametrize(("weight_format", "layout", "num_rows"), EACH_PAIR)
def test_bits_are_those_of_decoded_weights(weight_format, layout, num_rows):
    check(packed_layer(weight_format, layout, num_rows=num_rows), "relu2" if "ungated" in layout else "silu")


@pytest.mark.sweep(1)
@pytest.mark.parametrize("layout", ["interleaved", "transposed"])
@pytest.mark.parametrize(
    "weight_format", [pytest.param(one, marks=pytest.mark.thorough if one == "fp8" else ()) for one in FORMATS]
)
def test_addends_and_no_activation(weight_format, layout):
    check(packed_layer(weight_format, layout, num_rows=20).with_addends(), None if layout == "transposed" else GPT_OSS)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("weight_format", "layout"), [("mxfp4", "transposed"), ("nf4", "transposed"), ("fp8", "interleaved-transposed")]
)
def test_tiles_of_bytes_as_large_as_those_of_h(weight_format, layout):
    """Loaded with two axes, as h is, they would be laid out alike: dweights would be summed in another order."""
    layer = packed_layer(weight_format, layout, num_rows=9, sizes=(128, 128))
    check(layer, options=KernelOptions(batch_invariant=True))


@pytest.mark.thorough
@pytest.mark.parametrize(("weight_format", "save"), [*((one, "hidden") for one in FORMATS), ("nf4", "input")])
def test_layers_with_adapters(weight_format, save, monkeypatch):
    """The result, and the gradients of x, of the routing and of both factors; an expert is hot, another one empty."""
    monkeypatch.setattr(backends, "choose", lambda *_, **__: kernels)
    case = PackedCase(weight_format, 11, 5, rank=3, hidden=96, bias=save == "input", hot=True)
    assert not (case.topk_ids() == 4).any()
    results = [case.run(decoded=decoded, backend="triton", save=save) for decoded in (False, True)]
    assert {"y", "x", "topk_weights", "gate_up_a", "gate_up_b", "down_a", "down_b"} <= results[0].keys()
    assert all(torch.isfinite(value).all() and value.any() for value in results[0].values())
    assert_same_bits(*results)


@pytest.mark.parametrize(
    "formats",
    [pytest.param(of, marks=pytest.mark.thorough) for of in (("mxfp4", None), ("fp8", "mxfp4"))],
    ids=str,
)
def test_weights_of_two_formats(formats):
    check(packed_layer(None, sizes=(64, 128), formats=formats, num_rows=9))


@pytest.mark.thorough
def test_tiles_of_fp8_that_the_weight_ends_in():
    check(packed_layer("fp8", "transposed", sizes=(130, 128), num_rows=9))


@pytest.mark.parametrize(
    ("layout", "sizes", "formats"),
    [
        ("concatenated", (32, 6), ("nf4", "nf4")),
        pytest.param("transposed", (40, 24), ("nf4", "nf4"), marks=pytest.mark.thorough),
        ("transposed", (64, 5), ("nf4", None)),
        pytest.param("interleaved-transposed", (192, 33), ("nf4", None), marks=pytest.mark.thorough),
        ("ungated-transposed", (40, 24), ("nf4", "nf4")),
    ],
    ids=str,
)
def test_blocks_of_nf4_that_begin_inside_a_row(layout, sizes, formats):
    """An odd F of halves side by side shares a byte between them."""
    activation = "relu2" if "ungated" in layout else "silu"
    check(packed_layer("nf4", layout, sizes=sizes, formats=formats, num_rows=20), activation)


@pytest.mark.sweep(1)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("weight_format", FORMATS)
def test_every_code_and_scale(weight_format, transposed):
    """Rows with a single one give the weight's own values, those of the smallest and the largest scales among them."""
    num_experts, rows, columns = {"mxfp4": (4, 32, 64), "fp8": (1, 136, 256), "nf4": (2, 64, 64)}[weight_format]
    values, scales = FORMATS[weight_format].empty((num_experts, rows, columns), "cpu")
    codes = torch.arange(values.numel()).view(values.shape)
    codes = (codes + codes // 256 if weight_format != "mxfp4" else codes * 9 + codes // 16) % 256
    if weight_format == "fp8":
        codes = codes.where(codes & 127 != 127, 1)
    if weight_format == "mxfp4":
        scales.copy_((torch.arange(scales.numel()) % (LARGEST_MXFP4_SCALE + 1)).view(scales.shape))
    else:
        limit = FORMATS[weight_format].largest_scale
        scales.copy_(torch.logspace(-38, math.log10(limit), scales.numel()).clamp(max=limit).view(scales.shape))
        scales.view(-1)[-1] = limit
    values.view(torch.uint8).copy_(codes)
    values, scales = values.to(DEVICE), scales.to(DEVICE)
    layout, plain = ExpertLayout(gated=False, transposed=transposed), decoded(values, scales)
    depth = rows if transposed else columns
    ids = torch.arange(num_experts, device=DEVICE).repeat_interleave(depth).view(-1, 1)
    ones = torch.eye(depth, dtype=torch.bfloat16, device=DEVICE).repeat(num_experts, 1)
    grouping = kernels.group(ids, num_experts)
    found = kernels.down(ones, Projection(values, None, layout, scales=scales), grouping)
    expected = plain if transposed else plain.mT
    assert len(plain.unique()) > (15 if weight_format == "nf4" else 100)
    assert torch.equal(found.view(num_experts, depth, -1), expected)  # of a product zeros have no sign


@pytest.mark.thorough
@pytest.mark.parametrize("weight_format", FORMATS)
def test_a_part_of_the_experts_and_other_strides(weight_format):
    layer = packed_layer(weight_format, bias=False, num_rows=9)
    for name in ("w1", "w2"):
        values = getattr(layer, name)
        wide = values.new_empty(values.shape[0], values.shape[1] + 1, 2 * values.shape[2])
        wide[:, 1:, ::2] = values
        setattr(layer, name, wide[:, 1:, ::2])
        scales = getattr(layer, f"{name}_scales")
        setattr(layer, f"{name}_scales", torch.cat([scales, scales])[: len(scales)].mT.contiguous().mT)
    check(layer)
    part = slice(1, 4)
    ids = torch.where((layer.ids >= 1) & (layer.ids < 4), layer.ids - 1, -1)
    grouping = kernels.group(ids, 3)
    a = layer.draw(grouping.num_pairs, layer.intermediate)
    results = []
    for one in (layer, layer.decoded()):
        scales = None if one.w2_scales is None else one.w2_scales[part]
        results.append(kernels.down(a, Projection(one.w2[part], None, one.layout, scales=scales), grouping))
    num_active = int(grouping.expert_offsets[-1])
    assert_same_bits(results[0][:num_active], results[1][:num_active])


def test_an_entry_for_plain_weights_is_not_taken_for_packed_ones():
    layer = packed_layer("mxfp4", sizes=(64, 64), num_rows=9)
    with measured_tiles.asked() as asked:
        products(layer, given_rows(layer))
    assert {tuple(key.split()[2:4]) for key in asked} == {(name, "mxfp4") for name in ("up", "down", "down_grad")}
    for config in asked.values():
        name, way = config.reads[-1]
        assert name == "weight"
        assert way.startswith("pointers: ")  # it is packed, or the GPU has no TMA


@pytest.mark.thorough
def test_no_row_depends_on_its_neighbours():
    layer, options = packed_layer("nf4", num_rows=40), KernelOptions(batch_invariant=True)
    check(layer, options=options)
    whole, _ = kernels.up(layer.x, layer.gate_up, kernels.group(layer.ids, 5), "silu", options=options)
    few = kernels.group(layer.ids[:3], 5)
    alone, _ = kernels.up(layer.x[:3], layer.gate_up, few, "silu", options=options)
    inverse = kernels.group(layer.ids, 5).inverse[:3]
    is_active = inverse >= 0
    assert_same_bits(alone[few.inverse[is_active].long()], whole[inverse[is_active].long()])


def test_the_group_of_one_scale_is_whole_everywhere():
    """A group divides a tile, a block, a row of values and, where halves lie side by side, each half."""
    stored = packed_tiles.stored_weight(packed_layer("nf4", "transposed", sizes=(64, 24)).gate_up)
    config = TileConfig(32, 32, 16, 4, 1)
    assert stored.decoding(1, config, 24, 16) == (packed_tiles.nf4, 8, 2)
    assert stored.decoding(1, config, 5, 16) == (packed_tiles.nf4, 1, 1)
    assert stored.decoding(1, config) == stored.decoding(2, config) == (packed_tiles.nf4, 16, 2)


def test_every_format_is_decoded_everywhere(monkeypatch):
    """One that is forgotten in a table is refused by all that read the table, and never decoded as another."""
    assert FORMATS.keys() == DECODERS.keys() == packed_tiles.KERNEL_FUNCTIONS.keys()
    layer = packed_layer("nf4", num_rows=3)
    a, _ = given_rows(layer)
    monkeypatch.delitem(packed_tiles.KERNEL_FUNCTIONS, "nf4")
    with pytest.raises(KeyError, match="nf4"):
        kernels.down(a, layer.down, kernels.group(layer.ids, layer.num_experts))
    monkeypatch.delitem(DECODERS, "nf4")
    with pytest.raises(KeyError, match="nf4"):
        torch_backend.down(a, layer.down, torch_backend.group(layer.ids, layer.num_experts))
    monkeypatch.delitem(formats._BY_DTYPES, (torch.uint8, torch.float32))
    with pytest.raises(TypeError, match="a packed weight has values and scales of"):
        reference.down(a, layer.down, reference.group(layer.ids, layer.num_experts))
