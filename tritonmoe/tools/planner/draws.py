"""Draws: what a job may really take, each time with other numbers in the place of all that nobody knows exactly."""

import math
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from tritonmoe.tools.planner.cluster import NORMAL_90, Cluster, spread_of
from tritonmoe.tools.planner.exchange_curve import ExchangeCurve
from tritonmoe.tools.planner.job import Job
from tritonmoe.tools.planner.operation_costs import Parts, layer_parts
from tritonmoe.tools.planner.step import StepTime, step_with

__all__ = [
    "KNOWN_NETWORK",
    "MODEL_ERROR",
    "Draw",
    "Drawn",
    "ModelError",
    "Uncertain",
    "are_unlike",
    "draw",
    "interval",
    "model_error",
    "told_by",
    "uncertainties",
]


@dataclass(frozen=True)
class ModelError:
    """The model's own error: the logarithm of measured over predicted, beyond what the estimates' spreads explain."""

    bias: float
    """Its middle."""
    faster: float
    slower: float
    """The standard deviations, below the middle and above it, of what all runs of one publication share: its code, its
    cluster, its care. What goes wrong makes a run slower."""
    own: float
    """The standard deviation of one run about that."""
    alike: float
    """The standard deviation of one run about another one of the same job that is spread and computed alike."""

    def log_factor(self, common: float, own: float) -> float:
        """Return the logarithm of a draw, from two standard normal numbers."""
        return self.bias + (self.slower if common > 0 else self.faster) * common + self.own * own


MODEL_ERROR = ModelError(bias=-0.11, faster=0.21, slower=0.46, own=0.15, alike=0.087)
"""Fitted by `python -m bench.plan_steps` to every published step that it has; there each family of rows is predicted
with the error that the other families say."""

KNOWN_NETWORK_ERROR = replace(MODEL_ERROR, bias=-0.12, faster=0.22, slower=0.21)
"""The same, fitted to the steps of which it is known over what NCCL ran between nodes, or that ran on one node."""
UNLIKE = 1.5
"""So many times the model's own error of one run is between a run and one that is spread or computed otherwise: with
that, three in four published steps lie in the intervals that another one of their job gives."""
KNOWN_NETWORK = 0.5
"""An efficiency between nodes with a smaller spread is of a known network."""


def model_error(cluster: Cluster) -> ModelError:
    """Return the model's own error on a cluster.

    Its middle is that of rates that are assumed: of a GPU whose rates were measured it is none.
    """
    spread = spread_of("between.efficiency", cluster.between.efficiency)
    error = KNOWN_NETWORK_ERROR if cluster.nodes == 1 or spread < KNOWN_NETWORK else MODEL_ERROR
    return error if cluster.gpu.gemm_efficiency.source == "assumed" else replace(error, bias=0.0)


JOB_SPREADS = {"pair_passes": 1.0, "us_per_expert": 4.0, "imbalance": 0.4}
"""Settings of a Job that are only assumed -> their spread."""
LEAST = {"pair_passes": 0.0, "us_per_expert": 0.0, "imbalance": 1.0}
"""What they are at least; with that they are no estimates."""
TENTHS = 10


@dataclass(frozen=True)
class Uncertain:
    """A number that nobody knows exactly."""

    key: str
    """Such as "gpu.gemm_efficiency" or "job.pair_passes"."""
    value: float
    source: str
    spread: float

    @property
    def sigma(self) -> float:
        return math.log1p(self.spread) / NORMAL_90


def uncertainties(job: Job, cluster: Cluster) -> list[Uncertain]:
    """Return all numbers of a job and a cluster that are estimates."""
    found = [Uncertain(key, one.value, one.source, spread_of(key, one)) for key, one in cluster.estimates()]
    found += [
        Uncertain(f"job.{name}", getattr(job, name), "assumed", spread)
        for name, spread in JOB_SPREADS.items()
        if getattr(job, name) > LEAST[name]
    ]
    return found


@dataclass(frozen=True)
class Draw:
    """What everything uncertain may really be: a factor for each number, and one for what the model leaves out."""

    factors: Mapping[str, float]
    common: float
    own: float
    """Standard normal numbers: of what a run shares with others of its kind, and of the run alone."""
    model: ModelError = MODEL_ERROR
    """The model's own error where the job runs."""
    told: tuple[float, float] | None = None
    """Where a step of the job was measured, with this draw's numbers: the logarithm of what the model leaves out, and
    its standard deviation."""

    def job(self, job: Job) -> Job:
        changed = {
            name: max(least, getattr(job, name) * self.factors.get(f"job.{name}", 1.0)) for name, least in LEAST.items()
        }
        return replace(job, **changed)

    def error(self, error: ModelError | None = None, *, is_unlike: bool = False) -> float:
        """Return how many times as long a step takes as the model says.

        error: None: the draw's own. is_unlike: whether a step was measured that is spread or computed otherwise.
        """
        error = error or self.model
        if self.told is not None:
            spread = math.hypot(self.told[1], UNLIKE * error.own if is_unlike else 0.0)
            return math.exp(self.told[0] + spread * self.own)
        return math.exp(error.log_factor(self.common, self.own))


