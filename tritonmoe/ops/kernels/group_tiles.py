"""The tiles of pairs that the programs of `group` count and place, and the table of them where rows come in chunks."""

import torch
from torch import Tensor

from tritonmoe.ops.grouping import RowSources
from tritonmoe.ops.kernels.launch import INTERPRETED, cdiv
from tritonmoe.runtime.cpu_memory import to_device

__all__ = ["PAIRS_PER_TILE", "TileTable"]

PAIRS_PER_TILE = 256 if INTERPRETED else 512


class TileTable:
    """The tiles of flat pairs that programs count and place, and (several chunks) the table of them on the device."""

    def __init__(self, num_pairs: int) -> None:
        self.num_pairs = num_pairs
        self.num_tiles = cdiv(num_pairs, PAIRS_PER_TILE)
        self.num_scans = 1
        self.on_device: Tensor | None = None

    @classmethod
    def of_chunks(
        cls, row_sources: RowSources, pair_offsets: tuple[int, ...], top_k: int, device: torch.device
    ) -> "TileTable":
        """Cut each run of rows into tiles; group_steps.py says what the table holds."""
        counts = row_sources.rows.flatten() * top_k  # of each run, by (chunk, run)
        ends = counts.cumsum(0)
        tiles_of_runs = (counts + PAIRS_PER_TILE - 1) // PAIRS_PER_TILE
        runs = torch.arange(len(counts)).repeat_interleave(tiles_of_runs)
        tiles = torch.arange(len(runs))
        place_in_run = tiles - (tiles_of_runs.cumsum(0) - tiles_of_runs)[runs]
        chunks, runs_of_chunk = runs // len(row_sources.ranks), runs % len(row_sources.ranks)
        by_source = torch.sort(torch.tensor(row_sources.ranks)[runs_of_chunk], stable=True)[1]
        num_chunks = len(row_sources.rows)
        chunk_begins = torch.searchsorted(chunks, torch.arange(num_chunks))
        table = torch.cat(
            [
                (ends - counts)[runs] + place_in_run * PAIRS_PER_TILE,
                ends[runs],
                torch.tensor(pair_offsets)[chunks],
                tiles,
                by_source,
                chunk_begins,
                torch.tensor([len(runs), 2 * len(runs)]),
            ]
        ).to(torch.int32)
        self = cls(int(ends[-1]))
        self.num_tiles, self.num_scans = len(runs), num_chunks + 1
        self.on_device = to_device(table, device)
        return self
