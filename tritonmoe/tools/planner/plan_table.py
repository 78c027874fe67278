"""A plan and a comparison of clusters as text, at most one screen."""

from collections.abc import Iterator, Sequence

from tritonmoe.tools.planner.comparison import Comparison
from tritonmoe.tools.planner.job import Job
from tritonmoe.tools.planner.plan_verdict import DECIDES, compare_notes, compare_verdict, plan_notes, plan_verdict, why
from tritonmoe.tools.planner.training_plan import Plan, Prediction
from tritonmoe.tools.report.terminal import TEXT_COLUMNS

__all__ = ["comparison_table", "plan_table"]

MOST_ROWS = 12
MOST_PARTS = 6


def plan_table(plan: Plan) -> str:
    """Return the choices, the best one's parts, what to measure next, and what to do."""
    job, cluster, best = plan.job, plan.cluster, plan.best
    price = f"{cluster.usd_per_gpu_hour:g} $ a GPU-hour"
    lines = [
        f"{job.model.name} on {cluster.num_gpus} GPUs of {cluster.name}, {price}: trainer {job.trainer}, "
        f"{job.sequence} x {job.micro_batch} tokens, {best.time.tokens} a step, {job.dtype}"
        + (", two batches" if job.two_batches else "")
        + _frozen(job),
        "",
        *_choices(plan),
    ]
    if plan.num_found > MOST_ROWS:
        lines.append(
            f"... and {plan.num_found - MOST_ROWS} other choices: --json lists the {len(plan.predictions)} best"
        )
    lines.append("")
    if best.fits:
        lines += _about_best(plan)
    return "\n".join([*lines, *plan_notes(plan), plan_verdict(plan)])


def _frozen(job: Job) -> str:
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
    header = ("tp", "pp", "ep", "levels", "recompute", "chunks", "GB", f"step {unit.name} (80 %)")
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
    lines = [f"{job.model.name}, trainer {job.trainer}{_frozen(job)}{at}", ""]
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
            *("", "GPUs", "$ an hour", "tp, pp, ep", "levels", "recompute", "chunks", "GB of a GPU"),
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
    """Say how the first cluster does against the others, as far as the job fits on them."""
    bests = [plan.best for plan in comparison.plans]
    for name, share in zip(names, comparison.is_cheapest, strict=True):
        if share is not None:
            yield f"{name} is the cheapest in {share:.0%} of the draws of the estimates."
    for number, (name, best) in enumerate(zip(names, bests, strict=True)):
        usd = comparison.break_even_usd(number)
        if not best.fits:
            yield f"The job doesn't fit on {name}: a GPU needs at least {best.memory_gb:.0f} GB."
        elif number and usd is not None:
            yield f"{name} costs as much as {names[0]} at {usd:.2f} $ a GPU-hour, for this model."


def _crossings(comparison: Comparison, names: Sequence[str]) -> Iterator[str]:
    """Say which cluster is cheapest from which size on."""
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
    return f"{one.memory_gb:.0f}" if one.fits else f"{one.memory_gb:.0f} too large"


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
