"""UniformWalk: all ranks of an item at once give what the walk by levels gives."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.synthetic_runs import Run, write_run
from tritonmoe.tools.doctor import walk
from tritonmoe.tools.doctor.graph import Graph, Kind
from tritonmoe.tools.doctor.recorded_graph import graph_of
from tritonmoe.tools.doctor.uniform_walk import uniform_walk
from tritonmoe.tools.doctor.walk import Walker
from tritonmoe.tools.recording.recording_reader import read_recording

RUN = Run(num_layers=2, is_chained=True, noise=0.1, late_rank=(1, 0.01))


def graph(folder: Path, run: Run) -> Graph:
    return graph_of(read_recording(write_run(folder, [run] * 3))).graph


def both(of: Graph, monkeypatch: pytest.MonkeyPatch) -> tuple[Walker, Walker]:
    """Return a walker of all ranks at once, and one by levels."""
    at_once = Walker(of)
    monkeypatch.setattr(walk, "uniform_walk", lambda _: None)
    return at_once, Walker(of)


@pytest.mark.thorough
@pytest.mark.parametrize(
    "run",
    [RUN, replace(RUN, recomputes=True), replace(RUN, node_size=2, has_two_levels=True), replace(RUN, size=3)],
    ids=["one level", "recompute", "two levels", "three ranks"],
)
@pytest.mark.parametrize("is_queued", [False, True])
def test_walks_agree(tmp_path: Path, run: Run, is_queued: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    of = graph(tmp_path, run)
    of.is_queued_at_start = is_queued
    of.tables.delay_s = torch.rand(len(of.tables.delay_s), dtype=torch.float64) * 1e-3
    assert uniform_walk(of) is not None
    at_once, by_levels = both(of, monkeypatch)
    runs = torch.stack([of.tables.run_s, of.tables.run_s * torch.rand(len(of.tables.run_s))])
    transfers = torch.stack([of.tables.transfer_s, 2 * of.tables.transfer_s])
    assert at_once.all_step_times(runs, transfers) == by_levels.all_step_times(runs, transfers)
    found, expected = (of.moments(runs[1], transfers[1]) for of in (at_once, by_levels))
    assert found.step_s == expected.step_s
    for name in ("step_ends_s", "started_s", "ended_s", "waits_since_s"):
        assert torch.equal(getattr(found, name).nan_to_num(nan=-1.0), getattr(expected, name).nan_to_num(nan=-1.0)), (
            name
        )


def test_ranks_that_do_unlike_things_are_walked_by_levels(tmp_path: Path) -> None:
    of = graph(tmp_path, RUN)
    kinds, places = of.tables.programs[0]
    first, second = (kinds == int(Kind.WAIT)).nonzero()[:2, 0].tolist()
    swapped = places.clone()
    swapped[[first, second]] = places[[second, first]]
    of.tables.programs[0] = kinds, swapped
    assert uniform_walk(of) is None
    of.tables.programs[0] = kinds[:-1], places[:-1]
    assert uniform_walk(of) is None
