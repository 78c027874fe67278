"""Pictures of the site as SVG, drawn from bench/results: each for wide windows, and once more for phones."""

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape

from bench.readme.results import DOCS, load, load_all, table_head, table_row, where
from tritonmoe.tools.demo.measure import NUM_CHUNKS
from tritonmoe.tools.report.png import COLORS, group_of
from tritonmoe.tools.report.timeline import Timeline

__all__ = ["PICTURES", "dense_or_moe_figure", "overlap_figure", "picture", "pictures"]

WIDTHS = {"": 720, "-narrow": 350}
STYLE = f"""<style>
  svg {{ font: 14px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }}
  .ground {{ fill: #ffffff; }} .words {{ fill: #172036; }} .faint {{ fill: #596379; }} .strong {{ font-weight: 700; }}
  .line {{ stroke: #596379; stroke-dasharray: 4 3; }} .rail {{ fill: #f3f5fa; }} .other {{ fill: #b3b8c4; }}
  .small {{ font-size: 12px; }} .on-dark {{ fill: #ffffff; }} .on-light {{ fill: #172036; }}
  .experts {{ fill: {COLORS["experts"]}; }} .dispatch {{ fill: {COLORS["dispatch"]}; }}
  .weight-gradients {{ fill: {COLORS["weight gradients"]}; }} .combine {{ fill: {COLORS["combine"]}; }}
  .routing-data-sums {{ fill: #b3b8c4; }}
  @media (prefers-color-scheme: dark) {{
    .ground {{ fill: #12161f; }} .words {{ fill: #e4e8f1; }} .faint {{ fill: #aab3c5; }} .line {{ stroke: #aab3c5; }}
    .rail {{ fill: #1b212d; }} .other, .routing-data-sums {{ fill: #6d7484; }} .experts {{ fill: #5b7fe8; }}
    .weight-gradients {{ fill: #9db3ff; }} .dispatch {{ fill: #d8822d; }} .combine {{ fill: #f2b566; }}
  }}
</style>"""
LETTER, STRONG_LETTER = 7.4, 9.6
"""Pixels that a letter needs at most, on average of a line."""


class Bar(NamedTuple):
    """One bar: what it stands for, its value and how that is written, and the class of its color."""

    label: str
    value: float
    text: str
    color: str


def picture(name: str, alt: str, folder: str = "images") -> str:
    """Return the HTML that shows a picture of PICTURES in a page."""
    narrow = f'<source media="(max-width: 700px)" srcset="{folder}/{name}-narrow.svg">'
    return f'<picture class="picture">{narrow}<img alt="{escape(alt)}" src="{folder}/{name}.svg"></picture>'


def overlap_figure(name: str) -> str:
    """Return the picture of the demo's layer with its caption."""
    results = load(name)["results"]
    alt = "One MoE layer on four emulated ranks: its exchanges in turn with compute, and overlapped"
    return "\n".join(
        [
            picture("overlap", alt),
            "",
            f"One MoE layer on {results['ranks']} **emulated** ranks, forward and backward: blue computes, "
            "amber travels. "
            f"With the same {NUM_CHUNKS} chunks, overlapped is {results['speed_up']:.2f} times as fast as in turn, "
            "which takes longer than in turn in one chunk: `tritonmoe demo` measures and draws it on your machine.",
        ]
    )


def pictures() -> dict[Path, str]:
    """Return every picture's file and what must be in it."""
    return {
        DOCS / "images" / f"{name}{ending}.svg": draw(width)
        for name, draw in PICTURES.items()
        for ending, width in WIDTHS.items()
    }


