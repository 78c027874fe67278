"""Files that others may read or write at the same time, or that others have made: written whole, locked, distrusted.

What a file may make its reader build is bounded here, before it is built: by the size of the file, by how deep it
nests, and by how large it is once unpacked or written out. An error says what was found, the limit, and the way out.
"""

import contextlib
import gzip
import json
import math
import os
import re
import secrets
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

__all__ = [
    "Json",
    "Unpacked",
    "check_depth_of_names",
    "check_plain",
    "check_regular",
    "check_size",
    "load_json",
    "locked",
    "nests_too_deep",
    "num_elements",
    "parse_json",
    "read_bytes",
    "read_json",
    "write_whole",
]

Json: TypeAlias = dict[str, Any]
"""An object of JSON: strings, numbers, true, false, null, lists and objects by name."""

MAX_DEPTH = 64
"""How deep objects and lists may nest in a JSON file: in a config some ten of them do."""
MAX_JSON_BYTES = 16 << 20
MAX_LINES_BYTES = 512 << 20
"""A file of many records that is read at once."""
MAX_VALUES = 64 << 20
"""How many values data may have, written out: a list that stands in it twice counts twice."""
MAX_RATIO = 256
"""How many times as large as the packed file its content may be, beyond what fits into MAX_JSON_BYTES. Traces are 10 to
30 times as large; gzip packs zeros a thousandfold."""
MAX_DIMENSIONS = 64
"""PyTorch's own limit."""
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


def check_size(path: Path, max_bytes: int, way_out: str = "give another file") -> int:
    """Return the bytes of a file. Raises ValueError where it is none, as check_regular, or has more than max_bytes."""
    check_regular(path)
    size = path.stat().st_size
    if size > max_bytes:
        raise ValueError(
            f"{path} is damaged: it has {size} bytes, and no such file needs more than {max_bytes}: {way_out}"
        )
    return size


def read_bytes(path: Path, max_bytes: int = MAX_LINES_BYTES, way_out: str = "give another file") -> bytes:
    """Return the content of a file. Raises as check_size, and OSError where it can't be read."""
    size = check_size(path, max_bytes, way_out)
    with path.open("rb") as file:
        return file.read(size)


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """Return what a JSON file holds, checked as by parse_json.

    Raises:
        ValueError: it is no file, has more than max_bytes, or is refused by parse_json. OSError: it can't be read.
    """
    return parse_json(read_bytes(path, max_bytes), path)


class Unpacked(gzip.GzipFile):
    """A packed file whose content may be at most MAX_RATIO times as large as it is.

    Raises:
        ValueError: more was unpacked; it is said as soon as that is so.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._path, self._size = path, path.stat().st_size
        self._most = max(MAX_RATIO * self._size, MAX_JSON_BYTES)

    def read1(self, size: int = -1) -> bytes:
        return self._checked(super().read1(size))

    def read(self, size: int | None = -1) -> bytes:
        return self._checked(super().read(self._most + 1 if size is None or size < 0 else size))

    def _checked(self, content: bytes) -> bytes:
        if self.tell() > self._most:
            raise ValueError(
                f"{self._path} is damaged: of its {self._size} bytes more than {self._most} are unpacked, and no trace "
                f"is packed to less than 1/{MAX_RATIO}: unpack it yourself if it is right"
            )
        return content


def check_plain(found: object, where: Path | str) -> None:
    """Raise ValueError for plain data that is too large to be walked through, or written out, as readers do.

    A pickle can hold one list in many places, or in itself: a few bytes are then a structure without an end.
    """
    known: dict[int, tuple[int, int]] = {}  # of every list, tuple and dict: its values, written out, and its levels

    def measured(value: object, depth: int) -> tuple[int, int]:
        if not isinstance(value, dict | list | tuple):
            if isinstance(value, int) and not -(2**63) <= value < 2**64:
                raise ValueError(f"{where} is damaged: it has an integer of more than 64 bits")
            return 1, 0
        if id(value) not in known:
            if depth >= MAX_DEPTH:
                raise nests_too_deep(where)
            parts = [*value, *value.values()] if isinstance(value, dict) else value
            inside = [measured(one, depth + 1) for one in parts]
            known[id(value)] = 1 + sum(one for one, _ in inside), 1 + max((one for _, one in inside), default=0)
        num_values, levels = known[id(value)]
        if depth + levels > MAX_DEPTH:
            raise nests_too_deep(where)
        if num_values > MAX_VALUES:
            raise ValueError(
                f"{where} is damaged: written out it has more than {MAX_VALUES} values, of which some stand in many "
                "places: record it anew"
            )
        return num_values, levels

    measured(found, 0)


def nests_too_deep(where: Path | str) -> ValueError:
    """Return the error for data whose objects and lists stand in each other too often."""
    return ValueError(f"{where} is damaged: it nests deeper than {MAX_DEPTH}")


def check_depth_of_names(text: str, where: Path | str) -> None:
    """Raise ValueError for TOML with a name of MAX_DEPTH parts, as a.b.c has three: its reader takes their square."""
    for line in text.splitlines():
        if not line.lstrip().startswith("#") and any(
            part.count(".") >= MAX_DEPTH for part in re.split(r"[=,{}\[\]]", line)
        ):
            raise nests_too_deep(where)


def num_elements(sizes: object) -> int | None:
    """Return how many elements a tensor of these sizes has; None where they are no sizes of any tensor."""
    if not isinstance(sizes, list | tuple) or not 0 < len(sizes) <= MAX_DIMENSIONS:
        return None
    if not all(type(size) is int and 0 <= size < 1 << 48 for size in sizes):
        return None
    total = math.prod(sizes)
    return total if total < 1 << 62 else None


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
                raise ValueError(f"{nests_too_deep(where)}, at {key[:99]}")
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
        raise nests_too_deep(where) from None
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
