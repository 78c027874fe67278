"""Copies: the plan of a call in which hot experts have copies on other ranks, whose pairs these compute.

Every rank hears all counts and plans the same copies. Where none are made the call is planned as without them.
"""

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from tritonmoe.config.activations import is_fused
from tritonmoe.config.layer import PerWeight
from tritonmoe.dispatch.call_settings import CallSettings, with_setting
from tritonmoe.dispatch.copies import ExpertCopies
from tritonmoe.dispatch.count_exchange import spare_header_ints
from tritonmoe.dispatch.header import CallHeader
from tritonmoe.dispatch.plan import DispatchPlan, exchange_plan
from tritonmoe.dispatch.send_plan import count_keys
from tritonmoe.errors import CountMismatch, TransportError
from tritonmoe.expert_parallel.call import ProposedCall
from tritonmoe.expert_parallel.plans.base import BackwardExperts, ForwardExperts, Kept, PlanKind, PlannedCall
from tritonmoe.expert_parallel.plans.copies.copied_experts import BackwardWithCopies, ForwardWithCopies, KeptCopies
from tritonmoe.expert_parallel.plans.copies.copy_costs import MeasuredCosts, Numbers, agreed_costs
from tritonmoe.expert_parallel.plans.copies.copy_exchanges import copy_exchanges, expert_bytes, gradient_bytes
from tritonmoe.expert_parallel.plans.copies.copy_planner import CopyCosts, is_uneven, plan_copies
from tritonmoe.expert_parallel.plans.plain import OwnBackward, OwnExperts, Plain, count_tokens, planned_call
from tritonmoe.experts.backward_run import BackwardRun
from tritonmoe.experts.reading_ahead import has_streamed
from tritonmoe.experts.tensors import CallTensors
from tritonmoe.overlap.report import CopiesReport, LayerReport
from tritonmoe.runtime.host_device import HostCopy
from tritonmoe.transports import fail_peers_on_error
from tritonmoe.transports.waiting import Doing
from tritonmoe.transports.wire import choose_wires

__all__ = ["Copies"]


