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

__all__ = ["MODEL_ERROR", "Draw", "Drawn", "ModelError", "Uncertain", "draw", "interval", "uncertainties"]


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

    def log_factor(self, common: float, own: float) -> float:
        """Return the logarithm of a draw, from two standard normal numbers."""
        return self.bias + (self.slower if common > 0 else self.faster) * common + self.own * own


MODEL_ERROR = ModelError(bias=0.01, faster=0.09, slower=0.5, own=0.17)
"""Fitted by `python -m bench.plan_steps` to every published step that it has; there each family of rows is predicted
with the error that the other families say."""


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

    def job(self, job: Job) -> Job:
        changed = {
            name: max(least, getattr(job, name) * self.factors.get(f"job.{name}", 1.0)) for name, least in LEAST.items()
        }
        return replace(job, **changed)

    def error(self, error: ModelError = MODEL_ERROR) -> float:
        """Return how many times as long a step takes as the model says."""
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
        )
        for _ in range(count)
    ]


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
