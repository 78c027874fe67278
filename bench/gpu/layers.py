"""A whole layer beside its peers and dense products of its FLOPs, in the same rounds; its router, its memory."""

import itertools
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from bench.gpu.peers import COMPILING, PEERS, Function, peer_functions
from bench.gpu.workbench import Call, Workbench, with_entries
from tritonmoe.config.layer import MoEConfig
from tritonmoe.experts.moe_mlp import moe_mlp
from tritonmoe.ops.kernels.tiles import measured_tiles
from tritonmoe.routing.router import TopKRouter
from tritonmoe.runtime.files import Json
from tritonmoe.tools.benchmarks.roofline import BACKWARD_PRODUCTS, FORWARD_PRODUCTS, product_flops
from tritonmoe.tools.benchmarks.shapes import LayerInputs, dense_products, draw_routing
from tritonmoe.tools.benchmarks.step_memory import kept_for_backward_mb, peak_mb

__all__ = ["measure_compiling_peers", "measure_few", "measure_layer", "measure_memory", "measure_router"]

OURS, TUNED, DENSE, TORCH = "tritonmoe", "tritonmoe, tuned", "dense products", "torch backend"
UNCAPTURED = (TORCH, "eager")
"""They read how many pairs every expert has, so no CUDA graph can hold them."""
NUM_SETS = 4
"""So many layers take turns where tokens are few: what one has left in the L2 cache the others have replaced."""


def measure_layer(
    bench: Workbench, shape: str, num_tokens: int, routing: str, backward: bool, others: bool, entries: Json
) -> Json:
    """Time a forward, or a forward and backward, of moe_mlp in the table's tiles beside dense products of its FLOPs.

    Args:
        others: whether the peers and the torch backend are timed too.
        entries: measured tiles; where there are any, moe_mlp is timed with them as well.

    Returns:
        What Workbench.time does, with "tflops" of every time, and "fraction_of_dense" where both are timed in one way.
    """
    inputs = bench.inputs(shape, num_tokens, routing)
    ours = {OURS: experts(bench, inputs, {})}
    if entries:
        ours[TUNED] = experts(bench, inputs, entries)
    functions, left_out = others_of(bench, inputs) if others else ({}, {})
    # What is compared comes first: a peer may take the memory, or leave something behind.
    variants = {name: step_of(inputs, function, backward) for name, function in ours.items()}
    variants[DENSE] = _dense_products(inputs, backward)
    variants |= {name: step_of(inputs, function, backward) for name, function in functions.items()}
    found = bench.time(variants, OURS, UNCAPTURED)
    found["left_out"] |= left_out
    flops = product_flops(inputs.shape, num_tokens, backward=backward)
    dense = found["times"].get(DENSE)
    for name, timed in found["times"].items():
        timed["tflops"] = flops / timed["us"] / 1e6
        if dense is not None and name != DENSE and timed["timed_by"] == dense["timed_by"]:
            timed["fraction_of_dense"] = round(dense["us"] / timed["us"], 3)
    return found


def experts(bench: Workbench, inputs: LayerInputs, entries: measured_tiles.Entries) -> Function:
    """Return moe_mlp of these inputs, with these measured tiles, as a function that gives y."""
    x, ids, gates, backend = inputs.x, inputs.topk_ids, inputs.topk_weights, bench.setting.layer_backend
    run = with_entries(lambda: moe_mlp(x, ids, gates, **inputs.arguments, backend=backend), entries)
    return run  # type: ignore[return-value]


def others_of(bench: Workbench, inputs: LayerInputs) -> tuple[dict[str, Function], dict[str, str]]:
    """Return the peers that can run, the torch backend last, as functions that give y, and why others can't."""
    found, left_out = peer_functions(inputs, PEERS)
    x, ids, gates = inputs.x, inputs.topk_ids, inputs.topk_weights
    found[TORCH] = lambda: moe_mlp(x, ids, gates, **inputs.arguments, backend="torch")
    return found, left_out


def step_of(inputs: LayerInputs, function: Function, backward: bool) -> Call:
    """Return a forward without a graph, or a forward and the gradients of everything."""

    def forward_only() -> None:
        with torch.no_grad():
            function()

    def both() -> None:
        torch.autograd.grad(function(), list(inputs.leaves.values()), inputs.dout)

    return both if backward else forward_only


def _dense_products(inputs: LayerInputs, backward: bool) -> Call:
    """Return matrix products of the layer's FLOPs: N rows, no experts, gather, activation or sum."""
    products = dense_products(inputs)
    names = (*FORWARD_PRODUCTS, *(BACKWARD_PRODUCTS if backward else ()))

    def run() -> None:
        for name in names:
            products[name]()

    return run


def measure_memory(bench: Workbench, shape: str, num_tokens: int, routing: str, with_peers: bool) -> Json:
    """Return the megabytes that a forward keeps for backward beside x and weights, and the most that a step holds.

    with_peers: whether those of the peers and the torch backend too, by name, and how far each one's result is from
    ours, relative; a peer that raises is left out, and why.
    """
    inputs = bench.inputs(shape, num_tokens, routing)
    ours = experts(bench, inputs, {})
    if not with_peers:
        return _memory_of(inputs, ours)
    functions, left_out = others_of(bench, inputs)
    memory = _memory_beside(inputs, ours, functions, left_out)
    return {**memory[OURS], "memory": memory, "left_out": left_out}


