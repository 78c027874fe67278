"""Where the elements of matrices are: in the registers of a warp, in shared memory, in tensor memory.

The layouts are those of the PTX instruction set's manual: ldmatrix and stmatrix, mma.sync m16n8k16 and m16n8k32,
wgmma and tcgen05, and their descriptors of matrices in shared memory.
"""

from functools import cache, lru_cache

import numpy as np
from numpy.typing import NDArray

from virtual_gpu.shared_memory import Pieces

__all__ = [
    "accumulator_rows_and_columns",
    "descriptor_places",
    "load_matrices",
    "matrix_of",
    "mma_operands",
    "product",
    "product_of_short_sums",
    "store_matrices",
    "swizzled",
]

LANE = np.arange(32)
GROUP, MEMBER = LANE // 4, LANE % 4


def swizzled(places: NDArray[np.intp], width: int) -> NDArray[np.intp]:
    """Exchange 16-byte pieces as a swizzle of `width` bytes (0, 32, 64, 128) does: address bits 4.. xor bits 7.. ."""
    if width == 0:
        return places
    mask = width // 16 - 1
    return places ^ (((places >> 7) & mask) << 4)


def load_matrices(rows: NDArray[np.uint8], num_matrices: int, transposed: bool) -> NDArray[np.uint32]:
    """Return ldmatrix's registers (matrices, threads) of the rows of all warps: (warps * matrices * 8, 16) bytes."""
    matrices = np.ascontiguousarray(rows).view(np.uint16).reshape(-1, num_matrices, 8, 8)
    if transposed:
        matrices = matrices.transpose(0, 1, 3, 2)
    return np.ascontiguousarray(matrices.transpose(1, 0, 2, 3)).reshape(num_matrices, -1).view(np.uint32)


def store_matrices(registers: list[NDArray[np.uint32]], transposed: bool) -> NDArray[np.uint8]:
    """Return the rows (warps * matrices * 8, 16 bytes) that stmatrix writes, from registers of all threads."""
    matrices = np.stack(registers).view(np.uint16).reshape(len(registers), -1, 8, 8).transpose(1, 0, 2, 3)
    if transposed:
        matrices = matrices.transpose(0, 1, 3, 2)
    return np.ascontiguousarray(matrices).view(np.uint8).reshape(-1, 16)


def mma_operands(a: NDArray[np.uint32], b: NDArray[np.uint32]) -> tuple[NDArray[np.uint16], NDArray[np.uint16]]:
    """Return A (warps, 16, 16) and B (warps, 8, 16) of m16n8k16 from registers (warps, 4 or 2, 32): the depth last.

    Of m16n8k32 each entry has two elements of 8 bits.
    """
    warps = len(a)
    left = np.empty((warps, 16, 16), np.uint16)
    for register in range(4):
        pair = np.ascontiguousarray(a[:, register]).view(np.uint16).reshape(warps, 32, 2)
        for half in range(2):
            left[:, GROUP + 8 * (register % 2), 2 * MEMBER + half + 8 * (register // 2)] = pair[:, :, half]
    right = np.empty((warps, 8, 16), np.uint16)
    for register in range(2):
        pair = np.ascontiguousarray(b[:, register]).view(np.uint16).reshape(warps, 32, 2)
        for half in range(2):
            right[:, GROUP, 2 * MEMBER + half + 8 * register] = pair[:, :, half]
    return left, right


def product(left: NDArray[np.float32], right: NDArray[np.float32]) -> NDArray[np.float32]:
    """Multiply float32 matrices, rounding each sum once: no element depends on where in the matrix it is.

    Sums of float32 in a library for CPUs may be in another order for other rows.
    """
    return (left.astype(np.float64) @ right.astype(np.float64)).astype(np.float32)


def product_of_short_sums(
    left: NDArray[np.float32], right: NDArray[np.float32], sums: NDArray[np.float32], bits: int
) -> NDArray[np.float32]:
    """Return left (..., m, K) @ right (..., K, n) + sums, whose terms are cut to `bits` bits of the largest of them."""
    products = left[..., :, None, :].astype(np.float64) * right.swapaxes(-1, -2)[..., None, :, :]
    terms = np.concatenate([sums[..., None].astype(np.float64), products], -1)
    unit = np.ldexp(1.0, np.frexp(abs(terms).max(-1, keepdims=True))[1] - bits)
    return (np.trunc(terms / unit) * unit).sum(-1).astype(np.float32)


@cache
def accumulator_rows_and_columns(num_registers: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return the row of 16 and the column of each accumulator (num_registers, 32), of mma.sync and a warp's wgmma."""
    register = np.arange(num_registers)[:, None]
    return GROUP + register % 4 // 2 * 8, register // 4 * 8 + 2 * MEMBER + register % 2


@lru_cache(4096)
def descriptor_places(
    descriptor: int, outer: int, depth_contiguous: bool, *, tcgen05: bool, element_bytes: int = 2
) -> Pieces:
    """Return the pieces of shared memory, 16 bytes each, that a matrix of 32 bytes of depth is made of.

    Args:
        descriptor: of wgmma or tcgen05. outer: rows of A or columns of B.
        depth_contiguous: whether elements of one row follow each other (K-major): the pieces (outer, 2); or those of
            one column (MN-major): the pieces (depth, outer * element_bytes / 16).
    """
    start = (descriptor & 0x3FFF) << 4
    leading = ((descriptor >> 16) & 0x3FFF) << 4
    stride = ((descriptor >> 32) & 0x3FFF) << 4
    code = (descriptor >> 61) & 7 if tcgen05 else (descriptor >> 62) & 3
    width = ({0: 0, 2: 128, 4: 64, 6: 32} if tcgen05 else {0: 0, 1: 128, 2: 64, 3: 32})[code]
    if (descriptor >> 49) & 7:
        raise NotImplementedError("matrix descriptors with a base offset")
    if depth_contiguous:  # i and k are bytes along the axis of a piece
        i, k = np.arange(outer)[:, None], np.array([[0, 16]])
    else:
        i, k = np.arange(0, outer * element_bytes, 16)[None, :], np.arange(32 // element_bytes)[:, None]
    if width == 0 and depth_contiguous:  # core matrices of 8 rows of 16 bytes each
        places = i // 8 * stride + k // 16 * leading + i % 8 * 16
    elif width == 0:
        places = i // 16 * stride + k // 8 * leading + k % 8 * 16
    elif depth_contiguous:
        places = i // 8 * stride + i % 8 * width + k
    else:
        places = i // width * leading + i % width + k // 8 * stride + k % 8 * width
    return Pieces(swizzled(start + places, width).reshape(-1) // 16, 16)


def matrix_of(
    read: NDArray[np.uint8], outer: int, depth_contiguous: bool, element_bytes: int = 2
) -> NDArray[np.unsignedinteger]:
    """Return a matrix (outer, depth) from the bytes of the pieces that `descriptor_places` gives."""
    elements = read.reshape(-1).view(f"u{element_bytes}")
    return elements.reshape(outer, -1) if depth_contiguous else elements.reshape(-1, outer).T
