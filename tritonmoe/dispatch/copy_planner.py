"""plan_copies(): which experts are copied for one call and how many of their pairs go there, from counts alone.

Every rank calls it with the same numbers and must find the same plan, so there are only integers here. Candidates
differ in how evenly they spread the pairs, in how many copies they make, and in where these are: a closed form prices
each. A pass takes as long as the busiest rank computes, or as the busiest port is occupied, and then what nothing
hides: the first rows that come and the last that go. What is copied occupies the ports of its owner and of its rank.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tritonmoe.dispatch.copies import ExpertCopies, ExpertCopy

__all__ = ["CopyCosts", "PlannedCopies", "is_uneven", "plan_copies"]

SMALLEST_EXCESS_PERCENT = 3
"""Ranks whose busiest has less than this more than their mean are left alone."""
LARGEST_SHARE_PERCENT = 97
"""Copies are made where a call is expected to take at most this share of its time without."""
CAPS_PERCENT = (100, 110, 150, 220)
"""Up to how much of the mean the candidates let ranks keep."""
EXPOSED_SHARE = 8
"""One part in so many of a pass's exchanges is taken to be hidden by nothing at either end."""
COPY_SHARE = 256
"""Each copy on a rank is taken to make the call longer by one part in so many: products of fewer pairs are slower."""
PARTS = 64
"""Rows are estimated in such parts of one."""
SMALLEST_PIECE = 32
"""Without costs, no copy takes fewer pairs than one part in so many of the mean of a rank."""

Move = tuple[int, int, int]
"""An expert, the rank that it is copied to, and how many of its pairs go there."""


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
    other_row_bytes: int
    """Of a row in other exchanges."""
    expert_bytes: int
    """Of the weights of one expert."""
    gradient_bytes: int
    """Of what comes home of them in a backward, and of what goes there again before it."""
    with_permille: int = 1000
    """By how much calls with copies have taken longer, or shorter, than was expected of them."""
    without_permille: int = 1000
    """The same of calls without."""


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
    """Say whether ranks with so many pairs are uneven enough to look for copies."""
    return 100 * max(pairs) * len(pairs) > (100 + SMALLEST_EXCESS_PERCENT) * sum(pairs)


def plan_copies(counts: Tensor, rows: Tensor, top_k: int, max_copies: int, costs: CopyCosts | None) -> PlannedCopies:
    """Return the copies that make a call fastest, if it is 3 % faster with them.

    Args:
        counts: (W, slots) int64 on the CPU, how many pairs each rank's tokens have of each slot.
        rows: (W, W) int64, the rows that go from rank i to rank k without copies.
        max_copies: the most copies on a rank.
        costs: None to spread the pairs as evenly as so many copies can, whatever that takes.
    """
    load = _Load(counts, rows, top_k)
    without = _Candidate(load, ())
    best, best_price = without, without.price(costs)
    seen: set[tuple[Move, ...]] = {()}
    for moves in _candidates(load, max_copies, costs):
        if moves not in seen:
            seen.add(moves)
            candidate = _Candidate(load, moves)
            price = candidate.price(costs)
            if price < best_price:
                best, best_price = candidate, price
    with_fs, without_fs = best_price[0], without.price(costs)[0]
    permille = (1000, 1000) if costs is None else (costs.with_permille, costs.without_permille)
    is_faster = 100 * with_fs * permille[0] <= LARGEST_SHARE_PERCENT * without_fs * permille[1]
    copies = best.copies() if best is not without and is_faster else None
    if copies is not None and not copies.copies:
        copies = None
    return PlannedCopies(copies, with_fs, without_fs) if costs else PlannedCopies(copies, 0, 0)


class _Load:
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


