"""estimate_bytes(): before any call, what ranks will hold for the loads that their experts are expected to have."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tritonmoe.config.overlap import OverlapConfig, OverlapPlan
from tritonmoe.dispatch.placement import ExpertPlacement
from tritonmoe.overlap.report import Keeps
from tritonmoe.overlap.simulation.cost_model import LayerWork
from tritonmoe.overlap.simulation.memory import BufferWidths, bytes_of_ranks
from tritonmoe.overlap.tuning.memory_budget import Parts, bytes_of_parts, choose_parts
from tritonmoe.overlap.tuning.search import budgeted_plan, fixed_plan

__all__ = ["Estimate", "estimate_bytes", "expert_loads"]

MOST_ODDS = 1e6
"""Of an expert that all tokens choose."""


@dataclass(frozen=True)
class Estimate:
    """What every rank holds, (W,) float64 bytes: the buffers of calls, without weights and the caller's tensors."""

    peak: Tensor
    """The most at any time, in the last layer's forward or backward."""
    kept: Tensor
    """What all layers keep for their backwards."""
    keeps: tuple[Keeps, ...]
    """Of every layer, what a call keeps, and ..."""
    parts: tuple[int, ...]
    """... the number of parts in which it runs, both as in LayerReport."""


def expert_loads(routing: str | Tensor | Sequence[float], placement: ExpertPlacement, top_k: int) -> Tensor:
    """Return (E,) float64: how many of a token's K experts each expert is, on average; their sum is K.

    Args:
        routing: "uniform"; "worst": all tokens choose experts of rank 0, and of others only if rank 0 has fewer than K;
            or the recorded number of pairs of each expert (E,).
    Raises:
        ValueError: routing is none of these, or fewer than K experts have pairs.
    Example:
        4 experts, K = 2, recorded [30, 10, 10, 10]: [1, 1/3, 1/3, 1/3].
    """
    num_experts = placement.num_experts
    if isinstance(routing, str):
        if routing not in ("uniform", "worst"):
            raise ValueError(
                f'routing is {routing!r}: give "uniform", "worst", or the number of pairs of each expert (E,)'
            )
        counts = torch.ones(num_experts, dtype=torch.float64, device="cpu")
        if routing == "worst":
            counts[list(placement.experts_of_rank[0])] *= MOST_ODDS
    else:
        counts = torch.as_tensor(routing, dtype=torch.float64, device="cpu")
    if counts.shape != (num_experts,) or not bool((counts >= 0).all() & counts.isfinite().all() & (counts.sum() > 0)):
        raise ValueError(
            f"routing must be one count of pairs for each of {num_experts} experts, none negative, not all zero; got "
            f"shape {tuple(counts.shape)} with sum {float(counts.sum())}"
        )
    num_chosen = int((counts > 0).sum())
    if num_chosen < top_k:
        raise ValueError(
            f"routing has pairs of {num_chosen} experts, and a token chooses {top_k} different ones: give the counts "
            "of more tokens"
        )
    loads = torch.zeros_like(counts)
    while (left := top_k - float(loads.sum())) > 1e-9 and bool((counts > 0).any()):
        loads += counts * left / counts.sum()
        full = loads >= 1  # a token chooses an expert once: the others get the rest
        loads[full] = 1.0
        counts = counts * ~full
    return loads


