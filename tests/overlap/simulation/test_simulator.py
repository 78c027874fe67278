"""The simulator against schedules worked out by hand, in whole seconds; costs that are fitted and probed."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tritonmoe as tm
from tritonmoe.config.overlap import equal_sizes, ramp_sizes
from tritonmoe.overlap.schedule import build_backward, build_forward
from tritonmoe.overlap.simulation.cost_model import LayerWork, LinkCosts, StepCosts, fit_line
from tritonmoe.overlap.simulation.simulator import Simulation, simulate, simulate_layer

LINK = LinkCosts(latency_s=0.0, bytes_per_s=1.0)
"""A row of one byte takes a second."""
COSTS = StepCosts({}, {"experts": 1.0, "experts_backward": 1.0, "weight_grad": 1.0})
"""A pair takes a second."""


def work(size: int, rows: float, pairs_per_row: float = 1.0, local_rows: float | None = None) -> LayerWork:
    """Every rank sends `rows` rows of one byte to all others together; ids and weights weigh nothing."""
    traffic = torch.full((size, size), rows / max(1, size - 1))
    traffic.fill_diagonal_(rows if local_rows is None else local_rows)
    return LayerWork.of(traffic, pairs_per_row, row_bytes=1, top_k=0)


def forward_s(plan: tm.OverlapPlan, layer: LayerWork, link: LinkCosts = LINK, costs: StepCosts = COSTS) -> float:
    return simulate(build_forward(plan), plan, layer, costs, link).total_s


def remote(sizes: tuple[int, ...], **others: int) -> tm.OverlapPlan:
    return tm.OverlapPlan(sizes, local_start=16, **others)


@pytest.mark.parametrize("size", [2, 3, 64, 65, 100], ids="W{}".format)
@pytest.mark.parametrize(
    ("plan", "pairs_per_row", "expected"),
    [
        # 12 rows there, 12 rows back, no local rows.
        (remote((1,)), 3, 12 + 36 + 12),
        (remote((1, 1, 1)), 3, 4 + 36 + 4),  # compute is the longer side: only the ends show
        (remote((1, 1)), 0, 24),  # nothing to compute: the link is busy all the time
        (remote((1, 1, 1)), 1, 24),  # 4 4 4 there, the experts of each under the next, 4 4 4 back
        (remote((1, 1)), 1, 24 + 0),
        (remote((1,)), 1, 12 + 12 + 12),
        (remote((1, 2, 1)), 3, 3 + 36 + 3),  # a ramp shows less of its ends
        (remote((1, 1, 1), serial=True), 3, 12 + 36 + 12),
        # One dispatch under way: dispatch 1 goes out at 4, when 0 is there, and the experts hide it.
        (remote((1, 1, 1), window=1), 3, 4 + 36 + 4),
        # There 4, experts 4 with the next dispatch below, back behind it; combine 1 waits for combine 0 (12 to 16), ...
        (remote((1, 1, 1), window=1), 1, 4 + 4 + 4 + 4 + 4 + 4),
    ],
    ids=str,
)
def test_by_hand(plan: tm.OverlapPlan, pairs_per_row: float, expected: float, size: int) -> None:
    assert forward_s(plan, work(size, 12, pairs_per_row, local_rows=0)) == pytest.approx(expected)


def test_local_pairs_fill_both_ends() -> None:
    """12 rows there, 12 back, 12 s of experts for remote rows and 12 for local ones."""
    layer = work(2, 12)
    both = tm.OverlapPlan((1, 1))
    assert forward_s(both, layer) == 24  # the bound
    first = tm.OverlapPlan((1, 1), local_start=16)
    assert forward_s(first, layer) == 12 + 12 + 6
    last = tm.OverlapPlan((1, 1), local_start=0)
    assert forward_s(last, layer) == 6 + 12 + 12
    assert forward_s(tm.OverlapPlan((1, 1), local_first=False), layer) == 6 + 24 + 6
    assert forward_s(tm.OverlapPlan((1, 1), serial=True), layer) == 48


def test_the_bound_of_backward() -> None:
    """Weight gradients hide the last exchange: 4 + 12 + 12 with 12 s of data gradients, 12 of weight gradients."""
    plan = remote((1, 1, 1))
    layer = work(2, 12, local_rows=0)
    schedule = build_backward(plan, needs_x=True, needs_topk_weights=True)
    assert simulate(schedule, plan, layer, COSTS, LINK).total_s == 4 + 12 + 12
    forward, backward = simulate_layer(plan, layer, COSTS, LINK, backward=True)
    assert (forward.total_s, backward.total_s) == (24, 28)


def test_latency_counts_for_every_exchange_that_is_waited_for() -> None:
    link = LinkCosts(latency_s=2.0, bytes_per_s=1.0)
    layer = work(2, 12, 3, local_rows=0)
    assert forward_s(remote((1,)), layer, link) == (12 + 2) + 36 + (12 + 2)
    assert forward_s(remote((1, 1, 1)), layer, link) == (4 + 2) + 36 + (4 + 2)
    assert forward_s(remote((1, 1, 1), serial=True), layer, link) == 2 + 3 * (2 * 4 + 2 * 2) + 36


def test_posting_costs_the_compute_lane() -> None:
    costs = StepCosts({"dispatch": 1.0, "experts": 2.0, "reduce": 3.0}, {"experts": 1.0})
    # Two postings, the first rows after 1 + 6 s, experts 2 x (2 + 6), back 6, two sums of which one is hidden.
    assert forward_s(remote((1, 1)), work(2, 12, local_rows=0), LINK, costs) == 1 + 6 + 2 * 8 + 6 + 3


@pytest.mark.parametrize("is_shared", [False, True])
def test_compute_is_slower_beside_exchanges(is_shared: bool) -> None:
    link = LinkCosts(0.0, 1.0, is_shared, contention=0.5)
    layer = work(2, 12, 2, local_rows=0)
    # Dispatch 1 is under way until 12 s, beside experts 0 from 6 s on where exchanges take turns: they lose 3 of these
    # 6 s. Experts 1 lose 3 of the 6 s of combine 0.
    expected = 12 + 12 + (12 + 3) + 6 if is_shared else 6 + (12 + 3) + (12 + 3) + 6
    assert forward_s(remote((1, 1)), layer, link) == expected
    # Nothing is under way beside the experts of a single chunk.
    assert forward_s(remote((1,)), layer, link) == 12 + 24 + 12
    # Experts that are over before the rows beside them take twice as long.
    expected = 12 + 3 + 2 * 3 + 6 if is_shared else 6 + 2 * 3 + 2 * 3 + 6
    assert forward_s(remote((1, 1)), work(2, 12, 0.5, local_rows=0), link) == expected


def test_a_shared_link() -> None:
    """Two dispatches posted together arrive together; a window of one makes them take turns."""
    shared = LinkCosts(0.0, 1.0, is_shared=True)
    layer = work(2, 12, 1, local_rows=0)
    # Both there at 12; experts to 18; combine 0 alone until 24, combine 1 then.
    assert forward_s(remote((1, 1)), layer, shared) == 12 + 6 + 6 + 6
    assert forward_s(remote((1, 1), window=1), layer, shared) == 6 + 6 + 6 + 6 + 0
    # Unequal ones: 3 and 9. The small one is there at 6, the large one at 12. Experts 3 and 9 end at 9 and 21.
    # Combine 0 starts at 9 beside 3 s of dispatch 1's rest, both at half speed, to 15.
    assert forward_s(remote((1, 3)), layer, shared) == 15 + 9 + 9
    # One alone reaches half of the link: 24 s each.
    half = LinkCosts(0.0, 1.0, is_shared=True, alone_share=0.5)
    assert forward_s(remote((1,)), layer, half) == 24 + 12 + 24
    # Two together have all of it, and the second combine is alone for a while.
    assert forward_s(remote((1, 1)), layer, half) == 12 + 6 + 12 + 6


def test_two_levels() -> None:
    """Four ranks, two nodes: 1 row inside, 2 rows across a link that is ten times slower, at the same time."""
    layer = work(4, 3, 0)
    assert forward_s(tm.OverlapPlan(), layer, LinkCosts(0.0, 1.0, node_size=2, inter_bytes_per_s=0.1)) == 20 + 20
    assert forward_s(tm.OverlapPlan(), layer, LinkCosts(0.0, 1.0, node_size=2, inter_bytes_per_s=100)) == 1 + 1
    assert forward_s(tm.OverlapPlan(), layer, LinkCosts(0.0, 1.0, node_size=4, inter_bytes_per_s=0.1)) == 3 + 3


@pytest.mark.parametrize("size", [3, 70])
def test_the_busiest_port_holds_up_its_peers(size: int) -> None:
    rows = torch.zeros(size, size)
    rows[:, 1] = 5  # everybody sends 5 rows to rank 1
    layer = LayerWork.of(rows, 0.0, 1, 0)
    assert forward_s(tm.OverlapPlan(), layer) == 2 * 5 * (size - 1)


def test_only_dispatches_are_narrow_with_fp8() -> None:
    layer = replace(work(2, 12, 0, local_rows=0), other_row_bytes=4)
    assert forward_s(remote((1,)), layer) == 12 + 4 * 12
    backward = simulate_layer(remote((1,)), layer, COSTS, LINK, backward=True)[1]
    assert backward.total_s == 4 * 12 + 4 * 12


def test_one_rank_exchanges_nothing() -> None:
    layer = LayerWork.of(torch.tensor([[7.0]]), 2, 1, 0)
    assert forward_s(remote((1,)), layer) == 14


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(2, 5),
    num_chunks=st.integers(1, 6),
    local_start=st.integers(0, 16),
    window=st.integers(1, 6),
    pairs_per_row=st.sampled_from([0.0, 0.5, 1.0, 3.0]),
    is_ramp=st.booleans(),
    is_shared=st.booleans(),
    seed=st.integers(0, 5),
)
def test_bounds(size, num_chunks, local_start, window, pairs_per_row, is_ramp, is_shared, seed) -> None:
    """Never faster than compute or link allow, never slower than serial, and steps come after what they need."""
    rows = torch.randint(0, 9, (size, size), generator=torch.Generator().manual_seed(seed))
    layer = LayerWork.of(rows, pairs_per_row, 1, 0)
    sizes = (ramp_sizes if is_ramp else equal_sizes)(num_chunks)
    plan = tm.OverlapPlan(sizes, local_start=local_start, window=window, backward_window=window)
    link = LinkCosts(0.25, 1.0, is_shared=is_shared)
    out, into = layer.ports(link)
    serial_plan = tm.OverlapPlan(sizes, local_start=local_start, serial=True)
    passes = simulate_layer(plan, layer, COSTS, link, backward=True)
    serials = simulate_layer(serial_plan, layer, COSTS, link, backward=True)
    compute = layer.pairs.sum(0)
    for simulation, serial, factor in zip(passes, serials, (1, 2), strict=True):
        assert simulation.total_s >= float(compute.max()) * factor - 1e-9
        assert simulation.total_s >= 2 * float(torch.maximum(out, into).max()) - 1e-9
        if not is_shared:
            assert simulation.total_s <= serial.total_s + 1e-9
        check_order(simulation)


def check_order(simulation: Simulation) -> None:
    for step in simulation.steps:
        assert bool((step.end_s >= step.start_s).all()), step
        for earlier in step.step.after:
            needed = simulation.steps[earlier]
            if step.step.lane == "compute":
                assert bool((step.start_s >= needed.end_s - 1e-9).all()), (step, needed)


def test_many_ranks() -> None:
    rows = torch.randint(0, 20, (512, 512), generator=torch.Generator().manual_seed(0))
    layer = LayerWork.of(rows, 1.5, 1024, 8)
    for is_shared in (False, True):
        link = LinkCosts(1e-5, 1e9, is_shared, node_size=8, inter_bytes_per_s=1e8)
        simulation = simulate_layer(tm.OverlapPlan(ramp_sizes(8)), layer, COSTS, link, backward=False)[0]
        assert simulation.end_s.shape == (512,)
        assert simulation.total_s >= float(layer.pairs.sum(0).max())


def test_timeline() -> None:
    simulation = simulate_layer(remote((1, 1)), work(2, 2, local_rows=0), COSTS, LINK, backward=False)[0]
    lines = str(simulation).splitlines()
    assert lines[0] == "rank 0, 4000.000 ms"
    (dispatch,) = [line for line in lines if "dispatch 1" in line]
    assert dispatch.count("=") == 36
    assert "1000.000 .. 3000.000 ms" not in dispatch
    (experts,) = [line for line in lines if "experts 1" in line]
    assert experts.count("#") == 18
    assert experts.endswith("2000.000 .. 3000.000 ms")


def test_fit_line() -> None:
    assert fit_line([(0, 1), (2, 2), (4, 3)]) == pytest.approx((1, 0.5))
    assert fit_line([(1, 2), (3, 6)]) == pytest.approx((0, 2))
    assert fit_line([(2, 1), (4, 4)]) == pytest.approx((0, 18 / 20))  # a line through 0, not below it
    assert fit_line([(2, 3), (4, 1)]) == pytest.approx((2, 0))  # falling: noise
    assert fit_line([(2, 3)]) == pytest.approx((0, 1.5))
    assert fit_line([(0, 3), (0, 5)]) == pytest.approx((4, 0))


def test_costs_are_fitted_kind_by_kind() -> None:
    costs = StepCosts.fit([("experts", 1, 3), ("reduce", 5, 1), ("experts", 3, 7)])
    assert costs.seconds("experts", 10.0) == pytest.approx(1 + 2 * 10)
    assert costs.seconds("reduce", 10.0) == pytest.approx(2)
    assert costs.seconds("weight_grad", 10.0) == 0
    assert costs.seconds("experts", torch.tensor([0.0, 2.0])).tolist() == pytest.approx([0, 5])  # nothing costs nothing


def test_costs_join_measured_sizes() -> None:
    costs = StepCosts.through([("experts", 4, 4), ("experts", 2, 3), ("experts", 8, 12), ("experts", 8, 13)])
    units = [1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 16.0]
    expected = [2.5, 3, 3.5, 4, 8, 12, 28]
    assert [costs.seconds("experts", n) for n in units] == pytest.approx(expected)
    assert costs.seconds("experts", torch.tensor([0.0, *units])).tolist() == pytest.approx([0, *expected])
    # 4 at a time twice instead of 8, and 2 twice instead of 4.
    assert costs.of_one_more_chunk("experts", 8.0) == pytest.approx(4 + 4 - 12)
    assert costs.of_one_more_chunk("experts", 4.0) == pytest.approx(3 + 3 - 4)
    samples = [("reduce", 1, 5), ("reduce", 2, 4), ("reduce", 3, 9), ("group", 2, 3), ("dispatch", 0, 1)]
    noisy = StepCosts.through(samples)
    assert [noisy.seconds("reduce", n) for n in (1.0, 2.0, 3.0)] == pytest.approx([5, 5, 9])  # more never costs less
    assert noisy.seconds("group", 4.0) == pytest.approx(6)
    assert noisy.seconds("dispatch", 4.0) == 0
    # Sizes that differ by one token are one: the line through them would say that 10 pairs cost as much as 1000.
    alike = StepCosts.through(
        [("experts", 1000, 5.1), ("experts", 1001, 5.0), ("experts", 1002, 4.9), ("experts", 2002, 10)]
    )
    assert alike.seconds("experts", 10.0) == pytest.approx(10 * 5 / 1001)
    assert alike.seconds("experts", 1001.0) == pytest.approx(5)
    rising = StepCosts.through([("experts", 2, 1), ("experts", 4, 9)])
    assert [rising.seconds("experts", n) for n in (1.0, 2.0, 3.0)] == pytest.approx([0.5, 1, 5])  # not below zero


def test_a_chunk_costs_what_the_curve_says() -> None:
    """Experts that are slow at few pairs: 12 pairs take 12 s, 6 take 10; three chunks of 4 take 28 s."""
    curve = StepCosts.through([("experts", 4, 28 / 3), ("experts", 6, 10), ("experts", 12, 12)])
    layer = work(2, 12, 1, local_rows=0)
    assert forward_s(remote((1,)), layer, LINK, curve) == pytest.approx(12 + 12 + 12)
    assert forward_s(remote((1, 1, 1)), layer, LINK, curve) == pytest.approx(4 + 28 + 4)


@pytest.mark.parametrize(
    "wrong",
    [
        {"latency_s": -1.0},
        {"bytes_per_s": 0.0},
        {"alone_share": 0.0},
        {"node_size": 2},
        {"node_size": 0, "inter_bytes_per_s": 1.0},
        {"node_size": 2, "inter_bytes_per_s": 0.0},
    ],
    ids=str,
)
def test_links_that_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match=r"needed|belong together|must be positive"):
        LinkCosts(**({"latency_s": 0.0, "bytes_per_s": 1.0} | wrong))


@pytest.mark.parametrize(("window", "num_chunks"), list(itertools.product((1, 2, 8), (1, 3, 8))))
def test_chunks_share_the_work(window: int, num_chunks: int) -> None:
    """However it is cut, all rows and pairs are there."""
    layer = work(3, 10, 2, local_rows=4)
    for local_first in (True, False):
        plan = tm.OverlapPlan(ramp_sizes(num_chunks), local_first, 5, window)
        home, received, pairs = layer.segments(plan)
        assert len(home) == num_chunks + 2 * local_first
        assert torch.stack(home).sum(0).tolist() == pytest.approx([14.0] * 3)
        assert torch.stack(received).sum(0).tolist() == pytest.approx([14.0] * 3)
        assert torch.stack(pairs).sum(0).tolist() == pytest.approx([28.0] * 3)
