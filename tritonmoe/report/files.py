"""Pictures are written whole or not at all, as every file is: neither a full disk nor Ctrl-C leaves a part of one."""

import io
import os
from typing import Any

from tritonmoe.runtime.files import write_whole

__all__ = ["write_picture"]


def write_picture(path: str | os.PathLike, figure: Any, **options: Any) -> None:
    """Write a matplotlib figure as a PNG; raises what write_whole does."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", **options)
    write_whole(path, drawn.getvalue(), "picture")
