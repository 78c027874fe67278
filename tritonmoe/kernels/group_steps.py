"""The three steps of grouping, as pieces of kernels: count a tile, scan the tiles, place a tile's pairs.

Tiles of flat pairs never straddle two chunks. The first step stores a tile's exclusive running count over the
experts; the second sums these down the tiles of a chunk (sums of exclusive running counts are the chunk's expert
offsets); the third ranks the pairs of a tile by comparing them and stores every pair in its place.
"""

import triton
import triton.language as tl

__all__ = ["count_tile", "place_tile", "scan_tiles"]


@triton.jit
def _tile_range(
    tile,
    chunk_table,  # (3, C+1) int32: first tile, first flat pair, first storage position; None for one chunk
    num_pairs,
    num_chunks,
    BLOCK_C: tl.constexpr,
    TILE: tl.constexpr,
):
    """Give a tile's first flat pair, the end of its chunk, and the chunk's first storage position."""
    if chunk_table is None:
        return tile * TILE, num_pairs, 0
    else:
        chunks = tl.arange(0, BLOCK_C)
        first_tiles = tl.load(chunk_table + chunks, mask=chunks < num_chunks, other=0)
        # An empty chunk has no tile: the last chunk that starts at or before `tile` is the one that owns it.
        chunk = tl.sum(((first_tiles <= tile) & (chunks < num_chunks)).to(tl.int32), 0) - 1
        first_flat = chunk_table + num_chunks + 1 + chunk
        begin = tl.load(first_flat) + (tile - tl.load(chunk_table + chunk)) * TILE
        return begin, tl.load(first_flat + 1), tl.load(chunk_table + 2 * (num_chunks + 1) + chunk)


@triton.jit
def _pair_of_flat(
    flat,
    valid,
    row_order,  # (R,) int64 or None: the order in which rows are walked
    K,
):
    """Give the row and slot of the flat-th pair in walking order."""
    row = flat // K
    slot = flat % K
    if row_order is not None:
        row = tl.load(row_order + row, mask=valid, other=0)
    return row.to(tl.int64), slot


@triton.jit
def _load_experts(
    row,
    slot,
    valid,
    topk_ids,  # (R, K) integers
    stride_ids_row,
    stride_ids_slot,
    E,
):
    """Give each pair's expert as int32; E for pairs that are skipped or past the end."""
    ids = tl.load(topk_ids + row * stride_ids_row + slot * stride_ids_slot, mask=valid, other=-1)
    return tl.where((ids >= 0) & (ids < E), ids, E).to(tl.int32)


@triton.jit
def count_tile(
    tile,
    topk_ids,  # (R, K) integers
    row_order,  # (R,) int64 or None
    chunk_table,  # (3, C+1) int32 or None
    starts,  # (num_tiles, E+1) int32: pairs of the tile whose expert is smaller
    num_pairs,
    num_chunks,
    E,
    K,
    stride_ids_row,
    stride_ids_slot,
    BLOCK_C: tl.constexpr,
    BLOCK_E: tl.constexpr,
    TILE: tl.constexpr,
):
    """Store the exclusive running count of a tile's pairs over the experts."""
    first, end, _ = _tile_range(tile, chunk_table, num_pairs, num_chunks, BLOCK_C, TILE)
    flat = first + tl.arange(0, TILE)
    valid = flat < end
    row, slot = _pair_of_flat(flat, valid, row_order, K)
    experts = _load_experts(row, slot, valid, topk_ids, stride_ids_row, stride_ids_slot, E)
    counts = tl.histogram(experts, BLOCK_E)
    bins = tl.arange(0, BLOCK_E)
    exclusive = tl.cumsum(counts, 0) - counts
    tl.store(starts + tl.cast(tile, tl.int64) * (E + 1) + bins, exclusive, mask=bins <= E)


