"""What a reader gives of one rank: when its computing lane was busy, its exchanges, its steps, what the file lacks."""

from array import array
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

__all__ = ["Busy", "Part", "RankTrace", "Step", "union"]


@dataclass
class Part:
    """One rank's part of an exchange; times in seconds on the file's clock."""

    kind: str
    posted_s: float
    start_s: float
    end_s: float | None
    """None where the file doesn't tell."""
    lane: int = 0
    phase: str = ""
    group: str | None = None
    sequence: int | None = None
    group_ranks: tuple[int, ...] | None = None
    sent: tuple[int, ...] | None = None
    """Bytes for each rank of the group."""
    received: tuple[int, ...] | None = None
    rows: int | None = None
    """How many rows came."""
    num_bytes: int | None = None
    element_bytes: int | None = None
    """How wide its numbers are."""
    peer: int | None = None
    """The other rank of a send or receive, by its number in the group."""
    other: int | None = None
    """The same by its index, once ranks' traces are joined."""
    links: tuple[tuple[str, int, int, float], ...] = ()
    """(send or recv, the other rank's number in the group, bytes, seconds) of each link, where they are known apart."""
    way: str = ""
    """What a send or receive is called where the other rank is known: "send to a later rank"."""
    is_noticed: bool = False
    """Whether end_s is when the rank that had waited for it went on: it may have ended sooner."""
    is_timed: bool = True
    """Whether the file tells when it was, and not only how long it took."""
    key: tuple = ()
    """What it is compared by, once ranks' traces are joined."""
    member: int = -1
    """Then, its place in the graph."""
    idle_since_s: float | None = None
    """Then, since when its rank's computing lane stood still for it; None where it didn't."""


@dataclass
class Step:
    """One step of the training, as its rank saw it."""

    number: int
    start_s: float
    end_s: float


@dataclass
class RankTrace:
    """One rank of a run."""

    source: str
    rank: int | None
    world_size: int | None
    lanes: str
    """gpu, cpu, or none: what is known of the computing."""
    host: str = ""
    """Empty where the file doesn't tell."""
    routed: tuple[int, int] | None = None
    """How many tokens a router of this rank had at most, and how many experts it gave each."""
    busy_start_s: array = field(default_factory=lambda: array("d"))
    busy_end_s: array = field(default_factory=lambda: array("d"))
    """When the computing lane was busy: intervals in order that don't overlap."""
    backward_start_s: array = field(default_factory=lambda: array("d"))
    backward_end_s: array = field(default_factory=lambda: array("d"))
    """When the host ran backwards, where that is also when they were computed."""
    parts: list[Part] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    groups: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """The ranks of each group of processes, by its name."""
    rank_in: dict[str, int] = field(default_factory=dict)
    """The rank's number in each group, where files don't have the groups' ranks."""
    wires: list[tuple[str, str, int, float, float]] = field(default_factory=list)
    """(group, send or recv, the other rank's number in the group, bytes, seconds) of all that went over one link."""
    is_unix_clock: bool = False
    limits: list[str] = field(default_factory=list)
    """What the file can't tell."""

    def move(self, moved: Callable[[float], float]) -> None:
        """Put all its times onto another clock."""
        for times in (self.busy_start_s, self.busy_end_s, self.backward_start_s, self.backward_end_s):
            times[:] = array("d", map(moved, times))
        for part in self.parts:
            part.posted_s, part.start_s = moved(part.posted_s), moved(part.start_s)
            part.end_s = None if part.end_s is None else moved(part.end_s)
        for step in self.steps:
            step.start_s, step.end_s = moved(step.start_s), moved(step.end_s)


def union(starts: Sequence[float], ends: Sequence[float]) -> tuple[array, array]:
    """Return the intervals in order in which at least one of these lasts."""
    found_starts, found_ends = array("d"), array("d")
    last = float("-inf")
    for start, end in sorted(zip(starts, ends, strict=True)):
        if start > last:
            found_starts.append(start)
            found_ends.append(end)
            last = end
        elif end > last:
            found_ends[-1] = last = end
    return found_starts, found_ends


class Busy:
    """For how long of a time something lasts, in intervals in order that don't overlap."""

    def __init__(self, starts: Sequence[float], ends: Sequence[float]) -> None:
        self.starts, self.ends = starts, ends
        self.sums = [0.0]
        for start, end in zip(self.starts, self.ends, strict=True):
            self.sums.append(self.sums[-1] + end - start)

    def until(self, moment_s: float) -> float:
        at = bisect_right(self.starts, moment_s)
        if not at:
            return 0.0
        return self.sums[at] - max(0.0, self.ends[at - 1] - moment_s)

    def between(self, start_s: float, end_s: float) -> float:
        return max(0.0, self.until(end_s) - self.until(start_s))
