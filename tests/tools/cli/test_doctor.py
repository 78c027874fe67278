"""`tritonmoe doctor`: the verdict, its files, and the exit status."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

import tritonmoe as tm
from tests.support.synthetic_runs import Run, write_run
from tritonmoe.tools.benchmarks import overlap_rank
from tritonmoe.tools.benchmarks.measured_layer import MeasuredLayer
from tritonmoe.tools.benchmarks.overlap_variants import Variant
from tritonmoe.tools.cli import main
from tritonmoe.tools.doctor.recorded_run import judge_recording
from tritonmoe.tools.recording.recording_reader import read_recording


@pytest.fixture
def healthy(tmp_path: Path) -> Path:
    return write_run(tmp_path / "healthy", [Run()] * 4)


@pytest.fixture
def slow(tmp_path: Path) -> Path:
    return write_run(tmp_path / "slow", [Run(slow_rank=(2, 1.5))] * 4)


def test_a_healthy_run(healthy: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["doctor", str(healthy)]) == 0
    said = capsys.readouterr().out
    assert "HEALTHY" in said
    assert len(said.splitlines()) <= 20


def test_a_slow_rank(slow: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["doctor", str(slow), "--json", str(tmp_path / "verdict.json")]) == 1
    said = capsys.readouterr().out
    assert "1. SLOW RANK" in said
    assert "rank 2 computes 1.50 times as long as usual" in said
    assert len(said.splitlines()) <= 20
    (verdict,) = json.loads((tmp_path / "verdict.json").read_text())
    found = judge_recording(read_recording(slow)).found
    assert verdict["findings"][0]["cost_s"] == found.findings[0].cost.seconds
    assert (verdict["ranks"], verdict["is_healthy"], verdict["findings"][0]["ranks"]) == (4, False, [2])


@pytest.mark.thorough
def test_several_runs(healthy: Path, slow: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["doctor", str(healthy), str(slow)]) == 1
    said = capsys.readouterr().out
    assert said.index("HEALTHY") < said.index("SLOW RANK")


def test_unreadable(healthy: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (healthy / "rank-0002.jsonl").write_text('{"format": "trace"}\n')
    assert main(["doctor", str(healthy)]) == 2
    said = capsys.readouterr()
    assert not said.out
    assert f"tritonmoe doctor: {healthy / 'rank-0002.jsonl'} line 1: not a recording" in said.err
    assert main(["doctor", str(tmp_path / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_one_rank(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["doctor", str(write_run(tmp_path, [Run(size=1)] * 2))]) == 2
    assert "is a recording of one rank" in capsys.readouterr().err


@pytest.mark.thorough
def test_bench_overlap_records(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the calls of "auto", though a rank is late with one before them."""
    run_rounds = overlap_rank.run_rounds

    def run_late(rank: MeasuredLayer, *arguments: Any) -> Any:
        found = run_rounds(rank, *arguments)
        if rank.transport.rank == 1:
            time.sleep(0.5)
            rank.run_layer(Variant("compute", 1))
        return found

    monkeypatch.setattr(overlap_rank, "run_rounds", run_late)
    arguments = ["--emulate", "2", "--model", "tiny", "--tokens", "64", "--chunks", "1", "2", "--rounds", "3", "--rate"]
    assert main(["bench", "overlap", *arguments, "100mbit", "--record", str(tmp_path / "run")]) == 0
    assert f"read it with tritonmoe doctor {tmp_path / 'run'}" in capsys.readouterr().out
    found = read_recording(tmp_path / "run")
    assert len(found.calls) == 3
    assert isinstance(found.calls[0].plan, tm.OverlapPlan)
    assert main(["doctor", str(tmp_path / "run")]) in (0, 1)
