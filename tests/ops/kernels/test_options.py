"""num_sms and batch_invariant, and the tiles that follow from them and from a layer's pairs per expert."""

import dataclasses
import logging

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DEVICE, LAYOUTS, Layer, WithOptions, assert_row_tiles, random_ids
from uninitialised import nan_filled_memory

from tritonmoe.config.layer import KernelOptions, Projection
from tritonmoe.ops import aot
from tritonmoe.ops.backends import triton as kernels
from tritonmoe.ops.grouping import RowSources
from tritonmoe.ops.kernels import launch, row_tiles, tile_runs
from tritonmoe.ops.kernels.tiles import tile_choice
from tritonmoe.tools.benchmarks.shapes import GPU_SHAPES


@pytest.mark.sweep(1)
@pytest.mark.parametrize(
    "num_sms", [pytest.param(1, marks=pytest.mark.thorough), 3, pytest.param(1000, marks=pytest.mark.thorough)]
)
@pytest.mark.parametrize("layout", ["concatenated", "interleaved"])
def test_bits_do_not_depend_on_num_sms(layout, num_sms):
    """Several tiles for each program, with experts that are empty or end in the middle of a tile."""
    layer = Layer(random_ids(50, 2, 4), 6, LAYOUTS[layout], hidden=70, intermediate=50)
    grouping = kernels.group(layer.ids, 6)
    expected = layer.run(kernels, grouping, "silu")
    actual = layer.run(WithOptions(KernelOptions(num_sms=num_sms)), grouping, "silu")
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name


def test_num_sms_bounds_the_grid():
    variant, options = aot.Variant(), KernelOptions(num_sms=100)
    x = torch.empty(4096, variant.hidden_size, dtype=torch.bfloat16, device="meta")
    w1 = torch.empty(64, 2 * 768, 2048, dtype=torch.bfloat16, device="meta")
    w2 = torch.empty(64, 2048, 768, dtype=torch.bfloat16, device="meta")
    gate_up, down = (Projection(weight, None, LAYOUTS["concatenated"]) for weight in (w1, w2))
    with launch.recording(aot.TARGETS["sm_90"]) as launches:
        grouping = kernels.group(torch.empty(4096, 8, dtype=torch.int64, device="meta"), 64)
        launches.clear()
        h, a = kernels.up(x, gate_up, grouping, "silu", options=options)
        kernels.down(a, down, grouping, options=options)
        kernels.up_grad(h, gate_up, grouping, options=options)
        assert [item.grid for item in launches] == [(100,)] * 3
        launches.clear()
        kernels.down(a, down, grouping)
    assert launches[0].grid[0] > 100


@pytest.mark.parametrize(("version", "stages"), [((3, 7, 0), 1), ((3, 7, 1), 3)])
def test_loads_that_no_fence_follows_are_not_asynchronous(version, stages, monkeypatch):
    """Where Triton puts no fence between cp.async and tcgen05; TMA and the tiles of mma.sync need none."""
    monkeypatch.setattr(launch, "TRITON_VERSION", version)
    gathered = ("up up", "down_grad down_grad", "weight_grad W1 outer_sums", "weight_grad W2 outer_sums")
    products = (*gathered, "down grouped_matmul", "up_grad grouped_matmul")
    for target, variant, waiting in (
        ("sm_100", "bf16", gathered),
        ("sm_100", "bf16 gathered by TMA", gathered[1:]),
        ("sm_100", "bf16 pointers", products),
        ("sm_100", "128 tokens", gathered[2:]),  # the others' tiles are too low for tcgen05
        ("sm_100", "fp32", ()),
        ("sm_90", "bf16 pointers", ()),
    ):
        launches = aot.record_launches(aot.VARIANTS[variant], aot.TARGETS[target])
        found = {name for name in products if launches[name].options["num_stages"] == 1}
        assert found == (set(waiting) if stages == 1 else set()), f"{target}, {variant}"


def test_tf32_goes_through_tcgen05_too(monkeypatch):
    monkeypatch.setattr(launch, "TRITON_VERSION", (3, 7, 0))
    monkeypatch.setattr(launch, "dot_precision", lambda like: "tf32")
    launches = aot.record_launches(aot.VARIANTS["fp32"], aot.TARGETS["sm_100"])
    assert launches["up up"].options["num_stages"] == 1
    assert launches["down grouped_matmul"].options["num_stages"] > 1


@pytest.mark.parametrize(
    ("variant", "target", "registers"),
    [
        ("bf16", "sm_90", 255),  # one program of 128 x 256, as its shared memory says
        ("fp32", "sm_90", 128),  # two of 128 x 64
        ("odd fp32", "sm_90", 255),  # without vector loads one of 64 x 64 takes the registers of two
        ("bf16", "gfx942", None),  # no option of its compiler
    ],
)
def test_registers_of_weight_grad(variant, target, registers):
    launches = aot.record_launches(aot.VARIANTS[variant], aot.TARGETS[target])
    for operation in ("W1", "W1 main_grad", "W2"):
        item = launches[f"weight_grad {operation} outer_sums"]
        assert item.options.get("maxnreg") == registers
        assert item.options["num_warps"] == 8


