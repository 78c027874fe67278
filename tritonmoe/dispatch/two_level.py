"""Dispatch in two levels: a token crosses once to every other node that needs it, and spreads inside that node.

Both levels are plans of dispatch/plan.py. In the outer one the ranks with the same place in their nodes exchange rows,
and a "rank" is a node; the rows that arrive at a relay are the tokens of the inner one, whose ranks are those of the
relay's node and whose segments are the outer plan's. The source knows node, relay and rank of every pair, so it tells
each rank in the one count exchange both what that rank receives in the end and what it has to relay.

Example: 4 ranks in nodes of 2, a token of rank 0 that needs ranks 2 and 3: one outer row to rank 2 (place 0 of node 1),
from there one inner row to rank 2 itself and one to rank 3.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from tritonmoe.config.overlap import MAX_CHUNKS, OverlapConfig, OverlapPlan
from tritonmoe.dispatch.count_exchange import check_counts, exchange_counts
from tritonmoe.dispatch.header import CallHeader
from tritonmoe.dispatch.placement import ExpertPlacement
from tritonmoe.dispatch.plan import DispatchPlan, offsets
from tritonmoe.dispatch.send_plan import RowOrder, TokenPlan, count_rows, order_rows, owners_of_pairs, row_segments
from tritonmoe.errors import CountMismatch
from tritonmoe.ops.grouping import RowSources
from tritonmoe.runtime.cpu_memory import to_device
from tritonmoe.transports import HostCopy, TwoLevelTransport, leaving_nobody_waiting

__all__ = ["TwoLevelPlan", "check_two_level", "exchange_two_level_plan"]

MAX_TWO_LEVEL_CHUNKS = MAX_CHUNKS - 2
"""The inner plan's chunks are the outer plan's segments: the chunks and two local slices."""


@dataclass(frozen=True)
class TwoLevelPlan:
    """Every size and offset of both levels."""

    outer: DispatchPlan
    relay_rows: list[list[int]]
    """[segment][rank of this node]: the inner rows that this rank sends as a relay."""
    inner_receive_rows: list[list[int]]
    """[segment][relay of this node]: the inner rows that come here."""
    pair_offsets: tuple[int, ...]
    """Where each segment's pairs start on this rank, and their end."""
    source_rows: Tensor
    """(segments, W) int64: the rows that each source has for this rank, by source = node * node_size + place."""
    first_expert_of_node: int
    num_experts_of_node: int
    place: int
    """The place of this rank in its node."""

    def inner(self, topk_ids: Tensor) -> DispatchPlan:
        """Return the inner plan once the ids (R, K) of the outer rows are here; reads nothing on the host."""
        size = len(self.relay_rows[0])
        overlap = OverlapPlan(chunk_sizes=(1,) * len(self.relay_rows), local_first=False)
        bounds = self.outer.receive_offsets
        rows = torch.arange(topk_ids.shape[0], device=topk_ids.device)
        starts = to_device(torch.tensor(bounds[1:-1], dtype=torch.int64, device="cpu"), topk_ids.device)
        segments = torch.bucketize(rows, starts, right=True)[:, None].expand(-1, size)
        owner = owners_of_pairs(topk_ids - self.first_expert_of_node, self.num_experts_of_node, size)
        row_keys, _ = count_rows(owner, segments, len(self.relay_rows))
        found = order_rows(row_keys, size, topk_ids.shape[1], self.relay_rows)
        return DispatchPlan(
            rank=self.place,
            size=size,
            overlap=overlap,
            tokens=TokenPlan(bounds, RowOrder(lambda: found), self.relay_rows, [], self.relay_rows),
            receive_rows=self.inner_receive_rows,
            return_rows=self.inner_receive_rows,
            send_offsets=offsets(self.relay_rows),
            receive_offsets=offsets(self.inner_receive_rows),
            pair_offsets=self.pair_offsets,
            traffic=self.outer.traffic,
            traffic_pairs=self.outer.traffic_pairs,
            headers=self.outer.headers,
            find_sources=self._row_sources,
        )

    def _row_sources(self) -> RowSources:
        """Return the rank that each inner received row comes from; they are stored by (segment, relay, node, token)."""
        size = len(self.relay_rows[0])
        by_relay = self.source_rows.view(len(self.relay_rows), -1, size).transpose(1, 2)  # (segments, place, node)
        ranks = torch.arange(self.source_rows.shape[1], device="cpu").view(-1, size).T  # (place, node)
        return RowSources(tuple(ranks.flatten().tolist()), by_relay.flatten(1))


def check_two_level(overlap: OverlapConfig | OverlapPlan, placement: ExpertPlacement | None) -> None:
    """Raise ValueError for what a layer can't do on a TwoLevelTransport."""
    sizes = overlap.shape if isinstance(overlap, OverlapConfig) else overlap.chunk_sizes
    num_chunks = len(sizes) if isinstance(sizes, tuple) else overlap.num_chunks
    if num_chunks != "auto" and num_chunks > MAX_TWO_LEVEL_CHUNKS:
        raise ValueError(f"on a TwoLevelTransport num_chunks must be at most {MAX_TWO_LEVEL_CHUNKS}, got {num_chunks}")
    if overlap.chunk_by == "experts":
        raise ValueError(
            "chunk_by='experts' needs a transport of one level, since a relay spreads and gathers the rows of a chunk "
            "together: use chunk_by='tokens', or TwoLevelTransport.world"
        )
    if isinstance(overlap, OverlapConfig) and overlap.memory_budget_bytes is not None:
        raise ValueError(
            "memory_budget_bytes needs a transport of one level, whose buffers alone can be predicted: give "
            "num_chunks, or use TwoLevelTransport.world"
        )
    if overlap.capacity is not None:
        raise ValueError("capacity needs a transport of one level: leave it out, or use TwoLevelTransport.world")
    if overlap.balance is not None:
        raise ValueError(
            "balance needs a transport of one level, since copies of experts go from any rank to any other: leave it "
            "out, or use TwoLevelTransport.world"
        )
    if placement is not None and placement.has_replicas:
        raise ValueError(
            "a placement with replicas needs a transport of one level, since the gradients of replicas are summed over "
            "all ranks: use a placement without replicas, or TwoLevelTransport.world"
        )


