"""ForwardPass and BackwardPass: the buffers of one layer call on one rank, and what every kind of step does to them."""

from collections.abc import Callable, Sequence
from typing import Generic

import torch
from torch import Tensor

from tritonmoe.backends.ops import WeightGrads
from tritonmoe.config.layer import PerWeight
from tritonmoe.dispatch.count_exchange import BackwardAgreement
from tritonmoe.dispatch.placement import ExpertPlacement, pack_replica_grads, sum_replica_grads
from tritonmoe.experts.tensors import CallTensors
from tritonmoe.overlap.copied_experts import BackwardWithCopies, ForwardWithCopies
from tritonmoe.overlap.copy_exchanges import CopyExchanges
from tritonmoe.overlap.executor import Actions, Execution
from tritonmoe.overlap.experts import BackwardExperts, Experts, MakeExperts
from tritonmoe.overlap.report import PassReport
from tritonmoe.overlap.row_exchanges import ArrivingMetadata, RowExchanges
from tritonmoe.overlap.schedule import build_backward, build_forward
from tritonmoe.overlap.steps import StepKind, Way
from tritonmoe.transports import PendingExchange
from tritonmoe.transports.wire import WireFormat

__all__ = ["BackwardPass", "ForwardPass"]


class ForwardPass(Generic[Experts]):
    """The forward of one layer call on one rank.

    Args:
        make_experts: makes the experts of the received rows, before any of them has arrived.
        tensors: x (T, D), and what belongs to its rows.
        fillers: the caller's work, as in expert_parallel_mlp.
        copies: how the weights of copied experts travel; None where there are none.
    """

    rows: Tensor
    """(R, D) received rows."""
    experts: Experts
    """The experts of the call, from the group step on."""
    received_weights: Tensor
    """(R, K) fp32, from the group step on."""
    wire_squares: Tensor | None = None
    """As in LayerReport."""
    _arriving: ArrivingMetadata

    def __init__(
        self,
        exchanges: RowExchanges,
        make_experts: MakeExperts[Experts],
        tensors: CallTensors[Tensor],
        fillers: Sequence[Callable[[], None]] = (),
        copies: CopyExchanges | None = None,
    ) -> None:
        self.exchanges, self.plan = exchanges, exchanges.plan
        self.make_experts, self.copies = make_experts, copies
        self.x, self.tensors = tensors.x, tensors
        self.fillers = fillers
        plan, x, width = self.plan, tensors.x, tensors.x.shape[1]
        self.rows = x if plan.is_identity else x.new_empty(plan.num_received, width)
        self.home = x.new_empty(plan.num_home, width)
        self.out = self.home if plan.is_identity else x.new_empty(x.shape[0], width)
        self.partials: dict[int, Tensor] = {}
        self.dispatch_wire = WireFormat(x.dtype, plan.overlap.wire_dtype)
        self.wire = exchanges.wire_after_dispatch(x.dtype)
        if not self.dispatch_wire.is_exact:
            self.wire_squares = torch.zeros(2, dtype=torch.float32, device=x.device)

    def run(self) -> tuple[Tensor, PassReport]:
        """Return y (T, D), and the timings."""
        return self.out, self.execution().run()

    def execution(self) -> Execution:
        """Return the steps, of which `out` is the result (T, D) once they have run."""
        relays_copies = self.copies is not None and self.copies.copies.are_relayed
        schedule = build_forward(
            self.plan.overlap, len(self.fillers), has_copies=self.copies is not None, relays_copies=relays_copies
        )
        return Execution(schedule, self.actions(), self.x.device, lambda: self.plan.call)

    def actions(self) -> Actions:
        return {
            **({} if self.copies is None else {**self.copies.actions(), StepKind.COPY_EXPERTS: self.copy_experts}),
            StepKind.METADATA: self.metadata,
            StepKind.DISPATCH: self.dispatch,
            StepKind.FILLER: self.filler,
            StepKind.GROUP: self.group,
            StepKind.EXPERTS: self.compute_experts,
            StepKind.COMBINE: self.combine,
            StepKind.REDUCE: self.reduce,
        }

    def metadata(self) -> PendingExchange:
        pending, self._arriving = self.exchanges.send_metadata(self.tensors)
        return pending

    def dispatch(self, chunk: int) -> PendingExchange:
        packed = self.exchanges.pack(self.x, chunk)
        return self.exchanges.send_chunk(packed, chunk, self.rows, self.dispatch_wire, self.wire_squares)

    def filler(self, number: int) -> None:
        self.fillers[number]()

    def group(self) -> None:
        plan = self.plan
        if not plan.is_identity:
            local = slice(plan.num_local)
            torch.index_select(self.x, 0, plan.tokens.home_tokens[local], out=self.rows[local])
        received, places = self.exchanges.receive_metadata(self._arriving, self.tensors)
        self.received_weights = received.topk_weights
        self.experts = self.make_experts(plan, received._replace(x=self.rows), places)

    def compute_experts(self, chunk: int) -> None:
        out = self.home[self.plan.home_slice(chunk)] if chunk < 0 else None
        self.partials[chunk] = self.experts.forward(self.plan.segment(chunk), out=out)

    def copy_experts(self, chunk: int) -> None:
        assert isinstance(self.experts, ForwardWithCopies)
        self.experts.add_copies(self.plan.segment(chunk), self.partials[chunk])

    def combine(self, chunk: int) -> PendingExchange:
        return self.exchanges.return_chunk(self.partials.pop(chunk), chunk, self.home, self.wire)

    def reduce(self, chunk: int) -> None:
        self.exchanges.sum_at_home(self.home, chunk, self.out)
        if self.copies is not None:
            self.copies.settle()


