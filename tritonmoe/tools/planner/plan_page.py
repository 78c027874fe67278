"""A plan, or a comparison of clusters, as an HTML report: what --json has, as charts and tables."""

from collections.abc import Iterator, Sequence
from typing import Any

from tritonmoe.runtime.files import Json
from tritonmoe.tools.planner.comparison import Comparison
from tritonmoe.tools.planner.plan_text import DECIDES, comparison_as_json, plan_as_json
from tritonmoe.tools.planner.training_plan import Plan
from tritonmoe.tools.report.charts import Curve, Curves, Segment, Strip, Strips, ticks
from tritonmoe.tools.report.figures import Cell, Figures, Line, Table, Words
from tritonmoe.tools.report.html import Block, Page, Section

__all__ = ["comparison_page", "plan_page"]

MOST_ROWS = 40
MOST_BARS = 8
MOST_PARTS = 9
MOST_ESTIMATES = 12
OTHER = "everything else"


def plan_page(plan: Plan) -> Page:
    data = plan_as_json(plan)
    figures = Figures(data)
    one = _Planned(figures, "")
    title = f"{plan.job.model.name} on {plan.cluster.num_gpus} GPUs of {plan.cluster.name}"
    sections = [
        Section("The choices", [one.table()]),
        Section("Step time by the number of expert-parallel ranks", [one.curve()]),
        Section("Where the time goes", [one.parts()]),
        Section("Which number matters most", list(one.sensitivity())),
        Section("What this rests on", list(one.estimates())),
    ]
    summary: list[list[Cell]] = [one.job(), one.best(), *one.exchanges()]
    summary += [[said] for said in (*data["notes"], data["verdict"])]
    return Page(title, summary, [of for of in sections if of.blocks], data)


def comparison_page(comparison: Comparison) -> Page:
    data = comparison_as_json(comparison)
    figures = Figures(data)
    plans = [_Planned(figures, f"plans/{number}/") for number in range(len(comparison.plans))]
    names = [one.name for one in plans]
    curves = [Curve(one.name, one.fastest_by_degree()) for one in plans]
    rows = [row for one in plans for row in one.rows(MOST_ROWS)]
    table = Table(["cluster", *HEADER], rows)
    summary = [plans[0].job(), *(one.best() for one in plans)]
    for number, name in enumerate(names):
        if figures.at(f"is_cheapest/{number}") is not None:
            summary.append([f"{name} is the cheapest in ", figures(f"is_cheapest/{number}", "share"), " of the draws."])
    summary += [[said] for said in (*data["notes"], data["verdict"])]
    sections = [
        Section("The best choice on every cluster", [Table(["cluster", *HEADER], [one.rows(1)[0] for one in plans])]),
        Section("Step time by the number of expert-parallel ranks",
                [Curves("A step with the fastest choice", "expert-parallel ranks", "ms", curves, table)]),
        Section("Step time and price by the number of GPUs", list(_by_gpus(figures, names))),
        Section("Price by the size of the model", [_by_scale(figures, names), _break_even(figures, names)]),
        Section("Where the time goes", [_parts([(one, 0, one.name) for one in plans])]),
        *(Section(f"Which number matters most: {one.name}", list(one.sensitivity())) for one in plans),
        *(Section(f"What this rests on: {one.name}", list(one.estimates())) for one in plans),
    ]  # fmt: skip
    title = f"{comparison.plans[0].job.model.name} on {', '.join(names)}"
    return Page(title, summary, [of for of in sections if of.blocks], data)


HEADER = (
    *("memory", "tp", "pp", "ep", "levels", "recompute", "chunks", "step", "low (80 %)", "high (80 %)", "exchanges"),
    *("exposed", "no overlap", "tokens/s/GPU", "MFU", "GPUs used", "$/M tokens"),
)


