"""Pictures are written whole or not at all, as every file is: neither a full disk nor Ctrl-C leaves a part of one."""

import io
import os
from typing import TYPE_CHECKING

from tritonmoe.runtime.files import write_whole

__all__ = ["write_picture"]


if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_picture(path: str | os.PathLike, figure: "Figure", bbox_inches: str | None = None) -> None:
    """Write a matplotlib figure as a PNG. It raises what write_whole raises; bbox_inches is that of savefig."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", bbox_inches=bbox_inches)
    write_whole(path, drawn.getvalue(), "picture")
