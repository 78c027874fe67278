"""What `record` writes against what the reports say; that it costs nothing where nobody records."""

import json
import math
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import tritonmoe as tm
from tests.support.synthetic_runs import Run, write_run
from tritonmoe.errors import TransportError
from tritonmoe.expert_parallel.call import listeners
from tritonmoe.layer import report_of
from tritonmoe.overlap.report import LayerReport
from tritonmoe.overlap.steps import StepKind
from tritonmoe.runtime.weight_files import WeightFile
from tritonmoe.tools.doctor.recorded_run import judge_recording
from tritonmoe.tools.recording import record
from tritonmoe.tools.recording.call_recording import folder_name
from tritonmoe.tools.recording.pass_steps import PassSteps, arrivals_of
from tritonmoe.tools.recording.recording_reader import read_recording
from tritonmoe.tools.report.perfetto import chrome_trace
from tritonmoe.tools.report.timeline import layer_timeline
from tritonmoe.transports import EmulatedTransport, LocalTransport, PendingExchange, Transport, TwoLevelTransport
from tritonmoe.transports.two_level_transport import GroupView

SIZE, NUM_TOKENS, CALLS = 2, 48, 3
CONFIG = tm.MoEConfig(8, 4, 4, 2)


def train(transport: Transport, calls: int = CALLS, backward: bool = True) -> list[LayerReport]:
    layer = tm.GroupedExperts(CONFIG, transport, tm.OverlapConfig(3), backend="torch")
    generator = torch.Generator().manual_seed(transport.rank)
    x = torch.randn(NUM_TOKENS, 8, generator=generator, requires_grad=backward)
    weights, ids = torch.rand(NUM_TOKENS, 4, generator=generator).topk(2)
    reports = []
    for _ in range(calls):
        with torch.set_grad_enabled(backward):
            y = layer(x, ids, weights)
        if backward:
            y.sum().backward()
        reports.append(report_of(layer))
    return reports


def test_a_recording_says_what_the_reports_say(tmp_path: Path) -> None:
    with record(tmp_path / "run"):
        reports = tm.run_on_emulated_ranks(train, SIZE, link=tm.LinkModel(0.01, latency_us=200))
    assert sorted(file.name for file in (tmp_path / "run").iterdir()) == ["rank-0000.jsonl", "rank-0001.jsonl"]
    recording = read_recording(tmp_path / "run")
    assert (recording.size, recording.notes, recording.has_arrivals) == (SIZE, (), True)
    assert recording.transport == "EmulatedTransport"
    header = recording.headers[1]
    assert header["versions"]["torch"] == torch.__version__.partition("+")[0] or header["versions"]["torch"]
    assert header["model"] == {"num_experts": 4, "hidden_size": 8, "intermediate_size": 4, "top_k": 2}
    assert [call.sequence for call in recording.calls] == [0, 1, 2]
    for call, *of_ranks in zip(recording.calls, *reports, strict=True):
        assert (call.layer, call.is_recompute, call.plan) == (0, False, of_ranks[0].overlap)
        assert call.work.rows.tolist() == of_ranks[0].traffic_rows.tolist()
        assert call.work.pairs.tolist() == of_ranks[0].traffic_pairs.tolist()
        for rank, report in enumerate(of_ranks):
            of = call.ranks[rank]
            assert sum(of.pairs_per_expert) == report.pair_offsets[-1] == int(report.traffic_pairs[:, rank].sum())
            assert report.backward is not None
            for written, reported in zip(of.passes, (report.forward, report.backward), strict=True):
                marks = reported.marks
                assert written.marks == pytest.approx(marks, abs=1e-6)
                assert marks is not None
                assert marks.entered <= marks.counts_posted <= marks.counts_left <= written.origin
                assert written.total_s == pytest.approx(reported.total_s, abs=1e-6)
                assert [step.step for step in written.steps] == [
                    type(step.step)(step.step.kind, step.step.chunk) for step in reported.steps
                ]
                for place, (step, timing) in enumerate(zip(written.steps, reported.steps, strict=True)):
                    assert (step.start_s, step.end_s) == pytest.approx((timing.start_s, timing.end_s), abs=1e-6)
                    assert (step.wait_s, step.post_s) == pytest.approx((timing.wait_s, timing.post_s), abs=1e-6)
                    if step.step.kind is StepKind.DISPATCH:
                        own, other = (told(written.steps, place)[of] for of in (rank, 1 - rank))
                        assert own is None
                        assert other is not None
                        assert step.start_s < other <= step.end_s + 1e-6


