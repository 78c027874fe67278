"""Layers of bench.gpu as jobs run them: options, peers, few tokens, held multiprocessors, training, emulated ranks."""

import os
import subprocess
import sys
import types
from dataclasses import replace

import pytest
import torch

from bench.gpu import emulated_overlap, layers, multiprocessors, peers, training, ways
from bench.gpu.children import ROOT
from bench.gpu.setting import HEADLINE, REHEARSAL
from bench.gpu.workbench import Workbench
from tritonmoe.experts.moe_mlp import moe_mlp
from tritonmoe.tools.benchmarks.shapes import draw_inputs

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="runs in the interpreter")
OTHER = "gpt-oss"


@pytest.fixture(scope="module")
def bench():
    bench = Workbench(REHEARSAL)
    yield bench
    bench.clocks.close()


def draw(routing, shape=HEADLINE):
    return draw_inputs(REHEARSAL.shapes[shape], 12, routing, torch.float32, torch.device("cpu"))


def results_of(inputs, function):
    y = function()
    return [y.detach(), *torch.autograd.grad(y, list(inputs.leaves.values()), inputs.dout)]


def expected_of(inputs):
    x, ids, gates = inputs.x, inputs.topk_ids, inputs.topk_weights
    return results_of(inputs, lambda: moe_mlp(x, ids, gates, **inputs.arguments, backend="reference"))


@pytest.mark.parametrize("routing", ["uniform", "hot"])
def test_peers_compute_the_same_layer(routing):
    """With a hot expert others have no pair."""
    inputs = draw(routing)
    functions, _ = peers.peer_functions(inputs, peers.PEERS)
    assert {"eager", "grouped_mm", "torch grouped_mm"} <= set(functions)
    expected = expected_of(inputs)
    for name, function in functions.items():
        for found, right in zip(results_of(inputs, function), expected, strict=True):
            torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5, msg=name)


def test_peers_that_can_not_run_say_why(monkeypatch):
    _, reasons = peers.peer_functions(draw("uniform"), peers.COMPILING)
    assert reasons["moe-ops"] == "the package moe-ops is not installed"
    assert reasons["sonic-moe"] == "the package sonic-moe is not installed"
    _, reasons = peers.peer_functions(draw("uniform", OTHER), peers.PEERS)
    assert "SwiGLU without biases" in reasons["torch grouped_mm"]
    broken = types.ModuleType("moe_ops")
    broken.__spec__ = types.SimpleNamespace()
    monkeypatch.setitem(sys.modules, "moe_ops", broken)
    _, reasons = peers.peer_functions(draw("uniform"), ["moe-ops"])
    assert reasons["moe-ops"].startswith("ImportError: cannot import name")


def test_peers_that_compile_are_timed_alone(bench, monkeypatch):
    arguments = {"shape": HEADLINE, "num_tokens": 12, "routing": "uniform"}
    found = layers.measure_compiling_peers(bench, **arguments, backward=True)
    assert set(found["left_out"]) == set(peers.COMPILING)
    monkeypatch.setitem(peers.OTHERS, "moe-ops", peers.OTHERS["torch grouped_mm"])
    monkeypatch.setitem(peers.OTHERS, "sonic-moe", lambda *weights: lambda *of: 1 / 0)
    monkeypatch.setattr(peers, "PACKAGES", {})
    found = layers.measure_compiling_peers(bench, **arguments, backward=True)
    assert set(found["times"]) == {"tritonmoe", "moe-ops"}
    assert found["left_out"]["sonic-moe"].startswith("ZeroDivisionError")
    assert set(found["memory"]) == {"tritonmoe", "moe-ops"}
    assert found["memory"]["moe-ops"]["distance"] < 1e-5
    assert layers.measure_compiling_peers(bench, **arguments, backward=False)["memory"] == {}


def test_a_layer_in_every_way_in_which_jobs_run_it(bench):
    found = ways.measure_ways(bench, HEADLINE, 12, "uniform")
    expected = {"tritonmoe", "one tile a program", "hidden recomputed", "into a main_grad", "adapters of rank 16"}
    expected.add(ways.BESIDE_OTHER_RANKS)
    assert set(found["times"]) == expected
    assert found["left_out"] == {}


