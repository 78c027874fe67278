"""Results that a kill can't take: one line of JSON each, in one file, on the disk as soon as it exists.

Every line belongs to a run: a card, a driver, versions and sources, whose lines count only while they are the same. A
line that a kill tore is the last one, and is dropped when the file is opened again.
"""

import ast
import contextlib
import functools
import hashlib
import json
import math
import os
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from tritonmoe.runtime.files import Json, locked, parse_json, read_bytes
from tritonmoe.tools.benchmarks.timing import cpu_name, package_versions

__all__ = ["KeptResults", "hash_of", "identity", "open_results", "query_gpu", "read_results", "source_hash"]

PACKAGES = ("torch", "triton", "transformers", "liger-kernel")


def query_gpu(*fields: str) -> list[str] | None:
    """Return what nvidia-smi says of these fields of the first GPU, None where there is no nvidia-smi or no GPU."""
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits", "--id=0"]
    try:
        found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return [value.strip() for value in found.splitlines()[0].split(",")]


@functools.cache
def _sources() -> str:
    return source_hash(Path(__file__).parents[2])


def identity() -> Json:
    """Return card, driver, versions and a hash of tritonmoe's files: results of two that differ are not mixed."""
    has_gpu = torch.cuda.is_available()
    driver = query_gpu("driver_version") if has_gpu else None
    return {
        "device": torch.cuda.get_device_name() if has_gpu else cpu_name(),
        "driver": None if driver is None else driver[0],
        "versions": package_versions(*PACKAGES),
        "sources": _sources(),
    }


LOCK_TIMEOUT_S = 10.0
"""A process that was killed has let go by then."""
WAY_OUT = "move the file of results away, and measure into a new one"


def hash_of(files: Iterable[tuple[Path, Path]]) -> str:
    """Return a hash of Python files, without their docstrings and lines of comments: 64 hexadecimal digits.

    files: each with the folder from which its name counts.
    """
    digest = hashlib.sha256()
    for root, path in files:
        digest.update(f"{path.relative_to(root).as_posix()}\0{_without_prose(path.read_text())}\0".encode())
    return digest.hexdigest()


def _without_prose(source: str) -> str:
    """Return the lines of a Python file that are code: those of no docstring, of no comment, and not empty."""
    prose = {
        line
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    lines = enumerate(source.splitlines(), 1)
    return "\n".join(text for line, text in lines if line not in prose and text.strip() and text.strip()[0] != "#")


def source_hash(*roots: Path) -> str:
    """Return a hash of the Python files in these folders: 16 hexadecimal digits, the same wherever the folders lie."""
    return hash_of((root, path) for root in roots for path in sorted(root.rglob("*.py")))[:16]


class KeptResults:
    """The results of one run in an open file, and what they belong to."""

    def __init__(self, path: Path, identity: Json) -> None:
        """Read the file, or begin it, and add a line that says what this run is, unless one stands there.

        identity: all that a result depends on beside its case.
        """
        self.path = path
        self.run = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
        path.parent.mkdir(parents=True, exist_ok=True)
        _drop_torn_line(path)
        lines = read_results(path)
        self.by_case: dict[str, Json] = {line["case"]: line for line in lines if line["run"] == self.run}
        """The run's results by the name of their case; of several the last."""
        self._file = path.open("ab")
        if "identity" not in self.by_case:
            self.add("identity", identity)

    def add(self, case: str, values: Json) -> None:
        """Append a result; it is on the disk when this returns."""
        line: Json = _without_nan({"run": self.run, "case": case, **values})
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.by_case[case] = line

    def close(self) -> None:
        self._file.close()


@contextlib.contextmanager
def open_results(path: Path, identity: Json) -> Iterator[KeptResults]:
    """Open a file of results alone: a second process that opens it waits, and fails after ten seconds.

    Raises:
        ValueError: the file is no file of results. OSError: it can't be written, or another process has it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.with_name(path.name + ".lock"), LOCK_TIMEOUT_S):
        results = KeptResults(path, identity)
        try:
            yield results
        finally:
            results.close()


def read_results(path: Path) -> list[Json]:
    """Return every whole line of a file of results, oldest first; none where there is no file.

    Raises:
        ValueError: a line is damaged, or is no result.
    """
    if not path.exists():
        return []
    lines = []
    for number, text in enumerate(read_bytes(path, way_out=WAY_OUT).split(b"\n")[:-1], 1):
        line = parse_json(text, path)
        if not isinstance(line, dict) or not {"run", "case"} <= set(line):
            raise ValueError(f"{path} is no file of results: line {number} has no run and case. Give another file")
        lines.append(line)
    return lines


def _without_nan(value: Any) -> Any:
    """Return a value whose NaN and infinities are the words "nan" and "inf": JSON has neither."""
    if isinstance(value, dict):
        return {name: _without_nan(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _drop_torn_line(path: Path) -> None:
    """Cut the file behind its last whole line."""
    if path.exists():
        content = read_bytes(path, way_out=WAY_OUT)
        if not content.endswith(b"\n"):
            os.truncate(path, content.rfind(b"\n") + 1)
