"""The layer: route, then run the experts on one device or, through the scheduler, on many ranks."""

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .arguments import (
    ExpertSettings,
    ExpertWeights,
    cast_for_autocast,
    check_arguments,
    find_main_grads,
    make_settings,
)
from .autograd import once_differentiable, outside_graphs, without_autocast
from .config import Activation, ExpertLayout, KernelOptions, MoEConfig, OverlapConfig, OverlapPlan, is_fused
from .dispatch import DTYPE_CODES, CallHeader, DispatchPlan, exchange_plan, plan_tokens, refuse_call
from .errors import NonFiniteScores
from .experts import moe_mlp
from .experts_run import ExpertsRun, activation_parameters
from .overlap.executor import ExpertsPass, LayerPass, LayerReport
from .overlap.node_pass import NodePass
from .overlap.tuner import Message, PlanChooser
from .placement import ExpertPlacement
from .routing import Routing, RoutingStatistics, TopKRouter, load_balance_loss, routing_statistics, z_loss
from .shared_expert import SharedExpert
from .transports import Transport, TwoLevelTransport, as_transport
from .two_level import TwoLevelPlan, check_two_level, exchange_two_level_plan
from .wire import WireFormat

__all__ = ["GroupedExperts", "MoELayer", "expert_parallel_mlp"]


