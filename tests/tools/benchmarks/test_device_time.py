"""How calls are timed: by the clock on a CPU, and on a stand-in of a GPU by graphs, or by events."""

import contextlib

import pytest
import torch

from tritonmoe.tools.benchmarks.device_time import CAPTURE_FAILED, TimedCalls, graph_pool, interleaved

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
    """A GPU of which each call takes two milliseconds, and raises state["refuses"] where it is captured.

    Such a capture leaves behind what it does in PyTorch 2.11, or, where it "ends itself", in newer ones.
    """
    state = {"ms": 0.0, "capturing": None, "replays": 0, "pools": [], "refuses": None, "ends itself": False}
    state |= {"stream": "default", "underway": [], "shares": []}

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
        if pool in state["underway"]:
            raise RuntimeError("beginAllocateToPool: already recording to mempool_id")
        state["pools"].append(pool)
        state.update(capturing=graph, stream="capture", underway=[pool], shares=[*state["shares"], pool])
        try:
            yield
        except RuntimeError:
            state["underway"] = [] if state["ends itself"] else [pool]
            raise RuntimeError("operation failed due to a previous error during capture")  # noqa: B904  # as torch does, which hides why
        else:
            state.update(stream="default", underway=[])
        finally:
            state["capturing"] = None

    def end(index, pool):
        if pool not in state["underway"]:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        state["underway"].remove(pool)

    def run():
        if state["capturing"] is None:
            state["ms"] += 2.0
            return
        if state["refuses"] is not None:
            raise state["refuses"]
        state["capturing"].ms += 2.0

    functions = {
        "synchronize": lambda device=None: None,
        "graph_pool_handle": lambda: (0, 100),
        "current_device": lambda: 0,
        "current_stream": lambda device=None: state["stream"],
        "set_stream": lambda stream: state.update(stream=stream),
    }
    for name, value in {"CUDAGraph": Graph, "Event": Event, "graph": capture, **functions}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda index, pool: state["shares"].remove(pool))
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


@pytest.mark.parametrize("ends_itself", [False, True])
def test_a_capture_that_fails_leaves_nothing_behind(ends_itself, gpu):
    state, run = gpu
    state |= {"refuses": RuntimeError("operation not permitted when stream is capturing"), "ends itself": ends_itself}
    assert TimedCalls(run, GPU, batch_s=0.02, pool=(0, 7)).way.startswith(CAPTURE_FAILED)
    assert (state["stream"], state["underway"]) == ("default", [])
    assert state["shares"] == ([(0, 7)] if ends_itself else []), "a newer PyTorch gives back its share itself"
    state["refuses"] = None
    assert TimedCalls(run, GPU, batch_s=0.02, pool=(0, 7)).way == "graph"


def test_what_reads_the_device_is_not_captured(gpu):
    state, run = gpu
    timed = TimedCalls(run, GPU, batch_s=0.02, captures=False)
    assert (timed.way, timed.count, state["pools"]) == ("events", 10, [])
    assert timed.seconds() == pytest.approx(0.002)


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
