"""plan_copies(): which experts are copied for one call and how many of their pairs go there, from counts alone.

Every rank calls it with the same numbers and must find the same plan, so there are only integers here. Candidates
differ in how evenly they spread the pairs, in how many copies they make, and in where these are: a closed form prices
each. A pass takes as long as the busiest rank computes, and what of the first rows that come and the last that go
nothing hides; or as long as the busiest port is occupied, and one of the two. What is copied occupies the ports of its
owner and of its rank; a rank begins with its copies when their weights have come, and their gradients leave it late in
the backward, a part under the product that gives the next one.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import chain, groupby
from operator import itemgetter
from typing import NamedTuple

import torch
from torch import Tensor

from tritonmoe.dispatch.copies import ExpertCopies, ExpertCopy, is_relayed, on_ports

__all__ = ["CopyCosts", "PlannedCopies", "is_uneven", "plan_copies"]

LARGEST_SHARE_PERCENT = 97
"""Copies are made where a call is expected to take at most this share of its time without."""

TRIED_PAIRS = 4
"""Of each copy that there may be, so many experts with pairs of a rank's tokens are tried for it."""

Move = tuple[int, int, int]
"""An expert, the rank that it is copied to, and how many of its pairs go there."""

SMALLEST_EXCESS_PERCENT = 3
"""Ranks whose busiest has less than this more than their mean are left alone."""
CAPS_PERCENT = (100, 120, 150, 220)
"""Up to how much of the mean the candidates let ranks keep."""
EXPOSED_SHARE = 8
"""One part in so many of a pass's exchanges is taken to be hidden by nothing at either end."""
COPY_SHARE = 256
"""Each copy on a rank is taken to make the call longer by one part in so many: products of fewer pairs are slower. So
are as many copies as there are ranks, wherever they are, since all of them are packed and unpacked."""
PARTS = 64
"""Rows are estimated in such parts of one."""
SMALLEST_PIECE = 32
"""Without costs, no copy takes fewer pairs than one part in so many of the mean of a rank."""


class CopyCosts(NamedTuple):
    """What a call is expected to take, agreed by all ranks."""

    forward_fs: int
    """Femtoseconds that the experts need for a pair in the forward."""
    backward_fs: int
    """The same in the backward, weight gradients included; 0 without one."""
    byte_fs: int
    """Femtoseconds for which a byte occupies a port."""
    call_fs: int
    """What a call takes longer for being planned again."""
    row_bytes: int
    """Of a row in the forward's dispatch."""
    gradient_row_bytes: int
    """Of a row in the adjoint of combine."""
    other_row_bytes: int
    """Of a row in other exchanges."""
    expert_bytes: int
    """Of the weights of one expert."""
    gradient_bytes: int
    """Of what comes home of them in a backward, and of what goes there again before it."""
    forward_rank_fs: int = 0
    """What a rank's experts need in the forward beside, for any number of pairs."""
    backward_rank_fs: int = 0
    """The same in the backward."""
    with_permille: int = 1000
    """By how much calls with copies have taken longer, or shorter, than was expected of them."""
    without_permille: int = 1000
    """The same of calls without."""
    without: "CopyCosts | None" = None
    """Of calls without copies alone, by which such a call is priced; None where they are the same."""


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


class PlannedCopies(NamedTuple):
    """Copies, and what a call is expected to take with them and without, in femtoseconds; 0 without costs."""

    copies: ExpertCopies | None
    """None where copies would not make the call 3 % faster."""
    with_fs: int
    without_fs: int

    @property
    def call_fs(self) -> int:
        """What the call is expected to take as it will run."""
        return self.without_fs if self.copies is None else self.with_fs


def is_uneven(pairs: Sequence[int]) -> bool:
    """Return whether ranks with so many pairs are uneven enough to look for copies."""
    return 100 * max(pairs) * len(pairs) > (100 + SMALLEST_EXCESS_PERCENT) * sum(pairs)


