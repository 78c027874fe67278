"""The parameters of experts: their names and shapes, and what they are before training."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tritonmoe.config.layer import MoEConfig

__all__ = ["PARAMETERS", "draw_experts", "draw_uniform", "empty_parameters"]

PARAMETERS = ("gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias")
"""The names of the experts' parameters, as in transformers; experts without biases have None for them."""


def empty_parameters(
    config: MoEConfig, num_experts: int, device: torch.device | str | None, dtype: torch.dtype | None
) -> dict[str, Tensor | None]:
    """Return memory for the parameters of num_experts experts, by name, uninitialised."""
    layout, model_width, inner = config.layout, config.hidden_size, config.intermediate_size
    width = 2 * inner if layout.gated else inner
    up_shape = (model_width, width) if layout.transposed else (width, model_width)
    down_shape = (inner, model_width) if layout.transposed else (model_width, inner)
    shapes = dict(zip(PARAMETERS, (up_shape, down_shape, (width,), (model_width,)), strict=True))
    return {
        name: torch.empty(num_experts, *shape, device=device, dtype=dtype, requires_grad=True)
        if config.bias or not name.endswith("bias")
        else None
        for name, shape in shapes.items()
    }


def draw_experts(gate_up_proj: Tensor, down_proj: Tensor, config: MoEConfig, experts: Sequence[int], seed: int) -> None:
    """Draw every expert from a seed of its own, so that its values don't depend on which other experts are here.

    Args:
        gate_up_proj, down_proj: (len(experts), ...), written in place. experts: their ids.
    """
    for place, expert in enumerate(experts):
        own = torch.Generator().manual_seed(seed + expert)
        draw_uniform(gate_up_proj[place], config.hidden_size, own)
        draw_uniform(down_proj[place], config.intermediate_size, own)


def draw_uniform(weight: Tensor, fan_in: int, generator: torch.Generator | None) -> None:
    """Draw a weight in place, uniformly within 1 / sqrt(fan_in) of zero, as torch.nn.Linear does."""
    bound = 1 / math.sqrt(fan_in)
    weight.copy_(torch.empty(weight.shape, device="cpu").uniform_(-bound, bound, generator=generator))
