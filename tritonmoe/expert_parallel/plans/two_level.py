"""TwoLevel: the plan of a call in which a token crosses once to every other node that needs it, and spreads in there.

Both levels are plans of dispatch/plan.py. In the outer one the ranks with the same place in their nodes exchange rows,
and a "rank" is a node; the rows that arrive at a relay are the tokens of the inner one, whose ranks are those of the
relay's node and whose segments are the outer plan's. The source knows node, relay and rank of every pair, so it tells
each rank in the one count exchange both what that rank receives in the end and what it has to relay.

Example: 4 ranks in nodes of 2, a token of rank 0 that needs ranks 2 and 3: one outer row to rank 2 (place 0 of node 1),
from there one inner row to rank 2 itself and one to rank 3.

To the pass over the outer rows a relay is the experts: it spreads a chunk's rows inside the node, runs the experts, and
returns the sums. Its exchanges run inside the node while those of the outer pass, over the slow link, are under way;
they are waited for where they are posted, and count as the experts' time. The steps are those of
schedule.build_inside, which the simulator prices too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from tritonmoe.config.layer import PerWeight
from tritonmoe.config.overlap import MAX_CHUNKS, OverlapConfig, OverlapPlan
from tritonmoe.dispatch.count_exchange import check_counts, exchange_counts
from tritonmoe.dispatch.expert_chunks import RowPlaces
from tritonmoe.dispatch.header import CallHeader
from tritonmoe.dispatch.placement import ExpertPlacement
from tritonmoe.dispatch.plan import DispatchPlan, offsets
from tritonmoe.dispatch.send_plan import RowOrder, TokenPlan, count_rows, order_rows, owners_of_pairs, row_segments
from tritonmoe.errors import CountMismatch
from tritonmoe.expert_parallel.call import ProposedCall
from tritonmoe.expert_parallel.plans.base import (
    NUM_KIND_TENSORS,
    BackwardExperts,
    ForwardExperts,
    Kept,
    PlanKind,
    PlannedCall,
)
from tritonmoe.expert_parallel.plans.plain import OwnExperts, planned_call
from tritonmoe.experts.backward_run import BackwardRun
from tritonmoe.experts.forward_run import ForwardRun
from tritonmoe.experts.tensors import CallTensors
from tritonmoe.ops.backends.ops import WeightGrads
from tritonmoe.ops.grouping import RowSources
from tritonmoe.overlap.executor import Actions, Execution
from tritonmoe.overlap.report import LayerReport, PassReport
from tritonmoe.overlap.row_exchanges import RowExchanges
from tritonmoe.overlap.schedule import build_inside
from tritonmoe.overlap.steps import Step, StepKind
from tritonmoe.runtime.cpu_memory import to_device
from tritonmoe.runtime.host_device import HostCopy
from tritonmoe.transports import PendingExchange, Transport, TwoLevelTransport, fail_peers_on_error
from tritonmoe.transports.wire import WireFormat

__all__ = ["TwoLevel"]

MAX_TWO_LEVEL_CHUNKS = MAX_CHUNKS - 2
"""The inner plan's chunks are the outer plan's segments: the chunks and two local slices."""


@dataclass(eq=False)
class TwoLevel(PlanKind):
    """One call on a TwoLevelTransport."""

    name = "two levels"

    inside_node: Transport
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

    @classmethod
    def takes(cls, call: ProposedCall) -> bool:
        if call.transport.node_size is None:
            return False
        _check_two_level(call.spec.overlap, call.spec.placement)
        return True

    @classmethod
    def plan(cls, call: ProposedCall, header: CallHeader, others: Sequence[type[PlanKind]]) -> PlannedCall:
        transport = call.transport
        assert isinstance(transport, TwoLevelTransport)
        kind = _exchange_two_level_plan(
            transport, header, call.tensors.topk_ids, call.num_slots, call.overlap, call.num_nonfinite_rows
        )
        planned = planned_call(call, kind, header, kind.outer)
        planned.transport = transport.between_nodes
        return planned

    def forward_experts(self, call: PlannedCall, tensors: CallTensors[Tensor], keep_hidden: bool) -> ForwardExperts:
        return NodeForward(self, call, OwnExperts(call, tensors, keep_hidden))

    def backward_experts(self, call: PlannedCall, kept: Kept) -> BackwardExperts:
        assert isinstance(kept.of_kind, DispatchPlan)
        own = kept.run(call.settings)
        return NodeBackward(self.exchanges(call, kept.of_kind), kept.plan.overlap.num_local_slices, own)

    def report(self, call: PlannedCall, report: LayerReport) -> None:
        report.pair_offsets = self.pair_offsets
        report.rows_to_nodes = tuple(map(sum, zip(*call.plan.tokens.rows, strict=True)))

    def exchanges(self, call: PlannedCall, inner: DispatchPlan) -> RowExchanges:
        """Return the exchanges inside the node."""
        return RowExchanges(inner, self.inside_node, call.settings.ops.gather_sum)

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


def _check_two_level(overlap: OverlapConfig | OverlapPlan, placement: ExpertPlacement | None) -> None:
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


def _exchange_two_level_plan(
    transport: TwoLevelTransport,
    header: CallHeader,
    topk_ids: Tensor,
    num_experts: int,
    overlap: OverlapPlan,
    num_nonfinite_rows: Tensor,
) -> TwoLevel:
    """Plan both levels from this rank's ids (T, K) and one count exchange; raises what exchange_plan raises.

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
    headers, (traffic, traffic_pairs), received, marks, _ = counts
    told_rows, told_pairs = received[:2].tolist()
    relayed_from = received[:, :, place::node_size]  # (kinds, segments, nodes): only our place in a node tells us
    with fail_peers_on_error(transport):
        check_counts(told_rows, told_pairs, told_rows, traffic, traffic_pairs, header.top_k, transport.rank)
        _check_relayed(relayed_from[2:], traffic, transport)
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
        marks=marks,
    )
    experts_of_node = num_experts // num_nodes
    return TwoLevel(
        inside_node=transport.inside_node,
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


def _check_relayed(counts: Tensor, traffic: Tensor, transport: TwoLevelTransport) -> None:
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


class _NodePass:
    """One direction of one layer call's inner level on one rank.

    Args:
        exchanges: those inside the node. The tokens of their plan are the rows that this rank relays, and each of its
            chunks is a segment of the outer plan.
        num_local_slices: how many of the outer plan's segments are local ones.
    """

    def __init__(self, exchanges: RowExchanges, num_local_slices: int) -> None:
        self.exchanges, self.plan = exchanges, exchanges.plan
        self._num_local_slices = num_local_slices
        self.reports: list[tuple[Step, PassReport]] = []
        """What every step so far did inside the node."""

    def segment(self, chunk: int) -> int:
        """Return the segment of a chunk of the outer plan, which is a chunk of the inner one."""
        return chunk + self._num_local_slices

    def spread(self, relayed: Tensor, segment: int, received: Tensor) -> PendingExchange:
        """Send the rows of a segment from their relay to the ranks of this node that need them."""
        packed = self.exchanges.pack(relayed, segment)
        return self.exchanges.send_chunk(packed, segment, received, WireFormat(relayed.dtype))

    def run(self, step: Step, actions: Actions, device: torch.device, needs_x: bool = True) -> None:
        """Run what a step of the outer level consists of inside the node."""
        report = Execution(build_inside(step, needs_x=needs_x), actions, device, lambda: self.plan.call).run()
        self.reports.append((step, report))

    def step_of(self, kind: StepKind, segment: int) -> Step:
        return Step(kind, segment - self._num_local_slices)


class NodeForward(_NodePass, ForwardExperts):
    """What stands for the experts in a forward; own: the experts of the rows that come here inside the node."""

    rows: Tensor
    """(R', D): what the experts work on."""
    relayed: Tensor
    """(R, D): the rows that the outer level brings here."""

    def __init__(self, kind: TwoLevel, call: PlannedCall, own: OwnExperts) -> None:
        self._kind, self._call, self.experts = kind, call, own

    def group(self, plan: DispatchPlan, received: CallTensors[Tensor], places: RowPlaces) -> None:
        """Spread what came with the relayed rows, and group the rows that will come here."""
        inner = self._kind.inner(received.topk_ids)
        exchanges = self._kind.exchanges(self._call, inner)
        _NodePass.__init__(self, exchanges, plan.overlap.num_local_slices)
        self.relayed = received.x
        self.rows = received.x.new_empty(inner.num_received, received.x.shape[1])

        def post() -> PendingExchange:
            return exchanges.send_metadata(received)

        def group() -> None:
            tensors, inner_places = exchanges.receive_metadata(received)
            self.experts.group(inner, tensors._replace(x=self.rows), inner_places)

        self.run(Step(StepKind.GROUP, None), {StepKind.NODE_METADATA: post, StepKind.GROUP: group}, self.rows.device)

    def forward(self, segment: int, out: Tensor | None = None) -> Tensor:
        """Return the weighted partial sums of the relayed rows of a segment, over the experts of this node."""
        inside = _Forward(self, out)
        self.run(self.step_of(StepKind.EXPERTS, segment), inside.actions(), self.rows.device)
        return inside.sums.result

    def end(self, out: Tensor, timings: PassReport) -> None:
        self.experts.end(out, timings)
        timings.inside = self.reports

    @property
    def own(self) -> ForwardRun:
        return self.experts.own

    def kept(self) -> tuple[object, tuple[Tensor | None, ...]]:
        return self.plan, (None,) * NUM_KIND_TENSORS


class NodeBackward(_NodePass, BackwardExperts):
    """What stands for the experts in a backward; experts: this rank's own."""

    def __init__(self, exchanges: RowExchanges, num_local_slices: int, experts: BackwardRun) -> None:
        super().__init__(exchanges, num_local_slices)
        self.experts = experts

    @cached_property
    def dout_rows(self) -> Tensor:
        """(R', D): the gradients of the experts' outputs, made at the first use."""
        return torch.empty_like(self.experts.rows)

    def backward(
        self, segment: int, dout: Tensor, needs_dx: bool, out: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor]:
        """Return dx of the relayed rows of a segment, None unless needed, and the gradient of their topk_weights."""
        inside = _Backward(self, dout, needs_dx, out)
        self.run(self.step_of(StepKind.EXPERTS_BACKWARD, segment), inside.actions(), dout.device, needs_dx)
        return inside.dx.result if needs_dx else None, inside.dweights.result

    def weight_grad(self, dout: Tensor, needs: PerWeight[bool]) -> WeightGrads:
        """Return the gradients of this rank's experts; the gradients of their outputs came here chunk by chunk."""
        return self.experts.weight_grad(self.dout_rows, needs)

    def end(self, grads: CallTensors[Tensor | None], timings: PassReport) -> CallTensors[Tensor | None]:
        timings.inside, timings.loads = self.reports, self.experts.loads
        return grads._replace(activation_parameters=self.experts.activation_grads)


class _Sums:
    """One row per received row of a chunk on its way back to the relay, and its sum there, in rank order, in fp32."""

    result: Tensor
    """The sums, once they are taken."""

    def __init__(self, exchanges: RowExchanges, out: Tensor | None = None) -> None:
        self.exchanges, self.out = exchanges, out

    def post(self, partial: Tensor, segment: int) -> PendingExchange:
        self._home = partial.new_empty(self.exchanges.plan.num_home, partial.shape[1])
        return self.exchanges.return_chunk(partial, segment, self._home, WireFormat(partial.dtype))

    def take(self, segment: int) -> None:
        plan = self.exchanges.plan
        index = plan.tokens.home_index[plan.token_slice(segment)]
        self.result = self.exchanges.gather_sum(self._home, index, out=self.out)
        del self._home


class _Forward:
    """The steps inside the node of one chunk's forward."""

    def __init__(self, node: NodeForward, out: Tensor | None) -> None:
        self.node = node
        self.sums = _Sums(node.exchanges, out)
        self.partials: dict[int, Tensor] = {}

    def actions(self) -> Actions:
        return {
            StepKind.NODE_DISPATCH: self.dispatch,
            StepKind.EXPERTS: self.experts,
            StepKind.NODE_COMBINE: self.combine,
            StepKind.NODE_REDUCE: self.reduce,
        }

    def dispatch(self, chunk: int) -> PendingExchange:
        return self.node.spread(self.node.relayed, self.node.segment(chunk), self.node.rows)

    def experts(self, chunk: int) -> None:
        self.partials[chunk] = self.node.experts.forward(self.node.segment(chunk))

    def combine(self, chunk: int) -> PendingExchange:
        return self.sums.post(self.partials.pop(chunk), self.node.segment(chunk))

    def reduce(self, chunk: int) -> None:
        self.sums.take(self.node.segment(chunk))


class _Backward:
    """The steps inside the node of one chunk's backward."""

    def __init__(self, node: NodeBackward, dout: Tensor, needs_dx: bool, out: Tensor | None) -> None:
        self.node, self.dout, self.needs_dx = node, dout, needs_dx
        self.dx, self.dweights = _Sums(node.exchanges, out), _Sums(node.exchanges)
        self.partials: dict[int, Tensor] = {}
        self.weight_partials: dict[int, Tensor] = {}

    def actions(self) -> Actions:
        return {
            StepKind.NODE_COMBINE_BACKWARD: self.combine_backward,
            StepKind.EXPERTS_BACKWARD: self.experts_backward,
            StepKind.NODE_DISPATCH_BACKWARD: self.dispatch_backward,
            StepKind.NODE_REDUCE_BACKWARD: self.reduce_backward,
            StepKind.NODE_ROUTING_BACKWARD: self.routing_backward,
            StepKind.NODE_REDUCE_ROUTING_BACKWARD: self.reduce_routing_backward,
        }

    def combine_backward(self, chunk: int) -> PendingExchange:
        return self.node.spread(self.dout, self.node.segment(chunk), self.node.dout_rows)

    def experts_backward(self, chunk: int) -> None:
        segment, node = self.node.segment(chunk), self.node
        partial, self.weight_partials[chunk] = node.experts.backward(segment, node.dout_rows, self.needs_dx)
        if partial is not None:
            self.partials[chunk] = partial

    def dispatch_backward(self, chunk: int) -> PendingExchange:
        return self.dx.post(self.partials.pop(chunk), self.node.segment(chunk))

    def reduce_backward(self, chunk: int) -> None:
        self.dx.take(self.node.segment(chunk))

    def routing_backward(self, chunk: int) -> PendingExchange:
        return self.dweights.post(self.weight_partials.pop(chunk).to(torch.float32), self.node.segment(chunk))

    def reduce_routing_backward(self, chunk: int) -> None:
        # Every pair is computed by one rank only: the other ranks' terms are zero.
        self.dweights.take(self.node.segment(chunk))
