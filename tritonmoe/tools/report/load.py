"""A picture of how evenly the tokens of a model are spread over the experts of its layers."""

import os
from collections.abc import Mapping, Sequence

from tritonmoe.tools.report.picture import new_figure, write_picture

__all__ = ["write_load_png"]


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