def test_a_recording_says_which_steps_waited_for_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts in files; what is read on rank 1 comes late. Steps of experts in memory are written as before."""
    read = WeightFile.read

    def read_slowly(file: WeightFile, memory: memoryview, offset: int) -> None:
        time.sleep(0.01 * ("rank-1" in file.path.name))
        read(file, memory, offset)

    monkeypatch.setattr(WeightFile, "read", read_slowly)

    def on_rank(transport: Transport) -> LayerReport:
        layer = tm.GroupedExperts(tm.MoEConfig(8, 4, 24, 2), transport, tm.OverlapConfig(2), backend="torch")
        tm.offload_experts(layer.requires_grad_(False), tmp_path / "experts")
        x = torch.randn(NUM_TOKENS, 8, requires_grad=True)
        weights, ids = torch.rand(NUM_TOKENS, 24).topk(2)
        layer(x, ids, weights).sum().backward()
        return report_of(layer)

    with record(tmp_path / "run"):
        reports = tm.run_on_emulated_ranks(on_rank, SIZE)
    (call,) = read_recording(tmp_path / "run").calls
    for of, report in zip(call.ranks, reports, strict=True):
        assert report.backward is not None
        for written, reported in zip(of.passes, (report.forward, report.backward), strict=True):
            assert [step.load_s for step in written.steps] == pytest.approx(
                [timing.load_s for timing in reported.steps], abs=1e-6
            )
    waits_s = [sum(step.load_s for step in of.forward.steps) for of in call.ranks]
    assert waits_s[1] > max(0.02, 2 * waits_s[0])
    timeline = layer_timeline("run", reports[1])
    events = chrome_trace({"run": [timeline]})["traceEvents"]
    shown_us = sum(event["args"].get("waited_for_experts_us", 0.0) for event in events)
    passes = (reports[1].forward, reports[1].backward)
    assert shown_us == pytest.approx(1e6 * sum(one.loads.wait_s for one in passes), abs=0.1)
    steps = [
        step
        for line in (tmp_path / "run" / "rank-0001.jsonl").open()
        for step in json.loads(line).get("forward", {}).get("steps", ())
    ]
    assert {step["kind"] for step in steps if "load_s" in step} == {"experts"}


def told(steps: PassSteps, place: int) -> list[float | None]:
    """Return when the rows of every rank had arrived in a step that tells it; None: not known."""
    assert steps.layout.tell_arrivals[place]
    return [None if math.isnan(at) else at for at in arrivals_of([steps], [[place]])[0, 0].tolist()]


def test_what_posting_takes_is_before_the_counts_are_posted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a host without time to post would look like counts that travel for long."""
    post_counts, seconds = EmulatedTransport.post_counts, 0.02

    def post_late(transport: EmulatedTransport, counts: torch.Tensor) -> PendingExchange:
        time.sleep(seconds)
        return post_counts(transport, counts)

    monkeypatch.setattr(EmulatedTransport, "post_counts", post_late)
    for reports in tm.run_on_emulated_ranks(train, SIZE):
        for report in reports:
            for marks in (report.forward.marks, report.backward.marks):
                assert marks.counts_posted - marks.entered >= seconds


def test_forwards_alone_and_forwards_whose_backward_does_not_come(tmp_path: Path) -> None:
    with record(tmp_path):
        tm.run_on_emulated_ranks(lambda transport: train(transport, backward=False), SIZE)
    assert [call.has_backward for call in read_recording(tmp_path).calls] == [False] * CALLS

    def forward_only(transport: Transport) -> None:
        layer = tm.GroupedExperts(CONFIG, transport, backend="torch")
        x = torch.randn(NUM_TOKENS, 8, requires_grad=True)
        layer(x, torch.zeros(NUM_TOKENS, 2, dtype=torch.int64), torch.rand(NUM_TOKENS, 2))

    with record(tmp_path / "left"):
        tm.run_on_emulated_ranks(forward_only, SIZE)
    assert [call.has_backward for call in read_recording(tmp_path / "left").calls] == [False]


def wait_for_calls(folder: Path, count: int) -> list[dict]:
    """Return the calls of rank 0's file, once it has so many, while the recording goes on."""
    file, deadline = folder / "rank-0000.jsonl", time.monotonic() + 30
    while not file.exists() or file.read_bytes().count(b"\n") <= count:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return [json.loads(line) for line in file.read_text().split("\n")[1:-1]]


