"""How a grouped product's kernel gets the tiles of a packed weight: bytes and scales are loaded, and decoded to bf16.

A tile is loaded as it is stored, rows by elements of the weight's last axis, an element having one value or, of 4 bits,
two. A group is values side by side that have one scale, so many as a tile, a block and the gate half of a row hold
whole: their scale is loaded once. For each format of config/formats.py a function of its name loads the tile that `at`
describes (tensors, places, masks, strides) and returns (rows, groups, elements of a group) in bf16, or two such values.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonmoe.config.formats import FP8_BLOCK, MXFP4_BLOCK, NF4_BLOCK, NF4_VALUES, PackedFormat, format_of
from tritonmoe.config.layer import Projection
from tritonmoe.config.precision import BLOCKS
from tritonmoe.ops.kernels.arithmetic import as_loaded, round_to
from tritonmoe.ops.kernels.tiles import tma
from tritonmoe.ops.kernels.tiles.config import TileConfig

__all__ = ["StoredWeight", "load_packed_tile", "stored_weight"]

_MXFP4_BLOCK, _FP8_BLOCK, _NF4_BLOCK = tl.constexpr(MXFP4_BLOCK), tl.constexpr(FP8_BLOCK), tl.constexpr(NF4_BLOCK)
_NF4_VALUES = tl.constexpr(NF4_VALUES)


class StoredWeight(NamedTuple):
    """A weight as kernels take it, packed or not."""

    values: Tensor
    """The weight, or the bytes of a packed one."""
    scales: Tensor | None
    stride_scales_expert: int
    stride_scales_row: int
    """The scales of a row; of a format whose blocks may begin in one row and end in the next, the bytes of a row."""
    packed: PackedFormat | None
    scaling: str | None = None
    """The format of an ExpertPrecision whose codes these are: what kernels call SCALES."""

    def product(self, operation: str) -> str:
        """Name a product by this weight as `grouped_matmul_config` takes it."""
        stored_as = self.scaling if self.packed is None else self.packed.name
        return operation if stored_as is None else f"{operation} {stored_as}"

    @property
    def tma_refusal(self) -> str:
        """Why TMA can't read the weight; empty where it is not packed."""
        return "" if self.packed is None else "it is packed"

    def depth_last(self, depth_axis: int) -> bool:
        """Whether the axis that is summed over is the contiguous one; of a packed weight, the last one."""
        if self.scales is not None:
            return depth_axis == 2
        return (tma.innermost_last(self.values) is self.values) == (depth_axis == 2)

    def columns_last(self, column_axis: int) -> bool:
        """Whether a row's columns lie side by side."""
        return column_axis == 2 if self.scales is not None else self.values.stride(column_axis) == 1

    def decoding(
        self, depth_axis: int, config: TileConfig, num_units: int = 0, piece: int | None = None
    ) -> tuple[Any, int, int]:
        """Return FORMAT, GROUP and PER of a launch, which say how its tiles are decoded or scaled.

        Args:
            num_units: the columns of the gate half and of the up half, where one follows the other; else 0.
            piece: how many columns lie side by side, where a tile has pieces of the gate and of the up half.
        """
        packed, scales = self.packed, self.scales
        if self.scaling is not None:
            of_halves = _largest_power_of_2(num_units) or config.block_n
            return None, 1 if self.scaling == "mxfp8" else min(BLOCKS["fp8_block"], config.block_n, of_halves), 1
        if packed is None or scales is None:
            return None, 1, 1
        group = packed.block
        if scales.dim() == 2:
            group = min(group, _largest_power_of_2(packed.per_element * self.values.shape[2]))
        if depth_axis == 2:
            group = min(group, config.block_k)
        elif piece is None:
            group = min(group, config.block_n)
        else:
            group = min(group, piece, _largest_power_of_2(num_units))
        # Where two halves share a byte, each value has a byte loaded for it.
        return KERNEL_FUNCTIONS[packed.name], group, packed.per_element if group > 1 else 1


def _largest_power_of_2(number: int) -> int:
    """Return the largest power of two that divides a number."""
    return number & -number


