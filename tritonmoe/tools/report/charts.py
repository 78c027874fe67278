"""What the charts of an HTML report show, in shares of their width and height; the page's template draws them."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from tritonmoe.tools.report.figures import UNITS, Cell, Table
from tritonmoe.tools.report.png import COLORS, group_of
from tritonmoe.tools.report.timeline import Timeline

__all__ = [
    *("Bars", "Curve", "Curves", "Heat", "MOST_SPANS", "Segment", "Strip", "Strips", "compact", "lanes_chart"),
    *("ranks_within", "ticks"),
]

NUM_SHADES = 8
"""Of a heat map; the lightest is just above its base, the darkest of the largest value."""
MOST_CELL, LEAST_CELL, CELLS_WIDTH = 40.0, 4.0, 960.0
"""Pixels: cells of a heat map are square."""
LEAST_NUMBER_CELL = 14.0
"""A smaller cell has no room for a number."""
MOST_NAMES, LETTER = 16, 6.4
"""So many rows and columns are named; pixels of a letter."""
MOST_TITLED = 60
"""A strip of more segments is drawn as one path of each color, without their titles."""
MOST_TICKS = 6


@dataclass(frozen=True)
class Segment:
    """A piece of a strip, in shares of the chart's width."""

    start: float
    width: float
    color: str
    """A class of the page's style, or "mark" for a moment without a width."""
    title: str = ""


@dataclass(frozen=True)
class Strip:
    """One line of a chart: a bar, a stack of bars, a lane."""

    label: str
    segments: Sequence[Segment]
    text: Cell = ""
    """The strip's number."""
    interval: tuple[float, float] | None = None
    heading: str = ""
    """What stands above this strip and those that follow it."""

    @property
    def paths(self) -> list[tuple[str, str]]:
        """Return (color, path of all its segments) in a box of 1000 by 14, where there are too many to name each."""
        if len(self.segments) <= MOST_TITLED:
            return []
        by_color: dict[str, list[str]] = {}
        for one in self.segments:
            piece = f"M{1000 * one.start:.1f} 0h{1000 * one.width:.1f}v14h{-1000 * one.width:.1f}z"
            by_color.setdefault(one.color, []).append(piece)
        return [(color, "".join(pieces)) for color, pieces in by_color.items()]


@dataclass(frozen=True)
class Strips:
    """Strips to one scale, above the table of their numbers."""

    kind: ClassVar = "strips"
    title: str
    strips: Sequence[Strip]
    ticks: Sequence[tuple[float, str]]
    legend: Sequence[tuple[str, str]]
    """(color, meaning)."""
    table: Table | None
    """None where the section has it already, or another chart."""


