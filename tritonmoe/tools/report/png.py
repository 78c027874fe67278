"""PNG pictures, by matplotlib: a layer's communication, the load of experts, and how far recorded routings agree.

A picture is written whole or not at all, as every file is.
"""

import io
import itertools
import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tritonmoe.runtime.files import Json, write_whole
from tritonmoe.tools.report.terminal import short_name
from tritonmoe.tools.report.timeline import Span, Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.gridspec import SubplotSpec

__all__ = [
    "COLORS",
    "group_of",
    "new_figure",
    "write_agreement_png",
    "write_load_png",
    "write_overlap_png",
    "write_picture",
    "write_png",
]


def new_figure(width: float, height: float, layout: Literal["constrained"] | None = None) -> "Figure":
    """Return an empty figure of so many inches; layout is that of Figure. Raises ImportError without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "drawing a PNG needs matplotlib, which is not installed: pip install 'tritonmoe[demo]'"
        ) from error
    # Not pyplot: it keeps global state and may look for a screen.
    figure = Figure(figsize=(width, height), dpi=120, layout=layout)
    FigureCanvasAgg(figure)
    return figure


def write_picture(path: str | os.PathLike, figure: "Figure", bbox_inches: str | None = None) -> None:
    """Write a figure as a PNG. Raises what write_whole raises; bbox_inches is that of savefig."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", bbox_inches=bbox_inches)
    write_whole(path, drawn.getvalue(), "picture")


COLORS = {
    "experts": "#3f66d6",
    "dispatch": "#c9711a",
    "weight gradients": "#22397f",
    "combine": "#f2b566",
    "routing data, sums": "#b3b8c4",
}
"""Blue computes, amber travels, as on the site and in the pages of reports."""
INK = "#172036"
SHADES = ("#edf1fc", COLORS["experts"], COLORS["weight gradients"])
GROUP_OF_SHORT_NAME = {"d": "dispatch", "c": "combine", "e": "experts", "w": "weight gradients"}


def group_of(span: Span) -> str:
    """Return the legend entry of a step; a backward's exchange has that of the forward's in the same direction."""
    return GROUP_OF_SHORT_NAME.get(short_name(span), "routing data, sums")


def write_png(
    path: Path, traffic_rows: Sequence[Sequence[int]], timelines: Sequence[Timeline], *, title: str, note: str = ""
) -> None:
    """Draw the (W, W) traffic as a heat map and every timeline to one scale, and write the picture.

    Raises:
        ImportError: matplotlib is not installed. OSError: the picture could not be written; no part of it is left.
    """
    figure = new_figure(14, 2.0 + 1.7 * max(2, len(timelines)), "constrained")
    figure.suptitle(f"{title}\n{note}" if note else title, fontsize=12)
    grid = figure.add_gridspec(max(1, len(timelines)), 2, width_ratios=(1, 2.6))
    _draw_heat_map(figure.add_subplot(grid[:, 0]), traffic_rows)
    _draw_timelines(figure, [grid[number, 1] for number in range(len(timelines))], timelines)
    write_picture(path, figure)


def write_overlap_png(
    path: Path, timelines: Sequence[Timeline], results: Json, notes: Sequence[str], legend: str
) -> None:
    """Draw the timelines to one scale and the time of every schedule over the number of chunks.

    results: what the overlap benchmark gives: link, model, tokens, routing, pass, variants, summary.
    notes, legend: the figures that stand above the drawings, and the meaning of words in lines below.
    Raises:
        ImportError: matplotlib is not installed. OSError: the picture could not be written; no part of it is left.
    """
    legend_height = 0.2 * (1 + len(legend.splitlines()))
    figure = new_figure(14, 4.6 + 1.7 * len(timelines) + legend_height, "constrained")
    title = (
        f"{results['model']}, T={results['tokens']} on each of {results['ranks']} ranks, {results['routing']} routing, "
        f"{results['pass']}; {results['link']}"
    )
    figure.suptitle("\n".join(textwrap.fill(line, 150) for line in (title, *notes)), fontsize=12)
    heights = [*[1.7] * len(timelines), 3.7, legend_height]
    grid = figure.add_gridspec(len(heights), 1, height_ratios=heights)
    _draw_timelines(figure, [grid[number, 0] for number in range(len(timelines))], timelines)
    _draw_sweep(figure.add_subplot(grid[len(timelines), 0]), results)
    words = figure.add_subplot(grid[len(timelines) + 1, 0])
    words.set_axis_off()
    words.text(0, 1, legend, va="top", family="monospace", fontsize=9, transform=words.transAxes)
    write_picture(path, figure)


