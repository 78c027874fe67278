"""Published exchanges over several nodes: how links get slower with more of them, each cluster out of its own fit."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from bench.plan_samples import GPU_POSTED_LATENCY_US, Fabric, Sample, fabrics, gpu_posted
from bench.published import Row, Table
from tritonmoe.tools.planner.cluster import Estimate
from tritonmoe.tools.planner.operation_costs import exchange_s

__all__ = ["SHORTEST_S", "errors_with_nothing_of_their_own", "fabric_tables"]


@dataclass(frozen=True)
class Defaults:
    """What all fabrics are taken to have in common. The numbers here are fitted to all, and those of the presets."""

    efficiency: float = 0.87
    decay: float = 0.03
    nccl_latency_us: float = 120.0
    nccl_us_per_peer: float = 0.9


STEPS = Defaults(0.01, 0.01, 10.0, 0.1)
LEAST, MOST = Defaults(0.5, 0.0, 0.0, 0.0), Defaults(1.0, 0.4, 400.0, 3.0)


def _seconds(fabric: Fabric, sample: Sample, defaults: Defaults, moved_gb_per_s: float | None) -> float:
    """Return what is predicted. moved_gb_per_s: of kernels that forward, where their own two-node row said it."""
    cluster = fabric.cluster if fabric.is_nccl else gpu_posted(fabric.cluster)
    between, inside, inside_bytes = cluster.between, cluster.inside, sample.inside_bytes
    between = replace(
        between,
        efficiency=Estimate(defaults.efficiency, "assumed"),
        decay=Estimate(defaults.decay, "assumed"),
        latency_us=Estimate(defaults.nccl_latency_us if fabric.is_nccl else GPU_POSTED_LATENCY_US, "assumed"),
        us_per_peer=Estimate(defaults.nccl_us_per_peer if fabric.is_nccl else 0.0, "assumed"),
    )
    if moved_gb_per_s is not None:
        inside = replace(inside, gb_per_s=moved_gb_per_s, efficiency=Estimate(1.0, "measured"))
        inside_bytes = sample.moved_bytes
    cluster = replace(cluster, between=between, inside=inside)
    return exchange_s(cluster, sample.num_ranks, inside_bytes, sample.cross_bytes)


def _moved_rates(fabric: Fabric) -> dict[str, float]:
    """Return the GB/s that a GPU moves in each series of kernels that forward, from its row of two nodes."""
    if fabric.is_nccl:
        return {}
    return {
        sample.series: sample.moved_bytes / (sample.seconds - GPU_POSTED_LATENCY_US * 1e-6) / 1e9
        for sample in fabric.samples
        if sample.num_ranks == 16
    }


def _fit(others: Sequence[Fabric]) -> Defaults:
    """Return the defaults with the least mean error of logarithms, over all rows of three nodes and more.

    Every fabric counts the same. A search that changes one number at a time by a step, as long as that helps.
    """

    def loss(defaults: Defaults) -> float:
        total = 0.0
        for fabric in others:
            rates = _moved_rates(fabric)
            errors = [
                abs(math.log(_seconds(fabric, sample, defaults, rates.get(sample.series)) / sample.seconds))
                for sample in fabric.samples
                if sample.num_ranks > 16
            ]
            total += sum(errors) / len(errors)
        return total

    best, least = Defaults(), loss(Defaults())
    improved = True
    while improved:
        improved = False
        for name in vars(best):
            for sign in (-1, 1):
                value = getattr(best, name) + sign * getattr(STEPS, name)
                if getattr(LEAST, name) <= value <= getattr(MOST, name):
                    tried = replace(best, **{name: round(value, 6)})
                    if (found := loss(tried)) < least - 1e-9:
                        best, least, improved = tried, found, True
    return best


def fabric_tables() -> Iterator[Table]:
    """Return a table for every fabric, with defaults that were fitted to the others."""
    every = fabrics()
    for fabric in every:
        defaults = _fit([other for other in every if other is not fabric])
        rates = _moved_rates(fabric)
        rows, excluded = [], set()
        for sample in fabric.samples:
            moved = rates.get(sample.series) if sample.num_ranks > 8 else None
            predicted = _seconds(fabric, sample, defaults, moved)
            is_fitted = sample.num_ranks == 16 and sample.series in rates
            note = ""
            if sample.num_ranks <= 8:
                note = "one node: the preset's link inside"
            elif sample.seconds <= 400e-6:
                note = "400 us or less"
            if note:
                excluded.add(sample.what)
            shown = sample.shown(predicted)
            rows.append(Row(sample.what, sample.unit, sample.measured, shown, is_fitted, note, sample.seconds))
        fitted = (
            f"to the other fabrics' rows of more than two nodes: efficiency {defaults.efficiency:.2f}, decay "
            f"{defaults.decay:.2f}, NCCL's latency {defaults.nccl_latency_us:.0f} us and "
            f"{defaults.nccl_us_per_peer:.1f} us per peer; "
            + ("nothing to its own" if fabric.is_nccl else "to its own rows of two nodes: how fast rows are moved")
        )
        yield Table(
            *(f"Decay with nodes: {fabric.name}", fabric.source, fitted, rows, 0.15, 0.25),
            "several nodes, above 400 us, nothing fitted",
            frozenset(excluded),
        )


SHORTEST_S = 100e-6


def errors_with_nothing_of_their_own() -> list[float]:
    """Return the sizes of the errors of all these exchanges of 100 us and more, by other clusters' rows alone."""
    every, found = fabrics(), []
    for fabric in every:
        defaults = _fit([other for other in every if other is not fabric])
        found += [
            abs(_seconds(fabric, one, defaults, None) / one.seconds - 1)
            for one in fabric.samples
            if one.seconds >= SHORTEST_S
        ]
    return found
