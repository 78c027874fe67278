"""Readers of foreign traces: each kind of file, what it can't tell, and damage, which is refused with the place."""

import gzip
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
from gpu_traces import DEEP_EP, LATE_S, NEW, OLD, event, gpu_trace

from bench.faults import Fault
from bench.foreign_scenarios import Scenario
from bench.synthetic_traces import write_traces
from tritonmoe.tools.cli import main
from tritonmoe.tools.doctor.attribution import Verdict, attribute
from tritonmoe.tools.doctor.exchange_names import kind_of_kernel, kind_of_name
from tritonmoe.tools.doctor.reading import read_traces
from tritonmoe.tools.doctor.trace_files import JsonPieces


def judged(folder: Path) -> Verdict:
    return attribute(read_traces(folder).graph)


@pytest.mark.parametrize(
    ("names", "metadata"),
    [((NEW, NEW), True), ((OLD, OLD), False), (DEEP_EP, False), (("void hybrid_ep::dispatch_kernel<1>()",), False)],
)
def test_gpu_traces(names: tuple[str, ...], metadata: bool, tmp_path: Path) -> None:
    for rank in range(4):
        trace = gpu_trace(rank, 4, names, 2, metadata)
        (tmp_path / f"worker{rank}.json.gz").write_bytes(gzip.compress(json.dumps(trace).encode()))
    run = read_traces(tmp_path)
    assert run.kinds == {"Kineto (GPU)": 4}
    assert len(run.graph.exchanges) == 6 * len(names)
    assert ("matches them by their order" in " ".join(run.limits)) == (names != (NEW, NEW) and names != (OLD, OLD))
    found = attribute(run.graph)
    (finding,) = found.findings
    assert (finding.kind, finding.culprits.ranks, finding.when.when) == ("late rank", (2,), "always")
    assert finding.cost.seconds == pytest.approx(
        LATE_S * 5 / 6, rel=0.02
    )  # the first step begins with its first kernel


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (NEW, "all_to_all"), (OLD, "all_to_all"), ("ncclDevKernel_AllReduce_Sum_bf16_RING_LL(x)", "all_reduce"),
        ("ncclKernel_ReduceScatter_RING_LL_Sum_float(x)", "reduce_scatter"),
        ("ncclDevKernel_AllGather_RING_LL(x)", "all_gather"),
        ("ncclDevKernel_Generic_4(x)", "exchange"), ("void rcclGenericKernel<1>(x)", "exchange"),
        ("ampere_bf16_s16816gemm", None), ("void at::native::reduce_kernel<512>()", None), (DEEP_EP[0], "notify"),
        ("void deep_ep::intranode::cached_notify_combine<2>()", "notify"), (DEEP_EP[2], "combine"),
        ("void nccl_ep::dispatch_kernel<4>()", "dispatch"), ("void hybrid_ep::combine_kernel<2>()", "combine"),
        ("void deep_ep::internode::cached_notify<false>(int, int*)", "notify"),
        ("void deep_ep::intranode::dispatch<8, 512>(int4*)", "dispatch"),
        ("void deep_ep::internode_ll::combine<true, 7>(void*)", "combine"),
        ("void internode::dispatch<false, 4>(int4*)", "dispatch"),
        ("rcclDevKernel_AllGather_RING_SIMPLE(x)", "all_gather"),
        ("ncclDevKernel_ReduceScatter_Sum_f32_RING_LL(x)", "reduce_scatter"),
    ],
)  # fmt: skip
def test_names_of_kernels(name: str, kind: str | None) -> None:
    assert kind_of_kernel(name) == kind


def test_names_of_records() -> None:
    names = ("gloo:all_to_all", "nccl:_reduce_scatter_base", "_allgather_base", "mpi:all_reduce", "alltoallv", "wait")
    assert [kind_of_name(name) for name in names] == [
        *("all_to_all", "reduce_scatter", "all_gather", "all_reduce", "all_to_all", None)
    ]


def test_old_hosts_without_gpu_lanes_are_refused(tmp_path: Path) -> None:
    trace = gpu_trace(0, 2, (NEW,), None, False)
    trace["traceEvents"] = [event("cpu_op", "record_param_comms", 5, 10, 1), event("cpu_op", "aten::mm", 20, 10, 1)]
    (tmp_path / "a.json").write_text(json.dumps(trace))
    with pytest.raises(ValueError, match=r"no events of a GPU.*ProfilerActivity"):
        read_traces(tmp_path)


