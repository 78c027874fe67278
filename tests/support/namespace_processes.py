"""Which processes are in network namespaces, and whether they are there still."""

import contextlib
import os
from pathlib import Path

__all__ = ["processes_in", "start_of"]


def processes_in(namespaces: set[str]) -> set[tuple[int, str]]:
    """Return the processes in network namespaces, of any session, and when they started.

    A namespace that has ended leaves its number to the next one, perhaps another test's: it tells nothing afterwards.
    """
    found = set()
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.readlink(entry / "ns" / "net") in namespaces and (started := start_of(int(entry.name))):
                found.add((int(entry.name), started))
    return found


def start_of(pid: int) -> str | None:
    """Return the moment at which a process started; None where it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]