@triton.jit
def read_slots(tiles, found, number, stride, BLOCK_M: tl.constexpr):
    slot = tl.program_id(0)
    expert, first, end = row_tiles.tile_of_slot(slot, tiles, BLOCK_M)
    tl.store(found + slot, expert)
    tl.store(found + stride + slot, first)
    tl.store(found + 2 * stride + slot, end)
    tl.store(number + slot, row_tiles.num_row_tiles(tiles, BLOCK_M))


@pytest.mark.thorough
@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.integers(0, 140), min_size=1, max_size=9),
    skipped=st.integers(0, 50),
    height=st.sampled_from(row_tiles.TILE_HEIGHTS),
)
def test_slots_cover_every_pair_once(counts, skipped, height):
    """The row tiles of a grouping that was cut are the list of all experts' tiles; the slots behind it are empty."""
    ids = torch.tensor([e for e, count in enumerate([*counts, skipped]) for _ in range(count)]).view(-1, 1).to(DEVICE)
    cut = dataclasses.replace(kernels.group(ids, len(counts)), row_tiles=None)
    with nan_filled_memory():
        tiles = row_tiles.row_tiles_of(cut)
    assert row_tiles.row_tiles_of(cut) is tiles
    offsets = cut.expert_offsets.tolist()
    assert_row_tiles(tiles[0], offsets, cut.num_pairs)
    num_slots = row_tiles.num_tile_slots(cut.num_pairs, len(counts), height)
    found, number = torch.full((3, num_slots), -1, device=DEVICE), torch.full((num_slots,), -1, device=DEVICE)
    launch.launch(read_slots, (num_slots,), tiles, found, number, num_slots, BLOCK_M=height)
    expected = [
        (e, first, offsets[e + 1]) for e in range(len(counts)) for first in range(offsets[e], offsets[e + 1], height)
    ]
    reached = [tuple(column) for column in found.T.tolist()]
    assert reached[: len(expected)] == expected
    assert all(expert == -1 for expert, _, _ in reached[len(expected) :])
    assert set(number.tolist()) <= {len(expected)}


def rows_of_layer(layer, options):
    """Run forward and backward and give everything that has a row for each token."""
    backend = WithOptions(options)
    grouping = kernels.group(layer.ids, layer.num_experts)
    h, a = backend.up(layer.x, layer.gate_up, grouping, "silu")
    y = backend.down(a, layer.down, grouping)
    dh, _, dweights = backend.down_grad(layer.dout, layer.down, h, layer.weights, grouping, "silu")
    dx = backend.up_grad(dh, layer.gate_up, grouping)
    return {
        "out": kernels.gather_sum(y, grouping.inverse, layer.weights),
        "dx": kernels.gather_sum(dx, grouping.inverse),
        "dweights": grouping.pairs_to_rows(dweights),
    }


def some_rows(layer, rows):
    """Return a batch of these rows only."""
    batch = object.__new__(Layer)
    vars(batch).update(vars(layer))
    for name in ("ids", "x", "dout", "weights"):
        setattr(batch, name, getattr(layer, name)[rows])
    return batch


def test_batch_invariant_rows_have_the_same_bits_in_any_batch():
    layer = Layer(random_ids(90, 2, 3), 3, LAYOUTS["concatenated"], hidden=70, intermediate=40)
    options = KernelOptions(batch_invariant=True)
    reached = rows_of_layer(layer, options)
    for rows in (slice(0, 1), slice(57, 58), slice(40, 75)):
        alone = rows_of_layer(some_rows(layer, rows), options)
        for name, value in alone.items():
            assert torch.equal(value, reached[name][rows]), (name, rows)


def tile(num_rows, options=KernelOptions(), *, num_experts=64, top_k=8, target="sm_90", chunk=None):
    """Return the tile of the up-projection of a layer with so many rows."""
    with launch.recording(aot.TARGETS[target]):
        ids = torch.empty(num_rows, top_k, dtype=torch.int64, device="meta")
        if chunk is None:
            grouping = kernels.group(ids, num_experts)
        else:
            cuts = (0, chunk, num_rows)
            grouping = kernels.group(
                ids,
                num_experts,
                chunk_row_offsets=cuts,
                chunk_pair_offsets=tuple(top_k * cut for cut in cuts),
                row_sources=RowSources((0,), torch.tensor([[chunk], [num_rows - chunk]])),
            ).chunk(0)
        like = torch.empty(num_rows, 2048, dtype=torch.bfloat16, device="meta")
        return tile_choice.grouped_matmul_config("up", like, 768, 2048, grouping, options, {"weight": ""})


