"""The doctor's verdict on traces of other trainers: who, when and how much, against what was wrong with them."""

import json
from pathlib import Path

import pytest

from bench.faults import Fault
from bench.foreign_judging import judge
from bench.foreign_scenarios import Scenario, draw
from bench.synthetic_traces import write_traces
from tritonmoe.tools.cli import main
from tritonmoe.tools.doctor.attribution import Verdict, attribute
from tritonmoe.tools.doctor.chrome_timeline import slowdown_of
from tritonmoe.tools.doctor.reading import read_traces

AR = Path(__file__).parent / "data" / "straggler_ar_two_steps.json.gz"


def verdict(scenario: Scenario, folder: Path) -> tuple[Verdict, float]:
    share = write_traces(scenario, folder)
    return attribute(read_traces(folder).graph), share


FAULTS = {
    "slow rank": (Fault("slow rank", (2,), 3.0),),
    "late rank": (Fault("late rank", (1,), 0.1),),
    "two late": (Fault("late rank", (0, 3), 0.1),),
    "periodic": (Fault("late rank", (3,), 0.4, "periodic", 3),),
    "moving": (Fault("late rank", (), 0.15),),
    "growing": (Fault("late rank", (1,), 0.3, "growing"),),
    "slow backward": (Fault("slow rank", (2,), 4.0, phase="backward"),),
    "slow link": (Fault("slow link", (1, 2), 8.0),),
    "imbalance": (Fault("imbalance", (0,), 0.7),),
}


@pytest.mark.parametrize("name", FAULTS)
def test_cause_who_when_and_cost(name: str, tmp_path: Path) -> None:
    scenario = Scenario(name, 11, faults=FAULTS[name])
    found, share = verdict(scenario, tmp_path)
    judged = judge(scenario, found, share)
    assert share > 0.15
    assert (judged.cause, judged.culprits, judged.when, judged.gain) == (True, True, True, True), judged
    assert found.error == pytest.approx(0, abs=0.01)
    assert not found.is_healthy


def test_where(tmp_path: Path) -> None:
    slow, _ = verdict(Scenario("", 3, faults=FAULTS["slow backward"]), tmp_path / "slow")
    assert slow.findings[0].culprits.phase == "backward"
    late = Fault("late rank", (1,), 0.2, phase="forward", layer=1)
    one, _ = verdict(Scenario("", 3, num_layers=3, faults=(late,)), tmp_path / "late")
    assert one.findings[0].culprits.place == ("forward", "before", "all_to_all", 3)


@pytest.mark.parametrize("num_ranks", [2, 3, 8])
def test_healthy_runs_are_silent(num_ranks: int, tmp_path: Path) -> None:
    found, _ = verdict(Scenario("healthy", 5, num_ranks=num_ranks, num_layers=4), tmp_path)
    assert found.is_healthy
    assert found.findings == ()


@pytest.mark.thorough
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", ["healthy", "slow rank", "late rank", "two late", "late periodic", "late moving"])
def test_drawn_scenarios(kind: str, seed: int, tmp_path: Path) -> None:
    scenario = draw(kind, 500 + seed, num_ranks=(4, 3, 8, 4)[seed])
    found, share = verdict(scenario, tmp_path)
    judged = judge(scenario, found, share)
    assert judged.cause in (True, None), judged
    assert judged.culprits in (True, None), judged


def test_two_equal_faults_of_two_kinds_are_both_said(tmp_path: Path) -> None:
    faults = (Fault("slow rank", (0,), 3.0, phase="forward"), Fault("late rank", (2,), 0.06))
    found, _ = verdict(Scenario("", 8, faults=faults), tmp_path)
    assert {(one.kind, one.culprits.ranks) for one in found.findings} == {("slow rank", (0,)), ("late rank", (2,))}


def test_a_published_job_has_the_published_verdict() -> None:
    graph = read_traces(AR).graph
    found = attribute(graph)
    (finding,) = found.findings
    assert (finding.kind, graph.named(finding.culprits.ranks)) == ("slow rank", "rank dp 0 pp 0")
    assert found.error == pytest.approx(0, abs=0.01)
    jobs = slowdown_of(graph)
    published = 46.568 / 23.485, 1.0017, -0.0012  # S of the two steps alone; M_W and M_S of the job
    assert tuple(jobs[:3]) == pytest.approx(published, rel=0.03, abs=0.03)
    assert graph.named(jobs.slowest) == "rank dp 0 pp 0"


@pytest.mark.thorough
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_traces(Scenario("", 1, faults=FAULTS["late rank"]), tmp_path / "late", packed=True)
    write_traces(Scenario("", 1), tmp_path / "healthy")
    (tmp_path / "late" / "notes.txt").write_text("of Tuesday")
    assert main(["doctor", str(tmp_path / "late"), "--json", str(tmp_path / "verdict.json")]) == 1
    said = capsys.readouterr().out
    assert "1. LATE RANK: rank 1 comes late" in said
    assert "notes.txt" in said
    assert len(said.splitlines()) <= 25
    (found,) = json.loads((tmp_path / "verdict.json").read_text())
    assert (found["findings"][0]["kind"], found["findings"][0]["ranks"]) == ("late rank", [1])
    assert main(["doctor", str(tmp_path / "healthy")]) == 0
    assert "HEALTHY" in capsys.readouterr().out
    assert main(["doctor", str(tmp_path / "nothing")]) == 2
