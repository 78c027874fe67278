"""Turns of pytest-xdist's workers: a test marked `alone` runs while no other worker runs one."""

import fcntl
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def turn(run: str, *, alone: bool) -> Iterator[None]:
    """Hold this worker's turn among those of a run, which has this name: shared with the others', or alone.

    Whoever wants to be alone keeps the gate closed while it waits, so that it gets its turn.
    """
    path = Path(tempfile.gettempdir()) / f"tritonmoe-tests-{run}"
    with open(f"{path}-gate", "w") as gate, open(f"{path}-turns", "w") as turns:
        fcntl.flock(gate, fcntl.LOCK_EX)
        fcntl.flock(turns, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(gate, fcntl.LOCK_UN)
        yield


def remove(run: str) -> None:
    """Remove the files of a run that has ended."""
    for path in Path(tempfile.gettempdir()).glob(f"tritonmoe-tests-{run}-*"):
        path.unlink()
