"""What the overlap benchmark's times mean: figures of merit, and which of them can't be."""

import statistics

from tritonmoe.runtime.files import Json
from tritonmoe.tools.benchmarks.overlap_rank import RankMeasurement
from tritonmoe.tools.benchmarks.overlap_variants import best
from tritonmoe.tools.benchmarks.timing import ratio, summarize

__all__ = [
    "BEYOND_BOUND",
    "beyond_bounds",
    "is_noise",
    "mark_contention",
    "marks",
    "merits",
    "scattered_times",
    "series_is_too_long",
    "summarize_overlap",
]

BEYOND_BOUND = 0.01
"""How far beyond its bound a call at that bound may be measured, relative to the bound."""
SCATTERED = 0.5
"""A time tells nothing if the middle half of its rounds covers more than that part of the median."""
RESTS_ON = {
    "bound_ratio": ("T_compute", "T_communication"),
    "pass_bound_ratio": ("T_pass_bound",),
    "hidden_share": ("T_compute", "T_communication"),
    "exposed_ms": ("T_compute",),
}
"""The times that a figure of merit compares a call's time with."""
TOO_NOISY, NOTHING_HIDDEN = "too noisy", "nothing hidden"


def summarize_overlap(measured: RankMeasurement) -> Json:
    """Return the times, medians over the rounds with quartiles, and what they say of the best schedule and of auto.

    overlap_table.TERMS says what the figures are. contention is this rank's.
    """
    seconds = measured.seconds
    names = {kind: best(seconds, kind) for kind in ("compute", "communication", "serial", "overlapped")}
    summary: Json = {f"T_{kind}": {"variant": name, **summarize(seconds[name])} for kind, name in names.items()}
    summary["T_pass_bound"] = {
        "variant": f"{names['compute']}, {names['communication']}",
        **summarize(_pass_bounds(measured, names["compute"], names["communication"])),
    }
    for kind, name in (("overlapped", names["overlapped"]), ("auto", "auto")):
        beside, alone = (statistics.median(values) for values in measured.experts_s[name])
        times = summarize(seconds[name])
        summary[kind] = {
            "variant": name,
            **times,
            **merits(times, summary),
            "contention": round(beside / alone, 4),
            "num_chunks": [report.num_chunks for report in measured.reports[name]][-1],
        }
    summary["auto"]["over_best"] = ratio(summary["auto"], summary["overlapped"])
    if any(_is_impossible(beyond_bounds(summary[kind], summary)) for kind in ("overlapped", "auto")):
        summary["auto"]["marks"]["over_best"] = TOO_NOISY
    if any(name.startswith("two levels") for name in seconds):
        name = best(seconds, "two levels")
        two_levels = summary["T_two levels"] = {"variant": name, **summarize(seconds[name])}
        summary["two_levels_speed_up"] = ratio(summary["T_overlapped"], two_levels)
        summary["two_levels_auto_over_best"] = ratio(summarize(seconds["auto on two levels"]), two_levels)
    return summary


def merits(times: Json, summary: Json) -> Json:
    """Return the figures of merit of a call with these times: quotients and differences of medians as they are shown.

    "marks" has the word before each figure that can't be: see marks().
    """
    compute, communication = summary["T_compute"], summary["T_communication"]
    time_ms, compute_ms, communication_ms = (one["median_ms"] for one in (times, compute, communication))
    figures: Json = {
        "hidden_share": round((compute_ms + communication_ms - time_ms) / min(compute_ms, communication_ms), 4),
        "exposed_ms": round(time_ms - compute_ms, 3),
        "bound_ratio": ratio(times, max(compute, communication, key=lambda one: one["median_ms"])),
        "pass_bound_ratio": ratio(times, summary["T_pass_bound"]),
        "speed_up": ratio(summary["T_serial"], times),
    }
    # Where nothing tells a time from that in turn, nothing tells what of the time is hidden or exposed either.
    of_noise = dict.fromkeys(figures, TOO_NOISY) if is_noise(summary["T_serial"], times) else {}
    scattered = scattered_times(summary)
    of_noise |= {name: TOO_NOISY for name, times_of in RESTS_ON.items() if not scattered.isdisjoint(times_of)}
    return {**figures, "marks": marks(figures, summary) | of_noise}


