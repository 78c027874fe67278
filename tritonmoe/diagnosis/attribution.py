"""Attribution: what a recorded step would gain if one cause were gone; the step is walked again without it.

Causes overlap: without a slow link the experts may be what everybody waits for. So gains don't add up, and what all of
them gain together is a figure of its own.
"""

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tritonmoe.diagnosis.advice import proposals
from tritonmoe.diagnosis.causes import Cause, CauseKind, causes_of
from tritonmoe.diagnosis.chosen_calls import calls_of_most_time
from tritonmoe.diagnosis.costs import Costs, fit_costs
from tritonmoe.diagnosis.recording import RecordedCall, Recording
from tritonmoe.diagnosis.replay import Conditions, conditions_of, measured_s, passes_before, walk

__all__ = ["Advice", "Attribution", "Finding", "Gain", "attribute"]

PART_OF: dict[CauseKind, CauseKind] = {"slow link": "bandwidth", "slow port": "bandwidth", "late link": "latency"}
"""Where one of these is found it stands before what it is a part of."""
SMALLEST_SHARE = 0.08
"""A cause that costs a smaller share of the step is not spoken of."""
SMALLEST_ADVICE = 0.03
"""Advice that gains a smaller share is not given."""
MOST_ERROR = 0.10
"""A replay that is further off than this explains nothing."""
NUM_SELECTIONS = 16
"""So many selections of the calls, drawn with replacement, give the intervals."""
INTERVAL = 0.8
MOST_WALKED = 4
"""So many calls are walked without each cause, spread over the layers, and over the recording."""
WALKED_OF_SELECTION = 2
MOST_REPLAYED = 32
"""So many are walked as they were, to see how far off the walk is."""
FEW_CALLS = 3
"""Selections of fewer calls than that are too much alike to tell how certain a gain is."""


@dataclass(frozen=True)
class Gain:
    """How much shorter the step is without something."""

    seconds: float
    low_s: float
    """The interval that holds 80 % of what selections of the calls give."""
    high_s: float

    def share(self, step_s: float) -> float:
        return self.seconds / step_s if step_s else 0.0


@dataclass(frozen=True)
class Finding:
    """A cause, and what it costs."""

    kind: CauseKind
    ranks: tuple[int, ...]
    """The ranks at fault, the worst first; of a slow link sender and receiver."""
    words: str
    gain: Gain
    is_certain: bool
    """Whether it gains more than nothing in the whole interval."""


@dataclass(frozen=True)
class Advice:
    """Something that would help."""

    words: str
    costs: str
    """What it costs, beside the work of doing it; empty where nothing is known."""
    gain: Gain


@dataclass(frozen=True)
class Attribution:
    """Why the step of a recording takes as long as it does."""

    recording: Recording
    call: RecordedCall
    """One of those that it is about."""
    calls: tuple[RecordedCall, ...]
    """All of those."""
    num_calls: int
    """How many calls it is about: those of one plan and size that take most of the time."""
    measured_s: float
    """The median of what they took."""
    replayed_s: float
    """What the walk gives for that: as much more or less as it gives, in the median, for each call itself."""
    costs: Costs
    findings: tuple[Finding, ...]
    """The causes that cost enough to be spoken of, by their gain; bandwidth and latency last where a link is named."""
    others: tuple[Finding, ...]
    """The rest, and what the experts compute, which is the bound itself."""
    advice: tuple[Advice, ...]
    """What would help, by its gain."""
    together: Gain
    """Without all causes, the experts' work as it is."""
    misfits: tuple[str, ...]
    """If the replay is off: what doesn't fit."""
    notes: tuple[str, ...]

    @property
    def error(self) -> float:
        """The relative error of the replay."""
        return self.replayed_s / self.measured_s - 1 if self.measured_s else 0.0

    @property
    def is_explained(self) -> bool:
        return abs(self.error) <= MOST_ERROR

    @property
    def is_healthy(self) -> bool:
        return self.is_explained and not self.findings


