"""Walker: what the steps of a graph take, with given times for its stretches of work and its exchanges.

What comes after what is found once. What ranks can do at once is walked together, for all of them and with several sets
of times: what would be without this, without that, and so on.
"""

import functools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from tritonmoe.tools.doctor.graph import Graph, Kind, Tables, indices

__all__ = ["Moments", "Walker", "lane_before", "walker_of"]

MOST_VALUES = 3 << 23
"""So many numbers at most are held in one walk: of large graphs fewer sets of times are walked together."""
POST, WAIT, STEP = int(Kind.POST), int(Kind.WAIT), int(Kind.STEP)
ENDS, SOME = len(Kind), len(Kind) + 1
_Places: TypeAlias = Tensor | slice


@dataclass(frozen=True)
class Moments:
    """When everything of a graph happened, as a walk gives it: seconds from when the first rank begins."""

    step_s: list[float]
    """How long each step took."""
    step_ends_s: Tensor
    """(S, W): when each rank had ended each step."""
    started_s: Tensor
    """(M,): when each exchange had started on its rank."""
    ended_s: Tensor
    """(M,)."""
    waits_since_s: Tensor
    """(M,): since when its rank had nothing to do but to wait for it; NaN where it never waits."""


class _Together(NamedTuple):
    """What happens at once: items of one kind, exchanges that end (ENDS), or a member that needs only some (SOME)."""

    kind: int
    what: _Places
    """Members; of the ends of steps their numbers."""
    others: _Places | None
    """Of items their ranks, None: all; of exchanges the members before in their lanes, None: none; else the needed."""
    size: int = 1
    """How many items they are, or how many members each exchange has."""


