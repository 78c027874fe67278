"""Dropout on what adapters multiply: which columns of a row are left out, by a hash of the row's seed and the column.

No mask outlives its pass: a seed is drawn for every token and travels with its row, so that forward, backward and a
recompute find the same columns, whatever chunk, place or rank the row is in. The scale 1 / (1 - p) is in B.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from tritonmoe.experts.tensors import CallTensors
from tritonmoe.ops.grouping import Grouping

__all__ = ["AdapterDropout", "DroppedRows", "rows_of_pairs", "with_row_seeds"]

CPU_BLOCK_ELEMENTS = 2**16
"""So many columns' hashes stay in cache; on a GPU they take a little memory instead of a few times the rows'."""
GPU_BLOCK_ELEMENTS = 2**24


class DroppedRows(NamedTuple):
    """The rows of a call as the adapter of the up-projection multiplies them."""

    values: Tensor
    """(R, D): the rows, with zeros where dropped."""
    is_dropped: Tensor
    """(R, D) bool."""

    @classmethod
    def like(cls, rows: Tensor) -> "DroppedRows":
        """Return memory for those of `rows`."""
        return cls(torch.empty_like(rows), torch.empty_like(rows, dtype=torch.bool))

    def of_pairs(self, grouping: Grouping) -> Tensor:
        """Return is_dropped (N, D) of each pair's row."""
        return self.is_dropped.index_select(0, rows_of_pairs(grouping))


class AdapterDropout(NamedTuple):
    """Which columns are left out of what the adapters of one call multiply."""

    probability: float
    """p, of each column."""
    row_seeds: Tensor
    """(R,) int32."""

    def drop_rows(self, rows: Tensor, places: slice | Tensor, out: DroppedRows) -> None:
        """Drop columns of the rows (R, D) at these places, for the up-projection: the same for all pairs of a row."""
        is_dropped = _is_dropped(self.row_seeds[places], rows.shape[1], self.probability)
        out.values[places] = rows[places].masked_fill(is_dropped, 0)
        out.is_dropped[places] = is_dropped

    def dropped_of_pairs(self, grouping: Grouping, width: int) -> Tensor:
        """Return which columns of each pair's activation are dropped: (N, width) bool, in storage order."""
        seeds = self.row_seeds.index_select(0, rows_of_pairs(grouping))
        slots = grouping.pair_index % grouping.top_k + 1
        return _is_dropped(_mix(seeds ^ _mix(slots)), width, self.probability)


def with_row_seeds(inputs: CallTensors[Tensor], dropout: float) -> CallTensors[Tensor]:
    """Draw a seed for every token from the generator of its device, unless nothing is dropped, or they are there."""
    if dropout == 0 or inputs.row_seeds is not None:
        return inputs
    x = inputs.x
    seeds = torch.randint(-(2**31), 2**31, x.shape[:1], dtype=torch.int32, device=x.device)
    return inputs._replace(row_seeds=seeds)


def rows_of_pairs(grouping: Grouping) -> Tensor:
    """Return the row (N,) int32 of each pair, and any for padding."""
    return grouping.row_index.clamp(0, grouping.num_layer_rows - 1)


def _is_dropped(seeds: Tensor, width: int, probability: float) -> Tensor:
    """Return (n, width) bool, of rows with these seeds (n,) int32: True with this probability."""
    columns = _mix(torch.arange(1, width + 1, dtype=torch.int32, device=seeds.device))
    threshold = min(round(probability * 2**32) - 2**31, 2**31 - 1)
    elements = CPU_BLOCK_ELEMENTS if seeds.device.type == "cpu" else GPU_BLOCK_ELEMENTS
    is_dropped = torch.empty(seeds.shape[0], width, dtype=torch.bool, device=seeds.device)
    step = max(1, elements // width)
    for part, out in zip(seeds.split(step), is_dropped.split(step), strict=True):
        torch.lt(_mix(part.unsqueeze(1) ^ columns), threshold, out=out)
    return is_dropped


def _mix(bits: Tensor) -> Tensor:
    """Hash each int32, whose products wrap, in place.

    Source: lowbias32 (Wellons, hash-prospector, public domain) but for its last step, which only low bits need: here
    high ones decide.
    """
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B - 2**32)):
        bits ^= (bits >> shift) & (2 ** (32 - shift) - 1)  # a logical shift
        bits *= factor
    return bits
