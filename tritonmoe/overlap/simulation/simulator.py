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
from tritonmoe.overlap.schedule import Schedule, build_backward, build_forward, build_inside, phase_ends
from tritonmoe.overlap.simulation.cost_model import (
    LayerWork,
    LinkCosts,
    StepCosts,
    backward_with,
    forward_with,
    step_units,
)
from tritonmoe.overlap.simulation.two_level_work import TwoLevelWork
from tritonmoe.overlap.steps import Step, StepKind, Way

__all__ = ["MOST_LAYERS", "SimulatedStep", "Simulation", "simulate", "simulate_layer", "simulate_two_batches"]

EXACT_RANKS = 64
"""Up to so many ranks the time of every message is computed; beyond, an exchange ends when its busiest port is done."""


class Ports:
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
        self.has_copies = {way: work.travelling(way) > 0 for way in (Way.TO_COPIES, Way.AMONG_COPIES, Way.TO_OWNERS)}
        """(W, W): whether rank i sends rank k anything of copied experts, as most don't; rows go from all to all."""
        self.inside_ports = {way: work.inside_ports(link, way) for way in Way}
        """Those to the other ranks of a node, where they are second ones."""
        self.inside_clock = torch.zeros(work.size, dtype=torch.float64, device="cpu")
        each, self.link_s = link.each, dict[Way, Tensor]()
        """(W, W), where ways from rank to rank differ: the seconds of one byte per travelling row."""
        self.link_clock = torch.zeros(0, device="cpu")
        """(W, W), there: when each is free."""
        if each is not None:
            self.link_s = {way: work.travelling(way) * each.link_s for way in Way}
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
        inside = self.inside_ports[way]
        near_s = None if inside is None else tuple(seconds * row_bytes for seconds in inside)
        if self.link.is_shared:
            self._work_off(now)
            self.remaining[number] = torch.maximum(_busiest(out_s, in_s, near_s), self._slowest_link(way, row_bytes))
            return
        start, near_start = torch.maximum(now, self.clock), torch.maximum(now, self.inside_clock)
        self.clock = start + torch.maximum(out_s, in_s) / self.link.alone_share
        if near_s is not None:
            self.inside_clock = near_start + torch.maximum(*near_s) / self.link.alone_share
        if self.is_in_one_group is not None:
            # A message from i to k occupies both ends' ports until the busier one is done.
            message_s = torch.maximum(out_s[:, None], in_s) / self.link.alone_share
            begin = torch.maximum(start[:, None], start)
            if near_s is not None:
                near_message_s = torch.maximum(near_s[0][:, None], near_s[1]) / self.link.alone_share
                message_s = torch.where(self.is_in_one_node, near_message_s, message_s)
                begin = torch.where(self.is_in_one_node, torch.maximum(near_start[:, None], near_start), begin)
            if self.link_s:
                link_s = self.link_s[way] * row_bytes
                begin = torch.maximum(begin, self.link_clock)
                if self.link.is_rendezvous:  # the receiver's word that it may come is behind what that one sends
                    begin = torch.maximum(begin, self.link_clock.T)
                self.link_clock = torch.where(link_s > 0, begin + link_s, self.link_clock)
                message_s = torch.maximum(message_s, link_s)
            latency_s = self.link.latency_s if self.link.each is None else self.link.each.latency_s
            is_sent = self.is_in_one_group & self.has_copies.get(way, self.is_in_one_group)
            arrival = (begin + message_s + latency_s).where(is_sent, -1.0)
            if len(arrival) > 1:
                arrival.fill_diagonal_(-1.0)
            self.messages[number] = arrival
            self.arrivals[number] = torch.maximum(arrival.amax(0), arrival.amax(1))
        else:
            busiest = torch.maximum(_busiest(out_s, in_s, near_s), self._slowest_link(way, row_bytes))
            arrival = self._of_group(torch.maximum(start, near_start)) + self._of_group(busiest) / self.link.alone_share
            self.arrivals[number] = arrival + self._latency_s

    @property
    def is_in_one_node(self) -> Tensor:
        """(W, W): whether rank i reaches rank k over their second ports."""
        node_size = self.link.port_node_size
        assert node_size is not None
        node = torch.arange(len(self.clock), device="cpu") // node_size
        return node[:, None] == node

    @property
    def _latency_s(self) -> float:
        return self.link.latency_s if self.link.each is None else float(self.link.each.latency_s.max())

    def _slowest_link(self, way: Way, row_bytes: float) -> Tensor:
        """Return the longest time (W,) that a message of each rank takes on its own way."""
        if not self.link_s:
            return torch.zeros_like(self.clock)
        link_s = self.link_s[way].clone().fill_diagonal_(0) * row_bytes
        return torch.maximum(link_s.amax(0), link_s.amax(1))

    def beside(self, now: Tensor, seconds: Tensor) -> Tensor:
        """Return how long compute of (W,) `seconds` takes from `now` on, slower while exchanges are under way."""
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
            busy_until = torch.maximum(self.clock, self.inside_clock)
        return seconds + lost * torch.minimum(seconds / (1 - lost), (busy_until - now).clamp(min=0))

    def arrival(self, number: int) -> Tensor:
        """Return (W,) when the exchange has arrived, if nothing is posted before that."""
        if number not in self.arrivals:
            levels, widths = self._levels()
            below = torch.cat([torch.zeros_like(levels[:1]), levels[:-1]])
            reached = (self.remaining[number] - below).clamp(min=0).minimum(levels - below)
            own = self.clock + (reached * widths).sum(0)
            self.arrivals[number] = self._of_group(own) + self._latency_s
        return self.arrivals[number]

    def _of_group(self, values: Tensor) -> Tensor:
        """Return every rank the largest value of its group."""
        most = torch.zeros_like(values).scatter_reduce(0, self.group_of_rank, values, "amax", include_self=False)
        return most[self.group_of_rank]

    def _levels(self) -> tuple[Tensor, Tensor]:
        """Return the remaining work of all exchanges, ascending, and what a second of it takes in each stretch."""
        levels = torch.stack(list(self.remaining.values())).sort(0).values
        widths = torch.arange(len(levels), 0, -1, dtype=levels.dtype, device="cpu")
        widths[-1] = 1 / self.link.alone_share
        return levels, widths[:, None]

    def _work_off(self, now: Tensor) -> None:
        """Advance every port to `now`, all of its exchanges at the same speed."""
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


