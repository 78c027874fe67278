"""between_of: what lies between a recording's events: gaps, ranks that come late, what all ranks do at once."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tritonmoe.tools.doctor.recorded_steps import PlacedPass
from tritonmoe.tools.doctor.samples import LEAST_S, far_out

__all__ = ["Between", "between_of"]

MET = 0.8
"""Ranks have met between two passes if the one that ended the first last enters the next by less than that part of its
lateness later."""


@dataclass
class Between:
    """Of every event (R,), in the order of ranks and their times."""

    begin: float
    """When the first rank enters the first pass."""
    start: Tensor
    body_s: Tensor
    """What it takes; where a device is behind the host, what is left when the device has ended the one before."""
    ended: Tensor
    """When the one before it had ended."""
    gap_s: Tensor
    """From there to its start, or where rows are waited for, to the wait; where they are there already all of it."""
    is_bound: Tensor
    """Whether rows are waited for."""
    is_first: Tensor
    """Whether the one before it is of another pass."""
    late_s: Tensor
    """Of a first one: by how much the rank comes later than the others, by what it did itself."""
    common_s: Tensor
    """Of a first one between the pieces of two halves: what all ranks do there, while exchanges of the other half go
    on."""
    pause_s: Tensor
    """Of a first one: what all ranks did together, beyond what is usual."""
    usual_s: Tensor
    """(P,): what all ranks usually do together before a pass, which is of no interest here."""
    meeting_places: list[int]
    """The passes before which ranks wait for each other, in an exchange that is not recorded."""


def between_of(rows: Mapping[str, Tensor], passes: Sequence[PlacedPass], size: int, has_halves: bool) -> Between:
    """Find what lies between events; has_halves: whether those of two passes take turns."""
    begin = float(rows["start"].min())
    start, body_s = rows["start"].clone(), rows["body"].clone()
    ended, is_first = torch.full_like(start, begin), torch.ones_like(start, dtype=torch.bool)
    for own in torch.arange(len(start)).split(rows["rank"].bincount(minlength=size).tolist()):
        place = rows["place"][own]
        is_first[own[1:]] = place[1:] != place[:-1]
        end = start[own] + body_s[own]
        if not has_halves:
            # Of a device behind the host: what the host does before the device has ended a pass costs nothing.
            reached = end.cummax(0).values
            entry = torch.where(is_first[own], torch.arange(len(own)), 0).cummax(0).values
            device = torch.where(entry > 0, reached[(entry - 1).clamp(min=0)], begin)
            start[own] = torch.maximum(start[own], device)
            body_s[own] = torch.where(
                is_first[own] | (start[own] == device), (end - start[own]).clamp(min=0), body_s[own]
            )
            end = torch.maximum(end, start[own])
        ended[own[1:]] = end[:-1]
    began_wait = torch.maximum(start - rows["waited"], ended)
    is_bound = rows["arrived"] > began_wait
    gap_s = (torch.where(is_bound, began_wait, start) - ended).clamp(min=0)
    found = Between(
        begin, start, body_s, ended, gap_s, is_bound, is_first, torch.zeros_like(start),
        torch.zeros_like(start), torch.zeros_like(start), torch.zeros(len(passes), dtype=torch.float64), [],
    )  # fmt: skip
    _tell_apart(found, rows, passes, size, has_halves)
    return found


def _tell_apart(
    found: Between, rows: Mapping[str, Tensor], passes: Sequence[PlacedPass], size: int, has_halves: bool
) -> None:
    """Part what lies before passes into what all ranks do, and by how much each comes later."""
    first = found.is_first.nonzero()[:, 0]
    is_entry = rows["number"][first] == 0
    place, rank = rows["place"][first], rows["rank"][first]
    shape = len(passes), size
    ended, entered = (torch.full(shape, torch.nan, dtype=torch.float64) for _ in range(2))
    ended[place[is_entry], rank[is_entry]] = found.ended[first[is_entry]]
    entered[place[is_entry], rank[is_entry]] = found.start[first[is_entry]]
    meets = torch.zeros(len(passes), dtype=torch.bool) if has_halves else _meets(ended, entered, passes)
    found.meeting_places = meets.nonzero()[:, 0].tolist()
    waited_for = torch.where(meets, ended.amax(1), torch.nan)[:, None]
    own_s = torch.where(meets[:, None], entered - waited_for, (entered - ended).clamp(min=0))
    common_s = own_s.amin(1)
    late = (own_s - common_s[:, None])[place, rank]
    group = place * (int(rows["number"].max()) + 1) + rows["number"][first]
    least = torch.full((int(group.max()) + 1,), torch.inf, dtype=torch.float64)
    least = least.scatter_reduce(0, group, found.gap_s[first], "amin")[group]
    found.late_s[first] = torch.where(is_entry, late, found.gap_s[first] - least)
    found.common_s[first] = torch.where(is_entry, 0.0, least)
    by_work: dict[tuple, list[int]] = defaultdict(list)
    for number, of in enumerate(passes):
        by_work[of.phase, of.layer, of.work, of.call.half].append(number)
    pause_s = torch.zeros(len(passes), dtype=torch.float64)
    for own in by_work.values():
        pause_s[own] = far_out(common_s[own])
    found.usual_s += common_s - pause_s
    found.pause_s[first] = torch.where(is_entry, pause_s[place], 0.0)


def _meets(ended: Tensor, entered: Tensor, passes: Sequence[PlacedPass]) -> Tensor:
    """Say before which passes (P,) ranks wait for each other, as in a barrier or a sum of gradients.

    Where they do, a rank whose previous pass ended late enters the next one with the others.
    """
    behind, late = ended - ended.amin(1, keepdim=True), entered - entered.amin(1, keepdim=True)
    most, last = behind.max(1)
    can = (entered.amin(1) >= ended.amax(1)) & (most > LEAST_S)
    has_met = late.gather(1, last[:, None])[:, 0] < MET * most
    votes: dict[tuple, float] = defaultdict(float)
    names = [(of.phase, of.layer) for of in passes]
    for name, weight, met, possible in zip(names, most.tolist(), has_met.tolist(), can.tolist(), strict=True):
        votes[name] += weight if met and possible else -weight
    return can & torch.tensor([votes[name] > 0 for name in names])