def draw(job: Job, cluster: Cluster, count: int) -> list[Draw]:
    """Return so many draws, of which a cluster has the same alone and beside others.

    Two clusters of which the same is assumed share what it may really be, as they share the model's error: they are
    machines of one kind, or run one trainer. What was measured on one says nothing about the other.
    """
    numbers = {
        one.key: (one.sigma, random.Random(f"{one.key} {one.value} {'' if one.source == 'assumed' else cluster.name}"))
        for one in uncertainties(job, cluster)
    }
    common, own = random.Random("common"), random.Random(f"own {cluster.name}")
    return [
        Draw(
            {key: math.exp(generator.gauss(0.0, sigma)) for key, (sigma, generator) in numbers.items()},
            common.gauss(0.0, 1.0),
            own.gauss(0.0, 1.0),
            model_error(cluster),
        )
        for _ in range(count)
    ]


def are_unlike(one: Job, other: Job) -> bool:
    """Return whether two runs of a job are spread or computed otherwise."""
    return any(getattr(one, name) != getattr(other, name) for name in ("recompute", "dtype", "tp", "pp", "ep"))


def told_by(
    draws: Sequence[Draw], taken_s: Sequence[float], measured_s: float, model: ModelError | None = None
) -> list[tuple[int, Draw]]:
    """Return draws as likely as a measured step makes them, each with its place among these and what it tells.

    taken_s: what the measured step takes in each draw, without the model's own error. How much longer it took is due to
    what other runs of the job share as far as that varies more than one run does from another.
    """
    found, weights = [], []
    for one, seconds in zip(draws, taken_s, strict=True):
        error = model or one.model
        apart = math.log(measured_s / seconds) - error.bias
        shared, alike = (error.slower if apart > 0 else error.faster) ** 2, error.alike**2
        weights.append(math.exp(-(apart**2) / 2 / (shared + alike)) * math.sqrt(shared / (shared + alike)))
        spread = math.sqrt(shared * alike / (shared + alike) + alike)
        found.append(replace(one, told=(error.bias + apart * shared / (shared + alike), spread)))
    generator, total = random.Random("measured"), sum(weights)
    if not total:
        raise ValueError(
            f"a step of {measured_s:.4g} s was measured, and {statistics.median(taken_s):.4g} s is predicted: no "
            "estimate is so far off. Is it the same job, on the same cluster?"
        )
    reached, places, at = weights[0], [], 0
    for number in range(len(draws)):  # each as often as its weight says, evenly
        while reached < (number + 0.5) / len(draws) * total and at + 1 < len(draws):
            at += 1
            reached += weights[at]
        places.append(at)
    return [(place, replace(found[place], own=generator.gauss(0.0, 1.0))) for place in places]


@dataclass(frozen=True)
class Drawn:
    """What one choice takes, as estimated or in one draw, without the model's own error."""

    time: StepTime
    serial: StepTime
    """The same without any overlap of exchanges and experts."""
    exchange_s: float
    """Of a step: all exchanges of rows, hidden or not."""

    @classmethod
    def of(cls, job: Job, cluster: Cluster, curves: tuple[ExchangeCurve, ExchangeCurve]) -> "Drawn":
        """Return it by the curves of a plan and of the serial one."""
        parts = layer_parts(job, cluster)
        time, serial = (step_with(job, cluster, parts, curve.time(job, cluster, parts)) for curve in curves)
        return cls(time, serial, _moving_s(job, cluster, parts, curves[0]) * time.num_calls)


def _moving_s(job: Job, cluster: Cluster, parts: Parts, curve: ExchangeCurve) -> float:
    """Return what the exchanges of a layer and micro-batch take, with packing and the agreements before them."""
    forward, backward = (one.exchange_s + one.packing_s for one in curve.lanes(job, cluster, parts))
    forwards = 2 if job.recompute == "full" else 1
    seconds = forwards * forward + backward + (forwards + 1) * curve.agreeing_s(job, cluster, parts)
    return job.imbalance * seconds


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the ends of the interval that holds four values of five."""
    tenths = statistics.quantiles(values, n=TENTHS, method="inclusive") if len(values) > 1 else list(values) * 2
    return tenths[0], tenths[-1]
