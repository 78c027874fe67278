"""ExpertCopies: which experts have copies on other ranks for one call, and which of their pairs go there.

Slots are counted as elsewhere: rank k has the slots k * L .. (k + 1) * L, which are experts unless there is a
placement. With copies every rank has G slots more, behind its own L; so slots are numbered anew, and everything behind
the layer's entry counts these.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from tritonmoe.config.overlap import OverlapPlan
from tritonmoe.runtime.cpu_memory import to_device

__all__ = ["ExpertCopies", "ExpertCopy", "is_relayed", "on_ports"]


class ExpertCopy(NamedTuple):
    """One expert that a rank computes a part of beside its own."""

    expert: int
    """Its slot, as it is counted without copies."""
    rank: int
    """Where the copy is."""
    pairs: tuple[int, ...]
    """How many pairs of each rank's tokens it takes; the owner computes all others."""


@dataclass(frozen=True)
class ExpertCopies:
    """The copies of one call, the same on every rank.

    Example:
        W=2, L=2, one copy of expert 0 on rank 1 with pairs (0, 3): rank 0 has the slots 0 and 1, and a place for a copy
        that stays empty, rank 1 the slots 3 and 4, and the copy in 5. Of the pairs that rank 1's tokens have of expert
        0, three go to slot 5, and all others to slot 0, as do those of rank 0's tokens.
    """

    size: int
    num_own: int
    """L, the slots of one rank without copies."""
    copies: tuple[ExpertCopy, ...]
    """By (expert, rank)."""

    @cached_property
    def num_copies(self) -> int:
        """G, the most copies that a rank has."""
        return max(map(len, self._on_rank))

    @property
    def num_slots(self) -> int:
        """The slots of all ranks, those of copies included."""
        return self.size * (self.num_own + self.num_copies)

    @cached_property
    def _on_rank(self) -> list[list[ExpertCopy]]:
        return [[copy for copy in self.copies if copy.rank == rank] for rank in range(self.size)]

    def on(self, rank: int) -> list[ExpertCopy]:
        """Return the copies that a rank has, in the order of their slots, which is that of their owners."""
        return self._on_rank[rank]

    def owner(self, copy: ExpertCopy) -> int:
        return copy.expert // self.num_own

    def sent(self, owner: int) -> list[list[int]]:
        """Return for each rank the experts that it gets a copy of from `owner`, as that one counts its own."""
        first = owner * self.num_own
        return [[c.expert - first for c in self.on(rank) if self.owner(c) == owner] for rank in range(self.size)]

    def received(self, rank: int) -> list[int]:
        """Return how many copies a rank gets from each other one."""
        owners = [self.owner(copy) for copy in self.on(rank)]
        return [owners.count(owner) for owner in range(self.size)]

    @cached_property
    def sent_copies(self) -> list[list[int]]:
        """[owner][rank] how many experts are copied."""
        return [[len(experts) for experts in self.sent(owner)] for owner in range(self.size)]

    @cached_property
    def copy_pairs(self) -> list[int]:
        """How many pairs the copies on each rank compute."""
        return [sum(sum(copy.pairs) for copy in self.on(rank)) for rank in range(self.size)]

    @cached_property
    def are_relayed(self) -> bool:
        """Whether owners send each copy of an expert a piece of its weights, which the copies' ranks then pass on."""
        return is_relayed(*self._on_ports)

    @property
    def on_each_port(self) -> tuple[list[float], list[float]]:
        """How many experts' weights each rank sends, and receives, on their way to all copies."""
        sent, received = [0.0] * self.size, [float(len(of)) for of in self._on_rank]
        for copy in self.copies:
            num_copies = len(self.ranks_of[copy.expert]) if self.are_relayed else 1
            sent[self.owner(copy)] += 1 / num_copies
            sent[copy.rank] += (num_copies - 1) / num_copies  # what it passes on to the other copies
        return sent, received

    @cached_property
    def _on_ports(self) -> tuple[int, int]:
        return on_ports([(copy.expert, copy.rank) for copy in self.copies], self.num_own, self.size)

    @cached_property
    def ranks_of(self) -> dict[int, list[int]]:
        """The ranks, ascending, that have a copy of each expert that has any."""
        found: dict[int, list[int]] = {}
        for copy in self.copies:
            found.setdefault(copy.expert, []).append(copy.rank)
        return found

    @property
    def relayed(self) -> tuple[Tensor, Tensor]:
        """(W, W) float64: how many experts' weights go from rank i to rank k from owners, and then among copies."""
        first, then = ([[0.0] * self.size for _ in range(self.size)] for _ in range(2))
        for copy in self.copies:
            ranks = self.ranks_of[copy.expert]
            first[self.owner(copy)][copy.rank] += 1 / len(ranks)
            for rank in ranks:
                then[rank][copy.rank] += (rank != copy.rank) / len(ranks)
        of_both = torch.tensor([first, then], dtype=torch.float64, device="cpu")
        return of_both[0], of_both[1]

    @cached_property
    def words(self) -> str:
        """What ranks compare."""
        return "; ".join(f"{expert} on {rank} {list(pairs)}" for expert, rank, pairs in self.copies)

    def slots(self, topk_ids: Tensor, rank: int, overlap: OverlapPlan) -> Tensor:
        """Return the slot (T, K) int64, counted with copies, of each pair of `rank`'s tokens; -1 for skipped pairs.

        An expert's pairs are counted in an order of the tokens: by how far behind the start of its chunk each is, so
        that every chunk gives away about the same share. The first pairs go to the copy on this rank, if there is one,
        then to the others by rank, and the rest to the owner. So tokens that leave an owner leave it with the pairs of
        all its copied experts. Where there are other pairs than the plan was made for, as near-ties can give in a
        recompute, the owner gets more of them or fewer.

        Args:
            topk_ids: slots counted without copies.
        """
        ids = topk_ids.long().flatten()
        num_slots = self.size * self.num_own
        ids = ids.masked_fill((ids < 0) | (ids >= num_slots), num_slots)
        of_slots, bounds, targets = self._tables(rank, ids.device)
        column, slots = of_slots.index_select(1, ids)
        order = _order_in_chunks(topk_ids.shape[0], overlap, ids.device)
        if order is not None:
            column = column.view_as(topk_ids).index_select(0, order).flatten()
        numbers = torch.arange(bounds.shape[1], device=ids.device)
        number = (column == numbers[:, None]).cumsum(1, dtype=torch.int32).gather(0, column[None])
        place = (number > bounds.index_select(1, column)).sum(0)
        target = targets.index_select(0, place.add_(column, alpha=bounds.shape[0] + 1)).view_as(topk_ids)
        if order is not None:
            target = torch.empty_like(target).index_copy_(0, order, target)
        return torch.where(target >= 0, target, slots.view_as(topk_ids))

    def _tables(self, rank: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Return what slots() looks up.

        (2, slots + 1) the number of each copied expert among them, H for others and for skipped pairs, and the owner's
        slot, counted with copies, -1 for skipped pairs; (places, H + 1) up to which of its pairs each place takes them;
        and ((H + 1) * (places + 1),) the slot of each place, -1 for the owner's, which is the last.
        """
        copied = sorted(self.ranks_of)
        columns = [len(copied)] * (self.size * self.num_own + 1)
        places = []
        for number, expert in enumerate(copied):
            columns[expert] = number
            of_expert = [copy for copy in self.copies if copy.expert == expert]
            places.append(sorted(of_expert, key=lambda copy: (copy.rank != rank, copy.rank)))
        width = max(map(len, places), default=0)
        bounds, targets = [], []
        for of_expert in (*places, []):
            missing = width - len(of_expert)
            reached = list(accumulate(copy.pairs[rank] for copy in of_expert))
            bounds.append(reached + (reached or [0])[-1:] * missing)
            targets += [self._slot(copy) for copy in of_expert] + [-1] * (missing + 1)
        slots = [slot + slot // self.num_own * self.num_copies for slot in range(self.size * self.num_own)]
        flat = [*columns, *slots, -1, *chain(*zip(*bounds, strict=True)), *targets]
        table = to_device(torch.tensor(flat, dtype=torch.int64, device="cpu"), device)  # one copy to the device
        of_slots, of_places, to_slots = table.split([2 * len(columns), width * len(bounds), len(targets)])
        return of_slots.view(2, -1), of_places.view(width, len(bounds)), to_slots

    def _slot(self, copy: ExpertCopy) -> int:
        return copy.rank * (self.num_own + self.num_copies) + self.num_own + self.on(copy.rank).index(copy)


def on_ports(places: Sequence[tuple[int, int]], num_own: int, size: int) -> tuple[int, int]:
    """Return how many experts' weights pass the busiest port where owners send all copies, and where they are relayed.

    With relays an owner sends every expert once, in pieces, and then every copy's rank sends and receives about one.

    Args:
        places: the expert and the rank of each copy.
    """
    sent, received = [0] * size, [0] * size
    experts: list[set[int]] = [set() for _ in range(size)]
    for expert, rank in places:
        owner = expert // num_own
        sent[owner] += 1
        received[rank] += 1
        experts[owner].add(expert)
    return max(*sent, *received), max(map(len, experts)) + max(received)


def is_relayed(direct: int, relayed: int) -> bool:
    """Return whether relays are worth another exchange: two experts' weights less on the busiest port."""
    return relayed + 2 <= direct


def _order_in_chunks(num_tokens: int, overlap: OverlapPlan, device: torch.device) -> Tensor | None:
    """Return the tokens (T,) by how far behind the start of their chunk they are, in shares of it; None for one chunk.

    Example:
        Six tokens in two chunks, (0, 1, 2) and (3, 4, 5): (0, 3, 1, 4, 2, 5).
    """
    if overlap.num_chunks == 1:
        return None
    sizes = [last - first for first, last in pairwise(overlap.bounds(num_tokens))]
    if len(set(sizes)) == 1:
        return torch.arange(num_tokens, device=device).view(len(sizes), -1).T.flatten()
    behind = [torch.arange(size, dtype=torch.float64, device=device) / max(1, size) for size in sizes]
    return torch.sort(torch.cat(behind), stable=True)[1]
