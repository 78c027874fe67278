"""Two hosts in traces: clocks of their own, uplinks that their ranks share, and links that are slow between them."""

import gzip
import json
from pathlib import Path

import pytest
from step_graphs import Exchange, graph_of

from bench.faults import Fault
from bench.foreign_hosts import HOST_TRAINERS, move_clocks, of_hosts
from bench.foreign_scenarios import Scenario
from bench.synthetic_traces import write_traces
from tritonmoe.tools.doctor.attribution import attribute
from tritonmoe.tools.doctor.graph import Graph, Run
from tritonmoe.tools.doctor.matching import align_clocks
from tritonmoe.tools.doctor.reading import read_traces
from tritonmoe.tools.doctor.trace import Part, RankTrace

HOSTS = ("node-0", "node-0", "node-1", "node-1")
STEPS = 12


def on_two_hosts(folder: Path, apart_s: float, drift: float = 0.0) -> None:
    """Write traces of four ranks, those of the second host by a clock of its own."""
    write_traces(Scenario("", 4, faults=(Fault("late rank", (2,), 0.1),)), folder)
    for rank, host in enumerate(HOSTS):
        file = folder / f"rank{rank}.json"
        trace = json.loads(file.read_text()) | {"host_name": host}
        for event in trace["traceEvents"]:
            if host == "node-1" and "ts" in event:
                event["ts"] += apart_s * 1e6 + drift * event["ts"]
        file.write_text(json.dumps(trace))


@pytest.mark.thorough
@pytest.mark.parametrize(("apart_s", "drift"), [(2.5, 0.0), (-3.0, 3e-4), (0.0015, 0.0), (0.0, 1e-3)])
def test_clocks_of_hosts_are_put_on_one(apart_s: float, drift: float, tmp_path: Path) -> None:
    """Clocks that differ by less than 2 ms too: over an exchange of 1 ms that would be all there is."""
    on_two_hosts(tmp_path / "same", 0.0)
    on_two_hosts(tmp_path / "apart", apart_s, drift)
    same, apart = (read_traces(tmp_path / name) for name in ("same", "apart"))
    assert not any("clocks" in words for words in same.limits)
    assert any("clocks don't agree" in words for words in apart.limits)
    for one, other in zip(same.graph.members, apart.graph.members, strict=True):
        assert other.transfer_s == pytest.approx(one.transfer_s, abs=4e-4)
    expected, found = (attribute(run.graph).findings for run in (same, apart))
    assert [(one.kind, one.culprits.ranks) for one in found] == [("late rank", (2,))]
    assert found[0].cost.seconds == pytest.approx(expected[0].cost.seconds, rel=0.02)


def test_clocks_reach_each_other_through_others() -> None:
    """Ranks 0 and 1 meet, and 1 and 2; a rank that is always late tells nothing by when others come."""
    ahead_s = (0.0, 5.0, -2.0)
    traces = [RankTrace(f"rank {rank}", rank, 3, "cpu", host=f"host {rank}") for rank in range(3)]
    together = {}
    for count in range(20):
        for pair in ((0, 1), (1, 2)):
            end_s = count + 0.5 * pair[0]
            parts = []
            for rank in pair:
                start_s = end_s - (0.0002 if rank == 2 else 0.1)
                part = Part("all_reduce", start_s + ahead_s[rank], start_s + ahead_s[rank], end_s + ahead_s[rank])
                traces[rank].parts.append(part)
                parts.append((rank, part))
            together[len(together)] = parts
    limits: list[str] = []
    align_clocks(traces, [trace.host for trace in traces], together, limits)
    assert "by 5000.0 ms" in limits[0]
    for parts in together.values():
        ends = [part.end_s for _, part in parts]
        assert ends[0] == pytest.approx(ends[1], abs=1e-6)


def run_of(transfers_s: tuple[float, ...]) -> Graph:
    """Return steps of four exchanges, which take so long on each rank of two hosts, and vary by little."""

    def exchange(step: int, count: int) -> Exchange:
        def transfer_s(rank: int) -> float:
            return transfers_s[rank] + 1e-4 * ((step + rank + count) % 3)

        return ("forward", "all_to_all", count), lambda rank: Run(rank, step, ("work", count), 0.005), transfer_s

    graph = graph_of(len(HOSTS), STEPS, lambda step: [exchange(step, count) for count in range(4)])
    graph.hosts = HOSTS
    return graph


def test_who_of_a_host_gets_its_rows_first_is_no_fault() -> None:
    """They share an uplink: it has as much to do whoever comes first."""
    assert attribute(run_of((0.012, 0.020, 0.011, 0.020))).findings == ()
    graph = run_of((0.012, 0.020, 0.011, 0.020))
    graph.hosts = ()
    assert [one.kind for one in attribute(graph).findings] == ["slow link"]


@pytest.mark.parametrize(
    ("transfers_s", "ranks", "more_s"),
    [((0.012, 0.013, 0.040, 0.041), {2, 3}, 0.027), ((0.012, 0.012, 0.011, 0.040), {3}, 0.028)],
)
def test_a_slow_way_to_a_host_or_to_a_rank_of_it(
    transfers_s: tuple[float, ...], ranks: set[int], more_s: float
) -> None:
    (finding,) = attribute(run_of(transfers_s)).findings
    assert (finding.kind, set(finding.culprits.ranks)) == ("slow link", ranks)
    assert finding.cost.seconds == pytest.approx(4 * more_s, rel=0.05)


def test_scenarios_of_hosts_and_their_clocks(tmp_path: Path) -> None:
    drawn = of_hosts(HOST_TRAINERS, [3])
    assert [Scenario.of(json.loads(json.dumps(one.plain()))) for one in drawn] == drawn
    assert {one.num_hosts for one in drawn} == {2}
    on_two_hosts(tmp_path, 0.0)
    for rank in range(4):
        trace = (tmp_path / f"rank{rank}.json").read_bytes()
        (tmp_path / f"rank{rank}.trace.json.gz").write_bytes(gzip.compress(trace))
        (tmp_path / f"rank{rank}.json").unlink()
    apart_s, _ = move_clocks(tmp_path, 3)
    assert any(f"by {abs(1e3 * apart_s):.0f}" in words for words in read_traces(tmp_path).limits)
