"""Verdicts on recordings that the simulator made: causes are found, with their culprit and their cost."""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tritonmoe as tm
from tests.support.synthetic_runs import Run, healthy, write_run
from tritonmoe.config.overlap import OverlapPlan
from tritonmoe.overlap.simulation.simulator import simulate_two_batches
from tritonmoe.tools.doctor import causes
from tritonmoe.tools.doctor.advice import advice_on
from tritonmoe.tools.doctor.conditions import conditions_of
from tritonmoe.tools.doctor.costs import fit_costs
from tritonmoe.tools.doctor.recorded_run import RecordedRun, judge_recording
from tritonmoe.tools.doctor.run_figures import figures_of
from tritonmoe.tools.doctor.verdict import as_json, as_text
from tritonmoe.tools.recording import record
from tritonmoe.tools.recording.pass_steps import TIMES
from tritonmoe.tools.recording.recording_reader import read_recording

CALLS = 4


def diagnose(folder: Path, run: Run) -> RecordedRun:
    return judge_recording(read_recording(write_run(folder, [run] * CALLS)))


@pytest.mark.parametrize("size", [pytest.param(2, marks=pytest.mark.thorough), 4])
def test_a_healthy_run(size: int, tmp_path: Path) -> None:
    found = diagnose(tmp_path, Run(size=size))
    assert found.found.measured_s == pytest.approx(Run(size=size).seconds())
    assert found.found.error == pytest.approx(0, abs=0.02)
    assert found.found.is_healthy, found.found.findings


CAUSES = {
    "slow link": (Run(slow_link=(2, 1, 60.0)), (2, 1)),
    "slow port": (Run(slow_port=(3, 20.0)), (3,)),
    "slow rank": (Run(slow_rank=(2, 1.5)), (2,)),
    "late rank": (Run(late_rank=(1, 0.08)), (1,)),
    "imbalance": (Run(hot_rank=(0, 2.0)), (0,)),
    "bandwidth": (Run(byte_s=2e-6), ()),
    "latency": (Run(latency_s=0.02), ()),
    "chunk overhead": (Run(fixed_s=0.01), ()),
    "host overhead": (Run(host_s=0.03), ()),
}


FIRST = ("slow link",)


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in FIRST else pytest.mark.thorough) for kind in CAUSES]
)
def test_a_cause_is_found_with_its_culprit_and_its_cost(kind: str, tmp_path: Path) -> None:
    run, culprits = CAUSES[kind]
    found = diagnose(tmp_path, run)
    assert found.found.error == pytest.approx(0, abs=0.02)
    first = found.found.findings[0]
    assert (first.kind, first.culprits.ranks) == (kind, culprits)
    if kind in ("slow link", "slow port", "slow rank", "late rank"):
        assert first.cost.seconds == pytest.approx(run.seconds() - healthy(run).seconds(), rel=0.05)


@pytest.mark.thorough
def test_a_link_whose_messages_come_late(tmp_path: Path) -> None:
    """Its bytes are as fast as the others', so that no link is slow."""
    run = Run(size=3, late_link=(2, 1, 0.03))
    found = diagnose(tmp_path, run)
    assert found.found.error == pytest.approx(0, abs=0.02)
    assert [(one.kind, one.culprits.links) for one in found.found.findings] == [("late link", ((2, 1),))]
    assert found.found.findings[0].cost.seconds == pytest.approx(run.seconds() - healthy(run).seconds(), rel=0.05)


@pytest.mark.thorough
def test_a_slow_link_is_not_late(tmp_path: Path) -> None:
    """Its small messages take longer too, as long as their bytes say."""
    found = diagnose(tmp_path, Run(slow_link=(2, 1, 100.0)))
    assert [one.kind for one in found.found.findings] == ["slow link"]


TWO_LEVELS = Run(node_size=2, has_two_levels=True, top_k=4, num_chunks=2)
ON_TWO_LEVELS = {
    "healthy": (TWO_LEVELS, None),
    "between nodes": (replace(TWO_LEVELS, slow_link=(0, 2, 60.0)), ("slow link", (0, 2))),
    "inside a node": (replace(TWO_LEVELS, slow_link=(3, 2, 60.0)), ("slow link", (3, 2))),
    "slow rank": (replace(TWO_LEVELS, slow_rank=(2, 1.5)), ("slow rank", (2,))),
    "late link": (replace(TWO_LEVELS, late_link=(1, 3, 0.1)), ("late link", (1, 3))),
    "slow port": (replace(TWO_LEVELS, size=6, slow_port=(3, 40.0)), ("slow port", (3,))),
    "imbalance": (replace(TWO_LEVELS, hot_rank=(0, 2.0)), ("imbalance", (0,))),
    "bandwidth": (replace(TWO_LEVELS, byte_s=2e-6), ("bandwidth", ())),
}


