"""The gradients of the gate weights: the second kernel of `down_grad`, which sums what its column tiles left."""

import triton
import triton.language as tl
from torch import Tensor

from tritonmoe.ops.grouping import Grouping
from tritonmoe.ops.kernels.launch import launch, next_power_of_2
from tritonmoe.ops.kernels.row_tiles import num_tile_slots, row_tiles_of, tile_of_slot

__all__ = ["sum_partials"]


@triton.jit(do_not_specialize=["N"], do_not_specialize_on_alignment=["pair_index"])
def _sum_partials_kernel(
    partial_sums,  # (num_column_tiles, N) fp32
    dout,  # (R, D)
    bias,  # (E, D) or None
    pair_index,  # (N,) int32
    row_tiles,  # (1, num_slots, 4, 4) int32
    dweights,  # (N,) fp32
    D,
    K,
    N,
    num_column_tiles,
    stride_dout_row,
    stride_dout_column,
    stride_bias_expert,
    stride_bias_column,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    expert, first, end = tile_of_slot(tl.program_id(0), row_tiles, BLOCK_M)
    if expert < 0:
        return
    positions = first + tl.arange(0, BLOCK_M)
    valid = positions < end
    total = tl.zeros((BLOCK_M,), tl.float32)
    for column_tile in range(num_column_tiles):
        total += tl.load(partial_sums + tl.cast(column_tile, tl.int64) * N + positions, mask=valid, other=0.0)
    if bias is not None:
        rows = tl.load(pair_index + positions, mask=valid, other=0) // K
        dout_rows = dout + rows.to(tl.int64)[:, None] * stride_dout_row
        products = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
        for start in range(0, D, BLOCK_K):
            columns = start + tl.arange(0, BLOCK_K)
            bias_pointers = bias + expert.to(tl.int64) * stride_bias_expert + columns * stride_bias_column
            bias_row = tl.load(bias_pointers, mask=columns < D, other=0.0).to(tl.float32)
            dout_tile = tl.load(
                dout_rows + columns[None, :] * stride_dout_column, mask=(columns < D)[None, :], other=0.0
            )
            products += dout_tile.to(tl.float32) * bias_row[None, :]
        total += tl.sum(products, 1)
    tl.store(dweights + positions, total, mask=valid)


def sum_partials(
    partial_sums: Tensor, dout: Tensor, down_bias: Tensor | None, grouping: Grouping, dweights: Tensor
) -> None:
    """Write <g, a> + <dout_t, b2> of every pair into dweights.

    Args:
        partial_sums: (num_column_tiles, N) fp32, the parts of <g, a>, which are added from the first to the last.
        dout: (R, D). down_bias: (E, D) or None. dweights: (N,) fp32.
    """
    num_pairs, num_experts, depth = grouping.num_pairs, grouping.num_experts, dout.shape[1]
    block_m = 32
    launch(
        _sum_partials_kernel,
        (num_tile_slots(num_pairs, num_experts, block_m),),
        partial_sums,
        dout,
        down_bias,
        grouping.pair_index,
        row_tiles_of(grouping),
        dweights,
        depth,
        grouping.top_k,
        num_pairs,
        partial_sums.shape[0],
        *dout.stride(),
        *((0, 0) if down_bias is None else down_bias.stride()),
        BLOCK_M=block_m,
        BLOCK_K=min(128, next_power_of_2(depth)),
    )
