"""check(): whether the arguments of an expert-parallel call fit together, before anything of it is sent."""

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tritonmoe.config.activations import is_fused
from tritonmoe.config.formats import weight_shape
from tritonmoe.config.layer import PerWeight
from tritonmoe.config.numbers import is_integer
from tritonmoe.config.overlap import OverlapConfig, OverlapPlan, check_overlap
from tritonmoe.config.precision import ExpertPrecision
from tritonmoe.dispatch.header import DTYPE_CODES
from tritonmoe.dispatch.placement import ExpertPlacement
from tritonmoe.expert_parallel.call import ProposedCall, listeners
from tritonmoe.expert_parallel.plans import PLAN_KINDS
from tritonmoe.expert_parallel.plans.base import PlanKind
from tritonmoe.expert_parallel.state import abort_call, state_of
from tritonmoe.experts.adapter_dropout import with_row_seeds
from tritonmoe.experts.arguments import (
    cast_for_autocast,
    check_arguments,
    check_tensors,
    find_main_grads,
)
from tritonmoe.experts.callable_activation import activation_parameters
from tritonmoe.experts.spec import ExpertSpec, choose_backend
from tritonmoe.experts.tensors import CallTensors
from tritonmoe.runtime.host_device import is_captured
from tritonmoe.transports.wire import WireFormat

__all__ = ["MAX_FILLERS", "check", "check_expert_parallel", "check_fillers"]

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
        if not is_fused(spec.experts.activation):
            tensors = _with_activation_parameters(tensors, spec.experts)
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
    down, scales = tensors.weights.down_proj, tensors.weights.down_scales
    down_shape = tuple(down.shape) if scales is None else weight_shape(down, scales)
    call.intermediate_size = down_shape[2 - spec.experts.layout.transposed]
    call.tensors, call.state = tensors, state_of(transport)
    call.sequence = call.state.next_call()
    return kinds


def _with_activation_parameters(tensors: CallTensors[Tensor], spec: ExpertSpec) -> CallTensors[Tensor]:
    """Return the tensors with the parameters of a callable activation."""
    weights = tensors.weights
    like = tensors.x.new_empty(1).expand(weight_shape(weights.gate_up_proj, weights.gate_up_scales))
    return tensors._replace(activation_parameters=activation_parameters(spec.activation, like, spec.layout))


def _checked_tensors(call: ProposedCall) -> tuple[CallTensors[Tensor], PerWeight[Tensor] | None]:
    """Check what is so on every transport, in a CUDA graph or not.

    Return the tensors in autocast's dtypes, and the weights as they are given where a main_grad hangs on one.
    """
    spec, transport, given = call.spec, call.transport, call.tensors
    _ = spec.experts.checked
    check_overlap(spec.overlap)
    check_tensors(given)
    if call.fillers:
        check_fillers(call.fillers)
    tensors = cast_for_autocast(given)
    is_added = not call.is_compiled and find_main_grads(given.weights) is not None
    if is_added and spec.placement is not None and spec.placement.has_replicas:
        raise ValueError(
            "weights with a main_grad can't have replicas: gradients that were added to a main_grad can't be summed "
            "over the replicas any more. Use a placement without replicas, or leave main_grad to after the backward"
        )
    check_arguments(tensors, spec.experts.layout, spec.experts.precision)
    check_expert_parallel(tensors.weights.gate_up_proj.shape[0], spec.num_experts, transport.size, spec.placement)
    check_dtype(tensors.x.dtype, spec.overlap)
    if spec.experts.precision is not None:
        _check_with_precision(spec.overlap, spec.experts.precision)
    return with_row_seeds(tensors, spec.experts.dropout), given.weights if is_added else None


def _check_with_precision(overlap: OverlapConfig | OverlapPlan, precision: ExpertPrecision) -> None:
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


def check_dtype(dtype: torch.dtype, overlap: OverlapConfig | OverlapPlan) -> None:
    """Raise TypeError or ValueError unless rows of this dtype can travel, in the wire format that is asked for."""
    if dtype not in DTYPE_CODES:
        raise TypeError(f"x must be one of {', '.join(map(str, DTYPE_CODES))}, got {dtype}")
    WireFormat(dtype, overlap.wire_dtype)


def check_expert_parallel(
    num_local_experts: int, num_experts: int, size: int, placement: ExpertPlacement | None = None
) -> None:
    """Raise ValueError or TypeError unless num_experts can be split over `size` ranks and this rank holds its share."""
    if not is_integer(num_experts):
        raise TypeError(f"num_experts must be a whole number, E over all ranks, got {num_experts!r}")
    if placement is not None and not isinstance(placement, ExpertPlacement):
        raise TypeError(f"placement must be an ExpertPlacement or None, got {placement!r}")
    if placement is not None:
        if (placement.size, placement.num_experts) != (size, num_experts):
            raise ValueError(
                f"placement is for {placement.num_experts} experts on {placement.size} ranks, the layer has "
                f"{num_experts} experts on {size} ranks"
            )
        if num_local_experts != placement.num_slots:
            raise ValueError(
                f"placement gives each rank {placement.num_slots} slots, but this rank's gate_up_proj has "
                f"{num_local_experts} experts: pass the experts of placement.experts_of_rank[rank], in that order"
            )
        return
    if num_experts < 1 or num_experts % size:
        sizes = [w for w in range(1, num_experts + 1) if num_experts % w == 0]
        raise ValueError(
            f"num_experts ({num_experts}) must be divisible by the number of ranks ({size}); "
            f"choose one of {', '.join(map(str, sizes))} ranks"
        )
    if num_local_experts != num_experts // size:
        raise ValueError(
            f"each of {size} ranks holds num_experts / ranks = {num_experts // size} experts, but this rank's "
            f"gate_up_proj has {num_local_experts}: pass only this rank's experts"
        )
