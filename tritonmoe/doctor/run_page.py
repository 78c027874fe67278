"""The doctor's verdict as an HTML report: what --json has, as charts and tables, with the lanes of the median call."""

from collections.abc import Iterator, Sequence

from tritonmoe.doctor.attribution import Finding
from tritonmoe.doctor.recorded_run import RecordedRun
from tritonmoe.doctor.run_figures import PASSES, figures_of, timelines_of
from tritonmoe.doctor.verdict import as_json, words_of
from tritonmoe.report.charts import Heat, Segment, Strip, Strips, ticks
from tritonmoe.report.figures import Cell, Figures, Line, Table, Words
from tritonmoe.report.html import Block, Page, Section
from tritonmoe.report.lanes import MOST_SPANS, lanes_chart, ranks_within
from tritonmoe.report.perfetto import chrome_trace
from tritonmoe.report.timeline import Timeline

__all__ = ["run_page"]

MOST_RANKS = 64
"""A matrix or table of ranks shows so many."""
MOST_HOT = 12
MARKS = {
    "entered_s": "entered",
    "counts_posted_s": "counts posted",
    "counts_left_s": "everybody's counts there",
    "first_step_s": "first step",
    "ended_s": "ended",
}


def run_page(found: Sequence[RecordedRun]) -> Page:
    """Give the page of these verdicts, one after the other."""
    figures = Figures([{**as_json(one, one.found), **figures_of(one)} for one in found])
    summary: list[Line] = []
    sections: list[Section] = []
    lanes: dict[str, list[Timeline]] = {}
    for number, one in enumerate(found):
        run = _Run(one, figures, str(number), MOST_SPANS // len(found))
        name = f"{one.recording.path}: " if len(found) > 1 else ""
        summary += run.summary()
        sections += [Section(name + title, blocks) for title, blocks in run.sections() if blocks]
        lanes |= {name + which: timelines for which, timelines in run.timelines.items()}
    title = f"Why is the step slow? {', '.join(str(one.recording.path) for one in found)}"
    return Page(title, summary, sections, figures.data, chrome_trace(lanes))


class _Run:
    """One run's part of the page."""

    def __init__(self, run: RecordedRun, figures: Figures, key: str, most_spans: int) -> None:
        self.run, self.found, self.figures, self.key = run, run.found, figures, key
        size = run.recording.size
        at_fault = [rank for one in run.found.findings for rank in one.culprits.ranks]
        times = self.at("median_call/forward")
        slowest = max(range(size), key=lambda rank: times[rank]["ended_s"])
        conspicuous = list(dict.fromkeys([*at_fault, slowest, *range(size)]))
        self.ranks = sorted(conspicuous[:MOST_RANKS])
        """Those that matrices and tables show."""
        whole = timelines_of(run)
        self.lane_ranks = ranks_within(whole, most_spans, conspicuous)
        self.timelines = {name: [of[rank] for rank in self.lane_ranks] for name, of in whole.items()}

    def at(self, key: str):
        return self.figures.at(f"{self.key}/{key}")

    def number(self, key: str, unit: str) -> Cell:
        """Give the number at a key, "-" where the JSON has null."""
        key = f"{self.key}/{key}"
        return "-" if self.figures.at(key) is None else self.figures(key, unit)

    def summary(self) -> Iterator[Line]:
        run, found, number = self.run, self.found, self.number
        yield [
            f"{run.recording.path}: ", number("ranks", "count"), f" ranks, {run.recording.transport}, ",
            number("calls", "count"), f" calls of {run.calls[0].plan} in {len(found.graph.steps)} steps",
        ]  # fmt: skip
        yield [
            "The calls of a step were measured at ", number("measured_s", "s"), " and replayed at ",
            number("replayed_s", "s"), ", ", number("error", "share"), " off.",
        ]  # fmt: skip
        if not found.is_explained:
            yield "UNEXPLAINED: the replay is off by more than 10 %, so nothing below is certain."
        if found.is_healthy:
            yield "HEALTHY: nothing takes longer than is usual for its kind."
        for n, one in enumerate(found.findings):
            yield [
                f"{n + 1}. {one.kind.upper()}: {words_of(one, found)}. Without it the step takes ",
                *self._gain(f"findings/{n}"),
                " less.",
            ]

    def _gain(self, key: str) -> list[Cell]:
        return [self.number(f"{key}/share", "share"), ", ", self.number(f"{key}/cost_s", "s"), ","]

    def sections(self) -> Iterator[tuple[str, list[Block]]]:
        yield "What would it gain without ...", list(self._causes())
        yield "What would help", list(self._advice())
        yield "The median call, measured and replayed", list(self._lanes())
        yield "Who waits for whom", list(self._waits())
        yield "Links", list(self._links())
        yield "Load of the experts", list(self._loads())
        yield "How ranks come to the call", list(self._marks())
        yield "What this rests on", list(self._assumptions())

    def _causes(self) -> Iterator[Block]:
        keys: list[tuple[str, Finding | None]] = [(f"findings/{n}", one) for n, one in enumerate(self.found.findings)]
        keys += [("together", None)] if len(keys) > 1 else []
        top = max([self.found.replayed_s, *(self.at(f"{key}/high_s") for key, _ in keys)])
        strips, rows = [], []
        for key, one in keys:
            name = "all causes together" if one is None else _name(one)
            gain, low, high = (max(0.0, self.at(f"{key}/{end}")) / top for end in ("cost_s", "low_s", "high_s"))
            color = "c5" if one is None else "c6"
            strips.append(Strip(name, [Segment(0, gain, color)], self.number(f"{key}/share", "share"), (low, high)))
            ends = [self.number(f"{key}/{end}", "s") for end in ("cost_s", "low_s", "high_s")]
            words = "causes overlap" if one is None else words_of(one, self.found)
            rows.append([name, self.number(f"{key}/share", "share"), *ends, words])
        for n, (kind, share) in enumerate(self.found.others):
            part = max(0.0, share) * self.found.replayed_s / top
            strips.append(Strip(kind, [Segment(0, part, "c4")], self.number(f"others/{n}/share", "share")))
            rows.append([kind, self.number(f"others/{n}/share", "share"), "-", "-", "-", "too small or not certain"])
        header = ["cause", "of the step", "gain", "low (80 %)", "high (80 %)", "what it is"]
        axis = ticks(1e3 * top, " ms")
        legend = [("c6", "a finding"), ("c4", "too small or not certain")]
        yield Strips("How much shorter the calls of a step would be", strips, axis, legend, Table(header, rows))

    def _advice(self) -> Iterator[Block]:
        rows = [
            [one.words, self.number(f"advice/{n}/share", "share"),
             *(self.number(f"advice/{n}/{end}", "s") for end in ("gain_s", "low_s", "high_s")), one.costs or "-"]
            for n, one in enumerate(self.run.advice)
        ]  # fmt: skip
        if rows:
            yield Table(["change", "of the step", "gain", "low (80 %)", "high (80 %)", "what it costs"], rows)

    def _lanes(self) -> Iterator[Block]:
        key = "median_call"
        rows: list[list[Cell]] = [
            ["all ranks", *(self.number(f"{key}/{of}", "s") for of in ("measured_s", "replayed_s"))]
        ]
        marks: dict[int, dict[str, float]] = {}
        for rank in self.lane_ranks:
            at = self.at(f"{key}/forward/{rank}")
            marks[rank] = {word: max(0.0, at[name]) for name, word in MARKS.items() if at[name] is not None}
        table = Table(["rank", "measured", "replayed"], rows, "The whole call")
        title = (
            "Forward, then backward; thin marks: entered, counts posted, everybody's counts there, first step, ended"
        )
        yield lanes_chart(title, self.timelines, table, marks)
        if len(self.lane_ranks) < self.run.recording.size:
            yield Words([f"{len(self.lane_ranks)} of {self.run.recording.size} ranks are drawn, and are in the trace."])

    def _matrix(self, name: str, title: str, unit: str, row: str, column: str, base: float = 0.0) -> Iterator[Block]:
        values, ranks = self.at(name), self.ranks
        if values is None:
            yield Words(["It is not known when each rank's rows arrived: the transport doesn't tell."])
            return
        shown: list[list[float | None]] = [[None if i == k else values[i][k] for k in ranks] for i in ranks]
        names = [str(rank) for rank in ranks]
        yield Heat(title, f"{self.key}/{name}", shown, unit, row, column, names, names, (ranks, ranks), base)
        yield from self._left_out()

    def _left_out(self) -> Iterator[Block]:
        if len(self.ranks) < self.run.recording.size:
            yield Words([f"{len(self.ranks)} of {self.run.recording.size} ranks are shown, those at fault among them."])

    def _waits(self) -> Iterator[Block]:
        title = "How long a rank stood still for another's rows in a call, median of all calls"
        yield from self._matrix("waits_s", title, "s", "waiting rank", "rank whose rows it waits for")

    def _links(self) -> Iterator[Block]:
        title = "How many times as long as elsewhere a byte takes"
        yield from self._matrix("byte_ratios", title, "times", "from rank", "to rank", 1.0)

    def _loads(self) -> Iterator[Block]:
        loads = self.at("loads")
        size = self.run.recording.size
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
            if self.run.costs.slowness[rank] > 1:
                rows.append(
                    [f"slowness of rank {rank}", number(f"slowness/{rank}", "times"), "fitted to the experts' steps"]
                )
        yield Table(["number", "value", "where it comes from"], rows)
        header = self.run.recording.headers[0]
        versions = ", ".join(f"{name} {of}" for name, of in (header.get("versions") or {}).items())
        hosts = sorted({str(of["host"]) for of in self.run.recording.headers})
        lines: list[Line] = [
            "Intervals hold 80 % of what selections of the steps, drawn with replacement, give.",
            "Causes overlap: what they gain doesn't add up.",
            f"Recorded on {', '.join(hosts[:8])}{' and others' if len(hosts) > 8 else ''}"
            + (f" with {versions}." if versions else "."),
        ]
        yield Words([*lines, *(f"Note: {note}" for note in self.run.limits)])


def _name(one) -> str:
    ranks = one.culprits.ranks
    return one.kind + (f", {' to '.join(map(str, ranks))}" if ranks and one.kind != "imbalance" else "")
