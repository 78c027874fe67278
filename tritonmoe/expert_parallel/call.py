"""One expert-parallel call on one rank, once its plan is known: its forward and its backward, and what is kept between.

Whoever calls these, an autograd Function or an operator, saves the tensors.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from tritonmoe.config.activations import is_fused
from tritonmoe.config.layer import PerWeight
from tritonmoe.dispatch.capacity import CappedTokens, poison
from tritonmoe.dispatch.count_exchange import post_backward
from tritonmoe.dispatch.expert_chunks import RowPlaces
from tritonmoe.dispatch.header import CallHeader
from tritonmoe.dispatch.placement import ExpertPlacement, replica_bits
from tritonmoe.dispatch.plan import DispatchPlan
from tritonmoe.errors import CountMismatch, TransportError
from tritonmoe.expert_parallel.listeners import listeners
from tritonmoe.expert_parallel.state import state_of
from tritonmoe.experts.arguments import find_main_grads
from tritonmoe.experts.callable_activation import ActivationGraph
from tritonmoe.experts.run import ExpertsRun
from tritonmoe.experts.spec import ExpertSettings
from tritonmoe.experts.tensors import CallTensors
from tritonmoe.experts.weight_gradients import SharedWeightGrads
from tritonmoe.grouping import Grouping, RowSources
from tritonmoe.overlap.executor import Phases, run_all_phases
from tritonmoe.overlap.layer_pass import BackwardPass, ExpertsPass, ForwardPass, MakeExperts
from tritonmoe.overlap.report import CallMarks, LayerReport, PassReport
from tritonmoe.overlap.row_exchanges import RowExchanges, RowMetadata
from tritonmoe.runtime.autograd import checkpointed_region, is_recomputing
from tritonmoe.runtime.host_device import is_captured
from tritonmoe.transports import PendingExchange, Transport, leaving_nobody_waiting

__all__ = [
    "ExpertParallelCall",
    "Kept",
    "ReceivedExperts",
    "Runner",
    "SavedTensors",
    "backward_phases",
    "forward_phases",
    "group_received",
    "run_backward",
    "run_forward",
]


@dataclass(kw_only=True)
class ExpertParallelCall:
    """One call on a transport of one level, from the plan to the end of its backward.

    Every method here is a point where TwoLevelCall (two_level_call.py) does something else; nothing else differs.
    """

    settings: ExpertSettings
    owners: PerWeight[Tensor] | None
    """The weights as the user holds them, where a main_grad hangs; None where there is none."""
    all_ranks: Transport
    transport: Transport
    """What the plan's rows go over."""
    header: CallHeader
    """What this rank told the others: by `sequence`, `layer` and `copy` they know that they run the same backward."""
    plan: DispatchPlan
    first_expert: int
    """The first slot of this rank, where slots are experts unless there is a placement."""
    placement: ExpertPlacement | None
    entered_at: float
    """As in CheckedCall; of a second run, when that began."""
    fillers: Sequence[Callable[[], None]] = ()
    first_run: LayerReport | None = None
    """As in LayerReport."""
    report: LayerReport = field(init=False)
    """Made by the forward."""
    capped: CappedTokens | None = None
    """With a capacity: the sizes assumed before any count was read, and the flag that says whether the rows fitted."""
    flag: PendingExchange | None = None
    """With a capacity in a CUDA graph: every rank's flag, under way while the rows are."""
    is_wrong: Tensor | None = None
    """(1,) bool on the device, once the flags are here: whether the results are to be NaN."""

    def __post_init__(self) -> None:
        if self.owners is not None and find_main_grads(self.owners) is None:
            self.owners = None  # they may be copies, which are for autograd alone to keep

    def make_experts(self, weights: PerWeight[Tensor], keep_hidden: bool) -> MakeExperts:
        """Return what makes the experts of the rows that the plan brings here."""
        return ReceivedExperts(self, weights, keep_hidden)

    def group(self, plan: DispatchPlan, places: RowPlaces, local_ids: Tensor, num_local_experts: int) -> Grouping:
        """Group the rows that `plan` brings here, of experts local_ids (R, K)."""
        return group_received(self.settings, plan, places, local_ids, num_local_experts, plan.row_sources(), False)

    def after_forward(self, experts: ExpertsPass, timings: PassReport) -> tuple[ExpertsRun, DispatchPlan | None]:
        """Return the experts of this rank and, of two levels, the inner plan, of what ran the forward."""
        assert isinstance(experts, ExpertsRun)
        return experts, None

    def experts_of_backward(self, run: ExpertsRun, kept: "Kept") -> tuple[ExpertsPass, Tensor]:
        """Return what computes the experts' backward, and the gate weights (R, K) of the rows that it received."""
        return run, run.topk_weights

    def after_backward(self, experts: ExpertsPass, timings: PassReport) -> None:
        """Take into the report what two levels did inside a node."""

    @property
    def pair_offsets(self) -> tuple[int, ...]:
        """Where the pairs of each segment start that this rank's experts compute, and their end."""
        return self.plan.pair_offsets

    @property
    def rows_to_nodes(self) -> tuple[int, ...] | None:
        """The rows that this rank sends to each node, its own included; None on one level."""
        return None

    def located(self, error: TransportError) -> TransportError:
        """Return an error of an exchange as one that names a rank of all ranks."""
        return error


