"""A picture of how far two recordings of the routing agree, layer by layer."""

import os
from collections.abc import Mapping

from tritonmoe.tools.report.picture import new_figure, write_picture

__all__ = ["write_agreement_png"]


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
