"""agree(): the first kind of plan that takes a call plans it, after which all ranks know every size and offset."""

import torch

from tritonmoe.dispatch.header_check import NoLayerCall
from tritonmoe.expert_parallel.call import ProposedCall
from tritonmoe.expert_parallel.call_header import call_header
from tritonmoe.expert_parallel.plans import KIND_NAMES
from tritonmoe.expert_parallel.plans.base import PlanKind, PlannedCall

__all__ = ["agree"]


@torch.no_grad()
def agree(call: ProposedCall, kinds: list[type[PlanKind]]) -> PlannedCall:
    """Tell every rank what this call is and how many rows it sends there, hear the same of them, and plan the call.

    Args:
        kinds: of plans that take the call, as check() found them.
    Raises, on every rank alike:
        CountMismatch, TransportError, NonFiniteScores, CapacityOverflow, ValueError: as exchange_plan says.
    """
    try:
        return kinds[0].plan(call, call_header(call, KIND_NAMES), kinds[1:])
    except NoLayerCall:
        call.state.uncount_call()
        raise
