"""run_call(): an expert-parallel call from its arguments to its result: check, choose a plan, agree, run."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import Tensor

from tritonmoe.expert_parallel.agree import agree
from tritonmoe.expert_parallel.call import ProposedCall
from tritonmoe.expert_parallel.check import check
from tritonmoe.expert_parallel.choose import choose_plan, learn
from tritonmoe.expert_parallel.plans.base import PlannedCall, RunForward
from tritonmoe.runtime.autograd import caller_autocast, is_recomputing, without_autocast

__all__ = ["run_call"]


def run_call(call: ProposedCall, run_forward: RunForward) -> Tensor:
    """Return the result (T, D) of a call; its report goes to the layer that calls.

    Raises:
        What check() and agree() raise, and TransportError where an exchange fails.
    """
    kinds = check(call)
    choose_plan(call)
    planned = first = agree(call, kinds)
    if call.fillers:
        planned.fillers = _fillers(call)
    again: PlannedCall | None = planned
    with without_autocast(call.tensors.x.device):
        while again is not None:
            planned, y = again, None  # a first run, and what it keeps for a backward, are given up
            slots, planned.slots = planned.slots, None
            tensors = call.tensors if slots is None else call.tensors._replace(topk_ids=slots)
            y = planned.kind.run(planned, tensors, run_forward)
            again = planned.kind.plan_again(call, planned)
    assert y is not None
    report = planned.report
    learn(call, first.plan, report)
    if first.plan.needs_any and not is_recomputing():
        call.state.start(call.sequence, call.kind, report.overlap, planned.kind.repeated)
    if call.layer is not None:
        call.layer.last_report = report
    return y


def _fillers(call: ProposedCall) -> list[Callable[[], None]]:
    """Return the fillers, to be run in the modes of the caller: a Function's forward runs without either."""
    autocast = caller_autocast(call.tensors.x.device)
    return [partial(_run_filler, filler, call.grad_enabled, autocast) for filler in call.fillers]


def _run_filler(filler: Callable[[], None], grad_enabled: bool, autocast: Callable[[], AbstractContextManager]) -> None:
    with torch.set_grad_enabled(grad_enabled), autocast():
        filler()
