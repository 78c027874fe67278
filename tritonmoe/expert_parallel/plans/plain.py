"""Plain: the plan of a call whose rows go straight to the ranks that own their experts, as counted."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from tritonmoe.config.layer import PerWeight
from tritonmoe.dispatch.expert_chunks import RowPlaces
from tritonmoe.dispatch.header import CallHeader
from tritonmoe.dispatch.plan import DispatchPlan, exchange_plan
from tritonmoe.dispatch.send_plan import TokenPlan, plan_tokens
from tritonmoe.expert_parallel.call import ProposedCall
from tritonmoe.expert_parallel.plans.base import BackwardExperts, ForwardExperts, Kept, PlanKind, PlannedCall
from tritonmoe.experts.backward_run import BackwardRun
from tritonmoe.experts.forward_run import ForwardRun
from tritonmoe.experts.spec import ExpertSettings
from tritonmoe.experts.tensors import CallTensors
from tritonmoe.ops.backends.ops import WeightGrads
from tritonmoe.ops.grouping import Grouping, RowSources
from tritonmoe.overlap.report import PassReport
from tritonmoe.transports import fail_peers_on_error

__all__ = ["OwnBackward", "OwnExperts", "Plain", "count_tokens", "group_received", "planned_call"]


class Plain(PlanKind):
    """The kind that is left for every call that no other kind plans."""

    name = "plain"

    @classmethod
    def takes(cls, call: ProposedCall) -> bool:
        return True

    @classmethod
    def plan(cls, call: ProposedCall, header: CallHeader, others: Sequence[type[PlanKind]] = ()) -> PlannedCall:
        with fail_peers_on_error(call.transport):
            tokens = count_tokens(call)
        header = header._replace(nonfinite_rows=tokens.nonfinite_rows)
        return planned_call(call, cls(), header, exchange_plan(call.transport, header, tokens, call.overlap))

    def forward_experts(self, call: PlannedCall, tensors: CallTensors[Tensor], keep_hidden: bool) -> ForwardExperts:
        return OwnExperts(call, tensors, keep_hidden)

    def backward_experts(self, call: PlannedCall, kept: Kept) -> BackwardExperts:
        return OwnBackward(kept.run(call.settings))


def count_tokens(call: ProposedCall, num_copies: int = 0) -> TokenPlan:
    """Count this rank's rows and pairs; what plan_tokens reads is the one host read before the count exchange."""
    rank, size, topk_ids = call.transport.rank, call.transport.size, call.tensors.topk_ids
    read = call.transport.wait_for_copy
    return plan_tokens(topk_ids, call.num_slots, rank, size, call.overlap, call.num_nonfinite_rows, read, num_copies)


def planned_call(call: ProposedCall, kind: PlanKind, header: CallHeader, plan: DispatchPlan) -> PlannedCall:
    """Return a call whose plan is made, on one level."""
    return PlannedCall(
        kind=kind,
        settings=call.settings,
        all_ranks=call.transport,
        transport=call.transport,
        header=header,
        plan=plan,
        entered_at=call.entered_at,
        first_expert=call.transport.rank * (call.num_slots // call.transport.size),
        placement=call.spec.placement,
        owners=call.owners,
    )


class OwnExperts(ForwardExperts):
    """This rank's own experts in a forward; tensors: of this rank's own call."""

    _run: ForwardRun

    def __init__(self, call: PlannedCall, tensors: CallTensors[Tensor], keep_hidden: bool) -> None:
        self._call, self._tensors, self._keep_hidden = call, tensors, keep_hidden

    def group(self, plan: DispatchPlan, received: CallTensors[Tensor], places: RowPlaces) -> None:
        call, given = self._call, self._tensors
        local_ids, num_local = received.topk_ids - call.first_expert, given.weights.gate_up_proj.shape[0]
        grouping = group_received(call.settings, plan, places, local_ids, num_local)
        weights, parameters = given.weights, given.activation_parameters
        tensors = received.without("topk_ids")._replace(weights=weights, activation_parameters=parameters)
        self._run = ForwardRun(call.settings, tensors, grouping, self._keep_hidden)

    def forward(self, segment: int, out: Tensor | None = None) -> Tensor:
        return self._run.forward(segment, out)

    def end(self, out: Tensor, timings: PassReport) -> None:
        timings.loads = self._run.loads

    @property
    def own(self) -> ForwardRun:
        return self._run


class OwnBackward(BackwardExperts):
    """This rank's own experts in a backward."""

    def __init__(self, run: BackwardRun) -> None:
        self._run = run

    def backward(
        self, segment: int, dout: Tensor, needs_dx: bool, out: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor]:
        return self._run.backward(segment, dout, needs_dx, out)

    def weight_grad(self, dout: Tensor, needs: PerWeight[bool]) -> WeightGrads:
        return self._run.weight_grad(dout, needs)

    def end(self, grads: CallTensors[Tensor | None], timings: PassReport) -> CallTensors[Tensor | None]:
        timings.loads = self._run.loads
        return grads._replace(activation_parameters=self._run.activation_grads)


def group_received(
    settings: ExpertSettings, plan: DispatchPlan, places: RowPlaces, local_ids: Tensor, num_local_experts: int
) -> Grouping:
    """Group the received rows, of experts local_ids (R, K), in the plan's chunks; `places` are of those not local."""
    row_offsets, pair_offsets, row_sources = plan.receive_offsets, plan.pair_offsets, plan.row_sources()
    num_slices = plan.overlap.num_local_slices
    if plan.overlap.chunk_by == "experts":
        # By (rank, token) behind the local rows, all chunks are one, whose pairs are by expert then.
        local = torch.arange(plan.num_local, device=local_ids.device)
        received, returned = (torch.cat([local, of]) for of in places)
        local_ids = local_ids[received]
        rows = row_sources.rows
        row_sources = RowSources(
            row_sources.ranks, torch.cat([rows[:num_slices], rows[num_slices:].sum(0, keepdim=True)])
        )
        row_offsets, pair_offsets = ((*of[: num_slices + 1], of[-1]) for of in (row_offsets, pair_offsets))
    busy = [c for c, (first, last) in enumerate(pairwise(row_offsets)) if first < last]
    if len(busy) > 1 or plan.is_inside_node or plan.tokens.has_padding:
        grouping = settings.ops.group(
            local_ids,
            num_local_experts,
            chunk_row_offsets=row_offsets,
            chunk_pair_offsets=pair_offsets,
            row_sources=row_sources,
        )
    else:
        # All rows in one chunk are stored in source order already.
        grouping = settings.ops.group(
            local_ids,
            num_local_experts,
            chunk_row_offsets=(0, plan.num_received),
            chunk_pair_offsets=(0, pair_offsets[-1]),
        ).among_empty_chunks(busy[0] if busy else 0, row_offsets, pair_offsets)
    if plan.overlap.chunk_by == "tokens":
        return grouping
    return grouping.in_expert_chunks(
        plan.overlap.bounds(num_local_experts), plan.return_offsets, plan.pair_offsets, received, returned
    )
