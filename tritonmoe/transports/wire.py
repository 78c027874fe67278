"""How rows travel: as they are, as bf16, as fp8 with a scale for every 128 columns of a row, or in an ExpertPrecision.

The fp8 format follows DeepSeek-V3's dispatch (arXiv 2412.19437): e4m3 values, one fp32 scale per row and block of 128
columns. e4m3 has no infinity, so the code of its largest number stands for one here, and finite values use the range
up to the number below it: NaN and both infinities arrive as what they were.

Rows in an ExpertPrecision are rounded before they travel, so their codes and scales stand for the bits that they have.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tritonmoe.config import precision as grid
from tritonmoe.config.precision import ExpertPrecision
from tritonmoe.transports import PendingExchange

__all__ = ["NUM_ROUNDING_SUMS", "DecodedExchange", "WireFormat", "Wires", "choose_wires", "rounding_sums"]

NUM_ROUNDING_SUMS = 5
BLOCK_COLUMNS = 128
LARGEST_FINITE = 416.0
"""The number below 448, e4m3's largest, whose code means infinity here."""
INFINITY = 448.0
SMALLEST_SCALE = 2.0**-126
"""A block of zeros, or of numbers too small for fp32's normal range, is divided by this."""


@dataclass(frozen=True)
class WireFormat:
    """What rows (n, D) of `dtype` look like between ranks: (n, columns) of `wire_dtype`, bytes for fp8.

    wire_dtype None sends rows as they are; torch.bfloat16 is for fp32 rows, torch.float8_e4m3fn for any but fp64.
    precision: bf16 rows travel as its codes and scales, bytes.
    Raises TypeError for another combination.
    Example:
        WireFormat(torch.float32, torch.float8_e4m3fn).row_bytes(300) is 300 + 3 * 4 = 312.
    """

    dtype: torch.dtype
    wire_dtype: torch.dtype | None = None
    precision: ExpertPrecision | None = None

    def __post_init__(self) -> None:
        takes = {
            None: (self.dtype,),
            torch.bfloat16: (torch.float32,),
            torch.float8_e4m3fn: (torch.float32, torch.bfloat16, torch.float16),
        }
        if self.dtype not in takes[self.wire_dtype]:
            allowed = ", ".join(map(str, takes[self.wire_dtype]))
            raise TypeError(
                f"wire_dtype={self.wire_dtype} can carry rows of {allowed}, got {self.dtype}: leave wire_dtype out"
            )

    @property
    def is_plain(self) -> bool:
        """Whether rows travel as they are."""
        return self.wire_dtype is None and self.precision is None

    def row_bytes(self, width: int) -> int:
        """Return the bytes of one travelling row of `width` columns."""
        if self.precision is not None:
            return width + -(-width // self.precision.block)
        if self.wire_dtype == torch.float8_e4m3fn:
            return width + 4 * num_blocks(width)
        return width * (self.wire_dtype or self.dtype).itemsize

    def encode(self, rows: Tensor) -> Tensor:
        """Return what is sent for rows (n, D)."""
        if self.precision is not None:
            encoded = self.empty(rows.shape[0], rows.shape[1], rows.device)
            grid.encode(rows, (1, self.precision.block), self._parts(encoded, rows.shape[1]))
            return encoded
        if self.wire_dtype is None:
            return rows
        if self.wire_dtype == torch.bfloat16:
            return rows.to(torch.bfloat16)
        values, scales = _quantize(rows)
        return torch.cat([scales.view(torch.uint8), values.view(torch.uint8)], dim=1)

    @staticmethod
    def _parts(encoded: Tensor, width: int) -> grid.Encoded:
        """Return the codes and scales of rows in a precision; the scales come first."""
        num_scales = encoded.shape[1] - width
        return grid.Encoded(encoded[:, num_scales:].view(torch.float8_e4m3fn), encoded[:, :num_scales])

    def rounding_sums(self, rows: Tensor, encoded: Tensor) -> Tensor:
        """Return rounding_sums() of rows (n, D) and what arrives for them."""
        # Piece by piece: wide copies of all rows could be the most memory that a call needs.
        step = max(1, (grid.PIECE if rows.is_cpu else grid.PIECE_OF_GPU) // max(1, rows.shape[1]))
        sums = rows.new_zeros(NUM_ROUNDING_SUMS, dtype=torch.float64)
        for piece, of_piece in zip(rows.split(step), encoded.split(step), strict=True):
            arrived = torch.empty_like(piece)
            self.decode(of_piece, arrived)
            sums += rounding_sums(piece, arrived)
        return sums

    def empty(self, num_rows: int, width: int, device: torch.device) -> Tensor:
        """Return memory for `num_rows` received rows of `width` columns, as they travel."""
        if self.precision is not None or self.wire_dtype == torch.float8_e4m3fn:
            return torch.empty(num_rows, self.row_bytes(width), dtype=torch.uint8, device=device)
        return torch.empty(num_rows, width, dtype=self.wire_dtype or self.dtype, device=device)

    def decode(self, received: Tensor, out: Tensor) -> None:
        """Write the rows that `received` stands for into out (n, D)."""
        if self.precision is not None:
            codes, scales = self._parts(received, out.shape[1])
            grid.decode(codes, scales, (1, self.precision.block), out)
        elif self.wire_dtype == torch.float8_e4m3fn:
            scale_bytes = 4 * num_blocks(out.shape[1])
            scales = received[:, :scale_bytes].clone(memory_format=torch.contiguous_format).view(torch.float32)
            _dequantize(received[:, scale_bytes:].view(torch.float8_e4m3fn), scales, out)
        else:
            out.copy_(received)


class Wires(NamedTuple):
    """How rows travel in each of a layer's exchanges."""

    dispatch: WireFormat
    gradients: WireFormat
    """In the adjoint of combine, whose rows are the gradients of outputs."""
    sums: WireFormat
    """In combine and in the adjoint of dispatch, whose rows are sums of pairs: fp8 is too coarse for these."""

    def row_bytes(self, width: int) -> tuple[int, int, int]:
        """Return the bytes of one row of `width` columns in each."""
        return self.dispatch.row_bytes(width), self.gradients.row_bytes(width), self.sums.row_bytes(width)

    def kept_row_bytes(self, width: int) -> int:
        """Return the bytes of a received row that a backward keeps: as it travels where codes have all of its bits."""
        dispatch = self.dispatch
        return width * dispatch.dtype.itemsize if dispatch.precision is None else dispatch.row_bytes(width)


def choose_wires(dtype: torch.dtype, wire_dtype: torch.dtype | None, precision: ExpertPrecision | None) -> Wires:
    """Return how rows of a layer travel with OverlapConfig.wire_dtype, or where experts have a precision.

    Raises:
        TypeError: wire_dtype can't carry rows of this dtype.
    """
    if precision is not None:
        codes = WireFormat(dtype, None, precision)
        return Wires(codes, codes, WireFormat(dtype))
    sums = WireFormat(dtype, None if wire_dtype == torch.float8_e4m3fn else wire_dtype)
    return Wires(WireFormat(dtype, wire_dtype), sums, sums)


def rounding_sums(rows: Tensor, changed: Tensor) -> Tensor:
    """Return what rounding did to rows (n, D): fp64 (NUM_ROUNDING_SUMS,), sums that add up over chunks.

    The squares of the changes of numbers that stayed finite, those of the numbers, how many numbers became zeros, how
    many became infinite or NaN, and how many numbers there are.
    """
    wide, rounded = rows.to(torch.float32), changed.to(torch.float32)
    change, zeroed = rounded - wide, wide.count_nonzero() - rounded.count_nonzero()
    overflowed = zeroed.new_zeros(())
    squares = [torch.dot(one.flatten(), one.flatten()).double() for one in (change, wide)]
    # Where these are finite, so are all numbers. A GPU is not asked: the host would wait for the answer.
    if not (wide.is_cpu and all(map(torch.isfinite, squares))):
        stayed = rounded.isfinite()
        overflowed = (wide.isfinite() & ~stayed).sum()
        squares = [_square_sum(change.nan_to_num_(0, 0, 0)), _square_sum(wide.where(stayed, 0))]
    return torch.stack([*squares, zeroed, overflowed, zeroed.new_full((), wide.numel())])


def _square_sum(values: Tensor) -> Tensor:
    """Return the sum of the squares of finite fp32 numbers, perhaps past fp32, as fp64; `values` is overwritten."""
    if values.numel() == 0:
        return values.new_zeros((), dtype=torch.float64)
    size = values.abs().amax().clamp(min=torch.finfo(torch.float32).tiny)
    return (torch.linalg.vector_norm(values.div_(size)).double() * size).square()


class DecodedExchange(PendingExchange):
    """An exchange of encoded rows that gives the rows they stand for: they are decoded where they are waited for."""

    def __init__(self, pending: PendingExchange, wire: WireFormat, out: Tensor) -> None:
        self._pending, self._wire, self._out = pending, wire, out
        self._done = False

    def wait(self) -> Tensor:
        received = self._pending.wait()
        if not self._done:
            self._wire.decode(received, self._out)
            self._done = True
        return self._out

    def finished_at(self) -> float | None:
        return self._pending.finished_at()

    def arrivals(self) -> tuple[float | None, ...] | None:
        return self._pending.arrivals()


def num_blocks(width: int) -> int:
    """Return the number of blocks of BLOCK_COLUMNS in a row, the last one perhaps shorter."""
    return -(-width // BLOCK_COLUMNS)


def _quantize(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return e4m3 values (n, D) and scales (n, blocks) fp32."""
    num_rows, width = rows.shape
    padded = torch.nn.functional.pad(rows.to(torch.float32), (0, num_blocks(width) * BLOCK_COLUMNS - width))
    blocks = padded.view(num_rows, num_blocks(width), BLOCK_COLUMNS)
    infinite = blocks.isinf()
    finite = blocks.masked_fill(infinite, 0)
    largest = finite.abs().nan_to_num(nan=0.0).amax(2)
    scales = (largest / LARGEST_FINITE).clamp(min=SMALLEST_SCALE)
    scaled = (finite / scales.unsqueeze(2)).clamp(-LARGEST_FINITE, LARGEST_FINITE)
    scaled = torch.where(infinite, torch.sign(blocks) * INFINITY, scaled)
    return scaled.to(torch.float8_e4m3fn).view(num_rows, num_blocks(width) * BLOCK_COLUMNS)[
        :, :width
    ].contiguous(), scales


def _dequantize(values: Tensor, scales: Tensor, out: Tensor) -> None:
    wide = values.to(torch.float32)
    each = scales.repeat_interleave(BLOCK_COLUMNS, dim=1)[:, : wide.shape[1]]
    result = wide * each
    infinite = wide.abs() == INFINITY
    out.copy_(torch.where(infinite, torch.sign(wide) * torch.inf, result))
