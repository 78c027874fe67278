"""on_trace_ready: what it writes in real processes over gloo is read, and matched by the flight recorder's numbers."""

from pathlib import Path

import pytest
from processes import run_processes

from tritonmoe.tools.doctor.attribution import attribute
from tritonmoe.tools.doctor.reading import read_traces
from tritonmoe.tools.recording import on_trace_ready

WORKER = Path(__file__).parent / "profiled_worker.py"


@pytest.mark.thorough
@pytest.mark.alone
def test_a_plain_job_of_two_ranks(tmp_path: Path) -> None:
    ended = run_processes(2, "gloo", str(WORKER), str(tmp_path / "run"), str(tmp_path / "meet"), timeout_s=170.0)
    assert ended.statuses == [0, 0], ended.output
    assert sorted(file.name for file in (tmp_path / "run").iterdir()) == [
        *("rank-0000.flight.json", "rank-0000.trace.json.gz", "rank-0001.flight.json", "rank-0001.trace.json.gz")
    ]
    run = read_traces(tmp_path / "run")
    graph = run.graph
    assert (graph.ranks, len(graph.steps)) == ([0, 1], 4)
    assert run.limits == []
    exchanges = [[graph.members[one] for one in members] for members in graph.exchanges]
    assert {len(members) for members in exchanges} == {2}
    kinds = {members[0].key[:2] for members in exchanges}
    assert kinds >= {("forward", "all_to_all"), ("backward", "all_to_all"), ("backward", "all_reduce")}
    sent = {members[0].sent for members in exchanges if members[0].key == ("forward", "all_to_all", 0)}
    assert sent == {(0, 24 * 16 * 4)}  # rank 0 keeps 8 rows of 32
    found = attribute(graph)
    assert found.error == pytest.approx(0, abs=0.02)
    (first, *_) = found.findings
    assert (first.kind, first.culprits.ranks) == ("late rank", (1,))


def test_a_trace_is_not_written_over(tmp_path: Path) -> None:
    import torch

    write = on_trace_ready(tmp_path)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], on_trace_ready=write):
        torch.ones(3).sum()
    assert (tmp_path / "rank-0000.trace.json.gz").exists()
    again = on_trace_ready(tmp_path)
    profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
    with pytest.raises(FileExistsError, match="folder of its own"):
        again(profile)
