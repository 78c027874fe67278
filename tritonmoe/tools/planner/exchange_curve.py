"""ExchangeCurve: what a schedule takes on clusters like one on which it was walked, without a walk for each.

Times of a walk grow with the costs. So the walk's time over the sum of both lanes, compute and exchanges, depends on
the share of the exchanges alone, nearly: it is walked for some shares, and read off for others.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from tritonmoe.config.overlap import OverlapPlan
from tritonmoe.overlap.schedule import build_backward, build_forward
from tritonmoe.overlap.simulation.cost_model import LinkCosts, StepCosts
from tritonmoe.overlap.simulation.simulator import SimulatedStep, simulate
from tritonmoe.overlap.simulation.two_level_work import TwoLevelWork
from tritonmoe.overlap.steps import StepKind
from tritonmoe.tools.planner.cluster import Cluster
from tritonmoe.tools.planner.job import Job
from tritonmoe.tools.planner.layer_exchange import ExchangeTime, LayerExchange, iter_leaf_steps
from tritonmoe.tools.planner.operation_costs import Parts, exchanges_s, layer_parts
from tritonmoe.tools.planner.step import BESIDE, exchange_time, in_turn, layer_exchange

__all__ = ["SERIAL", "ExchangeCurve", "Lanes"]

SERIAL = OverlapPlan((1,), local_first=False, serial=True)
"""One exchange after the other, and nothing beside them: what everybody starts from."""
SHARES = (0.02, 0.2, 0.35, 0.45, 0.5, 0.55, 0.65, 0.8, 0.98)
"""The shares of the exchanges, forward and backward together, for which schedules are walked, with links so slow."""
CONTENTION = 0.2
"""What is walked where the cluster itself has none."""


@dataclass(frozen=True)
class Lanes:
    """What one pass takes on both lanes, one after the other."""

    compute_s: float
    exchange_s: float
    packing_s: float = 0.0
    """Of compute_s: what packs rows that are sent, before an exchange can start."""

    @property
    def sum_s(self) -> float:
        return self.compute_s + self.exchange_s

    def times(self, factor: float) -> "Lanes":
        return Lanes(factor * self.compute_s, factor * self.exchange_s, factor * self.packing_s)

    def plus(self, compute_s: float) -> "Lanes":
        return Lanes(self.compute_s + compute_s, self.exchange_s, self.packing_s)


@dataclass(frozen=True)
class Curve:
    """(share of the exchanges in both lanes, time over their sum, exposed time over their sum), by share."""

    points: Sequence[tuple[float, float, float]]

    def at(self, lanes: Lanes) -> tuple[float, float]:
        """Return the seconds of a pass and those in which nothing is computed."""
        share = lanes.exchange_s / lanes.sum_s if lanes.sum_s else 0.0
        total, exposed = self.points[0][1:] if share < self.points[0][0] else self.points[-1][1:]
        for (x0, *low), (x1, *high) in pairwise(self.points):
            if x0 <= share <= x1:
                between = (share - x0) / (x1 - x0) if x1 > x0 else 0.0
                total, exposed = (a + between * (b - a) for a, b in zip(low, high, strict=True))
        return lanes.sum_s * total, lanes.sum_s * exposed


class ExchangeCurve:
    """Experts and exchanges of one layer of a job under a plan, for every cluster like the one given.

    What compute loses beside an exchange is read off in between two values of it. For the given cluster a curve gives
    what a walk gives.
    """

    def __init__(self, job: Job, cluster: Cluster, num_levels: int, plan: OverlapPlan) -> None:
        job = _whole(job)
        self.job, self.num_levels, self.plan = job, num_levels, plan
        self._units = _Units(layer_exchange(job, cluster, num_levels, layer_parts(job, cluster)), plan)
        both = self.lanes(job, cluster, layer_parts(job, cluster))
        compute_s, exchange_s = sum(of.compute_s for of in both), sum(of.exchange_s for of in both)
        slower = [share / (1 - share) * compute_s / exchange_s for share in SHARES] if exchange_s else []
        self._contention = cluster.gpu.contention.value or CONTENTION
        self._calm, self._busy = (
            self._curves([_slower(cluster, factor, contention) for factor in (*slower, 1.0)])
            for contention in (0.0, self._contention)
        )

    def lanes(self, job: Job, cluster: Cluster, parts: Parts) -> tuple[Lanes, Lanes]:
        """Return what a layer's passes take one step after the other, without the agreement before each."""
        job = _whole(job)
        halves = 2 if job.two_batches else 1
        forward, backward = self._units.lanes(layer_exchange(job, cluster, self.num_levels, parts))
        return forward.times(halves), backward.times(halves)

    def agreeing_s(self, job: Job, cluster: Cluster, parts: Parts) -> float:
        """Return what the agreement before each pass takes: an exchange of a few bytes for each half of a batch."""
        if job.ep == 1:
            return 0.0
        job = _whole(job)
        latency_s = layer_exchange(job, cluster, self.num_levels, parts).link.latency_s
        return (2 if job.two_batches else 1) * latency_s

    def time(self, job: Job, cluster: Cluster, parts: Parts) -> ExchangeTime:
        """Return exchange_time, within some hundredths, of a job that differs only in what its steps cost."""
        calls = self._calls(layer_exchange(_whole(job), cluster, self.num_levels, parts), parts)
        busy = cluster.gpu.contention.value / self._contention
        found = []
        for lanes, calm_curve, busy_curve, fixed in zip(calls.lanes, self._calm, self._busy, calls.fixed, strict=True):
            pair = zip(calm_curve.at(lanes), busy_curve.at(lanes), strict=True)
            total, exposed = (calm + busy * (other - calm) for calm, other in pair)
            found.append((total + fixed[0], exposed + fixed[1]))
        forward, backward, again = found
        time = ExchangeTime(forward[0], backward[0], forward[1], backward[1], again[0], again[1])
        return in_turn(time, parts) if job.two_batches and not job.overlaps_exchange else time

    def _calls(self, exchange: LayerExchange, parts: Parts) -> "_Calls":
        """Return the lanes of forward, backward and a forward that runs again, and what comes to each beside them."""
        forward, backward = self._units.lanes(exchange)
        agreeing = exchange.link.latency_s if self.job.ep > 1 else 0.0
        if not self.job.two_batches:
            return _Calls((forward, backward, forward), ((agreeing, agreeing),) * 3)
        beside = [sum(parts[name][number] for name in BESIDE) for number in range(2)]
        both = [one.times(2).plus(of) for one, of in zip((forward, backward), beside, strict=True)]
        fixed = [(-of, 0.0) for of in beside]
        return _Calls((*both, forward.times(2)), (*fixed, (2 * agreeing, 2 * agreeing)))

    def _curves(self, clusters: Sequence[Cluster]) -> list[Curve]:
        points: list[list[tuple[float, float, float]]] = [[], [], []]
        for cluster in clusters:
            parts = layer_parts(self.job, cluster)
            calls = self._calls(layer_exchange(self.job, cluster, self.num_levels, parts), parts)
            time = exchange_time(self.job, cluster, self.num_levels, self.plan, parts)
            walked = (
                (time.forward_s, time.exposed_forward_s),
                (time.backward_s, time.exposed_backward_s),
                (time.again_s, time.exposed_again_s),
            )
            for own, lanes, fixed, (total, exposed) in zip(points, calls.lanes, calls.fixed, walked, strict=True):
                whole = lanes.sum_s or 1.0
                own.append((lanes.exchange_s / whole, (total - fixed[0]) / whole, (exposed - fixed[1]) / whole))
        return [Curve(sorted(own)) for own in points]


