"""run_call(): an expert-parallel call from its arguments to its result: check, choose a plan, agree, run."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import Tensor

from tritonmoe.dispatch.capacity import some_rank_overflowed, watched
from tritonmoe.expert_parallel.agree import agree, agree_without_capacity
from tritonmoe.expert_parallel.agreed_call import AgreedCall
from tritonmoe.expert_parallel.check import check
from tritonmoe.expert_parallel.choose import choose_plan
from tritonmoe.expert_parallel.proposed_call import ProposedCall
from tritonmoe.experts.tensors import CallTensors
from tritonmoe.overlap.report import LayerReport
from tritonmoe.runtime.autograd import caller_autocast, without_autocast

__all__ = ["RunForward", "run_call"]

RunForward = Callable[[AgreedCall, CallTensors[Tensor]], Tensor]
"""Runs the forward of a call so that its backward can follow: as autograd Functions (whole_call.py, split_call.py), or
inside an operator (operator.py). Each of them makes a CallForward, and then a CallBackward (call_pass.py)."""


def run_call(call: ProposedCall, run_forward: RunForward) -> Tensor:
    """Return the result (T, D) of a call; its report goes to the layer that calls.

    Raises:
        What check() and agree() raise, and TransportError where an exchange fails.
    """
    check(call)
    choice = choose_plan(call)
    agreed = agree(call, choice)
    y, report = run(call, agreed, run_forward)
    choice.learn(call, agreed, report)
    report.half = call.half
    if call.layer is not None:
        before = call.layer.last_report
        if report.half == 2 and before is not None and before.half == 1:
            report.first_half = before
        call.layer.last_report = report
    return y


def run(call: ProposedCall, agreed: AgreedCall, run_forward: RunForward) -> tuple[Tensor, LayerReport]:
    """Run a call as agreed, and once more by its counts where rows of some rank had no room in the capacity."""
    device = call.tensors.x.device
    if call.fillers:
        autocast = caller_autocast(device)
        agreed.fillers = [partial(_run_filler, filler, call.grad_enabled, autocast) for filler in call.fillers]
    tensors = call.tensors if agreed.slots is None else call.tensors._replace(topk_ids=agreed.slots)
    agreed.slots = None
    with without_autocast(device):
        y = run_forward(agreed, tensors)
    report = agreed.report
    if agreed.is_wrong is not None:
        call.state.captured_flags.append(watched(agreed.is_wrong))
    if agreed.capped is not None and some_rank_overflowed(call.transport, agreed.header, agreed.capped):
        del y  # and with it what the first run keeps for a backward
        again = agree_without_capacity(call, agreed)
        with without_autocast(device):
            y = run_forward(again, call.tensors)
        return y, again.report
    return y, report


def _run_filler(filler: Callable[[], None], grad_enabled: bool, autocast: Callable[[], AbstractContextManager]) -> None:
    """Run a filler in the modes of the caller: a Function's forward runs without either."""
    with torch.set_grad_enabled(grad_enabled), autocast():
        filler()
