"""`tritonmoe bench expert_parallel`: a run on two namespaces, what it says of its times, what it refuses."""

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tritonmoe.tools.benchmarks.expert_parallel import MIXED, OURS, PEERS, RankSteps, main, make_parser, summarize_steps
from tritonmoe.tools.benchmarks.namespaces import unusable_reason

ROOT = Path(__file__).parents[3]
BENCH = [sys.executable, "-m", "tritonmoe", "bench", "expert_parallel"]
VERSION = tuple(int(number) for number in importlib.metadata.version("transformers").split(".")[:2])
NAMES = [str(variant) for variant in (OURS, *PEERS, MIXED)]


@pytest.mark.slow
@pytest.mark.skipif(unusable_reason() is not None, reason=str(unusable_reason()))
@pytest.mark.skipif(VERSION < (5, 23), reason="EPImplementationInterface came in 5.23")
def test_two_namespaces(tmp_path: Path) -> None:
    sizes = ["--layers", "2", "--hidden-size", "64", "--intermediate-size", "32", "--experts", "8", "--top-k", "4"]
    arguments = ["--netns", "2", "--rate", "200mbit", "--tokens", "256", "--rounds", "2", "--chunks", "2", *sizes]
    run = subprocess.run(
        [*BENCH, *arguments, "--json", str(tmp_path / "times.json")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    assert "in sight" in run.stdout
    results = json.loads((tmp_path / "times.json").read_text())["results"]
    assert list(results["variants"]) == NAMES
    assert results["link"] == "2 network namespaces, gloo, 200mbit a link"
    assert 0 < results["gradient_difference"] < 1e-4
    assert results["loss_difference"] < 1e-5
    # A token travels once to the other rank, which needs 15 of 16, and not once for each of K / 2 = 2 experts there:
    # in 4 exchanges of 2 layers, rows of 64 * 4 bytes.
    sent = {name: case["sent_mb"] for name, case in results["variants"].items()}
    saved = 8 * 256 * 256 * (2 - 15 / 16) / 1e6
    assert abs(sent[NAMES[1]] - sent[NAMES[0]] - saved) < 0.3 * saved
    assert abs(sent[NAMES[1]] - sent[NAMES[3]]) < 0.1 * sent[NAMES[1]]


def test_the_ratio_is_of_the_medians() -> None:
    seconds = {
        NAMES[0]: [1.0, 2.0, 4.0],
        NAMES[1]: [3.0, 4.0, 2.0],
        NAMES[2]: [2.0, 5.0, 8.0],
        NAMES[3]: [1.0, 1.0, 1.0],
    }
    fast = {name: [1.0, 1.0, 1.0] for name in NAMES}
    arguments = make_parser().parse_args(["--netns", "2"])
    results = summarize_steps(arguments, RankSteps(seconds, fast, dict.fromkeys(NAMES, 1.0), 0.0, 0.0), num_ranks=2)
    assert results["best_other"] == NAMES[1]
    assert results["ratio"] == 1.5  # of the medians 3 and 2; that of the rounds' own 3, 2 and 0.5 is 2
    assert results["variants"][NAMES[1]]["exposed_ms"] == 2000.0
    assert results["compute_over_communication"] == 0.5
    without_link = summarize_steps(arguments, RankSteps(seconds, {}, {}, 0.0, 0.0), num_ranks=2)
    assert "compute_over_communication" not in without_link


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "start it with --netns N, or under torchrun"),
        (["--netns", "3"], "divide the 64 experts, got 3"),
        (["--netns", "2", "--rate", "fast"], "a rate is a positive number"),
        (["--netns", "2", "--rounds", "0"], "argument --rounds: must be a whole number of at least 1, got '0'"),
        (["--netns", "2", "--top-k", "65"], "--top-k 65 must not exceed --experts 64"),
    ],
)
def test_bad_arguments(arguments: list[str], words: str, complaint_of) -> None:
    assert words in complaint_of(main, arguments)
