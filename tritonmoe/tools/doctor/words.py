"""A finding in words: what is wrong, who it is, where, when, and what to do about it; numbers as a reader sees them."""

from collections.abc import Sequence
from typing import NamedTuple

from tritonmoe.tools.doctor.attribution import Cost, Finding, Verdict
from tritonmoe.tools.doctor.causes import CAUSES, Words
from tritonmoe.tools.doctor.culprits import phase_of
from tritonmoe.tools.doctor.graph import Graph, Key
from tritonmoe.tools.recording.call_recording import Recording

__all__ = ["FindingWords", "cost_words", "count_words", "describe_finding", "mended_words", "share_words", "time_words"]

ADDS_UP = 0.05
"""Costs add up to what mending all gains if they differ from that by a smaller part of it."""


class FindingWords(NamedTuple):
    """A finding in words."""

    title: str
    """The kind of the cause, in the plural where it is that of all ranks."""
    sentence: str
    to_do: str


def describe_finding(one: Finding, found: Verdict, recording: Recording | None = None) -> FindingWords:
    """Return the words of a finding; recording: the recording of this package's layers, where the run is one."""
    graph, culprits = found.graph, one.culprits
    cause = CAUSES[one.kind]
    unlike = sorted({graph.stages[rank] for rank in culprits.ranks} if graph.stages else ())
    if cause.of_whom == "stage" and unlike:
        who = f"stage{'s' * (len(unlike) > 1)} {' and '.join(map(str, unlike))}"
    elif cause.of_whom:
        who = cause.of_whom + "s" * (cause.of_whom == "stage")
    elif culprits.links and not culprits.words:
        ways = [f"from rank {graph.ranks[i]} to rank {graph.ranks[k]}" for i, k in culprits.links]
        who = " and ".join(ways)
    elif culprits.moves and culprits.ranks:
        who = f"{graph.named(culprits.ranks)}, each in other steps,"
    elif culprits.moves:
        who = "a different rank from step to step"
    elif culprits.ranks:
        who = graph.named(culprits.ranks) + _host_words(graph, culprits.ranks)
    else:
        who = "all ranks" if len(graph.ranks) > 1 else "the rank"
    count = len(culprits.links) * (not culprits.words) or len(culprits.ranks) or len(graph.ranks)
    several = count > 1 and (not culprits.moves or bool(culprits.ranks)) and len(unlike) * bool(cause.of_whom) != 1
    where = [place_words(culprits.place)] if culprits.place else [f"in {culprits.phase}"] if culprits.phase else []
    where += [f"in layer {culprits.layer}"] if culprits.layer is not None else []
    hidden = "; other causes hide this cause: mending it alone gains little" if one.is_hidden else ""
    is_of_all = len(graph.ranks) > 1 and not (culprits.links or culprits.moves or culprits.ranks)
    is_of_no_rank = is_of_all and bool(cause.to_do_of_all)
    to_do = cause.to_do_of_all if is_of_no_rank else cause.to_do
    if len(graph.ranks) == 2 and cause.is_of_links:
        to_do = f"two ranks can't tell whether sender, receiver or link is at fault: check both; {to_do}"
    title = f"{one.kind}s" if is_of_no_rank else one.kind
    if cause.to_do_of_layer is not None and recording is not None:
        to_do = cause.to_do_of_layer(recording, culprits.layer)
    if one.may_be_noise:
        to_do = f"record again first, since 0 is in the interval and this may be noise; then {to_do}"
    what = cause.what(Words(culprits, len(graph.ranks), several))
    return FindingWords(title, f"{', '.join([f'{who} {what}', *where, str(one.when)])}{hidden}", to_do)


def mended_words(found: Verdict) -> str:
    """Return how the gain of mending all findings compares with the sum of their costs."""
    all_s, sum_s = found.mended.seconds, sum(one.cost.seconds for one in found.findings)
    if abs(all_s - sum_s) <= ADDS_UP * sum_s:
        return "their costs add up"
    if all_s < sum_s:
        return "causes overlap, so that this is less than their costs"
    return "waits hide behind each other, so that mending all gains more than mending each alone"


def _host_words(graph: Graph, ranks: Sequence[int]) -> str:
    """Return the host of which these are all ranks, in words; "" where they are not all, or the host has one rank."""
    hosts = {graph.hosts[rank] for rank in ranks} if graph.hosts else set()
    if len(hosts) != 1 or len(ranks) < 2 or graph.hosts.count(*hosts) != len(ranks):
        return ""
    return f", all of host {hosts.pop()},"


def place_words(key: Key) -> str:
    """Name a key: "before all_to_all 3 of forward"."""
    phase = phase_of(key)
    of_phase = f" of {phase}" if phase and phase == key[0] else ""
    if "before" in key:
        return f"before {key[2]} {key[3] + 1}{of_phase}"
    if len(key) == 3 and isinstance(key[2], int):
        return f"in {key[1]} {key[2] + 1}{of_phase}"
    return f"in {' '.join(map(str, key))}"


def count_words(count: int, what: str) -> str:
    """Return "1 rank", "3 ranks"."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def time_words(seconds: float) -> str:
    """Return milliseconds, of long times seconds."""
    return f"{seconds:.1f} s" if abs(seconds) >= 10 else f"{1e3 * seconds:.1f} ms"


def share_words(seconds: float, found: Verdict, decimals: int = 0) -> str:
    """Return a time as a share of the whole step."""
    return f"{seconds / found.whole_s if found.whole_s else 0.0:.{decimals}%}"


def cost_words(cost: Cost, found: Verdict) -> str:
    """Return a cost with its interval, which no step can exceed: "12.1 ms a step, 14% (13% to 15%)"."""
    seconds, low_s, high_s = (min(value, found.whole_s) for value in (cost.seconds, cost.low_s, cost.high_s))
    share, low, high = (share_words(value, found) for value in (seconds, low_s, high_s))
    return f"{time_words(seconds)} a step, {share} ({low} to {high})"
