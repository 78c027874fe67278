"""agree(): the one exchange before any row moves, after which all ranks have the same plan for one call.

On two levels the plan is made in _agree_on_two_levels, and with a capacity in _agree_on_capacity.
"""

import copy
import time
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from tritonmoe.config.formats import format_of
from tritonmoe.config.layer import PerWeight
from tritonmoe.config.overlap import OverlapConfig, OverlapPlan
from tritonmoe.dispatch.capacity import plan_capped_tokens, post_flag, replay_overflowed
from tritonmoe.dispatch.copies import ExpertCopies
from tritonmoe.dispatch.count_exchange import CountTimes
from tritonmoe.dispatch.header import DTYPE_CODES, SAVES, CallHeader, weight_bits
from tritonmoe.dispatch.header_check import NoLayerCall
from tritonmoe.dispatch.placement import ExpertPlacement, replica_bits
from tritonmoe.dispatch.plan import DispatchPlan, exchange_plan
from tritonmoe.dispatch.send_plan import TokenPlan, plan_tokens
from tritonmoe.dispatch.terms import CallTerms, plan_terms
from tritonmoe.dispatch.two_level import exchange_two_level_plan
from tritonmoe.expert_parallel.agreed_call import AgreedCall
from tritonmoe.expert_parallel.balance import plan_balance, told_beside
from tritonmoe.expert_parallel.choose import Choice
from tritonmoe.expert_parallel.proposed_call import ProposedCall
from tritonmoe.expert_parallel.two_level_call import TwoLevelCall
from tritonmoe.experts.arguments import have_wider_main_grads
from tritonmoe.experts.tensors import NAMES, OPTIONAL
from tritonmoe.transports import TwoLevelTransport, leaving_nobody_waiting
from tritonmoe.tuning.copy_costs import MeasuredCosts

__all__ = ["agree", "agree_without_capacity"]


@torch.no_grad()
def agree(call: ProposedCall, choice: Choice) -> AgreedCall:
    """Tell every rank what this call is and how many rows it sends there, hear the same of them, and plan the call.

    Raises, on every rank alike:
        CountMismatch, TransportError, NonFiniteScores, CapacityOverflow, ValueError: as exchange_plan says.
    """
    try:
        return _agree(call, choice, call_header(call, choice))
    except NoLayerCall:
        call.state.uncount_call()
        raise


def _agree(call: ProposedCall, choice: Choice, header: CallHeader) -> AgreedCall:
    overlap = choice.overlap
    if call.two_level is not None:
        return _agree_on_two_levels(call, header, overlap, call.two_level)
    if overlap.capacity is not None:
        return _agree_on_capacity(call, header, overlap)
    if choice.copies is not None:
        return _agree_on_copies(call, header, overlap, choice.copies)
    with leaving_nobody_waiting(call.transport):
        tokens = _plan_tokens(call, overlap)
        beside = None if choice.costs is None else told_beside(call, overlap, choice.costs)
    header = header._replace(nonfinite_rows=tokens.nonfinite_rows)
    plan = exchange_plan(call.transport, header, tokens, overlap, is_final=choice.costs is None, beside=beside)
    first = _planned(call, plan, header)
    return first if choice.costs is None else _agree_on_balance(call, first, choice.costs)


def _agree_on_balance(call: ProposedCall, first: AgreedCall, costs: MeasuredCosts) -> AgreedCall:
    """Plan a call once more if experts shall have copies in it; first: what was agreed without."""
    began, overlap = time.perf_counter(), first.plan.overlap
    copies = plan_balance(call, first, costs)
    if copies is None:
        with leaving_nobody_waiting(call.transport):
            first.plan.tokens.order.find()
        first.plan = replace(first.plan, beside=None)  # it is read, and would live until the backward
        return first
    terms = call_terms(call, overlap, copies.words)
    second = _agree_on_copies(call, first.header._replace(terms=terms), overlap, copies)
    began_at, ended_at = first.plan.count_times, second.plan.count_times
    if began_at is not None and ended_at is not None:
        second.plan = replace(second.plan, count_times=CountTimes(began_at.posted, ended_at.left))
    second.pairs_without_copies = first.plan.traffic_pairs
    second.balance, second.expected_fs = first.balance, first.expected_fs
    second.planning_s = time.perf_counter() - began
    return second


