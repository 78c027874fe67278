"""Two levels for traces: nodes are read, bounds hold what tokens do, and a gain is promised where it is sure."""

import json
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench.foreign_scenarios import Scenario
from bench.synthetic_traces import write_traces
from tritonmoe.tools.cli import main
from tritonmoe.tools.doctor.graph import Graph, Kind, Member, Run
from tritonmoe.tools.doctor.joining import slow_links
from tritonmoe.tools.doctor.kineto import host_in_name
from tritonmoe.tools.doctor.offers import layers_of, node_bytes, offers_of
from tritonmoe.tools.doctor.reading import read_traces
from tritonmoe.tools.doctor.trace import Part, RankTrace

ROW_BYTES, EXPERTS_OF_RANK, LATENCY_S, COMPUTE_S = 1000, 4, 1e-4, 0.01
FAR_BYTE_S, NEAR_BYTE_S = 1e-7, 5e-9
NUM_STEPS = 4


class Routing:
    """Tokens of every rank, and the experts that each was given by chance."""

    def __init__(self, num_nodes: int, node_size: int, tokens: int, chosen: int, seed: int) -> None:
        draw, self.node_size, self.size = random.Random(seed), node_size, num_nodes * node_size
        self.tokens, self.chosen = tokens, chosen
        weights = [draw.uniform(0.3, 1.7) for _ in range(self.size * EXPERTS_OF_RANK)]
        experts = torch.tensor(weights).expand(self.size * tokens, -1)
        generator = torch.Generator().manual_seed(seed)
        ids = torch.multinomial(experts, chosen, generator=generator).view(self.size, tokens, chosen)
        self.ranks = ids // EXPERTS_OF_RANK
        """(W, T, K): the rank of each pair's expert."""

    def pairs(self) -> Tensor:
        """Return (W, W) how many pairs of each rank go to each."""
        return torch.stack([of.flatten().bincount(minlength=self.size) for of in self.ranks]).double()

    def far_rows(self) -> Tensor:
        """Return (W, nodes) how many tokens need any rank of each other node."""
        nodes = self.ranks // self.node_size
        found = torch.zeros(self.size, self.size // self.node_size, dtype=torch.float64)
        for rank in range(self.size):
            for node in range(found.shape[1]):
                if node != rank // self.node_size:
                    found[rank, node] = int((nodes[rank] == node).any(1).sum())
        return found

    def far_ports(self) -> tuple[float, float]:
        """Return the rows of the busiest port between nodes, on one level and on two."""
        node = torch.arange(self.size) // self.node_size
        far = self.pairs() * (node[:, None] != node)
        rows = self.far_rows()
        came = rows.view(-1, self.node_size, rows.shape[1]).sum(0)
        return float(torch.maximum(far.sum(0), far.sum(1)).max()), float(max(rows.sum(1).max(), came.max()))

    def near_ports(self) -> tuple[float, float]:
        """Return the rows of the busiest port inside of nodes, on one level and on two."""
        node, place = torch.arange(self.size) // self.node_size, torch.arange(self.size) % self.node_size
        pairs = self.pairs()
        near = pairs * (node[:, None] == node)
        near.fill_diagonal_(0)
        then = torch.zeros_like(near)
        for sender in range(self.size):
            for target in range(self.size):
                via = int(node[target]) * self.node_size + int(place[sender])
                then[via, target] += pairs[sender, target] * (via != target)
        return tuple(float(torch.maximum(of.sum(0), of.sum(1)).max()) for of in (near, then))  # type: ignore[return-value]

    def seconds(self, near_byte_s: float = NEAR_BYTE_S) -> tuple[float, float]:
        """Return what an exchange takes on one level and on two."""
        (far, far_then), (near, near_then) = self.far_ports(), self.near_ports()
        one = LATENCY_S + ROW_BYTES * max(far * FAR_BYTE_S, near * near_byte_s)
        return one, 2 * LATENCY_S + ROW_BYTES * (far_then * FAR_BYTE_S + near_then * near_byte_s)


def graph_of(routing: Routing, near_byte_s: float = NEAR_BYTE_S, has_near: bool = True) -> Graph:
    """Return a graph of such a layer; has_near: ranks of a node sum something among themselves too."""
    size = routing.size
    graph = Graph(list(range(size)), list(range(NUM_STEPS)), [[] for _ in range(size)], begin_s=[0.0] * size)
    graph.hosts = tuple(f"host-{rank // routing.node_size}" for rank in range(size))
    graph.routed = ((routing.tokens, routing.chosen),) * size
    sent = (routing.pairs().fill_diagonal_(0) * ROW_BYTES).long()
    took_s, _ = routing.seconds(near_byte_s)

    def add(
        key: tuple, step: int, groups: list[list[int]], seconds: float, rows: Tensor | None, num_bytes: int
    ) -> None:
        for group in groups:
            members = []
            for rank in group:
                member = Member(rank, step, len(graph.exchanges), key, 0, 0.0, seconds, num_bytes=num_bytes)
                if rows is not None:
                    member.sent, member.received = tuple(rows[rank].tolist()), tuple(rows[:, rank].tolist())
                    member.row_bytes, member.element_bytes = ROW_BYTES, 1
                members.append(len(graph.members))
                graph.programs[rank] += [(Kind.POST, members[-1]), (Kind.WAIT, members[-1])]
                graph.members.append(member)
            graph.exchanges.append(members)

    every = [list(range(size))]
    nodes = [list(range(first, first + routing.node_size)) for first in range(0, size, routing.node_size)]
    summed, count = 1_000_000, routing.node_size
    for step in range(NUM_STEPS):
        if has_near:
            moved = 2 * (count - 1) / count * summed
            add(("forward", "all_reduce", 0), step, nodes, LATENCY_S + moved * near_byte_s, None, summed)
        add(("forward", "all_reduce", 1), step, every, LATENCY_S, None, 8)
        add(("forward", "all_to_all", 0), step, every, took_s, sent, 0)
        for rank in range(size):
            graph.runs.append(Run(rank, step, ("forward", "before", "all_to_all", 1), COMPUTE_S))
            graph.programs[rank].append((Kind.RUN, len(graph.runs) - 1))
        add(("forward", "all_to_all", 1), step, every, took_s, sent.T, 0)
        for rank in range(size):
            graph.programs[rank].append((Kind.STEP, step))
        graph.measured_s.append(2 * took_s + COMPUTE_S)
    return graph


@pytest.mark.parametrize(
    ("num_nodes", "node_size", "chosen"), [(2, 2, 1), (2, 2, 4), (2, 4, 8), (3, 2, 2), (4, 4, 8), (8, 2, 6)]
)
def test_bounds_hold_what_tokens_do(num_nodes: int, node_size: int, chosen: int) -> None:
    for seed in range(5):
        routing = Routing(num_nodes, node_size, 64, chosen, seed)
        graph = graph_of(routing)
        (layer, *_) = layers_of(graph)
        found = node_bytes(graph, layer)
        assert found is not None
        far, far_then = (ROW_BYTES * rows for rows in routing.far_ports())
        near, near_then = (ROW_BYTES * rows for rows in routing.near_ports())
        assert (found.far, found.near, found.near_then) == pytest.approx((far, near, near_then))
        assert found.far_then[0] <= far_then * (1 + 1e-9)
        assert far_then <= found.far_then[2] * (1 + 1e-9)
        assert found.far_then[1] == pytest.approx(far_then, rel=0.1)


@pytest.mark.parametrize(("num_nodes", "node_size", "chosen"), [(2, 2, 4), (2, 4, 8), (4, 4, 16)])
def test_gain_is_that_of_the_same_tokens_on_two_levels(num_nodes: int, node_size: int, chosen: int) -> None:
    routing = Routing(num_nodes, node_size, 64, chosen, 3)
    one_s, two_s = routing.seconds()
    (offer,) = [one for one in offers_of(graph_of(routing)) if "two levels" in one.words]
    gained_s = 2 * (one_s - two_s)
    assert offer.gain.low_s <= gained_s <= offer.gain.high_s
    assert offer.gain.seconds == pytest.approx(gained_s, rel=0.25)
    assert f"each of {num_nodes} hosts" in offer.words


@pytest.mark.thorough
@pytest.mark.parametrize("near_byte_s", [NEAR_BYTE_S, 4 * NEAR_BYTE_S])
@pytest.mark.parametrize(("num_nodes", "node_size", "chosen"), [(4, 2, 1), (2, 3, 2), (3, 2, 4), (2, 4, 6)])
def test_what_is_offered_is_gained(num_nodes: int, node_size: int, chosen: int, near_byte_s: float) -> None:
    """Also of one expert for each token, where a hot rank's rows come over all ports of its node on two levels."""
    for seed in range(3):
        routing = Routing(num_nodes, node_size, 64, chosen, seed)
        one_s, two_s = routing.seconds(near_byte_s)
        for offer in offers_of(graph_of(routing, near_byte_s)):
            if "two levels" in offer.words:
                assert 0 < offer.gain.low_s <= 2 * (one_s - two_s) <= offer.gain.high_s


def test_two_levels_are_offered_where_they_help_for_certain() -> None:
    def is_offered(graph: Graph) -> bool:
        return any("two levels" in one.words for one in offers_of(graph))

    routing = Routing(2, 4, 64, 8, 1)
    assert is_offered(graph_of(routing))
    assert not is_offered(graph_of(routing, has_near=False))  # inside, rows may take as long as between hosts
    assert not is_offered(graph_of(routing, near_byte_s=FAR_BYTE_S))
    one_host, no_tokens, wrong, unlike = (graph_of(routing) for _ in range(4))
    one_host.hosts = ("a",) * 8
    no_tokens.routed = ()
    wrong.routed = ((8, 2),) * 8  # of something else: ranks send more rows than that
    unlike.hosts = ("a", "b") * 4  # neighbours are no nodes
    assert not any(map(is_offered, (one_host, no_tokens, wrong, unlike)))


def test_hosts_in_names() -> None:
    name = "gpu-node-7_4242.1790857026000000000.pt.trace.json"
    assert host_in_name(name, {"4242"}) == host_in_name(f"{name}.gz", {"1", "4242"}) == "gpu-node-7"
    assert host_in_name(name, {"4243"}) == ""
    assert host_in_name("rank_3.1790857026000000000.pt.trace.json", {"4242"}) == ""
    assert host_in_name("rank-0003.trace.json.gz", {"3"}) == ""


def written(folder: Path, has_names: bool = False, has_router: bool = True, num_hosts: int = 2) -> Path:
    """Write traces of 4 ranks on so many hosts, which stand in the files or in their names."""
    write_traces(Scenario("", 5, num_steps=3), folder / "as they were")
    for rank in range(4):
        file = folder / "as they were" / f"rank{rank}.json"
        trace = json.loads(file.read_text())
        host = f"host-{rank * num_hosts // 4}"
        if has_router:
            first = next(one for one in trace["traceEvents"] if one["name"] == "aten::mm")
            arguments = {"Input Dims": [[256, 16], [], []], "Concrete Inputs": ["", "2", "-1"]}
            trace["traceEvents"].append({**first, "name": "aten::topk", "args": arguments})
        if not has_names:
            trace["host_name"] = host
        name = f"{host}_7.179085702600000000{rank}.pt.trace.json" if has_names else f"rank{rank}.json"
        (folder / name).write_text(json.dumps(trace))
        file.unlink()
    return folder


def test_nodes_of_files(tmp_path: Path) -> None:
    for number, has_names in enumerate((False, True)):
        run = read_traces(written(tmp_path / str(number), has_names=has_names))
        assert run.graph.hosts == ("host-0", "host-0", "host-1", "host-1")
        assert run.graph.routed == ((256, 2),) * 4
        (words,) = run.limits
        assert words.startswith("no exchange is of the ranks of one host alone")
    alone = read_traces(written(tmp_path / "alone", num_hosts=1, has_router=False))
    assert alone.limits == []  # on one host nobody asks for two levels
    untold = read_traces(written(tmp_path / "untold", has_router=False))
    assert "don't say how many tokens a rank has" in untold.limits[0]


def test_nodes_that_files_do_not_tell(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_traces(Scenario("", 5, num_steps=3), tmp_path)
    assert read_traces(tmp_path).graph.hosts == ()
    assert "--ranks-per-node COUNT says it" in read_traces(tmp_path).limits[0]
    assert read_traces(tmp_path, 2).graph.hosts == ("node 0", "node 0", "node 1", "node 1")
    main(["doctor", str(tmp_path)])
    assert "the files don't say which ranks share a host" in " ".join(capsys.readouterr().out.split())
    main(["doctor", str(tmp_path), "--ranks-per-node", "4"])
    assert "share a host" not in " ".join(capsys.readouterr().out.split())
    with pytest.raises(SystemExit):
        main(["doctor", str(tmp_path), "--ranks-per-node", "0"])
    trace = json.loads((tmp_path / "rank1.json").read_text())
    del trace["distributedInfo"]["rank"]
    (tmp_path / "rank1.json").write_text(json.dumps(trace))
    assert main(["doctor", str(tmp_path), "--ranks-per-node", "2"]) == 2
    assert "doesn't say which rank wrote it" in capsys.readouterr().err


def test_a_recording_has_its_hosts(capsys: pytest.CaptureFixture) -> None:
    recording = Path(__file__).parents[3] / "bench" / "results" / "recordings" / "slow_link"
    assert main(["doctor", str(recording), "--ranks-per-node", "2"]) == 2
    assert "is a recording, which has its ranks' hosts" in capsys.readouterr().err


def test_links_between_hosts_are_not_slow_for_that() -> None:
    def trace(rank: int, slow: tuple[int, int] | None) -> RankTrace:
        of = RankTrace(str(rank), rank, 6, "inspector", f"host-{rank // 3}", rank_in={"g": rank})
        of.groups["g"] = tuple(range(6))
        part = Part("all_to_all", 0.0, 0.0, 1.0, group="g")
        part.links = tuple(
            ("send", other, 1000, (1e-3 if other // 3 == rank // 3 else 1e-2) * (3 if (rank, other) == slow else 1))
            for other in range(6)
            if other != rank
        )
        of.parts = [part]
        return of

    hosts = tuple(f"host-{rank // 3}" for rank in range(6))
    assert slow_links([trace(rank, None) for rank in range(6)], hosts) is None
    inside = slow_links([trace(rank, (1, 0)) for rank in range(6)], hosts)
    assert inside is not None
    assert inside.links == ((1, 0),)  # though it is faster than any between hosts
    between = slow_links([trace(rank, (1, 4)) for rank in range(6)], hosts)
    assert between is not None
    assert between.links == ((1, 4),)
