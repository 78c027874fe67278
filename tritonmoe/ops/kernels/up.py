"""The up-projection: rows gathered through the pairs, bias and activation fused behind the product."""

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from tritonmoe.config.activations import FusedActivation
from tritonmoe.config.layer import ExpertLayout, KernelOptions, Projection
from tritonmoe.config.precision import Encoded
from tritonmoe.ops.grouping import Grouping
from tritonmoe.ops.kernels import weight_tiles
from tritonmoe.ops.kernels.activations import activation_options
from tritonmoe.ops.kernels.arithmetic import dot, split_column_pairs, split_columns, zeros
from tritonmoe.ops.kernels.epilogues import up_epilogue
from tritonmoe.ops.kernels.gather import gather_rows
from tritonmoe.ops.kernels.launch import cdiv, contiguous_columns, launch, output, tile_keywords
from tritonmoe.ops.kernels.packed_tiles import stored_weight
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
from tritonmoe.ops.kernels.tiles.config import TileConfig
from tritonmoe.ops.kernels.tiles.left_out import leaving_out_refused_tiles
from tritonmoe.ops.kernels.tiles.tile_choice import grouped_matmul_config

__all__ = ["up"]

FEW_COLUMNS = 32
"""Of such a product, an adapter's with its factor, sums take few registers; ptxas would spill some of the others."""


