"""A finding in words: what is wrong, who it is, where, when, and what to do about it; numbers as a reader sees them."""

from collections.abc import Sequence
from dataclasses import dataclass

from tritonmoe.tools.doctor.attribution import Cost, Finding, Verdict
from tritonmoe.tools.doctor.causes import LINKS
from tritonmoe.tools.doctor.culprits import phase_of
from tritonmoe.tools.doctor.graph import Graph, Key
from tritonmoe.tools.recording.call_recording import Recording

__all__ = ["FindingWords", "cost_words", "count_words", "mended_words", "share_words", "time_words", "words_of"]

MOST_FACTOR = 50.0
"""Beyond that what is usual is next to nothing, and how many times as much it is says nothing."""
LEAST_FACTOR = 1.05
OF_LONG_BATCHES = "if a rank has more tokens than the others, make batches of equal length"
MEASURE = "measure the links alone with tritonmoe doctor --probe-links"
ADDS_UP = 0.05
"""Costs add up to what mending all gains if they differ from that by a smaller part of it."""
TO_DO_OF_ALL = {
    "slow rank": "check what else ran on these machines, their clocks and their temperature",
    "late rank": "check what the ranks do outside of operations: data loading, logging, checkpoints, garbage "
    "collection",
}
"""Where no rank differs from the others."""
TO_DO = {
    "slow rank": "check the machine's clocks, its temperature and its other programs; else leave the machine out",
    "late rank": "check what the rank does outside of operations: data loading, logging, checkpoints, garbage "
    "collection",
    "slow link": f"check cable, port, switch and route; {MEASURE}",
    "late link": "check the route, and what may delay messages on it: a switch, a proxy, a busy core",
    "slow port": f"check the network card of that rank, its cable and its driver; {MEASURE}",
    "bandwidth": "send fewer bytes (a narrower wire_dtype, two levels), or hide exchanges behind compute (chunks)",
    "latency": "make fewer and larger exchanges (fewer chunks), or use a network with less delay",
    "chunk overhead": "use fewer chunks",
    "host overhead": "use a faster host or fewer other threads; check what Python does between the steps of the layer",
    "exchange contention": "keep some cores for the exchanges alone (on a GPU: num_sms of the layer)",
    "pause": "check what all ranks do at the same time between calls: checkpoints, evaluation, logging",
    "imbalance": "balance the router: switch its auxiliary loss or bias on, or raise the weight (the files don't have "
    f"the weight); or spread hot experts over ranks; {OF_LONG_BATCHES}",
}


@dataclass(frozen=True)
class FindingWords:
    """The parts of a sentence about a finding."""

    what: str
    who: str
    where: str
    """Empty where it is everywhere."""
    when: str
    to_do: str
    title: str
    """The kind of the cause, in the plural where it is that of all ranks."""
    hidden: str
    """What is added where another cause hides it; else empty."""

    @property
    def sentence(self) -> str:
        where = f", {self.where}" if self.where else ""
        return f"{self.who} {self.what}{where}, {self.when}{self.hidden}"


def words_of(one: Finding, found: Verdict, recording: Recording | None = None) -> FindingWords:
    """Say what a finding is; recording: of this package's layers, where it is one."""
    graph, culprits = found.graph, one.culprits
    if culprits.links and not culprits.words:
        ways = [f"from rank {graph.ranks[i]} to rank {graph.ranks[k]}" for i, k in culprits.links]
        who = " and ".join(ways)
    elif culprits.moves:
        who = "a different rank from step to step"
    elif culprits.ranks:
        who = graph.named(culprits.ranks) + _host_words(graph, culprits.ranks)
    else:
        who = "all ranks" if len(graph.ranks) > 1 else "the rank"
    count = len(culprits.links) * (not culprits.words) or len(culprits.ranks) or len(graph.ranks)
    several = not culprits.moves and count > 1
    where = [place_words(culprits.place)] if culprits.place else [f"in {culprits.phase}"] if culprits.phase else []
    where += [f"in layer {culprits.layer}"] if culprits.layer is not None else []
    hidden = "; other causes hide this cause: mending it alone gains little" if one.is_hidden else ""
    is_of_all = len(graph.ranks) > 1 and not (culprits.links or culprits.moves or culprits.ranks)
    is_of_no_rank = is_of_all and one.kind in TO_DO_OF_ALL
    to_do = TO_DO_OF_ALL[one.kind] if is_of_no_rank else TO_DO[one.kind]
    if len(graph.ranks) == 2 and LINKS.get(one.kind, one.kind) == "slow link":
        to_do = f"two ranks can't tell whether sender, receiver or link is at fault: check both; {to_do}"
    title = f"{one.kind}s" if is_of_no_rank else one.kind
    if one.kind == "imbalance" and recording is not None:
        balance = _balance_to_do(recording, culprits.layer)
        to_do = f"{balance}; or move experts with tritonmoe.rebalance; {OF_LONG_BATCHES}"
    if one.may_be_noise:
        to_do = f"record again first, since 0 is in the interval and this may be noise; then {to_do}"
    what = _what(one, several, len(graph.ranks))
    return FindingWords(what, who, ", ".join(where), str(one.when), to_do, title, hidden)


