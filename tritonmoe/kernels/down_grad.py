"""Backward through gather_sum, the down-projection and the activation at once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonmoe.config.layer import ExpertLayout, FusedActivation, KernelOptions
from tritonmoe.grouping import Grouping
from tritonmoe.kernels import weight_tiles
from tritonmoe.kernels.activations import activate_with_slopes, activation_options
from tritonmoe.kernels.launch import (
    TRITON_VERSION,
    contiguous_columns,
    dot,
    dot_precision,
    launch,
    num_programs,
    num_tile_slots,
    output,
    round_to,
    row_tile_ends,
    slot_and_column_tile,
    split_column_pairs,
    split_columns,
    tile_of_slot,
)
from tritonmoe.kernels.tiles import tma
from tritonmoe.kernels.tiles.choice import grouped_matmul_config

__all__ = ["down_grad"]


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
        total = tl.sum(g * a, 1)
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
        total = tl.sum(g * a, 1)
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
    return total


@triton.jit(do_not_specialize=["N", "num_slots"], do_not_specialize_on_alignment=["pair_index", "expert_offsets"])
def _down_grad_kernel(
    dout,  # (R, D)
    weight,  # (E, D, F) in any layout, through its strides, or its descriptor
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
    WEIGHT_BY_TMA: tl.constexpr,
    DEPTH_LAST: tl.constexpr,
    EVEN_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    GROUP_M: tl.constexpr,
    FLATTEN: tl.constexpr,
    SUBTILES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    num_row_tiles = num_slots
    if FLATTEN:
        tile_ends = row_tile_ends(expert_offsets, E, BLOCK_E, BLOCK_M)
        num_row_tiles = tl.max(tile_ends, 0)
    num_tiles = num_row_tiles * num_column_tiles
    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), flatten=FLATTEN):
        if not FLATTEN:
            tile_ends = row_tile_ends(expert_offsets, E, BLOCK_E, BLOCK_M)
        slot, column_tile = slot_and_column_tile(tile, num_row_tiles, num_column_tiles, GROUP_M)
        expert, first, end = tile_of_slot(slot, tile_ends, expert_offsets, E, BLOCK_M)
        if FLATTEN or first < end:
            first_unit = column_tile * BLOCK_N
            positions = first + tl.arange(0, BLOCK_M)
            valid = positions < end
            pairs = tl.load(pair_index + positions, mask=valid, other=0)
            depth = tl.arange(0, BLOCK_K)
            dout_pointers = (
                dout + (pairs // K).to(tl.int64)[:, None] * stride_dout_row + depth[None, :] * stride_dout_column
            )
            units = first_unit + tl.arange(0, BLOCK_N)
            weight_pointers = None
            if not WEIGHT_BY_TMA:
                weight_pointers = weight_tiles.first_pointers(
                    weight, expert, depth, units, stride_weight_expert, stride_weight_out, stride_weight_in
                )
            g = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for start in range(0, D, BLOCK_K):
                depth_mask = depth < D - start
                if EVEN_D:
                    dout_tile = tl.load(dout_pointers)
                else:
                    dout_tile = tl.load(dout_pointers, mask=depth_mask[None, :], other=0.0)
                weight_tile = weight_tiles.load_tile(
                    weight,
                    weight_pointers,
                    expert,
                    start,
                    first_unit,
                    depth_mask,
                    units < F,
                    WEIGHT_BY_TMA,
                    False,
                    DEPTH_LAST,
                    EVEN_D,
                    BLOCK_K,
                    BLOCK_N,
                )
                if not WEIGHT_BY_TMA:
                    weight_pointers += BLOCK_K * stride_weight_out
                g = dot(dout_tile, weight_tile, g, PRECISION)
                dout_pointers += BLOCK_K * stride_dout_column

            if FLATTEN:
                # Loaded once more (and differently, or it would be once): kept through the loop they take registers.
                pairs = tl.load(pair_index + positions, mask=valid, other=0, eviction_policy="evict_last")
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


@triton.jit(do_not_specialize=["N"], do_not_specialize_on_alignment=["pair_index", "expert_offsets"])
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
    tile_ends = row_tile_ends(expert_offsets, E, BLOCK_E, BLOCK_M)
    expert, first, end = tile_of_slot(tl.program_id(0), tile_ends, expert_offsets, E, BLOCK_M)
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
    options: KernelOptions = KernelOptions(),
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
    refusals = {"weight": tma.refusal_of_weight(down_proj)}
    # Alternating columns of h take more registers, and Triton 3.6 spills some.
    fits = not layout.interleaved or TRITON_VERSION >= (3, 7)
    config = grouped_matmul_config("down_grad", dout, num_units, depth, grouping, options, refusals, fits)
    num_slots = num_tile_slots(num_pairs, num_experts, config.block_m)
    num_column_tiles = triton.cdiv(num_units, config.block_n)
    block_e = triton.next_power_of_2(num_experts)
    partial_sums = dweights.new_empty(num_column_tiles, num_pairs)
    launch(
        _down_grad_kernel,
        (num_programs(num_slots * num_column_tiles, config, options, dout.device),),
        dout,
        tma.describe_weight(down_proj, out_axis, config.block_k, config.block_n)
        if config.by_tma("weight")
        else down_proj,
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
        WEIGHT_BY_TMA=config.by_tma("weight"),
        DEPTH_LAST=(tma.innermost_last(down_proj) is down_proj) == (out_axis == 2),
        EVEN_D=depth % config.block_k == 0,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        BLOCK_E=block_e,
        GROUP_M=config.group_m,
        FLATTEN=config.persistent,
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
