"""ExpertPrecision: the format in which experts that train multiply, and the grid to which a format rounds numbers.

A block of numbers has one scale, a power of two. A code is an e4m3 number, and stands for code * scale:

| format | blocks of rows | blocks of a weight |
| --- | --- | --- |
| fp8_block | 128 along what a product sums over | 128 x 128 |
| mxfp8 | 32 along what a product sums over | 32 along what a product sums over |

The scale is the least power of two with which no number of the block is past 448, the largest of e4m3 (the rule that
torchao calls RCEIL), found by integers from the bf16 number of the largest magnitude. So each number that a code and a
scale stand for is a bf16 number, and rounding a second time, in the same blocks, changes nothing: products in bf16 of
rounded operands define what is right, on every device. Sources: DeepSeek-V3 (arXiv:2412.19437) for blocks of 128, and
the OCP specification of microscaling formats (version 1.0) for blocks of 32.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "Encoded",
    "ExpertPrecision",
    "check_precision",
    "decode",
    "encode",
    "rounded",
    "rounded_rows",
    "weight_block",
]

BLOCKS = {"fp8_block": 128, "mxfp8": 32}
SMALLEST_SCALE, LARGEST_SCALE = 10, 246
"""Those whose codes all stand for normal bf16 numbers. A block that needs a smaller scale is stored as zeros."""
NOT_FINITE = 255
"""The scale of a block that needs a larger one (448 * 2**119 = 2.98e38 is the largest number of the others) or has an
infinity or NaN. All its numbers are NaN then: 255 is NaN in the OCP format too."""
MIDDLE_SCALE = 240
"""Numbers of blocks with larger scales are rounded after a division: 16 times such a number may be past bf16."""
PIECE, PIECE_OF_GPU = 2**19, 2**24
"""So many numbers are rounded at a time. Temporaries stay in a CPU's caches, and are a small part of a GPU's memory."""


@dataclass(frozen=True)
class ExpertPrecision:
    """How experts that train multiply: rows and weights rounded to 8 bits in blocks; the sums are fp32.

    Parameters keep their dtype. Biases, activations and the sums of a token's experts are those of a bf16 layer.
    """

    format: Literal["fp8_block", "mxfp8"]
    """"fp8_block": e4m3 in blocks of 128, and of 128 x 128 in weights. "mxfp8": e4m3 in blocks of 32."""
    weight_gradients: Literal["bf16", "fp8"] = "bf16"
    """"bf16": gradients of weights are products of the rows as the experts got them (rounded), and of bf16 numbers.
    "fp8": both operands are rounded along the tokens too, in blocks that begin anew with each expert."""

    def __post_init__(self) -> None:
        if self.format not in tuple(BLOCKS):
            raise ValueError(f"format must be one of {', '.join(map(repr, BLOCKS))}, got {self.format!r}")
        if self.weight_gradients not in ("bf16", "fp8"):
            raise ValueError(f"weight_gradients must be 'bf16' or 'fp8', got {self.weight_gradients!r}")

    @property
    def block(self) -> int:
        """How many numbers, side by side along what a product sums over, have one scale."""
        return BLOCKS[self.format]

    @property
    def is_symmetric(self) -> bool:
        """Whether a weight is rounded alike for the products of both directions."""
        return self.block_rows == self.block

    @property
    def block_rows(self) -> int:
        """How many rows of a weight have one scale."""
        return self.block if self.format == "fp8_block" else 1


class Encoded(NamedTuple):
    """Rows or a weight as codes and scales, with what a product sums over as the last axis."""

    codes: Tensor
    """float8_e4m3fn."""
    scales: Tensor
    """uint8, one for each block of codes."""


def check_precision(precision: object) -> None:
    """Raise TypeError unless this is an ExpertPrecision or None."""
    if precision is not None and not isinstance(precision, ExpertPrecision):
        raise TypeError(
            f"expert_precision must be an ExpertPrecision or None, got {precision!r}: "
            "use tritonmoe.ExpertPrecision('fp8_block') or ('mxfp8')"
        )


def encode(matrix: Tensor, block: tuple[int, int], out: Encoded | None = None) -> Encoded:
    """Round a matrix to e4m3, with one scale for each block of so many rows and columns; the last ones may be short.

    Args:
        matrix: (A, B) bf16. out: memory for the result, in any layout.
    Returns:
        Codes (A, B) float8_e4m3fn, and scales (ceil(A / rows), ceil(B / columns)) uint8: a number is code * 2**(scale -
        127). No code is a negative zero. The codes of a block with the scale 255 are zeros.
    Example:
        A row [448, -1, 0.3] in blocks of (1, 3) has the scale 127 and the codes [448, -1, 0.3125]; of [896, -1, 0.3]
        these are 128 and [448, -0.5, 0.15625].
    """
    num_rows, columns = matrix.shape
    if out is None:
        codes = torch.empty(matrix.shape, dtype=torch.float8_e4m3fn, device=matrix.device)
        scales = codes.new_empty(-(-num_rows // block[0]), -(-columns // block[1]), dtype=torch.uint8)
        out = Encoded(codes, scales)
    for rows, blocks in _pieces(matrix, block):
        numbers, largest, is_plain = _rounded(blocks)
        of_blocks = _scales(largest)
        is_kept = (of_blocks >= SMALLEST_SCALE) & (of_blocks <= LARGEST_SCALE)
        inverse = torch.where(is_kept, (254 - of_blocks) << 7, 0).to(torch.int16).view(torch.bfloat16)
        numbers *= inverse
        out.codes[rows] = _joined(numbers if is_plain else numbers.nan_to_num_(0.0), rows, matrix)
        first = rows.start // block[0]
        out.scales[first : first + of_blocks.shape[0]] = of_blocks.flatten(1)
    return out


def decode(codes: Tensor, scales: Tensor, block: tuple[int, int], out: Tensor | None = None) -> Tensor:
    """Return the matrix (A, B) in bf16 that encode() made these codes and scales of, rounded; out: memory for that."""
    if out is None:
        out = torch.empty(codes.shape, dtype=torch.bfloat16, device=codes.device)
    for rows, bits in _pieces(codes.view(torch.int8), block):
        # An e4m3 code has the bits of an fp16 number 2**8 times as small, but for their places.
        halves = (bits.to(torch.int16) << 7).bitwise_and_(-0x4001).view(torch.float16)
        first = rows.start // block[0]
        of_blocks = scales[first : first + bits.shape[0]].int()
        powers = (of_blocks + 8) << 23
        powers.masked_fill_(of_blocks == 0, 0).masked_fill_(of_blocks == NOT_FINITE, 0x7FC00000)
        numbers = halves.float().mul_(powers.view(torch.float32)[:, None, :, None])
        out[rows] = _joined(numbers, rows, codes)
    return out


def rounded(matrix: Tensor, block: tuple[int, int], out: Tensor | None = None) -> Tensor:
    """Return decode() of encode() of a matrix (A, B) bf16, without making codes; out: contiguous memory for that."""
    if out is None:
        out = torch.empty_like(matrix, memory_format=torch.contiguous_format)
    for rows, blocks in _pieces(matrix, block):
        if (rows.stop - rows.start) % block[0] == out.shape[1] % block[1] == 0:
            _rounded(blocks, _in_blocks(out[rows], block))
        else:
            out[rows] = _joined(_rounded(blocks)[0], rows, matrix)
    return out


def rounded_rows(rows: Tensor, precision: ExpertPrecision) -> Tensor:
    """Return rows (N, columns) bf16, rounded for a product that sums over the columns."""
    return rounded(rows, (1, precision.block))


def weight_block(precision: ExpertPrecision, depth: int) -> tuple[int, int]:
    """Return the block of one expert's weight (A, B) for a product that sums over the axis `depth`, 0 or 1."""
    block = (precision.block_rows, precision.block)
    return block if depth == 1 else block[::-1]


