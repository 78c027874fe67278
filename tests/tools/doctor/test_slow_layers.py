"""Recordings of layers that run on emulated ranks, one of which computes slowly: in parts, and on two levels."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import tritonmoe as tm
from tritonmoe.experts.forward_run import ForwardRun
from tritonmoe.overlap.report import Keeps, LayerReport
from tritonmoe.overlap.steps import StepKind
from tritonmoe.tools.doctor.causes import CAUSES
from tritonmoe.tools.doctor.recorded_run import RecordedRun, judge_recording
from tritonmoe.tools.doctor.verdict import as_text
from tritonmoe.tools.recording import record
from tritonmoe.tools.recording.recording_reader import read_recording
from tritonmoe.transports import Transport, TwoLevelTransport

STEPS, HIDDEN, SLOW_S = 4, 32, 0.02
Diagnose = Callable[[int, tm.OverlapConfig, bool], tuple[RecordedRun, LayerReport]]


@pytest.fixture
def diagnose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Diagnose:
    """Record a layer whose forward is slow on rank 1, wherever it computes, and judge it; of four ranks two a node."""
    forward, slow = ForwardRun._forward, set[int]()

    def slowly(run: ForwardRun, *arguments: object) -> object:
        time.sleep(SLOW_S * (run.weights.gate_up_proj.data_ptr() in slow))
        return forward(run, *arguments)  # type: ignore[arg-type]  # whatever they are

    def judge(size: int, overlap: tm.OverlapConfig, is_training: bool) -> tuple[RecordedRun, LayerReport]:
        def on_rank(transport: Transport) -> LayerReport:
            rank, num_experts = transport.rank, 2 * size
            transport = TwoLevelTransport(transport, 2) if size == 4 else transport
            layer = tm.GroupedExperts(tm.MoEConfig(HIDDEN, HIDDEN, num_experts, 2), transport, overlap, backend="torch")
            slow.update([layer.gate_up_proj.data_ptr()] * (rank == 1))
            generator = torch.Generator().manual_seed(rank)
            for _ in range(STEPS):
                x = torch.randn(100, HIDDEN, generator=generator, requires_grad=is_training)
                weights, ids = torch.rand(100, num_experts, generator=generator).topk(2)
                with torch.set_grad_enabled(is_training):
                    y = layer(x, ids, weights)
                if is_training:
                    y.sum().backward()
            return layer.last_report

        with record(tmp_path / "run"):
            reports = tm.run_on_emulated_ranks(on_rank, size, link=tm.LinkModel(0.5, latency_us=100))
        return judge_recording(read_recording(tmp_path / "run")), reports[0]

    monkeypatch.setattr(ForwardRun, "_forward", slowly)
    return judge


JOBS: dict[str, tuple[int, Keeps]] = {
    "trained": (160_000, "hidden"),
    "sent again": (45_000, "nothing"),
    "inference": (60_000, "hidden"),
}


@pytest.mark.parametrize(
    "job", ["trained", *[pytest.param(job, marks=pytest.mark.thorough) for job in ("sent again", "inference")]]
)
def test_parts_are_read_as_one_call(job: str, diagnose: Diagnose) -> None:
    (budget, keeps), is_training = JOBS[job], job != "inference"
    found, report = diagnose(2, tm.OverlapConfig(memory_budget_bytes=budget), is_training)
    assert len(report.parts) > 1
    assert max(call.part for call in found.recording.calls) >= len(report.parts)
    assert STEPS - 1 <= len(found.found.graph.steps) <= STEPS  # the first one may be warm-up
    assert found.found.error == pytest.approx(0, abs=0.02)
    first = found.found.findings[0]
    assert (first.kind, first.culprits.ranks) == ("slow rank", (1,))
    assert first.cost.share(found.found.whole_s) > 0.3
    assert "run in parts (memory_budget_bytes)" in as_text(found, found.found, found.advice)
    if is_training:
        assert report.keeps == keeps
        # The rows that a backward sends again are among its steps, whose waits are told then.
        kinds = {step.step.kind for step in found.recording.calls[0].ranks[0].passes[1].steps}
        assert (StepKind.DISPATCH in kinds) == (keeps == "nothing")
        assert report.backward is not None
        assert (StepKind.DISPATCH in {step.step.kind for step in report.backward.steps}) == (keeps == "nothing")


def test_a_slow_rank_of_another_node_is_no_slow_port(diagnose: Diagnose) -> None:
    """Emulated ranks make each exchange together: those inside a node last until the other node's ranks have come."""
    found, _ = diagnose(4, tm.OverlapConfig(2), True)
    assert found.recording.has_two_levels
    assert found.found.error == pytest.approx(0, abs=0.02)
    first = found.found.findings[0]
    assert (first.kind, first.culprits.ranks) == ("slow rank", (1,))
    of_links = [one.cost.seconds for one in found.found.findings if CAUSES[one.kind].is_of_links]
    assert max(of_links, default=0.0) < 0.3 * first.cost.seconds  # what a busy machine does to messages
