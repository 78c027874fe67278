"""Which files of a checkpoint directory are read: its own, and none that a name or a link in it leads to elsewhere."""

import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from tritonmoe.runtime.files import check_regular

__all__ = ["check_name", "file_inside"]

CACHED_REPOSITORY = re.compile(r"(models|datasets|spaces|kernels)--.+")


def check_name(name: object, where: str) -> str:
    """Return the name of a file in a directory, or in one below it; `where` says what names it.

    Raises:
        ValueError: it is no name, leads out of the directory, or is one of several ways to write a name.
    """
    if not isinstance(name, str) or not name.isprintable() or any(character in name for character in "\\:"):
        raise ValueError(f"{where} must be the name of a file, got {name!r}")
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{where} must name a file in the same directory, got {name!r}")
    if str(path) != name or not path.name:  # "./a" and "a" would be one file under two names
        raise ValueError(f"{where} must be the name of a file in its plainest form, got {name!r}")
    return name


def file_inside(directory: Path, name: str) -> Path:
    """Return the path of an ordinary file of a directory, following links that stay there.

    A checkpoint may come from anybody, and a link in it may lead to what its author can't read and its reader can.
    Links of Hugging Face's cache lead from models--NAME/snapshots/REVISION to files in models--NAME/blobs, which may be
    links into the blobs of the whole cache: both are followed, for such a directory alone.

    Raises:
        ValueError: a link leads out of the directory, or it is a directory, a pipe, a socket or a device.
        FileNotFoundError: it is not there, or a link to nothing.
    """
    path = directory / name
    folder, target = Path(os.path.realpath(directory)), Path(os.path.realpath(path))
    if not any(target.is_relative_to(place) for place in (folder, *_blobs_of_cache(folder))):
        raise ValueError(
            f"{path} is a link out of the directory, to {target}: if that file is meant, copy it in the link's place"
        )
    check_regular(path)
    return path


def _blobs_of_cache(folder: Path) -> Iterator[Path]:
    """Return where the links of a snapshot may lead; nothing for a directory that is none of Hugging Face's cache."""
    for above in folder.parents:
        if above.name == "snapshots" and CACHED_REPOSITORY.fullmatch(above.parent.name):
            yield above.parent / "blobs"
            yield above.parent.parent / "blobs"
