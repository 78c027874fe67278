"""What a tile configuration is. tile_choice.py chooses one from table.py; measured_tiles.py keeps measured ones."""

import dataclasses
import functools
from dataclasses import dataclass
from typing import TypeGuard

import triton

from tritonmoe.config.numbers import is_integer
from tritonmoe.ops.kernels.gpus import ARCHITECTURES
from tritonmoe.ops.kernels.tiles import tma

__all__ = ["GATHERS", "TileConfig", "refusal"]

GATHERS = ("pointers", "tma", "copy")
"""How `up` gets rows through an index: see `TileConfig`."""

MAX_BLOCK = 1024
"""The longest side of a tile. Triton's own limit is on a tile's elements."""
MAX_PROGRAMS = 4
"""The most persistent programs that share a multiprocessor: tiles of more would be too small to multiply."""
SHARED_ELEMENTS = ARCHITECTURES["sm_90"].shared_bytes_per_program // 2
"""Elements of two bytes for which a multiprocessor of Hopper and Blackwell has shared memory."""
MAX_COUNT = 1024
"""The most stages, and the most row tiles side by side: a file that says more is damaged."""


def _is_power_of_two(value: object) -> TypeGuard[int]:
    return is_integer(value) and value > 0 and value & (value - 1) == 0


def refusal(name: str, value: object) -> str:
    """Return why field `name` of a TileConfig can't be `value`; empty where it can."""
    if name in ("block_m", "block_n", "block_k"):
        fits = _is_power_of_two(value) and 16 <= value <= MAX_BLOCK
        rule = f"a power of two from 16 on, up to {MAX_BLOCK}: Triton has no other tiles"
    elif name == "num_warps":
        fits, rule = _is_power_of_two(value) and value <= 32, "a power of two up to 32"
    elif name == "subtiles":
        fits, rule = is_integer(value) and value in (1, 2, 4, 8), "1, 2, 4 or 8"
    elif name == "gather":
        fits, rule = value in GATHERS, f"one of {', '.join(GATHERS)}"
    elif name in ("persistent", "tma"):
        fits, rule = isinstance(value, bool), "false or true"
    elif name == "programs_per_multiprocessor":
        fits, rule = is_integer(value) and 1 <= value <= MAX_PROGRAMS, f"an integer from 1 to {MAX_PROGRAMS}"
    elif name in ("num_stages", "group_m"):
        fits = is_integer(value) and 1 <= value <= MAX_COUNT
        rule = f"an integer from 1 on, up to {MAX_COUNT}"
    else:
        return f"a tile configuration has no field {name!r}"
    return "" if fits else f"{name} must be {rule}, got {value!r}"


_CHECKED = (
    *("block_m", "block_n", "block_k", "num_warps", "num_stages", "group_m", "subtiles"),
    *("gather", "programs_per_multiprocessor"),
)


@functools.lru_cache(None, typed=True)  # 1.0 is no 1
def _check(*values: int | str) -> None:
    """Raise ValueError for the first field of _CHECKED that can't be; cached, as every product of every step asks."""
    for name, value in zip(_CHECKED, values, strict=True):
        if refused := refusal(name, value):
            raise ValueError(f"A tile configuration's {refused}")


@dataclass(frozen=True)
class TileConfig:
    """One program's tile: block_m pairs by block_n columns, in steps of block_k, and how it is compiled."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int = 8
    """Row tiles that run side by side over all column tiles, so that their weights stay in L2."""
    subtiles: int = 1
    """Pieces in which the epilogue handles the columns: fewer live registers."""
    persistent: bool = False
    """Whether programs walk over several tiles, and load their next tile while they store one.
    programs_per_multiprocessor of them on each multiprocessor walk over all tiles; beside exchanges each has a run of a
    few. Only where TMA reads all operands that it may."""
    tma: bool = False
    """Whether operands that allow it are read by TMA."""
    gather: str = ""
    """How `up` gets the rows of x: through "pointers", by "tma", which gathers them (Blackwell), or by TMA as boxes of
    a "copy" in storage order. Empty for the other operations."""
    programs_per_multiprocessor: int = 1
    """With two, one multiplies while the other stores; both need room in registers and shared memory."""
    reads: tuple[tuple[str, str], ...] = ()
    """(operand, how its tiles are read): see `tma.reads`. Rows that are gathered are here where TMA was asked for, the
    result "out" where TMA stores it."""

    def __post_init__(self) -> None:
        gather = self.gather or GATHERS[0]
        _check(
            self.block_m,
            self.block_n,
            self.block_k,
            self.num_warps,
            self.num_stages,
            self.group_m,
            self.subtiles,
            gather,
            self.programs_per_multiprocessor,
        )

    def by_tma(self, operand: str) -> bool:
        """Return whether tiles of `operand` are read by TMA, or those of "out" stored."""
        return (operand, tma.BY_TMA) in self.reads

    @property
    def pieces_stored_by_tma(self) -> int:
        """In how many pieces TMA stores a tile in half precision: one, if no fewer programs fit so."""
        buffers = self.num_stages * (self.block_m + self.block_n) * self.block_k
        whole = buffers + self.block_m * self.block_n
        return 1 if SHARED_ELEMENTS // whole >= max(1, SHARED_ELEMENTS // buffers) else self.subtiles

    def __str__(self) -> str:
        fields = [
            f"{name}={value}"
            for name, value in dataclasses.asdict(self).items()
            if name != "reads" and (name, value) not in (("gather", ""), ("programs_per_multiprocessor", 1))
        ]
        return " ".join(fields) + "".join(f"; {operand} by {way}" for operand, way in self.reads)

    def clipped(self, width: int, depth: int) -> "TileConfig":
        """Shrink the tile to a product with `width` columns summed over `depth`."""
        block_n = min(self.block_n, max(16, triton.next_power_of_2(width)))
        return dataclasses.replace(
            self,
            block_n=block_n,
            block_k=min(self.block_k, max(16, triton.next_power_of_2(depth))),
            subtiles=max(1, min(self.subtiles, block_n // 16)),
        )
