"""calls_of_most_time: which calls of a recording a verdict is about: those of one plan and of about one size."""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

from tritonmoe.diagnosis.fits import fit_relative_line
from tritonmoe.diagnosis.recording import RecordedCall, Recording

__all__ = ["calls_of_most_time"]

WARM_UP_CALLS = 1
"""So many first calls of a layer are left out, where there are more than three times as many."""
APART = 2.0
"""Calls are of another size if they have more than so many times the pairs of the next smaller ones: prefill, say."""
OUTLIER = 1.25
"""A call that takes so many times what is usual for its pairs is an outlier ..."""
KEPT_SHARE = 0.7
"""... unless fewer than these calls would be left: then it is what the run is like."""


def calls_of_most_time(
    recording: Recording, times: Mapping[RecordedCall, float]
) -> tuple[list[RecordedCall], list[RecordedCall]]:
    """Give the calls of the plan and size that take most of the time, and all calls of layers of the same sizes.

    Raises:
        ValueError: there is no call.
    """
    if not recording.calls:
        raise ValueError(f"{recording.path}: there is no call that all ranks have recorded")
    seen: dict[int, int] = {}
    calls = []
    for call in recording.calls:
        seen[call.layer] = seen.get(call.layer, 0) + 1
        if seen[call.layer] > WARM_UP_CALLS:
            calls.append(call)
    if len(calls) < 3 * WARM_UP_CALLS * len(seen):
        calls = list(recording.calls)
    groups: dict[tuple, list[RecordedCall]] = {}
    for call in calls:
        groups.setdefault((*_sizes(call), call.plan, call.has_backward), []).append(call)
    parts = [_without_outliers(part, times) for group in groups.values() for part in _parts(group)]
    most = max(parts, key=lambda part: sum(map(times.__getitem__, part)))
    return most, [call for part in parts for call in part if _sizes(call) == _sizes(most[0])]


def _sizes(call: RecordedCall) -> tuple:
    return (*call.sizes.values(), call.row_bytes, call.other_row_bytes)


def _num_pairs(call: RecordedCall) -> float:
    return float(call.work.pairs.sum())


def _parts(calls: Sequence[RecordedCall]) -> Iterator[list[RecordedCall]]:
    """Part calls whose numbers of pairs are far apart; each part is in its order."""
    ordered = sorted(map(_num_pairs, calls))
    bounds = [larger for smaller, larger in pairwise(ordered) if larger > APART * smaller]
    for low, high in pairwise([0.0, *bounds, math.inf]):
        yield [call for call in calls if low <= _num_pairs(call) < high]


def _without_outliers(calls: list[RecordedCall], times: Mapping[RecordedCall, float]) -> list[RecordedCall]:
    """Leave out calls that something else on the machine disturbed, if they are few: their steps tell no costs.

    Those took far longer than a line through all calls gives for as many pairs.
    """
    fixed_s, pair_s = fit_relative_line([(_num_pairs(call), times[call]) for call in calls])
    excess = {call: times[call] / (fixed_s + pair_s * _num_pairs(call) or 1.0) for call in calls}
    limit = OUTLIER * statistics.median(excess.values())
    kept = [call for call in calls if excess[call] <= limit]
    return kept if len(kept) >= KEPT_SHARE * len(calls) else calls