@dataclass(frozen=True)
class Heat:
    """A matrix of the page's JSON as shaded cells, above the table of its numbers; None where nothing is known."""

    kind: ClassVar = "heat"
    title: str
    key: str
    values: Sequence[Sequence[float | None]]
    unit: str
    row: str
    """What a row stands for: "rank"."""
    column: str
    row_names: Sequence[str]
    column_names: Sequence[str]
    picked: tuple[Sequence[int], Sequence[int]] | None = None
    """The rows and columns of the JSON's matrix that are shown, where it is not all."""
    base: float = 0.0
    """The value of an empty cell."""
    table: Table | None = None
    """What stands below instead of the matrix itself."""

    @property
    def largest(self) -> float:
        return max((value for row in self.values for value in row if value is not None), default=self.base)

    @property
    def cell(self) -> float:
        """The pixels of a cell, as wide as high."""
        return max(LEAST_CELL, min(MOST_CELL, CELLS_WIDTH // max(1, len(self.column_names))))

    @property
    def left(self) -> float:
        """The pixels that names of rows need."""
        return 10 + LETTER * max((len(name) for name in self.row_names), default=0)

    @property
    def is_upright(self) -> bool:
        """Whether names of columns are too long to stand side by side."""
        every = math.ceil(len(self.column_names) / MOST_NAMES)
        return LETTER * max((len(name) for name in self.column_names), default=0) > every * self.cell - 3

    @property
    def below(self) -> float:
        """The pixels that they need."""
        return 10 + LETTER * max(map(len, self.column_names)) if self.is_upright else 18.0

    @property
    def scale(self) -> tuple[float, str]:
        """Return what the numbers in cells are divided by, and how they are called: (0.001, "ms")."""
        if self.unit != "s":
            return 1.0, {"times": "multiples", "count": "counts", "share": "shares"}.get(self.unit, self.unit)
        scales = (1.0, "seconds"), (1e-3, "ms")
        return next((scale for scale in scales if self.largest >= 2 * scale[0]), (1e-6, "us"))

    @property
    def numbers(self) -> list[tuple[int, int, str, bool]]:
        """Return (row, column, number, whether the cell is dark) of every cell that has room for it."""
        if self.cell < LEAST_NUMBER_CELL:
            return []
        shade = (self.largest - self.base) / 2
        return [
            (i, k, text, value - self.base > shade)
            for i, row in enumerate(self.values)
            for k, value in enumerate(row)
            if value is not None and (text := compact(value / self.scale[0]))
        ]

    @property
    def shades(self) -> list[tuple[int, str]]:
        """Return (shade, path of all its cells), where cells are 1 wide and high."""
        paths: dict[int, list[str]] = {}
        for i, row in enumerate(self.values):
            for k, value in enumerate(row):
                if value is not None and value > self.base:
                    shade = math.ceil(NUM_SHADES * (value - self.base) / (self.largest - self.base))
                    paths.setdefault(shade, []).append(f"M{k} {i}h1v1h-1z")
        return [(shade, "".join(path)) for shade, path in sorted(paths.items())]

    def said(self, value: float | None) -> str:
        return "-" if value is None else UNITS[self.unit](value)

    def ticks(self, names: Sequence[str]) -> list[tuple[float, str]]:
        """Return (middle of the cell as a share of all, name), at most MOST_NAMES."""
        every = math.ceil(len(names) / MOST_NAMES)
        return [((n + 0.5) / len(names), name) for n, name in enumerate(names) if n % every == 0]


@dataclass(frozen=True)
class Bars:
    """Upright bars side by side, above the table of their numbers; they start at 0."""

    kind: ClassVar = "bars"
    title: str
    x: str
    y: str
    names: Sequence[str]
    values: Sequence[float]
    colors: Sequence[str]
    line: float
    """A value that all are compared with, drawn across."""
    legend: Sequence[tuple[str, str]]
    table: Table

    @property
    def top(self) -> float:
        return max(self.values, default=0.0) * 1.05 or 1.0

    @property
    def paths(self) -> list[tuple[str, str]]:
        """Return (color, path of all bars of that color) in a box of 1000 by 1000."""
        by_color: dict[str, list[str]] = {}
        width = 1000 / max(1, len(self.values))
        for n, (value, color) in enumerate(zip(self.values, self.colors, strict=True)):
            height, room = 1000 * value / self.top, min(0.15 * width, 6.0)
            left, wide = width * n + room / 2, width - room
            by_color.setdefault(color, []).append(f"M{left:.2f} 1000v{-height:.1f}h{wide:.2f}V1000z")
        return [(color, "".join(path)) for color, path in by_color.items()]

    @property
    def x_ticks(self) -> list[tuple[float, str]]:
        every = math.ceil(len(self.names) / 12) or 1
        return [((n + 0.5) / len(self.names), name) for n, name in enumerate(self.names) if n % every == 0]

    @property
    def y_ticks(self) -> list[tuple[float, str]]:
        """Return (share of the height from the top, text)."""
        return [(1 - share, text) for share, text in ticks(self.top)]


@dataclass(frozen=True)
class Curve:
    """One line of a chart: points, and an interval around each where it is known."""

    name: str
    points: Sequence[tuple[float, float]]
    intervals: Sequence[tuple[float, float]] = ()


@dataclass(frozen=True)
class Curves:
    """Lines over one axis whose places are evenly apart, above the table of their numbers; y starts at 0."""

    kind: ClassVar = "curves"
    title: str
    x: str
    y: str
    curves: Sequence[Curve]
    table: Table | None
    """None where the section has it already, or a chart below."""

    @property
    def places(self) -> list[float]:
        return sorted({x for curve in self.curves for x, _ in curve.points})

    @property
    def top(self) -> float:
        """The end of the y axis."""
        values = [y for curve in self.curves for _, y in curve.points]
        values += [high for curve in self.curves for _, high in curve.intervals]
        return max(values, default=0.0) * 1.05 or 1.0

    def x_share(self, x: float) -> float:
        return (self.places.index(x) + 0.5) / len(self.places)

    def line(self, curve: Curve) -> str:
        """Return the points in a box of 1000 by 1000."""
        return " ".join(f"{1000 * self.x_share(x):.1f},{1000 * (1 - y / self.top):.1f}" for x, y in curve.points)

    def band(self, curve: Curve) -> str:
        """Return the intervals' outline there."""
        xs = [x for x, _ in curve.points]
        low, high = zip(*curve.intervals, strict=True)
        edges = [*zip(xs, high, strict=True), *reversed(list(zip(xs, low, strict=True)))]
        return self.line(Curve(curve.name, edges))

    @property
    def y_ticks(self) -> list[tuple[float, str]]:
        """Return (share of the height from the top, text)."""
        return [(1 - share, text) for share, text in ticks(self.top)]


def compact(value: float) -> str:
    """Return a number in at most four characters, "" for none: 0.4, 12, 340, 1.2k, 15k, 3.4M."""
    if round(abs(value), 1) == 0:
        return ""
    for factor, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, "")):
        if abs(value) >= 0.9995 * factor:
            scaled = value / factor
            return f"{scaled:.0f}{letter}" if abs(scaled) >= 9.95 else f"{scaled:.1f}".removesuffix(".0") + letter
    return f"{value:.1f}"


