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
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["ExpertPrecision", "check_precision", "decode", "encode", "rounded", "rounded_rows", "rounded_weight"]

BLOCKS = {"fp8_block": 128, "mxfp8": 32}
SMALLEST_SCALE, LARGEST_SCALE = 10, 246
"""Those whose codes all stand for normal bf16 numbers. A block that needs a smaller scale is stored as zeros."""
NOT_FINITE = 255
"""The scale of a block that needs a larger one (448 * 2**119 = 2.98e38 is the largest number of the others) or has an
infinity or NaN. All its numbers are NaN then: 255 is NaN in the OCP format too."""
PIECE = 2**17
"""So many numbers are rounded at a time, whose temporaries stay in a CPU's caches."""


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
        if self.format not in BLOCKS:
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


def check_precision(precision: object) -> None:
    """Raise TypeError unless this is an ExpertPrecision or None."""
    if precision is not None and not isinstance(precision, ExpertPrecision):
        raise TypeError(
            f"expert_precision must be an ExpertPrecision or None, got {precision!r}: "
            "use tritonmoe.ExpertPrecision('fp8_block') or ('mxfp8')"
        )


def encode(matrix: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Round a matrix to e4m3, with one scale for each block of so many rows and columns; the last ones may be short.

    Args:
        matrix: (A, B) bf16.
    Returns:
        Codes (A, B) float8_e4m3fn, and scales (ceil(A / rows), ceil(B / columns)) uint8: a number is code * 2**(scale -
        127). No code is a negative zero. The codes of a block with the scale 255 are zeros.
    Example:
        A row [448, -1, 0.3] in blocks of (1, 3) has the scale 127 and the codes [448, -1, 0.3125]; of [896, -1, 0.3]
        these are 128 and [448, -0.5, 0.15625].
    """
    codes = torch.empty(matrix.shape, dtype=torch.float8_e4m3fn, device=matrix.device)
    scales = []
    for rows, blocks in _pieces(matrix, block):
        exact, of_blocks = _exact_codes(blocks)
        codes[rows] = exact.nan_to_num_(0.0).flatten(2).flatten(0, 1)[: rows.stop - rows.start, : matrix.shape[1]]
        scales.append(of_blocks.flatten(1).to(torch.uint8))
    empty = torch.empty(0, -(-matrix.shape[1] // block[1]), dtype=torch.uint8, device=matrix.device)
    return codes, torch.cat([empty, *scales])


def decode(codes: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    """Return the matrix (A, B) in bf16 that encode() made these codes and scales of, rounded."""
    of_each = scales.repeat_interleave(block[0], 0)[: codes.shape[0]]
    of_each = of_each.repeat_interleave(block[1], 1)[:, : codes.shape[1]]
    return (codes.float() * _powers(of_each.int())).to(torch.bfloat16)


def rounded(matrix: Tensor, block: tuple[int, int]) -> Tensor:
    """Return decode() of encode() of a matrix (A, B) bf16, without making codes: an eighth of the time on a CPU."""
    out = torch.empty_like(matrix, memory_format=torch.contiguous_format)
    for rows, blocks in _pieces(matrix, block):
        exact, scales = _exact_codes(blocks)
        exact *= _powers(scales)
        out[rows] = exact.flatten(2).flatten(0, 1)[: rows.stop - rows.start, : matrix.shape[1]]
    return out


def rounded_rows(rows: Tensor, precision: ExpertPrecision) -> Tensor:
    """Return rows (N, columns) bf16, rounded for a product that sums over the columns."""
    return rounded(rows, (1, precision.block))


def rounded_weight(weight: Tensor, precision: ExpertPrecision, depth: int) -> Tensor:
    """Return a weight (E, A, B) bf16, rounded for a product that sums over the axis `depth`, 1 or 2."""
    block = (precision.block_rows, precision.block)
    return torch.stack([rounded(matrix, block if depth == 2 else block[::-1]) for matrix in weight])


def _pieces(matrix: Tensor, block: tuple[int, int]) -> Iterator[tuple[slice, Tensor]]:
    """Cut a matrix into rows that stay in cache, as (blocks down, rows of a block, blocks across, columns of one)."""
    height, width = block
    num_rows, columns = matrix.shape
    step = max(1, PIECE // (height * max(columns, 1))) * height
    for first in range(0, num_rows, step):
        piece = matrix[first : first + step].float()
        padding = (0, -columns % width, 0, -piece.shape[0] % height)
        if any(padding):
            piece = F.pad(piece, padding)
        yield slice(first, min(first + step, num_rows)), piece.unflatten(1, (-1, width)).unflatten(0, (-1, height))


def _exact_codes(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return what codes are as fp32 numbers, in the memory of `blocks`, and scales (int32, 1 along a block's axes)."""
    magnitudes = blocks.view(torch.int32) & 0x7FFFFFFF
    largest = magnitudes.amax((1, 3), keepdim=True).clamp_(max=0x7F800000)  # what NaN has above would overflow
    scales = ((largest + 0x1FFFFF) >> 23) - 8  # one more where the mantissa is past that of 448 = 1.75 * 2**8
    is_too_large = scales > LARGEST_SCALE
    is_kept = (scales >= SMALLEST_SCALE) & ~is_too_large
    blocks *= torch.where(is_kept, (254 - scales) << 23, 0).view(torch.float32)
    scales.masked_fill_(~is_kept, 0).masked_fill_(is_too_large, NOT_FINITE)
    # A number whose leading bit is 2**e, or 2**-6 if that is larger, becomes a multiple of 2**(e - 3), ties to even:
    # numbers next to 1.5 * 2**(e + 20) are just these multiples.
    exponents = torch.bitwise_and(blocks.view(torch.int32), 0x7F800000, out=magnitudes)
    shift = exponents.clamp_(min=(127 - 6) << 23).add_((20 << 23) + 0x400000).view(torch.float32)
    return blocks.add_(shift).sub_(shift), scales


def _powers(scales: Tensor) -> Tensor:
    """Return 2**(scale - 127), 0 for 0, and NaN for 255."""
    return (scales << 23 | (scales == NOT_FINITE).int()).view(torch.float32)
