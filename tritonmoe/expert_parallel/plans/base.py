"""PlanKind: a way to plan a call and to compute its received rows; PlannedCall: a call that all ranks have planned."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple, Protocol

from torch import Tensor

from tritonmoe.config.layer import PerWeight
from tritonmoe.dispatch.expert_chunks import RowPlaces
from tritonmoe.dispatch.header import CallHeader
from tritonmoe.dispatch.placement import ExpertPlacement
from tritonmoe.dispatch.plan import DispatchPlan
from tritonmoe.errors import CountMismatch, TransportError
from tritonmoe.expert_parallel.call import ProposedCall
from tritonmoe.experts.backward_run import BackwardRun
from tritonmoe.experts.callable_activation import ActivationGraph
from tritonmoe.experts.forward_run import ForwardRun
from tritonmoe.experts.spec import ExpertSettings
from tritonmoe.experts.tensors import NO_TENSORS, CallTensors
from tritonmoe.experts.weight_gradients import SharedWeightGrads
from tritonmoe.ops.backends.ops import WeightGrads
from tritonmoe.ops.grouping import Grouping
from tritonmoe.overlap.executor import Actions
from tritonmoe.overlap.report import Keeps, LayerReport, PassReport
from tritonmoe.overlap.schedule import Schedule, build_backward, build_forward
from tritonmoe.transports import Transport, fail_peers_on_error

__all__ = [
    "NUM_KIND_TENSORS",
    "BackwardBuffers",
    "BackwardExperts",
    "ForwardBuffers",
    "ForwardExperts",
    "Kept",
    "PlanKind",
    "PlannedByAnother",
    "PlannedCall",
    "RunForward",
]

NUM_KIND_TENSORS = 1 + len(PerWeight._fields)
"""So many tensors every call saves for its kind of plan, None where the kind needs fewer: a recompute, whose kind may
be another, must save as many as the forward."""


class ForwardBuffers(Protocol):
    """What the kinds' own steps see of a ForwardPass."""

    plan: DispatchPlan
    partials: dict[int, Tensor]
    """The sums of received rows, by chunk, until they go home."""


class BackwardBuffers(Protocol):
    """What the kinds' own steps see of a BackwardPass."""

    plan: DispatchPlan
    dout_rows: Tensor
    """(R, D) gradients of the sums of received rows."""
    home: Tensor
    """(S, D), where the gradients of home rows arrive; those of rows that stay are computed there."""
    partials: dict[int, Tensor]
    """The gradients of received rows, by chunk, until they go home."""
    dweights: Tensor
    """(R, K) fp32, of the received rows' gate weights."""
    weight_grads: WeightGrads
    """This rank's, from the weight_grad step on."""


class ForwardExperts(ABC):
    """What computes the received rows of one forward; stand-ins of benchmarks and tests take a fixed time."""

    def schedule(self, plan: DispatchPlan, num_fillers: int) -> Schedule:
        """Return the steps of the pass."""
        return build_forward(plan.overlap, num_fillers)

    def actions(self, buffers: ForwardBuffers) -> Actions:
        """Return what the kind's own steps do."""
        return {}

    @abstractmethod
    def group(self, plan: DispatchPlan, received: CallTensors[Tensor], places: RowPlaces) -> None:
        """Take the plan, the received rows x (R, D), whose buffer is not filled yet, and what came with the rows.

        places: where the rows lie that are not this rank's own.
        """

    @abstractmethod
    def forward(self, segment: int, out: Tensor | None = None) -> Tensor:
        """Return the weighted sums over this rank's experts of the rows that a segment finishes."""

    def settle(self) -> None:
        """Wait for what this rank has only sent."""

    def end(self, out: Tensor, timings: PassReport) -> None:
        """Finish the result (T, D) and the timings, once all steps have run."""

    @property
    def own(self) -> ForwardRun:
        """The run of this rank's own experts, of which a backward saves tensors."""
        raise NotImplementedError(f"{type(self).__name__} has no experts whose backward could follow")

    @property
    def needs_rows(self) -> bool:
        """Whether gradients of other weights than this rank's own are made from the rows."""
        return False

    def kept(self) -> tuple[object, tuple[Tensor | None, ...]]:
        """Return what else the kind's backward needs: anything but tensors, and NUM_KIND_TENSORS tensors."""
        return None, (None,) * NUM_KIND_TENSORS


class BackwardExperts(ABC):
    """What computes the received rows of one backward, or such a stand-in."""

    def schedule(self, plan: DispatchPlan, sums_replicas: bool) -> Schedule:
        """Return the steps of the pass; sums_replicas: whether gradients of replicated experts are summed in it."""
        return build_backward(
            plan.overlap,
            needs_x=plan.needs_x,
            needs_topk_weights=plan.needs_topk_weights,
            sums_replicas=sums_replicas,
        )

    def actions(self, buffers: BackwardBuffers) -> Actions:
        """Return what the kind's own steps do."""
        return {}

    @abstractmethod
    def backward(
        self, segment: int, dout: Tensor, needs_dx: bool, out: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor]:
        """Return dx of the rows that a segment finishes, None unless needed, and the gradients of their weights."""

    @abstractmethod
    def weight_grad(self, dout: Tensor, needs: PerWeight[bool]) -> WeightGrads:
        """Return the gradients of the experts' weights, over all segments."""

    def end(self, grads: CallTensors[Tensor | None], timings: PassReport) -> CallTensors[Tensor | None]:
        """Return the finished gradients, and finish the timings, once all steps have run."""
        return grads