@dataclass(frozen=True)
class ReceivedExperts:
    """Makes this rank's experts of the rows that came here, once their ids have come too."""

    call: ExpertParallelCall
    weights: PerWeight[Tensor]
    keep_hidden: bool

    def __call__(self, plan: DispatchPlan, rows: Tensor, metadata: RowMetadata, places: RowPlaces) -> ExpertsRun:
        call, num_local_experts = self.call, self.weights.gate_up_proj.shape[0]
        topk_ids, topk_weights, row_seeds = metadata
        grouping = call.group(plan, places, topk_ids - call.first_expert, num_local_experts)
        return ExpertsRun(
            call.settings, self.weights, rows, topk_weights, grouping, self.keep_hidden, row_seeds=row_seeds
        )


class Runner(Protocol):
    """How a planned call is run so that its backward can follow: by an autograd Function, or inside an operator."""

    @property
    def is_compiled(self) -> bool:
        """Whether the call stands in a compiled graph."""
        ...

    @property
    def half(self) -> int:
        """Which half of a batch in two_batches the call is of, 1 or 2; 0 for a whole batch."""
        ...

    @property
    def grad_enabled(self) -> bool:
        """Whether the call was made with gradients enabled."""
        ...

    @property
    def owners(self) -> PerWeight[Tensor] | None:
        """As in ExpertParallelCall."""
        ...

    def needs(self, tensors: CallTensors[Tensor]) -> CallTensors[bool]:
        """Return of what this rank wants a gradient."""
        ...

    def run(self, call: ExpertParallelCall, tensors: CallTensors[Tensor]) -> Tensor:
        """Run the forward and give its result (T, D)."""
        ...


@dataclass
class Kept:
    """What a forward keeps for its backward beside tensors."""

    plan: DispatchPlan
    inner_plan: DispatchPlan | None
    grouping: Grouping
    activation_graphs: dict[int, ActivationGraph]
    report: LayerReport


class SavedTensors(NamedTuple):
    """The tensors that a backward needs of its forward."""

    received: CallTensors[Tensor]
    """Of the R rows that this rank's experts worked on: x (R, D), topk_weights (R, K) fp32; without topk_ids."""
    h: Tensor | None


def run_forward(call: ExpertParallelCall, tensors: CallTensors[Tensor]) -> tuple[Tensor, ExpertsRun, Kept]:
    """Return out (T, D), the experts' run, of which a backward saves tensors, and the rest."""
    return run_all_phases(forward_phases(call, tensors))


def forward_phases(call: ExpertParallelCall, tensors: CallTensors[Tensor]) -> Phases[tuple[Tensor, ExpertsRun, Kept]]:
    """Do what run_forward() does, in three phases."""
    x, topk_ids, topk_weights, weights, row_seeds, _ = tensors
    settings, plan = call.settings, call.plan
    keep_hidden = plan.needs_any and (settings.spec.save == "hidden" or not is_fused(settings.spec.activation))
    exchanges = RowExchanges(plan, call.transport, settings.ops.gather_sum)
    make_experts = call.make_experts(weights, keep_hidden)
    metadata = RowMetadata(topk_ids, topk_weights, row_seeds)
    with _in_the_middle(call):  # its buffers too: the other ranks are in this call already
        layer_pass = ForwardPass(exchanges, make_experts, x, metadata, call.fillers)
        call.fillers = ()  # what they hold is for autograd alone to keep
        out, timings = yield from layer_pass.phases()
    run, inner_plan = call.after_forward(layer_pass.experts, timings)
    call.report = LayerReport(
        call.all_ranks.rank,
        plan.traffic,
        plan.traffic_pairs,
        layer_pass.dispatch_wire.row_bytes(x.shape[1]),
        plan.overlap,
        topk_ids.shape[1],
        plan.send_offsets,
        plan.return_offsets,
        call.pair_offsets,
        forward=timings,
        wire_squares=layer_pass.wire_squares,
        other_row_bytes=layer_pass.wire.row_bytes(x.shape[1]),
        first_run=call.first_run,
        rows_to_nodes=call.rows_to_nodes,
        marks=None if plan.count_times is None else CallMarks(call.entered_at, *plan.count_times),
    )
    for listener in listeners:
        listener.after_forward(call.all_ranks, call.header, call.report, run.grouping)
    if call.flag is not None:
        call.is_wrong = call.flag.wait().any().view(1)
        poison([out], call.is_wrong)
    # No backward goes through the graphs of a forward that will be recomputed.
    is_first = checkpointed_region() is not None and not is_recomputing()
    activation_graphs = {} if is_first else run.activation_graphs
    return out, run, Kept(plan, inner_plan, run.grouping, activation_graphs, call.report)


