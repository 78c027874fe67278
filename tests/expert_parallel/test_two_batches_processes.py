"""two_batches between four gloo processes: under DDP, FSDP2, checkpointing and Ctrl-C."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).parent / "two_batches_worker.py"
CASES = ("gloo", "ddp", "accumulation", "fsdp", "fsdp_lets_go_too_early", "mixed_precision", "interrupted")


@pytest.mark.thorough
@pytest.mark.alone
def test_two_batches_on_four_ranks():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4"]
    result = subprocess.run(
        [*command, str(WORKER), *CASES],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    passed = [line.removeprefix("passed ") for line in result.stdout.splitlines() if line.startswith("passed ")]
    assert result.returncode == 0, (passed, result.stderr[-6000:])
    assert passed == list(CASES)