def local_call() -> Callable[[], torch.Tensor]:
    """Return a layer's call on one rank that is alone."""
    layer = tm.GroupedExperts(CONFIG, LocalTransport(), backend="torch")
    x = torch.randn(NUM_TOKENS, 8, requires_grad=True)
    weights, ids = torch.rand(NUM_TOKENS, 4).topk(2)
    return lambda: layer(x, ids, weights).sum()


def test_a_forward_whose_graph_is_dropped_is_written_then(tmp_path: Path) -> None:
    """And one whose graph is kept has its backward, later."""
    call = local_call()
    with record(tmp_path):
        kept, dropped = call(), call()
        del dropped
        (line,) = wait_for_calls(tmp_path, 1)
        assert (line["call"], line["backward"]) == (1, None)
        kept.backward()
        _, line = wait_for_calls(tmp_path, 2)
        assert line["call"] == 0
        assert line["backward"] is not None
    assert len(wait_for_calls(tmp_path, 2)) == 2


@pytest.mark.thorough
def test_as_many_forwards_as_there_are_wait_for_their_backward(tmp_path: Path) -> None:
    """As in a pipeline, whose microbatches all go forwards first."""
    call = local_call()
    with record(tmp_path):
        torch.stack([call() for _ in range(300)]).sum().backward()
    calls = read_recording(tmp_path).calls
    assert [call.sequence for call in calls] == list(range(300))
    assert all(call.has_backward for call in calls)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_both_runs_of_a_checkpointed_call_are_written_when_its_backward_is_over(
    use_reentrant: bool, tmp_path: Path
) -> None:
    call, anchor = local_call(), torch.zeros((), requires_grad=True)
    with record(tmp_path):
        checkpoint(lambda anchor: anchor + call(), anchor, use_reentrant=use_reentrant).backward()
        lines = sorted(wait_for_calls(tmp_path, 2), key=lambda line: line["call"])
    assert [line["recomputed"] for line in lines] == [False, True]
    assert [line["backward"] is not None for line in lines] == [not use_reentrant, use_reentrant]


@pytest.mark.parametrize("backward", [True, False])
def test_the_first_run_of_a_call_that_overflows_is_no_time_of_the_host(backward: bool, tmp_path: Path) -> None:
    def on_rank(transport: Transport) -> LayerReport:
        layer = tm.GroupedExperts(CONFIG, transport, tm.OverlapConfig(2, capacity=0.1), backend="torch")
        x = torch.randn(NUM_TOKENS, 8, requires_grad=backward)
        with torch.set_grad_enabled(backward):
            y = layer(x, torch.tensor([[0, 3]]).expand(NUM_TOKENS, 2), torch.ones(NUM_TOKENS, 2))
        if backward:
            y.sum().backward()
        return report_of(layer)

    with record(tmp_path):
        reports = tm.run_on_emulated_ranks(on_rank, SIZE, link=tm.LinkModel(0.01, latency_us=2000))
    recording = read_recording(tmp_path)
    said = "1 of 1 calls overflowed their capacity and ran twice: what the first runs took is in none of these times"
    assert recording.notes == (said,)
    for report, of in zip(reports, recording.calls[0].ranks, strict=True):
        assert report.first_run is not None
        first = report.first_run.forward
        assert first.total_s > 0.002
        assert of.forward.entered >= first.started_at + first.total_s - 1e-6


def test_ranks_may_each_enter_the_same_folder(tmp_path: Path) -> None:
    def on_rank(transport: Transport) -> None:
        with record(tmp_path):
            train(transport)
            transport.barrier()

    tm.run_on_emulated_ranks(on_rank, SIZE)
    assert len(read_recording(tmp_path).calls) == CALLS


def test_a_second_transport_has_a_folder_of_its_own(tmp_path: Path) -> None:
    with record(tmp_path):
        for _ in range(2):
            tm.run_on_emulated_ranks(train, SIZE)
    assert len(read_recording(tmp_path).calls) == CALLS
    assert len(read_recording(tmp_path / "transport-1").calls) == CALLS


def test_a_recording_is_not_written_over(tmp_path: Path) -> None:
    with record(tmp_path):
        tm.run_on_emulated_ranks(train, SIZE)
    before = (tmp_path / "rank-0000.jsonl").read_bytes()
    with pytest.raises(FileExistsError, match="a new folder for each run"), record(tmp_path):
        tm.run_on_emulated_ranks(train, SIZE)
    assert (tmp_path / "rank-0000.jsonl").read_bytes() == before


