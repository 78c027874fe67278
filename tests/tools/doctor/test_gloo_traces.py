"""Kineto traces over gloo of other trainers' ways: stages of a pipeline, and exchanges that an operator waits for."""

import json
from pathlib import Path
from typing import Any

import pytest

from tritonmoe.tools.doctor.attribution import attribute
from tritonmoe.tools.doctor.reading import read_traces

FORWARD_US, SEND_US, NUM_BATCHES, STEPS = 8000.0, 3000.0, 3, 8
GROUPS = {"0": [0, 1, 2, 3], "1": [0, 1], "2": [2, 3], "3": [0, 2], "4": [1, 3]}


class Rank:
    def __init__(self, rank: int) -> None:
        self.rank, self.now, self.events = rank, 1e6, []  # type: ignore[var-annotated]

    def event(self, category: str, name: str, start: float, end: float, thread: int = 1, **arguments: Any) -> None:
        self.events.append({"ph": "X", "cat": category, "name": name, "ts": start, "dur": end - start, "pid": 1,
                            "tid": thread, "args": arguments})  # fmt: skip

    def compute(self, us: float, is_backward: bool = False) -> None:
        if is_backward:
            self.event("cpu_op", "autograd::engine::evaluate_function: MmBackward0", self.now, self.now + us)
        self.event("cpu_op", "aten::mm", self.now, self.now + us)
        self.now += us

    def write(self, folder: Path, size: int) -> None:
        config = [
            {"pg_name": name, "ranks": ranks, "pg_size": len(ranks)}
            for name, ranks in GROUPS.items() if self.rank in ranks and max(ranks) < size
        ]  # fmt: skip
        about = {"backend": "gloo", "rank": self.rank, "world_size": size, "pg_config": config}
        folder.mkdir(exist_ok=True)
        top = {"distributedInfo": about, "baseTimeNanoseconds": 10**18, "traceEvents": self.events}
        (folder / f"{self.rank}.json").write_text(json.dumps(top))


def pipeline(folder: Path, late: int | None, slow_pair: int | None) -> float:
    """Write a pipeline of two stages, 1F1B with a forward and a backward each; ranks r and r + 2 are one line.

    A transfer is noticed by the thread that hands it over, when that gets to wait for it: a send long after it ended.
    Gives the mean seconds of a step.
    """
    ranks = [Rank(rank) for rank in range(4)]
    took = []
    for step in range(STEPS):
        begins = [rank.now for rank in ranks]
        for line in (0, 1):
            first, second = ranks[line], ranks[line + 2]
            us = SEND_US * (5 if slow_pair == line else 1)
            for _ in range(NUM_BATCHES):
                first.compute(FORWARD_US)
                first.event(
                    "cpu_op", "c10d::send", first.now, first.now + 50, **{"Concrete Inputs": ["", "", "1", "0"]}
                )
                posted = first.now
                second.event(
                    "cpu_op", "c10d::recv_", second.now, second.now + 20, **{"Concrete Inputs": ["", "", "0", "0"]}
                )
                came = max(posted, second.now) + us
                second.event("user_annotation", "gloo:recv", second.now + 20, came)
                second.now = came
                if late == second.rank:
                    second.now += 12_000
                second.compute(FORWARD_US)
                second.compute(2 * FORWARD_US, is_backward=True)
                second.event(
                    "cpu_op", "c10d::send", second.now, second.now + 50, **{"Concrete Inputs": ["", "", "0", "0"]}
                )
                second.event("user_annotation", "gloo:send", second.now + 50, second.now + 100)
                first.event(
                    "cpu_op", "c10d::recv_", first.now + 50, first.now + 70, **{"Concrete Inputs": ["", "", "1", "0"]}
                )
                back = second.now + SEND_US
                first.event("user_annotation", "gloo:send", posted + 50, back + 10)
                first.event("user_annotation", "gloo:recv", first.now + 70, back)
                first.now, second.now = back + 20, second.now + 120
                first.compute(2 * FORWARD_US, is_backward=True)
        end = max(rank.now for rank in ranks)
        for rank, begin in zip(ranks, begins, strict=True):
            start = rank.now
            rank.event(
                "cpu_op", "c10d::allreduce_", start, start + 40, **{"Concrete Inputs": ["", "", "", "", "False", "-1"]}
            )
            rank.event("user_annotation", "gloo:all_reduce", start + 10, end + 500, 9)
            rank.now = end + 600
            rank.event("user_annotation", f"ProfilerStep#{step}", begin, rank.now)
        took.append(end + 600 - max(begins))
    for rank in ranks:
        rank.write(folder, 4)
    return sum(took) / len(took) / 1e6


