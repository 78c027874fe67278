"""ForwardPass and BackwardPass: the two passes of one planned call on one rank, and what every kind of step does.

Whoever makes these, an autograd Function or an operator, saves the tensors.
"""

import time
from abc import ABC, abstractmethod
from functools import partial
from typing import Generic, TypeVar

import torch
from torch import Tensor

from tritonmoe.config.activations import is_fused
from tritonmoe.config.layer import PerWeight
from tritonmoe.dispatch.count_exchange import BackwardAgreement, post_backward
from tritonmoe.dispatch.header import CallHeader
from tritonmoe.dispatch.placement import ExpertPlacement, pack_replica_grads, replica_bits, sum_replica_grads
from tritonmoe.expert_parallel.call import listeners
from tritonmoe.expert_parallel.plans.base import BackwardExperts, ForwardExperts, Kept, PlannedCall
from tritonmoe.expert_parallel.state import state_of
from tritonmoe.experts.arguments import find_main_grads
from tritonmoe.experts.tensors import CallTensors
from tritonmoe.experts.weight_gradients import SharedWeightGrads, rows_to_save
from tritonmoe.ops.backends.ops import WeightGrads
from tritonmoe.overlap.executor import Actions, Execution
from tritonmoe.overlap.report import LayerReport, PassReport
from tritonmoe.overlap.row_exchanges import RowExchanges, SentRows
from tritonmoe.overlap.schedule import build_fetch
from tritonmoe.overlap.steps import StepKind, Way
from tritonmoe.runtime.autograd import checkpointed_region, is_recomputing
from tritonmoe.runtime.host_device import is_captured
from tritonmoe.transports import PendingExchange
from tritonmoe.transports.wire import NUM_ROUNDING_SUMS, choose_wires

__all__ = ["BackwardPass", "ForwardPass", "post_agreement"]

Result = TypeVar("Result")


class _LayerPass(ABC, Generic[Result]):
    """One pass: run() does all of it, or begin(), compute() and end() a part each, so that other work runs between."""

    _execution: Execution

    def __init__(self, call: PlannedCall) -> None:
        self.call = call

    def run(self) -> Result:
        with self.call.in_the_middle():
            timings = self._start().run()
        return self._finish(timings)

    def begin(self) -> None:
        """Post the exchanges that need no other step."""
        with self.call.in_the_middle():
            self._execution = self._start()
            self._execution.begin()

    def compute(self) -> None:
        """Compute, and post all other exchanges."""
        with self.call.in_the_middle():
            self._execution.compute()

    def end(self) -> Result:
        """Sum what these bring, and give the result."""
        with self.call.in_the_middle():
            timings = self._ended()
        return self._finish(timings)

    def _ended(self) -> PassReport:
        """Run the last steps; the pass lets go of them, which hold its methods, and so all of its buffers."""
        execution = self._execution
        del self._execution
        return execution.end()

    @abstractmethod
    def _start(self) -> Execution:
        """Make the buffers, and return the steps."""

    @abstractmethod
    def _finish(self, timings: PassReport) -> Result:
        """Return the result once the steps have run."""