@dataclass(eq=False)
class Copies(PlanKind):
    """A call with OverlapPlan.balance, whether it has got copies or not."""

    name = "copies"

    said: CopiesReport
    costs: MeasuredCosts | None = None
    """By which copies are planned; None where they are those of the forward that is recomputed."""
    expected_fs: int = 0
    """With balance="auto": what the passes are expected to take, in femtoseconds; 0 where nobody knows."""
    planning_s: float | None = None
    """How long it took to plan the copies; None where there are none."""

    @classmethod
    def takes(cls, call: ProposedCall) -> bool:
        if call.spec.overlap.balance is None:
            return False
        experts, placement = call.spec.experts, call.spec.placement
        if not is_fused(experts.activation):
            raise ValueError(
                "balance copies only the weights of experts, and a callable activation may have parameters or a state "
                "of its own: name an activation of the kernels (moe_mlp lists them), or leave OverlapConfig.balance out"
            )
        if has_streamed(call.tensors.weights):
            raise ValueError(
                "balance copies the weights of experts to other ranks, and offloaded ones stay with their "
                "rank: leave OverlapConfig.balance out, or don't call offload_experts()"
            )
        if placement is not None and placement.has_replicas:
            raise ValueError(
                "balance can't copy experts that have replicas, over which gradients are summed already: use a "
                "placement without replicas, or leave OverlapConfig.balance out"
            )
        return not call.half and call.transport.size > 1

    @classmethod
    def plan(cls, call: ProposedCall, header: CallHeader, others: Sequence[type[PlanKind]]) -> PlannedCall:
        if call.again is not None:
            copies = call.again.of_kind
            if not isinstance(copies, ExpertCopies):
                return Plain.plan(call, header)
            return _planned(call, _with_words(header, copies.words), cls(CopiesReport(copies, "")), copies)
        costs = call.state.learnt.setdefault((cls.name, call.kind), MeasuredCosts())
        assert isinstance(costs, MeasuredCosts)
        header = _with_words(header, "planned from counts")
        with fail_peers_on_error(call.transport):
            tokens = count_tokens(call)
            extra = extra_counts(call, costs)
        header = header._replace(nonfinite_rows=tokens.nonfinite_rows)
        plan = exchange_plan(call.transport, header, tokens, call.overlap, is_final=False, extra=extra)
        began = time.perf_counter()
        kind = decide(call, plan, costs)
        copies = kind.said.planned
        if copies is None:
            with fail_peers_on_error(call.transport):
                plan.tokens.order.find()
            plan = replace(plan, extra_counts=None)  # they would live until the backward
            return planned_call(call, kind, header, plan)
        second = _planned(call, _with_words(header, copies.words), kind, copies)
        if plan.marks is not None and second.plan.marks is not None:
            marks = plan.marks._replace(counts_left=second.plan.marks.counts_left)
            second.plan = replace(second.plan, marks=marks)
        kind.said.pairs_without = plan.traffic_pairs
        kind.planning_s = time.perf_counter() - began
        return second

    def forward_experts(self, call: PlannedCall, tensors: CallTensors[Tensor], keep_hidden: bool) -> ForwardExperts:
        own = OwnExperts(call, tensors, keep_hidden)
        copies = self.said.planned
        if copies is None:
            return own
        exchanges = copy_exchanges(copies, call.transport, tensors.weights, call.plan)
        return ForwardWithCopies(call, own, keep_hidden, exchanges)

    def backward_experts(self, call: PlannedCall, kept: Kept) -> BackwardExperts:
        run = kept.run(call.settings)
        if not isinstance(kept.of_kind, KeptCopies):
            return OwnBackward(run)
        copies, grouping = kept.of_kind
        exchanges = copy_exchanges(copies, call.transport, kept.received.weights, kept.plan)
        copy_h, *copy_weights = kept.kind_tensors

        def make_copies() -> BackwardRun:
            assert grouping is not None
            kept_weights = cast(PerWeight[Tensor], PerWeight(*copy_weights))
            weights = kept_weights if kept.plan.keeps_copies else exchanges.weights
            return BackwardRun(call.settings, kept.received._replace(weights=weights), grouping, copy_h)

        return BackwardWithCopies(run, make_copies, kept.plan, exchanges)

    def report(self, call: PlannedCall, report: LayerReport) -> None:
        report.copies = self.said
        if self.costs is not None:
            self.costs.observe(report, call.plan.needs_any, self.planning_s, self.expected_fs)

    @property
    def repeated(self) -> object:
        return self.said.planned


def _with_words(header: CallHeader, copies: str) -> CallHeader:
    """Return a header that says in words which copies the call has, as far as that is known."""
    assert isinstance(header.settings, CallSettings), "this rank's own header has them"
    return header._replace(settings=with_setting(header.settings, "copies", copies))


def _planned(call: ProposedCall, header: CallHeader, kind: Copies, copies: ExpertCopies) -> PlannedCall:
    """Plan a call by the counts of its rows with copies of experts."""
    transport = call.transport
    slots = copies.slots(call.tensors.topk_ids, transport.rank, call.overlap)
    counted = copy.copy(call)
    counted.tensors, counted.num_slots = call.tensors._replace(topk_ids=slots), copies.num_slots
    tokens = count_tokens(counted, copies.num_copies)
    header = header._replace(nonfinite_rows=tokens.nonfinite_rows, num_experts=copies.num_slots)
    plan = exchange_plan(transport, header, tokens, call.overlap)
    weights, said = call.tensors.weights, kind.said
    said.expert_bytes = expert_bytes(weights)
    said.gradient_bytes = gradient_bytes(weights, plan.needs_weights, plan.has_wide_grads)
    said.pair_offsets, said.are_kept = plan.copy_pair_offsets, plan.keeps_copies
    planned = planned_call(counted, kind, header, plan)
    planned.slots = slots
    return planned


def extra_counts(call: ProposedCall, costs: MeasuredCosts) -> Tensor | None:
    """Return what plans of copies are made from, to travel with the counts; None for an exchange of its own.

    It travels there where the ranks of the last call were uneven, and if the header has room for so many experts.
    """
    if not costs.were_uneven:
        return None
    told = _told(call, costs)
    return told if len(told) <= spare_header_ints(call.overlap.num_segments) else None


