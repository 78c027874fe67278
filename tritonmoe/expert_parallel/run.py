"""A layer call from its arguments to its result: checks, a plan that all ranks agree on, and its run."""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from tritonmoe.config.layer import Activation, ExpertLayout, KernelOptions, is_fused, is_integer
from tritonmoe.config.overlap import OverlapConfig, OverlapPlan, check_overlap
from tritonmoe.dispatch.capacity import (
    plan_capped_tokens,
    post_flag,
    replay_overflowed,
    some_rank_overflowed,
    watched,
)
from tritonmoe.dispatch.header import DTYPE_CODES, EXPERT_GRADIENTS, SAVES, CallHeader, activation_fields
from tritonmoe.dispatch.placement import ExpertPlacement, replica_bits
from tritonmoe.dispatch.plan import DispatchPlan, exchange_plan
from tritonmoe.dispatch.send_plan import plan_tokens
from tritonmoe.dispatch.two_level import check_two_level, exchange_two_level_plan
from tritonmoe.expert_parallel.call import ExpertParallelCall
from tritonmoe.expert_parallel.state import refuse, state_of
from tritonmoe.experts.arguments import (
    ExpertWeights,
    cast_for_autocast,
    check_arguments,
    check_tensors,
    find_main_grads,
    make_settings,
)
from tritonmoe.experts.callable_activation import activation_parameters
from tritonmoe.overlap.report import LayerReport
from tritonmoe.runtime.autograd import caller_autocast, is_recomputing, without_autocast
from tritonmoe.runtime.cpu_threads import num_workers
from tritonmoe.runtime.host_device import is_captured
from tritonmoe.simulation.memory import BufferWidths, WorkingSet
from tritonmoe.transports import Transport, TwoLevelTransport
from tritonmoe.transports.wire import WireFormat
from tritonmoe.tuning.tuner import Message, PlanChooser

__all__ = ["MAX_FILLERS", "Needs", "check_expert_parallel", "check_fillers", "run_call"]

MAX_FILLERS = 2

Apply = Callable[[ExpertParallelCall, Tensor, Tensor, Tensor, ExpertWeights, Sequence[Tensor]], Tensor]
"""(call, topk_ids, x, topk_weights, weights, parameters of a callable activation) -> y, by run_forward."""


class Needs(NamedTuple):
    """What this rank needs a gradient of."""

    grad_enabled: bool
    x: bool
    topk_weights: bool
    gate_up_proj: bool
    gate_up_bias: bool
    down_proj: bool
    down_bias: bool
    parameters: bool = False

    @classmethod
    def of(cls, x: Tensor, topk_weights: Tensor, weights: ExpertWeights, parameters: Sequence[Tensor]) -> "Needs":
        """Ask the tensors, in the caller's grad mode."""
        enabled = torch.is_grad_enabled()
        tensors = (x, topk_weights, *weights)
        needs_x, needs_topk_weights, w1, b1, w2, b2 = (enabled and t is not None and t.requires_grad for t in tensors)
        return cls(
            enabled, needs_x, needs_topk_weights, w1, b1, w2, b2, enabled and any(p.requires_grad for p in parameters)
        )

    @property
    def weights(self) -> tuple[bool, bool, bool, bool]:
        """In the order of ExpertWeights."""
        return self[3:7]

    @property
    def any(self) -> bool:
        return any(self[1:])


