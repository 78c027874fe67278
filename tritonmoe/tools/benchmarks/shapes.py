"""The layers that are measured: shapes of published models, routings, and inputs."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from tritonmoe.config.activations import ClampedSwiGLU, FusedActivation
from tritonmoe.config.formats import WeightFormat
from tritonmoe.config.layer import ExpertLayout

__all__ = ["GPU_SHAPES", "LayerInputs", "LayerShape", "draw_inputs", "draw_routing", "tiny"]


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
