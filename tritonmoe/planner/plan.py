"""plan(): what a training step would take on a cluster, for every way to spread the experts, and how sure that is."""

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tritonmoe.config.overlap import OverlapPlan, equal_sizes, ramp_sizes
from tritonmoe.planner.cluster import INTERVALS, Cluster
from tritonmoe.planner.job import Job, expert_degrees
from tritonmoe.planner.job_memory import memory_gb
from tritonmoe.planner.layer_parts import layer_parts
from tritonmoe.planner.step import StepTime, exchange_time, step_time
from tritonmoe.runtime.files import Json
from tritonmoe.tuning.search import preferred

__all__ = ["Choice", "Comparison", "Plan", "Prediction", "Sensitivity", "compare", "plan"]

OVERLAPS = tuple(
    OverlapPlan(sizes)
    for sizes in (
        *(equal_sizes(count) for count in (1, 2, 3, 4, 6, 8, 12)),
        *(ramp_sizes(count) for count in (4, 6, 8)),
    )
)
"""The schedules that are tried."""
NUM_DRAWS = 40
"""So many clusters are drawn from the intervals; the same ones for every choice."""
CONTENDERS = 6
"""So many of the fastest choices are compared in every drawn cluster, and for every estimate."""
USABLE_MEMORY = 0.92
"""The share of a GPU's memory that a job can fill: the rest goes to the allocator, the driver and buffers of NCCL."""
SCALES = (0.5, 0.707, 1.0, 1.414, 2.0, 2.828)
SIZES = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Factors of a cluster's number of nodes."""


@dataclass(frozen=True)
class Choice:
    """One way to spread the experts and to run their exchanges."""

    ep: int
    num_levels: int
    overlap: OverlapPlan

    def __str__(self) -> str:
        sizes = self.overlap.chunk_sizes
        chunks = str(len(sizes)) if len(set(sizes)) == 1 else f"{len(sizes)} ramp"
        return f"ep={self.ep}, {'two levels' if self.num_levels == 2 else 'one level'}, chunks {chunks}"


@dataclass(frozen=True)
class Prediction:
    """What is predicted for one choice."""

    choice: Choice
    time: StepTime
    step_interval_s: tuple[float, float]
    """Holds the step's time four times of five, as far as the estimates' intervals do."""
    layer_interval_s: tuple[float, float]
    memory_gb: float
    fits: bool
    usd_per_million_tokens: float
    draws_s: tuple[float, ...]
    """The step's time in each of the drawn clusters."""


@dataclass(frozen=True)
class Sensitivity:
    """What it would change if one estimate were at an end of its interval."""

    key: str
    source: str
    swing: float
    """The best choice's time at the slower end less that at the faster end, over its time."""
    regret: float
    """How much longer than the best choice there the choice made now would take, at the worse end, over its time."""


@dataclass(frozen=True)
class Plan:
    """The predictions for all choices, the fastest that fits first."""

    job: Job
    cluster: Cluster
    predictions: list[Prediction]
    stays_best: float
    """In how many of the drawn clusters the best choice is still the fastest that fits, as a share."""
    sensitivities: list[Sensitivity]
    """What to measure first comes first: what may change the choice, then what may change its time."""

    @property
    def best(self) -> Prediction:
        return self.predictions[0]

    def to_json(self) -> Json:
        """Give everything as JSON has it."""
        return {
            "model": self.job.model.name,
            "cluster": self.cluster.name,
            "gpus": self.cluster.num_gpus,
            "job": {name: getattr(self.job, name) for name in JOB_FIELDS},
            "intervals": INTERVALS,
            "choices": [_as_json(one) for one in self.predictions],
            "stays_best": self.stays_best,
            "measure_next": [vars(one) for one in self.sensitivities],
            "estimates": {key: vars(one) for key, one in self.cluster.estimates()},
        }


JOB_FIELDS = ("sequence", "micro_batch", "micro_batches", "tp", "pp", "recompute", "dtype", "wire_dtype", "two_batches")


def _as_json(one: Prediction) -> Json:
    return {
        "ep": one.choice.ep,
        "levels": one.choice.num_levels,
        "chunk_sizes": list(one.choice.overlap.chunk_sizes),
        "step_ms": 1e3 * one.time.step_s,
        "step_interval_ms": [1e3 * of for of in one.step_interval_s],
        "layer_ms": 1e3 * one.time.layer_s,
        "layer_interval_ms": [1e3 * of for of in one.layer_interval_s],
        "exposed_ms": 1e3 * one.time.exposed_s,
        "tokens_per_s": one.time.tokens_per_s,
        "memory_gb": one.memory_gb,
        "fits": one.fits,
        "usd_per_million_tokens": one.usd_per_million_tokens,
        "parts_ms": {name: 1e3 * seconds for name, seconds in one.time.parts.items()},
    }


