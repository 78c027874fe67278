"""What stands in for a layer's experts while its communication is measured: experts that compute nothing, or sleep."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, Protocol
from unittest.mock import patch

import torch
from torch import Tensor

from tritonmoe.config.layer import NO_WEIGHTS, PerWeight
from tritonmoe.config.overlap import OverlapPlan
from tritonmoe.dispatch.call_settings import CallSettings, plan_settings
from tritonmoe.dispatch.expert_chunks import RowPlaces
from tritonmoe.dispatch.header import CallHeader
from tritonmoe.dispatch.plan import DispatchPlan, exchange_plan
from tritonmoe.dispatch.send_plan import plan_tokens
from tritonmoe.expert_parallel.call import ProposedCall
from tritonmoe.expert_parallel.layer_pass import BackwardPass, ForwardPass
from tritonmoe.expert_parallel.plans.base import BackwardExperts, ForwardExperts, Kept, PlanKind, PlannedCall
from tritonmoe.experts.backward_run import BackwardRun
from tritonmoe.experts.forward_run import ForwardRun
from tritonmoe.experts.spec import ExpertSettings, ExpertSpec
from tritonmoe.experts.tensors import NO_TENSORS, CallTensors
from tritonmoe.ops.backends import choose
from tritonmoe.ops.backends.ops import CalledLayer, WeightGrads
from tritonmoe.overlap.report import PassReport
from tritonmoe.transports import Transport

__all__ = ["FixedExperts", "run_passes", "sleeping_experts"]


class StandIn(Protocol):
    """What stands in for the experts of one call; the methods are those of ForwardExperts and BackwardExperts."""

    def forward(self, segment: int, out: Tensor | None = None) -> Tensor: ...

    def backward(
        self, segment: int, dout: Tensor, needs_dx: bool, out: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor]: ...

    def weight_grad(self, dout: Tensor, needs: PerWeight[bool]) -> WeightGrads: ...


MakeStandIn = Callable[[Tensor, DispatchPlan], StandIn]
"""(rows (R, D), the plan) -> the experts of one call."""


class FixedExperts:
    """Experts that take a given time for all rows of a call, each row its share, and compute nothing.

    Args:
        total_s: seconds of a forward; a backward takes no time.
        row_offsets: where each segment starts in `rows`, and its end.
    """

    def __init__(self, total_s: float, row_offsets: tuple[int, ...], rows: Tensor, top_k: int) -> None:
        self.total_s = total_s
        self.row_offsets = row_offsets
        self.rows = rows
        self.top_k = top_k

    def forward(self, segment: int, out: Tensor | None = None) -> Tensor:
        first, last = self.row_offsets[segment : segment + 2]
        if self.total_s:
            time.sleep(self.total_s * (last - first) / max(1, self.row_offsets[-1]))
        return self.rows[first:last] if out is None else out.zero_()

    def backward(
        self, segment: int, dout: Tensor, needs_dx: bool, out: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor]:
        first, last = self.row_offsets[segment : segment + 2]
        dweights = torch.zeros(last - first, self.top_k, dtype=torch.float32, device=dout.device)
        if not needs_dx:
            return None, dweights
        return dout[first:last] if out is None else out.zero_(), dweights

    def weight_grad(self, dout: Tensor, needs: PerWeight[bool]) -> PerWeight[Tensor | None]:
        return NO_WEIGHTS


@dataclass(eq=False)
class _StandIns(PlanKind):
    """A call whose received rows go to stand-ins."""

    name = "stand-ins"

    make: MakeStandIn
    stand_in: StandIn | None = None

    @classmethod
    def takes(cls, call: ProposedCall) -> bool:
        return False

    @classmethod
    def plan(cls, call: ProposedCall, header: CallHeader, others: Sequence[type[PlanKind]]) -> PlannedCall:
        raise AssertionError("run_passes() has made the plan")

    def forward_experts(self, call: PlannedCall, tensors: CallTensors[Tensor], keep_hidden: bool) -> ForwardExperts:
        return _Forward(self)

    def backward_experts(self, call: PlannedCall, kept: Kept) -> BackwardExperts:
        return _Backward(self)


class _Forward(ForwardExperts):
    def __init__(self, kind: _StandIns) -> None:
        self._kind = kind

    def group(self, plan: DispatchPlan, received: CallTensors[Tensor], places: RowPlaces) -> None:
        self._kind.stand_in = self._kind.make(received.x, plan)

    def forward(self, segment: int, out: Tensor | None = None) -> Tensor:
        assert self._kind.stand_in is not None, "group() comes first"
        return self._kind.stand_in.forward(segment, out)


class _Backward(BackwardExperts):
    def __init__(self, kind: _StandIns) -> None:
        assert kind.stand_in is not None, "the forward comes first"
        self._stand_in = kind.stand_in

    def backward(
        self, segment: int, dout: Tensor, needs_dx: bool, out: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor]:
        return self._stand_in.backward(segment, dout, needs_dx, out)

    def weight_grad(self, dout: Tensor, needs: PerWeight[bool]) -> WeightGrads:
        return self._stand_in.weight_grad(dout, needs)


class _ForwardPass(ForwardPass):
    """A forward of which nobody hears, and which has no report of a layer."""

    timings: PassReport

    def _finish(self, timings: PassReport) -> Tensor:
        self.timings = timings
        return self.out


class _BackwardPass(BackwardPass):
    timings: PassReport

    def _finish(self, timings: PassReport) -> CallTensors[Tensor | None]:
        self.timings = timings
        return self.grads


class Passes(NamedTuple):
    """What the passes of a call with stand-ins gave, and their times."""

    out: Tensor
    """(T, D)."""
    grads: CallTensors[Tensor | None] | None
    """None without a backward."""
    reports: list[PassReport]


def run_passes(
    transport: Transport,
    overlap: OverlapPlan,
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    num_experts: int,
    make: MakeStandIn,
    dout: Tensor | None = None,
) -> Passes:
    """Run a layer call with stand-ins for its experts, and with dout (T, D) its backward too."""
    needs, spec = int(dout is not None), ExpertSpec()
    layer = CalledLayer(spec.layout, "silu", x.shape[1], x.shape[1], has_bias=False)
    tokens = plan_tokens(topk_ids, num_experts, transport.rank, transport.size, overlap)
    header = CallHeader(
        settings=CallSettings(plan_settings(overlap)),
        num_experts=num_experts,
        top_k=topk_ids.shape[1],
        hidden_size=x.shape[1],
        grad_enabled=needs,
        needs_any=needs,
        needs_x=needs,
        needs_topk_weights=needs,
    )
    call = PlannedCall(
        kind=_StandIns(make),
        settings=ExpertSettings(choose("auto", x.device, x.dtype), spec, spec.options, layer),
        all_ranks=transport,
        transport=transport,
        header=header,
        plan=exchange_plan(transport, header, tokens, overlap),
        entered_at=time.perf_counter(),
    )
    forward = _ForwardPass(call, NO_TENSORS._replace(x=x, topk_ids=topk_ids, topk_weights=topk_weights))
    out, reports = forward.run(), [forward.timings]
    if dout is None:
        return Passes(out, None, reports)
    kept = Kept(call.plan, None, {}, None)  # type: ignore[arg-type] # stand-ins need no more
    backward = _BackwardPass(call, kept, dout, PerWeight(False, False, False, False))
    grads = backward.run()
    return Passes(out, grads, [*reports, backward.timings])


@contextmanager
def sleeping_experts(pair_s: float) -> Iterator[None]:
    """Make all experts sleep so many seconds for each pair in each of the three instead of computing; they give zeros.

    A rank then takes as long as it has pairs, on any machine, beside any number of other ranks in the process. All else
    of a call is as it is: counts, plans, exchanges of rows, of copies and of their gradients.
    """

    def forward(run: ForwardRun, chunk: int, out: Tensor | None = None) -> Tensor:
        grouping = run.grouping.chunk(chunk)
        time.sleep(pair_s * grouping.num_pairs)
        shape = grouping.inverse.shape[0], run.rows.shape[1]
        return run.rows.new_zeros(shape) if out is None else out.zero_()

    def backward(
        run: BackwardRun, chunk: int, dout: Tensor, needs_dx: bool, out: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor]:
        grouping = run.grouping.chunk(chunk)
        time.sleep(pair_s * grouping.num_pairs)
        dweights = run.topk_weights.new_zeros(grouping.inverse.shape)
        if not needs_dx:
            return None, dweights
        return dout.new_zeros(grouping.inverse.shape[0], dout.shape[1]) if out is None else out.zero_(), dweights

    def weight_grad(run: BackwardRun, dout: Tensor, needs: PerWeight[bool]) -> PerWeight[Tensor | None]:
        time.sleep(pair_s * run.grouping.num_pairs * (2 * needs.gate_up_proj + needs.down_proj) / 3)
        there = run.weights.map(torch.zeros_like)
        return PerWeight(*(grad if needed else None for grad, needed in zip(there, needs, strict=True)))

    with (
        patch.object(ForwardRun, "forward", forward),
        patch.object(BackwardRun, "backward", backward),
        patch.object(BackwardRun, "weight_grad", weight_grad),
    ):
        yield
