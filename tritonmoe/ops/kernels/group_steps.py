"""The three steps of grouping, as pieces of kernels: count a tile, scan the tiles, place a tile's pairs.

The first step stores a tile's exclusive running count over the experts; the second sums these down the tiles of a chunk
(sums of exclusive running counts are the chunk's expert offsets); the third sorts the pairs of a tile and stores every
pair in its place.

With several chunks a tile has pairs of one chunk and one source rank. The second step then also sums down all tiles by
(source rank, chunk), which gives the layer's expert offsets, and the third stores the source order as well. The host
knows what tiles there are, and hands them over in `tile_table` (group_tiles.TileTable), int32, part after part:
- first flat pair of each tile; end of its pairs; first storage position of its chunk: num_tiles each,
- the tiles in the order in which scans meet them: by chunk, then all once more by source rank: 2 * num_tiles,
- where in that order each chunk's scan begins, where the layer's, and where that ends: C + 2.
"""

import triton
import triton.language as tl

from tritonmoe.ops.kernels.row_tiles import row_of

__all__ = ["count_tile", "place_tile", "scan_tiles"]


@triton.jit
def _tile_range(
    tile,
    tile_table,  # int32, or None for one chunk
    num_pairs,
    num_tiles,
    TILE: tl.constexpr,
):
    """Return a tile's first flat pair, the end of its pairs, and its chunk's first storage position."""
    if tile_table is None:
        return tile * TILE, num_pairs, 0
    else:
        entry = tile_table + tile
        return tl.load(entry), tl.load(entry + num_tiles), tl.load(entry + 2 * num_tiles)


@triton.jit
def _load_experts(
    flat,
    valid,
    topk_ids,  # (R, K) integers
    E,
    K: tl.constexpr,
    stride_ids_row,
    stride_ids_slot,
):
    """Return each flat pair's expert as int32; E for pairs that are skipped or past the end."""
    row = row_of(flat, K)
    pointers = topk_ids + row.to(tl.int64) * stride_ids_row + (flat - row * K) * stride_ids_slot
    ids = tl.load(pointers, mask=valid, other=-1)
    return tl.where((ids >= 0) & (ids < E), ids, E).to(tl.int32)


@triton.jit
def count_tile(
    tile,
    topk_ids,  # (R, K) integers
    tile_table,  # int32 or None
    starts,  # (num_tiles, E+1) int32: pairs of the tile whose expert is smaller
    num_pairs,
    num_tiles,
    E,
    K: tl.constexpr,
    stride_ids_row,
    stride_ids_slot,
    BLOCK_E: tl.constexpr,
    TILE: tl.constexpr,
):
    """Store the exclusive running count of a tile's pairs over the experts."""
    first, end, _ = _tile_range(tile, tile_table, num_pairs, num_tiles, TILE)
    flat = first + tl.arange(0, TILE)
    experts = _load_experts(flat, flat < end, topk_ids, E, K, stride_ids_row, stride_ids_slot)
    counts = tl.histogram(experts, BLOCK_E)
    bins = tl.arange(0, BLOCK_E)
    exclusive = tl.cumsum(counts, 0) - counts
    tl.store(starts + tl.cast(tile, tl.int64) * (E + 1) + bins, exclusive, mask=bins <= E)


