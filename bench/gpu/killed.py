"""`python -m bench.gpu.killed`: rehearsals that are killed at random times, and whether they lose or repeat a case.

A run is killed up to three times, each time the one process alone, with SIGKILL, a random while after a random number
of results stands in its file; the fourth time it may end. Then every case of the plan and every kernel must stand in
its file exactly once, none of them failed. What Triton compiles is kept in one cache for all runs.
"""

import argparse
import collections
import contextlib
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from bench.gpu.children import ROOT
from bench.gpu.compilation import kernels_of
from bench.gpu.plan import cases
from bench.gpu.setting import REHEARSAL
from tritonmoe.runtime.files import Json
from tritonmoe.runtime.processes import dies_with_its_parent
from tritonmoe.tools.benchmarks.argument_types import output_file, positive
from tritonmoe.tools.benchmarks.kept_results import read_results
from tritonmoe.tools.benchmarks.timing import write_json

__all__ = ["main"]

MOST_RESTARTS = 3
LATER_S = 3.0
"""Longer than most cases: a kill falls anywhere in one, and sometimes behind it."""
BUDGET_S = 3600.0
"""Kills end a rehearsal here, and no budget, which a busy machine would use up."""
TARGET = "sm_90"
OUTPUT = "output.txt"


def main(argv: Sequence[str] | None = None) -> int:
    """Run them; 1 where one lost or repeated a case, or did not end."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.killed", description=__doc__)
    parser.add_argument("--runs", type=positive, default=20, help="rehearsals to kill (default 20)")
    parser.add_argument("--json", type=output_file, help="also write the outcome to this file")
    parser.add_argument("--seed", type=int, default=0, help="of the times at which they are killed (default 0)")
    arguments = parser.parse_args(argv)
    draw = random.Random(arguments.seed)
    expected = {case.name for case in cases(REHEARSAL, TARGET)}
    expected |= {kernel.name for kernel in kernels_of(REHEARSAL, TARGET)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        started = time.perf_counter()
        status, output = _run_to_end(folder, folder / "first.jsonl")
        full_s = time.perf_counter() - started
        compiled = re.findall(r".*kernels and tiles are compiled.*", output)
        print(f"unharmed: status {status}, {full_s:.1f} s. {' '.join(compiled)}", flush=True)
        outcomes: list[Json] = []
        results = {"unharmed_s": round(full_s, 1), "compiled": compiled, "cases": len(expected), "runs": outcomes}
        for number in range(arguments.runs if status == 0 else 0):
            outcomes.append(_killed_run(folder, folder / f"{number}.jsonl", draw, expected))
            print(f"{number + 1}: {outcomes[-1]}", flush=True)
            write_json(arguments.json, "gpu_killed", results)  # whatever becomes of this process
    num_right = sum(outcome["is_right"] for outcome in outcomes)
    print(f"{num_right} of {arguments.runs} runs lost and repeated nothing")
    return 0 if num_right == arguments.runs else 1


def _start(folder: Path, file: Path) -> subprocess.Popen[bytes]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(folder / "triton")}
    command = [sys.executable, "-m", "bench.gpu", "--rehearse", "--budget-s", str(BUDGET_S), "--out", str(file)]
    with (folder / OUTPUT).open("wb") as output:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=dies_with_its_parent,
        )


def _run_to_end(folder: Path, file: Path) -> tuple[int, str]:
    status = _start(folder, file).wait()
    return status, (folder / OUTPUT).read_text(errors="replace")


def _num_lines(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0


def _kill_at(folder: Path, file: Path, num_lines: int, later_s: float) -> Json | None:
    """Start a run and kill it so long after its file has so many lines; None where it ended before."""
    process = _start(folder, file)
    while _num_lines(file) < num_lines and process.poll() is None:
        time.sleep(0.01)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(later_s)
    if process.poll() is not None:
        return None
    process.kill()
    process.wait()
    return {"later_s": round(later_s, 2), "lines": _num_lines(file)}


def _killed_run(folder: Path, file: Path, draw: random.Random, expected: set[str]) -> Json:
    """Kill a run one to three times, let it end, and say what its file holds."""
    lines = sorted(draw.randrange(len(expected)) for _ in range(draw.randint(1, MOST_RESTARTS)))
    found = [_kill_at(folder, file, num_lines, draw.uniform(0.0, LATER_S)) for num_lines in lines]
    kills = [kill for kill in found if kill is not None]
    status, output = _run_to_end(folder, file)
    if status != 0:
        print(output[-3000:], file=sys.stderr)
    counts = collections.Counter(line["case"] for line in read_results(file))
    outcome = {
        "kills": kills,
        "status": status,
        "lost": sorted(expected - set(counts)),
        "repeated": sorted(name for name, count in counts.items() if count > 1),
        "failed": sorted(line["case"] for line in read_results(file) if "failed" in line),
    }
    is_right = status == 0 and not outcome["lost"] and not outcome["repeated"] and not outcome["failed"]
    return {**outcome, "is_right": is_right}


if __name__ == "__main__":
    sys.exit(main())
