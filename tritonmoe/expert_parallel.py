"""expert_parallel_mlp: one call of the experts spread over many ranks, its checks and its plan."""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from .arguments import (
    ExpertWeights,
    cast_for_autocast,
    check_arguments,
    find_main_grads,
    make_settings,
)
from .autograd import (
    keep_beside,
    kept_beside,
    once_differentiable,
    outside_graphs,
    without_autocast,
)
from .capacity import (
    is_captured,
    plan_capped_tokens,
    post_flag,
    replay_overflowed,
    some_rank_overflowed,
    watched,
)
from .config import Activation, ExpertLayout, KernelOptions, OverlapConfig, OverlapPlan, is_fused
from .count_exchange import DTYPE_CODES, CallHeader
from .dispatch import DispatchPlan, exchange_plan, plan_tokens
from .expert_parallel_call import ExpertParallelCall, run_backward, run_forward
from .experts_run import activation_parameters
from .overlap.executor import LayerReport
from .overlap.memory import BufferWidths
from .overlap.tuner import Message, PlanChooser
from .placement import ExpertPlacement
from .routing import is_recomputing
from .transport_state import refuse, state_of
from .transports import Transport, TwoLevelTransport
from .two_level import check_two_level, exchange_two_level_plan
from .wire import WireFormat

__all__ = ["check_expert_parallel", "expert_parallel_mlp", "run_expert_parallel"]


class _ExpertParallelMLP(torch.autograd.Function):
    """One layer call on one rank; the plan is made before, so that autograd sees what any rank needs."""

    @staticmethod
    def forward(
        ctx: Any,
        call: ExpertParallelCall,
        topk_ids: Tensor,
        x: Tensor,
        topk_weights: Tensor,
        gate_up_proj: Tensor,
        gate_up_bias: Tensor | None,
        down_proj: Tensor,
        down_bias: Tensor | None,
        anchor: Tensor | None,
        *parameters: Tensor,
    ) -> Tensor:
        weights = ExpertWeights(gate_up_proj, gate_up_bias, down_proj, down_bias)
        out, run, kept = run_forward(call, topk_ids, x, topk_weights, weights)
        ctx.call = call
        ctx.weights_dtype = topk_weights.dtype
        if kept.plan.needs_any:
            ctx.save_for_backward(run.rows, run.topk_weights, *weights, run.h, keep_beside(ctx, kept), *parameters)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        rows, received_weights, w1, b1, w2, b2, h, mark, *parameters = ctx.saved_tensors
        dx, dtopk_weights, grads, activation_grads = run_backward(
            ctx.call,
            kept_beside(ctx, mark),
            rows,
            received_weights,
            ExpertWeights(w1, b1, w2, b2),
            h,
            dout,
            ctx.needs_input_grad[4:8],
            parameters,
        )
        if dtopk_weights is not None:
            dtopk_weights = dtopk_weights.to(ctx.weights_dtype)
        return None, None, dx, dtopk_weights, *grads, None, *activation_grads


def expert_parallel_mlp(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    *,
    num_experts: int,
    transport: Transport,
    overlap: OverlapConfig | OverlapPlan | None = None,
    placement: ExpertPlacement | None = None,
    activation: Activation = "silu",
    gated: bool = True,
    interleaved: bool = False,
    transposed: bool = False,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    backend: str = "auto",
    save: Literal["hidden", "input"] = "hidden",
    num_sms: int | None = None,
    batch_invariant: bool = False,
    fillers: Sequence[Callable[[], None]] = (),
) -> Tensor:
    """Do what moe_mlp does with the experts spread over the ranks of `transport`, exchanges hidden behind compute.

    Rank k holds the experts k * E / W .. (k + 1) * E / W. Every rank makes every call, forward and backward; T may
    differ between ranks, zero included. Expert gradients are the sum over all ranks' losses: where dense gradients
    are averaged over W ranks, divide these by W.

    Args:
        x: this rank's tokens (T, D). topk_ids: (T, K) global expert ids. topk_weights: (T, K), used in fp32.
        gate_up_proj, down_proj, gate_up_bias, down_bias: this rank's E / W experts, shapes as in moe_mlp.
        num_experts: E over all ranks, divisible by transport.size.
        overlap: what to choose the chunks from, or the OverlapPlan to run; the same on every rank. None is
            OverlapConfig().
        placement: which experts this rank's weights are, where not the contiguous ones: gate_up_proj is then
            (slots, 2F, D), and so on. Gradients of replicas are summed over their owners, so that they stay equal.
        fillers: at most two functions that need no exchange (halves of a dense block, the next router): the first is
            called while the first rows are under way, the second while the last are. They run in the caller's grad
            mode and keep what they make; their gradients are ordinary autograd's.
    Returns:
        (T, D) in x.dtype.
    Raises:
        ValueError, TypeError: on the rank whose arguments don't fit; the others raise TransportError. Nothing moves.
        CountMismatch: the ranks make different calls. NonFiniteScores: a rank's topk_weights are not finite.
        TransportError: an exchange failed or timed out.
    """
    y, _ = run_expert_parallel(
        x,
        topk_ids,
        topk_weights,
        ExpertWeights(gate_up_proj, gate_up_bias, down_proj, down_bias),
        num_experts=num_experts,
        transport=transport,
        overlap=overlap or OverlapConfig(),
        placement=placement,
        layout_flags=(gated, interleaved, transposed),
        activation=activation,
        backend=backend,
        save=save,
        options=KernelOptions(num_sms, batch_invariant),
        fillers=fillers,
    )
    return y


