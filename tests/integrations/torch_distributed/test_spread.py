"""Experts that are spread over four gloo processes, in what users put around them: right, or refused with a way out."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).parent / "spread_worker.py"
CASES = (
    *("optimizers", "numbers", "selection_bias", "file_of_one_rank", "assigned", "meshes", "fully_shard"),
    *("changed_in_place", "too_late", "replicated_slots"),
)


@pytest.mark.thorough
def test_spread_experts_on_four_ranks():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4"]
    result = subprocess.run(
        [*command, str(WORKER), *CASES],
        capture_output=True,
        text=True,
        timeout=170,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    passed = [line.removeprefix("passed ") for line in result.stdout.splitlines() if line.startswith("passed ")]
    assert result.returncode == 0, (passed, result.stderr[-6000:])
    assert passed == list(CASES)
