"""Experts in files on two gloo processes: bits, files that can't be read, and what users put around layers."""

from pathlib import Path

import pytest
from processes import run_torchrun

WORKER = Path(__file__).parent / "offloading_worker.py"


def test_offloaded_experts_on_two_ranks(tmp_path: Path) -> None:
    run_torchrun(2, WORKER, str(tmp_path), cases=("bits", "files"))


@pytest.mark.thorough
def test_what_users_put_around_offloaded_experts(tmp_path: Path) -> None:
    run_torchrun(2, WORKER, str(tmp_path), cases=("wrapped", "states", "refused"))
