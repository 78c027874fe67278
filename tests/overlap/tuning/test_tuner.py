"""num_chunks="auto": the closed form, the search, the trials, and ranks that agree on all of it."""

from collections.abc import Callable, Collection
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

import tritonmoe as tm
from tritonmoe.config.overlap import FEW_CHUNKS, MAX_CHUNKS, NUM_CHUNKS, candidate_sizes, equal_sizes, ramp_sizes
from tritonmoe.expert_parallel.state import state_of
from tritonmoe.overlap.report import StepTiming
from tritonmoe.overlap.simulation.cost_model import LayerWork, LinkCosts, StepCosts
from tritonmoe.overlap.simulation.memory import BufferWidths, WorkingSet, peak_bytes
from tritonmoe.overlap.steps import Step, StepKind
from tritonmoe.overlap.tuning import tuner
from tritonmoe.overlap.tuning.measured_calls import layer_costs, link_costs, median_steps
from tritonmoe.overlap.tuning.search import (
    COMMUNICATION_BOUND_NUM_CHUNKS,
    budgeted_plan,
    closed_form_growth,
    closed_form_num_chunks,
    other_chunks_first,
    pack_plan,
    preferred,
    search,
    unpack_plan,
    with_chunk_costs,
)
from tritonmoe.overlap.tuning.tuner import (
    DETERMINISTIC_NUM_CHUNKS,
    DRIFT_CALLS,
    MAX_UNHEARD_CALLS,
    MEASURED_NUM_CHUNKS,
    NUM_VOTES,
    SETTLING_CALLS,
    TRIAL_ROUNDS,
    PlanChooser,
    TriedCall,
)
from tritonmoe.tools.benchmarks import auto, overlap
from tritonmoe.tools.planner.plan_search import OVERLAPS
from tritonmoe.transports import LocalTransport, Transport

AUTO = tm.OverlapConfig()
MEASURED_OF_TWO_EXPERTS = [*MEASURED_NUM_CHUNKS[:2], 1, 2]
"""Chunks of the first calls: of tokens, and of two local experts, of which there are no more chunks."""


@pytest.mark.parametrize(
    ("experts_s", "communication_s", "eps_s", "expected"),
    [
        (0.010, 0.008, 0.000150, 7),  # sqrt(53.3)
        (0.010, 0.008, 0.000500, 4),
        (0.100, 0.100, 0.004, 5),
        (0.010, 0.020, 0.000150, COMMUNICATION_BOUND_NUM_CHUNKS),
        (0.010, 0.0002, 0.000150, 1),  # less to hide than a chunk costs
        (0.0002, 0.010, 0.000150, 1),  # nothing to hide it behind
        (0.010, 0.0, 0.000150, 1),
        (0.0, 0.0, 0.0, 1),
        (1.0, 0.9, -1.0, 13),  # a negative eps is noise: 0.5 % of the experts' time counts
        (1.0, 0.9, 0.000001, 13),
        (0.010, 0.010, 0.0, 14),  # and never less than 50 us
    ],
)
def test_closed_form(experts_s: float, communication_s: float, eps_s: float, expected: int) -> None:
    assert closed_form_num_chunks(experts_s, communication_s, eps_s) == expected


def test_closed_form_of_a_ramp() -> None:
    assert [closed_form_growth(1.0, communication_s) for communication_s in (2.0, 0.5, 0.01, 0.0)] == [2, 4, 8, 8]


def test_no_number_of_chunks_is_far_from_one_that_is_tried() -> None:
    for best in range(1, NUM_CHUNKS[-1] + 1):  # of C * eps + B / C, where B = eps * best ** 2
        tried = min(count / best + best / count for count in NUM_CHUNKS) / 2
        assert tried <= 1.021


def test_planner_doctor_and_benchmarks_try_the_same_chunks() -> None:
    assert [plan.chunk_sizes for plan in OVERLAPS if not plan.serial] == list(candidate_sizes())
    assert {len(sizes) for sizes in candidate_sizes()} == set(FEW_CHUNKS) < set(NUM_CHUNKS)
    for parser in (auto.make_parser(), overlap.make_parser()):
        assert parser.parse_args(["--netns", "2"]).chunks == list(FEW_CHUNKS)
        assert f"(default {' '.join(map(str, FEW_CHUNKS))})" in parser.format_help()


def test_closed_form_stays_within_the_limit() -> None:
    for experts_s in (1e-6, 1e-3, 1.0, 1e3):
        for ratio in (0.0, 1e-3, 0.5, 1.0, 2.0, 1e3):
            for eps_s in (-1.0, 0.0, 1e-9, 1e-3, 10.0):
                assert 1 <= closed_form_num_chunks(experts_s, experts_s * ratio, eps_s) <= MAX_CHUNKS