class BackwardPass:
    """The backward of one layer call on one rank.

    Args:
        experts, received_weights: those of the forward, or experts that go on from what it saved.
        sends_copies: where experts have copies, whether the weights of these travel once more.
        dout: (T, D), the gradient of the output. needs_weights: which weights need a gradient.
        placement: where replicas of experts are, whose gradients are summed.
    """

    dx: Tensor
    """(T, D), where some rank needs it."""
    dtopk_weights: Tensor
    """(T, K) fp32, where some rank needs it, from its reduce step on."""
    weight_grads: WeightGrads
    """This rank's, from the weight_grad step on."""
    replicas: ExpertPlacement
    """Where replicas are, if gradients are summed over them."""

    def __init__(
        self,
        exchanges: RowExchanges,
        experts: BackwardExperts,
        received_weights: Tensor,
        dout: Tensor,
        needs_weights: PerWeight[bool],
        placement: ExpertPlacement | None = None,
        sends_copies: bool = False,
    ) -> None:
        self.exchanges, self.plan = exchanges, exchanges.plan
        self.experts, self.dout, self.needs_weights = experts, dout, needs_weights
        self.copies = experts if isinstance(experts, BackwardWithCopies) else None
        self.sends_copies = sends_copies
        plan, width = self.plan, dout.shape[1]
        self.dout_rows = dout if plan.is_identity else dout.new_empty(plan.num_received, width)
        self.home = dout.new_empty(plan.num_home, width)
        if plan.needs_x:
            self.dx = self.home if plan.is_identity else dout.new_empty(dout.shape[0], width)
        self.dweights = torch.zeros_like(received_weights)
        self.packed: dict[int, Tensor] = {}
        self.partials: dict[int, Tensor] = {}
        self.wire = exchanges.wire_after_dispatch(dout.dtype)
        self.sums_replicas = False
        if placement is not None and placement.has_replicas and any(needs_weights):
            self.sums_replicas, self.replicas = True, placement

    def run(self, agreement: BackwardAgreement | None = None) -> tuple[CallTensors[Tensor | None], PassReport]:
        """Return the gradients, and the timings; agreement: as in execution()."""
        report = self.execution(agreement).run()
        return self.grads, report

    def execution(self, agreement: BackwardAgreement | None = None) -> Execution:
        """Return the steps, of which `grads` are the results once they have run.

        agreement: the exchange in which ranks agree on this backward, under way while the buffers are made and the
            first chunk's rows are packed; it ends here, before any row is posted.
        """
        plan = self.plan
        schedule = build_backward(
            plan.overlap,
            needs_x=plan.needs_x,
            needs_topk_weights=plan.needs_topk_weights,
            sums_replicas=self.sums_replicas,
            has_copies=self.copies is not None,
            sends_copies=self.sends_copies,
            relays_copies=self.copies is not None and self.copies.exchanges.copies.are_relayed,
            returned_copies=() if self.copies is None else self.copies.exchanges.returned,
        )
        if agreement is not None:
            if schedule[0].kind is StepKind.COMBINE_BACKWARD:
                self.packed[0] = self.exchanges.pack(self.dout, 0)
            agreement.wait()
        return Execution(schedule, self.actions(), self.dout.device, lambda: plan.call)

    @property
    def grads(self) -> CallTensors[Tensor | None]:
        """The gradients: of x (T, D) and topk_weights (T, K), in fp32, where some rank needs them, and of weights."""
        dx = self.dx if self.plan.needs_x else None
        dtopk_weights = self.dtopk_weights if self.plan.needs_topk_weights else None
        return CallTensors(dx, None, dtopk_weights, self.weight_grads)

    def actions(self) -> Actions:
        of_copies = {} if self.copies is None else self._actions_of_copies(self.copies)
        return {
            **of_copies,
            StepKind.COMBINE_BACKWARD: self.combine_backward,
            StepKind.EXPERTS_BACKWARD: self.experts_backward,
            StepKind.DISPATCH_BACKWARD: self.dispatch_backward,
            StepKind.ROUTING_BACKWARD: self.routing_backward,
            StepKind.WEIGHT_GRAD: self.weight_grad,
            StepKind.REDUCE_BACKWARD: self.reduce_backward,
            StepKind.REDUCE_ROUTING_BACKWARD: self.reduce_routing_backward,
            StepKind.REPLICA_BACKWARD: self.replica_backward,
            StepKind.REDUCE_REPLICA_BACKWARD: self.reduce_replica_backward,
        }

    def _actions_of_copies(self, copies: BackwardWithCopies) -> Actions:
        def copy_experts_backward(chunk: int) -> None:
            place = self.plan.home_slice(chunk) if chunk < 0 else self.plan.return_slice(chunk)
            dx = None if not self.plan.needs_x else self.home[place] if chunk < 0 else self.partials[chunk]
            copies.add_copies_backward(self.plan.segment(chunk), self.dout_rows, dx, self.dweights[place])

        return {
            **copies.exchanges.actions(),
            StepKind.COPY_EXPERTS_BACKWARD: copy_experts_backward,
            StepKind.COPY_WEIGHT_GRAD: lambda part: copies.copy_weight_grad(part, self.dout_rows),
            StepKind.COPIES_BACKWARD: copies.return_copies,
            StepKind.REDUCE_COPIES_BACKWARD: lambda part: copies.add_copies(part, self.weight_grads),
        }

    def combine_backward(self, chunk: int) -> PendingExchange:
        packed = self.packed.pop(chunk) if chunk in self.packed else self.exchanges.pack(self.dout, chunk)
        return self.exchanges.send_chunk(packed, chunk, self.dout_rows, self.wire)

    def experts_backward(self, chunk: int) -> None:
        plan, segment = self.plan, self.plan.segment(chunk)
        if chunk < 0:
            self._local_experts_backward(segment, plan.home_slice(chunk))
            return
        returned = plan.return_slice(chunk)
        partial, self.dweights[returned] = self.experts.backward(segment, self.dout_rows, plan.needs_x)
        if partial is not None:
            self.partials[chunk] = partial

    def _local_experts_backward(self, segment: int, stays: slice) -> None:
        """Compute the gradients of rows that stay: where they lie at home they lie in the receive buffer too."""
        plan = self.plan
        if not plan.is_identity:
            torch.index_select(self.dout, 0, plan.tokens.home_tokens[stays], out=self.dout_rows[stays])
        out = self.home[stays] if plan.needs_x else None
        _, self.dweights[stays] = self.experts.backward(segment, self.dout_rows, plan.needs_x, out=out)

    def dispatch_backward(self, chunk: int) -> PendingExchange:
        return self.exchanges.return_chunk(self.partials.pop(chunk), chunk, self.home, self.wire)

    def routing_backward(self) -> PendingExchange:
        plan, dweights = self.plan, self.dweights
        self.dweights_home = dweights.new_empty(plan.num_home, dweights.shape[1])
        self.dweights_home[: plan.num_local] = dweights[: plan.num_local]
        pending, self.arriving_dweights = self.exchanges.exchange_all(
            dweights.index_select(0, plan.return_order()), Way.HOME
        )
        return pending

    def weight_grad(self) -> None:
        self.weight_grads = self.experts.weight_grad(self.dout_rows, self.needs_weights)

    def reduce_backward(self, chunk: int) -> None:
        self.exchanges.sum_at_home(self.home, chunk, self.dx)

    def reduce_routing_backward(self) -> None:
        self.dweights_home[self.plan.home_order()] = self.arriving_dweights
        # Every pair is computed by one rank only: the other ranks' terms are zero.
        self.dtopk_weights = self.exchanges.gather_sum(self.dweights_home, self.plan.tokens.home_index)

    def replica_backward(self) -> PendingExchange:
        packed, splits = pack_replica_grads(self.weight_grads, self.replicas, self.plan.rank)
        self.arriving_grads = torch.empty_like(packed)
        return self.exchanges.transport.exchange(packed, splits, splits, self.arriving_grads)

    def reduce_replica_backward(self) -> None:
        self.weight_grads = sum_replica_grads(self.weight_grads, self.arriving_grads, self.replicas, self.plan.rank)
