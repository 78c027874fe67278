"""UniformWalk: the walk of a graph whose ranks do the same in the same order, all ranks of an item at once.

So it is with a recording of this package's layers, and with most trainers that have no pipeline. All ranks come to an
exchange at the same place of their programs, so whatever is waited for stands further up in every program.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from tritonmoe.tools.doctor.graph import Graph, Kind, Tables, indices

__all__ = ["UniformWalk", "Walked", "uniform_walk"]

MOST_TIMES = 1 << 25
"""So many numbers at most are given to one walk: of large graphs fewer sets of times are walked together."""
ITEMS_AT_ONCE = 4096
"""The times of so many items are laid out together."""


Walked: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor]
"""What a walk with B sets of times gives: (S, W, B) when each rank had ended each step; and (M, B) when each exchange
had started on its rank, when it had ended, and since when the rank had nothing to do but to wait for it (NaN where it
never waits); these are empty unless they are asked for."""


@dataclass
class _Exchange:
    """The exchanges that all ranks post at one place of their programs."""

    before: int
    """Those before them in their lanes; -1: none."""
    order: Tensor | None
    """The ranks, one exchange's behind the other's; None: all are of one."""
    back: Tensor | None
    num_ranks: int
    """Of each of these exchanges."""

    def latest(self, moments: Tensor) -> Tensor:
        """Return (W, B), or (1, B) of all ranks, when the last rank of each one's exchange had come."""
        if self.order is None or self.back is None:
            return moments.amax(0, keepdim=True)
        groups = moments[self.order].view(-1, self.num_ranks, moments.shape[1])
        return groups.amax(1, keepdim=True).expand_as(groups).reshape(moments.shape)[self.back]


