"""RankColumns: one rank's file of a recording, checked, in columns that go quickly from process to process."""

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TypeAlias

from tritonmoe.config.overlap import OverlapPlan
from tritonmoe.dispatch.count_exchange import CallMarks
from tritonmoe.runtime.files import Json
from tritonmoe.tools.recording.call_recording import RankCall, RecordedPass
from tritonmoe.tools.recording.pass_steps import Layout, PassSteps, StepColumns

__all__ = ["Agreed", "CallLine", "RankColumns"]

Agreed: TypeAlias = tuple[int, bool, int, int, OverlapPlan, int, int, int, int, Mapping[str, int]]
"""What all ranks must say alike of a call: the fields of RecordedCall from `layer` to `sizes`."""


class CallLine(NamedTuple):
    """A call as one rank's file has it, times by the rank's own clock."""

    path: Path
    number: int
    """Of the line."""
    agreed: Agreed
    call: RankCall
    ran_twice: bool
    """Whether rows of some rank didn't fit into a capacity; then it is the second run."""

    @property
    def where(self) -> str:
        return f"{self.path} line {self.number}"


_Shape: TypeAlias = tuple[bool, Layout, Layout]
"""What a pass consists of: whether it has marks, its steps, and those inside a node."""


class _Line(NamedTuple):
    """What stands in no column of a line."""

    sequence: int
    number: int
    agreed: Agreed
    ran_twice: bool
    widths: tuple[int, ...]
    """How many numbers rows, pairs, pairs_per_expert and, on two levels, rows_to_nodes have."""
    load_balance_loss_weight: float | None
    passes: tuple[_Shape, ...]


@cache
def _shape(has_marks: bool, steps: Layout, steps_inside: Layout) -> _Shape:
    """Return one object for all passes of one shape."""
    return has_marks, steps, steps_inside


def _no_counts() -> array:
    return array("q")


def _no_moments() -> array:
    return array("d")


@dataclass
class RankColumns:
    """What one rank has recorded, checked by itself."""

    path: Path
    header: Json
    rank: int
    size: int
    notes: list[str]
    """What is left out of it."""
    steps: StepColumns = field(default_factory=StepColumns)
    lines: list[_Line] = field(default_factory=list)
    counts: array = field(default_factory=_no_counts)
    moments: array = field(default_factory=_no_moments)
    """Of each pass its marks, where it has some, its origin and how long it took."""

    def add(self, line: CallLine, sequence: int) -> None:
        """Add a line, whose steps are in `steps` already."""
        call, widths = line.call, []
        for counts in (call.rows, call.pairs, call.pairs_per_expert, call.rows_to_nodes):
            if counts is not None:
                self.counts.extend(counts)
                widths.append(len(counts))
        for one in call.passes:
            self.moments.extend((*(one.marks or ()), one.origin, one.total_s))
        weight = call.load_balance_loss_weight
        shapes = tuple(_shape(one.marks is not None, one.steps.layout, one.steps_inside.layout) for one in call.passes)
        self.lines.append(_Line(sequence, line.number, line.agreed, line.ran_twice, tuple(widths), weight, shapes))

    def calls(self, steps: StepColumns, at: tuple[int, int]) -> dict[int, CallLine]:
        """Return its calls by their numbers; of one that ran twice the second run.

        steps: the columns that its steps stand in by now; at: what take() gave for them.
        """
        read, counted = _Passes(self.moments, steps, *at), 0
        found: dict[int, CallLine] = {}
        for line in self.lines:
            counts: list[Sequence[int]] = []
            for width in line.widths:
                counts.append(self.counts[counted : counted + width])
                counted += width
            rows, pairs, of_experts, *to_nodes = counts
            forward, *backward = [read.next(shape) for shape in line.passes]
            whole = backward[0] if backward else None, to_nodes[0] if to_nodes else None
            call = RankCall(rows, pairs, of_experts, forward, *whole, line.load_balance_loss_weight)
            found[line.sequence] = CallLine(self.path, line.number, line.agreed, call, line.ran_twice)
        return found


class _Passes:
    """The passes of a file, in the order of its lines."""

    def __init__(self, moments: array, steps: StepColumns, at: int, arrivals_at: int) -> None:
        self.moments, self.steps, self.at, self.arrivals_at = iter(moments), steps, at, arrivals_at

    def next(self, shape: _Shape) -> RecordedPass:
        has_marks, steps, steps_inside = shape
        marks = CallMarks(*islice(self.moments, len(CallMarks._fields))) if has_marks else None
        origin, total_s = next(self.moments), next(self.moments)
        return RecordedPass(marks, origin, total_s, self._steps(steps), self._steps(steps_inside))

    def _steps(self, layout: Layout) -> PassSteps:
        found = PassSteps(self.steps, layout, self.at, self.arrivals_at)
        self.at += len(layout.steps)
        self.arrivals_at += layout.num_arrivals
        return found
