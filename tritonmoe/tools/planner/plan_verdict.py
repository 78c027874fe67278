"""verdict: the one sentence at the end of a plan: take this, by so much, as sure as that; and why before it."""

from collections.abc import Iterable, Iterator, Sequence

from tritonmoe.runtime.files import Json
from tritonmoe.tools.planner.comparison import Comparison
from tritonmoe.tools.planner.job import Job
from tritonmoe.tools.planner.job_memory import USABLE_MEMORY
from tritonmoe.tools.planner.plan_search import ways
from tritonmoe.tools.planner.sensitivity import Sensitivity
from tritonmoe.tools.planner.step import HOST
from tritonmoe.tools.planner.training_plan import Plan, Prediction

__all__ = [
    "DECIDES",
    "compare_notes",
    "compare_verdict",
    "comparison_as_json",
    "nothing_fits",
    "plan_as_json",
    "plan_notes",
    "plan_verdict",
    "why",
]

DECIDES = 0.005
"""An estimate decides what is best if at an end of its interval the best choice now would take so much longer."""
SURE = 0.8
"""A choice that is the best in such a share of the draws is made."""
EXPLAINS = 0.05
"""A number decides if it explains at least such a share of how prices differ from draw to draw."""
MOST_NODES = 64
LITTLE_GAINED = 0.8
"""Overlap that shortens a step by a smaller part of what it hides is explained."""


def why(one: Sensitivity) -> str:
    """Say what an estimate does."""
    if one.regret > DECIDES:
        return f"may make another choice better, by up to {one.regret:.1%}"
    return f"moves the time by {one.swing:.1%} and changes no choice"


def _not_measured(job: Job) -> str | None:
    """Say what the times of a job leave out because nobody has measured it; None where that is nothing."""
    if job.packed_format is None:
        return None
    return (
        f"Not measured on a GPU: how long experts in {job.frozen} are decoded. Their products count as those of bf16 "
        "weights, so that steps take longer than this says; memory counts them packed."
    )


def plan_notes(plan: Plan) -> list[str]:
    """Return what a plan's numbers rest on and what they leave out, a sentence or two each."""
    return [note for note in (_not_measured(plan.job), _hiding(plan.best), _between_nodes([plan])) if note]


def _hiding(best: Prediction) -> str | None:
    """Say why overlap shortens a step by less than it hides; None where it doesn't."""
    hidden_s, gained_s = best.exchange_s - best.time.exposed_s, best.serial_s - best.time.step_s
    if not best.fits or hidden_s < DECIDES * best.time.step_s or gained_s >= LITTLE_GAINED * hidden_s:
        return None
    waits = " Where a layer waits for its host, nothing is gained." if best.time.parts.get(HOST) else ""
    return (
        f"Overlap hides {1e3 * hidden_s:.0f} ms of exchanges, but makes a step only {1e3 * gained_s:.0f} ms shorter: "
        "experts compute in parts then, of which each reads the weights again, and more slowly while rows travel."
        f"{waits}"
    )


def compare_notes(comparison: Comparison) -> list[str]:
    """Return the same of a comparison, with the prices that it assumes."""
    plans = comparison.plans
    notes = _not_measured(plans[0].job), _between_nodes(plans), _prices(plans)
    return [note for note in notes if note]


def plan_as_json(plan: Plan) -> Json:
    """Return everything that --json and the page have, with the sentences that the terminal prints."""
    return {**plan.to_json(), "notes": plan_notes(plan), "verdict": plan_verdict(plan)}


def comparison_as_json(comparison: Comparison) -> Json:
    """Return the same of a comparison."""
    sentences = {"notes": compare_notes(comparison), "verdict": compare_verdict(comparison)}
    return {**comparison.to_json(), **sentences}


def _between_nodes(plans: Sequence[Plan]) -> str | None:
    """Return whether rows of experts cross nodes, and what a faster network could save; None where nothing fits."""
    fits = [one for one in plans if one.best.fits and one.cluster.nodes > 1]
    if not fits:
        return None
    inside = [one for one in fits if one.best.choice.ep <= one.best.choice.gpus_per_node]
    crossing = [one for one in fits if one not in inside]
    where = []
    for group, words in ((inside, "stay inside a node"), (crossing, "cross nodes")):
        if group:
            on = f" on {_listed(one.cluster.name for one in group)}" if len(plans) > 1 else ""
            degrees = sorted({(one.best.choice.ep, one.best.choice.gpus_per_node) for one in group})
            said = _listed(f"ep={ep} with {gpus} GPUs a node" for ep, gpus in degrees)
            where.append(f"{words}{on} ({said})")
    shares = _listed(
        f"{one.best.between_nodes_s / one.best.time.step_s:.0%}" + (f" on {one.cluster.name}" if len(plans) > 1 else "")
        for one in fits
    )
    carried = "gradients, weights and the rows of pipeline stages"
    only = f"The network between nodes then carries only {carried}: " if not crossing else ""
    saves = (
        "even a network between nodes that took no time would shorten a step of the best choice's layout by no more "
        "than"
    )
    return (
        f"Exchanges of rows {', and '.join(where)}. {only}{saves if only else saves[0].upper() + saves[1:]} {shares}."
    )


