"""Programs of bench.gpu beside its worker: a world of one rank, one case alone, the checks with another ptxas."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from bench.gpu import alone, one_case, other_ptxas, programs
from bench.gpu.children import ROOT
from bench.gpu.setting import HEADLINE, REHEARSAL
from tritonmoe.ops.aot import TARGETS
from tritonmoe.ops.kernels import launch
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


def test_one_case_prints_its_result(capsys):
    assert one_case.main(["describe_machine", "{}", "--rehearse"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["card"] is None


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


def ptxas(folder, version):
    """Return the path of a program that says it is this ptxas."""
    path = folder / f"ptxas of {version}"
    path.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V{version}'\n")
    path.chmod(0o755)
    return str(path)


def test_the_newest_other_ptxas_is_taken(tmp_path):
    paths = [ptxas(tmp_path, version) for version in ("12.8.93", "13.0.88", "9.0.1")]
    broken = tmp_path / "ptxas"
    broken.write_text("no program")
    candidates = [None, str(broken), str(tmp_path / "missing"), *paths]
    assert other_ptxas.other_ptxas((12, 8, 93), candidates) == (paths[1], (13, 0, 88))
    assert other_ptxas.other_ptxas((13, 0, 88), candidates) == (paths[0], (12, 8, 93))
    assert other_ptxas.other_ptxas((12, 8, 93), [None, paths[0], str(broken)]) == ("", ())


def test_checks_with_another_ptxas(ran, monkeypatch, tmp_path):
    path = ptxas(tmp_path, "13.3.1")
    arguments = {"shape": HEADLINE, "num_tokens": 12, "routing": "uniform", "tiles": {"persistent": False}}
    ran["output"] = '{"passed": true}'
    monkeypatch.setattr(other_ptxas, "PLACES", (str(tmp_path / "ptxas*"),))
    monkeypatch.setattr(other_ptxas.shutil, "which", lambda tool: None)
    monkeypatch.setattr(other_ptxas, "own_version", lambda target: (12, 8, 93))
    assert other_ptxas.check_with_other_ptxas(Bench(), **arguments)["passed"]
    assert ran["calls"][-1][1] == {"TRITON_INTERPRET": "1"}
    bench = Bench(is_rehearsal=False)
    monkeypatch.setattr(launch, "target_of", lambda device: TARGETS["sm_90"])
    found = other_ptxas.check_with_other_ptxas(bench, **arguments)
    command, variables = ran["calls"][-1]
    assert json.loads(command[-1]) == arguments
    assert set(variables.values()) == {path}
    assert "TRITON_PTXAS_PATH" in variables
    assert (found["passed"], found["version"], found["own_version"]) == (True, "13.3.1", "12.8.93")
    monkeypatch.setattr(other_ptxas, "own_version", lambda target: (13, 3, 1))
    reason = "there is no other ptxas than Triton's own, 13.3.1"
    assert other_ptxas.check_with_other_ptxas(bench, **arguments) == {"left_out": reason}
    monkeypatch.setattr(launch, "target_of", lambda device: TARGETS["gfx942"])
    assert "not assembled by ptxas" in other_ptxas.check_with_other_ptxas(bench, **arguments)["left_out"]


def test_tritons_own_ptxas_has_a_version():
    assert len(other_ptxas.own_version(TARGETS["sm_90"])) == 3
