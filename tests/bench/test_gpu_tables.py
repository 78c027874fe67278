"""The tables of a day with a GPU, from lines as bench.gpu writes them."""

import pytest

from bench.readme import gpu_tables
from tritonmoe.tools.benchmarks.kept_results import open_results

LAYER = {"shape": "Mixtral", "num_tokens": 32768, "routing": "uniform", "backward": False, "others": True}
TIMES = {
    "tritonmoe": {"us": 200.0, "tflops": 400.4, "fraction_of_dense": 0.601, "timed_by": "graph"},
    "grouped_mm": {"us": 300.0, "tflops": 266.0, "timed_by": "graph"},
    "eager": {"us": 250.0, "tflops": 320.0, "timed_by": "events"},
    "torch backend": {"us": 10.0, "tflops": 1.0, "timed_by": "events"},
    "dense products": {"us": 120.0, "tflops": 700.0, "timed_by": "graph"},
}


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_tables, "RESULTS", tmp_path)
    return tmp_path / "gpu.jsonl"


def cells_of(shape):
    (row,) = (row for row in gpu_tables.gpu_table("gpu").splitlines() if row.startswith(f"| {shape} |"))
    return [cell.strip() for cell in row.split("|")[2:-1]]


def test_nothing_is_measured_yet(results):
    assert "on a GPU: not measured yet" in gpu_tables.gpu_table("gpu")
    assert set(cells_of("Mixtral")) == {"not measured yet"}


def test_the_last_runs_layers_beside_their_peers(results):
    with open_results(results, {"device": "an older card"}) as lines:
        lines.add("D 1", {"arguments": LAYER, "times": {"tritonmoe": {"us": 1.0, "tflops": 9999.0}}})
    with open_results(results, {"device": "H100"}) as lines:
        lines.add("B 1", {"arguments": {**LAYER, "others": False}, "times": {"tritonmoe": {"tflops": 8888.0}}})
        left_out = {"liger": "the package liger-kernel is not installed", "eager": "too many experts"}
        lines.add("D 1", {"arguments": LAYER, "times": TIMES, "left_out": left_out})
        ours = {**TIMES["tritonmoe"], "us": 150.0, "tflops": 533.3, "fraction_of_dense": 0.8}
        tuned = {**TIMES, "tritonmoe, tuned": ours}
        lines.add("D 2", {"arguments": {**LAYER, "backward": True}, "times": tuned})
        lines.add("D 3", {"arguments": {**LAYER, "num_tokens": 4096, "backward": True}, "failed": "x"})
        lines.add("D 4", {"arguments": {**LAYER, "num_tokens": 8}, "out_of_memory": "x"})
    text = gpu_tables.gpu_table("gpu").splitlines()[0]
    assert text.startswith("`python -m bench.gpu` on H100.")
    assert text.endswith(" Peers: eager, grouped_mm. Left out: liger, since the package liger-kernel is not installed.")
    by_name = ["400, 0.60, 1.50x grouped_mm", "533, 0.80, 2.00x grouped_mm"]
    assert cells_of("Mixtral") == [*by_name, "failed", "out of memory"]


def test_peers_that_compile_stand_beside_the_others(results):
    """They were timed in other rounds: what counts is their time over ours there."""
    arguments = {name: LAYER[name] for name in ("shape", "num_tokens", "routing", "backward")}
    with open_results(results, {"device": "H100"}) as lines:
        lines.add("D 1", {"arguments": LAYER, "times": TIMES})
        ours = {"us": 100.0, "timed_by": "graph"}
        quick = {"tritonmoe": ours, "moe-ops": {"us": 110.0, "timed_by": "graph"}}
        lines.add("D peers that compile 1", {"arguments": arguments, "times": quick, "left_out": {"sonic-moe": "why"}})
        lines.add("D peers that compile 2", {"arguments": {**arguments, "backward": True}, "left_out": {}})
        lines.add("D memory", {"arguments": arguments, "memory": {"tritonmoe": {"kept_mb": 1.0, "peak_mb": 2.0}}})
        memory = {"tritonmoe": {"kept_mb": 9.0, "peak_mb": 9.0}, "moe-ops": {"kept_mb": 3.0, "peak_mb": 4.0}}
        lines.add("D peers that compile 3", {"arguments": arguments, "times": quick, "memory": memory})
    assert cells_of("Mixtral")[0] == "400, 0.60, 1.10x moe-ops"
    text = gpu_tables.gpu_table("gpu").splitlines()[0]
    assert text.endswith(" Peers: eager, grouped_mm, moe-ops. Left out: sonic-moe, since why.")
    rows = gpu_tables.gpu_memory_table("gpu").splitlines()[2:]
    assert rows[2:] == ["| tritonmoe | 1 | 2 |", "| moe-ops | 3 | 4 |"]


def test_training_and_memory_of_the_last_run(results):
    """The peak of a step stands beside what is held the whole time; one table each, and only text before a day."""
    for table in (gpu_tables.gpu_training_table, gpu_tables.gpu_memory_table):
        assert table("gpu").startswith("`python -m bench.gpu` on a GPU: not measured yet. ")
        assert "\n" not in table("gpu")
    with open_results(results, {"device": "H100"}) as lines:
        times = {"tritonmoe": {"median_ms": 100.0}, "eager": {"median_ms": 250.0}}
        case = {"T": 500, "times": times, "peak_mb": {"tritonmoe": 730.2, "eager": 750.0}}
        lines.add("D training", {"failed": "it took longer than 240 s"})
        assert "not measured yet" in gpu_tables.gpu_training_table("gpu")
        lines.add("D training", {"results": [case]})
        assert "not measured yet" in gpu_tables.gpu_memory_table("gpu")
        memory = {"tritonmoe": {"kept_mb": 10.0, "peak_mb": 30.0}, "eager": {"kept_mb": 20.4, "peak_mb": 50.0}}
        lines.add("D memory", {"arguments": LAYER, "memory": memory})
    _, _, *rows = gpu_tables.gpu_training_table("gpu").splitlines()
    assert rows[2:] == ["| tritonmoe | 5000 | 1.00 | 730 |", "| eager | 2000 | 0.40 | 750 |"]
    text, _, *rows = gpu_tables.gpu_memory_table("gpu").splitlines()
    assert text.startswith("`python -m bench.gpu` on H100.")
    assert text.endswith("in bf16, Mixtral, T = 32768, uniform routing.")
    assert rows[2:] == ["| tritonmoe | 10 | 30 |", "| eager | 20 | 50 |"]
