"""What arguments of a command may be: refused while they are parsed, before anything is measured."""

import argparse
import importlib.util
import math
import os
from pathlib import Path
from typing import TypeAlias

from tritonmoe.config.overlap import FEW_CHUNKS, MAX_CHUNKS

__all__ = [
    "Subparsers",
    "add_chunks",
    "chunk_count",
    "output_file",
    "output_folder",
    "picture_file",
    "positive",
    "positive_number",
    "report_file",
    "seed",
]

Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
"""What add_subparsers() gives, to which every subcommand adds its own parser."""


def positive(text: str) -> int:
    """Return a whole number of at least 1."""
    return _whole_number(text, 1, None)


def chunk_count(text: str) -> int:
    """Return a number of chunks."""
    return _whole_number(text, 1, MAX_CHUNKS)


def add_chunks(parser: argparse._ActionsContainer) -> None:
    """Add --chunks, the numbers of chunks that a benchmark tries."""
    words = f"numbers of chunks to try (default {' '.join(map(str, FEW_CHUNKS))})"
    parser.add_argument("--chunks", type=chunk_count, nargs="+", default=list(FEW_CHUNKS), help=words)


def seed(text: str) -> int:
    """Return a seed of which a generator can take some thousandfold."""
    return _whole_number(text, 0, 2**32 - 1)


def _whole_number(text: str, least: int, most: int | None) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least or (most is not None and value > most):
        limits = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise argparse.ArgumentTypeError(f"must be a whole number {limits}, got {text!r}")
    return value


def positive_number(text: str) -> float:
    """Return a number above zero, of seconds or milliseconds say."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text!r}")
    return value


def output_file(text: str) -> Path:
    """Return the path of a file that can be written, as far as that is known before: its folder may be made yet."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"must be a file, and {text!r} is a directory")
    if os.path.exists(path) and not path.is_file():
        _check_access(path, text)  # a device or a pipe is written to as it is
    else:
        _check_folder(path.resolve().parent, text)
    return path


def picture_file(text: str) -> Path:
    """Return the path of a PNG that can be drawn and written, as far as that is known before."""
    path = output_file(text)
    if path.suffix.lower() not in (".png", ""):
        name = path.with_suffix(".png")
        raise argparse.ArgumentTypeError(f"a picture is written as PNG: call it {str(name)!r}, got {text!r}")
    if importlib.util.find_spec("matplotlib") is None:
        raise argparse.ArgumentTypeError("matplotlib, which draws it, is not installed: pip install 'tritonmoe[demo]'")
    return path


def report_file(text: str) -> Path:
    """Return the path of an HTML report that can be written, as far as that is known before."""
    if importlib.util.find_spec("jinja2") is None:
        raise argparse.ArgumentTypeError("jinja2, which makes it, is not installed: pip install 'tritonmoe[html]'")
    return output_file(text)


def output_folder(text: str) -> Path:
    """Return the path of a folder that can be written to, as far as that is known before: it may be made yet."""
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