class UniformWalk:
    """A graph's programs, as all of its ranks have them."""

    def __init__(
        self,
        graph: Graph,
        items: Sequence[tuple[Kind, int]],
        exchanges: Sequence[_Exchange],
        members: Tensor,
        runs: tuple[Tensor, Tensor],
    ) -> None:
        """items: but for work, which of the exchanges, or which step, each is.

        members: (K, W), those of the exchanges on every rank. runs: Runs in the order of the items that they come
        before; and in that order the item's number times W, and the rank.
        """
        self.graph, self.items, self.exchanges, self.members = graph, items, exchanges, members
        self.run_order, self.run_place = runs

    @property
    def num_at_once(self) -> int:
        """How many sets of times are walked together."""
        return max(1, MOST_TIMES // (len(self.graph.tables.run_rank) + len(self.graph.tables.member_rank) + 1))

    def walk(self, run_s: Tensor, transfer_s: Tensor, has_moments: bool) -> Walked:
        """Walk with B sets of times, (B, N) and (B, M)."""
        graph, num_sets, num_ranks = self.graph, len(run_s), len(self.graph.ranks)
        begin = torch.tensor(graph.begin_s, dtype=torch.float64, device="cpu")
        now = begin[:, None].expand(-1, num_sets)
        step_ends = torch.zeros(len(graph.steps), num_ranks, num_sets, dtype=torch.float64, device="cpu")
        started: list[Tensor] = []
        ended: list[Tensor] = []
        waits_since: list[Tensor | None] = [None] * len(self.exchanges)
        for first in range(0, len(self.items), ITEMS_AT_ONCE):
            items = self.items[first : first + ITEMS_AT_ONCE]
            spent_s = self._spent(run_s, first, len(items)).unbind(0)
            posted = [number for kind, number in items if kind is Kind.POST]
            transfers_s = self._of_members(transfer_s, posted)
            delays_s = self._of_members(graph.tables.delay_s[None], posted)
            for (kind, number), work_s in zip(items, spent_s, strict=True):
                now = now + work_s
                if kind is Kind.POST:
                    at = number - posted[0]
                    start, end = self._exchanged(number, now, ended, transfers_s[at], delays_s[at])
                    started.append(start)
                    ended.append(end)
                elif kind is Kind.WAIT:
                    waits_since[number] = now
                    now = torch.maximum(now, ended[number])
                else:
                    step_ends[number] = now
        if not has_moments:
            nothing = torch.zeros(0, num_sets, dtype=torch.float64, device="cpu")
            return step_ends, nothing, nothing, nothing
        never = torch.full((num_ranks, num_sets), torch.nan, dtype=torch.float64, device="cpu")
        since = [never if of is None else of for of in waits_since]
        of_members = [self._by_member(of, num_sets) for of in (started, ended, since)]
        return step_ends, of_members[0], of_members[1], of_members[2]

    def _exchanged(
        self, number: int, now: Tensor, ended: Sequence[Tensor], transfer_s: Tensor, delay_s: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return when exchanges that are posted now start, and when they end."""
        of = self.exchanges[number]
        if not self.graph.is_queued_at_start:
            since = of.latest(now)
            if of.before >= 0:
                since = torch.maximum(since, ended[of.before])
            return now, since + transfer_s
        start = (now if of.before < 0 else torch.maximum(now, ended[of.before])) + delay_s
        return start, of.latest(start) + transfer_s

    def _spent(self, run_s: Tensor, first: int, count: int) -> Tensor:
        """Return (count, W, B) what is spent before each of some items."""
        num_ranks = len(self.graph.ranks)
        bounds = torch.searchsorted(self.run_place, indices([first * num_ranks, (first + count) * num_ranks])).tolist()
        own = slice(*bounds)
        found = torch.zeros(count * num_ranks, len(run_s), dtype=torch.float64, device="cpu")
        found.index_add_(0, self.run_place[own] - first * num_ranks, run_s[:, self.run_order[own]].T.contiguous())
        return found.view(count, num_ranks, -1)

    def _of_members(self, values: Tensor, exchanges: Sequence[int]) -> Sequence[Tensor]:
        """Return (W, B) of each of these exchanges, which follow each other, of (B, M)."""
        if not exchanges:
            return ()
        own = self.members[exchanges[0] : exchanges[-1] + 1]
        return values[:, own.flatten()].T.contiguous().view(*own.shape, -1).unbind(0)

    def _by_member(self, values: Sequence[Tensor], num_sets: int) -> Tensor:
        found = torch.empty(self.members.numel(), num_sets, dtype=torch.float64, device="cpu")
        if values:
            found[self.members.flatten()] = torch.stack(list(values)).flatten(0, 1)
        return found


def uniform_walk(graph: Graph) -> UniformWalk | None:
    """Return the walk of a graph whose ranks all do the same in the same order; None of another."""
    tables, num_ranks = graph.tables, len(graph.ranks)
    kept = [kinds != int(Kind.RUN) for kinds, _ in tables.programs]
    kinds = [of[keep] for (of, _), keep in zip(tables.programs, kept, strict=True)]
    if tables.needs or not kinds or not all(torch.equal(kinds[0], one) for one in kinds[1:]):
        return None
    places = torch.stack([of[keep] for (_, of), keep in zip(tables.programs, kept, strict=True)], 1)
    members = places[kinds[0] == int(Kind.POST)]
    num_members = len(tables.member_rank)
    numbers = torch.full((num_members,), -1, dtype=torch.int64, device="cpu")
    numbers[members.flatten()] = torch.arange(len(members)).repeat_interleave(num_ranks)
    if members.numel() != num_members or bool((numbers < 0).any()):
        return None
    exchanges = _exchanges_of(tables, members, numbers)
    is_exchange = kinds[0] != int(Kind.STEP)
    places[is_exchange] = numbers[places[is_exchange]]
    posted_at = (kinds[0] == int(Kind.POST)).nonzero()[:, 0]
    is_wait = kinds[0] == int(Kind.WAIT)
    is_behind = posted_at[places[is_wait, 0]] < is_wait.nonzero()[:, 0]
    if exchanges is None or not torch.equal(places, places[:, :1].expand_as(places)) or not bool(is_behind.all()):
        return None
    items = [(Kind(kind), number) for kind, number in zip(kinds[0].tolist(), places[:, 0].tolist(), strict=True)]
    return UniformWalk(graph, items, exchanges, members, _runs_of(tables, kept, num_ranks))


def _exchanges_of(tables: Tables, members: Tensor, numbers: Tensor) -> list[_Exchange] | None:
    """Return the exchanges of all ranks, in the order in which they are posted; None where ranks post others."""
    num_ranks = members.shape[1]
    exchange, lane = tables.member_exchange[members], tables.member_lane[members]
    first = torch.full((int(tables.member_exchange.max()) + 1 if len(numbers) else 0,), len(members))
    first = first.scatter_reduce(0, tables.member_exchange, numbers, "amin")
    if not torch.equal(first[tables.member_exchange], numbers):
        return None
    order = lane.argsort(dim=0, stable=True)
    ordered = lane.gather(0, order)
    before = torch.full_like(order, -1)
    follows = torch.where(ordered[1:] == ordered[:-1], order[:-1], -1)
    before.scatter_(0, order[1:], follows)
    if not torch.equal(before, before[:, :1].expand_as(before)):
        return None
    relative = exchange - exchange.amin(1, keepdim=True)
    is_one = (relative == 0).all(1).tolist()
    grouped: dict[tuple[int, ...], tuple[Tensor, Tensor, int] | None] = {}
    found = []
    for number, (one, previous) in enumerate(zip(is_one, before[:, 0].tolist(), strict=True)):
        if one:
            found.append(_Exchange(previous, None, None, num_ranks))
            continue
        of_ranks = tuple(relative[number].tolist())
        if of_ranks not in grouped:
            grouped[of_ranks] = _grouped(relative[number])
        groups = grouped[of_ranks]
        if groups is None:
            return None
        found.append(_Exchange(previous, *groups))
    return found


def _grouped(exchange: Tensor) -> tuple[Tensor, Tensor, int] | None:
    """Return the order of ranks by their exchanges, the way back, and the ranks of each; None where these differ."""
    counts = exchange.unique(return_counts=True)[1]
    if int(counts.min()) != int(counts.max()):
        return None
    order = exchange.argsort(stable=True)
    return order, order.argsort(), int(counts[0])


def _runs_of(tables: Tables, kept: Sequence[Tensor], num_ranks: int) -> tuple[Tensor, Tensor]:
    """Return the Runs in the order of the items that they come before, and of each the item times W, and the rank."""
    place = torch.full((len(tables.run_rank),), -1, dtype=torch.int64, device="cpu")
    for rank, ((_, of), keep) in enumerate(zip(tables.programs, kept, strict=True)):
        place[of[~keep]] = keep.cumsum(0)[~keep] * num_ranks + rank
    order = place.argsort(stable=True)
    order = order[int((place < 0).sum()) :]
    return order, place[order]
