"""Checkpoint directories: read tensors from safetensors shards one at a time, write shards, publish all or nothing."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["CheckpointReader", "ShardWriter", "check_destination", "parse_size", "unpublished"]

SIZE_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def parse_size(size: int | str) -> int:
    """Give bytes of "500MB", "5GB" or a number of bytes."""
    if isinstance(size, int):
        number = size
    else:
        try:
            unit = size[-2:].upper()
            number = int(float(size[:-2]) * SIZE_UNITS[unit])
        except (KeyError, ValueError, TypeError):
            raise ValueError(f"a shard size is a number of bytes, or like '500MB' or '5GB'; got {size!r}") from None
    if number < 1:
        raise ValueError(f"a shard must hold at least one byte, got {size!r}")
    return number


class CheckpointReader:
    """The tensors of a checkpoint directory by name, read when asked for.

    Raises:
        ValueError: the directory is no whole safetensors checkpoint; nothing is read before that is known.
    """

    def __init__(self, directory: str | os.PathLike, stem: str = "model") -> None:
        from safetensors import SafetensorError, safe_open

        self.directory = Path(directory)
        index = self.directory / f"{stem}.safetensors.index.json"
        listed: dict[str, str] | None = None
        if index.exists():
            try:
                listed = json.loads(index.read_text())["weight_map"]
                files = sorted(set(listed.values()))
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                raise ValueError(f"{index} is damaged ({error}): the checkpoint is half written") from error
        else:
            files = [f"{stem}.safetensors"]
            if not (self.directory / files[0]).exists():
                found = sorted(path.name for path in self.directory.glob("*"))[:8]
                there = "it holds " + (", ".join(found) or "nothing")
                if not self.directory.is_dir():
                    there = "it is a file" if self.directory.exists() else "no such directory"
                raise ValueError(
                    f"{self.directory} has neither {index.name} nor {files[0]} "
                    f"({there}); bring other formats into this one with from_pretrained and save_pretrained"
                )
        missing = [name for name in files if not (self.directory / name).exists()]
        if missing:
            raise ValueError(
                f"{self.directory} is half written: {index.name} names {', '.join(missing[:4])}, "
                f"{len(missing)} of {len(files)} shards, which are not there"
            )
        self._handles: dict[str, Any] = {}
        self._file_of: dict[str, str] = {}
        for name in files:
            try:
                handle = safe_open(self.directory / name, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{self.directory / name} is damaged or half written ({error})") from error
            self._handles[name] = handle
            self._file_of |= dict.fromkeys(handle.keys(), name)
        lost = sorted(set(listed or ()) - self._file_of.keys())
        if lost:
            raise ValueError(
                f"{self.directory} is half written: {index.name} names {', '.join(lost[:4])} ({len(lost)} tensors), "
                "which no shard holds"
            )
        self.num_files = len(files)
        self.num_bytes = sum((self.directory / name).stat().st_size for name in files)

    def keys(self) -> list[str]:
        return list(self._file_of)

    def __getitem__(self, name: str) -> Tensor:
        return self._handles[self._file_of[name]].get_tensor(name)

    def dtype(self, name: str) -> torch.dtype:
        """Give a tensor's dtype, reading at most one of its rows."""
        part = self._handles[self._file_of[name]].get_slice(name)
        return (part[:1] if part.get_shape() else self[name]).dtype


class ShardWriter:
    """Write tensors into shards of at most `max_bytes` (one tensor may be larger), then the index.

    Holds one shard in memory. Shards get their final names in close(), when their number is known. Raises OSError where
    one can't be written, as on a full disk.
    """

    def __init__(self, directory: Path, max_bytes: int, stem: str = "model") -> None:
        self.directory, self.max_bytes, self.stem = directory, max_bytes, stem
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._names: list[list[str]] = []
        self.num_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > self.max_bytes:
            self._flush()
        # a copy: what a shard holds must not keep a larger tensor alive, or be one that safetensors calls shared
        self._pending[name] = tensor.detach().to("cpu", copy=True).contiguous()
        self._pending_bytes += size
        self.num_bytes += size

    def _flush(self) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        path = self.directory / f"{self.stem}-{len(self._names) + 1:05d}.unfinished"
        try:
            save_file(self._pending, path, metadata={"format": "pt"})
        except SafetensorError as error:  # a full disk is one, and no OSError
            raise OSError(
                f"could not write {self._pending_bytes / 1e9:.2f} GB to {self.directory.parent} ({error}): make room, "
                "or choose a directory on another disk; what was written is removed"
            ) from error
        self._names.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0

    def close(self) -> int:
        """Write what is left and the index; gives the number of shards."""
        if self._pending:
            self._flush()
        num_shards = len(self._names)
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._names, 1):
            tail = "" if num_shards == 1 else f"-{number:05d}-of-{num_shards:05d}"
            final = f"{self.stem}{tail}.safetensors"
            os.rename(self.directory / f"{self.stem}-{number:05d}.unfinished", self.directory / final)
            weight_map |= dict.fromkeys(names, final)
        if num_shards > 1:
            index = {"metadata": {"total_size": self.num_bytes}, "weight_map": weight_map}
            (self.directory / f"{self.stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
        return num_shards


def check_destination(
    directory: str | os.PathLike, num_bytes: int, may_hold: Callable[[str], bool] = lambda name: False
) -> Path:
    """Give the path of a directory that may be written: absent or empty, on a disk with room for num_bytes.

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
    """Give a temporary directory beside `directory`, which becomes it when the block ends, or goes when it raises.

    A process that is killed leaves the temporary directory, named .NAME.unfinished-PID, and nothing else.

    Args:
        entry: a file without which nothing loads. Given it, a directory that holds other files takes the new ones in
            when all are written: what it has of `entry` and of the weights called `stem` goes, `entry` comes last.
    """
    is_taken_in = entry is not None and directory.is_dir() and any(directory.iterdir())
    place = directory if is_taken_in else directory.absolute().parent
    temporary = place / f".{directory.absolute().name}.unfinished-{os.getpid()}"
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if is_taken_in:
            for stale in [directory / str(entry), *directory.glob(f"{stem}*.safetensors*")]:
                stale.unlink(missing_ok=True)
            for path in sorted(temporary.iterdir(), key=lambda path: path.name == entry):
                os.replace(path, directory / path.name)
            temporary.rmdir()
        else:
            os.rename(temporary, directory)  # over an empty directory, or none: all or nothing
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
