"""PassSteps: the steps of a recorded pass on one rank, whose times stand in columns with those of its other passes."""

import math
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import chain
from typing import TypeAlias, overload

import torch
from torch import Tensor

from tritonmoe.overlap.report import StepTiming
from tritonmoe.overlap.steps import Step, StepKind

__all__ = [
    "TIMES",
    "Layout",
    "PassSteps",
    "RecordedStep",
    "StepColumns",
    "arrivals_of",
    "layout_of",
    "places_of",
    "times_of",
]

TIMES = ("start_s", "end_s", "wait_s", "post_s", "units", "load_s")
"""The numbers of a step, in the order of its columns; the last four are never negative."""
Moments: TypeAlias = Sequence[float | None]


@dataclass(frozen=True)
class RecordedStep(StepTiming):
    """One step of a pass on one rank, in seconds from the origin of the pass."""

    units: float = 0.0
    """How many of its kind's units it has (steps.Unit); with a capacity those of the room."""


@dataclass(frozen=True, eq=False)
class Layout:
    """Which steps a pass consists of; layout_of() makes one object of equal ones."""

    steps: tuple[Step, ...]
    tell_arrivals: tuple[bool, ...]
    """Of which steps it is known when the rows of every rank had arrived."""
    num_peers: int
    """How many ranks take part in an exchange."""

    def __reduce__(self) -> tuple[object, ...]:
        return layout_of, (self.steps, self.tell_arrivals, self.num_peers)

    @cached_property
    def num_arrivals(self) -> int:
        """How many moments of ranks its steps tell."""
        return self.num_peers * sum(self.tell_arrivals)

    @cached_property
    def kinds(self) -> tuple[StepKind, ...]:
        return tuple(step.kind for step in self.steps)

    @cached_property
    def arrival_rows(self) -> tuple[int, ...]:
        """Of each step, how many of those before it tell arrivals; -1 of one that doesn't."""
        return tuple(sum(self.tell_arrivals[:n]) if tells else -1 for n, tells in enumerate(self.tell_arrivals))

    @cached_property
    def exchanges(self) -> tuple[int, ...]:
        """The places of its exchanges."""
        return tuple(place for place, step in enumerate(self.steps) if step.lane == "comm")


@cache
def layout_of(steps: tuple[Step, ...], tell_arrivals: tuple[bool, ...], num_peers: int) -> Layout:
    """Return the one layout of these steps."""
    return Layout(steps, tell_arrivals, num_peers)


class StepColumns:
    """The numbers of the steps of many passes of one rank, one step behind the other."""

    def __init__(self) -> None:
        self.flat_times, self.flat_arrivals = array("d"), array("d")

    @cached_property
    def times(self) -> Tensor:
        """(N, 6): what TIMES says, of every step."""
        return _tensor(self.flat_times).view(-1, len(TIMES))

    @cached_property
    def arrivals(self) -> Tensor:
        """The moments of all steps that tell them; NaN where a rank's is not known."""
        return _tensor(self.flat_arrivals)

    def add(self, layout: Layout, times: Sequence[Sequence[float]], arrivals: Sequence[Moments]) -> "PassSteps":
        """Add the steps of a pass: the numbers of each, and the moments of those that tell them."""
        found = PassSteps(self, layout, len(self.flat_times) // len(TIMES), len(self.flat_arrivals))
        self.flat_times.extend(chain.from_iterable(times))
        for moments in arrivals:
            self.flat_arrivals.extend([math.nan if at is None else at for at in moments])
        return found

    def take(self, other: "StepColumns") -> tuple[int, int]:
        """Move the numbers of others behind these; return where their steps and their arrivals begin."""
        at = len(self.flat_times) // len(TIMES), len(self.flat_arrivals)
        for into, of in ((self.flat_times, other.flat_times), (self.flat_arrivals, other.flat_arrivals)):
            into.extend(of)
            del of[:]
        return at


def _tensor(numbers: array) -> Tensor:
    if not numbers:
        return torch.zeros(0, dtype=torch.float64, device="cpu")
    return torch.frombuffer(numbers, dtype=torch.float64)


class PassSteps(Sequence[RecordedStep]):
    """The steps of a pass on one rank, in order; a RecordedStep is made where one is asked for."""

    __slots__ = ("arrivals_at", "at", "columns", "layout")
    __hash__ = None  # type: ignore[assignment]  # as of whatever is compared by numbers

    def __init__(self, columns: StepColumns, layout: Layout, at: int, arrivals_at: int) -> None:
        """at, arrivals_at: where its steps begin among those of the columns, and its arrivals."""
        self.columns, self.layout, self.at, self.arrivals_at = columns, layout, at, arrivals_at

    @property
    def times(self) -> Tensor:
        """(S, 6): what TIMES says, of every step."""
        return self.columns.times[self.at : self.at + len(self.layout.steps)]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PassSteps) or self.layout is not other.layout:
            return False
        return torch.equal(self.times, other.times) and torch.equal(self._arrivals, other._arrivals)

    @property
    def _arrivals(self) -> Tensor:
        own = self.columns.arrivals[self.arrivals_at : self.arrivals_at + self.layout.num_arrivals]
        return own.nan_to_num(nan=-1.0)

    def __len__(self) -> int:
        return len(self.layout.steps)

    def __iter__(self) -> Iterator[RecordedStep]:
        for step, numbers in zip(self.layout.steps, self.times.tolist(), strict=True):
            start_s, end_s, wait_s, post_s, units, load_s = numbers
            yield RecordedStep(step, start_s, end_s, wait_s, post_s, units=units, load_s=load_s)

    @overload
    def __getitem__(self, place: int) -> RecordedStep: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[RecordedStep]: ...
    def __getitem__(self, place: int | slice) -> RecordedStep | Sequence[RecordedStep]:
        return list(self)[place]


