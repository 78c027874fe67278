"""Attribution: causes that a recording of the simulator's own has are found, with their culprit and their cost."""

from pathlib import Path

import pytest

from bench.synthetic_runs import Run, healthy, write_run
from tritonmoe.diagnosis.attribution import Attribution, attribute
from tritonmoe.diagnosis.recording import read_recording

CALLS = 4


def diagnose(folder: Path, run: Run) -> Attribution:
    return attribute(read_recording(write_run(folder, [run] * CALLS)))


@pytest.mark.parametrize("size", [2, 4])
def test_a_healthy_run(size: int, tmp_path: Path) -> None:
    found = diagnose(tmp_path, Run(size=size))
    assert found.measured_s == pytest.approx(Run(size=size).seconds())
    assert found.error == pytest.approx(0, abs=0.02)
    assert found.is_healthy, found.findings


CAUSES = {
    "slow link": (Run(slow_link=(2, 1, 60.0)), (2, 1)),
    "slow port": (Run(slow_port=(3, 20.0)), (3,)),
    "slow rank": (Run(slow_rank=(2, 1.5)), (2,)),
    "late rank": (Run(late_rank=(1, 0.08)), (1,)),
    "imbalance": (Run(hot_rank=(0, 2.0)), (0,)),
    "bandwidth": (Run(byte_s=2e-6), ()),
    "latency": (Run(latency_s=0.02), ()),
    "chunk overhead": (Run(fixed_s=0.01), ()),
    "host overhead": (Run(host_s=0.03), ()),
}


@pytest.mark.parametrize("kind", CAUSES)
def test_a_cause_is_found_with_its_culprit_and_its_cost(kind: str, tmp_path: Path) -> None:
    run, culprits = CAUSES[kind]
    found = diagnose(tmp_path, run)
    assert found.error == pytest.approx(0, abs=0.02), found.misfits
    first = found.findings[0]
    assert (first.kind, first.ranks) == (kind, culprits)
    if kind in ("slow link", "slow port", "slow rank", "late rank"):
        assert first.gain.seconds == pytest.approx(run.seconds() - healthy(run).seconds(), rel=0.05)
