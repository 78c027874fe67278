"""One model of a run: what every rank did in order, and the exchanges in which ranks wait for each other.

A rank's *program* is what its computing lane did: stretches of work, exchanges that it posts, and exchanges whose end
it waits for. An exchange that several ranks take part in starts for each of them when all that it needs have come.
What is computed of a graph is computed on its numbers, which Tables has as tensors.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property
from typing import Literal, TypeAlias

import torch
from torch import Tensor

__all__ = ["Graph", "Item", "Key", "Kind", "LinkFault", "Member", "Run", "Tables", "floats", "indices"]

Key: TypeAlias = tuple
"""What operations are compared by: those with the same key do the same work."""
Item: TypeAlias = tuple[int, int]


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
    batch: int = -1
    """Of a pipeline: twice the number of the micro-batch of its step that this is the work of; in backward 1 more."""
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
    row_bytes: int = 0
    """Of an all-to-all whose splits are known, and which brings this rank any rows."""


@dataclass
class Tables:
    """N stretches of work and M exchanges as ranks know them; see Run and Member, whose fields these are."""

    keys: list[Key]
    run_rank: Tensor
    run_step: Tensor
    run_key: Tensor
    """A place in `keys`, as member_key is one."""
    run_stretch: Tensor
    """Runs of one number are compared as one."""
    busy_s: Tensor
    idle_s: Tensor
    overhead_s: Tensor
    load_s: Tensor
    """The part of overhead_s in which experts were waited for that are read from a file."""
    rows: Tensor
    """0 where that is not known."""
    run_batch: Tensor
    """-1 where that is not known."""
    member_rank: Tensor
    member_step: Tensor
    member_key: Tensor
    member_exchange: Tensor
    member_lane: Tensor
    """A number for each lane of each rank."""
    delay_s: Tensor
    transfer_s: Tensor
    bytes_out: Tensor
    """To other ranks; NaN where that is not known."""
    bytes_in: Tensor
    num_bytes: Tensor
    """Where neither is known; else the larger of both."""
    needs: dict[int, tuple[int, ...]] = field(default_factory=dict)
    """Of the members that don't wait for all of their exchange."""
    programs: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Of each rank: the kinds of its items, and their indices."""

    @property
    def run_s(self) -> Tensor:
        """How long each stretch took."""
        return self.busy_s + self.idle_s + self.overhead_s


@dataclass(frozen=True)
class LinkFault:
    """Which end of which links is slow."""

    kind: Literal["slow link", "late link", "slow port"]
    links: tuple[tuple[int, int], ...]
    """Sender and receiver of each, as indices of ranks, the worst first; of a port or a node none."""
    ranks: tuple[int, ...]
    """Of a link sender and receiver, of a port its rank, of a node all of its ranks; none where they change."""
    words: str


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
    fault: LinkFault | None = None
    """Which links are slow, where it is known how long rows of every rank travelled, and any are."""
    linked_s: Tensor | None = None
    """(M,): what of each exchange's time is due to slow links, where that is known."""
    hosts: tuple[str, ...] = ()
    """The host of every rank; empty where the files don't tell."""
    stages: tuple[int, ...] = ()
    """The pipeline stage of every rank; empty where the files don't tell."""
    replicas: tuple[int, ...] = ()
    """Then, the data-parallel rank of every rank."""
    routed: tuple[tuple[int, int], ...] = ()
    """How many tokens a router of each rank had at most, and how many experts it gave each; empty where that is not
    known of all."""
    alone_s: float = 0.0
    """How long a rank waits in a step for exchanges of which the files don't tell the other ranks, the mean of all."""
    exposed_s: float = 0.0
    """For how long of a step exchanges are under way on a rank and nothing is computed, the mean of all."""

    @cached_property
    def tables(self) -> Tables:
        """Its numbers: of the rows above, once they are all there, or given by who has them as tensors already."""
        return _tables_of(self)

    def named(self, indices: Sequence[int]) -> str:
        """Return the names of ranks, by their indices: "rank 2", "ranks 2 and 5"."""
        names = [self.names.get(index, str(self.ranks[index])) for index in indices]
        if len(names) > 6:
            names = [*names[:5], f"{len(names) - 5} others"]
        joined = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
        return f"rank{'s' if len(names) > 1 else ''} {joined}"


def floats(values: Sequence[float] | Sequence[list[float]]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device="cpu")


def indices(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device="cpu")


def _tables_of(graph: Graph) -> Tables:
    """Return the tables of a graph that was put together row by row."""
    keys: dict[Key, int] = {}
    stretches: dict[tuple[int, int], int] = {}
    runs, members = graph.runs, graph.members

    def stretch(index: int) -> int:
        run = runs[index]
        place = (run.rank, run.stretch) if run.stretch >= 0 else (-1, index)
        return stretches.setdefault(place, len(stretches))

    known = [(of.sent, of.received) if of.sent is not None and of.received is not None else None for of in members]
    bytes_out, bytes_in = (floats([torch.nan if of is None else float(sum(of[way])) for of in known]) for way in (0, 1))
    both = torch.maximum(bytes_out, bytes_in)
    alone = floats([float(member.num_bytes or 0) for member in members])
    return Tables(
        run_rank=indices([run.rank for run in runs]),
        run_step=indices([run.step for run in runs]),
        run_key=indices([keys.setdefault(run.key, len(keys)) for run in runs]),
        run_stretch=indices([stretch(index) for index in range(len(runs))]),
        busy_s=floats([run.busy_s for run in runs]),
        idle_s=floats([run.idle_s for run in runs]),
        overhead_s=torch.zeros(len(runs), dtype=torch.float64, device="cpu"),
        load_s=torch.zeros(len(runs), dtype=torch.float64, device="cpu"),
        rows=floats([float(run.rows or 0) for run in runs]),
        run_batch=indices([run.batch for run in runs]),
        member_rank=indices([member.rank for member in members]),
        member_step=indices([member.step for member in members]),
        member_key=indices([keys.setdefault(member.key, len(keys)) for member in members]),
        member_exchange=indices([member.exchange for member in members]),
        member_lane=indices([member.rank * 1_000_003 + member.lane for member in members]),
        delay_s=floats([member.delay_s for member in members]),
        transfer_s=floats([member.transfer_s for member in members]),
        bytes_out=bytes_out,
        bytes_in=bytes_in,
        num_bytes=torch.where(both.isnan(), alone, both),
        needs={index: member.needs for index, member in enumerate(members) if member.needs is not None},
        programs=[
            (indices([int(kind) for kind, _ in program]), indices([index for _, index in program]))
            for program in graph.programs
        ],
        keys=list(keys),
    )
