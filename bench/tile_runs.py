"""How programs get their tiles: what a counter would make of a product's machine code, and when all have ended.

Compiled are the products whose programs walk, as they are, with one tile a program, and with a counter in global memory
from which a program takes its next tile, or its next four: copies of the package whose loops over tiles are changed.

What runs when is a model, no measurement. A multiprocessor runs one program at a time, the GPU starts the next program
where one has ended, and every tile takes one unit of time. A program takes a share of a unit more: its first loads and
its last stores, during which nothing is multiplied. An exchange holds some multiprocessors, for all of the time or for
a part. Drawn are the tiles of each multiprocessor, the multiprocessors that are held, and until when.
"""

import argparse
import heapq
import importlib.metadata
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from bench.codegen import ROOT, STEP_KERNELS, STEP_VARIANT, source_hash
from tritonmoe.runtime.files import write_whole
from tritonmoe.tools.benchmarks.argument_types import output_file

__all__ = ["EDITS", "GRIDS", "KERNELS", "ONE_TILE", "RESULT", "RUN_GRIDS", "ends_of", "main", "model_rows", "runs_of"]

RESULT = Path("bench") / "results" / "tile_runs.json"
TARGETS = ("sm_90", "sm_100")
KERNELS = STEP_KERNELS[:3]
"""up_grad is the kernel of down."""
MULTIPROCESSORS = 132
STARTS = (0.1, 0.25)
"""What a program takes more than its tiles, as a share of a tile."""
DRAWN = 400
ONE_TILE = "one tile a program"

HEAD = """    first_tile, end_tile, step = tiles_of_program(num_tiles, programs_at_once, FLATTEN)
    for tile in tl.range(first_tile, end_tile, step, flatten=FLATTEN):
"""
COUNTER = "row_tiles + 19"
"""A number in the lists of row tiles that nobody reads."""


def _body(text: str) -> tuple[str, str, str]:
    """Return a kernel's file before its loop over tiles, the loop's body, and what follows."""
    before, behind = text.split(HEAD)
    lines = behind.splitlines(keepends=True)
    end = next(number for number, line in enumerate(lines) if line.strip() and not line.startswith(" " * 8))
    return before, "".join(lines[:end]).rstrip() + "\n", "\n\n" + "".join(lines[end:])


def _tile_by_tile(text: str) -> str:
    before, body, behind = _body(text)
    take = f"tile = tl.atomic_add({COUNTER}, 1)\n"
    return f"{before}    {take}    while tile < num_tiles:\n{body}        {take}{behind}"


def _four_by_four(text: str) -> str:
    before, body, behind = _body(text)
    take = f"taken = tl.atomic_add({COUNTER}, 4)\n"
    loop = "        for tile in tl.range(taken, min(taken + 4, num_tiles), flatten=FLATTEN):\n"
    deeper = "".join(f"    {line}" if line.strip() else line for line in body.splitlines(keepends=True))
    return f"{before}    {take}    while taken < num_tiles:\n{loop}{deeper}        {take}{behind}"


def _one_by_one(text: str) -> str:
    return re.sub(r"\*\*(tile_keywords\(.*\)),", r'**{**\1, "FLATTEN": False},', text)


EDITS: dict[str, Callable[[str], str]] = {
    "a fixed share, or runs": lambda text: text,
    ONE_TILE: _one_by_one,
    "a counter, tile by tile": _tile_by_tile,
    "a counter, four by four": _four_by_four,
}
"""What is done to the files of the kernels; the first two are what is launched."""


