"""Rows copied into storage order, for a product that reads them as boxes instead of through an index."""

import triton
import triton.language as tl
from torch import Tensor

from tritonmoe.ops.grouping import Grouping
from tritonmoe.ops.kernels.launch import INTERPRETED, cdiv, launch, next_power_of_2, output

__all__ = ["gather_rows"]


@triton.jit(do_not_specialize_on_alignment=["pair_index", "expert_offsets"])
def _gather_rows_kernel(
    x,  # (R, D)
    pair_index,  # (N,) int32
    expert_offsets,  # (E+1,) int32
    out,  # (N, D), dtype of x
    D,
    E,
    K,
    stride_x_row,
    stride_x_column,
    stride_out_row,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    positions = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    valid = positions < tl.load(expert_offsets + E)
    rows = (tl.load(pair_index + positions, mask=valid, other=0) // K).to(tl.int64)
    mask = valid[:, None] & (columns < D)[None, :]
    values = tl.load(x + rows[:, None] * stride_x_row + columns[None, :] * stride_x_column, mask=mask)
    tl.store(out + positions.to(tl.int64)[:, None] * stride_out_row + columns[None, :], values, mask=mask)


def gather_rows(x: Tensor, grouping: Grouping) -> Tensor:
    """Return the row (N, D) of x at every storage position; behind the last pair nothing is written."""
    num_pairs, width = grouping.num_pairs, x.shape[1]
    out = output(x, num_pairs, width)
    block_m, block_d = (32, 64) if INTERPRETED else (4, min(512, next_power_of_2(width)))
    launch(
        _gather_rows_kernel,
        (cdiv(num_pairs, block_m), cdiv(width, block_d)),
        x,
        grouping.pair_index,
        grouping.expert_offsets,
        out,
        width,
        grouping.num_experts,
        grouping.top_k,
        x.stride(0),
        x.stride(1),
        out.stride(0),
        BLOCK_M=block_m,
        BLOCK_D=block_d,
    )
    return out