def estimate_bytes(
    routing: str | Tensor | Sequence[float],
    placement: ExpertPlacement,
    num_tokens: int,
    top_k: int,
    row_bytes: tuple[int, int, int],
    widths: BufferWidths,
    overlap: OverlapConfig | OverlapPlan,
    *,
    num_layers: int = 1,
    is_fused: bool = True,
) -> Estimate:
    """Return what every rank holds at most when so many equal layers run one after the other, and back.

    Args:
        routing: as in expert_loads(); the tokens of all ranks choose alike.
        num_tokens: T, of every rank.
        row_bytes: of one row as it travels to experts, of its gradient, and in the other exchanges.
        is_fused: whether a backward can compute h again.
    Raises:
        ValueError: routing is none, or the memory depends on what only a call knows.
    """
    for rule, is_so in (
        ("placements with replicas", placement.has_replicas),
        ("a capacity", overlap.capacity is not None),
        ("balance", overlap.balance is not None),
    ):
        if is_so:
            raise ValueError(f"the memory of calls with {rule} can't be estimated before a call: leave {rule} out")
    size = placement.size
    loads = expert_loads(routing, placement, top_k)
    work = _expected_work(loads, placement, num_tokens, top_k, row_bytes)
    busiest = max((loads[list(ids)] for ids in placement.experts_of_rank), key=lambda of: float(of.sum()))
    # Of that rank's pairs its busiest expert has as many as if there were so many experts, all alike.
    widths = replace(widths, num_local_experts=max(1, round(float(busiest.sum() / busiest.max()))))
    plan = _plan(overlap, size, work, widths)
    if isinstance(overlap, OverlapPlan) or overlap.memory_budget_bytes is None:
        found = bytes_of_ranks(plan, work, widths)
        most = torch.maximum(found.forward, found.backward)
        keeps: Keeps = "hidden" if widths.keeps_hidden else "rows"
        peak = (num_layers - 1) * found.kept + most
        return Estimate(peak, num_layers * found.kept, (keeps,) * num_layers, (1,) * num_layers)
    held = peak = torch.zeros(size, dtype=torch.float64, device="cpu")
    chosen: list[Parts] = []
    for _ in range(num_layers):
        of_ranks = [widths] * size
        parts = choose_parts(
            overlap.memory_budget_bytes, plan, work, of_ranks, held, can_be_cut=is_fused, can_drop_hidden=is_fused
        )
        most, kept = bytes_of_parts(parts, plan, work, of_ranks)
        peak, held = torch.maximum(peak, held + most), held + kept
        chosen.append(parts)
    return Estimate(peak, held, tuple(of.keeps for of in chosen), tuple(of.number for of in chosen))


def _plan(overlap: OverlapConfig | OverlapPlan, size: int, work: LayerWork, widths: BufferWidths) -> OverlapPlan:
    """Return the plan of a call; of num_chunks="auto" without a budget that which holds most, with one chunk."""
    if isinstance(overlap, OverlapPlan):
        return overlap
    if overlap.memory_budget_bytes is not None:
        return budgeted_plan(overlap, work, widths, [widths.working_set])[0]
    return fixed_plan(overlap, 1 if overlap.num_chunks == "auto" else overlap.num_chunks, size)


def _expected_work(
    loads: Tensor, placement: ExpertPlacement, num_tokens: int, top_k: int, row_bytes: tuple[int, int, int]
) -> LayerWork:
    """Return the mean rows and pairs of all ranks.

    A token's experts are drawn independently of each other, on the condition that they are K: with equal loads that is
    to draw without replacement. So the probability that a token needs no expert of a rank is a quotient of two sums,
    over all sets of K experts (without this rank's), of the products of their odds.
    """
    odds = (loads / (1 - loads)).clamp(max=MOST_ODDS).tolist()
    every = _sum_over_sets(odds, top_k)
    needed, pairs = [], []
    for ids in placement.experts_of_rank:
        here = set(ids)
        without = _sum_over_sets([of for expert, of in enumerate(odds) if expert not in here], top_k)
        needed.append(num_tokens * (1 - without / every))
        pairs.append(num_tokens * float(loads[list(ids)].sum()))
    size = placement.size
    rows, of_pairs = (torch.tensor([each] * size, dtype=torch.float64, device="cpu") for each in (needed, pairs))
    to_experts, gradients, sums = row_bytes
    return LayerWork(rows, of_pairs, to_experts, top_k, sums, gradient_row_bytes=gradients)


def _sum_over_sets(odds: Sequence[float], top_k: int) -> float:
    """Return the sum, over all sets of K numbers, of the product of the set.

    Example:
        [1, 2, 3] and K = 2: 1 * 2 + 1 * 3 + 2 * 3 = 11.
    """
    sums = [1.0] + [0.0] * top_k  # over the sets of 0, 1, ... K of the numbers so far
    for number in odds:
        for count in range(top_k, 0, -1):
            sums[count] += number * sums[count - 1]
    return sums[top_k]