def run_call(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    weights: ExpertWeights,
    *,
    owners: ExpertWeights | None,
    apply: Apply,
    needs: Needs | None = None,
    num_experts: int,
    transport: Transport,
    overlap: OverlapConfig | OverlapPlan,
    placement: ExpertPlacement | None,
    layout_flags: tuple[bool, bool, bool],
    activation: Activation,
    backend: str,
    save: Literal["hidden", "input"],
    options: KernelOptions,
    layer: int = -1,
    expert_gradients: str = "sum",
    num_nonfinite_rows: Tensor | None = None,
    fillers: Sequence[Callable[[], None]] = (),
) -> tuple[Tensor, LayerReport]:
    """Check the arguments, agree on a plan with the other ranks, and run it; a capacity that overflowed, twice.

    Args:
        owners: the weights as the user holds them, where a main_grad hangs; None where there can be none.
        apply: runs one planned call.
        needs: which gradients a compiled graph was made for; None to ask the tensors.
        The others are expert_parallel_mlp's, and GroupedExperts.forward's.
    Returns:
        What `apply` gave, and the report.
    """
    rank, size = transport.rank, transport.size
    state = state_of(transport)
    try:
        check_tensors(x, topk_ids, topk_weights, weights)
        check_overlap(overlap)
        check_fillers(fillers)
        x, topk_weights, weights = cast_for_autocast(x, topk_weights, weights)
        # Refuses bad ones here, before anything is sent.
        has_main_grads = owners is not None and find_main_grads(owners) is not None
        if has_main_grads and placement is not None and placement.has_replicas:
            raise ValueError(
                "weights with a main_grad can't have replicas: what was added to a main_grad can't be summed over the "
                "replicas any more. Use a placement without replicas, or leave main_grad to after the backward"
            )
        layout = ExpertLayout(*layout_flags)
        check_arguments(x, topk_ids, topk_weights, weights, layout, activation)
        check_expert_parallel(weights.gate_up_proj.shape[0], num_experts, size, placement)
        if x.dtype not in DTYPE_CODES:
            raise TypeError(f"x must be one of {', '.join(map(str, DTYPE_CODES))}, got {x.dtype}")
        WireFormat(x.dtype, overlap.wire_dtype)
        if isinstance(transport, TwoLevelTransport):
            check_two_level(overlap, placement)
        in_graph = is_captured(x.device)
        if in_graph and overlap.capacity is None:
            raise ValueError(
                "a CUDA graph can't capture an expert-parallel call that waits for its counts: give OverlapConfig a "
                "capacity, or leave these layers out of the graph"
            )
        options = options._replace(beside_exchanges=size > 1)
        settings = make_settings(x, topk_ids, weights, layout, activation, backend, save, options)
        parameters = [] if is_fused(activation) else activation_parameters(activation, weights.gate_up_proj, layout)
    except Exception:
        refuse(transport)
        raise
    sequence = state.num_calls
    state.num_calls += 1
    is_compiled = needs is not None
    needs = needs or Needs.of(x, topk_weights, weights, parameters)
    grad_enabled = needs.grad_enabled
    inner = layout.intermediate_size(weights.gate_up_proj.shape[2 if layout.transposed else 1])
    kind: tuple = ()
    chooser, again = None, None
    if isinstance(overlap, OverlapConfig):
        widths = BufferWidths(
            x.shape[1],
            inner,
            weights.gate_up_proj.shape[0],
            x.dtype.itemsize,
            gated=layout.gated,
            save=save,
            has_backward=grad_enabled,
        )
        kind = (num_experts, widths, topk_ids.shape[1], x.dtype, topk_weights.dtype, overlap)
        chooser = state.choosers.setdefault(
            kind,
            PlanChooser(
                overlap,
                size,
                transport.shares_link(x.device),
                widths,
                can_cut_experts=not isinstance(transport, TwoLevelTransport),
            ),
        )
        ops = settings.ops
        chooser.working_set = WorkingSet(ops.MAX_BLOCK_PAIRS, num_workers(x.device), ops.copies_rows())
        if is_recomputing():
            again = state.plan_to_recompute(kind)
        chosen = chooser.plan() if again is None else again
        message = chooser.message() if again is None and not in_graph else Message()
    else:
        chosen, message = overlap, Message()
    chosen = replace(chosen, wire_dtype=overlap.wire_dtype, capacity=overlap.capacity)
    with torch.no_grad():
        if placement is not None:
            topk_ids, num_experts = placement.slots(topk_ids, rank), size * placement.num_slots
        if num_nonfinite_rows is None:
            skipped = (topk_ids < 0) | (topk_ids >= num_experts)
            num_nonfinite_rows = (~(torch.isfinite(topk_weights) | skipped)).any(dim=1).sum()
        header = CallHeader.of(
            chosen,
            sequence=sequence,
            num_experts=num_experts,
            top_k=topk_ids.shape[1],
            hidden_size=x.shape[1],
            dtype=DTYPE_CODES[x.dtype],
            grad_enabled=int(grad_enabled),
            needs_any=int(needs.any),
            needs_x=int(needs.x),
            needs_topk_weights=int(needs.topk_weights),
            compiled=int(is_compiled),
            placement=0 if placement is None else zlib.crc32(str(placement.experts_of_rank).encode()),
            replica_grads=replica_bits(placement, needs.weights),
            replay_overflowed=int(not in_graph and replay_overflowed(state.captured_flags, x.device)),
            layer=layer,
            auto=int(isinstance(overlap, OverlapConfig) and overlap.is_auto),
            save=SAVES.index(save),
            deterministic=int(torch.are_deterministic_algorithms_enabled()),
            topk_weights_dtype=DTYPE_CODES.get(topk_weights.dtype, 0),
            captured=int(in_graph),
            intermediate_size=inner,
            gated=int(layout.gated),
            interleaved=int(layout.interleaved),
            transposed=int(layout.transposed and placement is not None and placement.has_replicas),
            expert_gradients=EXPERT_GRADIENTS.index(expert_gradients),
            gate_up_bias=int(weights.gate_up_bias is not None),
            down_bias=int(weights.down_bias is not None),
            **activation_fields(activation),
            **state.history(),
            **message._asdict(),
        )
        two_level, inside_node, row_transport, capped, flag = None, None, transport, None, None
        if isinstance(transport, TwoLevelTransport):
            two_level = exchange_two_level_plan(transport, header, topk_ids, num_experts, chosen, num_nonfinite_rows)
            plan, row_transport, inside_node = two_level.outer, transport.between_nodes, transport.inside_node
        elif chosen.capacity is not None:
            capped = plan_capped_tokens(topk_ids, num_experts, rank, size, chosen, num_nonfinite_rows)
            plan = exchange_plan(transport, header, capped.tokens, chosen)
            if in_graph:
                flag = post_flag(transport, capped)
        else:
            tokens = plan_tokens(topk_ids, num_experts, rank, size, chosen, num_nonfinite_rows)
            plan = exchange_plan(transport, header._replace(nonfinite_rows=tokens.nonfinite_rows), tokens, chosen)
    first_expert = rank * (num_experts // size)

    autocast = caller_autocast(x.device)

    def in_caller_mode(filler: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            with torch.set_grad_enabled(grad_enabled), autocast():  # a Function's forward runs without either
                filler()

        return run

    def run_plan(plan: DispatchPlan, fillers: Sequence[Callable[[], None]] = ()) -> tuple[Tensor, LayerReport]:
        call = ExpertParallelCall(
            settings,
            owners,
            transport,
            sequence,
            layer,
            row_transport,
            plan,
            first_expert,
            placement,
            two_level,
            inside_node,
        )
        call.fillers, call.flag = [in_caller_mode(filler) for filler in fillers], flag
        with without_autocast(x.device):
            y = apply(call, topk_ids, x, topk_weights, weights, parameters)
        assert call.report is not None
        if call.is_wrong is not None:
            state.captured_flags.append(watched(call.is_wrong))
        return y, call.report

    y, report = run_plan(plan, fillers)
    if capped is not None and not in_graph and some_rank_overflowed(transport, header, capped):
        del y, capped  # and with them what the first run keeps for a backward
        chosen = replace(chosen, capacity=None)
        with torch.no_grad():
            tokens = plan_tokens(topk_ids, num_experts, rank, size, chosen)
            plan = exchange_plan(transport, header._replace(capacity=0), tokens, chosen)
        first_run, (y, report) = report, run_plan(plan)
        report.first_run = first_run
    if again is not None:
        report.choice = "the plan of the forward that is recomputed"
    elif chooser is not None:
        # A captured call has no times, and no later one may read its events.
        if in_graph:
            report.choice = chooser.choice
        else:
            chooser.observe([Message.of(header) for header in plan.headers], report, plan.needs_any)
        if plan.needs_any and not is_recomputing():
            state.start(sequence, kind, chosen)
    return y, report


def check_fillers(fillers: Sequence[Callable[[], None]]) -> None:
    """Raise TypeError or ValueError unless these are at most two functions."""
    if not isinstance(fillers, Sequence) or not all(callable(filler) for filler in fillers):
        raise TypeError(f"fillers must be a list of functions that take nothing, got {fillers!r}")
    if len(fillers) > MAX_FILLERS:
        raise ValueError(f"there is room for {MAX_FILLERS} fillers in a call, got {len(fillers)}")


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