@triton.jit(do_not_specialize=["num_slots", "programs_at_once"], do_not_specialize_on_alignment=["pair_index"])
def _up_kernel(
    x,  # (R, D), or its descriptor; GATHER "copy": that of its rows in storage order (N, D); with SCALES its codes
    x_scales,  # with SCALES, of x
    weight,  # (E, 2F, D) in any layout, through its strides, or its descriptor, or its bytes; F without a gate
    scales,  # of a packed weight, or with SCALES, or None
    bias,  # (E, 2F) or None
    addend,  # (N, 2F), perhaps the same memory as h, or None
    pair_index,  # (N,) int32
    row_tiles,  # (1, num_slots, 4, 4) int32
    h,  # (N, 2F), dtype of x, or None
    a,  # (N, F), dtype of x, or None
    D,
    F,
    num_slots,
    num_column_tiles,
    programs_at_once,
    stride_x_row,
    stride_x_column,
    stride_weight_expert,
    stride_weight_out,
    stride_weight_in,
    stride_scales_expert,
    stride_scales_row,
    stride_bias_expert,
    stride_bias_column,
    stride_addend_row,
    stride_h_row,
    stride_a_row,
    number_0,
    number_1,
    number_2,
    K: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HALVES: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    PER: tl.constexpr,
    WEIGHT_BY_TMA: tl.constexpr,
    DEPTH_LAST: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATHER: tl.constexpr,
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
    # Gate and up columns of a unit share one accumulator, so that one program can activate them.
    WIDTH: tl.constexpr = 2 * BLOCK_N if GATED else BLOCK_N
    SUB_N: tl.constexpr = BLOCK_N // SUBTILES
    strides = (stride_weight_expert, stride_weight_in, stride_weight_out, stride_scales_expert, stride_scales_row)
    # By TMA all gate columns come first, then all up columns: two boxes in one load.
    TWO_BOXES: tl.constexpr = WEIGHT_BY_TMA and GATED and not INTERLEAVED
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
            positions = first + tl.arange(0, BLOCK_M)
            valid = positions < end
            # Rows past the expert's end are some other row's numbers: computed and not stored.
            rows = row_of(tl.load(pair_index + positions, mask=valid, other=0), K)
            depth = tl.arange(0, BLOCK_K)
            if GATHER == "pointers":
                x_pointers = x + rows.to(tl.int64)[:, None] * stride_x_row + depth[None, :] * stride_x_column
            columns, column_mask = weight_tiles.gate_and_up_columns(
                column_tile, F, GATED, INTERLEAVED, HALVES, BLOCK_N, SUB_N, 1 if DEPTH_LAST else PER
            )
            groups, group_mask = columns, column_mask
            if FORMAT is not None and not DEPTH_LAST:
                groups, group_mask = weight_tiles.gate_and_up_columns(
                    column_tile, F, GATED, INTERLEAVED, HALVES, BLOCK_N, SUB_N, GROUP
                )
            weight_pointers = None
            if FORMAT is None and not WEIGHT_BY_TMA:
                weight_pointers = weight_tiles.first_pointers(weight, expert, depth, columns, strides)
            accumulator = zeros(num_tiles, BLOCK_M, WIDTH, FLATTEN)
            for start in range(0, D, BLOCK_K):
                depth_mask = depth < D - start
                if GATHER == "copy":
                    # Rows past the expert's end are some other expert's.
                    x_tile = x.load([first, start])
                elif GATHER == "tma":
                    x_tile = x.gather(rows, start)
                elif EVEN_D:
                    x_tile = tl.load(x_pointers)
                else:
                    x_tile = tl.load(x_pointers, mask=depth_mask[None, :], other=0.0)
                weight_tile = weight_tiles.load_tile(
                    weight,
                    scales,
                    weight_pointers,
                    expert,
                    start,
                    D,
                    column_tile * (BLOCK_N if TWO_BOXES else WIDTH),
                    depth_mask,
                    columns,
                    column_mask,
                    groups * GROUP,
                    group_mask,
                    strides,
                    FORMAT,
                    GROUP,
                    PER,
                    WEIGHT_BY_TMA,
                    TWO_BOXES,
                    DEPTH_LAST,
                    EVEN_D,
                    BLOCK_K,
                    WIDTH,
                )
                if FORMAT is None and not WEIGHT_BY_TMA:
                    weight_pointers += BLOCK_K * stride_weight_in
                if SCALES is None:
                    accumulator = dot(x_tile, weight_tile, accumulator, PRECISION)
                else:
                    accumulator = add_scaled_product(
                        x_tile,
                        weight_tile,
                        accumulator,
                        x_scales,
                        scales,
                        expert,
                        rows,
                        scaled_columns(column_tile, F, GATED, INTERLEAVED, TWO_BOXES, BLOCK_N, GROUP),
                        start,
                        D,
                        stride_scales_expert,
                        SCALES,
                        GROUP,
                        BLOCK_K,
                    )
                if GATHER == "pointers":
                    x_pointers += BLOCK_K * stride_x_column

            if not FLATTEN:
                expert, first, end = tile_of_slot_again(slot, row_tiles, BLOCK_M)
                positions = first + tl.arange(0, BLOCK_M)
                valid = positions < end
            if TWO_BOXES:
                gate_half, up_half = split_column_pairs(accumulator, BLOCK_M, BLOCK_N, True)
                gates = split_columns(gate_half, BLOCK_M, BLOCK_N, SUBTILES)
                ups = split_columns(up_half, BLOCK_M, BLOCK_N, SUBTILES)
            else:
                subtiles = split_columns(accumulator, BLOCK_M, WIDTH, SUBTILES)
            for part in tl.static_range(SUBTILES):
                if TWO_BOXES:
                    gate, up_part = gates[part], ups[part]
                elif GATED:
                    gate, up_part = split_column_pairs(subtiles[part], BLOCK_M, SUB_N, HALVES)
                else:
                    gate, up_part = subtiles[part], subtiles[part]
                up_epilogue(
                    gate,
                    up_part,
                    column_tile * BLOCK_N + part * SUB_N,
                    expert,
                    positions.to(tl.int64),
                    valid,
                    bias,
                    addend,
                    h,
                    a,
                    F,
                    stride_bias_expert,
                    stride_bias_column,
                    stride_addend_row,
                    stride_h_row,
                    stride_a_row,
                    (number_0, number_1, number_2),
                    (a if h is None else h).dtype.element_ty,
                    GATED,
                    INTERLEAVED,
                    ACTIVATION,
                    BLOCK_M,
                    SUB_N,
                )


def _operands(
    x: Tensor, weight: Tensor, layout: ExpertLayout, grouping: Grouping, config: TileConfig
) -> tuple[Tensor | TensorDescriptor, Tensor | TensorDescriptor]:
    """Return the rows and the weight as the kernel takes them: tensors, or the descriptors of what TMA reads."""
    out_axis, in_axis = (2, 1) if layout.transposed else (1, 2)
    rows: Tensor | TensorDescriptor = x
    if config.gather == "copy":
        rows = tma.describe(gather_rows(x, grouping), (config.block_m, config.block_k))
    elif config.gather == "tma":
        rows = tma.describe(x, (1, config.block_k))
    if not config.by_tma("weight"):
        return rows, weight
    if layout.gated and not layout.interleaved:
        return rows, tma.describe(weight, (1, 2, config.block_n, config.block_k), *tma.halves(weight, out_axis))
    tile_width = config.block_n * (2 if layout.gated else 1)
    return rows, tma.describe_weight(weight, in_axis, config.block_k, tile_width)


@leaving_out_refused_tiles
def up(
    x: Tensor,
    projection: Projection,
    grouping: Grouping,
    activation: FusedActivation | None,
    *,
    needs_h: bool = True,
    out_h: Tensor | None = None,
    options: KernelOptions = KernelOptions(),
    codes: Encoded | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Launch the operation `up` of `backends.ops`: gather, product, bias and activation in one kernel.

    codes: of x, by a projection whose weight is codes too.
    """
    stored, layout = stored_weight(projection), projection.layout
    weight, bias, addend = stored.values, projection.bias, projection.addend
    out_axis, in_axis = (2, 1) if layout.transposed else (1, 2)
    num_experts, width = weight.shape[0], projection.shape[out_axis]
    num_units = layout.intermediate_size(width)
    keeps_h = needs_h or out_h is not None or activation is None
    h = output(x, grouping.num_pairs, width, out_h) if keeps_h else None
    a = None if activation is None else output(x, grouping.num_pairs, num_units)
    function, numbers = activation_options(activation)
    operation = "up" if layout.gated else "up_ungated"
    in_halves = layout.gated and not layout.interleaved
    refused = tma.refusal_of_halves(weight, out_axis) if in_halves else tma.refusal_of_weight(weight)
    x, x_scales = (contiguous_columns(x), None) if codes is None else codes
    depth = x.shape[1]
    refusals = {"weight": stored.tma_refusal or refused}
    config = grouped_matmul_config(stored.product(operation), x, num_units, depth, grouping, options, refusals)
    num_slots = num_tile_slots(grouping.num_pairs, num_experts, config.block_m)
    num_column_tiles = cdiv(num_units, config.block_n)
    grid, programs_at_once = grid_of(num_slots * num_column_tiles, config, options, x.device)
    rows, weight_operand = _operands(x, weight, layout, grouping, config)
    # Side by side keeps the split inside a thread, but breaks up loads along a contiguous output axis.
    halves = in_halves and stored.columns_last(out_axis)
    piece = config.block_n // config.subtiles if halves else None
    weight_format, group, per = stored.decoding(in_axis, config, num_units if in_halves else 0, piece)
    launch(
        _up_kernel,
        grid,
        rows,
        x_scales,
        weight_operand,
        stored.scales,
        bias,
        addend,
        grouping.pair_index,
        row_tiles_of(grouping),
        h,
        a,
        depth,
        num_units,
        num_slots,
        num_column_tiles,
        programs_at_once,
        *x.stride(),
        weight.stride(0),
        weight.stride(out_axis),
        weight.stride(in_axis),
        stored.stride_scales_expert,
        stored.stride_scales_row,
        *((0, 0) if bias is None else bias.stride()),
        0 if addend is None else addend.stride(0),
        0 if h is None else h.stride(0),
        0 if a is None else a.stride(0),
        *numbers,
        max_registers=80 if num_units <= FEW_COLUMNS else None,
        K=grouping.top_k,
        GATED=layout.gated,
        INTERLEAVED=layout.interleaved,
        HALVES=halves,
        WEIGHT_BY_TMA=config.by_tma("weight"),
        DEPTH_LAST=stored.depth_last(in_axis),
        ACTIVATION=function,
        GATHER=config.gather,
        EVEN_D=depth % config.block_k == 0,
        FORMAT=weight_format,
        GROUP=group,
        PER=per,
        SCALES=stored.scaling,
        **tile_keywords(config, x),
    )
    return h, a
