"""Tiles of an expert's rows read by TMA, zero behind its last row, or stored by TMA, up to its last row.

What lies behind that row is another expert's, or NaN. TMA gives zeros outside a tensor and stores nothing there, and a
descriptor says once for all experts where a tensor ends. So the rows have an end of their own, BOUND, and two more axes
lead from there to any address: addresses wrap around 2^64. It is the way of `triton.tools.ragged_tma`.

Worked example with a BOUND of 8: an expert's rows are 5 and 6. A box of four rows begins at row 8 - (7 - 5) = 6 of the
third axis, whose rows 6 and 7 are inside and 8 and 9 outside; the first two axes put row 0 of the third at -8 + 7 = -1.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from tritonmoe.ops.kernels.tiles import tma

__all__ = ["describe", "load", "refusal", "store"]

BOUND = 2**30
LAST = 2**31 - 2**16
"""More than any coordinate, and an int32."""


def refusal(values: Tensor) -> str:
    """Return why TMA can't read or store tiles of the rows of `values` (N, width); empty where it can."""
    if len(values) > BOUND:
        return f"{len(values)} rows are more than 2^30"
    return tma.refusal(values)


def describe(values: Tensor, block_rows: int, block_columns: int) -> TensorDescriptor:
    """Return the descriptor of values (N, width) for `load` and `store`; `refusal` has nothing against them."""
    stride = values.stride(0)
    # BOUND * 2^34 elements are a multiple of 2^64 bytes: one step along the first axis is BOUND rows back.
    return tma.describe(
        values,
        (1, 1, block_rows, block_columns),
        (LAST, LAST, BOUND, values.shape[1]),
        (2**34 - stride, stride, stride, 1),
    )


@triton.jit
def load(
    values,  # the descriptor of (N, width)
    start,
    end,
    first_column,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Return (BLOCK_ROWS, BLOCK_COLUMNS) from row `start` on, zero from row `end` on."""
    bound = 2**30  # BOUND; the interpreter takes no tl.constexpr among coordinates
    tile = values.load([bound, end, bound - (end - start), first_column])
    return tl.reshape(tile, (BLOCK_ROWS, BLOCK_COLUMNS))


@triton.jit
def store(
    tile,  # (BLOCK_ROWS, BLOCK_COLUMNS), of the dtype of values
    values,  # the descriptor of (N, width)
    start,
    end,
    first_column,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Store the rows of a tile from row `start` on, none from row `end` on."""
    bound = 2**30  # BOUND
    box = tl.reshape(tile, (1, 1, BLOCK_ROWS, BLOCK_COLUMNS))
    values.store([bound, end, bound - (end - start), first_column], box)
