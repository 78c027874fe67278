"""What the overlap benchmark's times mean, in one sentence: what overlap can gain here, and what it gained."""

from tritonmoe.runtime.files import Json
from tritonmoe.tools.benchmarks.overlap_report import BEYOND_BOUND, is_noise, scattered_times, series_is_too_long
from tritonmoe.tools.benchmarks.overlap_table import AGAIN
from tritonmoe.tools.report.figures import UNITS

__all__ = ["verdict"]

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
