"""Stages of torch.distributed.pipelining with spread experts: one device's gradients, whatever the schedule."""

from pathlib import Path

import pytest
from processes import run_torchrun

WORKER = Path(__file__).parent / "pipeline_worker.py"
CASES = (
    *("ScheduleGPipe", "Schedule1F1B", "ScheduleInterleaved1F1B", "ScheduleInterleavedZeroBubble"),
    *("ScheduleZBVZeroBubble", "ddp Schedule1F1B", "fsdp Schedule1F1B", "fsdp ScheduleZBVZeroBubble"),
)


@pytest.mark.thorough
def test_two_stages_of_two_ranks() -> None:
    run_torchrun(4, WORKER, cases=CASES)
