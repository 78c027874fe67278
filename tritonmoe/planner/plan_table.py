"""A plan and a comparison of clusters as text, at most one screen."""

from collections.abc import Iterator, Sequence

from tritonmoe.planner.plan import Comparison, Plan, Prediction, Sensitivity

__all__ = ["comparison_table", "plan_table"]

MOST_ROWS = 12
MOST_PARTS = 6
DECIDES = 0.005
"""An estimate decides what is best if at an end of its interval the best choice now would take so much longer."""
HEADER = ("ep", "levels", "chunks", "layer ms", "step ms (80 %)", "exposed ms", "GB", "$/M tokens", "")


def plan_table(plan: Plan) -> str:
    """Give the choices, the best one's parts, and what to measure next."""
    job, cluster, best = plan.job, plan.cluster, plan.best
    lines = [
        f"{job.model.name} on {cluster.num_gpus} GPUs of {cluster.name}: {job.sequence} x {job.micro_batch} tokens, "
        f"{job.micro_batches} micro-batches, tp={job.tp} pp={job.pp}, {job.dtype}, recompute {job.recompute}"
        + (", two batches" if job.two_batches else ""),
        "",
        *_table([HEADER, *(_row(one) for one in plan.predictions[:MOST_ROWS])]),
    ]
    if len(plan.predictions) > MOST_ROWS:
        lines.append(f"... and {len(plan.predictions) - MOST_ROWS} slower ones: --json has them all")
    lines.append("")
    if not best.fits:
        lines.append(
            f"Nothing fits into {cluster.gpu.memory_gb:g} GB: at least {best.memory_gb:.0f} GB are needed. "
            "Try --recompute full, a larger --pp or --tp, or more GPUs."
        )
        return "\n".join(lines)
    lines += [
        f"Best: {best.choice}. It stays so in {plan.stays_best:.0%} of {len(best.draws_s)} draws of the estimates.",
        f"Its step: {_parts(best)}.",
    ]
    deciding = [one for one in plan.sensitivities if one.regret > DECIDES]
    first, *others = deciding + sorted(
        (one for one in plan.sensitivities if one not in deciding), key=lambda one: one.swing, reverse=True
    )
    lines += [
        f"Measure next: {first.key} ({first.source}), which {_why(first)}.",
        "Then: " + ", ".join(f"{one.key}, which {_why(one)}" for one in others[:2]) + ".",
    ]
    return "\n".join(lines)


def _why(one: Sensitivity) -> str:
    if one.regret > DECIDES:
        return f"may make another choice better, by up to {one.regret:.1%}"
    return f"moves the time by {one.swing:.1%} and changes no choice"


def comparison_table(comparison: Comparison) -> str:
    """Give the best choice on every cluster, and the price by model size."""
    rows: list[Sequence[str]] = [("cluster", "GPUs", *HEADER)]
    for plan in comparison.plans:
        rows.append((plan.cluster.name, str(plan.cluster.num_gpus), *_row(plan.best)))
    names = [plan.cluster.name for plan in comparison.plans]
    lines = [f"{comparison.plans[0].job.model.name}", "", *_table(rows), ""]
    lines += _decision(comparison, names)
    lines += ["", "$ per million tokens, by the model's widths:"]
    prices = [
        (name, *("-" if usd is None else f"{usd:.4f}" for usd in own))
        for name, own in zip(names, comparison.usd, strict=True)
    ]
    lines += _table([("cluster", *(f"x{scale:.2g}" for scale in comparison.scales)), *prices])
    lines += ["", *_crossings(comparison, names)]
    return "\n".join(lines)


def _decision(comparison: Comparison, names: Sequence[str]) -> Iterator[str]:
    """Say how the first cluster does against the others, as far as the job fits on them."""
    bests = [plan.best for plan in comparison.plans]
    others = [name for name, best in zip(names[1:], bests[1:], strict=True) if best.fits]
    if comparison.is_cheaper is not None:
        share = f"{comparison.is_cheaper:.0%}"
        yield f"{names[0]} is cheaper than {' and '.join(others)} in {share} of the draws of the estimates."
    for number, (name, best) in enumerate(zip(names, bests, strict=True)):
        usd = comparison.break_even_usd(number)
        if not best.fits:
            yield f"Nothing fits on {name}, at least {best.memory_gb:.0f} GB are needed: draws and prices leave it out."
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


def _row(one: Prediction) -> tuple[str, ...]:
    sizes, time = one.choice.overlap.chunk_sizes, one.time
    low, high = one.step_interval_s
    return (
        str(one.choice.ep),
        str(one.choice.num_levels),
        f"{len(sizes)}" + ("" if len(set(sizes)) == 1 else " ramp"),
        f"{time.layer_s * 1e3:.2f}",
        f"{time.step_s * 1e3:.0f} ({low * 1e3:.0f} - {high * 1e3:.0f})",
        f"{time.exposed_s * 1e3:.0f}",
        f"{one.memory_gb:.0f}",
        f"{one.usd_per_million_tokens:.4f}",
        "" if one.fits else "too large",
    )


def _parts(one: Prediction) -> str:
    """Give the largest parts of a step as shares, the rest as one."""
    parts = sorted(one.time.parts.items(), key=lambda item: item[1], reverse=True)
    said = [f"{name} {seconds / one.time.step_s:.0%}" for name, seconds in parts[:MOST_PARTS]]
    rest = sum(seconds for _, seconds in parts[MOST_PARTS:])
    return ", ".join(said) + (f", other {rest / one.time.step_s:.0%}" if rest else "")


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[n]) for row in rows if n < len(row)) for n in range(max(map(len, rows)))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=False)).rstrip() for row in rows]
