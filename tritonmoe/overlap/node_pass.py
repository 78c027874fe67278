"""NodeForward and NodeBackward: a relay spreads a chunk's rows inside the node, lets the experts run, returns the sums.

To the outer pass of a two-level layer it is the experts. Its exchanges run inside the node while those of the outer
pass, over the slow link, are under way; they are waited for where they are posted, and count as the experts' time.
The steps are those of schedule.build_inside, which the simulator prices too.
"""

from functools import cached_property
from typing import Any, Generic

import torch
from torch import Tensor

from tritonmoe.backends.ops import WeightGrads
from tritonmoe.config.layer import PerWeight
from tritonmoe.experts.tensors import CallTensors
from tritonmoe.overlap.executor import Actions, Execution
from tritonmoe.overlap.experts import BackwardExperts, Experts, MakeExperts
from tritonmoe.overlap.report import PassReport
from tritonmoe.overlap.row_exchanges import ArrivingMetadata, RowExchanges
from tritonmoe.overlap.schedule import build_inside
from tritonmoe.overlap.steps import Step, StepKind
from tritonmoe.transports import PendingExchange
from tritonmoe.transports.wire import WireFormat

__all__ = ["NodeBackward", "NodeForward"]


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


class NodeForward(_NodePass, Generic[Experts]):
    """What stands for the experts in a forward: see ForwardExperts. When made it spreads what came with the rows.

    Args:
        relayed: the rows x (R, D) that the outer level brought here, and what belongs to them.
        make_experts: makes the experts of the rows that came here inside the node.
    """

    rows: Tensor
    """(R', D): what the experts work on."""
    experts: Experts

    def __init__(
        self,
        exchanges: RowExchanges,
        num_local_slices: int,
        relayed: CallTensors[Tensor],
        make_experts: MakeExperts[Experts],
    ) -> None:
        super().__init__(exchanges, num_local_slices)
        self.relayed = relayed.x
        self.rows = relayed.x.new_empty(self.plan.num_received, relayed.x.shape[1])

        arriving: ArrivingMetadata

        def post() -> PendingExchange:
            nonlocal arriving
            pending, arriving = exchanges.send_metadata(relayed)
            return pending

        def group() -> None:
            received, places = exchanges.receive_metadata(arriving, relayed)
            self.experts = make_experts(self.plan, received._replace(x=self.rows), places)

        self.run(Step(StepKind.GROUP, None), {StepKind.NODE_METADATA: post, StepKind.GROUP: group}, self.rows.device)

    def forward(self, segment: int, out: Tensor | None = None) -> Tensor:
        """Return the weighted partial sums of the relayed rows of a segment, over the experts of this node."""
        inside = _Forward(self, out)
        self.run(self.step_of(StepKind.EXPERTS, segment), inside.actions(), self.rows.device)
        return inside.sums.result


class NodeBackward(_NodePass):
    """What stands for the experts in a backward: see BackwardExperts.

    Args:
        experts: those of this rank. rows: (R', D), what they worked on.
    """

    def __init__(self, exchanges: RowExchanges, num_local_slices: int, experts: BackwardExperts, rows: Tensor) -> None:
        super().__init__(exchanges, num_local_slices)
        self.experts = experts
        self._rows = rows

    @cached_property
    def dout_rows(self) -> Tensor:
        """(R', D): the gradients of the experts' outputs, made at the first use."""
        return torch.empty_like(self._rows)

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

    def __init__(self, node: NodeForward[Any], out: Tensor | None) -> None:
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
