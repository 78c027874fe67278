"""When each step of one layer call ran on one rank, as plain spans that every kind of report draws."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tritonmoe.overlap.report import LayerReport, PassReport, StepTiming
from tritonmoe.overlap.simulation.simulator import SimulatedStep, Simulation
from tritonmoe.runtime.files import Json

__all__ = [
    "LANES",
    "NODE",
    "PassTimeline",
    "Span",
    "Timeline",
    "layer_timeline",
    "pass_timeline",
    "simulated_timeline",
    "spans_of",
]

NODE = "node"
"""The lane of what steps of two levels do inside the node: exchanges and computation, one after the other."""
LANES = ("compute", "comm", NODE)


@dataclass(frozen=True)
class Span:
    """One step on one lane, in seconds."""

    name: str
    """The name of the step in the schedule: "dispatch 1", "experts local", "weight_grad", "node_dispatch 1"."""
    kind: str
    chunk: int | None
    lane: str
    start_s: float
    """For an exchange: when the lane turned to it, which is when the exchange before it had ended."""
    end_s: float
    posted_s: float
    """When the step was issued; for a step on the compute lane that is its start."""
    half: int = 0
    """Which half of a batch in two_batches the step is of, 1 or 2; 0 for a whole batch."""
    load_s: float = 0.0
    """For how long of it products waited for experts that are read from a file."""

    def shifted(self, offset_s: float) -> "Span":
        """Return the same span so many seconds later."""
        return replace(
            self,
            start_s=self.start_s + offset_s,
            end_s=self.end_s + offset_s,
            posted_s=self.posted_s + offset_s,
        )


@dataclass(frozen=True)
class PassTimeline:
    """One pass; its spans count from its own start."""

    spans: tuple[Span, ...]
    total_s: float


@dataclass(frozen=True)
class Timeline:
    """The forward and the backward of one layer call on one rank, drawn one after the other."""

    name: str
    rank: int
    forward: PassTimeline
    backward: PassTimeline

    @staticmethod
    def of_plain(plain: Json) -> "Timeline":
        """Return the timeline whose dataclasses.asdict() this is, or what is left of it as JSON."""
        passes = {
            which: PassTimeline(tuple(Span(**span) for span in plain[which]["spans"]), plain[which]["total_s"])
            for which in ("forward", "backward")
        }
        return Timeline(plain["name"], plain["rank"], **passes)

    @property
    def total_s(self) -> float:
        return self.forward.total_s + self.backward.total_s

    @property
    def lanes(self) -> tuple[str, ...]:
        """The lanes that are drawn: compute and comm, and the node's where there are two levels."""
        return tuple(lane for lane in LANES if lane != NODE or any(span.lane == NODE for span in self.spans))

    @property
    def spans(self) -> list[Span]:
        """The spans of both passes, from the start of the forward."""
        offset_s = self.forward.total_s
        return [*self.forward.spans, *(span.shifted(offset_s) for span in self.backward.spans)]


def pass_timeline(report: PassReport) -> PassTimeline:
    """Return the steps of one pass, lane by lane, each lane in the order of time and without overlaps.

    An exchange is posted early and then stands in the queue of its link: its span begins where the one before ended.
    """
    return PassTimeline(spans_of(report.steps, report.steps_inside), report.total_s)


def _halves_timeline(reports: Sequence[PassReport]) -> PassTimeline:
    """Return the steps of both halves' passes, the first half's first, on one time line."""
    first, second = reports
    second_s = second.seconds_behind(first)
    starts_s = max(0.0, -second_s), max(0.0, second_s)
    marked = []
    for half, (report, start_s) in enumerate(zip(reports, starts_s, strict=True), 1):
        spans = spans_of(report.steps, report.steps_inside)
        marked += [replace(span.shifted(start_s), half=half, name=f"{span.name} of half {half}") for span in spans]
    ended_s = max(report.total_s + start_s for report, start_s in zip(reports, starts_s, strict=True))
    return PassTimeline(_without_overlaps(marked), ended_s)


def _without_overlaps(spans: Sequence[Span]) -> tuple[Span, ...]:
    """Return spans lane by lane, in the order in which they were posted, each behind the end of the one before."""
    placed = []
    for lane in LANES:
        reached_s = 0.0
        for span in sorted((span for span in spans if span.lane == lane), key=lambda span: span.posted_s):
            start_s = max(span.posted_s, reached_s)
            # A small exchange may arrive just before the one that it was posted after: it is shown as a point.
            reached_s = max(start_s, span.end_s)
            placed.append(replace(span, start_s=start_s, end_s=reached_s))
    return tuple(placed)


def spans_of(steps: Sequence[StepTiming], inside: Sequence[StepTiming]) -> tuple[Span, ...]:
    """Return the spans of steps, lane by lane; inside: of those that they do inside the node."""
    lanes = [*((timing.step.lane, timing) for timing in steps), *((NODE, timing) for timing in inside)]
    return _without_overlaps(
        [
            Span(
                *(str(of.step), str(of.step.kind), of.step.chunk, lane, of.start_s, of.end_s, of.start_s),
                load_s=of.load_s,
            )
            for lane, of in lanes
        ]
    )


def simulated_timeline(name: str, rank: int, passes: Sequence[Simulation]) -> Timeline:
    """Return the timeline of a simulated forward and, where it was simulated, backward on one rank."""
    timelines = []
    for simulation in passes:
        inside = [step for outer in simulation.steps for step in outer.inside]
        spans = spans_of(_timings(simulation.steps, rank), _timings(inside, rank))
        timelines.append(PassTimeline(spans, float(simulation.end_s[rank])))
    return Timeline(name, rank, *[*timelines, PassTimeline((), 0.0)][:2])


def _timings(steps: Sequence[SimulatedStep], rank: int) -> list[StepTiming]:
    return [StepTiming(one.step, float(one.start_s[rank]), float(one.end_s[rank]), 0.0) for one in steps]


def layer_timeline(name: str, report: LayerReport) -> Timeline:
    """Return the timeline of a layer's last call, in two_batches of both halves; its backward may be empty."""
    first = report.first_half
    if first is not None:
        backward = PassTimeline((), 0.0)
        if first.backward is not None and report.backward is not None:
            backward = _halves_timeline([first.backward, report.backward])
        return Timeline(name, report.rank, _halves_timeline([first.forward, report.forward]), backward)
    backward = PassTimeline((), 0.0) if report.backward is None else pass_timeline(report.backward)
    return Timeline(name, report.rank, pass_timeline(report.forward), backward)
