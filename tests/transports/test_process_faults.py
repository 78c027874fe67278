"""A rank that dies, comes late or says something else, in gloo processes: the others end in time and say where."""

import functools
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import fault_processes
import pytest
from fault_cases import DAMAGED, LATE_S, SIZE, TIMEOUT_S, VICTIM
from processes import ENVIRONMENT, NEEDS_MPI, run_processes

pytestmark = [pytest.mark.alone, pytest.mark.thorough]
SURVIVORS = range(VICTIM)
SLACK_S = 4.0
"""For processes that have to wait for a core."""


@functools.cache
def all_results(*arguments: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        ended = subprocess.run(
            [sys.executable, fault_processes.__file__, folder, *arguments],
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert ended.returncode == 0, ended.stderr
        return json.loads((Path(folder) / "results.json").read_text())


def ranks_of(name: str, which: str, *late_s: str) -> list[Any]:
    """Return what the ranks of a case heard; the arguments are those of fault_processes.py."""
    results = all_results(which, *late_s)[name]
    assert results["hung"] == [], results
    return results["ranks"]


def ranks_on_one_level(name: str, *late_s: str) -> list[Any]:
    return ranks_of(name, "one", *late_s)


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("killed_in_dispatch", "step dispatch, chunk [01]"),
        ("killed_in_experts", "step combine, chunk [01]"),
        ("killed_in_combine", "step combine, chunk [01]"),
        ("killed_in_backward", "step combine_backward, chunk [01]"),
        ("killed_in_backward_experts", "step dispatch_backward, chunk [01]"),
    ],
)
def test_a_killed_rank(name: str, where: str) -> None:
    ranks = ranks_on_one_level(name)
    assert ranks[VICTIM] is None
    for rank in SURVIVORS:
        assert ranks[rank]["error"] == "TransportError", ranks
        assert re.search(f"^{where}: .*rank {rank} of {SIZE}", ranks[rank]["words"]), ranks
        assert f"rank {VICTIM} has ended: its connection is closed and it left no word" in ranks[rank]["words"], ranks
        assert ranks[rank]["seconds"] < 0.5 + TIMEOUT_S + SLACK_S


LATE = [
    (),
    *(pytest.param((seconds,), marks=pytest.mark.slow, id=f"{seconds} s") for seconds in ("1", "5", "30")),
]


@pytest.mark.parametrize("late_s", LATE)
def test_a_late_rank_changes_nothing(late_s: tuple[str, ...]) -> None:
    healthy, late = (ranks_on_one_level(name, *late_s) for name in ("healthy", "late"))
    for rank in range(SIZE):
        assert "error" not in healthy[rank], healthy
        assert late[rank]["value"] == healthy[rank]["value"]
    assert max(late[rank]["seconds"] for rank in SURVIVORS) > 0.9 * (float(*late_s) or LATE_S)


@pytest.mark.parametrize("late_s", LATE)
def test_a_rank_that_is_later_than_the_timeout(late_s: tuple[str, ...]) -> None:
    ranks, timeout_s = ranks_on_one_level("too_late", *late_s), float(*late_s) / 2 or TIMEOUT_S
    assert re.search(rf"^step \w+, chunk [01]: .*rank {VICTIM} of {SIZE}", ranks[VICTIM]["words"]), ranks
    for rank in SURVIVORS:
        assert re.search(f"^step dispatch, chunk 1: .*rank {rank} of {SIZE}", ranks[rank]["words"]), ranks
        assert f"has not heard from ranks [{VICTIM}] within" in ranks[rank]["words"], ranks
        assert 0.9 * timeout_s < ranks[rank]["seconds"] < timeout_s + SLACK_S


def run_as_users(name: str, backend: str, folder: Path) -> tuple[str, float]:
    """Run a case in processes that nobody watches over; gives what they said and the seconds."""
    before = time.perf_counter()
    ended = run_processes(SIZE, backend, fault_processes.__file__, str(folder), backend, name, timeout_s=60)
    assert 0 not in ended.statuses, ended
    return ended.output, time.perf_counter() - before


@pytest.mark.parametrize("name", ["killed_in_combine", pytest.param("too_late", marks=pytest.mark.slow)])
def test_processes_end_by_themselves(name: str, tmp_path: Path) -> None:
    """The error is on the screen, and gloo's exchanges under way keep no process from its end."""
    output, seconds = run_as_users(name, "gloo", tmp_path)
    step = "combine" if name == "killed_in_combine" else "dispatch"
    for rank in SURVIVORS:
        assert re.search(rf"TransportError: step {step}, chunk [01]: .*rank {rank} of {SIZE}", output), output
    assert seconds < 30


@NEEDS_MPI
def test_mpi_is_aborted_after_the_line_that_names_step_and_chunk(tmp_path: Path) -> None:
    output, seconds = run_as_users("too_late", "mpi", tmp_path)
    # Lines of several ranks can be mixed up in mpiexec's output.
    assert re.search(rf"TransportError: step dispatch, chunk 1: .*rank [01] of {SIZE}", output), output
    assert output.count("TransportError: step dispatch, chunk 1") == len(SURVIVORS), output
    assert "MPI_Abort when this process ends" in output
    assert seconds < 30


