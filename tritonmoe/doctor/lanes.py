"""What ranks did and when, as a walk of the graph gives it: pieces of lanes, and how long who waited for whom."""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

from tritonmoe.doctor.attribution import Verdict
from tritonmoe.doctor.graph import Graph, Kind
from tritonmoe.doctor.walk import Moments, Walker

__all__ = ["DOING", "Doing", "Piece", "RankTimes", "Shown", "shown_of", "slow_steps"]

Doing: TypeAlias = Literal["computing", "host", "waiting", "rows"]
DOING: dict[Doing, str] = {
    "computing": "computing",
    "host": "neither: the host does something else",
    "waiting": "waiting until another rank comes",
    "rows": "waiting while what was sent is under way",
}
SLOW = 1.1
"""A step is slow if it takes so many times the median ..."""
FAR_OUT = 3.0
"""... and is further from it than so many times what steps usually are."""


class Piece(NamedTuple):
    """What one rank did for a while; times as in Moments."""

    rank: int
    step: int
    start_s: float
    end_s: float
    doing: Doing
    on: int
    """The rank that is waited for; -1 where there is none."""
    name: str


@dataclass
class RankTimes:
    """What one rank did in a step, the mean of all steps."""

    computing_s: float = 0.0
    host_s: float = 0.0
    waiting_s: float = 0.0
    rows_s: float = 0.0
    sent_bytes: float | None = None
    """To other ranks; None where the files don't tell."""
    received_bytes: float | None = None


@dataclass(frozen=True)
class Shown:
    """What a page shows of a run beside its verdict."""

    ranks: list[RankTimes]
    waits_s: list[list[float]]
    """(W, W): how long a rank stood in exchanges in a step until another one came, the mean of all steps."""
    slow: list[int]
    """Indices of the steps that took longer than the others."""
    typical: int
    """The index of a step that took about the median."""
    slowest: int
    lanes: dict[int, list[Piece]]
    """The pieces of these two steps."""
    begins_s: dict[int, float]
    """When they began."""


def slow_steps(times_s: Sequence[float]) -> list[int]:
    """Give the steps that took longer than the others: by a tenth of the median, and by more than steps usually do."""
    middle = statistics.median(times_s)
    usual = statistics.median(abs(one - middle) for one in times_s)
    return [step for step, one in enumerate(times_s) if one > SLOW * middle and one - middle > FAR_OUT * usual]


def shown_of(found: Verdict) -> Shown:
    """Give what a page shows of the run of a verdict."""
    graph = found.graph
    size, num_steps = len(graph.ranks), len(graph.steps)
    moments = Walker(graph).moments([run.busy_s + run.idle_s for run in graph.runs], graph.transfers_s())
    ordered = sorted(range(num_steps), key=lambda step: moments.step_s[step])
    typical, slowest = ordered[(num_steps - 1) // 2], ordered[-1]
    ranks = [RankTimes() for _ in range(size)]
    waits_s = [[0.0] * size for _ in range(size)]
    lanes: dict[int, list[Piece]] = {typical: [], slowest: []}
    for piece in _pieces(graph, moments):
        seconds = (piece.end_s - piece.start_s) / num_steps
        of = ranks[piece.rank]
        if piece.doing == "computing":
            of.computing_s += seconds
        elif piece.doing == "host":
            of.host_s += seconds
        elif piece.doing == "rows":
            of.rows_s += seconds
        else:
            of.waiting_s += seconds
            if piece.on >= 0:
                waits_s[piece.rank][piece.on] += seconds
        if piece.step in lanes:
            lanes[piece.step].append(piece)
    for member in graph.members:
        if member.sent is not None and member.received is not None:
            of = ranks[member.rank]
            of.sent_bytes = (of.sent_bytes or 0.0) + sum(member.sent) / num_steps
            of.received_bytes = (of.received_bytes or 0.0) + sum(member.received) / num_steps
    begins = {step: min((piece.start_s for piece in of), default=0.0) for step, of in lanes.items()}
    return Shown(ranks, waits_s, slow_steps(moments.step_s), typical, slowest, lanes, begins)


def _pieces(graph: Graph, moments: Moments) -> Iterator[Piece]:
    """Give what every rank did, one rank after the other; within a stretch of work first what it computed."""
    for rank, program in enumerate(graph.programs):
        now_s, step = graph.begin_s[rank], 0
        for kind, index in program:
            if kind == Kind.RUN:
                run = graph.runs[index]
                name = " ".join(str(word) for word in run.key if isinstance(word, str))
                for doing, seconds in (("computing", run.busy_s), ("host", run.idle_s)):
                    if seconds > 0:
                        yield Piece(rank, step, now_s, now_s + seconds, doing, -1, name)  # type: ignore[arg-type]
                        now_s += seconds
            elif kind == Kind.WAIT:
                member = graph.members[index]
                ended_s = moments.ended_s[index]
                if ended_s <= now_s:
                    continue
                needs = graph.exchanges[member.exchange] if member.needs is None else member.needs
                last = max(needs, key=lambda one: moments.started_s[one])
                name = " ".join(str(word) for word in member.key if isinstance(word, str))
                here_s = min(max(now_s, moments.started_s[last]), ended_s)
                if here_s > now_s:
                    on = graph.members[last].rank
                    yield Piece(rank, step, now_s, here_s, "waiting", -1 if on == rank else on, name)
                if ended_s > here_s:
                    yield Piece(rank, step, here_s, ended_s, "rows", -1, name)
                now_s = ended_s
            elif kind == Kind.STEP:
                step = index + 1
