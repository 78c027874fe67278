"""What kernels do with tiles of numbers: multiply, round and split them, with the same bits in the interpreter."""

import triton
import triton.language as tl
from triton.language.extra.libdevice import fast_dividef

from tritonmoe.ops.kernels.launch import INTERPRETED, compiled_for

__all__ = [
    "as_loaded",
    "dot",
    "round_to",
    "rounded",
    "sigmoid_of",
    "split_column_pairs",
    "split_columns",
    "widened",
    "zeros",
]

_IN_INTERPRETER = tl.constexpr(INTERPRETED)


@tl.core.builtin
def _is_nvidia(_semantic=None):
    """Return whether the compiler's target is NVIDIA's; `tl.target_info` asks the driver instead, if there is one."""
    return tl.constexpr(_semantic.builder.options.backend_name == "cuda")


@tl.core.builtin
def _is_blackwell(_semantic=None):
    """Return whether products are outside of the target's registers, as on sm_100: LLVM makes of sums and products of
    neighbours, but not of inline assembly, instructions that compute both."""
    return tl.constexpr(compiled_for(_semantic).tensor_columns > 0)


@triton.jit
def _one_each(instruction: tl.constexpr, x):
    return tl.inline_asm_elementwise(instruction, "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def sigmoid_of(x):
    """Return 1 / (1 + exp(-x)) in fp32, by the two approximations of the hardware: about 1e-7 * (1 + |x|) off.

    `tl.sigmoid` takes more than twice the instructions: for denormal numbers, which are zero here, and for divisors
    beyond 2^126, whose quotients are zero here.
    """
    power = -1.4426950408889634 * x
    if _IN_INTERPRETER:
        result = 1.0 / (1.0 + tl.exp2(power))
    elif _is_nvidia():
        result = _one_each("rcp.approx.ftz.f32 $0, $1;", 1.0 + _one_each("ex2.approx.ftz.f32 $0, $1;", power))
    else:
        result = fast_dividef(1.0, 1.0 + tl.exp2(power))
    return result


@triton.jit
def dot(left, right, accumulator, PRECISION: tl.constexpr):
    """Add left @ right in fp32."""
    if _IN_INTERPRETER and left.dtype == tl.bfloat16:
        # The interpreter reads bf16 operands of tl.dot as integers.
        left = _as_float(left)
        right = _as_float(right)
    return tl.dot(left, right, accumulator, input_precision=PRECISION)


@triton.jit
def round_to(value, dtype: tl.constexpr):
    """Round fp32 to a stored dtype, to nearest even."""
    if _IN_INTERPRETER and dtype == tl.bfloat16:
        # The interpreter cuts the low bits off, and makes other numbers of those without a leading one.
        bits = value.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        result = bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        result = value.to(dtype)
    return result


@triton.jit
def _as_float(value):
    """Return bf16 in fp32, as the interpreter's own cast doesn't for numbers without a leading one."""
    return (value.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def as_loaded(tile):
    """Return a tile of bf16 that was computed, for `dot`, which sums as if it had been loaded.

    Otherwise Triton looks through the computation for what was loaded. Of less than 16 bits it orders the depth another
    way for mma.sync, so that other products are added together.
    """
    if not _IN_INTERPRETER and _is_nvidia():
        tile = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [tile], tl.bfloat16, is_pure=False, pack=2)
    return tile


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
    """Cut (BLOCK_M, WIDTH) into a tuple of 1, 2, 4 or 8 tiles, from left to right."""
    if PARTS == 1:
        return (tile,)
    elif PARTS == 2:
        return split_column_pairs(tile, BLOCK_M, WIDTH // 2, True)
    else:
        tl.static_assert(PARTS == 4 or PARTS == 8)
        left, right = split_column_pairs(tile, BLOCK_M, WIDTH // 2, True)
        lefts = split_columns(left, BLOCK_M, WIDTH // 2, PARTS // 2)
        rights = split_columns(right, BLOCK_M, WIDTH // 2, PARTS // 2)
        return lefts + rights


@triton.jit
def zeros(count, BLOCK_M: tl.constexpr, WIDTH: tl.constexpr, FLATTEN: tl.constexpr):
    """Return (BLOCK_M, WIDTH) zeros to add products to. count: an int32 from 0 on that is not known when compiling."""
    zero = 0.0
    if FLATTEN and not _IN_INTERPRETER and not _is_blackwell():
        # ptxas brings every constant zero to its place through a uniform register: two instructions each.
        zero = (count >> 31).to(tl.float32, bitcast=True)
    return tl.full((BLOCK_M, WIDTH), zero, tl.float32)


@triton.jit
def widened(tile):
    """Return a tile of a stored dtype in fp32."""
    if _IN_INTERPRETER or tile.dtype != tl.bfloat16:
        return tile.to(tl.float32)
    elif _is_nvidia() and not _is_blackwell():
        bits = tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16;\nand.b32 $1, $2, 0xffff0000;", "=&r,=&r,r", [tile], tl.int32, is_pure=True, pack=2
        )
        return bits.to(tl.float32, bitcast=True)
    else:
        return tile.to(tl.float32)


@triton.jit
def rounded(value, dtype: tl.constexpr):
    """Return fp32 values of a stored dtype: the nearest ones."""
    if _IN_INTERPRETER or dtype != tl.bfloat16:
        return round_to(value, dtype).to(tl.float32)
    elif _is_nvidia() and not _is_blackwell():
        bits = tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $3, $2;\nand.b32 $1, $0, 0xffff0000;\nshl.b32 $0, $0, 16;",
            "=r,=r,f,f",
            [value],
            tl.int32,
            is_pure=True,
            pack=2,
        )
        return bits.to(tl.float32, bitcast=True)
    else:
        return round_to(value, dtype).to(tl.float32)
