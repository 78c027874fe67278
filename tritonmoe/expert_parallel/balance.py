"""plan_balance(): whether experts get copies for one call: every rank hears all counts, and plans the same."""

import torch
from torch import Tensor

from tritonmoe.config.overlap import OverlapPlan
from tritonmoe.dispatch.copies import ExpertCopies
from tritonmoe.dispatch.copy_planner import CopyCosts, is_uneven, plan_copies
from tritonmoe.dispatch.count_exchange import room_beside
from tritonmoe.dispatch.plan import DispatchPlan
from tritonmoe.dispatch.send_plan import count_keys
from tritonmoe.errors import CountMismatch, TransportError
from tritonmoe.expert_parallel.agreed_call import AgreedCall
from tritonmoe.expert_parallel.proposed_call import ProposedCall
from tritonmoe.overlap.copy_exchanges import expert_bytes, gradient_bytes
from tritonmoe.runtime.host_device import HostCopy
from tritonmoe.transports import leaving_nobody_waiting
from tritonmoe.transports.waiting import Doing
from tritonmoe.transports.wire import WireFormat
from tritonmoe.tuning.copy_costs import MeasuredCosts, Numbers, agreed_costs

__all__ = ["plan_balance", "told_beside"]


def told_beside(call: ProposedCall, overlap: OverlapPlan, costs: MeasuredCosts) -> Tensor | None:
    """Return what plans of copies are made from, to be told beside the counts; None for an exchange of its own.

    It is told there where the ranks of the last call were uneven, and if there is room for so many experts.
    """
    if not costs.were_uneven:
        return None
    told = _told(call, costs)
    return told if len(told) <= room_beside(overlap.num_segments) else None


def plan_balance(call: ProposedCall, agreed: AgreedCall, costs: MeasuredCosts) -> ExpertCopies | None:
    """Decide on the copies of a call from every rank's counts, which one exchange more brings if they are not here yet.

    Args:
        agreed: the call without copies, which gets the reason and what it is expected to take: balance, expected_fs.
        costs: of calls before, for balance="auto".
    Raises:
        TransportError: the exchange failed.
    """
    plan = agreed.plan
    costs.were_uneven = is_uneven(plan.traffic_pairs.sum(0).tolist())
    if not costs.were_uneven:
        agreed.balance = "no copies: ranks have about as many pairs"
        return None
    transport, overlap, top_k = call.transport, plan.overlap, call.tensors.topk_ids.shape[1]
    with leaving_nobody_waiting(transport):
        received = plan.beside
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
                agreed.balance = "no copies: too few calls of this kind were measured on every rank"
                return None
            if not all(of.without_permille for of in numbers):
                agreed.expected_fs = plan_copies(slots, plan.traffic, top_k, 1, prices).without_fs
                agreed.balance = "no copies: the call is measured without them first"
                return None
        found = plan_copies(slots, plan.traffic, top_k, overlap.max_copies, prices)
    agreed.expected_fs = found.call_fs
    if found.copies is None:
        agreed.balance = "no copies: none make the call at least 3 % faster"
        return None
    agreed.balance = f"{len(found.copies.copies)} copies"
    if prices is not None:
        gain = 1 - found.with_fs / found.without_fs
        agreed.balance += f": {found.with_fs / 1e12:.2f} ms expected, {gain:.0%} less than without"
    return found.copies


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
    wire = WireFormat(x.dtype, plan.overlap.wire_dtype)
    after = WireFormat(x.dtype, None if plan.overlap.wire_dtype == torch.float8_e4m3fn else plan.overlap.wire_dtype)
    weights = call.tensors.weights
    again = 0 if plan.keeps_copies else expert_bytes(weights)
    return agreed_costs(
        numbers,
        has_backward=plan.needs_any,
        row_bytes=(wire.row_bytes(x.shape[1]), after.row_bytes(x.shape[1])),
        expert_bytes=expert_bytes(weights),
        gradient_bytes=sum(gradient_bytes(weights, plan.needs_weights, plan.has_wide_grads)) + again,
    )
