"""Tiles read by TMA: the bits of pointers, and pointers, with the reason, where TMA can't read a layout."""

import contextlib

import pytest
import torch
from kernel_cases import DEVICE, LAYOUTS, SOME_LAYOUTS, Layer, random_ids
from tolerance import assert_close_to_exact
from triton import __version__ as triton_version
from triton.tools.tensor_descriptor import TensorDescriptor
from uninitialised import nan_filled_memory

from tritonmoe.ops import aot
from tritonmoe.ops.backends import reference
from tritonmoe.ops.backends import triton as kernels
from tritonmoe.ops.kernels import launch
from tritonmoe.ops.kernels.tiles import measured_tiles, tile_choice, tma
from tritonmoe.tools.cli import main

pytestmark = pytest.mark.usefixtures("reads_by_tma")
OFF = "switched off by a test"
WEIGHT, BOTH = {"weight": tma.BY_TMA}, {"values": tma.BY_TMA, "weight": tma.BY_TMA}
ALL = BOTH | {"out": tma.BY_TMA}
BY_TMA = [WEIGHT, ALL, WEIGHT, ALL]
"""How up, down, down_grad and up_grad read their operands where they can, and store their result."""
TWO_PIECES = "pointers: a tile's gate and up columns are two pieces of its contiguous axis"


@contextlib.contextmanager
def reading(*, by_tma=True):
    """Collect how the operands of each grouped product are read; without `by_tma` all by pointers, and stored so."""

    def note(key, config):
        found.append(dict(config.reads))

    with pytest.MonkeyPatch.context() as patch:
        found = []
        patch.setattr(tile_choice, "_why_no_tma", lambda target: "" if by_tma else OFF)
        patch.setattr(tile_choice, "_config", tile_choice._config.__wrapped__)  # nothing chosen before
        patch.setattr(measured_tiles, "note", note)
        yield found


def ragged_layer(dtype, layout, **sizes):
    """Return a layer whose experts hold 0, 1, 31, 32 and 34 pairs in interpreted tiles of 32 rows, and its grouping."""
    ids = torch.arange(5).repeat_interleave(torch.tensor([0, 1, 31, 32, 34]))
    ids = ids[torch.randperm(98, generator=torch.Generator().manual_seed(0))].view(-1, 2)
    layer = Layer(ids, 5, LAYOUTS[layout], dtype, **sizes)
    return layer, kernels.group(layer.ids, 5)


def products(backend, layer, grouping, values):
    """Return all products but weight_grad, `values` (N, F) being a, and as many columns of them as W1 has h, dh."""
    hidden = torch.cat([values, values.flip(1)], 1) if layer.layout.gated else values
    h, a = backend.up(layer.x, layer.gate_up, grouping, "silu")
    down = backend.down(values, layer.down, grouping)
    dh, scaled_a, dweights = backend.down_grad(layer.dout, layer.down, hidden, layer.weights, grouping, "silu")
    up_grad = backend.up_grad(hidden, layer.gate_up, grouping)
    return {"h": h, "a": a, "down": down, "dh": dh, "s*a": scaled_a, "dweights": dweights, "up_grad": up_grad}


def random_values(grouping, width, dtype):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(grouping.num_pairs, width, generator=generator).to(DEVICE, dtype)


