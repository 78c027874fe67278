"""How a grouped product's kernel gets the tiles of a packed weight: bytes and scales are loaded, and decoded to bf16.

A tile is loaded as it is stored, rows by elements of the weight's last axis, an element having one value or, of 4 bits,
two. A group is values side by side that have one scale, so many as a tile, a block and the gate half of a row hold
whole: their scale is loaded once. config/formats.py has the formats.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonmoe.config.formats import FP8_BLOCK, MXFP4_BLOCK, NF4_BLOCK, NF4_VALUES, WeightFormat, format_of
from tritonmoe.config.layer import Projection
from tritonmoe.kernels.arithmetic import as_loaded, round_to
from tritonmoe.kernels.tiles import tma
from tritonmoe.kernels.tiles.config import TileConfig

__all__ = ["StoredWeight", "load_packed_tile", "stored_weight"]

BLOCKS = {"mxfp4": MXFP4_BLOCK, "fp8": FP8_BLOCK, "nf4": NF4_BLOCK}
_MXFP4_BLOCK, _FP8_BLOCK, _NF4_BLOCK = tl.constexpr(MXFP4_BLOCK), tl.constexpr(FP8_BLOCK), tl.constexpr(NF4_BLOCK)
_NF4_VALUES = tl.constexpr(NF4_VALUES)


class StoredWeight(NamedTuple):
    """A weight as kernels take it, packed or not."""

    values: Tensor
    """The weight, or the bytes of a packed one."""
    scales: Tensor | None
    stride_scales_expert: int
    stride_scales_row: int
    """The scales of a row; of nf4, whose blocks may begin in one row and end in the next, the bytes of a row."""
    weight_format: WeightFormat | None

    def product(self, operation: str) -> str:
        """Name a product by this weight as `grouped_matmul_config` takes it."""
        return operation if self.weight_format is None else f"{operation} {self.weight_format}"

    @property
    def tma_refusal(self) -> str:
        """Why TMA can't read the weight; empty where it is not packed."""
        return "" if self.weight_format is None else "it is packed"

    def depth_last(self, depth_axis: int) -> bool:
        """Say whether the axis that is summed over is the contiguous one; of a packed weight, the last one."""
        if self.scales is not None:
            return depth_axis == 2
        return (tma.innermost_last(self.values) is self.values) == (depth_axis == 2)

    def columns_last(self, column_axis: int) -> bool:
        """Say whether a row's columns lie side by side."""
        return column_axis == 2 if self.scales is not None else self.values.stride(column_axis) == 1

    def decoding(
        self, depth_axis: int, config: TileConfig, num_units: int = 0, piece: int | None = None
    ) -> tuple[str, int, int]:
        """Return FORMAT, GROUP and PER of a launch, which say how its tiles are decoded.

        Args:
            piece: how many columns lie side by side, where a tile has pieces of the gate and of the up half, each of
                num_units columns.
        """
        if self.weight_format is None:
            return "", 1, 1
        group = BLOCKS[self.weight_format]
        if self.weight_format == "nf4":
            group = min(group, _largest_power_of_2(2 * self.values.shape[2]))
        if depth_axis == 2:
            group = min(group, config.block_k)
        elif piece is None:
            group = min(group, config.block_n)
        else:
            group = min(group, piece, _largest_power_of_2(num_units))
        # Where two halves share a byte, each value has a byte loaded for it.
        return self.weight_format, group, 2 if self.weight_format != "fp8" and group > 1 else 1


def _largest_power_of_2(number: int) -> int:
    """Return the largest power of two that divides a number."""
    return number & -number


def stored_weight(projection: Projection) -> StoredWeight:
    """Return how a projection's weight is stored. Scales that are not contiguous are copied."""
    weight, scales = projection.weight, projection.scales
    if scales is None:
        return StoredWeight(weight, None, 0, 0, None)
    weight_format, scales = format_of(weight, scales), scales.contiguous()
    of_row = weight.shape[2] if weight_format == "nf4" else scales.shape[2]
    return StoredWeight(weight.view(torch.uint8), scales, scales.stride(0), of_row, weight_format)