@pytest.mark.thorough
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n == "inside a node" else pytest.mark.thorough) for n in ON_TWO_LEVELS]
)
def test_causes_on_two_levels(name: str, tmp_path: Path) -> None:
    run, expected = ON_TWO_LEVELS[name]
    found = diagnose(tmp_path, run)
    assert found.found.measured_s == pytest.approx(run.seconds())
    assert found.found.error == pytest.approx(0, abs=0.02)
    waits_s = torch.tensor(figures_of(found)["waits_s"])
    if name in ("between nodes", "inside a node"):
        sender, receiver = run.slow_link[:2]
        assert int(waits_s.argmax()) == receiver * run.size + sender
    assert (
        (found.found.findings[0].kind, found.found.findings[0].culprits.ranks) if found.found.findings else None
    ) == expected
    # Inside a node of two a slow port is two slow links.
    if name not in ("healthy", "imbalance", "bandwidth", "slow port"):
        assert found.found.findings[0].cost.seconds == pytest.approx(run.seconds() - healthy(run).seconds(), rel=0.05)


@pytest.mark.thorough
def test_other_levels_are_advised_by_what_they_gain(tmp_path: Path) -> None:
    """Rows that cross once to a node save time between nodes; where both links are as fast, they cost some."""
    one = Run(node_size=2, top_k=4, num_chunks=2, byte_s=5e-6)
    two = replace(one, has_two_levels=True)
    (advice,) = (a for a in diagnose(tmp_path / "one", one).advice if "two levels" in a.words)
    assert advice.gain.seconds == pytest.approx(one.seconds() - two.seconds(), rel=0.05)
    alike = replace(one, inside_byte_s=5e-6)
    assert not any("two levels" in a.words for a in diagnose(tmp_path / "alike", alike).advice)
    two = replace(alike, has_two_levels=True)
    (advice,) = (a for a in diagnose(tmp_path / "two", two).advice if "one level" in a.words)
    assert advice.gain.seconds == pytest.approx(two.seconds() - alike.seconds(), rel=0.05)


@pytest.mark.thorough
def test_links_between_hosts_are_slower_than_those_inside(tmp_path: Path) -> None:
    """On one level too: no link is slow for being one between nodes."""
    run = Run(node_size=2, top_k=4, byte_s=2e-6, inside_byte_s=2e-8)
    found = diagnose(tmp_path, run)
    assert found.found.error == pytest.approx(0, abs=0.02)
    assert [one.kind for one in found.found.findings] == ["bandwidth"]
    assert found.costs.link.each is not None
    assert found.costs.link.each.inside is not None
    assert float(found.costs.link.each.port_out_s.median()) == pytest.approx(2e-6, rel=0.05)
    assert float(found.costs.link.each.inside.out_s.median()) == pytest.approx(2e-8, rel=0.5)


@pytest.mark.thorough
@pytest.mark.parametrize(
    "run",
    [Run(byte_s=6e-7, contention=0.5), replace(TWO_LEVELS, byte_s=1e-6, contention=0.5)],
    ids=["one level", "two levels"],
)
def test_contention_is_a_part_of_what_the_bytes_cost(run: Run, tmp_path: Path) -> None:
    found = diagnose(tmp_path, run)
    assert found.found.error == pytest.approx(0, abs=0.02)
    (contention,) = (one for one in found.found.findings if one.kind == "exchange contention")
    assert contention.cost.seconds == pytest.approx(run.seconds() - healthy(run).seconds(), rel=0.05)
    assert found.costs.link.contention == pytest.approx(0.5)


@pytest.mark.thorough
def test_a_slow_port_of_three(tmp_path: Path) -> None:
    """Most links are slow then."""
    found = diagnose(tmp_path, Run(size=3, slow_port=(1, 20.0)))
    assert found.found.error == pytest.approx(0, abs=0.02)
    assert (found.found.findings[0].kind, found.found.findings[0].culprits.ranks) == ("slow port", (1,))


