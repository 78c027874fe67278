"""Checkpoint directories: read tensors from safetensors shards one at a time, write shards."""

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tritonmoe.runtime.files import check_regular, parse_json, read_json

if TYPE_CHECKING:
    from safetensors import safe_open

__all__ = ["CheckpointReader", "ShardWriter", "file_inside", "parse_size"]

SIZE_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
MAX_INDEX_BYTES = 128 << 20
"""An index of a million tensors fits; safetensors allows the header of a file 100 MB."""


def parse_size(size: int | str) -> int:
    """Return bytes of "500MB", "5GB" or a number of bytes."""
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


class CheckpointReader(Mapping[str, Tensor]):
    """The tensors of a checkpoint directory by name, read when asked for.

    The directory may come from anybody: nothing outside of it is read (`file_inside`), and nothing that is no file.

    Raises:
        ValueError: the directory is no whole safetensors checkpoint, or leads elsewhere; no tensor is read before that
            is known.
    """

    def __init__(self, directory: str | os.PathLike, stem: str = "model") -> None:
        self.directory = Path(directory)
        index = self.directory / f"{stem}.safetensors.index.json"
        listed = _files_by_tensor(self.directory, stem)
        files = sorted(set(listed.values())) or [f"{stem}.safetensors"]
        missing = [name for name in files if not (self.directory / name).exists()]
        if missing:
            raise ValueError(
                f"{self.directory} is half written: {index.name if listed else 'it'} names {', '.join(missing[:4])}, "
                f"{len(missing)} of {len(files)} shards, which are not there"
            )
        paths = {name: file_inside(self.directory, name) for name in files}
        self._handles: dict[str, safe_open] = {}
        self._file_of: dict[str, str] = {}
        for name, path in paths.items():
            self._handles[name] = handle = _open(path)
            for tensor in handle.keys():  # noqa: SIM118  # what safe_open gives has no iterator
                if not tensor.isprintable():
                    raise ValueError(f"{path} holds a tensor whose name can't be printed: {tensor!r}")
                if tensor in self._file_of:
                    raise ValueError(
                        f"{self.directory} holds {tensor} twice, in {self._file_of[tensor]} and in {name}: remove one "
                        "of the two"
                    )
                self._file_of[tensor] = name
        lost = sorted(listed.keys() - self._file_of.keys())
        if lost:
            raise ValueError(
                f"{self.directory} is half written: {index.name} names {', '.join(lost[:4])} ({len(lost)} tensors), "
                "which no shard holds"
            )
        self.num_files = len(files)
        self.num_bytes = sum(path.stat().st_size for path in paths.values())

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)

    def __contains__(self, name: object) -> bool:
        return name in self._file_of

    def __getitem__(self, name: str) -> Tensor:
        return self._handles[self._file_of[name]].get_tensor(name)

    def dtype(self, name: str) -> torch.dtype:
        """Return a tensor's dtype, reading at most one of its rows."""
        part = self._handles[self._file_of[name]].get_slice(name)
        return (part[:1] if part.get_shape() else self[name]).dtype

    def check_shape(self, name: str, wanted: tuple[int, ...]) -> None:
        """Raise ValueError unless a tensor has the shape that config.json gives it; the tensor isn't read."""
        shape = tuple(self._handles[self._file_of[name]].get_slice(name).get_shape())
        if shape != wanted:
            raise ValueError(
                f"{self.directory} does not fit its config.json: {name} is {shape} in the file, {wanted} in the model"
            )


def _files_by_tensor(directory: Path, stem: str) -> dict[str, str]:
    """Return what the index says; nothing where there is a single file."""
    index, single = directory / f"{stem}.safetensors.index.json", directory / f"{stem}.safetensors"
    if not os.path.lexists(index):
        if os.path.lexists(single):
            return {}
        found = sorted(path.name for path in directory.glob("*"))[:8]
        there = "it holds " + (", ".join(found) or "nothing")
        if not directory.is_dir():
            there = "it is a file" if directory.exists() else "no such directory"
        raise ValueError(
            f"{directory} has neither {index.name} nor {single.name} "
            f"({there}); bring other formats into this one with from_pretrained and save_pretrained"
        )
    try:
        found = read_json(file_inside(directory, index.name), MAX_INDEX_BYTES)
    except FileNotFoundError as error:
        raise ValueError(f"{index} leads to no file: the checkpoint is half written") from error
    listed = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(listed, dict) or not listed:
        raise ValueError(f'{index} is damaged or half written: it has no "weight_map" from tensors to files')
    for tensor, name in listed.items():
        _check_name(name, f"{index}: weight_map[{tensor!r}]")
    if os.path.lexists(single) and single.name not in listed.values():
        raise ValueError(
            f"{directory} holds two checkpoints, {single.name} and the shards of {index.name}: from_pretrained would "
            "read the former. Move the other one away"
        )
    return listed


def _open(path: Path) -> "safe_open":
    """Return an open file of tensors, which safetensors has found to lie in it side by side, without gaps."""
    from safetensors import SafetensorError, safe_open

    try:
        opened = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or half written ({error})") from error
    with path.open("rb") as file:
        parse_json(file.read(int.from_bytes(file.read(8), "little")), path)  # a name may not stand there twice
    return opened


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


CACHED_REPOSITORY = re.compile(r"(models|datasets|spaces|kernels)--.+")


def _check_name(name: object, where: str) -> str:
    """Return the name of a file in a directory, or in one below it; `where` says what names it.

    Raises:
        ValueError: it is no name, leads out of the directory, or is one of several ways to write a name.
    """
    if not isinstance(name, str) or not name.isprintable() or any(character in name for character in "\\:"):
        raise ValueError(f"{where} must be the name of a file, got {name!r}")
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{where} must name a file in the same directory, got {name!r}")
    if str(path) != name or not path.name:  # "./a" and "a" would be one file under two names
        raise ValueError(f"{where} must be the name of a file in its plainest form, got {name!r}")
    return name


def file_inside(directory: Path, name: str) -> Path:
    """Return the path of an ordinary file of a directory, following links that stay there.

    A checkpoint may come from anybody, and a link in it may lead to what its author can't read and its reader can.
    Links of Hugging Face's cache lead from models--NAME/snapshots/REVISION to files in models--NAME/blobs, which may be
    links into the blobs of the whole cache: both are followed, for such a directory alone.

    Raises:
        ValueError: a link leads out of the directory, or it is a directory, a pipe, a socket or a device.
        FileNotFoundError: it is not there, or a link to nothing.
    """
    path = directory / name
    folder, target = Path(os.path.realpath(directory)), Path(os.path.realpath(path))
    if not any(target.is_relative_to(place) for place in (folder, *_blobs_of_cache(folder))):
        raise ValueError(
            f"{path} is a link out of the directory, to {target}: if that file is meant, copy it in the link's place"
        )
    check_regular(path)
    return path


def _blobs_of_cache(folder: Path) -> Iterator[Path]:
    """Return where the links of a snapshot may lead; nothing for a directory that is none of Hugging Face's cache."""
    for above in folder.parents:
        if above.name == "snapshots" and CACHED_REPOSITORY.fullmatch(above.parent.name):
            yield above.parent / "blobs"
            yield above.parent.parent / "blobs"