def _candidates(load: _Load, max_copies: int, costs: CopyCosts | None) -> Iterator[tuple[Move, ...]]:
    """Yield the moves of each candidate."""
    mean, most = -(-sum(load.of_rank) // load.size), max(load.of_rank)
    least = max(1, mean // SMALLEST_PIECE)
    if costs is not None:
        pair_fs = max(1, costs.forward_fs + costs.backward_fs)
        least = max(1, (costs.expert_bytes + costs.gradient_bytes) * costs.byte_fs // pair_fs // EXPOSED_SHARE)
    for percent in CAPS_PERCENT if costs else CAPS_PERCENT[:1]:
        cap = mean * percent // 100
        if 100 * cap > LARGEST_SHARE_PERCENT * most:
            break
        for held in sorted({1, min(2, max_copies), max_copies}) if percent == CAPS_PERCENT[0] else (max_copies,):
            yield _by_load(load, cap, held, least)
            yield _by_tokens(load, cap, held, least)


def _by_load(load: _Load, cap: int, max_copies: int, least: int) -> tuple[Move, ...]:
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


def _by_tokens(load: _Load, cap: int, max_copies: int, least: int) -> tuple[Move, ...]:
    """Make copies where the tokens are: each rank computes pairs of its own tokens, whose rows then stay."""
    over = {rank: pairs - cap for rank, pairs in enumerate(load.of_rank) if pairs > cap}
    room = {rank: cap - pairs for rank, pairs in enumerate(load.of_rank) if cap - pairs >= least}
    hot = [expert for owner in over for expert in range(owner * load.num_own, (owner + 1) * load.num_own)]
    if not room or not hot:
        return ()
    ranks = list(room)
    found = _columns(load.counts, hot).index_select(0, _as_index(ranks)).flatten()
    order = torch.sort(found, descending=True, stable=True)[1][: 4 * max_copies * load.size].tolist()
    here, held = found.tolist(), dict.fromkeys(ranks, 0)
    moves: list[Move] = []
    for place in order:
        rank, expert = ranks[place // len(hot)], hot[place % len(hot)]
        owner = expert // load.num_own
        piece = min(here[place], over[owner], room[rank])
        if piece < least or held[rank] == max_copies:
            continue
        moves.append((expert, rank, piece))
        over[owner], room[rank], held[rank] = over[owner] - piece, room[rank] - piece, held[rank] + 1
    return tuple(sorted(moves))


class _Candidate:
    """Moves, from which of the sources their pairs come, and what a call takes with them.

    A rank gives its own tokens' pairs to its own copy first. The others come from whole ranks as far as they go, each
    expert beginning with another one: few pieces of a few pairs each.
    """

    def __init__(self, load: _Load, moves: tuple[Move, ...]) -> None:
        self.load, self.moves = load, moves
        self.flow = self._flow() if moves else load.counts.new_zeros(load.size, 0)
        """(W, copies) how many pairs of each rank's tokens go to each copy."""

    def _flow(self) -> Tensor:
        load, size = self.load, self.load.size
        experts, ranks, pieces = (_as_index(of) for of in zip(*self.moves, strict=True))
        places = torch.arange(len(self.moves), device="cpu")
        stay = torch.minimum(load.counts[ranks, experts], pieces)
        left = load.counts.clone()
        left[ranks, experts] -= stay
        order = (torch.arange(size, device="cpu")[:, None] + experts) % size
        left = left.index_select(1, experts).gather(0, order)
        reached = left.cumsum(0)
        taken: dict[int, int] = {}
        bounds = []
        for (expert, _, _), far in zip(self.moves, (pieces - stay).tolist(), strict=True):
            first = taken.get(expert, 0)
            taken[expert] = first + far
            bounds.append((first, first + far))
        firsts, lasts = torch.tensor(bounds, device="cpu").unbind(1)
        flow = (torch.minimum(reached, lasts) - torch.maximum(reached - left, firsts)).clamp_(min=0)
        flow = torch.zeros_like(flow).scatter_(0, order, flow)
        flow[ranks, places] += stay
        return flow

    def copies(self) -> ExpertCopies:
        of_copy = self.flow.T.tolist()
        found = [ExpertCopy(e, r, tuple(of)) for (e, r, _), of in zip(self.moves, of_copy, strict=True) if any(of)]
        return ExpertCopies(self.load.size, self.load.num_own, tuple(found))

    def price(self, costs: CopyCosts | None) -> tuple[int, int]:
        """Return femtoseconds of the call, or without costs the busiest rank's pairs; and the number of copies."""
        load = self.load
        pairs = list(load.of_rank)
        for (expert, rank, _), moved in zip(self.moves, self.flow.sum(0).tolist(), strict=True):
            pairs[expert // load.num_own] -= moved
            pairs[rank] += moved
        if costs is None:
            return max(pairs), len(self.moves)
        ports, copied = self._ports()
        first, last = costs.row_bytes + costs.other_row_bytes, 2 * costs.other_row_bytes
        forward = _pass_fs(pairs, costs.forward_fs, ports, first, copied, costs.expert_bytes, costs.byte_fs)
        backward = 0
        if costs.backward_fs:
            backward = _pass_fs(pairs, costs.backward_fs, ports, last, copied, costs.gradient_bytes, costs.byte_fs)
        ranks = [rank for _, rank, _ in self.moves]
        most = max(map(ranks.count, ranks), default=0)
        total = forward + backward + (costs.call_fs if self.moves else 0)
        return total + total * most // COPY_SHARE, len(self.moves)

    def _ports(self) -> tuple[list[int], list[int]]:
        """Return how many rows, and how many copies, pass the busier direction of each rank's port."""
        load = self.load
        out, into = list(load.out), list(load.into)
        copies_out, copies_in = [0] * load.size, [0] * load.size
        if self.moves:
            experts, ranks, _ = zip(*self.moves, strict=True)
            owners = [expert // load.num_own for expert in experts]
            # A pair that leaves takes its part of a row along, and needs a new one where its token didn't go before.
            tokens = load.tokens[:, None]
            moved = self.flow * PARTS
            lost = moved * _columns(load.rows, owners) // _columns(load.pairs, owners).clamp_(min=1)
            gained = moved * (tokens - _columns(load.rows, ranks)).clamp_(min=0) // tokens
            numbers = torch.arange(len(self.moves), device="cpu")
            lost[owners, numbers] = 0
            gained[list(ranks), numbers] = 0
            for rank, change in enumerate((gained - lost).sum(1).tolist()):
                out[rank] += change // PARTS
            for owner, rank, less, more in zip(
                owners, ranks, lost.sum(0).tolist(), gained.sum(0).tolist(), strict=True
            ):
                into[owner] -= less // PARTS
                into[rank] += more // PARTS
                copies_out[owner] += 1
                copies_in[rank] += 1
        return (
            [max(0, *both) for both in zip(out, into, strict=True)],
            list(map(max, copies_out, copies_in)),
        )


def _as_index(numbers: Sequence[int]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64, device="cpu")


def _columns(values: Tensor, numbers: Sequence[int]) -> Tensor:
    """Return these columns; values[:, numbers] would start threads, which takes longer than all the rest."""
    return values.index_select(1, _as_index(numbers))


def _pass_fs(
    pairs: Sequence[int],
    pair_fs: int,
    ports: Sequence[int],
    bytes_per_row: int,
    copied: Sequence[int],
    bytes_per_copy: int,
    byte_fs: int,
) -> int:
    exposed = max(ports) * bytes_per_row * byte_fs // EXPOSED_SHARE
    computed = max(pairs) * pair_fs
    sent = max(rows * bytes_per_row + of * bytes_per_copy for rows, of in zip(ports, copied, strict=True)) * byte_fs
    return max(computed, sent + exposed) + exposed
