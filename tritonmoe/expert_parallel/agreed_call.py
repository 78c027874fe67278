"""AgreedCall: what all ranks have agreed on for one expert-parallel call, and this rank's part of it.

call_pass.py runs its forward and its backward.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from torch import Tensor

from tritonmoe.config.layer import PerWeight
from tritonmoe.dispatch.capacity import CappedTokens
from tritonmoe.dispatch.copies import ExpertCopies
from tritonmoe.dispatch.expert_chunks import RowPlaces
from tritonmoe.dispatch.header import CallHeader
from tritonmoe.dispatch.placement import ExpertPlacement
from tritonmoe.dispatch.plan import DispatchPlan
from tritonmoe.errors import CountMismatch, TransportError
from tritonmoe.experts.backward_run import BackwardRun
from tritonmoe.experts.forward_run import ForwardRun
from tritonmoe.experts.spec import ExpertSettings
from tritonmoe.experts.tensors import CallTensors
from tritonmoe.grouping import Grouping, RowSources
from tritonmoe.overlap.copied_experts import ForwardWithCopies
from tritonmoe.overlap.copy_exchanges import CopyExchanges
from tritonmoe.overlap.experts import BackwardExperts, ForwardExperts, MakeExperts
from tritonmoe.overlap.report import LayerReport, PassReport
from tritonmoe.transports import PendingExchange, Transport, leaving_nobody_waiting

__all__ = ["AgreedCall", "group_received"]


@dataclass(kw_only=True)
class AgreedCall:
    """One call on a transport of one level, from the plan to the end of its backward.

    Most methods are points where TwoLevelCall (two_level_call.py) does something else; nothing else differs.
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
    """The first slot of this rank, where slots are experts unless there is a placement, and copies have some too."""
    placement: ExpertPlacement | None
    entered_at: float
    """As in ProposedCall; of a second run, when that began."""
    copies: ExpertCopies | None = None
    """The copies of experts that the plan counts with."""
    slots: Tensor | None = None
    """(T, K) the slots of this rank's pairs, counted with copies, until the forward takes them."""
    pairs_without_copies: Tensor | None = None
    """As in LayerReport."""
    balance: str = ""
    """As in LayerReport."""
    expected_fs: int = 0
    """With balance="auto": what the passes are expected to take, in femtoseconds; 0 where nobody knows."""
    planning_s: float | None = None
    """How long it took to plan the copies; None where they weren't."""
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

    def make_experts(self, own_experts: MakeExperts[ForwardRun]) -> MakeExperts[ForwardExperts]:
        """Return what makes that to which the plan's rows go: this rank's own experts."""
        return own_experts

    def own_experts(
        self,
        given: CallTensors[Tensor],
        keep_hidden: bool,
        plan: DispatchPlan,
        received: CallTensors[Tensor],
        places: RowPlaces,
    ) -> ForwardRun:
        """Return this rank's experts of the rows that came to them; given: the tensors of this rank's own call."""
        num_local_experts = given.weights.gate_up_proj.shape[0]
        grouping = self.group(plan, places, received.topk_ids - self.first_expert, num_local_experts)
        weights, parameters = given.weights, given.activation_parameters
        tensors = received.without("topk_ids")._replace(weights=weights, activation_parameters=parameters)
        return ForwardRun(self.settings, tensors, grouping, keep_hidden)

    def experts_with_copies(
        self,
        given: CallTensors[Tensor],
        keep_hidden: bool,
        exchanges: CopyExchanges,
        plan: DispatchPlan,
        received: CallTensors[Tensor],
        places: RowPlaces,
    ) -> ForwardWithCopies:
        """Return this rank's experts and copies of the rows that came to them; given: as in own_experts."""
        num_own = given.weights.gate_up_proj.shape[0]
        copied = replace(plan, pair_offsets=plan.copy_pair_offsets)
        own_offsets = tuple(all_ - of for all_, of in zip(plan.pair_offsets, plan.copy_pair_offsets, strict=True))
        own = self.own_experts(given, keep_hidden, replace(plan, pair_offsets=own_offsets), received, places)

        def make_copies() -> ForwardRun:
            weights = exchanges.weights
            local_ids = received.topk_ids - (self.first_expert + num_own)
            grouping = self.group(copied, places, local_ids, weights.gate_up_proj.shape[0])
            return ForwardRun(self.settings, own.tensors._replace(weights=weights), grouping, keep_hidden)

        return ForwardWithCopies(own, make_copies, plan)

    def group(self, plan: DispatchPlan, places: RowPlaces, local_ids: Tensor, num_local_experts: int) -> Grouping:
        """Group the rows that `plan` brings here, of experts local_ids (R, K)."""
        return group_received(self.settings, plan, places, local_ids, num_local_experts, plan.row_sources(), False)

    def after_forward(self, experts: ForwardExperts, timings: PassReport) -> tuple[ForwardRun, DispatchPlan | None]:
        """Return the experts of this rank and, of two levels, the inner plan, of what ran the forward."""
        assert isinstance(experts, ForwardRun)
        return experts, None

    def experts_of_backward(
        self, run: BackwardRun, plan: DispatchPlan, inner_plan: DispatchPlan | None
    ) -> tuple[BackwardExperts, Tensor]:
        """Return what computes the experts' backward, and the gate weights (R, K) of the rows that it received.

        Args:
            plan, inner_plan: those of the forward whose tensors the backward has.
        """
        return run, run.topk_weights

    def after_backward(self, experts: BackwardExperts, timings: PassReport) -> None:
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

    @contextmanager
    def in_the_middle(self) -> Iterator[None]:
        """Let the other ranks hear where this one fails in the middle of the call."""
        try:
            with leaving_nobody_waiting(self.all_ranks):
                try:
                    yield
                except CountMismatch as error:
                    mismatch = error
                else:
                    return
        except TransportError as error:
            located = self.located(error)
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
