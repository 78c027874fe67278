"""What changes in a run: all ranks together, one rank for a while, few ranks by turns, two ranks in other passes."""

from pathlib import Path

import pytest

from bench.changing_runs import STEPS, judged, kinds_of
from bench.foreign_scenarios import Scenario
from bench.synthetic_traces import write_traces
from tritonmoe.tools.doctor.attribution import attribute
from tritonmoe.tools.doctor.reading import read_traces

KINDS = (
    "all slow growing", "all slow from half-way", "network slow for a while", "all late growing", "slow for a while",
    "late up to a step", "two of eight slow by turns", "slow forward, another backward", "warm-up of all",
    "two late of three, each for a while", "first one slow, then the other",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_what_changes_is_named(kind: str, tmp_path: Path) -> None:
    size, faults, expected = kinds_of(0)[kind]
    write_traces(Scenario(kind, 0, size, 2, STEPS, faults), tmp_path)
    found = attribute(read_traces(tmp_path).graph)
    assert judged(found, expected) == [True, True, True], found.findings
