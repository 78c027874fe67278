"""How the times of `tritonmoe bench transformers` are shown: a table, a picture."""

from collections.abc import Sequence
from pathlib import Path

from tritonmoe.runtime.files import Json
from tritonmoe.tools.report.picture import new_figure, write_picture

__all__ = ["as_table", "write_png"]


def as_table(results: list[Json], names: Sequence[str]) -> str:
    """Return a line for each case: median ms and peak MB under every implementation, and the ratio.

    Args:
        names: the implementations, ours first.
    """
    names = _measured(results, names)
    head = ["", "pass", "T", "dtype", "routing", *names, "ratio"]
    lines = [head]
    for case in results:
        cells = [
            f"{case['times'][name]['median_ms']:.1f} / {case['peak_mb'][name]:.1f}" if name in case["times"] else "-"
            for name in names
        ]
        about = [str(case[key]) for key in ("subject", "pass", "T", "dtype", "routing")]
        lines.append([*about, *cells, f"{case['ratio']:.2f} over {case['best_other']}"])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    kept = [
        f"kept for backward, {case['subject']} {case['dtype']} {case['routing']}, MB: "
        + "  ".join(f"{name} {value:.1f}" for name, value in case["kept_for_backward_mb"].items())
        for case in results
        if "kept_for_backward_mb" in case
    ]
    return "\n".join(["median ms / peak MB of a call; ratio: best other median over ours", *text, *kept])


def write_png(path: Path, results: list[Json], names: Sequence[str]) -> None:
    """Draw a bar for every implementation of every case, as a multiple of the median time of names[0]."""
    figure = new_figure(11, 1.2 + 0.55 * len(results), "constrained")
    axes = figure.add_subplot()
    ours, names = names[0], _measured(results, names)
    height = 0.8 / len(names)
    for position, name in enumerate(names):
        here = [(line, case) for line, case in enumerate(results) if name in case["times"]]
        medians = [case["times"][name]["median_ms"] / case["times"][ours]["median_ms"] for _, case in here]
        axes.barh([line + position * height for line, _ in here], medians, height=height, label=name)
    labels = [f"{case['subject']}, {case['pass']}, {case['dtype']}, {case['routing']}" for case in results]
    axes.set_yticks([line + 0.4 - height / 2 for line in range(len(results))], labels, fontsize=8)
    axes.invert_yaxis()
    axes.axvline(1.0, color="#333333", lw=1)
    axes.set_xlabel(f"multiple of {ours}'s time")
    axes.legend()
    write_picture(path, figure)


def _measured(results: list[Json], names: Sequence[str]) -> list[str]:
    return [name for name in names if any(name in case["times"] for case in results)]