class Pass:
    """A PassReport with chosen times: exchanges one after the other, then the experts."""

    is_over = True

    def __init__(self, num_chunks: int, experts_s: float, dispatch_s: float, total_s: float, chunk_s: float) -> None:
        self.total_s = total_s
        self.steps = []
        for n in range(num_chunks):
            first, last = (dispatch_s * part / num_chunks for part in (n, n + 1))
            self.steps.append(StepTiming(Step(StepKind.DISPATCH, n), 0.0, last, 0.0))
            self.steps.append(
                StepTiming(Step(StepKind.EXPERTS, n), first, first + experts_s / num_chunks + chunk_s, 0.0)
            )

    def lane_s(self, *kinds: str) -> float:
        return sum(t.end_s - t.start_s for t in self.steps if t.step.kind in kinds)


class Report:
    """A LayerReport of two ranks whose 1000 rows of 1 kB all travel, in equal chunks."""

    row_bytes, other_row_bytes, top_k, backward, choice = 1000, None, 1, None, ""
    gradient_row_bytes = None
    first_run: "Report | None" = None
    copies = None

    def __init__(
        self, plan: tm.OverlapPlan, experts_s: float, dispatch_s: float, total_s: float = 0.0, chunk_s: float = 0.0
    ) -> None:
        self.overlap, self.num_chunks = plan, plan.num_chunks
        self.traffic_rows = self.traffic_pairs = torch.tensor([[0, 1000], [1000, 0]])
        bounds = tuple(1000 * n // plan.num_chunks for n in range(plan.num_chunks + 1))
        self.send_offsets = self.return_offsets = self.pair_offsets = (0,) * plan.num_local_slices + bounds
        self.forward = Pass(plan.num_chunks, experts_s, dispatch_s, total_s, chunk_s)


def test_the_time_of_a_run_that_overflowed_counts() -> None:
    plan = tm.OverlapPlan()
    report = Report(plan, 1.0, 1.0, total_s=2.0)
    report.first_run = Report(replace(plan, capacity=1.0), 1.0, 1.0, total_s=1.5)
    assert TriedCall(0, 1000, report, has_backward=False).nanoseconds() == 3.5e9


def test_search_finds_what_hand_computed_cases_ask_for() -> None:
    rows = torch.tensor([[0, 100], [100, 0]])
    layer = LayerWork.of(rows, 1.0, 1, 0)
    experts = StepCosts({}, {"experts": 1.0})

    def found(costs: StepCosts, link: LinkCosts, config: tm.OverlapConfig = AUTO) -> list[tuple[float, tm.OverlapPlan]]:
        return search(config, layer, costs, link, backward=False)

    # A chunk costs as much as all there is to hide: one chunk.
    seconds, plan = found(StepCosts({"experts": 60.0}, {"experts": 1.0}), LinkCosts(0.0, 4.0))[0]
    assert (plan.num_chunks, seconds) == (1, 25 + 160 + 25)
    # Chunks are free and compute is the longer side: many chunks, and a ramp.
    seconds, plan = found(experts, LinkCosts(0.0, 4.0))[0]
    assert plan.chunk_sizes == ramp_sizes(16, 4)
    assert seconds == pytest.approx(100 + 50 / sum(ramp_sizes(16, 4)))
    # Every plan is there, the fastest first, and "equal" leaves out ramps.
    plans = found(experts, LinkCosts(0.0, 4.0), tm.OverlapConfig(shape="equal"))
    assert [s for s, _ in plans] == sorted(s for s, _ in plans)
    assert {len(set(plan.chunk_sizes)) for _, plan in plans} == {1}
    assert any(plan.num_chunks == 1 for _, plan in plans)
    # A link that is shared wants its dispatches to take turns.
    _, plan = found(experts, LinkCosts(0.0, 2.0, is_shared=True))[0]
    assert plan.window < plan.num_chunks


def test_local_pairs_are_split_as_the_ends_need() -> None:
    """Twice as many local pairs as hide both ends: half first is as fast as it gets."""
    layer = LayerWork.of(torch.full((2, 2), 100), 1.0, 1, 0)
    seconds, plan = search(AUTO, layer, StepCosts({}, {"experts": 1.0}), LinkCosts(0.0, 1.0), backward=False)[0]
    assert seconds == pytest.approx(200)
    assert 4 <= plan.local_start <= 12


def test_a_budget_leaves_out_plans() -> None:
    layer = LayerWork.of(torch.full((2, 2), 100), 1.0, 1, 0)
    costs, link = StepCosts({}, {"experts": 1.0}), LinkCosts(0.0, 1.0)
    found = search(AUTO, layer, costs, link, backward=True, fits=lambda plan: plan.num_chunks >= 6)
    assert min(plan.num_chunks for _, plan in found) == 6


@pytest.mark.parametrize("is_shared", [False, True])
def test_link_costs_of_measured_calls(is_shared: bool) -> None:
    """1000 rows of 1 kB in 2 s, or 1.5 s where two exchanges together are faster; the shortest time of two counts."""
    plans = [tm.OverlapPlan(equal_sizes(n), local_start=0) for n in (1, 2, 1, 2)]
    whole = 1.5 if is_shared else 2.0
    reports = [Report(plan, 1.0, s) for plan, s in zip(plans, (3.0, 2.5, 2.0, whole), strict=True)]
    link = link_costs(reports, is_shared)
    assert link.is_shared == is_shared
    assert link.alone_share == (0.75 if is_shared else 1.0)
    assert link.bytes_per_s == pytest.approx(1e6 / whole)
    assert link.latency_s == pytest.approx(0.0, abs=1e-9)


def test_a_chunk_that_was_measured_to_cost_nothing_costs_half_a_per_cent() -> None:
    costs = with_chunk_costs(StepCosts({"experts": 0.0, "dispatch": 0.0}, {"experts": 1e-3, "dispatch": 1e-6}), 1000.0)
    assert costs.fixed_s == {"experts": 0.005, "dispatch": 0.0}
    assert with_chunk_costs(StepCosts({"experts": 0.1}, {"experts": 1e-3}), 1000.0).fixed_s == {"experts": 0.1}
    few = with_chunk_costs(StepCosts({"experts_backward": 0.0}, {"experts_backward": 1e-9}), 1000.0)
    assert few.fixed_s == {"experts_backward": 50e-6}


def test_of_plans_predicted_alike_the_fewest_chunks_are_preferred() -> None:
    many, few, slow = (tm.OverlapPlan(equal_sizes(n)) for n in (16, 3, 2))
    found = [(1.0, many), (1.005, few), (1.1, slow)]
    assert [plan for _, plan in preferred(found)] == [few, many, slow]
    assert [plan for _, plan in preferred([(1.0, many), (1.02, few), (1.1, slow)])] == [many, few, slow]
    assert preferred([]) == []


def test_a_link_that_is_the_longer_side_gets_few_chunks() -> None:
    """From two chunks on all experts but the last chunk's are hidden: what more chunks gain is not measurable."""
    _, choosers = run_choosers(30, fewer_is_slower, experts_s=0.02, dispatch_s=1.0)
    assert max(plan.num_chunks for plan in choosers[0].candidates) <= 4


def test_other_chunks_are_tried_before_other_windows() -> None:
    two, three = tm.OverlapPlan(equal_sizes(2)), tm.OverlapPlan(equal_sizes(3))
    of_experts = tm.OverlapPlan(equal_sizes(2), chunk_by="experts")
    plans = [two, replace(two, window=1), three, of_experts, replace(three, window=2)]
    assert other_chunks_first(plans) == [two, three, of_experts, replace(two, window=1), replace(three, window=2)]
    assert other_chunks_first([]) == []


@pytest.mark.parametrize("order", [(1, 4), (4, 1)], ids=str)
def test_calls_of_different_sizes_are_different_points(order: tuple[int, int]) -> None:
    """A call with four times the rows takes four times as long; neither lends the other its rows."""
    plan = tm.OverlapPlan(local_start=0)
    reports = []
    for times in order:
        report = Report(plan, experts_s=0.1 * times, dispatch_s=0.2 * times)
        report.traffic_rows = report.traffic_pairs = times * report.traffic_rows
        report.send_offsets = report.return_offsets = report.pair_offsets = (0, 0, 0, 1000 * times)
        reports.append(report)
    costs, link = layer_costs(reports), link_costs(reports, is_shared=False)
    assert sorted(units for kind, units, _ in median_steps(reports) if kind == "experts") == [1000, 4000]
    assert costs.seconds("experts", 2000.0) == pytest.approx(0.2)
    assert link.bytes_per_s == pytest.approx(1e6 / 0.2)
    # Two exchanges together carry a byte in the time that one alone does.
    together = [reports[order.index(4)], Report(tm.OverlapPlan(equal_sizes(2), local_start=0), 0.1, 0.2)]
    assert link_costs(together, is_shared=True).alone_share == pytest.approx(1.0)


def test_plans_travel_as_one_integer() -> None:
    for sizes in (equal_sizes(1), equal_sizes(32), ramp_sizes(16), ramp_sizes(3, 8)):
        for local_start, window, backward_window in ((0, 1, 32), (16, 32, 1), (5, 3, 7)):
            for chunk_by in ("tokens", "experts"):
                plan = tm.OverlapPlan(sizes, False, local_start, window, backward_window, chunk_by=chunk_by)
                assert unpack_plan(pack_plan(plan), tm.OverlapConfig(local_first=False)) == plan
                assert 0 < pack_plan(plan) < 2**63


def run_choosers(
    num_calls: int,
    total_s,
    *,
    experts_s: float = 0.4,
    dispatch_s: float = 0.2,
    chunk_s: float = 0.0,
    num_ranks: int = 2,
    expert_chunk_s: float | None = None,
    config: tm.OverlapConfig = AUTO,
) -> tuple[list[tm.OverlapPlan], list[PlanChooser]]:
    """Run choosers of ranks that measure differently; total_s(call, rank, plan) is what each measures of a call.

    chunk_s: what a chunk costs on top; expert_chunk_s: a chunk of experts, None where there are none to choose.
    """
    widths = BufferWidths(hidden_size=8, intermediate_size=4, num_local_experts=8, dtype_bytes=4)
    choosers = [
        PlanChooser(config, num_ranks, widths=widths, can_cut_experts=expert_chunk_s is not None)
        for _ in range(num_ranks)
    ]
    chosen = []
    for call in range(num_calls):
        plans = [chooser.plan() for chooser in choosers]
        assert len(set(plans)) == 1, call
        messages = [chooser.message() for chooser in choosers]
        assert len({message.measured_call for message in messages}) == 1
        for rank, chooser in enumerate(choosers):
            slower = 1 + rank
            cost_s = chunk_s if plans[0].chunk_by == "tokens" else expert_chunk_s
            report = Report(plans[0], experts_s * slower, dispatch_s * slower, total_s(call, rank, plans[0]), cost_s)
            chooser.observe(messages, report, has_backward=False)
        chosen.append(plans[0])
    return chosen, choosers


def fewer_is_slower(call: int, rank: int, plan: tm.OverlapPlan) -> float:
    """Chunks pay: one takes 1 s, others less; rank 1 is the slower one of even calls."""
    return (1.0 if plan.num_chunks == 1 else 0.7) * (1.1 if rank == call % 2 else 1.0)


def test_ranks_that_measure_differently_agree_at_every_call() -> None:
    chosen, choosers = run_choosers(40, fewer_is_slower)
    assert [plan.num_chunks for plan in chosen[: len(MEASURED_NUM_CHUNKS)]] == list(MEASURED_NUM_CHUNKS)
    num_calls = SETTLING_CALLS - len(MEASURED_NUM_CHUNKS)  # there are no chunks of experts to measure
    tried = chosen[len(MEASURED_NUM_CHUNKS) + 1 : num_calls - 1]
    assert len(set(tried)) == 1 + NUM_VOTES
    for first in range(0, len(tried), 1 + NUM_VOTES):  # every plan once a round
        assert set(tried[first : first + 1 + NUM_VOTES]) == set(tried)
    # The order shifts, so that a stack of layers doesn't always try the same plan in the same layer.
    assert tried[:3] != tried[3:6]
    assert len(set(chosen[num_calls:])) == 1
    assert chosen[-1].num_chunks > 1
    for rank, chooser in enumerate(choosers):
        assert chooser.chosen == chosen[-1]
        assert f"30% faster than one chunk, median of 3 rounds (experts {400 * (1 + rank)}.00 ms" in chooser.choice


def test_the_fastest_measured_plan_is_chosen_whatever_was_predicted() -> None:
    chosen, _ = run_choosers(30, fewer_is_slower)
    second = sorted(set(chosen[len(MEASURED_NUM_CHUNKS) + 1 :]), key=pack_plan)
    for favourite in second:

        def total_s(call: int, rank: int, plan: tm.OverlapPlan, favourite=favourite) -> float:
            return 0.5 if plan == favourite else 1.0

        found, choosers = run_choosers(30, total_s)
        assert found[-1] == favourite
        assert ("faster than one chunk" in choosers[0].choice) == (favourite.num_chunks > 1)


@pytest.mark.parametrize(("seconds", "pays"), [(0.975, False), (0.95, True)])
def test_one_chunk_unless_others_gain_three_per_cent(seconds: float, pays: bool) -> None:
    chosen, choosers = run_choosers(30, lambda call, rank, plan: 1.0 if plan.num_chunks == 1 else seconds)
    assert (chosen[-1].num_chunks > 1) == pays
    assert ("gained less than 3%" in choosers[0].choice) != pays


def test_one_disturbed_round_does_not_decide() -> None:
    def total_s(call: int, rank: int, plan: tm.OverlapPlan) -> float:
        disturbed = len(MEASURED_NUM_CHUNKS) + 1 <= call <= len(MEASURED_NUM_CHUNKS) + 3
        return (1.0 if plan.num_chunks == 1 else 0.7) * (5.0 if disturbed and plan.num_chunks > 1 else 1.0)

    assert run_choosers(30, total_s)[0][-1].num_chunks > 1


def test_nothing_is_tried_where_every_other_plan_is_predicted_to_be_far_slower() -> None:
    chosen, choosers = run_choosers(12, lambda *_: 1.0, experts_s=1.0, dispatch_s=1e-4, chunk_s=0.5)
    assert {plan.num_chunks for plan in chosen} <= set(MEASURED_NUM_CHUNKS)
    assert choosers[0].chosen == chosen[-1]


def test_chunks_of_experts_are_measured_tried_and_chosen() -> None:
    """A chunk of tokens costs 30 ms, one of experts nothing; the best of tokens is tried all the same."""

    def chosen_with(tokens_s: float, experts_s: float) -> tuple[list[tm.OverlapPlan], list[PlanChooser]]:
        seconds = {"tokens": tokens_s, "experts": experts_s}
        return run_choosers(
            SETTLING_CALLS + 3,
            lambda call, rank, plan: 1.0 if plan.num_chunks == 1 else seconds[plan.chunk_by],
            chunk_s=0.03,
            expert_chunk_s=0.0,
        )

    chosen, choosers = chosen_with(0.9, 0.7)
    kinds = [(plan.chunk_by, plan.num_chunks) for plan in chosen[: 2 * len(MEASURED_NUM_CHUNKS)]]
    few, several, *_ = MEASURED_NUM_CHUNKS
    assert kinds == [("tokens", few), ("tokens", several), ("experts", few), ("experts", several)] * 2
    tried = choosers[0].candidates
    assert [plan.chunk_by for plan in tried] == ["tokens", "experts", "tokens"]
    assert all(first < last for first, last in pairwise(tried[1].bounds(8)))  # no chunk without an expert
    assert chosen[SETTLING_CALLS:] == [tried[1]] * 3
    assert "of experts" in choosers[0].choice
    # What is measured counts, not what was predicted.
    assert chosen_with(0.7, 0.9)[0][-1].chunk_by == "tokens"
    assert chosen_with(1.0, 1.0)[0][-1].num_chunks == 1


@pytest.mark.parametrize("chunk_by", ["tokens", "experts"])
def test_what_is_cut_may_be_given(chunk_by: str) -> None:
    config = tm.OverlapConfig(chunk_by=chunk_by)
    chosen, _ = run_choosers(SETTLING_CALLS + 3, fewer_is_slower, expert_chunk_s=0.0, config=config)
    assert {plan.chunk_by for plan in chosen} == {chunk_by}


@pytest.mark.thorough
def test_drift_starts_all_again_and_noise_does_not() -> None:
    def drifts_at_50(call: int, rank: int, plan: tm.OverlapPlan) -> float:
        return fewer_is_slower(call, rank, plan) * (1.3 if call >= 50 else 1.0)

    def noisy(call: int, rank: int, plan: tm.OverlapPlan) -> float:
        return fewer_is_slower(call, rank, plan) * (1.08 if call % 3 else 1.0)

    before = run_choosers(50, drifts_at_50)[1]
    assert before[0].num_searches == 1
    chosen, choosers = run_choosers(50 + 2 * DRIFT_CALLS + SETTLING_CALLS + 2, drifts_at_50)
    assert choosers[0].num_searches == 2
    assert [plan.num_chunks for plan in chosen[50:]].count(1) >= 2 + TRIAL_ROUNDS
    assert run_choosers(100, noisy)[1][0].num_searches == 1


def train(
    chooser: PlanChooser,
    num_steps: int,
    total_s: Callable[[int, tm.OverlapPlan], float],
    *,
    num_layers: int = 1,
    lost: Collection[int] = (),
    rows: Callable[[int], int] = lambda call: 1000,
) -> list[tm.OverlapPlan]:
    """Run steps of so many layers' forwards, then their backwards, on ranks that measure alike.

    Args:
        total_s: of a call and its plan, what it takes forward, and backward again.
        lost: steps that have no backward. rows: of a call, those of the busiest rank.
    """
    plans = []
    for step in range(num_steps):
        reports = []
        for _ in range(num_layers):
            plan, message, call = chooser.plan(), chooser.message(), len(plans)
            report = Report(plan, 0.4, 0.2, total_s(call, plan))
            report.traffic_rows = report.traffic_pairs = report.traffic_rows * rows(call) // 1000
            chooser.observe([message, message], report, has_backward=True)
            plans.append(plan)
            reports.append(report)
        for report in [] if step in lost else reports:
            report.backward = Pass(0, 0.0, 0.0, report.forward.total_s, 0.0)
    return plans


def chunks_pay(call: int, plan: tm.OverlapPlan) -> float:
    return 1.0 if plan.num_chunks == 1 else 0.7


def test_forwards_that_could_run_backward_and_never_do_are_compared_alone() -> None:
    """As in an evaluation that leaves gradients on. Once a backward comes, whole calls are measured from the start."""

    def total_s(call: int, plan: tm.OverlapPlan) -> float:
        return chunks_pay(call, plan)

    chooser = PlanChooser(AUTO, 2)
    train(chooser, 2 * MAX_UNHEARD_CALLS + 20, total_s, lost=range(1000))
    assert chooser.chosen is not None
    assert chooser.chosen.num_chunks > 1
    assert "30% faster than one chunk, median of 3 rounds of forwards, since no backward came" in chooser.choice
    plans = train(chooser, SETTLING_CALLS + 2, total_s)
    assert [plan.num_chunks for plan in plans[2:6]] == list(MEASURED_NUM_CHUNKS), (
        "after a call that nothing was known of"
    )
    assert "since no backward came" not in chooser.choice
    assert "median of 3 rounds (" in chooser.choice
    # An evaluation between steps of training changes nothing.
    plans = train(chooser, 3 * MAX_UNHEARD_CALLS, total_s, lost=range(1000))
    assert set(plans) == {chooser.chosen}


def test_calls_of_no_size_do_not_hold_up_the_choice() -> None:
    """Where no two calls can be compared nothing is known: one chunk, whose calls are watched from then on."""
    chooser = PlanChooser(AUTO, 2)

    def rows(call: int) -> int:
        return 1000 if call <= 5 else 10

    train(chooser, MAX_UNHEARD_CALLS + 30, chunks_pay, rows=rows)
    assert chooser.chosen == chooser.candidates[0]
    assert chooser.chosen.num_chunks == 1
    assert "too few whole calls" in chooser.choice
    assert chooser.trials.usual == (2e8, 10)
    train(chooser, DRIFT_CALLS, lambda call, plan: 10.0, rows=lambda call: 10)
    assert chooser.chosen is None, "it is ten times slower now"


@pytest.mark.thorough
@pytest.mark.parametrize("lost", [(), (1,), (10,), (12, 13)])
def test_a_backward_that_never_comes_loses_one_call(lost: tuple[int, ...]) -> None:
    """As of a step that is left out since its loss isn't finite; also once a plan is chosen."""
    chooser = PlanChooser(AUTO, 2)
    # One of the measured calls is waited for.
    train(chooser, SETTLING_CALLS + 3 * len(lost) + MAX_UNHEARD_CALLS * (1 in lost), chunks_pay, lost=lost)
    assert "median of 3 rounds" in chooser.choice
    slower = 2 * DRIFT_CALLS + SETTLING_CALLS + 4
    train(chooser, slower, lambda call, plan: 2 * chunks_pay(call, plan), lost=(3,))
    assert chooser.num_searches == 2


@pytest.mark.thorough
@pytest.mark.parametrize("num_layers", [12, 94])
def test_a_deep_model_compares_whole_calls(num_layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All layers run forward before any runs backward, and the search sees backwards too."""
    searched = []
    monkeypatch.setattr(
        tuner, "search", lambda *args, **given: searched.append(given["backward"]) or search(*args, **given)
    )
    chooser = PlanChooser(AUTO, 2)
    plans = train(chooser, 4, chunks_pay, num_layers=num_layers)
    assert searched == [True]
    assert "30% faster than one chunk, median of 3 rounds" in chooser.choice
    assert plans[-1].num_chunks > 1


def test_decoding_is_not_compared_with_prefill() -> None:
    """Its rows take a hundred times as long each: whichever plan it ran with would lose."""
    chooser = PlanChooser(AUTO, 2)

    def is_prefill(call: int) -> bool:
        return call < 9 or call % 10 == 0

    def total_s(call: int, plan: tm.OverlapPlan) -> float:
        return chunks_pay(call, plan) if is_prefill(call) else 0.1

    train(chooser, 120, total_s, rows=lambda call: 1000 if is_prefill(call) else 1)
    assert all(time < 3e6 for times in chooser.trials.times.values() for time in times)
    assert "30% faster than one chunk" in chooser.choice


def test_where_nothing_is_tried_calls_are_watched_too() -> None:
    chosen, choosers = run_choosers(40, fewer_is_slower, chunk_s=9.0)
    assert choosers[0].choice.endswith("in one chunk)")
    assert "predicted to be slower" in choosers[0].choice
    assert {plan.num_chunks for plan in chosen[6:]} == {1}

    def drifts_at_40(call: int, rank: int, plan: tm.OverlapPlan) -> float:
        return fewer_is_slower(call, rank, plan) * (10.0 if call >= 40 else 1.0)

    chosen, choosers = run_choosers(40 + 2 * DRIFT_CALLS + 2, drifts_at_40, chunk_s=9.0)
    assert {plan.num_chunks for plan in chosen[40:]} == set(MEASURED_NUM_CHUNKS), "it measures again"


def test_a_budget_gives_the_fewest_chunks() -> None:
    layer = LayerWork.of(torch.tensor([[0, 100], [100, 0]]), 1.0, 40, 1)
    widths = BufferWidths(hidden_size=10, intermediate_size=5, num_local_experts=1, dtype_bytes=4)
    least = tm.OverlapPlan(equal_sizes(32), window=1, backward_window=1)
    peaks = {}
    for num_chunks in range(1, MAX_CHUNKS + 1):
        plan = replace(least, chunk_sizes=equal_sizes(num_chunks), window=2, backward_window=2)
        peaks[num_chunks] = peak_bytes(plan, layer, widths).most
    assert list(peaks.values()) == sorted(peaks.values(), reverse=True)
    for num_chunks in (1, 3, 4, 5, 32):
        config = tm.OverlapConfig(memory_budget_bytes=peaks[num_chunks])
        plan, why = budgeted_plan(config, layer, widths, [WorkingSet()])
        assert (plan.num_chunks, plan.window) == (num_chunks, 2)
        assert why.endswith(f"the fewest chunks within memory_budget_bytes = {peaks[num_chunks]}")
        tighter, _ = budgeted_plan(
            tm.OverlapConfig(memory_budget_bytes=peaks[num_chunks] - 1), layer, widths, [WorkingSet()]
        )
        assert tighter.num_chunks > num_chunks or tighter == least
        assert budgeted_plan(config, None, widths, ())[0] == least
    plan, why = budgeted_plan(tm.OverlapConfig(memory_budget_bytes=1), layer, widths, [WorkingSet()])
    assert plan == least
    assert f"with {peak_bytes(least, layer, widths).most} bytes still more than memory_budget_bytes = 1" in why
    for wrong in ({"num_chunks": 2}, {"shape": "ramp"}, {"shape": (1, 2)}, {"wire_dtype": torch.bfloat16}):
        with pytest.raises(ValueError, match="chooses the number of chunks"):
            tm.OverlapConfig(memory_budget_bytes=10, **wrong)
    with pytest.raises(ValueError, match="positive number of bytes"):
        tm.OverlapConfig(memory_budget_bytes=0)


def test_a_budget_is_for_every_working_set() -> None:
    """Ranks with other threads, backends or measured tiles choose one plan: the one that fits on the most wasteful."""
    layer = LayerWork.of(torch.tensor([[0, 4000], [4000, 0]]), 1.0, 256, 1)
    widths = BufferWidths(hidden_size=64, intermediate_size=400, num_local_experts=2, dtype_bytes=4, save="input")
    blocks, kernels = WorkingSet(256, num_workers=1), WorkingSet(copies_rows=True)
    assert [WorkingSet.unpack(each.pack()) for each in (blocks, kernels)] == [blocks, kernels]
    config = tm.OverlapConfig(memory_budget_bytes=34_000_000)
    chosen = [budgeted_plan(config, layer, widths, sets)[0] for sets in ([blocks], [kernels], {blocks, kernels})]
    assert [plan.num_chunks for plan in chosen] == [1, 2, 2]


def test_a_given_number_is_used_as_it_is() -> None:
    """No chooser is asked, and none is made."""
    ramp = tm.OverlapConfig(num_chunks=5, shape="ramp")
    given = {
        equal_sizes(5): tm.OverlapConfig(num_chunks=5),
        (1, 2, 4, 2, 1): ramp,
        (3, 1): tm.OverlapConfig(shape=(3, 1)),
    }

    def on_rank(transport: Transport) -> None:
        experts = tm.GroupedExperts(tm.MoEConfig(8, 4, 4, 2), transport)
        for sizes, config in given.items():
            experts.overlap = config
            experts(*batch(transport.rank))
            assert experts.last_report.overlap.chunk_sizes == sizes
            assert experts.last_report.choice == "as configured"
        assert not state_of(transport).choosers

    for size in (1, 2):
        tm.run_on_emulated_ranks(on_rank, size, timeout_s=20)


def test_one_rank_has_nothing_to_hide() -> None:
    chooser = PlanChooser(AUTO, 1)
    assert chooser.plan() == tm.OverlapPlan((1,), local_start=16)
    assert chooser.choice == "one rank has no exchange to hide"
    assert PlanChooser(replace(AUTO, serial=True), 2).plan().num_chunks == 1


def batch(rank: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(10 * seed + rank)
    num_tokens = 20 + 3 * rank
    x = torch.randn(num_tokens, 8, generator=generator)
    return x, torch.randint(0, 4, (num_tokens, 2), generator=generator), torch.rand(num_tokens, 2, generator=generator)


def chunks_of_calls(num_calls: int, num_ranks: int = 2, link: tm.LinkModel | None = None) -> list[list[int]]:
    """Train a layer's experts and give the chunk numbers of every rank's calls."""
    config = tm.MoEConfig(8, 4, 4, 2)

    def on_rank(transport: Transport) -> list[int]:
        experts = tm.GroupedExperts(config, transport, generator=torch.Generator().manual_seed(0))
        counts = []
        for call in range(num_calls):
            experts(*batch(transport.rank, call)).sum().backward()
            counts.append(experts.last_report.num_chunks)
        return counts

    return tm.run_on_emulated_ranks(on_rank, num_ranks, timeout_s=20, link=link)


@pytest.mark.parametrize(
    "link", [None, tm.LinkModel(0.001), tm.LinkModel(None, latency_us=3000)], ids=["memory", "slow", "late"]
)
@pytest.mark.parametrize("num_ranks", [2, pytest.param(4, marks=pytest.mark.thorough)], ids="W{}".format)
def test_ranks_agree_and_settle(num_ranks: int, link: tm.LinkModel | None) -> None:
    chosen = chunks_of_calls(SETTLING_CALLS + 3, num_ranks, link)
    assert all(counts == chosen[0] for counts in chosen)
    measured = MEASURED_OF_TWO_EXPERTS if num_ranks == 2 else list(MEASURED_NUM_CHUNKS)  # one expert can't be cut
    assert chosen[0][: len(MEASURED_NUM_CHUNKS)] == measured
    assert len(set(chosen[0][SETTLING_CALLS:])) == 1
    assert 1 <= chosen[0][-1] <= MAX_CHUNKS


def test_deterministic_algorithms_fix_the_number() -> None:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert chunks_of_calls(4) == [[DETERMINISTIC_NUM_CHUNKS] * 4] * 2
    finally:
        torch.use_deterministic_algorithms(before)


@pytest.mark.thorough
def test_one_transport_settles_every_kind_of_call_by_itself() -> None:
    """Training and inference, and layers of other shapes, are measured apart; T does not matter."""

    def on_rank(transport: Transport) -> list[list[int]]:
        layers = [tm.GroupedExperts(tm.MoEConfig(8, inner, 4, 2), transport) for inner in (4, 6)]
        counts: list[list[int]] = [[], [], []]
        for call in range(SETTLING_CALLS + 2):
            for n, layer in enumerate(layers):
                layer(*batch(transport.rank, call)).sum().backward()
                counts[n].append(layer.last_report.num_chunks)
            with torch.no_grad():
                layers[0](*batch(transport.rank, call))
            counts[2].append(layers[0].last_report.num_chunks)
        return counts

    per_rank = tm.run_on_emulated_ranks(on_rank, 2, timeout_s=20)
    assert per_rank[0] == per_rank[1]
    for counts in per_rank[0]:
        assert counts[: len(MEASURED_NUM_CHUNKS)] == MEASURED_OF_TWO_EXPERTS
        assert len(set(counts[SETTLING_CALLS:])) == 1


@pytest.mark.thorough
def test_layers_of_one_shape_settle_together() -> None:
    """State belongs to the transport: the second layer of a stack measures nothing anew."""

    def on_rank(transport: Transport) -> list[int]:
        layers = [tm.GroupedExperts(tm.MoEConfig(8, 4, 4, 2), transport) for _ in range(SETTLING_CALLS + 2)]
        counts = []
        for layer in layers:
            layer(*batch(transport.rank)).sum().backward()
            counts.append(layer.last_report.num_chunks)
        return counts

    first, second = tm.run_on_emulated_ranks(on_rank, 2, timeout_s=20)
    assert first == second
    assert first[: len(MEASURED_NUM_CHUNKS)] == MEASURED_OF_TWO_EXPERTS
    assert len(set(first[SETTLING_CALLS:])) == 1


@pytest.mark.thorough
def test_a_stack_whose_backwards_come_last() -> None:
    """Four layers forward, then four backward: times arrive later, and the ranks still agree."""

    def on_rank(transport: Transport) -> list[tm.OverlapPlan]:
        layers = [tm.GroupedExperts(tm.MoEConfig(8, 4, 4, 2), transport) for _ in range(4)]
        plans = []
        for step in range(8):
            x, ids, weights = batch(transport.rank, step)
            for layer in layers:
                x = x + layer(x, ids, weights)
                plans.append(layer.last_report.overlap)
            x.sum().backward()
        return plans

    first, second = tm.run_on_emulated_ranks(on_rank, 2, timeout_s=20)
    assert first == second
    assert len(set(first[SETTLING_CALLS + 4 :])) == 1


def test_auto_on_a_local_transport() -> None:
    transport = LocalTransport()
    experts = tm.GroupedExperts(tm.MoEConfig(8, 4, 4, 2), transport)
    for call in range(6):
        experts(*batch(0, call)).sum().backward()
        assert experts.last_report.num_chunks == 1


def test_ranks_that_need_gradients_at_different_times() -> None:
    """Whether a rank itself needs a gradient may change from call to call, rank by rank."""

    def on_rank(transport: Transport) -> list[int]:
        experts = tm.GroupedExperts(tm.MoEConfig(8, 4, 4, 2), transport).requires_grad_(False)
        counts = []
        for call in range(SETTLING_CALLS + 1):
            x, ids, weights = batch(transport.rank, call)
            x.requires_grad_(transport.rank == 0 or call % 2 == 0)
            experts(x, ids, weights).sum().backward()
            counts.append(experts.last_report.num_chunks)
        return counts

    first, second = tm.run_on_emulated_ranks(on_rank, 2, timeout_s=20)
    assert first == second
