"""Programs of bench.gpu beside its worker: a world of one rank, and benchmarks of the package."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.gpu import alone, programs
from bench.gpu.children import ROOT
from bench.gpu.plan import cases
from bench.gpu.setting import DAY, HEADLINE, REHEARSAL
from tritonmoe.tools.benchmarks import overlap, transformers
from tritonmoe.tools.benchmarks.model_sizes import check_model_sizes
from tritonmoe.transports import LocalTransport

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="runs in the interpreter")


class ChangedRows:
    """A transport whose rows arrive changed."""

    rank, size = 0, 1

    def exchange(self, rows, input_splits, output_splits, out=None):
        self.received = rows.clone() if out is None else out.copy_(rows)
        self.received[-1, -1] += 1
        return self

    def wait(self):
        return self.received


def test_wrong_rows_are_found():
    assert alone._same_rows(LocalTransport(), REHEARSAL)
    assert alone._dropped_buffers(LocalTransport(), REHEARSAL)
    assert not alone._same_rows(ChangedRows(), REHEARSAL)
    assert not alone._dropped_buffers(ChangedRows(), REHEARSAL)


def test_other_bits_than_one_devices_are_found(monkeypatch):
    assert alone._call_is_right(LocalTransport(), REHEARSAL)
    step = alone._step

    def changed(*arguments):
        return lambda: [value + 1e-6 for value in step(*arguments)()]

    monkeypatch.setattr(alone, "_step", changed)
    assert not alone._call_is_right(LocalTransport(), REHEARSAL)


@pytest.mark.thorough
def test_a_world_of_one_over_gloo():
    command = [sys.executable, "-m", "bench.gpu.alone", "--rehearse"]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=os.environ).stdout
    found = json.loads(output.splitlines()[-1])
    assert len(found["checks"]) == 3
    assert all(found["checks"].values())
    assert found["gb_per_s"] > 0


class Bench:
    """What programs ask of a workbench."""

    def __init__(self, **fields):
        self.setting = replace(REHEARSAL, **fields)

    def forget(self): ...


@pytest.fixture
def ran(monkeypatch):
    """What programs are run with, and what the next one gives: its status, and what it prints."""
    ran = {"calls": [], "status": 0, "output": ""}

    def run_program(command, limit_s, variables=None):
        ran["calls"].append((command, variables))
        return {"command": " ".join(command), "status": ran["status"], "program_s": 1.0, "output": ran["output"]}

    monkeypatch.setattr(programs, "run_program", run_program)
    return ran


def test_a_result_stands_among_warnings(ran):
    ran["output"] = 'W: no affinity\n{"checks": {"a": true}}\n[rank0] destroy_process_group() was not called'
    assert programs.run_alone(Bench())["passed"]
    ran["output"] = '{"checks": {"a": true, "b": false}}'
    found = programs.run_alone(Bench())
    assert (found["passed"], found["errors"]) == (False, ["b"])
    ran["output"] = "nothing"
    assert programs.run_alone(Bench())["failed"] == "nothing"
    ran["output"] = ""
    assert programs.run_alone(Bench())["failed"] == "it printed nothing"
    ran["status"], ran["output"] = -6, '{"checks": {"a": true}}\nNCCL WARN'
    found = programs.run_alone(Bench())
    assert found["failed"].endswith("NCCL WARN")
    assert found["checks"] == {"a": True}, "what came before the end is kept"
    ran["status"], ran["output"] = None, ""
    assert programs.run_alone(Bench())["failed"] == "it took longer than 240 s: "
    assert ran["calls"][0][0][-1] == "--rehearse"
    programs.run_alone(Bench(is_rehearsal=False))
    assert ran["calls"][-1][0][1:] == ["-m", "bench.gpu.alone"]


def test_a_benchmarks_results_are_kept(ran, monkeypatch):
    def write_results(command, limit_s, variables=None):
        Path(command[-1]).write_text('{"results": [{"ratio": 2.0}]}')
        return {"command": "", "status": ran["status"], "program_s": 1.0, "output": "a table"}

    monkeypatch.setattr(programs, "run_program", write_results)
    found = programs.run_benchmark(Bench(), ["transformers", "--tokens", "16"])
    assert (found["results"], found["output"]) == ([{"ratio": 2.0}], "a table")
    ran["status"] = None
    assert programs.run_benchmark(Bench(), [])["failed"] == "it took longer than 240 s: a table"


@pytest.mark.parametrize("setting", [DAY, REHEARSAL], ids=["day", "rehearsal"])
def test_the_benchmarks_take_their_arguments(setting):
    overlap.check_arguments(overlap.make_parser().parse_args(setting.overlap.split()))
    parser = transformers.make_parser()
    arguments = parser.parse_args(setting.training.split())
    check_model_sizes(arguments)
    transformers._check_used(arguments, parser)
    shape = DAY.shapes[HEADLINE]
    if setting is DAY:
        sizes = arguments.hidden_size, arguments.intermediate_size, arguments.experts, arguments.top_k
        assert sizes == (shape.hidden_size, shape.intermediate_size, shape.num_experts, shape.top_k)


@pytest.mark.thorough
@pytest.mark.parametrize("case", ["D training", "D overlap emulated"])
def test_a_benchmark_in_rehearsal(case):
    (arguments,) = (one.arguments["arguments"] for one in cases(REHEARSAL, "sm_90") if one.name == case)
    found = programs.run_benchmark(Bench(), arguments)
    assert found.get("results"), found
