"""A picture: a figure of matplotlib, written whole or not at all, as every file is."""

import io
import os
from typing import TYPE_CHECKING, Literal

from tritonmoe.runtime.files import write_whole

__all__ = ["new_figure", "write_picture"]

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
