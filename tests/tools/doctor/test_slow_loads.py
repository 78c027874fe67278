"""Experts in files: a disk that is slow is called so, and not its rank."""

import time
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tritonmoe as tm
from tests.support.synthetic_runs import Run, healthy, write_run
from tritonmoe.runtime.weight_files import WeightFile
from tritonmoe.tools.doctor.recorded_run import RecordedRun, judge_recording
from tritonmoe.tools.doctor.verdict import as_json, as_text
from tritonmoe.tools.recording import record
from tritonmoe.tools.recording.recording_reader import read_recording
from tritonmoe.transports import Transport

CALLS, LOAD_S = 4, 0.04
DISKS = {"one rank": ((2,), (2,)), "all ranks": ((0, 1, 2, 3), ())}


@pytest.mark.parametrize(
    "node_size", [None, pytest.param(2, marks=pytest.mark.thorough)], ids=["one level", "two levels"]
)
@pytest.mark.parametrize("whose", DISKS)
def test_a_slow_disk_has_its_cost(whose: str, node_size: int | None, tmp_path: Path) -> None:
    slow, culprits = DISKS[whose]
    levels = {} if node_size is None else {"node_size": 2, "has_two_levels": True, "top_k": 4, "num_chunks": 2}
    run = Run(slow_disk=(slow, LOAD_S), **levels)  # type: ignore[arg-type]  # a bool and integers
    found = judge_recording(read_recording(write_run(tmp_path, [run] * CALLS)))
    assert found.found.error == pytest.approx(0, abs=0.02)
    assert [(one.kind, one.culprits.ranks) for one in found.found.findings] == [("slow loads", culprits)]
    expected = run.seconds() - healthy(run).seconds()
    assert expected > LOAD_S
    assert found.found.findings[0].cost.seconds == pytest.approx(expected, rel=0.02)
    # Compute is priced as if nobody had waited.
    fast = judge_recording(read_recording(write_run(tmp_path / "fast", [healthy(run)] * CALLS)))
    assert found.costs.slowness == (1.0,) * 4
    assert found.costs.steps.unit_s["experts"] == pytest.approx(fast.costs.steps.unit_s["experts"], rel=0.01)
    assert found.found.computing_s == pytest.approx(fast.found.computing_s)
    num_steps = 2 * (run.num_chunks + 2)  # in both passes; local rows are computed in two
    assert found.found.host_s - fast.found.host_s == pytest.approx(LOAD_S * num_steps * len(slow) / 4, rel=0.01)
    assert found.advice == []
    assert any("experts are read from files" in limit for limit in found.limits)
    assert ("slow loads", 0.0) in fast.found.others


@pytest.mark.thorough
def test_a_slow_rank_with_a_slow_disk(tmp_path: Path) -> None:
    """Each of both is found with its own cost."""
    run = Run(slow_disk=((0, 1, 2, 3), LOAD_S), slow_rank=(1, 1.5))
    found = judge_recording(read_recording(write_run(tmp_path, [run] * CALLS)))
    costs = {one.kind: (one.culprits.ranks, one.cost.seconds) for one in found.found.findings}
    assert set(costs) == {"slow loads", "slow rank"}
    assert costs["slow rank"] == ((1,), pytest.approx(run.seconds() - replace(run, slow_rank=None).seconds(), rel=0.05))


SIZE, STEPS, HIDDEN, NUM_EXPERTS = 3, 5, 32, 18
LATE_S = 0.008
"""Of each read from a slow disk."""


def diagnose(folder: Path, monkeypatch: pytest.MonkeyPatch, slow: Collection[int]) -> RecordedRun:
    """Record a layer whose experts are read slowly on these ranks, and judge it."""
    read = WeightFile.read

    def read_slowly(file: WeightFile, memory: memoryview, offset: int) -> None:
        time.sleep(LATE_S * any(f"rank-{rank}-of" in file.path.name for rank in slow))
        read(file, memory, offset)

    monkeypatch.setattr(WeightFile, "read", read_slowly)

    def train(transport: Transport) -> None:
        config = tm.MoEConfig(HIDDEN, HIDDEN, NUM_EXPERTS, 2)
        layer = tm.GroupedExperts(config, transport, tm.OverlapConfig(2), backend="torch")
        tm.offload_experts(layer.requires_grad_(False), folder / "experts")
        generator = torch.Generator().manual_seed(transport.rank)
        for _ in range(STEPS):
            x = torch.randn(150, HIDDEN, generator=generator, requires_grad=True)
            weights, ids = torch.rand(150, NUM_EXPERTS, generator=generator).topk(2)
            layer(x, ids, weights).sum().backward()

    with record(folder / "run"):
        tm.run_on_emulated_ranks(train, SIZE)
    return judge_recording(read_recording(folder / "run"))


@pytest.mark.parametrize(
    ("slow", "culprits", "words"),
    [((1,), (1,), "rank 1 waits for experts"), (range(SIZE), (), "all ranks wait for experts")],
    ids=["one rank", "all ranks"],
)
def test_a_slow_disk_is_found(
    slow: Collection[int], culprits: tuple[int, ...], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What else a busy machine does to these ranks may be found too."""
    found = diagnose(tmp_path, monkeypatch, slow)
    one = max(found.found.findings, key=lambda one: one.cost.seconds)
    assert (one.kind, one.culprits.ranks) == ("slow loads", culprits)
    text = as_text(found, found.found, found.advice)
    assert words in text
    assert "resident_bytes" in text
    assert as_json(found, found.found)["findings"]
    # What is waited for is measured, and neither compute nor an exchange.
    steps = [step for of in found.built.passes for one in of.of_ranks for step in one.steps]
    tables = found.built.graph.tables
    computed_s, loaded_s = sum(step.held_s - step.load_s for step in steps), sum(step.load_s for step in steps)
    assert float(tables.busy_s.sum()) == pytest.approx(computed_s, rel=0.01)
    assert float(tables.load_s.sum()) == pytest.approx(loaded_s)
    assert found.found.host_s >= loaded_s / len(found.built.graph.steps) / SIZE > LATE_S
