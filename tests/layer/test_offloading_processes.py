"""Experts in files on two gloo processes: bits, files that can't be read, and what users put around layers."""

from pathlib import Path

from processes import run_torchrun

WORKER = Path(__file__).parent / "offloading_worker.py"
CASES = ("bits", "files")


def test_offloaded_experts_on_two_ranks(tmp_path: Path) -> None:
    run_torchrun(2, WORKER, str(tmp_path), cases=CASES)
