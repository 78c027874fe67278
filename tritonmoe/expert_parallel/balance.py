"""plan_balance(): whether experts get copies for one call: every rank hears all counts, and plans the same."""

from typing import NamedTuple

import torch
from torch import Tensor

from tritonmoe.dispatch.copies import ExpertCopies
from tritonmoe.dispatch.copy_planner import CopyCosts, is_uneven, plan_copies
from tritonmoe.dispatch.plan import DispatchPlan
from tritonmoe.dispatch.send_plan import count_keys
from tritonmoe.errors import TransportError
from tritonmoe.expert_parallel.rank_call import RankCall
from tritonmoe.overlap.copy_exchanges import expert_bytes, gradient_bytes
from tritonmoe.runtime.host_device import HostCopy
from tritonmoe.transports import leaving_nobody_waiting
from tritonmoe.transports.waiting import Doing
from tritonmoe.transports.wire import WireFormat
from tritonmoe.tuning.copy_costs import MeasuredCosts, Numbers, agreed_costs

__all__ = ["Balanced", "plan_balance"]


class Balanced(NamedTuple):
    """What came of a call's `balance`."""

    copies: ExpertCopies | None
    words: str
    """Why, in one sentence."""
    expected_fs: int = 0
    """What the call is expected to take, in femtoseconds; 0 where nobody knows."""


def plan_balance(call: RankCall, plan: DispatchPlan, costs: MeasuredCosts) -> Balanced:
    """Decide on the copies of a call from every rank's counts; one exchange, where ranks are uneven at all.

    Args:
        plan: the call's without copies. costs: of calls before, for balance="auto".
    Raises:
        TransportError: the exchange failed.
    """
    if not is_uneven(plan.traffic_pairs.sum(0).tolist()):
        return Balanced(None, "no copies: ranks have about as many pairs")
    transport, overlap, top_k = call.transport, plan.overlap, call.tensors.topk_ids.shape[1]
    with leaving_nobody_waiting(transport):
        counts = _count_slots(call)
        told = torch.cat([counts, torch.tensor(costs.numbers(), dtype=torch.int64, device="cpu")])
        try:
            with Doing(lambda: f"the exchange of experts' counts of {plan.call}"):
                received = transport.exchange_counts(told.repeat(transport.size, 1))
        except TransportError as error:
            raise TransportError(f"experts' counts of {plan.call}: {error}") from error
        slots, agreed = received[:, : len(counts)].contiguous(), None
        if overlap.balance == "auto":
            numbers = [Numbers(*of) for of in received[:, len(counts) :].tolist()]
            agreed = _costs(call, plan, numbers)
            if agreed is None:
                return Balanced(None, "no copies: too few calls of this kind were measured on every rank")
            if not all(of.without_permille for of in numbers):
                found = plan_copies(slots, plan.traffic, top_k, 1, agreed)
                return Balanced(None, "no copies: the call is measured without them first", found.without_fs)
        found = plan_copies(slots, plan.traffic, top_k, overlap.max_copies, agreed)
    if found.copies is None:
        return Balanced(None, "no copies: none make the call at least 3 % faster", found.call_fs)
    words = f"{len(found.copies.copies)} copies"
    if agreed is not None:
        gain = 1 - found.with_fs / found.without_fs
        words += f": {found.with_fs / 1e12:.2f} ms expected, {gain:.0%} less than without"
    return Balanced(found.copies, words, found.call_fs)


def _count_slots(call: RankCall) -> Tensor:
    """Return how many pairs this rank's tokens have of each slot, (slots,) int64 on the CPU."""
    ids = call.tensors.topk_ids.long()
    keys = ids.masked_fill((ids < 0) | (ids >= call.num_slots), call.num_slots)
    (counts,) = call.transport.wait_for_copy(HostCopy(count_keys(keys, call.num_slots)))
    return counts


def _costs(call: RankCall, plan: DispatchPlan, numbers: list[Numbers]) -> CopyCosts | None:
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
