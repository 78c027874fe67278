"""weight_gradients(): one call of the op for all weights that need a gradient, which may be added to something.

That is a weight's main_grad, or what another backward of the same weights has left: SharedWeightGrads.
"""

from dataclasses import dataclass, field
from functools import partial
from operator import mul

import torch
from torch import Tensor
from torch.autograd.graph import Node

from tritonmoe.config.layer import NO_WEIGHTS, PerWeight
from tritonmoe.experts.adapted_projection import AdapterRowsOfBoth, adapter_gradients
from tritonmoe.experts.flops import count_products
from tritonmoe.experts.spec import ExpertSettings
from tritonmoe.ops.backends.ops import GradientOperands
from tritonmoe.ops.grouping import Grouping

__all__ = ["SharedWeightGrads", "rows_to_save", "weight_gradients"]


@dataclass
class SharedWeightGrads:
    """Two calls with the same weights have one each: through it the earlier backward leaves its gradients to the later.

    The later backward adds its own to them. Autograd would sum two tensors of all weights' size, which on a CPU can
    take longer than to compute them.
    """

    later: Node | None = None
    """The autograd node of the call whose backward comes later; None in that call itself."""
    left: dict[int, PerWeight[Tensor | None]] = field(default_factory=dict)
    """The gradients that wait for the later backward, by the number of the graph's run; the same dict for both."""

    def take(self) -> PerWeight[Tensor | None]:
        """Return what the other call's backward has left in this run of the graph."""
        return self.left.pop(torch._C._current_graph_task_id(), NO_WEIGHTS)

    def leave(self, grads: PerWeight[Tensor | None]) -> PerWeight[Tensor | None]:
        """Hand the gradients to the other call if its backward follows in this run of the graph, else return them.

        A loss of one half alone, say, has a graph without the other half.
        """
        if self.later is None or not torch._C._will_engine_execute_node(self.later):
            return grads
        self.left.clear()  # what a run that failed has left
        self.left[torch._C._current_graph_task_id()] = grads
        return NO_WEIGHTS


def rows_to_save(x: Tensor, weights: PerWeight[Tensor], needs_gate_up: bool, *, computes_h: bool) -> Tensor:
    """Return x where a backward reads it, else what has its shape and no memory: frozen experts need no rows.

    needs_gate_up: whether the gradient of gate_up_proj is wanted. computes_h: whether the backward computes h again.
    """
    if computes_h or needs_gate_up or weights.gate_up_a is not None:
        return x
    return x.new_empty(1).expand(x.shape)


def weight_gradients(
    settings: ExpertSettings,
    grouping: Grouping,
    needs: PerWeight[bool],
    main_grads: PerWeight[Tensor | None] | None,
    operands: GradientOperands,
    left: PerWeight[Tensor | None] = NO_WEIGHTS,
    adapter_rows: AdapterRowsOfBoth = (None, None),
) -> PerWeight[Tensor | None]:
    """Call the operation weight_grad for the weights that need it, and add to main_grads where there are such.

    left: what SharedWeightGrads.take() gave, which is added to, and given back, before any main_grad.
    """
    if not any(needs):
        return left
    ops, options = settings.ops, settings.options
    sums: PerWeight[Tensor | None] = left
    if main_grads is not None:
        sums = PerWeight(*(main if mine is None else mine for mine, main in zip(left, main_grads, strict=True)))
    x, dh, dout, scaled_a, _ = operands
    for is_needed, one, other in ((needs.gate_up_proj, x, dh), (needs.down_proj, dout, scaled_a)):
        if is_needed and one is not None and other is not None:
            count_products(settings.ops, one, grouping.num_pairs, partial(mul, one.shape[1], other.shape[1]))
    grads: PerWeight[Tensor | None] = ops.weight_grad(
        grouping, settings.spec.layout, operands, needs, accumulate=sums, options=options
    )
    if adapter_rows != (None, None):
        grads = grads._replace(**adapter_gradients(ops, options, grouping, needs, operands, adapter_rows))
    if sums is NO_WEIGHTS:
        return grads
    others = [name for name in PerWeight._fields if name not in ("gate_up_proj", "down_proj")]
    grads = grads._replace(**{name: _added(getattr(grads, name), getattr(sums, name)) for name in others})
    return PerWeight(*(grad if mine is None else mine for mine, grad in zip(left, grads, strict=True)))


def _added(grad: Tensor | None, total: Tensor | None) -> Tensor | None:
    if grad is None or total is None:
        return grad
    total.add_(grad)
    return None
