"""Damaged files, made by seeds from small real ones: the command refuses or judges them, and says what is so.

A file is cut, empty, has bits flipped or bytes doubled; or its values are lost, of other types, huge, negative, no
numbers, or nested. Whatever is left, the command ends with the status that it documents, without a traceback.
"""

import copy
import gzip
import json
import math
import pickle
import random
import re
import time
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from gpu_traces import DEEP_EP, NEW, gpu_trace

from tritonmoe.tools.cli import main

HERE = Path(__file__).parent
DATA = HERE / "data"
RECORDINGS = HERE.parents[2] / "bench" / "results" / "recordings"
LONGEST_S = 5.0
NUM_LINES = 5
FIRST, MOST = 24, 300
WRONG: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        -1,
        0,
        0.5,
        1e300,
        -1e300,
        2**70,
        -(2**40),
        1 << 30,
        float("nan"),
        float("inf"),
        -float("inf"),
    ),
    *("text", "", "NaN", "9" * 400, [], {}, [[1]], {"a": 1}, [None] * 50),
)


def _of_folder(folder: Path, among: str = "") -> dict[str, bytes]:
    files = [file for file in folder.iterdir() if among in file.name and file.name != "measured.json"]
    return {file.name: file.read_bytes() for file in files}


def _of_recording() -> dict[str, bytes]:
    """Return the first calls of a recording."""
    files = _of_folder(RECORDINGS / "slow_link")
    return {name: b"".join(of.splitlines(keepends=True)[:NUM_LINES]) for name, of in files.items()}


def _of_gpus() -> dict[str, bytes]:
    names = (NEW, *DEEP_EP)
    return {f"rank{rank}.json": json.dumps(gpu_trace(rank, 2, names, 1, True)).encode() for rank in range(2)}


def _of_pickles() -> dict[str, bytes]:
    records = _of_folder(DATA / "gloo_ddp", "flight")
    return {name.replace(".flight.json", ".pickle"): pickle.dumps(json.loads(of)) for name, of in records.items()}


KINDS: dict[str, tuple[Callable[[], dict[str, bytes]], str]] = {
    # of what is damaged: all files of a run, and the one
    "recording": (_of_recording, "rank-0002.jsonl"),
    "trace": (lambda: _of_folder(DATA / "gloo_ddp"), "rank-0001.trace.json.gz"),
    "trace of a GPU": (_of_gpus, "rank1.json"),
    "flight record beside a trace": (lambda: _of_folder(DATA / "gloo_ddp"), "rank-0001.flight.json"),
    "flight record": (lambda: _of_folder(DATA / "gloo_ddp", "flight"), "rank-0001.flight.json"),
    "pickled flight record": (_of_pickles, "rank-0001.pickle"),
    "inspector": (lambda: _of_folder(DATA / "inspector_slow_link"), "rank-1.json.gz"),
    "timeline": (lambda: _of_folder(DATA, "straggler"), "straggler_ar_two_steps.json.gz"),
}


