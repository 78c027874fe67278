"""A whole layer beside its peers and dense products of its FLOPs, in the same rounds; its router, its memory."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.gpu.checks import entries_for_all
from bench.gpu.workbench import Call, Workbench, with_entries
from tritonmoe.benchmarks.operation_calls import dense_products
from tritonmoe.benchmarks.roofline import BACKWARD_PRODUCTS, FORWARD_PRODUCTS, product_flops
from tritonmoe.benchmarks.shapes import LayerInputs
from tritonmoe.benchmarks.step_memory import kept_for_backward_mb, peak_mb
from tritonmoe.config.layer import MoEConfig
from tritonmoe.experts.adapters import ExpertAdapters
from tritonmoe.experts.moe_mlp import moe_mlp
from tritonmoe.integrations.transformers import peers
from tritonmoe.kernels.tiles import measured_tiles
from tritonmoe.routing.router import TopKRouter
from tritonmoe.runtime.files import Json

__all__ = ["OURS", "TUNED", "measure_layer", "measure_memory", "measure_router", "measure_ways"]

OURS, TUNED, DENSE, TORCH = "tritonmoe", "tritonmoe, tuned", "dense products", "torch backend"
UNCAPTURED = (TORCH, "eager")
"""They read how many pairs every expert has, so no CUDA graph can hold them."""
BATCHED_MM_LARGEST_PAIRS = 64
"""batched_mm copies the weights for every pair."""
EAGER_LARGEST_EXPERTS = 256
Function = Callable[[], Tensor]


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
    ours = {OURS: _with_tiles(_ours(bench.setting.layer_backend, inputs), {})}
    if entries:
        ours[TUNED] = _with_tiles(_ours(bench.setting.layer_backend, inputs), entries)
    functions, left_out = _peers(inputs) if others else ({}, {})
    # What is compared comes first: a peer may take the memory, or leave something behind.
    variants = {name: _step(inputs, function, backward) for name, function in ours.items()}
    variants[DENSE] = _dense_products(inputs, backward)
    variants |= {name: _step(inputs, function, backward) for name, function in functions.items()}
    found = bench.time(variants, OURS, UNCAPTURED)
    found["left_out"] |= left_out
    flops = product_flops(inputs.shape, num_tokens, backward=backward)
    dense = found["times"].get(DENSE)
    for name, timed in found["times"].items():
        timed["tflops"] = flops / timed["us"] / 1e6
        if dense is not None and name != DENSE and timed["timed_by"] == dense["timed_by"]:
            timed["fraction_of_dense"] = round(dense["us"] / timed["us"], 3)
    return found


def _ours(backend: str, inputs: LayerInputs, **options: Any) -> Function:
    x, ids, gates = inputs.x, inputs.topk_ids, inputs.topk_weights
    return lambda: moe_mlp(x, ids, gates, **inputs.arguments, **options, backend=backend)


def _peers(inputs: LayerInputs) -> tuple[dict[str, Function], dict[str, str]]:
    """Return all peers that can run, as functions of the same tensors, the torch backend last, and why others can't."""
    x, ids, gates = inputs.x, inputs.topk_ids, inputs.topk_weights
    found: dict[str, Function] = {}
    left_out: dict[str, str] = {}
    for peer in peers.PEERS:
        reason = _why_left_out(peer, inputs)
        if reason is None:
            try:
                function = _peer_function(peer, inputs)
            except Exception as error:  # another version of the package, say
                reason = f"{type(error).__name__}: {error}"[:300]
        if reason is not None:
            left_out[peer] = reason
            continue
        # transformers multiplies rows by the weights in their own dtype: give it the rows' one.
        found[peer] = lambda function=function: function(x, ids, gates.to(x.dtype))  # type: ignore[misc]
    found[TORCH] = _ours("torch", inputs)
    return found, left_out


def _with_tiles(function: Function, entries: measured_tiles.Entries) -> Function:
    return with_entries(function, entries)  # type: ignore[return-value]


def _why_left_out(peer: str, inputs: LayerInputs) -> str | None:
    reason = peers.peer_unusable_reason(peer, inputs.x.device, plain=inputs.shape.is_plain)
    if reason is None and peer == "batched_mm" and inputs.topk_ids.numel() > BATCHED_MM_LARGEST_PAIRS:
        reason = f"it copies the weights for every pair: only up to {BATCHED_MM_LARGEST_PAIRS} pairs"
    if reason is None and peer == "eager" and inputs.shape.num_experts > EAGER_LARGEST_EXPERTS:
        reason = f"it loops over the experts: only up to {EAGER_LARGEST_EXPERTS}"
    return reason


