"""What the cases of bench.gpu measure and check, in the interpreter on a CPU with tiny layers."""

import itertools
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from bench.gpu import checks, children, clocks, layers, offloaded, operations, peers, programs, workbench
from bench.gpu.setting import HEADLINE, REHEARSAL
from bench.gpu.workbench import Workbench
from tritonmoe.ops.kernels.tiles import measured_tiles

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="runs in the interpreter")


@pytest.fixture(scope="module")
def bench():
    bench = Workbench(REHEARSAL)
    yield bench
    bench.clocks.close()


@pytest.mark.thorough
def test_samples_of_every_result_are_compared_with_fp64(bench):
    for shape, biases in ((HEADLINE, []), ("gpt-oss", ["dgate_up_bias", "ddown_bias"])):
        found = checks.check_samples(bench, shape, 12, "hot", {})
        of_experts = [f"d{name}" for name in ("gate_up_proj", "down_proj")] + biases
        expected = {"y", "dx", "dtopk_weights"}
        expected |= {f"{name} of the {of} expert" for name in of_experts for of in ("busiest", "middle", "idlest")}
        assert set(found["errors"]) == expected
        assert found["passed"]
        assert all(error["largest"]["error"] > 0 for error in found["errors"].values())


@pytest.mark.parametrize("name", ["dx", "ddown_proj"])
def test_an_error_of_a_thousandth_is_found(name, bench, monkeypatch):
    step = checks._step

    def wrong(inputs, backend):
        return {key: value * (1.001 if key == name else 1.0) for key, value in step(inputs, backend).items()}

    monkeypatch.setattr(checks, "_step", wrong)
    found = checks.check_samples(bench, HEADLINE, 12, "uniform", {})
    assert not found["passed"]
    assert {error.partition(" of ")[0] for error, of in found["errors"].items() if not of["passed"]} == {name}


@pytest.mark.thorough
def test_the_checked_tiles_are_used(bench):
    found = checks.check_samples(bench, HEADLINE, 12, "uniform", {"gather": "copy"})
    assert any("gather=copy" in tile for key, tile in found["tiles"].items() if " up " in key)


@pytest.mark.thorough
def test_a_bit_that_differs_in_one_rerun_is_found(bench, monkeypatch):
    assert checks.rerun(bench, HEADLINE, 12, "zipf", {}) == {"reruns": 2, "different": {}, "passed": True}
    step, runs = checks._step, []

    def unsteady(inputs, backend):
        found = step(inputs, backend)
        runs.append(1)
        if len(runs) == 4:  # one finds the keys of the tiles, one is the first
            found["dx"].view(torch.int32)[-1, -1] ^= 1
        return found

    monkeypatch.setattr(checks, "_step", unsteady)
    found = checks.rerun(bench, HEADLINE, 12, "zipf", {})
    assert found == {"reruns": 2, "different": {"dx": 1}, "passed": False}


@pytest.mark.thorough
def test_a_layer_beside_its_peers(bench):
    entries = {key: {"block_n": 16} for key in bench.calls_by_key(bench.inputs(HEADLINE, 12, "uniform"))}
    found = layers.measure_layer(bench, HEADLINE, 12, "uniform", backward=True, others=True, entries=entries)
    of_peers = {"eager", "grouped_mm", "torch grouped_mm"}
    assert {"tritonmoe", "tritonmoe, tuned", "torch backend"} | of_peers <= set(found["times"])
    assert set(found["left_out"]) >= {"sonicmoe", "liger"}
    assert set(found["left_out"]) | set(found["times"]) > set(peers.PEERS)
    ours = found["times"]["tritonmoe"]
    assert ours["tflops"] == pytest.approx(3 * 6 * 24 * 32 * 16 / ours["us"] / 1e6)
    assert ours["fraction_of_dense"] > 0
    assert len(ours["samples_us"]) == REHEARSAL.rounds


def test_a_peer_that_fails_is_left_out_and_ours_is_not(bench, monkeypatch):
    def refuse(*weights, **keywords):
        raise ImportError("cannot import name 'MixtralExperts'")

    monkeypatch.setattr(peers.bench_model, "experts_function", refuse)
    found = layers.measure_layer(bench, HEADLINE, 12, "uniform", backward=False, others=True, entries={})
    assert found["left_out"]["eager"] == "ImportError: cannot import name 'MixtralExperts'"
    monkeypatch.setattr(layers, "moe_mlp", refuse)
    with pytest.raises(ImportError):
        layers.measure_layer(bench, HEADLINE, 12, "uniform", backward=False, others=False, entries={})


