"""Grouping without atomics: a stable counting sort of the pairs by (chunk, expert) in three launches, or in one.

The three steps count a tile, scan the tiles, and place a tile's pairs. The first stores a tile's exclusive running
count over the experts; the second sums these down the tiles of a chunk (sums of exclusive running counts are the
chunk's expert offsets); the third sorts the pairs of a tile and stores every pair in its place. Few pairs of one chunk
go through the three in one program, which also lists their row tiles (row_tiles.py).

With several chunks a tile has pairs of one chunk and one source rank. The second step then also sums down all tiles by
(source rank, chunk), which gives the layer's expert offsets, and the third stores the source order as well. The host
knows what tiles there are, and hands them over in `tile_table` (group_tiles.TileTable), int32, part after part:
- first flat pair of each tile; end of its pairs; first storage position of its chunk: num_tiles each,
- the tiles in the order in which scans meet them: by chunk, then all once more by source rank: 2 * num_tiles,
- where in that order each chunk's scan begins, where the layer's, and where that ends: C + 2.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonmoe.ops.kernels.group_tiles import PAIRS_PER_TILE, TileTable
from tritonmoe.ops.kernels.launch import INTERPRETED, cdiv, launch, next_power_of_2
from tritonmoe.ops.kernels.row_tiles import EXPERTS_PER_STEP, empty_row_tiles, row_of, write_row_tiles

__all__ = ["MAX_FEW_PAIRS", "group_few_pairs", "group_pairs"]


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
def _count_tile(
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
def _scan_tiles(
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
def _place_tile(
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


MAX_FEW_PAIRS = 1024
"""Up to so many pairs one program is faster than three launches."""
FEW_PAIRS_PER_TILE = 128


@triton.jit(do_not_specialize=["num_pairs", "num_tiles"])
def _count_kernel(
    topk_ids,  # (R, K) integers
    tile_table,  # int32 or None
    starts,  # (num_tiles, E+1) int32
    num_pairs,
    num_tiles,
    E,
    stride_ids_row,
    stride_ids_slot,
    K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    TILE: tl.constexpr,
):
    _count_tile(
        tl.program_id(0),
        topk_ids,
        tile_table,
        starts,
        num_pairs,
        num_tiles,
        E,
        K,
        stride_ids_row,
        stride_ids_slot,
        BLOCK_E,
        TILE,
    )


@triton.jit(do_not_specialize=["num_tiles"])
def _scan_kernel(
    starts,  # (num_tiles, E+1) int32
    tile_table,  # int32 or None
    expert_offsets,  # (C+1, E+1) int32; (1, E+1) for one chunk
    shifts,  # (2, num_tiles, E) int32; (1, num_tiles, E) for one chunk
    num_tiles,
    E,
    BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    experts = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    _scan_tiles(tl.program_id(0), experts, starts, tile_table, expert_offsets, shifts, num_tiles, E, BLOCK_E, BLOCK_T)


@triton.jit(
    do_not_specialize=["num_pairs", "num_positions", "num_tiles"], do_not_specialize_on_alignment=["expert_offsets"]
)
def _place_kernel(
    topk_ids,  # (R, K) integers
    tile_table,  # int32 or None
    expert_offsets,  # (E+1,) int32, of the layer
    shifts,  # (2, num_tiles, E) int32; (1, num_tiles, E) for one chunk
    pair_index,  # (N,) int32
    inverse,  # (R, K) int32
    source_order,  # (N,) int32 or None
    num_pairs,
    num_positions,
    num_tiles,
    E,
    stride_ids_row,
    stride_ids_slot,
    K: tl.constexpr,
    LOG_TILE: tl.constexpr,
):
    _place_tile(
        tl.program_id(0),
        topk_ids,
        tile_table,
        expert_offsets,
        shifts,
        pair_index,
        inverse,
        source_order,
        num_pairs,
        num_positions,
        num_tiles,
        E,
        K,
        stride_ids_row,
        stride_ids_slot,
        LOG_TILE,
    )


@triton.jit(do_not_specialize=["num_pairs", "num_positions", "num_tiles", "num_slots"])
def _group_few_kernel(
    topk_ids,  # (R, K) integers
    starts,  # (num_tiles, E+1) int32, and behind it the shifts (num_tiles, E)
    expert_offsets,  # (1, E+1) int32
    pair_index,  # (N,) int32
    inverse,  # (R, K) int32
    row_tiles,  # (1, num_slots, 4, 4) int32
    num_pairs,
    num_positions,
    num_tiles,
    num_slots,
    E,
    stride_ids_row,
    stride_ids_slot,
    K: tl.constexpr,
    BLOCK_BINS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    LOG_TILE: tl.constexpr,
):
    """Count, scan, place and list the row tiles in one program, which can read behind a barrier what it wrote."""
    shifts = starts + num_tiles * (E + 1)
    for tile in range(num_tiles):
        _count_tile(
            tile,
            topk_ids,
            None,
            starts,
            num_pairs,
            num_tiles,
            E,
            K,
            stride_ids_row,
            stride_ids_slot,
            BLOCK_BINS,
            2**LOG_TILE,
        )
    tl.debug_barrier()
    for first_expert in range(0, E + 1, BLOCK_E):
        experts = first_expert + tl.arange(0, BLOCK_E)
        _scan_tiles(0, experts, starts, None, expert_offsets, shifts, num_tiles, E, BLOCK_E, BLOCK_T)
    tl.debug_barrier()
    for tile in range(num_tiles):
        _place_tile(
            tile,
            topk_ids,
            None,
            expert_offsets,
            shifts,
            pair_index,
            inverse,
            None,
            num_pairs,
            num_positions,
            num_tiles,
            E,
            K,
            stride_ids_row,
            stride_ids_slot,
            LOG_TILE,
        )
    write_row_tiles(0, 1, expert_offsets, row_tiles, num_slots, E, BLOCK_E)


def _num_bins(num_experts: int) -> int:
    """Return one bin for each expert and one for skipped pairs; tl.histogram wants at least one for each thread."""
    return max(256, next_power_of_2(num_experts + 1))


def group_few_pairs(topk_ids: Tensor, num_experts: int, num_positions: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Group one chunk of at most MAX_FEW_PAIRS pairs in one launch of one program.

    Returns:
        The pairs in storage order (num_positions,), -1 past their end; the expert offsets (1, E+1); the inverse (R, K);
        the row tiles.
    """
    num_pairs = topk_ids.numel()
    num_tiles = cdiv(num_pairs, FEW_PAIRS_PER_TILE)
    starts_and_shifts = topk_ids.new_empty(num_tiles * (2 * num_experts + 1), dtype=torch.int32)
    offsets = topk_ids.new_empty(1, num_experts + 1, dtype=torch.int32)
    pair_index = topk_ids.new_empty(num_positions, dtype=torch.int32)
    inverse = topk_ids.new_empty(topk_ids.shape, dtype=torch.int32)
    row_tiles = empty_row_tiles(1, num_positions, num_experts, topk_ids)
    launch(
        _group_few_kernel,
        (1,),
        topk_ids,
        starts_and_shifts,
        offsets,
        pair_index,
        inverse,
        row_tiles,
        num_pairs,
        num_positions,
        num_tiles,
        row_tiles.shape[1],
        num_experts,
        topk_ids.stride(0),
        topk_ids.stride(1),
        K=topk_ids.shape[1],
        BLOCK_BINS=_num_bins(num_experts),
        BLOCK_E=EXPERTS_PER_STEP,
        BLOCK_T=8,
        LOG_TILE=FEW_PAIRS_PER_TILE.bit_length() - 1,
        max_registers=255,  # it is alone
    )
    return pair_index, offsets, inverse, row_tiles


