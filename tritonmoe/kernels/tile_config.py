"""What a tile configuration is: chosen in tile_choice.py, or measured and kept in measured_tiles.py."""

import dataclasses
from dataclasses import dataclass

import triton

from . import tma

__all__ = ["TileConfig"]


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
    """Whether there are only as many programs as free multiprocessors, which load their next tile while they store one.
    Only where TMA reads all operands that it may, and it is known how many multiprocessors are free."""
    tma: bool = False
    """Whether operands that allow it are read by TMA."""
    gather: str = ""
    """How `up` gets the rows of x: through "pointers", by "tma", which gathers them (Blackwell), or by TMA as boxes of
    a "copy" in storage order. Empty for the other operations."""
    reads: tuple[tuple[str, str], ...] = ()
    """(operand, how its tiles are read): see `tma.reads`. Rows that are gathered are here where TMA was asked for."""

    def by_tma(self, operand: str) -> bool:
        """Say whether tiles of `operand` are read by TMA."""
        return (operand, tma.BY_TMA) in self.reads

    def __str__(self) -> str:
        fields = [
            f"{name}={value}" for name, value in dataclasses.asdict(self).items() if name != "reads" and value != ""
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