def _agree_on_copies(call: ProposedCall, header: CallHeader, overlap: OverlapPlan, copies: ExpertCopies) -> AgreedCall:
    """Plan a call by the counts of its rows with copies of experts."""
    transport = call.transport
    slots = copies.slots(call.tensors.topk_ids, transport.rank, overlap)
    counted = copy.copy(call)
    counted.tensors, counted.num_slots = call.tensors._replace(topk_ids=slots), copies.num_slots
    tokens = _plan_tokens(counted, overlap, copies.num_copies)
    header = header._replace(nonfinite_rows=tokens.nonfinite_rows, num_experts=copies.num_slots)
    planned = _planned(counted, exchange_plan(transport, header, tokens, overlap), header)
    planned.copies, planned.slots = copies, slots
    return planned


@torch.no_grad()
def agree_without_capacity(call: ProposedCall, first: AgreedCall) -> AgreedCall:
    """Plan a call again by its counts, after a first run in which some rank's rows did not fit."""
    entered_at = time.perf_counter()
    header, overlap = first.header, replace(first.report.overlap, capacity=None)
    again = _planned(call, exchange_plan(call.transport, header, _plan_tokens(call, overlap), overlap), header)
    again.entered_at, again.first_run = entered_at, first.report
    return again


def _plan_tokens(call: ProposedCall, overlap: OverlapPlan, num_copies: int = 0) -> TokenPlan:
    rank, size, topk_ids = call.transport.rank, call.transport.size, call.tensors.topk_ids
    read = call.transport.wait_for_copy
    return plan_tokens(topk_ids, call.num_slots, rank, size, overlap, call.num_nonfinite_rows, read, num_copies)