def _compile(edit: Callable[[str], str]) -> list[dict[str, Any]]:
    """Return what a changed copy of the package compiles to: a row for each kernel and target."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / ROOT.name
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("up", "down", "down_grad"):
            file = copy / "ops" / "kernels" / f"{name}.py"
            file.write_text(edit(file.read_text()))
        command = [sys.executable, "-m", "tritonmoe.ops.aot", "--json", "--workers", "1", "--variants", STEP_VARIANT]
        command += ["--targets", *TARGETS, "--kernels", *KERNELS]
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        paths = filter(None, [folder, environment.get("PYTHONPATH")])
        environment |= {"PYTHONPATH": os.pathsep.join(paths), "TRITON_CACHE_DIR": str(Path(folder) / "cache")}
        done = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def code_rows() -> Iterator[dict[str, Any]]:
    """Return for each way to get tiles, kernel and target what its loop is made of."""
    for way, edit in EDITS.items():
        for row in _compile(edit):
            assert not row["problem"], row["problem"]
            step = row["step"]
            yield {
                "way": way,
                **{name: row[name] for name in ("kernel", "target", "registers", "spills", "shared_bytes")},
                "step": step["instructions"],
                "issue_share": step["issue_slots"] / step["matrix_cycles"],
                "stores_in_loop": "store" in row["loop"],
            }


def runs_of(num_tiles: int, at_once: int, lengths: Sequence[int] = (4, 2)) -> list[int]:
    """Return the tiles of every program in its turn, as `tile_runs.tiles_of_program` shares them out for (4, 2)."""
    runs: list[int] = []
    for length in lengths:
        rounds = max(num_tiles - (length - 1) * at_once, 0) // (length * at_once)
        runs += [length] * (rounds * at_once)
        num_tiles -= rounds * length * at_once
    return runs + [1] * num_tiles


def _shares(num_tiles: int, num_programs: int) -> list[int]:
    return [num_tiles // num_programs + (program < num_tiles % num_programs) for program in range(num_programs)]


def _runs(lengths: Sequence[int]) -> Callable[[int, int], list[int]]:
    return lambda num_tiles, num_held: runs_of(num_tiles, MULTIPROCESSORS, lengths)


RUN_GRIDS = {"runs of two and one": (2,), "runs of four, two and one": (4, 2), "runs of eight to one": (8, 4, 2)}
GRIDS: dict[str, Callable[[int, int], list[int]]] = {
    "a fixed share of all tiles": lambda num_tiles, num_held: _shares(num_tiles, MULTIPROCESSORS),
    "a fixed share, of free multiprocessors (num_sms)": lambda num_tiles, num_held: _shares(
        num_tiles, MULTIPROCESSORS - num_held
    ),
    ONE_TILE: lambda num_tiles, num_held: [1] * num_tiles,
    **{name: _runs(lengths) for name, lengths in RUN_GRIDS.items()},
    "runs of four, to the last": lambda num_tiles, num_held: [4] * (num_tiles // 4) + [1] * (num_tiles % 4),
}
"""The tiles of every program in its turn, of so many tiles, where so many multiprocessors are held."""


def ends_of(runs: Sequence[int], free_at: Sequence[float], start: float) -> float:
    """Return when the last program has ended: each begins where a multiprocessor is free first."""
    free = list(free_at)
    heapq.heapify(free)
    last = 0.0
    for tiles in runs:
        if tiles:
            end = heapq.heappop(free) + start + tiles
            heapq.heappush(free, end)
            last = max(last, end)
    return last


def model_rows() -> Iterator[dict[str, Any]]:
    """Return how long each grid takes, in the time of one tile a program: the mean of what was drawn, and the most."""
    for start in STARTS:
        generator = random.Random(0)
        times: dict[str, list[float]] = {way: [] for way in GRIDS}
        for _ in range(DRAWN):
            per_multiprocessor = 2.0 * 50.0 ** generator.random()
            num_tiles, num_held = round(per_multiprocessor * MULTIPROCESSORS), generator.choice((0, 4, 8, 16, 24, 32))
            released = math.inf if generator.random() < 0.5 else generator.random() * per_multiprocessor
            free_at = [0.0] * (MULTIPROCESSORS - num_held) + [released] * num_held
            for way, grid in GRIDS.items():
                times[way].append(ends_of(grid(num_tiles, num_held), free_at, start))
        for way, found in times.items():
            shares = [time / of_one for time, of_one in zip(found, times[ONE_TILE], strict=True)]
            yield {"way": way, "start": start, "mean": mean(shares), "most": max(shares)}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.tile_runs", description=__doc__)
    parser.add_argument("--json", type=output_file, default=RESULT, help=f"file to write (default {RESULT})")
    arguments = parser.parse_args(argv)
    table = {
        "benchmark": "tile_runs",
        "source_hash": source_hash(),
        "triton": importlib.metadata.version("triton"),
        "date": time.strftime("%Y-%m-%d"),
        "multiprocessors": MULTIPROCESSORS,
        "drawn": DRAWN,
    }
    rows = {"code": list(code_rows()), "model": list(model_rows())}
    lines = (f' "{name}": [\n  ' + ",\n  ".join(map(json.dumps, found)) + "\n ]" for name, found in rows.items())
    text = json.dumps(table, indent=1)[:-2] + ",\n" + ",\n".join(lines) + "\n}\n"
    write_whole(arguments.json, text, "table")
    return 0


if __name__ == "__main__":
    sys.exit(main())