def _draw_timelines(figure: "Figure", cells: "Sequence[SubplotSpec]", timelines: Sequence[Timeline]) -> None:
    longest_ms = max((timeline.total_s for timeline in timelines), default=0.0) * 1e3
    for number, timeline in enumerate(timelines):
        axes = figure.add_subplot(cells[number])
        _draw_lanes(axes, timeline, longest_ms)
        if number == len(timelines) - 1:
            axes.set_xlabel("milliseconds")
            handles = [axes.barh([0], [0], color=color, label=name) for name, color in COLORS.items()]
            figure.legend(handles=handles, loc="outside lower right", ncols=len(handles), fontsize=9, frameon=False)


def _draw_sweep(axes: "Axes", results: Json) -> None:
    series: dict[str, list[tuple[int, Mapping[str, float]]]] = {}
    for variant in results["sweep"]:
        series.setdefault(variant["series"], []).append((variant["num_chunks"], results["variants"][variant["name"]]))
    for color, (name, points) in zip(itertools.cycle(COLORS.values()), series.items(), strict=False):
        chunks = [num_chunks for num_chunks, _ in points]
        medians = [times["median_ms"] for _, times in points]
        below = [times["median_ms"] - times["lower_quartile_ms"] for _, times in points]
        above = [times["upper_quartile_ms"] - times["median_ms"] for _, times in points]
        axes.errorbar(chunks, medians, yerr=[below, above], marker="o", capsize=3, label=name, color=color)
    for kind in ("compute", "communication"):
        time_ms = results["summary"][f"T_{kind}"]["median_ms"]
        axes.axhline(time_ms, color=INK, lw=1, ls="--" if kind == "compute" else ":", label=f"T_{kind}")
    axes.axhline(results["summary"]["auto"]["median_ms"], color="#d6336c", lw=1, label="auto")
    axes.set_xlabel("number of chunks")
    axes.set_xticks(sorted({num_chunks for points in series.values() for num_chunks, _ in points}))
    axes.set_ylabel("milliseconds")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=9, ncols=2)