@pytest.mark.sweep(1)
@pytest.mark.parametrize("layout", SOME_LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_bits_are_those_of_pointers(layout, dtype):
    """Ragged and empty experts, depths and widths that end inside a tile, a bias, weights of both orders."""
    layer, grouping = ragged_layer(dtype, layout, hidden=40, intermediate=24)
    values = random_values(grouping, 24, dtype)
    with nan_filled_memory(), reading() as ways:
        by_tma = products(kernels, layer, grouping, values)
    assert ways == (BY_TMA if layout != "transposed" else [{"weight": TWO_PIECES}, *BY_TMA[1:]])
    with nan_filled_memory(), reading(by_tma=False) as ways:
        by_pointers = products(kernels, layer, grouping, values)
    assert ways == [dict.fromkeys(way - {"out"}, f"pointers: {OFF}") for way in map(dict.keys, BY_TMA)]
    expected = products(reference, layer, grouping, values)
    exact = products(reference, layer.double(), grouping, values.double())
    for name, value in by_tma.items():
        assert torch.equal(value, by_pointers[name]), name
        assert_close_to_exact(name, value, expected[name], exact[name])


def test_neighbours_are_neither_used_nor_written():
    """A tile's box reaches into the next expert's rows: NaN there stays there, and what lies behind is left alone."""
    layer, grouping = ragged_layer(torch.float32, "concatenated", bias=False)
    offsets, num_active = grouping.expert_offsets.tolist(), int(grouping.expert_offsets[-1])
    a = random_values(grouping, 12, torch.float32)
    expected = kernels.down(a, layer.down, grouping)
    poisoned = a.clone()
    for expert in (2, 4):
        poisoned[offsets[expert] : offsets[expert + 1]] = float("nan")
    buffer = torch.full((grouping.num_pairs + 40, 24), -7.0, device=DEVICE)
    with reading() as found:
        kernels.down(poisoned, layer.down, grouping, out=buffer[: grouping.num_pairs, :20])
    assert found == [ALL]
    for expert in range(5):
        rows = slice(offsets[expert], offsets[expert + 1])
        if expert in (2, 4):
            assert buffer[rows, :20].isnan().all()
        else:
            assert torch.equal(buffer[rows, :20], expected[rows])
    assert (buffer[num_active:] == -7).all()
    assert (buffer[:, 20:] == -7).all()


def is_stored_by_tma(product, *operands, **keywords):
    """Record a product as an H100 would launch it, and say whether TMA stores its result."""
    with launch.recording(aot.TARGETS["sm_90"]) as launches:
        product(*operands, **keywords)
    return isinstance(launches[-1].args[launches[-1].kernel.arg_names.index("out")], TensorDescriptor)


def test_results_that_tma_cannot_store_are_stored_through_pointers():
    layer = Layer(random_ids(400, 2, 3), 3, LAYOUTS["concatenated"], torch.bfloat16, hidden=272, intermediate=144)
    grouping = reference.group(layer.ids, 3)
    a = random_values(grouping, 144, torch.bfloat16)
    out = torch.empty(grouping.num_pairs, 272, dtype=torch.bfloat16, device=DEVICE)
    down, added = layer.down, layer.down._replace(addend=out)
    assert is_stored_by_tma(kernels.down, a, down, grouping)
    assert is_stored_by_tma(kernels.down, a, down, grouping, out=out)
    assert not is_stored_by_tma(kernels.down, a, added, grouping, out=out)
    assert not is_stored_by_tma(kernels.down, a, down, grouping, out=misaligned(out))
    assert not is_stored_by_tma(kernels.down, a, down, grouping, out=padded(out))
    assert not is_stored_by_tma(kernels.down, misaligned(a), down, grouping)
    in_fp32 = down._replace(weight=layer.w2.float(), bias=None)
    assert not is_stored_by_tma(kernels.down, a.float(), in_fp32, grouping)
    with measured_tiles.asked() as asked:
        is_stored_by_tma(kernels.down, a, down, grouping)
    with measured_tiles.using({key: {"tma": False} for key in asked}):
        assert not is_stored_by_tma(kernels.down, a, down, grouping)


@pytest.mark.parametrize(
    ("fields", "pieces"),
    [
        ({}, 1),
        ({"num_stages": 4}, 4),  # 192 KB of 227, and 64 KB for a whole tile
        ({"block_n": 128, "num_warps": 4, "programs_per_multiprocessor": 2}, 4),  # twice 96 KB, and 32 KB
        ({"block_m": 64}, 1),  # 120 KB, and 32 KB
    ],
)
def test_a_tile_is_stored_whole_where_as_many_programs_fit(fields, pieces):
    variant = aot.VARIANTS["Qwen3-30B-A3B"]
    with measured_tiles.using({}), measured_tiles.asked() as asked:
        aot.record_launches(variant, aot.TARGETS["sm_90"])
    keys = [key for key in asked if " down " in key]
    with measured_tiles.using(dict.fromkeys(keys, fields)), measured_tiles.asked() as asked:
        aot.record_launches(variant, aot.TARGETS["sm_90"])
    assert [(asked[key].by_tma("out"), asked[key].subtiles) for key in keys] == [(True, pieces)] * len(keys)


def misaligned(tensor):
    """Return the same values at an address that is no multiple of 16."""
    memory = tensor.new_empty(tensor.numel() + 1)[1:]
    return memory.view(tensor.shape).copy_(tensor)


def padded(tensor):
    """Return the same values with one more element from row to row, NaN in it."""
    memory = tensor.new_full((*tensor.shape[:-1], tensor.shape[-1] + 1), float("nan"))
    memory[..., :-1] = tensor
    return memory[..., :-1]


def strided(tensor):
    """Return the same values with NaN between any two."""
    memory = tensor.new_full((*tensor.shape, 2), float("nan"))
    memory[..., 0] = tensor
    return memory[..., 0]


def interleaved_experts(weight):
    """Return the same values with experts as the middle axis in memory."""
    return weight.transpose(0, 1).contiguous().transpose(0, 1)


REFUSED = {
    "values address": (misaligned, None, {"values": "its address is no multiple of 16 bytes"}),
    "weight address": (None, misaligned, {"weight": "its address is no multiple of 16 bytes"}),
    "values rows": (padded, None, {"values": "50 bytes along axis 0 are no multiple of 16 below 2^40"}),
    "weight rows": (None, padded, {"weight": "1000 bytes along axis 0 are no multiple of 16 below 2^40"}),
    "weight columns": (None, strided, {"weight": "no axis of a tile is contiguous, strides are (960, 48, 2)"}),
    "experts inside": (
        None,
        interleaved_experts,
        {"weight": "strides (24, 72, 1) are not nested, the axes after the first have shape (20, 24)"},
    ),
    "both": (misaligned, misaligned, dict.fromkeys(("values", "weight"), "its address is no multiple of 16 bytes")),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_tma_cannot_read_is_read_through_pointers(case):
    change_values, change_weight, reasons = REFUSED[case]
    layer = Layer(random_ids(20, 2, 3), 3, LAYOUTS["concatenated"], torch.float16, intermediate=24)
    grouping = kernels.group(layer.ids, 3)
    num_active = int(grouping.expert_offsets[-1])
    a = random_values(grouping, 24, torch.float16)
    with reading() as found:
        expected = kernels.down(a, layer.down, grouping)
        values = change_values(a) if change_values else a
        down = layer.down._replace(weight=change_weight(layer.w2)) if change_weight else layer.down
        with nan_filled_memory():
            actual = kernels.down(values, down, grouping)
    assert found[0] == BOTH  # rows of 20 columns are not stored by TMA
    assert found[1] == BOTH | {name: f"pointers: {reason}" for name, reason in reasons.items()}
    assert torch.equal(actual[:num_active], expected[:num_active])


@pytest.mark.sweep(1)
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (misaligned, "its address is no multiple of 16 bytes"),
        (padded, "18 bytes along axis 1 are no multiple of 16 below 2^40"),
        (strided, "no axis of a tile is contiguous, strides are (384, 16, 2)"),
    ],
)
@pytest.mark.parametrize("layout", ["concatenated", "interleaved"])
def test_weights_that_tma_cannot_read_beside_gathered_rows(layout, change, reason):
    layer, grouping = ragged_layer(torch.float16, layout, hidden=24, intermediate=8)
    values = random_values(grouping, 8, torch.float16)
    expected = products(kernels, layer, grouping, values)
    layer.w1, layer.w2 = change(layer.w1), change(layer.w2)
    with nan_filled_memory(), reading() as found:
        actual = products(kernels, layer, grouping, values)
    assert found[2] == {"weight": f"pointers: {reason}"}
    assert found[0]["weight"].startswith("pointers: ")
    for name, value in actual.items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_odd_sizes_need_pointers(dtype):
    layer, grouping = ragged_layer(dtype, "concatenated", hidden=37, intermediate=11)
    values = random_values(grouping, 11, dtype)
    with nan_filled_memory(), reading() as found:
        actual = products(kernels, layer, grouping, values)
    assert len(found) == 4
    assert all(way.startswith("pointers: ") for ways in found for way in ways.values())
    expected = products(reference, layer, grouping, values)
    exact = products(reference, layer.double(), grouping, values.double())
    for name, value in actual.items():
        assert_close_to_exact(name, value, expected[name], exact[name])