class ForwardPass(_LayerPass[Tensor]):
    """The forward of a call, whose result is out (T, D); tensors: x (T, D), and what belongs to its rows."""

    experts: ForwardExperts
    """What computes the received rows."""
    rows: SentRows
    """x, on its way to the experts."""
    wire_sums: Tensor | None = None
    """As in LayerReport."""
    sums_sent: Tensor | None = None
    """The same, where the exchange rounds rows and adds them."""

    def __init__(self, call: PlannedCall, tensors: CallTensors[Tensor]) -> None:
        super().__init__(call)
        self.plan, self.tensors, self.x = call.plan, tensors, tensors.x
        self.exchanges = RowExchanges(call.plan, call.transport, call.settings.ops.gather_sum)

    def begin_fetch(self) -> None:
        """Post the exchanges that bring the received rows once more, of which the forward has kept none."""
        with self.call.in_the_middle():
            self._receive(keep_hidden=False)
            schedule, device = build_fetch(self.plan.overlap), self.x.device
            self._execution = Execution(schedule, self._actions(), device, lambda: self.plan.call)
            self._execution.begin()

    def end_fetch(self) -> Kept:
        """Wait for these, and return what a backward needs."""
        with self.call.in_the_middle():
            fetched = self._ended()
        run = self.experts.own
        rows = run.tensors._replace(x=run.rows)
        return Kept(self.plan, run.grouping, {}, self.call.report, received=rows, fetched=fetched)

    def _receive(self, keep_hidden: bool) -> None:
        """Make what receives rows, and what computes them."""
        call, plan, x = self.call, self.plan, self.x
        self.experts = call.kind.forward_experts(call, self.tensors, keep_hidden)
        self.wires = choose_wires(x.dtype, plan.overlap.wire_dtype, call.settings.spec.precision)
        self.rows = SentRows(self.exchanges, x, self.wires.dispatch)

    def _start(self) -> Execution:
        call, plan, x, width = self.call, self.plan, self.x, self.x.shape[1]
        spec = call.settings.spec
        saves_hidden = spec.save == "hidden" and call.keeps == "hidden"
        self._receive(keep_hidden=plan.needs_any and (saves_hidden or not is_fused(spec.activation)))
        self.fillers, call.fillers = call.fillers, ()  # what they hold is for autograd alone to keep
        self.home = x.new_empty(plan.num_home, width)
        self.out = self.home if plan.is_identity else x.new_empty(x.shape[0], width)
        self.partials: dict[int, Tensor] = {}
        if spec.precision is not None:  # encoded here, and the same wherever it goes
            self.wire_sums = self.wires.dispatch.rounding_sums(x, self.rows.sent)
        elif not self.wires.dispatch.is_plain:
            self.sums_sent = self.wire_sums = x.new_zeros(NUM_ROUNDING_SUMS, dtype=torch.float64)
        schedule = self.experts.schedule(plan, len(self.fillers))
        return Execution(schedule, self._actions(), x.device, lambda: plan.call)

    def rows_to_keep(self, needs_weights: PerWeight[bool]) -> Tensor:
        """Return the received rows as the backward keeps them, which reads them for some gradients alone."""
        run = self.experts.own
        computes_h = is_fused(run.settings.spec.activation) and run.h is None
        needs_gate_up = needs_weights.gate_up_proj or self.experts.needs_rows
        rows = rows_to_save(run.rows, run.weights, needs_gate_up, computes_h=computes_h)
        if run.settings.spec.precision is None or rows is not run.rows:
            return rows
        # Codes and scales have all bits of the rows.
        return self.rows.arrived if rows is self.rows.received else self.wires.dispatch.encode(rows)

    def _actions(self) -> Actions:
        return {
            **self.experts.actions(self),
            StepKind.METADATA: partial(self.exchanges.send_metadata, self.tensors),
            StepKind.DISPATCH: self.dispatch,
            StepKind.FILLER: self.filler,
            StepKind.GROUP: self.group,
            StepKind.EXPERTS: self.compute_experts,
            StepKind.COMBINE: self.combine,
            StepKind.REDUCE: self.reduce,
        }

    def dispatch(self, chunk: int) -> PendingExchange:
        return self.rows.send(chunk, self.sums_sent)

    def filler(self, number: int) -> None:
        self.fillers[number]()

    def group(self) -> None:
        plan = self.plan
        self.rows.keep_home(slice(plan.num_local))
        received, places = self.exchanges.receive_metadata(self.tensors)
        self.experts.group(plan, received._replace(x=self.rows.received), places)

    def compute_experts(self, chunk: int) -> None:
        out = self.home[self.plan.home_slice(chunk)] if chunk < 0 else None
        self.rows.decode(self.plan.home_slice(chunk) if chunk < 0 else self.plan.receive_slice(chunk))
        self.partials[chunk] = self.experts.forward(self.plan.segment(chunk), out=out)

    def combine(self, chunk: int) -> PendingExchange:
        return self.exchanges.return_chunk(self.partials.pop(chunk), chunk, self.home, self.wires.sums)

    def reduce(self, chunk: int) -> None:
        self.exchanges.sum_at_home(self.home, chunk, self.out)
        self.experts.settle()

    def _finish(self, timings: PassReport) -> Tensor:
        call, experts = self.call, self.experts
        experts.end(self.out, timings)
        marks = self.plan.marks
        timings.marks = None if marks is None else marks._replace(entered=call.entered_at)
        call.report = self._report(timings)
        call.kind.report(call, call.report)
        for listener in listeners:
            listener.after_forward(call.all_ranks, call.header, call.report, experts.own.grouping)
        return self.out

    @property
    def kept(self) -> Kept:
        """What the backward needs, without tensors."""
        run = self.experts.own
        # No backward goes through the graphs of a forward that will be recomputed.
        is_first = checkpointed_region() is not None and not is_recomputing()
        graphs = {} if is_first else run.activation_graphs
        of_kind, _ = self.experts.kept()
        return Kept(self.plan, run.grouping, graphs, self.call.report, of_kind)

    def _report(self, timings: PassReport) -> LayerReport:
        plan = self.plan
        row_bytes, gradient_row_bytes, other_row_bytes = self.wires.row_bytes(self.x.shape[1])
        return LayerReport(
            rank=self.call.all_ranks.rank,
            traffic_rows=plan.traffic,
            traffic_pairs=plan.traffic_pairs,
            row_bytes=row_bytes,
            gradient_row_bytes=gradient_row_bytes,
            other_row_bytes=other_row_bytes,
            overlap=plan.overlap,
            top_k=self.tensors.topk_ids.shape[1],
            send_offsets=plan.send_offsets,
            return_offsets=plan.return_offsets,
            pair_offsets=plan.pair_offsets,
            forward=timings,
            wire_sums=self.wire_sums,
            first_run=self.call.first_run,
            keeps=self.call.keeps,
            part=self.call.part,
        )


def post_agreement(call: PlannedCall, needs_weights: PerWeight[bool], entered_at: float) -> BackwardAgreement | None:
    """Post the exchange in which ranks compare their backwards, before any row of them moves; None on one rank.

    entered_at: when this rank came to the backward: time.perf_counter().
    """
    header = CallHeader(
        sequence=call.header.sequence,
        layer=call.header.layer,
        copy=call.header.copy,
        is_backward=1,
        settings=call.header.settings,
        replica_grads=replica_bits(call.placement, needs_weights),
        # not the forward's state: the transport may have been rebuilt since
        **state_of(call.all_ranks).history(),
    )
    return post_backward(call.all_ranks, header, entered_at)


class BackwardPass(_LayerPass[CallTensors[Tensor | None]]):
    """The backward of a call. When made it tells the other ranks which one it is.

    Its results are the gradients: those of x and topk_weights where any rank needs them, that of topk_weights in fp32.

    Args:
        dout: (T, D), the gradient of the call's result. needs_weights: which weights need a gradient.
        shared_grads: as in BackwardRun. sums: where the gradients of weights are added, instead of a main_grad of each.
        agreement: post_agreement() of this backward; None to post it here.
    Raises:
        CountMismatch: the ranks don't all run this backward. TransportError: an exchange failed or timed out.
        ValueError: a CUDA graph captures the backward and has not captured the forward.
    """

    experts: BackwardExperts
    """What computes the received rows."""
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
        call: PlannedCall,
        kept: Kept,
        dout: Tensor,
        needs_weights: PerWeight[bool],
        shared_grads: SharedWeightGrads | None = None,
        sums: PerWeight[Tensor | None] | None = None,
        agreement: BackwardAgreement | None = None,
    ) -> None:
        super().__init__(call)
        entered_at = time.perf_counter()
        if is_captured(dout.device) and not call.header.captured:
            raise ValueError(
                "a CUDA graph captures the backward of an expert-parallel call, but not its forward: a replay would "
                "repeat the exchanges of that one call. Capture both, or neither"
            )
        self.plan, self.needs_weights = kept.plan, needs_weights
        self.dout = dout
        self.exchanges = RowExchanges(kept.plan, call.transport, call.settings.ops.gather_sum)
        self._agreement = post_agreement(call, needs_weights, entered_at) if agreement is None else agreement
        if sums is None and call.owners is not None:
            sums = find_main_grads(call.owners)
        self.kept = kept._replace(main_grads=sums, shared_grads=shared_grads)

    def _start(self) -> Execution:
        call, plan, dout, width = self.call, self.plan, self.dout, self.dout.shape[1]
        self.wires = choose_wires(dout.dtype, plan.overlap.wire_dtype, call.settings.spec.precision)
        received = self.kept.received
        if received.x is not None and received.x.dtype == torch.uint8:
            rows = dout.new_empty(received.x.shape[0], width)
            self.wires.dispatch.decode(received.x, rows)
            self.kept = self.kept._replace(received=received._replace(x=rows))
        self.experts = call.kind.backward_experts(call, self.kept)
        self.sent = SentRows(self.exchanges, dout, self.wires.gradients)
        self.dout_rows = self.sent.received
        self.home = dout.new_empty(plan.num_home, width)
        if plan.needs_x:
            self.dx = self.home if plan.is_identity else dout.new_empty(dout.shape[0], width)
        self.dweights = dout.new_zeros(plan.num_received, call.header.top_k, dtype=torch.float32)
        self.packed: dict[int, Tensor] = {}
        self.partials: dict[int, Tensor] = {}
        placement, sums_replicas = call.placement, False
        if placement is not None and placement.has_replicas and any(self.needs_weights):
            sums_replicas, self.replicas = True, placement
        schedule = self.experts.schedule(plan, sums_replicas)
        if self._agreement is not None:
            # It is under way while buffers are made and the first rows packed, and ends before any row is posted.
            if schedule[0].kind is StepKind.COMBINE_BACKWARD:
                self.packed[0] = self.exchanges.pack(self.sent.sent, 0)
            if self._agreement.marks is None:
                self._agreement.wait()
        return Execution(schedule, self._actions(), dout.device, lambda: plan.call)

    def _actions(self) -> Actions:
        return {
            **self.experts.actions(self),
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

    def combine_backward(self, chunk: int) -> PendingExchange:
        return self.sent.send(chunk, packed=self.packed.pop(chunk, None))

    def experts_backward(self, chunk: int) -> None:
        plan, segment = self.plan, self.plan.segment(chunk)
        if chunk < 0:
            self._local_experts_backward(segment, plan.home_slice(chunk))
            return
        self.sent.decode(plan.receive_slice(chunk))
        returned = plan.return_slice(chunk)
        partial, self.dweights[returned] = self.experts.backward(segment, self.dout_rows, plan.needs_x)
        if partial is not None:
            self.partials[chunk] = partial

    def _local_experts_backward(self, segment: int, stays: slice) -> None:
        """Compute the gradients of rows that stay."""
        self.sent.keep_home(stays)
        self.sent.decode(stays)
        out = self.home[stays] if self.plan.needs_x else None
        _, self.dweights[stays] = self.experts.backward(segment, self.dout_rows, self.plan.needs_x, out=out)

    def dispatch_backward(self, chunk: int) -> PendingExchange:
        return self.exchanges.return_chunk(self.partials.pop(chunk), chunk, self.home, self.wires.sums)

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

    def _finish(self, timings: PassReport) -> CallTensors[Tensor | None]:
        call, kept = self.call, self.kept
        state_of(call.all_ranks).note_backward(call.header.sequence)
        if kept.fetched is not None:
            timings = PassReport.joined([kept.fetched, timings])
        timings.marks = None if self._agreement is None else self._agreement.marks
        grads = self.experts.end(self.grads, timings)
        kept.report.backward = timings
        if call.report.overlap == kept.report.overlap:  # else it says nothing about the plan of the first forward
            call.report.backward = timings
        for listener in listeners:
            listener.after_backward(call.all_ranks, call.header, kept.report)
        return grads

    @property
    def grads(self) -> CallTensors[Tensor | None]:
        """The gradients: of x (T, D) and topk_weights (T, K), in fp32, where some rank needs them, and of weights."""
        dx = self.dx if self.plan.needs_x else None
        dtopk_weights = self.dtopk_weights if self.plan.needs_topk_weights else None
        return CallTensors(dx, None, dtopk_weights, self.weight_grads)
