"""The plan of one layer call, which all ranks agree on: where every row lies on both sides, and in what order.

Two buffers mirror each other: the home buffer (dispatch/send_plan.py), and the *receive* buffer, which has a row for
each token that came here. It is stored by (segment, rank, token) too; with chunks of experts the sums that go home have
another order than the rows that came (dispatch/expert_chunks.py).

Before any row moves, one exchange of a fixed size tells every rank the counts and that all ranks mean the same call.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from tritonmoe.config.layer import PerWeight
from tritonmoe.config.overlap import OverlapPlan
from tritonmoe.dispatch.count_exchange import CallMarks, check_copy_pairs, check_counts, exchange_counts
from tritonmoe.dispatch.expert_chunks import RowPlaces, place_rows
from tritonmoe.dispatch.header import SAVES, CallHeader
from tritonmoe.dispatch.send_plan import TokenPlan
from tritonmoe.ops.grouping import RowSources
from tritonmoe.runtime.cpu_memory import to_device
from tritonmoe.transports import Transport, fail_peers_on_error

__all__ = ["DispatchPlan", "exchange_plan", "offsets"]


@dataclass(frozen=True)
class DispatchPlan:
    """Every size and offset of one layer call; backward uses the same numbers, so it exchanges no counts."""

    rank: int
    size: int
    overlap: OverlapPlan
    tokens: TokenPlan
    receive_rows: list[list[int]]
    """[segment][rank] rows that come from each rank; in the local segments they come from this one."""
    return_rows: list[list[int]]
    """[segment][rank] rows that go back to each rank; with chunks of tokens the same as `receive_rows`."""
    send_offsets: tuple[int, ...]
    """Where each segment starts among the home rows that are sent, and its end."""
    receive_offsets: tuple[int, ...]
    """The same in the receive buffer."""
    pair_offsets: tuple[int, ...]
    """The same for the pairs that this rank's experts compute."""
    traffic: Tensor
    """(W, W) int64 on the CPU: the size of S_ik for every i (row) and k."""
    traffic_pairs: Tensor
    """The same for the pairs of rank i that rank k computes."""
    headers: list[CallHeader]
    """What every rank said of this call."""
    num_local_experts: int = 0
    """The experts of one rank, which only chunks of experts ask for."""
    copy_pair_offsets: tuple[int, ...] = ()
    """Where each segment starts among the pairs that this rank's copies of other ranks' experts compute, and its end;
    () without copies."""
    marks: CallMarks | None = None
    """Of the count exchange; None of the plan inside a node, whose counts came with those of all ranks."""
    extra_counts: Tensor | None = None
    """(W, n) int64: what every rank has sent with its counts; None where some rank has sent nothing."""
    find_sources: Callable[[], RowSources] | None = None
    """Inside a node: gives the rank whose token each received row is; None where the plan has no relays."""

    @property
    def call(self) -> str:
        """Which call it is, in words."""
        return self.headers[0].call

    @property
    def num_chunks(self) -> int:
        return self.overlap.num_chunks

    @cached_property
    def needs_any(self) -> bool:
        """Whether some rank needs any gradient: then every rank runs the backward."""
        return any(h.needs_any for h in self.headers)

    @cached_property
    def needs_x(self) -> bool:
        """Whether some rank needs the gradient of x: then every rank takes part in that gradient's exchanges."""
        return any(h.needs_x for h in self.headers)

    @cached_property
    def needs_topk_weights(self) -> bool:
        """The same for topk_weights."""
        return any(h.needs_topk_weights for h in self.headers)

    @property
    def needs_weights(self) -> PerWeight[bool]:
        """Of which kinds of weight some rank needs the gradient."""
        return _any_bit([header.needs_weights for header in self.headers])

    @property
    def has_wide_grads(self) -> PerWeight[bool]:
        """Of which kinds of weight some rank has a wider main_grad: gradients of their copies travel in fp32."""
        return _any_bit([header.wide_grads for header in self.headers])

    @property
    def keeps_copies(self) -> bool:
        """Whether weights of copies are kept until the backward: not if some rank computes h again to save memory."""
        return all(h.save == SAVES.index("hidden") for h in self.headers)

    @cached_property
    def home_offsets(self) -> tuple[int, ...]:
        """Where each segment starts in the home buffer, and its end."""
        if self.tokens.return_rows is self.tokens.rows:
            return self.send_offsets
        return offsets(self.tokens.return_rows)

    @cached_property
    def return_offsets(self) -> tuple[int, ...]:
        """Where each segment starts among the sums that go home, and its end."""
        return self.receive_offsets if self.return_rows is self.receive_rows else offsets(self.return_rows)

    def segment(self, chunk: int) -> int:
        """Return the segment of an exchanged chunk, or with local_first of the local rows (chunks -2 and -1)."""
        return chunk + self.overlap.num_local_slices

    def send_slice(self, chunk: int) -> slice:
        segment = chunk + self.overlap.num_local_slices
        return slice(*self.send_offsets[segment : segment + 2])

    def receive_slice(self, chunk: int) -> slice:
        segment = chunk + self.overlap.num_local_slices
        return slice(*self.receive_offsets[segment : segment + 2])

    def return_slice(self, chunk: int) -> slice:
        segment = chunk + self.overlap.num_local_slices
        return slice(*self.return_offsets[segment : segment + 2])

    def home_slice(self, chunk: int) -> slice:
        segment = chunk + self.overlap.num_local_slices
        return slice(*self.home_offsets[segment : segment + 2])

    def token_slice(self, chunk: int) -> slice:
        return slice(*self.tokens.token_bounds[chunk : chunk + 2])

    @cached_property
    def num_local(self) -> int:
        """How many rows are not exchanged: all buffers start with them."""
        return self.send_offsets[self.overlap.num_local_slices]

    @cached_property
    def is_identity(self) -> bool:
        """Whether every token stays, once: then home rows, received rows and tokens are the same, in one order."""
        if self.size > 1 or not self.overlap.local_first:
            return False
        return not self.tokens.has_padding and self.num_home == self.tokens.token_bounds[-1]

    @cached_property
    def num_home(self) -> int:
        return self.send_offsets[-1]

    @cached_property
    def num_received(self) -> int:
        return self.receive_offsets[-1]

    @property
    def all_send_splits(self) -> list[int]:
        """Return how many rows go to each rank over all chunks."""
        return [sum(column) for column in zip(*self.tokens.rows[self.overlap.num_local_slices :], strict=True)]

    @property
    def all_receive_splits(self) -> list[int]:
        return [sum(column) for column in zip(*self.receive_rows[self.overlap.num_local_slices :], strict=True)]

    def send_order(self) -> Tensor:
        """(S - local,) int64: exchanged home rows, as they are sent, by (rank, token), padding at its chunk's end."""
        if self.overlap.chunk_by == "tokens":
            return self._by_rank(self.tokens.rows)
        ranks, tokens = (of[self.num_local :] for of in (self.tokens.home_ranks, self.tokens.home_tokens))
        return torch.sort(ranks * self.tokens.token_bounds[-1] + tokens)[1] + self.num_local

    def place_received(self, topk_ids: Tensor) -> RowPlaces:
        """Return where the R - local rows that came here lie; with chunks of tokens it follows from the counts.

        topk_ids: (R - local, K), by (rank, token), as they come.
        """
        if self.overlap.chunk_by == "tokens":
            places = self._by_rank(self.receive_rows)
            return RowPlaces(places, places)
        local_ids = topk_ids - self.rank * self.num_local_experts
        received, returned = place_rows(local_ids, self.num_local_experts, self.overlap)
        return RowPlaces(received + self.num_local, returned + self.num_local)

    def return_order(self) -> Tensor:
        """(R - local,) int64: sums that go home, by (rank, chunk of return, token), which backward needs no ids for."""
        return self._by_rank(self.return_rows)

    def home_order(self) -> Tensor:
        """(S - local,) int64: the places of rows that come home in that order."""
        return self._by_rank(self.tokens.return_rows)

    def _by_rank(self, rows: list[list[int]]) -> Tensor:
        """Return the places (int64) by (rank, segment) of exchanged rows, which lie by (segment, rank) as counted."""
        num_slices, device = self.overlap.num_local_slices, self.tokens.home_index.device
        counts = torch.tensor(rows[num_slices:], dtype=torch.int64, device="cpu")
        starts = (counts.view(-1).cumsum(0) - counts.view(-1)).view_as(counts) + self.num_local
        by_rank = counts.T.flatten()
        shifts = starts.T.flatten() - (by_rank.cumsum(0) - by_rank)
        num_rows = int(by_rank.sum())
        shifts, by_rank = to_device(torch.stack([shifts, by_rank]), device)
        return torch.arange(num_rows, device=device) + shifts.repeat_interleave(by_rank, output_size=num_rows)

    @property
    def is_inside_node(self) -> bool:
        """Whether this is the inner plan of two levels, whose rows are not stored by source within a segment."""
        return self.find_sources is not None

    def row_sources(self) -> RowSources:
        """Return the rank whose token each received row is."""
        if self.find_sources is not None:
            return self.find_sources()
        return RowSources(tuple(range(self.size)), torch.tensor(self.receive_rows, dtype=torch.int64, device="cpu"))


