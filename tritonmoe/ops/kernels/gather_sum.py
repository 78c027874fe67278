"""Gather-sum: each token reads its rows in slot order. Nothing is scattered, so nothing needs an atomic."""

import triton
import triton.language as tl
from torch import Tensor

from tritonmoe.ops.kernels.arithmetic import round_to
from tritonmoe.ops.kernels.launch import INTERPRETED, cdiv, contiguous_columns, launch, next_power_of_2, output

__all__ = ["gather_sum"]


@triton.jit(do_not_specialize=["T"], do_not_specialize_on_alignment=["index", "weights"])
def _gather_sum_kernel(
    y,  # (N, D)
    index,  # (T, J) integers, -1 where there is nothing to add
    weights,  # (T, J) or None
    out,  # (T, D)
    T,
    D,
    stride_y_row,
    stride_y_column,
    stride_index_row,
    stride_index_slot,
    stride_weights_row,
    stride_weights_slot,
    stride_out_row,
    J: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    token_mask = tokens < T
    column_mask = columns < D
    total = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for slot in tl.static_range(J):
        index_pointers = index + tokens * stride_index_row + slot * stride_index_slot
        source = tl.load(index_pointers, mask=token_mask, other=-1).to(tl.int64)
        present = source >= 0
        y_pointers = y + source[:, None] * stride_y_row + columns[None, :] * stride_y_column
        term = tl.load(y_pointers, mask=present[:, None] & column_mask[None, :], other=0.0).to(tl.float32)
        if weights is not None:
            weight_pointers = weights + tokens * stride_weights_row + slot * stride_weights_slot
            # A skipped pair's weight may be NaN.
            term *= tl.load(weight_pointers, mask=present, other=0.0).to(tl.float32)[:, None]
        total += term
    mask = token_mask[:, None] & column_mask[None, :]
    out_pointers = out + tokens[:, None] * stride_out_row + columns[None, :]
    tl.store(out_pointers, round_to(total, out.dtype.element_ty), mask=mask)


def gather_sum(y: Tensor, index: Tensor, weights: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    """Launch the operation `gather_sum` of `backends.ops`."""
    num_tokens, width = index.shape[0], y.shape[1]
    out = output(y, num_tokens, width, out)
    y = contiguous_columns(y)
    block_t, block_d = (32, 64) if INTERPRETED else (4, min(512, next_power_of_2(width)))
    launch(
        _gather_sum_kernel,
        (cdiv(num_tokens, block_t), cdiv(width, block_d)),
        y,
        index,
        weights,
        out,
        num_tokens,
        width,
        *y.stride(),
        *index.stride(),
        *((0, 0) if weights is None else weights.stride()),
        out.stride(0),
        J=index.shape[1],
        BLOCK_T=block_t,
        BLOCK_D=block_d,
    )
    return out
