"""two_batches between four gloo processes: under DDP, FSDP2, checkpointing and Ctrl-C."""

from pathlib import Path

import pytest
from processes import run_torchrun

WORKER = Path(__file__).parent / "two_batches_worker.py"
CASES = (
    "gloo",
    "one_by_one",
    "ddp",
    "accumulation",
    "fsdp",
    "fsdp_lets_go_too_early",
    "mixed_precision",
    "interrupted",
)


@pytest.mark.thorough
def test_two_batches_on_four_ranks():
    run_torchrun(4, WORKER, cases=CASES, timeout_s=240.0)