def measure_compiling_peers(bench: Workbench, shape: str, num_tokens: int, routing: str, backward: bool) -> Json:
    """Time moe_mlp beside the peers that compile for minutes, and measure their memory; as measure_layer does."""
    inputs = bench.inputs(shape, num_tokens, routing)
    functions, left_out = peer_functions(inputs, COMPILING)
    if not functions:
        return {"left_out": left_out}
    ours = experts(bench, inputs, {})
    variants = {OURS: ours, **functions}
    found = bench.time({name: step_of(inputs, run, backward) for name, run in variants.items()}, OURS)
    memory = _memory_beside(inputs, ours, functions, left_out) if backward else {}
    return {**found, "left_out": left_out | found["left_out"], "memory": memory}


def _memory_beside(
    inputs: LayerInputs, ours: Function, functions: dict[str, Function], left_out: dict[str, str]
) -> dict[str, Json]:
    """Return the memory of moe_mlp and of every peer, and how far their results are from ours; note what raises."""
    memory = {OURS: _memory_of(inputs, ours)}
    with torch.no_grad():
        y = ours()
    for name, function in functions.items():
        try:
            memory[name] = _memory_of(inputs, function)
            with torch.no_grad():
                memory[name]["distance"] = float((function() - y).norm() / y.norm())
        except Exception as error:
            left_out[name] = f"{type(error).__name__}: {error}"[:300]
    return memory


def _memory_of(inputs: LayerInputs, function: Function) -> Json:
    kept = kept_for_backward_mb(function, inputs.leaves.values())
    return {"kept_mb": kept, "peak_mb": peak_mb(step_of(inputs, function, backward=True))}


def measure_router(bench: Workbench, shape: str, num_tokens: int) -> Json:
    """Time TopKRouter's forward and its forward and backward beside PyTorch's operations, and its logits' product."""
    inputs = bench.inputs(shape, num_tokens, "uniform")
    layer = inputs.shape
    sizes = layer.hidden_size, layer.intermediate_size, layer.num_experts, layer.top_k
    variants: dict[str, Call] = {}
    for name, backend in (("", "auto"), (f" of the {TORCH}", "torch")):
        router = TopKRouter(MoEConfig(*sizes), backend=backend).to(inputs.x.device, inputs.x.dtype)
        variants |= {f"{step}{name}": call for step, call in _router_steps(router, inputs).items()}
    product = inputs.x.detach() @ router.weight.detach().mT
    variants["product of the logits alone"] = lambda: torch.mm(inputs.x.detach(), router.weight.detach().mT)
    return {**bench.time(variants, "forward"), "logits": list(product.shape)}


def _router_steps(router: TopKRouter, inputs: LayerInputs) -> dict[str, Call]:
    dweights = torch.ones_like(inputs.topk_weights)

    def forward() -> None:
        with torch.no_grad():
            router(inputs.x)

    def both() -> None:
        torch.autograd.grad(router(inputs.x).topk_weights, (inputs.x, router.weight), dweights)

    return {"forward": forward, "forward+backward": both}


def measure_few(bench: Workbench, shape: str, num_tokens: int) -> Json:
    """Time a forward of few tokens in NUM_SETS layers in turn, each with weights and a routing of its own, and peers.

    Every layer's weights come from the device's memory, as they do in a model; "the same weights" are ours of one layer
    again and again, whose weights may stay in the cache.
    """
    inputs = bench.inputs(shape, num_tokens, "uniform")
    layers = [inputs, *(_other_layer(inputs, number) for number in range(1, NUM_SETS))]
    ours = [experts(bench, layer, {}) for layer in layers]
    variants = {OURS: _in_turn(layers, ours)}
    variants["the same weights"] = step_of(inputs, ours[0], False)
    found, reasons = zip(*(others_of(bench, layer) for layer in layers), strict=True)
    for name in found[0]:
        variants[name] = _in_turn(layers, [functions[name] for functions in found])
    times = bench.time(variants, OURS, UNCAPTURED)
    times["left_out"] |= reasons[0]
    return times


def _other_layer(inputs: LayerInputs, number: int) -> LayerInputs:
    """Return a layer of the same sizes with weights at other addresses, and another routing."""
    shape, generator = inputs.shape, torch.Generator(inputs.x.device).manual_seed(number)
    ids, gates = draw_routing(len(inputs.x), shape.num_experts, shape.top_k, "uniform", generator)
    weights = {name: nn.Parameter(weight.detach().roll(number, 0)) for name, weight in inputs.weights.items()}
    return replace(inputs, topk_ids=ids, topk_weights=gates.requires_grad_(), weights=weights)


def _in_turn(layers: Sequence[LayerInputs], functions: Sequence[Function]) -> Call:
    """Return a call that runs the next layer's forward, and behind the last one the first."""
    calls = itertools.cycle([step_of(layer, run, False) for layer, run in zip(layers, functions, strict=True)])
    return lambda: next(calls)()
