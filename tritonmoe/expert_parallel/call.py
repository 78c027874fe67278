"""One expert-parallel call on one rank, once its plan is known: its forward and its backward, and what is kept between.

Whoever calls these, an autograd Function or an operator, saves the tensors.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from tritonmoe.backends.reference import WeightGrads
from tritonmoe.config.layer import is_fused
from tritonmoe.dispatch.capacity import poison
from tritonmoe.dispatch.count_exchange import post_backward
from tritonmoe.dispatch.expert_chunks import RowPlaces
from tritonmoe.dispatch.header import CallHeader
from tritonmoe.dispatch.placement import ExpertPlacement, replica_bits
from tritonmoe.dispatch.plan import DispatchPlan
from tritonmoe.dispatch.two_level import TwoLevelPlan
from tritonmoe.errors import CountMismatch, TransportError
from tritonmoe.expert_parallel.state import state_of
from tritonmoe.experts.arguments import ExpertSettings, ExpertWeights, find_main_grads
from tritonmoe.experts.run import ExpertsRun
from tritonmoe.grouping import Grouping, RowSources
from tritonmoe.overlap.layer_pass import BackwardPass, ExpertsPass, ForwardPass
from tritonmoe.overlap.node_pass import NodePass
from tritonmoe.overlap.report import LayerReport
from tritonmoe.overlap.row_exchanges import RowExchanges
from tritonmoe.transports import PendingExchange, Transport, leaving_nobody_waiting

__all__ = ["ExpertParallelCall", "Kept", "group_received", "run_backward", "run_forward"]


@dataclass
class ExpertParallelCall:
    """One expert-parallel call, from the plan to the end of its backward."""

    settings: ExpertSettings
    owners: ExpertWeights | None
    """The weights as the user holds them, where a main_grad hangs; None where there can be none."""
    all_ranks: Transport
    sequence: int
    layer: int
    """Both as in the call's header: by them ranks know that they run the same backward."""
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

    @property
    def rank(self) -> int:
        return self.all_ranks.rank


@dataclass
class Kept:
    """What a forward keeps for its backward beside tensors."""

    plan: DispatchPlan
    inner_plan: DispatchPlan | None
    grouping: Grouping
    activation_graphs: Any
    report: LayerReport


def run_forward(
    call: ExpertParallelCall, topk_ids: Tensor, x: Tensor, topk_weights: Tensor, weights: ExpertWeights
) -> tuple[Tensor, ExpertsRun, Kept]:
    """Give out (T, D), the experts' run, whose rows, topk_weights and h are for a backward to save, and the rest."""
    settings, plan = call.settings, call.plan
    keep = plan.needs_any and (settings.save == "hidden" or not is_fused(settings.activation))

    def make_run(
        at: DispatchPlan, rows: Tensor, ids: Tensor, received_weights: Tensor, places: RowPlaces
    ) -> ExpertsRun:
        """Make the experts of the rows that plan `at` brings here."""
        sources = at.row_sources() if call.two_level is None else call.two_level.row_sources()
        local_ids, is_two_level = ids - call.first_expert, call.two_level is not None
        num_experts = weights.gate_up_proj.shape[0]
        grouping = group_received(settings, at, places, local_ids, num_experts, sources, is_two_level)
        return ExpertsRun(settings, weights, rows, received_weights, grouping, keep)

    def make_experts(
        at: DispatchPlan, rows: Tensor, ids: Tensor, received_weights: Tensor, places: RowPlaces
    ) -> ExpertsPass:
        if call.two_level is None:
            return make_run(at, rows, ids, received_weights, places)
        inner, inside_node = call.two_level.inner(ids), call.inside_node
        assert inside_node is not None
        exchanges = RowExchanges(inner, inside_node, settings.ops.gather_sum)
        return NodePass.receive(exchanges, at.overlap.num_local_slices, rows, ids, received_weights, make_run)

    exchanges = RowExchanges(plan, call.transport, settings.ops.gather_sum)
    layer_pass = ForwardPass(exchanges, make_experts, x, topk_ids, topk_weights, call.fillers)
    with _in_the_middle(call):
        out, timings = layer_pass.run()
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
        layer_pass.dispatch_wire.row_bytes(x.shape[1]),
        plan.overlap,
        topk_ids.shape[1],
        plan.send_offsets,
        plan.return_offsets,
        plan.pair_offsets if call.two_level is None else call.two_level.pair_offsets,
        forward=timings,
        wire_squares=layer_pass.wire_squares,
        other_row_bytes=layer_pass.wire.row_bytes(x.shape[1]),
        rows_between_nodes=None if call.two_level is None else sum(plan.all_send_splits) - plan.rows_to_itself,
    )
    if call.flag is not None:
        call.is_wrong = call.flag.wait().any().view(1)
        poison([out], call.is_wrong)
    return out, run, Kept(plan, inner_plan, run.grouping, run.activation_graphs, call.report)


