"""What the overlap benchmark's times mean: figures of merit, their spreads, and which of them can't be."""

import statistics

from tritonmoe.benchmarks.overlap_rank import RankMeasurement
from tritonmoe.benchmarks.timing import Samples, summarize
from tritonmoe.runtime.files import Json

__all__ = ["BEYOND_BOUND", "best", "spread", "summarize_overlap"]

BEYOND_BOUND = 0.01
"""How far beyond its bound a call at that bound may be measured, relative to the bound."""


def best(seconds: Samples, kind: str) -> str:
    """Give the name of the variant of this kind with the smallest median."""
    return min((name for name in seconds if name.startswith(kind)), key=lambda name: statistics.median(seconds[name]))


def spread(values: list[float], digits: int = 4) -> dict[str, float]:
    """Give median and quartiles of values that are no times."""
    ordered = sorted(values)
    quartiles = statistics.quantiles(ordered, n=4) if len(ordered) > 1 else [ordered[0]] * 3
    return {
        "median": round(statistics.median(ordered), digits),
        "lower_quartile": round(quartiles[0], digits),
        "upper_quartile": round(quartiles[2], digits),
    }


def summarize_overlap(measured: RankMeasurement) -> Json:
    """Give the figures of merit, each the median over the rounds with quartiles, for the best schedule and for auto.

    overlap_table.TERMS says what they are; "too_noisy" names those beyond their bound. A backward can't hide what the
    forward exposes; what a call takes outside its passes counts in all bounds. contention is this rank's.
    """
    seconds = measured.seconds
    names = {kind: best(seconds, kind) for kind in ("compute", "communication", "serial", "overlapped")}
    compute, communication, serial = (seconds[names[kind]] for kind in ("compute", "communication", "serial"))
    alone = statistics.median(report.forward.compute_s for report in measured.reports[names["compute"]])
    summary: Json = {f"T_{kind}": {"variant": name, **summarize(seconds[name])} for kind, name in names.items()}
    pass_bounds = [
        whole - sum(computes) + sum(map(max, computes, communications))
        for whole, computes, communications in zip(
            compute,
            zip(*measured.pass_seconds[names["compute"]], strict=True),
            zip(*measured.pass_seconds[names["communication"]], strict=True),
            strict=True,
        )
    ]
    for kind, name in (("overlapped", names["overlapped"]), ("auto", "auto")):
        rounds = list(zip(compute, communication, serial, seconds[name], strict=True))
        contention = [report.forward.compute_s / alone for report in measured.reports[name]]
        summary[kind] = {
            "variant": name,
            **summarize(seconds[name]),
            "hidden_share": spread([(a + b - t) / min(a, b) for a, b, _, t in rounds]),
            "exposed_ms": spread([1e3 * (t - a) for a, _, _, t in rounds], 3),
            "bound_ratio": spread([t / max(a, b) for a, b, _, t in rounds]),
            "pass_bound_ratio": spread([t / b for t, b in zip(seconds[name], pass_bounds, strict=True)]),
            "speed_up": spread([s / t for _, _, s, t in rounds]),
            "contention": spread(contention),
            "num_chunks": [report.num_chunks for report in measured.reports[name]][-1],
        }
        summary[kind]["too_noisy"] = _beyond_bounds(summary[kind], summary["T_compute"]["median_ms"])
    summary["auto"]["over_best"] = spread(
        [auto / over for auto, over in zip(seconds["auto"], seconds[names["overlapped"]], strict=True)]
    )
    if any(name.startswith("two levels") for name in seconds):
        name = best(seconds, "two levels")
        summary["T_two levels"] = {"variant": name, **summarize(seconds[name])}
        pairs = zip(seconds[names["overlapped"]], seconds[name], strict=True)
        summary["two_levels_speed_up"] = spread([one / two for one, two in pairs])
        by_auto = zip(seconds["auto on two levels"], seconds[name], strict=True)
        summary["two_levels_auto_over_best"] = spread([auto / over for auto, over in by_auto])
    return summary


def _beyond_bounds(figures: Json, compute_ms: float) -> list[str]:
    """Name the figures that can't be: a call takes as long as its compute and as its communication, or longer."""
    beyond = {
        "bound_ratio": 1 - figures["bound_ratio"]["median"],
        "pass_bound_ratio": 1 - figures["pass_bound_ratio"]["median"],
        "hidden_share": figures["hidden_share"]["median"] - 1,
        "exposed_ms": -figures["exposed_ms"]["median"] / compute_ms,
    }
    return [name for name, excess in beyond.items() if excess > BEYOND_BOUND]