class Kept(NamedTuple):
    """What a backward needs of its forward; the tensors are put there once autograd, which saves them, gives them."""

    plan: DispatchPlan
    grouping: Grouping
    activation_graphs: Mapping[int, ActivationGraph]
    report: LayerReport
    of_kind: object = None
    """What the kind of plan keeps beside tensors."""
    received: CallTensors[Tensor] = NO_TENSORS
    """Of the R rows that this rank's experts worked on: x (R, D), topk_weights (R, K) fp32; without topk_ids."""
    h: Tensor | None = None
    kind_tensors: tuple[Tensor | None, ...] = (None,) * NUM_KIND_TENSORS
    fetched: PassReport | None = None
    """The times of the exchanges that brought the received rows once more, if the forward kept none."""
    main_grads: PerWeight[Tensor | None] | None = None
    """As in BackwardRun; put there by the backward, like the next one."""
    shared_grads: SharedWeightGrads | None = None

    def run(self, settings: ExpertSettings) -> BackwardRun:
        """Return what computes the backward of this rank's own experts."""
        graphs = self.activation_graphs
        return BackwardRun(settings, self.received, self.grouping, self.h, graphs, self.main_grads, self.shared_grads)


class PlanKind(ABC):
    """One way to plan a call, and of one planned call what this way needs of it.

    The kinds of plans/__init__.py are asked in their order, the same on every rank: the first that takes a call plans
    the call.
    """

    name: ClassVar[str]

    @classmethod
    @abstractmethod
    def takes(cls, call: ProposedCall) -> bool:
        """Return whether this kind plans a call, before anything of it is sent; every rank must say the same.

        Raises:
            ValueError, RuntimeError: the call asks for this kind and can't have it. The other ranks raise too.
        """

    @classmethod
    @abstractmethod
    def plan(cls, call: ProposedCall, header: CallHeader, others: "Sequence[type[PlanKind]]") -> "PlannedCall":
        """Plan a call together with the other ranks.

        Args:
            header: what this rank tells the others of the call. others: the next kinds that take the call.
        """

    @abstractmethod
    def forward_experts(self, call: "PlannedCall", tensors: CallTensors[Tensor], keep_hidden: bool) -> ForwardExperts:
        """Return what computes the received rows of a forward; tensors: of this rank's own call."""

    @abstractmethod
    def backward_experts(self, call: "PlannedCall", kept: Kept) -> BackwardExperts:
        """Return what computes them in the backward."""

    def report(self, call: "PlannedCall", report: LayerReport) -> None:
        """Take into the report of a forward what only this kind knows."""

    def run(self, call: "PlannedCall", tensors: CallTensors[Tensor], run_forward: "RunForward") -> Tensor:
        """Run the forward, so that its backward can follow."""
        return run_forward(call, tensors)

    def plan_again(self, call: ProposedCall, planned: "PlannedCall") -> "PlannedCall | None":
        """Return the plan of a second run, where the first one couldn't be right; every rank gives one, or None."""
        return None

    @property
    def repeated(self) -> object:
        """What a recompute of the call is planned from: `of_kind` in UnderWay."""
        return None


class PlannedByAnother(PlanKind):
    """A kind that decides how a call runs, and lets another kind plan and compute it."""

    planned_by: PlanKind

    def forward_experts(self, call: "PlannedCall", tensors: CallTensors[Tensor], keep_hidden: bool) -> ForwardExperts:
        return self.planned_by.forward_experts(call, tensors, keep_hidden)

    def backward_experts(self, call: "PlannedCall", kept: Kept) -> BackwardExperts:
        return self.planned_by.backward_experts(call, kept)

    def report(self, call: "PlannedCall", report: LayerReport) -> None:
        self.planned_by.report(call, report)


@dataclass(kw_only=True)
class PlannedCall:
    """One call that all ranks have agreed on, and this rank's part of it, from the plan to the end of its backward."""

    kind: PlanKind
    settings: ExpertSettings
    all_ranks: Transport
    transport: Transport
    """What the plan's rows go over."""
    header: CallHeader
    """What this rank told the others: by `sequence`, `layer` and `copy` they know that they run the same backward."""
    plan: DispatchPlan
    entered_at: float
    """As in ProposedCall; of a second run, when that began."""
    first_expert: int = 0
    """The first slot of this rank, where slots are experts unless there is a placement, and copies have some too."""
    placement: ExpertPlacement | None = None
    owners: PerWeight[Tensor] | None = None
    """The weights as the user holds them, where a main_grad hangs; None where there is none."""
    keeps: Keeps = "hidden"
    """As in LayerReport. Only a memory budget makes this differ from "hidden"."""
    part: int = 0
    """As in LayerReport."""
    slots: Tensor | None = None
    """(T, K) the slots of this rank's pairs where the kind has renumbered them, until the forward takes them."""
    fillers: Sequence[Callable[[], None]] = ()
    first_run: LayerReport | None = None
    """As in LayerReport."""
    report: LayerReport = field(init=False)
    """Made by the forward."""

    @contextmanager
    def in_the_middle(self) -> Iterator[None]:
        """Make the other ranks fail with this one where it fails in the middle of the call."""
        try:
            with fail_peers_on_error(self.all_ranks):
                try:
                    yield
                except CountMismatch as error:
                    mismatch = error
                else:
                    return
        except TransportError as error:
            if self.transport is self.all_ranks:
                raise
            # Exchanges count the ranks of their level: say which rank of all it is of.
            rank, size = self.all_ranks.rank, self.all_ranks.size
            raise TransportError(f"rank {rank} of {size} on two levels: {error}") from error
        # Every rank hears of another backward before a row of it has moved: all can go on.
        raise mismatch


RunForward = Callable[[PlannedCall, CallTensors[Tensor]], Tensor]
"""Runs the forward of a call so that its backward can follow: as autograd Functions (whole_call.py, plans/halves.py),
or inside an operator (operator.py). Each of them makes a ForwardPass, and then a BackwardPass (layer_pass.py)."""
