"""The process that runs the cases of bench.gpu: what ends it, and that the next case has another."""

import os
import signal
import time

import pytest
import torch

from bench.gpu import worker
from bench.gpu.setting import REHEARSAL

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="forks")


def fake_measures():
    def sleep(bench):
        time.sleep(60)

    def crash(bench):
        signal.raise_signal(signal.SIGKILL)

    def fail(bench):
        raise ValueError("wrong numbers")

    def too_large(bench):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 22 GiB")

    def right(bench, key, entries):
        return {"key": key, "entries": entries}

    def process(bench, way, is_tile):
        times = {"ours": {"timed_by": "graph"}, "peer": {"timed_by": way}}
        return {"process": os.getpid(), **({"timed_by": {"table": way}} if is_tile else {"times": times})}

    def profile_step(bench):
        return {"process": os.getpid()}

    functions = (sleep, crash, fail, too_large, right, process, profile_step)
    return {function.__name__: function for function in functions}


@pytest.fixture
def runner(monkeypatch):
    """A Worker of the cases above."""
    context = worker.multiprocessing.get_context("fork")  # so that the process has these cases
    monkeypatch.setattr(worker, "_measures", fake_measures)
    monkeypatch.setattr(worker.multiprocessing, "get_context", lambda method: context)
    runner = worker.Worker(REHEARSAL)
    yield runner
    runner.stop()


@pytest.mark.parametrize("is_tile", [False, True])
def test_the_process_of_a_failed_capture_ends(is_tile, runner):
    def process(way):
        return runner.run("process", {"way": way, "is_tile": is_tile}, 30.0)["process"]

    first = process("graph")
    assert process("events") == first
    assert process("events: operation not permitted when stream is capturing") == first
    assert process("graph") != first


def test_the_process_of_a_profiler_ends(runner):
    first = runner.run("profile_step", {}, 30.0)["process"]
    assert runner.run("process", {"way": "graph", "is_tile": False}, 30.0)["process"] != first


def test_a_case_that_crashes_hangs_or_fails_takes_only_itself(runner):
    tile = {"key": "sm_90 bfloat16 up 1x1", "entries": {"sm_90 bfloat16 down 1x1": {"block_n": 16}}}
    right = {"key": "interpreter float32 up 1x1", "entries": {"interpreter float32 down 1x1": {"block_n": 16}}}
    assert runner.run("right", tile, 30.0) == right
    assert runner.run("crash", {}, 30.0) == {"failed": "its process ended with status -9"}
    assert runner.run("too_large", {}, 30.0)["out_of_memory"].startswith("CUDA out of memory")
    assert runner.run("sleep", {}, 0.5) == {"failed": "it took longer than 0 s"}
    assert runner.run("fail", {}, 30.0) == {"failed": "ValueError: wrong numbers"}
    assert runner.run("right", tile, 30.0) == right