class Walker:
    """Walks one graph, as often as somebody asks what would be with other times.

    Raises:
        ValueError: the graph has no end: ranks wait for each other in a circle, so files contradict each other.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph, self.tables = graph, graph.tables
        self.plan, numbers = _plan_of(self.tables)
        self.counts = [one.size for one in self.plan if one.kind < ENDS]
        self.num_items = sum(self.counts)
        self.item_of_run = torch.full_like(self.tables.run_rank, self.num_items)
        """(N,): the item that each Run comes before, in the order of the plan; the number of all items: none."""
        for (kinds, places), own in zip(self.tables.programs, numbers, strict=True):
            is_run = kinds == int(Kind.RUN)
            self.item_of_run[places[is_run]] = indices([*own, self.num_items])[(~is_run).cumsum(0)[is_run]]

    @property
    def num_at_once(self) -> int:
        """How many sets of times are walked together."""
        return max(1, MOST_VALUES // (self.num_items + 3 * len(self.tables.member_rank) + 1))

    def step_times(self, run_s: Tensor, transfer_s: Tensor) -> list[float]:
        """Return the seconds of every step, from when the last rank has ended the one before until it ends this one."""
        (found,) = self.all_step_times(run_s[None], transfer_s[None])
        return found

    def all_step_times(self, run_s: Tensor, transfer_s: Tensor) -> list[list[float]]:
        """Return the same for B sets of times, (B, N) and (B, M)."""
        count = self.num_at_once
        found: list[list[float]] = []
        for first in range(0, len(run_s), count):
            found += self._walk(run_s[first : first + count], transfer_s[first : first + count])[0]
        return found

    def moments(self, run_s: Tensor, transfer_s: Tensor) -> Moments:
        """Return when every exchange started and ended, and every step."""
        waited: list[Tensor] = []
        (step_s,), step_ends, started, ended = self._walk(run_s[None], transfer_s[None], waited)
        waits_since = torch.full_like(started, torch.nan)
        for of, since in zip((one.what for one in self.plan if one.kind == WAIT), waited, strict=True):
            waits_since[of] = since
        return Moments(step_s, *(of[..., 0] for of in (step_ends, started, ended, waits_since)))

    @torch.no_grad()
    def _walk(
        self, run_s: Tensor, transfer_s: Tensor, waited: list[Tensor] | None = None
    ) -> tuple[list[list[float]], Tensor, Tensor, Tensor]:
        """Return the seconds of every step of B sets of times, (S, W, B) when ranks ended them, and (M, B) when
        exchanges started and ended.

        waited: gets since when they were waited for, in the order of the plan.
        """
        graph, num_sets, num_members = self.graph, len(run_s), transfer_s.shape[1]
        is_queued = graph.is_queued_at_start

        def numbers(*shape: int, value: float = 0.0) -> Tensor:
            return torch.full((*shape, num_sets), value, dtype=torch.float64, device="cpu")

        of_items = numbers(self.num_items + 1).index_add_(0, self.item_of_run, run_s.T.contiguous())
        spent_s = iter(of_items.split([*self.counts, 1]))
        transfer_s, delay_s = transfer_s.T.contiguous(), self.tables.delay_s[:, None]
        now = numbers(len(graph.ranks)) + torch.tensor(graph.begin_s, dtype=torch.float64, device="cpu")[:, None]
        started, ended = numbers(num_members), numbers(num_members + 1, value=-torch.inf)
        step_ends = numbers(len(graph.steps), len(graph.ranks))
        for kind, what, others, size in self.plan:
            if kind == ENDS:
                start = started[what]
                if is_queued:
                    start = (start if others is None else torch.maximum(start, ended[others])) + delay_s[what]
                    started[what] = start
                since = start.view(-1, size, num_sets).amax(1, keepdim=True)
                since = since[0] if len(since) == 1 else since.expand(-1, size, -1).reshape(start.shape)
                if others is not None and not is_queued:
                    since = torch.maximum(since, ended[others])
                ended[what] = since + transfer_s[what]
            elif kind == SOME:
                ended[what] = started[others].amax(0) + transfer_s[what]
            else:
                moment = (now if others is None else now[others]) + next(spent_s)
                if kind == POST:
                    started[what] = moment
                elif kind == WAIT:
                    if waited is not None:
                        waited.append(moment)
                    moment = torch.maximum(moment, ended[what])
                else:
                    step_ends[what, others] = moment
                if others is None:
                    now = moment
                else:
                    now[others] = moment
        first = numbers(1, value=max(graph.begin_s, default=0.0))
        step_s = torch.cat([first, step_ends.amax(1)]).cummax(0).values.diff(dim=0).clamp(min=0)
        return step_s.T.tolist(), step_ends, started, ended[:-1]


def lane_before(programs: Sequence[tuple[Tensor, Tensor]], lane: Tensor) -> Tensor:
    """Return (M,) the member before each one in its lane, in the order in which they are posted; M: none."""
    before = torch.full_like(lane, len(lane))
    for kinds, places in programs:
        posted = places[kinds == POST]
        order = posted[lane[posted].argsort(stable=True)]
        follows = lane[order][1:] == lane[order][:-1]
        before[order[1:][follows]] = order[:-1][follows]
    return before


def _plan_of(tables: Tables) -> tuple[list[_Together], list[list[int]]]:
    """Return what comes together as ranks go on, and the places of each rank's items in it, but for work.

    Raises:
        ValueError: ranks wait for each other in a circle.
    """
    kept = [kinds != int(Kind.RUN) for kinds, _ in tables.programs]
    programs = [(of[0][keep].tolist(), of[1][keep].tolist()) for of, keep in zip(tables.programs, kept, strict=True)]
    exchange, before = tables.member_exchange.tolist(), lane_before(tables.programs, tables.member_lane).tolist()
    sizes = tables.member_exchange.bincount().tolist()
    members_of = [of.tolist() for of in tables.member_exchange.argsort(stable=True).split(sizes)]
    missing, is_over = list(sizes), [False] * len(sizes)
    """What has yet to come before an exchange ends: its members, and the exchanges before them in their lanes."""
    behind: dict[int, list[int]] = defaultdict(list)
    """By exchange, those of the members that follow it in its lanes."""
    for member, earlier in enumerate(before):
        if earlier < len(before):
            missing[exchange[member]] += 1
            behind[exchange[earlier]].append(exchange[member])
    blocked: dict[int, list[int]] = defaultdict(list)
    """By exchange, the ranks that stand still for it."""
    plan: list[_Together] = []
    numbers: list[list[int]] = [[] for _ in programs]
    count, going, met = 0, list(range(len(programs))), list[int]()
    while going or met:
        together: dict[int, list[tuple[int, int]]] = {POST: [], WAIT: [], STEP: []}
        for rank in sorted(going):
            (kinds, places), at = programs[rank], len(numbers[rank])
            if at == len(kinds):
                continue
            if kinds[at] == WAIT and not is_over[exchange[places[at]]]:
                blocked[exchange[places[at]]].append(rank)
                continue
            together[kinds[at]].append((rank, places[at]))
        going = []
        for kind, own in together.items():
            for rank, _ in own:
                numbers[rank].append(count)
                count += 1
                going.append(rank)
            if own:
                ranks, what = ([one[n] for one in own] for n in range(2))
                is_all = len(own) == len(programs) and kind != STEP
                others = None if is_all else indices(ranks) if kind == STEP else _as_slice(ranks)
                plan.append(_Together(kind, indices(what) if kind == STEP else _as_slice(what), others, len(own)))
        met += [exchange[member] for _, member in together[POST]]
        ended: dict[int, list[int]] = defaultdict(list)
        freed: list[int] = []
        for one in sorted(met):
            missing[one] -= 1
            if not missing[one]:
                is_over[one] = True
                ended[sizes[one]] += members_of[one]
                going += blocked.pop(one, [])
                freed += behind.pop(one, [])
        for size, members in ended.items():
            earlier = [before[member] for member in members]
            others = None if min(earlier) == len(before) else _as_slice(earlier)
            plan.append(_Together(ENDS, _as_slice(members), others, size))
            needing = [member for member in members if member in tables.needs]
            plan += [_Together(SOME, slice(one, one + 1), indices(tables.needs[one])) for one in needing]
        met = freed
    if any(len(own) < len(kinds) for own, (kinds, _) in zip(numbers, programs, strict=True)):
        raise ValueError("ranks wait for each other in a circle: these files are of different runs, or damaged")
    return plan, numbers


def _as_slice(numbers: list[int]) -> _Places:
    """Return numbers as places: a slice where they follow each other, which is faster."""
    following = range(numbers[0], numbers[0] + len(numbers))
    if numbers[-1] == following[-1] and numbers == list(following):
        return slice(following.start, following.stop)
    return indices(numbers)


@functools.lru_cache(maxsize=1)
def walker_of(graph: Graph) -> Walker:
    """Return the walker of a graph, which is kept: what is asked of a run is asked of one graph."""
    return Walker(graph)