def attribute(recording: Recording, seed: int = 0) -> Attribution:
    """Find what a recorded step would gain without each cause.

    Raises:
        ValueError: there is no call that all ranks have recorded, or only on one rank, or of halves of a batch.
    """
    if recording.size < 2:
        raise ValueError(f"{recording.path} is of one rank: there is no exchange that anything could be due to")
    if any(call.half for call in recording.calls):
        raise ValueError(
            f"{recording.path} is of two_batches, in which the times of each half hold the other one's work: record a "
            "run of whole batches"
        )
    before = passes_before(recording)
    times = {call: measured_s(call, before) for call in recording.calls}
    calls, similar = calls_of_most_time(recording, times)
    walked = _spread(sorted(calls, key=lambda call: call.layer), MOST_WALKED)
    costs = fit_costs(similar, recording)
    measured = statistics.median(map(times.__getitem__, calls))
    conditions = [conditions_of(call, before, costs) for call in walked]
    as_it_was = _walked(conditions)
    replayed = measured * statistics.median(
        _ratio(walk(conditions_of(call, before, costs)).total_s, times[call]) for call in _spread(calls, MOST_REPLAYED)
    )
    causes = list(causes_of(calls, costs, before))
    shares = [_gained(as_it_was, cause.remove) for cause in causes]
    promised = [(one, _gained(as_it_was, one.change)) for one in proposals(calls, conditions[0], before)]
    promised = [(one, share) for one, share in promised if share * replayed >= SMALLEST_ADVICE * measured]
    together = _gained(as_it_was, _all_of([cause for cause in causes if cause.kind != "expert compute"]))
    drawn: list[list[float]] = [[] for _ in (*causes, None)]
    drawn_promises: list[list[float]] = [[] for _ in promised]
    draw = random.Random(seed)
    chosen = set(calls)
    rest = [call for call in similar if call not in chosen]
    for _ in range(NUM_SELECTIONS):
        selection = draw.choices(calls, k=len(calls))
        own = fit_costs([*selection, *rest], recording)
        two = _spread(selection, WALKED_OF_SELECTION)
        few_as_they_were = _walked([conditions_of(call, before, own) for call in two])
        again = {cause.key: cause for cause in causes_of(selection, own, before)}
        for cause, values in zip(causes, drawn, strict=False):
            # A cause that the selection doesn't show gains nothing there.
            same = again.get(cause.key)
            values.append(0.0 if same is None else _gained(few_as_they_were, same.remove))
        for (proposal, _), values in zip(promised, drawn_promises, strict=True):
            values.append(_gained(few_as_they_were, proposal.change))
        drawn[-1].append(
            _gained(few_as_they_were, _all_of([cause for cause in again.values() if cause.kind != "expert compute"]))
        )
    found = [
        Finding(cause.kind, cause.ranks, cause.words, gain, gain.low_s > 0)
        for cause, share, values in zip(causes, shares, drawn, strict=False)
        for gain in (_interval(share, values, replayed),)
    ]
    spoken = [one for one in found if _is_spoken_of(one, measured)]
    named = {PART_OF[one.kind] for one in spoken if one.kind in PART_OF}
    spoken.sort(key=lambda one: (one.kind in named, -one.gain.seconds))
    advice = [
        Advice(proposal.words, proposal.costs, _interval(share, values, replayed))
        for (proposal, share), values in zip(promised, drawn_promises, strict=True)
    ]
    advice += [Advice(_mend(one), "", one.gain) for one in spoken if one.kind in _MENDING]
    few = [f"how much calls differ is not known of so few ({len(calls)}): record 20"] if len(calls) < FEW_CALLS else []
    helps = [one for one in advice if one.gain.low_s > 0 and one.gain.seconds >= SMALLEST_ADVICE * measured]
    others = sorted((one for one in found if one not in spoken), key=lambda one: -one.gain.seconds)
    return Attribution(
        recording=recording,
        call=walked[0],
        calls=tuple(calls),
        num_calls=len(calls),
        measured_s=measured,
        replayed_s=replayed,
        costs=costs,
        findings=tuple(spoken),
        others=tuple(others),
        advice=tuple(sorted(helps, key=lambda one: -one.gain.seconds)),
        together=_interval(together, drawn[-1], replayed),
        misfits=_misfits(walked, conditions, MISFIT_SHARE * measured),
        notes=(*few, *costs.notes, *recording.notes, f"{len(similar)} of {len(recording.calls)} calls are looked at"),
    )


