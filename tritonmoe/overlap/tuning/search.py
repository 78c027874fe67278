"""Plans for a call: where nothing is measured, within a memory budget, and the fastest ones that the simulator finds.

Let B be the time of a layer's exchanges, A that of its experts, and eps what one more chunk costs the experts. Where
compute is the longer side, C equal chunks take about A + C * eps + B / C, which is least at C = sqrt(B / eps). Where
the exchanges are the longer side, C = 3 is enough to hide the experts, and more chunks only add latency. Of chunks that
grow and then shrink, less of the first dispatch and of the last combine is exposed: each chunk may be 2 A / B times as
large as the one before, and still arrives while that one is computed. The search starts with these closed forms.
"""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import lru_cache

from tritonmoe.config.overlap import (
    LOCAL_PARTS,
    MAX_CHUNKS,
    NUM_CHUNKS,
    OverlapConfig,
    OverlapPlan,
    equal_sizes,
    ramp_sizes,
)
from tritonmoe.overlap.simulation.cost_model import LayerWork, LinkCosts, StepCosts
from tritonmoe.overlap.simulation.memory import BufferWidths, WorkingSet, peak_bytes
from tritonmoe.overlap.simulation.simulator import simulate_layer, simulate_two_batches
from tritonmoe.overlap.simulation.two_level_work import TwoLevelWork
from tritonmoe.overlap.steps import StepKind

__all__ = [
    "budgeted_plan",
    "closed_form_growth",
    "closed_form_num_chunks",
    "fixed_plan",
    "half_plan",
    "other_chunks_first",
    "pack_plan",
    "plan_of",
    "preferred",
    "search",
    "takes_chunks_of_experts",
    "unpack_plan",
    "with_chunk_costs",
]

COMMUNICATION_BOUND_NUM_CHUNKS = 3
MOST_GROWTH = 8
SMALLEST_EPS_S = 50e-6
SMALLEST_EPS_SHARE = 0.005
"""Of the time of all experts: a chunk that was measured to cost less was measured in noise."""
SEARCHED_LOCAL_STARTS = (4, 12, LOCAL_PARTS)
SEARCHED_WINDOWS = (2, 3)
ALIKE = 0.01
"""Plans whose predicted time is within this share of the fastest one's count as equally fast. Of those, plans with
fewer chunks are tried first: they have fewer exchanges, of whose small costs predictions know little."""
BUDGETED_WINDOW = 2
WALKED_LAYERS = 4
"""So many layers are walked to see what two halves of a batch take: the ends of the stack show."""


def _smallest_eps_s(experts_s: float) -> float:
    return max(SMALLEST_EPS_S, SMALLEST_EPS_SHARE * experts_s)


def with_chunk_costs(costs: StepCosts, num_pairs: float) -> StepCosts:
    """Return measured costs in which one more chunk of experts costs no less than the closed form takes it to.

    What it costs is the small difference of two measured times. Where noise leaves nothing of it, chunks would be free,
    and the search would find the plans with most of them.

    Args:
        num_pairs: those of all experts of the busiest rank.
    """
    fixed_s = dict(costs.fixed_s)
    for kind in (StepKind.EXPERTS, StepKind.EXPERTS_BACKWARD):
        if kind in fixed_s:
            fixed_s[kind] = max(fixed_s[kind], _smallest_eps_s(costs.seconds(kind, num_pairs)))
    return replace(costs, fixed_s=fixed_s)


def closed_form_num_chunks(experts_s: float, communication_s: float, eps_s: float) -> int:
    """Return the number of equal chunks that the model above predicts to be fastest, 1 where overlap can't pay.

    Args:
        experts_s: A, seconds of all experts in one chunk. communication_s: B, seconds of dispatch and combine.
        eps_s: seconds that one more chunk adds to A.
    Example:
        closed_form_num_chunks(0.010, 0.008, 0.000150) gives 7.
    """
    eps_s = max(eps_s, _smallest_eps_s(experts_s))
    if communication_s <= 2 * eps_s or experts_s <= 2 * eps_s:
        return 1
    if communication_s > experts_s:
        return COMMUNICATION_BOUND_NUM_CHUNKS
    return max(1, min(MAX_CHUNKS, round(math.sqrt(communication_s / eps_s))))


def closed_form_growth(experts_s: float, communication_s: float) -> int:
    """Return how many times as large as the one before a chunk may be, to arrive while that one is computed.

    It is 2 A / B, at least 2 and at most MOST_GROWTH.

    Example:
        closed_form_growth(0.010, 0.005) gives 4.
    """
    return round(max(2.0, min(MOST_GROWTH, 2 * experts_s / communication_s))) if communication_s else MOST_GROWTH


