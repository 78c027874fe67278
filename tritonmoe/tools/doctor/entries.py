"""Entries: how the ranks of a recording came to each pass, and which pass they came from."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from tritonmoe.tools.recording.call_recording import RecordedCall, RecordedPass, Recording

__all__ = ["Entry", "PassesBefore", "entries_of", "measured_s", "most_entered", "passes_before"]

MET_SHARE = 0.8
"""Ranks have waited for each other between two passes if one is later by less than this share of what it was before."""

PassesBefore = Mapping[tuple[int, int], tuple[RecordedCall, int]]
"""By the number of a call, and of its pass (0 of a forward, 1 of a backward): the call and pass before it."""


@dataclass(frozen=True)
class Entry:
    """How all ranks come to the first step of a pass; all of it (W,) seconds."""

    own_s: Tensor
    """How much later than the others each rank enters, for a reason of its own."""
    passed_on_s: Tensor
    """How much later it enters because its previous pass ended late: charged to that pass, not to the rank."""
    follows: int
    """The number of the pass before: 0 of a forward, 1 of a backward, of this call or another one."""
    before_counts_s: Tensor
    """From entering to sending its counts."""
    counts_s: Tensor
    """From the last rank's sending until it has everybody's."""
    before_steps_s: Tensor
    """From there to its first step."""
    meets: bool
    """Whether ranks wait for each other's counts."""


def passes_before(recording: Recording) -> PassesBefore:
    """Return for each pass the one before it, of any call, where that was over on all ranks when they entered this one.

    In a stack of layers that is the next layer's backward, or with activation checkpointing a recompute.
    """
    passes = [(call, number) for call in recording.calls for number in range(len(call.by_pass))]
    passes.sort(key=lambda one: one[0].by_pass[one[1]][0].entered)
    found = {}
    for (before, number_before), (after, number) in pairwise(passes):
        of_ranks = zip(before.by_pass[number_before], after.by_pass[number], strict=True)
        if all(one.end <= other.entered for one, other in of_ranks):
            found[after.sequence, number] = before, number_before
    return found


def measured_s(call: RecordedCall, before: PassesBefore) -> float:
    """Return what walk() predicts, as it was recorded."""
    total_s = 0.0
    for passes, entry in zip(call.by_pass, entries_of(call, before), strict=True):
        entered = torch.tensor([one.entered for one in passes], dtype=torch.float64, device="cpu")
        total_s += max(one.end for one in passes) - float(most_entered(entered)) - float(entry.passed_on_s.max())
    return total_s


def entries_of(call: RecordedCall, before: PassesBefore) -> tuple[Entry, ...]:
    entries = []
    for number, passes in enumerate(call.by_pass):
        other, follows = before.get((call.sequence, number), (None, 0))
        entries.append(_entry_of(passes, follows, None if other is None else other.by_pass[follows]))
    return tuple(entries)


def _entry_of(passes: Sequence[RecordedPass], follows: int, ended: Sequence[RecordedPass] | None) -> Entry:
    """Return how ranks came to a pass; `ended` is the pass before, whose number is `follows`."""

    def of_ranks(values: Iterable[float]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.float64, device="cpu")

    entered = of_ranks(one.entered for one in passes)
    late_s = entered - most_entered(entered)
    own_s = late_s.clamp(min=0)
    if ended is not None:
        end = of_ranks(one.end for one in ended)
        pause_s = entered - end
        behind_s = torch.minimum(own_s, (pause_s - most_entered(pause_s)).clamp(min=0))
        # A rank that had been later still has met the others since: its lateness is new.
        has_met = late_s < MET_SHARE * (end - most_entered(end))
        own_s = torch.where(has_met, own_s, behind_s)
    passed_on_s = late_s.clamp(min=0) - own_s
    marks = [one.marks for one in passes]
    origins = of_ranks(one.origin for one in passes)
    nothing = torch.zeros_like(origins)
    if any(mark is None for mark in marks):
        return Entry(own_s, passed_on_s, follows, nothing, nothing, origins - entered, False)
    posted = of_ranks(mark.counts_posted for mark in marks if mark is not None)
    left = of_ranks(mark.counts_left for mark in marks if mark is not None)
    counts_s = (left - posted.max()).clamp(min=0)
    # A rank that is early, not late, is held up by the others.
    own_s = torch.where(late_s < 0, late_s, own_s)
    return Entry(own_s, passed_on_s, follows, posted - entered, counts_s, origins - left, True)


def most_entered(moments: Tensor) -> Tensor:
    """Return the moment from which lateness counts: of an even number of ranks the earlier one in the middle."""
    return moments.median()