@dataclass(frozen=True)
class _Calls:
    """Of forward, backward and a forward that runs again: the lanes, and (total, exposed) seconds beside them."""

    lanes: Sequence[Lanes]
    fixed: Sequence[tuple[float, float]]


def _whole(job: Job) -> Job:
    """Return the job with batches that are not cut, where halves run in turn but nothing overlaps in a layer's call."""
    return replace(job, two_batches=False) if job.two_batches and not job.overlaps_exchange else job


def _slower(cluster: Cluster, factor: float, contention: float) -> Cluster:
    """Return the cluster with links so many times as slow, in every respect, that take so much of compute's speed."""
    links = {}
    for name in ("inside", "between"):
        link = getattr(cluster, name)
        links[name] = replace(
            link,
            gb_per_s=link.gb_per_s / factor,
            latency_us=replace(link.latency_us, value=link.latency_us.value * factor),
            us_per_peer=replace(link.us_per_peer, value=link.us_per_peer.value * factor),
            curve=tuple((num_bytes, us * factor) for num_bytes, us in link.curve),
        )
    gpu = replace(cluster.gpu, contention=replace(cluster.gpu.contention, value=contention))
    return replace(cluster, gpu=gpu, **links)


class _Units:
    """How many steps of each kind both passes have, with how many units, and what is sent on each link.

    Told by walks with costs of one: of a step, of a unit, or of a byte.
    """

    def __init__(self, exchange: LayerExchange, plan: OverlapPlan) -> None:
        self._passes = [_units(exchange, plan, is_forward=forward) for forward in (True, False)]

    def lanes(self, exchange: LayerExchange) -> tuple[Lanes, Lanes]:
        links = [exchange.link]
        if isinstance(exchange.work, TwoLevelWork):
            links.append(exchange.work.link)
        found = []
        for kinds, sent in self._passes:
            seconds = {
                kind: number * exchange.costs.fixed_s.get(kind, 0.0) + units * exchange.costs.unit_s.get(kind, 0.0)
                for kind, (number, units) in kinds.items()
            }
            moving = sum(exchanges_s(link, *of) for link, of in zip(links, sent, strict=False))
            packing = sum(of for kind, of in seconds.items() if kind.lane == "comm")
            found.append(Lanes(sum(seconds.values()), moving, packing))
        return found[0], found[1]


