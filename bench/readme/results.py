"""Results of bench/results, and how their machine and their spread are written."""

import json
from pathlib import Path

__all__ = ["DOCS", "RESULTS", "ROOT", "load", "load_all", "spread", "table_head", "table_row", "where"]

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
RESULTS = ROOT / "bench" / "results"


def load(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


def load_all(prefix: str) -> list[dict]:
    """Return what is in the files prefix_*.json, in the order of their names."""
    return [json.loads(file.read_text()) for file in sorted(RESULTS.glob(f"{prefix}_*.json"))]


def where(environment: dict) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items() if version)
    return f"{environment['device']}, {environment['cores']} cores, {versions}, {environment['date']}"


def spread(times: dict) -> str:
    return f"{times['median_ms']:.1f} ({times['lower_quartile_ms']:.1f} to {times['upper_quartile_ms']:.1f})"


def table_head(*titles: str) -> tuple[str, str]:
    """Return the first two lines of a table in Markdown."""
    return table_row(*titles), table_row(*["---"] * len(titles))


def table_row(*cells: object) -> str:
    """Return a line of a table in Markdown."""
    return f"|{''.join(f' {cell} |' if cell != '' else ' |' for cell in cells)}"
