"""A recording's part of the doctor's page: beside what any run has, its median call, rows, links, experts and costs."""

from collections.abc import Iterator
from typing import Any

from tritonmoe.tools.doctor.lanes import Shown
from tritonmoe.tools.doctor.page import RunPart
from tritonmoe.tools.doctor.recorded_run import RecordedRun
from tritonmoe.tools.doctor.run_figures import PASSES, timelines_of
from tritonmoe.tools.report.charts import MOST_SPANS, Heat, lanes_chart, ranks_within
from tritonmoe.tools.report.figures import Cell, Figures, Line, Table, Words
from tritonmoe.tools.report.html import Block

__all__ = ["RecordedPart"]

MOST_HOT = 12
MARKS = {
    "entered_s": "entered",
    "counts_posted_s": "counts posted",
    "counts_left_s": "everybody's counts there",
    "first_step_s": "first step",
    "ended_s": "ended",
}


class RecordedPart(RunPart):
    """A recording's part of a page, whose JSON stands at a key of the page's."""

    def __init__(self, run: RecordedRun, shown: Shown, figures: Figures, key: str) -> None:
        super().__init__(run, run.found, run.advice, shown, figures, key)
        self.recorded = run
        whole = timelines_of(run)
        self.lane_ranks = ranks_within(whole, MOST_SPANS, self.conspicuous)
        self.timelines = {name: [of[rank] for rank in self.lane_ranks] for name, of in whole.items()}

    def at(self, key: str) -> Any:
        return self.figures.at(f"{self.key}/{key}")

    def sections(self) -> Iterator[tuple[str, list[Block]]]:
        *common, grounds = super().sections()
        yield from common
        yield "The median call, measured and replayed", list(self._median_call())
        yield "Whose rows ranks wait for", list(self._rows())
        yield "Links", list(self._links())
        yield "Load of the experts", list(self._experts())
        yield "How ranks come to the call", list(self._marks())
        yield grounds
        yield "What its costs rest on", list(self._assumptions())

    def _median_call(self) -> Iterator[Block]:
        key = "median_call"
        rows: list[list[Cell]] = [
            ["all ranks", *(self.number(f"{key}/{of}", "s") for of in ("measured_s", "replayed_s"))]
        ]
        marks: dict[int, dict[str, float]] = {}
        for rank in self.lane_ranks:
            at = self.at(f"{key}/forward/{rank}")
            marks[rank] = {word: max(0.0, at[name]) for name, word in MARKS.items() if at[name] is not None}
        table = Table(["rank", "measured", "replayed"], rows, "The whole call")
        title = "Forward, then backward. Marks: a rank enters the pass, sends its counts, has all counts, begins, ends"
        yield lanes_chart(title, self.timelines, table, marks)
        yield Words(
            [
                "The replayed lanes are the simulator's, from costs that are fitted to all calls. The verdict rests on "
                "another replay, in which each operation takes as long as it took."
            ]
        )
        if len(self.lane_ranks) < self.recorded.recording.size:
            yield Words(
                [f"{len(self.lane_ranks)} of {self.recorded.recording.size} ranks are drawn, and are in the trace."]
            )

    def _matrix(self, name: str, title: str, unit: str, row: str, column: str, base: float = 0.0) -> Iterator[Block]:
        values, ranks = self.at(name), self.ranks
        if values is None:
            yield Words(["The transport doesn't tell when each rank's rows arrived."])
            return
        shown: list[list[float | None]] = [[None if i == k else values[i][k] for k in ranks] for i in ranks]
        names = [str(rank) for rank in ranks]
        yield Heat(title, f"{self.key}/{name}", shown, unit, row, column, names, names, (ranks, ranks), base)
        yield from self._left_out()

    def _rows(self) -> Iterator[Block]:
        title = "How long a rank waited for another rank's rows in a call, median of all calls"
        yield from self._matrix("waits_s", title, "s", "waiting rank", "rank whose rows it waits for")

    def _links(self) -> Iterator[Block]:
        title = "How many times as long as elsewhere a byte takes"
        yield from self._matrix("byte_ratios", title, "times", "from rank", "to rank", 1.0)

    def _experts(self) -> Iterator[Block]:
        loads = self.at("loads")
        size = self.recorded.recording.size
        num_experts = max(len(of["pairs"]) for of in loads.values())
        if not num_experts:
            return
        rows: list[list[Cell]] = []
        for name, of in loads.items():
            pairs = of["pairs"]
            for expert in sorted(range(len(pairs)), key=lambda e, pairs=pairs: -pairs[e])[:MOST_HOT]:  # type: ignore[misc]
                key, rank = f"loads/{name}", expert // max(1, len(pairs) // size)
                count, of_mean = (
                    self.number(f"{key}/pairs/{expert}", "count"),
                    self.number(f"{key}/of_mean/{expert}", "times"),
                )
                rows.append([f"{name}, expert {expert}", f"rank {rank}", count, of_mean])
        shown = [[*of["of_mean"], *[None] * (num_experts - len(of["of_mean"]))] for of in loads.values()]
        table = Table(["expert", "on", "pairs in all calls", "of the mean"], rows, "The fullest experts")
        experts = [str(expert) for expert in range(num_experts)]
        title, layers = "Pairs of each expert, as a multiple of its layer's mean", list(loads)
        yield Heat(title, "", shown, "times", "layer", "expert", layers, experts, table=table)

    def _marks(self) -> Iterator[Block]:
        for which in PASSES:
            if which not in self.at("median_call"):
                continue
            rows = [
                [f"rank {rank}", *(self.number(f"median_call/{which}/{rank}/{name}", "s") for name in MARKS)]
                for rank in self.ranks
            ]
            yield Words([f"The {which} of the median call, from when most ranks had entered it:"])
            yield Table(["rank", *MARKS.values()], rows, f"Marks of the {which}")
        yield from self._left_out()

    def _assumptions(self) -> Iterator[Block]:
        number, fitted = self.number, "fitted to all calls of the recording"
        rows: list[list[Cell]] = [
            ["latency of an exchange", number("link/latency_s", "s"), "fitted to arrivals of rows"],
            ["rate of a link", number("link/bytes_per_s", "bytes/s"), "fitted to arrivals of rows"],
            ["between two steps", number("gap_s", "s"), "median of the recording"],
        ]
        fixed, unit = self.at("step_costs/fixed_s"), self.at("step_costs/unit_s")
        for kind in (kind for kind in fixed if fixed[kind] or unit[kind]):
            rows.append([f"{kind}, fixed", number(f"step_costs/fixed_s/{kind}", "s"), fitted])
            rows.append([f"{kind}, each pair or row", number(f"step_costs/unit_s/{kind}", "s"), fitted])
        for rank in self.ranks:
            if self.recorded.costs.slowness[rank] > 1:
                rows.append(
                    [f"slowness of rank {rank}", number(f"slowness/{rank}", "times"), "fitted to the experts' steps"]
                )
        yield Table(["number", "value", "where it comes from"], rows)
        header = self.recorded.recording.headers[0]
        versions = ", ".join(f"{name} {of}" for name, of in (header.get("versions") or {}).items())
        hosts = sorted({str(of["host"]) for of in self.recorded.recording.headers})
        lines: list[Line] = [
            f"Recorded on {', '.join(hosts[:8])}{' and others' if len(hosts) > 8 else ''}"
            + (f" with {versions}." if versions else "."),
        ]
        yield Words(lines)
