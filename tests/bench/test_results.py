"""The committed results: every ratio of times is that of the medians beside it."""

import pytest

from bench.readme.results import RESULTS, load
from tritonmoe.tools.benchmarks.auto import summarize_cases
from tritonmoe.tools.benchmarks.overlap_report import metrics
from tritonmoe.tools.benchmarks.timing import ratio, summarize


def names(prefix: str) -> list[str]:
    return [file.stem for file in sorted(RESULTS.glob(f"{prefix}_*.json"))]


@pytest.mark.parametrize("name", names("overlap"))
def test_overlap(name: str) -> None:
    results = load(name)["results"]
    summary = results["summary"]
    assert "T_pass_bound" not in summary, "measured anew: what is said below of pass_bound_ratio and verdict is over"
    assert "verdict" not in results, "without T_pass_bound its bound is looser than that of pass_bound_ratio"
    assert "bound_ratio_of_medians" not in summary
    for kind in ("overlapped", "auto"):
        figures = summary[kind]
        expected = metrics(figures, {**summary, "T_pass_bound": summarize([1e-3])})
        for merit in ("hidden_share", "exposed_ms", "bound_ratio", "speed_up"):
            assert figures[merit] == expected[merit]
    assert summary["auto"].get("over_best") in (None, ratio(summary["auto"], summary["overlapped"]))
    if "two_levels_speed_up" in summary:
        assert summary["two_levels_speed_up"] == ratio(summary["T_overlapped"], summary["T_two levels"])


def test_auto() -> None:
    results = load("auto_netns")["results"]
    for case in results["cases"]:
        again = case["again_ms"]
        assert case["auto_over_winner"] == ratio(again["auto"], again[case["winner"]])
        assert case["auto_over_serial"] == ratio(again["auto"], again[case["serial"]])
    assert summarize_cases(results["cases"]).items() <= results.items()


@pytest.mark.parametrize("name", ["transformers_cpu", "moe_mlp_cpu"])
def test_implementations(name: str) -> None:
    for case in load(name)["results"]:
        assert case["ratio"] == ratio(case["times"][case["best_other"]], case["times"]["tritonmoe"], 3)


@pytest.mark.parametrize("name", names("expert_parallel"))
def test_expert_parallel(name: str) -> None:
    results = load(name)["results"]
    steps = {variant: case["step"] for variant, case in results["variants"].items()}
    assert results["ratio"] == ratio(steps[results["best_other"]], steps["tritonmoe, tritonmoe"], 3)


@pytest.mark.parametrize("name", names("two_batches"))
def test_two_batches(name: str) -> None:
    for case in load(name)["results"]["rates"]:
        step = case["step"]
        assert case["faster_than_one_batch"] == ratio(step["one batch"], step["two batches"], 3)
        assert case["auto_faster_than_one_batch"] == ratio(step["one batch"], step["auto"], 3)
        assert case["faster_than_serial"] == ratio(step["serial"], step["two batches"], 3)


def test_what_adapters_cost() -> None:
    frozen, *others = load("adapters_cpu")["results"]
    assert [one["of_frozen"] for one in others] == [ratio(one, frozen, 3) for one in others]
