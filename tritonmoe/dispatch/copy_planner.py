"""plan_copies(): which experts are copied for one call and how many of their pairs go there, from counts alone.

Every rank calls it with the same numbers and must find the same plan, so there are only integers here. Candidates
differ in how evenly they spread the pairs, in how many copies they make, and in where these are: a closed form prices
each. A pass takes as long as the busiest rank computes, and what of the first rows that come and the last that go
nothing hides; or as long as the busiest port is occupied, and one of the two. What is copied occupies the ports of its
owner and of its rank; a rank begins with its copies when their weights have come, and their gradients leave it late in
the backward, a part under the product that gives the next one.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from tritonmoe.dispatch.copies import ExpertCopies, ExpertCopy, is_relayed, on_ports
from tritonmoe.dispatch.copy_candidates import LARGEST_SHARE_PERCENT, Load, Move, candidates

__all__ = ["CopyCosts", "PlannedCopies", "is_uneven", "plan_copies"]

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
    load = Load(counts, rows, top_k)
    without = _Candidate(load, ())
    without_price = without.price(costs)
    best, best_price = without, without_price
    seen: set[tuple[Move, ...]] = {()}
    caps = CAPS_PERCENT if costs else CAPS_PERCENT[:1]
    for moves in candidates(load, max_copies, _least_pairs(load, costs), caps):
        candidate = _Candidate(load, moves)
        if moves not in seen and candidate.least_price(costs) < best_price:
            price = candidate.price(costs)
            if price < best_price:
                best, best_price = candidate, price
        seen.add(moves)
    with_fs, without_fs = best_price[0], without_price[0]
    permille = (1000, 1000) if costs is None else (costs.with_permille, costs.without_permille)
    is_faster = 100 * with_fs * permille[0] <= LARGEST_SHARE_PERCENT * without_fs * permille[1]
    copies = best.copies() if best is not without and is_faster else None
    if copies is not None and not copies.copies:
        copies = None
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

    def __init__(self, load: Load, moves: tuple[Move, ...]) -> None:
        self.load, self.moves = load, moves
        self.owners = [expert // load.num_own for expert, _, _ in moves]
        self.ranks = [rank for _, rank, _ in moves]
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
    def _on_ports(self) -> tuple[int, int]:
        return on_ports([move[:2] for move in self.moves], self.load.num_own, self.load.size)

    @cached_property
    def flow(self) -> Tensor:
        """(W, copies) how many pairs of each rank's tokens go to each copy."""
        return self._flow() if self.moves else self.load.counts.new_zeros(self.load.size, 0)

    @cached_property
    def _numbers(self) -> tuple[Tensor, Tensor, Tensor]:
        """The experts, ranks and pairs of the moves."""
        experts, ranks, pieces = torch.tensor(self.moves, dtype=torch.int64, device="cpu").unbind(1)
        return experts, ranks, pieces

    def _flow(self) -> Tensor:
        load, size = self.load, self.load.size
        experts, ranks, pieces = self._numbers
        places = torch.arange(len(self.moves), device="cpu")
        stay = torch.minimum(load.counts[ranks, experts], pieces)
        far = (pieces - stay).tolist()
        if not any(far):
            flow = torch.zeros(size, len(self.moves), dtype=torch.int64, device="cpu")
            flow[ranks, places] = stay
            return flow
        left = load.counts.clone()
        left[ranks, experts] -= stay
        order = (torch.arange(size, device="cpu")[:, None] + experts) % size
        left = left.index_select(1, experts).gather(0, order)
        reached = left.cumsum(0)
        taken: dict[int, int] = {}
        bounds = []
        for (expert, _, _), number in zip(self.moves, far, strict=True):
            first = taken.get(expert, 0)
            taken[expert] = first + number
            bounds.append((first, first + number))
        firsts, lasts = torch.tensor(bounds, device="cpu").unbind(1)
        flow = (torch.minimum(reached, lasts) - torch.maximum(reached - left, firsts)).clamp_(min=0)
        flow = torch.zeros_like(flow).scatter_(0, order, flow)
        flow[ranks, places] += stay
        return flow

    def copies(self) -> ExpertCopies:
        of_copy = self.flow.T.tolist()
        found = [ExpertCopy(e, r, tuple(of)) for (e, r, _), of in zip(self.moves, of_copy, strict=True) if any(of)]
        return ExpertCopies(self.load.size, self.load.num_own, tuple(found))

    def least_price(self, costs: CopyCosts | None) -> tuple[int, int]:
        """Return what price() would be if no rows travelled: which copies cost more than that is soon known."""
        return self._priced([0] * self.load.size, costs)

    def price(self, costs: CopyCosts | None) -> tuple[int, int]:
        """Return femtoseconds of the call, or without costs the busiest rank's pairs; and the number of copies."""
        return self._priced([] if costs is None else self._rows_on_ports(), costs)

    def _priced(self, rows: Sequence[int], costs: CopyCosts | None) -> tuple[int, int]:
        """Return the price with so many rows on the busier direction of each rank's port."""
        if costs is None:
            return max(self.pairs), len(self.moves)
        direct, relayed = self._on_ports
        carried = list(map(max, self.copies_out, self.copies_in))
        if is_relayed(direct, relayed):  # pieces that are passed on occupy everybody until the last ones have come
            carried, direct = [relayed] * self.load.size, relayed
        total = _pass_fs(
            self._forward_fs(costs, direct * costs.expert_bytes * costs.byte_fs),
            [of * costs.expert_bytes for of in carried],
            [of * (costs.row_bytes + costs.other_row_bytes) for of in rows],
            costs.byte_fs,
        )
        if costs.backward_fs:
            total += _pass_fs(
                self._backward_fs(costs, max(self.copies_out) * costs.gradient_bytes * costs.byte_fs),
                [of * costs.gradient_bytes for of in map(max, self.copies_out, self.copies_in)],
                [of * 2 * costs.other_row_bytes for of in rows],
                costs.byte_fs,
            )
        if self.moves:
            total += costs.call_fs
        slower = max(self.copies_in) * self.load.size + len(self.moves)
        return total + total * slower // (COPY_SHARE * self.load.size), len(self.moves)

    def _forward_fs(self, costs: CopyCosts, copies_fs: int) -> int:
        """Return what the busiest rank computes in a forward; half of own pairs are computed until copies have come."""
        longest = max(self.pairs) * costs.forward_fs
        for pairs, copied in zip(self.pairs, self.copied_pairs, strict=True):
            if copied:
                before_fs = (pairs - copied) * costs.forward_fs // 2
                longest = max(longest, pairs * costs.forward_fs + max(0, copies_fs - before_fs))
        return longest

    def _backward_fs(self, costs: CopyCosts, copies_fs: int) -> int:
        """Return the same of a backward, half of which are gradients of weights; those of copies come first.

        Two thirds of these, of gate_up_proj, travel while the others are computed.
        """
        longest, pair_fs = max(self.pairs) * costs.backward_fs, costs.backward_fs // 2
        for pairs, copied in zip(self.pairs, self.copied_pairs, strict=True):
            if copied:
                last_fs = max(copied * pair_fs, 2 * copied * pair_fs // 3 + 2 * copies_fs // 3)
                longest = max(longest, pairs * pair_fs + last_fs + copies_fs // 3)
        return longest

    def _rows_on_ports(self) -> list[int]:
        """Return how many rows pass the busier direction of each rank's port."""
        load = self.load
        out, into = list(load.out), list(load.into)
        if self.moves:
            # A pair that leaves takes its part of a row along, and needs a new one where its token didn't go before.
            tokens = load.tokens[:, None]
            moved = self.flow * PARTS
            experts, ranks, _ = self._numbers
            owners = torch.div(experts, load.num_own, rounding_mode="floor")
            lost = moved * load.rows.index_select(1, owners) // load.pairs.index_select(1, owners).clamp_(min=1)
            gained = moved * (tokens - load.rows.index_select(1, ranks)).clamp_(min=0) // tokens
            places = torch.arange(len(self.moves), device="cpu")
            lost[owners, places] = 0
            gained[ranks, places] = 0
            for rank, change in enumerate((gained - lost).sum(1).tolist()):
                out[rank] += change // PARTS
            changes = zip(self.owners, self.ranks, lost.sum(0).tolist(), gained.sum(0).tolist(), strict=True)
            for owner, rank, less, more in changes:
                into[owner] -= less // PARTS
                into[rank] += more // PARTS
        return [max(0, *both) for both in zip(out, into, strict=True)]


def _pass_fs(computed_fs: int, copies_bytes: Sequence[int], rows_bytes: Sequence[int], byte_fs: int) -> int:
    """Return what a pass takes; copies_bytes, rows_bytes: on the busier direction of each rank's port."""
    exposed_fs = max(rows_bytes) * byte_fs // EXPOSED_SHARE
    sent_fs = max(map(sum, zip(copies_bytes, rows_bytes, strict=True))) * byte_fs
    return max(computed_fs + exposed_fs, sent_fs) + exposed_fs