def group_pairs(
    topk_ids: Tensor, num_experts: int, table: TileTable, num_positions: int
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Group any number of pairs in three launches, which count, scan and place.

    Returns:
        All int32: the pairs in storage order (num_positions,), with one chunk -1 past their end; the expert offsets of
        each chunk and, with several, of the layer, (C+1, E+1) or (1, E+1); the inverse (R, K); with several chunks the
        source order (num_positions,), 0 past the end of all pairs.
    """
    starts = topk_ids.new_empty(table.num_tiles, num_experts + 1, dtype=torch.int32)
    assert num_positions <= table.num_pairs, f"{num_positions} positions for {table.num_pairs} pairs"
    num_orders = 1 if table.on_device is None else 2
    shifts = topk_ids.new_empty(num_orders, table.num_tiles, num_experts, dtype=torch.int32)
    offsets = topk_ids.new_empty(table.num_scans, num_experts + 1, dtype=torch.int32)
    pair_index = topk_ids.new_empty(num_positions, dtype=torch.int32)
    inverse = topk_ids.new_empty(topk_ids.shape, dtype=torch.int32)
    source_order = None if table.on_device is None else torch.empty_like(pair_index)
    launch(
        _count_kernel,
        (table.num_tiles,),
        topk_ids,
        table.on_device,
        starts,
        table.num_pairs,
        table.num_tiles,
        num_experts,
        topk_ids.stride(0),
        topk_ids.stride(1),
        K=topk_ids.shape[1],
        BLOCK_E=_num_bins(num_experts),
        TILE=PAIRS_PER_TILE,
    )
    block_e = 128 if INTERPRETED else 4  # many programs, each of few steps: what a step waits for is memory
    launch(
        _scan_kernel,
        (table.num_scans, cdiv(num_experts + 1, block_e)),
        starts,
        table.on_device,
        offsets,
        shifts,
        table.num_tiles,
        num_experts,
        BLOCK_E=block_e,
        BLOCK_T=8 if INTERPRETED else 256,
    )
    launch(
        _place_kernel,
        (table.num_tiles,),
        topk_ids,
        table.on_device,
        offsets[-1],
        shifts,
        pair_index,
        inverse,
        source_order,
        table.num_pairs,
        num_positions,
        table.num_tiles,
        num_experts,
        topk_ids.stride(0),
        topk_ids.stride(1),
        K=topk_ids.shape[1],
        LOG_TILE=PAIRS_PER_TILE.bit_length() - 1,
    )
    return pair_index, offsets, inverse, source_order