def test_stages_of_a_pipeline_are_matched_by_their_groups(tmp_path: Path) -> None:
    step_s = pipeline(tmp_path / "run", None, None)
    run = read_traces(tmp_path / "run")
    graph = run.graph
    assert run.limits == []
    pairs = {
        tuple(sorted(graph.members[one].rank for one in members)) for members in graph.exchanges if len(members) == 2
    }
    assert pairs == {(0, 2), (1, 3)}
    names = {
        graph.members[one].key[1].removesuffix(" first").split(" after ")[0]
        for members in graph.exchanges
        for one in members
    }
    assert names == {
        "send to a later rank", "recv from an earlier rank", "send to an earlier rank", "recv from a later rank",
        "all_reduce",
    }  # fmt: skip
    found = attribute(graph)
    assert found.measured_s == pytest.approx(step_s, rel=0.01)
    assert found.error == pytest.approx(0, abs=0.02)
    assert found.findings == ()
    # Each micro-batch is known by what is sent and received, and forward and backward by who runs them.
    assert (graph.stages, graph.replicas) == ((0, 0, 1, 1), (0, 1, 0, 1))
    tables = graph.tables
    for rank in range(4):
        for batch in range(2 * NUM_BATCHES):
            own = (tables.run_rank == rank) & (tables.run_step == 1) & (tables.run_batch == batch)
            assert float(tables.busy_s[own].sum()) * 1e6 == pytest.approx(FORWARD_US * (1 + batch % 2), rel=0.02)
    assert float(tables.busy_s[tables.run_batch < 0].sum()) < 0.02 * float(tables.busy_s.sum())


def test_a_late_rank_of_a_stage(tmp_path: Path) -> None:
    healthy_s = pipeline(tmp_path / "healthy", None, None)
    late_s = pipeline(tmp_path / "late", 3, None)
    (finding,) = attribute(read_traces(tmp_path / "late").graph).findings
    assert (finding.kind, finding.culprits.ranks, finding.when.when) == ("late rank", (3,), "always")
    assert finding.cost.seconds == pytest.approx(late_s - healthy_s, rel=0.05)


def test_a_slow_link_between_stages(tmp_path: Path) -> None:
    healthy_s = pipeline(tmp_path / "healthy", None, None)
    slow_s = pipeline(tmp_path / "slow", None, 1)
    (finding,) = attribute(read_traces(tmp_path / "slow").graph).findings
    assert finding.kind == "slow link"
    assert set(finding.culprits.ranks) <= {1, 3}
    assert finding.cost.seconds == pytest.approx(slow_s - healthy_s, rel=0.1)


def test_an_operator_that_waits_for_an_exchange_does_not_compute(tmp_path: Path) -> None:
    """A functional collective is waited for in the first operator that needs its rows, which holds wait_tensor."""
    for number in (0, 1):
        rank = Rank(number)
        for step in range(4):
            begin = rank.now
            own = 20_000.0 if number == 1 else 5000.0
            rank.compute(own)
            rank.event("cpu_op", "c10d::alltoall_base_", rank.now, rank.now + 50,
                       **{"Concrete Inputs": ["", "", "", "[4, 4]", "[4, 4]", "False", "-1"]})  # fmt: skip
            end = begin + 20_000 + 2000
            rank.event("user_annotation", "gloo:all_to_all", rank.now + 60, end, 9)
            rank.event("cpu_op", "_c10d_functional::wait_tensor", rank.now + 120, end + 10)
            rank.event("cpu_op", "aten::empty_like", rank.now + 100, end + 20)
            rank.now = end + 30
            rank.compute(1000)
            rank.event("user_annotation", f"ProfilerStep#{step}", begin, rank.now)
        rank.write(tmp_path / "run", 2)
    graph = read_traces(tmp_path / "run").graph
    busy = [sum(run.busy_s for run in graph.runs if run.rank == rank) / 4 for rank in (0, 1)]
    assert busy == pytest.approx([0.006, 0.021], rel=0.01)
    (finding,) = attribute(graph).findings
    assert (finding.kind, finding.culprits.ranks) == ("slow rank", (1,))
    assert finding.cost.seconds == pytest.approx(0.015, rel=0.03)
