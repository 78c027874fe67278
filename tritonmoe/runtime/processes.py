"""Processes that end with the one that started them, however that one ends."""

import ctypes
import multiprocessing
import os
import signal
import sys

__all__ = ["dies_with_its_parent", "ends_with_its_parent"]

PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None  # loaded here: it is called between fork and exec


def dies_with_its_parent() -> None:
    """Let Linux kill the process that calls this when its parent ends: nothing may go on using the GPU unseen."""
    if _LIBC is not None:
        _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def ends_with_its_parent() -> None:
    """Do the same for a process of multiprocessing, and end it at once where its parent has ended already."""
    dies_with_its_parent()
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():
        os._exit(1)