def run_backward(
    call: ExpertParallelCall,
    kept: Kept,
    rows: Tensor,
    received_weights: Tensor,
    weights: ExpertWeights,
    h: Tensor | None,
    dout: Tensor,
    needs_weights: tuple[bool, bool, bool, bool],
    parameters: Sequence[Tensor] = (),
) -> tuple[Tensor | None, Tensor | None, WeightGrads, list[Tensor | None]]:
    """Give the gradients of x, of topk_weights in fp32, of the weights, and of a callable activation's parameters.

    The first two where any rank needs them.

    Args:
        rows, received_weights, h: what the forward's run had. dout: (T, D). parameters: of a callable activation.
    Raises:
        CountMismatch: the ranks don't all run this backward. TransportError: an exchange failed or timed out.
    """
    state = state_of(call.all_ranks)  # not the forward's: the transport may have been rebuilt since
    header = CallHeader(
        sequence=call.sequence,
        layer=call.layer,
        is_backward=1,
        replica_grads=replica_bits(call.placement, needs_weights),
        **state.history(),
    )
    agreement = post_backward(call.all_ranks, header)
    run = ExpertsRun(
        call.settings,
        weights,
        rows,
        received_weights,
        kept.grouping,
        False,
        h,
        activation_graphs=kept.activation_graphs,
        activation_parameters=list(parameters),
        main_grads=None if call.owners is None else find_main_grads(call.owners),
    )
    experts: ExpertsPass = run
    if kept.inner_plan is not None:
        assert call.inside_node is not None
        exchanges = RowExchanges(kept.inner_plan, call.inside_node, call.settings.ops.gather_sum)
        experts = NodePass(exchanges, kept.plan.overlap.num_local_slices, rows.new_empty(0), run, rows)
        received_weights = received_weights.new_empty(kept.plan.num_received, received_weights.shape[1])
    exchanges = RowExchanges(kept.plan, call.transport, call.settings.ops.gather_sum)
    layer_pass = BackwardPass(exchanges, experts, received_weights, dout, needs_weights, call.placement)
    with _in_the_middle(call):
        dx, dtopk_weights, grads, timings = layer_pass.run(agreement)
    state.note_backward(call.sequence)
    if isinstance(experts, NodePass):
        timings.inside = experts.reports
    assert call.report is not None
    kept.report.backward = timings
    if call.report.overlap == kept.report.overlap:  # else it says nothing about the plan of the first forward
        call.report.backward = timings
    state.under_way.pop(call.sequence, None)
    if call.is_wrong is not None:
        poison([dx, dtopk_weights, *grads, *(run.main_grads or ()), *run.activation_grads], call.is_wrong)
    return dx, dtopk_weights, grads, run.activation_grads


@contextmanager
def _in_the_middle(call: ExpertParallelCall) -> Iterator[None]:
    """Let the other ranks hear where this one fails in the middle of a call.

    On two levels the error says which rank of all it is of: exchanges count the ranks of their level.
    """
    try:
        with leaving_nobody_waiting(call.all_ranks):
            try:
                yield
            except CountMismatch as error:
                mismatch = error
            else:
                return
    except TransportError as error:
        if call.two_level is None:
            raise
        raise TransportError(f"rank {call.rank} of {len(call.plan.headers)} on two levels: {error}") from error
    # Every rank hears of another backward before a row of it has moved: all can go on.
    raise mismatch


def group_received(
    settings: ExpertSettings,
    plan: DispatchPlan,
    places: RowPlaces,
    local_ids: Tensor,
    num_local_experts: int,
    row_sources: RowSources,
    is_two_level: bool,
) -> Grouping:
    """Group the received rows, of experts local_ids (R, K), in the plan's chunks; `places` are of those not local."""
    row_offsets, pair_offsets = plan.receive_offsets, plan.pair_offsets
    num_slices = plan.overlap.num_local_slices
    if plan.overlap.chunk_by == "experts":
        # By (rank, token) behind the local rows, all chunks are one, whose pairs are by expert then.
        local = torch.arange(plan.num_local, device=local_ids.device)
        received, returned = (torch.cat([local, of]) for of in places)
        local_ids = local_ids[received]
        rows = row_sources.rows
        row_sources = RowSources(
            row_sources.ranks, torch.cat([rows[:num_slices], rows[num_slices:].sum(0, keepdim=True)])
        )
        row_offsets, pair_offsets = ((*of[: num_slices + 1], of[-1]) for of in (row_offsets, pair_offsets))
    busy = [c for c, (first, last) in enumerate(pairwise(row_offsets)) if first < last]
    if len(busy) > 1 or is_two_level or plan.tokens.has_padding:
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
    if plan.overlap.chunk_by == "tokens":
        return grouping
    return grouping.in_expert_chunks(
        plan.overlap.bounds(num_local_experts), plan.return_offsets, plan.pair_offsets, received, returned
    )
