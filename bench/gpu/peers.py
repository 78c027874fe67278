"""Other implementations of a layer's experts as functions of its very tensors: transformers', Liger's and others'."""

import importlib.util
from collections.abc import Callable, Collection

import torch
from torch import Tensor
from torch.nn.functional import silu

from tritonmoe.integrations.transformers import bench_model
from tritonmoe.tools.benchmarks.shapes import LayerInputs

__all__ = ["COMPILING", "PEERS", "Function", "peer_functions"]

BATCHED_MM_LARGEST_PAIRS = 64
"""batched_mm copies the weights for every pair."""
EAGER_LARGEST_EXPERTS = 256
Function = Callable[[], Tensor]
Experts = Callable[[Tensor, Tensor, Tensor], Tensor]


def peer_functions(inputs: LayerInputs, names: Collection[str]) -> tuple[dict[str, Function], dict[str, str]]:
    """Return the peers of these names that can run, as functions that give y, and why others can't."""
    x, ids, gates = inputs.x, inputs.topk_ids, inputs.topk_weights
    found: dict[str, Function] = {}
    left_out: dict[str, str] = {}
    for peer in names:
        reason = _why_left_out(peer, inputs)
        if reason is None:
            try:
                function = _function(peer, inputs)
            except Exception as error:  # another version of the package, say
                reason = f"{type(error).__name__}: {error}"[:300]
        if reason is not None:
            left_out[peer] = reason
            continue
        # transformers multiplies rows by the weights in their own dtype: give it the rows' one.
        found[peer] = lambda function=function: function(x, ids, gates.to(x.dtype))  # type: ignore[misc]
    return found, left_out


def _why_left_out(peer: str, inputs: LayerInputs) -> str | None:
    shape = inputs.shape
    if peer in OTHERS:
        if not shape.is_plain:
            return "written here for SwiGLU without biases, concatenated and not transposed"
        package = PACKAGES.get(peer)
        if package is not None and importlib.util.find_spec(package) is None:
            return f"the package {peer} is not installed"
        return None
    reason = bench_model.peer_unusable_reason(peer, inputs.x.device, plain=shape.is_plain)
    if reason is None and peer == "batched_mm" and inputs.topk_ids.numel() > BATCHED_MM_LARGEST_PAIRS:
        reason = f"it copies the weights for every pair: only up to {BATCHED_MM_LARGEST_PAIRS} pairs"
    if reason is None and peer == "eager" and shape.num_experts > EAGER_LARGEST_EXPERTS:
        reason = f"it loops over the experts: only up to {EAGER_LARGEST_EXPERTS}"
    return reason


def _function(peer: str, inputs: LayerInputs) -> Experts:
    w = inputs.weights
    if peer in OTHERS:
        return OTHERS[peer](w["gate_up_proj"], w["down_proj"])
    if peer == "liger":
        return bench_model.liger_function(w["gate_up_proj"], w["down_proj"])
    if inputs.shape.is_plain:
        return bench_model.experts_function(peer, w["gate_up_proj"], w["down_proj"])
    return bench_model.gpt_oss_experts_function(
        peer, w["gate_up_proj"], w["down_proj"], w["gate_up_bias"], w["down_bias"]
    )


def _torch_grouped_mm(gate_up_proj: Tensor, down_proj: Tensor) -> Experts:
    """Return the fewest of PyTorch's own operations: a sort, two grouped products, and a sum without atomics."""
    grouped_mm = getattr(torch.nn.functional, "grouped_mm", None) or torch._grouped_mm

    def run(x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        (num_tokens, top_k), num_experts = topk_ids.shape, gate_up_proj.shape[0]
        order = topk_ids.flatten().argsort(stable=True)
        ends = torch.bincount(topk_ids.flatten(), minlength=num_experts).cumsum(0, dtype=torch.int32)
        gate, up = grouped_mm(x[order // top_k], gate_up_proj.mT, offs=ends).chunk(2, -1)
        rows = grouped_mm(silu(gate) * up, down_proj.mT, offs=ends)
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        return torch.einsum("tkd,tk->td", rows[back].view(num_tokens, top_k, -1), topk_weights)

    return run


def _moe_ops(gate_up_proj: Tensor, down_proj: Tensor) -> Experts:
    """Return moe-ops' kernels, as its README strings them together."""
    from moe_ops import grouped_gemm, permute, unpermute

    def run(x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        num_tokens, top_k = topk_ids.shape
        rows, places, offsets = permute(x, topk_ids.int(), E=gate_up_proj.shape[0])
        gate, up = grouped_gemm(rows, gate_up_proj, offsets).chunk(2, -1)
        rows = grouped_gemm(silu(gate) * up, down_proj, offsets)
        return unpermute(rows, places, topk_weights, num_tokens, top_k)

    return run


def _sonic_moe(gate_up_proj: Tensor, down_proj: Tensor) -> Experts:
    """Return SonicMoE's function for a given routing, on weights that it takes by other axes, as views."""
    from sonicmoe.enums import ActivationType
    from sonicmoe.functional import moe_general_routing_inputs

    def run(x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        num_tokens, top_k = topk_ids.shape
        tokens = torch.arange(num_tokens, dtype=torch.int32, device=x.device).repeat_interleave(top_k)
        y, _ = moe_general_routing_inputs(
            *(x, topk_weights.flatten(), tokens, topk_ids.flatten().int()),
            *(gate_up_proj.permute(1, 2, 0), None, down_proj.permute(1, 2, 0), None),
            E=gate_up_proj.shape[0],
            stream_id=torch.cuda.current_stream(x.device).cuda_stream,
            activation_type=ActivationType.SWIGLU,
            is_inference_mode_enabled=not torch.is_grad_enabled(),
            concat_layout=True,
        )
        return y

    return run


OTHERS: dict[str, Callable[[Tensor, Tensor], Experts]] = {
    "torch grouped_mm": _torch_grouped_mm,
    "sonic-moe": _sonic_moe,
    "moe-ops": _moe_ops,
}
PACKAGES = {"sonic-moe": "sonicmoe", "moe-ops": "moe_ops"}
"""What the packages of some are imported as."""
COMPILING = tuple(PACKAGES)
"""They compile, and try many tiles, for minutes when they are called first."""
PEERS = (*bench_model.PEERS, *(name for name in OTHERS if name not in COMPILING))
"""All others."""
