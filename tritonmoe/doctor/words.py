"""A finding in words: what is wrong, who it is, where, when, and what to do about it; numbers as a reader sees them."""

from dataclasses import dataclass

from tritonmoe.doctor.attribution import Cost, Finding, Verdict
from tritonmoe.doctor.culprits import phase_of
from tritonmoe.doctor.graph import Key

__all__ = ["FindingWords", "cost_words", "count_words", "share_words", "time_words", "to_do_of", "words_of"]

MOST_FACTOR = 50.0
"""Beyond that what is usual is next to nothing, and how many times as much it is says nothing."""
LEAST_FACTOR = 1.05
TO_DO = {
    "slow rank": "look at its clocks, its temperature and what else runs there; else leave the machine out",
    "late rank": "look at what it does outside of operations: data loading, logging, checkpoints, garbage collection",
    "slow link": "look at cable, port, switch and route; measure the links alone",
    "imbalance": "balance the router (its auxiliary loss or bias: higher, or on where it is off), or spread hot "
    "experts over ranks; where a rank has more tokens than the others, batches of one length",
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
    hidden: str
    """What is added where another cause hides it; else empty."""

    @property
    def sentence(self) -> str:
        where = f", {self.where}" if self.where else ""
        return f"{self.who} {self.what}{where}, {self.when}{self.hidden}"


def words_of(one: Finding, found: Verdict) -> FindingWords:
    """Say what a finding is."""
    graph, culprits = found.graph, one.culprits
    if culprits.moves:
        who = "another rank from step to step"
    elif culprits.ranks:
        who = graph.named(culprits.ranks)
    else:
        who = "all ranks" if len(graph.ranks) > 1 else "the rank"
    several = not culprits.moves and (len(culprits.ranks) or len(graph.ranks)) > 1
    s, their = ("", "their") if several else ("s", "its")
    is_beyond = culprits.factor > MOST_FACTOR
    if one.kind == "slow rank":
        what = f"compute{s} " + ("where others hardly do" if is_beyond else _times(culprits.factor))
    elif one.kind == "late rank":
        come = f"come{s} late to exchanges, doing nothing that the file shows"
        what = come if len(graph.ranks) > 1 else "does nothing that the file shows, for longer than usual"
    elif one.kind == "slow link":
        longer = f"need{s} {_times(culprits.factor)} for {their} bytes"
        what = f"need{s} time for {their} bytes where others need next to none" if is_beyond else longer
    else:
        what = f"get{s} more rows than others"
    where = place_words(culprits.place) if culprits.place else f"in {culprits.phase}" if culprits.phase else ""
    hidden = "; hidden by the other causes: alone it gains little" if one.is_hidden else ""
    return FindingWords(what, who, where, str(one.when), to_do_of(one), hidden)


def to_do_of(one: Finding) -> str:
    """Say what to do about a finding."""
    return TO_DO[one.kind]


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
    """Give "1 rank", "3 ranks"."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def time_words(seconds: float) -> str:
    """Give milliseconds, of long times seconds."""
    return f"{seconds:.1f} s" if abs(seconds) >= 10 else f"{1e3 * seconds:.1f} ms"


def share_words(seconds: float, found: Verdict) -> str:
    """Give a time as a share of a step."""
    return f"{seconds / found.replayed_s if found.replayed_s else 0.0:.0%}"


def cost_words(cost: Cost, found: Verdict) -> str:
    """Give a cost with its interval: "12.1 ms a step, 14% (13% to 15%)"."""
    low, high = (share_words(value, found) for value in (cost.low_s, cost.high_s))
    return f"{time_words(cost.seconds)} a step, {share_words(cost.seconds, found)} ({low} to {high})"
