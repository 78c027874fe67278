"""Grouping without atomics: a stable counting sort of the pairs by (chunk, expert) in three launches, or in one.

Few pairs of one chunk go through the three steps (group_steps.py) in one program.
"""

import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..config import MAX_EXPERTS, MAX_TOP_K
from .group_steps import count_tile, place_tile, scan_tiles
from .launch import INTERPRETED, launch

__all__ = ["MAX_FEW_PAIRS", "ChunkTable", "check_limits", "group_few_pairs", "place_pairs", "sort_pairs"]

PAIRS_PER_TILE = 256 if INTERPRETED else 512
MAX_FEW_PAIRS = 1024
"""Up to here one program is faster than three launches."""
FEW_PAIRS_PER_TILE = 128


@triton.jit(do_not_specialize=["num_pairs"])
def _count_kernel(
    topk_ids,  # (R, K) integers
    row_order,  # (R,) int64 or None
    chunk_table,  # (3, C+1) int32 or None
    starts,  # (num_tiles, E+1) int32
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
    count_tile(
        tl.program_id(0),
        topk_ids,
        row_order,
        chunk_table,
        starts,
        num_pairs,
        num_chunks,
        E,
        K,
        stride_ids_row,
        stride_ids_slot,
        BLOCK_C,
        BLOCK_E,
        TILE,
    )


@triton.jit(do_not_specialize=["num_tiles"])
def _scan_kernel(
    starts,  # (num_tiles, E+1) int32
    chunk_table,  # (3, C+1) int32 or None
    chunk_expert_offsets,  # (C, E+1) int32
    shifts,  # (num_tiles, E) int32
    num_tiles,
    E,
    BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    experts = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    scan_tiles(
        tl.program_id(0),
        experts,
        starts,
        chunk_table,
        chunk_expert_offsets,
        shifts,
        num_tiles,
        E,
        BLOCK_E,
        BLOCK_T,
    )


@triton.jit(do_not_specialize=["num_pairs", "num_positions"])
def _place_kernel(
    topk_ids,  # (R, K) integers
    row_order,  # (R,) int64 or None
    chunk_table,  # (3, C+1) int32 or None
    chunk_expert_offsets,  # (C, E+1) int32
    shifts,  # (num_tiles, E) int32
    sorted_pairs,  # (N,) int32
    pair_values,  # (R, K) int32 or None
    inverse,  # (R, K) int32 or None
    storage,  # (R, K) int32 or None
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
    place_tile(
        tl.program_id(0),
        topk_ids,
        row_order,
        chunk_table,
        chunk_expert_offsets,
        shifts,
        sorted_pairs,
        pair_values,
        inverse,
        storage,
        num_pairs,
        num_positions,
        num_chunks,
        E,
        K,
        stride_ids_row,
        stride_ids_slot,
        BLOCK_C,
        TILE,
        BLOCK_OTHERS,
    )


@triton.jit(do_not_specialize=["num_pairs", "num_positions", "num_tiles"])
def _group_few_kernel(
    topk_ids,  # (R, K) integers
    starts,  # (num_tiles, E+1) int32
    chunk_expert_offsets,  # (1, E+1) int32
    shifts,  # (num_tiles, E) int32
    sorted_pairs,  # (N,) int32
    inverse,  # (R, K) int32
    num_pairs,
    num_positions,
    num_tiles,
    E,
    K,
    stride_ids_row,
    stride_ids_slot,
    BLOCK_BINS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_OTHERS: tl.constexpr,
):
    """Count, scan and place in one program: what it wrote before a barrier, it can read behind it."""
    for tile in range(num_tiles):
        count_tile(
            tile, topk_ids, None, None, starts, num_pairs, 1, E, K, stride_ids_row, stride_ids_slot, 1, BLOCK_BINS, TILE
        )
    tl.debug_barrier()
    for first_expert in range(0, E + 1, BLOCK_E):
        experts = first_expert + tl.arange(0, BLOCK_E)
        scan_tiles(0, experts, starts, None, chunk_expert_offsets, shifts, num_tiles, E, BLOCK_E, BLOCK_T)
    tl.debug_barrier()
    for tile in range(num_tiles):
        place_tile(
            tile,
            topk_ids,
            None,
            None,
            chunk_expert_offsets,
            shifts,
            sorted_pairs,
            None,
            inverse,
            None,
            num_pairs,
            num_positions,
            1,
            E,
            K,
            stride_ids_row,
            stride_ids_slot,
            1,
            TILE,
            BLOCK_OTHERS,
        )


def check_limits(num_experts: int, top_k: int) -> None:
    """Raise ValueError for more experts or more slots of a token than the kernels take."""
    for name, value, limit in (("E (experts)", num_experts, MAX_EXPERTS), ("K (experts per token)", top_k, MAX_TOP_K)):
        if value > limit:
            raise ValueError(
                f"{name} is {value}, the Triton kernels take at most {limit}: use backend='torch', which has no limit"
            )


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


def _num_bins(num_experts: int) -> int:
    """One bin for each expert and one for skipped pairs; tl.histogram wants at least one for each thread."""
    return max(256, triton.next_power_of_2(num_experts + 1))


def group_few_pairs(topk_ids: Tensor, num_experts: int, num_positions: int) -> tuple[Tensor, Tensor, Tensor]:
    """Group one chunk of at most MAX_FEW_PAIRS pairs in one launch of one program.

    Returns:
        The pairs in storage order (num_positions,), -1 past their end; the expert offsets (1, E+1); the inverse (R, K).
    """
    num_pairs = topk_ids.numel()
    num_tiles = triton.cdiv(num_pairs, FEW_PAIRS_PER_TILE)
    starts = topk_ids.new_empty(num_tiles, num_experts + 1, dtype=torch.int32)
    shifts = topk_ids.new_empty(num_tiles, num_experts, dtype=torch.int32)
    offsets = topk_ids.new_empty(1, num_experts + 1, dtype=torch.int32)
    sorted_pairs = topk_ids.new_empty(num_positions, dtype=torch.int32)
    inverse = topk_ids.new_empty(topk_ids.shape, dtype=torch.int32)
    launch(
        _group_few_kernel,
        (1,),
        topk_ids,
        starts,
        offsets,
        shifts,
        sorted_pairs,
        inverse,
        num_pairs,
        num_positions,
        num_tiles,
        num_experts,
        topk_ids.shape[1],
        topk_ids.stride(0),
        topk_ids.stride(1),
        BLOCK_BINS=_num_bins(num_experts),
        BLOCK_E=128,
        BLOCK_T=8,
        TILE=FEW_PAIRS_PER_TILE,
        BLOCK_OTHERS=FEW_PAIRS_PER_TILE if INTERPRETED else 64,  # 16, 32 and 128 spill on some target or Triton
    )
    return sorted_pairs, offsets, inverse


def sort_pairs(
    topk_ids: Tensor, num_experts: int, table: ChunkTable, row_order: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Count: give the chunks' expert offsets (C, E+1) and the shifts that `place_pairs` needs, both int32."""
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
        BLOCK_E=_num_bins(num_experts),
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
    offsets: Tensor,
    shifts: Tensor,
    *,
    row_order: Tensor | None = None,
    pair_values: Tensor | None = None,
    inverse: Tensor | None = None,
    storage: Tensor | None = None,
) -> Tensor:
    """Place: give the pairs in storage order (N,), -1 past their end; fill `inverse` and `storage` where given."""
    sorted_pairs = topk_ids.new_empty(table.num_positions, dtype=torch.int32)
    launch(
        _place_kernel,
        (table.num_tiles,),
        topk_ids,
        row_order,
        table.on_device,
        offsets,
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
