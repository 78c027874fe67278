"""compare(): one job on several clusters, as they are, with equal GPUs or for equal money, and for models like it."""

import math
import statistics
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Literal, get_args

from tritonmoe.runtime.files import Json
from tritonmoe.tools.planner.cluster import Cluster
from tritonmoe.tools.planner.draws import uncertainties
from tritonmoe.tools.planner.job import Job
from tritonmoe.tools.planner.plan_search import Free, search
from tritonmoe.tools.planner.training_plan import USUAL, Plan, expected_time, plan, usd_per_million_tokens

__all__ = ["Comparison", "Equal", "Sized", "compare", "equalized"]

Equal = Literal["gpus", "price"]
SCALES = (0.5, 0.707, 1.0, 1.414, 2.0, 2.828)
SIZES = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Factors of a cluster's number of nodes."""


@dataclass(frozen=True)
class Sized:
    """The best choice on a cluster with this number of nodes; None where nothing fits."""

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
    equal: Equal | None
    scales: tuple[float, ...]
    """Factors of the model's widths."""
    usd: list[list[float | None]]
    """[cluster][scale]: the price of a million tokens with the best choice that fits; None where nothing fits."""
    sized: list[list[Sized]]
    """[cluster][number of nodes], every rank with as many micro-batches."""
    is_cheapest: list[float | None]
    """In which share of the draws each is the cheapest of those that the job fits; None where it fits none or just one,
    or not this one."""
    decides: list[tuple[int, str, float]]
    """(cluster, estimate, share of what the prices of the two cheapest differ by, draw by draw, that it explains), the
    largest first; of estimates that may make the other of the two the cheapest."""

    @property
    def fitting(self) -> list[int]:
        """The clusters that the job fits, the cheapest first."""
        fits = [n for n, one in enumerate(self.plans) if one.best.fits]
        return sorted(fits, key=lambda n: self.plans[n].best.usd_per_million_tokens)

    def break_even_usd(self, number: int) -> float | None:
        """Return the price of a GPU-hour at which a cluster costs as much as the first, for the model as it is.

        None where the job doesn't fit on both.
        """
        first, other = self.plans[0].best, self.plans[number].best
        if not (first.fits and other.fits):
            return None
        hours = self.plans[number].cluster.num_gpus * other.time.step_s / 3600 / (other.time.tokens / 1e6)
        return first.usd_per_million_tokens / hours

    def to_json(self) -> Json:
        return {
            "plans": [plan.to_json() for plan in self.plans],
            "equal": self.equal,
            "scales": list(self.scales),
            "usd_per_million_tokens": self.usd,
            "by_gpus": [[one.to_json() for one in own] for own in self.sized],
            "is_cheapest": self.is_cheapest,
            "decides": [
                {"cluster": self.plans[n].cluster.name, "key": key, "share": share} for n, key, share in self.decides
            ],
            "break_even_usd_per_gpu_hour": [self.break_even_usd(number) for number in range(len(self.plans))],
        }


def equalized(clusters: Sequence[Cluster], equal: Equal | None) -> list[Cluster]:
    """Return the clusters with as many GPUs as the first, or for as much money an hour: as near as whole nodes allow.

    Raises:
        ValueError: the first one costs nothing, or a cluster has no node for so little.
    """
    if equal is None:
        return list(clusters)
    if equal not in get_args(Equal):
        raise ValueError(f"equal must be one of {', '.join(get_args(Equal))}, got {equal!r}")
    first, found = clusters[0], [clusters[0]]
    for one in clusters[1:]:
        if equal == "gpus":
            nodes = first.num_gpus / one.gpus_per_node
        elif one.usd_per_gpu_hour * first.usd_per_gpu_hour == 0:
            raise ValueError(
                f"{first.name} and {one.name} can't be compared at an equal price: one of them costs nothing"
            )
        else:
            nodes = first.num_gpus * first.usd_per_gpu_hour / (one.gpus_per_node * one.usd_per_gpu_hour)
        if round(nodes) < 1:
            raise ValueError(
                f"{first.name} with {first.num_gpus} GPUs is less than half a node of {one.gpus_per_node} GPUs of "
                f"{one.name}: take more nodes (--nodes), or compare without --equal"
            )
        found.append(one.with_nodes(round(nodes)))
    return found


