"""Backward: through combine, the down-projection and the activation at once, and the weight gradients."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..config import ExpertLayout, FusedActivation
from ..grouping import Grouping
from .activations import activate_with_slopes, activation_options
from .launch import (
    INTERPRETED,
    contiguous_columns,
    dot,
    dot_precision,
    grouped_matmul_config,
    launch,
    num_tile_slots,
    output,
    round_to,
    slot_and_column_tile,
    split_column_pairs,
    split_columns,
    tile_of_slot,
)

__all__ = ["bias_grad", "down_grad", "outer_sums"]


@triton.jit
def _down_grad_epilogue(
    g,  # (BLOCK_M, SUB_N) fp32: the gradient of y carried through W2, before the gate weight
    first_unit,
    scale,  # (BLOCK_M,) fp32: gate weights
    positions,  # (BLOCK_M,) int64
    valid,  # (BLOCK_M,)
    hidden,  # (N, 2F): h; with ACTIVATION "none" (N, F): a
    dhidden,  # as hidden
    scaled_a,  # (N, F)
    F,
    stride_hidden_row,
    stride_dhidden_row,
    stride_scaled_a_row,
    limit,
    alpha,
    up_offset,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SUB_N: tl.constexpr,
):
    """Store dh and s*a of SUB_N units; give their part of each pair's <g, a>."""
    dtype: tl.constexpr = scaled_a.dtype.element_ty
    units = first_unit + tl.arange(0, SUB_N)
    mask = valid[:, None] & (units < F)[None, :]
    hidden_rows = hidden + positions[:, None] * stride_hidden_row
    dhidden_rows = dhidden + positions[:, None] * stride_dhidden_row
    da = scale[:, None] * g
    if ACTIVATION == "none":
        a = tl.load(hidden_rows + units[None, :], mask=mask, other=0.0).to(tl.float32)
        tl.store(dhidden_rows + units[None, :], round_to(da, dtype), mask=mask)
    else:
        if GATED:
            if INTERLEAVED:
                columns = 2 * first_unit + tl.arange(0, 2 * SUB_N)
                column_mask = valid[:, None] & (columns < 2 * F)[None, :]
                both = tl.load(hidden_rows + columns[None, :], mask=column_mask, other=0.0)
                gate, up = split_column_pairs(both, BLOCK_M, SUB_N, False)
            else:
                gate = tl.load(hidden_rows + units[None, :], mask=mask, other=0.0)
                up = tl.load(hidden_rows + F + units[None, :], mask=mask, other=0.0)
        else:
            gate = tl.load(hidden_rows + units[None, :], mask=mask, other=0.0)
            up = gate
        exact_a, slope_gate, slope_up = activate_with_slopes(
            gate.to(tl.float32), up.to(tl.float32), limit, alpha, up_offset, GATED, ACTIVATION
        )
        a = round_to(exact_a, dtype).to(tl.float32)
        dgate = round_to(slope_gate * da, dtype)
        if GATED:
            dup = round_to(slope_up * da, dtype)
            if INTERLEAVED:
                both = tl.reshape(tl.join(dgate, dup), (BLOCK_M, 2 * SUB_N))
                tl.store(dhidden_rows + columns[None, :], both, mask=column_mask)
            else:
                tl.store(dhidden_rows + units[None, :], dgate, mask=mask)
                tl.store(dhidden_rows + F + units[None, :], dup, mask=mask)
        else:
            tl.store(dhidden_rows + units[None, :], dgate, mask=mask)
    scaled_a_pointers = scaled_a + positions[:, None] * stride_scaled_a_row + units[None, :]
    tl.store(scaled_a_pointers, round_to(scale[:, None] * a, dtype), mask=mask)
    return tl.sum(g * a, 1)


