"""TwoLevel: the plan of a call whose rows go over nodes first, each to a relay, and then inside a node.

The plan's rows go between nodes. To the pass over them a relay is the experts: it spreads a chunk's rows inside the
node, lets the experts run, and returns the sums. Its exchanges run inside the node while those of the outer pass, over
the slow link, are under way; they are waited for where they are posted, and count as the experts' time. The steps are
those of schedule.build_inside, which the simulator prices too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tritonmoe.config.layer import PerWeight
from tritonmoe.dispatch.expert_chunks import RowPlaces
from tritonmoe.dispatch.header import CallHeader
from tritonmoe.dispatch.plan import DispatchPlan
from tritonmoe.dispatch.two_level import TwoLevelPlan, check_two_level, exchange_two_level_plan
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
from tritonmoe.overlap.executor import Actions, Execution
from tritonmoe.overlap.report import LayerReport, PassReport
from tritonmoe.overlap.row_exchanges import ArrivingMetadata, RowExchanges
from tritonmoe.overlap.schedule import build_inside
from tritonmoe.overlap.steps import Step, StepKind
from tritonmoe.transports import PendingExchange, Transport, TwoLevelTransport
from tritonmoe.transports.wire import WireFormat

__all__ = ["TwoLevel"]


@dataclass(eq=False)
class TwoLevel(PlanKind):
    """One call on a TwoLevelTransport."""

    name = "two levels"

    both: TwoLevelPlan
    inside_node: Transport

    @classmethod
    def takes(cls, call: ProposedCall) -> bool:
        if call.transport.node_size is None:
            return False
        check_two_level(call.spec.overlap, call.spec.placement)
        return True

    @classmethod
    def plan(cls, call: ProposedCall, header: CallHeader, others: Sequence[type[PlanKind]]) -> PlannedCall:
        transport = call.transport
        assert isinstance(transport, TwoLevelTransport)
        both = exchange_two_level_plan(
            transport, header, call.tensors.topk_ids, call.num_slots, call.overlap, call.num_nonfinite_rows
        )
        planned = planned_call(call, cls(both, transport.inside_node), header, both.outer)
        planned.transport = transport.between_nodes
        return planned

    def forward_experts(self, call: PlannedCall, tensors: CallTensors[Tensor], keep_hidden: bool) -> ForwardExperts:
        return NodeForward(self, call, OwnExperts(call, tensors, keep_hidden))

    def backward_experts(self, call: PlannedCall, kept: Kept) -> BackwardExperts:
        assert isinstance(kept.of_kind, DispatchPlan)
        own = kept.run(call.settings)
        return NodeBackward(self.exchanges(call, kept.of_kind), kept.plan.overlap.num_local_slices, own)

    def report(self, call: PlannedCall, report: LayerReport) -> None:
        report.pair_offsets = self.both.pair_offsets
        report.rows_to_nodes = tuple(map(sum, zip(*call.plan.tokens.rows, strict=True)))

    def exchanges(self, call: PlannedCall, inner: DispatchPlan) -> RowExchanges:
        """Return the exchanges inside the node."""
        return RowExchanges(inner, self.inside_node, call.settings.ops.gather_sum)


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
        """Do what a step of the outer level has to do inside the node."""
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
        inner = self._kind.both.inner(received.topk_ids)
        exchanges = self._kind.exchanges(self._call, inner)
        _NodePass.__init__(self, exchanges, plan.overlap.num_local_slices)
        self.relayed = received.x
        self.rows = received.x.new_empty(inner.num_received, received.x.shape[1])

        arriving: ArrivingMetadata

        def post() -> PendingExchange:
            nonlocal arriving
            pending, arriving = exchanges.send_metadata(received)
            return pending

        def group() -> None:
            tensors, inner_places = exchanges.receive_metadata(arriving, received)
            self.experts.group(inner, tensors._replace(x=self.rows), inner_places)

        self.run(Step(StepKind.GROUP, None), {StepKind.NODE_METADATA: post, StepKind.GROUP: group}, self.rows.device)

    def forward(self, segment: int, out: Tensor | None = None) -> Tensor:
        """Return the weighted partial sums of the relayed rows of a segment, over the experts of this node."""
        inside = _Forward(self, out)
        self.run(self.step_of(StepKind.EXPERTS, segment), inside.actions(), self.rows.device)
        return inside.sums.result

    def end(self, out: Tensor, timings: PassReport) -> None:
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
        timings.inside = self.reports
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