def test_what_files_cannot_tell_is_said(tmp_path: Path) -> None:
    write_traces(Scenario("", 2), tmp_path)
    (tmp_path / "rank3.json").unlink()
    (tmp_path / "rank2.json").unlink()
    run = read_traces(tmp_path)
    assert run.limits == ["of 4 ranks 2 have files here: what the other ranks do is not known"]
    (tmp_path / "rank1.json").unlink()
    assert "one rank only" in read_traces(tmp_path).limits[0]
    trace = json.loads((tmp_path / "rank0.json").read_text())
    trace["traceEvents"] = [one for one in trace["traceEvents"] if "ProfilerStep" not in one["name"]]
    (tmp_path / "rank0.json").write_text(json.dumps(trace))
    run = read_traces(tmp_path)
    assert any("no steps are marked" in words for words in run.limits)
    assert len(run.graph.steps) == 1
    assert not attribute(run.graph).is_healthy


@pytest.mark.parametrize(("us", "share", "refusal"), [(-3, 0.001, ""), (-3, 0.5, "events end"), (-2e3, 0.001, "times")])
def test_events_that_end_before_they_begin(us: float, share: float, refusal: str, tmp_path: Path) -> None:
    """A few of microseconds count as instants, and a line says so; many or long ones are damage."""
    for rank in range(2):
        trace = gpu_trace(rank, 2, (NEW, NEW), 2, True)
        trace["traceEvents"] += [
            event("cuda_runtime", "cudaEventQuery", 1e6 + number, us if number < 1000 * share else 1, 1, correlation=0)
            for number in range(1000)
        ]
        (tmp_path / f"worker{rank}.json").write_text(json.dumps(trace))
    if refusal:
        with pytest.raises(ValueError, match=refusal):
            read_traces(tmp_path)
    else:
        assert "1 of 1054 events end before they begin" in " ".join(read_traces(tmp_path).limits)


def test_two_runs_in_one_folder_are_refused(tmp_path: Path) -> None:
    write_traces(Scenario("", 2), tmp_path / "one")
    write_traces(Scenario("", 2), tmp_path / "other")
    with pytest.raises(ValueError, match="both of rank 0"):
        read_traces(tmp_path)


def test_clocks_that_do_not_agree_are_aligned(tmp_path: Path) -> None:
    write_traces(Scenario("", 4, faults=(Fault("late rank", (2,), 0.2),)), tmp_path)
    trace = json.loads((tmp_path / "rank1.json").read_text())
    trace["baseTimeNanoseconds"] += 700_000_000
    (tmp_path / "rank1.json").write_text(json.dumps(trace))
    run = read_traces(tmp_path)
    assert any("clocks don't agree (by 7" in words for words in run.limits)
    found = attribute(run.graph)
    assert (found.findings[0].kind, found.findings[0].culprits.ranks) == ("late rank", (2,))


def flight_record(rank: int, late: int, timed: bool) -> dict[str, Any]:
    """Return a dump of 8 steps, each an all-to-all and an all-reduce."""
    entries = []
    for count in range(16):
        base = 10**18 + (count // 2) * 40_000_000 + (count % 2) * 10_000_000
        created = base + (8_000_000 if rank == late and count % 2 == 0 else 0)
        entries.append(
            {
                "collective_seq_id": count, "process_group": ["0", "default_pg"], "is_p2p": False,
                "profiling_name": f"nccl:{'all_to_all' if count % 2 == 0 else 'all_reduce'}",
                "time_created_ns": created, "input_sizes": [[128, 4]], "input_dtypes": ["Float"], "state": "completed",
                "time_discovered_started_ns": created if timed else 0,
                "time_discovered_completed_ns": base + 9_000_000 if timed else 0, "duration_ms": None,
            }
        )  # fmt: skip
    return {"version": "2.10", "pg_config": {"0": {"ranks": "[0, 1, 2]"}}, "entries": entries, "rank": rank}


@pytest.mark.parametrize("timed", [False, True])
@pytest.mark.parametrize("packed", [json, pickle])
def test_flight_records(packed: Any, timed: bool, tmp_path: Path) -> None:
    for rank in range(3):
        content = packed.dumps(flight_record(rank, 1, timed))
        (tmp_path / f"dump_{rank}").write_bytes(content if isinstance(content, bytes) else content.encode())
    if packed is json:
        for file in tmp_path.iterdir():
            file.rename(file.with_suffix(".json"))
    run = read_traces(tmp_path)
    assert run.kinds == {"flight recorder": 3}
    assert (run.graph.ranks, len(run.graph.steps)) == ([0, 1, 2], 7)
    assert any("repeat after 2 exchanges" in words for words in run.limits)
    assert any("exchanges only" in words for words in run.limits)
    first = attribute(run.graph).findings[0]
    assert (first.kind, first.culprits.ranks) == ("late rank", (1,))


def test_a_pickle_runs_nothing(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "made"),)

    (tmp_path / "dump_0").write_bytes(pickle.dumps({"version": "2.10", "entries": [Evil()]}))
    with pytest.raises(ValueError, match=r"dump_0 is damaged.*only plain data"):
        read_traces(tmp_path)
    assert not (tmp_path / "made").exists()


