"""How `up` gets its rows: TMA that gathers them, and a copy read in boxes, give the bits of pointers."""

import contextlib
from dataclasses import replace

import pytest
import torch
from kernel_cases import DEVICE, LAYOUTS, Layer, chunked_rows, random_ids
from tolerance import assert_close_to_exact
from triton import __version__ as triton_version
from uninitialised import nan_filled_memory

from tritonmoe.config.layer import KernelOptions
from tritonmoe.ops import aot
from tritonmoe.ops.backends import reference
from tritonmoe.ops.backends import triton as kernels
from tritonmoe.ops.kernels.tiles import measured_tiles, tma
from tritonmoe.tools.cli import main

NEEDED_CAPABILITY = {"tma": 10, "copy": 9}
"""The major compute capability from which a GPU can read rows so."""
WAYS = tuple(NEEDED_CAPABILITY)


@pytest.fixture(autouse=True)
def read_by_this_gpu(request, reads_by_tma):
    """Skip a way that the GPU doesn't have, and no other."""
    way = request.node.callspec.params.get("way") if hasattr(request.node, "callspec") else None
    if DEVICE == "cuda" and torch.cuda.get_device_capability()[0] < NEEDED_CAPABILITY.get(way, 0):
        pytest.skip(f"a GPU of its capability can't read rows by {way}")


@contextlib.contextmanager
def gathering(way):
    """Get rows this way, as a measured entry would say; collect the choices."""

    class Everything(dict):
        def get(self, key, default=None):
            return {"gather": way}

    with measured_tiles.using(Everything()), measured_tiles.asked() as found:
        yield found


def run(way, layer, grouping, activation="silu", **keywords):
    """Return h and a with NaN in fresh memory, and how the rows were got."""
    with gathering(way) as found, nan_filled_memory():
        h, a = kernels.up(layer.x, layer.gate_up, grouping, activation, **keywords)
    (config,) = found.values()
    return h, a, config


def check(way, layer, activation="silu"):
    """Compare with pointers, bit for bit, and with the reference; give the choice."""
    grouping = kernels.group(layer.ids, layer.num_experts)
    num_active = int(grouping.expert_offsets[-1])
    expected_grouping = reference.group(layer.ids, layer.num_experts)
    found = run(way, layer, grouping, activation)
    pointers = run("pointers", layer, grouping, activation)
    expected = reference.up(layer.x, layer.gate_up, expected_grouping, activation)
    twin = layer.double()
    exact = reference.up(twin.x, twin.gate_up, expected_grouping, activation)
    for name, one, other, right, precise in zip("ha", found, pointers, expected, exact, strict=False):
        assert torch.equal(one[:num_active], other[:num_active]), name
        assert one[num_active:].isnan().all(), f"{name} was written behind the last pair"
        assert_close_to_exact(name, one[:num_active], right[:num_active], precise[:num_active])
    return found[2]


@pytest.mark.sweep(1)
@pytest.mark.parametrize(
    ("dtype", "layout"),
    [*((torch.float16, layout) for layout in LAYOUTS), *((torch.float32, layout) for layout in list(LAYOUTS)[:2])],
    ids=str,
)
@pytest.mark.parametrize("way", WAYS)
def test_bits_are_those_of_pointers(way, dtype, layout):
    """Ragged and empty experts, skipped ids, a depth that ends inside a tile, weights of both orders."""
    ids = torch.arange(5).repeat_interleave(torch.tensor([0, 1, 31, 32, 36]))
    ids = ids[torch.randperm(100, generator=torch.Generator().manual_seed(0))].view(-1, 2)
    ids[::7, 1] = -1
    config = check(way, Layer(ids, 5, LAYOUTS[layout], dtype, hidden=40, intermediate=24))
    assert config.gather == way
    assert config.by_tma("x")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("top_k", [1, 3])
def test_rows_by_tma_beside_a_weight_by_pointers(way, top_k):
    """F = 11: no stride of the weight is a multiple of 16 bytes."""
    layer = Layer(random_ids(37, top_k, 6), 6, LAYOUTS["transposed"], torch.float16, hidden=24, intermediate=11)
    config = check(way, layer)
    assert config.by_tma("x")
    assert not config.by_tma("weight")


@pytest.mark.parametrize("way", WAYS)
def test_a_row_reads_no_other_row(way):
    """NaN in tokens that other experts have, in those that nobody has, and inf, stay where they are."""
    layer = Layer(torch.tensor([[0], [1], [-1], [0], [2], [1]]), 4, LAYOUTS["concatenated"], hidden=24)
    layer.x[1] = layer.x[2] = float("nan")
    layer.x[4] = float("inf")
    grouping = kernels.group(layer.ids, 4)
    h, _, config = run(way, layer, grouping)
    assert config.gather == way
    rows = [0, 3, 1, 5, 4]
    assert [bool(h[position].isfinite().all()) for position in range(5)] == [row in (0, 3, 5) for row in rows]
    assert torch.equal(h[:5].nan_to_num(), run("pointers", layer, grouping)[0][:5].nan_to_num())