def places_of(passes: Sequence[PassSteps], steps: Sequence[Step]) -> list[list[int]]:
    """Return the places of these steps in a pass on every rank, or once where they are the same on all."""
    layouts = {one.layout for one in passes}
    of_layouts = {layout: [layout.steps.index(step) for step in steps] for layout in layouts}
    if len(layouts) == 1:
        return list(of_layouts.values())
    return [of_layouts[one.layout] for one in passes]


def times_of(passes: Sequence[PassSteps], places: Sequence[Sequence[int]]) -> Tensor:
    """Return (Q, X, 6): what TIMES says of X of the steps of each of Q passes.

    places: the steps of each pass, or once what is the same of all.
    """
    which = _indices(places).expand(len(passes), -1)

    def found(columns: StepColumns, own: Sequence[int] | slice, at: Tensor) -> Tensor:
        return columns.times[at + which[own]]

    return _of_columns(passes, [one.at for one in passes], found)


def arrivals_of(passes: Sequence[PassSteps], places: Sequence[Sequence[int]]) -> Tensor:
    """Return (Q, X, P): when the rows of every rank had arrived in X of the steps; where none tells it, the end.

    places: as of times_of().
    """
    peers = torch.arange(passes[0].layout.num_peers, device="cpu")
    rows = _indices([[one.layout.arrival_rows[n] for n in of] for one, of in zip(passes, places, strict=False)])
    rows = rows.expand(len(passes), -1)
    ends = times_of(passes, places)[:, :, 1:2].expand(-1, -1, len(peers))
    tells = (rows >= 0)[:, :, None]
    if not bool(tells.any()):
        return ends

    def found(columns: StepColumns, own: Sequence[int] | slice, at: Tensor) -> Tensor:
        moments = columns.arrivals
        if not len(moments):
            return ends[own].new_full((len(at), rows.shape[1], len(peers)), torch.nan)
        which = (at + rows[own].clamp(min=0) * len(peers))[:, :, None] + peers
        return moments[which.clamp(max=len(moments) - 1)]  # a pass that tells none may stand at the end

    return torch.where(tells, _of_columns(passes, [one.arrivals_at for one in passes], found), ends)


def _of_columns(
    passes: Sequence[PassSteps],
    at: Sequence[int],
    found: Callable[[StepColumns, Sequence[int] | slice, Tensor], Tensor],
) -> Tensor:
    """Return what is found of passes, which as a rule stand in the same columns, from these places (Q,) on."""
    first, places = passes[0].columns, _indices(at)[:, None]
    if all(one.columns is first for one in passes):
        return found(first, slice(None), places)
    of_columns: dict[int, list[int]] = {}
    for number, one in enumerate(passes):
        of_columns.setdefault(id(one.columns), []).append(number)
    parts = torch.cat([found(passes[own[0]].columns, own, places[own]) for own in of_columns.values()])
    return parts[_indices([number for own in of_columns.values() for number in own]).argsort()]


def _indices(values: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device="cpu")