def inspector_lines(rank: int, late: int, verbose: bool) -> str:
    header = {"id": "0x7f8c", "rank": rank, "n_ranks": 3, "nnodes": 1}
    stats = {"coll_records": 12, "coll_dropped_since_last_dump": 5 if rank == 0 else 0}
    records: list[dict[str, Any]] = [{"header": header, "metadata": {"hostname": "a"}, "dump_stats": stats}]
    for count in range(12):
        us = 2000 if rank == late else 9000
        performance: dict[str, Any] = {
            "coll": "AllReduce", "coll_sn": count, "coll_msg_size_bytes": 4096, "coll_exec_time_us": us
        }  # fmt: skip
        if verbose:
            end = 1752867229275811 + 20_000 * count
            kernel = {"channel_id": 0, "kernel_start_ts": end - us, "kernel_stop_ts": end, "kernel_record_ts": end}
            performance["event_trace_ts"] = {"coll_start_ts": end - us, "kernel_events": [kernel]}
        records.append({"coll_perf": performance})
    return "\n".join(map(json.dumps, records))


@pytest.mark.parametrize("verbose", [False, True])
def test_inspector_files(verbose: bool, tmp_path: Path) -> None:
    for rank in range(3):
        (tmp_path / f"host-pid{rank}.log").write_text(inspector_lines(rank, 2, verbose))
    run = read_traces(tmp_path)
    assert run.kinds == {"NCCL Inspector": 3}
    assert any("dropped 5 records" in words for words in run.limits)
    assert any("not when" in words for words in run.limits) != verbose
    first = attribute(run.graph).findings[0]
    assert (first.kind, first.culprits.ranks) == ("late rank", (2,))
    assert first.cost.seconds == pytest.approx(0.007, rel=0.1)


def test_pieces_are_what_json_says(tmp_path: Path) -> None:
    whole = {"a": [1, {"b": 'é{}[]\\"'}], "traceEvents": [{"x": i, "s": "y" * 3000} for i in range(1500)], "z": None}
    for name, content in (("a.json", json.dumps(whole, indent=1).encode()), ("b.json", json.dumps(whole).encode())):
        (tmp_path / name).write_bytes(content)
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content))
        for path in (tmp_path / name, tmp_path / f"{name}.gz"):
            found = list(JsonPieces(path, "traceEvents"))
            assert [value for key, value in found if key == "traceEvents"] == whole["traceEvents"]
            assert dict(found[:1] + found[-1:]) == {"a": whole["a"], "z": None}


