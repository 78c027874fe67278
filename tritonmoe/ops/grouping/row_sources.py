"""RowSources: which rank sent which received rows, by which pairs are put into an order that no chunk changes."""

from dataclasses import dataclass

import torch

from tritonmoe.runtime.cpu_memory import to_device

__all__ = ["RowSources"]


@dataclass(frozen=True)
class RowSources:
    """Which rank sent which received rows, as the host knows it: a chunk's rows come in runs, one rank's each.

    Example:
        ranks (0, 1) and rows [[2, 1], [1, 1]]: chunk 0 has two rows of rank 0, then one of rank 1; chunk 1 has one of
        each.
    """

    ranks: tuple[int, ...]
    """The rank that sent each run, the same in every chunk; for rows by (source rank, token) they ascend."""
    rows: torch.Tensor
    """(C, runs) int64 on the CPU."""

    def of_rows(self, device: torch.device) -> torch.Tensor:
        """Return the rank (R,) int64 that sent each row, without waiting for the device."""
        ranks = torch.tensor(self.ranks, dtype=torch.int64, device="cpu").repeat(len(self.rows))
        ranks, counts = to_device(torch.stack([ranks, self.rows.flatten()]), device)
        return ranks.repeat_interleave(counts, output_size=int(self.rows.sum()))
