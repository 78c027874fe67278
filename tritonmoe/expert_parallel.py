"""expert_parallel_mlp: one call of the experts spread over many ranks, from its checks to the end of its backward."""

import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .arguments import (
    ExpertSettings,
    ExpertWeights,
    cast_for_autocast,
    check_arguments,
    find_main_grads,
    make_settings,
)
from .autograd import (
    checkpointed_region,
    keep_beside,
    kept_beside,
    once_differentiable,
    outside_graphs,
    without_autocast,
)
from .capacity import (
    is_captured,
    plan_capped_tokens,
    poison,
    post_flag,
    replay_overflowed,
    some_rank_overflowed,
    watched,
)
from .config import Activation, ExpertLayout, KernelOptions, OverlapConfig, OverlapPlan, is_fused
from .dispatch import DTYPE_CODES, CallHeader, DispatchPlan, exchange_plan, plan_tokens, refuse_call
from .errors import TransportError
from .experts_run import ExpertsRun, activation_parameters
from .grouping import Grouping, RowSources
from .overlap.executor import ExpertsPass, LayerPass, LayerReport
from .overlap.memory import BufferWidths
from .overlap.node_pass import NodePass
from .overlap.tuner import Message, PlanChooser
from .placement import ExpertPlacement
from .routing import is_recomputing
from .transports import PendingExchange, Transport, TwoLevelTransport
from .two_level import TwoLevelPlan, check_two_level, exchange_two_level_plan
from .wire import WireFormat

__all__ = ["check_expert_parallel", "expert_parallel_mlp", "next_layer_number", "refuse", "run_expert_parallel"]


MAX_UNDER_WAY = 4096


class _UnderWay(NamedTuple):
    kind: tuple
    plan: OverlapPlan
    region: Any
    """checkpointed_region() of the forward."""


@dataclass
class _TransportState:
    """What lives as long as a transport: how many layer calls it has seen, and what "auto" has learnt."""

    num_calls: int = 0
    num_layers: int = 0
    choosers: dict[tuple, PlanChooser] = field(default_factory=dict)
    captured_flags: list[Tensor] = field(default_factory=list)
    """Of calls with a capacity that CUDA graphs have captured: (1,) bool on the host, set by a replay that gave NaN."""
    under_way: dict[int, _UnderWay] = field(default_factory=dict)
    """By number of the call: forwards inside a checkpoint whose backward is still to come."""
    recompute: tuple[Any, int, int] = (None, -1, 0)
    """The region and backward of the latest recomputed call, and how many calls of the region came before it."""

    def start(self, sequence: int, kind: tuple, plan: OverlapPlan) -> None:
        """Remember a forward, if it is one that will be recomputed."""
        region = checkpointed_region()
        if region is not None:
            self.under_way[sequence] = _UnderWay(kind, plan, region)
        if len(self.under_way) > MAX_UNDER_WAY:  # of forwards whose backward never came
            del self.under_way[next(iter(self.under_way))]

    def plan_to_recompute(self, kind: tuple) -> OverlapPlan | None:
        """Give the plan of the forward that this call recomputes: a region's calls come in their first order.

        None in reentrant checkpointing, where the recompute is the only call that keeps anything.
        """
        region, backward = checkpointed_region(), torch._C._current_graph_task_id()
        number = self.recompute[2] + 1 if self.recompute[:2] == (region, backward) else 0
        self.recompute = region, backward, number
        calls = [call for call in self.under_way.values() if call.region == region]
        return calls[number].plan if number < len(calls) and calls[number].kind == kind else None


_states: "WeakKeyDictionary[Transport, _TransportState]" = WeakKeyDictionary()


@dataclass
class _Call:
    """One expert-parallel call, from the plan to the end of its backward."""

    settings: ExpertSettings
    owners: ExpertWeights
    """The weights as the user holds them, where a main_grad hangs."""
    rank: int
    transport: Transport
    """What the plan's rows go over: of all ranks, or between nodes."""
    plan: DispatchPlan
    first_expert: int
    """The first slot of this rank, where slots are experts unless there is a placement."""
    placement: ExpertPlacement | None = None
    two_level: TwoLevelPlan | None = None
    """On a TwoLevelTransport: both levels; `plan` is the outer one."""
    inside_node: Transport | None = None
    fillers: Sequence[Callable[[], None]] = ()
    report: LayerReport | None = None
    flag: PendingExchange | None = None
    """In a captured call with a capacity: every rank's flag, under way while the rows are."""
    is_wrong: Tensor | None = None
    """(1,) bool on the device, once the flags are here: whether the results are to be NaN."""
    sequence: int = 0
    under_way: dict[int, Any] = field(default_factory=dict)
    """That of the transport's state, from which a backward takes its call."""