@triton.jit
def scan_tiles(
    chunk,
    experts,  # (BLOCK_E,): which experts to scan
    starts,  # (num_tiles, E+1) int32
    chunk_table,  # (3, C+1) int32 or None
    chunk_expert_offsets,  # (C, E+1) int32
    shifts,  # (num_tiles, E) int32: position in the chunk minus rank in the tile's sorted pairs
    num_tiles,
    E,
    BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Sum the tiles' counts: the chunk's expert offsets, and for each tile where its pairs of an expert go."""
    if chunk_table is None:
        first_tile = 0
        end_tile = num_tiles
    else:
        first_tile = tl.load(chunk_table + chunk)
        end_tile = tl.load(chunk_table + chunk + 1)
    offsets = tl.zeros((BLOCK_E,), tl.int32)
    for tile in range(first_tile, end_tile, BLOCK_T):
        tiles = (tile + tl.arange(0, BLOCK_T))[:, None]
        mask = (tiles < end_tile) & (experts <= E)[None, :]
        block = tl.load(starts + tiles.to(tl.int64) * (E + 1) + experts[None, :], mask=mask, other=0)
        offsets += tl.sum(block, 0)
    tl.store(chunk_expert_offsets + chunk * (E + 1) + experts, offsets, mask=experts <= E)
    earlier = tl.zeros((BLOCK_E,), tl.int32)
    for tile in range(first_tile, end_tile, BLOCK_T):
        tiles = (tile + tl.arange(0, BLOCK_T))[:, None]
        mask = (tiles < end_tile) & (experts < E)[None, :]
        pointers = starts + tiles.to(tl.int64) * (E + 1) + experts[None, :]
        start = tl.load(pointers, mask=mask, other=0)
        counts = tl.load(pointers + 1, mask=mask, other=0) - start
        before = tl.cumsum(counts, 0) - counts
        shift = (offsets + earlier)[None, :] + before - start
        tl.store(shifts + tiles.to(tl.int64) * E + experts[None, :], shift, mask=mask)
        earlier += tl.sum(counts, 0)


@triton.jit
def _load_keys(
    first,
    offsets,
    end,
    topk_ids,  # (R, K) integers
    row_order,  # (R,) int64 or None
    E,
    K,
    stride_ids_row,
    stride_ids_slot,
    TILE: tl.constexpr,
):
    """Give validity, pair id, expert and sort key of some pairs of a tile; keys are unique and stable."""
    flat = first + offsets
    valid = flat < end
    row, slot = _pair_of_flat(flat, valid, row_order, K)
    experts = _load_experts(row, slot, valid, topk_ids, stride_ids_row, stride_ids_slot, E)
    return valid, row * K + slot, experts, experts * TILE + offsets


@triton.jit
def place_tile(
    tile,
    topk_ids,  # (R, K) integers
    row_order,  # (R,) int64 or None
    chunk_table,  # (3, C+1) int32 or None
    chunk_expert_offsets,  # (C, E+1) int32
    shifts,  # (num_tiles, E) int32
    sorted_pairs,  # (N,) int32: flat pair ids in storage order, or the values of `pair_values` in that order
    pair_values,  # (R, K) int32 or None
    inverse,  # (R, K) int32 or None: position in the chunk, -1 where skipped
    storage,  # (R, K) int32 or None: position in all chunks' storage, -1 where skipped
    num_pairs,
    num_positions,
    num_chunks,
    E,
    K,
    stride_ids_row,
    stride_ids_slot,
    BLOCK_C: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_OTHERS: tl.constexpr,
):
    """Store a tile's pairs where they belong, and -1 at the positions that one chunk's pairs leave over."""
    first, end, first_position = _tile_range(tile, chunk_table, num_pairs, num_chunks, BLOCK_C, TILE)
    valid, pair, experts, keys = _load_keys(
        first, tl.arange(0, TILE), end, topk_ids, row_order, E, K, stride_ids_row, stride_ids_slot, TILE
    )
    # The rank in the sorted tile is the number of smaller keys.
    rank = tl.zeros((TILE,), tl.int32)
    for start in range(0, TILE, BLOCK_OTHERS):
        others = start + tl.arange(0, BLOCK_OTHERS)
        _, _, _, other_keys = _load_keys(
            first, others, end, topk_ids, row_order, E, K, stride_ids_row, stride_ids_slot, TILE
        )
        rank += tl.sum((other_keys[None, :] < keys[:, None]).to(tl.int32), 1)
    active = experts < E
    shift = tl.load(shifts + tl.cast(tile, tl.int64) * E + experts, mask=active, other=0)
    position = tl.where(active, shift + rank, -1)
    stored = tl.where(active, first_position + position, -1)
    if pair_values is None:
        value = pair.to(tl.int32)
    else:
        value = tl.load(pair_values + pair, mask=active, other=0)
    tl.store(sorted_pairs + stored, value, mask=active & (stored < num_positions))
    if inverse is not None:
        tl.store(inverse + pair, position, mask=valid)
    if storage is not None:
        tl.store(storage + pair, stored, mask=valid)
    if chunk_table is None:
        # Tile after tile covers all positions, each once.
        positions = tl.cast(tile, tl.int64) * TILE + tl.arange(0, TILE)
        padding = (positions >= tl.load(chunk_expert_offsets + E)) & (positions < num_positions)
        tl.store(sorted_pairs + positions, tl.full((TILE,), -1, tl.int32), mask=padding)
