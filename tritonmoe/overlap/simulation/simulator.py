"""How long a schedule takes: the steps that the executor runs, walked with costs instead of tensors.

All ranks are walked at once, step by step, in vectors over the ranks. This gives the executor's times exactly: the
executor posts nothing while it waits, so nothing that comes later in the schedule can delay an exchange that is waited
for.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from tritonmoe.config.overlap import OverlapPlan
from tritonmoe.overlap.schedule import Schedule, build_inside
from tritonmoe.overlap.simulation.copy_work import backward_with, forward_with
from tritonmoe.overlap.simulation.cost_model import LayerWork, LinkCosts
from tritonmoe.overlap.simulation.ports import Ports
from tritonmoe.overlap.simulation.step_costs import StepCosts
from tritonmoe.overlap.simulation.step_units import step_units
from tritonmoe.overlap.simulation.two_level_work import TwoLevelWork
from tritonmoe.overlap.steps import Step, StepKind, Way

__all__ = ["SimulatedStep", "Simulation", "Walk", "WalkedPass", "simulate", "simulate_layer"]
COLUMNS = 72


@dataclass(frozen=True)
class SimulatedStep:
    """One step on all ranks: (W,) seconds from the start of the pass."""

    step: Step
    start_s: Tensor
    end_s: Tensor
    """For an exchange: when its rows had arrived."""
    inside: "Sequence[SimulatedStep]" = field(default_factory=list)
    """On two levels: what it does inside the node."""
    posted_s: Tensor | None = None
    """Of an exchange: when it was posted."""
    wait_s: Tensor | None = None
    """Of an exchange: how long the compute lane stood still for it."""
    arrivals_s: Tensor | None = None
    """Of an exchange: (W, W), when the rows from rank i to rank k had arrived, where the time of every message is
    computed."""


@dataclass(frozen=True)
class Simulation:
    """One simulated pass; print it for its timeline on rank 0."""

    steps: list[SimulatedStep]
    """In the schedule's order."""
    end_s: Tensor
    """(W,)."""

    @property
    def total_s(self) -> float:
        """Return the time of the slowest rank."""
        return float(self.end_s.max())

    def lane_s(self, *kinds: StepKind) -> float:
        """Return the summed duration of the steps of these kinds, of each step that of the slowest rank."""
        return sum(float((s.end_s - s.start_s).max()) for kind in kinds for s in self.steps if s.step.kind is kind)

    def __str__(self) -> str:
        return self.timeline(0)

    def timeline(self, rank: int) -> str:
        """Return one line per step that takes time, with a bar from its start to its end."""
        spans = [(str(s.step), s.step.lane, float(s.start_s[rank]), float(s.end_s[rank])) for s in self.steps]
        total_s = max(self.total_s, 1e-12)
        width = max(len(name) for name, *_ in spans)
        lines = [f"rank {rank}, {total_s * 1e3:.3f} ms"]
        for lane, mark in (("comm", "="), ("compute", "#")):
            lines.append(lane)
            for name, own_lane, start, end in spans:
                if own_lane == lane and end > start:
                    first = min(COLUMNS - 1, int(start / total_s * COLUMNS))
                    last = max(first + 1, round(end / total_s * COLUMNS))
                    bar = " " * first + mark * (last - first)
                    lines.append(f"  {name:{width}} |{bar:{COLUMNS}}| {start * 1e3:9.3f} .. {end * 1e3:.3f} ms")
        return "\n".join(lines)


class Walk:
    """The clock and port of every rank, through the passes of calls that all have this plan, work and costs."""

    def __init__(
        self,
        plan: OverlapPlan,
        work: LayerWork | TwoLevelWork,
        costs: StepCosts,
        link: LinkCosts,
        start_s: Tensor | None = None,
    ) -> None:
        self.plan, self.work, self.costs = plan, work, costs
        self.levels = work if isinstance(work, TwoLevelWork) else None
        self.outer = work.outer if isinstance(work, TwoLevelWork) else work
        self.ports = Ports(self.outer, link, None if self.levels is None else self.levels.place_of_rank)
        self.now = torch.zeros(work.size, dtype=torch.float64, device="cpu") if start_s is None else start_s
        """(W,): up to when each rank has come."""
        self._numbers = itertools.count()
        self._awaited: dict[int, Tensor] = {}
        """By the number of an exchange: which ranks wait for it, where those that get nothing don't."""

    def compute(self, seconds: Tensor) -> None:
        """Let every rank compute for (W,) seconds."""
        self.now = self.now + self.ports.beside(self.now, seconds)

    def post(self, row_bytes: float, way: Way | None) -> int:
        """Post an exchange of so many bytes for each row that travels, and give its number."""
        number = next(self._numbers)
        self.ports.post(number, self.now, row_bytes, way)
        if way in (Way.TO_COPIES, Way.AMONG_COPIES):
            self._awaited[number] = self.outer.travelling(way).sum(0) > 0
        return number

    def wait(self, number: int) -> tuple[Tensor, Tensor]:
        """Let every rank wait for an exchange; give (W,) when it had arrived, and for how long they have waited."""
        arrival = self.ports.arrival(number)
        if number in self._awaited:
            arrival = torch.where(self._awaited[number], arrival, self.now)
        wait_s = (arrival - self.now).clamp(min=0)
        self.now = torch.maximum(self.now, arrival)
        return arrival, wait_s


