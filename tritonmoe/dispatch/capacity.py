"""Capacity: segments of a size that every rank knows beforehand, so that rows leave before a count reaches the host.

With OverlapPlan.capacity the rows and pairs of each (segment, rank) have a fixed room: what routing to experts drawn
uniformly would need on average, times the capacity. Rows that are there fill it from its start, the rest is padding:
copies of token 0 whose ids are -1, for which experts compute nothing and which nobody reads. A segment that doesn't fit
travels as padding alone, and the call has *overflowed*: its ranks hear of it once the last combine is enqueued, and run
the call again without a capacity. The room for a rank doesn't depend on how tokens are cut into chunks.

Example: W=2, E=4, K=2, one chunk of 100 tokens: a token needs the other rank unless both of its experts are among the
2 of 4 here, 1 - 2/4 * 1/3 of the time. Capacity 1.1 gives ceil(1.1 * 100 * 5/6) = 92 rows and ceil(1.1 * 100 * 2/2) =
110 pairs; two equal chunks have room for 46 rows and 55 pairs each.

In a CUDA graph nothing can be read and nothing run again: there a call that has overflowed gives NaN, and the next call
that is not captured raises CapacityOverflow.
"""

import math
from collections.abc import Iterable, Sequence
from fractions import Fraction
from itertools import pairwise

import torch
from torch import Tensor

from tritonmoe.config.overlap import OverlapPlan
from tritonmoe.dispatch.call_settings import in_millionths
from tritonmoe.dispatch.count_exchange import exchange_counts
from tritonmoe.dispatch.header import CallHeader
from tritonmoe.dispatch.send_plan import (
    RowOrder,
    TokenPlan,
    compact_columns,
    count_rows,
    owners_of_pairs,
    row_segments,
)
from tritonmoe.runtime.cpu_memory import to_device
from tritonmoe.runtime.host_device import HostCopy
from tritonmoe.transports import PendingExchange, Transport

__all__ = [
    "plan_capped_tokens",
    "poison",
    "post_flag",
    "replay_overflowed",
    "segment_room",
    "some_rank_overflowed",
    "watched",
]


