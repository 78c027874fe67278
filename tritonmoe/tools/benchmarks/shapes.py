"""The layers that are measured: shapes of published models, routings, and inputs."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor

from tritonmoe.config.activations import ClampedSwiGLU, FusedActivation
from tritonmoe.config.formats import WeightFormat
from tritonmoe.config.layer import ExpertLayout, Projection
from tritonmoe.config.precision import ExpertPrecision
from tritonmoe.experts.quantized_weight import QuantizedWeight
from tritonmoe.ops import backends
from tritonmoe.ops.backends.ops import NO_GRADIENTS, GradientOperands, Operations

__all__ = [
    *("GPU_SHAPES", "LayerInputs", "LayerShape", "dense_products", "draw_inputs", "draw_routing"),
    *("operation_calls", "tiny"),
]


@dataclass(frozen=True)
class LayerShape:
    """One MoE layer of a published model."""

    name: str
    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    activation: FusedActivation = "silu"
    layout: ExpertLayout = field(default_factory=ExpertLayout)
    bias: bool = False
    weight_format: WeightFormat | None = None
    """Of weights that are packed, and frozen; None for plain ones."""
    precision: ExpertPrecision | None = None
    """In which experts train, where that isn't the dtype."""

    @property
    def is_plain(self) -> bool:
        """Whether it is SwiGLU without biases in the layout of most models."""
        is_swiglu = self.layout == ExpertLayout() and self.activation == "silu"
        return is_swiglu and not self.bias and self.weight_format is None

    @property
    def num_parameters(self) -> int:
        width = 3 if self.layout.gated else 2
        return self.num_experts * width * self.hidden_size * self.intermediate_size


GPU_SHAPES = {
    shape.name: shape
    for shape in (
        LayerShape("Qwen3-30B-A3B", 128, 8, 2048, 768),
        LayerShape("Mixtral", 8, 2, 4096, 14336),
        LayerShape("Qwen3-Next", 512, 10, 2048, 512),
        LayerShape(
            "gpt-oss",
            128,
            4,
            2880,
            2880,
            ClampedSwiGLU(7.0, alpha=1.702, up_offset=1.0),
            ExpertLayout(interleaved=True, transposed=True),
            bias=True,
        ),
        # What one rank of eight computes when every rank has T tokens: T*K pairs on a 1/8 of the experts.
        LayerShape("DeepSeek-V3, 1 of 8 ranks", 32, 8, 7168, 2048),
        LayerShape("DeepSeek-V3", 256, 8, 7168, 2048),
    )
}


def tiny(shape: LayerShape) -> LayerShape:
    """Shrink a shape so that a CPU runs it in milliseconds; layout, activation and biases stay."""
    num_experts = min(shape.num_experts, 12)
    return replace(
        shape,
        num_experts=num_experts,
        top_k=min(shape.top_k, num_experts),
        hidden_size=32,
        intermediate_size=16,
    )


@dataclass
class LayerInputs:
    """Weights, tokens and routing of one case, on one device."""

    shape: LayerShape
    x: Tensor
    topk_ids: Tensor
    topk_weights: Tensor
    weights: dict[str, torch.nn.Parameter]
    """gate_up_proj, down_proj and, with biases, gate_up_bias, down_bias, in the layout of moe_mlp."""
    dout: Tensor

    @property
    def arguments(self) -> dict[str, Any]:
        """Return what moe_mlp takes after x, topk_ids and topk_weights."""
        layout = self.shape.layout
        flags = {"gated": layout.gated, "interleaved": layout.interleaved, "transposed": layout.transposed}
        return {**self.weights, **flags, "activation": self.shape.activation}

    @property
    def leaves(self) -> dict[str, Tensor]:
        return {"x": self.x, "topk_weights": self.topk_weights, **self.weights}


