"""Walker: what the steps of a graph take, with given times for its stretches of work and its exchanges.

What comes after what is found once; then all ranks are walked together, level by level, with several sets of times at
once: what would be without this, without that, and so on.
"""

import functools
from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor

from tritonmoe.doctor.graph import Graph, Kind
from tritonmoe.doctor.tables import indices
from tritonmoe.doctor.uniform_walk import Walked, uniform_walk

__all__ = ["Moments", "Walker", "walker_of"]

RUN, POST, WAIT, STEP = int(Kind.RUN), int(Kind.POST), int(Kind.WAIT), int(Kind.STEP)
MOST_TIMES = 1 << 25
"""So many numbers at most are given to one walk ..."""
MOST_VALUES = 1 << 24
"""... or are held in it, where ranks do unlike things: of large graphs fewer sets of times are walked together."""


@dataclass
class _Level:
    """What happens at once: places in the list of all items by kind, then the exchanges that end."""

    items: list[tuple[int, slice, Tensor | slice, Tensor | slice]]
    """(kind, items, ranks, members or steps)."""
    exchanges: list[tuple[int, Tensor | slice, Tensor | slice | None]]
    """(number of members of each, members, members before them in their lanes)."""
    special: tuple[Tensor, Tensor] | None
    """Members that don't wait for all, and the members that each waits for."""


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