def run_expert_parallel(*arguments: Any, **options: Any) -> tuple[Tensor, LayerReport]:
    """Run one layer call, outside the graph where torch.compile sees it: the plan is made of exchanged counts."""
    run = _call_outside_graphs if torch.compiler.is_compiling() else _run_eagerly
    return run(*arguments, **options)


def _run_eagerly(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    weights: ExpertWeights,
    *,
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
    num_nonfinite_rows: Tensor | None = None,
    fillers: Sequence[Callable[[], None]] = (),
) -> tuple[Tensor, LayerReport]:
    rank, size = transport.rank, transport.size
    state = state_of(transport)
    owners = weights
    try:
        x, topk_weights, weights = cast_for_autocast(x, topk_weights, owners)
        # Refuses bad ones here, before anything is sent.
        if find_main_grads(owners) is not None and placement is not None and placement.has_replicas:
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
        if len(fillers) > MAX_FILLERS:
            raise ValueError(f"there is room for {MAX_FILLERS} fillers in a call, got {len(fillers)}")
        in_graph = is_captured(x.device)
        if in_graph and overlap.capacity is None:
            raise ValueError(
                "a CUDA graph can't capture an expert-parallel call that waits for its counts: give OverlapConfig a "
                "capacity, or leave these layers out of the graph"
            )
        settings = make_settings(x, topk_ids, weights, layout, activation, backend, save, options)
        parameters = [] if is_fused(activation) else activation_parameters(activation, weights.gate_up_proj, layout)
    except Exception:
        refuse(transport)
        raise
    sequence = state.num_calls
    state.num_calls += 1
    grad_enabled = torch.is_grad_enabled()
    tensors = [x, topk_weights, *(w for w in weights if w is not None), *parameters]
    needs_any = grad_enabled and any(t.requires_grad for t in tensors)
    replica_grads = 0
    if placement is not None and placement.has_replicas and grad_enabled:
        replica_grads = sum(2**i for i, w in enumerate(weights) if w is not None and w.requires_grad)
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
            max_block_pairs=settings.ops.MAX_BLOCK_PAIRS,
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
            needs_any=int(needs_any),
            needs_x=int(grad_enabled and x.requires_grad),
            needs_topk_weights=int(grad_enabled and topk_weights.requires_grad),
            placement=0 if placement is None else zlib.crc32(str(placement.experts_of_rank).encode()),
            replica_grads=replica_grads,
            replay_overflowed=int(not in_graph and replay_overflowed(state.captured_flags, x.device)),
            layer=layer,
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
            plan = exchange_plan(transport, replace(header, nonfinite_rows=tokens.nonfinite_rows), tokens, chosen)
    first_expert = rank * (num_experts // size)

    def in_caller_mode(filler: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            with torch.set_grad_enabled(grad_enabled):  # a Function's forward runs without
                filler()

        return run

    def run_plan(plan: DispatchPlan, fillers: Sequence[Callable[[], None]] = ()) -> tuple[Tensor, LayerReport]:
        call = ExpertParallelCall(
            settings, owners, rank, row_transport, plan, first_expert, placement, two_level, inside_node
        )
        call.sequence, call.under_way = sequence, state.under_way
        call.fillers, call.flag = [in_caller_mode(filler) for filler in fillers], flag
        # A rank that needs no gradient itself still takes part in the others' backward.
        anchor = x.new_empty(0).requires_grad_() if plan.needs_any and not needs_any else None
        with without_autocast(x.device):
            y = _ExpertParallelMLP.apply(call, topk_ids, x, topk_weights, *weights, anchor, *parameters)
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
            plan = exchange_plan(transport, replace(header, capacity=0), tokens, chosen)
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


_call_outside_graphs = outside_graphs(_run_eagerly)

MAX_FILLERS = 2


def check_expert_parallel(
    num_local_experts: int, num_experts: int, size: int, placement: ExpertPlacement | None = None
) -> None:
    """Raise ValueError unless num_experts can be split over `size` ranks and this rank holds its share."""
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