@pytest.mark.parametrize("target", list(aot.TARGETS))
def test_tiles_follow_the_pairs_per_expert(target):
    """8 pairs of 64 experts for each row: 24, 48 and 96 pairs per expert are 192, 384 and 768 rows."""
    heights = {rows: tile(rows, target=target).block_m for rows in (1, 191, 192, 383, 384, 767, 768, 100_000)}
    assert heights == {1: 16, 191: 16, 192: 32, 383: 32, 384: 64, 767: 64, 768: 128, 100_000: 128}
    assert len({tile(rows, target=target) for rows in (768, 769, 4096, 100_000)}) == 1


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize("shape", GPU_SHAPES.values(), ids=GPU_SHAPES)
def test_one_token_occupies_every_multiprocessor(shape, target):
    """The K tiles that one token has at least, by all column tiles; up to eight tokens nothing is compiled anew."""

    def configs(num_rows):
        with launch.recording(aot.TARGETS[target]):
            ids = torch.empty(num_rows, shape.top_k, dtype=torch.int64, device="meta")
            grouping = kernels.group(ids, shape.num_experts)
            like = torch.empty(num_rows, shape.hidden_size, dtype=torch.bfloat16, device="meta")
            widths = {"up": shape.intermediate_size, "down": shape.hidden_size}
            depths = {"up": shape.hidden_size, "down": shape.intermediate_size}
            return {
                name: tile_choice.grouped_matmul_config(name, like, width, depths[name], grouping, KernelOptions(), {})
                for name, width in widths.items()
            }, widths

    (one_token, widths), (eight_tokens, _), (nine_tokens, _) = map(configs, (1, 8, 9))
    assert one_token == eight_tokens
    for name, config in one_token.items():
        assert shape.top_k * -(-widths[name] // config.block_n) >= 304  # compute units of an MI300X
        assert config.block_n <= nine_tokens[name].block_n


@pytest.mark.parametrize("target", list(aot.TARGETS))
def test_a_program_walks_over_several_tiles(target):
    """Only tall ones, on Hopper and Blackwell, whatever runs beside it."""
    beside = KernelOptions(beside_exchanges=True)
    some_sms = KernelOptions(num_sms=100, beside_exchanges=True)
    alone, shared, limited, short = (
        tile(*arguments, target=target) for arguments in ((4096,), (4096, beside), (4096, some_sms), (700,))
    )
    fences_loads = launch.TRITON_VERSION >= (3, 7, 1)  # before, loads through pointers wait on Blackwell
    walks = target == "sm_90" or (target == "sm_100" and fences_loads)
    assert [config.persistent for config in (alone, short)] == [walks, False]
    assert alone == shared == limited


def test_a_persistent_grid_has_the_multiprocessors(monkeypatch):
    monkeypatch.setattr(launch, "_num_multiprocessors", lambda index: 132)
    config, device = tile(4096), torch.device("cuda", 0)
    assert config.persistent
    tiles = {
        (number, options): launch.num_programs(number, config, options, device)
        for number in (7, 4000)
        for options in (KernelOptions(), KernelOptions(num_sms=100))
    }
    assert list(tiles.values()) == [7, 7, 132, 100]
    one_tile = dataclasses.replace(config, persistent=False)
    assert launch.num_programs(4000, one_tile, KernelOptions(), device) == 4000
    beside, some_sms = KernelOptions(beside_exchanges=True), KernelOptions(num_sms=100, beside_exchanges=True)
    assert tile_runs.grid_of(4000, config, KernelOptions(), device) == ((132,), 132)
    assert tile_runs.grid_of(4000, config, some_sms, device) == ((100,), 100)
    assert tile_runs.grid_of(4000, config, beside, device) == (((6 + 5) * 132,), 132)
    assert tile_runs.grid_of(4000, one_tile, beside, device) == ((4000,), 4000)


def test_tiles_are_those_of_the_layer_whatever_the_chunk():
    assert {tile(4096, chunk=rows) for rows in (1, 100, 4095)} == {tile(4096)}


def test_batch_invariant_tiles_do_not_depend_on_the_rows():
    options = KernelOptions(batch_invariant=True)
    assert len({tile(rows, options) for rows in (0, 1, 100, 100_000)}) == 1


def test_what_keeps_a_product_from_its_fast_way_is_logged_once(caplog):
    """A weight whose address TMA can't take; what runs beside it is no reason."""
    layout, storage = LAYOUTS["concatenated"], torch.empty(64 * 2048 * 768 + 1, dtype=torch.bfloat16)
    at_an_odd_address = storage[1:].view(64, 2048, 768)
    a = torch.empty(4096 * 8, 768, dtype=torch.bfloat16)
    tile_choice._config.cache_clear()
    with caplog.at_level(logging.INFO, "tritonmoe"), launch.recording(aot.TARGETS["sm_90"]):
        grouping = kernels.group(torch.zeros(4096, 8, dtype=torch.int64), 64)
        for options in (KernelOptions(), KernelOptions(beside_exchanges=True), KernelOptions(10, False, True)):
            kernels.down(a, Projection(storage[:-1].view(64, 2048, 768), None, layout), grouping, options=options)
        assert not caplog.records
        for _ in range(2):
            kernels.down(a, Projection(at_an_odd_address, None, layout), grouping)
    assert len(caplog.records) == 1
    assert "its weight is read through pointers: its address is no multiple of 16 bytes" in caplog.text
