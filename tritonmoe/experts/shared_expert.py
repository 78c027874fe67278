"""The shared expert of a layer: a dense feed-forward block that every token passes, in two halves."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tritonmoe.config.activations import is_fused
from tritonmoe.config.layer import MoEConfig
from tritonmoe.ops.backends.ops import accumulation_dtype, apply_activation
from tritonmoe.runtime.autograd import is_autocast_on
from tritonmoe.runtime.wrappers import refuse_computed

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
            shape = (columns, rows) if self.layout.transposed else (rows, columns)
            self.register_parameter(name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw both weights uniformly, as the routed experts' are drawn; ValueError as theirs."""
        refuse_computed(type(self).__name__, self, ("gate_up_proj", "down_proj"), "reset_parameters()")
        for weight in (self.gate_up_proj, self.down_proj):
            rows_out = self._rows_out(weight)
            bound = 1 / math.sqrt(rows_out.shape[1])
            if not weight.is_meta:
                rows_out.copy_(torch.empty(rows_out.shape, device="cpu").uniform_(-bound, bound, generator=generator))

    def extra_repr(self) -> str:
        model_width, inner = self.down_proj.shape[:: -1 if self.layout.transposed else 1]
        gate = "gated" if self.layout.gated else "ungated"
        return f"hidden_size={model_width}, intermediate_size={inner}; {self.activation}, {gate}"

    @property
    def is_hooked(self) -> bool:
        """Whether something hangs on calls of the module (FSDP2, pruning), which calls of its halves would pass by."""
        hooks = self._forward_pre_hooks, self._forward_hooks, self._backward_pre_hooks, self._backward_hooks
        return any(hooks) or "forward" in self.__dict__

    def up(self, x: Tensor) -> Tensor:
        """Return (T, F), the activation of x (T, D) times the up-projection."""
        weight = self.gate_up_proj
        if x.dtype != weight.dtype and not is_autocast_on(x.device):
            raise TypeError(f"the shared expert is {weight.dtype} and x is {x.dtype}: cast one to the other's dtype")
        h = F.linear(x, self._rows_out(weight))
        if is_fused(self.activation):
            return apply_activation(h.to(accumulation_dtype(h.dtype)), self.layout, self.activation).to(h.dtype)
        return self.activation(h)

    def down(self, a: Tensor) -> Tensor:
        """Return (T, D) of what up() gave."""
        return F.linear(a, self._rows_out(self.down_proj))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x))

    def _rows_out(self, weight: Tensor) -> Tensor:
        return weight.T if self.layout.transposed else weight
