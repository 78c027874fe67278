"""Rows and weights as codes and scales, which 8-bit instructions multiply: the bits of config/precision.py's encode().

What a product sums over is the last axis of codes, whatever it was before, and is padded with zeros to a multiple of
128: kernels that multiply codes need no mask along it. No row is padded.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonmoe.config.precision import LARGEST_SCALE, NOT_FINITE, SMALLEST_SCALE, Encoded, ExpertPrecision
from tritonmoe.ops.kernels.arithmetic import round_to
from tritonmoe.ops.kernels.launch import INTERPRETED, cdiv, launch

__all__ = ["encode_rows", "encode_weight", "round_rows"]

DEPTH = 128
"""The depth of codes is a multiple of it: a block of "fp8_block", four of "mxfp8"."""
ROWS_OF_ROWS, ROWS_OF_WEIGHTS = 16, 128
"""The rows of a program's tile. A block of a weight may have 128 of them."""
_IN_INTERPRETER = tl.constexpr(INTERPRETED)
_SMALLEST, _LARGEST, _NOT_FINITE = tl.constexpr(SMALLEST_SCALE), tl.constexpr(LARGEST_SCALE), tl.constexpr(NOT_FINITE)


@triton.jit
def _code_of(value):
    """Return the e4m3 code of fp32 numbers within +-448, uint8, rounded to nearest even; no code is a negative zero."""
    if _IN_INTERPRETER:
        # The interpreter's own cast drops a carry into the exponent.
        bits = value.to(tl.int32, bitcast=True)
        # Beside 2^14 numbers without a leading one have their code in the last bits, rounded.
        small = (tl.abs(value) + 16384.0).to(tl.int32, bitcast=True) & 0xF
        magnitude = bits & 0x7FFFFFFF
        normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
        code = (tl.where(tl.abs(value) < 0.015625, small, normal) | ((bits >> 24) & 0x80)).to(tl.uint8)
    else:
        code = value.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    return tl.where(code == 0x80, 0, code).to(tl.uint8)