def _draw_heat_map(axes: "Axes", traffic_rows: Sequence[Sequence[int]]) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    num_ranks = len(traffic_rows)
    every = [value for values in traffic_rows for value in values]
    least, largest = min(every, default=0), max(every, default=0)
    shades = LinearSegmentedColormap.from_list("traffic", SHADES)
    axes.imshow(traffic_rows, cmap=shades, vmin=least, vmax=max(least + 1, largest))
    axes.set_title(f"tokens of rank i that need rank k: {least:,} (lightest) .. {largest:,}", fontsize=10)
    axes.set_xlabel("to rank k")
    axes.set_ylabel("from rank i")
    step = max(1, num_ranks // 16)
    axes.set_xticks(range(0, num_ranks, step))
    axes.set_yticks(range(0, num_ranks, step))
    if num_ranks <= 16:
        for i, values in enumerate(traffic_rows):
            for k, value in enumerate(values):
                color = "white" if value - least > 0.4 * (largest - least) else INK
                axes.text(k, i, str(value), ha="center", va="center", color=color, fontsize=11)


def _draw_lanes(axes: "Axes", timeline: Timeline, longest_ms: float) -> None:
    axes.set_title(f"{timeline.name}: {timeline.total_s * 1e3:.0f} ms (rank {timeline.rank})", fontsize=11, loc="left")
    lanes = timeline.lanes
    for span in timeline.spans:
        group, place = group_of(span), lanes.index(span.lane)
        start_ms, width_ms = span.start_s * 1e3, (span.end_s - span.start_s) * 1e3
        axes.barh(place, width_ms, left=start_ms, height=0.72, color=COLORS[group], edgecolor="white", lw=0.6)
        if width_ms > 0.018 * longest_ms and group != "routing data, sums":
            label = "w" if span.chunk is None else "L" if span.chunk < 0 else str(span.chunk)
            ink = INK if group == "combine" else "white"
            axes.text(start_ms + width_ms / 2, place, label, ha="center", va="center", color=ink, fontsize=8)
    forward_ms = timeline.forward.total_s * 1e3
    axes.axvline(forward_ms, color=INK, lw=1, ls="--")
    axes.text(forward_ms, -0.62, " backward", ha="left", va="bottom", fontsize=8, color=INK)
    axes.text(forward_ms, -0.62, "forward ", ha="right", va="bottom", fontsize=8, color=INK)
    axes.set_yticks(range(len(lanes)), lanes)
    axes.set_ylim(len(lanes) - 0.4, -0.85)
    axes.set_xlim(0, max(longest_ms * 1.01, 1e-6))
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def write_agreement_png(
    path: str | os.PathLike, agreements: Mapping[str, Mapping[str, float]], *, title: str = "agreement of the routing"
) -> None:
    """Draw the share of equal ids over the layers, a line for each comparison, and write the picture.

    Args:
        agreements: what is compared -> what RoutingRecording.agreement() gives: name of a layer -> share of equal ids.
            All of one model.
    Raises:
        ImportError: matplotlib is not installed. ValueError: there is no layer, or layers differ. OSError: the
            picture could not be written; no part of it is left.
    """
    layers = next(iter(agreements.values()), {})
    if not layers or any(list(shares) != list(layers) for shares in agreements.values()):
        raise ValueError("there is nothing to draw: every agreement must have the same layers, and at least one")
    figure = new_figure(3.5 + min(14.0, 0.16 * len(layers) + 3), 3.5)
    axes = figure.add_subplot()
    for name, shares in agreements.items():
        mean = sum(shares.values()) / len(shares)
        axes.plot(
            range(len(layers)), [100 * share for share in shares.values()], marker="o", label=f"{name} ({mean:.2%})"
        )
    axes.set_title(title, fontsize=11)
    axes.set_xlabel(f"layer, from {next(iter(layers))}")
    axes.locator_params(axis="x", integer=True)
    axes.set_ylabel("equal ids, %")
    axes.legend(fontsize=8)
    write_picture(path, figure, bbox_inches="tight")


def write_load_png(
    path: str | os.PathLike, loads: Mapping[str, Sequence[int]], *, title: str = "load of the experts"
) -> None:
    """Draw a heat map, a line for each layer and a column for each expert, and write the picture.

    Args:
        loads: name of a layer -> pairs of each of its experts. 1.0 in the picture is the layer's mean; layers may
            have different numbers of experts.
    Raises:
        ImportError: matplotlib is not installed. ValueError: there is no layer. OSError: the picture
            could not be written; no part of it is left.
    """
    if not loads:
        raise ValueError("there is nothing to draw: no layer has been called yet")
    num_experts = max(len(load) for load in loads.values())
    relative = []
    for load in loads.values():
        mean = sum(load) / len(load) or 1.0
        relative.append([count / mean for count in load] + [float("nan")] * (num_experts - len(load)))
    figure = new_figure(3.5 + min(14.0, 0.16 * num_experts + 3), 1.5 + 0.3 * len(loads))
    axes = figure.add_subplot()
    image = axes.imshow(relative, cmap="viridis", vmin=0.0, vmax=max(2.0, min(8.0, _largest(relative))), aspect="auto")
    axes.set_title(title, fontsize=11)
    axes.set_xlabel("expert")
    axes.set_yticks(range(len(loads)), list(loads), fontsize=8)
    figure.colorbar(image, ax=axes, label="multiple of the mean load")
    write_picture(path, figure, bbox_inches="tight")


def _largest(relative: Sequence[Sequence[float]]) -> float:
    return max((value for line in relative for value in line if value == value), default=0.0)
