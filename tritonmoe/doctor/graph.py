"""One model of a run: what every rank did in order, and the exchanges in which ranks wait for each other.

A rank's *program* is what its computing lane did: stretches of work, exchanges that it posts, and exchanges whose end
it waits for. An exchange that several ranks take part in starts for each of them when all that it needs have come.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property
from typing import TypeAlias

from tritonmoe.doctor.link_ends import SlowLinks
from tritonmoe.doctor.tables import Key, Tables, tables_of

__all__ = ["Graph", "Item", "Key", "Kind", "Member", "Run"]


class Kind(IntEnum):
    """What an item of a program is."""

    RUN = 0
    """A stretch of work: the index of a Run."""
    POST = 1
    """An exchange is handed over: the index of a Member."""
    WAIT = 2
    """Nothing goes on before an exchange has ended: the index of a Member."""
    STEP = 3
    """A step of the training ends: its index."""


Item: TypeAlias = tuple[int, int]


@dataclass
class Run:
    """A stretch of one rank's computing lane, between two exchanges."""

    rank: int
    """An index into the graph's ranks."""
    step: int
    key: Key
    busy_s: float
    """How long operations ran."""
    idle_s: float = 0.0
    """How long none did, and no exchange was waited for: the host did something else."""
    rows: int | None = None
    """How many rows the last exchange brought."""
    stretch: int = -1
    """Runs of one number are one stretch, which waits cut in pieces: what is usual is asked of all of it; -1: alone."""


@dataclass
class Member:
    """What one rank knows of an exchange."""

    rank: int
    step: int
    exchange: int
    key: Key
    lane: int
    """Exchanges of one lane of a rank follow each other."""
    delay_s: float
    """From when it was posted, and its lane free, until it started."""
    transfer_s: float
    """From when the last rank that it needs had started until it ended."""
    needs: tuple[int, ...] | None = None
    """The members whose start it waits for; None: all of the exchange."""
    sent: tuple[int, ...] | None = None
    """Bytes for each rank of the group, in its order; what stays on the rank itself counts as 0."""
    received: tuple[int, ...] | None = None
    num_bytes: int | None = None
    element_bytes: int | None = None
    """How wide its numbers are."""
    linked_s: float = 0.0
    """What of transfer_s is due to slow links, where that is known."""
    row_bytes: int = 0
    """Of an all-to-all whose splits are known, and which brings this rank any rows."""


@dataclass(eq=False)
class Graph:
    """All steps of a run."""

    ranks: list[int]
    """The ranks that are known, by their numbers in the job."""
    steps: list[int]
    """The numbers of the steps."""
    programs: list[list[Item]] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    members: list[Member] = field(default_factory=list)
    exchanges: list[list[int]] = field(default_factory=list)
    """The members of every exchange."""
    begin_s: list[float] = field(default_factory=list)
    """When each rank begins the first step, from when the first of them does."""
    measured_s: list[float] = field(default_factory=list)
    """How long each step took."""
    names: dict[int, str] = field(default_factory=dict)
    """How ranks are called, where that is more than a number."""
    is_queued_at_start: bool = True
    """Whether an exchange starts on a rank when the one before it in its lane has ended there; else all of a rank's may
    be under way, and only their ends follow each other."""
    slow_links: SlowLinks | None = None
    """Which links are slow, and which end of them, where the files have times for every peer."""
    hosts: tuple[str, ...] = ()
    """The host of every rank; empty where the files don't tell."""
    routed: tuple[tuple[int, int], ...] = ()
    """How many tokens a router of each rank had at most, and how many experts it gave each; empty where that is not
    known of all."""

    @cached_property
    def tables(self) -> Tables:
        """Its numbers: of the rows above, once they are all there, or given by who has them as tensors already."""
        return tables_of(self)

    def named(self, indices: Sequence[int]) -> str:
        """Return the names of ranks, by their indices: "rank 2", "ranks 2 and 5"."""
        names = [self.names.get(index, str(self.ranks[index])) for index in indices]
        if len(names) > 6:
            names = [*names[:5], f"{len(names) - 5} others"]
        joined = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
        return f"rank{'s' if len(names) > 1 else ''} {joined}"
