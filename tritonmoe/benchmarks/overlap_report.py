"""What the overlap benchmark's times mean: shares, spreads, and the table that is printed."""

import statistics
from typing import Any

from .overlap_rank import RankMeasurement
from .timing import Samples, summarize

__all__ = ["as_table", "best", "summarize_overlap"]


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


def summarize_overlap(measured: RankMeasurement) -> dict[str, Any]:
    """Give the figures of merit, each the median over the rounds with quartiles, for the best schedule and for auto.

    With comp, comm and over the times of compute alone, communication alone and the overlapped layer in one round:
    hidden_share = (comp + comm - over) / min(comp, comm), exposed_ms = over - comp, bound_ratio = over / max(comp,
    comm), speed_up = serial / over. pass_bound_ratio = over / the sum of both passes' max(comp, comm), and what a call
    takes outside its passes: a backward can't hide what the forward exposes. contention = the experts' time under
    exchanges / alone, on this rank.
    """
    seconds = measured.seconds
    names = {kind: best(seconds, kind) for kind in ("compute", "communication", "serial", "overlapped")}
    compute, communication, serial = (seconds[names[kind]] for kind in ("compute", "communication", "serial"))
    alone = statistics.median(report.forward.compute_s for report in measured.reports[names["compute"]])
    summary: dict[str, Any] = {
        f"T_{kind}": {"variant": name, **summarize(seconds[name])} for kind, name in names.items()
    }
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
    best_s = statistics.median(seconds[names["overlapped"]])
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
    summary["bound_ratio_of_medians"] = round(
        best_s / max(statistics.median(compute), statistics.median(communication)), 4
    )
    return summary


def as_table(results: dict[str, Any]) -> str:
    """Give the results as text."""
    summary = results["summary"]
    lines = [f"{results['link']}, {results['model']} T={results['tokens']}, {results['routing']}, {results['pass']}"]
    if results["wire_dtype"] is not None:
        lines[0] += f", rows travel as {results['wire_dtype']}"
    for name, times in results["variants"].items():
        line = (
            f"  {name:32} {times['median_ms']:9.2f} ms  ({times['lower_quartile_ms']:.2f} .. "
            f"{times['upper_quartile_ms']:.2f})"
        )
        if name in results["predicted_ms"]:
            line += f"  predicted {results['predicted_ms'][name]:.2f}"
        lines.append(line)
    for title in ("compute", "communication", "serial", "overlapped"):
        row = summary[f"T_{title}"]
        lines.append(f"T_{title:14} {row['median_ms']:9.2f} ms  {row['variant']}")
    for kind in ("overlapped", "auto"):
        row = summary[kind]
        lines.append(
            f"{kind:11} C={row['num_chunks']}: {row['bound_ratio']['median']:.3f} x max(compute, communication), "
            f"{row['pass_bound_ratio']['median']:.3f} x that of each pass, "
            f"hidden {row['hidden_share']['median']:.1%}, exposed {row['exposed_ms']['median']:.2f} ms, "
            f"speed-up {row['speed_up']['median']:.2f}, contention {row['contention']['median']:.2f}"
        )
    for rank, sent in enumerate(results["sent_bytes"] or []):
        computed = sent["rows"] + sent["metadata"]
        lines.append(
            f"rank {rank} sent {sent['measured']:.0f} bytes in a call, computed {computed:.0f} "
            f"({sent['measured'] / computed - 1:+.2%})"
        )
    for levels, by_node in results["uplink_bytes"].items():
        said = ", ".join(f"{sent:.0f}" for sent in by_node)
        lines.append(f"{levels}: bytes in a call from each node to other nodes: {said}")
    if "T_two levels" in summary:
        ratio = summary["two_levels_speed_up"]
        lines.append(
            f"two levels against one: {ratio['median']:.2f} times as fast ({summary['T_two levels']['variant']}); "
            f"auto there: {summary['two_levels_auto_over_best']['median']:.3f} of that time"
        )
    return "\n".join(lines)