def _prices(plans: Sequence[Plan]) -> str:
    """Say which price of a GPU-hour each cluster has, and which have the same one."""
    names: dict[float, list[str]] = {}
    for one in plans:
        names.setdefault(one.cluster.usd_per_gpu_hour, []).append(one.cluster.name)
    said = "; ".join(
        f"{_listed(of)} {'cost the same,' if len(of) > 1 else 'costs'} {usd:g} $ a GPU-hour"
        for usd, of in names.items()
    )
    return f"Prices are taken as the clusters have them (those of presets are assumed): {said}."


def _listed(words: Iterable[str]) -> str:
    *others, last = words
    return f"{', '.join(others)} and {last}" if others else last


def plan_verdict(plan: Plan) -> str:
    """Return one sentence: what to take, how much that gains, whether that is sure, and on which number it depends."""
    if not plan.best.fits:
        return nothing_fits(plan)
    best, *others = (one for one in plan.predictions if one.fits)
    is_sure = plan.stays_best >= SURE
    gains = "no other choice fits"
    if others:
        faster = 1 - best.time.step_s / best.time.tokens * others[0].time.tokens / others[0].time.step_s
        gains = (
            f"it is {faster:.1%} faster than the next choice ({others[0].choice}), which is "
            f"{'more than' if is_sure else 'within'} the uncertainty (it stays the best in {plan.stays_best:.0%} of "
            f"{len(plan.draws)} draws)"
        )
    first = plan.sensitivities[0]
    if not is_sure and first.regret > DECIDES:
        return (
            f"Take {best.choice}: {gains}; measure {first.key} first, which is {_known(first.source)} and {why(first)}."
        )
    low, high = best.step_interval_s
    widest = max(plan.sensitivities, key=lambda one: one.swing)
    return (
        f"Take {best.choice}: {gains}; how long a step takes, {low * 1e3:.0f} to {high * 1e3:.0f} ms, depends most on "
        f"{widest.key}, which is {_known(widest.source)}."
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
            if any(way.fits for way in ways(plan.job, plan.cluster.with_nodes(nodes), (), plan.free)):
                return nodes
        except ValueError:
            pass
        factor *= 2
    return None


def compare_verdict(comparison: Comparison) -> str:
    """Return one sentence: what to buy, how much that saves, whether that is sure, and on what it depends."""
    fits, plans = comparison.fitting, comparison.plans
    if not fits:
        return "Buy none of these clusters: the job fits on none of them."
    if len(fits) == 1:
        return f"Buy {plans[fits[0]].cluster.name}, because the job fits on no other cluster."
    shares = {n: comparison.is_cheapest[n] or 0.0 for n in fits}
    often = max(fits, key=lambda n: shares[n])
    chosen = often if shares[often] >= SURE else fits[0]
    next_one = next(n for n in fits if n != chosen)
    name, other = (plans[n].cluster.name for n in (chosen, next_one))
    mine, theirs = (plans[n].best.usd_per_million_tokens for n in (chosen, next_one))
    less = f"{1 - mine / theirs:.0%} less than" if theirs > mine * 1.005 else "as much as"
    is_sure = shares[chosen] >= SURE
    said = (
        f"Buy {name}: a million tokens cost {mine:.4f} $, {less} on {other}, the next, which is "
        f"{'more than' if is_sure else 'within'} the uncertainty ({name} is the cheapest in {shares[chosen]:.0%} of "
        "the draws)"
    )
    if theirs > 0 and mine > 0:
        as_much = plans[next_one].cluster.usd_per_gpu_hour * mine / theirs
        said += f", and depends on the prices: {other} costs as much at {as_much:.2f} $ a GPU-hour"
    if is_sure:
        return f"{said}."
    number, key, explained = (*comparison.decides, (0, "", 0.0))[0]
    if explained < EXPLAINS:
        return f"{said}; no single number decides, so run the job on both for some minutes first."
    of = plans[number].cluster.name
    return f"{said}; measure {key} of {of} first, which explains {explained:.0%} of the difference."
