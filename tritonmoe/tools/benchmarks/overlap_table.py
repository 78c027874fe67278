"""How the overlap benchmark's figures are shown: the words they are called by, the table, the legend."""

import textwrap
from collections.abc import Iterable

from tritonmoe.runtime.files import Json
from tritonmoe.tools.benchmarks.overlap_report import (
    BEYOND_BOUND,
    NOTHING_HIDDEN,
    TOO_NOISY,
    beyond_bounds,
    is_noise,
    scattered_times,
    series_is_too_long,
)
from tritonmoe.tools.report.terminal import TEXT_COLUMNS

__all__ = [
    "AGAIN",
    "OF_ROUNDS",
    "TERMS",
    "TERMS_OF_PICTURE",
    "as_table",
    "as_terms",
    "headline",
    "noise_notes",
    "shown",
]

TERMS = {
    "T_compute": "the layer with rows that arrive without delay: nothing travels",
    "T_communication": "the layer's exchanges, with experts that compute nothing; the fastest number of chunks",
    "T_pass_bound": "the longer of these two in each of forward and backward, plus the call's time outside of both; "
    "no less than T_compute or T_communication",
    "T_serial": "compute and exchanges in turn; the fastest number of chunks",
    "T_overlapped": "the fastest overlapped schedule",
    "auto": 'num_chunks="auto": the schedule that the layer chose by itself',
    "free transport": "an overlapped schedule with rows that arrive without delay: the cost of its steps",
    "predicted": "the simulator's time, from the costs of steps and of the link",
    "planned": "in pictures and traces: the lanes that the simulator predicts",
    "bound_ratio": "time / max(T_compute, T_communication): at least 1; 1 if the shorter one is wholly hidden",
    "pass_bound_ratio": "time / T_pass_bound: at least 1; a backward can't hide what the forward exposes",
    "hidden_share": "(T_compute + T_communication - time) / min(T_compute, T_communication): 0 to 1",
    "exposed_ms": "time - T_compute: at least 0",
    "speed_up": "T_serial / time, like all ratios a ratio of the medians that are shown",
    "contention": "the experts' time in forward during exchanges / without any, of the rank with the largest ratio: "
    "at least 1",
    "over_best": "auto's time / T_overlapped",
    "two_levels_speed_up": "T_overlapped / the fastest time on two levels",
    "two_levels_auto_over_best": "auto's time on two levels / the fastest time on two levels",
}
"""What is measured, and the figures of merit, by their names in text, JSON and pictures."""
TERMS_OF_PICTURE = (
    *("T_compute", "T_communication", "T_serial", "auto", "free transport", "planned"),
    *("bound_ratio", "hidden_share", "speed_up"),
)
OF_ROUNDS = (
    "A time is that of the slowest rank, the median of the rounds with its quartiles; a figure is of these medians. "
    f"A figure beyond its bound by more than {BEYOND_BOUND} (exposed_ms: by that times T_compute) is too noisy. Where "
    "a time is shorter than its bound, all its figures are: its hidden_share, speed_up and over_best. hidden_share and "
    "speed_up are too noisy as well where T_serial is longer than T_compute and T_communication together, by more than "
    "the quartiles allow, and all figures of a time whose quartiles and those of T_serial overlap. So is a figure of "
    "T_compute, T_communication or T_pass_bound if the quartiles of that time are further apart than half its median. "
    "Where a call takes longer than T_compute and T_communication together, nothing is hidden."
)
MOST_OFF = 1.2
"""By how many times the ratio of T_compute to T_communication may miss the one that was asked for, unsaid."""
AGAIN = "measure more rounds (--rounds), on an idle machine, or a larger layer (--tokens, --model)"
"""What to do about noise, at the end of a sentence."""
FIGURES = ("bound_ratio", "pass_bound_ratio", "hidden_share", "exposed_ms", "speed_up", "contention", "over_best")
TWO_LEVELS = ("two_levels_speed_up", "two_levels_auto_over_best")


def shown(figures: Json, name: str) -> str:
    """Return one figure of merit as text, with its mark: "1.018", "too noisy: 0.953"."""
    text, mark = f"{figures[name]:.3f}", figures.get("marks", {}).get(name)
    return text if mark is None else f"{mark}: {text}"


