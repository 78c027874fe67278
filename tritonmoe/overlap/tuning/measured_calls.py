"""What the reports of a layer's calls say: the work of all ranks, what the steps cost, and the link."""

import statistics
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import torch

from tritonmoe.config.overlap import OverlapPlan
from tritonmoe.overlap.report import CopiesReport, LayerReport
from tritonmoe.overlap.simulation.cost_model import (
    CopyUnits,
    CopyWork,
    LayerWork,
    LinkCosts,
    StepCosts,
    fit_line,
    step_units,
)
from tritonmoe.overlap.steps import Step, StepKind, Way

__all__ = ["layer_costs", "layer_work", "link_costs", "median_steps", "most_work"]

SMALLEST_ALONE_SHARE = 0.4


def layer_work(report: LayerReport) -> LayerWork:
    """Return what all ranks did in a call, the same on every rank."""
    rows, pairs = report.traffic_rows.to(torch.float64), report.traffic_pairs.to(torch.float64)
    copies = None if report.copies is None else _copy_work(report.copies)
    row_bytes = report.row_bytes, report.top_k, report.other_row_bytes
    return LayerWork(rows, pairs, *row_bytes, copies, report.gradient_row_bytes)


def _copy_work(said: CopiesReport) -> CopyWork | None:
    copies = said.planned
    if copies is None:
        return None
    return CopyWork(
        torch.tensor(copies.sent_copies, dtype=torch.float64, device="cpu"),
        torch.tensor(copies.copy_pairs, dtype=torch.float64, device="cpu"),
        said.expert_bytes,
        said.gradient_bytes,
        are_sent_again=not said.are_kept,
        relayed=copies.relayed if copies.are_relayed else None,
    )


def most_work(report: LayerReport) -> LayerWork:
    """Return the work of a call, or with a capacity its room; of a call that ran twice the larger of both."""
    work = layer_work(report)
    if report.first_run is None:
        return work
    first = layer_work(report.first_run)
    return replace(work, rows=torch.maximum(work.rows, first.rows), pairs=torch.maximum(work.pairs, first.pairs))


def copy_units(report: LayerReport) -> CopyUnits[float] | None:
    """Return what this rank has to do with copies; None without any."""
    said = report.copies
    if said is None or said.planned is None:
        return None
    pairs = [float(last - first) for first, last in pairwise(said.pair_offsets)]
    return CopyUnits(pairs, float(sum(said.planned.sent_copies[report.rank])), said.gradient_bytes)


def median_steps(reports: Sequence[LayerReport]) -> list[tuple[StepKind, float, float]]:
    """Return (kind, units, seconds) of every step of this rank's calls, forward and backward.

    Where calls with equal plans have the same step with as many units, its median time counts, of two the shorter one.
    """
    seconds: dict[tuple[OverlapPlan, Step, float], list[float]] = {}
    for report in reports:
        sizes = [
            [float(last - first) for first, last in pairwise(offsets)]
            for offsets in (report.send_offsets, report.return_offsets, report.pair_offsets)
        ]
        timings = report.forward.steps + ([] if report.backward is None else report.backward.steps)
        for timing in timings:
            step = timing.step
            units = step_units(step, report.overlap.num_local_slices, *sizes, copies=copy_units(report))
            seconds.setdefault((report.overlap, step, units), []).append(timing.held_s)
    return [(step.kind, units, statistics.median_low(times)) for (_, step, units), times in seconds.items()]


def layer_costs(reports: Sequence[LayerReport]) -> StepCosts:
    """Fit a line to the steps of every kind that this rank measured."""
    return StepCosts.fit(median_steps(reports))


def link_costs(reports: Sequence[LayerReport], is_shared: bool) -> LinkCosts:
    """Fit the link to the metadata and dispatches of calls with one chunk and with several.

    An exchange of which only the latest possible end is known, behind compute, or the latest possible beginning, behind
    such an exchange, counts where nothing better is known of any dispatch.

    is_shared: whether exchanges that are under way together share the link.
    """
    alone: dict[tuple[int, str, float], float] = {}  # by bytes: the shortest seconds of an exchange on an idle link
    late: dict[tuple[int, str, float], float] = {}  # the same where one of its ends is not known
    together: dict[int, float] = {}  # by number of chunks: the shortest seconds of all dispatches, by their bytes
    for report in reports:
        work = layer_work(report)
        busiest = float(torch.maximum(*work.ports(LinkCosts(0.0, 1.0))).max())
        exchanges = [t for t in report.forward.steps if t.step.kind.way is Way.TO_EXPERTS]
        free_at, is_free_known = 0.0, True
        for timing in exchanges:
            posted = timing.start_s + timing.post_s
            began, is_known = max(posted, free_at), timing.is_end_known and (is_free_known or posted >= free_at)
            free_at, is_free_known = timing.end_s, timing.is_end_known
            if is_shared and timing.step.chunk is not None and report.num_chunks > 1:
                continue
            share = 1.0 if timing.step.chunk is None else work.shares(report.overlap)[0][timing.step.chunk]
            num_bytes = busiest * share * work.bytes_per_row(timing.step.kind)
            key, seconds = (report.num_chunks, str(timing.step), num_bytes), max(0.0, timing.end_s - began)
            found = alone if is_known else late
            found[key] = min(seconds, found.get(key, seconds))
        dispatches = [t for t in exchanges if t.step.kind is StepKind.DISPATCH]
        whole_s = dispatches[-1].end_s - dispatches[0].start_s - dispatches[0].post_s
        of_a_byte = whole_s / max(1.0, busiest * work.bytes_per_row(StepKind.DISPATCH))
        together[report.num_chunks] = min(of_a_byte, together.get(report.num_chunks, of_a_byte))
    if not any(step.startswith(StepKind.DISPATCH) for _, step, _ in alone):
        alone = late | alone
    latency_s, byte_s = fit_line([(num_bytes, seconds) for (_, _, num_bytes), seconds in alone.items()])
    alone_share = 1.0
    if is_shared and together[1] > 0:
        alone_share = min(1.0, max(SMALLEST_ALONE_SHARE, together[max(together)] / together[1]))
    return LinkCosts(latency_s, 1 / max(byte_s * alone_share, 1e-18), is_shared, alone_share)
