"""Files that others may read or write at the same time, or that others have made: written whole, locked, distrusted."""

import contextlib
import json
import math
import os
import secrets
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

__all__ = ["Json", "check_regular", "load_json", "locked", "parse_json", "read_json", "write_whole"]

Json: TypeAlias = dict[str, Any]
"""An object of JSON: strings, numbers, true, false, null, lists and objects by name."""

MAX_DEPTH = 64
"""How deep objects and lists may nest in a JSON file: in a config some ten of them do."""
MAX_JSON_BYTES = 16 << 20
KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def write_whole(path: str | os.PathLike, content: bytes | str, what: str) -> None:
    """Write a file, beside its place first, in a folder that may be new; a device or a pipe is written to as it is.

    Of two that write the same path at once one's content is there in the end, whole. A file that was there keeps its
    mode, a new one has what the umask leaves. The content has reached the disk (fsync) before it takes the old one's
    place: a disk or quota that is full on the way says so in time, and a power cut leaves the old content or the new.
    The folder is not synced: which of the two it leaves may be the old one.

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
        # As mkstemp does, a name that nobody can guess, and never an existing file or link; but with the umask's mode.
        part = target.with_name(f".{target.name[:32]}.{secrets.token_hex(8)}.part")
        try:
            with part.open("xb") as file:
                with contextlib.suppress(FileNotFoundError):
                    part.chmod(stat.S_IMODE(target.stat().st_mode))
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise OSError(error.errno, f"the {what} could not be written: {error.strerror}", str(path)) from error


def check_regular(path: Path) -> None:
    """Raise ValueError for a directory, pipe, socket or device: reading one may never end; OSError where nothing is."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path} must be a file, and is {KINDS.get(stat.S_IFMT(mode), 'something else')}")


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """Return what a JSON file holds, checked as by parse_json.

    Raises:
        ValueError: it is no file, has more than max_bytes, or is refused by parse_json. OSError: it can't be read.
    """
    check_regular(path)
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            raise ValueError(f"{path} is damaged: it has {size} bytes, and no such file needs more than {max_bytes}")
        return parse_json(file.read(), path)


def parse_json(text: bytes, where: Path | str) -> Any:
    """Return what JSON of unknown origin says, `where` being the file that it comes from, and the line, say.

    Raises:
        ValueError: it is no JSON, or is what Python would take and no reader expects: a key that stands twice in an
            object (the last would win), objects and lists in each other to more than MAX_DEPTH, NaN, or an integer
            of more than 64 bits. The message names the file, and the key where there is one.
    """
    found = load_json(text, where)
    unseen: list[tuple[str, int, object]] = [("", 1, found)]
    while unseen:
        key, depth, value = unseen.pop()
        if isinstance(value, dict | list):
            if depth > MAX_DEPTH:
                raise ValueError(f"{where} is damaged: it nests deeper than {MAX_DEPTH}, at {key[:99]}")
            if isinstance(value, list) and _are_sound_numbers(value):
                continue
            items = value.items() if isinstance(value, dict) else enumerate(value)
            for name, inside in items:
                if not isinstance(inside, str):
                    unseen.append((f"{key}[{name!r}]", depth + 1, inside))
        elif isinstance(value, float) and math.isnan(value):
            raise ValueError(f"{where} is damaged: {key} is NaN")
        elif isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ValueError(f"{where} is damaged: {key} is an integer of more than 64 bits")
    return found


def load_json(text: bytes, where: Path | str) -> object:
    """Return the same for a reader that looks at every number it takes itself, as parse_json does.

    Raises:
        ValueError: it is no JSON, or has a key twice in an object.
    """
    try:
        return _loaded(text)
    except RecursionError:
        raise ValueError(f"{where} is damaged: it nests deeper than {MAX_DEPTH}") from None
    except ValueError as error:
        raise ValueError(f"{where} is damaged or half written: {error}") from error


def _loaded(text: bytes) -> object:
    """Return what JSON says; an integer of more than 20 digits is 2 to the 64."""
    try:
        return json.loads(text, object_pairs_hook=_as_object)
    except ValueError:  # Python refuses to read thousands of digits, and doesn't say where they are
        return json.loads(text, object_pairs_hook=_as_object, parse_int=_as_integer)


def _are_sound_numbers(values: list) -> bool:
    """Return whether a list holds nothing but numbers and None that no reader has to look at one by one."""
    kinds = set(map(type, values))
    if kinds == {int}:
        return min(values) >= -(2**63) and max(values) < 2**63
    if kinds == {float, type(None)}:
        return not math.isnan(sum(filter(None, values)))
    return kinds == {float} and not math.isnan(sum(values))


def _as_object(pairs: list[tuple[str, object]]) -> Json:
    found: Json = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it has the key {next(name for name in names if names.count(name) > 1)!r} twice")
    return found


def _as_integer(digits: str) -> int:
    return int(digits) if len(digits) <= 20 else 1 << 64


@contextlib.contextmanager
def locked(path: Path, timeout_s: float = 60.0) -> Iterator[None]:
    """Hold the lock that is the file `path`, which is made where it is missing and stays, empty.

    Processes of one machine exclude each other, and so do those of machines that share a disk whose locks are shared.
    On Windows nobody is excluded.

    Raises:
        OSError: somebody has held it for timeout_s, the disk knows no locks, or the file can't be made.
    """
    no_link = getattr(os, "O_NOFOLLOW", 0)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | no_link, 0o666)
    try:
        deadline = time.monotonic() + timeout_s
        while not _lock_open_file(descriptor):
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"{path} has been locked by another process for {timeout_s} s: wait for it, or end it"
                )
            time.sleep(0.002)
        yield
    finally:
        os.close(descriptor)


def _lock_open_file(descriptor: int) -> bool:
    """Lock an open file until it is closed; False where somebody else has. Raises OSError where there are no locks."""
    if sys.platform == "win32":
        return True
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
