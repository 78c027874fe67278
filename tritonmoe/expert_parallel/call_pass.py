"""CallForward and CallBackward: the two passes of one expert-parallel call on one rank, once its plan is known.

Whoever makes these, an autograd Function or an operator, saves the tensors.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import partial
from typing import Generic, NamedTuple, TypeVar, cast

from torch import Tensor

from tritonmoe.config.activations import is_fused
from tritonmoe.config.layer import NO_WEIGHTS, PerWeight
from tritonmoe.dispatch.capacity import poison
from tritonmoe.dispatch.copies import ExpertCopies
from tritonmoe.dispatch.count_exchange import post_backward
from tritonmoe.dispatch.header import CallHeader
from tritonmoe.dispatch.placement import replica_bits
from tritonmoe.dispatch.plan import DispatchPlan
from tritonmoe.expert_parallel.agreed_call import AgreedCall
from tritonmoe.expert_parallel.listeners import listeners
from tritonmoe.expert_parallel.state import state_of
from tritonmoe.experts.arguments import find_main_grads
from tritonmoe.experts.backward_run import BackwardRun
from tritonmoe.experts.callable_activation import ActivationGraph
from tritonmoe.experts.forward_run import ForwardRun
from tritonmoe.experts.tensors import NO_TENSORS, CallTensors
from tritonmoe.experts.weight_gradients import SharedWeightGrads
from tritonmoe.grouping import Grouping
from tritonmoe.overlap.copied_experts import BackwardWithCopies, ForwardWithCopies
from tritonmoe.overlap.copy_exchanges import expert_bytes, gradient_bytes
from tritonmoe.overlap.executor import Execution
from tritonmoe.overlap.experts import ForwardExperts
from tritonmoe.overlap.layer_pass import BackwardPass, ForwardPass
from tritonmoe.overlap.relayed_copies import copy_exchanges
from tritonmoe.overlap.report import CallMarks, LayerReport, PassReport
from tritonmoe.overlap.row_exchanges import RowExchanges
from tritonmoe.runtime.autograd import checkpointed_region, is_recomputing
from tritonmoe.runtime.host_device import is_captured

__all__ = ["CallBackward", "CallForward", "Kept"]

Result = TypeVar("Result")
NOT_SAVED = cast(PerWeight[Tensor], NO_WEIGHTS)


class Kept(NamedTuple):
    """What a backward needs of its forward; the tensors are put there once autograd, which saves them, gives them."""

    plan: DispatchPlan
    inner_plan: DispatchPlan | None
    grouping: Grouping
    activation_graphs: Mapping[int, ActivationGraph]
    report: LayerReport
    copies: ExpertCopies | None = None
    copy_grouping: Grouping | None = None
    """Of the pairs of this rank's copies; None where there are none."""
    received: CallTensors[Tensor] = NO_TENSORS
    """Of the R rows that this rank's experts worked on: x (R, D), topk_weights (R, K) fp32; without topk_ids."""
    h: Tensor | None = None
    copy_h: Tensor | None = None
    """Of the pairs of this rank's copies."""
    copy_weights: PerWeight[Tensor] = NOT_SAVED
    """Of these copies; None where a backward has them sent again."""


class _CallPass(ABC, Generic[Result]):
    """One pass: run() does all of it, or begin(), compute() and end() a part each, so that other work runs between."""

    _execution: Execution

    def __init__(self, call: AgreedCall) -> None:
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
            timings = self._execution.end()
        return self._finish(timings)

    @abstractmethod
    def _start(self) -> Execution:
        """Make the buffers, and return the steps."""

    @abstractmethod
    def _finish(self, timings: PassReport) -> Result:
        """Return the result once the steps have run."""


