"""How a grouped product's kernel gets the tiles of its weights: by TMA or through pointers, or decoded."""

import triton
import triton.language as tl

from tritonmoe.ops.kernels.packed_tiles import load_packed_tile

__all__ = ["first_pointers", "gate_and_up_columns", "load_tile"]


@triton.jit
def gate_and_up_columns(
    column_tile,
    F,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HALVES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SUB_N: tl.constexpr,
    STEP: tl.constexpr,
):
    """Return the place, in STEPs, of every STEP-th column of a tile read through pointers, and whether it exists.

    A subtile of 2*SUB_N lanes holds gate and up of SUB_N units: alternating, or one half after the other (HALVES).
    """
    lanes = tl.arange(0, (2 * BLOCK_N if GATED else BLOCK_N) // STEP)
    PIECE: tl.constexpr = SUB_N // STEP
    first = column_tile * (BLOCK_N // STEP)
    if GATED:
        if INTERLEAVED:
            columns = 2 * first + lanes
            mask = columns < 2 * F // STEP
        elif HALVES:
            units = first + lanes // (2 * PIECE) * PIECE + lanes % PIECE
            columns = lanes // PIECE % 2 * (F // STEP) + units
            mask = units < F // STEP
        else:
            tl.static_assert(STEP == 1)
            units = first + lanes // 2
            columns = lanes % 2 * F + units
            mask = units < F
    else:
        columns = first + lanes
        mask = columns < F // STEP
    return columns, mask


@triton.jit
def first_pointers(
    weight,  # (E, depth, columns) in any layout, through its strides
    expert,
    depth,  # (BLOCK_K,) int32
    columns,  # (WIDTH,) int32
    strides,
):
    """Return pointers (BLOCK_K, WIDTH) to an expert's first tile."""
    stride_expert, stride_depth, stride_column, _, _ = strides
    expert_pointer = weight + expert.to(tl.int64) * stride_expert
    return expert_pointer + depth[:, None] * stride_depth + columns[None, :] * stride_column


@triton.jit
def load_tile(
    weight,  # by TMA the descriptor of the weight or of tma.halves; the bytes of a packed one
    scales,  # of a packed weight, or None
    pointers,  # (BLOCK_K, WIDTH), moved on to `start`; None by TMA, and of a packed weight
    expert,
    start,
    depth_size,
    first_column,
    depth_mask,  # (BLOCK_K,): what exists from `start` on
    columns,  # (WIDTH,), or elements of a packed weight
    column_mask,
    group_columns,
    group_mask,
    strides,  # of the weight, (expert, depth, column), and of the scales, (expert, row)
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    PER: tl.constexpr,
    BY_TMA: tl.constexpr,
    TWO_BOXES: tl.constexpr,
    DEPTH_LAST: tl.constexpr,
    EVEN_DEPTH: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Return (BLOCK_K, WIDTH) of one expert's weight from depth `start` on.

    By TMA: from first_column on; DEPTH_LAST: the depth is the contiguous axis; TWO_BOXES: of `tma.halves`, whose column
    is a unit, WIDTH // 2 gate columns, then their up columns. Through pointers: where they point; EVEN_DEPTH: no tile
    ends outside the weight.
    """
    if FORMAT is not None:
        tile = load_packed_tile(
            weight,
            scales,
            expert,
            start,
            depth_size,
            columns,
            column_mask,
            group_columns,
            group_mask,
            strides,
            FORMAT,
            GROUP,
            PER,
            DEPTH_LAST,
            EVEN_DEPTH,
            BLOCK_K,
            WIDTH,
        )
    elif BY_TMA:
        if TWO_BOXES:
            tile = tl.reshape(weight.load([expert, 0, first_column, start]), (WIDTH, BLOCK_K)).T
        elif DEPTH_LAST:
            tile = tl.reshape(weight.load([expert, first_column, start]), (WIDTH, BLOCK_K)).T
        else:
            tile = tl.reshape(weight.load([expert, start, first_column]), (BLOCK_K, WIDTH))
    elif EVEN_DEPTH:
        tile = tl.load(pointers, mask=column_mask[None, :], other=0.0)
    else:
        tile = tl.load(pointers, mask=depth_mask[:, None] & column_mask[None, :], other=0.0)
    return tile
