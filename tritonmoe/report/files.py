"""Files are written whole or not at all: neither a full disk nor Ctrl-C leaves a part of one."""

import io
import os
from pathlib import Path
from typing import Any

__all__ = ["write_picture", "write_whole"]


def write_picture(path: str | os.PathLike, figure: Any, **options: Any) -> None:
    """Write a matplotlib figure as a PNG; raises what write_whole does."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", **options)
    write_whole(path, drawn.getvalue(), "picture")


def write_whole(path: str | os.PathLike, content: bytes | str, what: str) -> None:
    """Write a file, beside its place first, in a folder that may be new; a device or a pipe is written to as it is.

    what: "trace", say; the error's message names it.
    Raises:
        OSError: it could not be written, on a full disk for example; then what was there before is there still.
    """
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    try:
        if path.exists() and not path.is_file():
            path.write_bytes(data)
            return
        target = path.resolve()  # a link stays one
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(target.name + ".part")
        try:
            part.write_bytes(data)
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise OSError(error.errno, f"the {what} could not be written: {error.strerror}", str(path)) from error
