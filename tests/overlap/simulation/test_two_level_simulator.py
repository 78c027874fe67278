"""The simulator on two levels: by hand, the very steps and rows of a call, and how long one takes on emulated links."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import tritonmoe as tm
from tritonmoe.config.overlap import ramp_sizes
from tritonmoe.overlap.report import LayerReport, PassReport
from tritonmoe.overlap.simulation.cost_model import LayerWork, LinkCosts, StepCosts
from tritonmoe.overlap.simulation.simulator import Simulation, simulate_layer
from tritonmoe.overlap.simulation.two_level_work import TwoLevelWork
from tritonmoe.transports import EmulatedWorld, LinkModel, PendingExchange, Transport, TwoLevelTransport
from tritonmoe.transports.two_level_transport import GroupView

CONFIG = tm.MoEConfig(hidden_size=64, intermediate_size=8, num_experts=8, top_k=4)
SIZE, NODE_SIZE, NUM_TOKENS = 4, 2, 512
ROW_BYTES = 4 * CONFIG.hidden_size
FREE = LinkCosts(0.0, float("inf"))


def work_by_hand(size: int) -> TwoLevelWork:
    """Nodes of 2; 6 tokens of each rank need both ranks of the next node, 2 the other rank of its own."""
    rows, rows_to_nodes = torch.zeros(size, size), torch.zeros(size, size // 2)
    for rank in range(size):
        node = rank // 2
        following = (node + 1) % (size // 2)
        rows[rank, [2 * following, 2 * following + 1]] = 6
        rows[rank, rank ^ 1] = 2
        rows_to_nodes[rank, following], rows_to_nodes[rank, node] = 6, 2
    one_level = LayerWork.of(rows, 1.0, row_bytes=1, top_k=0)
    return TwoLevelWork.of(one_level, rows_to_nodes, LinkCosts(0.0, 2.0))


@pytest.mark.parametrize("size", [4, 6, 72], ids="W{}".format)
def test_by_hand(size: int) -> None:
    """A row takes 1 s between nodes, half a second inside, a pair 1 s."""
    costs = StepCosts({}, {"experts": 1.0, "experts_backward": 1.0, "weight_grad": 1.0})
    plan = tm.OverlapPlan((1,), local_start=16)
    forward, backward = simulate_layer(plan, work_by_hand(size), costs, LinkCosts(0.0, 1.0), backward=True)
    times = {str(s.step): (float(s.start_s[0]), float(s.end_s[0])) for s in forward.steps}
    # Own node: 2 rows there, 2 pairs, 2 rows back. From outside: 6 relayed rows, 6 of them for the other rank of the
    # node, 12 pairs that come over both relays, 6 rows back.
    assert times["dispatch 0"] == (0, 6)
    assert times["experts local"] == (0, 1 + 2 + 1)
    assert times["experts 0"] == (6, 6 + 3 + 12 + 3)
    assert times["combine 0"] == (24, 24 + 6)
    assert forward.total_s == 30
    (relayed,) = [s.inside for s in forward.steps if str(s.step) == "experts 0"]
    assert [(str(s.step), float(s.end_s[0])) for s in relayed] == [
        ("node_dispatch 0", 9),
        ("experts 0", 21),
        ("node_combine 0", 24),
        ("node_reduce 0", 24),
    ]
    assert backward.total_s == 24 + 14  # the weight gradients of 14 pairs hide the last exchange
    together = replace(plan, local_first=False)
    assert simulate_layer(together, work_by_hand(size), costs, LinkCosts(0.0, 1.0), backward=False)[0].total_s == (
        6 + (2 + 6) / 2 + 14 + (2 + 6) / 2 + 6
    )


def test_costs_of_steps_between_nodes_hold_inside() -> None:
    costs = StepCosts({"dispatch": 1.0, "combine": 10.0, "reduce": 100.0}, {})
    plan = tm.OverlapPlan((1,), local_first=False)
    (forward,) = simulate_layer(plan, work_by_hand(4), costs, FREE, backward=False)
    # Packed and summed once between nodes and once inside, beside 4 s there and 4 s back inside.
    assert forward.total_s == 2 * (1 + 10 + 100) + 4 + 4


def test_rows_that_contradict_each_other() -> None:
    work = LayerWork.of(torch.ones(4, 4), 1.0, 1, 0)
    for wrong in (torch.full((4, 2), 3.0), torch.full((4, 2), 0.5), torch.ones(4, 3)):
        with pytest.raises(ValueError, match=r"rows_to_nodes .* must be"):
            TwoLevelWork.of(work, wrong, FREE)


class Counting(GroupView):
    """Counts the rows of a layer that leave this rank in `sent`."""

    def __init__(self, world: Transport, ranks: range) -> None:
        super().__init__(world, ranks)
        self.sent = 0

    def exchange(self, rows: Tensor, input_splits, output_splits, out: Tensor | None = None) -> PendingExchange:
        if rows.shape[1] == CONFIG.hidden_size:
            self.sent += sum(input_splits) - input_splits[self.rank]
        return super().exchange(rows, input_splits, output_splits, out)


def batch(rank: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    weights, ids = torch.rand(NUM_TOKENS, 8, generator=generator).topk(4)
    return torch.randn(NUM_TOKENS, CONFIG.hidden_size, generator=generator), ids, weights


def work_of_batches(link: LinkCosts) -> TwoLevelWork:
    """Count what test batches need, token by token."""
    rows, pairs, to_nodes = (torch.zeros(SIZE, n) for n in (SIZE, SIZE, SIZE // NODE_SIZE))
    for rank in range(SIZE):
        for token in (batch(rank)[1] // 2).tolist():  # ranks of its experts
            for owner in token:
                pairs[rank, owner] += 1
            for owner in set(token):
                rows[rank, owner] += 1
            for node in {owner // NODE_SIZE for owner in token}:
                to_nodes[rank, node] += 1
    one_level = LayerWork(rows.double(), pairs.double(), ROW_BYTES, CONFIG.top_k)
    return TwoLevelWork.of(one_level, to_nodes, link)


PLANS = {
    "one chunk": tm.OverlapPlan((1,)),
    "ramp": tm.OverlapPlan(ramp_sizes(4), local_start=5, window=2),
    "all local rows first": tm.OverlapPlan((1, 1), local_start=16),
    "all rows travel": tm.OverlapPlan((1, 1, 1), local_first=False),
    "serial": tm.OverlapPlan((1, 1), serial=True),
}


@pytest.mark.thorough
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_the_simulated_steps_are_those_of_the_call(plan: tm.OverlapPlan) -> None:
    def on_rank(world: Transport) -> tuple[LayerReport, int, int]:
        place, node = world.rank % NODE_SIZE, world.rank // NODE_SIZE
        views = (
            Counting(world, range(place, SIZE, NODE_SIZE)),
            Counting(world, range(node * NODE_SIZE, (node + 1) * NODE_SIZE)),
        )
        transport = TwoLevelTransport(world, NODE_SIZE, between_nodes=views[0], inside_node=views[1])
        experts = tm.GroupedExperts(CONFIG, transport, plan)
        x, ids, weights = batch(world.rank)
        y = experts(x.requires_grad_(), ids, weights.requires_grad_())
        sent = [view.sent for view in views]
        y.sum().backward()
        return experts.last_report, *sent

    work = work_of_batches(FREE)
    passes = simulate_layer(plan, work, StepCosts({}, {}), FREE, backward=True)
    for rank, (report, outside, inside) in enumerate(tm.run_on_emulated_ranks(on_rank, SIZE)):
        for executed, simulation in zip((report.forward, report.backward), passes, strict=True):
            check_steps(executed, simulation)
        # Dispatch and combine of every row that does not stay where it is.
        assert (outside, inside) == tuple(
            int(sum(of.sum(d)[rank] - of[rank, rank] for d in (0, 1)))
            for of in (work.outer.rows, work.own.rows + work.relayed.rows)
        )
        last = report.pair_offsets[-1]
        assert last == int(work.outer.pairs.sum(0)[rank]) == int((work.own.pairs + work.relayed.pairs).sum(0)[rank])


def check_steps(executed: PassReport | None, simulation: Simulation) -> None:
    assert executed is not None
    assert [timing.step for timing in executed.steps] == [simulated.step for simulated in simulation.steps]
    inside = [(str(step), [timing.step for timing in report.steps]) for step, report in executed.inside]
    assert inside == [(str(s.step), [t.step for t in s.inside]) for s in simulation.steps if s.inside]
    assert len(inside) > 1


def test_a_call_takes_as_long_as_it_is_simulated() -> None:
    """Both links emulated, each on ports of its own; what is computed takes no time beside them."""
    outer, inner = LinkModel(0.0032, latency_us=1000), LinkModel(0.0016, latency_us=500)
    plan = tm.OverlapPlan((1, 1), local_start=16)

    def link_costs(link: LinkModel) -> LinkCosts:
        assert link.bandwidth_gb_per_s is not None
        return LinkCosts(link.latency_us * 1e-6, link.bandwidth_gb_per_s * 1e9)

    between = [EmulatedWorld(SIZE // NODE_SIZE, link=outer) for _ in range(NODE_SIZE)]
    inside = [EmulatedWorld(NODE_SIZE, link=inner) for _ in range(SIZE // NODE_SIZE)]

    def on_rank(world: Transport) -> list[tuple[float, float]]:
        node, place = divmod(world.rank, NODE_SIZE)
        transport = TwoLevelTransport(
            world,
            NODE_SIZE,
            between_nodes=between[place].transports[node],
            inside_node=inside[node].transports[place],
        )
        experts = tm.GroupedExperts(CONFIG, transport, plan)
        times = []
        for _ in range(3):
            x, ids, weights = batch(world.rank)
            y = experts(x.requires_grad_(), ids, weights.requires_grad_())
            world.exchange_counts(torch.zeros(SIZE, 1, dtype=torch.int64))
            y.sum().backward()
            report = experts.last_report
            times.append((report.forward.total_s, report.backward.total_s))
        return times

    try:
        measured = torch.tensor(tm.run_on_emulated_ranks(on_rank, SIZE)).amax(0).amin(0)
    finally:
        for group in (*between, *inside):
            group.close()
    work = work_of_batches(link_costs(inner))
    passes = simulate_layer(plan, work, StepCosts({}, {}), link_costs(outer), backward=True)
    without = simulate_layer(plan, replace(work, link=FREE), StepCosts({}, {}), link_costs(outer), backward=True)
    for seconds, simulation, other in zip(measured.tolist(), passes, without, strict=True):
        assert 0.9 * simulation.total_s < seconds < 1.5 * simulation.total_s
        assert other.total_s < 0.6 * seconds
