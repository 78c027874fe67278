"""What `tritonmoe bench gpu` measures of a layer: correctness against fp64, and its time beside its peers."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tritonmoe import backends
from tritonmoe.benchmarks.roofline import backward_flops, forward_flops
from tritonmoe.benchmarks.shapes import LayerInputs, LayerShape, draw_inputs
from tritonmoe.benchmarks.timing import Samples, interleave, summarize, synchronize
from tritonmoe.experts.moe_mlp import moe_mlp
from tritonmoe.integrations.transformers import peers
from tritonmoe.runtime.files import Json

__all__ = ["Setting", "check", "measure_layer", "time_variants"]

MOST_CHECKED_PARAMETERS = 1_700_000_000
"""So many parameters and their gradients take 27 GB in fp64."""
BATCHED_MM_LARGEST_PAIRS = 64
"""batched_mm copies the weights for every pair."""
EAGER_LARGEST_EXPERTS = 256


@dataclass(frozen=True)
class Setting:
    """What is the same for every case of a run."""

    device: torch.device
    dtype: torch.dtype
    backend: str
    rounds: int
    batch_s: float
    """A timed batch of calls lasts about so long."""


def check(shape: LayerShape, num_tokens: int, routing: str, setting: Setting) -> Json:
    """Compare y and every gradient with fp64; allowed is twice the error of plain PyTorch in the same dtype.

    Experts are left out where fp64 weights would not fit; results["num_experts"] says how many remained.
    """
    per_expert = shape.num_parameters // shape.num_experts
    shape = replace(shape, num_experts=max(shape.top_k, min(shape.num_experts, MOST_CHECKED_PARAMETERS // per_expert)))
    inputs = draw_inputs(shape, num_tokens, routing, setting.dtype, setting.device)
    ours = _values(inputs, setting.backend, setting.dtype)
    plain = _values(inputs, "reference", setting.dtype)
    exact = _values(inputs, "reference", torch.float64)
    errors = {}
    for name, value in exact.items():
        error, plain_error = (float((found[name].double() - value).abs().max()) for found in (ours, plain))
        floor = 4 * torch.finfo(setting.dtype).eps * max(1.0, float(value.abs().max()))
        errors[name] = {
            "error": error,
            "plain_error": plain_error,
            "allowed": 2 * plain_error + floor,
            "passed": error <= 2 * plain_error + floor,  # NaN is no pass
        }
    return {"num_experts": shape.num_experts, "errors": errors, "passed": all(e["passed"] for e in errors.values())}


def _values(inputs: LayerInputs, backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Give y and the gradient of every leaf, computed in `dtype`; the gate weights stay in fp32 or better."""
    leaves = {
        name: leaf.detach().to(torch.promote_types(leaf.dtype, dtype)).requires_grad_()
        for name, leaf in inputs.leaves.items()
    }
    arguments = {**inputs.arguments, **{name: leaves[name] for name in inputs.weights}}
    y = moe_mlp(leaves["x"], inputs.topk_ids, leaves["topk_weights"], **arguments, backend=backend)
    grads = torch.autograd.grad(y, list(leaves.values()), inputs.dout.to(y.dtype))
    return {"y": y.detach(), **{f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}}


def measure_layer(shape: LayerShape, num_tokens: int, routing: str, setting: Setting) -> Json:
    """Time moe_mlp, its peers and dense products of the same FLOPs in the same rounds; memory and grouping too."""
    inputs = draw_inputs(shape, num_tokens, routing, setting.dtype, setting.device)
    functions, left_out = _implementations(inputs, setting)
    results: Json = {}
    for backward in (False, True):
        flops = forward_flops(shape, num_tokens) + (backward_flops(shape, num_tokens) if backward else 0)
        variants = {name: _step(inputs, function, backward) for name, function in functions.items()}
        variants["dense products"] = _dense_products(inputs, backward)
        times, failed = time_variants(variants, setting)
        left_out |= failed
        results["forward+backward" if backward else "forward"] = _rates(times, flops)
    results["memory"] = _memory(inputs, functions["tritonmoe"])
    ops = backends.choose(setting.backend, setting.device, setting.dtype)
    times, _ = time_variants({"group": lambda: ops.group(inputs.topk_ids, shape.num_experts)}, setting)
    results["group_us"] = round(1e6 * statistics.median(times["group"]), 2)
    results["left_out"] = left_out
    return results


