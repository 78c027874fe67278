"""Row tiles: how the programs of a grouped product share the rows of ragged experts; the host reads no number.

They are listed once, for each height that a tile may have, so that a program finds its own with one load. Slot s of
height h of a chunk is row_tiles[chunk, s, h]: the expert, the first position, and where the expert's positions end;
the fourth number, of slot 0 alone, is how many tiles there are. The tiles of expert 0 come first, then those of expert
1, and so on; in the slots behind them the expert is -1, and the other numbers are anything.

Worked example with tiles of 16 rows, expert_offsets [0, 20, 20, 24], N = 24, four slots:

    slot                 0           1           2           3
    row_tiles[0, s, 0]   0, 0, 20    0, 16, 20   2, 20, 24   -1
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonmoe.ops.grouping import Grouping
from tritonmoe.ops.kernels.launch import INTERPRETED, cdiv, compiled_for, launch

__all__ = [
    "EXPERTS_PER_STEP",
    "TILE_HEIGHTS",
    "empty_row_tiles",
    "first_tile",
    "list_row_tiles",
    "num_row_tiles",
    "num_tile_slots",
    "row_of",
    "row_tiles_of",
    "slot_and_column_tile",
    "tile_of_slot",
    "tile_of_slot_again",
    "write_row_tiles",
]

TILE_HEIGHTS = (16, 32, 64, 128)
"""The rows that a tile may have: each height is twice the one before."""
EXPERTS_PER_STEP = 128
"""So many experts are looked at together where row tiles are written."""
SLOTS_PER_PROGRAM = 128
"""So many slots of the lowest tiles are one program's share."""
_IN_INTERPRETER = tl.constexpr(INTERPRETED)
_NUM_CHIPLETS = tl.constexpr(8)
"""Of MI300X, MI325X and MI350. With another number, as of MI300A, neighbours are spread as program numbers are."""


def num_tile_slots(num_pairs: int, num_experts: int, height: int) -> int:
    """Bound the row tiles of this height without reading expert_offsets.

    An expert with pairs has at most one tile that is not full.
    """
    return num_pairs // height + min(num_experts, num_pairs)


def empty_row_tiles(num_chunks: int, num_pairs: int, num_experts: int, like: Tensor) -> Tensor:
    """Return memory (C, num_slots, 4, 4) int32 for the row tiles of chunks of at most num_pairs, where `like` is."""
    num_slots = num_tile_slots(num_pairs, num_experts, TILE_HEIGHTS[0])
    return like.new_empty(num_chunks, num_slots, len(TILE_HEIGHTS), 4, dtype=torch.int32)


@triton.jit
def row_of(pairs, K: tl.constexpr):
    """Return the rows of pairs, none of which is negative: an unsigned division by a constant is short."""
    return (pairs.to(tl.uint32) // K).to(tl.int32)


@triton.jit
def _entry(row_tiles, slot, BLOCK_M: tl.constexpr):
    """Return where the four numbers of a slot stand for tiles of BLOCK_M rows, one of TILE_HEIGHTS."""
    HEIGHT: tl.constexpr = (BLOCK_M > 16) + (BLOCK_M > 32) + (BLOCK_M > 64)
    return row_tiles + tl.cast(slot, tl.int64) * 16 + HEIGHT * 4


@triton.jit
def tile_of_slot(
    slot,
    row_tiles,  # (num_slots, 4, 4) int32
    BLOCK_M: tl.constexpr,
):
    """Return the expert, first position and end position of row tile `slot`; expert -1: nothing to do."""
    entry = _entry(row_tiles, slot, BLOCK_M)
    return tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)


@triton.jit
def tile_of_slot_again(
    slot,
    row_tiles,  # (num_slots, 4, 4) int32
    BLOCK_M: tl.constexpr,
):
    """Return the same behind a loop. Kept through it they take registers; the loads differ, or they would be one.

    Not where a program walks: its flat loop would carry the slot.
    """
    entry = _entry(row_tiles, slot, BLOCK_M)
    expert = tl.load(entry, eviction_policy="evict_last")
    first = tl.load(entry + 1, eviction_policy="evict_last")
    return expert, first, tl.load(entry + 2, eviction_policy="evict_last")


@triton.jit
def num_row_tiles(
    row_tiles,  # (num_slots, 4, 4) int32
    BLOCK_M: tl.constexpr,
):
    """Return the number of row tiles, which have the first slots."""
    return tl.load(_entry(row_tiles, 0, BLOCK_M) + 3)


