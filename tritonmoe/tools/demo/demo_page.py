"""What `tritonmoe demo` found, as an HTML report."""

from tritonmoe.tools.demo.demo_text import Results, as_json
from tritonmoe.tools.demo.measure import VARIANTS
from tritonmoe.tools.report.charts import Curve, Curves, Heat
from tritonmoe.tools.report.figures import Cell, Figures, Line, Table
from tritonmoe.tools.report.html import Page, Section
from tritonmoe.tools.report.lane_chart import lanes_chart, ranks_within
from tritonmoe.tools.report.perfetto import chrome_trace

__all__ = ["as_page"]


def as_page(results: Results) -> Page:
    """Return the page: lanes, exposed communication, traffic, and how the loss fell."""
    data = as_json(results)
    number, layer = Figures(data), results.layer
    variants: list[list[Cell]] = [
        [name, number(f"layer/median_s/{name}", "s"), number(f"layer/exposed_share/{name}", "share")]
        for name in VARIANTS
    ]
    whole = Table(["schedule", "forward + backward", "communication exposed"], variants, "Medians of the rounds")
    runs = {name: layer.timelines[name] for name in ("serial", "overlapped")}
    ranks = ranks_within(runs, first=[one.rank for one in layer.shown])
    runs = {name: [timelines[rank] for rank in ranks] for name, timelines in runs.items()}
    steps = len(data["training"]["losses_nats"])
    every = max(1, steps // 12)
    shown = sorted({*range(0, steps, every), steps - 1})
    losses: list[list[Cell]] = [[f"{step + 1}", number(f"training/losses_nats/{step}", "plain")] for step in shown]
    curve = Curve("loss", [(step + 1, data["training"]["losses_nats"][step]) for step in shown])
    names = [str(rank) for rank in range(results.num_ranks)]
    traffic = Heat(
        "Tokens of a rank that need an expert of another",
        *("layer/traffic_rows", layer.traffic_rows, "count", "from rank", "to rank", names, names),
        base=min(map(min, layer.traffic_rows)),
    )
    sections = [
        Section("One layer, serial and overlapped", [
            lanes_chart("The median round of each schedule: forward, then backward", runs, whole)]),
        Section("Traffic of this layer", [traffic]),
        Section("Training", [Curves("Loss", "step", "nats a byte", [curve], Table(["step", "nats a byte"], losses))]),
    ]  # fmt: skip
    summary: list[Line] = [
        [number("ranks", "count"), f" emulated ranks on {data['machine']['name']}; the link is emulated, in wall time"],
        ["overlapped is ", number("layer/speed_up", "times"), " as fast as serial with the same chunks, ",
         number("layer/speed_up_over_one_chunk", "times"), " as fast as serial in one chunk"],
        "serial and overlapped gave the same losses, bit for bit" if results.is_bit_equal
        else "WRONG: serial and overlapped gave different losses",
    ]  # fmt: skip
    return Page("tritonmoe demo", summary, sections, data, chrome_trace(runs))