@triton.jit
def scan_tiles(
    scan,  # which one: a chunk, or with a tile table the number of chunks for the layer
    experts,  # (BLOCK_E,): which experts to scan
    starts,  # (num_tiles, E+1) int32
    tile_table,  # int32 or None
    expert_offsets,  # (C+1, E+1) int32: those of each chunk, then the layer's; (1, E+1) for one chunk
    shifts,  # (2, num_tiles, E) int32: position in the chunk, then in source order, minus rank in the sorted tile
    num_tiles,
    E,
    BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Sum the tiles' counts: the expert offsets, and for each tile where its pairs of an expert go."""
    if tile_table is None:
        begin = 0
        end = num_tiles
    else:
        begin = tl.load(tile_table + 5 * num_tiles + scan)
        end = tl.load(tile_table + 5 * num_tiles + scan + 1)
    offsets = tl.zeros((BLOCK_E,), tl.int32)
    for step in range(begin, end, BLOCK_T):
        steps = step + tl.arange(0, BLOCK_T)
        tiles = _tiles_of_steps(steps, end, tile_table, num_tiles)
        mask = (steps < end)[:, None] & (experts <= E)[None, :]
        block = tl.load(starts + tiles[:, None] * (E + 1) + experts[None, :], mask=mask, other=0)
        offsets += tl.sum(block, 0)
    tl.store(expert_offsets + scan * (E + 1) + experts, offsets, mask=experts <= E)
    earlier = tl.zeros((BLOCK_E,), tl.int32)
    for step in range(begin, end, BLOCK_T):
        steps = step + tl.arange(0, BLOCK_T)
        tiles = _tiles_of_steps(steps, end, tile_table, num_tiles)
        mask = (steps < end)[:, None] & (experts < E)[None, :]
        pointers = starts + tiles[:, None] * (E + 1) + experts[None, :]
        start = tl.load(pointers, mask=mask, other=0)
        counts = tl.load(pointers + 1, mask=mask, other=0) - start
        before = tl.cumsum(counts, 0) - counts
        shift = (offsets + earlier)[None, :] + before - start
        # The second half of the steps is the layer's scan.
        shift_rows = tiles + tl.where(steps < num_tiles, 0, num_tiles)
        tl.store(shifts + shift_rows[:, None] * E + experts[None, :], shift, mask=mask)
        earlier += tl.sum(counts, 0)


@triton.jit
def _tiles_of_steps(steps, end, tile_table, num_tiles):
    """Return the tiles, int64, that a scan meets at these steps."""
    if tile_table is None:
        return steps.to(tl.int64)
    else:
        return tl.load(tile_table + 3 * num_tiles + steps, mask=steps < end, other=0).to(tl.int64)


@triton.jit
def _sorted_keys(keys, LOG_SIZE: tl.constexpr):
    """Sort (2**LOG_SIZE,) different keys from 0 to 2**30 by a bitonic network (Batcher 1968).

    Stage s merges runs of 2**s keys, of which every other one falls. Its step compares keys whose places differ in one
    bit, which is an axis here: a key's partner is the sum of the two without it.
    """
    places = tl.reshape(tl.arange(0, 2**LOG_SIZE), [2] * LOG_SIZE)
    cube = tl.reshape(keys, [2] * LOG_SIZE)
    for stage in tl.static_range(1, LOG_SIZE + 1):
        falls = (places >> stage) & 1
        for bit in tl.static_range(stage - 1, -1, -1):
            partner = tl.sum(cube, LOG_SIZE - 1 - bit, keep_dims=True) - cube
            is_upper = (places >> bit) & 1
            cube = tl.where(is_upper == falls, tl.minimum(cube, partner), tl.maximum(cube, partner))
    return tl.reshape(cube, [2**LOG_SIZE])


@triton.jit
def place_tile(
    tile,
    topk_ids,  # (R, K) integers
    tile_table,  # int32 or None
    expert_offsets,  # (E+1,) int32, of the layer
    shifts,  # (2, num_tiles, E) int32
    pair_index,  # (N,) int32: flat pair ids in storage order
    inverse,  # (R, K) int32: position in the chunk, -1 where skipped
    source_order,  # (N,) int32: storage positions; None without a tile table
    num_pairs,
    num_positions,
    num_tiles,
    E,
    K: tl.constexpr,
    stride_ids_row,
    stride_ids_slot,
    LOG_TILE: tl.constexpr,
):
    """Store a tile's pairs where they belong, and mark the positions that the pairs leave over.

    With one chunk those positions of pair_index become -1. With several chunks, any of which may end early, those
    behind the last pair of all become 0 in source_order, because others index with it.
    """
    TILE: tl.constexpr = 2**LOG_TILE
    first, end, first_position = _tile_range(tile, tile_table, num_pairs, num_tiles, TILE)
    ranks = tl.arange(0, TILE)
    pairs = first + ranks
    experts = _load_experts(pairs, pairs < end, topk_ids, E, K, stride_ids_row, stride_ids_slot)
    keys = _sorted_keys(experts * TILE + ranks, LOG_TILE)
    experts = keys // TILE
    pairs = first + keys % TILE
    active = experts < E
    shift = shifts + tl.cast(tile, tl.int64) * E + experts
    position = tl.where(active, tl.load(shift, mask=active, other=0) + ranks, -1)
    stored = first_position + position
    tl.store(pair_index + stored, pairs, mask=active & (stored < num_positions))
    tl.store(inverse + pairs, position, mask=pairs < end)
    if source_order is not None:
        layer_shift = shift + tl.cast(num_tiles, tl.int64) * E
        place = tl.load(layer_shift, mask=active, other=0) + ranks
        tl.store(source_order + place, stored, mask=active & (place < num_positions))
    # Tile after tile covers all positions, each once.
    positions = tl.cast(tile, tl.int64) * TILE + ranks
    padding = (positions >= tl.load(expert_offsets + E)) & (positions < num_positions)
    if tile_table is None:
        tl.store(pair_index + positions, tl.full((TILE,), -1, tl.int32), mask=padding)
    else:
        tl.store(source_order + positions, tl.zeros((TILE,), tl.int32), mask=padding)
