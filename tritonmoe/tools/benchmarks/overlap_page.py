"""The overlap benchmark's figures as an HTML report."""

from collections.abc import Mapping, Sequence

from tritonmoe.runtime.files import Json
from tritonmoe.tools.benchmarks.overlap_table import OF_ROUNDS, TERMS, TERMS_OF_PICTURE, headline, noise_notes, shown
from tritonmoe.tools.report.charts import Curve, Curves, Heat
from tritonmoe.tools.report.figures import Cell, Figures, Table, Words
from tritonmoe.tools.report.html import Page, Section
from tritonmoe.tools.report.lane_chart import lanes_chart, ranks_within
from tritonmoe.tools.report.perfetto import chrome_trace
from tritonmoe.tools.report.timeline import Timeline

__all__ = ["overlap_page"]

QUARTILES = ("median_ms", "lower_quartile_ms", "upper_quartile_ms")
MERITS = ("hidden_share", "exposed_ms", "bound_ratio", "speed_up")


def overlap_page(results: Json, timelines: Mapping[str, Sequence[Timeline]]) -> Page:
    """Return the page. results: what --json has; timelines: name of a schedule -> those of the ranks."""
    number = Figures(results)
    places = ranks_within(timelines)
    lanes = {name: [of[place] for place in places] for name, of in timelines.items()}
    merits: list[list[Cell]] = [
        [name, *(shown(results["summary"][kind], name) for kind in ("overlapped", "auto"))] for name in MERITS
    ]
    merit = Table(
        ["figure", "the fastest overlapped", "auto"], merits, "Figures of merit, of the medians of the rounds"
    )
    variants: list[list[Cell]] = [
        [name, *(number(f"variants/{name}/{of}", "ms") for of in QUARTILES)] for name in results["variants"]
    ]
    series: dict[str, list[Json]] = {}
    for one in results["sweep"]:
        series.setdefault(one["series"], []).append(one)
    curves = [
        Curve(
            name,
            [(one["num_chunks"], results["variants"][one["name"]]["median_ms"]) for one in of],
        )
        for name, of in series.items()
    ]
    table = Table(["schedule", "median", "lower quartile", "upper quartile"], variants)
    ranks = [str(rank) for rank in range(results["ranks"])]
    traffic = Heat(
        "Tokens of a rank that need an expert of another",
        *("traffic_rows", results["traffic_rows"], "count", "from rank", "to rank", ranks, ranks),
        base=min(map(min, results["traffic_rows"])),
    )
    sections = [
        Section("Lanes", [lanes_chart("The best schedules, measured and planned", lanes, merit)]),
        Section("Time by the number of chunks", [
            Curves("A call, median of its rounds", "number of chunks", "ms", curves, table)]),
        Section("Traffic", [traffic]),
        Section("What the words mean", [Words([f"{name}: {TERMS[name]}" for name in TERMS_OF_PICTURE] + [OF_ROUNDS])]),
    ]  # fmt: skip
    summary = [
        f"{results['model']}, {results['tokens']} tokens on each of {results['ranks']} ranks, {results['routing']} "
        f"routing, {results['pass']}; {results['link']}",
        results["verdict"]["text"],
        headline(results),
        *noise_notes(results),
    ]
    return Page("How much of a layer's communication is hidden", summary, sections, results, chrome_trace(lanes))