def ticks(top: float, unit: str = "") -> list[tuple[float, str]]:
    """Return at most six round numbers from 0 to `top`: (share of top, text with the unit)."""
    if not top > 0:
        return []
    step = 10.0 ** math.floor(math.log10(top / MOST_TICKS))
    step *= next(factor for factor in (1, 2, 5, 10, 20) if top / (factor * step) < MOST_TICKS)
    return [(n * step / top, f"{n * step:,.6g}{unit}") for n in range(int(top / step) + 1)]


MOST_SPANS = 3000
"""A page draws so many steps, and has them in its trace ..."""
MOST_RANKS = 16
"""... of so many ranks."""
CLASSES = {name: f"c{number}" for number, name in enumerate(COLORS)}
Marks = Mapping[str, float]
"""What a mark means, and its second on the timeline."""


def ranks_within(
    runs: Mapping[str, Sequence[Timeline]], most: int = MOST_SPANS, first: Iterable[int] = ()
) -> list[int]:
    """Return the ranks to draw, with at most `most` steps but at least one rank; `first` before the others."""
    size = max(map(len, runs.values()))
    order = list(dict.fromkeys([*first, *range(size)]))
    chosen: list[int] = []
    used = 0
    for rank in order:
        used += sum(len(timelines[rank].spans) for timelines in runs.values())
        if chosen and (used > most or len(chosen) == MOST_RANKS):
            break
        chosen.append(rank)
    return sorted(chosen)


def lanes_chart(
    title: str,
    runs: Mapping[str, Sequence[Timeline]],
    table: Table,
    marks: Mapping[int, Marks] | None = None,
) -> Strips:
    """Draw every rank's lanes, one run below the other, all to one scale.

    runs: name of a run -> timelines of the same ranks, in the same order.
    marks: rank -> marks, which stand on its first run's compute lane.
    """
    longest_s = max((one.total_s for timelines in runs.values() for one in timelines), default=0.0) or 1.0
    ranks = [one.rank for one in next(iter(runs.values()))]
    strips = []
    for number, rank in enumerate(ranks):
        for name, timelines in runs.items():
            timeline = timelines[number]
            heading = f"rank {rank}, {name}" if len(runs) > 1 else f"rank {rank}"
            for lane in timeline.lanes:
                segments = list(_segments(timeline, lane, longest_s))
                if marks is not None and name == next(iter(runs)) and lane == "compute":
                    segments += [
                        Segment(at / longest_s, 0.0, "mark", f"{word}: {1e3 * at:.3g} ms")
                        for word, at in marks[rank].items()
                    ]
                strips.append(Strip(lane, segments, heading=heading))
                heading = ""
    axis = ticks(1e3 * longest_s, " ms")
    return Strips(title, strips, axis, [(CLASSES[name], name) for name in COLORS], table)


def _segments(timeline: Timeline, lane: str, longest_s: float) -> Iterator[Segment]:
    for span in timeline.spans:
        width = (span.end_s - span.start_s) / longest_s
        if span.lane == lane and width >= 5e-5:  # one that rounds to nothing would look like a mark
            title = f"{span.name}: {1e3 * (span.end_s - span.start_s):.3g} ms"
            yield Segment(span.start_s / longest_s, width, CLASSES[group_of(span)], title)
