"""Where the elements of matrices are in the registers of a wavefront, and how lanes exchange them.

The layouts are those of the CDNA 3 and CDNA 4 instruction set manuals: V_MFMA, DS_READ_B64_TR_B16, V_PERMLANE*_SWAP
and the data-parallel primitives (DPP).
"""

from functools import cache

import numpy as np
from numpy.typing import NDArray

__all__ = ["LANES", "accumulator_matrix", "accumulator_registers", "dpp_sources", "operand_matrix", "transposed"]

LANES = 64


def operand_matrix(words: NDArray[np.uint32], element: str, size: int) -> NDArray[np.generic]:
    """Return an operand of V_MFMA as (waves, size, K), K along the second axis for both operands.

    Args:
        words: (registers, waves, 64). element: NumPy's name of the stored type. size: rows of A or columns of B.
    """
    registers, waves, _ = words.shape
    if registers == 8:  # 16 bytes of the first half of K, then 16 of the second
        return np.concatenate([operand_matrix(half, element, size) for half in (words[:4], words[4:])], 2)
    elements = np.ascontiguousarray(words).view(element).reshape(registers, waves, LANES // size, size, -1)
    # A lane holds one row; lanes of the next group hold what follows along K.
    return elements.transpose(1, 3, 2, 0, 4).reshape(waves, size, -1)


def accumulator_registers(matrix: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return (registers, waves, 64) of V_MFMA's result (waves, size, size): four rows a lane, then the next group."""
    waves, size, _ = matrix.shape
    groups = LANES // size
    parts = matrix.reshape(waves, size // 4 // groups, groups, 4, size)
    return parts.transpose(1, 3, 0, 2, 4).reshape(-1, waves, LANES)


def accumulator_matrix(registers: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    """Return the matrix (waves, size, size) that `accumulator_registers` spreads."""
    _, waves, _ = registers.shape
    parts = registers.reshape(-1, 4, waves, LANES // size, size)
    return parts.transpose(2, 0, 3, 1, 4).reshape(waves, size, size)


def transposed(rows: NDArray[np.uint16]) -> NDArray[np.uint16]:
    """Return what DS_READ_B64_TR_B16 leaves in each lane, of the four elements that each read: (waves, 64, 4) both.

    Of 16 lanes, four read a row of 16 elements; each gets a column of the four rows.
    """
    return rows.reshape(-1, 4, 4, 16).transpose(0, 1, 3, 2).reshape(rows.shape)


@cache
def dpp_sources(control: str) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
    """Return for each lane the one that it reads under a DPP control ("row_shr:8"), and whether there is such a one.

    Raises:
        NotImplementedError: for another control than those that occur.
    """
    lane = np.arange(LANES)
    name, _, value = control.partition(":")
    row, place = lane // 16, lane % 16
    everywhere = np.ones(LANES, bool)
    if name == "quad_perm":
        choice = np.array([int(item) for item in value.strip("[]").split(",")])
        return lane // 4 * 4 + choice[lane % 4], everywhere
    if name == "row_shr":
        return lane - int(value) * (place >= int(value)), place >= int(value)
    if name == "row_shl":
        return lane + int(value) * (place + int(value) < 16), place + int(value) < 16
    if name == "row_ror":
        return row * 16 + (place - int(value)) % 16, everywhere
    if name == "row_half_mirror":
        return lane ^ 7, everywhere
    if control == "row_bcast:15":
        return np.maximum(row * 16 - 1, 0), row > 0
    if control == "row_bcast:31":
        return np.full(LANES, 31), lane >= 32
    raise NotImplementedError(control)
