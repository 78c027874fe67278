"""How a grouped product's kernel gets the tiles of its weights: by TMA or through pointers, the same numbers."""

import triton
import triton.language as tl

__all__ = ["first_pointers", "load_tile"]


@triton.jit
def first_pointers(
    weight,  # (E, depth, columns) in any layout, through its strides
    expert,
    depth,  # (BLOCK_K,) int32
    columns,  # (WIDTH,) int32
    stride_expert,
    stride_depth,
    stride_column,
):
    """Return pointers (BLOCK_K, WIDTH) to an expert's first tile."""
    expert_pointer = weight + expert.to(tl.int64) * stride_expert
    return expert_pointer + depth[:, None] * stride_depth + columns[None, :] * stride_column


@triton.jit
def load_tile(
    weight,  # by TMA the descriptor of the weight or of tma.halves
    pointers,  # (BLOCK_K, WIDTH), moved on to `start`; None by TMA
    expert,
    start,
    first_column,
    depth_mask,  # (BLOCK_K,): what exists from `start` on
    column_mask,  # (WIDTH,)
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
    if BY_TMA:
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
