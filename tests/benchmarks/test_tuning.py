"""The search of `tritonmoe tune`, on a time that is a formula."""

import torch

from tritonmoe import aot
from tritonmoe.backends import triton as kernels
from tritonmoe.benchmarks import tuning
from tritonmoe.benchmarks.tuning import CHOICES, descend
from tritonmoe.config.layer import ExpertLayout, Projection
from tritonmoe.kernels import launch

START = {
    "block_m": 128,
    "block_n": 64,
    "block_k": 64,
    "num_warps": 8,
    "num_stages": 3,
    "group_m": 8,
    "subtiles": 1,
    "tma": True,
}


def search(seconds, **keywords):
    tries = list(descend(START, seconds, **keywords))
    return tries, tries[-1][2]


def test_finds_the_fastest_of_independent_fields():
    best = {"block_m": 64, "block_n": 256, "block_k": 32, "num_warps": 4, "num_stages": 5, "group_m": 1, "subtiles": 4}
    best["tma"] = False
    tries, found = search(lambda candidate: 1.0 + sum(candidate[name] != best[name] for name in best))
    assert found == best
    assert tries[0][0] == START
    tried = [tuple(candidate.items()) for candidate, _, _ in tries]
    assert len(set(tried)) == len(tried) <= 2 * sum(map(len, CHOICES.values()))


def test_keeps_the_start_when_nothing_is_faster():
    assert search(lambda candidate: 1.0)[1] == START


def test_what_cannot_run_is_never_chosen():
    def seconds(candidate):
        return None if candidate["block_n"] > 64 else 1.0 / candidate["block_n"]

    assert search(seconds)[1] == START


def test_a_start_that_cannot_run_is_left():
    _, found = search(lambda candidate: None if candidate == START else 1.0)
    assert found != START


def test_stages_that_are_not_used_are_not_measured(monkeypatch):
    """Before Triton 3.7.1 loads through pointers have one stage on Blackwell, whatever is asked for."""
    ids = torch.empty(4096, 8, dtype=torch.int64, device="meta")
    x, w1 = (torch.empty(*shape, dtype=torch.bfloat16, device="meta") for shape in ((4096, 2048), (64, 1536, 2048)))

    def up():
        grouping = kernels.group(ids, 64)
        kernels.up(x, Projection(w1, None, ExpertLayout()), grouping, "silu")

    monkeypatch.setattr(launch, "TRITON_VERSION", (3, 7, 0))
    monkeypatch.setattr(tuning, "draw_inputs", lambda *arguments: None)
    monkeypatch.setattr(tuning, "operation_calls", lambda inputs, backend: {"up": up})
    monkeypatch.setattr(tuning, "_seconds", lambda call: call() or 1.0)
    lines: list[str] = []
    with launch.recording(aot.TARGETS["sm_100"]):
        assert tuning.tune(None, 4096, torch.bfloat16, torch.device("meta"), lines.append) == {}
    lines = [line for line in lines if line.startswith("  ")]
    stages = [line for line in lines if "num_stages" in line]
    assert len(stages) == len(CHOICES["num_stages"])
    assert all(line.endswith("can't run") for line in stages)
    assert any(line.endswith("us") for line in lines if "group_m" in line)