class _Planned:
    """A plan in the page's JSON."""

    def __init__(self, figures: Figures, key: str) -> None:
        self.figures, self.key = figures, key
        self.choices: list[Json] = self.at("choices")

    def at(self, key: str) -> Any:
        return self.figures.at(self.key + key)

    def number(self, key: str, unit: str) -> Cell:
        return self.figures(self.key + key, unit)

    @property
    def name(self) -> str:
        return str(self.at("cluster"))

    def job(self) -> list[Cell]:
        of = self.at("job")
        said = [f"{name} {value}" for name, value in of.items() if value not in (None, False)]
        return [f"{self.at('model')}: {', '.join(said)}".replace("_", " ")]

    def best(self) -> list[Cell]:
        one = self.choices[0]
        if not one["fits"]:
            return [
                f"{self.name}: the job doesn't fit, a GPU needs at least ",
                self.number("choices/0/memory_gib", "GiB"),
                ".",
            ]
        return [
            f"{self.name}, ", self.number("gpus", "count"), f" GPUs. The best choice is {_choice(one)}. A step takes ",
            self.number("choices/0/step_ms", "ms"), ", and a million tokens cost ",
            self.number("choices/0/usd_per_million_tokens", "$"), ". This choice stays the best in ",
            self.number("stays_best", "share"), " of the draws of the estimates.",
        ]  # fmt: skip

    def rows(self, most: int) -> list[list[Cell | Line]]:
        rows: list[list[Cell | Line]] = []
        for n, one in enumerate(self.choices[:most]):
            key = f"choices/{n}/"
            memory = self.number(key + "memory_gib", "GiB")
            row: list[Cell | Line] = [memory if one["fits"] else [memory, " too large"]]
            row += [self.number(key + name, "count") for name in ("tp", "pp", "ep", "levels")]
            row += [one["recompute"], _chunks(one)]
            row += [self.number(key + name, "ms") for name in TIMES]
            row += [self.number(key + "tokens_per_s_per_gpu", "count"), self.number(key + "mfu", "share")]
            row += [self.number(key + "gpus_used", "count"), self.number(key + "usd_per_million_tokens", "$")]
            rows.append([self.name, *row])
        return rows

    def table(self) -> Table:
        rows = [row[1:] for row in self.rows(MOST_ROWS)]
        return Table(HEADER, rows, f"{len(rows)} of {self.at('choices_found')} choices")

    def curve(self) -> Curves:
        curves = []
        for levels, name in ((1, "one level"), (2, "two levels")):
            of: dict[int, Json] = {}
            for one in self.choices:  # the best one of each number of ranks comes first
                if one["levels"] == levels:
                    of.setdefault(one["ep"], one)
            if of:
                points = [(ep, of[ep]["step_ms"]) for ep in sorted(of)]
                intervals = [tuple(of[ep]["step_interval_ms"]) for ep in sorted(of)]
                curves.append(Curve(f"{self.name}, {name}", points, intervals))
        title = "A step with the best choice, and its 80 % interval"
        return Curves(title, "expert-parallel ranks", "ms", curves, None)

    def exchanges(self) -> Iterator[list[Cell]]:
        if self.choices[0]["fits"]:
            yield [
                "Exchanges take ", self.number("choices/0/exchange_ms", "ms"), " of a step. Nothing computes during ",
                self.number("choices/0/exposed_ms", "ms"), " of this time. Without overlap a step takes ",
                self.number("choices/0/serial_step_ms", "ms"), ". A GPU trains ",
                self.number("choices/0/tokens_per_s_per_gpu", "count"), " tokens a second, at ",
                self.number("usd_per_gpu_hour", "$"), " an hour.",
            ]  # fmt: skip

    def fastest_by_degree(self) -> list[tuple[float, float]]:
        fastest: dict[int, float] = {}
        for one in self.choices:
            fastest[one["ep"]] = min(one["step_ms"], fastest.get(one["ep"], one["step_ms"]))
        return sorted(fastest.items())

    def parts(self) -> Strips:
        return _parts([(self, n, _choice(one)) for n, one in enumerate(self.choices[:MOST_BARS])])

    def sensitivity(self) -> Iterator[Block]:
        """Return a chart for each effect of an estimate's interval, its longest bar first."""
        found = self.at("measure_next")
        if not found:
            return
        for what, title in EFFECTS.items():
            numbers = sorted(range(len(found)), key=lambda n, what=what: -found[n][what])  # type: ignore[misc]
            numbers = [n for n in numbers if found[n][what] > DECIDES][:MOST_ESTIMATES]
            if numbers:
                top = found[numbers[0]][what]
                strips = [
                    Strip(
                        found[n]["key"],
                        [Segment(0, found[n][what] / top, "c0")],
                        self.number(f"measure_next/{n}/{what}", "share"),
                    )
                    for n in numbers
                ]
                rows = [
                    [found[n]["key"], found[n]["source"], strip.text] for n, strip in zip(numbers, strips, strict=True)
                ]
                table = Table(["estimate", "source", title], rows)
                yield Strips(title, strips, ticks(100 * top, " %"), [("c0", title)], table)

    def estimates(self) -> Iterator[Block]:
        rows: list[list[Cell]] = [
            [key, self.number(f"estimates/{key}/value", "plain"), one["source"], f"{one['spread']:.3g}"]
            for key, one in self.at("estimates").items()
        ]
        yield Table(["estimate", "value", "source", "spread"], rows, f"Estimates of {self.name}")
        errors = [[what, self.number(f"model_error/{name}", "plain")] for name, what in ERRORS.items()]
        yield Table(["the model's own error, of the logarithm of a step's time", "value"], errors)
        yield Words(
            [
                "An estimate's name has its unit; shares and exponents have none. The 80 % interval of an estimate is "
                "value / (1 + spread) to value * (1 + spread).",
                "The model's own error is measured: the time that published steps took, over the predicted time.",
            ]
        )


