"""Sends and receives without the other rank: those of all ranks are all-to-alls, others are said to be alone."""

import json
from pathlib import Path

import pytest
import torch
from gpu_traces import event
from processes import run_torchrun

from tritonmoe.tools.doctor.attribution import attribute
from tritonmoe.tools.doctor.kineto_events import from_label
from tritonmoe.tools.doctor.matching import as_all_to_alls
from tritonmoe.tools.doctor.reading import read_traces
from tritonmoe.tools.doctor.trace import Part, RankTrace
from tritonmoe.tools.doctor.verdict import as_text
from tritonmoe.transports.gloo import GlooExchange

WORKER = Path(__file__).parent / "own_layers_worker.py"

SIZE, STEPS, LATE_US = 3, 6, 50_000.0


def write(folder: Path, late: int, without: int | None = None) -> Path:
    """Write traces of ranks that post receives and sends at once, twice a step, all on one thread; `late` sleeps first.

    without: a rank that sends one row less.
    """
    folder.mkdir()
    for rank in range(SIZE):
        events = []
        for step in range(STEPS):
            base = 1e6 + 200_000.0 * step
            came = [base + (LATE_US if one == late else 0.0) for one in range(SIZE)]
            events.append(event("user_annotation", f"ProfilerStep#{step}", base, 199_000.0, 1))
            for number in range(2):
                events.append(event("cpu_op", "aten::mm", came[rank], 10_000.0, 1))
                posted, ended = came[rank] + 10_100.0, max(came) + 15_000.0
                for place, kind in enumerate(["recv"] * (SIZE - 1) + ["send"] * (SIZE - 1)):
                    if rank != without or number or place:
                        start = posted + 10.0 * place
                        events.append(event("user_annotation", f"gloo:{kind}", start, ended - start, 1))
                came = [ended] * SIZE
            events.append(event("cpu_op", "aten::mm", came[rank], 10_000.0, 1))
        about = {"backend": "gloo", "rank": rank, "world_size": SIZE}
        (folder / f"{rank}.json").write_text(json.dumps({"distributedInfo": about, "traceEvents": events}))
    return folder


def test_ranks_wait_for_each_other_in_them(tmp_path: Path) -> None:
    run = read_traces(write(tmp_path / "run", late=1))
    graph = run.graph
    assert {len(members) for members in graph.exchanges} == {SIZE}
    assert {member.key[1] for member in graph.members} == {"all_to_all"}
    found = attribute(graph)
    assert found.error == pytest.approx(0, abs=0.01)
    (finding,) = found.findings
    assert (finding.kind, finding.culprits.ranks, finding.when.when) == ("late rank", (1,), "always")
    # Before the first step there is nothing that it could come late to.
    assert finding.cost.seconds == pytest.approx(LATE_US / 1e6, rel=0.2)


def test_what_does_not_fit_is_said_to_be_alone(tmp_path: Path) -> None:
    run = read_traces(write(tmp_path / "run", late=1, without=2))
    assert any(
        "the files don't name the other rank of sends and receives: each counts alone" in words for words in run.limits
    )
    found = attribute(run.graph)
    assert found.error == pytest.approx(0, abs=0.05)  # what one thread has under way at once does not take turns
    assert "what these files can't tell" in as_text(run, found)
    assert not found.is_healthy
    assert "NOT CERTAIN: for" in as_text(run, found)


def test_the_peer_of_two_ranks_is_known_where_messages_without_rows_are_missing() -> None:
    def rank(kinds: str) -> RankTrace:
        trace = RankTrace("", 0, 2, "cpu")
        for place, kind in enumerate(kinds):
            at_s = 0.1 * (place // 2) + 1e-5 * place
            if kind != "-":
                trace.parts.append(Part({"r": "recv", "s": "send"}[kind], at_s, at_s, at_s + 0.01))
        return trace

    traces, limits = [rank("rsrs-s"), rank("rsrsr-")], list[str]()
    as_all_to_alls(traces, limits)
    assert limits == []
    assert [[part.kind for part in trace.parts] for trace in traces] == [["all_to_all"] * 3] * 2


def test_a_label_tells_an_exchange() -> None:
    exchange = GlooExchange(Links(), None, torch.zeros(3, 4), torch.zeros(5, 4), "", 1.0)  # type: ignore[arg-type]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        exchange.post_rows(1, 7, torch.zeros(3, 4), [1, 2], [3, 2], torch.zeros(5, 4))
    (label,) = (of.name for of in profile.events() if of.name.startswith("tritonmoe"))
    part = Part("all_to_all", 0.0, 0.0, None)
    from_label(part, label)
    assert (part.group_ranks, part.sequence, part.rows, part.element_bytes) == ((4, 6), 7, 5, 4)
    assert (part.sent, part.received) == ((16, 32), (48, 32))


class Links:
    """Stands in for the connections of ranks 4 and 6 of a job."""

    group = "0/0", (4, 6)

    def receive(self, part: torch.Tensor, peer: int, tag: int) -> object:
        return object()

    send = receive


@pytest.mark.thorough
@pytest.mark.alone
@pytest.mark.parametrize(("size", "wrapper", "late"), [(2, "ddp", 1), (4, "fsdp2", 2)])
def test_layers_of_this_package_under_the_profiler(size: int, wrapper: str, late: int, tmp_path: Path) -> None:
    run_torchrun(size, WORKER, str(tmp_path / "run"), wrapper, str(late), "0.5", cases=[wrapper])
    run = read_traces(tmp_path / "run")
    (first, *_) = attribute(run.graph).findings
    assert (first.kind, first.culprits.ranks) == ("late rank", (late,))