@triton.jit
def load_packed_tile(
    values,  # (E, rows, elements) uint8
    scales,  # (E, ...) as formats.py says
    expert,
    start,
    depth_size,
    columns,  # (WIDTH,); where they are the last axis, (WIDTH // PER,) elements
    column_mask,
    group_columns,  # the first column of each group, (WIDTH // GROUP,); None where the depth is the last axis
    group_mask,
    strides,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    PER: tl.constexpr,
    DEPTH_LAST: tl.constexpr,
    EVEN_DEPTH: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Return (BLOCK_K, WIDTH) of one expert's weight from depth `start` on, in bf16."""
    stride_expert, stride_depth, stride_column, stride_scales_expert, stride_scales_row = strides
    if DEPTH_LAST:
        rows, row_mask = columns, column_mask
        elements = start // PER + tl.arange(0, BLOCK_K // PER)
        element_mask = elements < depth_size // PER
        groups = start + tl.arange(0, BLOCK_K // GROUP) * GROUP
        scale_mask = groups < depth_size
        stride_row, stride_element = stride_column, stride_depth
    else:
        rows = start + tl.arange(0, BLOCK_K)
        row_mask = rows < depth_size
        elements, element_mask = columns, column_mask
        groups, scale_mask = group_columns, group_mask
        stride_row, stride_element = stride_depth, stride_column
    of_expert = values + expert.to(tl.int64) * stride_expert
    SHARED_BYTES: tl.constexpr = PER == 1 and FORMAT == "nf4"
    bytes_ = elements // 2 if SHARED_BYTES else elements
    # One axis more than h has: loads of one shape are spread alike over threads, and `down_grad` sums as h is spread.
    pointers = of_expert + rows[:, None, None] * stride_row + bytes_[None, None, :] * stride_element
    scales_of_expert = scales + expert.to(tl.int64) * stride_scales_expert
    if FORMAT == "mxfp4":
        places = rows[:, None] * stride_scales_row + (groups // _MXFP4_BLOCK)[None, :]
    elif FORMAT == "fp8":
        places = (rows // _FP8_BLOCK)[:, None] * stride_scales_row + (groups // _FP8_BLOCK)[None, :]
    else:
        places = (rows[:, None] * stride_scales_row + groups[None, :] // 2) // (_NF4_BLOCK // 2)
    if EVEN_DEPTH and DEPTH_LAST:
        codes = tl.load(pointers, mask=row_mask[:, None, None], other=0)
        scale = tl.load(scales_of_expert + places, mask=row_mask[:, None], other=0)
    elif EVEN_DEPTH:
        codes = tl.load(pointers, mask=element_mask[None, None, :], other=0)
        scale = tl.load(scales_of_expert + places, mask=scale_mask[None, :], other=0)
    else:
        codes = tl.load(pointers, mask=row_mask[:, None, None] & element_mask[None, None, :], other=0)
        scale = tl.load(scales_of_expert + places, mask=row_mask[:, None] & scale_mask[None, :], other=0)
    if SHARED_BYTES:
        codes = codes >> ((1 - elements % 2) * 4)[None, None, :].to(tl.uint8)
    LENGTH: tl.constexpr = BLOCK_K if DEPTH_LAST else WIDTH
    tile = _decoded(codes, scale, FORMAT, GROUP, PER, LENGTH)
    return tile.T if DEPTH_LAST else tile


@triton.jit
def _decoded(
    codes,  # (rows, 1, LENGTH // PER) uint8
    scale,  # (rows, LENGTH // GROUP)
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    PER: tl.constexpr,
    LENGTH: tl.constexpr,
):
    """Return (rows, LENGTH) in bf16: each value times its scale in fp32, rounded once."""
    ROWS: tl.constexpr = codes.shape[0]
    codes = tl.reshape(codes, (ROWS, LENGTH // GROUP, GROUP // PER)).to(tl.int32)
    factor = _factor(scale, FORMAT)[:, :, None]
    tile = round_to(_value(codes, FORMAT) * factor, tl.bfloat16)
    if PER == 2:
        high = round_to(_value(codes >> 4, FORMAT) * factor, tl.bfloat16)
        tile = tl.join(high, tile) if FORMAT == "nf4" else tl.join(tile, high)
    return as_loaded(tl.reshape(tile, (ROWS, LENGTH)))


@triton.jit
def _factor(scale, FORMAT: tl.constexpr):
    """Return scales in fp32."""
    if FORMAT == "mxfp4":
        exponent = scale.to(tl.int32)
        factor = tl.where(exponent == 0, 1 << 22, exponent << 23).to(tl.float32, bitcast=True)
    else:
        factor = scale
    return factor


@triton.jit
def _value(code, FORMAT: tl.constexpr):
    """Return the fp32 value of a code. Of four bits the higher ones are not read.

    The bits of e2m1 and e4m3, moved to where fp32's exponent ends, are their value divided by a power of two, also
    without a leading one.
    """
    if FORMAT == "fp8":
        bits = (code & 0x7F) << 20 | (code & 0x80) << 24
        value = bits.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120
    elif FORMAT == "mxfp4":
        bits = (code & 7) << 22 | (code & 8) << 28
        value = bits.to(tl.float32, bitcast=True) * 8.507059173023462e37  # 2^126
    else:
        value = _nf4_value(code, 0, 16)
    return value


@triton.jit
def _nf4_value(code, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """Return the fp32 values of codes whose low bits choose among COUNT values from FIRST on."""
    if COUNT == 2:
        return tl.where((code & 1) != 0, _NF4_VALUES[FIRST + 1], _NF4_VALUES[FIRST])
    else:
        low = _nf4_value(code, FIRST, COUNT // 2)
        high = _nf4_value(code, FIRST + COUNT // 2, COUNT // 2)
        return tl.where((code & (COUNT // 2)) != 0, high, low)