ERRORS = {
    "bias": "middle",
    "faster": "standard deviation that runs of one kind share, of those that are faster",
    "slower": "the same of those that are slower",
    "own": "standard deviation of one run about that",
}
EFFECTS = {"swing": "How far an estimate's interval moves the step's time",
           "regret": "By how much another choice may be better within an estimate's interval"}  # fmt: skip
TIMES = ("step_ms", "step_interval_ms/0", "step_interval_ms/1", "exchange_ms", "exposed_ms", "serial_step_ms")


def _chunks(one: Json) -> str:
    sizes = one["chunk_sizes"]
    return f"{len(sizes)}" + ("" if len(set(sizes)) == 1 else " ramp")


def _choice(one: Json) -> str:
    levels = "two levels" if one["levels"] == 2 else "one level"
    spread = f"tp {one['tp']}, pp {one['pp']}, ep {one['ep']}"
    return f"{spread}, {levels}, recompute {one['recompute']}, chunks {_chunks(one)}"


def _parts(bars: Sequence[tuple[_Planned, int, str]]) -> Strips:
    """Stack the parts of these choices' steps, all to one scale."""
    of_bars = [of.choices[n]["parts_ms"] for of, n, _ in bars]
    names = sorted(
        {name for parts in of_bars for name in parts}, key=lambda name: -max(p.get(name, 0) for p in of_bars)
    )
    colors = {name: f"c{min(n, MOST_PARTS)}" for n, name in enumerate(names)}
    top = max(sum(parts.values()) for parts in of_bars)
    strips, rows = [], []
    for (of, n, label), parts in zip(bars, of_bars, strict=True):
        segments, reached = [], 0.0
        for name in (name for name in names if name in parts):
            segments.append(Segment(reached / top, parts[name] / top, colors[name], f"{name}: {parts[name]:.4g} ms"))
            reached += parts[name]
        strips.append(Strip(label, segments, of.number(f"choices/{n}/step_ms", "ms")))
        cells = (of.number(f"choices/{n}/parts_ms/{name}", "ms") if name in parts else "-" for name in names)
        rows.append([label, *cells])
    legend = [(colors[name], name) for name in names[:MOST_PARTS]]
    legend += [(f"c{MOST_PARTS}", OTHER)] if len(names) > MOST_PARTS else []
    axis = ticks(top, " ms")
    return Strips("Parts of a step", strips, axis, legend, Table(["choice", *names], rows))


def _by_gpus(figures: Figures, names: Sequence[str]) -> Iterator[Block]:
    table = Table(["cluster", "GPUs", "step", "$/M tokens"], [
        [name, *(_known(figures, f"by_gpus/{n}/{k}/{of}", unit)
                 for of, unit in (("gpus", "count"), ("step_ms", "ms"), ("usd_per_million_tokens", "$")))]
        for n, name in enumerate(names) for k in range(len(figures.at(f"by_gpus/{n}")))
    ])  # fmt: skip
    for of, unit, title in (
        ("step_ms", "ms", "A step with the cheapest choice, every rank with as many micro-batches"),
        ("usd_per_million_tokens", "$ for a million tokens", "The price of the same"),
    ):
        curves = [
            Curve(name, [(one["gpus"], one[of]) for one in figures.at(f"by_gpus/{n}") if one[of] is not None])
            for n, name in enumerate(names)
        ]
        yield Curves(title, "GPUs", unit, [curve for curve in curves if curve.points], None)
    yield table


def _known(figures: Figures, key: str, unit: str) -> Cell:
    return "-" if figures.at(key) is None else figures(key, unit)


def _by_scale(figures: Figures, names: Sequence[str]) -> Curves:
    scales, prices = figures.at("scales"), figures.at("usd_per_million_tokens")
    curves = [
        Curve(name, [(scale, usd) for scale, usd in zip(scales, prices[n], strict=True) if usd is not None])
        for n, name in enumerate(names)
    ]
    rows: list[list[Cell]] = [
        [name, *(_known(figures, f"usd_per_million_tokens/{n}/{k}", "$") for k in range(len(scales)))]
        for n, name in enumerate(names)
    ]
    table = Table(["cluster", *(f"x{scale:g}" for scale in scales)], rows)
    title = "A million tokens with the cheapest choice that fits"
    return Curves(title, "factor of the model's widths", "$", [curve for curve in curves if curve.points], table)


def _break_even(figures: Figures, names: Sequence[str]) -> Table:
    rows: list[list[Cell]] = [
        [name, _known(figures, f"break_even_usd_per_gpu_hour/{n}", "$")] for n, name in enumerate(names)
    ]
    return Table(["cluster", f"$ a GPU-hour at which it costs as much as {names[0]}"], rows, "Break-even prices")
