"""What is saved and copied of spread experts and of what FSDP2 shards beside them, on two gloo processes."""

from pathlib import Path

import pytest
from processes import run_torchrun

WORKER = Path(__file__).parent / "saved_worker.py"
CASES = ("dense_shards", "replicas_beside_dense", "written_by_a_process", "written_before_shards")


@pytest.mark.thorough
def test_saved():
    run_torchrun(2, WORKER, cases=CASES)