def mended_words(found: Verdict) -> str:
    """Say how what mending all findings gains compares with their costs."""
    all_s, sum_s = found.mended.seconds, sum(one.cost.seconds for one in found.findings)
    if abs(all_s - sum_s) <= ADDS_UP * sum_s:
        return "their costs add up"
    if all_s < sum_s:
        return "causes overlap, so that this is less than their costs"
    return "waits hide behind each other, so that mending all gains more than mending each alone"


def _host_words(graph: Graph, ranks: Sequence[int]) -> str:
    """Say of which host these are all ranks; "" where they are not, or it has one."""
    hosts = {graph.hosts[rank] for rank in ranks} if graph.hosts else set()
    if len(hosts) != 1 or len(ranks) < 2 or graph.hosts.count(*hosts) != len(ranks):
        return ""
    return f", all of host {hosts.pop()},"


def _balance_to_do(recording: Recording, layer: int | None) -> str:
    """Say what is to be done about the balance of a layer's router; None: of all layers."""
    weights = {
        of.load_balance_loss_weight
        for call in recording.calls
        if call.layer == layer or layer is None or call.layer < 0
        for of in call.ranks
    }
    known = sorted(weight for weight in weights if weight)
    named = f"{known[0]:g}" if len(known) == 1 else f"{known[0]:g} to {known[-1]:g}" if known else ""
    if None in weights:
        beside = f" ({named} in the layers that recorded it)" if known else ""
        return (
            f"switch the router's auxiliary loss or bias on, or raise its weight{beside}: the recording doesn't have "
            "the weight"
        )
    if not known:
        return (
            "set load_balance_loss_weight, which is 0, and add the layers' aux_loss to the loss; or set selection_bias"
        )
    if 0.0 in weights:
        return f"set load_balance_loss_weight in the layers where it is 0, or raise it above {named}"
    return f"raise load_balance_loss_weight above {named}"


def _what(one: Finding, several: bool, num_ranks: int) -> str:
    culprits = one.culprits
    s, their = ("", "their") if several else ("s", "its")
    is_beyond = culprits.factor > MOST_FACTOR
    if one.kind == "slow rank":
        return f"compute{s} " + ("where other ranks compute next to nothing" if is_beyond else _times(culprits.factor))
    if one.kind == "late rank":
        if num_ranks == 1:
            return "runs no operation for longer than usual"
        return f"come{s} late to exchanges, and run{s} no operation meanwhile"
    if one.kind == "slow link" and culprits.words:
        return culprits.words
    if one.kind == "slow link" and culprits.links:
        return (
            "bytes take time, and over other links next to none"
            if is_beyond
            else f"bytes take {_times(culprits.factor)}"
        )
    if one.kind == "slow link":
        if is_beyond:
            return f"need{s} time for {their} bytes, and other ranks need next to none"
        return f"need{s} {_times(culprits.factor)} for {their} bytes"
    return {
        "imbalance": f"get{s} more rows than other ranks",
        "late link": "every message, even a small one, comes later than over other links",
        "slow port": culprits.words or f"move{s} {their} bytes more slowly than other ranks",
        "bandwidth": f"wait{s} for the bytes of exchanges, at the links' usual rate",
        "latency": f"wait{s} for the fixed time of exchanges, which even the smallest exchange takes",
        "chunk overhead": f"pay{s} the fixed cost of a chunk, which even the smallest chunk has, once for every chunk",
        "host overhead": f"wait{s} for the host (Python), before the first operation of a pass and between operations",
        "exchange contention": f"compute{s} more slowly while an exchange is under way",
        "pause": f"do{'' if several else 'es'} something else at the same time between calls, for longer than usual",
    }[one.kind]


def _times(factor: float) -> str:
    return "longer than usual" if factor < LEAST_FACTOR else f"{factor:.2f} times as long as usual"


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


def share_words(seconds: float, found: Verdict) -> str:
    """Return a time as a share of a step."""
    return f"{seconds / found.replayed_s if found.replayed_s else 0.0:.0%}"


def cost_words(cost: Cost, found: Verdict) -> str:
    """Return a cost with its interval, which no step can exceed: "12.1 ms a step, 14% (13% to 15%)"."""
    seconds, low_s, high_s = (min(value, found.replayed_s) for value in (cost.seconds, cost.low_s, cost.high_s))
    share, low, high = (share_words(value, found) for value in (seconds, low_s, high_s))
    return f"{time_words(seconds)} a step, {share} ({low} to {high})"
