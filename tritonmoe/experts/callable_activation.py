"""Activations that are callables: run, checked, differentiated between the two products, their parameters found."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tritonmoe.experts.spec import ExpertSettings
from tritonmoe.experts.tensors import CallTensors
from tritonmoe.ops.grouping import Grouping

__all__ = ["ActivationGraph", "checked_activation", "run_activation", "with_activation_parameters", "zero_padding"]


class ActivationGraph(NamedTuple):
    """What autograd recorded of one call."""

    h: Tensor
    """(n, 2F), a leaf."""
    a: Tensor
    """(n, F)."""

    def backward(self, da: Tensor, parameters: Sequence[Tensor], grads: list[Tensor | None]) -> Tensor:
        """Return h's gradient, and add those of the callable's parameters to `grads`."""
        inputs = [self.h, *(p for p in parameters if p.requires_grad)]
        # retain_graph: the layer's own backward may run twice, and this graph goes when the layer's does.
        dh, *found = torch.autograd.grad(self.a, inputs, da, retain_graph=True, allow_unused=True)
        remaining = iter(found)
        for i, parameter in enumerate(parameters):
            grad = next(remaining) if parameter.requires_grad else None
            if grad is not None:
                so_far = grads[i]
                grads[i] = grad if so_far is None else so_far + grad
        return torch.zeros_like(self.h) if dh is None else dh


def run_activation(
    settings: ExpertSettings, h: Tensor, grouping: Grouping, keep_graph: bool
) -> tuple[Tensor, ActivationGraph | None]:
    """Run a callable activation on a chunk's h; give a, detached, and its graph where a backward may come."""
    zero_padding(h, grouping)
    if not keep_graph:
        with torch.no_grad():
            return checked_activation(settings, h), None
    with torch.enable_grad():
        leaf = h.detach().requires_grad_()
        a = checked_activation(settings, leaf.clone())  # cloned: a callable may work in place
    return a.detach(), ActivationGraph(leaf, a)


def zero_padding(values: Tensor, grouping: Grouping) -> None:
    """Zero the positions past the last pair, which the kernels never write, before a callable reads them."""
    if values.is_cuda or values.shape[0] > int(grouping.expert_offsets[-1]):
        padding = torch.arange(values.shape[0], device=values.device) >= grouping.expert_offsets[-1]
        values.masked_fill_(padding[:, None], 0)


def checked_activation(settings: ExpertSettings, h: Tensor) -> Tensor:
    """Call a callable activation on h (n, 2F) and check that it gives (n, F) in the same dtype."""
    activation, shape = settings.spec.activation, tuple(h.shape)
    assert callable(activation)
    a = activation(h)
    expected = (shape[0], settings.spec.layout.intermediate_size(shape[1]))
    if not isinstance(a, Tensor) or tuple(a.shape) != expected or a.dtype != h.dtype:
        got = f"{tuple(a.shape)} {a.dtype}" if isinstance(a, Tensor) else type(a).__name__
        raise ValueError(f"the activation callable must turn {shape} {h.dtype} into {expected} {h.dtype}, got {got}")
    return a.contiguous()


def with_activation_parameters(tensors: CallTensors[Tensor], settings: ExpertSettings) -> CallTensors[Tensor]:
    """Add the parameters of a callable activation, which are found by running it on no rows and walking the graph.

    Raises what checked_activation raises, so that a callable that doesn't fit is found before anything is sent.
    """
    layer = settings.layer
    width = layer.intermediate_size * (2 if layer.layout.gated else 1)
    with torch.enable_grad():
        empty = tensors.x.new_zeros(0, width).requires_grad_()
        out = checked_activation(settings, empty.clone())
    found: dict[int, Tensor] = {}
    seen: set[object] = set()
    nodes = [] if out.grad_fn is None else [out.grad_fn]
    while nodes:
        node = nodes.pop()
        if node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and leaf is not empty:
            found[id(leaf)] = leaf
        nodes.extend(upstream for upstream, _ in node.next_functions if upstream is not None)
    return tensors._replace(activation_parameters=list(found.values()))