def test_what_comes_after_a_failed_capture_gets_another_pool(bench, monkeypatch):
    """It names no device of its own: a stand-in of TimedCalls says which pool it got."""
    pools = itertools.count()
    used = {}

    class TimedCalls(workbench.TimedCalls):
        def __init__(self, run, device, batch_s, pool, captures):
            super().__init__(run, device, batch_s)
            used[run] = pool, captures
            if run is read:
                self.way = f"{workbench.CAPTURE_FAILED}operation not permitted when stream is capturing"
            if run is fail:
                raise torch.OutOfMemoryError("no memory")

    def ours(): ...
    def read(): ...
    def fail(): ...
    def last(): ...

    monkeypatch.setattr(workbench, "graph_pool", lambda device: next(pools))
    monkeypatch.setattr(workbench, "TimedCalls", TimedCalls)
    variants = {run.__name__: run for run in (ours, read, fail, last)}
    found = bench.time(variants, "ours", ["last"])
    assert used == {ours: (0, True), read: (0, True), fail: (1, True), last: (2, False)}
    assert set(found["times"]) == {"ours", "read", "last"}


def test_what_is_compared_is_timed_first_and_what_reads_is_not_captured(bench, monkeypatch):
    asked = []

    def time_them(variants, needed, uncaptured):
        asked.append((list(variants), needed, uncaptured))
        ways = {name: "events" if name in uncaptured else "graph" for name in variants}
        return {"times": {name: {"us": 1.0, "timed_by": way} for name, way in ways.items()}, "left_out": {}}

    monkeypatch.setattr(bench, "time", time_them)
    entries = {"sm_90 bfloat16 up 1x1": {"block_n": 16}}
    found = layers.measure_layer(bench, HEADLINE, 12, "uniform", backward=False, others=True, entries=entries)
    ((names, needed, uncaptured),) = asked
    assert names[:3] == ["tritonmoe", "tritonmoe, tuned", "dense products"]
    assert names[-1] == "torch backend"
    assert needed == "tritonmoe"
    assert set(uncaptured) == {"torch backend", "eager"}
    fractions = {name for name, timed in found["times"].items() if "fraction_of_dense" in timed}
    assert fractions == set(names) - {"dense products", "torch backend", "eager"}


def test_a_variant_that_fails_while_it_is_timed_is_left_out(bench):
    def run_out_of_memory():
        calls.append(1)
        if len(calls) > 2:
            raise torch.OutOfMemoryError("no memory")

    calls = []
    found = bench.time({"ours": list, "peer": run_out_of_memory}, "ours")
    assert set(found["times"]) == {"ours"}
    assert found["left_out"] == {"peer": "OutOfMemoryError: no memory"}
    calls = []
    with pytest.raises(torch.OutOfMemoryError):
        bench.time({"ours": run_out_of_memory, "peer": list}, "ours")


def test_memory_is_h_and_the_mark_of_the_call(bench):
    """h in the layer's dtype, one int64 that marks the call, and nothing that depends on D."""
    found = layers.measure_memory(bench, HEADLINE, 12, "uniform", with_peers=False)
    assert found["kept_mb"] == round((24 * 2 * 16 * 4 + 8) / 1e6, 3)
    assert found["peak_mb"] > 0


def test_offloaded_experts(bench):
    found = offloaded.measure_offloaded(bench, HEADLINE, 12, 0.25)
    assert found["passed"]
    assert found["same_bits"] == {"files": True}
    assert set(found["times"]) == {offloaded.RESIDENT, offloaded.KERNELS, offloaded.COPIES, "files"}
    assert found["tokens_per_expert"] == 6
    assert "forwards and backwards of experts took" in found["said"]["files"]


def test_single_operations(bench):
    found = operations.measure_operation(bench, "down", HEADLINE, 12)
    assert {"kernel", "dense product"} == set(found["times"])
    assert found["times"]["kernel"]["gb_per_s"] >= 0
    assert operations.measure_host(bench, "group", 8)["launches"] == 1
    profile = operations.profile_step(bench, HEADLINE, 12, {})
    assert profile["kernels"]
    assert profile["total_us"] >= max(kernel["us"] for kernel in profile["kernels"])


