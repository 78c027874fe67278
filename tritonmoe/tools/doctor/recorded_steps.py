"""What the passes of a recording are: in which step of the training, of which layer, and what each of them does."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from tritonmoe.config.overlap import OverlapPlan
from tritonmoe.overlap.schedule import build_inside
from tritonmoe.overlap.steps import StepKind
from tritonmoe.tools.recording.call_recording import RecordedCall, RecordedPass, Recording
from tritonmoe.tools.recording.schedules import inside_of, schedule_of

__all__ = ["COUNTS", "Event", "Events", "PlacedPass", "events_of", "placed_passes"]

COUNTS = "counts"
"""The event of a pass in which its ranks exchange their counts."""
WARM = 1.25
"""A first step is one of warming up if it takes so many times as long as those after it do."""
FEW_STEPS = 4
APART = 2.0
"""Steps have other work if they have more than so many times the pairs of the next smaller ones: prefill, say."""


@dataclass(frozen=True)
class PlacedPass:
    """A pass of a call, and where it belongs."""

    call: RecordedCall
    number: int
    """0 of a forward, 1 of a backward."""
    layer: int
    step: int
    work: int
    """Steps of one number have the same layers, plans and about as many pairs."""

    @property
    def phase(self) -> str:
        if self.number:
            return "backward"
        return "backward recompute" if self.call.is_recompute else "forward"

    @property
    def of_ranks(self) -> tuple[RecordedPass, ...]:
        return self.call.by_pass[self.number]


def placed_passes(recording: Recording) -> tuple[list[PlacedPass], list[str]]:
    """Return the passes in the order of their times, and what is to be known: which steps are left aside, and why.

    A step goes once over all layers, forward and backward: it begins with the forward of a layer that it has had.
    """
    passes = [(call, number) for call in recording.calls for number in range(len(call.by_pass))]
    passes.sort(key=lambda one: min(of.entered for of in one[0].by_pass[one[1]]))
    layers = _layers_of(passes)
    steps: list[list[tuple[RecordedCall, int, int]]] = []
    seen: set[tuple[int, int]] = set()
    for call, number in passes:
        layer = layers[call.sequence]
        if number == 0 and not call.is_recompute:
            if not steps or ((layer, call.half) in seen and call.part <= 1):
                steps.append([])
                seen = set()
            seen.add((layer, call.half))
        elif not steps:
            steps.append([])
        steps[-1].append((call, number, layer))
    works = _works_of(steps)
    aside, notes = _aside(steps, works)
    return [
        PlacedPass(call, number, layer, index, work)
        for index, (of_step, work) in enumerate(zip(steps[aside:], works[aside:], strict=True))
        for call, number, layer in of_step
    ], notes


def _layers_of(passes: Sequence[tuple[RecordedCall, int]]) -> dict[int, int]:
    """Return the layer of every call: that of a function, which has no number, is how many calls are open before it."""
    found: dict[int, int] = {}
    open_calls: list[RecordedCall] = []
    recomputes = any(call.is_recompute for call, _ in passes)
    for call, number in passes:
        if call.layer >= 0:
            found[call.sequence] = call.layer
        elif number == 1:
            open_calls = [other for other in open_calls if found[other.sequence] != found[call.sequence]]
        elif (call.is_recompute or call.part > 1) and open_calls:
            found[call.sequence] = found[open_calls[-1].sequence]
        else:
            found[call.sequence] = len({found[other.sequence] for other in open_calls if other.half == call.half})
            if call.has_backward or recomputes:
                open_calls.append(call)
    return found


def _works_of(steps: Sequence[Sequence[tuple[RecordedCall, int, int]]]) -> list[int]:
    """Number what steps do: their layers, passes, plans, sizes, and about how many pairs they have."""
    kinds = [
        tuple(
            dict.fromkeys(
                (layer, number, call.is_recompute, call.plan, call.half, *call.sizes.values())
                for call, number, layer in of_step
            )
        )
        for of_step in steps
    ]
    pairs = [_num_pairs(of_step) for of_step in steps]
    bounds: dict[tuple, list[float]] = {}
    for kind in set(kinds):
        ordered = sorted(own for own, of in zip(pairs, kinds, strict=True) if of == kind)
        larger = [high for low, high in pairwise(ordered) if high > APART * low]
        bounds[kind] = [0.0, *larger]
    numbers: dict[tuple, int] = {}
    found = []
    for kind, own in zip(kinds, pairs, strict=True):
        part = sum(own >= bound for bound in bounds[kind])
        found.append(numbers.setdefault((kind, part), len(numbers)))
    return found


def _aside(steps: Sequence[Sequence[tuple[RecordedCall, int, int]]], works: Sequence[int]) -> tuple[int, list[str]]:
    """Return how many first steps are left aside, in which a program warms up: a quarter of the steps at most."""
    times = [_seconds(of_step) / max(1.0, _num_pairs(of_step)) for of_step in steps]
    aside, times_as_long = 0, 1.0
    for first in range(len(steps) // FEW_STEPS):
        others = sorted(
            time for time, work in zip(times[first + 1 :], works[first + 1 :], strict=True) if work == works[first]
        )
        if len(others) < FEW_STEPS - 1 or times[first] <= WARM * others[-2]:  # of the others one may be an accident
            break
        aside, times_as_long = first + 1, times[first] / others[len(others) // 2]
    if aside:
        which = "the first step, which takes" if aside == 1 else f"the first {aside} steps, which take at least"
        return aside, [
            f"{which} {times_as_long:.1f} times as long as later ones, {'is' if aside == 1 else 'are'} left out "
            "(warm-up)"
        ]
    return 0, []


def _num_pairs(of_step: Sequence[tuple[RecordedCall, int, int]]) -> float:
    return float(sum(sum(of.pairs) for call, number, _ in of_step if not number for of in call.ranks))


def _seconds(of_step: Sequence[tuple[RecordedCall, int, int]]) -> float:
    return sum(max(one.end - one.entered for one in call.by_pass[number]) for call, number, _ in of_step)


@dataclass(frozen=True)
class Event:
    """Something that a rank does in a pass."""

    name: str
    """The kind of step, counts, plan (from having everybody's counts to the first step), or end."""
    chunk: int | None
    kind: StepKind | None
    place: int
    """Of its step in RecordedPass.steps, or in steps_inside; -1: none."""
    is_inside: bool
    waits: tuple[int, ...]
    """The exchanges that end before it."""
    posts: int
    """The exchange that it posts; -1: none."""


@dataclass(frozen=True)
class Events:
    """What a rank does in a pass, in order."""

    events: tuple[Event, ...]
    exchanges: tuple[int, ...]
    """The event that posts each."""


def events_of(plan: OverlapPlan, one: RecordedPass) -> Events:
    """Return what a pass consists of, with its count exchange, if it began with one."""
    return _events_of(plan, one.steps.layout.kinds, bool(one.steps_inside), one.marks is not None)


@lru_cache(maxsize=1024)
def _events_of(plan: OverlapPlan, kinds: tuple[StepKind, ...], has_inside: bool, has_counts: bool) -> Events:
    events: list[Event] = []
    exchanges: list[int] = []

    def add(
        name: str, chunk: int | None, kind: StepKind | None, place: int, waits: list[int], is_inside: bool = False
    ) -> int:
        posts = -1
        if name == COUNTS or (kind is not None and kind.lane == "comm"):
            posts = len(exchanges)
            exchanges.append(len(events))
        events.append(Event(name, chunk, kind, place, is_inside, tuple(waits), posts))
        return posts

    if has_counts:
        counts = add(COUNTS, None, None, -1, [])
        add("plan", None, None, -1, [counts])
    schedule = schedule_of(plan, list(kinds))
    needs_x = bool(inside_of(schedule)) and StepKind.DISPATCH_BACKWARD in kinds
    under_way: dict[int, int] = {}
    left: list[int] = []
    place_inside = 0
    for place, step in enumerate(schedule):
        waits = [*left, *(under_way.pop(earlier) for earlier in step.after if earlier in under_way)]
        left = []
        inside = build_inside(step, needs_x=needs_x) if has_inside else ()
        if not inside:
            posts = add(str(step.kind), step.chunk, step.kind, place, waits)
            if posts >= 0:
                under_way[place] = posts
            continue
        under_way_inside: dict[int, int] = {}
        for number, own in enumerate(inside):
            waits += [under_way_inside.pop(earlier) for earlier in own.after if earlier in under_way_inside]
            posts = add(str(own.kind), own.chunk, own.kind, place_inside, waits, is_inside=True)
            if posts >= 0:
                under_way_inside[number] = posts
            waits = []
            place_inside += 1
        left = list(under_way_inside.values())
    add("end", None, None, -1, [*left, *under_way.values()])
    return Events(tuple(events), tuple(exchanges))