@lru_cache(maxsize=256)
def fixed_plan(config: OverlapConfig, num_chunks: int, size: int) -> OverlapPlan:
    """Return the plan of so many chunks where nothing is measured: half of the local pairs at either end."""
    if isinstance(config.shape, tuple):
        sizes = config.shape
    else:
        sizes = (ramp_sizes if config.shape == "ramp" else equal_sizes)(num_chunks)
    local_start = LOCAL_PARTS if size == 1 else LOCAL_PARTS // 2
    return plan_of(config, sizes, local_start=local_start, serial=config.serial)


def half_plan(overlap: OverlapConfig, size: int) -> OverlapPlan:
    """Return the plan of half a batch under num_chunks="auto".

    Its products are small already: so there is one chunk, which on several ranks has the rows that stay as well.
    """
    return fixed_plan(replace(overlap, local_first=size == 1 and overlap.local_first), 1, size)


def plan_of(config: OverlapConfig, chunk_sizes: tuple[int, ...], **others: int) -> OverlapPlan:
    """Return a plan with what the configuration leaves no choice about."""
    chunk_by = "experts" if config.chunk_by == "experts" else "tokens"
    return OverlapPlan(chunk_sizes, config.local_first, chunk_by=chunk_by, **others)  # type: ignore[arg-type]


def takes_chunks_of_experts(config: OverlapConfig) -> bool:
    """Return whether chunk_by may be "experts"; it may not with a capacity or a memory budget, say."""
    try:
        replace(config, chunk_by="experts")
    except ValueError:
        return False
    return True


def budgeted_plan(
    config: OverlapConfig, work: LayerWork | None, widths: BufferWidths, working_sets: Collection[WorkingSet]
) -> tuple[OverlapPlan, str]:
    """Return the fewest equal chunks with which a call's peak_bytes fit into config.memory_budget_bytes, and say why.

    Args:
        work: what the call before sent and computed; None before the first call. Without it, and where no plan fits,
            the result is the plan that takes least memory.
        working_sets: those of all ranks. The plan fits with each of them on every rank, so that all ranks choose the
            same one.
    Raises:
        ValueError: config has no budget.
    """
    budget = config.memory_budget_bytes
    if budget is None:
        raise ValueError(
            "memory_budget_bytes is None, so there is no budget to fit a plan into: give "
            "OverlapConfig(memory_budget_bytes=...)"
        )
    least = plan_of(config, equal_sizes(MAX_CHUNKS), window=1, backward_window=1, serial=config.serial)
    if work is None:
        return least, f"{least}: takes least, until a call has shown how many rows there are"

    def most(plan: OverlapPlan) -> int:
        return max(peak_bytes(plan, work, replace(widths, working_set=each)).most for each in working_sets)

    chunks = range(1, MAX_CHUNKS + 1)
    windowed = replace(least, window=BUDGETED_WINDOW, backward_window=BUDGETED_WINDOW)
    plans = [replace(windowed, chunk_sizes=equal_sizes(num_chunks)) for num_chunks in chunks]
    why = f"the fewest chunks within memory_budget_bytes = {budget}"
    if most(plans[0]) <= budget:  # asked first: a plan takes as long to predict as it has chunks
        return plans[0], f"{plans[0]}: {why}"
    peak = most(least)
    if peak > budget:
        return least, f"{least}: takes least, and with {peak} bytes still more than memory_budget_bytes = {budget}"
    found = next((plan for plan in plans[1:] if most(plan) <= budget), least)
    return found, f"{found}: {why}"


