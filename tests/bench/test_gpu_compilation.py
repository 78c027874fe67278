"""What bench.gpu compiles before it measures: each once, again where Triton's cache is new, and on after a crash."""

import multiprocessing
import signal
import time

import pytest
import torch

from bench.gpu import children, compilation, plan
from bench.gpu.compilation import Kernel, compile_missing
from bench.gpu.setting import DAY, HEADLINE, REHEARSAL
from tritonmoe.ops.aot import Variant
from tritonmoe.tools.benchmarks.kept_results import open_results, read_results

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="forks")
KERNELS = [Kernel(f"A compile {name}", Variant(), name) for name in ("one", "two", "three")]


@pytest.fixture(autouse=True)
def compile_nothing(monkeypatch, tmp_path):
    """Let one process at a time say that it compiled a kernel."""

    def compile_one(kernel, target):
        assert target == "sm_90"
        if kernel.kernel == "crashes":
            signal.raise_signal(signal.SIGKILL)
        if kernel.kernel == "hangs":
            time.sleep(60)
        return {"problem": "", "compile_s": 1.5}

    context = multiprocessing.get_context("fork")  # so that the process has this function
    monkeypatch.setattr(children.multiprocessing, "get_context", lambda method: context)
    monkeypatch.setattr(children.os, "cpu_count", lambda: 1)
    monkeypatch.setattr(compilation, "_compile", compile_one)
    monkeypatch.setattr(compilation.triton.knobs.cache, "dir", str(tmp_path / "triton"))


def compile_all(path, kernels=KERNELS, budget_s=60.0):
    """Return whether all were tried, what was said in the end, and the new lines by kernel, in their order."""
    file, said = path / "results.jsonl", []
    before = len(read_results(file))
    with open_results(file, {}) as results:
        is_done = compile_missing(kernels, "sm_90", results, time.monotonic() + budget_s, said.append)
    lines = [line for line in read_results(file)[before:] if line["case"] != "identity"]
    return is_done, said[-1], {line["case"].split()[-1]: line for line in lines}


def test_each_is_compiled_once_and_the_total_is_said(tmp_path):
    is_done, said, lines = compile_all(tmp_path)
    assert is_done
    assert said.startswith("3 kernels and tiles are compiled for sm_90, 3 of them now, in ")
    assert said.endswith("; all together took 4.5 s of processes")
    assert list(lines) == ["one", "two", "three"]
    assert compile_all(tmp_path)[2] == {}


@pytest.mark.parametrize(
    ("name", "why"), [("crashes", "its process ended with status -9"), ("hangs", "it took longer than 2 s")]
)
def test_one_that_ends_its_compiler_is_a_problem_and_the_others_are_compiled(name, why, tmp_path, monkeypatch):
    monkeypatch.setattr(compilation, "COMPILE_LIMIT_S", 2.0)
    kernels = [KERNELS[0], Kernel(f"A compile {name}", Variant(), name), KERNELS[1]]
    is_done, _, lines = compile_all(tmp_path, kernels)
    assert is_done
    assert {kernel: line["problem"] for kernel, line in lines.items()} == {
        "one": "",
        name: f"compiling it: {why}",
        "two": "",
    }
    assert compile_all(tmp_path, kernels)[2] == {}, "another call would end there again"


def test_the_deadline_ends_it_and_the_next_call_goes_on(tmp_path):
    hanging = Kernel("A compile hangs", Variant(), "hangs")
    is_done, said, lines = compile_all(tmp_path, [KERNELS[0], hanging, *KERNELS[1:]], budget_s=2.0)
    assert not is_done
    assert said == "3 kernels and tiles are not compiled yet"
    assert list(lines) == ["one"]
    assert list(compile_all(tmp_path)[2]) == ["two", "three"]


def test_a_new_machine_compiles_anew(tmp_path, monkeypatch):
    (first,) = {line["cache"] for line in compile_all(tmp_path)[2].values()}
    monkeypatch.setattr(compilation.triton.knobs.cache, "dir", str(tmp_path / "of another machine"))
    lines = compile_all(tmp_path)[2]
    assert list(lines) == ["one", "two", "three"]
    assert first not in {line["cache"] for line in lines.values()}


def test_the_headline_and_its_candidates_are_compiled_before_what_only_the_last_stage_launches(monkeypatch):
    monkeypatch.setattr(compilation, "source_of", lambda launch, target: launch)
    monkeypatch.setattr(compilation, "record_launches", lambda variant, target: {"up": FakeLaunch(variant)})
    kernels = compilation.kernels_of(REHEARSAL, "sm_90")
    names = [kernel.name for kernel in kernels]
    assert len(set(names)) == len(names)
    stages = [name[0] for name in names]
    assert stages == sorted(stages)
    assert set(stages) == set("AF")
    headline = [name for name in names if name.startswith(f"A compile {HEADLINE} T={REHEARSAL.headline_tokens} ")]
    assert len(headline) == len(compilation.CHECKED_TILES)
    tokens = {tokens for tokens in REHEARSAL.peer_tokens if any(f"{HEADLINE} T={tokens}" in name for name in names)}
    assert tokens == set(REHEARSAL.peer_tokens)
    assert all(plan.FEW_TOKENS in setting.peer_tokens for setting in (DAY, REHEARSAL)), "B measures the host with them"
    assert all(kernel.name.startswith("A ") for kernel in kernels if kernel.candidate is not None)
    of_f = {tuple(name.removeprefix("F compile ").split(": ")[0].rsplit(" T=", 1)) for name in names if name[0] == "F"}
    assert of_f == {(HEADLINE, "1"), ("gpt-oss", "12")}


class FakeLaunch:
    """A launch that is no other variant's."""

    def __init__(self, variant):
        self.options = str(variant)

    def hash(self):
        return self.options
