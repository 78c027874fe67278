"""A rank that dies, comes late or says something else, in gloo processes: the others end in time and say where."""

import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import fault_cases
import pytest
from fault_cases import LATE_S, SIZE, TIMEOUT_S, VICTIM

import tritonmoe

SURVIVORS = range(VICTIM)
SLACK_S = 4.0
"""For processes that have to wait for a core."""


@functools.cache
def all_results() -> dict[str, Any]:
    environment = {**os.environ, "PYTHONPATH": str(Path(tritonmoe.__file__).parents[1])}
    with tempfile.TemporaryDirectory() as folder:
        ended = subprocess.run(
            [sys.executable, fault_cases.__file__, folder], env=environment, capture_output=True, text=True, timeout=200
        )
        assert ended.returncode == 0, ended.stderr
        return json.loads((Path(folder) / "results.json").read_text())


def ranks_of(name: str) -> list[Any]:
    results = all_results()[name]
    assert results["hung"] == [], results
    return results["ranks"]


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("killed_in_dispatch", "step dispatch, chunk [01]"),
        ("killed_in_experts", "step combine, chunk [01]"),
        ("killed_in_combine", "step combine, chunk [01]"),
        ("killed_in_backward", "step combine_backward, chunk [01]"),
    ],
)
def test_a_killed_rank(name: str, where: str) -> None:
    ranks = ranks_of(name)
    assert ranks[VICTIM] is None
    for rank in SURVIVORS:
        assert ranks[rank]["error"] == "TransportError", ranks
        assert re.search(f"^{where}: .*rank {rank} of {SIZE}", ranks[rank]["words"]), ranks
        assert ranks[rank]["seconds"] < 0.5 + TIMEOUT_S + SLACK_S


def test_a_late_rank_changes_nothing() -> None:
    healthy, late = ranks_of("healthy"), ranks_of("late")
    for rank in range(SIZE):
        assert "error" not in healthy[rank], healthy
        assert late[rank]["value"] == healthy[rank]["value"]
    assert max(late[rank]["seconds"] for rank in SURVIVORS) > 0.9 * LATE_S


def test_a_rank_that_is_later_than_the_timeout() -> None:
    ranks = ranks_of("too_late")
    for rank in SURVIVORS:
        assert re.search(f"^step dispatch, chunk 1: .*rank {rank} of {SIZE}", ranks[rank]["words"]), ranks
        assert 0.9 * TIMEOUT_S < ranks[rank]["seconds"] < TIMEOUT_S + SLACK_S
    assert ranks[VICTIM]["error"] == "TransportError"


def test_corrupted_counts() -> None:
    """gloo itself would read memory that was never written, or abort."""
    ranks = ranks_of("corrupted_counts")
    assert ranks[VICTIM]["error"] == "CountMismatch"
    words = f"^rank {VICTIM} got counts of rank 0 that contradict each other: .* rows in all, by segment"
    assert re.search(words, ranks[VICTIM]["words"]), ranks
    for rank in SURVIVORS:
        assert re.search(f"^step metadata, all chunks: .*rank {rank} of {SIZE}", ranks[rank]["words"]), ranks
        assert ranks[rank]["seconds"] < TIMEOUT_S + SLACK_S


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("different_chunks", "the ranks disagree on num_chunks .*rank 0: 2, rank 1: 2, rank 2: 3"),
        ("different_layer_order", "the ranks disagree on layer .*rank 0: 0, rank 1: 0, rank 2: 1"),
    ],
)
def test_ranks_that_disagree(name: str, words: str) -> None:
    for result in ranks_of(name):
        assert result["error"] == "CountMismatch"
        assert re.search(words, result["words"]), result


def test_control_c() -> None:
    for result in ranks_of("interrupted"):
        assert result["error"] == "KeyboardInterrupt", result
        assert result["seconds"] < LATE_S + SLACK_S