def _units(
    exchange: LayerExchange, plan: OverlapPlan, *, is_forward: bool
) -> tuple[dict[StepKind, tuple[float, float]], list[tuple[float, float]]]:
    """Return {kind: (steps, units)} of a pass, and (exchanges, bytes) between nodes and inside them."""
    free, byte = LinkCosts(0.0, float("inf")), LinkCosts(0.0, 1.0)
    ones: dict[str, float] = dict.fromkeys(StepKind, 1.0)

    def walk(of: OverlapPlan, costs: StepCosts, link: LinkCosts) -> list[SimulatedStep]:
        if is_forward:
            schedule = build_forward(of, exchange.num_fillers)
        else:
            schedule = build_backward(of, needs_x=True, needs_topk_weights=True)
        work = exchange.work
        return simulate(
            schedule, of, replace(work, link=link) if isinstance(work, TwoLevelWork) else work, costs, link
        ).steps

    kinds: dict[StepKind, tuple[float, float]] = {}
    steps, units = (
        list(iter_leaf_steps(walk(plan, costs, free))) for costs in (StepCosts(ones, {}), StepCosts({}, ones))
    )
    for pair in zip(steps, units, strict=True):
        spans = [float(((one.end_s if one.posted_s is None else one.posted_s) - one.start_s).max()) for one in pair]
        kind = pair[0].step.kind.twin  # costs inside nodes are those between them
        before = kinds.get(kind, (0.0, 0.0))
        kinds[kind] = before[0] + spans[0], before[1] + spans[1]
    # Told by exchanges that don't wait for each other. Those of chunks overlap in latency: one of each kind counts.
    sent = [[0.0, 0.0], [0.0, 0.0]]
    for level, step in _exchanges(walk(SERIAL, StepCosts({}, {}), byte)):
        sent[level][0] += 1
        sent[level][1] += float((step.end_s - step.posted_s).max())  # type: ignore[operator]
    return kinds, [(number, num_bytes) for number, num_bytes in sent]


def _exchanges(steps: Sequence[SimulatedStep]) -> Iterator[tuple[int, SimulatedStep]]:
    """Return (1 inside a node, else 0, the step) of every exchange that takes time."""
    for step in steps:
        for level, one in [(1, inside) for inside in step.inside] or [(0, step)]:
            if one.posted_s is not None and float((one.end_s - one.posted_s).max()) > 0:
                yield level, one
