"""Weight gradients: a grouped product summed over each expert's pairs, its operands gathered in the kernel."""

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonmoe.config.layer import KernelOptions
from tritonmoe.ops.grouping import Grouping
from tritonmoe.ops.kernels import ragged_tiles
from tritonmoe.ops.kernels.arithmetic import dot, round_to, split_columns
from tritonmoe.ops.kernels.launch import cdiv, contiguous_columns, dot_precision, launch, next_power_of_2, num_programs
from tritonmoe.ops.kernels.row_tiles import first_tile, row_of, slot_and_column_tile
from tritonmoe.ops.kernels.spans import add_to, num_span_slots, num_workspace_rows, span_of_slot, sum_spans
from tritonmoe.ops.kernels.tiles.config import TileConfig
from tritonmoe.ops.kernels.tiles.left_out import leaving_out_refused_tiles
from tritonmoe.ops.kernels.tiles.tile_choice import grouped_matmul_config

__all__ = ["outer_sums", "span_length"]

MIN_SPAN = 4096
"""A piece of an expert with fewer pairs would cost more in its second pass than it gains."""
ENOUGH_TILES = 512
"""So many tiles keep any GPU busy to the end."""


def span_length(num_pairs: int, tiles_per_expert: int) -> int:
    """Return the pairs of a span, from what the whole layer has: an expert of two spans or more is cut.

    There are at most ENOUGH_TILES / tiles_per_expert spans, rounded up: if one expert has all the pairs, its tiles
    still keep the GPU busy, and the workspace has the size of ENOUGH_TILES accumulators (128 MiB of 128 x 256).
    """
    return max(MIN_SPAN, cdiv(num_pairs, cdiv(ENOUGH_TILES, tiles_per_expert)))