@dataclass
class _Kept:
    """What a forward keeps for its backward beside tensors."""

    plan: DispatchPlan
    inner_plan: DispatchPlan | None
    grouping: Grouping
    activation_graphs: Any
    report: LayerReport


class _ExpertParallelMLP(torch.autograd.Function):
    """One layer call on one rank; the plan is made before, so that autograd sees what any rank needs."""

    @staticmethod
    def forward(
        ctx: Any,
        call: _Call,
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
        settings, plan = call.settings, call.plan
        weights = ExpertWeights(gate_up_proj, gate_up_bias, down_proj, down_bias)
        keep = plan.needs_any and (settings.save == "hidden" or not is_fused(settings.activation))

        def make_run(at: DispatchPlan, rows: Tensor, ids: Tensor, received_weights: Tensor) -> ExpertsRun:
            """Make the experts of the rows that plan `at` brings here."""
            sources = at.row_sources() if call.two_level is None else call.two_level.row_sources()
            local_ids, is_two_level = ids - call.first_expert, call.two_level is not None
            grouping = _group(settings, at, local_ids, gate_up_proj.shape[0], sources, is_two_level)
            return ExpertsRun(settings, weights, rows, received_weights, grouping, keep)

        def make_experts(at: DispatchPlan, rows: Tensor, ids: Tensor, received_weights: Tensor) -> ExpertsPass:
            if call.two_level is None:
                return make_run(at, rows, ids, received_weights)
            inner, inside_node = call.two_level.inner(ids), call.inside_node
            assert inside_node is not None
            num_slices = at.overlap.num_local_slices
            combine = settings.ops.combine
            return NodePass.receive(inner, inside_node, num_slices, combine, rows, ids, received_weights, make_run)

        layer_pass = LayerPass(plan, call.transport, settings.ops.combine, make_experts, fillers=call.fillers)
        with _naming_rank(call):
            out, timings = layer_pass.forward(x, topk_ids, topk_weights)
        plan = call.plan = layer_pass.plan
        run = layer_pass.experts
        inner_plan = None
        if isinstance(run, NodePass):
            timings.inside = run.reports
            inner_plan, run = run.plan, run.experts
        assert isinstance(run, ExpertsRun)
        call.report = LayerReport(
            call.rank,
            plan.traffic,
            plan.traffic_pairs,
            WireFormat(x.dtype, plan.overlap.wire_dtype).row_bytes(x.shape[1]),
            plan.overlap,
            topk_ids.shape[1],
            plan.send_offsets,
            plan.return_offsets,
            plan.pair_offsets if call.two_level is None else call.two_level.pair_offsets,
            forward=timings,
            wire_squares=layer_pass.wire_squares,
            other_row_bytes=layer_pass.other_row_bytes(x),
            rows_between_nodes=None if call.two_level is None else sum(plan.all_send_splits) - plan.rows_to_itself,
        )
        ctx.call = call
        ctx.num_parameters = len(parameters)
        ctx.weights_dtype = topk_weights.dtype
        if plan.needs_any:
            mark = keep_beside(ctx, _Kept(plan, inner_plan, run.grouping, run.activation_graphs, call.report))
            ctx.save_for_backward(run.rows, run.topk_weights, *weights, run.h, mark, *parameters)
        if call.flag is not None:
            call.is_wrong = call.flag.wait().any().view(1)
            poison([out], call.is_wrong)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        rows, received_weights, w1, b1, w2, b2, h, mark, *parameters = ctx.saved_tensors
        kept: _Kept = kept_beside(ctx, mark)
        run = ExpertsRun(
            call.settings,
            ExpertWeights(w1, b1, w2, b2),
            rows,
            received_weights,
            kept.grouping,
            False,
            h,
            activation_graphs=kept.activation_graphs,
            activation_parameters=parameters,
            main_grads=find_main_grads(call.owners),
        )
        experts: ExpertsPass = run
        if kept.inner_plan is not None:
            assert call.inside_node is not None
            num_slices, combine = kept.plan.overlap.num_local_slices, call.settings.ops.combine
            experts = NodePass(kept.inner_plan, call.inside_node, num_slices, combine, rows.new_empty(0), run, rows)
            received_weights = received_weights.new_empty(kept.plan.num_received, received_weights.shape[1])
        layer_pass = LayerPass(
            kept.plan,
            call.transport,
            call.settings.ops.combine,
            make_experts=None,
            experts=experts,
            received_weights=received_weights,
            placement=call.placement,
        )
        with _naming_rank(call):
            dx, dtopk_weights, grads, timings = layer_pass.backward(dout, ctx.needs_input_grad[4:8])
        if isinstance(experts, NodePass):
            timings.inside = experts.reports
        assert call.report is not None
        kept.report.backward = timings
        if call.report.overlap == kept.report.overlap:  # else it says nothing about the plan of the first forward
            call.report.backward = timings
        call.under_way.pop(call.sequence, None)
        if call.is_wrong is not None:
            poison([dx, dtopk_weights, *grads, *(run.main_grads or ()), *run.activation_grads], call.is_wrong)
        if dtopk_weights is not None:
            dtopk_weights = dtopk_weights.to(ctx.weights_dtype)
        return None, None, dx, dtopk_weights, *grads, None, *run.activation_grads


@contextmanager
def _naming_rank(call: _Call) -> Iterator[None]:
    """Let an error on two levels say which rank of all it is of: exchanges count the ranks of their level."""
    try:
        yield
    except TransportError as error:
        if call.two_level is None:
            raise
        raise TransportError(f"rank {call.rank} of {len(call.plan.headers)} on two levels: {error}") from error


def _group(
    settings: ExpertSettings,
    plan: DispatchPlan,
    local_ids: Tensor,
    num_local_experts: int,
    row_sources: RowSources,
    is_two_level: bool,
) -> Grouping:
    """Group the received rows, of experts local_ids (R, K), in the plan's chunks."""
    row_offsets, pair_offsets, places = plan.receive_offsets, plan.pair_offsets, None
    num_slices = plan.overlap.num_local_slices
    if plan.overlap.chunk_by == "experts":
        # By (rank, token) behind the local rows, all chunks are one, whose pairs are by expert then.
        local = torch.arange(plan.num_local, device=local_ids.device)
        places = torch.cat([local, plan.receive_order()]), torch.cat([local, plan.return_order()])
        local_ids = local_ids[places[0]]
        rows = row_sources.rows
        row_sources = RowSources(
            row_sources.ranks, torch.cat([rows[:num_slices], rows[num_slices:].sum(0, keepdim=True)])
        )
        row_offsets, pair_offsets = ((*of[: num_slices + 1], of[-1]) for of in (row_offsets, pair_offsets))
    busy = [c for c, (first, last) in enumerate(pairwise(row_offsets)) if first < last]
    if len(busy) > 1 or is_two_level or plan.tokens.padding is not None:
        grouping = settings.ops.group(
            local_ids,
            num_local_experts,
            chunk_row_offsets=row_offsets,
            chunk_pair_offsets=pair_offsets,
            row_sources=row_sources,
        )
    else:
        # All rows in one chunk are stored in source order already.
        grouping = settings.ops.group(
            local_ids,
            num_local_experts,
            chunk_row_offsets=(0, plan.num_received),
            chunk_pair_offsets=(0, pair_offsets[-1]),
        ).among_empty_chunks(busy[0] if busy else 0, row_offsets, pair_offsets)
    if places is None:
        return grouping
    return grouping.in_expert_chunks(
        plan.overlap.bounds(num_local_experts), plan.return_offsets, plan.pair_offsets, *places
    )


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


def next_layer_number(transport: Transport) -> int:
    """Give a new layer its place on this transport, by which the ranks know that they call the same one."""
    state = _states.setdefault(transport, _TransportState())
    state.num_layers += 1
    return state.num_layers - 1


def refuse(transport: Transport) -> None:
    """Let the other ranks hear that this rank raised before its part of a layer call; then it may raise."""
    state = _states.setdefault(transport, _TransportState())
    state.num_calls += 1
    refuse_call(transport, state.num_calls - 1)


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
    state = _states.setdefault(transport, _TransportState())
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
        call = _Call(settings, owners, rank, row_transport, plan, first_expert, placement, two_level, inside_node)
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
