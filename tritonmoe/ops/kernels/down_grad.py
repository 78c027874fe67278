"""Backward through gather_sum, the down-projection and the activation at once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonmoe.config.activations import FusedActivation
from tritonmoe.config.layer import KernelOptions, Projection
from tritonmoe.config.precision import Encoded
from tritonmoe.ops.grouping import Grouping
from tritonmoe.ops.kernels import weight_tiles
from tritonmoe.ops.kernels.activations import activation_options
from tritonmoe.ops.kernels.arithmetic import dot, split_columns, zeros
from tritonmoe.ops.kernels.epilogues import down_grad_epilogue
from tritonmoe.ops.kernels.launch import TRITON_VERSION, cdiv, contiguous_columns, launch, output, tile_keywords
from tritonmoe.ops.kernels.packed_tiles import stored_weight
from tritonmoe.ops.kernels.pair_sums import sum_partials
from tritonmoe.ops.kernels.row_tiles import (
    num_row_tiles,
    num_tile_slots,
    row_of,
    row_tiles_of,
    slot_and_column_tile,
    tile_of_slot,
    tile_of_slot_again,
)
from tritonmoe.ops.kernels.scaled_tiles import add_scaled_product, scaled_columns
from tritonmoe.ops.kernels.tile_runs import grid_of, tiles_of_program
from tritonmoe.ops.kernels.tiles import tma
from tritonmoe.ops.kernels.tiles.left_out import leaving_out_refused_tiles
from tritonmoe.ops.kernels.tiles.tile_choice import grouped_matmul_config

__all__ = ["down_grad"]


@triton.jit(do_not_specialize=["N", "num_slots", "programs_at_once"], do_not_specialize_on_alignment=["pair_index"])
def _down_grad_kernel(
    dout,  # (R, D); with SCALES its codes
    dout_scales,  # with SCALES, of dout
    weight,  # (E, D, F) in any layout, through its strides, or its descriptor, or its bytes
    scales,  # of a packed weight, or with SCALES, or None
    addend,  # (N, F), perhaps the same memory as scaled_a, or None
    hidden,  # (N, 2F): h; without ACTIVATION (N, F): a
    topk_weights,  # (R, K)
    pair_index,  # (N,) int32
    row_tiles,  # (1, num_slots, 4, 4) int32
    dhidden,  # as hidden
    scaled_a,  # (N, F)
    partial_sums,  # (num_column_tiles, N) fp32: <g, a> of each column tile
    D,
    F,
    N,
    num_slots,
    num_column_tiles,
    programs_at_once,
    stride_dout_row,
    stride_dout_column,
    stride_weight_expert,
    stride_weight_in,
    stride_weight_out,
    stride_scales_expert,
    stride_scales_row,
    stride_addend_row,
    stride_hidden_row,
    stride_topk_weights_row,
    stride_topk_weights_slot,
    stride_dhidden_row,
    stride_scaled_a_row,
    number_0,
    number_1,
    number_2,
    K: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    PER: tl.constexpr,
    WEIGHT_BY_TMA: tl.constexpr,
    DEPTH_LAST: tl.constexpr,
    EVEN_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    FLATTEN: tl.constexpr,
    SUBTILES: tl.constexpr,
    PRECISION: tl.constexpr,
    SCALES: tl.constexpr,
):
    LANES: tl.constexpr = 1 if DEPTH_LAST else PER
    strides = (stride_weight_expert, stride_weight_out, stride_weight_in, stride_scales_expert, stride_scales_row)
    tl.assume(D > 0)
    num_used_slots = num_slots
    if FLATTEN:
        num_used_slots = num_row_tiles(row_tiles, BLOCK_M)
    num_tiles = num_used_slots * num_column_tiles
    first_tile, end_tile, step = tiles_of_program(num_tiles, programs_at_once, FLATTEN)
    for tile in tl.range(first_tile, end_tile, step, flatten=FLATTEN):
        slot, column_tile = slot_and_column_tile(tile, num_used_slots, num_column_tiles, GROUP_M)
        expert, first, end = tile_of_slot(slot, row_tiles, BLOCK_M)
        if FLATTEN or expert >= 0:
            first_unit = column_tile * BLOCK_N
            positions = first + tl.arange(0, BLOCK_M)
            valid = positions < end
            pairs = tl.load(pair_index + positions, mask=valid, other=0)
            depth = tl.arange(0, BLOCK_K)
            dout_pointers = (
                dout + row_of(pairs, K).to(tl.int64)[:, None] * stride_dout_row + depth[None, :] * stride_dout_column
            )
            columns = column_tile * (BLOCK_N // LANES) + tl.arange(0, BLOCK_N // LANES)
            group_columns = first_unit + tl.arange(0, 1 if DEPTH_LAST else BLOCK_N // GROUP) * GROUP
            weight_pointers = None
            if FORMAT is None and not WEIGHT_BY_TMA:
                weight_pointers = weight_tiles.first_pointers(weight, expert, depth, columns, strides)
            if not FLATTEN:
                # Behind the last tile's epilogue, once: Triton 3.6 would put a barrier for it into every step.
                tl.debug_barrier()
            g = zeros(num_tiles, BLOCK_M, BLOCK_N, FLATTEN)
            for start in range(0, D, BLOCK_K):
                depth_mask = depth < D - start
                if EVEN_D:
                    dout_tile = tl.load(dout_pointers)
                else:
                    dout_tile = tl.load(dout_pointers, mask=depth_mask[None, :], other=0.0)
                weight_tile = weight_tiles.load_tile(
                    weight,
                    scales,
                    weight_pointers,
                    expert,
                    start,
                    D,
                    first_unit,
                    depth_mask,
                    columns,
                    columns < F // LANES,
                    group_columns,
                    group_columns < F,
                    strides,
                    FORMAT,
                    GROUP,
                    PER,
                    WEIGHT_BY_TMA,
                    False,
                    DEPTH_LAST,
                    EVEN_D,
                    BLOCK_K,
                    BLOCK_N,
                )
                if FORMAT is None and not WEIGHT_BY_TMA:
                    weight_pointers += BLOCK_K * stride_weight_out
                if SCALES is None:
                    g = dot(dout_tile, weight_tile, g, PRECISION)
                else:
                    g = add_scaled_product(
                        dout_tile,
                        weight_tile,
                        g,
                        dout_scales,
                        scales,
                        expert,
                        row_of(pairs, K),
                        scaled_columns(column_tile, F, False, False, False, BLOCK_N, GROUP),
                        start,
                        D,
                        stride_scales_expert,
                        SCALES,
                        GROUP,
                        BLOCK_K,
                    )
                dout_pointers += BLOCK_K * stride_dout_column

            if not FLATTEN:
                _, first, end = tile_of_slot_again(slot, row_tiles, BLOCK_M)
                positions = first + tl.arange(0, BLOCK_M)
                valid = positions < end
            # Loaded once more (and differently, or it would be once): kept through the loop they take registers.
            pairs = tl.load(pair_index + positions, mask=valid, other=0, eviction_policy="evict_last")
            rows = row_of(pairs, K)
            weights_row = topk_weights + rows.to(tl.int64) * stride_topk_weights_row
            weights_pointers = weights_row + (pairs - rows * K) * stride_topk_weights_slot
            scale = tl.load(weights_pointers, mask=valid, other=0.0).to(tl.float32)
            long_positions = positions.to(tl.int64)
            SUB_N: tl.constexpr = BLOCK_N // SUBTILES
            subtiles = split_columns(g, BLOCK_M, BLOCK_N, SUBTILES)
            total = tl.zeros((BLOCK_M,), tl.float32)
            for part in tl.static_range(SUBTILES):
                total += down_grad_epilogue(
                    subtiles[part],
                    first_unit + part * SUB_N,
                    scale,
                    long_positions,
                    valid,
                    addend,
                    hidden,
                    dhidden,
                    scaled_a,
                    F,
                    stride_addend_row,
                    stride_hidden_row,
                    stride_dhidden_row,
                    stride_scaled_a_row,
                    (number_0, number_1, number_2),
                    GATED,
                    INTERLEAVED,
                    ACTIVATION,
                    BLOCK_M,
                    SUB_N,
                )
            tl.store(partial_sums + column_tile.to(tl.int64) * N + long_positions, total, mask=valid)


@leaving_out_refused_tiles
def down_grad(
    dout: Tensor,
    projection: Projection,
    hidden: Tensor,
    topk_weights: Tensor,
    grouping: Grouping,
    activation: FusedActivation | None,
    *,
    out: tuple[Tensor | None, Tensor | None] = (None, None),
    options: KernelOptions = KernelOptions(),
    codes: Encoded | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the operation `down_grad` of `backends.ops`.

    One kernel computes the product and the activation's backward, a second one sums the gradients of the gate weights.
    codes: of dout, by a projection whose weight is codes too.
    """
    stored, layout, addend = stored_weight(projection), projection.layout, projection.addend
    in_axis, out_axis = (1, 2) if layout.transposed else (2, 1)
    weight, num_units = stored.values, projection.shape[in_axis]
    num_pairs = grouping.num_pairs
    dh = output(dout, num_pairs, hidden.shape[1], out[0])
    scaled_a = output(dout, num_pairs, num_units, out[1])
    dweights = dout.new_empty(num_pairs, dtype=torch.float32)
    rows, row_scales = (contiguous_columns(dout), None) if codes is None else codes
    depth = rows.shape[1]
    if hidden.stride(1) != 1:
        hidden = hidden.contiguous()
    function, numbers = activation_options(activation)
    refusals = {"weight": stored.tma_refusal or tma.refusal_of_weight(weight)}
    # Alternating columns of h take more registers, and Triton 3.6 spills some.
    fits = not layout.interleaved or TRITON_VERSION >= (3, 7)
    config = grouped_matmul_config(
        stored.product("down_grad"), rows, num_units, depth, grouping, options, refusals, fits
    )
    num_slots = num_tile_slots(num_pairs, weight.shape[0], config.block_m)
    num_column_tiles = cdiv(num_units, config.block_n)
    grid, programs_at_once = grid_of(num_slots * num_column_tiles, config, options, dout.device)
    partial_sums = dweights.new_empty(num_column_tiles, num_pairs)
    weight_format, group, per = stored.decoding(out_axis, config)
    launch(
        _down_grad_kernel,
        grid,
        rows,
        row_scales,
        tma.describe_weight(weight, out_axis, config.block_k, config.block_n) if config.by_tma("weight") else weight,
        stored.scales,
        addend,
        hidden,
        topk_weights,
        grouping.pair_index,
        row_tiles_of(grouping),
        dh,
        scaled_a,
        partial_sums,
        depth,
        num_units,
        num_pairs,
        num_slots,
        num_column_tiles,
        programs_at_once,
        *rows.stride(),
        weight.stride(0),
        weight.stride(in_axis),
        weight.stride(out_axis),
        stored.stride_scales_expert,
        stored.stride_scales_row,
        0 if addend is None else addend.stride(0),
        hidden.stride(0),
        *topk_weights.stride(),
        dh.stride(0),
        scaled_a.stride(0),
        *numbers,
        K=grouping.top_k,
        GATED=layout.gated,
        INTERLEAVED=layout.interleaved,
        ACTIVATION=function,
        WEIGHT_BY_TMA=config.by_tma("weight"),
        DEPTH_LAST=stored.depth_last(out_axis),
        EVEN_D=depth % config.block_k == 0,
        FORMAT=weight_format,
        GROUP=group,
        PER=per,
        SCALES=stored.scaling,
        **tile_keywords(config, rows),
    )
    sum_partials(partial_sums, dout, projection.bias, grouping, dweights)
    return dh, scaled_a, dweights