def search(
    config: OverlapConfig,
    work: LayerWork | TwoLevelWork,
    costs: StepCosts,
    link: LinkCosts,
    *,
    backward: bool,
    fits: Callable[[OverlapPlan], bool] = lambda plan: True,
    beside_s: tuple[float, float] | None = None,
) -> list[tuple[float, OverlapPlan]]:
    """Return pairs of predicted seconds and plan, the fastest first.

    Numbers and shapes of chunks are searched first; for the two best of them the share of local pairs that runs first,
    and for the two best of all these the windows.

    Args:
        backward: whether the backward counts too. fits: says whether a plan may be used.
        beside_s: to search for two halves of a batch at once: the seconds that the rest of the model takes with one
            half beside each layer, forward and backward. `work` is one half's then, and what is predicted is the time
            of both halves, the rest of the model included, of one layer of a stack.
    """
    predicted: dict[OverlapPlan, float] = {}

    def seconds(plan: OverlapPlan) -> float:
        if plan not in predicted:
            if beside_s is None:
                passes, num_layers = simulate_layer(plan, work, costs, link, backward=backward), 1
            else:
                rest_s, num_layers = beside_s if backward else beside_s[:1], WALKED_LAYERS
                passes = simulate_two_batches(plan, work, costs, link, rest_s, num_layers)
            predicted[plan] = sum(simulation.total_s for simulation in passes) / num_layers
        return predicted[plan]

    def best(count: int) -> list[OverlapPlan]:
        return sorted(predicted, key=seconds)[:count]

    def tries(plan: OverlapPlan) -> None:
        if fits(plan):
            seconds(plan)

    seed, growth = _closed_form(config, work, costs, link)
    growths = {"equal": [1], "ramp": [2]}.get(str(config.shape), [1, 2, growth])
    for num_chunks in sorted({seed, *NUM_CHUNKS}):
        for growth in growths:
            tries(plan_of(config, ramp_sizes(num_chunks, growth)))
    if config.local_first:
        for plan in best(2):
            for local_start in SEARCHED_LOCAL_STARTS:
                tries(replace(plan, local_start=local_start))
    for plan in best(2):
        for window in SEARCHED_WINDOWS:
            if window < plan.num_chunks:
                tries(replace(plan, window=window))
                if backward:
                    tries(replace(plan, backward_window=window))
                    tries(replace(plan, window=window, backward_window=window))
    return [(seconds(plan), plan) for plan in best(len(predicted))]


def _closed_form(
    config: OverlapConfig, work: LayerWork | TwoLevelWork, costs: StepCosts, link: LinkCosts
) -> tuple[int, int]:
    """Return the number of chunks, and how much each is larger than the one before, that the closed forms give."""
    one = simulate_layer(plan_of(config, (1,)), work, costs, link, backward=False)[0]
    experts_s = one.lane_s(StepKind.EXPERTS)
    communication_s = one.lane_s(StepKind.DISPATCH, StepKind.COMBINE)
    outer = work.outer if isinstance(work, TwoLevelWork) else work
    eps_s = costs.of_one_more_chunk(StepKind.EXPERTS, float(outer.pairs.sum(0).max()))
    seed = closed_form_num_chunks(experts_s, communication_s, eps_s)
    # The inner level of two has the local slices as chunks too.
    return min(seed, MAX_CHUNKS - 2), closed_form_growth(experts_s, communication_s)


def preferred(found: Sequence[tuple[float, OverlapPlan]]) -> list[tuple[float, OverlapPlan]]:
    """Sort predicted seconds and plans: the fastest and those ALIKE by number of chunks, the others by seconds.

    Example:
        (1.000, 16 chunks), (1.005, 3 chunks) and (1.1, 2 chunks) give the order 3, 16, 2.
    """
    limit_s = (1 + ALIKE) * min((seconds for seconds, _ in found), default=0.0)

    def key(seconds_and_plan: tuple[float, OverlapPlan]) -> tuple[float, int, float]:
        seconds, plan = seconds_and_plan
        return (0.0, plan.num_chunks, seconds) if seconds <= limit_s else (seconds, 0, seconds)

    return sorted(found, key=key)


def pack_plan(plan: OverlapPlan) -> int:
    """Return one positive integer for a plan that the search found, by which ranks name the plan to each other."""
    growth = plan.chunk_sizes[1] if plan.num_chunks > 2 else 1
    assert plan.chunk_sizes == ramp_sizes(plan.num_chunks, growth), "unpack_plan() would make other chunks of it"
    value = plan.num_chunks
    for part in (growth, int(plan.chunk_by == "experts"), plan.local_start, plan.window, plan.backward_window):
        value = value * 64 + part
    return value


def unpack_plan(value: int, config: OverlapConfig) -> OverlapPlan:
    """Return the plan that pack_plan() packed; what the configuration leaves no choice about comes from `config`."""
    parts = []
    for _ in range(5):
        value, part = divmod(value, 64)
        parts.append(part)
    backward_window, window, local_start, is_of_experts, growth = parts
    config = replace(config, chunk_by="experts" if is_of_experts else "tokens")
    return plan_of(
        config, ramp_sizes(value, growth), local_start=local_start, window=window, backward_window=backward_window
    )


def other_chunks_first(plans: Sequence[OverlapPlan]) -> list[OverlapPlan]:
    """Move the first plan of each choice of chunks before all others, which keep their order.

    Plans with the same chunks and other windows take about as long, so trying two of them tells little.
    """
    firsts = {(plan.chunk_by, plan.chunk_sizes): plan for plan in reversed(plans)}
    return sorted(plans, key=lambda plan: firsts[plan.chunk_by, plan.chunk_sizes] != plan)  # which keeps their order