def test_a_main_grad_gets_every_steps_gradient(monkeypatch):
    inputs, made = draw("uniform"), []
    parameter = ways.nn.Parameter
    monkeypatch.setattr(ways.nn, "Parameter", lambda weight: made.append(parameter(weight)) or made[-1])
    step = ways._adding_step(inputs, "torch")
    for _ in range(2):
        step()
    expected = expected_of(inputs)[-len(made) :]
    for weight, grad in zip(made, expected, strict=True):
        torch.testing.assert_close(weight.main_grad, 2 * grad, rtol=1e-4, atol=1e-5)
        assert weight.grad is None


def test_layers_with_few_tokens_take_turns(bench, monkeypatch):
    asked = {}

    def time_them(variants, needed, uncaptured):
        asked.update(variants)
        return {"times": {}, "left_out": {}}

    monkeypatch.setattr(bench, "time", time_them)
    made = [bench.inputs(HEADLINE, 8, "uniform")]
    other_layer = ways._other_layer
    monkeypatch.setattr(ways, "_other_layer", lambda *of: made.append(other_layer(*of)) or made[-1])
    found = ways.measure_few(bench, HEADLINE, 8)
    assert {"tritonmoe", "the same weights", "eager", "torch grouped_mm", "torch backend"} <= set(asked)
    assert "liger" in found["left_out"]
    addresses = {weight.data_ptr() for layer in made for weight in layer.weights.values()}
    assert len(made) == ways.NUM_SETS
    assert len(addresses) == 2 * ways.NUM_SETS
    assert len({tuple(layer.topk_ids.flatten().tolist()) for layer in made}) == ways.NUM_SETS
    assert all(layer.topk_ids.max() < layer.shape.num_experts for layer in made)
    ran = []
    layers_in_turn = ways._in_turn(made, [lambda number=number: ran.append(number) for number in range(ways.NUM_SETS)])
    for _ in range(ways.NUM_SETS + 1):
        layers_in_turn()
    assert ran == [*range(ways.NUM_SETS), 0]


@pytest.mark.thorough
def test_a_layer_beside_held_multiprocessors(bench, monkeypatch):
    found = ways.measure_beside(bench, HEADLINE, 12, "uniform", [0, 2])
    all_ways = ("all multiprocessors", ways.BESIDE_OTHER_RANKS, "one tile a program")
    names = {f"{way}, {held} held" for way in all_ways for held in (0, 2)}
    assert set(found["times"]) == names
    assert all(len(timed["samples_us"]) == REHEARSAL.rounds for timed in found["times"].values())
    timed_calls = ways.TimedCalls

    def fail_once(*arguments):
        monkeypatch.setattr(ways, "TimedCalls", timed_calls)
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(ways, "TimedCalls", fail_once)
    found = ways.measure_beside(bench, HEADLINE, 12, "uniform", [0, 2])
    assert found["left_out"] == {"all multiprocessors, 0 held": "OutOfMemoryError: no memory"}
    assert set(found["times"]) == names - set(found["left_out"])


@pytest.fixture
def holder(monkeypatch):
    """What holds nothing; `free` says of each try whether the multiprocessors were free before its end."""
    made = multiprocessors.Holder(torch.device("cpu"))
    made.device, made.free, made.held_s = torch.device("cuda"), [], []
    made._stream = types.SimpleNamespace(query=lambda: made.free.pop(0), synchronize=lambda: None)
    made._launch = lambda num_programs, seconds: made.held_s.append(seconds)
    monkeypatch.setattr(multiprocessors.torch.cuda, "synchronize", lambda device: None)
    return made


def test_what_is_measured_ends_before_the_multiprocessors_are_free(holder):
    seconds = iter((5.0, 4.0, 3.0, 2.0))
    holder.free += [True, True, False]
    assert holder.seconds_beside(lambda: next(seconds), 8) == 2.0, "the first one is not measured beside anything"
    assert holder.held_s[1:] == [2 * holder.held_s[0], 4 * holder.held_s[0]]
    assert holder.held_s[0] > multiprocessors.MARGIN_S
    holder.free += [True] * multiprocessors.MOST_TRIES
    with pytest.raises(RuntimeError, match=r"8 multiprocessors held for .* were free before"):
        holder.seconds_beside(lambda: 1.0, 8)
    assert holder.seconds_beside(lambda: 7.0, 0) == 7.0


