"""Grouped products of rows in storage order: the down-projection, and dh carried back through the up-projection."""

import triton
import triton.language as tl
from torch import Tensor

from tritonmoe.config.layer import KernelOptions, Projection
from tritonmoe.config.precision import Encoded
from tritonmoe.ops.grouping import Grouping
from tritonmoe.ops.kernels import ragged_tiles, weight_tiles
from tritonmoe.ops.kernels.arithmetic import dot, round_to, split_columns, zeros
from tritonmoe.ops.kernels.launch import cdiv, contiguous_columns, launch, output, tile_keywords
from tritonmoe.ops.kernels.packed_tiles import stored_weight
from tritonmoe.ops.kernels.row_tiles import (
    num_row_tiles,
    num_tile_slots,
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

__all__ = ["down", "up_grad"]


@triton.jit(do_not_specialize=["num_slots", "programs_at_once"])
def _grouped_matmul_kernel(
    values,  # (N, depth), or its descriptor; with SCALES its codes
    values_scales,  # with SCALES, of the values
    weight,  # (E, depth, width) in any layout, through its strides, or its descriptor, or its bytes
    scales,  # of a packed weight, or with SCALES, or None
    bias,  # (E, width) or None
    addend,  # (N, width), perhaps the same memory as out, or None
    row_tiles,  # (1, num_slots, 4, 4) int32
    out,  # (N, width), dtype of values, or its `ragged_tiles` descriptor
    depth_size,
    width,
    num_slots,
    num_column_tiles,
    programs_at_once,
    stride_values_row,
    stride_values_column,
    stride_weight_expert,
    stride_weight_in,
    stride_weight_out,
    stride_scales_expert,
    stride_scales_row,
    stride_bias_expert,
    stride_bias_column,
    stride_addend_row,
    stride_out_row,
    VALUES_BY_TMA: tl.constexpr,
    OUT_BY_TMA: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    PER: tl.constexpr,
    WEIGHT_BY_TMA: tl.constexpr,
    DEPTH_LAST: tl.constexpr,
    EVEN_DEPTH: tl.constexpr,
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
    strides = (stride_weight_expert, stride_weight_in, stride_weight_out, stride_scales_expert, stride_scales_row)
    tl.assume(depth_size > 0)
    num_used_slots = num_slots
    if FLATTEN:
        num_used_slots = num_row_tiles(row_tiles, BLOCK_M)
    num_tiles = num_used_slots * num_column_tiles
    first_tile, end_tile, step = tiles_of_program(num_tiles, programs_at_once, FLATTEN)
    for tile in tl.range(first_tile, end_tile, step, flatten=FLATTEN):
        slot, column_tile = slot_and_column_tile(tile, num_used_slots, num_column_tiles, GROUP_M)
        expert, first, end = tile_of_slot(slot, row_tiles, BLOCK_M)
        if FLATTEN or expert >= 0:
            columns = column_tile * (BLOCK_N // LANES) + tl.arange(0, BLOCK_N // LANES)
            positions = first + tl.arange(0, BLOCK_M)
            valid = positions < end
            depth = tl.arange(0, BLOCK_K)
            if not VALUES_BY_TMA:
                rows = tl.minimum(positions, end - 1).to(tl.int64)
                value_pointers = values + rows[:, None] * stride_values_row + depth[None, :] * stride_values_column
            group_columns = column_tile * BLOCK_N + tl.arange(0, 1 if DEPTH_LAST else BLOCK_N // GROUP) * GROUP
            weight_pointers = None
            if FORMAT is None and not WEIGHT_BY_TMA:
                weight_pointers = weight_tiles.first_pointers(weight, expert, depth, columns, strides)
            accumulator = zeros(num_tiles, BLOCK_M, BLOCK_N, FLATTEN)
            for start in range(0, depth_size, BLOCK_K):
                depth_mask = depth < depth_size - start
                if VALUES_BY_TMA:
                    # Rows past the expert's end are some other expert's: computed and not stored.
                    value_tile = values.load([first, start])
                else:
                    if EVEN_DEPTH:
                        value_tile = tl.load(value_pointers)
                    else:
                        value_tile = tl.load(value_pointers, mask=depth_mask[None, :], other=0.0)
                    value_pointers += BLOCK_K * stride_values_column
                weight_tile = weight_tiles.load_tile(
                    weight,
                    scales,
                    weight_pointers,
                    expert,
                    start,
                    depth_size,
                    column_tile * BLOCK_N,
                    depth_mask,
                    columns,
                    columns < width // LANES,
                    group_columns,
                    group_columns < width,
                    strides,
                    FORMAT,
                    GROUP,
                    PER,
                    WEIGHT_BY_TMA,
                    False,
                    DEPTH_LAST,
                    EVEN_DEPTH,
                    BLOCK_K,
                    BLOCK_N,
                )
                if FORMAT is None and not WEIGHT_BY_TMA:
                    weight_pointers += BLOCK_K * stride_weight_in
                if SCALES is None:
                    accumulator = dot(value_tile, weight_tile, accumulator, PRECISION)
                else:
                    accumulator = add_scaled_product(
                        value_tile,
                        weight_tile,
                        accumulator,
                        values_scales,
                        scales,
                        expert,
                        tl.minimum(positions, end - 1),
                        scaled_columns(column_tile, width, False, False, False, BLOCK_N, GROUP),
                        start,
                        depth_size,
                        stride_scales_expert,
                        SCALES,
                        GROUP,
                        BLOCK_K,
                    )

            if not FLATTEN:
                expert, first, end = tile_of_slot_again(slot, row_tiles, BLOCK_M)
                positions = first + tl.arange(0, BLOCK_M)
                valid = positions < end
            SUB_N: tl.constexpr = BLOCK_N // SUBTILES
            subtiles = split_columns(accumulator, BLOCK_M, BLOCK_N, SUBTILES)
            for part in tl.static_range(SUBTILES):
                part_columns = column_tile * BLOCK_N + part * SUB_N + tl.arange(0, SUB_N)
                part_mask = part_columns < width
                sums = subtiles[part]
                if bias is not None:
                    bias_pointers = bias + expert.to(tl.int64) * stride_bias_expert + part_columns * stride_bias_column
                    sums += tl.load(bias_pointers, mask=part_mask, other=0.0).to(tl.float32)[None, :]
                mask = valid[:, None] & part_mask[None, :]
                if addend is not None:
                    addend_rows = addend + positions.to(tl.int64)[:, None] * stride_addend_row
                    sums += tl.load(addend_rows + part_columns[None, :], mask=mask, other=0.0).to(tl.float32)
                if OUT_BY_TMA:
                    part_first = column_tile * BLOCK_N + part * SUB_N
                    ragged_tiles.store(round_to(sums, out.dtype), out, first, end, part_first, BLOCK_M, SUB_N)
                else:
                    out_rows = out + positions.to(tl.int64)[:, None] * stride_out_row
                    tl.store(out_rows + part_columns[None, :], round_to(sums, out.dtype.element_ty), mask=mask)


@leaving_out_refused_tiles
def _grouped_matmul(
    values: Tensor,
    projection: Projection,
    in_axis: int,
    bias: Tensor | None,
    grouping: Grouping,
    out: Tensor | None,
    options: KernelOptions,
    codes: Encoded | None,
) -> Tensor:
    """Multiply rows in storage order by their expert's weight, summing over the weight's `in_axis`.

    codes: of the rows, by a projection whose weight is codes too.
    """
    stored, addend, out_axis = stored_weight(projection), projection.addend, 3 - in_axis
    weight, depth, width = stored.values, projection.shape[in_axis], projection.shape[out_axis]
    out = output(values, grouping.num_pairs, width, out)
    values, values_scales = (contiguous_columns(values), None) if codes is None else codes
    refusals = {"values": tma.refusal(values), "weight": stored.tma_refusal or tma.refusal_of_weight(weight)}
    # What is added may be where the result is stored: threads that load it and TMA have no order.
    refusals["out"] = ragged_tiles.refusal(out) if addend is None else "it is added to"
    config = grouped_matmul_config(stored.product("down"), values, width, depth, grouping, options, refusals)
    out_by_tma = config.by_tma("out")
    num_slots = num_tile_slots(grouping.num_pairs, weight.shape[0], config.block_m)
    num_column_tiles = cdiv(width, config.block_n)
    grid, programs_at_once = grid_of(num_slots * num_column_tiles, config, options, values.device)
    weight_format, group, per = stored.decoding(in_axis, config)
    launch(
        _grouped_matmul_kernel,
        grid,
        tma.describe(values, (config.block_m, config.block_k)) if config.by_tma("values") else values,
        values_scales,
        tma.describe_weight(weight, in_axis, config.block_k, config.block_n) if config.by_tma("weight") else weight,
        stored.scales,
        bias,
        addend,
        row_tiles_of(grouping),
        ragged_tiles.describe(out, config.block_m, config.block_n // config.subtiles) if out_by_tma else out,
        depth,
        width,
        num_slots,
        num_column_tiles,
        programs_at_once,
        *values.stride(),
        weight.stride(0),
        weight.stride(in_axis),
        weight.stride(out_axis),
        stored.stride_scales_expert,
        stored.stride_scales_row,
        *((0, 0) if bias is None else bias.stride()),
        0 if addend is None else addend.stride(0),
        out.stride(0),
        OUT_BY_TMA=out_by_tma,
        VALUES_BY_TMA=config.by_tma("values"),
        WEIGHT_BY_TMA=config.by_tma("weight"),
        DEPTH_LAST=stored.depth_last(in_axis),
        EVEN_DEPTH=depth % config.block_k == 0,
        FORMAT=weight_format,
        GROUP=group,
        PER=per,
        SCALES=stored.scaling,
        **tile_keywords(config, values),
    )
    return out


def down(
    a: Tensor,
    projection: Projection,
    grouping: Grouping,
    *,
    out: Tensor | None = None,
    options: KernelOptions = KernelOptions(),
    codes: Encoded | None = None,
) -> Tensor:
    """Launch the operation `down` of `backends.ops`: one grouped product."""
    in_axis = 1 if projection.layout.transposed else 2
    return _grouped_matmul(a, projection, in_axis, projection.bias, grouping, out, options, codes)


def up_grad(
    dh: Tensor,
    projection: Projection,
    grouping: Grouping,
    *,
    out: Tensor | None = None,
    options: KernelOptions = KernelOptions(),
    codes: Encoded | None = None,
) -> Tensor:
    """Launch the operation `up_grad` of `backends.ops`: one grouped product, whose sums go over all 2F columns."""
    in_axis = 2 if projection.layout.transposed else 1
    return _grouped_matmul(dh, projection, in_axis, None, grouping, out, options, codes)
