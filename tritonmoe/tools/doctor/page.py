"""The doctor's verdict on runs of any trainer as an HTML page: verdict, findings, steps, lanes, who waits for whom.

The part of a recording has its median call, rows, links, experts and costs beside these.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from tritonmoe.tools.doctor.advice import Advice
from tritonmoe.tools.doctor.attribution import Verdict
from tritonmoe.tools.doctor.lanes import DOING, Piece, Shown
from tritonmoe.tools.doctor.reading import ReadRun
from tritonmoe.tools.doctor.recorded_run import RecordedRun
from tritonmoe.tools.doctor.run_figures import PASSES, timelines_of
from tritonmoe.tools.doctor.verdict import (
    FindingWords,
    about,
    count_words,
    describe_finding,
    headline,
    mended_words,
    recording_of,
    remarks,
    step_words,
    warnings_of,
)
from tritonmoe.tools.report.charts import (
    MOST_SPANS,
    Bars,
    Heat,
    Segment,
    Strip,
    Strips,
    lanes_chart,
    ranks_within,
    ticks,
)
from tritonmoe.tools.report.figures import Cell, Figures, Line, Table, Words
from tritonmoe.tools.report.html import Banner, Block, Page, Section
from tritonmoe.tools.report.perfetto import chrome_trace
from tritonmoe.tools.report.timeline import Timeline

__all__ = ["RecordedPart", "RunPart", "runs_page"]

MOST_RANKS = 64
"""Charts and tables show so many, those at fault first."""
MOST_SEGMENTS = 12_000
"""The lanes of a page are drawn in so many pieces."""
MOST_PIECES = 400
"""Those of one rank in one step."""
COLORS = {"computing": "c0", "host": "c4", "waiting": "c6", "rows": "c1"}
LEGEND = [(COLORS[doing], words) for doing, words in DOING.items()]
MOST_NAMED = 12
MOST_HOT = 12
MARKS = {
    "entered_s": "entered",
    "counts_posted_s": "counts posted",
    "counts_left_s": "everybody's counts there",
    "first_step_s": "first step",
    "ended_s": "ended",
}


class RunPart:
    """One run's part of a page, whose JSON stands at a key of the page's."""

    def __init__(
        self, run: ReadRun, found: Verdict, advice: Sequence[Advice], shown: Shown, figures: Figures, key: str
    ) -> None:
        self.run, self.found, self.advice, self.shown = run, found, advice, shown
        self.figures, self.key = figures, key
        self.timelines: dict[str, list[Timeline]] = {}
        self.words = [describe_finding(one, found, recording_of(run)) for one in found.findings]
        size = len(found.graph.ranks)
        at_fault = [index for one in found.findings for index in one.culprits.ranks]
        waited_for = sorted(range(size), key=lambda rank: -sum(of[rank] for of in shown.waits_s))
        self.conspicuous = list(dict.fromkeys([*at_fault, *waited_for[:8], *range(size)]))
        """Indices of ranks, those first that are to be shown."""
        self.ranks = sorted(self.conspicuous[:MOST_RANKS])
        """Those that are shown."""

    def at(self, key: str) -> Any:
        return self.figures.at(f"{self.key}/{key}")

    def number(self, key: str, unit: str) -> Cell:
        """Return the number at a key, "not known" where the JSON has null."""
        return "not known" if self.at(key) is None else self.figures(f"{self.key}/{key}", unit)

    def name(self, index: int) -> str:
        return self.found.graph.names.get(index, str(self.found.graph.ranks[index]))

    def banner(self, name: str = "") -> Banner:
        """Return the verdict."""
        found, number = self.found, self.number
        said = headline(found)
        lines: list[Line] = []
        tone: Literal["bad", "good", "open"]
        if found.is_healthy:
            tone, verdict = "good", said[0]
        elif said:
            tone, verdict = "open", said[0]
            lines += said[1:]
        else:
            tone, verdict = "bad", f"{count_words(len(found.findings), 'finding')}: "
            verdict += _together([words.title for words in self.words]).upper()
        for n, words in enumerate(self.words):
            said_of_it = f"{n + 1}. {words.title.upper()}: {words.sentence}. It costs "
            cost, share = number(f"findings/{n}/cost_s", "s"), number(f"findings/{n}/share", "share")
            lines.append([said_of_it, cost, " a step, ", share, ". To do: ", words.to_do, "."])
        lines += warnings_of(found)
        calls = ["; its layer calls ", number("measured_s", "s")] if found.whole_s != found.replayed_s else []
        step, replayed, error = (
            number(*of) for of in (("whole_s" if calls else "measured_s", "s"), ("replayed_s", "s"), ("error", "share"))
        )
        steps = f", the mean of {count_words(len(found.graph.steps), 'step')}"
        lines.append(["A step takes ", step, steps, *calls, "; replayed ", replayed, ", ", error, " off."])
        return Banner(tone, verdict, lines, name, self.run.limits)

    def sections(self) -> Iterator[tuple[str, list[Block]]]:
        yield "Findings", list(self._findings())
        yield "What would help", list(self._offers())
        yield "Steps", list(self._steps())
        yield "What ranks do in a step", list(self._lanes())
        yield "Who waits for whom", list(self._waits())
        yield "Load of the ranks", list(self._loads())
        yield "What this rests on", [Words(list(self._grounds()))]

    def _grounds(self) -> Iterator[str]:
        yield about(self.run, self.found)
        yield step_words(self.found)
        yield from remarks(self.run, self.found)
        yield "Intervals are 80 % intervals, from random selections of the steps (drawn with replacement)."

    def _findings(self) -> Iterator[Block]:
        found = self.found
        if not found.findings:
            yield Words(["Nothing costs 5 % of a step."])
        keys: list[tuple[str, FindingWords | None]] = [(f"findings/{n}", words) for n, words in enumerate(self.words)]
        if not keys:
            return
        if len(keys) > 1:
            keys.append(("findings_together", None))
        top = max([found.whole_s, *(self.at(f"{key}/high_s") for key, _ in keys)]) or 1.0
        strips: list[Strip] = []
        rows: list[Sequence[Cell | Line]] = []
        for n, (key, words) in enumerate(keys):
            name = "all together" if words is None else f"{n + 1}. {found.findings[n].kind}"
            at = [max(0.0, self.at(f"{key}/{end}")) / top for end in ("cost_s", "low_s", "high_s")]
            share = self.number(f"{key}/share", "share")
            color = "c5" if words is None else "c6"
            strips.append(Strip(name, [Segment(0, at[0], color)], share, (at[1], at[2])))
            cost, low, high = (self.number(f"{key}/{end}", "s") for end in ("cost_s", "low_s", "high_s"))
            costs: list[Cell | Line] = [[cost, " (", low, " to ", high, ")"], share]
            if words is None:
                rows.append([name, mended_words(found), *costs, ""])
            else:
                rows.append([name, words.sentence, *costs, words.to_do])
        header = ["finding", "what it is", "costs a step (80 %)", "share", "to do"]
        table = Table(header, rows, "The findings")
        yield Strips("What each costs, of a step", strips, ticks(1e3 * top, " ms"), [], table)

    def _offers(self) -> Iterator[Block]:
        rows = [
            [one.words, *(self.number(f"advice/{n}/{end}", "s") for end in ("gain_s", "low_s", "high_s")),
             self.number(f"advice/{n}/share", "share"), one.costs or "-"]
            for n, one in enumerate(self.advice)
        ]  # fmt: skip
        if rows:
            yield Table(["change", "saves a step", "low (80 %)", "high (80 %)", "of a step", "what it costs"], rows)
        else:
            yield Words(["The files show no change that would certainly gain time."])

    def _steps(self) -> Iterator[Block]:
        graph, shown = self.found.graph, self.shown
        slow = set(shown.slow)
        times = [1e3 * seconds for seconds in graph.measured_s]
        colors = ["c6" if step in slow else "c0" for step in range(len(times))]
        rows: list[list[Cell]] = [
            [f"step {number}", self.number(f"measured_steps_s/{index}", "s"), "slow" if index in slow else "-"]
            for index, number in enumerate(graph.steps)
        ]
        legend = [
            ("c0", "as most steps"),
            ("c6", "slow: more than a tenth above the median, and above the usual differences"),
        ]
        middle = sorted(times)[(len(times) - 1) // 2]
        yield Bars(
            "How long each step took", "step", "ms; dashed: the median", [str(number) for number in graph.steps], times,
            colors, middle, legend if slow else [], Table(["step", "took", "beside the others"], rows),
        )  # fmt: skip
        if slow:
            named = [str(graph.steps[index]) for index in shown.slow[:MOST_NAMED]]
            more = f" and {len(slow) - MOST_NAMED} more" if len(slow) > MOST_NAMED else ""
            yield Words([f"Slow are {count_words(len(slow), 'step')} of {len(times)}: {', '.join(named)}{more}."])

    def _lanes(self) -> Iterator[Block]:
        shown, graph = self.shown, self.found.graph
        steps = [("A typical step", shown.typical)]
        if shown.slowest != shown.typical:
            steps.append(("The slowest step", shown.slowest))
        longest_s = max(
            (piece.end_s - shown.begins_s[step] for _, step in steps for piece in shown.lanes[step]), default=0.0
        )
        limit = min(MOST_PIECES, MOST_SEGMENTS // (len(self.ranks) * len(steps)))
        for title, step in steps:
            by_rank: dict[int, list[Piece]] = {index: [] for index in self.ranks}
            for piece in shown.lanes[step]:
                if piece.rank in by_rank:
                    by_rank[piece.rank].append(piece)
            strips = []
            for index, pieces in by_rank.items():
                segments = self._segments(pieces, shown.begins_s[step], longest_s or 1.0, limit)
                strips.append(Strip(f"rank {self.name(index)}", segments))
            heading = f"{title}: step {graph.steps[step]}"
            yield Strips(heading, strips, ticks(1e3 * longest_s, " ms"), LEGEND, None)
        yield Words(
            ["Between two exchanges, computing is drawn first, then time that is neither computing nor waiting."]
        )
        yield from self._left_out()

    def _segments(self, pieces: Sequence[Piece], begin_s: float, longest_s: float, limit: int) -> list[Segment]:
        if len(pieces) > limit:
            pieces = _coarser(pieces, begin_s, longest_s / limit)
        found = []
        for piece in pieces:
            width = (piece.end_s - piece.start_s) / longest_s
            if width < 5e-5:  # one that rounds to nothing would look like a mark
                continue
            on = f" (rank {self.name(piece.on)})" if piece.on >= 0 else ""
            title = f"{DOING[piece.doing]}{on}: {1e3 * (piece.end_s - piece.start_s):.3g} ms, {piece.name}"
            found.append(Segment((piece.start_s - begin_s) / longest_s, width, COLORS[piece.doing], title))
        return found

    def _left_out(self) -> Iterator[Block]:
        size = len(self.found.graph.ranks)
        if len(self.ranks) < size:
            yield Words([f"{len(self.ranks)} of {size} ranks are shown, those at fault among them."])

    def _waits(self) -> Iterator[Block]:
        if len(self.found.graph.ranks) < 2:
            yield Words(["There is one rank only: what this rank waits for is not known."])
            return
        title = "How long a rank waited in exchanges for another rank to come, for each step"
        yield from self._matrix("waits_for_ranks_s", title, "s", "waiting rank", "rank that it waits for")

    def _matrix(self, name: str, title: str, unit: str, row: str, column: str, base: float = 0.0) -> Iterator[Block]:
        values, ranks = self.at(name), self.ranks
        if values is None:
            yield Words(["The transport doesn't tell when each rank's rows arrived."])
            return
        shown: list[list[float | None]] = [[None if i == k else values[i][k] for k in ranks] for i in ranks]
        names = [self.name(index) for index in ranks]
        yield Heat(title, f"{self.key}/{name}", shown, unit, row, column, names, names, (ranks, ranks), base)
        yield from self._left_out()

    def _loads(self) -> Iterator[Block]:
        shown = self.shown
        doing = {"computing": "computing_s", "host": "host_s", "waiting": "waiting_s", "rows": "rows_s"}
        top = max((sum(getattr(of, key) for key in doing.values()) for of in shown.ranks), default=0.0) or 1.0
        strips, rows = [], []
        for index in self.ranks:
            of, at, segments = shown.ranks[index], 0.0, []
            for name, key in doing.items():
                share = getattr(of, key) / top
                segments.append(Segment(at, share, COLORS[name], f"{name}: {1e3 * getattr(of, key):.3g} ms"))
                at += share
            strips.append(Strip(f"rank {self.name(index)}", segments, self.number(f"by_rank/{index}/computing_s", "s")))
            cells = [self.number(f"by_rank/{index}/{key}", "s") for key in doing.values()]
            cells += [self.number(f"by_rank/{index}/{key}", "bytes") for key in ("sent_bytes", "received_bytes")]
            rows.append([f"rank {self.name(index)}", *cells])
        header = ["rank", "computing", "neither", "waits for ranks", "waits for rows", "sent", "received"]
        title = "What a rank does in a step, the mean of all steps; the number is the time that the rank computes"
        yield Strips(title, strips, ticks(1e3 * top, " ms"), LEGEND, Table(header, rows))
        yield from self._left_out()


def _coarser(pieces: Sequence[Piece], begin_s: float, cell_s: float) -> list[Piece]:
    """Return pieces that are at least a cell long: in each cell what takes most of it, cells of one kind joined."""
    cells: dict[int, dict[str, float]] = {}
    for piece in pieces:
        at = int((piece.start_s - begin_s) / cell_s)
        while begin_s + at * cell_s < piece.end_s:
            inside_s = min(piece.end_s, begin_s + (at + 1) * cell_s) - max(piece.start_s, begin_s + at * cell_s)
            of_cell = cells.setdefault(at, {})
            of_cell[piece.doing] = of_cell.get(piece.doing, 0.0) + max(0.0, inside_s)
            at += 1
    found: list[Piece] = []
    for at in sorted(cells):
        doing = max(cells[at], key=lambda name, at=at: cells[at][name])  # type: ignore[misc]
        start_s = begin_s + at * cell_s
        if found and found[-1].doing == doing and found[-1].end_s > start_s - 0.5 * cell_s:
            found[-1] = found[-1]._replace(end_s=start_s + cell_s)
        else:
            found.append(Piece(pieces[0].rank, pieces[0].step, start_s, start_s + cell_s, doing, -1, ""))  # type: ignore[arg-type]
    return found


def _together(words: Sequence[str]) -> str:
    unlike = list(dict.fromkeys(words))
    return unlike[0] if len(unlike) == 1 else f"{', '.join(unlike[:-1])} and {unlike[-1]}"


class RecordedPart(RunPart):
    """A recording's part of a page, whose JSON stands at a key of the page's."""

    def __init__(self, run: RecordedRun, shown: Shown, figures: Figures, key: str) -> None:
        super().__init__(run, run.found, run.advice, shown, figures, key)
        self.recorded = run
        whole = timelines_of(run)
        self.lane_ranks = ranks_within(whole, MOST_SPANS, self.conspicuous)
        self.timelines = {name: [of[rank] for rank in self.lane_ranks] for name, of in whole.items()}

    def sections(self) -> Iterator[tuple[str, list[Block]]]:
        *common, grounds = super().sections()
        yield from common
        yield "The median call, measured and replayed", list(self._median_call())
        title = "How long a rank waited for another rank's rows in a call, median of all calls"
        waits = self._matrix("waits_s", title, "s", "waiting rank", "rank whose rows it waits for")
        yield "Whose rows ranks wait for", list(waits)
        title = "How many times as long as elsewhere a byte takes"
        yield "Links", list(self._matrix("byte_ratios", title, "times", "from rank", "to rank", 1.0))
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
            + (f" with {versions}." if versions else ".")
        ]
        yield Words(lines)


def runs_page(parts: Mapping[str, RunPart], figures: Figures) -> Page:
    """Return the page of these runs, by their names, one after the other."""
    banners, sections = [], []
    lanes: dict[str, list[Timeline]] = {}
    for path, part in parts.items():
        name = f"{path}: " if len(parts) > 1 else ""
        banners.append(part.banner(path if len(parts) > 1 else ""))
        sections += [Section(name + title, blocks) for title, blocks in part.sections() if blocks]
        lanes |= {name + which: timelines for which, timelines in part.timelines.items()}
    trace = chrome_trace(lanes) if lanes else None
    return Page(f"Why is the step slow? {', '.join(parts)}", [], sections, figures.data, trace, banners)
