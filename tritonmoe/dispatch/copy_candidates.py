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

Move = tuple[int, int, int]
"""An expert, the rank that it is copied to, and how many of its pairs go there."""


class Load:
    """What a call has to do without copies; arguments as in plan_copies."""

    def __init__(self, counts: Tensor, rows: Tensor, top_k: int) -> None:
        self.counts, self.rows = counts, rows
        self.size = counts.shape[0]
        self.num_own = counts.shape[1] // self.size
        """L, the slots of one rank."""
        of_expert = counts.sum(0)
        self.of_expert: list[int] = of_expert.tolist()
        self.of_rank: list[int] = of_expert.view(self.size, self.num_own).sum(1).tolist()
        self.pairs = counts.view(self.size, self.size, self.num_own).sum(2)
        """(W, W) pairs of rank i that rank k computes."""
        self.tokens = torch.div(counts.sum(1), max(1, top_k), rounding_mode="floor").clamp_(min=1)
        """(W,)."""
        own = rows.diagonal()
        self.out: list[int] = (rows.sum(1) - own).tolist()
        self.into: list[int] = (rows.sum(0) - own).tolist()


def candidates(load: Load, max_copies: int, least: int, caps_percent: Sequence[int]) -> Iterator[tuple[Move, ...]]:
    """Yield the moves of each candidate.

    Args:
        least: the fewest pairs that are worth a copy. caps_percent: up to how much of the mean ranks keep, ascending.
    """
    mean, most = -(-sum(load.of_rank) // load.size), max(load.of_rank)
    for percent in caps_percent:
        cap = mean * percent // 100
        if 100 * cap > LARGEST_SHARE_PERCENT * most:
            break
        for held in sorted({1, min(2, max_copies), max_copies}) if percent == caps_percent[0] else (max_copies,):
            yield _by_load(load, cap, held, least)
            yield _by_tokens(load, cap, held, least)


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


def _by_tokens(load: Load, cap: int, max_copies: int, least: int) -> tuple[Move, ...]:
    """Make copies where the tokens are: each rank computes pairs of its own tokens, whose rows then stay."""
    over = {rank: pairs - cap for rank, pairs in enumerate(load.of_rank) if pairs > cap}
    room = {rank: cap - pairs for rank, pairs in enumerate(load.of_rank) if cap - pairs >= least}
    hot = [expert for owner in over for expert in range(owner * load.num_own, (owner + 1) * load.num_own)]
    if not room or not hot:
        return ()
    ranks = list(room)
    # load.counts[:, hot] would start threads, which takes longer than all the rest.
    found = load.counts.index_select(1, _as_index(hot)).index_select(0, _as_index(ranks)).flatten()
    order = torch.sort(found, descending=True, stable=True)[1][: 4 * max_copies * load.size].tolist()
    here, held = found.tolist(), dict.fromkeys(ranks, 0)
    moves: list[Move] = []
    for place in order:
        if here[place] < least:
            break
        rank, expert = ranks[place // len(hot)], hot[place % len(hot)]
        owner = expert // load.num_own
        piece = min(here[place], over[owner], room[rank])
        if piece < least or held[rank] == max_copies:
            continue
        moves.append((expert, rank, piece))
        over[owner], room[rank], held[rank] = over[owner] - piece, room[rank] - piece, held[rank] + 1
    return tuple(sorted(moves))


def _as_index(numbers: Sequence[int]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64, device="cpu")
