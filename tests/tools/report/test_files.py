"""Timelines of a real layer call, and the files that are made of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tritonmoe as tm
from tritonmoe.overlap.report import PassReport, StepMarks
from tritonmoe.overlap.simulation.cost_model import LayerWork, LinkCosts, StepCosts
from tritonmoe.overlap.simulation.simulator import simulate_layer
from tritonmoe.overlap.simulation.two_level_work import TwoLevelWork
from tritonmoe.overlap.steps import Step, StepKind
from tritonmoe.tools.report.perfetto import chrome_trace, write_chrome_trace
from tritonmoe.tools.report.png import write_png
from tritonmoe.tools.report.terminal import lane_timelines
from tritonmoe.tools.report.timeline import (
    NODE,
    PassTimeline,
    Span,
    Timeline,
    layer_timeline,
    pass_timeline,
    simulated_timeline,
)
from tritonmoe.transports import TwoLevelTransport

TIMELINE = Timeline(
    "serial",
    1,
    PassTimeline(
        (
            Span("experts 1", "experts", 1, "compute", 0.003, 0.005, 0.003),
            Span("dispatch 1", "dispatch", 1, "comm", 0.001, 0.003, 0.0),
        ),
        0.005,
    ),
    PassTimeline((Span("weight_grad", "weight_grad", None, "compute", 0.0, 0.002, 0.0),), 0.002),
)


def test_exchanges_that_queue_follow_one_another():
    report = PassReport(torch.device("cpu"))
    start = report._origin
    # Posted at 1.0, 1.1 and 1.2 ms; arrived at 5, 8 and 7 ms; waited for in another order.
    for chunk, finished in ((1, 0.008), (0, 0.005), (2, 0.007)):
        step = Step(StepKind.DISPATCH, chunk)
        posted = start + 0.001 + 0.0001 * chunk
        report.ran.append(StepMarks(step, posted, start + 0.009, posted, start + 0.008, start + finished))
    spans = pass_timeline(report).spans
    assert [span.name for span in spans] == ["dispatch 0", "dispatch 1", "dispatch 2"]
    edges = [edge for span in spans for edge in (span.start_s, span.end_s)]
    assert edges == pytest.approx([0.001, 0.005, 0.005, 0.008, 0.008, 0.008])
    assert spans[1].posted_s == pytest.approx(0.0011)


def test_timeline_of_a_layer():
    config = tm.MoEConfig(hidden_size=16, intermediate_size=8, num_experts=4, top_k=2)

    def run(transport):
        generator = torch.Generator().manual_seed(0)
        layer = tm.MoELayer(config, transport, tm.OverlapConfig(num_chunks=2), generator=generator)
        layer(torch.ones(6, 16, requires_grad=True)).sum().backward()
        return layer_timeline("run", layer.last_report)

    for rank, timeline in enumerate(tm.run_on_emulated_ranks(run, 2, link=tm.LinkModel(0.01))):
        assert timeline.rank == rank
        names = [span.name for span in timeline.spans]
        assert {"dispatch 0", "dispatch 1", "experts local", "combine 1", "weight_grad"} <= set(names)
        assert timeline.lanes == ("compute", "comm")
        check_lanes(timeline)


def test_timeline_of_two_batches(tmp_path):
    """Both halves stand on one time line: one's exchanges over the other's computation, in both passes."""
    config = tm.MoEConfig(hidden_size=16, intermediate_size=8, num_experts=4, top_k=2)

    def run(transport):
        generator = torch.Generator().manual_seed(0)
        layer = tm.MoELayer(config, transport, tm.OverlapConfig(1, local_first=False), generator=generator)
        x = torch.randn(12, 16, generator=generator).requires_grad_()
        sum(tm.two_batches(lambda half: layer(half).sum(), x[:5], x[5:])).backward()
        assert layer.last_report.half == 2
        assert layer.last_report.first_half.half == 1
        assert layer.last_report.first_half.first_half is None
        return layer_timeline("two batches", layer.last_report)

    timelines = tm.run_on_emulated_ranks(run, 2, link=tm.LinkModel(0.001))
    for timeline in timelines:
        check_lanes(timeline)
        computed = [(span.kind, span.half) for span in timeline.spans if span.lane == "compute"]
        forward = [("group", 1), ("experts", 1), ("group", 2), ("experts", 2), ("reduce", 1), ("reduce", 2)]
        assert computed[:6] == forward
        backward = [(span.kind, span.half) for span in timeline.backward.spans if span.lane == "compute"]
        assert backward[:4] == [
            *(("experts_backward", 2), ("weight_grad", 2)),
            *(("experts_backward", 1), ("weight_grad", 1)),
        ]
        assert {"dispatch 0 of half 1", "dispatch 0 of half 2"} <= {span.name for span in timeline.spans}
    write_chrome_trace(tmp_path / "trace.json", {"two batches": timelines})
    write_png(tmp_path / "lanes.png", [[1, 2], [3, 4]], timelines, title="two batches")


def check_lanes(timeline):
    """Steps of a lane follow one another, within the time that is drawn."""
    for lane in timeline.lanes:
        spans = [span for span in timeline.spans if span.lane == lane]
        edges = [edge for span in spans for edge in (span.start_s, span.end_s)]
        assert edges == sorted(edges)
        assert edges[-1] <= timeline.total_s


INSIDE = {
    "group": ["node_metadata", "group"],
    "experts": ["node_dispatch", "experts", "node_combine", "node_reduce"],
    "experts_backward": [
        *("node_combine_backward", "experts_backward"),
        *("node_dispatch_backward", "node_reduce_backward"),
        *("node_routing_backward", "node_reduce_routing_backward"),
    ],
}
"""What a step of two levels does inside the node."""


def test_timeline_of_two_levels(tmp_path):
    """What a step does inside its node is drawn under that step, as it ran and as it was planned."""
    config = tm.MoEConfig(hidden_size=16, intermediate_size=8, num_experts=8, top_k=4)
    plan = tm.OverlapPlan(chunk_sizes=(1, 1))

    def run(world):
        transport, generator = TwoLevelTransport(world, 2), torch.Generator().manual_seed(0)
        layer = tm.MoELayer(config, transport, plan, generator=generator)
        layer(torch.randn(20, 16, generator=generator).requires_grad_()).sum().backward()
        return layer_timeline("run", layer.last_report)

    work = TwoLevelWork.of(LayerWork.of(torch.ones(4, 4), 4.0, 64, 4), torch.ones(4, 2), LinkCosts(1e-3, 1e6))
    costs = StepCosts({"group": 1e-3, "reduce": 1e-3}, {"experts": 1e-3, "experts_backward": 1e-3})
    simulated = simulate_layer(plan, work, costs, LinkCosts(1e-2, 1e6), backward=True)
    measured = tm.run_on_emulated_ranks(run, 4, link=tm.LinkModel(0.01))
    planned = [simulated_timeline("run, planned", rank, simulated) for rank in range(4)]
    for timeline in (*measured, *planned):
        assert timeline.lanes == ("compute", "comm", NODE)
        check_lanes(timeline)
        inside = [span for span in timeline.spans if span.lane == NODE]
        for outer in (span for span in timeline.spans if span.lane == "compute" and span.kind in INSIDE):
            here, inside = inside[: len(INSIDE[outer.kind])], inside[len(INSIDE[outer.kind]) :]
            assert [span.kind for span in here] == INSIDE[outer.kind]
            assert {span.chunk for span in here} == {outer.chunk}
            assert outer.start_s <= here[0].start_s
            assert here[-1].end_s <= outer.end_s
        assert inside == []
    trace = chrome_trace({"run": measured, "run, planned": planned})["traceEvents"]
    for run, timelines in (("run", measured), ("run, planned", planned)):
        (tid,) = {e["tid"] for e in trace if e["name"] == "thread_name" and e["args"]["name"] == f"{run}: {NODE}"}
        names = [event["name"] for event in trace if event["ph"] == "X" and (event["pid"], event["tid"]) == (3, tid)]
        assert names == [span.name for span in timelines[3].spans if span.lane == NODE]
    write_png(tmp_path / "picture.png", [[1]], [measured[0], planned[0]], title="title")
    assert "node    " in lane_timelines([measured[0]])


def test_chrome_trace_of_two_runs(tmp_path):
    runs = {"serial": [TIMELINE], "overlapped": [TIMELINE]}
    path = tmp_path / "trace.json"
    write_chrome_trace(path, runs)
    trace = json.loads(path.read_text())
    assert trace == chrome_trace(runs)
    events = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert [(e["name"], e["pid"], e["tid"], e["ts"], e["dur"]) for e in events] == [
        ("experts 1", 1, 0, 3000.0, 2000.0),
        ("weight_grad", 1, 0, 5000.0, 2000.0),
        ("dispatch 1", 1, 1, 1000.0, 2000.0),
        ("experts 1", 1, 3, 3000.0, 2000.0),
        ("weight_grad", 1, 3, 5000.0, 2000.0),
        ("dispatch 1", 1, 4, 1000.0, 2000.0),
    ]
    assert events[2]["args"] == {"chunk": 1, "kind": "dispatch", "run": "serial", "posted_us": 0.0}
    names = {
        (event["pid"], event["tid"]): event["args"]["name"]
        for event in trace["traceEvents"]
        if event["name"] == "thread_name"
    }
    assert names == {
        (1, 0): "serial: compute",
        (1, 1): "serial: comm",
        (1, 3): "overlapped: compute",
        (1, 4): "overlapped: comm",
    }
    processes = [event["args"]["name"] for event in trace["traceEvents"] if event["name"] == "process_name"]
    assert processes == ["rank 1"]


def test_a_full_disk_under_the_trace(tmp_path):
    with pytest.raises(OSError, match="the trace could not be written: No space left on device") as raised:
        write_chrome_trace(Path("/dev/full"), {"run": [TIMELINE]})
    assert raised.value.filename == "/dev/full"


@pytest.mark.thorough
def test_no_part_of_a_trace_is_left(tmp_path):
    """A file that must not grow beyond 100 bytes stands for a disk that fills up on the way."""
    path = tmp_path / "trace.json"
    code = f"""if True:
        import pathlib, resource, signal, sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from test_files import TIMELINE, write_chrome_trace
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        write_chrome_trace(pathlib.Path({str(path)!r}), {{"run": [TIMELINE]}})
    """
    environment = {**os.environ, "PYTHONPATH": str(Path(tm.__file__).parents[1])}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "the trace could not be written: File too large" in ended.stderr
    assert not path.exists()


def test_png_is_a_png(tmp_path):
    path = tmp_path / "picture.png"
    write_png(path, [[1, 2], [3, 0]], [TIMELINE, TIMELINE], title="title", note="emulated link")
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert data[12:16] == b"IHDR"
    assert int.from_bytes(data[16:20], "big") > 800


def test_png_without_matplotlib_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'tritonmoe\[demo\]'"):
        write_png(tmp_path / "picture.png", [[1]], [TIMELINE], title="title")