def test_no_rows():
    layer = Layer(torch.empty(0, 3, dtype=torch.int64), 7, LAYOUTS["concatenated"])
    grouping = kernels.group(layer.ids, 7)
    with reading() as found:
        assert products(kernels, layer, grouping, layer.x[:, :12])["down"].shape == (0, 20)
    assert found[1] == BOTH | {"values": "pointers: shape (0, 12) is empty"}


@pytest.mark.parametrize(
    ("shape", "strides", "reason"),
    [
        ((8, 64), (64, 1), ""),
        ((8, 64), (72, 1), ""),
        ((8, 64), (65, 1), "130 bytes along axis 0 are no multiple of 16 below 2^40"),
        ((8, 64), (0, 1), "strides (0, 1) are not nested, the axes after the first have shape (64,)"),
        ((8, 64), (64, 0), "no axis of a tile is contiguous, strides are (64, 0)"),
        ((4, 8, 64), (1024, 128, 1), ""),
        ((4, 8, 64), (520, 64, 1), "strides (520, 64, 1) are not nested, the axes after the first have shape (8, 64)"),
        ((2, 8, 64), (2**39, 64, 1), "1099511627776 bytes along axis 0 are no multiple of 16 below 2^40"),
        ((2, 8, 64), (2**39 - 64, 64, 1), ""),
        ((0, 64), (64, 1), "shape (0, 64) is empty"),
    ],
)
def test_rules(shape, strides, reason):
    tensor = torch.empty(0, dtype=torch.bfloat16, device="meta").as_strided((0,), (1,))
    assert tma.refusal(tensor.new_empty_strided(shape, strides)) == reason


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITONMOE_CACHE_DIR", str(tmp_path))
    measured_tiles.kept.cache_clear()
    yield tmp_path / "tiles.json"
    measured_tiles.kept.cache_clear()