def _implementations(inputs: LayerInputs, setting: Setting) -> tuple[dict[str, Callable[[], Tensor]], dict[str, str]]:
    """Give tritonmoe and every peer that can run, as functions of the very same tensors, and why others can't."""
    shape, x, ids, gates = inputs.shape, inputs.x, inputs.topk_ids, inputs.topk_weights
    functions: dict[str, Callable[[], Tensor]] = {
        "tritonmoe": lambda: moe_mlp(x, ids, gates, **inputs.arguments, backend=setting.backend)
    }
    left_out: dict[str, str] = {}
    for peer in peers.PEERS:
        reason = peers.peer_unusable_reason(peer, setting.device, plain=shape.is_plain)
        if reason is None and peer == "batched_mm" and ids.numel() > BATCHED_MM_LARGEST_PAIRS:
            reason = f"it copies the weights for every pair: only up to {BATCHED_MM_LARGEST_PAIRS} pairs"
        if reason is None and peer == "eager" and shape.num_experts > EAGER_LARGEST_EXPERTS:
            reason = f"it loops over the experts: only up to {EAGER_LARGEST_EXPERTS}"
        if reason is not None:
            left_out[peer] = reason
            continue
        try:
            function = _peer_function(peer, inputs)
        except Exception as error:  # another version of the package, say
            left_out[peer] = _shortened(error)
            continue
        # transformers multiplies rows by the weights in their own dtype: give it the rows' one.
        functions[peer] = lambda function=function: function(x, ids, gates.to(x.dtype))  # type: ignore[misc]
    return functions, left_out


def _peer_function(peer: str, inputs: LayerInputs) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    w = inputs.weights
    if peer == "liger":
        return peers.liger_function(w["gate_up_proj"], w["down_proj"])
    if inputs.shape.is_plain:
        return peers.experts_function(peer, w["gate_up_proj"], w["down_proj"])
    return peers.gpt_oss_experts_function(peer, w["gate_up_proj"], w["down_proj"], w["gate_up_bias"], w["down_bias"])


def _shortened(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:300]


def _step(inputs: LayerInputs, function: Callable[[], Tensor], backward: bool) -> Callable[[], None]:
    def forward_only() -> None:
        with torch.no_grad():
            function()

    def both() -> None:
        torch.autograd.grad(function(), list(inputs.leaves.values()), inputs.dout)

    return both if backward else forward_only


def _dense_products(inputs: LayerInputs, backward: bool) -> Callable[[], None]:
    """Give matrix products of the layer's FLOPs: N rows, no experts, gather, activation or sum."""
    shape, x = inputs.shape, inputs.x.detach()
    n, d, f = inputs.topk_ids.numel(), shape.hidden_size, shape.intermediate_size
    width = 2 * f if shape.layout.gated else f
    rows, hidden, inner = (x.new_empty(n, columns).normal_() for columns in (d, width, f))
    w1, w2 = x.new_empty(d, width).normal_(), x.new_empty(f, d).normal_()

    def run() -> None:
        rows @ w1
        inner @ w2
        if backward:
            rows @ w2.mT
            hidden @ w1.mT
            hidden.mT @ rows
            inner.mT @ rows

    return run


def time_variants(variants: Mapping[str, Callable[[], object]], setting: Setting) -> tuple[Samples, dict[str, str]]:
    """Time all variants in the same rounds, in batches of calls; one that fails is left out, with its error."""
    batches: dict[str, Callable[[], None]] = {}
    counts: dict[str, int] = {}
    failed: dict[str, str] = {}
    for name, run in variants.items():
        try:
            run()
            synchronize()
            started = time.perf_counter()
            run()
            synchronize()
        except Exception as error:
            if name == "tritonmoe":
                raise
            failed[name] = _shortened(error)
            gc.collect()
            continue
        count = max(1, min(200, round(setting.batch_s / (time.perf_counter() - started))))

        def batch(run: Callable[[], object] = run, count: int = count) -> None:
            for _ in range(count):
                run()

        batches[name], counts[name] = batch, count
    samples = interleave(batches, setting.rounds, slice_s=0)
    return {name: [seconds / counts[name] for seconds in times] for name, times in samples.items()}, failed


def _rates(times: Samples, flops: int) -> Json:
    """Give each variant's times and TFLOP/s, and its fraction of the dense products' rate: medians of same rounds."""
    rates: Json = {}
    dense_s = statistics.median(times["dense products"]) if "dense products" in times else None
    for name, seconds in times.items():
        median_s = statistics.median(seconds)
        rates[name] = {**summarize(seconds), "tflops": round(flops / median_s / 1e12, 3)}
        if dense_s is not None and name != "dense products":
            rates[name]["fraction_of_dense"] = round(dense_s / median_s, 3)
    return rates


def _memory(inputs: LayerInputs, function: Callable[[], Tensor]) -> dict[str, int | None]:
    """Give the bytes that a forward keeps for backward beside x and the weights, and the step's peak."""
    known = {leaf.untyped_storage().data_ptr() for leaf in inputs.leaves.values()}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    cuda = inputs.x.is_cuda
    before = 0
    if cuda:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = function()
    kept = torch.cuda.memory_allocated() - before - y.untyped_storage().nbytes() if cuda else None
    grads = torch.autograd.grad(y, list(inputs.leaves.values()), inputs.dout)
    peak = torch.cuda.max_memory_allocated() - before if cuda else None
    del grads
    return {"saved_tensor_bytes": sum(saved.values()), "kept_bytes": kept, "peak_bytes": peak}
