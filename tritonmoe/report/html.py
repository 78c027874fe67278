"""A report as one HTML page that needs no network: tables, and charts in SVG, of numbers that it holds as JSON."""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, ClassVar

from tritonmoe.runtime.files import Json, write_whole

__all__ = [
    "Block",
    "Cell",
    "Curve",
    "Curves",
    "Figures",
    "Heat",
    "Line",
    "Number",
    "Page",
    "Section",
    "Segment",
    "Strip",
    "Strips",
    "Table",
    "Words",
    "page_text",
    "ticks",
    "write_page",
]

NUM_SHADES = 8
"""Of a heat map; the lightest is of zero, the darkest of the largest value."""
MOST_OPEN_ROWS = 16
"""A longer table below a chart is folded; on paper all are shown."""


def _significant(value: float, digits: int = 3) -> str:
    """Give so many digits, never as a power of ten: 1,234 and 12.3 and 0.00123."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    decimals = digits - 1 - math.floor(math.log10(abs(value)))
    return f"{value:,.{min(9, max(0, decimals))}f}"


def _seconds(value: float) -> str:
    if abs(value) < 1e-10:
        return "0 ms"
    if abs(value) < 1e-4:
        return f"{_significant(value * 1e6)} us"
    return f"{_significant(value * 1e3)} ms"


UNITS = {
    "s": _seconds,
    "ms": lambda value: _seconds(value / 1e3),
    "share": lambda value: f"{round(100 * value, 1) + 0.0:.1f} %",  # never -0.0
    "bytes/s": lambda value: f"{_significant(value / 1e9)} GB/s",
    "GB": lambda value: f"{_significant(value)} GB",
    "$": lambda value: f"{value:.4f} $",
    "times": lambda value: f"{value:.2f} x",
    "count": lambda value: f"{value:,.0f}",
    "plain": lambda value: f"{value:g}",
}
"""Unit of a number in JSON -> how a reader sees it, with a unit."""


@dataclass(frozen=True)
class Number:
    """A number of the page's JSON."""

    key: str
    """Where it stands there: "0/findings/1/gain_s"."""
    value: float
    unit: str
    """A key of UNITS."""

    @property
    def text(self) -> str:
        return UNITS[self.unit](self.value)

    def __str__(self) -> str:
        return self.text


Cell = str | Number
Line = str | Sequence[Cell]
"""A sentence, whole or in pieces."""


class Figures:
    """The JSON of a page, whose numbers are taken out by key: so a page can't show what its JSON doesn't have."""

    def __init__(self, data: Json | list[Json]) -> None:
        self.data = data

    def at(self, key: str) -> Any:
        """Give what stands at a key. Raises KeyError, IndexError or ValueError where there is nothing."""
        found: Any = self.data
        for name in key.split("/"):
            found = found[int(name)] if isinstance(found, list) else found[name]
        return found

    def __call__(self, key: str, unit: str) -> Number:
        return Number(key, self.at(key), unit)


@dataclass(frozen=True)
class Words:
    """A paragraph, or a list of several."""

    kind: ClassVar = "words"
    lines: Sequence[Line]


@dataclass(frozen=True)
class Table:
    """Rows below a header; the first cell of a row names it."""

    kind: ClassVar = "table"
    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    title: str = "The numbers"

    @property
    def word_columns(self) -> set[int]:
        """Those that hold words, not numbers: aligned at their left."""
        return {n for row in self.rows for n, cell in enumerate(row) if isinstance(cell, str) and cell[:1].isalpha()}

    @property
    def is_open(self) -> bool:
        return len(self.rows) <= MOST_OPEN_ROWS


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


Block = Words | Table | Strips | Heat | Curves


@dataclass(frozen=True)
class Section:
    """A heading, and what stands below it."""

    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Page:
    """A report."""

    title: str
    summary: Sequence[Line]
    sections: Sequence[Section]
    data: Json | list[Json]
    """The JSON with all numbers that are shown."""
    trace: Json | None = None
    """What chrome_trace gives; the page offers it as a file."""


def ticks(top: float, unit: str = "", most: int = 6) -> list[tuple[float, str]]:
    """Give at most `most` round numbers from 0 to `top`: (share of top, text with the unit)."""
    if not top > 0:
        return []
    step = 10.0 ** math.floor(math.log10(top / most))
    step *= next(factor for factor in (1, 2, 5, 10, 20) if top / (factor * step) < most)
    return [(n * step / top, f"{n * step:,.6g}{unit}") for n in range(int(top / step) + 1)]


def page_text(page: Page) -> str:
    """Give the page as HTML. Raises ImportError where jinja2 is missing, ValueError for NaN or infinity in its data."""
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError as error:
        raise ImportError("a report needs jinja2, which is not installed: pip install 'tritonmoe[html]'") from error
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["embedded"] = _embedded
    template = environment.from_string((resources.files("tritonmoe.report") / "page.html").read_text("utf-8"))
    return template.render(page=page)


def _embedded(data: object) -> Any:
    """Give JSON that can stand inside a script element, whatever its strings hold."""
    from markupsafe import Markup

    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def write_page(path: str | os.PathLike, page: Page) -> None:
    """Write the page. Raises what page_text raises, and OSError where it could not be written, whole."""
    write_whole(path, page_text(page), "report")
