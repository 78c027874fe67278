"""verdict: the one sentence at the end of a plan: take this because, or measure that first because."""

from collections.abc import Iterator

from tritonmoe.planner.comparison import Comparison
from tritonmoe.planner.job import Job
from tritonmoe.planner.job_memory import USABLE_MEMORY
from tritonmoe.planner.plan_search import search
from tritonmoe.planner.sensitivity import Sensitivity
from tritonmoe.planner.training_plan import Plan

__all__ = ["DECIDES", "compare_verdict", "not_measured", "nothing_fits", "plan_verdict", "why"]

DECIDES = 0.005
"""An estimate decides what is best if at an end of its interval the best choice now would take so much longer."""
SURE = 0.8
"""A choice that is the best in such a share of the draws is made."""
EXPLAINS = 0.05
"""A number decides if it explains at least such a share of how prices differ from draw to draw."""
MOST_NODES = 64


def why(one: Sensitivity) -> str:
    """Say what an estimate does."""
    if one.regret > DECIDES:
        return f"may make another choice better, by up to {one.regret:.1%}"
    return f"moves the time by {one.swing:.1%} and changes no choice"


def not_measured(job: Job) -> str | None:
    """Say what the times of a job leave out because nobody has measured it; None where that is nothing."""
    if job.packed_format is None:
        return None
    return (
        f"Not measured on a GPU: how long experts in {job.frozen} are decoded. Their products count as those of bf16 "
        "weights, so that steps take longer than this says; memory counts them packed."
    )


def plan_verdict(plan: Plan) -> str:
    """Return one sentence."""
    if not plan.best.fits:
        return nothing_fits(plan)
    best, stays = plan.best, f"stays the best in {plan.stays_best:.0%} of {len(plan.draws)} draws"
    low, high = best.step_interval_s
    first = plan.sensitivities[0]
    if plan.stays_best >= SURE or first.regret <= DECIDES:
        widest = max(plan.sensitivities, key=lambda one: one.swing)
        said = f"Take {best.choice}, because this choice {stays}"
        if widest.source == "assumed":
            said += (
                f". A step takes {low * 1e3:.0f} to {high * 1e3:.0f} ms; the interval is wide mostly because "
                f"{widest.key} is only assumed"
            )
        return said + "."
    return (
        f"Measure {first.key} first, because this number is {_known(first.source)} and {why(first)}. With today's "
        f"estimates the choice above {stays}."
    )


def _known(source: str) -> str:
    return {"assumed": "only assumed", "probe": "known only from a short probe"}.get(source, source)


def nothing_fits(plan: Plan) -> str:
    """Say what is needed, and what would help that wasn't tried yet."""
    best, cluster, job = plan.best, plan.cluster, plan.job
    choice, free = best.choice, plan.free
    usable = USABLE_MEMORY * cluster.gpu.memory_gb
    tried = [name for name, is_free in (("tp", free.tp), ("pp", free.pp), ("recomputation", free.recompute)) if is_free]
    said = (
        f"Nothing fits. A job can fill {usable:.1f} of a GPU's {cluster.gpu.memory_gb:g} GB ({USABLE_MEMORY:.0%}: the "
        f"allocator, the driver and NCCL need the rest), and this job needs at least {best.memory_gb:.0f} GB, with "
        f"{choice}{' (all values of ' + ', '.join(tried) + ' were tried)' if tried else ''}."
    )
    helps = list(_helps(plan, choice.recompute == "full" or free.recompute))
    nodes = _nodes_needed(plan)
    if nodes:
        helps.append(f"{nodes} nodes instead of {cluster.nodes} (--nodes {nodes})")
    return said + (f" Try {', or '.join(helps)}." if helps else f" {job.model.name} needs GPUs with more memory.")


def _helps(plan: Plan, is_recomputed: bool) -> Iterator[str]:
    job, free = plan.job, plan.free
    if not is_recomputed:
        yield "--recompute full"
    if not free.pp:
        yield f"more pipeline stages than {job.pp} (--pp; without --pp all numbers are tried)"
    if not free.tp:
        yield f"more tensor-parallel ranks than {job.tp} (--tp; without --tp all numbers are tried)"
    if job.micro_batch > 1:
        yield f"fewer than {job.micro_batch} sequences a micro-batch (--micro-batch)"


def _nodes_needed(plan: Plan) -> int | None:
    """Return the number of nodes, so many times as large, on which the job fits as far as it is free."""
    factor = 2
    while factor <= MOST_NODES:
        nodes = factor * plan.cluster.nodes
        try:
            if search(plan.job, plan.cluster.with_nodes(nodes), (), plan.free)[0].fits:
                return nodes
        except ValueError:
            pass
        factor *= 2
    return None


def compare_verdict(comparison: Comparison) -> str:
    """Return one sentence."""
    fits = comparison.fitting
    names = [plan.cluster.name for plan in comparison.plans]
    if not fits:
        return "Buy none of these clusters: the job fits on none of them."
    first = fits[0]
    if len(fits) == 1:
        return f"Buy {names[first]}, because the job fits on no other cluster."
    best, second = (comparison.plans[n].best for n in fits[:2])
    share = max(comparison.is_cheapest[n] or 0.0 for n in fits)
    chosen = max(fits, key=lambda n: comparison.is_cheapest[n] or 0.0)
    if share >= SURE:
        other = next(n for n in fits if n != chosen)
        mine, theirs = (comparison.plans[n].best.usd_per_million_tokens for n in (chosen, other))
        less = f"{1 - mine / theirs:.0%} less than on {names[other]}" if theirs > mine else "least"
        cheapest = f"it is the cheapest in {share:.0%} of the draws"
        return f"Buy {names[chosen]}, because a million tokens cost {less}, and {cheapest}."
    near = second.usd_per_million_tokens / best.usd_per_million_tokens - 1 if best.usd_per_million_tokens else 0.0
    cheaper = f"{near:.0%} cheaper than" if round(near, 2) else "as cheap as"
    said = (
        f"{names[first]} is {cheaper} {names[fits[1]]}, but the cheapest in only "
        f"{comparison.is_cheapest[first] or 0.0:.0%} of the draws"
    )
    number, key, explained = (*comparison.decides, (0, "", 0.0))[0]
    if explained < EXPLAINS:
        return f"Run the job on both clusters for some minutes first, because no single number decides: {said}."
    return (
        f"Measure {key} of {names[number]} first, because this number explains {explained:.0%} of the difference in "
        f"price: {said}."
    )