def plan(job: Job, cluster: Cluster, degrees: Sequence[int] = (), *, seed: int = 0, num_draws: int = NUM_DRAWS) -> Plan:
    """Predict a job's step on a cluster for every number of expert-parallel ranks that fits, or for those of `degrees`.

    Each is tried on one level and, where it covers several nodes, on two, and with the schedule that is fastest for it.
    num_draws: so many clusters are drawn from the estimates' intervals.

    Raises:
        ValueError: the job fits the cluster with none of the degrees.
    """
    choices = [_best_overlap(job, cluster, *one) for one in _spreads(job, cluster, degrees)]
    generator = random.Random(seed)
    drawn = [cluster.drawn(generator) for _ in range(num_draws)]
    predictions = [_predict(job, cluster, choice, drawn) for choice in choices]
    # Those that don't fit come last, the one that lacks least memory first.
    predictions.sort(key=lambda one: (not one.fits, one.time.step_s if one.fits else one.memory_gb))
    best = predictions[0]
    contenders = [one for one in predictions if one.fits == best.fits][:CONTENDERS]
    fastest = [min(contenders, key=lambda one, n=n: one.draws_s[n]) for n in range(num_draws)]  # type: ignore[misc]
    stays = sum(one is best for one in fastest) / num_draws
    return Plan(job, cluster, predictions, stays, _sensitivities(job, cluster, [one.choice for one in contenders]))


def _spreads(job: Job, cluster: Cluster, degrees: Sequence[int]) -> list[tuple[int, int]]:
    """Give (ep, levels) of everything that is tried."""
    for ep in degrees:
        replace(job, ep=ep).dp(cluster)  # raises where it doesn't fit
    found = sorted(set(degrees)) or expert_degrees(job, cluster)
    if not found:
        replace(job, ep=1).dp(cluster)
        raise ValueError(f"no number of expert-parallel ranks fits {job.model.num_experts} experts and the GPUs")
    node = cluster.gpus_per_node
    return [(ep, levels) for ep in found for levels in ((1, 2) if ep > node > 1 else (1,))]


def _best_overlap(job: Job, cluster: Cluster, ep: int, num_levels: int) -> Choice:
    """Give the schedule whose layer is fastest; of those that are about as fast the one with fewest chunks."""
    spread = replace(job, ep=ep)
    parts = layer_parts(spread, cluster)
    tried = OVERLAPS if ep > 1 else OVERLAPS[:1]
    found = [(exchange_time(spread, cluster, num_levels, overlap, parts).total_s, overlap) for overlap in tried]
    return Choice(ep, num_levels, preferred(found)[0][1])


def _time(job: Job, cluster: Cluster, choice: Choice) -> StepTime:
    return step_time(replace(job, ep=choice.ep), cluster, choice.num_levels, choice.overlap)


def _predict(job: Job, cluster: Cluster, choice: Choice, drawn: Sequence[Cluster]) -> Prediction:
    time = _time(job, cluster, choice)
    draws = [_time(job, one, choice) for one in drawn]
    memory = memory_gb(replace(job, ep=choice.ep), cluster)
    return Prediction(
        choice,
        time,
        _interval([one.step_s for one in draws]),
        _interval([one.layer_s for one in draws]),
        memory,
        memory <= USABLE_MEMORY * cluster.gpu.memory_gb,
        _usd_per_million(cluster, time),
        tuple(one.step_s for one in draws),
    )


def _interval(values: Sequence[float]) -> tuple[float, float]:
    tenths = statistics.quantiles(values, n=10, method="inclusive") if len(values) > 1 else values
    return tenths[0], tenths[-1]


def _sensitivities(job: Job, cluster: Cluster, contenders: Sequence[Choice]) -> list[Sensitivity]:
    """Move each estimate to both ends of its interval, and see what the contenders take there."""
    found = []
    for key, estimate in cluster.estimates():
        width = 1 + INTERVALS[estimate.source]
        ends = [
            [_time(job, cluster.scaled({key: factor}), choice).step_s for choice in contenders]
            for factor in (1 / width, width)
        ]
        swing = abs(ends[0][0] - ends[1][0]) / min(ends[0][0], ends[1][0])
        regret = max(own[0] / min(own) - 1 for own in ends)
        found.append(Sensitivity(key, estimate.source, swing, regret))
    return sorted(found, key=lambda one: (one.regret, one.swing), reverse=True)