def decide(call: ProposedCall, plan: DispatchPlan, costs: MeasuredCosts) -> Copies:
    """Decide on the copies of a call from every rank's counts, which one exchange more brings if they are not here yet.

    Every rank decides the same.

    Args:
        plan: of the call without copies. costs: of calls before, for balance="auto".
    Raises:
        TransportError: the exchange failed.
    """
    costs.were_uneven = is_uneven(plan.traffic_pairs.sum(0).tolist())
    if not costs.were_uneven:
        return _without("ranks have about as many pairs", costs)
    transport, overlap, top_k = call.transport, plan.overlap, call.tensors.topk_ids.shape[1]
    with fail_peers_on_error(transport):
        received = plan.extra_counts
        if received is None:
            told = _told(call, costs)
            try:
                with Doing(lambda: f"the exchange of experts' counts of {plan.call}"):
                    received = transport.exchange_counts(told.repeat(transport.size, 1))
            except TransportError as error:
                raise TransportError(f"experts' counts of {plan.call}: {error}") from error
        first = received.shape[1] - len(Numbers._fields)
        counts = received[:, :first].contiguous().view(torch.int32)
        slots, prices = counts[:, : call.num_slots].long(), None
        if not torch.equal(slots.view(transport.size, transport.size, -1).sum(2), plan.traffic_pairs):
            raise CountMismatch(f"experts' counts of {plan.call} don't add up to the ranks' pairs: they were damaged")
        if overlap.balance == "auto":
            numbers = [Numbers(*of) for of in received[:, first:].tolist()]
            prices = _costs(call, plan, numbers)
            if prices is None:
                return _without("too few calls of this kind were measured on every rank", costs)
            if not all(of.without_forward_permille for of in numbers):
                expected_fs = plan_copies(slots, plan.traffic, top_k, 1, prices).without_fs
                return _without("the call is measured without them first", costs, expected_fs)
        found = plan_copies(slots, plan.traffic, top_k, overlap.max_copies, prices)
    if found.copies is None:
        return _without("none make the call at least 3 % faster", costs, found.call_fs)
    reason = f"{len(found.copies.copies)} copies"
    if prices is not None:
        gain = 1 - found.with_fs / found.without_fs
        reason += f": {found.with_fs / 1e12:.2f} ms expected, {gain:.0%} less than without"
    return Copies(CopiesReport(found.copies, reason), costs, found.call_fs)


def _without(reason: str, costs: MeasuredCosts, expected_fs: int = 0) -> Copies:
    return Copies(CopiesReport(None, f"no copies: {reason}"), costs, expected_fs)


def _told(call: ProposedCall, costs: MeasuredCosts) -> Tensor:
    """Return this rank's counts of pairs, two in an integer, and its Numbers."""
    counts = _count_slots(call).to(torch.int32)
    if len(counts) % 2:
        counts = torch.cat([counts, counts.new_zeros(1)])
    numbers = torch.tensor(costs.numbers(), dtype=torch.int64, device="cpu")
    return torch.cat([counts.view(torch.int64), numbers])


def _count_slots(call: ProposedCall) -> Tensor:
    """Return how many pairs this rank's tokens have of each slot, (slots,) int64 on the CPU."""
    ids = call.tensors.topk_ids.long()
    keys = ids.masked_fill((ids < 0) | (ids >= call.num_slots), call.num_slots)
    (counts,) = call.transport.wait_for_copy(HostCopy(*count_keys([keys], call.num_slots)))
    return counts


def _costs(call: ProposedCall, plan: DispatchPlan, numbers: list[Numbers]) -> CopyCosts | None:
    x = call.tensors.x
    wires = choose_wires(x.dtype, plan.overlap.wire_dtype, call.spec.experts.precision)
    weights = call.tensors.weights
    again = 0 if plan.keeps_copies else expert_bytes(weights)
    return agreed_costs(
        numbers,
        has_backward=plan.needs_any,
        row_bytes=wires.row_bytes(x.shape[1]),
        expert_bytes=expert_bytes(weights),
        gradient_bytes=sum(gradient_bytes(weights, plan.needs_weights, plan.has_wide_grads)) + again,
    )