def marks(figures: Json, summary: Json) -> dict[str, str]:
    """Return the word before each figure of merit that can't be, or that says nothing: name -> word.

    A call takes as long as its compute and as its communication, or longer: where one took less, no figure of its time
    holds. One that takes longer than both in turn hides nothing. Where both in turn took longer than they can, no
    figure that needs them holds.
    """
    beyond = beyond_bounds(figures, summary)
    found = dict.fromkeys(beyond, TOO_NOISY)
    if _is_impossible(beyond):
        found |= dict.fromkeys(("hidden_share", "speed_up"), TOO_NOISY)
    if series_is_too_long(summary):
        return found | dict.fromkeys(("hidden_share", "speed_up"), TOO_NOISY)
    return {"hidden_share": NOTHING_HIDDEN, **found} if figures["hidden_share"] < -BEYOND_BOUND else found


def beyond_bounds(figures: Json, summary: Json) -> list[str]:
    """Return the names of the figures of merit that are further beyond their bounds than can be measured."""
    beyond = {
        "bound_ratio": 1 - figures["bound_ratio"],
        "pass_bound_ratio": 1 - figures["pass_bound_ratio"],
        "hidden_share": figures["hidden_share"] - 1,
        "exposed_ms": -figures["exposed_ms"] / summary["T_compute"]["median_ms"],
    }
    return [name for name, excess in beyond.items() if excess > BEYOND_BOUND]


def mark_contention(summary: Json) -> None:
    """Mark the contention of all ranks where experts were faster during exchanges than without any."""
    for kind in ("overlapped", "auto"):
        if 1 - summary[kind]["contention"] > BEYOND_BOUND:
            summary[kind]["marks"]["contention"] = TOO_NOISY


def _is_impossible(beyond: list[str]) -> bool:
    """Return whether a call took less than it can, by the figures that are beyond their bounds."""
    return "bound_ratio" in beyond or "pass_bound_ratio" in beyond


def scattered_times(summary: Json) -> set[str]:
    """Return the names of the times that figures of merit compare with, and that the rounds don't tell."""
    return {
        name
        for name in set().union(*RESTS_ON.values())
        if summary[name]["upper_quartile_ms"] - summary[name]["lower_quartile_ms"]
        > SCATTERED * summary[name]["median_ms"]
    }


def is_noise(one: Json, other: Json) -> bool:
    """Return whether the middle halves of two times overlap, so that nothing tells which is shorter."""
    return max(one["lower_quartile_ms"], other["lower_quartile_ms"]) <= min(
        one["upper_quartile_ms"], other["upper_quartile_ms"]
    )


def series_is_too_long(summary: Json) -> bool:
    """Return whether the time in series is longer than its two parts together, by more than the noise of all three.

    It may be shorter: both parts have what a call does once, such as its planning and the packing of rows.
    """
    longest_ms = sum(summary[name]["upper_quartile_ms"] for name in ("T_compute", "T_communication"))
    return summary["T_serial"]["lower_quartile_ms"] > longest_ms * (1 + BEYOND_BOUND)


def _pass_bounds(measured: RankMeasurement, compute: str, communication: str) -> list[float]:
    """Return each round's longer side of the forward and of the backward, and what a call takes outside its passes.

    A backward can't hide what the forward exposes. What compute alone takes outside its passes may be less than what
    communication alone does: no call is shorter than either.
    """
    return [
        max(exchanges, whole - sum(computes) + sum(map(max, computes, communications)))
        for whole, exchanges, computes, communications in zip(
            measured.seconds[compute],
            measured.seconds[communication],
            zip(*measured.pass_seconds[compute], strict=True),
            zip(*measured.pass_seconds[communication], strict=True),
            strict=True,
        )
    ]
