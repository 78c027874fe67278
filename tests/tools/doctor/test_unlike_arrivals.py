"""Recordings in which some passes of a rank tell when each rank's rows arrived, and others only when all were there."""

import json
import statistics
from pathlib import Path

import pytest
import torch

from tests.support.synthetic_runs import Run, write_run
from tritonmoe.runtime.files import Json
from tritonmoe.tools.doctor.messages import Reach, find_messages
from tritonmoe.tools.doctor.recorded_run import judge_recording
from tritonmoe.tools.doctor.run_figures import figures_of
from tritonmoe.tools.recording.recording_reader import read_recording

SIZE = 3


def without_arrivals(folder: Path, rank: int) -> list[list[Json]]:
    """Leave out the arrivals of a rank's backward; return the calls of all ranks as the files have them."""
    calls = []
    for other in range(SIZE):
        file = folder / f"rank-{other:04d}.jsonl"
        header, *lines = map(json.loads, file.read_text().splitlines())
        for line in lines if other == rank else []:
            for step in line["backward"]["steps"]:
                step["arrivals_s"] = None
        file.write_text("".join(json.dumps(line) + "\n" for line in (header, *lines)))
        calls.append(lines)
    return calls


def stood(calls: list[Json], peer: int) -> float:
    """Return for how long a rank stood still for another one's rows in a call, the median of all calls."""
    sums = [
        sum(
            min(step["wait_s"], max(0.0, step["arrivals_s"][peer] - (step["end_s"] - step["wait_s"])))
            for of in (call["forward"], call["backward"])
            for step in of["steps"]
            if step["arrivals_s"] is not None and step["arrivals_s"][peer] is not None
        )
        for call in calls
    ]
    return statistics.median(sums)


@pytest.mark.thorough
@pytest.mark.parametrize("rank", [0, SIZE - 1], ids=["first", "last"])
def test_a_rank_that_tells_arrivals_of_forward_alone(rank: int, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [Run(size=SIZE, late_rank=(1, 0.01), noise=0.05)] * 3)
    calls = without_arrivals(folder, rank)
    run = judge_recording(read_recording(folder))
    expected = torch.tensor([[stood(of, peer) for peer in range(SIZE)] for of in calls], dtype=torch.float64)
    found = torch.tensor(figures_of(run)["waits_s"], dtype=torch.float64)
    assert (expected > 0).any(1).all()
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    for call, of_call in zip(run.recording.calls, zip(*calls, strict=True), strict=True):
        backward = find_messages(call, 1, Reach.ALL, None)
        of = of_call[rank]["backward"]
        ends = [of["origin"] + step["end_s"] for step in of["steps"] if step["arrivals_s"] is None]
        arrived = backward.arrived[:, [peer for peer in range(SIZE) if peer != rank], rank]
        for moments in arrived:
            known = moments[~moments.isnan()]
            assert all(min(abs(moment - end) for end in ends) < 1e-6 for moment in known.tolist())
        assert not backward.are_told_apart