def plan_copies(counts: Tensor, rows: Tensor, top_k: int, max_copies: int, costs: CopyCosts | None) -> PlannedCopies:
    """Return the copies that make a call fastest, if it is 3 % faster with them.

    Args:
        counts: (W, slots) int64 on the CPU, how many pairs each rank's tokens have of each slot.
        rows: (W, W) int64, the rows that go from rank i to rank k without copies.
        max_copies: the most copies on a rank.
        costs: None to spread the pairs as evenly as so many copies can, whatever that takes.
    """
    load = Load(counts, rows, top_k)
    without = _Candidate(load, (), costs)
    best, best_price = without, without.price
    caps = CAPS_PERCENT if costs else CAPS_PERCENT[:1]
    found = dict.fromkeys(candidates(load, max_copies, _least_pairs(load, costs), caps))
    for candidate in (_Candidate(load, moves, costs) for moves in found if moves):
        if candidate.least_price < best_price and candidate.price < best_price:
            best, best_price = candidate, candidate.price
    with_fs, without_fs = best_price[0], without.price[0]
    if costs is not None and costs.without is not None:
        without_fs = _Candidate(load, (), costs.without).price[0]
    permille = (1000, 1000) if costs is None else (costs.with_permille, costs.without_permille)
    is_faster = 100 * with_fs * permille[0] <= LARGEST_SHARE_PERCENT * without_fs * permille[1]
    copies = best.copies() if best is not without and is_faster else None
    return PlannedCopies(copies, with_fs, without_fs) if costs else PlannedCopies(copies, 0, 0)


