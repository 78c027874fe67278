"""Advice: changes of a run that the walk says would make its step shorter, and what each of them costs."""

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from tritonmoe.tools.doctor.attribution import Cost
from tritonmoe.tools.doctor.conditions import Conditions, conditions_of, measured_s, passes_before, walk
from tritonmoe.tools.doctor.costs import Costs, fit_costs
from tritonmoe.tools.doctor.proposals import Proposal, proposals
from tritonmoe.tools.recording.call_recording import RecordedCall, Recording

__all__ = ["Advice", "advice_on"]

SMALLEST_SHARE = 0.03
"""Advice that gains a smaller share is not given."""
MOST_ERROR = 0.10
"""Calls that the walk is further off than this give no advice."""
MOST_WALKED = 6
"""So many calls are walked with each change, spread over layers and over the recording."""
NUM_SELECTIONS = 5
"""So many selections of the calls, drawn with replacement, tell how certain costs are ..."""
WALKED_OF_SELECTION = 2
NUM_DRAWN = 200
"""... and so many how much calls differ."""
INTERVAL = 0.8
FEW_CALLS = 3


@dataclass(frozen=True)
class Advice:
    """Something that would help."""

    words: str
    costs: str
    """What it costs, beside the work of doing it; empty where nothing is known."""
    gain: Cost
    """Seconds of a step."""


def advice_on(
    recording: Recording, calls: Sequence[RecordedCall], costs: Costs, step_s: float, exposed_s: float
) -> list[Advice]:
    """Return what would help in a recording, whose calls like these take step_s in a step; each gain is above zero.

    calls: those that the costs were fitted to.
    exposed_s: what a step would save if rows travelled in no time. Costs that are fitted to noise may promise more.
    """
    if any(call.half for call in calls):
        return []  # the times of each half hold the other one's work
    before = passes_before(recording)
    walked = _spread(sorted(calls, key=lambda call: call.layer), MOST_WALKED)
    conditions = [conditions_of(call, before, costs) for call in walked]
    was_s = [walk(of).total_s for of in conditions]
    errors = [was / max(1e-9, measured_s(call, before)) - 1 for call, was in zip(walked, was_s, strict=True)]
    if abs(statistics.median(errors)) > MOST_ERROR:
        return []
    draw = random.Random(0)
    selections = []
    for _ in range(NUM_SELECTIONS if len(calls) >= FEW_CALLS else 0):
        selection = draw.choices(calls, k=len(calls))
        own = fit_costs(selection, recording)
        few = [conditions_of(call, before, own) for call in _spread(selection, WALKED_OF_SELECTION)]
        selections.append([(of, walk(of).total_s) for of in few])
    found = []
    for proposal in proposals(calls, conditions[0], before):
        shares = [_gained(of, was, proposal) for of, was in zip(conditions, was_s, strict=True)]
        if statistics.fmean(shares) < SMALLEST_SHARE:
            continue
        by_costs = [statistics.fmean(_gained(of, was, proposal) for of, was in own) for own in selections]
        means = [statistics.fmean(draw.choices(shares, k=len(shares))) for _ in range(NUM_DRAWN)]
        # What is not known of the costs, and what differs from call to call, both move the gain.
        aside = statistics.fmean(by_costs) if by_costs else 0.0
        drawn = sorted(mean + (draw.choice(by_costs) - aside if by_costs else 0.0) for mean in means)
        out = int(NUM_DRAWN * (1 - INTERVAL) / 2)
        most_s = exposed_s if proposal.sends_less else float("inf")
        gain = Cost(*(min(share * step_s, most_s) for share in (statistics.fmean(shares), drawn[out], drawn[-1 - out])))
        if gain.low_s > 0 and gain.seconds >= SMALLEST_SHARE * step_s:
            found.append(Advice(proposal.words, proposal.costs, gain))
    return sorted(found, key=lambda one: -one.gain.seconds)


def _gained(of: Conditions, was_s: float, proposal: Proposal) -> float:
    return (was_s - walk(proposal.change(of)).total_s) / was_s if was_s else 0.0


def _spread(calls: Sequence[RecordedCall], count: int) -> list[RecordedCall]:
    """Return so many calls, evenly spread."""
    if len(calls) <= count:
        return list(calls)
    return [calls[(2 * n + 1) * len(calls) // (2 * count)] for n in range(count)]
