"""What is said against a hot expert: load_balance_loss_weight is recorded, and called 0 where it is known to be."""

import copy
import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tritonmoe as tm
from bench.faults import Fault
from bench.foreign_scenarios import Scenario
from bench.synthetic_traces import write_traces
from tests.support.synthetic_runs import Run, write_run
from tritonmoe.tools.doctor.attribution import attribute
from tritonmoe.tools.doctor.reading import read_traces
from tritonmoe.tools.doctor.recorded_run import RecordedRun, judge_recording
from tritonmoe.tools.doctor.verdict import as_json, as_text, describe_finding
from tritonmoe.tools.recording import record
from tritonmoe.tools.recording.recording_reader import read_recording
from tritonmoe.transports import Transport


@pytest.fixture(scope="module")
def hot(tmp_path_factory: pytest.TempPathFactory) -> RecordedRun:
    """A run with a hot rank."""
    return judge_recording(read_recording(write_run(tmp_path_factory.mktemp("hot"), [Run(hot_rank=(0, 2.0))] * 4)))


def said_of(run: RecordedRun, weights: list[float | None]) -> str:
    """Return what is to be done about a hot rank, where a layer's calls have these weights in turn."""
    calls = [
        replace(call, ranks=tuple(replace(of, load_balance_loss_weight=weight) for of in call.ranks))
        for call, weight in zip(run.recording.calls, itertools.cycle(weights), strict=False)
    ]
    (finding,) = run.found.findings
    assert finding.kind == "imbalance"
    return describe_finding(finding, run.found, replace(run.recording, calls=tuple(calls))).to_do


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ([0.0], "set load_balance_loss_weight, which is 0, and add the layers' aux_loss to the loss; "),
        ([0.01], "raise load_balance_loss_weight above 0.01; "),
        ([0.01, 0.02], "raise load_balance_loss_weight above 0.01 to 0.02; "),
        ([0.0, 0.02], "set load_balance_loss_weight in the layers where it is 0, or raise it above 0.02; "),
        ([None], "switch the router's auxiliary loss or bias on, or raise its weight: the recording"),
        ([None, 0.0], "switch the router's auxiliary loss or bias on, or raise its weight: the"),
        ([None, 0.5], "switch the router's auxiliary loss or bias on, or raise its weight (0.5 in the layers"),
    ],
)  # fmt: skip
def test_what_is_said_of_the_weight(weights: list[float | None], said: str, hot: RecordedRun) -> None:
    assert said_of(hot, weights).startswith(said)


def test_recordings_without_the_weight_do_not_know_it(hot: RecordedRun) -> None:
    assert {of.load_balance_loss_weight for call in hot.recording.calls for of in call.ranks} == {None}
    text = " ".join(as_text(hot, hot.found).split())
    assert (
        "To do: switch the router's auxiliary loss or bias on, or raise its weight: the recording doesn't have the"
        in text
    )
    assert as_json(hot, hot.found)["findings"][0]["to_do"] in text


@pytest.mark.parametrize("wrong", [-1.0, "0", True, float("nan")])
def test_a_weight_that_is_none_is_refused(wrong: object, tmp_path: Path) -> None:
    path = write_run(tmp_path, [Run(size=2)])
    header, call = map(json.loads, (path / "rank-0001.jsonl").read_text().splitlines())
    lines = header, {**call, "load_balance_loss_weight": wrong}
    (path / "rank-0001.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in lines))
    with pytest.raises(ValueError, match=r"rank-0001.jsonl line 2"):
        read_recording(path)


def test_files_of_others_do_not_say_it(tmp_path: Path) -> None:
    write_traces(Scenario("", 11, faults=(Fault("imbalance", (0,), 0.7),)), tmp_path)
    run = read_traces(tmp_path)
    assert "raise the weight (the files don't have the weight)" in " ".join(as_text(run, attribute(run.graph)).split())


def _calls(transport: Transport) -> None:
    generator = torch.Generator().manual_seed(0)
    of = [tm.MoEConfig(8, 4, 4, 2, load_balance_loss_weight=weight) for weight in (0.0, 0.25)]
    layers = [tm.MoELayer(config, transport, backend="torch", generator=generator) for config in of]
    layers.append(copy.deepcopy(layers[1]))
    x = torch.randn(16, 8, generator=generator)
    for layer in layers:
        layer(x)
    experts = tm.GroupedExperts(of[0], transport, backend="torch", generator=generator)
    experts(x, torch.zeros(16, 2, dtype=torch.int64), torch.rand(16, 2))


def test_weights_are_recorded(tmp_path: Path) -> None:
    with record(tmp_path):
        tm.run_on_emulated_ranks(_calls, 2)
    calls = read_recording(tmp_path).calls
    weights = [[of.load_balance_loss_weight for of in call.ranks] for call in calls]
    assert weights == [[0.0, 0.0], [0.25, 0.25], [0.25, 0.25], [None, None]]


def test_a_layer_that_is_spread_later_keeps_its_weight(tmp_path: Path) -> None:
    def call(transport: Transport) -> None:
        config = tm.MoEConfig(8, 4, 4, 2, load_balance_loss_weight=0.5)
        layer = tm.MoELayer(config, backend="torch", generator=torch.Generator().manual_seed(0))
        layer.experts.spread_over(transport)
        layer(torch.randn(16, 8))

    with record(tmp_path):
        tm.run_on_emulated_ranks(call, 2)
    assert read_recording(tmp_path).calls[0].ranks[1].load_balance_loss_weight == 0.5
