"""How calls are timed: by the clock on a CPU, and on a stand-in of a GPU by graphs, or by events."""

import contextlib

import pytest
import torch

from tritonmoe.benchmarks.device_time import TimedCalls, graph_pool, interleaved

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_a_cpu_is_timed_by_the_clock():
    calls = []
    timed = TimedCalls(lambda: calls.append(1), CPU, batch_s=0.0)
    assert (timed.way, timed.count) == ("clock", 1)
    before = len(calls)
    assert 0 < timed.seconds() < 1
    assert len(calls) == before + 1
    assert graph_pool(CPU) is None


def test_every_variant_is_timed_once_a_round_behind_one_that_is_dropped():
    counts = {"a": 0, "b": 0}

    def run(name):
        def count():
            counts[name] += 1

        return count

    timed = {name: TimedCalls(run(name), CPU, batch_s=0.0) for name in counts}
    counts.update(a=0, b=0)
    samples = interleaved(timed, rounds=4)
    assert {name: len(times) for name, times in samples.items()} == {"a": 4, "b": 4}
    assert counts == {"a": 5, "b": 5}


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of which each call takes two milliseconds, and raises state["refuses"] where it is captured."""
    state = {"ms": 0.0, "capturing": None, "replays": 0, "pools": [], "refuses": None}

    class Graph:
        def __init__(self):
            self.ms = 0.0

        def replay(self):
            state["replays"] += 1
            state["ms"] += self.ms

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = state["ms"]

        def synchronize(self):
            pass

        def elapsed_time(self, other):
            return other.at - self.at

    @contextlib.contextmanager
    def capture(graph, pool):
        state["pools"].append(pool)
        state["capturing"] = graph
        try:
            yield
        except RuntimeError:
            raise RuntimeError("operation failed due to a previous error during capture")  # noqa: B904
        finally:
            state["capturing"] = None

    def run():
        if state["capturing"] is None:
            state["ms"] += 2.0
            return
        if state["refuses"] is not None:
            raise state["refuses"]
        state["capturing"].ms += 2.0

    for name, value in {"CUDAGraph": Graph, "Event": Event, "graph": capture}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    return state, run


def test_a_gpu_is_timed_by_graphs(gpu):
    state, run = gpu
    timed = TimedCalls(run, GPU, batch_s=0.02, pool=(0, 7))
    assert (timed.way, timed.count, state["pools"]) == ("graph", 10, [(0, 7)])
    before = state["replays"]
    assert timed.seconds() == pytest.approx(0.002)
    assert state["replays"] == before + 1


def test_what_can_not_be_captured_is_timed_by_events_and_says_why(gpu):
    state, run = gpu
    state["refuses"] = RuntimeError("operation not permitted when stream is capturing\nmore")
    timed = TimedCalls(run, GPU, batch_s=0.02)
    assert timed.way == "events: operation not permitted when stream is capturing"
    assert timed.seconds() == pytest.approx(0.002)
    assert state["replays"] == 0


def test_a_graph_without_memory_is_no_reason_to_time_otherwise(gpu):
    state, run = gpu
    state["refuses"] = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 22 GiB")
    with pytest.raises(torch.OutOfMemoryError, match="22 GiB"):
        TimedCalls(run, GPU, batch_s=0.02)


def test_a_variant_that_fails_later_is_left_out_where_the_caller_says_so():
    def run_four_times():
        calls.append(1)
        if len(calls) > 4:
            raise torch.OutOfMemoryError("no memory")

    for rounds, kept in ((3, {"right"}), (1, {"right", "fails"})):
        calls, left_out = [], {}
        timed = {name: TimedCalls(run, CPU, 0.0) for name, run in (("fails", run_four_times), ("right", list))}
        samples = interleaved(timed, rounds, left_out.__setitem__)
        assert set(samples) == kept
        assert {len(seconds) for seconds in samples.values()} == {rounds}
        assert set(left_out) == {"right", "fails"} - kept
    calls = [1, 1]
    with pytest.raises(torch.OutOfMemoryError):
        interleaved({"fails": TimedCalls(run_four_times, CPU, 0.0)}, 1)