@triton.jit(do_not_specialize=["N", "num_slots"])
def _down_grad_kernel(
    dout,  # (R, D)
    weight,  # (E, D, F) in any layout, through its strides
    hidden,  # (N, 2F): h; with ACTIVATION "none" (N, F): a
    topk_weights,  # (R, K)
    pair_index,  # (N,) int32
    expert_offsets,  # (E+1,) int32
    dhidden,  # as hidden
    scaled_a,  # (N, F)
    partial_sums,  # (num_column_tiles, N) fp32: <g, a> of each column tile
    D,
    F,
    E,
    K,
    N,
    num_slots,
    num_column_tiles,
    stride_dout_row,
    stride_dout_column,
    stride_weight_expert,
    stride_weight_in,
    stride_weight_out,
    stride_hidden_row,
    stride_topk_weights_row,
    stride_topk_weights_slot,
    stride_dhidden_row,
    stride_scaled_a_row,
    limit,
    alpha,
    up_offset,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EVEN_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    GROUP_M: tl.constexpr,
    SUBTILES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    slot, column_tile = slot_and_column_tile(tl.program_id(0), num_slots, num_column_tiles, GROUP_M)
    expert, first, end = tile_of_slot(slot, expert_offsets, E, BLOCK_E, BLOCK_M)
    if first >= end:
        return
    first_unit = column_tile * BLOCK_N
    units = first_unit + tl.arange(0, BLOCK_N)
    unit_mask = units < F
    positions = first + tl.arange(0, BLOCK_M)
    valid = positions < end
    pairs = tl.load(pair_index + positions, mask=valid, other=0)
    depth = tl.arange(0, BLOCK_K)
    dout_pointers = dout + (pairs // K).to(tl.int64)[:, None] * stride_dout_row + depth[None, :] * stride_dout_column
    weight_pointers = (
        weight
        + expert.to(tl.int64) * stride_weight_expert
        + depth[:, None] * stride_weight_out
        + units[None, :] * stride_weight_in
    )
    g = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, D, BLOCK_K):
        if EVEN_D:
            dout_tile = tl.load(dout_pointers)
            weight_tile = tl.load(weight_pointers, mask=unit_mask[None, :], other=0.0)
        else:
            depth_mask = depth < D - start
            dout_tile = tl.load(dout_pointers, mask=depth_mask[None, :], other=0.0)
            weight_tile = tl.load(weight_pointers, mask=depth_mask[:, None] & unit_mask[None, :], other=0.0)
        g = dot(dout_tile, weight_tile, g, PRECISION)
        dout_pointers += BLOCK_K * stride_dout_column
        weight_pointers += BLOCK_K * stride_weight_out

    rows = (pairs // K).to(tl.int64)
    weights_pointers = topk_weights + rows * stride_topk_weights_row + pairs % K * stride_topk_weights_slot
    scale = tl.load(weights_pointers, mask=valid, other=0.0).to(tl.float32)
    long_positions = positions.to(tl.int64)
    SUB_N: tl.constexpr = BLOCK_N // SUBTILES
    subtiles = split_columns(g, BLOCK_M, BLOCK_N, SUBTILES)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for part in tl.static_range(SUBTILES):
        total += _down_grad_epilogue(
            subtiles[part],
            first_unit + part * SUB_N,
            scale,
            long_positions,
            valid,
            hidden,
            dhidden,
            scaled_a,
            F,
            stride_hidden_row,
            stride_dhidden_row,
            stride_scaled_a_row,
            limit,
            alpha,
            up_offset,
            GATED,
            INTERLEAVED,
            ACTIVATION,
            BLOCK_M,
            SUB_N,
        )
    tl.store(partial_sums + column_tile.to(tl.int64) * N + long_positions, total, mask=valid)


@triton.jit(do_not_specialize=["N"])
def _sum_partials_kernel(
    partial_sums,  # (num_column_tiles, N) fp32
    dout,  # (R, D)
    bias,  # (E, D) or None
    pair_index,  # (N,) int32
    expert_offsets,  # (E+1,) int32
    dweights,  # (N,) fp32
    D,
    E,
    K,
    N,
    num_column_tiles,
    stride_dout_row,
    stride_dout_column,
    stride_bias_expert,
    stride_bias_column,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    expert, first, end = tile_of_slot(tl.program_id(0), expert_offsets, E, BLOCK_E, BLOCK_M)
    if first >= end:
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


def down_grad(
    dout: Tensor,
    down_proj: Tensor,
    down_bias: Tensor | None,
    hidden: Tensor,
    topk_weights: Tensor,
    grouping: Grouping,
    layout: ExpertLayout,
    activation: FusedActivation | None,
    *,
    out_dh: Tensor | None = None,
    out_scaled_a: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the backward of the down half: see `backends.reference.down_grad`."""
    in_axis, out_axis = (1, 2) if layout.transposed else (2, 1)
    num_experts, num_units, depth = down_proj.shape[0], down_proj.shape[in_axis], dout.shape[1]
    num_pairs = grouping.num_pairs
    dh = output(dout, num_pairs, hidden.shape[1], out_dh)
    scaled_a = output(dout, num_pairs, num_units, out_scaled_a)
    dweights = dout.new_empty(num_pairs, dtype=torch.float32)
    dout = contiguous_columns(dout)
    if hidden.stride(1) != 1:
        hidden = hidden.contiguous()
    name, scalars = activation_options(activation)
    config = grouped_matmul_config("down_grad", dout, num_units, depth, num_experts, grouping.top_k)
    num_slots = num_tile_slots(num_pairs, num_experts, config.block_m)
    num_column_tiles = triton.cdiv(num_units, config.block_n)
    block_e = triton.next_power_of_2(num_experts)
    partial_sums = dweights.new_empty(num_column_tiles, num_pairs)
    launch(
        _down_grad_kernel,
        (num_slots * num_column_tiles,),
        dout,
        down_proj,
        hidden,
        topk_weights,
        grouping.pair_index,
        grouping.expert_offsets,
        dh,
        scaled_a,
        partial_sums,
        depth,
        num_units,
        num_experts,
        grouping.top_k,
        num_pairs,
        num_slots,
        num_column_tiles,
        dout.stride(0),
        dout.stride(1),
        down_proj.stride(0),
        down_proj.stride(in_axis),
        down_proj.stride(out_axis),
        hidden.stride(0),
        topk_weights.stride(0),
        topk_weights.stride(1),
        dh.stride(0),
        scaled_a.stride(0),
        *scalars,
        GATED=layout.gated,
        INTERLEAVED=layout.interleaved,
        ACTIVATION=name,
        EVEN_D=depth % config.block_k == 0,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        BLOCK_E=block_e,
        GROUP_M=config.group_m,
        SUBTILES=config.subtiles,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        PRECISION=dot_precision(dout.dtype),
    )
    block_m = 32
    launch(
        _sum_partials_kernel,
        (num_tile_slots(num_pairs, num_experts, block_m),),
        partial_sums,
        dout,
        down_bias,
        grouping.pair_index,
        grouping.expert_offsets,
        dweights,
        depth,
        num_experts,
        grouping.top_k,
        num_pairs,
        num_column_tiles,
        dout.stride(0),
        dout.stride(1),
        0 if down_bias is None else down_bias.stride(0),
        0 if down_bias is None else down_bias.stride(1),
        BLOCK_M=block_m,
        BLOCK_K=min(128, triton.next_power_of_2(depth)),
        BLOCK_E=block_e,
    )
    return dh, scaled_a, dweights


@triton.jit
def _outer_sums_kernel(
    pair_values,  # (N, P), by storage position
    row_values,  # (R, Q), by row
    order,  # (N,) int32: storage positions in source order; None where they are the same
    pair_index,  # (N,) int32: flat pair ids in source order
    expert_offsets,  # (E+1,) int32
    out,  # (E, P, Q) in any layout, through its strides
    P,
    Q,
    K,
    num_p_tiles,
    num_q_tiles,
    stride_pair_row,
    stride_pair_column,
    stride_row_row,
    stride_row_column,
    stride_out_expert,
    stride_out_p,
    stride_out_q,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tiles_per_expert = num_p_tiles * num_q_tiles
    expert = tl.program_id(0) // tiles_per_expert
    p_tile, q_tile = slot_and_column_tile(tl.program_id(0) % tiles_per_expert, num_p_tiles, num_q_tiles, GROUP_M)
    first = tl.load(expert_offsets + expert)
    end = tl.load(expert_offsets + expert + 1)
    p = p_tile * BLOCK_P + tl.arange(0, BLOCK_P)
    q = q_tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    accumulator = tl.zeros((BLOCK_P, BLOCK_Q), tl.float32)
    for start in range(first, end, BLOCK_K):
        positions = start + tl.arange(0, BLOCK_K)
        valid = positions < end
        rows = (tl.load(pair_index + positions, mask=valid, other=0) // K).to(tl.int64)
        if order is not None:
            positions = tl.load(order + positions, mask=valid, other=0)
        # Already (P, pairs): a transpose in registers would keep these loads out of the pipeline on sm_80.
        left_pointers = (
            pair_values + positions.to(tl.int64)[None, :] * stride_pair_row + p[:, None] * stride_pair_column
        )
        right_pointers = row_values + rows[:, None] * stride_row_row + q[None, :] * stride_row_column
        # Zero on both sides: what lies behind the expert's last pair may be NaN.
        left = tl.load(left_pointers, mask=valid[None, :] & (p < P)[:, None], other=0.0)
        right = tl.load(right_pointers, mask=valid[:, None] & (q < Q)[None, :], other=0.0)
        accumulator = dot(left, right, accumulator, PRECISION)
    out_pointers = out + expert.to(tl.int64) * stride_out_expert + p[:, None] * stride_out_p + q[None, :] * stride_out_q
    mask = (p < P)[:, None] & (q < Q)[None, :]
    if ACCUMULATE:
        # fp32, or fp64 where that is what is added to.
        wide: tl.constexpr = tl.float64 if out.dtype.element_ty == tl.float64 else tl.float32
        accumulator = accumulator.to(wide) + tl.load(out_pointers, mask=mask, other=0.0).to(wide)
    tl.store(out_pointers, round_to(accumulator, out.dtype.element_ty), mask=mask)


def outer_sums(
    pair_values: Tensor,
    row_values: Tensor,
    grouping: Grouping,
    pair_index: Tensor,
    pairs_first: bool,
    accumulate: Tensor | None = None,
) -> Tensor | None:
    """Give sum over each expert's pairs of the outer product of its pair values and its row's values.

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
    config = grouped_matmul_config("weight_grad", pair_values, q_size, p_size, num_experts, grouping.top_k)
    num_p_tiles, num_q_tiles = triton.cdiv(p_size, config.block_m), triton.cdiv(q_size, config.block_n)
    launch(
        _outer_sums_kernel,
        (num_experts * num_p_tiles * num_q_tiles,),
        pair_values,
        row_values,
        grouping.source_order,
        pair_index,
        grouping.expert_offsets,
        out,
        p_size,
        q_size,
        grouping.top_k,
        num_p_tiles,
        num_q_tiles,
        pair_values.stride(0),
        pair_values.stride(1),
        row_values.stride(0),
        row_values.stride(1),
        out.stride(0),
        out.stride(1 if pairs_first else 2),
        out.stride(2 if pairs_first else 1),
        BLOCK_P=config.block_m,
        BLOCK_Q=config.block_n,
        BLOCK_K=config.block_k,
        GROUP_M=config.group_m,
        ACCUMULATE=accumulate is not None,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        PRECISION=dot_precision(pair_values.dtype),
    )
    return out if accumulate is None else None


@triton.jit
def _bias_grad_kernel(
    values,  # (n, width): rows found through `index`
    index,  # (N,) int32 in source order: flat pair ids (SCALED), storage positions, or None for positions
    scale,  # (R, K), or None when not SCALED
    expert_offsets,  # (E+1,) int32
    out,  # (E, width)
    width,
    K,
    stride_values_row,
    stride_values_column,
    stride_scale_row,
    stride_scale_slot,
    SCALED: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    expert = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.load(expert_offsets + expert)
    end = tl.load(expert_offsets + expert + 1)
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
    out_pointers = out + expert.to(tl.int64) * width + columns
    tl.store(out_pointers, round_to(tl.sum(sums, 0), out.dtype.element_ty), mask=columns < width)


def bias_grad(values: Tensor, grouping: Grouping, index: Tensor | None, scale: Tensor | None = None) -> Tensor:
    """Sum rows of `values` per expert, (E, width).

    Args:
        values: (N, width) by storage position with `index` the source order; or (R, width) by row, with
            `index` the flat pair ids in source order and `scale` (R, K) their weights.
    """
    values = contiguous_columns(values)
    width = values.shape[1]
    out = values.new_empty(grouping.num_experts, width)
    block_n = min(64, max(16, triton.next_power_of_2(width)))
    launch(
        _bias_grad_kernel,
        (grouping.num_experts, triton.cdiv(width, block_n)),
        values,
        index,
        scale,
        grouping.expert_offsets,
        out,
        width,
        grouping.top_k,
        values.stride(0),
        values.stride(1),
        0 if scale is None else scale.stride(0),
        0 if scale is None else scale.stride(1),
        SCALED=scale is not None,
        BLOCK_K=32 if INTERPRETED else 64,
        BLOCK_N=block_n,
    )
    return out
