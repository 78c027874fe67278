"""What the charts of an HTML report show, in shares of their width and height; the page's template draws them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from tritonmoe.report.figures import UNITS, Cell, Table

__all__ = ["Curve", "Curves", "Heat", "Segment", "Strip", "Strips", "ticks"]

NUM_SHADES = 8
"""Of a heat map; the lightest is just above its base, the darkest of the largest value."""


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


@dataclass(frozen=True)
class Strips:
    """Strips to one scale, above the table of their numbers."""

    kind: ClassVar = "strips"
    title: str
    strips: Sequence[Strip]
    ticks: Sequence[tuple[float, str]]
    legend: Sequence[tuple[str, str]]
    """(color, meaning)."""
    table: Table


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
    def cell_height(self) -> float:
        """Pixels."""
        return max(6, min(28, 448 // max(1, len(self.values))))

    @property
    def shades(self) -> list[tuple[int, str]]:
        """Give (shade, path of all its cells), where cells are 1 wide and high."""
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
        """Give (middle of the cell as a share of all, name), at most 16."""
        every = math.ceil(len(names) / 16)
        return [((n + 0.5) / len(names), name) for n, name in enumerate(names) if n % every == 0]


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
        """Give the points in a box of 1000 by 1000."""
        return " ".join(f"{1000 * self.x_share(x):.1f},{1000 * (1 - y / self.top):.1f}" for x, y in curve.points)

    def band(self, curve: Curve) -> str:
        """Give the intervals' outline there."""
        xs = [x for x, _ in curve.points]
        low, high = zip(*curve.intervals, strict=True)
        edges = [*zip(xs, high, strict=True), *reversed(list(zip(xs, low, strict=True)))]
        return self.line(Curve(curve.name, edges))

    @property
    def y_ticks(self) -> list[tuple[float, str]]:
        """Give (share of the height from the top, text)."""
        return [(1 - share, text) for share, text in ticks(self.top)]


def ticks(top: float, unit: str = "", most: int = 6) -> list[tuple[float, str]]:
    """Give at most `most` round numbers from 0 to `top`: (share of top, text with the unit)."""
    if not top > 0:
        return []
    step = 10.0 ** math.floor(math.log10(top / most))
    step *= next(factor for factor in (1, 2, 5, 10, 20) if top / (factor * step) < most)
    return [(n * step / top, f"{n * step:,.6g}{unit}") for n in range(int(top / step) + 1)]