@dataclass(frozen=True)
class Sized:
    """The cheapest choice on a cluster with another number of nodes; None where nothing fits."""

    gpus: int
    step_s: float | None
    usd_per_million_tokens: float | None

    def to_json(self) -> Json:
        step_ms = None if self.step_s is None else 1e3 * self.step_s
        return {"gpus": self.gpus, "step_ms": step_ms, "usd_per_million_tokens": self.usd_per_million_tokens}


@dataclass(frozen=True)
class Comparison:
    """Several clusters for one job, and for smaller and larger models like it."""

    plans: list[Plan]
    scales: tuple[float, ...]
    """Factors of the model's widths."""
    usd: list[list[float | None]]
    """[cluster][scale]: the price of a million tokens with the best choice that fits; None where nothing fits."""
    sized: list[list[Sized]]
    """[cluster][number of nodes], every rank with as many micro-batches."""
    is_cheaper: float | None
    """In how many pairs of drawn clusters the first one is the cheapest of those that the job fits, as a share; None
    where it fits no other, or not the first."""

    def break_even_usd(self, number: int) -> float | None:
        """Give the price of a GPU-hour at which a cluster costs as much as the first, for the model as it is.

        None where the job doesn't fit on both.
        """
        first, other = self.plans[0].best, self.plans[number].best
        if not (first.fits and other.fits):
            return None
        return first.usd_per_million_tokens / _gpu_hours_per_million(self.plans[number].cluster, other.time)

    def to_json(self) -> Json:
        return {
            "plans": [plan.to_json() for plan in self.plans],
            "scales": list(self.scales),
            "usd_per_million_tokens": self.usd,
            "by_gpus": [[one.to_json() for one in own] for own in self.sized],
            "first_is_cheapest": self.is_cheaper,
            "break_even_usd_per_gpu_hour": [self.break_even_usd(number) for number in range(len(self.plans))],
        }


def compare(job: Job, clusters: Sequence[Cluster], degrees: Sequence[int] = ()) -> Comparison:
    """Plan a job for several clusters, and its price for models of other widths. Raises ValueError as plan() does."""
    # Other draws for every cluster: what is uncertain about one says nothing about the others.
    plans = [plan(job, cluster, degrees, seed=number) for number, cluster in enumerate(clusters)]
    usd = [
        [_cheapest(replace(job, model=job.model.scaled(scale)), one, degrees)[0] for scale in SCALES]
        for one in clusters
    ]
    sized = [
        [_sized(job, one.with_nodes(nodes), degrees) for nodes in sorted({max(1, round(one.nodes * n)) for n in SIZES})]
        for one in clusters
    ]
    return Comparison(plans, SCALES, usd, sized, _first_is_cheapest(plans))


def _first_is_cheapest(plans: Sequence[Plan]) -> float | None:
    draws = [
        [seconds * one.best.usd_per_million_tokens / one.best.time.step_s for seconds in one.best.draws_s]
        for one in plans
        if one.best.fits
    ]
    if not plans[0].best.fits or len(draws) == 1:
        return None
    pairs = [(first, other) for first in draws[0] for other in (min(of) for of in zip(*draws[1:], strict=True))]
    return sum(first < other for first, other in pairs) / len(pairs)


def _cheapest(job: Job, cluster: Cluster, degrees: Sequence[int]) -> tuple[float | None, float | None]:
    """Give the price of a million tokens with the cheapest choice that fits, and the seconds of its step.

    Where none does, the backward computes all layers again; where still none does, the pipeline gets twice the stages.
    """
    while True:
        found = []
        for ep, num_levels in _spreads(job, cluster, degrees):
            spread = replace(job, ep=ep)
            if memory_gb(spread, cluster) <= USABLE_MEMORY * cluster.gpu.memory_gb:
                time = _time(job, cluster, _best_overlap(job, cluster, ep, num_levels))
                found.append((_usd_per_million(cluster, time), time.step_s))
        if found:
            return min(found)
        try:
            job = replace(job, recompute="full") if job.recompute != "full" else replace(job, pp=2 * job.pp)
            _spreads(job, cluster, degrees)
        except ValueError:
            return None, None


def _sized(job: Job, cluster: Cluster, degrees: Sequence[int]) -> Sized:
    """Give the cheapest choice on a cluster that may have too few nodes for the job."""
    try:
        usd, step_s = _cheapest(job, cluster, degrees)
    except ValueError:
        usd, step_s = None, None
    return Sized(cluster.num_gpus, step_s, usd)


def _usd_per_million(cluster: Cluster, time: StepTime) -> float:
    return cluster.usd_per_gpu_hour * _gpu_hours_per_million(cluster, time)


def _gpu_hours_per_million(cluster: Cluster, time: StepTime) -> float:
    return cluster.num_gpus * time.step_s / 3600 / (time.tokens / 1e6)
