"""The processes of bench.gpu: what ends them, and that others go on with the next case, or the next job."""

import os
import select
import signal
import subprocess
import sys
import time

import pytest
import torch

from bench.gpu import children, worker
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


@pytest.fixture(autouse=True)
def forked(monkeypatch):
    """Let processes have what this one has."""
    context = children.multiprocessing.get_context("fork")
    monkeypatch.setattr(children.multiprocessing, "get_context", lambda method: context)


@pytest.fixture
def runner(monkeypatch):
    """A Worker of the cases above."""
    monkeypatch.setattr(worker, "measures", fake_measures)
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


def work(pipe):
    while True:
        job = pipe.recv()
        if job == "crash":
            signal.raise_signal(signal.SIGKILL)
        if isinstance(job, int):  # hangs, and so does what it started, which has this file open
            subprocess.run([sys.executable, "-c", "import time; time.sleep(60)"], pass_fds=[job])
        pipe.send({"done": job})


def has_ended(read, write):
    """Say whether nobody has the writing end any more."""
    os.close(write)
    is_readable = bool(select.select([read], [], [], 10.0)[0])
    os.close(read)
    return is_readable


def test_a_job_that_crashes_or_hangs_takes_only_itself(monkeypatch):
    monkeypatch.setattr(children.os, "cpu_count", lambda: 2)
    read, write = os.pipe()
    jobs = ["a", "crash", "b", write, "c"]
    found = dict(children.answers(work, jobs, limit_s=2.0, deadline=time.monotonic() + 60.0))
    assert found.pop("crash") == {"failed": "its process ended with status -9"}
    assert found.pop(write) == {"failed": "it took longer than 2 s"}
    assert found == {job: {"done": job} for job in "abc"}
    assert has_ended(read, write), "what the job had started runs on"


def test_jobs_end_at_the_deadline(monkeypatch):
    monkeypatch.setattr(children.os, "cpu_count", lambda: 2)
    read, write = os.pipe()
    started = time.monotonic()
    found = dict(children.answers(work, [write, "a", "b"], limit_s=60.0, deadline=started + 2.0))
    assert found == {job: {"done": job} for job in "ab"}
    assert time.monotonic() - started < 30.0
    assert has_ended(read, write)
    assert list(children.answers(work, ["a"], 60.0, deadline=started)) == []
    assert list(children.answers(work, [], 60.0, deadline=time.monotonic() + 60.0)) == []
