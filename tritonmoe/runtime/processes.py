"""Processes that end with the one that started them, however that one ends."""

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TypeVar

__all__ = ["dies_with_its_parent", "ends_with_its_parent", "read_files"]

SMALL_BYTES = 32 << 20
"""Files that are smaller together are read in this process."""
Found = TypeVar("Found")

PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None  # loaded here: it is called between fork and exec


def dies_with_its_parent() -> None:
    """Make Linux kill this process when its parent ends: nothing may go on using the GPU unseen."""
    if _LIBC is not None:
        _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def ends_with_its_parent() -> None:
    """Make a process of multiprocessing end with its parent, and end it at once where its parent has ended already."""
    dies_with_its_parent()
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():
        os._exit(1)


def read_files(read: Callable[[Path], Found], files: Sequence[Path]) -> Iterator[Found]:
    """Return what `read` finds in each file, one by one; large ones are read by a process for each core."""
    workers = min(len(files), len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    if workers < 2 or sum(file.stat().st_size for file in files) < SMALL_BYTES:
        yield from map(read, files)
        return
    with ProcessPoolExecutor(workers) as pool:
        yield from pool.map(read, files)