def _planned(call: ProposedCall, plan: DispatchPlan, header: CallHeader) -> AgreedCall:
    """Return a call whose plan is made, on one level."""
    return AgreedCall(
        settings=call.settings,
        owners=call.owners,
        all_ranks=call.transport,
        transport=call.transport,
        header=header,
        plan=plan,
        first_expert=call.transport.rank * (call.num_slots // call.transport.size),
        placement=call.spec.placement,
        entered_at=call.entered_at,
    )


def _agree_on_capacity(call: ProposedCall, header: CallHeader, overlap: OverlapPlan) -> AgreedCall:
    """Plan with the room that the capacity gives, which reads no device; whether all fits is known behind the call.

    In a CUDA graph that is told on the device, beside the rows.
    """
    transport, topk_ids = call.transport, call.tensors.topk_ids
    capped = plan_capped_tokens(
        topk_ids, call.num_slots, transport.rank, transport.size, overlap, call.num_nonfinite_rows
    )
    planned = _planned(call, exchange_plan(transport, header, capped.tokens, overlap), header)
    if call.is_captured:
        planned.flag = post_flag(transport, capped)
    else:
        planned.capped = capped
    return planned


def _agree_on_two_levels(
    call: ProposedCall, header: CallHeader, overlap: OverlapPlan, transport: TwoLevelTransport
) -> TwoLevelCall:
    both = exchange_two_level_plan(
        transport, header, call.tensors.topk_ids, call.num_slots, overlap, call.num_nonfinite_rows
    )
    return TwoLevelCall(
        settings=call.settings,
        owners=call.owners,
        all_ranks=transport,
        transport=transport.between_nodes,
        header=header,
        plan=both.outer,
        first_expert=transport.rank * (call.num_slots // transport.size),
        placement=call.spec.placement,
        entered_at=call.entered_at,
        two_level=both,
        inside_node=transport.inside_node,
    )


def call_header(call: ProposedCall, choice: Choice) -> CallHeader:
    """Return what this rank says of a call to every rank, counts and nonfinite_rows apart."""
    spec, tensors, needs, placement = call.spec, call.tensors, call.needs, call.spec.placement
    flags = () if call.is_captured else call.state.captured_flags
    is_replay_wrong = bool(flags) and replay_overflowed(call.transport, flags, tensors.x.device)
    return CallHeader(
        sequence=call.sequence,
        layer=-1 if call.layer is None else call.layer.layer,
        copy=0 if call.layer is None else call.layer.copy,
        terms=call_terms(call, choice.overlap, choice.copy_words),
        num_experts=call.num_slots,
        top_k=tensors.topk_ids.shape[1],
        hidden_size=tensors.x.shape[1],
        intermediate_size=call.intermediate_size,
        topk_weights_dtype=DTYPE_CODES.get(tensors.topk_weights.dtype, 0),
        grad_enabled=int(call.grad_enabled),
        needs_any=int(any(needs.flatten())),
        needs_x=int(needs.x),
        needs_topk_weights=int(needs.topk_weights),
        needs_weights=0 if spec.overlap.balance is None else weight_bits(needs.weights),
        wide_grads=0 if spec.overlap.balance is None else weight_bits(have_wider_main_grads(call.owners)),
        half=call.half,
        compiled=int(call.is_compiled),
        captured=int(call.is_captured),
        replay_overflowed=int(is_replay_wrong),
        replica_grads=replica_bits(placement, needs.weights),
        auto=int(isinstance(spec.overlap, OverlapConfig) and spec.overlap.is_auto),
        save=SAVES.index(spec.experts.save),
        deterministic=int(torch.are_deterministic_algorithms_enabled()),
        **call.state.history(),
        **choice.message._asdict(),
    )


def call_terms(call: ProposedCall, overlap: OverlapPlan, copies: str) -> CallTerms:
    """Return what must be the same on all ranks of a call that runs this plan: what is configured, and its tensors.

    copies: which copies of experts it has, in words.
    """
    weights, placement = call.tensors.weights, call.spec.placement
    ranks = [0 if of is None else of.shape[1] for of in (weights.gate_up_a, weights.down_a)]
    given = tuple([name for name, tensor in zip(NAMES, call.tensors.flatten(), strict=False) if tensor is not None])
    gradients = "sum" if call.layer is None else call.layer.expert_gradients
    experts = call.spec.experts.agreed
    if weights.gate_up_scales is not None or weights.down_scales is not None:
        experts = (*experts, *_formats(weights))
    return _call_terms(experts, placement, gradients, call.tensors.x.dtype, given, tuple(ranks), copies, overlap)


def _formats(weights: PerWeight[Tensor]) -> list[tuple[str, object]]:
    """Return in which formats the weights are packed, by name."""
    pairs = {
        "gate_up_format": (weights.gate_up_proj, weights.gate_up_scales),
        "down_format": (weights.down_proj, weights.down_scales),
    }
    return [(name, format_of(values, scales)) for name, (values, scales) in pairs.items() if scales is not None]


@lru_cache(maxsize=1024)
def _call_terms(
    experts: tuple[tuple[str, object], ...],
    placement: ExpertPlacement | None,
    expert_gradients: str,
    dtype: torch.dtype,
    given: tuple[str, ...],
    adapter_ranks: tuple[int, ...],
    copies: str,
    overlap: OverlapPlan,
) -> CallTerms:
    """Return these as terms; kept by their values, which most calls of a layer share."""
    named: dict[str, object] = {
        "dtype": dtype,
        "placement": "contiguous" if placement is None else placement.experts_of_rank,
    }
    named |= dict(experts)
    if placement is None or not placement.has_replicas:
        del named["transposed"]  # gradients of replicas are summed as they lie in memory; to others it is all one
    named |= {"expert_gradients": expert_gradients}
    for name, rank in zip(("gate_up_rank", "down_rank"), adapter_ranks, strict=True):
        named[name] = rank or "no adapter"
    named["copies"] = copies
    named |= {name: "a tensor" if name in given else "none" for name in NAMES if name in OPTIONAL}
    return CallTerms((*named.items(), *plan_terms(overlap)))
