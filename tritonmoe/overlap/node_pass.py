"""NodePass: what a relay does with a chunk: spread its rows inside the node, let the experts run, bring the sums back.

To the outer pass of a two-level layer it is the experts. Its exchanges run inside the node while those of the outer
pass, over the slow link, are under way; they are waited for where they are posted, and count as the experts' time.
The steps are those of schedule.build_inside, which the simulator prices too.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tritonmoe.backends.ops import WeightGrads
from tritonmoe.dispatch.plan import DispatchPlan
from tritonmoe.overlap.executor import ExpertsPass, LayerPass, MakeExperts, execute
from tritonmoe.overlap.report import PassReport
from tritonmoe.overlap.schedule import Step, build_inside
from tritonmoe.transports import PendingExchange, Transport
from tritonmoe.transports.wire import WireFormat

__all__ = ["NodePass"]


@dataclass
class NodePass:
    """One layer call's inner level on one rank; see ExpertsPass for the calls. A chunk here is an outer segment."""

    plan: DispatchPlan
    """The inner plan: its tokens are the rows that this rank relays."""
    transport: Transport
    """Of the ranks of this node."""
    num_local_slices: int
    """How many of the segments are the outer plan's local ones."""
    gather_sum: Callable[..., Tensor]
    relayed: Tensor
    """(R, D) rows that the outer level brought here."""
    experts: ExpertsPass
    rows: Tensor
    """(R', D): what the experts work on."""
    dout_rows: Tensor | None = None
    """(R', D): the gradients of the experts' outputs."""
    reports: list[tuple[Step, PassReport]] = field(default_factory=list)
    """Of every step so far, what it did inside the node."""

    @classmethod
    def receive(
        cls,
        plan: DispatchPlan,
        transport: Transport,
        num_local_slices: int,
        gather_sum: Callable[..., Tensor],
        relayed: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        make_experts: MakeExperts,
    ) -> "NodePass":
        """Spread the ids (R, K) and weights (R, K) of the relayed rows inside the node, and make the experts."""
        rows = relayed.new_empty(plan.num_received, relayed.shape[1])
        inner = LayerPass(plan, transport, gather_sum, make_experts)
        metadata_in: list[list[Tensor]] = []
        made: list[NodePass] = []

        def metadata(_: int | None) -> PendingExchange:
            pending, metadata = inner.send_metadata(topk_ids, topk_weights)
            metadata_in.append(metadata)
            return pending

        def group(_: int | None) -> None:
            ids, weights, places = inner.receive_metadata(metadata_in[0], topk_ids.shape[1])
            experts = make_experts(plan, rows, ids, weights, places)
            made.append(cls(plan, transport, num_local_slices, gather_sum, relayed, experts, rows))

        step = Step("group", None, "compute")
        report = execute(build_inside(step, needs_x=True), {"node_metadata": metadata, "group": group}, rows.device)
        made[0].reports.append((step, report))
        return made[0]

    def forward(self, chunk: int, out: Tensor | None = None) -> Tensor:
        """Give the weighted partial sums of the relayed rows of `chunk`, over the experts of this node."""
        partials: list[Tensor] = []
        sums = _Sums(self, chunk)

        def experts(_: int | None) -> None:
            partials.append(self.experts.forward(chunk))

        actions = {
            "node_dispatch": lambda _: self._spread(self.relayed, chunk, self.rows),
            "experts": experts,
            "node_combine": lambda _: sums.post(partials.pop()),
            "node_reduce": lambda _: sums.take(out),
        }
        self._run("experts", chunk, actions)
        assert sums.result is not None
        return sums.result

    def backward(
        self, chunk: int, dout: Tensor, needs_dx: bool, out: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor]:
        """Give dx of the relayed rows of `chunk`, None unless needed, and the gradient of their topk_weights."""
        if self.dout_rows is None:
            self.dout_rows = torch.empty_like(self.rows)
        dout_rows = self.dout_rows
        grads: list[tuple[Tensor | None, Tensor]] = []
        dx, dweights = _Sums(self, chunk), _Sums(self, chunk)

        def experts(_: int | None) -> None:
            grads.append(self.experts.backward(chunk, dout_rows, needs_dx))

        actions = {
            "node_combine_backward": lambda _: self._spread(dout, chunk, dout_rows),
            "experts_backward": experts,
            "node_dispatch_backward": lambda _: dx.post(grads[0][0]),
            "node_reduce_backward": lambda _: dx.take(out),
            # Every pair is computed by one rank only: the other ranks' terms are zero.
            "node_routing_backward": lambda _: dweights.post(grads[0][1].to(torch.float32)),
            "node_reduce_routing_backward": lambda _: dweights.take(None),
        }
        self._run("experts_backward", chunk, actions, needs_dx)
        assert dweights.result is not None
        return dx.result, dweights.result

    def weight_grad(self, dout: Tensor, needs: tuple[bool, bool, bool, bool]) -> WeightGrads:
        """Give the gradients of this rank's experts."""
        assert self.dout_rows is not None
        return self.experts.weight_grad(self.dout_rows, needs)

    def layer_pass(self) -> LayerPass:
        return LayerPass(self.plan, self.transport, self.gather_sum, make_experts=None)

    def _run(
        self,
        kind: str,
        chunk: int,
        actions: Mapping[str, Callable[[int | None], PendingExchange | None]],
        needs_x: bool = True,
    ) -> None:
        step = Step(kind, chunk - self.num_local_slices, "compute")
        self.reports.append((step, execute(build_inside(step, needs_x=needs_x), actions, self.rows.device)))

    def _spread(self, relayed: Tensor, chunk: int, received: Tensor) -> PendingExchange:
        return self.layer_pass().send_chunk(relayed, chunk, received, WireFormat(relayed.dtype))


class _Sums:
    """One row per received row of a chunk on its way back to the relay, and its sum there, in rank order, in fp32."""

    def __init__(self, of: NodePass, chunk: int) -> None:
        self.of, self.chunk = of, chunk
        self.result: Tensor | None = None
        self._home: Tensor | None = None

    def post(self, partial: Tensor | None) -> PendingExchange:
        assert partial is not None
        self._home = partial.new_empty(self.of.plan.num_home, partial.shape[1])
        return self.of.layer_pass().return_chunk(partial, self.chunk, self._home, WireFormat(partial.dtype))

    def take(self, out: Tensor | None) -> None:
        plan = self.of.plan
        index = plan.tokens.home_index[plan.token_slice(self.chunk)]
        self.result, self._home = self.of.gather_sum(self._home, index, out=out), None
