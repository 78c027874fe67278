"""Numbers of a JSON object as a reader sees them, with their units, and tables of them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from tritonmoe.runtime.files import Json

__all__ = ["UNITS", "Cell", "Figures", "Line", "Number", "Table", "Words"]

MOST_OPEN_ROWS = 16
"""A longer table below a chart is folded; on paper all are shown."""


def _significant(value: float) -> str:
    """Return three digits, never as a power of ten: 1,234 and 12.3 and 0.00123."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    decimals = 2 - math.floor(math.log10(abs(value)))
    return f"{value:,.{min(9, max(0, decimals))}f}"


def _seconds(value: float) -> str:
    if abs(value) < 1e-10:
        return "0 ms"
    if abs(value) < 1e-4:
        return f"{_significant(value * 1e6)} us"
    if abs(value) >= 10:
        return f"{_significant(value)} s"
    return f"{_significant(value * 1e3)} ms"


def _bytes(value: float) -> str:
    for factor, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(value) >= factor:
            return f"{_significant(value / factor)} {name}"
    return f"{value:.0f} bytes"


UNITS = {
    "s": _seconds,
    "ms": lambda value: _seconds(value / 1e3),
    "share": lambda value: f"{round(100 * value, 1) + 0.0:.1f} %",  # never -0.0
    "bytes/s": lambda value: f"{_significant(value / 1e9)} GB/s",
    "bytes": _bytes,
    "GiB": lambda value: f"{_significant(value)} GiB",
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
        """Return what stands at a key. Raises KeyError, IndexError or ValueError where there is nothing."""
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
    rows: Sequence[Sequence[Cell | Line]]
    title: str = "The numbers"

    @property
    def word_columns(self) -> set[int]:
        """Those that hold words, not numbers: aligned at their left."""
        return {n for row in self.rows for n, cell in enumerate(row) if isinstance(cell, str) and cell[:1].isalpha()}

    @property
    def is_open(self) -> bool:
        return len(self.rows) <= MOST_OPEN_ROWS