@triton.jit(do_not_specialize=["N"], do_not_specialize_on_alignment=["scales"])
def _encode_kernel(
    matrix,  # (E, N, D) bf16 in any layout, through its strides
    codes,  # (E, N, padded) e4m3, or None
    scales,  # (E, N / ROWS_OF_SCALE, padded / DEPTH_OF_SCALE) uint8, or None
    rounded,  # (E, N, D) bf16, or None
    N,
    D,
    padded,
    stride_expert,
    stride_row,
    stride_depth,
    stride_codes_expert,  # 0 of one expert, or Triton would compile anew where N changes
    stride_scales_expert,
    ROWS_OF_SCALE: tl.constexpr,
    DEPTH_OF_SCALE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    expert = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    valid = rows < N
    depth = tl.program_id(1) * BLOCK_DEPTH + tl.arange(0, BLOCK_DEPTH)
    inside = valid[:, None] & (depth < D)[None, :]
    pointers = matrix + expert * stride_expert + rows[:, None] * stride_row + depth[None, :].to(tl.int64) * stride_depth
    numbers = tl.load(pointers, mask=inside, other=0.0)
    bits = numbers.to(tl.uint16, bitcast=True).to(tl.int32)
    GROUPS: tl.constexpr = BLOCK_ROWS // ROWS_OF_SCALE
    PIECES: tl.constexpr = BLOCK_DEPTH // DEPTH_OF_SCALE
    shape: tl.constexpr = (GROUPS, ROWS_OF_SCALE, PIECES, DEPTH_OF_SCALE)
    blocks = tl.reshape(bits, shape)
    largest = tl.max(tl.max(blocks & 0x7FFF, 3), 1)
    scale = ((largest + 0x1F) >> 7) - 8  # as config/precision.py has it
    is_kept = (scale >= _SMALLEST) & (scale <= _LARGEST)
    stored_scale = tl.where(is_kept, scale, tl.where(scale < _SMALLEST, 0, _NOT_FINITE))
    inverse = tl.where(is_kept, (254 - scale) << 23, 0).to(tl.float32, bitcast=True)
    values = tl.where(is_kept[:, None, :, None], blocks << 16, 0).to(tl.float32, bitcast=True)
    of_blocks = _code_of(values * inverse[:, None, :, None])
    code = tl.reshape(of_blocks, (BLOCK_ROWS, BLOCK_DEPTH))
    if codes is not None:
        code_pointers = codes + expert * stride_codes_expert + rows[:, None] * padded + depth[None, :]
        tl.store(code_pointers, code.to(tl.float8e4nv, bitcast=True), mask=valid[:, None])
        groups = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
        group_mask = groups * ROWS_OF_SCALE < N
        pieces = tl.program_id(1) * PIECES + tl.arange(0, PIECES)
        of_expert = scales + expert * stride_scales_expert
        scale_pointers = of_expert + groups[:, None] * (padded // DEPTH_OF_SCALE) + pieces[None, :]
        tl.store(scale_pointers, stored_scale.to(tl.uint8), mask=group_mask[:, None])
    if rounded is not None:
        # A code's bits, moved to where fp32's exponent ends, are its number divided by 2^120.
        wide = of_blocks.to(tl.int32)
        number = ((wide & 0x7F) << 20 | (wide & 0x80) << 24).to(tl.float32, bitcast=True) * 1.329227995784916e36
        factor = stored_scale << 23 | (stored_scale == _NOT_FINITE).to(tl.int32)
        number *= factor.to(tl.float32, bitcast=True)[:, None, :, None]
        rounded_pointers = rounded + rows[:, None] * D + depth[None, :]
        tl.store(rounded_pointers, round_to(tl.reshape(number, (BLOCK_ROWS, BLOCK_DEPTH)), tl.bfloat16), mask=inside)


def _launch(
    matrix: Tensor,
    strides: tuple[int, int, int],
    shape: tuple[int, int, int],
    block: tuple[int, int],
    encoded: Encoded | None,
    rounded: Tensor | None,
) -> None:
    num_experts, num_rows, depth = shape
    padded = cdiv(depth, DEPTH) * DEPTH
    codes, scales = (None, None) if encoded is None else encoded
    block_rows = ROWS_OF_WEIGHTS if block[0] > 1 else ROWS_OF_ROWS
    launch(
        _encode_kernel,
        (cdiv(num_rows, block_rows), padded // DEPTH, num_experts),
        matrix,
        codes,
        scales,
        rounded,
        num_rows,
        depth,
        padded,
        *strides,
        0 if codes is None or num_experts == 1 else codes.stride(0),
        0 if scales is None or num_experts == 1 else scales.stride(0),
        num_warps=8 if block[0] > 1 else 4,
        ROWS_OF_SCALE=block[0],
        DEPTH_OF_SCALE=block[1],
        BLOCK_ROWS=block_rows,
        BLOCK_DEPTH=DEPTH,
    )


def _empty(like: Tensor, shape: tuple[int, int, int], block: tuple[int, int]) -> Encoded:
    num_experts, num_rows, depth = shape
    padded = cdiv(depth, DEPTH) * DEPTH
    codes = like.new_empty(num_experts, num_rows, padded, dtype=torch.float8_e4m3fn)
    scales = like.new_empty(num_experts, cdiv(num_rows, block[0]), padded // block[1], dtype=torch.uint8)
    return Encoded(codes, scales)


def encode_rows(rows: Tensor, precision: ExpertPrecision, among: tuple[int, int] | None = None) -> Encoded:
    """Return rows (N, depth) bf16 as codes (N, padded) and scales (N, padded / block), for a sum over the depth.

    among: the first row that is read and encoded, and where they end; the others are anything. None: all.
    """
    (num_rows, depth), block = rows.shape, (1, precision.block)
    encoded = _empty(rows, (1, num_rows, depth), block)
    wanted = slice(*(among or (0, num_rows)))
    part, of_part = rows[wanted], Encoded(encoded.codes[:, wanted], encoded.scales[:, wanted])
    _launch(part, (0, rows.stride(0), rows.stride(1)), (1, part.shape[0], depth), block, of_part, None)
    return Encoded(encoded.codes[0], encoded.scales[0])


def encode_weight(weight: Tensor, precision: ExpertPrecision, depth: int) -> Encoded:
    """Return a weight (E, A, B) bf16 for a product that sums over the axis `depth`, 1 or 2, which comes last.

    Codes are (E, width, padded), scales (E, ceil(width / block_rows), padded / block).
    """
    other, block = 3 - depth, (precision.block_rows, precision.block)
    shape = weight.shape[0], weight.shape[other], weight.shape[depth]
    encoded = _empty(weight, shape, block)
    _launch(weight, (weight.stride(0), weight.stride(other), weight.stride(depth)), shape, block, encoded, None)
    return encoded


def round_rows(rows: Tensor, precision: ExpertPrecision) -> Tensor:
    """Return rows (N, depth) bf16, rounded as config/precision.py's rounded_rows() rounds them."""
    out = torch.empty_like(rows, memory_format=torch.contiguous_format)
    strides, shape = (0, rows.stride(0), rows.stride(1)), (1, rows.shape[0], rows.shape[1])
    _launch(rows, strides, shape, (1, precision.block), None, out)
    return out