class WalkedPass:
    """One pass of one call, on a walk that may go through others between its steps."""

    def __init__(self, walk: Walk, schedule: Schedule) -> None:
        self.walk, self.schedule = walk, schedule
        self.steps: list[SimulatedStep] = []
        """Those that have been walked."""
        self._under_way: dict[int, int] = {}
        """The numbers of the exchanges, by the positions of their steps."""
        self._sizes, self._copies = walk.outer.segments(walk.plan), walk.outer.copy_units(walk.plan)
        self._needs_x = any(step.kind is StepKind.DISPATCH_BACKWARD for step in schedule)

    def go_on(self, end: int | None = None) -> None:
        """Walk up to the step at this position, without it; to the end if it is None."""
        for position in range(len(self.steps), len(self.schedule) if end is None else end):
            self._walk_step(position)

    def _walk_step(self, position: int) -> None:
        walk, step, steps = self.walk, self.schedule[position], self.steps
        for earlier in step.after:
            number = self._under_way.pop(earlier, None)
            if number is not None:
                arrival, wait_s = walk.wait(number)
                messages = walk.ports.messages.get(number)
                steps[earlier] = replace(steps[earlier], end_s=arrival, wait_s=wait_s, arrivals_s=messages)
        start = walk.now
        if walk.levels is not None and (inside := build_inside(step, needs_x=self._needs_x)):
            done = _walk_inside(inside, walk, walk.levels, walk.levels.inside(walk.plan, step.chunk))
            walk.now = done[-1].end_s
            steps.append(SimulatedStep(step, start, walk.now, done))
            return
        units = step_units(step, walk.plan.num_local_slices, *self._sizes, copies=self._copies)
        seconds = walk.costs.on_ranks(step.kind, units)
        if step.lane == "compute":
            walk.compute(seconds)
            steps.append(SimulatedStep(step, start, walk.now))
            return
        walk.now = walk.now + seconds
        share = walk.outer.share_of(step, walk.plan)
        self._under_way[position] = walk.post(share * walk.outer.bytes_per_row(step.kind), step.kind.way)
        steps.append(SimulatedStep(step, start, walk.now, posted_s=walk.now))


def simulate(
    schedule: Schedule,
    plan: OverlapPlan,
    work: LayerWork | TwoLevelWork,
    costs: StepCosts,
    link: LinkCosts,
    start_s: Tensor | None = None,
) -> Simulation:
    """Return the times of every step of a schedule on all ranks.

    Args:
        work: what is sent and computed; on two levels a TwoLevelWork, whose outer rows go over `link`.
        start_s: (W,) when each rank starts; None: all together, at 0.
    Example:
        W=2, one chunk, one row each way that takes 1 s and experts of 3 s: 1 + 3 + 1 = 5 s.
    """
    walk = Walk(plan, work, costs, link, start_s)
    walked = WalkedPass(walk, schedule)
    walked.go_on()
    return Simulation(walked.steps, walk.now)


def _walk_inside(schedule: Schedule, walk: Walk, levels: TwoLevelWork, work: LayerWork) -> list[SimulatedStep]:
    """Return the times of the steps inside nodes, from where the walk is; every exchange is waited for at once.

    A step inside a node costs what its twin between nodes does, and is as slow as that beside exchanges between nodes.
    work: what is sent and computed inside the nodes.
    """
    sizes = [[of] for of in (work.rows.sum(1), work.rows.sum(0), work.pairs.sum(0))]
    ports = Ports(work, levels.link, levels.node_of_rank)
    now, steps = walk.now, []
    for position, step in enumerate(schedule):
        begun = now
        between_nodes = Step(step.kind.twin, None)
        seconds = walk.costs.on_ranks(between_nodes.kind, step_units(between_nodes, 0, *sizes))
        if step.lane == "compute":
            now = now + walk.ports.beside(now, seconds)
            steps.append(SimulatedStep(step, begun, now))
            continue
        now = now + seconds
        ports.post(position, now, work.bytes_per_row(between_nodes.kind), between_nodes.kind.way)
        posted, now = now, torch.maximum(now, ports.arrival(position))
        messages = ports.messages.get(position)
        steps.append(SimulatedStep(step, begun, now, posted_s=posted, wait_s=now - posted, arrivals_s=messages))
    return steps


def simulate_layer(
    plan: OverlapPlan, work: LayerWork | TwoLevelWork, costs: StepCosts, link: LinkCosts, *, backward: bool
) -> Sequence[Simulation]:
    """Return the simulated forward and, with every gradient needed, the backward."""
    copies = None if isinstance(work, TwoLevelWork) else work.copies
    schedules = [forward_with(copies, plan)]
    if backward:
        schedules.append(backward_with(copies, plan, True, True))
    return [simulate(schedule, plan, work, costs, link) for schedule in schedules]
