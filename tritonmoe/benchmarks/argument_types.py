"""What arguments of a command may be: refused while they are parsed, before anything is measured."""

import argparse
import importlib.util
import os
from pathlib import Path

__all__ = ["output_file", "output_folder", "picture_file", "positive"]


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
    if os.path.exists(path) and not path.is_file():
        _check_access(path, text)  # a device or a pipe is written to as it is
    else:
        _check_folder(path.resolve().parent, text)
    return path


def picture_file(text: str) -> Path:
    """Give the path of a PNG that can be drawn and written, as far as that is known before."""
    path = output_file(text)
    if path.suffix.lower() not in (".png", ""):
        name = path.with_suffix(".png")
        raise argparse.ArgumentTypeError(f"a picture is written as PNG: call it {str(name)!r}, got {text!r}")
    if importlib.util.find_spec("matplotlib") is None:
        raise argparse.ArgumentTypeError("matplotlib, which draws it, is not installed: pip install 'tritonmoe[demo]'")
    return path


def output_folder(text: str) -> Path:
    """Give the path of a folder that can be written to, as far as that is known before: it may be made yet."""
    path = Path(text)
    _check_folder(path.resolve(), text)
    return path


def _check_folder(folder: Path, text: str) -> None:
    """Refuse a folder that files can't be written to, or that can't be made."""
    place = next(parent for parent in (folder, *folder.parents) if os.path.exists(parent))
    if not place.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} can't be written: {place} is no directory")
    _check_access(place, text)


def _check_access(place: Path, text: str) -> None:
    if not os.access(place, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text!r} can't be written: no permission to write to {place}")
