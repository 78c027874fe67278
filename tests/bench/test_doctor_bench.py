"""python -m bench.doctor: what is judged of a kept run is what was measured and recorded."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from bench import doctor
from bench.readme.results import RESULTS

RECORDING = RESULTS / "recordings" / "slow_link"


def test_a_kept_run_is_judged(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    shutil.copytree(RECORDING, tmp_path / "kept" / "one")
    (tmp_path / "kept" / "interrupted").mkdir()
    assert doctor.main(["--judge", str(tmp_path / "kept"), "--json", str(tmp_path / "judged.json")]) == 0
    (judged,) = json.loads((tmp_path / "judged.json").read_text())["results"]["scenarios"]
    assert judged["causes"] == ["slow link"]
    assert judged["culprits_right"] == {"slow link": True}
    assert judged["predicted_share"]["slow link"] == pytest.approx(judged["true_share"]["slow link"], rel=0.1)
    assert "slow link" in capsys.readouterr().out


def test_what_is_kept_is_judged_as_it_was(tmp_path: Path) -> None:
    run = ["--json", str(tmp_path / "run.json"), "--seed", "3013", "--calls", "4"]
    assert doctor.main(["--synthetic", "1", "--keep", str(tmp_path / "kept"), *run]) == 0
    assert doctor.main(["--judge", str(tmp_path / "kept"), "--json", str(tmp_path / "again.json")]) == 0
    first, again = (json.loads((tmp_path / name).read_text())["results"] for name in ("run.json", "again.json"))
    assert first == again
    assert first["scenarios"][0]["is_first"]


def test_a_late_link_of_emulated_ranks_is_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The counts are late too: that is no fault of the host. A run that is gone on with measures nothing again."""
    plain = doctor.Scenario(0, 2, 256, 2, pair_s=4e-5, fixed_s=5e-4, rate=0.02, latency_s=2e-4)
    late = replace(plain, causes=("late link",), culprits={"late link": (1, 0)}, amounts={"late link": 0.03})
    (tmp_path / "0-2").mkdir()
    (tmp_path / "0-2" / "rank-0000.jsonl").write_text("of a run that was ended")
    folder = doctor.begin(str(tmp_path), late)
    judged = doctor.keep_and_judge(folder, "emulated", late, doctor.run_emulated(late, 3, folder))
    assert judged["said"][0][:2] == ("late link", [1, 0])
    assert not any(kind == "host overhead" for kind, *_ in judged["said"])
    assert (doctor.begin(str(tmp_path), late) / doctor.MEASURED).exists()


def test_a_healthy_scenario_has_nothing_to_leave_out() -> None:
    scenarios = [doctor.draw_scenario(number) for number in range(40)]
    assert {len(doctor.variants_of(of)) for of in scenarios} == {1, 2, 4}
    assert all((len(doctor.variants_of(of)) == 1) == (not of.causes) for of in scenarios)