def noise_notes(results: Json) -> list[str]:
    """Say whether the link has the asked ratio, and of each schedule with marked figures what was measured."""
    summary, notes = results["summary"], []
    compute, communication = (summary[f"T_{kind}"]["median_ms"] for kind in ("compute", "communication"))
    reached, asked = compute / communication, results["compute_ratio"]
    if asked is not None and not 1 / MOST_OFF <= reached / asked <= MOST_OFF:
        notes.append(
            f"compute took {reached:.2f} times as long as communication, and the link's rate was chosen for {asked:g} "
            f"(--compute-ratio): compute became slower or faster meanwhile. {AGAIN[0].upper()}{AGAIN[1:]}."
        )
    parts = f"{compute:.2f} ms of compute and {communication:.2f} ms of communication alone"
    for figures in (summary["overlapped"], summary["auto"]):
        took = f"{_title(figures)} took {figures['median_ms']:.2f} ms, beside {parts}."
        words = [name for name, mark in figures["marks"].items() if mark == TOO_NOISY]
        if NOTHING_HIDDEN in figures["marks"].values():
            notes.append(f"{NOTHING_HIDDEN}: {took} Its steps cost more than they hide.")
        if not words:
            continue
        reasons = []
        if beyond_bounds(figures, summary):
            reasons.append(
                "neither a call nor one of its passes can be faster than the longer of its compute and its "
                "communication"
            )
        if "contention" in words:
            reasons.append(
                f"experts took {figures['contention']:.3f} times as long during exchanges as without any, and can't be "
                "faster beside them"
            )
        if series_is_too_long(summary):
            reasons.append("T_serial is longer than T_compute and T_communication together, as the verdict says")
        if scattered := sorted(scattered_times(summary)):
            reasons.append(f"the rounds of {' and '.join(scattered)} differ by more than half of the median")
        if is_noise(summary["T_serial"], figures):
            reasons.append("the middle halves of its rounds and of T_serial's overlap")
        if "over_best" in words and not reasons:
            reasons.append("T_overlapped is shorter than its bound")
        why = "; ".join(reasons)
        notes.append(f"too noisy ({', '.join(words)}): {why}. {took} {AGAIN[0].upper()}{AGAIN[1:]}.")
    return notes


def headline(results: Json) -> str:
    """Return the best schedule's figures in one line."""
    figures = results["summary"]["overlapped"]
    names = ("bound_ratio", "hidden_share", "speed_up")
    said = ", ".join(f"{name} {shown(figures, name)}" for name in names)
    return f"{_title(figures)}: {said}"


def as_terms(names: Iterable[str]) -> str:
    """Return a legend: a line for each of these terms, then what is true of all figures."""
    names = list(names)
    width = max(map(len, names))
    behind = " " * (width + 2)
    terms = (textwrap.fill(f"{name:{width}}  {TERMS[name]}", TEXT_COLUMNS, subsequent_indent=behind) for name in names)
    return "\n".join([*terms, *textwrap.wrap(OF_ROUNDS, TEXT_COLUMNS)])


def _title(figures: Json) -> str:
    """Return a schedule's name with its chunks: the layer's choice has no number in it."""
    return f"auto (C={figures['num_chunks']})" if figures["variant"] == "auto" else figures["variant"]


def as_table(results: Json) -> str:
    """Return the results as text."""
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
    for title in ("compute", "communication", "pass_bound", "serial", "overlapped", "two levels"):
        if f"T_{title}" not in summary:
            continue
        row = summary[f"T_{title}"]
        lines.append(f"T_{title:14} {row['median_ms']:9.2f} ms  {row['variant']}")
    columns = [summary[kind] for kind in ("overlapped", "auto")]
    rows = [("", *map(_title, columns))]
    rows += [(name, *(shown(figures, name) if name in figures else "" for figures in columns)) for name in FIGURES]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    if "T_two levels" in summary:
        lines += [f"{name} {shown(summary, name)}" for name in TWO_LEVELS]
    for rank, sent in enumerate(results["sent_bytes"] or []):
        computed = sent["rows"] + sent["metadata"]
        lines.append(
            f"rank {rank} sent {sent['measured']:.0f} bytes in a call, computed {computed:.0f} "
            f"({sent['measured'] / computed - 1:+.2%})"
        )
    for levels, by_node in results["uplink_bytes"].items():
        said = ", ".join(f"{sent:.0f}" for sent in by_node)
        lines.append(f"{levels}: bytes in a call from each node to other nodes: {said}")
    terms = [name for name in TERMS if name not in TWO_LEVELS or "T_two levels" in summary]
    return "\n".join([*lines, *noise_notes(results), "", as_terms(terms)])