def _pieces(matrix: Tensor, block: tuple[int, int]) -> Iterator[tuple[slice, Tensor]]:
    """Cut a matrix into pieces of rows, as (blocks down, rows of a block, blocks across, columns of one)."""
    height, width = block
    num_rows, columns = matrix.shape
    step = max(1, (PIECE if matrix.is_cpu else PIECE_OF_GPU) // (height * max(columns, 1))) * height
    for first in range(0, num_rows, step):
        piece = matrix[first : first + step]
        padding = (0, -columns % width, 0, -piece.shape[0] % height)
        if any(padding):
            piece = F.pad(piece, padding)
        yield slice(first, min(first + step, num_rows)), _in_blocks(piece, block)


def _in_blocks(matrix: Tensor, block: tuple[int, int]) -> Tensor:
    return matrix.unflatten(1, (-1, block[1])).unflatten(0, (-1, block[0]))


def _joined(blocks: Tensor, rows: slice, matrix: Tensor) -> Tensor:
    """Return the rows of a matrix that _pieces() has cut into blocks."""
    return blocks.flatten(2).flatten(0, 1)[: rows.stop - rows.start, : matrix.shape[1]]


def _scales(largest: Tensor) -> Tensor:
    """Return the scales of blocks whose largest magnitudes have these bits, int32."""
    scales = ((largest.int() + 0x1F) >> 7) - 8  # one more where the mantissa is past that of 448 = 1.75 * 2**8
    return scales.masked_fill(scales < SMALLEST_SCALE, 0).masked_fill_(scales > LARGEST_SCALE, NOT_FINITE)


def _rounded(blocks: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor, bool]:
    """Return the numbers of blocks rounded, bf16 in `out` or new memory, and the bits of the largest magnitudes.

    The bits are int16, 1 along a block's axes. The third result is whether all numbers are known to be finite.
    """
    magnitudes = blocks.view(torch.int16) & 0x7FFF
    largest = magnitudes.amax(1 if blocks.shape[3] == 1 else 3, keepdim=True)
    if largest.shape[1] > 1:  # the second axis apart, which is faster
        largest = largest.amax(1, keepdim=True)
    # A GPU is not asked: the host would wait for the answer.
    is_plain = blocks.is_cpu and _are_plain(largest)
    up = None
    if is_plain:
        smallest = (largest + 0x1F).bitwise_and_(0x7F80).sub_(14 << 7)
    else:
        scales = ((largest.int() + 0x1F) >> 7) - 8
        is_large, smallest = scales > MIDDLE_SCALE, scales - 6
        is_too_small = scales < SMALLEST_SCALE
        ones = torch.ones_like(scales, dtype=torch.bfloat16)
        down = ones.masked_fill(is_large, 2.0**-16).masked_fill_(is_too_small, 0.0)
        up = ones.masked_fill(is_large, 2.0**16).masked_fill_(scales > LARGEST_SCALE, float("nan"))
        blocks = blocks * down
        torch.bitwise_and(blocks.view(torch.int16), 0x7FFF, out=magnitudes)
        smallest = (torch.where(is_large, smallest - 16, smallest) << 7).to(torch.int16)
    # A number whose leading bit is 2**e, or 2**-6 of the scale if that is larger, becomes a multiple of 2**(e - 3),
    # ties to even: bf16 numbers next to 1.5 * 2**(e + 4) are just these multiples.
    shift = magnitudes.bitwise_and_(0x7F80)
    torch.maximum(shift, smallest, out=shift)
    shift = shift.add_((4 << 7) + 0x40).view(torch.bfloat16)
    numbers = torch.add(blocks, shift, out=out).sub_(shift)
    if up is not None:
        numbers *= up
    return numbers, largest, is_plain


def _are_plain(largest: Tensor) -> bool:
    """Return whether blocks on a CPU have scales from SMALLEST_SCALE to MIDDLE_SCALE, or are zeros."""
    least, most = ((scale + 8 << 7) - 0x1F for scale in (SMALLEST_SCALE, MIDDLE_SCALE + 1))
    if largest.numel() == 0 or int(largest.max()) >= most:
        return False
    return int(largest.min()) >= least or not bool(((largest < least) & (largest > 0)).any())
