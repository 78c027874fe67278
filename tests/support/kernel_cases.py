"""Layers, routings and comparisons that the tests of the kernels share."""

import dataclasses
import itertools

import pytest
import torch
from tolerance import assert_close_to_exact
from uninitialised import nan_filled_memory

from tritonmoe.config.activations import ACTIVATION_NAMES, ClampedSwiGLU, SoftcappedSwiGLU
from tritonmoe.config.layer import ExpertLayout, PerWeight
from tritonmoe.ops.backends import reference
from tritonmoe.ops.backends import triton as kernels
from tritonmoe.ops.backends.kernel_check import LayerCase
from tritonmoe.ops.grouping import RowSources
from tritonmoe.ops.kernels.row_tiles import TILE_HEIGHTS, num_tile_slots

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAYOUTS = {
    "concatenated": ExpertLayout(),
    "interleaved": ExpertLayout(interleaved=True),
    "transposed": ExpertLayout(transposed=True),
    "interleaved-transposed": ExpertLayout(interleaved=True, transposed=True),
    "ungated": ExpertLayout(gated=False),
    "ungated-transposed": ExpertLayout(gated=False, transposed=True),
}
SOME_LAYOUTS = [
    pytest.param(name, marks=() if name in ("interleaved", "transposed") else pytest.mark.thorough) for name in LAYOUTS
]
"""Names of all layouts, of which the first tier has two: each of these changes how every kernel reads weights."""
GPT_OSS = ClampedSwiGLU(1.0, alpha=1.702, up_offset=1.0)
ALL_GRADIENTS = PerWeight(True, True, True, True)
ACTIVATIONS = (*ACTIVATION_NAMES, GPT_OSS, SoftcappedSwiGLU(0.7, 1.5))


class Layer(LayerCase):
    """A LayerCase on the device of the tests."""

    def __init__(self, ids, num_experts, layout, dtype=torch.float32, *, hidden=20, intermediate=12, **others):
        super().__init__(ids.to(DEVICE), num_experts, layout, dtype, sizes=(hidden, intermediate), **others)


def given_grads(grads):
    """Return the gradients of weights that are there, by name."""
    return {name: grad for name, grad in grads._asdict().items() if grad is not None}


class WithOptions:
    """The operations of the Triton backend under given options."""

    def __init__(self, options):
        self.options = options

    def __getattr__(self, name):
        operation = getattr(kernels, name)
        if name in ("group", "gather_sum"):
            return operation
        return lambda *args, **kwargs: operation(*args, **{**kwargs, "options": self.options})


def check_operations(layer, activation, backend=kernels):
    """Compare every operation with the reference, each on the same operands."""
    expected_grouping = reference.group(layer.ids, layer.num_experts)
    expected = layer.run(reference, expected_grouping, activation)
    exact = layer.double().run(reference, expected_grouping, activation, expected)
    with nan_filled_memory():
        grouping = backend.group(layer.ids, layer.num_experts)
        actual = layer.run(backend, grouping, activation, expected)
    assert actual.keys() == expected.keys()
    for name in actual:
        assert_close_to_exact(name, actual[name], expected[name], exact[name])
    return actual


def random_ids(num_rows, top_k, num_experts, *, skip=0.2, seed=0):
    """Draw ids, some of them skipped (below zero or too large), some twice in a row."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, num_experts, (num_rows, top_k), generator=generator)
    skipped = torch.rand(num_rows, top_k, generator=generator) < skip
    outside = torch.where(torch.rand(num_rows, top_k, generator=generator) < 0.5, -1, num_experts + 3)
    return torch.where(skipped, outside, ids)


def chunked_rows(num_rows, num_chunks, num_sources, seed=0):
    """Return chunk_row_offsets and the rows' sources, in any order of the ranks; some chunks and runs are empty."""
    generator = torch.Generator().manual_seed(seed)
    cuts = torch.randint(0, num_rows + 1, (num_chunks - 1,), generator=generator).sort().values.tolist()
    offsets = (0, *cuts, num_rows)
    sources = row_sources(offsets, torch.randint(0, num_sources, (num_rows,), generator=generator), num_sources)
    ranks = tuple(torch.randperm(num_sources, generator=generator).tolist())
    return offsets, dataclasses.replace(sources, ranks=ranks)


def row_sources(row_offsets, sources, num_sources):
    """Return the RowSources of rows that come by source in each chunk."""
    rows = [torch.bincount(sources[a:b], minlength=num_sources) for a, b in itertools.pairwise(row_offsets)]
    return RowSources(tuple(range(num_sources)), torch.stack(rows))


def assert_row_tiles(row_tiles, offsets, num_pairs):
    """Compare what launches for so many pairs read of one chunk's row tiles with the tiles of its experts, in order."""
    num_experts, row_tiles = len(offsets) - 1, row_tiles.tolist()
    for place, height in enumerate(TILE_HEIGHTS):
        tiles = [
            [e, first, offsets[e + 1]]
            for e in range(num_experts)
            for first in range(offsets[e], offsets[e + 1], height)
        ]
        slots = [row_tiles[slot][place] for slot in range(num_tile_slots(num_pairs, num_experts, height))]
        assert [slot[:3] for slot in slots[: len(tiles)]] == tiles
        assert all(slot[0] == -1 for slot in slots[len(tiles) :])
        assert not slots or slots[0][3] == len(tiles)


def assert_same_grouping(actual, expected):
    """Compare integers exactly, the reference's and the row tiles; behind the last pair there is padding of -1."""
    num_pairs = expected.num_pairs
    assert torch.equal(actual.pair_index[:num_pairs], expected.pair_index)
    assert (actual.pair_index[num_pairs:] == -1).all()
    for name in ("expert_offsets", "inverse", "chunk_expert_offsets"):
        assert torch.equal(getattr(actual, name), getattr(expected, name)), name
        assert getattr(actual, name).dtype == torch.int32
    assert actual.chunk_row_offsets == expected.chunk_row_offsets
    for chunk, offsets in enumerate(expected.chunk_expert_offsets.tolist()):
        first, last = actual.chunk_pair_offsets[chunk : chunk + 2]
        assert_row_tiles(actual.row_tiles[chunk], offsets, last - first)
    if expected.source_order is None:
        assert actual.source_order is None
    else:
        assert torch.equal(actual.source_order, expected.source_order)
        assert actual.chunk_pair_offsets == expected.chunk_pair_offsets
