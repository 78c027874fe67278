"""Uneven stages and micro-batches of a pipeline are named as such, and no machine is blamed for them."""

import random
from pathlib import Path

import pytest

from bench.uneven_pipelines import Pipeline, kinds_of, trace, traced_kinds, write_timeline
from tritonmoe.tools.doctor.attribution import attribute
from tritonmoe.tools.doctor.reading import read_traces
from tritonmoe.tools.doctor.verdict import describe_finding

ONE_TOO_MANY = "uneven micro-batches in few steps"
"""Of one that was held out it is known that some seeds, this one too, have a small cause that isn't there."""
FIRST = ("healthy", "uneven stages, the last", "one long micro-batch", "slow machine")


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=() if kind in FIRST else pytest.mark.thorough) for kind in kinds_of(random.Random(0))],
)
def test_causes_and_their_gain(kind: str, tmp_path: Path) -> None:
    job = kinds_of(random.Random(5))[kind]
    share = write_timeline(job, 5, tmp_path)
    found = attribute(read_traces(tmp_path).graph)
    findings = found.findings[:1] if kind == ONE_TOO_MANY else found.findings
    assert {one.kind for one in findings} == set(job.expected)
    assert all(one.cost.share(found.replayed_s) < 0.1 for one in found.findings[len(findings) :])
    assert found.is_healthy == (not job.expected)
    if job.expected:
        gained = found.together if len(found.findings) == len(findings) else findings[0].cost
        assert gained.share(found.replayed_s) == pytest.approx(share, abs=0.05)


def test_a_stage_is_named_and_nobody_is_to_leave_it_out(tmp_path: Path) -> None:
    write_timeline(Pipeline(stage_times=(1.0, 1.0, 1.0, 1.6)), 1, tmp_path)
    found = attribute(read_traces(tmp_path).graph)
    (words,) = (describe_finding(one, found) for one in found.findings)
    assert words.sentence == "stage 3 computes 1.39 times as long as the mean of the stages, in every step"
    assert "clocks" not in words.to_do
    write_timeline(Pipeline(1, stage_times=(1.0, 1.0, 1.0, 1.6)), 1, tmp_path)
    assert "a slow machine can't be told from a stage with more work" in " ".join(read_traces(tmp_path).limits)


def test_micro_batches_are_named(tmp_path: Path) -> None:
    write_timeline(kinds_of(random.Random(0))["one long micro-batch of all"], 0, tmp_path)
    found = attribute(read_traces(tmp_path).graph)
    (words,) = (describe_finding(one, found) for one in found.findings)
    assert words.sentence.startswith("micro-batches differ: those above the mean of their step")
    assert "as many tokens" in words.to_do


TRACED = ("uneven stages, GPipe", "one long micro-batch of two")


@pytest.mark.thorough
@pytest.mark.alone
def test_traces_of_pipelines_tell_it_too(tmp_path: Path) -> None:
    """Of torch.distributed.pipelining over gloo; a busy machine may add a cause, but none as large."""
    jobs = [traced_kinds(random.Random(0))[kind] for kind in TRACED]
    for number, (job, share) in enumerate(zip(jobs, trace([(0, job) for job in jobs], tmp_path), strict=True)):
        found = attribute(read_traces(tmp_path / str(2 * number) / "traces").graph)
        assert (found.findings[0].kind,) == job.expected
        assert found.findings[0].cost.share(found.replayed_s) == pytest.approx(share, abs=0.15)
