"""Replay: the recorded calls as the simulator walks them, from what their steps, links and entries are found to cost.

A call is walked as it was recorded: every rank enters when it did, hears from the others, and runs the steps of the
same schedule. What a step or an exchange costs comes from fits to all calls of the recording, so that a cause can be
taken out and the call walked again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from tritonmoe.config.overlap import OverlapPlan
from tritonmoe.overlap.schedule import Schedule
from tritonmoe.overlap.simulation.cost_model import LayerWork, LinkCosts, StepCosts
from tritonmoe.overlap.simulation.simulator import Simulation, simulate, simulate_two_batches
from tritonmoe.overlap.simulation.two_level_work import TwoLevelWork
from tritonmoe.overlap.steps import StepKind
from tritonmoe.tools.doctor.costs import Costs
from tritonmoe.tools.doctor.graph import floats
from tritonmoe.tools.recording.call_recording import RecordedCall, RecordedPass, Recording
from tritonmoe.tools.recording.schedules import schedule_of

__all__ = [
    "MET_SHARE",
    "Conditions",
    "Halves",
    "Nodes",
    "PassesBefore",
    "conditions_of",
    "measured_s",
    "passes_before",
    "walk",
    "with_plan",
]

HALF_PLAN = OverlapPlan((1,), local_first=False)
MET_SHARE = 0.8
"""Ranks have waited for each other between two passes if one is later by less than this share of what it was before."""

PassesBefore = Mapping[tuple[int, int], tuple[RecordedCall, int]]
"""By the number of a call, and of its pass (0 of a forward, 1 of a backward): the call and pass before it."""


@dataclass(frozen=True)
class Entry:
    """How all ranks come to the first step of a pass; all of it (W,) seconds."""

    own_s: Tensor
    """How much later than the others each rank enters, for a reason of its own."""
    passed_on_s: Tensor
    """How much later it enters because its previous pass ended late: charged to that pass, not to the rank."""
    follows: int
    """The number of the pass before: 0 of a forward, 1 of a backward, of this call or another one."""
    before_counts_s: Tensor
    """From entering to sending its counts."""
    counts_s: Tensor
    """From the last rank's sending until it has everybody's."""
    before_steps_s: Tensor
    """From there to its first step."""
    meets: bool
    """Whether ranks wait for each other's counts."""

    def on(self, ranks: slice) -> "Entry":
        """Return how only some of the ranks come."""
        own_s, passed_on_s, before_counts_s, counts_s, before_steps_s = (
            of[ranks] for of in vars(self).values() if isinstance(of, Tensor)
        )
        return Entry(own_s, passed_on_s, self.follows, before_counts_s, counts_s, before_steps_s, self.meets)


def passes_before(recording: Recording) -> PassesBefore:
    """Return for each pass the one before it, of any call, where that was over on all ranks when they entered this one.

    In a stack of layers that is the next layer's backward, or with activation checkpointing a recompute.
    """
    passes = [(call, number) for call in recording.calls for number in range(len(call.by_pass))]
    passes.sort(key=lambda one: one[0].by_pass[one[1]][0].entered)
    found = {}
    for (before, number_before), (after, number) in pairwise(passes):
        of_ranks = zip(before.by_pass[number_before], after.by_pass[number], strict=True)
        if all(one.end <= other.entered for one, other in of_ranks):
            found[after.sequence, number] = before, number_before
    return found


def measured_s(call: RecordedCall, before: PassesBefore) -> float:
    """Return what walk() predicts, as it was recorded."""
    total_s = 0.0
    for passes, entry in zip(call.by_pass, entries_of(call, before), strict=True):
        entered = floats([one.entered for one in passes])
        total_s += max(one.end for one in passes) - float(most_entered(entered)) - float(entry.passed_on_s.max())
    return total_s


def entries_of(call: RecordedCall, before: PassesBefore) -> tuple[Entry, ...]:
    """Return how ranks came to each pass of a call."""
    entries = []
    for number, passes in enumerate(call.by_pass):
        other, follows = before.get((call.sequence, number), (None, 0))
        entries.append(_entry_of(passes, follows, None if other is None else other.by_pass[follows]))
    return tuple(entries)


