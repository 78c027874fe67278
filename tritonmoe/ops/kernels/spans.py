"""Spans: a hot expert's pairs cut into pieces that run side by side, and the ordered sum of what they give.

Worked example with span = 4: expert_offsets = [0, 3, 14, 19] means experts of 3, 11 and 5 pairs. Only an expert of at
least two whole spans is cut: here expert 1, into the pairs 3..7 and 7..14 (the last span takes the rest). Expert e owns
the slots from expert_offsets[e] // span + e on, a cut expert the workspace rows from expert_offsets[e] // span on:

    slot                0         1              2              3       4         5       6
    expert, pairs       0, 0..3   1, 3..7        1, 7..14       none    none      2, ..   none
    workspace row       -         0              1

19 // 4 + 3 slots and 19 // 4 rows always suffice, so both shapes are known on the host, and no program looks at the
experts before its own. Cuts depend on an expert's number of pairs alone: not on chunks, nor on the number of programs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonmoe.ops.kernels.arithmetic import round_to
from tritonmoe.ops.kernels.launch import INTERPRETED, cdiv, launch, next_power_of_2

__all__ = ["add_to", "num_span_slots", "num_workspace_rows", "span_of_slot", "sum_spans"]


def num_workspace_rows(num_pairs: int, span: int) -> int:
    """Bound the spans of experts that are cut; 0 when no expert can be."""
    rows = num_pairs // span
    return rows if rows >= 2 else 0


def num_span_slots(num_pairs: int, num_experts: int, span: int) -> int:
    """Bound the spans of all experts; one for each expert when none can be cut."""
    return num_workspace_rows(num_pairs, span) + num_experts


@triton.jit
def span_of_slot(
    slot,
    expert_offsets,  # (E+1,) int32
    E,
    span,
    BLOCK_E: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Return a slot's expert, the first and end position of its span, and its workspace row (-1 when it is all).

    The expert is -1 where there is nothing to do. An expert without pairs has one span, which is empty.
    """
    if SPLIT:
        experts = tl.arange(0, BLOCK_E)
        starts = tl.load(expert_offsets + experts, mask=experts < E, other=0) // span + experts
        expert = tl.sum(((starts <= slot) & (experts < E)).to(tl.int32), 0) - 1
        first = tl.load(expert_offsets + expert)
        end = tl.load(expert_offsets + expert + 1)
        row = first // span
        index = slot - (row + expert)
        num_spans = tl.maximum((end - first) // span, 1)
        row = tl.where(num_spans > 1, row + index, -1)
        first += index * span
        end = tl.where(index < num_spans - 1, first + span, end)
        expert = tl.where(index < num_spans, expert, -1)
    else:
        # As in the other branch, all tensors.
        expert = slot + 0
        row = slot * 0 - 1
        first = tl.load(expert_offsets + expert)
        end = tl.load(expert_offsets + expert + 1)
    return expert, first, end, row


@triton.jit
def add_to(sums, pointers, mask):
    """Add what is stored at `pointers`: in fp32, or in fp64 where that is what is stored."""
    stored = tl.load(pointers, mask=mask, other=0.0)
    wide: tl.constexpr = tl.float64 if pointers.dtype.element_ty == tl.float64 else tl.float32
    return sums.to(wide) + stored.to(wide)


@triton.jit(do_not_specialize=["span"], do_not_specialize_on_alignment=["expert_offsets"])
def _sum_spans_kernel(
    workspace,  # (N // span, rows, columns) fp32
    expert_offsets,  # (E+1,) int32
    out,  # (E, rows, columns) in any layout, through its strides
    num_rows,
    num_columns,
    E,
    span,
    num_row_tiles,
    num_column_tiles,
    stride_out_expert,
    stride_out_row,
    stride_out_column,
    ACCUMULATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    column_tile = tl.program_id(0) % num_column_tiles
    row_tile = tl.program_id(0) // num_column_tiles % num_row_tiles
    first_span = tl.program_id(0) // num_column_tiles // num_row_tiles
    experts = tl.arange(0, BLOCK_E)
    begins = tl.load(expert_offsets + experts, mask=experts < E, other=0)
    ends = tl.load(expert_offsets + experts + 1, mask=experts < E, other=0)
    # At most one cut expert starts in this row of the workspace.
    is_owner = (begins // span == first_span) & ((ends - begins) // span >= 2)
    num_spans = tl.sum(tl.where(is_owner, (ends - begins) // span, 0), 0)
    if num_spans == 0:
        return
    expert = tl.sum(tl.where(is_owner, experts, 0), 0)
    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    size = tl.cast(num_rows, tl.int64) * num_columns
    pointers = workspace + first_span * size + rows.to(tl.int64)[:, None] * num_columns + columns[None, :]
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(num_spans):
        sums += tl.load(pointers, mask=mask, other=0.0)
        pointers += size
    out_rows = out + expert.to(tl.int64) * stride_out_expert + rows.to(tl.int64)[:, None] * stride_out_row
    out_pointers = out_rows + columns.to(tl.int64)[None, :] * stride_out_column
    if ACCUMULATE:
        sums = add_to(sums, out_pointers, mask)
    tl.store(out_pointers, round_to(sums, out.dtype.element_ty), mask=mask)


def sum_spans(workspace: Tensor | None, expert_offsets: Tensor, out: Tensor, span: int, accumulate: bool) -> None:
    """Fill, or with `accumulate` add to, the experts of `out` (E, rows, columns) that were cut, from their spans' sums.

    workspace: (N // span, rows, columns) fp32; None where no expert can be cut.
    """
    if workspace is None:
        return
    assert workspace.is_contiguous()
    assert workspace.dtype == torch.float32
    num_experts, num_rows, num_columns = out.shape
    block_n = min(128, max(16, next_power_of_2(num_columns)))
    block_m = 16 if INTERPRETED else min(4096 // block_n, next_power_of_2(num_rows))
    num_row_tiles, num_column_tiles = cdiv(num_rows, block_m), cdiv(num_columns, block_n)
    launch(
        _sum_spans_kernel,
        (workspace.shape[0] * num_row_tiles * num_column_tiles,),
        workspace,
        expert_offsets,
        out,
        num_rows,
        num_columns,
        num_experts,
        span,
        num_row_tiles,
        num_column_tiles,
        *out.stride(),
        ACCUMULATE=accumulate,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_E=next_power_of_2(num_experts),
        # With 4, Triton 3.6 spills 8 bytes a thread of fp32 on sm_100; with 8, Triton 3.9 spills 16 of bf16 on sm_90.
        num_warps=8 if out.dtype == torch.float32 else 4,
    )