@pytest.mark.thorough
def test_what_is_in_the_cache_of_tiles_is_not_measured(bench, monkeypatch):
    monkeypatch.setattr(measured_tiles, "kept", lambda: pytest.fail("tiles.json was asked"))
    operations.measure_operation(bench, "up", HEADLINE, 12)
    checks.check_samples(bench, HEADLINE, 12, "uniform", {})


def test_clocks_are_read_while_something_runs():
    printing = (
        "print('1980, 700.5, 61', flush=True); print('[N/A], 1, 1', flush=True); print('1900, 500.5, 61', flush=True)"
    )
    started = time.monotonic()
    read = clocks.Clocks(("python", "-c", f"{printing}; import time; time.sleep(60)"))
    while read.since(started)["readings"] < 2:
        assert time.monotonic() < started + 30
        time.sleep(0.01)
    found = read.since(started)
    assert found == {"readings": 2, "sm_mhz": 1940.0, "watts": 600.5, "celsius": 61.0, "lowest_sm_mhz": 1900.0}
    assert read.since(time.monotonic()) == {"readings": 0}
    read.close()


def test_a_program_that_takes_too_long_is_killed_with_what_it_started():
    child = "print(1, flush=True); import time; time.sleep(60)"
    script = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    started = time.monotonic()
    found = children.run_program([sys.executable, "-c", script], limit_s=1.0)
    assert time.monotonic() - started < 30
    assert found["status"] is None


@pytest.mark.thorough
def test_a_program_ends_with_the_process_that_started_it():
    child = "print(1, flush=True); import time; time.sleep(60)"
    script = f"""
import subprocess, sys
from tritonmoe.runtime.processes import dies_with_its_parent
process = subprocess.Popen([sys.executable, "-c", {child!r}], preexec_fn=dies_with_its_parent)
process.wait()
"""
    command = [sys.executable, "-c", script]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=children.ROOT, text=True)
    assert parent.stdout.readline() == "1\n"
    parent.send_signal(signal.SIGKILL)
    assert parent.stdout.read() == ""  # its end is closed when the child is gone too
    parent.wait()


def on_a_gpu(monkeypatch, output, status):
    """Make programs print this."""
    setting = programs.Workbench.__new__(programs.Workbench)
    setting.setting = replace(REHEARSAL, is_rehearsal=False)
    setting.forget = lambda: None
    commands = []

    def run_program(command, limit_s, variables=None):
        commands.append(command)
        return {"command": " ".join(command), "status": status, "program_s": 1.0, "output": output}

    monkeypatch.setattr(programs, "run_program", run_program)
    return setting, commands


def test_files_of_tests(monkeypatch):
    bench, _ = on_a_gpu(monkeypatch, "FAILED tests/a.py::test_b - assert 1\n1 failed, 2 passed in 1 s", 1)
    found = programs.run_tests(bench, "tests/a.py")
    assert (found["passed"], found["failures"]) == (False, ["FAILED tests/a.py::test_b - assert 1"])
    lines = (
        "[gw1] [  8%] PASSED tests/a.py::test_a[float16] ",
        "[gw0] [ 16%] FAILED tests/a.py::test_b ",
        "tests/a.py::test_c[a b] PASSED      [ 25%]",
        "tests/a.py::test_d ERROR [100%]",
        "[gw1] [ 33%] SKIPPED tests/a.py::test_e ",
        "a line that says PASSED",
    )
    bench, commands = on_a_gpu(monkeypatch, "\n".join(lines), None)
    found = programs.run_tests(bench, "tests/a.py")
    assert "-v" in commands[0]
    assert (found["passed"], found["num_passed"]) == (False, 2)
    assert found["failures"] == [lines[1].strip(), lines[3]]
    assert found["problem"] == "cut after 240 s, when 2 had passed"
    for status, passed in ((0, True), (programs.NO_TESTS, True), (None, False)):
        bench, _ = on_a_gpu(monkeypatch, "", status)
        assert programs.run_tests(bench, "tests/a.py")["passed"] == passed


def test_the_memory_of_peers_stands_beside_ours(bench):
    found = layers.measure_memory(bench, HEADLINE, 12, "uniform", with_peers=True)
    assert {"tritonmoe", "torch backend", "eager"} <= set(found["memory"])
    assert found["memory"]["tritonmoe"] == {"kept_mb": found["kept_mb"], "peak_mb": found["peak_mb"]}
    assert all(one["kept_mb"] > 0 and one["peak_mb"] > 0 for one in found["memory"].values())
    assert all(one["distance"] < 1e-5 for name, one in found["memory"].items() if name != "tritonmoe")
