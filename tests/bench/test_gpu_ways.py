"""Layers of bench.gpu beside their peers, and with few tokens."""

import sys
import types
from dataclasses import replace

import pytest
import torch

from bench.gpu import layers, peers
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


def test_layers_with_few_tokens_take_turns(bench, monkeypatch):
    asked = {}

    def time_them(variants, needed, uncaptured):
        asked.update(variants)
        return {"times": {}, "left_out": {}}

    monkeypatch.setattr(bench, "time", time_them)
    made = [bench.inputs(HEADLINE, 8, "uniform")]
    other_layer = layers._other_layer
    monkeypatch.setattr(layers, "_other_layer", lambda *of: made.append(other_layer(*of)) or made[-1])
    found = layers.measure_few(bench, HEADLINE, 8)
    assert {"tritonmoe", "the same weights", "eager", "torch grouped_mm", "torch backend"} <= set(asked)
    assert "liger" in found["left_out"]
    addresses = {weight.data_ptr() for layer in made for weight in layer.weights.values()}
    assert len(made) == layers.NUM_SETS
    assert len(addresses) == 2 * layers.NUM_SETS
    assert len({tuple(layer.topk_ids.flatten().tolist()) for layer in made}) == layers.NUM_SETS
    assert all(layer.topk_ids.max() < layer.shape.num_experts for layer in made)
    ran = []
    layers_in_turn = layers._in_turn(
        made, [lambda number=number: ran.append(number) for number in range(layers.NUM_SETS)]
    )
    for _ in range(layers.NUM_SETS + 1):
        layers_in_turn()
    assert ran == [*range(layers.NUM_SETS), 0]


def test_results_of_layers_are_those_that_are_timed():
    inputs = draw("hot")
    setting = types.SimpleNamespace(setting=replace(REHEARSAL, layer_backend="torch"))
    for found, right in zip(results_of(inputs, layers.experts(setting, inputs, {})), expected_of(inputs), strict=True):
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)
