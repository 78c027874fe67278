"""Grouping without atomics: a stable counting sort of the pairs by (chunk, expert) in three launches.

Tiles of flat pairs never straddle two chunks. Per tile the first kernel stores the exclusive running count over the
experts; the second sums these down the tiles of a chunk (sums of exclusive running counts are the chunk's expert
offsets); the third ranks the pairs of a tile by comparing them and stores every pair in its place.
"""

import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import INTERPRETED, launch

__all__ = ["ChunkTable", "place_pairs", "sort_pairs"]

PAIRS_PER_TILE = 256 if INTERPRETED else 512


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


@triton.jit(do_not_specialize=["num_pairs"])
def _count_kernel(
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
    tile = tl.program_id(0)
    first, end, _ = _tile_range(tile, chunk_table, num_pairs, num_chunks, BLOCK_C, TILE)
    flat = first + tl.arange(0, TILE)
    valid = flat < end
    row, slot = _pair_of_flat(flat, valid, row_order, K)
    experts = _load_experts(row, slot, valid, topk_ids, stride_ids_row, stride_ids_slot, E)
    counts = tl.histogram(experts, BLOCK_E)
    bins = tl.arange(0, BLOCK_E)
    exclusive = tl.cumsum(counts, 0) - counts
    tl.store(starts + tile.to(tl.int64) * (E + 1) + bins, exclusive, mask=bins <= E)


@triton.jit(do_not_specialize=["num_tiles"])
def _scan_kernel(
    starts,  # (num_tiles, E+1) int32
    chunk_table,  # (3, C+1) int32 or None
    chunk_expert_offsets,  # (C, E+1) int32
    shifts,  # (num_tiles, E) int32: position in the chunk minus rank in the tile's sorted pairs
    num_tiles,
    E,
    BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    chunk = tl.program_id(0)
    experts = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
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


@triton.jit(do_not_specialize=["num_pairs", "num_positions"])
def _place_kernel(
    topk_ids,  # (R, K) integers
    row_order,  # (R,) int64 or None
    chunk_table,  # (3, C+1) int32 or None
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
    tile = tl.program_id(0)
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
    shift = tl.load(shifts + tile.to(tl.int64) * E + experts, mask=active, other=0)
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


class ChunkTable:
    """Where tiles, flat pairs and storage of each chunk start, on the host and (several chunks) on the device."""

    def __init__(
        self, row_offsets: tuple[int, ...], pair_offsets: tuple[int, ...], top_k: int, device: torch.device
    ) -> None:
        self.num_chunks = len(row_offsets) - 1
        tiles = [0]
        for first, last in itertools.pairwise(row_offsets):
            tiles.append(tiles[-1] + triton.cdiv((last - first) * top_k, PAIRS_PER_TILE))
        self.num_tiles = tiles[-1]
        self.num_pairs = row_offsets[-1] * top_k
        self.num_positions = pair_offsets[-1]
        self.on_device: Tensor | None = None
        if self.num_chunks > 1:
            table = torch.tensor([tiles, [row * top_k for row in row_offsets], pair_offsets], dtype=torch.int32)
            if device.type == "cuda":
                # Pageable memory would make the copy wait for the device.
                table = table.pin_memory()
            self.on_device = table.to(device, non_blocking=True)

    @property
    def block_c(self) -> int:
        return triton.next_power_of_2(self.num_chunks)


def sort_pairs(
    topk_ids: Tensor, num_experts: int, table: ChunkTable, row_order: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Count: give the chunks' expert offsets (C, E+1) and what `place_pairs` needs, both int32."""
    starts = topk_ids.new_empty(table.num_tiles, num_experts + 1, dtype=torch.int32)
    shifts = topk_ids.new_empty(table.num_tiles, num_experts, dtype=torch.int32)
    offsets = topk_ids.new_empty(table.num_chunks, num_experts + 1, dtype=torch.int32)
    launch(
        _count_kernel,
        (table.num_tiles,),
        topk_ids,
        row_order,
        table.on_device,
        starts,
        table.num_pairs,
        table.num_chunks,
        num_experts,
        topk_ids.shape[1],
        topk_ids.stride(0),
        topk_ids.stride(1),
        BLOCK_C=table.block_c,
        BLOCK_E=max(256, triton.next_power_of_2(num_experts + 1)),
        TILE=PAIRS_PER_TILE,
    )
    block_e = 128 if INTERPRETED else 16
    launch(
        _scan_kernel,
        (table.num_chunks, triton.cdiv(num_experts + 1, block_e)),
        starts,
        table.on_device,
        offsets,
        shifts,
        table.num_tiles,
        num_experts,
        BLOCK_E=block_e,
        BLOCK_T=8 if INTERPRETED else 64,
    )
    return offsets, shifts


def place_pairs(
    topk_ids: Tensor,
    num_experts: int,
    table: ChunkTable,
    shifts: Tensor,
    *,
    row_order: Tensor | None = None,
    pair_values: Tensor | None = None,
    inverse: Tensor | None = None,
    storage: Tensor | None = None,
) -> Tensor:
    """Place: give the pairs in storage order (N,), -1 past their end; fill `inverse` and `storage` where given."""
    sorted_pairs = torch.full((table.num_positions,), -1, dtype=torch.int32, device=topk_ids.device)
    launch(
        _place_kernel,
        (table.num_tiles,),
        topk_ids,
        row_order,
        table.on_device,
        shifts,
        sorted_pairs,
        pair_values,
        inverse,
        storage,
        table.num_pairs,
        table.num_positions,
        table.num_chunks,
        num_experts,
        topk_ids.shape[1],
        topk_ids.stride(0),
        topk_ids.stride(1),
        BLOCK_C=table.block_c,
        TILE=PAIRS_PER_TILE,
        BLOCK_OTHERS=PAIRS_PER_TILE if INTERPRETED else 32,
    )
    return sorted_pairs