def segment_room(
    num_tokens: int, num_experts: int, top_k: int, rank: int, size: int, overlap: OverlapPlan
) -> tuple[list[list[int]], list[list[int]]]:
    """Return the rows, and the pairs, [segment][rank] that the capacity provides for num_tokens tokens of this rank."""
    assert overlap.capacity is not None
    capacity, own = Fraction(in_millionths(overlap.capacity), 10**6), num_experts // size  # no rounding before ceil
    misses = math.prod(Fraction(max(0, num_experts - own - j), num_experts - j) for j in range(min(top_k, num_experts)))
    room = min(num_tokens, math.ceil(capacity * num_tokens * (1 - misses)))
    pairs_room = min(room * top_k, max(room, math.ceil(capacity * num_tokens * top_k / size)))
    rows: list[list[int]] = []
    pairs: list[list[int]] = []

    def cut(token_bounds: Sequence[int], ranks: list[int]) -> None:
        """Return every segment its share of the room, with at least one pair and at most top_k pairs per row."""
        reached = [room * bound // max(1, num_tokens) for bound in token_bounds]
        beyond_one = [(pairs_room - room) * row // max(1, room) for row in reached]
        for (first, last), (first_pair, last_pair) in zip(pairwise(reached), pairwise(beyond_one), strict=True):
            here = last - first
            rows.append([here if k in ranks else 0 for k in range(size)])
            pairs.append([here + last_pair - first_pair if k in ranks else 0 for k in range(size)])

    others = list(range(size))
    if overlap.local_first:
        cut((0, overlap.local_bound(num_tokens), num_tokens), [rank])
        others.remove(rank)
    cut(overlap.bounds(num_tokens), others)
    return rows, pairs


def plan_capped_tokens(
    topk_ids: Tensor, num_experts: int, rank: int, size: int, overlap: OverlapPlan
) -> tuple[TokenPlan, Tensor]:
    """Return the plan of this rank's ids (T, K) by the capacity's room instead of counts, without a host read.

    Its rows and pairs are the room, padding included. The second result is (), bool, on the device: whether something
    doesn't fit.
    """
    num_tokens, top_k = topk_ids.shape
    device = topk_ids.device
    rows, pairs = segment_room(num_tokens, num_experts, top_k, rank, size, overlap)
    room_on_host = torch.tensor([rows, pairs], device="cpu")  # (2, segments, W)
    num_home = int(room_on_host[0].sum())
    room = to_device(room_on_host, device)
    room_rows = room[0].flatten()
    starts = torch.cat([room_rows.new_zeros(1), room_rows.cumsum(0)])  # by key; of rows that don't travel: the end

    segments = row_segments(overlap.bounds(num_tokens), rank, size, overlap, device)
    row_keys, counts = count_rows(owners_of_pairs(topk_ids, num_experts, size), segments, overlap.num_segments)
    fits = (counts <= room).all(0)  # (segments, W)
    # A row's place is its segment's start and how many rows of the segment come before it.
    sorted_keys, order = torch.sort(row_keys, stable=True)
    filled = torch.cat([counts.new_zeros(1), counts[0].flatten().cumsum(0)])
    places = starts[sorted_keys] + torch.arange(len(order), device=device) - filled[sorted_keys]
    stays = ~torch.cat([fits.flatten(), fits.new_zeros(1)])[sorted_keys]
    home_index = torch.empty_like(row_keys, dtype=torch.int32)
    home_index[order] = places.masked_fill(stays, -1).to(torch.int32)
    places = places.masked_fill(stays, num_home)  # what doesn't travel goes behind the end
    home_tokens = torch.zeros(num_home + 1, dtype=torch.int32, device=device)
    home_tokens[places] = torch.div(order, size, rounding_mode="floor").to(torch.int32)

    found = home_tokens[:num_home], compact_columns(home_index.view(-1, size), top_k)
    tokens = TokenPlan(
        token_bounds=overlap.bounds(num_tokens),
        order=RowOrder(lambda: found),
        rows=rows,
        pairs=pairs,
        return_rows=rows,
        has_padding=True,
    )
    return tokens, ~fits.all()


def some_rank_overflowed(transport: Transport, header: CallHeader, num_segments: int, flags: HostCopy) -> bool:
    """Return whether rows of any rank didn't fit; called by every rank, behind its last combine.

    It raises what exchange_plan raises, NonFiniteScores included, which with a capacity is known no earlier.

    Args:
        flags: whether something of this rank didn't fit, and how many of its tokens have scores that are not finite.
    """
    overflows, nonfinite_rows = transport.wait_for_copy(flags)
    header = header._replace(nonfinite_rows=int(nonfinite_rows), overflowed=int(overflows))
    no_counts = torch.zeros(3, num_segments, transport.size, dtype=torch.int64, device="cpu")
    headers, *_ = exchange_counts(transport, header, no_counts, where="after the last chunk")
    return any(h.overflowed for h in headers)


def post_flag(transport: Transport, is_wrong: Tensor) -> PendingExchange:
    """Send every rank this rank's flag (), bool, on the device; (W,) int64 arrive."""
    ones = [1] * transport.size
    return transport.exchange(is_wrong.to(torch.int64).repeat(transport.size), ones, ones)


def poison(values: Iterable[Tensor | None], is_wrong: Tensor) -> None:
    """Multiply tensors by NaN where the flag (1,) is true."""
    factor = torch.ones(1, device=is_wrong.device).masked_fill(is_wrong, torch.nan)
    for value in values:
        if value is not None:
            value.mul_(factor.to(value.dtype))


def watched(is_wrong: Tensor) -> Tensor:
    """Return a flag on the host that every replay of the graph writes; False until the first one.

    Pinned memory that the graph doesn't own: a tensor on the device would hold anything before the first replay.
    """
    on_host = torch.zeros(1, dtype=torch.bool, pin_memory=is_wrong.is_cuda, device="cpu")
    on_host.copy_(is_wrong, non_blocking=True)
    return on_host


def replay_overflowed(transport: Transport, flags: Sequence[Tensor], device: torch.device) -> bool:
    """Return, once, whether a replay that is enqueued on the current stream before has set one of its flags.

    It waits for that stream.
    """
    if device.type == "cuda":
        transport.wait_for_copy(HostCopy(torch.zeros((), dtype=torch.int64, device=device)))
    is_set = any(bool(flag) for flag in flags)
    for flag in flags:
        flag.zero_()
    return is_set
