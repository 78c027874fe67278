"""Votes: plans packed as integers, by which ranks that choose a plan tell each other which ones they would try."""

from collections.abc import Sequence
from dataclasses import replace

from tritonmoe.config.overlap import OverlapConfig, OverlapPlan, ramp_sizes
from tritonmoe.overlap.tuning.search import plan_of

__all__ = ["other_chunks_first", "pack", "unpack"]


def pack(plan: OverlapPlan) -> int:
    """Return a plan that the search found as one positive integer, which unpack() reads."""
    growth = plan.chunk_sizes[1] if plan.num_chunks > 2 else 1
    assert plan.chunk_sizes == ramp_sizes(plan.num_chunks, growth), "unpack() would make other chunks of it"
    value = plan.num_chunks
    for part in (growth, int(plan.chunk_by == "experts"), plan.local_start, plan.window, plan.backward_window):
        value = value * 64 + part
    return value


def unpack(value: int, config: OverlapConfig) -> OverlapPlan:
    """Return the plan that pack() packed; what the configuration leaves no choice about comes from `config`."""
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
