"""From one feed-forward block to E experts: copies, slices, noise, re-drawn units.

Identical copies behind a renormalised router compute what the block computed (sparse upcycling,
https://arxiv.org/abs/2212.05055). Slices of width F / G, G of them to a copy, follow Megatron's granular upcycling
(https://arxiv.org/abs/2410.07524), but scale `down` alone, by G: that is exact with any activation, which Megatron's
cube root on all three matrices is not. Re-drawn units are Drop-Upcycling (https://arxiv.org/abs/2502.19261).
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from einops import rearrange
from torch import Tensor

from tritonmoe.config.layer import MoEConfig, PerWeight

__all__ = ["DenseFFN", "Init", "UpcycleSettings", "make_experts"]

Init = Literal["copy", "noise", "drop"]
NOISE_STD = 0.02
"""Noise on a weight, in standard deviations of the matrix it belongs to."""
DROP_RATIO = 0.5
"""Share of an expert's units that init="drop" draws anew."""
ROUTER_STD = 0.02
SHARED_SCALE = 0.5
"""Share of the block's output that the shared expert gives, and what is left for the routed ones; a power of two."""


@dataclass(frozen=True, kw_only=True)
class UpcycleSettings:
    """What upcycling makes of each block; raises ValueError for a combination that can't be run."""

    num_experts: int
    top_k: int
    granularity: int = 1
    """G: an expert is 1 / G of the block, and the router picks the G parts of a copy together."""
    init: Init = "copy"
    shared_expert: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_experts", "top_k", "granularity"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        MoEConfig(1, 1, self.num_experts, self.top_k)  # the limits of every layer
        if self.init not in get_args(Init):
            raise ValueError(f"init must be one of {', '.join(get_args(Init))}, got {self.init!r}")
        if not isinstance(self.shared_expert, bool):
            raise ValueError(f"shared_expert must be True or False, got {self.shared_expert!r}")
        if not isinstance(self.seed, int) or not 0 <= self.seed < 2**47:  # beside it 16 bits of a block's index
            raise ValueError(f"seed must be an integer of 0..2**47 - 1, got {self.seed!r}")
        if self.num_experts % self.granularity:
            raise ValueError(
                f"num_experts ({self.num_experts}) must be a multiple of granularity ({self.granularity}): "
                "every copy of the block becomes that many experts"
            )
        if self.top_k % self.granularity:
            raise ValueError(
                f"top_k ({self.top_k}) must be a multiple of granularity ({self.granularity}): a token has to reach "
                f"all parts of a copy, or part of the output is missing. Use top_k={self.granularity} or a multiple"
            )

    @property
    def routed_scale(self) -> float:
        """What the routed experts' down projection is multiplied by."""
        return self.granularity * (SHARED_SCALE if self.shared_expert else 1.0)

    def expert_width(self, intermediate_size: int) -> int:
        """Return the width of one expert, F / G."""
        if intermediate_size % self.granularity:
            raise ValueError(
                f"granularity ({self.granularity}) must divide the feed-forward block's width ({intermediate_size})"
            )
        return intermediate_size // self.granularity


class DenseFFN(NamedTuple):
    """The weights of one dense block; gate and biases are None where it has none."""

    up: Tensor
    """(F, D)"""
    down: Tensor
    """(D, F)"""
    gate: Tensor | None = None
    """(F, D)"""
    up_bias: Tensor | None = None
    """(F,)"""
    gate_bias: Tensor | None = None
    """(F,)"""
    down_bias: Tensor | None = None
    """(D,)"""


@torch.no_grad()
def make_experts(settings: UpcycleSettings, block_index: int, dense: DenseFFN) -> tuple[Tensor, PerWeight[Tensor]]:
    """Return the router (E, D) and the E experts of one block; the same seed and index give the same bits.

    Both have the block's dtype and device; experts have the width F/G, in the axis order of moe_mlp.

    Expert e is part e % G of copy e // G. The G router rows of a copy are equal, so that top-k takes all or none of
    its parts; biases of `down` are not scaled, since the K weights of a token sum to 1.

    Example:
        E=4, G=2, F=6: experts 0 and 2 are units 0..2 of the block, experts 1 and 3 units 3..5; router rows 0 and 1
        are equal, and so are rows 2 and 3.
    """
    num_parts, copies = settings.granularity, settings.num_experts // settings.granularity
    model_width, width = dense.down.shape
    part_width = settings.expert_width(width)
    generator = torch.Generator().manual_seed((settings.seed << 16) + block_index)
    router = torch.randn(copies, model_width, generator=generator, device="cpu") * ROUTER_STD
    router = router.to(dense.up).repeat_interleave(num_parts, dim=0)

    halves = [weight for weight in (dense.gate, dense.up) if weight is not None]
    gate_up = torch.cat([rearrange(half, "(part f) d -> part f d", part=num_parts) for half in halves], dim=1)
    down = rearrange(dense.down, "d (part f) -> part d f", part=num_parts) * settings.routed_scale
    # Not einops.repeat, which may give one memory for all copies, and noise is added to each copy in place.
    gate_up, down = gate_up.repeat(copies, 1, 1), down.repeat(copies, 1, 1)
    for expert in range(settings.num_experts):
        # an axis of units for each matrix: rows of gate and of up, columns of down
        matrices = [*gate_up[expert].split(part_width), down[expert].T]
        if settings.init == "noise":
            for matrix in matrices:
                drawn = torch.randn(matrix.shape, generator=generator, device="cpu").to(matrix)
                matrix += drawn * (NOISE_STD * matrix.std())
        elif settings.init == "drop":
            units = torch.randperm(part_width, generator=generator, device="cpu")[: round(DROP_RATIO * part_width)]
            units = units.to(gate_up.device)
            for matrix in matrices:
                replaced = matrix[units].float()
                drawn = torch.randn(replaced.shape, generator=generator, device="cpu").to(replaced)
                matrix[units] = (drawn * replaced.std() + replaced.mean()).to(matrix.dtype)

    gate_up_bias = down_bias = None
    if dense.up_bias is not None:
        biases = [dense.up_bias] if dense.gate_bias is None else [dense.gate_bias, dense.up_bias]
        parts = torch.cat([rearrange(bias, "(part f) -> part f", part=num_parts) for bias in biases], dim=1)
        gate_up_bias = parts.repeat(copies, 1)
    if dense.down_bias is not None:
        down_bias = dense.down_bias * (SHARED_SCALE if settings.shared_expert else 1.0)
        down_bias = down_bias.repeat(settings.num_experts, 1)
    return router, PerWeight(gate_up, gate_up_bias, down, down_bias)
