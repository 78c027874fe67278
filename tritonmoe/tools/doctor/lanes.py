"""What ranks did and when, as a walk of the graph gives it: pieces of lanes, and how long who waited for whom."""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from tritonmoe.tools.doctor.attribution import Verdict
from tritonmoe.tools.doctor.graph import Graph, Key, Kind
from tritonmoe.tools.doctor.walk import Moments, walker_of

__all__ = ["DOING", "Doing", "Piece", "Shown", "shown_of", "slow_steps"]

Doing: TypeAlias = Literal["computing", "host", "waiting", "rows"]
DOING: dict[Doing, str] = {
    "computing": "computing",
    "host": "neither: the host does something else, or experts are read",
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
    """Return the steps that took longer than others: by a tenth of the median, and by more than steps usually do."""
    middle = statistics.median(times_s)
    usual = statistics.median(abs(one - middle) for one in times_s)
    return [step for step, one in enumerate(times_s) if one > SLOW * middle and one - middle > FAR_OUT * usual]


def shown_of(found: Verdict) -> Shown:
    """Return what a page shows of the run of a verdict."""
    graph, tables = found.graph, found.graph.tables
    size, num_steps = len(graph.ranks), len(graph.steps)
    moments = walker_of(graph).moments(tables.run_s, tables.transfer_s)
    ordered = sorted(range(num_steps), key=lambda step: moments.step_s[step])
    typical, slowest = ordered[(num_steps - 1) // 2], ordered[-1]
    waits = _Waits(graph, moments)

    def by_rank(rank: Tensor, seconds: Tensor) -> list[float]:
        sums = torch.zeros(size, dtype=torch.float64, device="cpu")
        return (sums.index_add_(0, rank, seconds) / num_steps).tolist()

    computing_s, host_s = (by_rank(tables.run_rank, of) for of in (tables.busy_s, tables.idle_s + tables.overhead_s))
    waiting_s, rows_s = (by_rank(tables.member_rank, of) for of in (waits.for_ranks_s, waits.for_rows_s))
    is_known = ~(tables.bytes_out.isnan() | tables.bytes_in.isnan())
    known_ranks = set(tables.member_rank[is_known].tolist())
    sent, received = (by_rank(tables.member_rank[is_known], of[is_known]) for of in (tables.bytes_out, tables.bytes_in))
    ranks = [
        RankTimes(
            *(of[rank] for of in (computing_s, host_s, waiting_s, rows_s)),
            *(of[rank] if rank in known_ranks else None for of in (sent, received)),
        )
        for rank in range(size)
    ]
    waits_s = torch.zeros(size * size, dtype=torch.float64, device="cpu")
    is_other = waits.on >= 0
    places = tables.member_rank[is_other] * size + waits.on[is_other]
    waits_s.index_add_(0, places, waits.for_ranks_s[is_other] / num_steps)
    lanes = {step: list(_pieces(graph, moments, waits, step)) for step in (typical, slowest)}
    begins = {step: min((piece.start_s for piece in of), default=0.0) for step, of in lanes.items()}
    return Shown(ranks, waits_s.view(size, size).tolist(), slow_steps(moments.step_s), typical, slowest, lanes, begins)


class _Waits:
    """How long each rank waits for each exchange, and for which rank: (M,)."""

    def __init__(self, graph: Graph, moments: Moments) -> None:
        tables = graph.tables
        num_exchanges = int(tables.member_exchange.max()) + 1 if len(tables.member_exchange) else 0
        nobody = torch.full((num_exchanges,), -torch.inf, dtype=torch.float64, device="cpu")
        latest = nobody.scatter_reduce(0, tables.member_exchange, moments.started_s, "amax")[tables.member_exchange]
        last = torch.full((num_exchanges,), -1, dtype=torch.int64, device="cpu")
        is_last = moments.started_s == latest
        last[tables.member_exchange[is_last]] = tables.member_rank[is_last]
        self.on = last[tables.member_exchange]
        """The rank that comes last; -1 where it is this one."""
        for member, needs in tables.needs.items():
            one = max(needs, key=lambda other: float(moments.started_s[other]))
            latest[member], self.on[member] = moments.started_s[one], tables.member_rank[one]
        self.on[self.on == tables.member_rank] = -1
        since, ended = moments.waits_since_s, moments.ended_s
        here = torch.minimum(torch.maximum(since, latest), torch.maximum(since, ended))
        self.here_s = here
        """When all that it needs had come, or since when it waits, whichever is later."""
        self.for_ranks_s = (here - since).nan_to_num(nan=0.0).clamp(min=0)
        self.for_rows_s = (ended - here).nan_to_num(nan=0.0).clamp(min=0)


def _pieces(graph: Graph, moments: Moments, waits: _Waits, step: int) -> Iterator[Piece]:
    """Return what every rank did in a step, one rank after the other; of a stretch of work first what it computed."""
    tables = graph.tables
    for rank, (kinds, places) in enumerate(tables.programs):
        ends = (kinds == int(Kind.STEP)).nonzero()[:, 0].tolist()
        first = ends[step - 1] + 1 if step else 0
        now_s = float(moments.step_ends_s[step - 1, rank]) if step else graph.begin_s[rank]
        items = zip(kinds[first : ends[step]].tolist(), places[first : ends[step]].tolist(), strict=True)
        for kind, index in items:
            if kind == Kind.RUN:
                name = _name(tables.keys[int(tables.run_key[index])])
                host_s = float(tables.idle_s[index] + tables.overhead_s[index])
                parts: tuple[tuple[Doing, float], ...] = (("computing", float(tables.busy_s[index])), ("host", host_s))
                for doing, seconds in parts:
                    if seconds > 0:
                        yield Piece(rank, step, now_s, now_s + seconds, doing, -1, name)
                        now_s += seconds
            elif kind == Kind.WAIT:
                ended_s = float(moments.ended_s[index])
                if ended_s <= now_s:
                    continue
                name = _name(tables.keys[int(tables.member_key[index])])
                here_s = min(max(now_s, float(waits.here_s[index])), ended_s)
                if here_s > now_s:
                    yield Piece(rank, step, now_s, here_s, "waiting", int(waits.on[index]), name)
                if ended_s > here_s:
                    yield Piece(rank, step, here_s, ended_s, "rows", -1, name)
                now_s = ended_s


def _name(key: Key) -> str:
    return " ".join(str(word) for word in key if isinstance(word, str))