@dataclass
class _TransportState:
    """What lives as long as a transport: how many layer calls it has seen, and what "auto" has learnt."""

    num_calls: int = 0
    num_layers: int = 0
    choosers: dict[tuple, PlanChooser] = field(default_factory=dict)


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
            local_ids, num_local_experts = ids - call.first_expert, gate_up_proj.shape[0]
            busy = [c for c, (first, last) in enumerate(pairwise(at.receive_offsets)) if first < last]
            source = at.row_source() if call.two_level is None else call.two_level.row_source(ids.device)
            if len(busy) > 1 or call.two_level is not None:
                grouping = settings.ops.group(
                    local_ids,
                    num_local_experts,
                    chunk_row_offsets=at.receive_offsets,
                    chunk_pair_offsets=at.pair_offsets,
                    row_source=source,
                )
            else:
                # All rows in one chunk are stored in source order already.
                grouping = settings.ops.group(
                    local_ids,
                    num_local_experts,
                    chunk_row_offsets=(0, at.num_received),
                    chunk_pair_offsets=(0, at.pair_offsets[-1]),
                ).among_empty_chunks(busy[0] if busy else 0, at.receive_offsets, at.pair_offsets)
            return ExpertsRun(settings, weights, rows, received_weights, grouping, keep)

        def make_experts(rows: Tensor, ids: Tensor, received_weights: Tensor) -> ExpertsPass:
            if call.two_level is None:
                return make_run(plan, rows, ids, received_weights)
            inner, inside_node = call.two_level.inner(ids), call.inside_node
            assert inside_node is not None
            return NodePass.receive(
                inner, inside_node, settings.ops.combine, rows, ids, received_weights, partial(make_run, inner)
            )

        layer_pass = LayerPass(plan, call.transport, settings.ops.combine, make_experts, fillers=call.fillers)
        out, timings = layer_pass.forward(x, topk_ids, topk_weights)
        run = layer_pass.experts
        ctx.inner_plan = None
        if isinstance(run, NodePass):
            ctx.inner_plan, run = run.plan, run.experts
        assert isinstance(run, ExpertsRun)
        call.report = LayerReport(
            call.rank,
            plan.traffic,
            WireFormat(x.dtype, plan.overlap.wire_dtype).row_bytes(x.shape[1]),
            plan.overlap,
            topk_ids.shape[1],
            plan.home_offsets,
            plan.receive_offsets,
            plan.pair_offsets if call.two_level is None else call.two_level.pair_offsets,
            forward=timings,
            wire_squares=layer_pass.wire_squares,
            other_row_bytes=layer_pass.other_row_bytes(x),
            rows_between_nodes=None if call.two_level is None else sum(plan.all_send_splits) - plan.rows_to_itself,
        )
        ctx.call, ctx.grouping, ctx.activation_graphs = call, run.grouping, run.activation_graphs
        ctx.num_parameters = len(parameters)
        ctx.weights_dtype = topk_weights.dtype
        if plan.needs_any:
            ctx.save_for_backward(run.rows, run.topk_weights, *weights, run.h, *parameters)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        rows, received_weights, w1, b1, w2, b2, h, *parameters = ctx.saved_tensors
        run = ExpertsRun(
            call.settings,
            ExpertWeights(w1, b1, w2, b2),
            rows,
            received_weights,
            ctx.grouping,
            False,
            h,
            activation_graphs=ctx.activation_graphs,
            activation_parameters=parameters,
            main_grads=find_main_grads(call.owners),
        )
        experts: ExpertsPass = run
        if ctx.inner_plan is not None:
            assert call.inside_node is not None
            combine = call.settings.ops.combine
            experts = NodePass(ctx.inner_plan, call.inside_node, combine, rows.new_empty(0), run, rows)
            received_weights = received_weights.new_empty(call.plan.num_received, received_weights.shape[1])
        layer_pass = LayerPass(
            call.plan,
            call.transport,
            call.settings.ops.combine,
            make_experts=None,
            experts=experts,
            received_weights=received_weights,
            placement=call.placement,
        )
        dx, dtopk_weights, grads, timings = layer_pass.backward(dout, ctx.needs_input_grad[4:8])
        assert call.report is not None
        call.report.backward = timings
        if dtopk_weights is not None:
            dtopk_weights = dtopk_weights.to(ctx.weights_dtype)
        return None, None, dx, dtopk_weights, *grads, None, *run.activation_grads


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
    y, _ = _run_expert_parallel(
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


def _refuse(transport: Transport) -> None:
    """Let the other ranks hear that this rank raised before its part of a layer call; then it may raise."""
    state = _states.setdefault(transport, _TransportState())
    state.num_calls += 1
    refuse_call(transport, state.num_calls - 1)


def _run_expert_parallel(*arguments: Any, **options: Any) -> tuple[Tensor, LayerReport]:
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
        settings = make_settings(x, layout, activation, backend, save, options)
        parameters = [] if is_fused(activation) else activation_parameters(activation, weights.gate_up_proj, layout)
    except Exception:
        _refuse(transport)
        raise
    state = _states.setdefault(transport, _TransportState())
    sequence = state.num_calls
    state.num_calls += 1
    grad_enabled = torch.is_grad_enabled()
    tensors = [x, topk_weights, *(w for w in weights if w is not None), *parameters]
    needs_any = grad_enabled and any(t.requires_grad for t in tensors)
    replica_grads = 0
    if placement is not None and placement.has_replicas and grad_enabled:
        replica_grads = sum(2**i for i, w in enumerate(weights) if w is not None and w.requires_grad)
    inner = layout.intermediate_size(weights.gate_up_proj.shape[2 if layout.transposed else 1])
    chooser = None
    if isinstance(overlap, OverlapConfig):
        kind = (num_experts, x.shape[1], inner, topk_ids.shape[1], x.dtype, topk_weights.dtype, grad_enabled)
        chooser = state.choosers.setdefault(
            (*kind, overlap), PlanChooser(overlap, size, transport.shares_link(x.device))
        )
        chosen, message = chooser.plan(), chooser.message()
    else:
        chosen, message = overlap, Message()
    chosen = replace(chosen, wire_dtype=overlap.wire_dtype)
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
            nonfinite_rows=int(num_nonfinite_rows),
            placement=0 if placement is None else zlib.crc32(str(placement.experts_of_rank).encode()),
            replica_grads=replica_grads,
            layer=layer,
            **message._asdict(),
        )
        two_level, inside_node, row_transport = None, None, transport
        if isinstance(transport, TwoLevelTransport):
            two_level = exchange_two_level_plan(transport, header, topk_ids, num_experts, chosen)
            plan, row_transport, inside_node = two_level.outer, transport.between_nodes, transport.inside_node
        else:
            plan = exchange_plan(transport, header, plan_tokens(topk_ids, num_experts, rank, size, chosen), chosen)
    first_expert = rank * (num_experts // size)
    call = _Call(settings, owners, rank, row_transport, plan, first_expert, placement, two_level, inside_node)

    def in_caller_mode(filler: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            with torch.set_grad_enabled(grad_enabled):  # a Function's forward runs without
                filler()

        return run

    call.fillers = [in_caller_mode(filler) for filler in fillers]
    # A rank that needs no gradient itself still takes part in the others' backward.
    anchor = x.new_empty(0).requires_grad_() if plan.needs_any and not needs_any else None
    with without_autocast(x.device):
        y = _ExpertParallelMLP.apply(call, topk_ids, x, topk_weights, *weights, anchor, *parameters)
    assert call.report is not None
    if chooser is not None:
        chooser.observe([Message.of(header) for header in plan.headers], call.report, plan.needs_any)
    return y, call.report


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


class GroupedExperts(nn.Module):
    """The experts of one rank as parameters, named and shaped as in transformers; runs moe_mlp, or its parallel twin.

    Parameters: gate_up_proj (E/W, 2F, D), down_proj (E/W, D, F), and with config.bias gate_up_proj_bias (E/W, 2F) and
    down_proj_bias (E/W, D); F instead of 2F when ungated, axes swapped when transposed.

    Args:
        config: shapes and activation.
        transport: None for one device; else a Transport, a torch ProcessGroup, or a DeviceMesh of one dimension, or of
            two: nodes and ranks of a node (a TwoLevelTransport).
            Every rank makes the same layers on it, in the same order, by which the ranks know that they call the same.
        overlap: how the exchanges overlap; the same on every rank.
        placement: which rank holds which experts; None for E / W contiguous ones each.
        backend, num_sms, batch_invariant: as in moe_mlp.
        generator: draws the weights; the same seed gives the same experts for every number of ranks. None draws
            from torch's global generator, which must then be in the same state on every rank.
    """

    def __init__(
        self,
        config: MoEConfig,
        transport: Any = None,
        overlap: OverlapConfig | OverlapPlan | None = None,
        *,
        placement: ExpertPlacement | None = None,
        backend: str = "auto",
        num_sms: int | None = None,
        batch_invariant: bool = False,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.transport = None if transport is None else as_transport(transport)
        self.overlap = overlap or OverlapConfig()
        self.backend = backend
        self.options = KernelOptions(num_sms, batch_invariant).check()
        self.last_report: LayerReport | None = None
        size = 1 if self.transport is None else self.transport.size
        rank = 0 if self.transport is None else self.transport.rank
        if placement is not None and self.transport is None:
            raise ValueError("placement says which rank holds which experts: it needs a transport")
        self.placement = placement
        self._layer = -1  # its place among this transport's layers, by which the ranks know that they call the same one
        if self.transport is not None:
            state = _states.setdefault(self.transport, _TransportState())
            self._layer = state.num_layers
            state.num_layers += 1
        num_local = config.num_experts // size if placement is None else placement.num_slots
        check_expert_parallel(num_local, config.num_experts, size, placement)
        first = rank * num_local
        self.expert_ids = tuple(range(first, first + num_local))
        """The experts of this rank, in the order of its weights."""
        if placement is not None:
            self.expert_ids = placement.experts_of_rank[rank]
        layout, model_width, inner = config.layout, config.hidden_size, config.intermediate_size
        width = 2 * inner if layout.gated else inner
        up_shape = (model_width, width) if layout.transposed else (width, model_width)
        down_shape = (inner, model_width) if layout.transposed else (model_width, inner)

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(num_local, *shape, device=device, dtype=dtype))

        self.gate_up_proj = empty(*up_shape)
        self.down_proj = empty(*down_shape)
        self.gate_up_proj_bias = empty(width) if config.bias else None
        self.down_proj_bias = empty(model_width) if config.bias else None
        self.reset_parameters(generator)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "last_report": None}

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw every expert from a seed of its own, so that its values don't depend on the number of ranks."""
        seed = int(torch.randint(2**62, (), generator=generator))
        for local, expert in enumerate(self.expert_ids):
            own = torch.Generator().manual_seed(seed + expert)
            for weight, fan_in in (
                (self.gate_up_proj[local], self.config.hidden_size),
                (self.down_proj[local], self.config.intermediate_size),
            ):
                bound = 1 / math.sqrt(fan_in)
                weight.copy_(torch.empty(weight.shape).uniform_(-bound, bound, generator=own))
        for bias in (self.gate_up_proj_bias, self.down_proj_bias):
            if bias is not None:
                bias.zero_()

    def forward(
        self,
        x: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        *,
        num_nonfinite_rows: Tensor | None = None,
        fillers: Sequence[Callable[[], None]] = (),
    ) -> Tensor:
        """Give (T, D) of x (T, D), topk_ids (T, K) and topk_weights (T, K); with several ranks, every rank calls.

        num_nonfinite_rows: Routing's count of tokens without a finite score; more than zero raises on every rank.
        fillers: as in expert_parallel_mlp; on one device they are called first.
        """
        config = self.config
        if self.transport is None:
            for filler in fillers:
                filler()
            return moe_mlp(
                x,
                topk_ids,
                topk_weights,
                self.gate_up_proj,
                self.down_proj,
                activation=config.activation,
                gated=config.gated,
                interleaved=config.interleaved,
                transposed=config.transposed,
                gate_up_bias=self.gate_up_proj_bias,
                down_bias=self.down_proj_bias,
                backend=self.backend,
                num_sms=self.options.num_sms,
                batch_invariant=self.options.batch_invariant,
            )
        y, self.last_report = _run_expert_parallel(
            x,
            topk_ids,
            topk_weights,
            ExpertWeights(self.gate_up_proj, self.gate_up_proj_bias, self.down_proj, self.down_proj_bias),
            num_experts=config.num_experts,
            transport=self.transport,
            overlap=self.overlap,
            placement=self.placement,
            layout_flags=(config.gated, config.interleaved, config.transposed),
            activation=config.activation,
            backend=self.backend,
            save="hidden",
            options=self.options,
            layer=self._layer,
            num_nonfinite_rows=num_nonfinite_rows,
            fillers=fillers,
        )
        return y


class MoELayer(nn.Module):
    """A router and its experts: (..., D) -> (..., D), to stand where a feed-forward block stood.

    With config.shared_intermediate_size, `shared_expert` is added to them: its up half runs under the first dispatch,
    its down half under the last combine; backward runs it before the exchanges.
    After forward: `aux_loss` (attached, the weighted sum of config's losses, zero where it has none), `last_routing`,
    `statistics()` of this rank's tokens, and with a transport `last_report`. Reentrant checkpointing runs forward
    without a graph: there, make aux_loss a result of the checkpointed function, `lambda x: (layer(x), layer.aux_loss)`.

    The router is the same on every rank and its gradient is this rank's share: average it as any dense parameter's.
    Expert gradients are sums over the ranks; see expert_parallel_mlp. Arguments are those of GroupedExperts.
    """

    def __init__(
        self,
        config: MoEConfig,
        transport: Any = None,
        overlap: OverlapConfig | OverlapPlan | None = None,
        *,
        placement: ExpertPlacement | None = None,
        backend: str = "auto",
        num_sms: int | None = None,
        batch_invariant: bool = False,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.router = TopKRouter(config, device=device, dtype=dtype)
        with torch.no_grad():
            bound = 1 / math.sqrt(config.hidden_size)
            drawn = torch.empty(self.router.weight.shape).uniform_(-bound, bound, generator=generator)
            self.router.weight.copy_(drawn)
        self.experts = GroupedExperts(
            config,
            transport,
            overlap,
            placement=placement,
            backend=backend,
            num_sms=num_sms,
            batch_invariant=batch_invariant,
            generator=generator,
            device=device,
            dtype=dtype,
        )
        self.shared_expert: nn.Module | None = None
        if config.shared_intermediate_size:
            self.shared_expert = SharedExpert(config, generator=generator, device=device, dtype=dtype)
        self.aux_loss: Tensor | None = None
        self.last_routing: Routing | None = None
        self._reported_nonfinite: Tensor | None = None

    @property
    def last_report(self) -> LayerReport | None:
        """Traffic and timings of the last expert-parallel call; None on one device."""
        return self.experts.last_report

    def statistics(self) -> RoutingStatistics:
        """Give the routing statistics of the last forward's tokens on this rank."""
        if self.last_routing is None:
            raise RuntimeError("there are no statistics before the first forward")
        return routing_statistics(self.last_routing.topk_ids, self.config.num_experts)

    def forward(self, x: Tensor) -> Tensor:
        one_device = self.experts.transport is None
        try:
            if x.shape[-1] != self.config.hidden_size:
                raise ValueError(f"x must be (..., D) with D = {self.config.hidden_size}, got {tuple(x.shape)}")
            if one_device and not torch.compiler.is_compiling():
                self._raise_earlier_nonfinite()
            flat = x.reshape(-1, x.shape[-1])
            routing = self.router(flat)
        except Exception:
            if self.experts.transport is not None:
                _refuse(self.experts.transport)
            raise
        halves: list[Tensor] = []
        fillers: list[Callable[[], None]] = []
        shared = self.shared_expert
        if isinstance(shared, SharedExpert):  # a subclass may run one of its own
            fillers = [lambda: halves.append(shared.up(flat)), lambda: halves.append(shared.down(halves[0]))]
        y = self.experts(
            flat,
            routing.topk_ids,
            routing.topk_weights,
            num_nonfinite_rows=routing.num_nonfinite_rows,
            fillers=fillers,
        )
        if halves:
            y = y + halves[1]
        if one_device and not torch.compiler.is_compiling():
            self._remember_nonfinite(routing.num_nonfinite_rows)
        self.last_routing = routing
        aux_loss = routing.topk_weights.new_zeros(())
        if self.config.load_balance_loss_weight:
            aux_loss = aux_loss + self.config.load_balance_loss_weight * load_balance_loss(
                routing, self.config.num_experts
            )
        if self.config.z_loss_weight:
            aux_loss = aux_loss + self.config.z_loss_weight * z_loss(routing.logits)
        self.aux_loss = aux_loss
        return y.view(x.shape)

    def __getstate__(self) -> dict[str, Any]:
        # What the last call left is no part of a copy: it hangs on that call's graph.
        return {**self.__dict__, "aux_loss": None, "last_routing": None, "_reported_nonfinite": None}

    def _remember_nonfinite(self, count: Tensor) -> None:
        """Start copying the flag to the host; the next call reads it, so that this one waits for nothing."""
        if not count.is_cuda:
            self._reported_nonfinite = count
            return
        if self._reported_nonfinite is None or not self._reported_nonfinite.is_pinned():
            self._reported_nonfinite = torch.zeros((), dtype=count.dtype, pin_memory=True)
        self._reported_nonfinite.copy_(count, non_blocking=True)

    def _raise_earlier_nonfinite(self) -> None:
        if self._reported_nonfinite is not None and int(self._reported_nonfinite):
            count = int(self._reported_nonfinite)
            self._reported_nonfinite = None
            raise NonFiniteScores(
                f"router scores of {count} tokens were NaN or infinite in an earlier forward of this layer (those "
                "tokens went to no expert): look for an overflow in the activations before the router"
            )
