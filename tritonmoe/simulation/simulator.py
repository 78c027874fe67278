"""How long a schedule takes: the steps that the executor runs, walked with costs instead of tensors.

All ranks are walked at once, step by step, in vectors over the ranks. This gives the executor's times exactly: the
executor posts nothing while it waits, so nothing that comes later in the schedule can delay an exchange that is waited
for.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from tritonmoe.config.overlap import OverlapPlan
from tritonmoe.overlap.schedule import Schedule, build_backward, build_forward, build_inside
from tritonmoe.overlap.steps import Step, StepKind, Way
from tritonmoe.simulation.cost_model import LayerWork, LinkCosts, StepCosts, step_units
from tritonmoe.simulation.two_level_work import TwoLevelWork

__all__ = ["SimulatedStep", "Simulation", "simulate", "simulate_layer"]

EXACT_RANKS = 64
"""Up to so many ranks the time of every message is computed; beyond, an exchange ends when its busiest port is done."""
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
        """Give the time of the slowest rank."""
        return float(self.end_s.max())

    def lane_s(self, *kinds: StepKind) -> float:
        """Give the summed duration of the steps of these kinds, of each step that of the slowest rank."""
        return sum(float((s.end_s - s.start_s).max()) for kind in kinds for s in self.steps if s.step.kind is kind)

    def __str__(self) -> str:
        return self.timeline(0)

    def timeline(self, rank: int) -> str:
        """Give one line per step that takes time, with a bar from its start to its end."""
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


class _Ports:
    """The port of every rank, through which its exchanges pass: in turn, or all that are under way at the same speed.

    group_of_rank: (W,) numbers; ranks with the same one exchange with each other. None where all ranks do.
    """

    def __init__(self, work: LayerWork, link: LinkCosts, group_of_rank: Tensor | None = None) -> None:
        self.link = link
        self.group_of_rank = (
            torch.zeros(work.size, dtype=torch.int64, device="cpu") if group_of_rank is None else group_of_rank
        )
        self.is_in_one_group = self.group_of_rank[:, None] == self.group_of_rank if work.size <= EXACT_RANKS else None
        self.ports = {way: work.ports(link, way) for way in Way}
        each, self.link_s = link.each, dict[Way, Tensor]()
        """(W, W), where ways from rank to rank differ: the seconds of one byte per travelling row."""
        self.link_clock = torch.zeros(0, device="cpu")
        """(W, W), there: when each is free."""
        if each is not None:
            self.link_s = {Way.TO_EXPERTS: work.rows * each.link_s, Way.HOME: work.rows.T * each.link_s}
            self.link_clock = torch.zeros_like(each.link_s)
        self.messages: dict[int, Tensor] = {}
        """When the rows of each exchange have arrived, from rank i to rank k; without an entry that is not known."""
        self.clock = torch.zeros(work.size, dtype=torch.float64, device="cpu")
        """(W,): where exchanges take turns, when the port is free; where they share it, up to when it has worked."""
        self.remaining: dict[int, Tensor] = {}
        """Where exchanges share the port: the seconds of work (W,) that each of them has left."""
        self.arrivals: dict[int, Tensor] = {}
        """When each exchange has arrived (W,), as far as that is known."""

    def post(self, number: int, now: Tensor, row_bytes: float, way: Way | None) -> None:
        """Post exchange `number` at (W,) `now`, of so many bytes for each row that travels."""
        way = way or Way.TO_EXPERTS
        out_s, in_s = (seconds * row_bytes for seconds in self.ports[way])
        if self.link.is_shared:
            self._work_off(now)
            self.remaining[number] = torch.maximum(torch.maximum(out_s, in_s), self._slowest_link(way, row_bytes))
            return
        start = torch.maximum(now, self.clock)
        self.clock = start + torch.maximum(out_s, in_s) / self.link.alone_share
        if self.is_in_one_group is not None:
            # A message from i to k occupies both ends' ports until the busier one is done.
            message_s = torch.maximum(out_s[:, None], in_s) / self.link.alone_share
            begin = torch.maximum(start[:, None], start)
            if self.link_s:
                link_s = self.link_s[way] * row_bytes
                begin = torch.maximum(begin, self.link_clock)
                if self.link.is_rendezvous:  # the receiver's word that it may come is behind what that one sends
                    begin = torch.maximum(begin, self.link_clock.T)
                self.link_clock = torch.where(link_s > 0, begin + link_s, self.link_clock)
                message_s = torch.maximum(message_s, link_s)
            latency_s = self.link.latency_s if self.link.each is None else self.link.each.latency_s
            arrival = (begin + message_s + latency_s).where(self.is_in_one_group, -1.0)
            if len(arrival) > 1:
                arrival.fill_diagonal_(-1.0)
            self.messages[number] = arrival
            self.arrivals[number] = torch.maximum(arrival.amax(0), arrival.amax(1))
        else:
            busiest = torch.maximum(torch.maximum(out_s, in_s), self._slowest_link(way, row_bytes))
            arrival = self._of_group(start) + self._of_group(busiest) / self.link.alone_share
            self.arrivals[number] = arrival + self._latency_s

    @property
    def _latency_s(self) -> float:
        return self.link.latency_s if self.link.each is None else float(self.link.each.latency_s.max())

    def _slowest_link(self, way: Way, row_bytes: float) -> Tensor:
        """Give the longest time (W,) that a message of each rank takes on its own way."""
        if not self.link_s:
            return torch.zeros_like(self.clock)
        link_s = self.link_s[way].clone().fill_diagonal_(0) * row_bytes
        return torch.maximum(link_s.amax(0), link_s.amax(1))

    def beside(self, now: Tensor, seconds: Tensor) -> Tensor:
        """Give how long compute of (W,) `seconds` takes from `now` on, slower while exchanges are under way."""
        lost = self.link.contention
        if not lost:
            return seconds
        if self.link.is_shared:
            self._work_off(now)
            busy_until = self.clock
            if self.remaining:
                levels, widths = self._levels()
                busy_until = busy_until + (
                    torch.diff(levels, dim=0, prepend=torch.zeros_like(levels[:1])) * widths
                ).sum(0)
        else:
            busy_until = self.clock
        return seconds + lost * torch.minimum(seconds / (1 - lost), (busy_until - now).clamp(min=0))

    def arrival(self, number: int) -> Tensor:
        """Give (W,) when the exchange has arrived, if nothing is posted before that."""
        if number not in self.arrivals:
            levels, widths = self._levels()
            below = torch.cat([torch.zeros_like(levels[:1]), levels[:-1]])
            reached = (self.remaining[number] - below).clamp(min=0).minimum(levels - below)
            own = self.clock + (reached * widths).sum(0)
            self.arrivals[number] = self._of_group(own) + self._latency_s
        return self.arrivals[number]

    def _of_group(self, values: Tensor) -> Tensor:
        """Give every rank the largest value of its group."""
        most = torch.zeros_like(values).scatter_reduce(0, self.group_of_rank, values, "amax", include_self=False)
        return most[self.group_of_rank]

    def _levels(self) -> tuple[Tensor, Tensor]:
        """Give the remaining work of all exchanges, ascending, and what a second of it takes in each stretch."""
        levels = torch.stack(list(self.remaining.values())).sort(0).values
        widths = torch.arange(len(levels), 0, -1, dtype=levels.dtype, device="cpu")
        widths[-1] = 1 / self.link.alone_share
        return levels, widths[:, None]

    def _work_off(self, now: Tensor) -> None:
        """Let every port work until `now`, all its exchanges at the same speed."""
        elapsed = (now - self.clock).clamp(min=0)
        self.clock = torch.maximum(self.clock, now)
        if not self.remaining:
            return
        levels, widths = self._levels()
        steps = levels - torch.cat([torch.zeros_like(levels[:1]), levels[:-1]])
        before = torch.cumsum(steps * widths, 0) - steps * widths
        level = ((elapsed - before) / widths).clamp(min=0).minimum(steps).sum(0)
        for number, left in self.remaining.items():
            self.remaining[number] = (left - level).clamp(min=0)
        for number in [n for n, left in self.remaining.items() if n in self.arrivals and not left.any()]:
            del self.remaining[number]


def simulate(
    schedule: Schedule,
    plan: OverlapPlan,
    work: LayerWork | TwoLevelWork,
    costs: StepCosts,
    link: LinkCosts,
    start_s: Tensor | None = None,
) -> Simulation:
    """Give the times of every step of a schedule on all ranks.

    Args:
        work: what is sent and computed; on two levels a TwoLevelWork, whose outer rows go over `link`.
        start_s: (W,) when each rank starts; None: all together, at 0.
    Example:
        W=2, one chunk, one row each way that takes 1 s and experts of 3 s: 1 + 3 + 1 = 5 s.
    """
    levels = work if isinstance(work, TwoLevelWork) else None
    outer = work.outer if isinstance(work, TwoLevelWork) else work
    ports = _Ports(outer, link, None if levels is None else levels.place_of_rank)
    sizes, (leaving, returning) = outer.segments(plan), outer.shares(plan)
    needs_x = any(step.kind is StepKind.DISPATCH_BACKWARD for step in schedule)
    now = torch.zeros(work.size, dtype=torch.float64, device="cpu") if start_s is None else start_s
    under_way: set[int] = set()
    steps: list[SimulatedStep] = []
    for position, step in enumerate(schedule):
        for earlier in step.after:
            if earlier in under_way:
                under_way.remove(earlier)
                arrival = ports.arrival(earlier)
                wait_s = (arrival - now).clamp(min=0)
                now = torch.maximum(now, arrival)
                messages = ports.messages.get(earlier)
                steps[earlier] = replace(steps[earlier], end_s=arrival, wait_s=wait_s, arrivals_s=messages)
        start = now
        if levels is not None and (inside := build_inside(step, needs_x=needs_x)):
            done = _walk_inside(inside, levels, levels.inside(plan, step.chunk), costs, start)
            now = done[-1].end_s
            steps.append(SimulatedStep(step, start, now, done))
            continue
        units = step_units(step, plan.num_local_slices, *sizes)
        seconds = costs.on_ranks(step.kind, units)
        now = now + (seconds if step.lane == "comm" else ports.beside(now, seconds))
        if step.lane == "comm":
            under_way.add(position)
            shares = returning if step.kind.way is Way.HOME else leaving
            share = 1.0 if step.chunk is None else shares[step.chunk]
            ports.post(position, now, share * outer.bytes_per_row(step.kind), step.kind.way)
        steps.append(SimulatedStep(step, start, now, posted_s=now if step.lane == "comm" else None))
    return Simulation(steps, now)


def _walk_inside(
    schedule: Schedule, levels: TwoLevelWork, work: LayerWork, costs: StepCosts, start: Tensor
) -> list[SimulatedStep]:
    """Give the times of the steps inside nodes, which start at (W,) `start`; every exchange is waited for at once.

    A step inside a node costs what its twin between nodes does. work: what is sent and computed inside the nodes.
    """
    sizes = [[of] for of in (work.rows.sum(1), work.rows.sum(0), work.pairs.sum(0))]
    ports = _Ports(work, levels.link, levels.node_of_rank)
    now, steps = start, []
    for position, step in enumerate(schedule):
        begun = now
        between_nodes = Step(step.kind.twin, None)
        now = now + costs.on_ranks(between_nodes.kind, step_units(between_nodes, 0, *sizes))
        if step.lane == "comm":
            ports.post(position, now, work.bytes_per_row(between_nodes.kind), between_nodes.kind.way)
            now = torch.maximum(now, ports.arrival(position))
        steps.append(SimulatedStep(step, begun, now))
    return steps


def simulate_layer(
    plan: OverlapPlan, work: LayerWork | TwoLevelWork, costs: StepCosts, link: LinkCosts, *, backward: bool
) -> Sequence[Simulation]:
    """Give the simulated forward and, with every gradient needed, the backward."""
    schedules = [build_forward(plan)]
    if backward:
        schedules.append(build_backward(plan, needs_x=True, needs_topk_weights=True))
    return [simulate(schedule, plan, work, costs, link) for schedule in schedules]
