"""Grouping without atomics: a stable counting sort of the pairs by (chunk, expert) in three launches, or in one.

Few pairs of one chunk go through the three steps (group_steps.py) in one program, which also lists their row tiles
(row_tiles.py).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonmoe.ops.kernels.group_steps import count_tile, place_tile, scan_tiles
from tritonmoe.ops.kernels.group_tiles import PAIRS_PER_TILE, TileTable
from tritonmoe.ops.kernels.launch import INTERPRETED, cdiv, launch, next_power_of_2
from tritonmoe.ops.kernels.row_tiles import EXPERTS_PER_STEP, empty_row_tiles, write_row_tiles

__all__ = ["MAX_FEW_PAIRS", "group_few_pairs", "group_pairs"]

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
    count_tile(
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
    scan_tiles(tl.program_id(0), experts, starts, tile_table, expert_offsets, shifts, num_tiles, E, BLOCK_E, BLOCK_T)


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
    place_tile(
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
        count_tile(
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
        scan_tiles(0, experts, starts, None, expert_offsets, shifts, num_tiles, E, BLOCK_E, BLOCK_T)
    tl.debug_barrier()
    for tile in range(num_tiles):
        place_tile(
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
