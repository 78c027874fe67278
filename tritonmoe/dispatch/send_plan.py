"""The sender's half of a plan, from ids alone: which tokens go to which rank, in which chunk (S_ik).

S_ik is the set of tokens of rank i that need any expert of rank k: a token that needs three experts of one rank
travels there once. The *home* buffer has a row for each (token, rank that needs it) of this rank. It is stored by
(segment, rank, token): with local_first, segments 0 and 1 hold the rows that never leave this rank (those that run
first, and the rest) and segment c + 2 the rows of chunk c; otherwise segment c is chunk c and this rank's own rows
travel in the chunks like all others. A chunk is a range of tokens, or of every rank's experts: then rows return in
other segments than they travelled in, and are stored at home in the order of return (dispatch/expert_chunks.py).

Example: W=2, E=4 (rank 0 owns experts 0 and 1), on rank 0 two tokens with topk_ids [[0, 1], [1, 3]], one chunk,
local_first, half of the local rows first: token 0 needs rank 0, token 1 needs both. Home rows are token 0 (local,
first), token 1 (local, last), then token 1 (to rank 1); home_index is [[0, -1], [1, 2]].
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from tritonmoe.config.overlap import OverlapPlan
from tritonmoe.dispatch.expert_chunks import first_and_last, pair_chunks
from tritonmoe.ops.grouping import RowSources
from tritonmoe.runtime.cpu_memory import to_device
from tritonmoe.runtime.host_device import HostCopy

__all__ = [
    "RowOrder",
    "TokenPlan",
    "compact_columns",
    "count_rows",
    "order_rows",
    "owners_of_pairs",
    "plan_tokens",
    "row_segments",
]


class RowOrder:
    """In what order the home rows lie: found while the counts travel, or never where copies of experts change it."""

    _found: tuple[Tensor, Tensor] | None = None

    def __init__(self, order: Callable[[], tuple[Tensor, Tensor]]) -> None:
        self._order = order

    def find(self) -> tuple[Tensor, Tensor]:
        """Return home_tokens and home_index of a TokenPlan, which the first call finds."""
        if self._found is None:
            self._found = self._order()
            del self._order  # with the keys that it holds, which would live until the backward
        return self._found


@dataclass(frozen=True)
class TokenPlan:
    """The sender's half of a plan, known without any exchange."""

    token_bounds: tuple[int, ...]
    """(C+1): this rank's tokens token_bounds[c] .. token_bounds[c+1] can be reduced once chunk c has been combined."""
    order: RowOrder
    rows: list[list[int]]
    """[segment][rank] home rows that are sent."""
    pairs: list[list[int]]
    """[segment][rank] routed pairs that are computed."""
    return_rows: list[list[int]]
    """[segment][rank] home rows that return; with chunks of tokens the same as `rows`."""
    nonfinite_rows: int = 0
    """How many tokens have router scores that are not finite."""
    has_padding: bool = False
    """Whether some home rows are padding, which belongs to no token; only with a capacity."""
    copy_pairs: list[list[int]] | None = None
    """[segment][rank] those of `pairs` that the rank's copies of experts compute; None without copies."""

    @cached_property
    def home_tokens(self) -> Tensor:
        """(S,) int32: the token of each home row, as they are sent."""
        return self.order.find()[0]

    @cached_property
    def home_index(self) -> Tensor:
        """(T, min(W, K)) int32: the home rows of each token, as they return, in the order of ranks; -1 for no row."""
        return self.order.find()[1]

    @property
    def home_ranks(self) -> Tensor:
        """(S,) int64: the rank of each home row, as they are sent."""
        rows = torch.tensor(self.rows, dtype=torch.int64, device="cpu")
        return RowSources(tuple(range(rows.shape[1])), rows).of_rows(self.home_tokens.device)

    def padding(self) -> Tensor:
        """(S,) bool: which home rows are padding. Only for chunks of tokens, whose rows return in their order."""
        rows = torch.ones(1 + self.home_tokens.shape[0], dtype=torch.bool, device=self.home_tokens.device)
        return rows.index_fill_(0, (self.home_index.flatten() + 1).to(torch.int64), False)[1:]


