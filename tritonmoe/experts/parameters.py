"""The parameters of experts: their names and shapes, and what they are before training."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tritonmoe.config.formats import find_format
from tritonmoe.config.layer import MoEConfig, PerWeight
from tritonmoe.experts.packed_parameters import from_bytes, to_bytes

__all__ = ["PARAMETERS", "draw_experts", "draw_packed_experts", "draw_uniform", "empty_parameters"]

PARAMETERS = (
    *("gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias"),
    *("gate_up_proj_scales", "down_proj_scales"),
)
"""The names of the experts' parameters, as in transformers; None for biases and scales that experts don't have.

Of packed experts, weights and scales are bytes in every format: see packed_parameters.py.
"""


def empty_parameters(
    config: MoEConfig, num_experts: int, device: torch.device | str | None, dtype: torch.dtype | None
) -> dict[str, Tensor | None]:
    """Return memory for the parameters of num_experts experts, by name, uninitialised."""
    parts: dict[str, Tensor | None] = dict.fromkeys(PARAMETERS)
    width = config.intermediate_size * (2 if config.gated else 1)
    for name, shape, out in zip(PARAMETERS, config.weight_shapes, (width, config.hidden_size), strict=False):
        if config.weight_format is None:
            parts[name] = torch.empty(num_experts, *shape, device=device, dtype=dtype, requires_grad=True)
        else:
            packed = find_format(config.weight_format).empty((num_experts, *shape), device)
            parts[name], parts[f"{name}_scales"] = map(to_bytes, packed)
        if config.bias:
            parts[f"{name}_bias"] = torch.empty(num_experts, out, device=device, dtype=dtype, requires_grad=True)
    return parts


def draw_experts(gate_up_proj: Tensor, down_proj: Tensor, config: MoEConfig, experts: Sequence[int], seed: int) -> None:
    """Draw every expert from a seed of its own, so that its values don't depend on which other experts are here.

    Args:
        gate_up_proj, down_proj: (len(experts), ...), written in place. experts: their ids.
    """
    for place, expert in enumerate(experts):
        own = torch.Generator().manual_seed(seed + expert)
        draw_uniform(gate_up_proj[place], config.hidden_size, own)
        draw_uniform(down_proj[place], config.intermediate_size, own)


def draw_packed_experts(parts: PerWeight[Tensor], config: MoEConfig, experts: Sequence[int], seed: int) -> None:
    """Draw packed experts as draw_experts() draws plain ones: each is drawn in fp32, and rounded.

    parts: the bytes of all experts, written in place.
    """
    assert parts.gate_up_scales is not None
    assert parts.down_scales is not None
    packed = find_format(config.weight_format)
    gate_up = from_bytes(packed, parts.gate_up_proj, parts.gate_up_scales)
    of_down = from_bytes(packed, parts.down_proj, parts.down_scales)
    up, down = (torch.empty(1, *shape, device="cpu") for shape in config.weight_shapes)
    for place, expert in enumerate(experts):
        draw_experts(up, down, config, (expert,), seed)
        packed.pack(up[0], *(part[place] for part in gate_up))
        packed.pack(down[0], *(part[place] for part in of_down))


def draw_uniform(weight: Tensor, fan_in: int, generator: torch.Generator | None) -> None:
    """Draw a weight in place, uniformly within 1 / sqrt(fan_in) of zero, as torch.nn.Linear does."""
    bound = 1 / math.sqrt(fan_in)
    weight.copy_(torch.empty(weight.shape, device="cpu").uniform_(-bound, bound, generator=generator))