class CallForward(_CallPass[Tensor]):
    """The forward of a call, whose result is out (T, D)."""

    experts: ForwardRun
    """This rank's, of which a backward saves tensors."""
    copies: ForwardRun | None = None
    """Its copies of other ranks' experts, which have pairs in this call."""
    kept: Kept
    """Without tensors."""
    _pass: ForwardPass[ForwardExperts]

    def __init__(self, call: AgreedCall, tensors: CallTensors[Tensor]) -> None:
        super().__init__(call)
        self._tensors = tensors

    def _start(self) -> Execution:
        call, spec = self.call, self.call.settings.spec
        keep_hidden = call.plan.needs_any and (spec.save == "hidden" or not is_fused(spec.activation))
        exchanges = RowExchanges(call.plan, call.transport, call.settings.ops.gather_sum)
        copies = None
        make_experts = call.make_experts(partial(call.own_experts, self._tensors, keep_hidden))
        if call.copies is not None:
            weights = self._tensors.weights
            copies = copy_exchanges(call.copies, call.transport, weights, call.plan)
            make_experts = partial(call.experts_with_copies, self._tensors, keep_hidden, copies)
        self._pass = ForwardPass(exchanges, make_experts, self._tensors, call.fillers, copies)
        call.fillers = ()  # what they hold is for autograd alone to keep
        return self._pass.execution()

    @property
    def saved_of_copies(self) -> tuple[Tensor | None, PerWeight[Tensor]]:
        """copy_h and copy_weights of Kept."""
        if self.copies is None:
            return None, NOT_SAVED
        return self.copies.h, self.copies.weights if self.call.plan.keeps_copies else NOT_SAVED

    def _finish(self, timings: PassReport) -> Tensor:
        call, plan, out = self.call, self.call.plan, self._pass.out
        experts = self._pass.experts
        if isinstance(experts, ForwardWithCopies):
            self.copies, experts = experts.copies, experts.own
        self.experts, inner_plan = call.after_forward(experts, timings)
        timings.marks = None if plan.count_times is None else CallMarks(call.entered_at, *plan.count_times)
        call.report = self._report(timings)
        for listener in listeners:
            listener.after_forward(call.all_ranks, call.header, call.report, self.experts.grouping)
        if call.flag is not None:
            call.is_wrong = call.flag.wait().any().view(1)
            poison([out], call.is_wrong)
        # No backward goes through the graphs of a forward that will be recomputed.
        is_first = checkpointed_region() is not None and not is_recomputing()
        graphs = {} if is_first else self.experts.activation_graphs
        copy_grouping = None if self.copies is None else self.copies.grouping
        grouping = self.experts.grouping
        self.kept = Kept(plan, inner_plan, grouping, graphs, call.report, call.copies, copy_grouping)
        return out

    def _report(self, timings: PassReport) -> LayerReport:
        call, plan, layer_pass = self.call, self.call.plan, self._pass
        weights, width = self._tensors.weights, self._tensors.x.shape[1]
        copied_bytes, copied_gradient_bytes = 0, (0, 0)
        if call.copies is not None:
            copied_bytes = expert_bytes(weights)
            copied_gradient_bytes = gradient_bytes(weights, plan.needs_weights, plan.has_wide_grads)
        return LayerReport(
            rank=call.all_ranks.rank,
            traffic_rows=plan.traffic,
            traffic_pairs=plan.traffic_pairs,
            row_bytes=layer_pass.dispatch_wire.row_bytes(width),
            other_row_bytes=layer_pass.wire.row_bytes(width),
            overlap=plan.overlap,
            top_k=self._tensors.topk_ids.shape[1],
            send_offsets=plan.send_offsets,
            return_offsets=plan.return_offsets,
            pair_offsets=call.pair_offsets,
            forward=timings,
            wire_squares=layer_pass.wire_squares,
            first_run=call.first_run,
            rows_to_nodes=call.rows_to_nodes,
            copies=call.copies,
            copied_bytes=copied_bytes,
            copied_gradient_bytes=copied_gradient_bytes,
            copy_pair_offsets=plan.copy_pair_offsets,
            copies_are_kept=call.copies is None or plan.keeps_copies,
            pairs_without_copies=call.pairs_without_copies,
            balance=call.balance,
        )