_MENDING: dict[CauseKind, str] = {
    "slow link": "mend the link from rank {} to rank {}",
    "late link": "find what holds up messages from rank {} to rank {}",
    "slow port": "mend the port of rank {}",
    "slow rank": "mend rank {}, or leave it out",
    "late rank": "find what holds up rank {} before the layer",
}


def _mend(one: Finding) -> str:
    return _MENDING[one.kind].format(*one.ranks)


def _is_spoken_of(one: Finding, measured: float) -> bool:
    if one.kind == "expert compute":
        return False
    return one.is_certain and one.gain.seconds >= max(SMALLEST_SHARE * measured, (one.gain.high_s - one.gain.low_s) / 2)


def _spread(calls: Sequence[RecordedCall], count: int) -> list[RecordedCall]:
    """Give so many calls, evenly spread."""
    if len(calls) <= count:
        return list(calls)
    return [calls[(2 * n + 1) * len(calls) // (2 * count)] for n in range(count)]


_Walked = Sequence[tuple[Conditions, float]]
"""Conditions of calls, and what their walks take."""


def _walked(conditions: Sequence[Conditions]) -> _Walked:
    return [(of, walk(of).total_s) for of in conditions]


def _gained(as_it_was: _Walked, remove: Callable[[Conditions], Conditions]) -> float:
    """Give the share of a call that is gained without something: batches may differ in their length."""
    return statistics.median(_ratio(total_s - walk(remove(of)).total_s, total_s) for of, total_s in as_it_was)


def _ratio(seconds: float, to_s: float) -> float:
    return seconds / to_s if to_s else 0.0


def _interval(share: float, drawn: Sequence[float], step_s: float) -> Gain:
    ordered = sorted(drawn)
    aside = int(len(ordered) * (1 - INTERVAL) / 2)
    low, high = min(ordered[aside], share), max(ordered[-1 - aside], share)
    return Gain(share * step_s, low * step_s, high * step_s)


def _all_of(causes: Sequence[Cause]) -> Callable[[Conditions], Conditions]:
    def remove(of: Conditions) -> Conditions:
        for cause in causes:
            of = cause.remove(of)
        return of

    return remove


MISFIT_SHARE = 0.03
PASSES = ("all of the forward", "all of the backward")


def _misfits(calls: Sequence[RecordedCall], conditions: Sequence[Conditions], least_s: float) -> tuple[str, ...]:
    """Say which kinds of steps, or waits, take another share of the step than in the walk, the largest first."""
    recorded: dict[str, list[float]] = {}
    walked: dict[str, list[float]] = {}
    size = len(calls[0].ranks)
    for call, of in zip(calls, conditions, strict=True):
        sums: dict[str, float] = {}
        for rank in call.ranks:
            for name, one in zip(PASSES, rank.passes, strict=False):
                sums[name] = sums.get(name, 0.0) + one.total_s
                for step in one.steps:
                    is_exchange = step.step.lane == "comm"
                    kind = f"waiting for {step.step.kind}" if is_exchange else str(step.step.kind)
                    sums[kind] = sums.get(kind, 0.0) + (step.wait_s if is_exchange else step.end_s - step.start_s)
        for kind, seconds in sums.items():
            recorded.setdefault(kind, []).append(seconds / size)
        sums = {}
        for name, simulation in zip(PASSES, walk(of).passes, strict=False):
            sums[name] = float((simulation.end_s - simulation.steps[0].start_s).mean())
            for simulated in simulation.steps:
                is_exchange = simulated.wait_s is not None
                kind = f"waiting for {simulated.step.kind}" if is_exchange else str(simulated.step.kind)
                spent = simulated.wait_s if simulated.wait_s is not None else simulated.end_s - simulated.start_s
                sums[kind] = sums.get(kind, 0.0) + float(spent.mean())
        for kind, seconds in sums.items():
            walked.setdefault(kind, []).append(seconds)
    off = {
        kind: (statistics.median(times), statistics.median(walked.get(kind, [0.0]))) for kind, times in recorded.items()
    }
    ordered = sorted(off.items(), key=lambda item: -abs(item[1][0] - item[1][1]))
    return tuple(
        f"{kind}: {1e3 * was:.1f} ms recorded, {1e3 * is_now:.1f} ms in the replay"
        for kind, (was, is_now) in ordered[:3]
        if abs(was - is_now) > least_s
    )