def _busiest(out_s: Tensor, in_s: Tensor, near_s: tuple[Tensor, ...] | None) -> Tensor:
    """Return (W,): for how long the busiest port of each rank is occupied, the two ways of a second one included."""
    busiest = torch.maximum(out_s, in_s)
    return busiest if near_s is None else torch.maximum(busiest, torch.maximum(*near_s))


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
        """Advance every rank by (W,) seconds of compute."""
        self.now = self.now + self.ports.beside(self.now, seconds)

    def post(self, row_bytes: float, way: Way | None) -> int:
        """Post an exchange of so many bytes for each row that travels, and return its number."""
        number = next(self._numbers)
        self.ports.post(number, self.now, row_bytes, way)
        if way in (Way.TO_COPIES, Way.AMONG_COPIES):
            self._awaited[number] = self.outer.travelling(way).sum(0) > 0
        return number

    def wait(self, number: int) -> tuple[Tensor, Tensor]:
        """Wait for an exchange on every rank; return (W,) when it had arrived, and how long each rank waited."""
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


MOST_LAYERS = 8
"""So many layers are enough to see what one of a longer stack takes, whose ends weigh nothing."""


def simulate_two_batches(
    plan: OverlapPlan,
    work: LayerWork | TwoLevelWork,
    costs: StepCosts,
    link: LinkCosts,
    beside_s: Sequence[float],
    num_layers: int,
    *,
    num_fillers: int = 0,
) -> list[Simulation]:
    """Return the simulated forward and, with two numbers in beside_s, the backward of a stack of layers in two halves.

    Ranks agree before each pass of a call: that takes a latency, behind the other half's rows.

    Args:
        work: of a call of one half; both are alike.
        beside_s: the seconds of compute that the rest of the model takes with one half before each layer's experts, in
            forward, and behind them, in backward.
        num_fillers: as in build_forward.
    Example:
        W=2, one layer, one row each way that takes 1 s, experts of 1 s, nothing beside them: dispatches until 1 and 2,
        experts until 2 and 3, combines until 3 and 4: 4 s, and one half after the other 6 s.
    """
    schedules = [build_forward(plan, num_fillers)]
    if len(beside_s) == 2:
        schedules.append(build_backward(plan, needs_x=True, needs_topk_weights=True))
    return [
        _simulate_pass(schedule, Walk(plan, work, costs, link), seconds, num_layers, is_backward=number == 1)
        for number, (schedule, seconds) in enumerate(zip(schedules, beside_s, strict=True))
    ]


def _simulate_pass(
    schedule: Schedule, walk: Walk, beside_s: float, num_layers: int, *, is_backward: bool
) -> Simulation:
    posted, computed = phase_ends(schedule)
    beside = torch.full_like(walk.now, beside_s)
    steps: list[SimulatedStep] = []
    of_halves: list[WalkedPass] = []
    for layer in range(num_layers + 1):
        before, of_halves = of_halves, []
        for half in range(2):  # each ends one layer and begins the next, up to its first handover there
            if layer > 0:
                before[half].go_on()
                steps += before[half].steps
            if layer > 0 if is_backward else layer < num_layers:
                walk.compute(beside)
            if layer < num_layers:
                if walk.work.size > 1:
                    walk.wait(walk.post(0, None))
                of_halves.append(WalkedPass(walk, schedule))
                of_halves[half].go_on(posted)
        for walked in of_halves:
            walked.go_on(computed)
    return Simulation(steps, walk.now)
