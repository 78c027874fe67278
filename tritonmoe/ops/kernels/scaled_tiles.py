"""How a grouped product's kernel multiplies codes and scales (encode.py): one block, by the cards' 8-bit instructions.

"fp8_block": `tl.dot` of codes sums at most 128 of the depth, and the sum is multiplied by the scales of the row and of
the weight's block in fp32: Hopper's own sums of 8-bit products have too few bits for more. "mxfp8": `tl.dot_scaled`
takes the scales of 32.
"""

import triton
import triton.language as tl

from tritonmoe.config.precision import BLOCKS
from tritonmoe.ops.kernels.launch import INTERPRETED

__all__ = ["add_scaled_product", "scaled_columns"]

_IN_INTERPRETER = tl.constexpr(INTERPRETED)
_FP8_BLOCK, _MXFP8 = tl.constexpr(BLOCKS["fp8_block"]), tl.constexpr(BLOCKS["mxfp8"])


@triton.jit
def _factor(scale):
    """Return 2^(scale - 127) of bytes, 0 for 0, and NaN for 255."""
    bits = scale.to(tl.int32)
    return (bits << 23 | (bits == 255).to(tl.int32)).to(tl.float32, bitcast=True)


@triton.jit
def _as_float(codes):
    """Return e4m3 codes, none of which is NaN, in fp32: the interpreter multiplies no codes."""
    bits = codes.to(tl.uint8, bitcast=True).to(tl.int32)
    return ((bits & 0x7F) << 20 | (bits & 0x80) << 24).to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120


@triton.jit
def _scaled(codes, scales):
    """Return codes (N, BLOCK_K) times the scales (N, BLOCK_K / 32) of their blocks, in fp32."""
    blocks: tl.constexpr = (scales.shape[0], scales.shape[1], _MXFP8)
    return tl.reshape(tl.reshape(_as_float(codes), blocks) * _factor(scales)[:, :, None], codes.shape)


@triton.jit
def scaled_columns(
    column_tile,
    width,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    TWO_BOXES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Return the weight's column with which each GROUP of an accumulator's columns begins, and whether it exists.

    As (groups, 1); where gate and up columns alternate in the tile and not in the weight, (groups of units, 2).
    width: F where columns are gate and up, else the weight's width. TWO_BOXES: see weight_tiles.load_tile.
    """
    if GATED and not INTERLEAVED:
        if TWO_BOXES:
            lanes = tl.arange(0, 2 * BLOCK_N // GROUP)[:, None] * GROUP
            half, units = lanes // BLOCK_N, column_tile * BLOCK_N + lanes % BLOCK_N
        else:
            half, units = (
                tl.arange(0, 2)[None, :],
                column_tile * BLOCK_N + tl.arange(0, BLOCK_N // GROUP)[:, None] * GROUP,
            )
        columns, mask = half * width + units, (half < 2) & (units < width)
    else:
        PER_UNIT: tl.constexpr = 2 if GATED else 1
        first = column_tile * (BLOCK_N * PER_UNIT)
        columns = first + tl.arange(0, BLOCK_N * PER_UNIT // GROUP)[:, None] * GROUP
        mask = columns < width * PER_UNIT
    return columns, mask


@triton.jit
def add_scaled_product(
    row_codes,  # (BLOCK_M, BLOCK_K) e4m3
    weight_codes,  # (BLOCK_K, WIDTH) e4m3
    accumulator,  # (BLOCK_M, WIDTH) fp32
    row_scales,  # (rows, depth_size / block) uint8
    weight_scales,  # (E, columns / rows of a block, depth_size / block) uint8
    expert,
    rows,  # (BLOCK_M,): those of the codes, all of which exist
    columns_and_mask,  # of `scaled_columns`
    start,
    depth_size,
    stride_scales_expert,
    SCALES: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Add the product of codes from depth `start` on, with their scales.

    SCALES: "fp8_block" or "mxfp8". GROUP: so many columns have one scale. BLOCK_K: at most a block of "fp8_block", at
    least one of "mxfp8".
    """
    columns, mask = columns_and_mask
    of_expert = weight_scales + expert.to(tl.int64) * stride_scales_expert
    if SCALES == "fp8_block":
        num_blocks = depth_size // _FP8_BLOCK
        block = start // _FP8_BLOCK
        row_factor = _factor(tl.load(row_scales + rows.to(tl.int64) * num_blocks + block))
        places = columns // _FP8_BLOCK * num_blocks + block
        column_factor = _factor(tl.load(of_expert + places, mask=mask, other=0))
        if _IN_INTERPRETER:
            step = tl.dot(_as_float(row_codes), _as_float(weight_codes))
        else:
            step = tl.dot(row_codes, weight_codes)
        # Factors of a group are one number in a thread's registers.
        groups: tl.constexpr = (step.shape[0], columns.shape[0], GROUP, columns.shape[1])
        factor = row_factor[:, None, None, None] * column_factor[None, :, None, :]
        accumulator += tl.reshape(tl.reshape(step, groups) * factor, step.shape)
    else:
        tl.static_assert(SCALES == "mxfp8")
        num_blocks = depth_size // _MXFP8
        blocks = start // _MXFP8 + tl.arange(0, BLOCK_K // _MXFP8)
        scales_of_rows = tl.load(row_scales + rows.to(tl.int64)[:, None] * num_blocks + blocks[None, :])
        tl.static_assert(GROUP == 1)
        each, mask = tl.reshape(columns, (accumulator.shape[1],)), tl.reshape(mask, (accumulator.shape[1],))
        places = each.to(tl.int64)[:, None] * num_blocks + blocks[None, :]
        scales_of_columns = tl.load(of_expert + places, mask=mask[:, None], other=0)
        if _IN_INTERPRETER:  # before 3.7 Triton's knows no dot_scaled
            weight = tl.trans(_scaled(tl.trans(weight_codes), scales_of_columns))
            accumulator += tl.dot(_scaled(row_codes, scales_of_rows), weight)
        else:
            accumulator = tl.dot_scaled(
                row_codes, scales_of_rows, "e4m3", weight_codes, scales_of_columns, "e4m3", accumulator
            )
    return accumulator