def _entry_of(passes: Sequence[RecordedPass], follows: int, ended: Sequence[RecordedPass] | None) -> Entry:
    """Return how ranks came to a pass; `ended` is the pass before, whose number is `follows`."""

    entered = floats([one.entered for one in passes])
    late_s = entered - most_entered(entered)
    own_s = late_s.clamp(min=0)
    if ended is not None:
        end = floats([one.end for one in ended])
        pause_s = entered - end
        behind_s = torch.minimum(own_s, (pause_s - most_entered(pause_s)).clamp(min=0))
        # A rank that had been later still has met the others since: its lateness is new.
        has_met = late_s < MET_SHARE * (end - most_entered(end))
        own_s = torch.where(has_met, own_s, behind_s)
    passed_on_s = late_s.clamp(min=0) - own_s
    marks = [one.marks for one in passes]
    origins = floats([one.origin for one in passes])
    nothing = torch.zeros_like(origins)
    if any(mark is None for mark in marks):
        return Entry(own_s, passed_on_s, follows, nothing, nothing, origins - entered, False)
    posted = floats([mark.counts_posted for mark in marks if mark is not None])
    left = floats([mark.counts_left for mark in marks if mark is not None])
    counts_s = (left - posted.max()).clamp(min=0)
    # A rank that is early, not late, is held up by the others.
    own_s = torch.where(late_s < 0, late_s, own_s)
    return Entry(own_s, passed_on_s, follows, posted - entered, counts_s, origins - left, True)


def most_entered(moments: Tensor) -> Tensor:
    """Return the moment from which lateness counts: of an even number of ranks the earlier one in the middle."""
    return moments.median()


@dataclass(frozen=True)
class Conditions:
    """What decides how long a call takes."""

    plan: OverlapPlan
    work: LayerWork
    schedules: tuple[Schedule, ...]
    """Of the forward and, if it ran, the backward."""
    entries: tuple[Entry, ...]
    """Of the same."""
    steps: StepCosts
    link: LinkCosts
    gap_s: float
    halves: "Halves | None" = None
    """To walk two halves of a batch at once; None for a whole batch."""
    nodes: "Nodes | None" = None
    """To walk two levels; None for one."""
    layer: int = -1
    """The layer whose call it is."""

    @property
    def walked_work(self) -> LayerWork | TwoLevelWork:
        """What is sent and computed, on the levels that are walked."""
        nodes, inside = self.nodes, self.link.each_link.inside
        if nodes is None:
            return self.work
        assert inside is not None
        each = replace(self.link.each_link, port_out_s=inside.out_s, port_in_s=inside.in_s, inside=None)
        link = replace(self.link, each=each, contention=0.0)
        return TwoLevelWork.of(self.work, nodes.rows_of(self.work), link, inside_row_bytes=nodes.row_bytes)

    @property
    def walked_link(self) -> LinkCosts:
        """The link of `walked_work`, of two levels the one between nodes."""
        return self.link if self.nodes is None else replace(self.link, each=replace(self.link.each_link, inside=None))


@dataclass(frozen=True)
class Nodes:
    """What is to be known of a call whose rows go over nodes first."""

    share: Tensor
    """(W, nodes): how many rows of each rank go to a node, of those that go to its ranks on one level."""
    row_bytes: int
    """Of a row inside a node."""

    @classmethod
    def of(cls, rows_to_nodes: Tensor, work: LayerWork, row_bytes: int) -> "Nodes":
        """Return what is to be known where so many tokens (W, nodes) of each rank need any rank of each node."""
        by_node = work.rows.view(work.size, rows_to_nodes.shape[1], -1)
        return cls(rows_to_nodes / by_node.sum(2).clamp(min=1), row_bytes)

    def rows_of(self, work: LayerWork) -> Tensor:
        """Return how many tokens (W, nodes) of each rank need any rank of each node."""
        by_node = work.rows.view(work.size, self.share.shape[1], -1)
        return torch.minimum(torch.maximum(self.share * by_node.sum(2), by_node.amax(2)), by_node.sum(2))


@dataclass(frozen=True)
class Halves:
    """What is to be known of a model whose layers run two halves of a batch at once."""

    beside_s: tuple[float, ...]
    """The seconds that the rest of the model takes with one half beside a layer, in each pass."""
    num_layers: int


@dataclass(frozen=True)
class Walk:
    """A call as it is walked."""

    total_s: float
    """From when most ranks have entered each pass until the last rank has ended it, all passes; where ranks come late
    because their previous pass ended late, from when the last of them has come."""
    passes: tuple[Simulation, ...]
    """Their times count from there."""


def walk(conditions: Conditions) -> Walk:
    """Walk a call under these conditions."""
    walked = _walk(conditions, {})
    passed_on_s = max(float(entry.passed_on_s.max()) for entry in conditions.entries)
    if passed_on_s > 0.01 * walked.total_s:
        # In a loop, and in a stack of layers, the pass before is one of this call or of a call like it.
        walked = _walk(conditions, {number: one.end_s for number, one in enumerate(walked.passes)})
    if conditions.halves is not None:
        walked = replace(walked, total_s=walked.total_s - _gain_of_halves(conditions, conditions.halves))
    return walked