def test_the_command_refuses_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_traces(Scenario("", 2), tmp_path)
    whole = (tmp_path / "rank1.json").read_text()
    (tmp_path / "rank1.json").write_text(whole.replace('"dur": ', '"dur" ', 1))
    assert main(["doctor", str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "rank1.json is damaged: element" in said.err
    assert said.err.count("\n") == 1


@pytest.mark.parametrize("is_packed", [False, True])
def test_a_file_that_ends_in_the_middle_is_read_up_to_there(is_packed: bool, tmp_path: Path) -> None:
    """The late rank is found in the steps that are whole; a file without any, or in no order, is refused."""
    write_traces(Scenario("late", 2, faults=(Fault("late rank", (2,), 0.1, "always"),)), tmp_path)
    path, whole = tmp_path / "rank1.json", (tmp_path / "rank1.json").read_bytes()

    def cut(share: float, content: bytes = whole) -> None:
        part = gzip.compress(content, 1, mtime=0) if is_packed else content
        path.write_bytes(part[: int(len(part) * share)])

    cut(0.6)
    run = read_traces(tmp_path)
    assert "the file ends in the middle" in " ".join(run.limits)
    assert 4 <= len(run.graph.steps) < 12
    found = attribute(run.graph)
    assert found.error == pytest.approx(0, abs=0.01)
    assert [(one.kind, one.culprits.ranks) for one in found.findings] == [("late rank", (2,))]
    cut(0.05)
    with pytest.raises(ValueError, match=r"before a step is whole|can't be unpacked"):
        read_traces(tmp_path)
    trace = json.loads(whole)
    trace["traceEvents"].reverse()
    cut(0.6, json.dumps(trace).encode())
    with pytest.raises(ValueError, match="don't stand in the order of their times"):
        read_traces(tmp_path)


def test_a_small_share_of_exposed_exchanges_is_said(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Of 10 ms the GPU computes 4.68 ms, then beside an exchange 5 ms, and 0.32 ms of that exchange alone."""
    events = []
    for step in range(8):
        begin = 1e6 + 1e4 * step
        events += [
            event("user_annotation", f"ProfilerStep#{step}", begin, 1e4, 1),
            event("kernel", "sm90_gemm", begin, 4680, 7, stream=7, correlation=2 * step),
            event("kernel", "sm90_gemm", begin + 4680, 5000, 7, stream=7, correlation=2 * step + 1),
            event("kernel", NEW, begin + 4680, 5320, 20, stream=20, correlation=2 * step + 1),
        ]
    trace = {"schemaVersion": 1, "distributedInfo": {"rank": 0, "world_size": 1}, "traceEvents": events}
    (tmp_path / "a.json").write_text(json.dumps(trace))
    assert main(["doctor", str(tmp_path)]) == 0
    assert "exchanges are 3.2% exposed" in capsys.readouterr().out


def test_gloo_runs_a_reduce_scatter_as_an_all_reduce_and_its_threads_compute_nothing_of_the_rank(
    tmp_path: Path,
) -> None:
    for rank in range(2):
        events = []
        for step in range(4):
            base = 1e6 + step * 100_000.0
            late = 40_000.0 if rank == 1 else 0.0
            events.append(event("user_annotation", f"ProfilerStep#{step}", base, 99_000, 1))
            events.append(event("cpu_op", "aten::mm", base + late, 10_000, 1))
            for count, (name, run) in enumerate(
                (("_reduce_scatter_base_", "all_reduce"), ("_allgather_base_", "all_gather"))
            ):
                posted, end = base + late + 10_000 + 5000 * count, base + 60_000 + 5000 * count
                events.append(event("cpu_op", f"c10d::{name}", posted, 50, 1))
                events.append(event("user_annotation", f"gloo:{run}", posted + 20, end - posted - 20, 2 + count))
                events.append(event("cpu_op", "aten::add_", posted + 30, end - posted - 40, 2 + count))
            events.append(event("cpu_op", "aten::mm", base + 66_000, 10_000, 1))
        about = {"backend": "gloo", "rank": rank, "world_size": 2}
        (tmp_path / f"{rank}.json").write_text(json.dumps({"distributedInfo": about, "traceEvents": events}))
    run = read_traces(tmp_path)
    assert run.limits == []
    assert {len(members) for members in run.graph.exchanges} == {2}
    assert {member.key[1] for member in run.graph.members} == {"reduce_scatter", "all_gather"}
    found = attribute(run.graph)
    assert (found.findings[0].kind, found.findings[0].culprits.ranks) == ("late rank", (1,))
    assert found.waiting_s == pytest.approx(0.03, rel=0.2)


def test_sends_and_receives_over_gloo_meet_their_peers(tmp_path: Path) -> None:
    for rank in range(2):
        events = []
        for step in range(6):
            late = 40_000.0 if step % 2 else 0.0
            base = 1e6 + step * 100_000.0 + (step // 2) * 40_000.0
            events.append(event("user_annotation", f"ProfilerStep#{step}", base, 99_900 + late, 1))
            name = "send" if rank == 0 else "recv_"
            start = base + 10_000.0 + late if rank == 0 else base + 5000.0
            end = base + 12_000.0 + late
            peer = {"Concrete Inputs": ["", "", str(1 - rank), "0"]}
            events.append(event("cpu_op", "aten::mm", base, 4000, 1))
            events.append(event("cpu_op", f"c10d::{name}", start, 50, 1, **peer))
            events.append(event("user_annotation", f"gloo:{name.strip('_')}", start + 10, end - start, 1))
            events.append(event("cpu_op", "aten::mm", end + 1000, 20_000, 1))
        about = {"backend": "gloo", "rank": rank, "world_size": 2}
        (tmp_path / f"{rank}.json").write_text(json.dumps({"distributedInfo": about, "traceEvents": events}))
    run = read_traces(tmp_path)
    assert run.limits == []
    assert len(run.graph.exchanges) == 6
    assert {len(members) for members in run.graph.exchanges} == {2}
    (finding,) = attribute(run.graph).findings
    assert (finding.kind, finding.culprits.ranks, finding.when.when) == ("late rank", (0,), "periodic")