@pytest.mark.thorough
def test_what_waits_for_a_slow_way_back_is_not_slow_itself(tmp_path: Path) -> None:
    """Over gloo a receiver's word that rows may come is behind the rows that it sends."""
    run = Run(size=2, num_chunks=6, slow_link=(1, 0, 10.0), uses_rendezvous=True)
    found = diagnose(tmp_path, run)
    assert found.found.error == pytest.approx(0, abs=0.02)
    assert (found.found.findings[0].kind, found.found.findings[0].culprits.ranks) == ("slow link", (1, 0))
    assert found.found.findings[0].cost.seconds == pytest.approx(run.seconds() - healthy(run).seconds(), rel=0.1)


KINDS = {
    "slow link": (st.floats(50.0, 200.0), lambda ranks, amount: Run(slow_link=(*ranks, amount)), 2),
    "slow port": (st.floats(10.0, 40.0), lambda ranks, amount: Run(slow_port=(ranks[0], amount)), 1),
    "slow rank": (st.floats(1.2, 3.0), lambda ranks, amount: Run(slow_rank=(ranks[0], amount)), 1),
    "late rank": (st.floats(0.06, 0.3), lambda ranks, amount: Run(late_rank=(ranks[0], amount)), 1),
}


@pytest.mark.thorough
@settings(max_examples=12, deadline=None)
@given(data=st.data(), kind=st.sampled_from(sorted(KINDS)), ranks=st.permutations(range(4)))
def test_any_culprit_is_found_with_its_cost(data: st.DataObject, kind: str, ranks: list[int]) -> None:
    amounts, make, num_culprits = KINDS[kind]
    run = make(tuple(ranks[:2]), data.draw(amounts))
    with tempfile.TemporaryDirectory() as folder:
        found = diagnose(Path(folder), run)
    assert found.found.error == pytest.approx(0, abs=0.03)
    assert (found.found.findings[0].kind, found.found.findings[0].culprits.ranks) == (kind, tuple(ranks[:num_culprits]))
    assert found.found.findings[0].cost.seconds == pytest.approx(run.seconds() - healthy(run).seconds(), rel=0.08)


@pytest.mark.thorough
def test_narrower_rows_save_no_more_than_exchanges_cost(tmp_path: Path) -> None:
    """Costs that are fitted to noise promise more than a step waits for rows: here a step waits for a twentieth."""
    run = diagnose(tmp_path, Run(byte_s=2e-6))
    step_s = run.found.replayed_s

    def narrower(exposed_s: float) -> list[float]:
        found = advice_on(run.recording, run.calls, run.costs, step_s, exposed_s)
        return [one.gain.high_s for one in found if "wire_dtype" in one.words]

    assert min(narrower(run.found.exposed_s)) > 0.1 * step_s
    assert narrower(0.05 * step_s) == [0.05 * step_s] * 2
    assert narrower(0.02 * step_s) == []


@pytest.mark.thorough
def test_two_batches_are_advised_where_the_model_has_other_work(tmp_path: Path) -> None:
    run = Run(size=2, num_chunks=2, byte_s=1e-6, num_layers=3, beside_s=(0.05, 0.1))
    found = diagnose(tmp_path / "stack", run)
    (advice,) = (one for one in found.advice if "two_batches" in one.words)
    work, plan = run.work(), OverlapPlan((1,), local_first=False)
    half = replace(work, rows=work.rows / 2, pairs=work.pairs / 2)
    halves = simulate_two_batches(plan, half, run.steps(), run.link(), (0.025, 0.05), 3)
    expected = 3 * (run.seconds() + 0.05 + 0.1) - sum(of.total_s for of in halves)
    assert advice.gain.seconds == pytest.approx(expected, rel=0.1)
    assert advice.gain.seconds > 0.1 * found.found.measured_s
    alone = diagnose(tmp_path / "alone", replace(run, num_layers=1))
    assert not any("two_batches" in one.words for one in alone.advice), "there is nothing beside a layer alone"
    hidden = diagnose(tmp_path / "hidden", replace(run, byte_s=1e-8))
    assert not any("two_batches" in one.words for one in hidden.advice), "there is nothing to hide"


@pytest.mark.thorough
def test_fewer_ranks_are_advised_where_rows_take_long(tmp_path: Path) -> None:
    """Half as many ranks: of 200 rows to each of 4 ranks 400 go to each of 2, one of which is this one itself."""
    run = Run(size=4, byte_s=2e-6)
    (advice,) = (one for one in diagnose(tmp_path / "slow", run).advice if "2 ranks instead of 4" in one.words)
    fewer = replace(run, size=2, rows=400.0)
    assert advice.gain.seconds == pytest.approx(run.seconds() - fewer.seconds(), rel=0.05)
    hidden = diagnose(tmp_path / "hidden", replace(run, byte_s=1e-8))
    assert not any("ranks instead" in one.words for one in hidden.advice), "there is nothing to gain"


