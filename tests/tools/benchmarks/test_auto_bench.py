"""`tritonmoe bench auto`: what it measures, what it makes of it, and a small run on a real link."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import tritonmoe as tm
from tritonmoe.tools.benchmarks.auto import main, summarize_cases, sweep_variants
from tritonmoe.tools.benchmarks.namespaces import unusable_reason

ROOT = Path(tm.__file__).parents[1]
REASON = unusable_reason()


def test_the_sweep_has_every_shape_of_its_chunk_counts() -> None:
    names = [str(variant) for variant in sweep_variants([1, 2, 4], num_local_experts=2)]
    assert len(set(names)) == len(names)
    overlapped = {name for name in names if name.startswith("overlapped")}
    assert overlapped == {f"overlapped C={n}" for n in ("1", "2", "4", "4 ramp x2", "4 ramp x4", "2 of experts")}
    assert {"compute", "serial C=1", "free transport C=4", "free transport C=2 of experts"} <= set(names)


def test_summary() -> None:
    def case(over_winner: float, over_serial: float, errors: list[float]) -> dict:
        return {
            "auto_over_winner": over_winner,
            "auto_over_serial": over_serial,
            "errors": {str(n): error for n, error in enumerate(errors)},
        }

    assert summarize_cases([case(1.02, 0.7, [0.1, -0.2]), case(0.99, 0.9, [0.0]), case(1.04, 0.8, [-0.3])]) == {
        "auto_excess_median": 0.02,
        "auto_excess_largest": 0.04,
        "auto_over_serial_largest": 0.9,
        "simulator_error_median": 0.15,
        "simulator_error_largest": 0.3,
    }


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "start it with --netns N, or under torchrun"),
        (["--netns", "3"], "divide the 8 experts of coarse"),
        (["--netns", "2", "--rates", "fast"], "a rate is a positive number"),
        (["--netns", "2", "--chunks", "1", "2", "1"], "--chunks must differ from each other, got 1 2 1"),
        (["--netns", "2", "--chunks", "33"], "must be a whole number from 1 to 32, got '33'"),
        (["--netns", "2", "--rounds", "0"], "argument --rounds: must be a whole number of at least 1, got '0'"),
    ],
)
def test_bad_arguments(arguments: list[str], words: str, complaint_of) -> None:
    assert words in complaint_of(main, arguments)


@pytest.mark.slow
@pytest.mark.skipif(REASON is not None, reason=str(REASON))
def test_two_namespaces(tmp_path: Path) -> None:
    arguments = ["--rates", "500mbit", "--models", "tiny", "--tokens", "256", "--chunks", "1", "2"]
    rounds = ["--sweep-rounds", "2", "--rounds", "3", "--json", str(tmp_path / "auto.json")]
    ended = subprocess.run(
        [sys.executable, "-m", "tritonmoe", "bench", "auto", "--netns", "2", *arguments, *rounds],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr
    results = json.loads((tmp_path / "auto.json").read_text())["results"]
    assert "2 cases: auto against the sweep's winner" in ended.stdout
    assert [case["routing"] for case in results["cases"]] == ["uniform", "zipf:1.2"]
    for case in results["cases"]:
        fastest = {
            kind: min((t["median_ms"], n) for n, t in case["sweep_ms"].items() if n.startswith(kind))
            for kind in ("overlapped", "serial")
        }
        assert (case["winner"], case["serial"]) == (fastest["overlapped"][1], fastest["serial"][1])
        assert set(case["again_ms"]) == {case["winner"], case["serial"], "auto"}
        assert all(times["samples"] == 3 for times in case["again_ms"].values())
        assert set(case["errors"]) == {name for name in case["sweep_ms"] if name.startswith("overlapped")}
        assert "measuring" not in case["auto"]