def _least_pairs(load: Load, costs: CopyCosts | None) -> int:
    """Return the fewest pairs that are worth a copy: where there are costs, those that pay for its way."""
    if costs is None:
        return max(1, -(-sum(load.of_rank) // load.size) // SMALLEST_PIECE)
    pair_fs = max(1, costs.forward_fs + costs.backward_fs)
    return max(1, (costs.expert_bytes + costs.gradient_bytes) * costs.byte_fs // pair_fs // EXPOSED_SHARE)


class _Candidate:
    """Moves, from which of the sources their pairs come, and what a call takes with them.

    A rank gives its own tokens' pairs to its own copy first. The others come from whole ranks as far as they go, each
    expert beginning with another one: few pieces of a few pairs each.
    """

    def __init__(self, load: Load, moves: tuple[Move, ...], costs: CopyCosts | None) -> None:
        self.load, self.moves, self.costs = load, moves, costs
        self.owners = [expert // load.num_own for expert, _, _ in moves]
        self.pairs = list(load.of_rank)
        """That each rank computes."""
        self.copies_out, self.copies_in, self.copied_pairs = ([0] * load.size for _ in range(3))
        for owner, (_, rank, moved) in zip(self.owners, moves, strict=True):
            self.pairs[owner] -= moved
            self.pairs[rank] += moved
            self.copies_out[owner] += 1
            self.copies_in[rank] += 1
            self.copied_pairs[rank] += moved

    @cached_property
    def flow(self) -> list[list[tuple[int, int]]]:
        """Of each move the ranks whose tokens' pairs go to the copy, with how many."""
        load, flow = self.load, []
        for expert, of_expert in groupby(self.moves, key=itemgetter(0)):
            pieces = [(rank, number) for _, rank, number in of_expert]
            left = [of[expert] for of in load.counts]
            stays = [min(left[rank], number) for rank, number in pieces]
            for (rank, _), stay in zip(pieces, stays, strict=True):
                left[rank] -= stay
            sources = chain(range(expert % load.size, load.size), range(expert % load.size))
            source = next(sources)
            for (rank, number), stay in zip(pieces, stays, strict=True):
                taken, far = [(rank, stay)] if stay else [], number - stay
                while far:
                    piece = min(far, left[source])
                    if piece:
                        taken.append((source, piece))
                        far -= piece
                        left[source] -= piece
                    else:
                        source = next(sources)
                flow.append(taken)
        return flow

    def copies(self) -> ExpertCopies:
        found = []
        for (expert, rank, _), taken in zip(self.moves, self.flow, strict=True):
            pairs = [0] * self.load.size
            for source, number in taken:
                pairs[source] = number
            found.append(ExpertCopy(expert, rank, tuple(pairs)))
        return ExpertCopies(self.load.size, self.load.num_own, tuple(found))

    @cached_property
    def least_price(self) -> tuple[int, int]:
        """What `price` would be if no rows travelled: which copies cost more than that is soon known."""
        return self._priced([0] * self.load.size)

    @cached_property
    def price(self) -> tuple[int, int]:
        """Femtoseconds of the call, or without costs the busiest rank's pairs; and the number of copies."""
        return self._priced([] if self.costs is None else self._rows_on_ports())

    def _priced(self, rows: Sequence[int]) -> tuple[int, int]:
        """Return the price with so many rows on the busier direction of each rank's port."""
        costs = self.costs
        if costs is None:
            return max(self.pairs), len(self.moves)
        sent, gradients, forward_fs, backward_fs = self._without_rows
        total = _pass_fs(forward_fs, sent, rows, costs.row_bytes + costs.other_row_bytes, costs.byte_fs)
        if costs.backward_fs:
            row_bytes = costs.gradient_row_bytes + costs.other_row_bytes
            total += _pass_fs(backward_fs, gradients, rows, row_bytes, costs.byte_fs)
        if self.moves:
            total += costs.call_fs
        slower = max(self.copies_in) * self.load.size + len(self.moves)
        return total + total * slower // (COPY_SHARE * self.load.size), len(self.moves)

    @cached_property
    def _without_rows(self) -> tuple[list[int], list[int], int, int]:
        """The bytes of copies on each rank's port in a forward and in a backward, and what ranks compute in them."""
        costs = self.costs
        assert costs is not None
        direct, relayed = on_ports([move[:2] for move in self.moves], self.load.num_own, self.load.size)
        on_port = carried = list(map(max, self.copies_out, self.copies_in))
        if is_relayed(direct, relayed):  # pieces that are passed on occupy everybody until the last ones have come
            carried, direct = [relayed] * self.load.size, relayed
        return (
            [of * costs.expert_bytes for of in carried],
            [of * costs.gradient_bytes for of in on_port],
            self._forward_fs(costs, direct * costs.expert_bytes * costs.byte_fs),
            self._backward_fs(costs, max(self.copies_out) * costs.gradient_bytes * costs.byte_fs),
        )

    def _forward_fs(self, costs: CopyCosts, copies_fs: int) -> int:
        """Return what the busiest rank computes in a forward; half of own pairs are computed until copies have come."""
        longest = max(self.pairs) * costs.forward_fs
        for pairs, copied in zip(self.pairs, self.copied_pairs, strict=True):
            if copied:
                before_fs = ((pairs - copied) * costs.forward_fs + costs.forward_rank_fs) // 2
                longest = max(longest, pairs * costs.forward_fs + max(0, copies_fs - before_fs))
        return longest + costs.forward_rank_fs

    def _backward_fs(self, costs: CopyCosts, copies_fs: int) -> int:
        """Return the same of a backward, half of which are gradients of weights; those of copies come first.

        Two thirds of these, of gate_up_proj, travel while the others are computed.
        """
        longest, pair_fs = max(self.pairs) * costs.backward_fs, costs.backward_fs // 2
        for pairs, copied in zip(self.pairs, self.copied_pairs, strict=True):
            if copied:
                last_fs = max(copied * pair_fs, 2 * copied * pair_fs // 3 + 2 * copies_fs // 3)
                longest = max(longest, pairs * pair_fs + last_fs + copies_fs // 3)
        return longest + costs.backward_rank_fs

    def _rows_on_ports(self) -> list[int]:
        """Return how many rows pass the busier direction of each rank's port."""
        load = self.load
        out, into = list(load.out), list(load.into)
        changes = [0] * load.size
        # A pair that leaves takes its part of a row along, and needs a new one where its token didn't go before.
        for owner, (_, rank, _), taken in zip(self.owners, self.moves, self.flow, strict=True):
            less = more = 0
            for source, number in taken:
                rows, moved, change = load.rows[source], number * PARTS, 0
                if source != owner:
                    change = -(moved * rows[owner] // load.pairs(source, owner))
                    less -= change
                tokens = load.tokens[source]
                if source != rank and tokens > rows[rank]:
                    gained = moved * (tokens - rows[rank]) // tokens
                    more += gained
                    change += gained
                changes[source] += change
            into[owner] -= less // PARTS
            into[rank] += more // PARTS
        return [max(0, sent + change // PARTS, came) for sent, change, came in zip(out, changes, into, strict=True)]


def _pass_fs(computed_fs: int, copies_bytes: Sequence[int], rows: Sequence[int], row_bytes: int, byte_fs: int) -> int:
    """Return what a pass takes; copies_bytes, rows: on the busier direction of each rank's port."""
    exposed_fs = max(rows) * row_bytes * byte_fs // EXPOSED_SHARE
    sent_bytes = max(copied + number * row_bytes for copied, number in zip(copies_bytes, rows, strict=True))
    return max(computed_fs + exposed_fs, sent_bytes * byte_fs) + exposed_fs