def exchange_two_level_plan(
    transport: TwoLevelTransport,
    header: CallHeader,
    topk_ids: Tensor,
    num_experts: int,
    overlap: OverlapPlan,
    num_nonfinite_rows: Tensor,
) -> TwoLevelPlan:
    """Plan both levels from this rank's ids (T, K) and one count exchange. It raises what exchange_plan raises.

    The one host read of a layer call before its count exchange is here: of the counts, and of num_nonfinite_rows, a
    scalar, with them.
    """
    size, node_size, num_nodes = transport.size, transport.node_size, transport.num_nodes
    node, place = divmod(transport.rank, node_size)
    num_tokens, num_segments = topk_ids.shape[0], overlap.num_segments
    owner = owners_of_pairs(topk_ids, num_experts, size)
    outer_owner = torch.div(owner, node_size, rounding_mode="floor")  # skipped: W // node_size is no node either
    segments = row_segments(overlap.bounds(num_tokens), node, num_nodes, overlap, topk_ids.device)
    outer_keys, outer_counts = count_rows(outer_owner, segments, num_segments)
    _, rank_counts = count_rows(owner, segments.repeat_interleave(node_size, dim=1), num_segments)
    to_read = HostCopy(outer_counts, rank_counts, num_nonfinite_rows)
    outer_counts, rank_counts, nonfinite_rows = transport.wait_for_copy(to_read)
    header = header._replace(nonfinite_rows=int(nonfinite_rows))
    outer_rows, outer_pairs = outer_counts.tolist()
    told = _told(rank_counts, outer_counts[0], node_size, place)
    order = RowOrder(partial(order_rows, outer_keys, num_nodes, topk_ids.shape[1], outer_rows))
    counts = exchange_counts(transport, header, told, meanwhile=order.find)
    headers, (traffic, traffic_pairs), received, times, _ = counts
    told_rows, told_pairs = received[:2].tolist()
    relayed_from = received[:, :, place::node_size]  # (kinds, segments, nodes): only our place in a node tells us
    with leaving_nobody_waiting(transport):
        check_counts(told_rows, told_pairs, told_rows, traffic, traffic_pairs, header.top_k, transport.rank)
        check_relayed(relayed_from[2:], traffic, transport)
    receive_rows = relayed_from[2].tolist()
    outer = DispatchPlan(
        rank=node,
        size=num_nodes,
        overlap=overlap,
        tokens=TokenPlan(overlap.bounds(num_tokens), order, outer_rows, outer_pairs, outer_rows),
        receive_rows=receive_rows,
        return_rows=receive_rows,
        send_offsets=offsets(outer_rows),
        receive_offsets=offsets(receive_rows),
        pair_offsets=(),
        traffic=traffic,
        traffic_pairs=traffic_pairs,
        headers=headers,
        count_times=times,
    )
    experts_of_node = num_experts // num_nodes
    return TwoLevelPlan(
        outer=outer,
        relay_rows=relayed_from[3:].sum(2).T.tolist(),
        inner_receive_rows=received[0].view(num_segments, num_nodes, node_size).sum(1).tolist(),
        pair_offsets=offsets(received[1].tolist()),
        source_rows=received[0].clone(),  # not a view, which would keep all that every rank told
        first_expert_of_node=node * experts_of_node,
        num_experts_of_node=experts_of_node,
        place=place,
    )


def _told(rank_counts: Tensor, outer_rows: Tensor, node_size: int, place: int) -> Tensor:
    """Return (3 + node_size, segments, W) what each rank is told by the rank with this place in its node.

    These are its own rows and pairs, and as a relay (the rank with our place in its node) the outer rows it gets from
    us and the rows it has to pass on to each rank of its node.
    """
    _, num_segments, size = rank_counts.shape
    told = torch.zeros(3 + node_size, num_segments, size, dtype=torch.int64, device="cpu")
    told[:2] = rank_counts
    told[2, :, place::node_size] = outer_rows
    told[3:, :, place::node_size] = rank_counts[0].view(num_segments, -1, node_size).permute(2, 0, 1)
    return told


def check_relayed(counts: Tensor, traffic: Tensor, transport: TwoLevelTransport) -> None:
    """Raise CountMismatch unless what this rank has to relay agrees with what every rank says of the whole call.

    Args:
        counts: (1 + node_size, segments, nodes): rows that come to this relay, and rows that it passes on to each rank
            of its node, from the rank with its place in each node. traffic: (W, W), of rows.
    """
    node_size = transport.node_size
    node, place = divmod(transport.rank, node_size)
    passed_on = counts[1:]
    own_node = traffic[place::node_size, node * node_size : (node + 1) * node_size]
    is_right = (passed_on.sum(1) == own_node.T).all(0)
    is_right &= ((passed_on.amax(0) <= counts[0]) & (counts[0] <= passed_on.sum(0))).all(0)
    for source in (~is_right).nonzero()[:, 0].tolist():
        raise CountMismatch(
            f"rank {transport.rank} got counts of rank {source * node_size + place} that contradict each other: by "
            f"segment {counts[0, :, source].tolist()} rows to relay, of which each rank of this node needs "
            f"{passed_on[:, :, source].tolist()}, {own_node[source].tolist()} in all: they were damaged on their way"
        )
