"""What bench.gpu compiles before it measures: the headline first, each once, and again where Triton's cache is new."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from bench.gpu import compilation
from bench.gpu.compilation import Kernel, compile_missing
from bench.gpu.setting import HEADLINE, REHEARSAL
from tritonmoe.aot import Variant
from tritonmoe.benchmarks.kept_results import open_results, read_results

KERNELS = [Kernel(f"A compile {name}", Variant(), name) for name in ("one", "two", "three")]


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """Compile nothing, in threads; give the names of what would have been."""
    compiled = []

    def compile_one(job):
        kernel, target = job
        assert target == "sm_90"
        compiled.append(kernel.kernel)
        if kernel.kernel == "raises":
            raise KeyError("no such launch")
        return kernel.name, {"problem": "", "compile_s": 1.5}

    monkeypatch.setattr(compilation, "_compile", compile_one)
    monkeypatch.setattr(
        compilation.concurrent.futures, "ProcessPoolExecutor", lambda workers, **options: ThreadPoolExecutor(1)
    )
    monkeypatch.setattr(compilation.triton.knobs.cache, "dir", str(tmp_path / "triton"))
    return compiled


def compile_all(path, kernels=KERNELS):
    said = []
    with open_results(path / "results.jsonl", {}) as results:
        compile_missing(kernels, "sm_90", results, said.append)
    return said[-1]


def test_each_is_compiled_once_and_the_total_is_said(compiled, tmp_path):
    assert compile_all(tmp_path).startswith("3 kernels and tiles are compiled for sm_90, 3 of them now, in ")
    assert compile_all(tmp_path).endswith("; all together took 4.5 s of processes")
    assert compiled == ["one", "two", "three"]


def test_what_was_compiled_before_a_stop_is_kept(compiled, tmp_path):
    with pytest.raises(KeyError):
        compile_all(tmp_path, [KERNELS[0], Kernel("A compile raises", Variant(), "raises")])
    compiled.clear()
    assert "3 of them now" not in compile_all(tmp_path)
    assert compiled == ["two", "three"]


def test_a_new_machine_compiles_anew(compiled, tmp_path, monkeypatch):
    compile_all(tmp_path)
    compiled.clear()
    monkeypatch.setattr(compilation.triton.knobs.cache, "dir", str(tmp_path / "of another machine"))
    compile_all(tmp_path)
    assert compiled == ["one", "two", "three"]
    lines = [line for line in read_results(tmp_path / "results.jsonl") if line["case"] == "A compile one"]
    assert len({line["cache"] for line in lines}) == 2


def test_the_headline_and_its_candidates_come_first(monkeypatch):
    monkeypatch.setattr(compilation, "source_of", lambda launch, target: launch)
    monkeypatch.setattr(compilation, "record_launches", lambda variant, target: {"up": FakeLaunch(variant)})
    names = [kernel.name for kernel in compilation.kernels_of(REHEARSAL, "sm_90")]
    assert len(set(names)) == len(names)
    is_headline = [f" {HEADLINE} T={REHEARSAL.headline_tokens} " in name for name in names]
    is_tile = [" tile " in name for name in names]
    assert is_headline == sorted(is_headline, reverse=True)
    assert is_tile[sum(is_headline) :] == sorted(is_tile[sum(is_headline) :], reverse=True)
    assert sum(is_headline) == len(compilation.CHECKED_TILES)


class FakeLaunch:
    """A launch that is no other variant's."""

    def __init__(self, variant):
        self.options = str(variant)

    def hash(self):
        return self.options