def shown(capsys, *arguments, product="down 2048x1024"):
    """Return what `tritonmoe tune --show` prints for a product, the only class of its pairs per expert."""
    assert main(["tune", *arguments, "--tokens", "16384", "--show"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if f" {product} " in line]
    return line


def test_the_choice_is_printed(capsys, cache):
    qwen = ("128", "8", "2048", "768", "bfloat16")
    assert "; values by TMA; weight by TMA; out by TMA (heuristic)" in shown(capsys, *qwen, "--target", "sm_90")
    up = {"product": "up 1024x2048"}
    assert shown(capsys, *qwen, "--target", "sm_90", **up).endswith("; weight by TMA (heuristic)")
    assert f"; weight by {TWO_PIECES} (" in shown(capsys, *qwen, "--target", "sm_90", "--transposed", **up)
    assert "; weight by TMA (" in shown(capsys, *qwen, "--target", "sm_90", "--transposed", "--interleaved", **up)
    by_pointers = "; values by pointers: sm_80 has no TMA; weight by pointers: sm_80 has no TMA (heuristic)"
    assert by_pointers in shown(capsys, *qwen, "--target", "sm_80")
    reason = "1332 bytes along axis {} are no multiple of 16 below 2^40"
    odd = f"values by pointers: {reason.format(0)}; weight by pointers: {reason.format(1)} (heuristic)"
    assert odd in shown(capsys, "128", "8", "2048", "666", "bfloat16", "--target", "sm_90")
    measured_tiles.write(cache, {f"sm_90 bfloat16 down 2048x1024 rows 128 triton {triton_version}": {"tma": False}})
    tuned = "; values by pointers: measured to be faster; weight by pointers: measured to be faster (tuned)"
    assert tuned in shown(capsys, *qwen, "--target", "sm_90")


@pytest.mark.parametrize(("target", "by_tma"), [("sm_80", False), ("sm_90", True), ("sm_100", True), ("gfx942", False)])
def test_launches_get_descriptors_where_there_is_tma(target, by_tma):
    launches = aot.record_launches(aot.Variant(), aot.TARGETS[target])
    values, no_scales, weight = launches["down grouped_matmul"].args[:3]
    assert no_scales is None
    assert isinstance(values, TensorDescriptor) is isinstance(weight, TensorDescriptor) is by_tma
    if by_tma:
        assert (values.shape, values.block_shape) == ([16384 * 8, 768], [128, 64])
        assert (weight.shape, weight.block_shape) == ([128, 2048, 768], [1, 256, 64])
        weight = launches["up_grad grouped_matmul"].args[2]  # here the depth is an outer axis
        assert (weight.shape, weight.block_shape) == ([128, 1536, 2048], [1, 64, 256])
    for kernel, place, box in (
        ("up up", 2, ([128, 2, 768, 2048], [1, 2, 128, 64])),
        ("up inference up", 2, ([128, 2, 768, 2048], [1, 2, 128, 64])),
        ("down_grad down_grad", 2, ([128, 2048, 768], [1, 64, 128])),
    ):
        weight = launches[kernel].args[place]
        assert isinstance(weight, TensorDescriptor) is by_tma
        if by_tma:
            assert (weight.shape, weight.block_shape) == box
