"""python -m bench.doctor: what is judged of a kept run is what was measured and recorded."""

import json
import shutil
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


def test_a_healthy_scenario_has_nothing_to_leave_out() -> None:
    scenarios = [doctor.draw_scenario(number) for number in range(40)]
    assert {len(doctor.variants_of(of)) for of in scenarios} == {1, 2, 4}
    assert all((len(doctor.variants_of(of)) == 1) == (not of.causes) for of in scenarios)