@pytest.mark.thorough
@pytest.mark.parametrize("fault", [Run(slow_rank=(2, 1.5)), Run(late_rank=(3, 0.08))], ids=["slow", "late"])
def test_fewer_ranks_leave_no_fault_behind(fault: Run, tmp_path: Path) -> None:
    """One of both halves has it still, and the step waits for that one."""
    assert not any("ranks instead" in one.words for one in diagnose(tmp_path, fault).advice)


@pytest.mark.thorough
def test_without_arrivals_no_link_is_called_slow(tmp_path: Path) -> None:
    """As over NCCL; a slow rank is found all the same."""
    found = diagnose(tmp_path, Run(slow_rank=(2, 1.5), records_arrivals=False))
    assert (found.found.findings[0].kind, found.found.findings[0].culprits.ranks) == ("slow rank", (2,))
    assert [one.kind for one in found.found.findings] == ["slow rank"]
    assert any("NCCL" in limit for limit in found.limits)


@pytest.mark.thorough
def test_a_slow_link_of_two_ranks_with_a_latency(tmp_path: Path) -> None:
    run = Run(size=2, slow_link=(0, 1, 10.0), latency_s=2e-3)
    found = diagnose(tmp_path, run)
    assert found.found.error == pytest.approx(0, abs=0.02)
    (link,) = found.found.findings
    assert (link.kind, link.culprits.links) == ("slow link", ((0, 1),))
    assert link.cost.seconds == pytest.approx(run.seconds() - healthy(run).seconds(), abs=0.02 * run.seconds())


@pytest.mark.thorough
def test_rows_that_all_stay_at_home(tmp_path: Path) -> None:
    """No exchange carries a row, so no link costs anything."""

    def local(transport: tm.transports.Transport) -> None:
        layer = tm.GroupedExperts(tm.MoEConfig(8, 4, 8, 2), transport, tm.OverlapConfig(2), backend="torch")
        ids = torch.tensor([[0, 1]]).expand(16, 2) + 2 * transport.rank
        for _ in range(3):
            layer(torch.randn(16, 8, requires_grad=True), ids, torch.ones(16, 2)).sum().backward()

    with record(tmp_path / "run"):
        tm.run_on_emulated_ranks(local, 4)
    found = judge_recording(read_recording(tmp_path / "run"))
    assert any("no exchange carried rows" in limit for limit in found.limits)


def test_rows_in_a_precision_are_priced_as_codes(tmp_path: Path) -> None:
    """The rate of the link is found by the bytes that travel, and no narrower rows are offered."""
    precision, bandwidth = tm.ExpertPrecision("mxfp8"), 4e-3

    def train(transport: tm.transports.Transport) -> None:
        config = tm.MoEConfig(256, 16, 8, 2, expert_precision=precision)
        layer = tm.GroupedExperts(config, transport, tm.OverlapConfig(2), backend="torch", dtype=torch.bfloat16)
        generator = torch.Generator().manual_seed(transport.rank)
        for num_tokens in (128, 128, 96, 192, 256, 160):
            x = torch.randn(num_tokens, 256, generator=generator).bfloat16().requires_grad_()
            weights, ids = torch.rand(num_tokens, 8, generator=generator).topk(2)
            layer(x, ids, weights).sum().backward()

    with record(tmp_path / "run"):
        tm.run_on_emulated_ranks(train, 2, link=tm.LinkModel(bandwidth, latency_us=200))
    recording = read_recording(tmp_path / "run")
    call, found = recording.calls[-1], judge_recording(recording)
    assert (call.row_bytes, call.gradient_row_bytes, call.other_row_bytes) == (256 + 8, 256 + 8, 512)
    assert found.costs.link.bytes_per_s == pytest.approx(bandwidth * 1e9, rel=0.15)
    assert not [one for one in found.advice if "wire_dtype" in one.words]


