"""Spread experts in DistributedDataParallel and torch's tools around it, on two gloo processes."""

from pathlib import Path

import pytest
from processes import run_torchrun

WORKER = Path(__file__).parent / "data_parallel_worker.py"
CASES = ("whatever_it_is_told", "what_is_frozen", "nothing_else_changes", "join", "mixing")


@pytest.mark.thorough
def test_data_parallel():
    run_torchrun(2, WORKER, cases=CASES)
