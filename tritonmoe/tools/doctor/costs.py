"""fit_costs: what the steps and exchanges of recorded calls cost on each rank, from what they took at every size.

A step takes `slowness of its rank * (fixed + unit * units)`, and longer where it runs beside an exchange.
"""

import functools
import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from tritonmoe.config.overlap import OverlapPlan
from tritonmoe.overlap.report import covered_s
from tritonmoe.overlap.simulation.cost_model import LayerWork, LinkCosts, StepCosts, step_units
from tritonmoe.overlap.steps import Step, StepKind, Unit
from tritonmoe.tools.doctor.link_fit import LinkRatios, fit_links
from tritonmoe.tools.doctor.messages import KEPT_PASSES
from tritonmoe.tools.doctor.samples import ALIKE, fit_relative_line, weighted_median
from tritonmoe.tools.recording.call_recording import RecordedCall, RecordedPass, Recording
from tritonmoe.tools.recording.pass_steps import RecordedStep

__all__ = ["Costs", "fit_costs"]

DISTURBED = 1.25
"""Of two or three calls one whose step takes so many times as long as in the middle one tells no cost."""
ROUNDS = 6
"""So often slowness of ranks and lines through their steps are fitted in turn."""
SMALLEST_SLOWNESS = 1.05
"""A rank that is slower by less than this is taken for as fast as the others."""
CONTENTIONS = tuple(step / 50 for step in range(31))
"""The shares of its speed that compute may lose beside an exchange, of which the one that fits best is taken ..."""
MISFIT = 0.01
"""... where steps are so far off their lines without any ..."""
SMALLEST_CONTENTION = 0.06
EXPLAINED = 0.5
"""... if it leaves at most this share of the squared error that there is without any."""


@dataclass(frozen=True)
class Costs:
    """What steps and exchanges cost in a recording."""

    steps: StepCosts
    link: LinkCosts
    ratios: LinkRatios
    slowness: tuple[float, ...]
    """How many times as long as the others each rank takes for its experts."""
    gap_s: float
    """What lies between two steps: the executor's own time."""
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Sample:
    """One step of one rank: what it took in the mean of the calls in which it had so many units.

    The longest of every eight are left out of the mean, of two or three those that are far longer than the middle one,
    or the shorter one: one disturbed call would be half of what is known of a size. Times have long tails, which the
    steps of a call share out among themselves: the sum of their medians would be less than the median of their sums.
    """

    kind: StepKind
    rank: int
    units: float
    seconds: float
    beside_s: float
    """For how long of them an exchange was under way."""

    def by(self, slowness: Sequence[float], contention: float) -> tuple[float, float]:
        """Return the units, and what they would take on a rank like the others, with no exchange beside them."""
        seconds = self.seconds - contention * self.beside_s
        return self.units, seconds / (slowness[self.rank] if self.kind.unit is Unit.PAIRS else 1.0)


def fit_costs(calls: Sequence[RecordedCall], recording: Recording) -> Costs:
    """Find what steps and exchanges cost, by some of the recording's calls, whose layers have the same sizes."""
    notes: list[str] = []
    size = len(calls[0].ranks)
    by_kind: dict[StepKind, list[_Sample]] = defaultdict(list)
    for sample in sorted(_samples(calls), key=lambda s: (str(s.kind), s.rank)):
        by_kind[sample.kind].append(sample)
    of_pairs = {kind: of for kind, of in by_kind.items() if kind.unit is Unit.PAIRS}
    slowness = _slowness(of_pairs, size)
    link, ratios, link_notes = fit_links(calls, recording)
    # Where it is not known when rows arrived, exchanges seem to last as long as the compute that hides them.
    contention = _contention(of_pairs, slowness) if ratios.are_told_apart else 0.0
    if contention:
        slowness = _slowness(of_pairs, size, contention)
    lines = _lines(by_kind, slowness, contention)
    sizes = [s.units for s in by_kind.get(StepKind.EXPERTS, [])]
    if sizes and max(sizes) < ALIKE * min(sizes):
        notes.append(
            "all steps of the experts had about the same number of pairs: the fixed cost of a step is not "
            "known, and counts as 0"
        )
    of_ranks = torch.tensor(slowness, dtype=torch.float64, device="cpu")
    steps = StepCosts(
        {str(kind): fixed for kind, (fixed, _) in lines.items()},
        {str(kind): unit for kind, (_, unit) in lines.items()},
        slowness={str(kind): of_ranks for kind in StepKind if kind.unit is Unit.PAIRS},
    )
    gaps = [gap for call in calls for number in range(len(call.by_pass)) for gap in _gaps_of(call, number)]
    link = replace(link, contention=contention)
    return Costs(steps, link, ratios, slowness, statistics.median(gaps), tuple(notes) + link_notes)


@functools.lru_cache(maxsize=KEPT_PASSES)
def _gaps_of(call: RecordedCall, number: int) -> list[float]:
    """Return the time between two steps of a pass on each rank."""
    steps = [(one, _leaves(one)) for one in call.by_pass[number]]
    return [
        max(0.0, one.total_s - sum(step.wait_s + step.held_s for step in own)) / max(1, len(own)) for one, own in steps
    ]


def _leaves(one: RecordedPass) -> list[RecordedStep]:
    """Return the steps of a pass, and instead of one that has steps inside its node those."""
    if not one.steps_inside:
        return list(one.steps)
    outer = {(step.step.kind, step.step.chunk) for step in one.steps_inside if not step.step.kind.is_inside_node}
    return [step for step in one.steps if (step.step.kind, step.step.chunk) not in outer] + list(one.steps_inside)


