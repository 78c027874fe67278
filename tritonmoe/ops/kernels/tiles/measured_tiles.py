"""Tile configurations that were measured, by what they were measured for: they stand before the table's.

An entry replaces fields of the TileConfig that the table gives (table.py). Its key has the architecture, the dtype, the
operation, the product's width and depth rounded up to powers of two, the class of pairs per expert
(`choice.measured_class`): never the number of rows, so that nothing is compiled anew in the middle of training; and
Triton's version: another one makes other code of the same tile.
`tritonmoe tune` measures entries and keeps them in tiles.json in $TRITONMOE_CACHE_DIR (default ~/.cache/tritonmoe).
Where that folder can't be, or can't be read, kernels take the table's tiles.
"""

import contextlib
import errno
import functools
import json
import logging
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import triton

from tritonmoe.ops.kernels.tiles.config import TileConfig, refusal
from tritonmoe.runtime.files import locked, read_json, write_whole

__all__ = [
    "SHIPPED",
    "Entries",
    "asked",
    "cache_file",
    "fields_of",
    "has_gather",
    "kept",
    "leave_out_last",
    "note",
    "read",
    "tile_key",
    "using",
    "write",
]

Entries = Mapping[str, Mapping[str, int | str]]
"""Key -> the fields of TileConfig that it replaces."""

SHIPPED: Entries = {}
"""Measured entries that come with the package: none yet."""

_replacement: Entries | None = None
_asked: dict[str, TileConfig] | None = None
_left_out: set[str] = set()
"""Keys of entries that this process found to be refused."""
_of_thread = threading.local()
"""`last`: the key of the entry that this thread took last."""
log = logging.getLogger("tritonmoe")


@functools.cache
def tile_key(architecture: str, dtype: torch.dtype, operation: str, width: int, depth: int, rows: int | None) -> str:
    """Return the key of one grouped product.

    Args:
        architecture: "sm_90", "gfx942".
        width, depth: as for `choice.grouped_matmul_config`. rows: the class of pairs per expert; None: any.
    Example:
        With Triton 3.6.0 tile_key("sm_90", torch.bfloat16, "up", 768, 2048, 128) is
        "sm_90 bfloat16 up 1024x2048 rows 128 triton 3.6.0".
    """
    width, depth = (1 << max(0, size - 1).bit_length() for size in (width, depth))
    product = f"{str(dtype).removeprefix('torch.')} {operation} {width}x{depth} rows {rows or 'any'}"
    return f"{architecture} {product} triton {triton.__version__}"


def fields_of(key: str) -> tuple[tuple[str, int | str], ...]:
    """Return the fields that an entry for `key` replaces, with their values; none where there is no entry.

    With it a product begins, for `leave_out_last`.
    """
    entries = kept() if _replacement is None else _replacement
    fields = entries.get(key, SHIPPED.get(key, {}))
    if not fields or key in _left_out:
        _of_thread.last = None
        return ()
    _of_thread.last = key
    return tuple(fields.items())


def leave_out_last(error: Exception) -> bool:
    """Take no more the entry that this thread's product took, and warn; False where it took none, or inside `using`."""
    key = getattr(_of_thread, "last", None)
    if key is None or _replacement is not None:
        return False
    _left_out.add(key)
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    log.warning("the measured tile of %s is left out, since it can't run: %s. Run `tritonmoe tune` again", key, reason)
    return True


def has_gather(way: str) -> bool:
    """Return whether an entry, of any product, gets rows this way."""
    entries = {**SHIPPED, **(kept() if _replacement is None else _replacement)}
    return any(fields.get("gather") == way for fields in entries.values())


def note(key: str, config: TileConfig) -> None:
    """Add the TileConfig that the product of this key got to `asked`."""
    if _asked is not None:
        _asked[key] = config


@contextlib.contextmanager
def using(entries: Entries) -> Iterator[None]:
    """Take these entries instead of the cache file's inside the block; {} leaves the table and SHIPPED."""
    global _replacement
    before, _replacement = _replacement, entries
    try:
        yield
    finally:
        _replacement = before


@contextlib.contextmanager
def asked() -> Iterator[dict[str, TileConfig]]:
    """Collect the keys that are asked for inside the block, with the TileConfig that each got."""
    global _asked
    before, _asked = _asked, {}
    try:
        yield _asked
    finally:
        _asked = before


def cache_file() -> Path:
    """Return where measured entries are kept: tiles.json in $TRITONMOE_CACHE_DIR, or in ~/.cache/tritonmoe.

    Raises:
        FileNotFoundError: there is no such folder, since the user has no home directory.
    """
    folder = os.environ.get("TRITONMOE_CACHE_DIR") or os.path.expanduser("~/.cache/tritonmoe")
    if folder.startswith("~/"):  # neither HOME nor an entry in the list of users
        raise FileNotFoundError(
            errno.ENOENT, "the user has no home directory, and TRITONMOE_CACHE_DIR is not set", folder
        )
    return Path(folder) / "tiles.json"


@functools.cache
def kept() -> Entries:
    """Return the entries of the cache file, which is read once, since every launch asks.

    A file that can't be read, as in another user's home directory, has none; that is said once.
    """
    try:
        return read(cache_file())
    except FileNotFoundError:
        return {}
    except OSError as error:
        log.warning("kernels take no measured tiles: %s. TRITONMOE_CACHE_DIR names another folder", error)
        return {}


def read(path: Path) -> dict[str, dict[str, int | str]]:
    """Return the entries of a cache file; none where there is no file.

    Raises:
        ValueError: the file is not one that `write` wrote, or a field can't be what an entry says. OSError: it can't
            be read.
    """
    try:
        found = read_json(path)
        if not isinstance(found, dict) or not isinstance(found.get("tiles"), dict):
            raise ValueError('it has no object "tiles"')
        entries: dict[str, dict[str, int | str]] = found["tiles"]
        for key, fields in entries.items():
            if not isinstance(fields, dict):
                raise ValueError(f"{key}: an entry is an object of fields, got {fields!r}")
            for name, value in fields.items():
                if refused := refusal(name, value):
                    raise ValueError(f"{key}: {refused}")
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except ValueError as error:
        raise ValueError(
            f"{path} is not a file of tile configurations ({error}): "
            "correct it, or delete it and run `tritonmoe tune` again"
        ) from error
    return entries


def write(path: Path, entries: Entries) -> None:
    """Add entries to a cache file, whole or not at all; others who do so wait, so that no entry is lost.

    The lock is the file of the same name that ends in .lock. On Windows nobody waits. Raises what `read` does, and
    OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.with_suffix(".lock")):
        merged = {**read(path), **entries}
        write_whole(path, json.dumps({"tiles": dict(sorted(merged.items()))}, indent=1), "file of tile configurations")
    kept.cache_clear()
