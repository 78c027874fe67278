"""Recordings of calls with a memory budget, which run in parts: the parts of a call are of one step."""

import time
from pathlib import Path

import pytest
import torch

import tritonmoe as tm
from tritonmoe.experts.forward_run import ForwardRun
from tritonmoe.overlap.report import Keeps, LayerReport
from tritonmoe.overlap.steps import StepKind
from tritonmoe.tools.doctor.recorded_run import judge_recording
from tritonmoe.tools.doctor.verdict import as_text
from tritonmoe.tools.recording import record
from tritonmoe.tools.recording.recording_reader import read_recording
from tritonmoe.transports import Transport

SIZE, STEPS, HIDDEN, SLOW_S = 2, 4, 32, 0.02
JOBS: dict[str, tuple[int, Keeps]] = {
    "trained": (160_000, "hidden"),
    "sent again": (45_000, "nothing"),
    "inference": (60_000, "hidden"),
}


@pytest.mark.parametrize(
    "job", ["trained", *[pytest.param(job, marks=pytest.mark.thorough) for job in ("sent again", "inference")]]
)
def test_parts_are_read_as_one_call(job: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 is slow in the forward of every part."""
    (budget, keeps), is_training = JOBS[job], job != "inference"
    forward, slow = ForwardRun._forward, set[int]()

    def slowly(run: ForwardRun, *arguments: object) -> object:
        time.sleep(SLOW_S * (run.weights.gate_up_proj.data_ptr() in slow))
        return forward(run, *arguments)  # type: ignore[arg-type]  # whatever they are

    monkeypatch.setattr(ForwardRun, "_forward", slowly)

    def on_rank(transport: Transport) -> LayerReport:
        overlap = tm.OverlapConfig(memory_budget_bytes=budget)
        config = tm.MoEConfig(HIDDEN, HIDDEN, 4, 2)
        layer = tm.GroupedExperts(config, transport, overlap, backend="torch")
        slow.update([layer.gate_up_proj.data_ptr()] * (transport.rank == 1))
        generator = torch.Generator().manual_seed(transport.rank)
        for _ in range(STEPS):
            x = torch.randn(100, HIDDEN, generator=generator, requires_grad=is_training)
            weights, ids = torch.rand(100, 4, generator=generator).topk(2)
            with torch.set_grad_enabled(is_training):
                y = layer(x, ids, weights)
            if is_training:
                y.sum().backward()
        return layer.last_report

    with record(tmp_path / "run"):
        reports = tm.run_on_emulated_ranks(on_rank, SIZE, link=tm.LinkModel(0.5, latency_us=100))
    num_parts = len(reports[0].parts)
    assert num_parts > 1
    found = judge_recording(read_recording(tmp_path / "run"))
    assert max(call.part for call in found.recording.calls) >= num_parts
    assert STEPS - 1 <= len(found.found.graph.steps) <= STEPS  # the first one may be warm-up
    assert found.found.error == pytest.approx(0, abs=0.02)
    first = found.found.findings[0]
    assert (first.kind, first.culprits.ranks) == ("slow rank", (1,))
    assert first.cost.share(found.found.whole_s) > 0.3
    assert "run in parts (memory_budget_bytes)" in as_text(found, found.found, found.advice)
    if is_training:
        assert reports[0].keeps == keeps
        # The rows that a backward sends again are among its steps, whose waits are told then.
        kinds = {step.step.kind for step in found.recording.calls[0].ranks[0].passes[1].steps}
        assert (StepKind.DISPATCH in kinds) == (keeps == "nothing")
        assert reports[0].backward is not None
        assert (StepKind.DISPATCH in {step.step.kind for step in reports[0].backward.steps}) == (keeps == "nothing")
