"""The doctor's verdict as an HTML report: what --json has, as charts and tables, with the lanes of the median call."""

from collections.abc import Iterator
from typing import Literal

from tritonmoe.diagnosis.attribution import Attribution
from tritonmoe.diagnosis.run_figures import PASSES, timelines_of
from tritonmoe.report.charts import Heat, Segment, Strip, Strips, ticks
from tritonmoe.report.figures import Cell, Figures, Line, Table, Words
from tritonmoe.report.html import Banner, Block
from tritonmoe.report.lanes import MOST_SPANS, lanes_chart, ranks_within

__all__ = ["RecordingPart"]

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


class RecordingPart:
    """A recording's part of a page, whose JSON stands at a key of the page's."""

    def __init__(self, found: Attribution, figures: Figures, key: str, most_spans: int = MOST_SPANS) -> None:
        self.found, self.figures, self.key = found, figures, key
        size = found.recording.size
        at_fault = [rank for one in found.findings for rank in one.ranks]
        times = self.at("median_call/forward")
        slowest = max(range(size), key=lambda rank: times[rank]["ended_s"])
        conspicuous = list(dict.fromkeys([*at_fault, slowest, *range(size)]))
        self.ranks = sorted(conspicuous[:MOST_RANKS])
        """Those that matrices and tables show."""
        whole = timelines_of(found)
        self.lane_ranks = ranks_within(whole, most_spans, conspicuous)
        self.timelines = {name: [of[rank] for rank in self.lane_ranks] for name, of in whole.items()}

    def at(self, key: str):
        return self.figures.at(f"{self.key}/{key}")

    def number(self, key: str, unit: str) -> Cell:
        """Give the number at a key, "-" where the JSON has null."""
        key = f"{self.key}/{key}"
        return "-" if self.figures.at(key) is None else self.figures(key, unit)

    def banner(self, name: str = "") -> Banner:
        """Give the verdict."""
        found, number = self.found, self.number
        lines: list[Line] = []
        tone: Literal["bad", "good", "open"] = "bad"
        verdict = ", ".join(dict.fromkeys(one.kind for one in found.findings)).upper()
        if found.is_healthy:
            tone, verdict = "good", "HEALTHY: no cause costs 8 % of the step"
        elif not found.is_explained:
            tone = "open"
            verdict = "UNEXPLAINED: the replay is off by more than 10 %, so nothing below is certain"
        for n, one in enumerate(found.findings):
            gain = self._gain(f"findings/{n}")
            lines.append([f"{n + 1}. {one.kind.upper()}: {one.words}. Without it the step takes ", *gain, " less."])
        lines.append([
            number("ranks", "count"), f" ranks, {found.recording.transport}, ", number("calls", "count"),
            f" calls ({'forward and backward' if found.call.has_backward else 'forward'}) of {found.call.plan}. ",
            "A call was measured at ", number("measured_s", "s"), " and replayed at ", number("replayed_s", "s"), ", ",
            number("error", "share"), " off.",
        ])  # fmt: skip
        return Banner(tone, verdict, lines, name)

    def _gain(self, key: str) -> list[Cell]:
        return [self.number(f"{key}/share", "share"), ", ", self.number(f"{key}/gain_s", "s"), ","]

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
        keys = [(f"{of}/{n}", one) for of in ("findings", "others") for n, one in enumerate(getattr(self.found, of))]
        if len(self.found.findings) > 1:
            keys.append(("together", None))
        top = max([self.found.replayed_s, *(self.at(f"{key}/high_s") for key, _ in keys)])
        strips, rows = [], []
        for key, one in keys:
            name = "all causes together" if one is None else _name(one)
            gain, low, high = (max(0.0, self.at(f"{key}/{end}")) / top for end in ("gain_s", "low_s", "high_s"))
            color = "c5" if one is None else "c6" if key.startswith("findings") else "c4"
            strips.append(Strip(name, [Segment(0, gain, color)], self.number(f"{key}/share", "share"), (low, high)))
            ends = [self.number(f"{key}/{end}", "s") for end in ("gain_s", "low_s", "high_s")]
            rows.append(
                [name, self.number(f"{key}/share", "share"), *ends, "causes overlap" if one is None else one.words]
            )
        header = ["cause", "of the step", "gain", "low (80 %)", "high (80 %)", "what it is"]
        axis = ticks(1e3 * top, " ms")
        legend = [("c6", "a finding"), ("c4", "too small or not certain, or the bound itself")]
        yield Strips("How much shorter the call would be", strips, axis, legend, Table(header, rows))
        if self.found.misfits:
            yield Words(["What doesn't fit in the replay:", *self.found.misfits])

    def _advice(self) -> Iterator[Block]:
        rows = [
            [one.words, self.number(f"advice/{n}/share", "share"),
             *(self.number(f"advice/{n}/{end}", "s") for end in ("gain_s", "low_s", "high_s")), one.costs or "-"]
            for n, one in enumerate(self.found.advice)
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
        if len(self.lane_ranks) < self.found.recording.size:
            yield Words(
                [f"{len(self.lane_ranks)} of {self.found.recording.size} ranks are drawn, and are in the trace."]
            )

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
        if len(self.ranks) < self.found.recording.size:
            yield Words(
                [f"{len(self.ranks)} of {self.found.recording.size} ranks are shown, those at fault among them."]
            )

    def _waits(self) -> Iterator[Block]:
        title = "How long a rank stood still for another's rows in a call, median of all calls"
        yield from self._matrix("waits_s", title, "s", "waiting rank", "rank whose rows it waits for")

    def _links(self) -> Iterator[Block]:
        title = "How many times as long as elsewhere a byte takes"
        yield from self._matrix("byte_ratios", title, "times", "from rank", "to rank", 1.0)

    def _loads(self) -> Iterator[Block]:
        loads = self.at("loads")
        size = self.found.recording.size
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
            if self.found.costs.slowness[rank] > 1:
                rows.append(
                    [f"slowness of rank {rank}", number(f"slowness/{rank}", "times"), "fitted to the experts' steps"]
                )
        yield Table(["number", "value", "where it comes from"], rows)
        header = self.found.recording.headers[0]
        versions = ", ".join(f"{name} {of}" for name, of in (header.get("versions") or {}).items())
        hosts = sorted({str(of["host"]) for of in self.found.recording.headers})
        lines: list[Line] = [
            "Intervals hold 80 % of what selections of the calls, drawn with replacement, give.",
            "Causes overlap: what they gain doesn't add up.",
            f"Recorded on {', '.join(hosts[:8])}{' and others' if len(hosts) > 8 else ''}"
            + (f" with {versions}." if versions else "."),
        ]
        yield Words([*lines, *(f"Note: {note}" for note in self.found.notes)])


def _name(one) -> str:
    return one.kind + (f", {' to '.join(map(str, one.ranks))}" if one.ranks and one.kind != "imbalance" else "")
