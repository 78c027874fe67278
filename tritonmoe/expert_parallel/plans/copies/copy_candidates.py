"""candidates(): which experts could be copied to which ranks for one call, and how many of their pairs would go there.

They differ in how evenly they spread the pairs, in how many copies they make, and in where these are. Every rank finds
the same ones: there are only integers here.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

__all__ = ["LARGEST_SHARE_PERCENT", "Load", "Move", "candidates"]

LARGEST_SHARE_PERCENT = 97
"""Copies are made where a call is expected to take at most this share of its time without."""

TRIED_PAIRS = 4
"""Of each copy that there may be, so many experts with pairs of a rank's tokens are tried for it."""

Move = tuple[int, int, int]
"""An expert, the rank that it is copied to, and how many of its pairs go there."""


class Load:
    """What a call has to do without copies; arguments as in plan_copies."""

    def __init__(self, counts: Tensor, rows: Tensor, top_k: int) -> None:
        self.size = counts.shape[0]
        self.num_own = counts.shape[1] // self.size
        """L, the slots of one rank."""
        self.of_expert: list[int] = counts.sum(0).tolist()
        firsts = range(0, len(self.of_expert), self.num_own)
        self.of_rank = [sum(self.of_expert[first : first + self.num_own]) for first in firsts]
        self.counts_of_slots = counts
        # Lists, since few of the numbers are read, and each operation on a tensor takes as long as reading hundreds.
        self.counts: list[list[int]] = counts.tolist()
        self.rows: list[list[int]] = rows.tolist()
        self.tokens = [max(1, sum(of) // max(1, top_k)) for of in self.counts]
        """Of each rank."""
        self.out: list[int] = rows.sum(1).tolist()
        self.into: list[int] = rows.sum(0).tolist()
        for rank, of in enumerate(self.rows):
            self.out[rank] -= of[rank]
            self.into[rank] -= of[rank]

    def pairs(self, source: int, rank: int) -> int:
        """Return how many pairs of one rank's tokens another rank computes."""
        return sum(self.counts[source][rank * self.num_own : (rank + 1) * self.num_own])


def candidates(load: Load, max_copies: int, least: int, caps_percent: Sequence[int]) -> Iterator[tuple[Move, ...]]:
    """Yield the moves of each candidate.

    Args:
        least: the fewest pairs that are worth a copy. caps_percent: up to how much of the mean ranks keep, ascending.
    """
    mean, most = -(-sum(load.of_rank) // load.size), max(load.of_rank)
    busy = _busy_places(load, mean * caps_percent[0] // 100, least)
    for percent in caps_percent:
        cap = mean * percent // 100
        if 100 * cap > LARGEST_SHARE_PERCENT * most:
            break
        for held in sorted({1, min(2, max_copies), max_copies}) if percent == caps_percent[0] else (max_copies,):
            yield _by_load(load, cap, held, least)
            yield _by_tokens(load, busy, cap, held, least)


def _busy_places(load: Load, cap: int, least: int) -> list[int]:
    """Return places (rank times slots plus expert) of `least` pairs or more that a rank above the cap computes.

    The most pairs come first, then the first place.
    """
    counts = load.counts_of_slots.flatten()
    is_busy = torch.tensor([pairs > cap for pairs in load.of_rank], device=counts.device).repeat_interleave(
        load.num_own
    )
    places = (is_busy & (load.counts_of_slots >= least)).flatten().nonzero().flatten()
    found: list[int] = places[counts[places].argsort(descending=True, stable=True)].tolist()
    return found


def _by_load(load: Load, cap: int, max_copies: int, least: int) -> tuple[Move, ...]:
    """Make few copies: what is too much, the hottest experts first, beside the room of the ranks, roomiest first."""
    amounts: list[tuple[int, int]] = []
    for owner, pairs in enumerate(load.of_rank):
        over, first = pairs - cap, owner * load.num_own
        experts = range(first, first + load.num_own)
        for expert in sorted(experts, key=lambda e: (-load.of_expert[e], e)) if over > 0 else ():
            amount = min(over, load.of_expert[expert])
            if amount < least:
                break
            amounts.append((-amount, expert))
            over -= amount
    rooms = sorted((pairs - cap, rank) for rank, pairs in enumerate(load.of_rank) if cap - pairs >= least)
    moves: list[Move] = []
    places = iter(rooms)
    room, rank, held = 0, -1, 0
    for negative, expert in sorted(amounts):
        amount = -negative
        while amount >= least:
            if room < least or held == max_copies:
                try:
                    negative_room, rank = next(places)
                except StopIteration:
                    return tuple(sorted(moves))
                room, held = -negative_room, 0
            piece = min(amount, room)
            moves.append((expert, rank, piece))
            amount, room, held = amount - piece, room - piece, held + 1
    return tuple(sorted(moves))


def _by_tokens(load: Load, busy: Sequence[int], cap: int, max_copies: int, least: int) -> tuple[Move, ...]:
    """Make copies where the tokens are: each rank computes pairs of its own tokens, whose rows then stay."""
    over = {rank: pairs - cap for rank, pairs in enumerate(load.of_rank) if pairs > cap}
    room = {rank: cap - pairs for rank, pairs in enumerate(load.of_rank) if cap - pairs >= least}
    held = dict.fromkeys(room, 0)
    moves: list[Move] = []
    left, num_over, num_open = TRIED_PAIRS * max_copies * load.size, sum(of >= least for of in over.values()), len(room)
    for place in busy:
        rank, expert = divmod(place, len(load.of_expert))
        owner = expert // load.num_own
        if not (num_over and num_open and left):
            break
        if rank not in room or owner not in over:
            continue
        left -= 1
        piece = min(load.counts[rank][expert], over[owner], room[rank])
        if piece >= least and held[rank] < max_copies:
            moves.append((expert, rank, piece))
            over[owner], room[rank], held[rank] = over[owner] - piece, room[rank] - piece, held[rank] + 1
            num_over -= over[owner] < least
            num_open -= room[rank] < least or held[rank] == max_copies
    return tuple(sorted(moves))
