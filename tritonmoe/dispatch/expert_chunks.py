"""Chunks of experts: which chunk a pair belongs to, when its row travels and returns, and where the row lies meanwhile.

Chunk c has the pairs of a contiguous range of every rank's own experts. A row travels with the first chunk that needs
it and returns with the last, so the receive buffer is stored by (first chunk, rank, token), and the sums that go home,
like the home buffer they come to, by (last chunk, rank, token).

Example: two chunks, on a rank with two experts, of rows 0, 1, 2, 3 by (rank, token) that need its experts {1}, {0},
{0, 1} and {1}: rows 1 and 2 arrive with chunk 0, rows 0 and 3 with chunk 1; the sum of row 1 returns with chunk 0,
those of rows 0, 2 and 3 with chunk 1. So the receive buffer is 1, 2, 0, 3, and the order of return 1, 0, 2, 3.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from tritonmoe.config.overlap import OverlapPlan
from tritonmoe.runtime.cpu_memory import to_device

__all__ = ["RowPlaces", "first_and_last", "pair_chunks", "place_rows"]


class RowPlaces(NamedTuple):
    """Where rows that came by (rank, token) lie, both (n,) int64."""

    received: Tensor
    """Their places in the receive buffer."""
    returned: Tensor
    """The places of their sums among those that go home."""


def pair_chunks(local_ids: Tensor, num_local_experts: int, overlap: OverlapPlan) -> Tensor:
    """Return each pair's chunk (..., K) int64 from its expert's place on its rank; any number for a skipped pair."""
    starts = torch.tensor(overlap.bounds(num_local_experts)[1:-1], dtype=local_ids.dtype, device="cpu")
    return torch.bucketize(local_ids, to_device(starts, local_ids.device), right=True)


def first_and_last(segments: Tensor, owner: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return the first and the last segment (T, W) int64 in which each rank needs each token.

    Args:
        segments: (T, K) int64, of every pair. owner: (T, K) int64, the rank of every pair, W for a skipped one.
    Returns:
        Any numbers for a rank that does not need the token.
    """
    none = segments.new_zeros(segments.shape[0], size + 1)
    first = none.scatter_reduce(1, owner, segments, "amin", include_self=False)
    last = none.scatter_reduce(1, owner, segments, "amax", include_self=False)
    return first[:, :size], last[:, :size]


def place_rows(local_ids: Tensor, num_local_experts: int, overlap: OverlapPlan) -> RowPlaces:
    """Return where rows that come to this rank lie, counted from zero.

    local_ids: (n, K), rows by (rank, token). Ids outside 0 .. num_local_experts - 1 are experts of other ranks; every
        row has at least one id inside.
    """
    chunks = pair_chunks(local_ids, num_local_experts, overlap)
    if local_ids.shape[1] == 1:  # every row has one chunk
        places = _places(chunks[:, 0])
        return RowPlaces(places, places)
    foreign = (local_ids < 0) | (local_ids >= num_local_experts)
    first = chunks.masked_fill(foreign, overlap.num_chunks).amin(1)
    last = chunks.masked_fill(foreign, -1).amax(1)
    return RowPlaces(_places(first), _places(last))


def _places(chunks: Tensor) -> Tensor:
    """Return the place (n,) int64 of each row once they are sorted by their chunks (n,)."""
    order = torch.sort(chunks, stable=True)[1]
    places = torch.empty_like(order)
    places[order] = torch.arange(order.shape[0], device=order.device)
    return places