def draw_routing(
    num_tokens: int, num_experts: int, top_k: int, routing: str, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw K experts per token, distinct ones but for "hot", (T, K) int64, and weights that sum to one, (T, K) fp32.

    Args:
        routing: "uniform", or "zipf": the n-th most popular of the experts, which stand in a drawn order, is chosen
            with a probability proportional to n ** -1.2 (the Gumbel trick gives K of them without repetition). "hot":
            all K of every second token are expert 0, so that it has more than half of the pairs.
    """
    device = generator.device
    scores = -torch.empty(num_tokens, num_experts, device=device).exponential_(generator=generator).log()
    if routing == "zipf":
        rank = torch.randperm(num_experts, generator=generator, device=device) + 1
        scores -= 1.2 * rank.log()
    elif routing not in ("uniform", "hot"):
        raise ValueError(f"routing must be uniform, zipf or hot, got {routing!r}")
    best, ids = scores.topk(top_k, dim=1)
    if routing == "hot":
        ids[::2] = 0
    return ids, best.softmax(1)


def draw_inputs(
    shape: LayerShape, num_tokens: int, routing: str, dtype: torch.dtype, device: torch.device
) -> LayerInputs:
    """Draw weights, tokens, an output gradient and a routing; every tensor that can have a gradient wants one."""
    generator = torch.Generator(device).manual_seed(0)
    e, d, f = shape.num_experts, shape.hidden_size, shape.intermediate_size
    width = 2 * f if shape.layout.gated else f

    def draw(*size: int, scale: float) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device).normal_(0.0, scale, generator=generator)

    sizes = {"gate_up_proj": (width, d), "down_proj": (d, f)}
    weights = {
        name: torch.nn.Parameter(draw(e, *(size[::-1] if shape.layout.transposed else size), scale=size[1] ** -0.5))
        for name, size in sizes.items()
    }
    if shape.bias:
        weights["gate_up_bias"] = torch.nn.Parameter(draw(e, width, scale=0.1))
        weights["down_bias"] = torch.nn.Parameter(draw(e, d, scale=0.1))
    ids, gates = draw_routing(num_tokens, e, shape.top_k, routing, generator)
    x = draw(num_tokens, d, scale=1.0).requires_grad_()
    return LayerInputs(shape, x, ids, gates.requires_grad_(), weights, draw(num_tokens, d, scale=1.0))


def operation_calls(inputs: LayerInputs, backend: str) -> dict[str, Callable[[], object]]:
    """Return every operation of a step, forward and backward, as a function that runs it alone.

    Weights that the shape says are packed are packed here, and have no gradients. In a precision, the kernels multiply
    codes of rows that are rounded here, and of weights that are encoded here.
    """
    shape, layout = inputs.shape, inputs.shape.layout
    ops = backends.choose(backend, inputs.x.device, inputs.x.dtype)
    x, gates, dout = inputs.x.detach(), inputs.topk_weights.detach(), inputs.dout
    w = {name: weight.detach() for name, weight in inputs.weights.items()}
    gate_up = _projection(shape, w["gate_up_proj"], w.get("gate_up_bias"))
    down = _projection(shape, w["down_proj"], w.get("down_bias"))
    if shape.precision is not None:
        from tritonmoe.ops.backends.encoded import EncodedOperations

        encoded = EncodedOperations(shape.precision)
        x, dout = encoded.round_rows(x), encoded.round_rows(dout)
        gate_up, down = encoded.projection(gate_up, "both"), encoded.projection(down, "both")
        ops = cast(Operations, encoded)
    activation = shape.activation
    grouping = ops.group(inputs.topk_ids, shape.num_experts)
    h, a = ops.up(x, gate_up, grouping, activation)
    y = ops.down(a, down, grouping)
    dh, scaled_a, _ = ops.down_grad(dout, down, h, gates, grouping, activation)
    dx = ops.up_grad(dh, gate_up, grouping)
    operands = GradientOperands(x, dh, dout, scaled_a, gates)
    needs_w1, needs_w2 = NO_GRADIENTS._replace(gate_up_proj=True), NO_GRADIENTS._replace(down_proj=True)
    calls: dict[str, Callable[[], object]] = {
        "group": lambda: ops.group(inputs.topk_ids, shape.num_experts),
        "up": lambda: ops.up(x, gate_up, grouping, activation),
        "up, inference": lambda: ops.up(x, gate_up, grouping, activation, needs_h=False),
        "down": lambda: ops.down(a, down, grouping),
        "gather_sum": lambda: ops.gather_sum(y, grouping.inverse, gates),
        "down_grad": lambda: ops.down_grad(dout, down, h, gates, grouping, activation),
        "up_grad": lambda: ops.up_grad(dh, gate_up, grouping),
        "gather_sum_grad": lambda: ops.gather_sum(dx, grouping.inverse),
    }
    if shape.weight_format is None:
        calls["weight_grad W1"] = lambda: ops.weight_grad(grouping, layout, operands, needs_w1)
        calls["weight_grad W2"] = lambda: ops.weight_grad(grouping, layout, operands, needs_w2)
    return calls


def _projection(shape: LayerShape, weight: Tensor, bias: Tensor | None) -> Projection:
    if shape.weight_format is None:
        return Projection(weight, bias, shape.layout)
    packed = QuantizedWeight.pack(weight, shape.weight_format)
    return Projection(packed.values, bias, shape.layout, scales=packed.scales)


def dense_products(inputs: LayerInputs) -> dict[str, Callable[[], Tensor]]:
    """Return for every kernel with a product one dense product of the same FLOPs."""
    shape, x = inputs.shape, inputs.x.detach()
    n, d, f = inputs.topk_ids.numel(), shape.hidden_size, shape.intermediate_size
    width = 2 * f if shape.layout.gated else f
    rows, hidden, inner = (x.new_empty(n, columns).normal_() for columns in (d, width, f))
    w1, w2 = x.new_empty(width, d).normal_(), x.new_empty(d, f).normal_()
    return {
        "up": lambda: rows @ w1.mT,
        "up, inference": lambda: rows @ w1.mT,
        "down": lambda: inner @ w2.mT,
        "down_grad": lambda: rows @ w2,
        "up_grad": lambda: hidden @ w1,
        "weight_grad W1": lambda: hidden.mT @ rows,
        "weight_grad W2": lambda: rows.mT @ inner,
    }
