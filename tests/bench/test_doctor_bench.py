"""python -m bench.doctor: jobs are what their kinds say, and a verdict is compared with what was measured."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from bench import doctor
from bench.doctor_faults import MEASURED, Job, JobFault, Layer, read_job, without
from bench.doctor_job import run_emulated
from bench.doctor_judge import Said, judge, summarize
from bench.doctor_kinds import KINDS, draw_job, is_held_out, kinds_of

LAYERS = tuple(Layer(64, 2, 2, pair_s, 0.004) for pair_s in (5e-5, 1e-4))
HEALTHY = Job("healthy", 0, 3, LAYERS, 6, rate=0.01, latency_s=1e-4, hidden_size=16, fixed_s=1e-4)
EVERY_THIRD = JobFault("late rank", (1,), 0.09, "periodic", 3, phase="forward", layer=1)
LATE = replace(HEALTHY, kind="late every n-th", faults=(EVERY_THIRD,))


def test_a_third_of_the_kinds_is_held_out() -> None:
    held_out, opened = kinds_of("held_out", is_real=False), kinds_of("open", is_real=False)
    assert sorted([*held_out, *opened]) == sorted(KINDS) == sorted(kinds_of("all", is_real=False))
    assert 3 * len(held_out) >= len(KINDS)
    assert all(map(is_held_out, held_out))


@pytest.mark.parametrize("is_real", [False, True])
def test_every_kind_can_be_drawn(is_real: bool) -> None:
    for kind in kinds_of("all", is_real):
        for number in range(4):
            job = draw_job(kind, number, is_real)
            assert job == draw_job(kind, number, is_real) == read_job(json.loads(json.dumps(asdict(job))))
            assert bool(job.faults) == (not kind.startswith("healthy"))
            assert not without(job, [fault.kind for fault in job.faults if fault.kind != "chunk overhead"]).faults or (
                kind == "chunk overhead"
            )
            for fault in job.faults:
                assert any(fault.level(step, job) for step in range(job.num_steps))
                assert all(0 <= rank < job.size for rank in fault.ranks)
                assert fault.when != "periodic" or sum(fault.level(s, job) for s in range(job.num_steps)) >= 3


def test_ranks_get_as_much_unless_an_expert_is_hot() -> None:
    for top_k in (1, 2):
        job = replace(HEALTHY, size=4, layers=(Layer(256, top_k, 2, 1e-4, 0.0),))
        hot = replace(job, faults=(JobFault("imbalance", (2,), 0.8),))
        even, uneven = (torch.cat([of.ids(0, rank, 0) for rank in range(4)]) // 2 for of in (job, hot))
        assert int(even.flatten().bincount().max()) <= 1.1 * 256 * top_k
        assert int((uneven == 2).sum()) >= 1.8 * 256 * top_k
        ids = hot.ids(0, 0, 0)
        assert all(len(set(row)) == top_k for row in ids.tolist())


def test_a_fault_costs_what_it_takes_and_time_is_virtual() -> None:
    """A rank that is 90 ms late in every third step makes these 90 ms longer, in every run."""
    seconds, again, healthy = run_emulated(LATE, None), run_emulated(LATE, None), run_emulated(HEALTHY, None)
    assert seconds == again
    costs = [ill - well for ill, well in zip(seconds, healthy, strict=True)]
    assert costs == pytest.approx([0, 0, 0.09, 0, 0, 0.09], abs=0.008)


@pytest.mark.thorough
def test_what_was_run_is_judged_and_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(doctor, "jobs_of", lambda _: [replace(LATE, num_steps=9)])
    left = doctor.folder_of(str(tmp_path / "runs"), LATE)
    left.mkdir(parents=True)
    (left / "rank-0000.jsonl").write_text("of a run that was ended")
    run = ["run", str(tmp_path / "runs"), "--emulated"]
    assert doctor.main(run) == 0
    before = (left / MEASURED).stat().st_mtime_ns
    assert doctor.main(run) == 0
    assert (left / MEASURED).stat().st_mtime_ns == before
    for kinds, number in (("all", 1), ("held_out" if not is_held_out(LATE.kind) else "open", 0)):
        into = tmp_path / f"{kinds}.json"
        assert doctor.main(["judge", str(tmp_path / "runs"), "--kinds", kinds, "--json", str(into)]) == 0
        assert len(json.loads(into.read_text())["results"]["scenarios"]) == number
    assert "late every n-th (3 ranks, 2 layers" in capsys.readouterr().out


def test_a_verdict_is_right_where_everything_is() -> None:
    seconds = {"with": [0.1, 0.1, 0.19] * 2, "without": [0.1] * 6}
    right = Said("late rank", (1,), False, "periodic", 3, 0.029)
    judged = judge(LATE, seconds, [right], 0.01)
    assert (judged["cause_right"], judged["culprits_right"], judged["when_right"]) == (True, True, True)
    assert judged["gains_right"] == {"late rank": True}
    wrong = {
        "cause_right": replace(right, kind="slow rank"),
        "culprits_right": replace(right, ranks=(0, 1)),
        "when_right": replace(right, period=4),
    }
    for name, said in wrong.items():
        assert judge(LATE, seconds, [said], 0.01)[name] is False
    assert judge(LATE, seconds, [replace(right, cost_s=0.02)], 0.01)["gains_right"] == {"late rank": False}
    assert judge(LATE, seconds, [], 0.01)["is_silent"]
    small = judge(LATE, {"with": [0.11] * 6, "without": [0.1] * 6}, [], 0.0)
    assert (small["cause_right"], small["culprits_right"], small["when_right"]) == (None, None, None)
    healthy = judge(HEALTHY, {"with": [0.1] * 6}, [right], 0.0)
    figures = summarize([judged, healthy])
    assert figures["healthy ones silent"] == {"right": 0, "of": 1}
    assert figures["first cause right"] == {"right": 1, "of": 1}


def test_of_several_faults_all_are_asked_for() -> None:
    slow = JobFault("slow rank", (0, 2), 2.0)
    job = replace(LATE, faults=(EVERY_THIRD, slow))
    seconds = {name: [0.1] * 6 for name in ("without", "with")}
    seconds |= {"with": [0.2] * 6, "without late rank": [0.17] * 6, "without slow rank": [0.13] * 6}
    of_late = Said("late rank", (1,), False, "periodic", 3, 0.03)
    of_slow = Said("slow rank", (0, 2), False, "always", None, 0.07)
    assert judge(job, seconds, [of_slow, of_late], 0.0)["culprits_right"] is True
    assert judge(job, seconds, [of_slow], 0.0)["culprits_right"] is False
    assert judge(job, seconds, [of_late, of_slow], 0.0)["cause_right"] is False, "the other costs more than twice that"