class CallBackward(_CallPass[CallTensors[Tensor | None]]):
    """The backward of a call. When made it tells the other ranks which one it is.

    Its results are the gradients: those of x and topk_weights where any rank needs them, that of topk_weights in fp32.

    Args:
        dout: (T, D), the gradient of the call's result. shared_grads: as in BackwardRun.
    Raises:
        CountMismatch: the ranks don't all run this backward. TransportError: an exchange failed or timed out.
        ValueError: a CUDA graph captures the backward and has not captured the forward.
    """

    def __init__(
        self,
        call: AgreedCall,
        kept: Kept,
        dout: Tensor,
        needs_weights: PerWeight[bool],
        shared_grads: SharedWeightGrads | None = None,
    ) -> None:
        super().__init__(call)
        self._entered_at = time.perf_counter()
        if is_captured(dout.device) and not call.header.captured:
            raise ValueError(
                "a CUDA graph captures the backward of an expert-parallel call, but not its forward: a replay would "
                "repeat the exchanges of that one call. Capture both, or neither"
            )
        self._kept, self._dout, self._needs_weights = kept, dout, needs_weights
        self._state = state_of(call.all_ranks)  # not the forward's: the transport may have been rebuilt since
        header = CallHeader(
            sequence=call.header.sequence,
            layer=call.header.layer,
            copy=call.header.copy,
            is_backward=1,
            terms=call.header.terms,
            replica_grads=replica_bits(call.placement, needs_weights),
            **self._state.history(),
        )
        self._agreement = post_backward(call.all_ranks, header)
        main_grads = None if call.owners is None else find_main_grads(call.owners)
        self._run = BackwardRun(
            call.settings, kept.received, kept.grouping, kept.h, kept.activation_graphs, main_grads, shared_grads
        )

    def _start(self) -> Execution:
        call, plan = self.call, self._kept.plan
        exchanges = RowExchanges(plan, call.transport, call.settings.ops.gather_sum)
        self._experts, received_weights = call.experts_of_backward(self._run, plan, self._kept.inner_plan)
        sends_copies = False
        if self._kept.copies is not None:
            self._experts, sends_copies = self._with_copies(self._kept.copies), not plan.keeps_copies
        self._pass = BackwardPass(
            exchanges, self._experts, received_weights, self._dout, self._needs_weights, call.placement, sends_copies
        )
        return self._pass.execution(self._agreement)

    def _with_copies(self, copies: ExpertCopies) -> BackwardWithCopies:
        """Return what computes the backward of this rank's own experts and of its copies."""
        call, kept = self.call, self._kept
        exchanges = copy_exchanges(copies, call.transport, kept.received.weights, kept.plan)

        def make_copies() -> BackwardRun:
            assert kept.copy_grouping is not None
            weights = kept.copy_weights if kept.plan.keeps_copies else exchanges.weights
            received = kept.received._replace(weights=weights)
            return BackwardRun(call.settings, received, kept.copy_grouping, kept.copy_h)

        return BackwardWithCopies(self._run, make_copies, kept.plan, exchanges)

    def _finish(self, timings: PassReport) -> CallTensors[Tensor | None]:
        call, kept, run = self.call, self._kept, self._run
        self._state.note_backward(call.header.sequence)
        call.after_backward(self._experts, timings)
        times = None if self._agreement is None else self._agreement.times
        timings.marks = None if times is None else CallMarks(self._entered_at, *times)
        kept.report.backward = timings
        if call.report.overlap == kept.report.overlap:  # else it says nothing about the plan of the first forward
            call.report.backward = timings
        for listener in listeners:
            listener.after_backward(call.all_ranks, call.header, kept.report)
        grads = self._pass.grads._replace(activation_parameters=run.activation_grads)
        if call.is_wrong is not None:
            poison([*grads.flatten(), *(run.main_grads or ())], call.is_wrong)
        return grads