def _peer_function(peer: str, inputs: LayerInputs) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    w = inputs.weights
    if peer == "liger":
        return peers.liger_function(w["gate_up_proj"], w["down_proj"])
    if inputs.shape.is_plain:
        return peers.experts_function(peer, w["gate_up_proj"], w["down_proj"])
    return peers.gpt_oss_experts_function(peer, w["gate_up_proj"], w["down_proj"], w["gate_up_bias"], w["down_bias"])


def _step(inputs: LayerInputs, function: Function, backward: bool) -> Call:
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

    with_peers: whether those of the peers and the torch backend too, by name; a peer that raises is left out, and why.
    """
    inputs = bench.inputs(shape, num_tokens, routing)
    ours = _with_tiles(_ours(bench.setting.layer_backend, inputs), {})
    found: Json = _memory_of(inputs, ours)
    if with_peers:
        functions, left_out = _peers(inputs)
        memory: dict[str, Json] = {OURS: dict(found)}
        for name, function in functions.items():
            try:
                memory[name] = _memory_of(inputs, function)
            except Exception as error:
                left_out[name] = f"{type(error).__name__}: {error}"[:300]
        found |= {"memory": memory, "left_out": left_out}
    return found


def _memory_of(inputs: LayerInputs, function: Function) -> Json:
    kept = kept_for_backward_mb(function, inputs.leaves.values())
    return {"kept_mb": kept, "peak_mb": peak_mb(_step(inputs, function, backward=True))}


WAYS: dict[str, dict[str, object]] = {
    "hidden recomputed": {"save": "input"},
    "batch invariant": {"batch_invariant": True},
}
"""Options of moe_mlp with which its steps are timed too."""
RANK = 16
"""Of the adapters with which frozen experts are timed."""


def measure_ways(bench: Workbench, shape: str, num_tokens: int, routing: str) -> Json:
    """Time a forward and backward as it is, with one tile a program (as beside other ranks), and with WAYS.

    Adapters on frozen experts come last.
    """
    inputs = bench.inputs(shape, num_tokens, routing)
    backend = bench.setting.layer_backend
    variants = {OURS: _step(inputs, _with_tiles(_ours(backend, inputs), {}), True)}
    one_tile = entries_for_all(bench, inputs, {"persistent": False})
    variants["one tile a program"] = _step(inputs, _with_tiles(_ours(backend, inputs), one_tile), True)
    for name, options in WAYS.items():
        if name != "batch invariant" or backend == "triton":
            variants[name] = _step(inputs, _with_tiles(_ours(backend, inputs, **options), {}), True)
    variants[f"adapters of rank {RANK}"] = with_entries(_adapted_step(inputs, backend), {})
    return bench.time(variants, OURS)


def _adapted_step(inputs: LayerInputs, backend: str) -> Call:
    """Return a step of frozen experts with adapters, whose gradients and x's are all that is computed."""
    generator = torch.Generator(inputs.x.device).manual_seed(0)
    layout, weights = inputs.arguments, inputs.weights
    transposed = bool(layout.get("transposed"))

    def factor(*shape: int) -> Tensor:
        drawn = torch.randn(*shape, generator=generator, device=inputs.x.device) * 0.02
        return drawn.to(inputs.x.dtype).requires_grad_()

    def factors(weight: Tensor) -> tuple[Tensor, Tensor]:
        out_axis, in_axis = (2, 1) if transposed else (1, 2)
        experts = weight.shape[0]
        return factor(experts, RANK, weight.shape[in_axis]), factor(experts, weight.shape[out_axis], RANK)

    (up_a, up_b), (down_a, down_b) = factors(weights["gate_up_proj"]), factors(weights["down_proj"])
    adapters = ExpertAdapters(up_a, up_b, down_a, down_b)
    frozen = {name: weight.detach() for name, weight in weights.items()}

    def run() -> None:
        ids, gates = inputs.topk_ids, inputs.topk_weights
        y = moe_mlp(inputs.x, ids, gates, **{**layout, **frozen}, adapters=adapters, backend=backend)
        torch.autograd.grad(y, (inputs.x, up_a, up_b, down_a, down_b), inputs.dout)

    return run


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