def test_causes_that_overlap_are_all_said(tmp_path: Path) -> None:
    """A slow rank and a late one; together they gain about what both cost."""
    run = Run(slow_rank=(2, 1.6), late_rank=(1, 0.1))
    found = diagnose(tmp_path, run)
    assert {(one.kind, one.culprits.ranks) for one in found.found.findings} == {
        ("slow rank", (2,)),
        ("late rank", (1,)),
    }
    assert found.found.together.seconds >= run.seconds() - healthy(run).seconds() - 1e-3


def test_shares_are_of_the_whole_step(tmp_path: Path) -> None:
    """A step has as much work between its calls as in them: what costs half of the calls costs a quarter."""
    run = Run(slow_rank=(2, 4.0))
    beside = replace(run, beside_s=(run.seconds(), 0.0))
    found = diagnose(tmp_path, beside)
    (one,) = found.found.findings
    assert found.found.whole_s == found.built.step_s > 1.5 * found.found.replayed_s
    share = one.cost.seconds / found.built.step_s
    assert as_json(found, found.found)["findings"][0]["share"] == pytest.approx(share)
    assert f"{share:.0%} (" in as_text(found, found.found)
    assert "its layer calls, which alone are recorded" in as_text(found, found.found)


def test_one_step_does_not_say_how_much_steps_differ(tmp_path: Path) -> None:
    found = judge_recording(read_recording(write_run(tmp_path, [Run(slow_rank=(2, 1.6))])))
    assert found.found.findings[0].when.when == "unknown"
    assert "in the few steps of these files" in as_text(found, found.found)


@pytest.mark.thorough
def test_one_disturbed_call_of_another_plan_tells_no_costs(tmp_path: Path) -> None:
    """Of two calls in one chunk one takes four times as long; neither has a fault that the others could have."""
    run, quiet = Run(num_chunks=3), replace(Run(), num_chunks=1)
    found = judge_recording(
        read_recording(write_run(tmp_path, [quiet] * 2 + [replace(quiet, pair_s=4e-4)] + [run] * 6))
    )
    assert found.found.error == pytest.approx(0, abs=0.01)
    assert found.found.findings == ()
    assert found.costs.link.contention == 0
    assert found.costs.steps.unit_s["experts"] == pytest.approx(run.pair_s, rel=0.01)


def test_chunks_that_differ_by_chance_occupy_ports_for_longer(tmp_path: Path) -> None:
    """Of two chunks each is busy in another direction, so that a port takes 150 rows twice instead of 100."""
    recording = read_recording(write_run(tmp_path, [Run(size=2, num_chunks=2)] * CALLS))
    call = recording.calls[-1]
    ranks = []
    for rank, of in enumerate(call.ranks):
        rows = {"dispatch": [150.0, 50.0], "combine": [50.0, 150.0]}
        steps = [
            replace(step, units=rows[step.step.kind][step.step.chunk ^ rank]) if step.step.kind in rows else step
            for step in of.forward.steps
        ]
        ranks.append(replace(of, forward=replace(of.forward, steps=tuple(steps))))
    costs = fit_costs(recording.calls, recording)
    even, uneven = (conditions_of(one, {}, costs).link.each_link for one in (call, replace(call, ranks=tuple(ranks))))
    assert torch.equal(even.port_out_s, costs.link.each.port_out_s)
    assert (uneven.port_out_s / even.port_out_s).tolist() == pytest.approx([1.5, 1.5])
    assert (uneven.port_in_s / even.port_in_s).tolist() == pytest.approx([1.5, 1.5])


def test_a_replay_that_is_off_explains_nothing(tmp_path: Path) -> None:
    """Steps that overlap in a way that no schedule has: the experts' times are three times too long."""
    recording = read_recording(write_run(tmp_path, [Run()] * CALLS))
    for steps in (of.forward.steps for call in recording.calls for of in call.ranks):
        for step, times in zip(steps.layout.steps, steps.times, strict=True):
            if step.lane == "compute":
                start_s, end_s = (TIMES.index(name) for name in ("start_s", "end_s"))
                times[end_s] = times[start_s] + 3 * (times[end_s] - times[start_s])
    found = judge_recording(recording)
    assert not found.found.is_explained
    assert not found.found.is_healthy
    assert "UNEXPLAINED" in as_text(found, found.found)


def test_every_kind_of_cause_has_an_entry() -> None:
    """So that a mistyped kind is an error of types."""
    assert tuple(causes.CAUSES) == get_args(causes.CauseKind)
    named = [one for cause in causes.CAUSES.values() for one in (*cause.explains, cause.excess_kind)]
    assert set(named) <= set(causes.CAUSES)
