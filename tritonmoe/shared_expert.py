"""The shared expert of a layer: a dense feed-forward block that every token passes, in two halves."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .backends.reference import accumulation_dtype, apply_activation
from .config import ClampedSwiGLU, MoEConfig

__all__ = ["SharedExpert"]


class SharedExpert(nn.Module):
    """act(x W1) W2 with the layer's activation: up() and down() are the halves, which a layer runs as fillers.

    Parameters: gate_up_proj (2F, D) and down_proj (D, F), F instead of 2F when ungated, axes swapped when transposed,
    without biases; F is config.shared_intermediate_size. It is the same on every rank: average its gradient as any
    dense parameter's.
    """

    gate_up_proj: nn.Parameter
    down_proj: nn.Parameter

    def __init__(
        self,
        config: MoEConfig,
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.layout, self.activation = config.layout, config.activation
        model_width, inner = config.hidden_size, config.shared_intermediate_size
        width = 2 * inner if self.layout.gated else inner
        shapes = {"gate_up_proj": (width, model_width), "down_proj": (model_width, inner)}
        for name, (rows, columns) in shapes.items():
            bound = 1 / math.sqrt(columns)
            drawn = torch.empty(rows, columns, device="cpu").uniform_(-bound, bound, generator=generator)
            self.register_parameter(
                name, nn.Parameter((drawn.T if self.layout.transposed else drawn).to(device, dtype).contiguous())
            )

    def up(self, x: Tensor) -> Tensor:
        """Give (T, F), the activation of x (T, D) times the up-projection."""
        h = F.linear(x, self._rows_out(self.gate_up_proj))
        if isinstance(self.activation, str | ClampedSwiGLU):
            return apply_activation(h.to(accumulation_dtype(h.dtype)), self.layout, self.activation).to(h.dtype)
        return self.activation(h)

    def down(self, a: Tensor) -> Tensor:
        """Give (T, D) of what up() gave."""
        return F.linear(a, self._rows_out(self.down_proj))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x))

    def _rows_out(self, weight: Tensor) -> Tensor:
        return weight.T if self.layout.transposed else weight
