"""check(): whether the arguments of an expert-parallel call fit together, before anything of it is sent."""

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tritonmoe.config.layer import PerWeight
from tritonmoe.config.overlap import OverlapConfig, OverlapPlan
from tritonmoe.config.precision import ExpertPrecision
from tritonmoe.dispatch.header import DTYPE_CODES
from tritonmoe.dispatch.placement import check_experts_of_rank
from tritonmoe.expert_parallel.call import ProposedCall, listeners
from tritonmoe.expert_parallel.plans import PLAN_KINDS
from tritonmoe.expert_parallel.plans.base import PlanKind
from tritonmoe.expert_parallel.state import abort_call, state_of
from tritonmoe.experts.adapter_dropout import with_row_seeds
from tritonmoe.experts.arguments import checked_tensors, find_main_grads
from tritonmoe.experts.callable_activation import with_activation_parameters
from tritonmoe.experts.spec import choose_backend
from tritonmoe.experts.tensors import CallTensors
from tritonmoe.runtime.host_device import is_captured
from tritonmoe.transports.wire import WireFormat

__all__ = ["MAX_FILLERS", "check", "check_fillers", "check_with_precision"]

MAX_FILLERS = 2


def check(call: ProposedCall) -> list[type[PlanKind]]:
    """Check a call on this rank, before anything of it is sent, and note in it what follows from its arguments alone.

    Return the kinds of plans that take the call.

    Raises:
        ValueError, TypeError: the arguments don't fit together. What a listener raises. The other ranks hear of either,
            and raise too.
    """
    call.entered_at = time.perf_counter()
    spec, transport, layer = call.spec, call.transport, call.layer
    try:
        tensors, call.owners = _checked_tensors(call)
        call.is_captured = is_captured(tensors.x.device)
        kinds = [kind for kind in PLAN_KINDS if kind.takes(call)]
        if not call.is_captured:
            for listener in listeners:
                listener.before_forward(transport, tensors.x.device)
        call.settings = choose_backend(spec.experts, tensors, beside_exchanges=transport.size > 1)
        if call.settings.layer.activation is None:
            tensors = with_activation_parameters(tensors, call.settings)
    except Exception:
        abort_call(transport)
        raise
    if not call.is_compiled:
        call.grad_enabled, call.needs = torch.is_grad_enabled(), tensors.needs()
    with torch.no_grad():
        if layer is not None:
            layer.count(tensors.topk_ids)
            has_factors = tensors.weights.gate_up_a is not None or tensors.weights.down_a is not None
            layer.takes_adapters |= has_factors and not spec.experts.adapters
        call.num_slots = spec.num_experts
        if spec.placement is not None:
            tensors = tensors._replace(topk_ids=spec.placement.slots(tensors.topk_ids, transport.rank))
            call.num_slots = transport.size * spec.placement.num_slots
        scores = call.nonfinite_scores
        call.num_nonfinite_rows = count_nonfinite_rows(tensors, call.num_slots) if scores is None else scores
    call.tensors, call.state = tensors, state_of(transport)
    call.sequence = call.state.next_call()
    return kinds


def _checked_tensors(call: ProposedCall) -> tuple[CallTensors[Tensor], PerWeight[Tensor] | None]:
    """Check what is so on every transport, in a CUDA graph or not.

    Return the tensors in autocast's dtypes, and the weights as they are given where a main_grad hangs on one.
    """
    spec, transport, given = call.spec, call.transport, call.tensors
    _ = spec.experts.checked
    if call.fillers:
        check_fillers(call.fillers)
    tensors = checked_tensors(given, spec.experts.layout, spec.experts.precision)
    is_added = not call.is_compiled and find_main_grads(given.weights) is not None
    if is_added and spec.placement is not None and spec.placement.has_replicas:
        raise ValueError(
            "weights with a main_grad can't have replicas: gradients that were added to a main_grad can't be summed "
            "over the replicas any more. Use a placement without replicas, or leave main_grad to after the backward"
        )
    check_experts_of_rank(tensors.weights.gate_up_proj.shape[0], spec.num_experts, transport.size, spec.placement)
    if tensors.x.dtype not in DTYPE_CODES:
        raise TypeError(f"x must be one of {', '.join(map(str, DTYPE_CODES))}, got {tensors.x.dtype}")
    WireFormat(tensors.x.dtype, spec.overlap.wire_dtype)  # which raises where rows can't travel in this format
    if spec.experts.precision is not None:
        check_with_precision(spec.overlap, spec.experts.precision)
    return with_row_seeds(tensors, spec.experts.dropout), given.weights if is_added else None


def check_with_precision(overlap: OverlapConfig | OverlapPlan, precision: ExpertPrecision) -> None:
    """Raise ValueError unless experts in this precision can exchange their rows so."""
    if overlap.wire_dtype == torch.float8_e4m3fn:
        raise ValueError(
            f"wire_dtype=torch.float8_e4m3fn rounds rows in other blocks than {precision}, so they would be rounded "
            "twice: leave wire_dtype out"
        )
    if isinstance(overlap, OverlapConfig) and overlap.memory_budget_bytes is not None:
        raise ValueError(
            f"memory_budget_bytes doesn't count the rounded copies of rows and weights that {precision} makes: give "
            "num_chunks, or leave the precision out"
        )


def count_nonfinite_rows(tensors: CallTensors[Tensor], num_slots: int) -> Tensor:
    """Return how many tokens have a weight, of a pair that is not skipped, that is not finite: a scalar, not read."""
    skipped = (tensors.topk_ids < 0) | (tensors.topk_ids >= num_slots)
    return (~(torch.isfinite(tensors.topk_weights) | skipped)).any(dim=1).sum()


def check_fillers(fillers: Sequence[Callable[[], None]]) -> None:
    """Raise TypeError or ValueError unless these are at most two functions."""
    if not isinstance(fillers, Sequence) or not all(callable(filler) for filler in fillers):
        raise TypeError(f"fillers must be a list of functions without arguments, got {fillers!r}")
    if len(fillers) > MAX_FILLERS:
        raise ValueError(f"a call takes at most {MAX_FILLERS} fillers, got {len(fillers)}")