COMPILE = """
import torch
from bench.gpu.multiprocessors import DEPTHS, ROWS, WARPS, _hold
from tritonmoe.ops.aot import architecture_named, compile_unchecked
from tritonmoe.ops.kernels.launch import Launch
for name in ("sm_80", "sm_90", "sm_100"):
    operands = torch.empty(ROWS * DEPTHS[0], dtype=torch.bfloat16, device="meta")
    arguments = operands, torch.empty(8, ROWS, ROWS, device="meta"), 10**6
    item = Launch(_hold, (8,), arguments, {"ROWS": ROWS, "DEPTH": DEPTHS[0]}, {"num_warps": WARPS})
    compiled = compile_unchecked(item, architecture_named(name).target)
    loop = compiled.asm["ptx"].split("globaltimer")
    print(name, compiled.metadata.shared, len(loop) - 1)
"""


@pytest.mark.thorough
def test_no_product_fits_beside_what_holds_a_multiprocessor():
    """Two programs of 128 KiB fit on none of these GPUs, and the kernel reads the time again and again."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-c", COMPILE]
    output = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    lines = [line.split() for line in output.splitlines()]
    assert [name for name, *_ in lines] == ["sm_80", "sm_90", "sm_100"]
    assert all(128 << 10 <= int(shared) < 164 << 10 and reads == "3" for _, shared, reads in lines)


@pytest.mark.thorough
def test_training_of_a_whole_model(bench):
    found = training.measure_training(bench, 12, 6)
    assert list(found["times"]) == list(found["memory"]) == list(training.IMPLEMENTATIONS)
    assert found["passed"]
    assert max(found["differences"].values()) < 1e-5
    assert max(found["losses"].values()) - min(found["losses"].values()) < 1e-5
    ours = found["times"]["tritonmoe"]
    assert ours["tokens_per_s"] == pytest.approx(12e6 / ours["us"], rel=1e-2)
    job = training._Job(REHEARSAL, 12, 6)
    weights_mb = sum(4e-6 * parameter.numel() for parameter in job.model.parameters())
    # AdamW's two states of every weight, and its counts of steps
    assert found["held_mb"] == pytest.approx(3 * weights_mb, rel=1e-2)


@pytest.mark.thorough
def test_an_implementation_with_other_gradients_is_wrong(bench, monkeypatch):
    loss_and_gradient, memory = training._Job.loss_and_gradient, training._Job.memory

    def wrong(job, name):
        loss, gradient = loss_and_gradient(job, name)
        return loss, gradient.roll(1, 0) if name == "grouped_mm" else gradient

    def too_large(job, name):
        if name == "eager":
            raise torch.OutOfMemoryError("no memory")
        return memory(job, name)

    monkeypatch.setattr(training._Job, "loss_and_gradient", wrong)
    monkeypatch.setattr(training._Job, "memory", too_large)
    found = training.measure_training(bench, 12, 6)
    assert not found["passed"]
    assert found["differences"]["grouped_mm"] > training.LARGEST_DIFFERENCE > found["differences"]["eager"]
    assert found["left_out"] == {"eager": "OutOfMemoryError: no memory"}
    assert set(found["times"]) == {"tritonmoe", "grouped_mm"}
    monkeypatch.setattr(training._Job, "memory", lambda job, name: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        training.measure_training(bench, 12, 6)


@pytest.mark.thorough
@pytest.mark.alone
def test_overlap_of_an_emulated_rank(bench):
    found = emulated_overlap.measure_overlap(bench, "tiny", 2, 16, [1, 2])
    assert {"compute", "auto", "serial C=1", "overlapped C=2", "communication C=2"} <= set(found["samples_s"])
    assert all(len(samples) == REHEARSAL.rounds for samples in found["samples_s"].values())
    assert found["rate_bits_per_s"] > 0
    assert found["speed_up"] == found["summary"]["overlapped"]["speed_up"]


def test_results_of_layers_are_those_that_are_timed():
    inputs = draw("hot")
    setting = types.SimpleNamespace(setting=replace(REHEARSAL, layer_backend="torch"))
    for found, right in zip(results_of(inputs, layers.experts(setting, inputs, {})), expected_of(inputs), strict=True):
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)
