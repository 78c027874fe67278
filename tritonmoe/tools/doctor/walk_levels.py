"""LevelWalk: the walk of a graph whose ranks do unlike things, as stages of a pipeline do, level by level.

What comes after what is found once: an item's level is above that of those before it on its rank, and of what it waits
for. All that is of one level is walked together.
"""

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor

from tritonmoe.tools.doctor.graph import Graph, Kind, indices
from tritonmoe.tools.doctor.uniform_walk import Walked

__all__ = ["LevelWalk"]

RUN, POST, WAIT = int(Kind.RUN), int(Kind.POST), int(Kind.WAIT)
MOST_VALUES = 1 << 24
"""So many numbers at most are held in one walk: of large graphs fewer sets of times are walked together."""


@dataclass
class _Level:
    """What happens at once: places in the list of all items by kind, then the exchanges that end."""

    items: list[tuple[int, slice, Tensor | slice, Tensor | slice]]
    """(kind, items, ranks, members or steps)."""
    exchanges: list[tuple[int, Tensor | slice, Tensor | slice | None]]
    """(number of members of each, members, members before them in their lanes)."""
    special: tuple[Tensor, Tensor] | None
    """Members that don't wait for all, and the members that each waits for."""


class LevelWalk:
    """A graph's items by level.

    Raises:
        ValueError: ranks wait for each other in a circle.
    """

    def __init__(self, graph: Graph) -> None:
        found = _Levelling(graph)
        self.graph, self.levels = graph, found.levels()
        self.order = indices([item[4] for item in found.items])
        """The segment of every item: the stretches of work before it."""
        self.segment_of_run = indices(found.segment_of_run)
        """(N,); -1: it comes before nothing."""
        self.num_segments = found.num_segments

    @property
    def num_at_once(self) -> int:
        """How many sets of times are walked together."""
        return max(1, MOST_VALUES // (self.num_segments + 3 * len(self.graph.tables.member_rank) + 1))

    def walk(self, run_s: Tensor, transfer_s: Tensor, has_moments: bool = True) -> Walked:
        """Walk with B sets of times, (B, N) and (B, M)."""
        graph, num_ranks, num_sets = self.graph, len(self.graph.ranks), len(run_s)
        num_members = len(graph.tables.member_rank)

        def numbers(*shape: int, value: float = 0.0) -> Tensor:
            return torch.full((*shape, num_sets), value, dtype=torch.float64, device="cpu")

        of_segments = numbers(self.num_segments + 1)
        of_segments.index_add_(0, self.segment_of_run % (self.num_segments + 1), run_s.T.contiguous())
        spent_s = of_segments[self.order]
        transfer_s, delay_s = transfer_s.T.contiguous(), graph.tables.delay_s[:, None]
        now = numbers(num_ranks) + torch.tensor(graph.begin_s, dtype=torch.float64, device="cpu")[:, None]
        started, ended = numbers(num_members), numbers(num_members + 1, value=-torch.inf)
        waits_since = numbers(num_members, value=torch.nan)
        step_ends = numbers(len(graph.steps), num_ranks)
        for level in self.levels:
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


class _Levelling:
    """Goes through all programs, each as far as what it waits for has ended."""

    def __init__(self, graph: Graph) -> None:
        self.tables, num_ranks = graph.tables, len(graph.ranks)
        self.exchange_of, self.lane_of = self.tables.member_exchange.tolist(), self.tables.member_lane.tolist()
        self.rank_of = self.tables.member_rank.tolist()
        num_members = len(self.rank_of)
        self.members_of: list[list[int]] = [[] for _ in range(max(self.exchange_of, default=-1) + 1)]
        for member, exchange in enumerate(self.exchange_of):
            self.members_of[exchange].append(member)
        self.missing = [len(members) for members in self.members_of]
        self.before = [-1] * num_members
        self.started, self.ended = [-1] * num_members, [-1] * num_members
        self.last_of_lane: dict[int, int] = {}
        self.behind: dict[int, tuple[int, int]] = {}
        self.blocked = [False] * num_members
        self.programs = [(kinds.tolist(), places.tolist()) for kinds, places in self.tables.programs]
        self.segment_of_run = [-1] * len(self.tables.run_rank)
        self.at, self.level = [0] * num_ranks, [-1] * num_ranks
        self.segment = list(range(num_ranks))
        self.num_segments = num_ranks
        self.items: list[tuple[int, int, int, int, int]] = []
        """(level, kind, rank, member or step, segment)."""
        self.ends: list[tuple[int, int]] = []
        """(level, exchange)."""
        self.ready = list(range(num_ranks))[::-1]

    def levels(self) -> list[_Level]:
        """Return all levels: an item comes after those before it on its rank, and after what it waits for.

        Raises:
            ValueError: ranks wait for each other in a circle.
        """
        while self.ready:
            self._go_on(self.ready.pop())
        if any(place < len(kinds) for place, (kinds, _) in zip(self.at, self.programs, strict=True)):
            raise ValueError("ranks wait for each other in a circle: these files are of different runs, or damaged")
        self.items.sort()
        return self._in_levels()

    def _go_on(self, rank: int) -> None:
        """Go on in a rank's program until it waits for what has not ended."""
        kinds, places = self.programs[rank]
        place, moment, segment = self.at[rank], self.level[rank], self.segment
        ended, num_items = self.ended, len(kinds)
        while place < num_items:
            kind, index = kinds[place], places[place]
            if kind == RUN:
                self.segment_of_run[index] = segment[rank]
                place += 1
                continue
            if kind == WAIT:
                end = ended[index]
                if end < 0:
                    self.blocked[index] = True
                    break
                moment = max(moment, end) + 1
            else:
                moment += 1
            self.items.append((moment, kind, rank, index, segment[rank]))
            segment[rank] = self.num_segments
            self.num_segments += 1
            place += 1
            if kind == POST:
                self._post(index, moment)
        self.at[rank], self.level[rank] = place, moment

    def _post(self, member: int, moment: int) -> None:
        """Start an exchange on a rank, once the exchange before it in its lane has ended."""
        one = self.last_of_lane.get(self.lane_of[member], -1)
        self.last_of_lane[self.lane_of[member]] = member
        self.before[member] = one
        if one < 0:
            self._start(member, moment)
        elif self.ended[one] >= 0:
            self._start(member, max(moment, self.ended[one] + 1))
        else:
            self.behind[one] = (member, moment)

    def _start(self, member: int, moment: int) -> None:
        """Note that an exchange has started on a rank; where it was the last one, all that waits for it goes on."""
        todo = [(member, moment)]
        while todo:
            member, moment = todo.pop()
            self.started[member] = moment
            exchange = self.exchange_of[member]
            self.missing[exchange] -= 1
            if self.missing[exchange]:
                continue
            members = self.members_of[exchange]
            end = max(self.started[one] for one in members)
            self.ends.append((end, exchange))
            for one in members:
                self.ended[one] = end
                if self.blocked[one]:
                    self.blocked[one] = False
                    self.ready.append(self.rank_of[one])
                following = self.behind.pop(one, None)
                if following is not None:
                    todo.append((following[0], max(following[1], end + 1)))

    def _in_levels(self) -> list[_Level]:
        found, ends, members_of, before = self.items, sorted(self.ends), self.members_of, self.before
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
        nobody = len(before)
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


def _places(numbers: list[int]) -> Tensor | slice:
    """Return a slice where the numbers follow each other, which is faster."""
    first = numbers[0]
    if numbers[-1] - first == len(numbers) - 1 and numbers == list(range(first, first + len(numbers))):
        return slice(first, first + len(numbers))
    return indices(numbers)