@triton.jit
def write_row_tiles(
    program,  # which of num_programs
    num_programs,
    expert_offsets,  # (E+1,) int32, of one chunk
    row_tiles,  # (num_slots, 4, 4) int32
    num_slots,
    E,
    BLOCK_E: tl.constexpr,
):
    """Write the row tiles of one chunk: of an expert's tiles every num_programs-th, of the slots behind them a part."""
    shifts = 4 + tl.arange(0, 4)[:, None]  # a height is 2 to the power of its shift
    places = tl.arange(0, 4)[:, None] * 4  # of each height, in a slot
    num_tiles = tl.zeros((4, 1), tl.int32)
    for first_expert in range(0, E, BLOCK_E):
        experts = first_expert + tl.arange(0, BLOCK_E)[None, :]
        begins = tl.load(expert_offsets + experts, mask=experts < E, other=0)
        ends = tl.load(expert_offsets + experts + 1, mask=experts < E, other=0)
        counts = (ends - begins + (1 << shifts) - 1) >> shifts
        slots = num_tiles + tl.cumsum(counts, 1) - counts
        for tile in range(program, tl.max(tl.max(counts, 1), 0), num_programs):
            # A chunk whose pairs are more than its room has no valid tiles, but stays inside its slots.
            mask = (tile < counts) & (slots + tile < num_slots)
            entries = row_tiles + (slots + tile).to(tl.int64) * 16 + places
            tl.store(entries, experts, mask=mask)
            tl.store(entries + 1, begins + (tile << shifts), mask=mask)
            tl.store(entries + 2, ends, mask=mask)
        num_tiles += tl.sum(counts, 1, keep_dims=True)
    if (program == 0) & (num_slots > 0):
        tl.store(row_tiles + places + 3, tl.minimum(num_tiles, num_slots))
    for first_slot in range(program * BLOCK_E, num_slots, num_programs * BLOCK_E):
        slots = first_slot + tl.arange(0, BLOCK_E)[None, :]
        entries = row_tiles + slots.to(tl.int64) * 16 + places
        tl.store(entries, -1, mask=(slots >= num_tiles) & (slots < num_slots))


@triton.jit(do_not_specialize=["num_slots"], do_not_specialize_on_alignment=["expert_offsets"])
def _row_tiles_kernel(
    expert_offsets,  # (C, E+1) int32
    row_tiles,  # (C, num_slots, 4, 4) int32
    num_slots,
    E,
    BLOCK_E: tl.constexpr,
):
    chunk = tl.program_id(1)
    write_row_tiles(
        tl.program_id(0),
        tl.num_programs(0),
        expert_offsets + chunk * (E + 1),
        row_tiles + chunk.to(tl.int64) * num_slots * 16,
        num_slots,
        E,
        BLOCK_E,
    )


def list_row_tiles(chunk_expert_offsets: Tensor, num_pairs: int) -> Tensor:
    """Return the row tiles (C, num_slots, 4, 4) of chunks with offsets (C, E+1); num_pairs: the most of a chunk."""
    num_chunks, num_experts = len(chunk_expert_offsets), chunk_expert_offsets.shape[1] - 1
    row_tiles = empty_row_tiles(num_chunks, num_pairs, num_experts, chunk_expert_offsets)
    num_slots = row_tiles.shape[1]
    launch(
        _row_tiles_kernel,
        (cdiv(num_slots, SLOTS_PER_PROGRAM), num_chunks),
        chunk_expert_offsets,
        row_tiles,
        num_slots,
        num_experts,
        BLOCK_E=EXPERTS_PER_STEP,
    )
    return row_tiles


def row_tiles_of(grouping: Grouping) -> Tensor:
    """Return the row tiles (1, num_slots, 4, 4) of one chunk; listed here where `group` has not listed them."""
    if grouping.row_tiles is not None:
        return grouping.row_tiles
    row_tiles = list_row_tiles(grouping.chunk_expert_offsets, grouping.num_pairs)
    vars(grouping)["row_tiles"] = row_tiles
    return row_tiles


@tl.core.builtin
def _has_chiplets(_semantic=None):
    """Return whether the compiler's target has so many chiplets, as MI300 and MI350."""
    return tl.constexpr(compiled_for(_semantic).chiplets == _NUM_CHIPLETS.value)


@triton.jit
def first_tile():
    """Return the tile with which this program begins: the program's number, or on AMD one that each has once.

    There programs go to NUM_CHIPLETS chiplets in turn, and each has an L2 cache of its own: tiles that are neighbours,
    and so read the same weights, go to one chiplet.
    """
    tile = tl.program_id(0)
    if not _IN_INTERPRETER and _has_chiplets():
        programs = tl.num_programs(0)
        chiplet = tile % _NUM_CHIPLETS
        tile = chiplet * (programs // _NUM_CHIPLETS) + min(chiplet, programs % _NUM_CHIPLETS) + tile // _NUM_CHIPLETS
    return tile


@triton.jit
def slot_and_column_tile(tile, num_slots, num_column_tiles, GROUP_M: tl.constexpr):
    """Return the (row slot, column tile) of a tile: GROUP_M slots go through all column tiles together."""
    tiles_per_group = GROUP_M * num_column_tiles
    first_slot = tile // tiles_per_group * GROUP_M
    slots = min(num_slots - first_slot, GROUP_M)
    within = tile % tiles_per_group
    return first_slot + within % slots, within // slots
