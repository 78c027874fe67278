"""Which tiles each program of a product computes: one of them, every num_programs-th, or a run of a few.

Which program computes a tile changes no bit of it: one program sums a tile, always in the same order.
"""

import torch
import triton
import triton.language as tl

from tritonmoe.config.layer import KernelOptions
from tritonmoe.ops.kernels.launch import num_programs
from tritonmoe.ops.kernels.row_tiles import first_tile
from tritonmoe.ops.kernels.tiles.config import TileConfig

__all__ = ["grid_of", "tiles_of_program"]

SHORT_ROUNDS = 5
"""The most rounds that take what the rounds of four tiles leave, fewer than seven tiles for each program: two rounds of
two tiles, and less than three of one."""


def grid_of(
    most_tiles: int, config: TileConfig, options: KernelOptions, device: torch.device
) -> tuple[tuple[int], int]:
    """Return the grid of a product over at most so many tiles, and how many programs the multiprocessors take at once.

    Beside exchanges nobody knows how many multiprocessors are free. A GPU starts a program where another one has ended,
    so where there are more programs than run at once, no tile waits for a multiprocessor that an exchange holds, and an
    exchange of higher priority gets one before all tiles are computed.
    """
    at_once = num_programs(most_tiles, config, options, device)
    beside_exchanges = options.beside_exchanges and options.num_sms is None
    if not (config.persistent and beside_exchanges and at_once < most_tiles):
        return (at_once,), at_once
    rounds_of_four = max(most_tiles - 3 * at_once, 0) // (4 * at_once)
    return (min(most_tiles, (rounds_of_four + SHORT_ROUNDS) * at_once),), at_once


@triton.jit
def tiles_of_program(num_tiles, programs_at_once, WALKS: tl.constexpr):
    """Return the first tile of this program, the tile before which it ends, and the step from tile to tile.

    Where no more programs are launched than run at once, each walks on to the last tile. Otherwise each has a run of
    four tiles, of two or of one. A round of programs_at_once programs takes tiles that are side by side: at first
    rounds of four, as long as each leaves three tiles for every program, then of two, as long as each leaves one. So
    runs that begin last are not what all others wait for at the end.
    """
    first, end, step = first_tile(), num_tiles, tl.num_programs(0)
    if WALKS:
        step = programs_at_once
        if tl.num_programs(0) > programs_at_once:
            in_fours = max(num_tiles - 3 * step, 0) // (4 * step) * (4 * step)
            in_twos = max(num_tiles - in_fours - step, 0) // (2 * step) * (2 * step)
            program = first - in_fours // 4 - in_twos // 2
            length, before = 1, in_fours + in_twos
            if program < 0:
                program += in_twos // 2
                length, before = 2, in_fours
            if program < 0:
                program += in_fours // 4
                length, before = 4, 0
            first = before + program // step * (length * step) + program % step
            end = min(first + length * step, num_tiles)
    return first, end, step