def _svg(width: int, height: float, title: str, parts: Sequence[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height:g}" role="img"'
    ground = f'<rect class="ground" width="{width}" height="{height:g}"/>'
    title = escape(title)
    return "\n".join([f'{head} aria-label="{title}">', f"<title>{title}</title>", STYLE, ground, *parts, "</svg>\n"])


def _text(x: float, y: float, words: str, kind: str = "words", anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(words)}</text>'


def _rect(x: float, y: float, width: float, height: float, kind: str, radius: float = 2) -> str:
    kind = kind.replace(",", "").replace(" ", "-")
    return f'<rect class="{kind}" x="{x:.1f}" y="{y:g}" width="{width:.1f}" height="{height:g}" rx="{radius:g}"/>'


def _legend(width: int, y: float, names: Sequence[str]) -> tuple[list[str], float]:
    """Return the colors' names in as many lines as they need, and where these end."""
    parts, x = [], 0.0
    for name in names:
        needed = 22 + LETTER * len(name) + 12
        if x and x + needed > width:
            x, y = 0.0, y + 20
        parts += [_rect(x, y - 10, 12, 12, name), _text(x + 18, y, name, "faint")]
        x += needed
    return parts, y + 8


def overlap_picture(width: int) -> str:
    """Draw the demo's layer, serial and overlapped, to one scale."""
    results = load("demo_cpu")["results"]
    runs = [Timeline.of_plain(one) for one in results["timelines"]]
    longest_s = max(run.total_s for run in runs)
    parts: list[str] = []
    y = 18.0
    for run in runs:
        words = {"serial": "in turn", "overlapped": "overlapped"}[run.name]
        parts.append(_text(0, y, f"{words}: {1e3 * run.total_s:.0f} ms", "words strong"))
        for lane, at in (("compute", y + 10), ("comm", y + 38)):
            parts.append(_rect(0, at, width, 25, "rail"))
            for span in run.spans:
                wide = width * (span.end_s - span.start_s) / longest_s
                if span.lane != lane or wide < 0.3:
                    continue
                left, group = width * span.start_s / longest_s, group_of(span)
                parts.append(_rect(left, at, max(wide - 0.8, 0.5), 25, group))
                if wide > 13 and group in ("experts", "dispatch", "combine") and (span.chunk or 0) >= 0:
                    ink = "on-light" if group == "combine" else "on-dark"
                    parts.append(_text(left + wide / 2, at + 17, str(span.chunk), f"small {ink}", "middle"))
        border = width * run.forward.total_s / longest_s
        parts.append(f'<line class="line" x1="{border:.1f}" x2="{border:.1f}" y1="{y + 4:g}" y2="{y + 80:g}"/>')
        parts.append(_text(border - 5, y + 78, "forward", "faint small", "end"))
        parts.append(_text(border + 5, y + 78, "backward", "faint small"))
        y += 106
    legend, y = _legend(width, y - 4, ("experts", "weight gradients", "dispatch", "combine"))
    return _svg(
        width, y, "One MoE layer on four emulated ranks, its exchanges in turn and overlapped", [*parts, *legend]
    )


def _bars(width: int, title: str, bars: Sequence[Bar], largest: float | None = None) -> str:
    """Draw bars to one scale, each below its words, so that a phone has room for both."""
    largest = largest or max(bar.value for bar in bars)
    room = width - STRONG_LETTER * max(len(bar.text) for bar in bars) - 10
    parts, y = [], 16.0
    for bar in bars:
        parts.append(_text(0, y, bar.label))
        wide = room * bar.value / largest
        parts.append(_rect(0, y + 7, wide, 18, bar.color, 3))
        parts.append(_text(wide + 8, y + 21, bar.text, "words strong"))
        y += 48
    return _svg(width, y - 10, title, parts)


def layer_bars(width: int) -> str:
    """Draw one layer's forward and backward beside the best of transformers."""
    bars = []
    for case in load("moe_mlp_cpu")["results"]:
        wanted = {"E_K_D_F": [64, 8, 512, 256], "T": 2048, "pass": "forward+backward"}
        if wanted.items() <= case.items():
            ours, other = case["times"]["tritonmoe"]["median_ms"], case["times"][case["best_other"]]["median_ms"]
            dtype = {"float32": "fp32", "bfloat16": "bf16"}[case["dtype"]]
            bars += [
                Bar(f"tritonmoe, {dtype}", ours, f"{ours:.0f} ms", "experts"),
                Bar(f"transformers' {case['best_other']}, {dtype}", other, f"{other:.0f} ms", "other"),
            ]
    return _bars(width, "One layer's forward and backward, tritonmoe and transformers", bars)


def overlap_bars(width: int) -> str:
    """Draw one layer over a real link: serial, overlapped, and what no schedule can beat."""
    summary = load("overlap_netns_both_balanced")["results"]["summary"]
    times = {name: summary[f"T_{name}"]["median_ms"] for name in ("serial", "overlapped", "compute", "communication")}
    bound = max(times["compute"], times["communication"])
    bars = [
        Bar("compute and exchanges in turn", times["serial"], f"{times['serial']:.0f} ms", "other"),
        Bar("overlapped", times["overlapped"], f"{times['overlapped']:.0f} ms", "experts"),
        Bar("the longer of both alone", bound, f"{bound:.0f} ms", "dispatch"),
    ]
    return _bars(width, "One layer over a link that is as slow as its compute", bars)


def exchange_bars(width: int) -> str:
    """Draw a model's step over two ranks beside transformers' own exchange."""
    bars = []
    for name, one in load("expert_parallel_netns")["results"]["variants"].items():
        exchange, experts = name.split(", ")
        time_s = one["step"]["median_ms"] / 1e3
        color = "experts" if exchange == "tritonmoe" else "other"
        bars.append(Bar(f"exchange: {exchange}, experts: {experts}", time_s, f"{time_s:.1f} s", color))
    return _bars(width, "A training step over two ranks", bars)


def node_bars(width: int) -> str:
    """Draw one layer over nodes with slow uplinks, on one level and on two."""
    bars = []
    for one in load_all("overlap_nodes"):
        summary, uplink = one["results"]["summary"], one["results"]["link"].rpartition(" ")[2]
        for name, key, color in (("one level", "T_overlapped", "other"), ("two levels", "T_two levels", "experts")):
            time_ms = summary[key]["median_ms"]
            bars.append(
                Bar(f"{name}, an uplink of {uplink.replace('mbit', ' Mbit/s')}", time_ms, f"{time_ms:.0f} ms", color)
            )
    return _bars(width, "One layer over nodes with slow uplinks, on one level and on two", bars)


def doctor_bars(width: int) -> str:
    """Draw how often the doctor names the first cause, and how often it is silent beside healthy jobs."""
    bars = []
    for ranks, words in (("emulated", "emulated ranks"), ("netns", "real links")):
        summaries = [one["results"]["summary"] for one in load_all(f"doctor_{ranks}")]
        for key, said in (
            ("first cause right", "first cause named"),
            ("healthy ones silent", "healthy, and called so"),
        ):
            right, of = (sum(one[key][name] for one in summaries) for name in ("right", "of"))
            color = "experts" if key == "first cause right" else "dispatch"
            bars.append(Bar(f"{said}, {words}", right / of, f"{right} of {of}", color))
    return _bars(width, "How often the doctor is right", bars, largest=1.0)


def dense_or_moe_curves(width: int) -> str:
    """Draw the held-out losses of dense blocks and of experts, a line for each seed."""
    curves = [(run["kind"], run["curve"]) for run in load("dense_or_moe")["results"]["runs"]]
    low, high = (pick(loss for _, curve in curves for _, loss in curve) for pick in (min, max))
    last, left, top, height = curves[0][1][-1][0], 40, 30, 220

    def at_x(step: int) -> float:
        return left + (width - left - 8) * step / last

    def at_y(loss: float) -> float:
        return top + height * (high - loss) / (high - low)

    parts = [_text(0, 16, "nats a byte, held out", "faint")]
    for tenth in range(math.ceil(10 * low), math.floor(10 * high) + 1):
        y = at_y(tenth / 10)
        parts.append(f'<line class="line" x1="{left}" x2="{width}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(left - 6, y + 5, f"{tenth / 10:.1f}", "faint small", "end"))
    for kind, curve in curves:
        points = " ".join(f"{at_x(step):.1f},{at_y(loss):.1f}" for step, loss in curve)
        color = COLORS["experts"] if kind == "moe" else "#b3b8c4"
        parts.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="2"/>')
    base = top + height + 20
    for step in range(0, last + 1, 200):
        parts.append(_text(at_x(step), base, str(step), "faint small", "end" if step == last else "middle"))
    parts += [_text(left, base + 20, "steps of training", "faint small")]
    for x, kind, words in ((left + 112, "experts", "experts"), (left + 192, "other", "dense block")):
        parts += [_rect(x, base + 10, 12, 12, kind), _text(x + 18, base + 21, words, "words small")]
    return _svg(width, base + 30, "The held-out loss of experts and of a dense block, by steps of training", parts)


def dense_or_moe_figure(name: str) -> str:
    """Return the picture of dense_or_moe_curves with its caption, and the losses at the end."""
    data = load(name)
    runs = data["results"]["runs"]
    ends = {kind: [run["curve"][-1][1] for run in runs if run["kind"] == kind] for kind in ("dense", "moe")}
    cpu_s = {kind: statistics.median(run["cpu_s"] for run in runs if run["kind"] == kind) for kind in ends}
    gains = [dense - moe for dense, moe in zip(ends["dense"], ends["moe"], strict=True)]
    num_seeds, steps = len(gains), runs[0]["curve"][-1][0]
    rows = [
        table_row(words, f"{statistics.mean(ends[kind]):.3f}", f"{min(ends[kind]):.3f} to {max(ends[kind]):.3f}",
                  f"{cpu_s[kind]:.0f} s")
        for kind, words in (("dense", "dense block"), ("moe", "Mixture of Experts"))
    ]  # fmt: skip
    alt = "The held-out loss of experts and of a dense block, by steps of training"
    return "\n".join(
        [
            picture("dense-or-moe", alt, "../images"),
            "",
            *table_head(f"after {steps} steps, {num_seeds} seeds", "held out: mean", "lowest to highest", "CPU time"),
            *rows,
            "",
            f"With the same seed, the loss with experts is lower by {min(gains):.3f} to {max(gains):.3f}. "
            f"`python -m bench.dense_or_moe` on {where(data['environment'])}, fp32, one thread; CPU time "
            "is the median, on a machine that did other work too.",
        ]
    )


PICTURES: dict[str, Callable[[int], str]] = {
    "overlap": overlap_picture,
    "result-layer": layer_bars,
    "result-overlap": overlap_bars,
    "result-exchange": exchange_bars,
    "result-nodes": node_bars,
    "result-doctor": doctor_bars,
    "dense-or-moe": dense_or_moe_curves,
}
"""By name: what draws a picture in so many pixels' width."""
