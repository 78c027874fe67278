"""What kernels do with tiles of numbers: multiply, round and split them, with the same bits in the interpreter."""

import triton
import triton.language as tl

from tritonmoe.kernels.launch import INTERPRETED

__all__ = ["dot", "round_to", "split_column_pairs", "split_columns"]

_IN_INTERPRETER = tl.constexpr(INTERPRETED)


@triton.jit
def dot(left, right, accumulator, PRECISION: tl.constexpr):
    """Add left @ right in fp32."""
    if _IN_INTERPRETER and left.dtype == tl.bfloat16:
        # The interpreter reads bf16 operands of tl.dot as integers.
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, accumulator, input_precision=PRECISION)


@triton.jit
def round_to(value, dtype: tl.constexpr):
    """Round fp32 to a stored dtype, to nearest even."""
    if _IN_INTERPRETER and dtype == tl.bfloat16:
        # The interpreter cuts the low bits off: leave none to cut.
        bits = value.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16
        value = bits.to(tl.float32, bitcast=True)
    return value.to(dtype)


@triton.jit
def split_column_pairs(tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HALVES: tl.constexpr):
    """Split (BLOCK_M, 2*BLOCK_N) in two: left and right half (HALVES), or even and odd columns."""
    if HALVES:
        pairs = tl.permute(tl.reshape(tile, (BLOCK_M, 2, BLOCK_N)), (0, 2, 1))
    else:
        pairs = tl.reshape(tile, (BLOCK_M, BLOCK_N, 2))
    return tl.split(pairs)


@triton.jit
def split_columns(tile, BLOCK_M: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr):
    """Cut (BLOCK_M, WIDTH) into a tuple of 1, 2 or 4 tiles, from left to right."""
    if PARTS == 1:
        return (tile,)
    elif PARTS == 2:
        return split_column_pairs(tile, BLOCK_M, WIDTH // 2, True)
    else:
        tl.static_assert(PARTS == 4)
        left, right = split_column_pairs(tile, BLOCK_M, WIDTH // 2, True)
        first, second = split_column_pairs(left, BLOCK_M, WIDTH // 4, True)
        third, fourth = split_column_pairs(right, BLOCK_M, WIDTH // 4, True)
        return (first, second, third, fourth)
