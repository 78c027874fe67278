"""Checkpoint directories are written beside their place, and published whole or not at all."""

import contextlib
import errno
import itertools
import logging
import os
import re
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

__all__ = ["check_destination", "unpublished"]

log = logging.getLogger("tritonmoe")


def check_destination(
    directory: str | os.PathLike, num_bytes: int, may_hold: Callable[[str], bool] = lambda name: False
) -> Path:
    """Return the path of a directory that may be written: absent or empty, on a disk with room for num_bytes.

    Args:
        may_hold: says which files, by their names, may be there already.
    """
    path = Path(directory)
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise FileExistsError(f"{path} exists already and is not an empty directory: choose another, or empty it")
    in_the_way = sorted(inside.name for inside in path.glob("*") if not may_hold(inside.name))
    if in_the_way:
        raise FileExistsError(
            f"{path} exists already and is not an empty directory, it holds {', '.join(in_the_way[:4])}: choose "
            "another, or empty it"
        )
    existing = next(parent for parent in path.absolute().parents if parent.exists())
    free = shutil.disk_usage(existing).free
    if num_bytes > free:
        raise OSError(
            f"{path} would take {num_bytes / 1e9:.2f} GB, but the disk has {free / 1e9:.2f} GB free: make room, or "
            "choose a directory on another disk"
        )
    return path


@contextlib.contextmanager
def unpublished(directory: Path, entry: str | None = None, stem: str = "model") -> Iterator[Path]:
    """Return a temporary directory beside `directory`, which becomes it when the block ends, or goes when it raises.

    What is published has reached the disk (fsync): a power cut leaves nothing, or what was there, or all of it. A
    process that is killed leaves the temporary directory, named .NAME.unfinished-PID-HOST, and nothing else. The next
    that writes there on the same machine removes it (_remove_abandoned).

    Args:
        entry: a file without which nothing loads. Given it, a directory that holds other files takes the new ones in
            when all are written: what it has of `entry` and of the weights called `stem` goes, `entry` comes last.
    Raises:
        FileExistsError: another process has written the directory meanwhile.
    """
    is_taken_in = entry is not None and directory.is_dir() and any(directory.iterdir())
    place = directory if is_taken_in else directory.absolute().parent
    place.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(place, directory.absolute().name)
    temporary, lock = _make_unfinished(place, directory.absolute().name)
    try:
        yield temporary
        for written in temporary.rglob("*"):
            if written.is_file():
                _sync(written)
        if is_taken_in:
            _take_in(directory, temporary, str(entry), stem)
        else:
            try:
                os.rename(temporary, directory)  # over an empty directory, or none: all or nothing
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                    raise
                raise FileExistsError(
                    f"{directory} was written by another process in the meantime: choose another directory"
                ) from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        if lock is not None:
            os.close(lock)


def _take_in(directory: Path, temporary: Path, entry: str, stem: str) -> None:
    """Move all files into a directory that holds others; of two that do so at once, one waits for the other."""
    lock = _lock(directory, waits=True)
    try:
        for stale in [directory / entry, *directory.glob(f"{stem}*.safetensors*")]:
            stale.unlink(missing_ok=True)
        for path in sorted(temporary.iterdir(), key=lambda path: path.name == entry):
            os.replace(path, directory / path.name)
        temporary.rmdir()
    finally:
        if lock is not None:
            os.close(lock)


def _sync(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9.-]", "-", socket.gethostname())[:64]


def _make_unfinished(place: Path, name: str) -> tuple[Path, int | None]:
    """Make a directory that nobody else has, and lock it; the lock is None where the disk has none."""
    for number in itertools.count():
        path = place / (f".{name}.unfinished-{os.getpid()}-{_host()}" + (f"_{number}" if number else ""))
        try:
            path.mkdir()
        except FileExistsError:  # of a process with the same number, in another container, or of another thread
            continue
        lock = _lock(path, waits=True)
        if lock is None or (path.exists() and os.path.samestat(os.fstat(lock), path.stat())):
            return path, lock
        os.close(lock)  # it was removed as abandoned, before it was locked
    raise AssertionError


def _remove_abandoned(place: Path, name: str) -> None:
    """Remove what processes that were killed have left of a directory of this name.

    That is what no process of the number in its name can be writing, since none runs on this machine or it is this one,
    and what nobody has locked. The number may be another process's by now: then it stays until that one has ended.
    Containers of one machine number their processes each for itself and may share a name: there the lock tells. Other
    machines on the same disk may not share its locks: their names are in those of their directories, which stay.
    """
    pattern = re.compile(rf"\.{re.escape(name)}\.unfinished-(\d+)(-{re.escape(_host())}(_\d+)?)?")
    for path in list(place.iterdir()):
        match = pattern.fullmatch(path.name)
        lock = None if match is None or _is_another_running(int(match[1])) else _lock(path, waits=False)
        if lock is not None:
            log.warning("removing %s, left by a process that was killed", path)
            shutil.rmtree(path, ignore_errors=True)
            os.close(lock)


def _is_another_running(pid: int) -> bool:
    """Return whether another process has this number on this machine; True on Windows, where asking would end it."""
    if sys.platform == "win32":
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # it is another user's
        return True
    return pid != os.getpid()


def _lock(directory: Path, *, waits: bool) -> int | None:
    """Return a descriptor that holds a directory's lock until it is closed, or None where the lock can't be had.

    Another process has it, `directory` is no directory, or there are no such locks: on Windows, on some network disks.
    """
    if sys.platform == "win32":
        return None
    import fcntl

    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if waits else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor
