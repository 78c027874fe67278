"""What arguments of a command may be: refused while they are parsed, before anything is measured."""

import argparse
import os
from pathlib import Path

__all__ = ["output_file", "positive"]


def positive(text: str) -> int:
    """Give a whole number of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return value


def output_file(text: str) -> Path:
    """Give the path of a file that can be written, as far as that is known before: its folder may be made yet."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"must be a file, and {text!r} is a directory")
    folder = path.resolve().parent
    place = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if path.exists() and not path.is_file():  # a device or a pipe is written to as it is
        place = path
    elif not place.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} can't be written: {place} is no directory")
    if not os.access(place, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text!r} can't be written: no permission to write to {place}")
    return path
