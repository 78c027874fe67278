"""A plan and a comparison of clusters as text: tables, notes, and the verdict (what to take, and how sure that is)."""

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence

from tritonmoe.runtime.files import Json
from tritonmoe.tools.planner.cluster import Cluster, spread_of
from tritonmoe.tools.planner.comparison import Comparison
from tritonmoe.tools.planner.draws import KNOWN_NETWORK
from tritonmoe.tools.planner.job import Job
from tritonmoe.tools.planner.job_memory import USABLE_MEMORY
from tritonmoe.tools.planner.operation_costs import FP8_SHARE
from tritonmoe.tools.planner.plan_search import ways
from tritonmoe.tools.planner.training_plan import Measured, Plan, Prediction, Sensitivity
from tritonmoe.tools.report.terminal import TEXT_COLUMNS

__all__ = [
    "DECIDES",
    "compare_notes",
    "compare_verdict",
    "comparison_as_json",
    "comparison_table",
    "nothing_fits",
    "plan_as_json",
    "plan_notes",
    "plan_table",
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
    """Return what an estimate does, in words."""
    if one.regret > DECIDES:
        return f"may make another choice better, by up to {one.regret:.1%}"
    return f"moves the time by {one.swing:.1%} and changes no choice"


def _not_measured(job: Job) -> str | None:
    """Return what the times of a job leave out because nobody has measured it; None where that is nothing."""
    if job.expert_precision is not None:
        return (
            f"Not measured on a GPU: experts in {job.expert_precision}. Their products are taken to reach "
            f"{FP8_SHARE:.0%} of the share of the peak that bf16 reaches; codes are written and read once more."
        )
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
    """Return why overlap shortens a step by less than it hides; None where it doesn't."""
    hidden_s, gained_s = best.exchange_s - best.time.exposed_s, best.serial_s - best.time.step_s
    if not best.fits or hidden_s < DECIDES * best.time.step_s or gained_s >= LITTLE_GAINED * hidden_s:
        return None
    return (
        f"Overlap hides {1e3 * hidden_s:.0f} ms of exchanges, but makes a step only {1e3 * gained_s:.0f} ms shorter: "
        "experts compute in parts then, of which each reads the weights again, and more slowly while rows travel."
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
    """Return which price of a GPU-hour each cluster has, and which have the same one."""
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
    """Return what is needed, and what would help that wasn't tried yet."""
    best, cluster, job = plan.best, plan.cluster, plan.job
    choice, free = best.choice, plan.free
    usable = USABLE_MEMORY * cluster.gpu.memory_gib
    tried = [name for name, is_free in (("tp", free.tp), ("pp", free.pp), ("recomputation", free.recompute)) if is_free]
    said = (
        f"Nothing fits. A job can fill {usable:.1f} of a GPU's {cluster.gpu.memory_gib:g} GiB ({USABLE_MEMORY:.0%}: "
        f"the allocator, the driver and NCCL need the rest), and this job needs at least {best.memory_gib:.0f} GiB, "
        f"with {choice}{' (all values of ' + ', '.join(tried) + ' were tried)' if tried else ''}."
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


MOST_ROWS = 12
MOVED = 1.25
"""A measured step says something of an estimate that is so many times what it was."""
MOST_PARTS = 6


def plan_table(plan: Plan) -> str:
    """Return the choices, the best one's parts, what to measure next, and what to do."""
    job, cluster, best = plan.job, plan.cluster, plan.best
    price = f"{cluster.usd_per_gpu_hour:g} $ a GPU-hour"
    lines = [
        f"{job.model.name} on {cluster.num_gpus} GPUs of {cluster.name}, {price}: trainer {job.trainer}, "
        f"{job.sequence} x {job.micro_batch} tokens, {best.time.tokens} a step, {job.dtype}"
        + (", two batches" if job.two_batches else "")
        + (", CUDA graphs" if job.cuda_graphs else "")
        + _experts(job),
        "",
        *_choices(plan),
    ]
    if plan.num_found > MOST_ROWS:
        lines.append(
            f"... and {plan.num_found - MOST_ROWS} other choices: --json lists the {len(plan.predictions)} best"
        )
    if plan.left_out:
        lines.append(f"Left out: {'; '.join(plan.left_out)}.")
    lines.append("")
    if best.fits:
        lines += _about_best(plan)
    if plan.measured is not None:
        lines.append(_told(plan, plan.measured))
    elif cluster.nodes > 1 and best.fits:
        lines.append(_network(cluster))
    return "\n".join([*lines, *plan_notes(plan), plan_verdict(plan)])


def _told(plan: Plan, measured: Measured) -> str:
    """Return what narrowed a plan, and which estimate it moved most."""
    factors = {key: statistics.median(one.factors[key] for one in plan.draws) for key in plan.draws[0].factors}
    said = (
        f"Narrowed by a run of {measured.cluster.num_gpus} GPUs with {measured.tokens_per_s:g} tokens/s, a step of "
        f"{measured.step_s:.4g} s."
    )
    most = max(factors, key=lambda key: abs(math.log(factors[key])), default="")
    if not most or abs(math.log(factors[most])) < math.log(MOVED):
        return said
    return f"{said} By that run, {most} is about {factors[most]:.2g} times what is assumed."


def _network(cluster: Cluster) -> str:
    """Return what is assumed of the network between nodes."""
    efficiency, spread = cluster.between.efficiency, spread_of("between.efficiency", cluster.between.efficiency)
    said = f"Between nodes {efficiency.value:.0%} of {cluster.between.gb_per_s:g} GB/s are {efficiency.source}"
    if spread < KNOWN_NETWORK:
        return f"{said}, within {spread:.0%}."
    return f"{said}, and may be much less: --network says whether NCCL runs over RDMA or sockets."


def _experts(job: Job) -> str:
    """Return what a title says of experts that aren't plain."""
    if job.expert_precision is not None:
        return f", experts in {job.expert_precision}"
    return "" if job.frozen is None else f", frozen, experts in {job.frozen} with adapters of rank {job.adapter_rank}"


def _about_best(plan: Plan) -> Iterator[str]:
    best, cluster = plan.best, plan.cluster
    used = f", which uses {best.gpus_used} of {cluster.num_gpus} GPUs" if best.gpus_used < cluster.num_gpus else ""
    yield f"Best: {best.choice}{used}. This choice stays the best in {plan.stays_best:.0%} of {len(plan.draws)} draws."
    yield (
        f"Speed: {best.tokens_per_s_per_gpu:.0f} tokens/s per GPU (MFU {best.mfu:.0%}). Price: "
        f"{best.usd_per_million_tokens:.4f} $ for a million tokens."
    )
    yield f"Parts of a step: {_parts(best)}."
    yield (
        f"Exchanges: {_ms(best.exchange_s, best.exchange_interval_s)} a step. During "
        f"{_ms(best.time.exposed_s, best.exposed_interval_s)} of this time nothing computes. Without overlap a step "
        f"takes {_ms(best.serial_s, best.serial_interval_s)}."
    )
    first, *others = plan.sensitivities
    deciding = [one for one in others if one.regret > DECIDES]
    then = (deciding + sorted((o for o in others if o not in deciding), key=lambda one: -one.swing))[:2]
    yield f"Measure next: {first.key} ({first.source}), which {why(first)}."
    yield "Then: " + ", ".join(f"{one.key}, which {why(one)}" for one in then) + "."


def _ms(seconds: float, interval: tuple[float, float]) -> str:
    return f"{seconds * 1e3:.0f} ms ({interval[0] * 1e3:.0f} - {interval[1] * 1e3:.0f})"


def _choices(plan: Plan) -> list[str]:
    """Return a line for each choice; whether it fits stands behind its first columns."""
    unit = _Unit(plan.best.time.step_s)
    header = ("tp", "pp", "ep", "levels", "recompute", "chunks", "GiB", f"step {unit.name} (80 %)")
    rows = [
        (*_layout(one), _memory(one), unit.interval(one), unit(one.exchange_s), unit(one.time.exposed_s))
        for one in plan.predictions[:MOST_ROWS]
    ]
    return _table([(*header, "exchanges", "exposed"), *rows], " ")


def comparison_table(comparison: Comparison) -> str:
    """Return the best choice on every cluster, and the price by model size."""
    names = [plan.cluster.name for plan in comparison.plans]
    at = {None: "", "gpus": ", at equal GPUs", "price": ", at an equal price"}[comparison.equal]
    job = comparison.plans[0].job
    lines = [f"{job.model.name}, trainer {job.trainer}{_experts(job)}{at}", ""]
    words, *columns = _clusters(comparison.plans)
    while columns:
        for number in range(len(columns), 0, -1):  # as many side by side as there is room for
            table = _table(list(zip(words, *columns[:number], strict=True)), is_first_left=True)
            if max(map(len, table)) <= TEXT_COLUMNS:
                break
        lines += [*table, ""]
        columns = columns[number:]
    lines += _decision(comparison, names)
    lines += ["", "$ per million tokens, by the model's widths:"]
    prices = [
        (name, *("-" if usd is None else f"{usd:.4f}" for usd in own))
        for name, own in zip(names, comparison.usd, strict=True)
    ]
    lines += _table([("cluster", *(f"x{scale:.2g}" for scale in comparison.scales)), *prices])
    lines += ["", *_crossings(comparison, names), "", *compare_notes(comparison), "", compare_verdict(comparison)]
    return "\n".join(lines)


def _clusters(plans: Sequence[Plan]) -> list[tuple[str, ...]]:
    """Return a column of words, and one for each cluster with its best choice."""
    unit = _Unit(min(plan.best.time.step_s for plan in plans))
    columns: list[tuple[str, ...]] = [
        (
            *("", "GPUs", "$ an hour", "tp, pp, ep", "levels", "recompute", "chunks", "GiB of a GPU"),
            *(f"step {unit.name} (80 %)", f"exchanges {unit.name}", f"exposed {unit.name}", "tokens a step"),
            *("tokens/s", "tokens/s per GPU", "MFU", "$ per M tokens"),
        )
    ]
    for plan in plans:
        cluster, best = plan.cluster, plan.best
        tp, pp, ep, *rest = _layout(best)
        columns.append(
            (
                *(cluster.name, str(cluster.num_gpus), f"{cluster.usd_per_gpu_hour * cluster.num_gpus:.0f}"),
                *(f"{tp}, {pp}, {ep}", *rest, _memory(best)),
                *(unit.interval(best), unit(best.exchange_s), unit(best.time.exposed_s), str(best.time.tokens)),
                *(
                    f"{best.time.tokens_per_s:.0f}",
                    f"{best.tokens_per_s_per_gpu:.0f}",
                    f"{best.mfu:.0%}",
                    f"{best.usd_per_million_tokens:.4f}",
                ),
            )
        )
    return columns


def _decision(comparison: Comparison, names: Sequence[str]) -> Iterator[str]:
    """Return how the first cluster does against the others, as far as the job fits on them."""
    bests = [plan.best for plan in comparison.plans]
    for name, share in zip(names, comparison.is_cheapest, strict=True):
        if share is not None:
            yield f"{name} is the cheapest in {share:.0%} of the draws of the estimates."
    for number, (name, best) in enumerate(zip(names, bests, strict=True)):
        usd = comparison.break_even_usd(number)
        if not best.fits:
            yield f"The job doesn't fit on {name}: a GPU needs at least {best.memory_gib:.0f} GiB."
        elif number and usd is not None:
            yield f"{name} costs as much as {names[0]} at {usd:.2f} $ a GPU-hour, for this model."


def _crossings(comparison: Comparison, names: Sequence[str]) -> Iterator[str]:
    """Return which cluster is cheapest from which size on."""
    last = None
    for number, scale in enumerate(comparison.scales):
        there = [(own[number], name) for own, name in zip(comparison.usd, names, strict=True)]
        known = [(usd, name) for usd, name in there if usd is not None]
        cheapest = min(known)[1] if known else "nothing fits"
        if cheapest != last:
            yield f"cheapest from x{scale:.2g} on: {cheapest}"
        last = cheapest


class _Unit:
    """The unit of a table's times: seconds where steps take ten of them, else milliseconds."""

    def __init__(self, step_s: float) -> None:
        self.name, self.factor, self.digits = ("s", 1.0, 1) if step_s >= 10 else ("ms", 1e3, 0)

    def __call__(self, seconds: float) -> str:
        return f"{seconds * self.factor:.{self.digits}f}"

    def interval(self, one: Prediction) -> str:
        """Return a step's time and its 80 % interval."""
        low, high = one.step_interval_s
        return f"{self(one.time.step_s)} ({self(low)} - {self(high)})"


def _layout(one: Prediction) -> tuple[str, ...]:
    sizes, of = one.choice.overlap.chunk_sizes, one.choice
    chunks = f"{len(sizes)}" + ("" if len(set(sizes)) == 1 else " ramp")
    return str(of.tp), str(of.pp), str(of.ep), str(of.num_levels), of.recompute, chunks


def _memory(one: Prediction) -> str:
    return f"{one.memory_gib:.0f}" if one.fits else f"{one.memory_gib:.0f} too large"


def _parts(one: Prediction) -> str:
    """Return the largest parts of a step as shares, the rest as one."""
    parts = sorted(one.time.parts.items(), key=lambda item: item[1], reverse=True)
    said = [f"{name} {seconds / one.time.step_s:.0%}" for name, seconds in parts[:MOST_PARTS]]
    rest = sum(seconds for _, seconds in parts[MOST_PARTS:])
    return ", ".join(said) + (f", other {rest / one.time.step_s:.0%}" if rest else "")


def _table(rows: Sequence[Sequence[str]], between: str = "  ", is_first_left: bool = False) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0]) if is_first_left else first.rjust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append(between.join(cells).rstrip())
    return lines