def of_bytes(content: bytes, draw: random.Random) -> bytes:
    """Damage a file as a disk or a network does."""
    way = draw.randrange(6)
    at = draw.randrange(len(content))
    if way == 0:
        return content[:at]
    if way == 1:
        return draw.choice(
            (b"", b" \n", b"\x00" * 64, b"\xff\xfe{", b"{}", b"[]", b"null", b"[" * 5000, b'{"a":' * 5000)
        )
    if way == 2:
        return content[at:]
    if way == 3:
        return content[:at] + content[draw.randrange(len(content)) :][: draw.randrange(1, 5000)] + content[at:]
    flipped = bytearray(content)
    for _ in range(draw.choice((1, 3, 40))):
        flipped[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    return bytes(flipped)


def of_values(found: Any, draw: random.Random) -> Any:
    """Damage what stands in a file: a value is lost, or is another one."""
    for _ in range(draw.choice((1, 1, 4))):
        place, keys = found, list(_keys(found))
        if not keys:
            return copy.deepcopy(draw.choice(WRONG))
        while True:
            key = draw.choice(keys)
            inside = place[key]
            if isinstance(inside, dict | list) and inside and draw.random() < 0.85:
                place, keys = inside, list(_keys(inside))
                continue
            break
        if isinstance(place, dict) and draw.random() < 0.3:
            del place[key]
        else:
            place[key] = _other(inside, draw)
    return found


def _keys(place: Any) -> Iterator[Any]:
    yield from place if isinstance(place, dict) else range(len(place)) if isinstance(place, list) else ()


def _other(value: Any, draw: random.Random) -> Any:
    if isinstance(value, int | float) and not isinstance(value, bool) and draw.random() < 0.4:
        return draw.choice((-value, value * 1000, value + 1, value * 1e-9, value / 2, str(value)))
    if draw.random() < 0.1:
        nested: Any = value
        for _ in range(draw.choice((3, 200, 400))):
            nested = [nested]
        return nested
    return copy.deepcopy(draw.choice(WRONG))


def damaged(name: str, content: bytes, draw: random.Random) -> bytes:
    """Return a damaged file of what a file has; of a packed one the packing is damaged, or what is packed."""
    if draw.random() < 0.15:
        return of_bytes(content, draw)
    if name.endswith(".gz"):
        return gzip.compress(damaged(name.removesuffix(".gz"), gzip.decompress(content), draw), 1, mtime=0)
    if draw.random() < 0.3:
        return of_bytes(content, draw)
    if name.endswith(".pickle"):
        return pickle.dumps(of_values(pickle.loads(content), draw))
    lines = content.splitlines(keepends=True)
    for at in draw.sample(range(len(lines)), min(draw.choice((1, 1, 3)), len(lines))):
        lines[at] = json.dumps(of_values(json.loads(lines[at]), draw)).encode() + b"\n"
    return b"".join(lines)


@cache
def whole(kind: str) -> dict[str, bytes]:
    """Return all files of a run."""
    return KINDS[kind][0]()


def folder_of(kind: str, seed: int, into: Path) -> Path:
    """Write a folder of a run of which one file is damaged, and return it."""
    into.mkdir()
    files, one = whole(kind), KINDS[kind][1]
    for name, content in {**files, one: damaged(one, files[one], random.Random(f"{kind} {seed}"))}.items():
        (into / name).write_bytes(content)
    return into


def check(kind: str, seed: int, into: Path, capsys: pytest.CaptureFixture) -> int:
    """Let the command judge a damaged run; return its status once all that it said was looked at."""
    folder, verdict_file = folder_of(kind, seed, into), into.with_suffix(".verdict")
    began = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        status = main(["doctor", str(folder), "--json", str(verdict_file)])
    took_s = time.process_time() - began
    said = capsys.readouterr()
    assert took_s < LONGEST_S
    assert "Traceback" not in said.err
    if status == 2:
        assert said.out == ""
        assert said.err.startswith("tritonmoe doctor: ")
        assert str(folder) in said.err
        assert said.err.count("\n") == 1
        assert len(said.err) < 700
        return status
    assert (status in (0, 1), said.err) == (True, "")
    assert not re.search(r"\b(?:nan|inf)\b|e\+\d\d", said.out, re.IGNORECASE), said.out
    (verdict,) = json.loads(verdict_file.read_text(), parse_constant=_no_number)
    assert status == int(not verdict["is_healthy"])
    assert verdict["steps"]
    for name in ("measured_s", "replayed_s"):
        assert 0 < verdict[name] < 1e9
    assert all(math.isfinite(of["cost_s"]) and of["cost_s"] > 0 for of in verdict["findings"])
    return status


def _no_number(constant: str) -> None:
    raise AssertionError(f"{constant} stands in the JSON")


SEEDS = [(kind, seed) for seed in range(math.ceil(MOST / len(KINDS))) for kind in KINDS][:MOST]


@pytest.mark.thorough
@pytest.mark.parametrize("kind", KINDS)
def test_whole_files_are_judged(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Else damage would be nothing but refused."""
    for name, content in whole(kind).items():
        (tmp_path / name).write_bytes(content)
    assert main(["doctor", str(tmp_path)]) in (0, 1)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("kind", "seed"), SEEDS[:FIRST])
def test_a_damaged_file(kind: str, seed: int, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    check(kind, seed, tmp_path / "run", capsys)


@pytest.mark.slow
def test_many_damaged_files(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    statuses = []
    for number, (kind, seed) in enumerate(SEEDS[FIRST:]):
        try:
            statuses.append(check(kind, seed, tmp_path / str(number), capsys))
        except BaseException as error:
            error.add_note(f"a damaged {kind}, seed {seed}")
            raise
    assert statuses.count(2) > len(statuses) / 5
    assert statuses.count(2) < 4 * len(statuses) / 5