def test_the_other_ranks_hear_of_a_file_of_an_earlier_run(tmp_path: Path) -> None:
    """Before a row has moved, and without a timeout; a second try doesn't go elsewhere."""
    earlier = tmp_path / "rank-0001.jsonl"
    earlier.write_text("")

    def on_rank(transport: Transport) -> None:
        layer = tm.GroupedExperts(CONFIG, transport, backend="torch")
        arguments = torch.randn(4, 8), torch.zeros(4, 2, dtype=torch.int64), torch.ones(4, 2)
        for _ in range(2):
            with pytest.raises(FileExistsError if transport.rank == 1 else TransportError, match="rank"):
                layer(*arguments)

    with record(tmp_path):
        tm.run_on_emulated_ranks(on_rank, SIZE)
    assert list(tmp_path.iterdir()) == [earlier]


def test_groups_of_a_jobs_ranks_have_folders_of_their_own(tmp_path: Path) -> None:
    """As in a mesh of two replicas and two expert ranks: rank 0 of both groups writes rank-0000.jsonl."""

    def on_rank(world: Transport) -> None:
        first = world.rank // SIZE * SIZE
        for _ in range(2):
            train(GroupView(world, range(first, first + SIZE)), calls=1)

    with record(tmp_path):
        tm.run_on_emulated_ranks(on_rank, 2 * SIZE)
    folders = [tmp_path / name for name in ("ranks-0000-to-0001", "ranks-0002-to-0003")]
    assert sorted(tmp_path.iterdir()) == folders
    for first, folder in zip((0, 2), folders, strict=True):
        for of_transport in (folder, folder / "transport-1"):
            recording = read_recording(of_transport)
            assert (recording.size, len(recording.calls)) == (SIZE, 1)
            assert [header["job_ranks"] for header in recording.headers] == [[first, first + 1]] * SIZE
    with pytest.raises(ValueError, match=f"give the folder of one, or of several, as {folders[0]} {folders[1]}"):
        read_recording(tmp_path)
    (folders[1] / "rank-0001.jsonl").rename(folders[0] / "rank-0001.jsonl")
    with pytest.raises(ValueError, match=r"job_ranks is \[2, 3\], and \[0, 1\] in"):
        read_recording(folders[0])


def test_groups_of_ranks_have_names_of_their_own() -> None:
    groups = [(3,), (4, 5, 6, 7), (1, 5), (0, 2, 4), (0, 3, 4), (0, 1, 4), (4, 2, 0)]
    names = [folder_name(group) for group in groups]
    even = ["ranks-0003-to-0003", "ranks-0004-to-0007", "ranks-0001-to-0005-by-4", "ranks-0000-to-0004-by-2"]
    assert names[:4] == even
    assert len(set(names)) == len(groups)


def test_nobody_listens_when_nothing_is_recorded(tmp_path: Path) -> None:
    assert not listeners
    with record(tmp_path):
        assert len(listeners) == 1
    assert not listeners


def record_until_killed(folder: Path) -> None:
    with record(folder):
        tm.run_on_emulated_ranks(lambda transport: train(transport, calls=1_000_000), SIZE)


@pytest.mark.thorough
def test_a_recording_killed_half_way_can_be_read(tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=record_until_killed, args=(tmp_path,))
    process.start()
    files = [tmp_path / f"rank-000{rank}.jsonl" for rank in range(SIZE)]
    deadline = time.monotonic() + 120
    while not all(file.exists() and file.read_bytes().count(b"\n") > CALLS for file in files):
        assert time.monotonic() < deadline
        assert process.is_alive()
        time.sleep(0.02)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert len(read_recording(tmp_path).calls) >= CALLS


def test_lines_are_objects_of_json(tmp_path: Path) -> None:
    with record(tmp_path):
        tm.run_on_emulated_ranks(train, SIZE)
    header, *calls = map(json.loads, (tmp_path / "rank-0001.jsonl").read_text().splitlines())
    assert (header["format"], header["schema"], header["rank"]) == ("tritonmoe recording", 1, 1)
    assert [call["call"] for call in calls] == list(range(CALLS))