def compare(
    job: Job,
    clusters: Sequence[Cluster],
    degrees: Sequence[int] = (),
    *,
    free: Free | None = None,
    equal: Equal | None = None,
) -> Comparison:
    """Plan a job for several clusters, and its price for models of other widths. Raises ValueError as plan() does."""
    clusters = equalized(clusters, equal)
    plans = [plan(job, cluster, degrees, free=free) for cluster in clusters]
    usd = [
        [
            _sized(one, replace(job, model=job.model.scaled(scale)), one.cluster, degrees).usd_per_million_tokens
            for scale in SCALES
        ]
        for one in plans
    ]
    sized = [
        [
            _sized(one, job, one.cluster.with_nodes(nodes), degrees)
            for nodes in sorted({max(1, round(one.cluster.nodes * n)) for n in SIZES})
        ]
        for one in plans
    ]
    return Comparison(plans, equal, SCALES, usd, sized, _cheapest_shares(plans), _decides(plans))


def _drawn_usd(one: Plan) -> list[float]:
    best = one.best
    return [seconds * best.usd_per_million_tokens / best.time.step_s for seconds in best.draws_s]


def _cheapest_shares(plans: Sequence[Plan]) -> list[float | None]:
    fits = [n for n, one in enumerate(plans) if one.best.fits]
    if len(fits) < 2:
        return [None] * len(plans)
    drawn = {n: _drawn_usd(plans[n]) for n in fits}
    count = len(drawn[fits[0]])
    winners = [min(fits, key=lambda n, k=k: drawn[n][k]) for k in range(count)]  # type: ignore[misc]
    return [winners.count(n) / count if n in drawn else None for n in range(len(plans))]


def _decides(plans: Sequence[Plan]) -> list[tuple[int, str, float]]:
    """Return what explains most of how the prices of the two cheapest differ, of what may change which is cheaper."""
    fits = [n for n, one in enumerate(plans) if one.best.fits]
    two = sorted(fits, key=lambda n: plans[n].best.usd_per_million_tokens)[:2]
    if len(two) < 2 or plans[two[0]].best.usd_per_million_tokens == 0:
        return []
    usd = [_drawn_usd(plans[n]) for n in two]
    ratios = [math.log(b / a) for a, b in zip(*usd, strict=True)]
    found = []
    for n in two:
        for key in plans[n].draws[0].factors:
            logs = [math.log(one.factors[key]) for one in plans[n].draws]
            if len(set(logs)) > 1 and _may_change(plans[two[0]], plans[two[1]], plans[n], key):
                found.append((n, key, statistics.correlation(logs, ratios) ** 2))
    return sorted(found, key=lambda of: -of[2])[:5]


def _may_change(cheapest: Plan, other: Plan, of: Plan, key: str) -> bool:
    """Return whether the other plan is the cheaper one with this estimate of a plan at an end of its interval.

    Two clusters of which the same is assumed have it together.
    """
    own = {one.key: one for one in uncertainties(of.job, of.cluster)}[key]
    prices = []
    for one in (cheapest, other):
        usd_per_s = one.best.usd_per_million_tokens / one.best.time.step_s * one.best.time.tokens
        has_it = one is of or (own.source == "assumed" and own in uncertainties(one.job, one.cluster))
        ends = [number.ends_s for number in one.sensitivities if number.key == key] if has_it else []
        now_s = one.best.time.step_s / one.best.time.tokens / USUAL
        prices.append([usd_per_s * seconds for seconds in (ends[0] if ends else (now_s, now_s))])
    return any(theirs < mine for mine, theirs in zip(*prices, strict=True))


def _sized(plan: Plan, job: Job, cluster: Cluster, degrees: Sequence[int]) -> Sized:
    """Return the best choice for a job like a plan's, on as many nodes as `cluster` has; they may be too few for it.

    Degrees that fit none of its choices are left out.
    """
    if (job, cluster) == (plan.job, plan.cluster):
        best = [(plan.best.time, plan.best.fits)]
    else:
        best = []
        for named in [[ep] for ep in degrees] or [[]]:
            with suppress(ValueError):
                (one, *_), _ = search(job, cluster, named, plan.free)
                best.append((expected_time(one), one.fits))
    times = [time for time, fits in best if fits]
    if not times:
        return Sized(cluster.num_gpus, None, None)
    time = min(times, key=lambda one: one.step_s / one.tokens)
    return Sized(cluster.num_gpus, time.step_s, usd_per_million_tokens(cluster, time))
