"""choose_parts(): what a call with a memory budget keeps for its backward, and into how many parts its tokens are cut.

Every rank finds the same, from the counts of all ranks and from what each of them keeps for earlier calls.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from tritonmoe.config.overlap import OverlapPlan, equal_sizes
from tritonmoe.overlap.report import Keeps
from tritonmoe.overlap.simulation.cost_model import LayerWork
from tritonmoe.overlap.simulation.memory import BufferWidths, BytesOfRanks, bytes_of_ranks

__all__ = ["Parts", "bytes_of_parts", "choose_parts", "plan_of_part"]

CHUNKS_OF_PART = 2

NUM_PARTS = (1, 2, 4, 8, 16, 32, 64)
FEW_PARTS = NUM_PARTS[: NUM_PARTS.index(8) + 1]
"""A call is cut into more only if it keeps the least: many small parts take longer than to compute h again."""


class Parts(NamedTuple):
    """How a call runs: in so many parts, of which each keeps the same for its backward."""

    number: int
    keeps: Keeps
    """As in LayerReport."""
    kept_bytes: tuple[int, ...]
    """What every rank keeps of all parts."""
    room_bytes: tuple[float, ...]
    """What every rank may hold of one part beside what is kept; infinite where nothing fits into the budget."""
    reason: str

    @property
    def are_several(self) -> bool:
        """Whether the call runs part by part; a call that keeps nothing does, in one part too."""
        return self.number > 1 or self.keeps == "nothing"

    def have_room_for(self, plan: OverlapPlan, work: LayerWork, widths: Sequence[BufferWidths]) -> bool:
        """Return whether every rank has room for a part of this work."""
        working = _working(self.keeps, _bytes_of_ranks(plan, work, self.keeps, widths, 1))
        return bool((working <= torch.tensor(self.room_bytes, dtype=torch.float64, device="cpu")).all())


def plan_of_part(overlap: OverlapPlan) -> OverlapPlan:
    """Return how a part of a call with this plan overlaps its exchanges."""
    return replace(overlap, chunk_sizes=equal_sizes(CHUNKS_OF_PART))


def choose_parts(
    budget: int,
    plan: OverlapPlan,
    work: LayerWork,
    widths: Sequence[BufferWidths],
    held: Tensor,
    *,
    can_be_cut: bool,
    can_drop_hidden: bool,
) -> Parts:
    """Return the fewest parts that keep the most and hold no more bytes than the budget on any rank.

    To compute h again costs more than a few cuts, and to send rows again costs more than both: so this goes through
    the numbers of parts first. Room is left for a call of this size that keeps nothing, which may come next.

    Args:
        plan: of the whole call. work: what all ranks send and compute. widths: of every rank's buffers.
        held: (W,) what every rank keeps for the backwards of earlier calls, in bytes.
        can_be_cut: whether the call may run in parts. can_drop_hidden: whether a backward can compute h again.
    """
    modes: list[Keeps] = ["hidden"]
    if widths[0].has_backward and can_drop_hidden:
        kept_rows: tuple[Keeps, ...] = ("rows",) if widths[0].save == "hidden" else ()
        modes += (*kept_rows, "nothing") if can_be_cut else kept_rows
    numbers = NUM_PARTS if can_be_cut else NUM_PARTS[:1]

    @cache
    def candidate(number: int, keeps: Keeps) -> _Candidate:
        return _candidate(number, keeps, plan, work, widths)

    def most(found: _Candidate) -> int:
        """Return the most bytes on any rank, those of a call that keeps least behind this one included."""
        beside = found.beside
        if found.number > 1:  # a whole call needs more than the least one
            least = candidate(numbers[-1], modes[-1]).beside
            beside = torch.maximum(beside, least)
        return int((held + found.kept + beside).max().ceil())

    def fits(number: int, keeps: Keeps) -> bool:
        return most(candidate(number, keeps)) <= budget

    for keeps in modes:
        tried = numbers if keeps == modes[-1] else numbers[: len(FEW_PARTS)]
        # One part is asked first: most calls fit as they are.
        index = 0 if fits(1, keeps) else bisect_left(tried, True, key=partial(fits, keeps=keeps))
        if index < len(tried):
            found = candidate(tried[index], keeps)
            words = (
                f"the most that fits into memory_budget_bytes = {budget}, with at most {most(found)} bytes on a rank"
            )
            return _parts(found, budget - held - found.kept - found.of_others, words)
    least = candidate(numbers[-1], modes[-1])
    words = f"takes least, and with {most(least)} bytes still more than memory_budget_bytes = {budget}"
    return _parts(least, torch.full_like(held, math.inf), words)


class _Candidate(NamedTuple):
    """One way to run a call, and the bytes (W,) of every rank."""

    number: int
    keeps: Keeps
    kept: Tensor
    """By all parts."""
    of_part: Tensor
    """What one part holds at its peak beside what is kept."""
    of_others: Tensor
    """What there is meanwhile: the rows of the next part, and sums of the weights' gradients."""

    @property
    def beside(self) -> Tensor:
        """What is held beside what is kept."""
        return self.of_part + self.of_others


def bytes_of_parts(
    parts: Parts, plan: OverlapPlan, work: LayerWork, widths: Sequence[BufferWidths]
) -> tuple[Tensor, Tensor]:
    """Return the peak of a call that runs so, and what it keeps, its pairs spread over experts as widths say; (W,)."""
    found = _candidate(parts.number, parts.keeps, plan, work, widths, num_experts=widths[0].num_local_experts)
    return found.kept + found.beside, found.kept


def _candidate(
    number: int,
    keeps: Keeps,
    plan: OverlapPlan,
    work: LayerWork,
    widths: Sequence[BufferWidths],
    *,
    num_experts: int = 1,
) -> _Candidate:
    part, is_whole = work.scaled(1 / number), number == 1 and keeps != "nothing"
    found = _bytes_of_ranks(plan if is_whole else plan_of_part(plan), part, keeps, widths, num_experts)
    kept = number * (found.kept_places if keeps == "nothing" else found.kept)
    of_others = torch.zeros_like(kept)
    if number > 1:
        rows = part.rows.sum(0) + 2 * part.rows.sum(1)  # received, and at home and packed
        of_others = of_others + rows * widths[0].row_bytes * (2 if keeps == "nothing" and widths[0].has_backward else 1)
    if widths[0].has_backward and (number > 1 or keeps == "nothing"):
        of_others = of_others + widths[0].wide_gradient_bytes
    return _Candidate(number, keeps, kept, _working(keeps, found), of_others)


def _bytes_of_ranks(
    plan: OverlapPlan, work: LayerWork, keeps: Keeps, widths: Sequence[BufferWidths], num_experts: int
) -> BytesOfRanks:
    """Return the bytes of every rank by its own widths, where so many experts have all of a rank's pairs."""
    saves = [
        replace(one, save=one.save if keeps == "hidden" else "input", num_local_experts=num_experts) for one in widths
    ]
    by_widths = {one: bytes_of_ranks(plan, work, one) for one in set(saves)}
    each = [[of[rank] for of in by_widths[one]] for rank, one in enumerate(saves)]
    return BytesOfRanks(*(torch.stack(of) for of in zip(*each, strict=True)))


def _working(keeps: Keeps, found: BytesOfRanks) -> Tensor:
    most = torch.maximum(found.forward, found.backward)
    return most if keeps == "nothing" else most - found.kept


def _parts(found: _Candidate, room: Tensor, words: str) -> Parts:
    return Parts(found.number, found.keeps, tuple(map(int, found.kept.tolist())), tuple(room.tolist()), words)