@pytest.mark.parametrize("way", WAYS)
def test_chunks_and_few_programs(way):
    """A chunk's last positions have anything in pair_index; three programs walk all tiles."""
    row_offsets, sources = chunked_rows(40, 3, 2)
    layer = Layer(random_ids(40, 2, 5), 5, LAYOUTS["concatenated"], hidden=24)
    grouping = kernels.group(
        layer.ids,
        5,
        chunk_row_offsets=row_offsets,
        chunk_pair_offsets=tuple(2 * row for row in row_offsets),
        row_sources=sources,
    )
    for index in range(3):
        chunk = grouping.chunk(index)
        num_active = int(chunk.expert_offsets[-1])
        pair_index = chunk.pair_index.clone()
        pair_index[num_active:] = 2**30
        chunk = replace(chunk, pair_index=pair_index)
        options = KernelOptions(num_sms=3)
        h, a, _ = run(way, layer, chunk, options=options)
        expected_h, expected_a, _ = run("pointers", layer, chunk)
        assert torch.equal(h[:num_active], expected_h[:num_active])
        assert torch.equal(a[:num_active], expected_a[:num_active])
        assert a[num_active:].isnan().all()


def misaligned(x):
    return x.new_empty(x.numel() + 1)[1:].view(x.shape).copy_(x)


def padded(x):
    return torch.cat([x, torch.full_like(x[:, :1], float("nan"))], 1)[:, :-1]


NOT_NESTED = "strides (0, 1) are not nested, the axes after the first have shape (24,)"


@pytest.mark.parametrize(
    ("change", "hidden", "reasons"),
    [
        (misaligned, 24, {"tma": "its address is no multiple of 16 bytes", "copy": ""}),
        (padded, 24, {"tma": "50 bytes along axis 0 are no multiple of 16 below 2^40", "copy": ""}),
        (
            lambda x: x[:1].expand_as(x),
            24,
            {"tma": "strides (0, 1) are not nested, the axes after the first have shape (24,)", "copy": ""},
        ),
        (torch.clone, 37, dict.fromkeys(WAYS, "74 bytes along axis 0 are no multiple of 16 below 2^40")),
    ],
    ids=["address", "rows", "expanded", "odd"],
)
@pytest.mark.parametrize("way", WAYS)
def test_what_tma_cannot_gather_goes_through_pointers(way, change, hidden, reasons):
    layer = Layer(random_ids(20, 2, 3), 3, LAYOUTS["concatenated"], torch.float16, hidden=hidden)
    layer.x = change(layer.x)
    config = check(way, layer)
    assert config.gather == ("pointers" if reasons[way] else way)
    assert dict(config.reads)["x"] == (f"pointers: {reasons[way]}" if reasons[way] else tma.BY_TMA)


@pytest.mark.parametrize("way", WAYS)
def test_no_rows(way):
    layer = Layer(torch.empty(0, 3, dtype=torch.int64), 7, LAYOUTS["concatenated"], hidden=24)
    h, a, config = run(way, layer, kernels.group(layer.ids, 7))
    assert (h.shape, a.shape) == ((0, 24), (0, 12))
    assert config.gather == "pointers"


def test_the_heuristic_takes_pointers_until_something_is_measured():
    for name in aot.TARGETS:
        with measured_tiles.using({}), measured_tiles.asked() as found:
            aot.record_launches(aot.Variant(), aot.TARGETS[name])
        gathers = {key.split()[2]: config.gather for key, config in found.items()}
        assert gathers == {"up": "pointers", "down": "", "down_grad": "", "weight_grad": ""}


@pytest.mark.parametrize(
    ("target", "way", "shown"),
    [
        ("sm_90", "tma", "gather=pointers; x by pointers: sm_90 has no TMA that gathers rows; weight by TMA (tuned)"),
        ("sm_100", "tma", "gather=tma; x by TMA; weight by TMA (tuned)"),
        ("sm_90", "copy", "gather=copy; x by TMA; weight by TMA (tuned)"),
        (
            "sm_120",
            "copy",
            "gather=pointers; x by pointers: ",  # before Triton 3.7 no TMA at all; later its registers would spill
        ),
        ("sm_80", "copy", "gather=pointers; x by pointers: sm_80 has no TMA; weight by pointers: sm_80 has no TMA"),
        ("gfx942", "tma", "gather=pointers; x by pointers: gfx942 has no TMA; weight by pointers: gfx942 has no TMA"),
    ],
)
def test_the_choice_is_printed(target, way, shown, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITONMOE_CACHE_DIR", str(tmp_path))
    measured_tiles.write(
        tmp_path / "tiles.json", {f"{target} bfloat16 up 1024x2048 rows 128 triton {triton_version}": {"gather": way}}
    )
    arguments = ["tune", "128", "8", "2048", "768", "bfloat16", "--target", target, "--tokens", "16384", "--show"]
    try:
        assert main(arguments) == 0
    finally:
        measured_tiles.kept.cache_clear()
    assert shown in capsys.readouterr().out


@pytest.mark.parametrize("way", WAYS)
def test_launches_get_descriptors(way):
    """The box of a gather is one row; a copy of the rows comes first."""
    variant = aot.Variant(tiles={"gather": way})
    launches = aot.record_launches(variant, aot.TARGETS["sm_100"])
    rows = launches["up up"].args[0]
    assert rows.block_shape == ([1, 64] if way == "tma" else [128, 64])
    assert rows.shape == ([16384, 2048] if way == "tma" else [16384 * 8, 2048])
    assert ("up gather_rows" in launches) is (way == "copy")