def _any_bit(of_ranks: list[int]) -> PerWeight[bool]:
    """Return for each kind of weight whether some rank has its bit."""
    return PerWeight(*(any(bits >> i & 1 for bits in of_ranks) for i in range(len(PerWeight._fields))))


def exchange_plan(
    transport: Transport,
    header: CallHeader,
    tokens: TokenPlan,
    overlap: OverlapPlan,
    is_final: bool = True,
    extra: Tensor | None = None,
) -> DispatchPlan:
    """Run the one count exchange of a layer call and give the plan that all ranks agree on.

    Args:
        is_final: False where copies may change the plan: then the order of its rows is left to be found.
        extra: as in exchange_counts.
    Raises, on every rank alike:
        TransportError: a rank refused its arguments. CountMismatch: the ranks' calls differ, or counts were damaged.
        NonFiniteScores: a rank's router scores were not finite. CapacityOverflow: an earlier replay's rows didn't fit.
        ValueError: a rank would receive more pairs than int32 positions can number.
    """
    has_copies = tokens.copy_pairs is not None
    third = tokens.copy_pairs if has_copies else tokens.return_rows  # rows return as they came where there are copies
    counts = torch.tensor([tokens.rows, tokens.pairs, third], device="cpu")  # (3, segments, W)
    meanwhile = tokens.order.find if is_final else None
    told = exchange_counts(transport, header, counts, meanwhile=meanwhile, extra=extra)
    headers, (traffic, traffic_pairs), received, marks, extra_counts = told
    receive_rows, receive_pairs, third = received.tolist()
    return_rows = receive_rows if has_copies else third
    with fail_peers_on_error(transport):
        check_counts(receive_rows, receive_pairs, return_rows, traffic, traffic_pairs, header.top_k, transport.rank)
        if has_copies:
            check_copy_pairs(receive_pairs, third, transport.rank)
    return DispatchPlan(
        rank=transport.rank,
        size=transport.size,
        overlap=overlap,
        tokens=tokens,
        receive_rows=receive_rows,
        return_rows=return_rows if overlap.chunk_by == "experts" else receive_rows,
        send_offsets=offsets(tokens.rows),
        receive_offsets=offsets(receive_rows),
        pair_offsets=offsets(receive_pairs),
        traffic=traffic,
        traffic_pairs=traffic_pairs,
        headers=headers,
        num_local_experts=header.num_experts // transport.size,
        copy_pair_offsets=offsets(third) if has_copies else (),
        marks=marks,
        extra_counts=extra_counts,
    )


def offsets(counts: list[list[int]]) -> tuple[int, ...]:
    """Return where each segment starts, and the end of the last, from its counts by rank."""
    return (0, *accumulate(map(sum, counts)))
