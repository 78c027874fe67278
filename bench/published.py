"""Published measurements beside what the planner says: the rows of a table, and how wrong it is."""

import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Row", "Table", "published"]

FILE = Path(__file__).parent / "results" / "published_measurements.json"


def published(name: str) -> dict[str, Any]:
    """Return a published table, and every row as {column: value}."""
    table = json.loads(FILE.read_text())[name]
    columns = table.get("columns", [])
    return {**table, "rows": [dict(zip(columns, row, strict=True)) for row in table.get("rows", [])]}


@dataclass(frozen=True)
class Row:
    """One published number."""

    what: str
    unit: str
    measured: float
    predicted: float | None
    """None: nothing is predicted."""
    is_fitted: bool = False
    """Whether a constant was fitted to it, so that its error says nothing."""
    note: str = ""
    seconds: float | None = None
    """Of an exchange: how long it took as published."""

    @property
    def error(self) -> float | None:
        return None if self.predicted is None else self.predicted / self.measured - 1


@dataclass(frozen=True)
class Table:
    """The rows of one published table."""

    name: str
    source: str
    fitted: str
    """Which constants were fitted to which rows."""
    rows: list[Row]
    median_target: float | None = None
    worst_target: float | None = None
    judged: str = "all rows that nothing was fitted to"
    """What the targets speak of; other rows have a note."""
    excluded: frozenset[str] = field(default_factory=frozenset)
    """The rows (`what`) that the targets don't speak of."""

    def errors(self) -> list[float]:
        """Return the sizes of the errors that the targets speak of."""
        return [
            abs(row.error)
            for row in self.rows
            if row.error is not None and not row.is_fitted and row.what not in self.excluded
        ]

    def verdict(self) -> str:
        errors = self.errors()
        if not errors:
            return "nothing is predicted"
        median, worst = statistics.median(errors), max(errors)
        said = f"median {median:.2%}, worst {worst:.2%} of {len(errors)} ({self.judged})"
        for kind, found, target in (("median", median, self.median_target), ("worst", worst, self.worst_target)):
            if target is not None:
                said += f"; {kind} target {target:.2%}: {'met' if found <= target else 'missed'}"
        return said

    def to_json(self) -> dict[str, Any]:
        errors = self.errors()
        return {
            "name": self.name,
            "source": self.source,
            "fitted": self.fitted,
            "judged": self.judged,
            "median_error": round(statistics.median(errors), 5) if errors else None,
            "worst_error": round(max(errors), 5) if errors else None,
            "median_target": self.median_target,
            "worst_target": self.worst_target,
            "rows": [
                {
                    "what": row.what,
                    "unit": row.unit,
                    "measured": row.measured,
                    "predicted": None if row.predicted is None else float(f"{row.predicted:.6g}"),
                    "error": None if row.error is None else round(row.error, 5),
                    "fitted": row.is_fitted,
                    "judged": row.what not in self.excluded and not row.is_fitted and row.error is not None,
                    "note": row.note,
                }
                for row in self.rows
            ],
        }

    def __str__(self) -> str:
        width = max(len(row.what) for row in self.rows)
        lines = [f"{self.name}: {self.source}", f"  fitted: {self.fitted}"]
        for row in self.rows:
            predicted = "-" if row.predicted is None else f"{row.predicted:,.6g}"
            error = "" if row.error is None else f"{row.error:+.2%}"
            mark = "fitted" if row.is_fitted else ""
            lines.append(
                f"  {row.what:{width}}  {row.measured:>13,.6g} {row.unit:4}  {predicted:>13}  {error:>8}  "
                f"{mark} {row.note}".rstrip()
            )
        return "\n".join([*lines, f"  {self.verdict()}"])
