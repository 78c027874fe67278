"""Row tiles: how the programs of a grouped product share the rows of ragged experts; the host reads no number."""

import triton
import triton.language as tl

__all__ = ["num_tile_slots", "row_of", "row_tile_ends", "slot_and_column_tile", "tile_of_slot"]


def num_tile_slots(num_pairs: int, num_experts: int, block_m: int) -> int:
    """Bound the row tiles of a grouped product without reading expert_offsets: see `tile_of_slot`.

    An expert with pairs has at most one tile that is not full.
    """
    return num_pairs // block_m + min(num_experts, num_pairs)


@triton.jit
def row_of(pairs, K: tl.constexpr):
    """Give the rows of pairs, none of which is negative: an unsigned division by a constant is short."""
    return (pairs.to(tl.uint32) // K).to(tl.int32)


@triton.jit
def row_tile_ends(
    expert_offsets,  # (E+1,) int32
    E,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Give for each expert the number of row tiles up to its last: (BLOCK_E,) int32, whose maximum is that of all."""
    experts = tl.arange(0, BLOCK_E)
    begins = tl.load(expert_offsets + experts, mask=experts < E, other=0)
    ends = tl.load(expert_offsets + experts + 1, mask=experts < E, other=0)
    return tl.cumsum(tl.cdiv(ends - begins, BLOCK_M), 0)


@triton.jit
def tile_of_slot(
    slot,
    tile_ends,  # (BLOCK_E,) int32: see row_tile_ends
    expert_offsets,  # (E+1,) int32
    E,
    BLOCK_M: tl.constexpr,
):
    """Give the expert, first position and end position of row tile `slot`; first >= end: nothing to do.

    The tiles of expert 0 come first, then those of expert 1, and so on; slots past the last tile have nothing to do.
    """
    earlier = tile_ends <= slot
    # Past the last tile this is E, which begins and ends at expert_offsets[E].
    expert = tl.minimum(tl.sum(earlier.to(tl.int32), 0), E)
    tile = slot - tl.max(tl.where(earlier, tile_ends, 0), 0)
    begin = tl.load(expert_offsets + expert)
    end = tl.load(expert_offsets + tl.minimum(expert + 1, E))
    return expert, begin + tile * BLOCK_M, end


@triton.jit
def slot_and_column_tile(tile, num_slots, num_column_tiles, GROUP_M: tl.constexpr):
    """Give the (row slot, column tile) of a tile: GROUP_M slots go through all column tiles together."""
    tiles_per_group = GROUP_M * num_column_tiles
    first_slot = tile // tiles_per_group * GROUP_M
    slots = min(num_slots - first_slot, GROUP_M)
    within = tile % tiles_per_group
    return first_slot + within % slots, within // slots
