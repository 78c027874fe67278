"""After a fault: everybody hears whose it was, and goes on after rebuild() where all ranks live."""

import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import random_faults
import rebuild_cases
from processes import ENVIRONMENT, run_processes
from random_faults import LATE_S, SIZE, TIMEOUT_S, step

import tritonmoe as tm

pytestmark = [pytest.mark.alone, pytest.mark.thorough]
SLACK_S = 8.0
"""For processes that have to wait for a core."""
MAX_GROWTH = 4 << 20
"""Of a process's memory, bytes, from the second to the last third of its faults."""


@functools.cache
def expected_values(seed: int) -> list[float]:
    """Return what the ranks' steps give, by the reference."""
    return tm.run_on_emulated_ranks(lambda transport: step(transport, seed, backend="reference"), SIZE)


def run_random_faults(folder: Path, *arguments: str, timeout_s: float) -> dict[Any, list[Any]]:
    """Run random_faults.py, check what every rank saw, and give it by world and rank."""
    command = [sys.executable, random_faults.__file__, str(folder), *arguments]
    ended = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout_s)
    assert ended.returncode == 0, ended.stderr
    by_rank = defaultdict(list)
    for result in json.loads((folder / "results.json").read_text()):
        if "statuses" in result:
            assert set(result["statuses"].values()) == {0}, (result, ended.stderr)
        else:
            check(result)
            by_rank[result["world"], result["rank"]].append(result)
    return by_rank


def check(seen: dict[str, Any]) -> None:
    (kind, _, victim), rank = seen["fault"], seen["rank"]
    names_victim = (
        rf"rank {victim} (failed with OwnError|called rebuild\(\)|has ended: its connection|gave no sign)"
        rf"|has not heard from ranks \[[^]]*{victim}"
    )
    if rank == victim and kind not in ("stopped", "late"):
        assert seen["error"].startswith("OwnError: "), seen
    else:
        assert re.search(rf"^TransportError: .*({names_victim})", seen["error"]), seen
    late_s = LATE_S if rank == victim else TIMEOUT_S
    assert seen["seconds"] < late_s + SLACK_S, seen
    if kind == "killed":
        assert re.search(rf"ranks \[{victim}\] have ended", seen["rebuilt"]), seen
        assert seen["rebuild_s"] < TIMEOUT_S + SLACK_S, seen
    else:
        assert seen["rebuilt"] == "yes", seen
        assert seen["value"] == pytest.approx(expected_values(seen["seed"])[rank], rel=1e-4), seen


@functools.cache
def case_results(size: int, *arguments: str) -> list[dict[str, str | None]]:
    """Run cases of rebuild_cases.py in processes, and give what failed, by rank and case."""
    with tempfile.TemporaryDirectory() as folder:
        ended = run_processes(size, "gloo", rebuild_cases.__file__, folder, *arguments, timeout_s=150)
        files = [Path(folder) / f"{rank}.json" for rank in range(size)]
        return [json.loads(file.read_text()) if file.exists() else {"start": ended.output} for file in files]


@pytest.mark.parametrize("name", rebuild_cases.CASES)
def test_gloo(name: str) -> None:
    for rank, results in enumerate(case_results(2)):
        failure = results.get(name, "was not reached")
        assert failure is None, f"rank {rank}: {failure}"


def test_gloo_without_a_store() -> None:
    name = "the_host_of_the_store_is_killed"
    assert case_results(2, name)[1] == {name: None}


def test_gloo_on_two_levels() -> None:
    name = "four_ranks_on_two_levels"
    assert case_results(4, name) == 4 * [{name: None}]


def test_some_random_faults(tmp_path: Path) -> None:
    run_random_faults(tmp_path, "1", "7", timeout_s=150)  # every kind is among them


@pytest.mark.slow
def test_200_random_faults(tmp_path: Path) -> None:
    seen = run_random_faults(tmp_path, "0", "200", timeout_s=3000)
    assert len({json.dumps(of_fault["fault"]) for of_rank in seen.values() for of_fault in of_rank}) > 30


@pytest.mark.soak
def test_soak(tmp_path: Path) -> None:
    """For TRITONMOE_SOAK_SECONDS and until the world ends: no wrong number, and memory stays flat."""
    seconds = os.environ.get("TRITONMOE_SOAK_SECONDS", "1800")
    for of_rank in run_random_faults(tmp_path, "0", "soak", seconds, timeout_s=float(seconds) + 3000).values():
        sizes = [of_fault["rss"] for of_fault in of_rank]
        third = len(sizes) // 3
        assert third > 50
        assert median(sizes[-third:]) - median(sizes[third:-third]) < MAX_GROWTH, sizes[:: third // 20]