@NEEDS_MPI
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("corrupted_counts", f"CountMismatch: rank {VICTIM} got counts of rank {DAMAGED} that contradict each other"),
        ("different_chunks", "CountMismatch: the ranks disagree on num_chunks"),
        ("different_layer_order", "CountMismatch: the ranks disagree on which call this is"),
        ("full_disk", "the trace could not be written: No space left on device"),
    ],
)
def test_other_faults_of_mpi(name: str, words: str, tmp_path: Path) -> None:
    output, seconds = run_as_users(name, "mpi", tmp_path)
    assert words in output, output
    if name == "corrupted_counts":  # the others wait for rows, and MPI ends them with this one
        assert f"MPI_Abort when this process ends: rank {VICTIM} failed with CountMismatch" in output, output
    if name == "full_disk":  # the others didn't hear of it themselves
        assert re.search(f"TransportError: count exchange of layer call 1.*rank [01] of {SIZE}", output), output
    assert seconds < 30
    assert running_after_a_while(tmp_path) == []


def running(folder: Path) -> list[int]:
    """Return the processes of run_as_users that have not ended."""
    pids = sorted(int(file.read_text()) for file in folder.glob("*.pid"))
    states = [subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True) for pid in pids]
    # One that ended is gone, or a zombie where nobody asks how.
    return [pid for pid, state in zip(pids, states, strict=True) if state.stdout.strip()[:1] not in ("", "Z")]


def running_after_a_while(folder: Path) -> list[int]:
    until = time.perf_counter() + SLACK_S
    while running(folder) and time.perf_counter() < until:
        time.sleep(0.1)
    return running(folder)


@NEEDS_MPI
@pytest.mark.parametrize(
    "name",
    [
        "killed_in_combine",
        *(
            pytest.param(f"killed_in_{where}", marks=pytest.mark.slow)
            for where in ("dispatch", "experts", "backward", "backward_experts")
        ),
    ],
)
def test_a_rank_of_mpi_is_killed(name: str, tmp_path: Path) -> None:
    """MPICH's mpiexec kills the others within milliseconds; where one lives on, it must say where it waited."""
    output, seconds = run_as_users(name, "mpi", tmp_path)
    assert len(list(tmp_path.glob("*.pid"))) == SIZE
    assert seconds < 30
    assert running_after_a_while(tmp_path) == []
    if "signal 9" not in output:
        for rank in SURVIVORS:
            error = rf"TransportError: step \w+, (chunk [01]|all chunks): .*rank {rank} of {SIZE}"
            assert re.search(error, output), output
    again = run_processes(SIZE, "mpi", fault_processes.__file__, str(tmp_path), "mpi", "healthy", timeout_s=60)
    assert again.statuses == [0], again


def test_corrupted_counts() -> None:
    """gloo itself would read memory that was never written, or abort."""
    ranks = ranks_on_one_level("corrupted_counts")
    assert ranks[VICTIM]["error"] == "CountMismatch"
    words = f"^rank {VICTIM} got counts of rank {DAMAGED} that contradict each other: .* rows in all, by segment"
    assert re.search(words, ranks[VICTIM]["words"]), ranks
    # Whoever is slow posts its rows of a later step when the others have ended already.
    where = "(metadata, all chunks|dispatch, chunk [01])"
    for rank in SURVIVORS:
        assert re.search(f"^step {where}: .*rank {rank} of {SIZE}", ranks[rank]["words"]), ranks
        assert f"rank {VICTIM} failed with CountMismatch" in ranks[rank]["words"], ranks
        assert ranks[rank]["seconds"] < TIMEOUT_S + SLACK_S


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("different_chunks", "the ranks disagree on num_chunks .*rank 0: 2, rank 1: 2, rank 2: 3"),
        (
            "different_layer_order",
            "the ranks disagree on which call this is .*rank 1: forward of layer 0, .*rank 2: forward of layer 1,",
        ),
    ],
)
def test_ranks_that_disagree(name: str, words: str) -> None:
    for result in ranks_on_one_level(name):
        assert result["error"] == "CountMismatch"
        assert re.search(words, result["words"]), result


def test_a_full_disk_under_the_trace_of_one_rank() -> None:
    """The others have called the next layer already."""
    ranks = ranks_on_one_level("full_disk")
    assert ranks[VICTIM]["error"] == "OSError"
    assert "the trace could not be written: No space left on device" in ranks[VICTIM]["words"]
    for rank in SURVIVORS:
        where = "count exchange of layer call 1, before any chunk"
        assert re.search(f"^{where}: .*rank {rank} of {SIZE}", ranks[rank]["words"]), ranks
        assert f"rank {VICTIM} has ended" in ranks[rank]["words"], ranks
        assert ranks[rank]["seconds"] < TIMEOUT_S + SLACK_S


def test_control_c() -> None:
    for result in ranks_on_one_level("interrupted"):
        assert result["error"] == "KeyboardInterrupt", result
        assert result["seconds"] < LATE_S + SLACK_S


def test_control_c_in_one_rank() -> None:
    ranks = ranks_on_one_level("one_interrupted")
    assert ranks[VICTIM]["error"] == "KeyboardInterrupt"
    for rank in SURVIVORS:
        assert re.search(f"^step dispatch, chunk 1: .*rank {rank} of {SIZE}", ranks[rank]["words"]), ranks
        assert f"rank {VICTIM} failed with KeyboardInterrupt" in ranks[rank]["words"], ranks
        assert ranks[rank]["seconds"] < LATE_S + SLACK_S