class Walker:
    """Walks one graph, as often as somebody asks what would be with other times.

    Raises:
        ValueError: the graph has no end: ranks wait for each other in a circle, so files contradict each other.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph, self.tables = graph, graph.tables
        self._num_members = len(self.tables.member_rank)
        self._uniform = uniform_walk(graph)
        if self._uniform is None:
            self._segment_of_run = torch.full((len(self.tables.run_rank),), -1, dtype=torch.int64, device="cpu")
            self._levels = self._compile()

    def _compile(self) -> list[_Level]:
        """Find the level of every item: it comes after those before it on its rank, and after what it waits for."""
        tables, num_ranks = self.tables, len(self.graph.ranks)
        exchange_of, lane_of = tables.member_exchange.tolist(), tables.member_lane.tolist()
        members_of: list[list[int]] = [[] for _ in range(max(exchange_of, default=-1) + 1)]
        for member, exchange in enumerate(exchange_of):
            members_of[exchange].append(member)
        missing = [len(members) for members in members_of]
        before = [-1] * self._num_members
        started, ended = [-1] * self._num_members, [-1] * self._num_members
        last_of_lane: dict[int, int] = {}
        behind: dict[int, tuple[int, int]] = {}
        blocked = [False] * self._num_members
        programs = [(kinds.tolist(), places.tolist()) for kinds, places in tables.programs]
        segment_of_run = [-1] * len(self._segment_of_run)
        at, level = [0] * num_ranks, [-1] * num_ranks
        segment = list(range(num_ranks))
        num_segments = num_ranks
        found: list[tuple[int, int, int, int, int]] = []
        """(level, kind, rank, member or step, segment)."""
        ends: list[tuple[int, int]] = []
        """(level, exchange)."""
        ready = list(range(num_ranks))[::-1]

        def start(member: int, moment: int) -> None:
            todo = [(member, moment)]
            while todo:
                member, moment = todo.pop()
                started[member] = moment
                exchange = exchange_of[member]
                missing[exchange] -= 1
                if missing[exchange]:
                    continue
                members = members_of[exchange]
                end = max(started[one] for one in members)
                ends.append((end, exchange))
                for one in members:
                    ended[one] = end
                    if blocked[one]:
                        blocked[one] = False
                        ready.append(rank_of[one])
                    following = behind.pop(one, None)
                    if following is not None:
                        todo.append((following[0], max(following[1], end + 1)))

        rank_of = tables.member_rank.tolist()
        while ready:
            rank = ready.pop()
            kinds, places = programs[rank]
            place, moment = at[rank], level[rank]
            num_items = len(kinds)
            while place < num_items:
                kind, index = kinds[place], places[place]
                if kind == RUN:
                    segment_of_run[index] = segment[rank]
                    place += 1
                    continue
                if kind == WAIT:
                    end = ended[index]
                    if end < 0:
                        blocked[index] = True
                        break
                    moment = max(moment, end) + 1
                else:
                    moment += 1
                found.append((moment, kind, rank, index, segment[rank]))
                segment[rank] = num_segments
                num_segments += 1
                place += 1
                if kind == POST:
                    one = last_of_lane.get(lane_of[index], -1)
                    last_of_lane[lane_of[index]] = index
                    before[index] = one
                    if one < 0:
                        start(index, moment)
                    elif ended[one] >= 0:
                        start(index, max(moment, ended[one] + 1))
                    else:
                        behind[one] = (index, moment)
            at[rank], level[rank] = place, moment
        if any(place < len(kinds) for place, (kinds, _) in zip(at, programs, strict=True)):
            raise ValueError("ranks wait for each other in a circle: these files are of different runs, or damaged")
        self._segment_of_run = indices(segment_of_run)
        self._num_segments = num_segments
        found.sort()
        self._order = indices([item[4] for item in found])
        return self._in_levels(found, ends, members_of, before)

    def _in_levels(
        self,
        found: list[tuple[int, int, int, int, int]],
        ends: list[tuple[int, int]],
        members_of: list[list[int]],
        before: list[int],
    ) -> list[_Level]:
        ends.sort()
        num_levels = 1 + max(found[-1][0] if found else -1, ends[-1][0] if ends else -1)
        levels = [_Level([], [], None) for _ in range(num_levels)]
        first = 0
        while first < len(found):
            last = first
            while last < len(found) and found[last][:2] == found[first][:2]:
                last += 1
            of = found[first:last]
            what, kind = [item[3] for item in of], of[0][1]
            levels[of[0][0]].items.append((kind, slice(first, last), _places([item[2] for item in of]), _places(what)))
            first = last
        by_size: dict[tuple[int, int], list[int]] = defaultdict(list)
        special: dict[int, list[int]] = defaultdict(list)
        for level, exchange in ends:
            members = members_of[exchange]
            by_size[level, len(members)] += members
            special[level] += [one for one in members if one in self.tables.needs]
        nobody = self._num_members
        for (level, size), members in by_size.items():
            behind = [before[one] if before[one] >= 0 else nobody for one in members]
            earlier = _places(behind) if any(one != nobody for one in behind) else None
            levels[level].exchanges.append((size, _places(members), earlier))
        for level, members in special.items():
            if members:
                needs = [self.tables.needs[one] for one in members]
                most = max(map(len, needs))
                levels[level].special = (
                    indices(members), torch.tensor([[*own, *[own[0]] * (most - len(own))] for own in needs]),
                )  # fmt: skip
        return levels

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

    @property
    def num_at_once(self) -> int:
        """How many sets of times are walked together."""
        if self._uniform is not None:
            return max(1, MOST_TIMES // (len(self.tables.run_rank) + self._num_members + 1))
        return max(1, MOST_VALUES // (self._num_segments + 3 * self._num_members + 1))

    def moments(self, run_s: Tensor, transfer_s: Tensor) -> Moments:
        """Return when every exchange started and ended, and every step."""
        (step_s,), found = self._walk(run_s[None], transfer_s[None], has_moments=True)
        return Moments(step_s, *(of[..., 0] for of in found))

    @torch.no_grad()
    def _walk(self, run_s: Tensor, transfer_s: Tensor, has_moments: bool = False) -> tuple[list[list[float]], Walked]:
        """Return the seconds of every step of each set, and all else that a walk gives."""
        if self._uniform is None:
            found = self._walk_levels(run_s, transfer_s)
        else:
            found = self._uniform.walk(run_s, transfer_s, has_moments)
        ends = found[0].amax(1)
        begin_s = max(self.graph.begin_s, default=0.0)
        first = torch.full((1, len(run_s)), begin_s, dtype=torch.float64, device="cpu")
        ends = torch.cat([first, ends]).cummax(0).values
        return ends.diff(dim=0).clamp(min=0).T.tolist(), found

    def _walk_levels(self, run_s: Tensor, transfer_s: Tensor) -> Walked:
        graph, num_ranks, num_sets = self.graph, len(self.graph.ranks), len(run_s)

        def numbers(*shape: int, value: float = 0.0) -> Tensor:
            return torch.full((*shape, num_sets), value, dtype=torch.float64, device="cpu")

        of_segments = numbers(self._num_segments + 1)
        of_segments.index_add_(0, self._segment_of_run % (self._num_segments + 1), run_s.T.contiguous())
        spent_s = of_segments[self._order]
        transfer_s, delay_s = transfer_s.T.contiguous(), self.tables.delay_s[:, None]
        now = numbers(num_ranks) + torch.tensor(graph.begin_s, dtype=torch.float64, device="cpu")[:, None]
        started, ended = numbers(self._num_members), numbers(self._num_members + 1, value=-torch.inf)
        waits_since = numbers(self._num_members, value=torch.nan)
        step_ends = numbers(len(graph.steps), num_ranks)
        for level in self._levels:
            for kind, items, ranks, what in level.items:
                moment = now[ranks] + spent_s[items]
                if kind == POST:
                    started[what] = moment
                elif kind == WAIT:
                    waits_since[what] = moment
                    moment = torch.maximum(moment, ended[what])
                else:
                    step_ends[what, ranks if isinstance(ranks, Tensor) else torch.arange(num_ranks)[ranks]] = moment
                now[ranks] = moment
            for size, members, before in level.exchanges:
                own = started[members]
                if graph.is_queued_at_start:
                    if before is not None:
                        own = torch.maximum(own, ended[before])
                    own = own + delay_s[members]
                    started[members] = own
                latest = own.view(-1, size, num_sets).amax(1, keepdim=True)
                since = latest.expand(-1, size, -1).reshape(own.shape)
                if before is not None and not graph.is_queued_at_start:
                    since = torch.maximum(since, ended[before])
                ended[members] = since + transfer_s[members]
            if level.special is not None:
                members, needs = level.special
                ended[members] = started[needs].amax(1) + transfer_s[members]
        return step_ends, started, ended[:-1], waits_since


@functools.lru_cache(maxsize=1)
def walker_of(graph: Graph) -> Walker:
    """Return the walker of a graph, which is kept: what is asked of a run is asked of one graph."""
    return Walker(graph)


def _places(numbers: list[int]) -> Tensor | slice:
    """Return a slice where the numbers follow each other, which is faster."""
    first = numbers[0]
    if numbers[-1] - first == len(numbers) - 1 and numbers == list(range(first, first + len(numbers))):
        return slice(first, first + len(numbers))
    return indices(numbers)