def _gain_of_halves(conditions: Conditions, halves: Halves) -> float:
    """Return by how much a layer takes less time with two halves of the batch, all ranks coming together."""
    costs, link = _with_gap(conditions.steps, conditions.gap_s), conditions.walked_link
    work, half = (replace(conditions, work=conditions.work.scaled(share)).walked_work for share in (1.0, 0.5))
    num_fillers = sum(step.kind is StepKind.FILLER for step in conditions.schedules[0])
    walked = simulate_two_batches(
        HALF_PLAN, half, costs, link, halves.beside_s, halves.num_layers, num_fillers=num_fillers
    )
    stack_s = sum(of.total_s for of in walked) / halves.num_layers
    passes = (simulate(schedule, conditions.plan, work, costs, link) for schedule in conditions.schedules)
    return sum(one.total_s + link.latency_s for one in passes) - (stack_s - 2 * sum(halves.beside_s))


def _walk(conditions: Conditions, ended_s: Mapping[int, Tensor]) -> Walk:
    """Walk a call whose ranks ended forwards (0) and backwards (1) before at these times (W,).

    Behind a pass that has none here, and none in this call yet, ranks come as far apart as was recorded.
    """
    ended_s = dict(ended_s)
    total_s, passes = 0.0, []
    costs = _with_gap(conditions.steps, conditions.gap_s)
    work, link = conditions.walked_work, conditions.walked_link
    for number, (schedule, entry) in enumerate(zip(conditions.schedules, conditions.entries, strict=True)):
        behind_s = entry.passed_on_s
        if (before_s := ended_s.get(entry.follows)) is not None:
            behind_s = torch.minimum(behind_s, (before_s - most_entered(before_s)).clamp(min=0))
        posted_s = entry.own_s + behind_s + entry.before_counts_s
        left_s = posted_s.max() + entry.counts_s if entry.meets else posted_s
        start_s = left_s + entry.before_steps_s
        simulation = simulate(schedule, conditions.plan, work, costs, link, start_s)
        total_s += simulation.total_s - float(behind_s.max())  # which is time of the pass before
        passes.append(simulation)
        ended_s[number] = simulation.end_s
    return Walk(total_s, tuple(passes))


def _with_gap(costs: StepCosts, gap_s: float) -> StepCosts:
    return replace(costs, fixed_s={kind: costs.fixed_s.get(kind, 0.0) + gap_s for kind in map(str, StepKind)})


def conditions_of(call: RecordedCall, before: PassesBefore, costs: Costs) -> Conditions:
    """Return the conditions under which a call ran."""
    schedules = tuple(schedule_of(call.plan, [step.step.kind for step in of[0].steps]) for of in call.by_pass)
    to_nodes = call.rows_to_nodes
    link = _with_uneven_chunks(costs.link, call)
    return Conditions(
        *(call.plan, call.work, schedules, entries_of(call, before), costs.steps, link, costs.gap_s),
        nodes=None if to_nodes is None else Nodes.of(to_nodes, call.work, call.inside_row_bytes),
        layer=call.layer,
    )


def _with_uneven_chunks(link: LinkCosts, call: RecordedCall) -> LinkCosts:
    """Return the link with ports that are occupied for as long as by the call's own chunks.

    The walk gives every chunk exactly its share of the rows. Of real ones, which differ by chance, the busier way of a
    port decides, in every exchange anew: ways of 54 and 48 rows, then of 48 and 54, take what 108 take.
    """
    if call.plan.chunk_by != "tokens" or link.each is None:
        return link

    def rows(kind: StepKind) -> Tensor:
        """Return (C, W): the rows of every chunk that each rank sends."""
        of_ranks = [[step.units for step in of.forward.steps if step.step.kind is kind] for of in call.ranks]
        return torch.tensor(of_ranks, dtype=torch.float64, device="cpu").T

    sent, returned = rows(StepKind.DISPATCH), rows(StepKind.COMBINE)
    times = torch.maximum(sent, returned).sum(0) / torch.maximum(sent.sum(0), returned.sum(0)).clamp(min=1)
    each, inside = link.each, link.each.inside
    times = times.clamp(min=1)  # of a rank without rows
    if inside is not None:
        inside = replace(inside, out_s=inside.out_s * times, in_s=inside.in_s * times)
    each = replace(each, port_out_s=each.port_out_s * times, port_in_s=each.port_in_s * times, inside=inside)
    return replace(link, each=each)


def with_plan(of: Conditions, plan: OverlapPlan) -> Conditions:
    """Return the same call by another plan, with as much needed of each pass."""
    schedules = tuple(schedule_of(plan, [step.kind for step in schedule]) for schedule in of.schedules)
    return replace(of, plan=plan, schedules=schedules)