def plan_tokens(
    topk_ids: Tensor,
    num_experts: int,
    rank: int,
    size: int,
    overlap: OverlapPlan,
    num_nonfinite_rows: Tensor | None = None,
    read: Callable[[HostCopy], list[Tensor]] = HostCopy.wait,
    num_copies: int = 0,
) -> TokenPlan:
    """Decide which token goes where and when, from this rank's ids (T, K) alone.

    Rank k owns the experts k * E / W .. (k + 1) * E / W. The one host read of a layer call before its count exchange is
    here, by `read` (Transport.wait_for_copy): of the counts, and of num_nonfinite_rows, a scalar, with them.

    num_copies: the last so many of each rank's experts are copies, whose pairs are counted for themselves too.
    """
    owner = owners_of_pairs(topk_ids, num_experts, size)
    if num_nonfinite_rows is None:
        num_nonfinite_rows = owner.new_zeros(())
    if overlap.chunk_by == "experts":
        return _plan_by_experts(topk_ids, owner, num_experts // size, rank, size, overlap, num_nonfinite_rows, read)
    bounds = overlap.bounds(topk_ids.shape[0])
    segments = row_segments(bounds, rank, size, overlap, topk_ids.device)
    is_copy = None
    if num_copies:
        num_slots = num_experts // size
        is_copy = (owner < size) & (topk_ids % num_slots >= num_slots - num_copies)
    row_keys, counts = count_rows(owner, segments, overlap.num_segments, is_copy)
    counts, nonfinite_rows = read(HostCopy(counts, num_nonfinite_rows))
    rows, pairs, *copy_pairs = counts.tolist()
    order = RowOrder(partial(order_rows, row_keys, size, topk_ids.shape[1], rows))
    return TokenPlan(
        bounds, order, rows, pairs, rows, int(nonfinite_rows), copy_pairs=copy_pairs[0] if copy_pairs else None
    )


def _plan_by_experts(
    topk_ids: Tensor,
    owner: Tensor,
    num_local_experts: int,
    rank: int,
    size: int,
    overlap: OverlapPlan,
    num_nonfinite_rows: Tensor,
    read: Callable[[HostCopy], list[Tensor]],
) -> TokenPlan:
    """Return the plan of plan_tokens() where a chunk is a range of every rank's own experts."""
    num_tokens, num_segments = topk_ids.shape[0], overlap.num_segments
    segments = pair_chunks(topk_ids % num_local_experts, num_local_experts, overlap) + overlap.num_local_slices
    if overlap.local_first:
        segments = torch.where(owner == rank, _local_slices(num_tokens, overlap, topk_ids.device)[:, None], segments)
    first, last = first_and_last(segments, owner, size)
    row_keys, counts = count_rows(owner, first, num_segments)
    return_keys, return_counts = count_rows(owner, last, num_segments)
    absent = num_segments * size
    (pairs,) = count_keys([(segments * size + owner).masked_fill(owner == size, absent)], absent)
    counts = torch.stack([counts[0], pairs.view(num_segments, size), return_counts[0]])
    counts, nonfinite_rows = read(HostCopy(counts, num_nonfinite_rows))
    rows, pairs, return_rows = counts.tolist()

    def find_order() -> tuple[Tensor, Tensor]:
        sent, returned = _sorted_rows(row_keys, rows), _sorted_rows(return_keys, return_rows)
        home_index = compact_columns(_places(returned, num_tokens * size).view(-1, size), topk_ids.shape[1])
        return _tokens_of(sent, size), home_index

    return TokenPlan(
        token_bounds=(0,) * overlap.num_chunks + (num_tokens,),
        order=RowOrder(find_order),
        rows=rows,
        pairs=pairs,
        return_rows=return_rows,
        nonfinite_rows=int(nonfinite_rows),
    )


def owners_of_pairs(topk_ids: Tensor, num_experts: int, size: int) -> Tensor:
    """Return the owner (T, K) int64 of each pair, the rank that owns its expert; `size` for a skipped pair."""
    skipped = (topk_ids < 0) | (topk_ids >= num_experts)
    owner = torch.div(topk_ids, num_experts // size, rounding_mode="floor").to(torch.int64)
    return owner.masked_fill(skipped, size)


def row_segments(bounds: tuple[int, ...], rank: int, size: int, overlap: OverlapPlan, device: torch.device) -> Tensor:
    """Return the segment (T, W) int64 in which each token's row for each rank would travel.

    bounds: overlap.bounds(T).
    """
    num_tokens = bounds[-1]
    positions = torch.arange(num_tokens, device=device)
    starts = to_device(torch.tensor(bounds[1:-1], dtype=torch.int64, device="cpu"), device)
    chunks = torch.bucketize(positions, starts, right=True) + overlap.num_local_slices
    segments = chunks[:, None].repeat(1, size)
    if overlap.local_first:
        segments[:, rank] = _local_slices(num_tokens, overlap, device)
    return segments


def _local_slices(num_tokens: int, overlap: OverlapPlan, device: torch.device) -> Tensor:
    """Return the segment (T,) int64 of each token's row for its own rank, with local_first."""
    return (torch.arange(num_tokens, device=device) >= overlap.local_bound(num_tokens)).to(torch.int64)


def count_rows(
    owner: Tensor, segments: Tensor, num_segments: int, is_copy: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Count the home rows and their pairs by (segment, rank).

    Args:
        owner: (T, K) int64, W for a skipped pair. segments: (T, W) int64.
        is_copy: (T, K) bool: pairs that are counted once more for themselves.
    Returns:
        The key of each (token, rank), (T * W,) int64: segment * W + rank, num_segments * W where it does not travel;
        and the counts of rows and of pairs, (2, num_segments, W) int64; (3, ..) with those of is_copy.
    """
    num_tokens, size = segments.shape
    absent = num_segments * size
    keys = segments.new_full((num_tokens, size + 1), absent)
    keys[:, :size] = segments * size + torch.arange(size, device=segments.device)
    needs = torch.zeros_like(keys, dtype=torch.bool).scatter_(1, owner, True)[:, :size]
    row_keys = keys[:, :size].masked_fill(~needs, absent).flatten()
    pair_keys = keys.gather(1, owner)
    counted = (
        [row_keys, pair_keys] if is_copy is None else [row_keys, pair_keys, pair_keys.masked_fill(~is_copy, absent)]
    )
    return row_keys, count_keys(counted, absent).view(-1, num_segments, size)


def count_keys(keys: Sequence[Tensor], limit: int) -> Tensor:
    """Count how often each of 0 .. limit - 1 is in each of `keys` (int64, at most `limit`), without a host read.

    Returns:
        (len(keys), limit) int64.
    """
    room = limit + 1
    places = torch.cat([of.flatten() + number * room for number, of in enumerate(keys)])
    counts = places.new_zeros(len(keys) * room)
    return counts.scatter_add_(0, places, places.new_ones(()).expand(places.shape)).view(-1, room)[:, :limit]


def order_rows(row_keys: Tensor, size: int, top_k: int, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Return home_tokens and home_index of a TokenPlan from count_rows's keys and its rows on the host."""
    order = _sorted_rows(row_keys, rows)
    return _tokens_of(order, size), compact_columns(_places(order, row_keys.shape[0]).view(-1, size), top_k)


def _sorted_rows(row_keys: Tensor, rows: list[list[int]]) -> Tensor:
    """Return the rows that travel in the order of their keys: (S,) int64, token * W + rank."""
    return torch.sort(row_keys, stable=True)[1][: sum(map(sum, rows))]


def _tokens_of(order: Tensor, size: int) -> Tensor:
    return torch.div(order, size, rounding_mode="floor").to(torch.int32)


def _places(order: Tensor, num_keys: int) -> Tensor:
    """Return where each of (token, rank) stands in `order`, (T * W,) int32, -1 where it does not travel."""
    places = torch.full((num_keys,), -1, dtype=torch.int32, device=order.device)
    places[order] = torch.arange(order.shape[0], dtype=torch.int32, device=order.device)
    return places


def compact_columns(home_index: Tensor, top_k: int) -> Tensor:
    """Bring the numbers of each row of (T, W), of which at most top_k are not -1, to its start: (T, min(W, top_k)).

    Example:
        [[-1, 4, -1, 7], [-1, -1, 5, -1]] and top_k = 2 give [[4, 7], [5, -1]].
    """
    num_columns = max(1, top_k)
    if home_index.shape[1] <= num_columns:
        return home_index
    present = home_index >= 0
    columns = (present.cumsum(1) - 1).masked_fill(~present, num_columns)  # -1 all go to one column, which is cut off
    compacted = home_index.new_full((home_index.shape[0], num_columns + 1), -1).scatter_(1, columns, home_index)
    return compacted[:, :num_columns].contiguous()