def test_halves_of_a_batch_are_told_and_replayed(tmp_path: Path) -> None:
    def on_rank(transport: Transport) -> None:
        layer = tm.MoELayer(CONFIG, transport, tm.OverlapConfig(2))
        x = torch.randn(NUM_TOKENS, 8, generator=torch.Generator().manual_seed(transport.rank))
        first, second = tm.two_batches(lambda half: layer(half).sum(), *x.chunk(2))
        (first + second).backward()

    with record(tmp_path / "run"):
        tm.run_on_emulated_ranks(on_rank, SIZE)
    recording = read_recording(tmp_path / "run")
    assert [call.half for call in recording.calls] == [1, 2]
    assert all(call.has_backward for call in recording.calls)
    found = judge_recording(recording)
    assert found.found.error == pytest.approx(0, abs=0.02)
    assert len(found.found.graph.steps) == 1
    assert found.advice == []


@pytest.mark.thorough
def test_two_levels_are_recorded_and_replayed(tmp_path: Path) -> None:
    def on_rank(transport: Transport) -> None:
        layer = tm.MoELayer(CONFIG, TwoLevelTransport(transport, 2), tm.OverlapConfig(2))
        for _ in range(CALLS):
            layer(torch.randn(NUM_TOKENS, 8, requires_grad=True)).sum().backward()

    with record(tmp_path / "run"):
        tm.run_on_emulated_ranks(on_rank, 4)
    recording = read_recording(tmp_path / "run")
    assert recording.node_size == 2
    (call, *_) = recording.calls
    assert call.levels is not None
    for rank, of in enumerate(call.ranks):
        node = of.rows_to_nodes[rank // 2]
        assert max(of.rows[rank - rank % 2 :][:2]) <= node <= NUM_TOKENS
        inside = {str(step.step.kind) for one in of.passes for step in one.steps_inside}
        assert {"node_metadata", "node_dispatch", "experts", "node_combine", "node_combine_backward"} <= inside
    inside_of_last = call.ranks[3].forward.steps_inside
    dispatches = [place for place, step in enumerate(inside_of_last) if step.step.kind == "node_dispatch"]
    assert all(told(inside_of_last, place)[0] is not None for place in dispatches)
    assert all(told(inside_of_last, place)[1] is None for place in dispatches)
    for steps in (steps for of in call.ranks for one in of.passes for steps in (one.steps, one.steps_inside)):
        for place, step in enumerate(steps):
            if steps.layout.tell_arrivals[place]:
                assert all(at is None or step.start_s <= at <= step.end_s + 1e-6 for at in told(steps, place)), step
    found = judge_recording(recording)
    assert found.found.error == pytest.approx(0, abs=0.02)
    assert found.costs.link.each is not None
    assert found.costs.link.each.inside is not None
    assert set(found.costs.steps.fixed_s) >= {"experts", "experts_backward", "dispatch"}
    assert not any("node_" in kind for kind in found.costs.steps.fixed_s)


def test_rows_to_nodes_that_contradict_are_refused(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [Run(node_size=2, has_two_levels=True)])
    file = folder / "rank-0002.jsonl"
    header, line = file.read_text().splitlines()
    call = json.loads(line)
    call["rows_to_nodes"][1] = 10**6
    file.write_text(f"{header}\n{json.dumps(call)}\n")
    with pytest.raises(ValueError, match=r"rank-0002.jsonl line 2: rows_to_nodes: 1000000 of node 1 contradict rows"):
        read_recording(folder)


def test_calls_with_copies_are_left_out(tmp_path) -> None:
    """A recording has no word for copies; a warning says so, once, other calls are there, and how many are not."""
    config = tm.MoEConfig(hidden_size=8, intermediate_size=6, num_experts=4, top_k=1)

    def on_rank(transport: Transport) -> None:
        experts = tm.GroupedExperts(config, transport, tm.OverlapConfig(1, balance="always"))
        for hot in (False, True, True):
            ids = torch.zeros(8, 1, dtype=torch.int64) if hot else torch.arange(8).remainder(4).view(8, 1)
            experts(torch.randn(8, 8), ids, torch.ones(8, 1)).sum().backward()
            assert (experts.last_report.copies.planned is not None) == hot

    with pytest.warns(UserWarning, match="copies") as warned, record(tmp_path / "run"):
        tm.run_on_emulated_ranks(on_rank, 2, timeout_s=20)
    assert len([one for one in warned if "OverlapConfig.balance" in str(one.message)]) == 1
    recording = read_recording(tmp_path / "run")
    assert len(recording.calls) == 1
    assert [note.split(" (")[0] for note in recording.notes] == ["2 calls whose hot experts had copies"]
