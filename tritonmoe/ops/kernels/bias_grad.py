"""Bias gradients: each expert's sum over its pairs."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonmoe.ops.grouping import Grouping
from tritonmoe.ops.kernels.arithmetic import round_to
from tritonmoe.ops.kernels.launch import INTERPRETED, cdiv, contiguous_columns, launch, next_power_of_2
from tritonmoe.ops.kernels.spans import num_span_slots, num_workspace_rows, span_of_slot, sum_spans

__all__ = ["bias_grad"]

SPAN = 2048
"""One program sums so many pairs, one after another; an expert of at least two spans is cut."""


@triton.jit(do_not_specialize=["num_slots"], do_not_specialize_on_alignment=["expert_offsets"])
def _bias_grad_kernel(
    values,  # (n, width): rows found through `index`
    index,  # (N,) int32 in source order: flat pair ids (SCALED), storage positions, or None for positions
    scale,  # (R, K), or None when not SCALED
    expert_offsets,  # (E+1,) int32
    out,  # (E, width)
    workspace,  # (N // SPAN, width) fp32; unless SPLIT, None
    width,
    E,
    K,
    num_slots,
    stride_values_row,
    stride_values_column,
    stride_scale_row,
    stride_scale_slot,
    SPAN: tl.constexpr,
    SCALED: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    expert, first, end, workspace_row = span_of_slot(
        tl.program_id(0) % num_slots, expert_offsets, E, SPAN, BLOCK_E, SPLIT
    )
    if expert < 0:
        return
    columns = tl.program_id(0) // num_slots * BLOCK_N + tl.arange(0, BLOCK_N)
    sums = tl.zeros((BLOCK_K, BLOCK_N), tl.float32)
    for start in range(first, end, BLOCK_K):
        rows = start + tl.arange(0, BLOCK_K)
        valid = rows < end
        if index is not None:
            rows = tl.load(index + rows, mask=valid, other=0)
        slots = rows
        if SCALED:
            slots = rows % K
            rows = rows // K
        rows = rows.to(tl.int64)
        pointers = values + rows[:, None] * stride_values_row + columns[None, :] * stride_values_column
        block = tl.load(pointers, mask=valid[:, None] & (columns < width)[None, :], other=0.0).to(tl.float32)
        if SCALED:
            scale_pointers = scale + rows * stride_scale_row + slots * stride_scale_slot
            block *= tl.load(scale_pointers, mask=valid, other=0.0).to(tl.float32)[:, None]
        sums += block
    total = tl.sum(sums, 0)
    if SPLIT and workspace_row >= 0:
        tl.store(workspace + workspace_row.to(tl.int64) * width + columns, total, mask=columns < width)
    else:
        out_pointers = out + expert.to(tl.int64) * width + columns
        tl.store(out_pointers, round_to(total, out.dtype.element_ty), mask=columns < width)


def bias_grad(values: Tensor, grouping: Grouping, index: Tensor | None, scale: Tensor | None = None) -> Tensor:
    """Sum rows of `values` per expert, (E, width).

    Args:
        values: (N, width) by storage position with `index` the source order; or (R, width) by row, with
            `index` the flat pair ids in source order and `scale` (R, K) their weights.
    """
    values = contiguous_columns(values)
    width, num_experts = values.shape[1], grouping.num_experts
    out = values.new_empty(num_experts, width)
    num_rows = num_workspace_rows(grouping.num_pairs, SPAN)
    workspace = values.new_empty(num_rows, 1, width, dtype=torch.float32) if num_rows else None
    num_slots = num_span_slots(grouping.num_pairs, num_experts, SPAN)
    # No vector load fits rows of an odd width: every element's address takes registers.
    block_n = min(32 if width % 8 else 64, max(16, next_power_of_2(width)))
    launch(
        _bias_grad_kernel,
        (num_slots * cdiv(width, block_n),),
        values,
        index,
        scale,
        grouping.expert_offsets,
        out,
        workspace,
        width,
        num_experts,
        grouping.top_k,
        num_slots,
        values.stride(0),
        values.stride(1),
        0 if scale is None else scale.stride(0),
        0 if scale is None else scale.stride(1),
        SPAN=SPAN,
        SCALED=scale is not None,
        SPLIT=workspace is not None,
        BLOCK_K=32 if INTERPRETED else 64,
        BLOCK_N=block_n,
        BLOCK_E=next_power_of_2(num_experts),
        num_warps=8,  # with 4, Triton 3.6 spills 8 bytes a thread on sm_100
    )
    sum_spans(workspace, grouping.expert_offsets, out.unsqueeze(1), SPAN, False)
    return out