def run_backward(
    call: ExpertParallelCall, kept: Kept, saved: SavedTensors, dout: Tensor, needs_weights: PerWeight[bool]
) -> CallTensors[Tensor | None]:
    """Return the gradients of a call from that of its result, dout (T, D): those of x and topk_weights where any rank
    needs them, that of topk_weights in fp32.

    Raises:
        CountMismatch: the ranks don't all run this backward. TransportError: an exchange failed or timed out.
        ValueError: a CUDA graph captures the backward and has not captured the forward.
    """
    return run_all_phases(backward_phases(call, kept, saved, dout, needs_weights))


def backward_phases(
    call: ExpertParallelCall,
    kept: Kept,
    saved: SavedTensors,
    dout: Tensor,
    needs_weights: PerWeight[bool],
    shared_grads: SharedWeightGrads | None = None,
) -> Phases[CallTensors[Tensor | None]]:
    """Do what run_backward() does, in three phases; shared_grads as in ExpertsRun."""
    entered_at = time.perf_counter()
    if is_captured(dout.device) and not call.header.captured:
        raise ValueError(
            "a CUDA graph captures the backward of an expert-parallel call whose forward it has not captured: a replay "
            "would repeat that one call's exchanges; capture both, or neither"
        )
    state = state_of(call.all_ranks)  # not the forward's: the transport may have been rebuilt since
    header = CallHeader(
        sequence=call.header.sequence,
        layer=call.header.layer,
        copy=call.header.copy,
        is_backward=1,
        replica_grads=replica_bits(call.placement, needs_weights),
        **state.history(),
    )
    agreement = post_backward(call.all_ranks, header)
    received = saved.received
    run = ExpertsRun(
        call.settings,
        received.weights,
        received.x,
        received.topk_weights,
        kept.grouping,
        False,
        saved.h,
        activation_graphs=kept.activation_graphs,
        activation_parameters=list(received.activation_parameters),
        main_grads=None if call.owners is None else find_main_grads(call.owners),
        shared_grads=shared_grads,
        row_seeds=received.row_seeds,
    )
    exchanges = RowExchanges(kept.plan, call.transport, call.settings.ops.gather_sum)
    with _in_the_middle(call):
        experts, received_weights = call.experts_of_backward(run, kept)
        layer_pass = BackwardPass(exchanges, experts, received_weights, dout, needs_weights, call.placement)
        dx, dtopk_weights, grads, timings = yield from layer_pass.phases(agreement)
    state.note_backward(call.header.sequence)
    call.after_backward(experts, timings)
    times = None if agreement is None else agreement.times
    kept.report.backward = timings
    kept.report.backward_marks = None if times is None else CallMarks(entered_at, *times)
    if call.report.overlap == kept.report.overlap:  # else it says nothing about the plan of the first forward
        call.report.backward, call.report.backward_marks = timings, kept.report.backward_marks
    for listener in listeners:
        listener.after_backward(call.all_ranks, call.header, kept.report)
    if call.is_wrong is not None:
        poison([dx, dtopk_weights, *grads, *(run.main_grads or ()), *run.activation_grads], call.is_wrong)
    return CallTensors(dx, None, dtopk_weights, grads, None, run.activation_grads)


@contextmanager
def _in_the_middle(call: ExpertParallelCall) -> Iterator[None]:
    """Let the other ranks hear where this one fails in the middle of a call."""
    try:
        with leaving_nobody_waiting(call.all_ranks):
            try:
                yield
            except CountMismatch as error:
                mismatch = error
            else:
                return
    except TransportError as error:
        located = call.located(error)
        if located is error:
            raise
        raise located from error
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
