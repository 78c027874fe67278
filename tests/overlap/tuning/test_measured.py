"""What the tuner reads from reports: the link, also where nobody knows when an exchange behind compute has ended."""

import pytest
import torch

from tritonmoe.config.overlap import OverlapPlan
from tritonmoe.overlap.report import LayerReport, PassReport, StepMarks
from tritonmoe.overlap.steps import Step, StepKind
from tritonmoe.overlap.tuning.measured_calls import link_costs

ROWS, ROW_BYTES, TOP_K = 1000, 4096, 2
LATENCY_S, BYTES_PER_S = 50e-6, 0.5e9
COMPUTE_S = 0.1
"""Of the experts of a chunk, longer than all exchanges."""


def report_of(num_chunks: int, knows_ends: bool) -> LayerReport:
    """Return what rank 0 of 2 reports of a forward whose exchanges take turns and are posted at once."""
    report = PassReport(torch.device("cpu"))
    origin = report._origin
    lane_s = free_at = 0.0
    exchanges = [(Step(StepKind.METADATA, None), ROWS * 8 * TOP_K)]
    exchanges += [(Step(StepKind.DISPATCH, c), ROWS * ROW_BYTES / num_chunks) for c in range(num_chunks)]
    for step, num_bytes in exchanges:
        free_at += LATENCY_S + num_bytes / BYTES_PER_S
        waited_at = max(lane_s, free_at)
        finished = origin + free_at if knows_ends else None
        report.ran.append(StepMarks(step, origin, origin + waited_at, origin, origin + lane_s, finished))
        lane_s = waited_at + (COMPUTE_S if step.kind is StepKind.DISPATCH else 0.0)
    traffic = torch.tensor([[0, ROWS], [ROWS, 0]])
    plan, ends = OverlapPlan((1,) * num_chunks), (0,) * (num_chunks + 3)
    return LayerReport(0, traffic, traffic, ROW_BYTES, plan, TOP_K, ends, ends, ends, report)


@pytest.mark.parametrize("knows_ends", [True, False])
def test_the_link_of_exchanges_behind_compute(knows_ends: bool) -> None:
    """The second dispatch is over long before it is waited for."""
    link = link_costs([report_of(num_chunks, knows_ends) for num_chunks in (1, 2)], is_shared=False)
    assert link.latency_s == pytest.approx(LATENCY_S, rel=1e-3)
    assert link.bytes_per_s == pytest.approx(BYTES_PER_S, rel=1e-3)


def test_where_no_dispatch_is_waited_for_the_link_is_at_least_so_fast() -> None:
    reports = [report_of(num_chunks, knows_ends=False) for num_chunks in (1, 2)]
    for report in reports:
        report.forward.ran = [
            marks._replace(wait_started=marks.ended) if marks.step.kind is StepKind.DISPATCH else marks
            for marks in report.forward.ran
        ]
    assert 0 < link_costs(reports, is_shared=False).bytes_per_s < 1.1 * BYTES_PER_S


def test_an_end_is_known_by_a_wait_or_by_the_transport() -> None:
    waited, not_waited = report_of(2, knows_ends=False).forward.steps[1:]
    assert (waited.is_end_known, not_waited.is_end_known) == (True, False)
    assert all(timing.is_end_known for timing in report_of(2, knows_ends=True).forward.steps)