@triton.jit(do_not_specialize=["span", "num_tiles"], do_not_specialize_on_alignment=["expert_offsets"])
def _outer_sums_kernel(
    pair_values,  # (N, P), by storage position, or its `ragged_tiles` descriptor
    row_values,  # (R, Q), by row
    order,  # (N,) int32: storage positions in source order; None where they are the same
    pair_index,  # (N,) int32: flat pair ids in source order
    expert_offsets,  # (E+1,) int32
    out,  # (E, P, Q) in any layout, through its strides
    workspace,  # (N // span, P, Q) fp32 in any layout, through its strides; unless SPLIT, None
    P,
    Q,
    E,
    span,
    num_tiles,
    num_p_tiles,
    num_q_tiles,
    stride_pair_row,
    stride_pair_column,
    stride_row_row,
    stride_row_column,
    stride_out_expert,
    stride_out_p,
    stride_out_q,
    stride_workspace_row,
    stride_workspace_p,
    stride_workspace_q,
    K: tl.constexpr,
    PAIRS_BY_TMA: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    GROUP_M: tl.constexpr,
    SUBTILES: tl.constexpr,
    SPLIT: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tiles_per_slot = num_p_tiles * num_q_tiles
    for tile in range(first_tile(), num_tiles, tl.num_programs(0)):
        expert, first, end, workspace_row = span_of_slot(
            tile // tiles_per_slot, expert_offsets, E, span, BLOCK_E, SPLIT
        )
        if ACCUMULATE:
            is_work = (expert >= 0) & (first < end)
        else:
            is_work = expert >= 0
        if is_work:
            p_tile, q_tile = slot_and_column_tile(tile % tiles_per_slot, num_p_tiles, num_q_tiles, GROUP_M)
            p = p_tile * BLOCK_P + tl.arange(0, BLOCK_P)
            q = q_tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
            accumulator = tl.zeros((BLOCK_P, BLOCK_Q), tl.float32)
            # Indices are loaded a step before what they lead to, into registers: they take no stage from the tiles.
            places = first + tl.arange(0, BLOCK_K)
            pairs = tl.load(pair_index + places, mask=places < end, other=0)
            if order is not None:
                stored = tl.load(order + places, mask=places < end, other=0)
            for start in range(first, end, BLOCK_K):
                places = start + tl.arange(0, BLOCK_K)
                valid = places < end
                rows = row_of(pairs, K).to(tl.int64)
                pairs = tl.load(pair_index + tl.minimum(places + BLOCK_K, end - 1))
                right_pointers = row_values + rows[:, None] * stride_row_row + q[None, :] * stride_row_column
                # Zero on both sides: what lies behind the expert's last pair may be NaN.
                if PAIRS_BY_TMA:
                    left = ragged_tiles.load(pair_values, start, end, p_tile * BLOCK_P, BLOCK_K, BLOCK_P).T
                else:
                    positions = places
                    if order is not None:
                        positions = stored
                        # Masked instead: with the minimum fp32 spills on sm_90 and sm_100 before Triton 3.7.
                        stored = tl.load(order + places + BLOCK_K, mask=places + BLOCK_K < end, other=0)
                    pair_rows = pair_values + positions.to(tl.int64)[None, :] * stride_pair_row
                    # Already (P, pairs): a transpose in registers would keep these loads out of the pipeline on sm_80.
                    left_pointers = pair_rows + p[:, None] * stride_pair_column
                    left = tl.load(left_pointers, mask=valid[None, :] & (p < P)[:, None], other=0.0)
                right = tl.load(right_pointers, mask=valid[:, None] & (q < Q)[None, :], other=0.0)
                accumulator = dot(left, right, accumulator, PRECISION)
            SUB_Q: tl.constexpr = BLOCK_Q // SUBTILES
            subtiles = split_columns(accumulator, BLOCK_P, BLOCK_Q, SUBTILES)
            for part in tl.static_range(SUBTILES):
                p = (p_tile * BLOCK_P + tl.arange(0, BLOCK_P)).to(tl.int64)[:, None]
                q = (q_tile * BLOCK_Q + part * SUB_Q + tl.arange(0, SUB_Q)).to(tl.int64)[None, :]
                mask = (p < P) & (q < Q)
                sums = subtiles[part]
                if SPLIT and workspace_row >= 0:
                    piece = workspace + workspace_row.to(tl.int64) * stride_workspace_row
                    tl.store(piece + p * stride_workspace_p + q * stride_workspace_q, sums, mask=mask)
                else:
                    pointers = out + expert.to(tl.int64) * stride_out_expert + p * stride_out_p + q * stride_out_q
                    if ACCUMULATE:
                        sums = add_to(sums, pointers, mask)
                    tl.store(pointers, round_to(sums, out.dtype.element_ty), mask=mask)


def _max_registers(tile_size: int, num_warps: int) -> int:
    """Return the registers of a thread that leave room for as many programs as shared memory: 1 or, of small tiles, 2.

    ptxas doesn't know shared memory, and by itself spills up to 32 bytes a thread to make room for one more.
    """
    num_programs = 1 if tile_size > 1024 * num_warps else 2
    return min(255, 2048 // (num_warps * num_programs))


def _refusal(pair_values: Tensor, grouping: Grouping) -> str:
    """Return why TMA can't read tiles of the pairs' values; empty where it can."""
    if grouping.source_order is not None:
        return "the pairs of a tile lie in several chunks"
    if pair_values.dtype == torch.float32:
        return "products in fp32 would spill registers with it"
    return ragged_tiles.refusal(pair_values)


def _in_pieces(config: TileConfig, pairs_first: bool) -> TileConfig:
    """Cut the epilogue of a tile that is added to a result: what is there takes registers too.

    On sm_90 a tile in one piece spills 224 bytes a thread, and one whose columns are the pairs' spills 216 in four.
    """
    pieces = 4 if pairs_first else 2
    return replace(config, subtiles=max(config.subtiles, min(pieces, config.block_n // 16)))


@leaving_out_refused_tiles
def outer_sums(
    pair_values: Tensor,
    row_values: Tensor,
    grouping: Grouping,
    pair_index: Tensor,
    pairs_first: bool,
    accumulate: Tensor | None = None,
    options: KernelOptions = KernelOptions(),
) -> Tensor | None:
    """Sum, over each expert's pairs, the outer product of the pair's values and its row's values.

    Args:
        pair_values: (N, P) by storage position. row_values: (R, Q) by row.
        pair_index: (N,) flat pair ids in source order.
        pairs_first: whether the result is (E, P, Q) or (E, Q, P).
        accumulate: where the result is added, of that shape; None is given back then.
    """
    pair_values, row_values = contiguous_columns(pair_values), contiguous_columns(row_values)
    num_experts, p_size, q_size = grouping.num_experts, pair_values.shape[1], row_values.shape[1]
    shape = (p_size, q_size) if pairs_first else (q_size, p_size)
    out = pair_values.new_empty(num_experts, *shape) if accumulate is None else accumulate
    assert out.shape == (num_experts, *shape), f"accumulate is {tuple(out.shape)}, not {(num_experts, *shape)}"
    if grouping.num_pairs == 0:  # no descriptor of them could be made: a kernel for pointers would be compiled
        return out.zero_() if accumulate is None else None
    refusals = {"pair_values": _refusal(pair_values, grouping)}
    config = grouped_matmul_config("weight_grad", pair_values, q_size, p_size, grouping, options, refusals)
    by_tma = config.by_tma("pair_values")
    # Rows without vector loads take the registers of two programs, and some spill where the epilogue works in pieces.
    has_vector_loads = p_size % 8 == 0 and q_size % 8 == 0
    max_registers = _max_registers(config.block_m * config.block_n, config.num_warps) if has_vector_loads else 255
    if accumulate is not None and has_vector_loads:
        config = _in_pieces(config, pairs_first)
    num_p_tiles, num_q_tiles = cdiv(p_size, config.block_m), cdiv(q_size, config.block_n)
    span = span_length(grouping.num_pairs, num_p_tiles * num_q_tiles)
    num_rows = num_workspace_rows(grouping.num_pairs, span)
    workspace = out.new_empty(num_rows, *shape, dtype=torch.float32) if num_rows else None
    num_tiles = num_span_slots(grouping.num_pairs, num_experts, span) * num_p_tiles * num_q_tiles
    p_axis, q_axis = (1, 2) if pairs_first else (2, 1)
    launch(
        _outer_sums_kernel,
        (num_programs(num_tiles, config, options, pair_values.device),),
        ragged_tiles.describe(pair_values, config.block_k, config.block_m) if by_tma else pair_values,
        row_values,
        grouping.source_order,
        pair_index,
        grouping.expert_offsets,
        out,
        workspace,
        p_size,
        q_size,
        num_experts,
        span,
        num_tiles,
        num_p_tiles,
        num_q_tiles,
        *pair_values.stride(),
        *row_values.stride(),
        out.stride(0),
        out.stride(p_axis),
        out.stride(q_axis),
        *((0, 0, 0) if workspace is None else (workspace.stride(axis) for axis in (0, p_axis, q_axis))),
        K=grouping.top_k,
        PAIRS_BY_TMA=by_tma,
        BLOCK_P=config.block_m,
        BLOCK_Q=config.block_n,
        BLOCK_K=config.block_k,
        BLOCK_E=next_power_of_2(num_experts),
        GROUP_M=config.group_m,
        SUBTILES=config.subtiles,
        SPLIT=workspace is not None,
        ACCUMULATE=accumulate is not None,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        max_registers=max_registers,
        PRECISION=dot_precision(pair_values),
    )
    sum_spans(workspace, grouping.expert_offsets, out, span, accumulate is not None)
    return out if accumulate is None else None
