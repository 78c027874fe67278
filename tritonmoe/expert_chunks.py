"""Chunks of experts: which chunk a pair belongs to, when its row travels and returns, and where the row lies meanwhile.

Chunk c has the pairs of a contiguous range of every rank's own experts. A row travels with the first chunk that needs
it and returns with the last, so the receive buffer is stored by (first chunk, rank, token), and the sums that go home,
like the home buffer they come to, by (last chunk, rank, token).

Example: two chunks, on a rank with two experts, of rows 0, 1, 2, 3 by (rank, token) that need its experts {1}, {0},
{0, 1} and {1}: rows 1 and 2 arrive with chunk 0, rows 0 and 3 with chunk 1; the sum of row 1 returns with chunk 0,
those of rows 0, 2 and 3 with chunk 1. So the receive buffer is 1, 2, 0, 3, and the order of return 1, 0, 2, 3.
"""

import torch
from torch import Tensor

from .cpu_memory import to_device
from .overlap_config import OverlapPlan

__all__ = ["first_and_last", "inverse_order", "pair_chunks", "place_rows"]


def pair_chunks(local_ids: Tensor, num_local_experts: int, overlap: OverlapPlan) -> Tensor:
    """Give the chunk (..., K) int64 of each pair from its expert's place on its rank; any number for a skipped pair."""
    starts = torch.tensor(overlap.bounds(num_local_experts)[1:-1], dtype=local_ids.dtype, device="cpu")
    return torch.bucketize(local_ids, to_device(starts, local_ids.device), right=True)


def first_and_last(segments: Tensor, owner: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Give the first and the last segment (T, W) int64 in which each rank needs each token.

    Args:
        segments: (T, K) int64, of every pair. owner: (T, K) int64, the rank of every pair, W for a skipped one.
    Returns:
        Any numbers for a rank that does not need the token.
    """
    none = segments.new_zeros(segments.shape[0], size + 1)
    first = none.scatter_reduce(1, owner, segments, "amin", include_self=False)
    last = none.scatter_reduce(1, owner, segments, "amax", include_self=False)
    return first[:, :size], last[:, :size]


def place_rows(local_ids: Tensor, num_local_experts: int, overlap: OverlapPlan) -> tuple[Tensor, Tensor]:
    """Say where rows that come to this rank lie, both (n,) int64 from zero: when received, and when sent back.

    local_ids: (n, K), rows by (rank, token); others than 0 .. num_local_experts - 1 are not this rank's, every row has
    one that is.
    """
    chunks = pair_chunks(local_ids, num_local_experts, overlap)
    foreign = (local_ids < 0) | (local_ids >= num_local_experts)
    first = chunks.masked_fill(foreign, overlap.num_chunks).amin(1)
    last = chunks.masked_fill(foreign, -1).amax(1)
    received, returned = (inverse_order(torch.sort(chunk, stable=True)[1]) for chunk in (first, last))
    return received, returned


def inverse_order(order: Tensor) -> Tensor:
    """Give the inverse (n,) int64 of a permutation (n,) of integers."""
    order = order.to(torch.int64)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.shape[0], device=order.device)
    return inverse