def _samples(calls: Sequence[RecordedCall]) -> list[_Sample]:
    found: dict[tuple, list[tuple[float, float, float]]] = {}
    plans: dict[OverlapPlan, int] = {}
    for call in calls:
        plan = plans.setdefault(call.plan, len(plans))
        for number in range(len(call.by_pass)):
            for key, value in _steps_of(call, number):
                found.setdefault((plan, key), []).append(value)
    samples = []
    for (_, (kind, _, rank, _)), values in found.items():
        ordered = sorted(values, key=lambda value: value[1])
        limit = DISTURBED * ordered[(len(values) - 1) // 2][1]
        few = [value for value in ordered if value[1] <= limit]
        kept = few if len(values) < 4 else ordered[: len(values) - len(values) // 8]
        samples.append(_Sample(StepKind.named(kind), rank, *map(statistics.fmean, zip(*kept, strict=True))))
    return samples


@functools.lru_cache(maxsize=KEPT_PASSES)
def _steps_of(call: RecordedCall, number: int) -> list[tuple[tuple, tuple[float, float, float]]]:
    """Return a pass's steps that have work: what they have in common with others, and what _Sample has of each.

    Steps with other numbers of units have that in common if they differ by little. A step inside a node costs what its
    twin between nodes does.
    """
    passes = [of.passes[number] for of in call.ranks]
    last_posted: dict[Step, float] = {}
    for one in passes:
        for step in one.steps:
            if step.step.lane == "comm":
                posted = one.origin + step.start_s + step.post_s
                last_posted[step.step] = max(posted, last_posted.get(step.step, posted))
    filled = call.filled.tolist()
    found = []
    for rank, one in enumerate(passes):
        # Rows are under way when the last rank has posted them, and exchanges take turns.
        under_way = [
            (max(step.start_s + step.post_s, last_posted[step.step] - one.origin), step.end_s)
            for step in one.steps
            if step.step.lane == "comm"
        ]
        for step in _leaves(one):
            if call.levels is not None and step.step.kind.is_inside_node:
                work = call.levels.inside(call.plan, step.step.chunk)
                step = replace(step, units=_units_inside(work, step.step.kind.twin, rank))
            elif call.plan.capacity is not None and step.step.kind.unit is Unit.PAIRS:  # experts skip the padding
                step = replace(step, units=step.units * filled[rank])
            if step.units > 0:
                is_computed = step.step.lane == "compute"
                beside_s = covered_s(under_way, step.start_s, step.end_s) if is_computed else 0.0
                key = (step.step.kind.twin.value, step.step.chunk, rank, round(8 * math.log2(step.units)))
                found.append((key, (step.units, step.held_s - step.load_s, beside_s)))
    return found


def _units_inside(work: LayerWork, twin: StepKind, rank: int) -> float:
    """Return the units of a step inside a node, by the work of its chunk there."""
    sizes = [[of[rank]] for of in (work.rows.sum(1), work.rows.sum(0), work.pairs.sum(0))]
    return float(step_units(Step(twin, None), 0, *sizes))


_ByKind = Mapping[StepKind, Sequence[_Sample]]


def _lines(by_kind: _ByKind, slowness: Sequence[float], contention: float) -> dict[StepKind, tuple[float, float]]:
    """Return (fixed, unit) seconds by kind of step."""
    points = {kind: [s.by(slowness, contention) for s in of] for kind, of in by_kind.items()}
    return {kind: _of_same_sum(fit_relative_line(of), of) for kind, of in points.items()}


def _of_same_sum(line: tuple[float, float], points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return the line whose sum over all points is theirs: relative errors alone let it lie below noisy points."""
    fixed, unit = line
    expected = sum(fixed + unit * units for units, _ in points)
    share = sum(seconds for _, seconds in points) / expected if expected else 1.0
    return fixed * share, unit * share


def _slowness(of_pairs: _ByKind, size: int, contention: float = 0.0) -> tuple[float, ...]:
    """Return how many times as long as the others each rank takes.

    Only steps that compute pairs tell it: what packing and summing cost is small, and noisy.
    """
    slowness = [1.0] * size
    for _ in range(ROUNDS):
        ratios: list[list[tuple[float, float]]] = [[] for _ in range(size)]
        for kind, (fixed, unit) in _lines(of_pairs, slowness, contention).items():
            for s in of_pairs[kind]:
                expected = fixed + unit * s.units
                if expected > 0:
                    ratios[s.rank].append(((s.seconds - contention * s.beside_s) / expected, s.seconds))
        found = [weighted_median(of) if of else 1.0 for of in ratios]
        typical = statistics.median_low(found)
        slowness = [value / typical for value in found]
    return tuple(value if value > SMALLEST_SLOWNESS else 1.0 for value in slowness)


def _contention(of_pairs: _ByKind, slowness: Sequence[float]) -> float:
    """Return the share of its speed that compute loses beside an exchange, 0 unless that explains what steps take."""

    def error(contention: float) -> float:
        total = 0.0
        for kind, (fixed, unit) in _lines(of_pairs, slowness, contention).items():
            for s in of_pairs[kind]:
                units, seconds = s.by(slowness, contention)
                total += (fixed + unit * units - seconds) ** 2
        return total

    without = error(0.0)
    if without <= MISFIT**2 * sum(s.seconds**2 for of in of_pairs.values() for s in of):
        return 0.0  # steps of one size, all of them beside exchanges, fit any of these
    best = min(CONTENTIONS, key=error)
    return best if best >= SMALLEST_CONTENTION and error(best) <= EXPLAINED * without else 0.0