def stored_weight(projection: Projection) -> StoredWeight:
    """Return how a projection's weight is stored. Scales that are not contiguous are copied."""
    weight, scales = projection.weight, projection.scales
    if scales is None:
        return StoredWeight(weight, None, 0, 0, None)
    if projection.is_encoded:
        block = weight.shape[2] // scales.shape[2]
        scaling = next(name for name, of_format in BLOCKS.items() if of_format == block)
        return StoredWeight(weight, scales, scales.stride(0), 0, None, scaling)
    packed, scales = format_of(weight, scales), scales.contiguous()
    of_row = weight.shape[2] if scales.dim() == 2 else scales.shape[2:].numel()
    return StoredWeight(weight.view(torch.uint8), scales, scales.stride(0), of_row, packed)


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
        elements = start // PER + tl.arange(0, BLOCK_K // PER)
        element_mask = elements < depth_size // PER
        groups = start + tl.arange(0, BLOCK_K // GROUP) * GROUP
        places, masks = (columns, elements, groups), (column_mask, element_mask, groups < depth_size)
        strides = (stride_expert, stride_column, stride_depth, stride_scales_expert, stride_scales_row)
        at = ((values, scales, expert), places, masks, strides)
        tile = as_loaded(tl.reshape(FORMAT(at, PER, "elements" if EVEN_DEPTH else ""), (WIDTH, BLOCK_K))).T
    else:
        rows = start + tl.arange(0, BLOCK_K)
        places, masks = (rows, columns, group_columns), (rows < depth_size, column_mask, group_mask)
        at = ((values, scales, expert), places, masks, strides)
        tile = as_loaded(tl.reshape(FORMAT(at, PER, "rows" if EVEN_DEPTH else ""), (BLOCK_K, WIDTH)))
    return tile


@triton.jit
def mxfp4(at, PER: tl.constexpr, EVEN: tl.constexpr):
    pointers, of_expert, rows, groups, of_row = _pointers(at, 1)
    places = rows[:, None] * of_row + (groups // _MXFP4_BLOCK)[None, :]
    codes, scale = _load(at, pointers, of_expert, places, 1, EVEN)
    exponent = scale.to(tl.int32)
    factor = tl.where(exponent == 0, 1 << 22, exponent << 23).to(tl.float32, bitcast=True)[:, :, None]
    low = round_to(_e2m1(codes) * factor, tl.bfloat16)
    return tl.join(low, round_to(_e2m1(codes >> 4) * factor, tl.bfloat16))


@triton.jit
def fp8(at, PER: tl.constexpr, EVEN: tl.constexpr):
    pointers, of_expert, rows, groups, of_row = _pointers(at, 1)
    places = (rows // _FP8_BLOCK)[:, None] * of_row + (groups // _FP8_BLOCK)[None, :]
    codes, scale = _load(at, pointers, of_expert, places, 1, EVEN)
    factor = scale[:, :, None]
    return round_to(_e4m3(codes) * factor, tl.bfloat16)


@triton.jit
def nf4(at, PER: tl.constexpr, EVEN: tl.constexpr):
    SHARE: tl.constexpr = 2 // PER
    pointers, of_expert, rows, groups, of_row = _pointers(at, SHARE)
    places = (rows[:, None] * of_row + groups[None, :] // 2) // (_NF4_BLOCK // 2)
    codes, scale = _load(at, pointers, of_expert, places, SHARE, EVEN)
    factor = scale[:, :, None]
    tile = round_to(_nf4_value(codes, 0, 16) * factor, tl.bfloat16)
    if PER == 2:
        tile = tl.join(round_to(_nf4_value(codes >> 4, 0, 16) * factor, tl.bfloat16), tile)
    return tile


KERNEL_FUNCTIONS = {function.__name__: function for function in (mxfp4, fp8, nf4)}


@triton.jit
def _pointers(at, SHARE: tl.constexpr):
    """Return pointers (rows, 1, elements) of the tile, and the scales of the expert, the rows, groups and row's stride.

    SHARE: how many elements have one byte.
    """
    tensors, places, _, strides = at
    values, scales, expert = tensors
    rows, elements, groups = places
    of_expert = values + expert.to(tl.int64) * strides[0]
    bytes_ = elements // SHARE
    # One axis more than h has: loads of one shape are spread alike over threads, and `down_grad` sums as h is spread.
    pointers = of_expert + rows[:, None, None] * strides[1] + bytes_[None, None, :] * strides[2]
    return pointers, scales + expert.to(tl.int64) * strides[3], rows, groups, strides[4]


@triton.jit
def _load(at, pointers, scales, places, SHARE: tl.constexpr, EVEN: tl.constexpr):
    """Return codes (rows, groups, elements of a group) int32, and the scales (rows, groups) in these places.

    Of SHARE = 2 elements in a byte the first is the high half. EVEN: the axis of which all exists, "rows", "elements".
    """
    _, inside, masks, _ = at
    rows, elements, groups = inside
    row_mask, element_mask, group_mask = masks
    if EVEN == "elements":
        codes = tl.load(pointers, mask=row_mask[:, None, None], other=0)
        scale = tl.load(scales + places, mask=row_mask[:, None], other=0)
    elif EVEN == "rows":
        codes = tl.load(pointers, mask=element_mask[None, None, :], other=0)
        scale = tl.load(scales + places, mask=group_mask[None, :], other=0)
    else:
        codes = tl.load(pointers, mask=row_mask[:, None, None] & element_mask[None, None, :], other=0)
        scale = tl.load(scales + places, mask=row_mask[:, None] & group_mask[None, :], other=0)
    if SHARE == 2:
        codes = codes >> ((1 - elements % 2) * 4)[None, None, :].to(tl.uint8)
    shape: tl.constexpr = (rows.shape[0], groups.shape[0], elements.shape[0] // groups.shape[0])
    return tl.reshape(codes, shape).to(tl.int32), scale


# The bits of e2m1 and e4m3, moved to where fp32's exponent ends, are their value divided by a power of two, also
# without a leading one. Of four bits the higher ones are not read.


@triton.jit
def _e2m1(code):
    bits = (code & 7) << 22 | (code & 8) << 28
    return bits.to(tl.float32, bitcast=True) * 8.507059173023462e37  # 2^126


@triton.jit
def _e4m3(code):
    bits = (code & 0x7F) << 20 | (code & 0x80) << 24
    return bits.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120


@triton.jit
def _nf4_value(code, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """Return the fp32 values of codes whose low bits choose among COUNT values from FIRST on."""
    if COUNT == 2:
        return tl.where((code & 1) != 0, _NF4_VALUES[FIRST + 1], _NF4_VALUES[FIRST])
    else:
        low = _nf4_value(code, FIRST, COUNT // 2)
        high = _nf4_value(code, FIRST + COUNT // 2, COUNT // 2)
        return tl.where((code & (COUNT // 2)) != 0, high, low)
