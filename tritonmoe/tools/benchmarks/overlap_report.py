"""What the overlap benchmark's times mean: figures of merit and which of them can't be, table, verdict, HTML report."""

import statistics
import textwrap
from collections.abc import Iterable, Mapping, Sequence

from tritonmoe.runtime.files import Json
from tritonmoe.tools.benchmarks.overlap_rank import RankMeasurement
from tritonmoe.tools.benchmarks.overlap_variants import best
from tritonmoe.tools.benchmarks.timing import ratio, summarize
from tritonmoe.tools.report.charts import Curve, Curves, Heat, lanes_chart, ranks_within
from tritonmoe.tools.report.figures import UNITS, Cell, Figures, Table, Words
from tritonmoe.tools.report.html import Page, Section
from tritonmoe.tools.report.perfetto import chrome_trace
from tritonmoe.tools.report.terminal import TEXT_COLUMNS
from tritonmoe.tools.report.timeline import Timeline

__all__ = [
    *("TERMS", "TERMS_OF_PICTURE", "as_table", "as_terms", "headline", "is_noise", "mark_contention", "marks"),
    *("metrics", "noise_notes", "overlap_page", "shown", "summarize_overlap", "verdict"),
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
            **metrics(times, summary),
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


def metrics(times: Json, summary: Json) -> Json:
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
    """Return a sentence if the link misses the asked ratio, and one for each schedule with marked figures."""
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


LEAST_ROUNDS = 3
"""Fewer have no spread to speak of."""
WHOLLY = 0.9
"""The share of what can be gained from which on next to all of it counts as gained."""


def verdict(results: Json) -> Json:
    """Return the verdict on what --json has: "text" for people, "case" and shares of the time in series for programs.

    "case": "gained", "hidden" (gained next to all that can be gained), "lost" (the fastest overlapped schedule is
    slower than the fastest without overlap), "few rounds", "noise" (the quartiles of both overlap), "too fast" (faster
    than its bound), "no bound" (the time in series is shorter than a call can be), "series too long" (longer than its
    parts together, by more than their noise), "no exchange".
    "gain" and "auto_gain" are 1 - time / T_serial, "possible_gain" is 1 - bound / time in series, which is T_serial or,
    where they are shorter, the parts together; None where the times don't tell. A gain may be the possible one and the
    error of measurement more.
    """
    found: Json = {"possible_gain": None, "gain": None, "auto_gain": None}
    rows = results["traffic_rows"]
    if not any(count for i, row in enumerate(rows) for k, count in enumerate(row) if i != k):
        text = "No rows travel between the ranks with this routing: there is nothing to hide."
        return {"case": "no exchange", "text": text, **found}
    summary = results["summary"]
    serial, overlapped, auto = (summary[name] for name in ("T_serial", "overlapped", "auto"))
    compute_ms, communication_ms = (summary[name]["median_ms"] for name in ("T_compute", "T_communication"))
    shorter, longer = sorted((("exchanges", communication_ms), ("compute", compute_ms)), key=lambda one: one[1])
    longest_ms = max(longer[1], summary["T_pass_bound"]["median_ms"])
    series_ms = serial["median_ms"]
    verb = "takes" if shorter[0] == "compute" else "take"
    takes = f"{shorter[0]} {verb} {_ms(shorter[1])} beside {_ms(longer[1])} of {longer[0]}"
    takes = f"On this emulated link {takes}" if results["emulated"] else takes[0].upper() + takes[1:]
    if series_ms < longest_ms * (1 - BEYOND_BOUND):
        text = f"{takes}, and both in turn took {_ms(series_ms)}, which is too short to be true: {AGAIN}."
        return {"case": "no bound", "text": text, **found}
    if series_is_too_long(summary):
        text = (
            f"{takes}, but both in turn took {_ms(series_ms)} ({_middle(serial)} in the middle half of the rounds), "
            f"more than the {_ms(compute_ms + communication_ms)} of both together. So how much overlap can gain can't "
            "be told: at every exchange the ranks wait for the slowest one, and where ranks share cores, with each "
            f"other or with other programs, these waits are in neither part; {AGAIN}."
        )
        return {"case": "series too long", "text": text, **found}

    def gain(time_ms: float) -> float:
        return round(1 - time_ms / series_ms, 4)

    in_turn_ms = min(series_ms, compute_ms + communication_ms)
    found["possible_gain"] = possible = max(0.0, round(1 - longest_ms / in_turn_ms, 4))
    by_pass = " (each pass by itself)" if longest_ms > longer[1] * (1 + BEYOND_BOUND) else ""
    case = _case(serial, overlapped, longest_ms, possible)
    if case in ("gained", "hidden", "lost"):
        found["gain"] = gain(overlapped["median_ms"])
        if auto["median_ms"] >= longest_ms * (1 - BEYOND_BOUND) and not is_noise(serial, auto):
            found["auto_gain"] = gain(auto["median_ms"])
    outcome = _outcome(case, summary, found, longest_ms)
    rests_on = sorted({"T_compute", "T_communication"} & scattered_times(summary))
    noisy = " and ".join(f"{name} took {_middle(summary[name])}" for name in rests_on)
    doubt = f" (too noisy: {noisy} in the middle half of the rounds)" if noisy else ""
    in_turn = f"{_ms(series_ms)} in series" if in_turn_ms == series_ms else f"{_ms(in_turn_ms)} of both parts together"
    text = f"{takes}: of the {in_turn} overlap can gain at most {_percent(possible)} here{by_pass}{doubt}; {outcome}."
    return {"case": case, "text": text, **found}


def _outcome(case: str, summary: Json, found: Json, longest_ms: float) -> str:
    """Return what the fastest overlapped schedule and auto made of the possible gain, in words."""
    serial, overlapped, possible = summary["T_serial"], summary["overlapped"], found["possible_gain"]
    name = overlapped["variant"]
    if case in ("gained", "hidden", "lost"):
        gains = f"{name} {_said(found['gain'], possible)}, auto {_said(found['auto_gain'], possible)}"
        if case == "gained":
            return gains
        if case == "hidden":
            return f"{gains}: {name} gained next to all that overlap can gain"
        fastest = "auto" if (found["auto_gain"] or 0) > 0 else serial["variant"]
        return f"but {gains}: {fastest} is the fastest"
    if case == "few rounds":
        return f"{serial['samples']} round{'s' * (serial['samples'] > 1)} can't tell what it gained: {AGAIN}"
    if case == "noise":
        return (
            f"what it gained can't be told from the noise, {name} took {_middle(overlapped)} and {serial['variant']} "
            f"{_middle(serial)} in the middle half of the rounds: {AGAIN}"
        )
    return (
        f"what it gained can't be told, for {name} took {_ms(overlapped['median_ms'])}, less than the "
        f"{_ms(longest_ms)} of its bound: {AGAIN}"
    )


def _case(serial: Json, overlapped: Json, longest_ms: float, possible: float) -> str:
    if serial["samples"] < LEAST_ROUNDS:
        return "few rounds"
    if overlapped["median_ms"] < longest_ms * (1 - BEYOND_BOUND):
        return "too fast"
    if is_noise(serial, overlapped):
        return "noise"
    gain = 1 - overlapped["median_ms"] / serial["median_ms"]
    if gain < 0:
        return "lost"
    return "hidden" if gain >= WHOLLY * possible else "gained"


def _ms(value: float) -> str:
    return UNITS["ms"](value)


def _middle(times: Json) -> str:
    return f"{_ms(times['lower_quartile_ms'])} to {_ms(times['upper_quartile_ms'])}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.01 or share == 0 else f"{100 * share:.1f} %"


def _said(gain: float | None, possible: float) -> str:
    if gain is None:
        return "nothing that can be told from the noise"
    if gain > possible:
        return "gained all of it" if possible > 0 else "gained nothing"
    return f"gained {_percent(gain)}" if gain >= 0 else f"lost {_percent(-gain)}"


QUARTILES = ("median_ms", "lower_quartile_ms", "upper_quartile_ms")
METRICS = ("hidden_share", "exposed_ms", "bound_ratio", "speed_up")


def overlap_page(results: Json, timelines: Mapping[str, Sequence[Timeline]]) -> Page:
    """Return the page. results: what --json has; timelines: name of a schedule -> those of the ranks."""
    number = Figures(results)
    places = ranks_within(timelines)
    lanes = {name: [of[place] for place in places] for name, of in timelines.items()}
    rows: list[list[Cell]] = [
        [name, *(shown(results["summary"][kind], name) for kind in ("overlapped", "auto"))] for name in METRICS
    ]
    metrics_table = Table(
        ["figure", "the fastest overlapped", "auto"], rows, "Figures of merit, of the medians of the rounds"
    )
    variants: list[list[Cell]] = [
        [name, *(number(f"variants/{name}/{of}", "ms") for of in QUARTILES)] for name in results["variants"]
    ]
    series: dict[str, list[Json]] = {}
    for one in results["sweep"]:
        series.setdefault(one["series"], []).append(one)
    curves = [
        Curve(
            name,
            [(one["num_chunks"], results["variants"][one["name"]]["median_ms"]) for one in of],
        )
        for name, of in series.items()
    ]
    table = Table(["schedule", "median", "lower quartile", "upper quartile"], variants)
    ranks = [str(rank) for rank in range(results["ranks"])]
    traffic = Heat(
        "Tokens of a rank that need an expert of another",
        *("traffic_rows", results["traffic_rows"], "count", "from rank", "to rank", ranks, ranks),
        base=min(map(min, results["traffic_rows"])),
    )
    sections = [
        Section("Lanes", [lanes_chart("The best schedules, measured and planned", lanes, metrics_table)]),
        Section("Time by the number of chunks", [
            Curves("A call, median of its rounds", "number of chunks", "ms", curves, table)]),
        Section("Traffic", [traffic]),
        Section("What the words mean", [Words([f"{name}: {TERMS[name]}" for name in TERMS_OF_PICTURE] + [OF_ROUNDS])]),
    ]  # fmt: skip
    summary = [
        f"{results['model']}, {results['tokens']} tokens on each of {results['ranks']} ranks, {results['routing']} "
        f"routing, {results['pass']}; {results['link']}",
        results["verdict"]["text"],
        headline(results),
        *noise_notes(results),
    ]
    return Page("How much of a layer's communication is hidden", summary, sections, results, chrome_trace(lanes))
