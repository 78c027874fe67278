"""Capacity: the plan of a call whose rows leave before their counts reach the host, and are run again without room."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from tritonmoe.dispatch.capacity import plan_capped_tokens, poison, post_flag, some_rank_overflowed, watched
from tritonmoe.dispatch.header import CallHeader
from tritonmoe.dispatch.plan import exchange_plan
from tritonmoe.expert_parallel.call import ProposedCall
from tritonmoe.expert_parallel.plans.base import BackwardExperts, ForwardExperts, Kept, PlanKind, PlannedCall
from tritonmoe.expert_parallel.plans.plain import OwnBackward, OwnExperts, Plain, planned_call
from tritonmoe.experts.backward_run import BackwardRun
from tritonmoe.experts.tensors import CallTensors
from tritonmoe.overlap.report import PassReport
from tritonmoe.runtime.host_device import HostCopy
from tritonmoe.transports import PendingExchange

__all__ = ["Capacity"]


@dataclass(eq=False)
class Capacity(PlanKind):
    """A call with the room of OverlapPlan.capacity, which reads no device; whether all fits is known behind the call.

    In a CUDA graph that is told on the device, beside the rows.
    """

    name = "capacity"

    num_segments: int
    flags: HostCopy | None = None
    """Two numbers on their way to the host: whether something didn't fit (0 or 1), and how many tokens have scores that
    are not finite. None in a CUDA graph, where nothing can be read."""
    flag: PendingExchange | None = None
    """In a CUDA graph: every rank's flag, under way while the rows are."""
    is_wrong: Tensor | None = None
    """(1,) bool on the device, once the flags are here: whether the results are to be NaN."""

    @classmethod
    def takes(cls, call: ProposedCall) -> bool:
        if call.spec.overlap.capacity is None and call.is_captured:
            raise ValueError(
                "a CUDA graph can't capture an expert-parallel call that waits for its counts: give OverlapConfig a "
                "capacity, or leave these layers out of the graph"
            )
        return call.spec.overlap.capacity is not None

    @classmethod
    def plan(cls, call: ProposedCall, header: CallHeader, others: Sequence[type[PlanKind]]) -> PlannedCall:
        transport = call.transport
        ids, overlap, num_nonfinite_rows = call.tensors.topk_ids, call.overlap, call.num_nonfinite_rows
        tokens, overflows = plan_capped_tokens(ids, call.num_slots, transport.rank, transport.size, overlap)
        kind = cls(overlap.num_segments)
        if not call.is_captured:
            kind.flags = HostCopy(overflows, num_nonfinite_rows)
        plan = exchange_plan(transport, header, tokens, overlap)
        if call.is_captured:
            kind.flag = post_flag(transport, overflows | (num_nonfinite_rows > 0))
        return planned_call(call, kind, header, plan)

    def forward_experts(self, call: PlannedCall, tensors: CallTensors[Tensor], keep_hidden: bool) -> ForwardExperts:
        return _Forward(call, tensors, keep_hidden, self)

    def backward_experts(self, call: PlannedCall, kept: Kept) -> BackwardExperts:
        return _Backward(kept.run(call.settings), self)

    def plan_again(self, call: ProposedCall, planned: PlannedCall) -> PlannedCall | None:
        if self.is_wrong is not None:
            call.state.captured_flags.append(watched(self.is_wrong))
        flags = self.flags
        if flags is None or not some_rank_overflowed(call.transport, planned.header, self.num_segments, flags):
            return None
        entered_at = time.perf_counter()
        call.overlap = replace(planned.report.overlap, capacity=None)
        again = Plain.plan(call, planned.header)
        again.entered_at, again.first_run = entered_at, planned.report
        return again


class _Forward(OwnExperts):
    def __init__(self, call: PlannedCall, tensors: CallTensors[Tensor], keep_hidden: bool, capacity: Capacity) -> None:
        super().__init__(call, tensors, keep_hidden)
        self._capacity = capacity

    def end(self, out: Tensor, timings: PassReport) -> None:
        super().end(out, timings)
        capacity = self._capacity
        if capacity.flag is not None:
            capacity.is_wrong = capacity.flag.wait().any().view(1)
            poison([out], capacity.is_wrong)


class _Backward(OwnBackward):
    def __init__(self, run: BackwardRun, capacity: Capacity) -> None:
        super().__init__(run)
        self._capacity = capacity

    def end(self, grads: CallTensors[Tensor | None], timings: PassReport) -> CallTensors[Tensor | None]:
        grads = super().end(grads, timings)
        if self._capacity.is_wrong is not None:
            poison([*grads.flatten(), *(self._run.main_grads or ())], self._capacity.is_wrong)
        return grads
