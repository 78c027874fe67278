"""A layer call as one operator that torch.compile can see: `tritonmoe::expert_parallel_mlp` and its backward.

What a graph would otherwise be free to do with an exchange, it must not:

- *Order.* Ranks must make the same exchanges in the same order. The transport's handle goes through every forward, in
  and out (`turn`), and is written back: each call needs the one before it, none is dead, and no two are alike. Each
  backward takes what the one before it gave (`after`): it can't write to the handle, since autograd would refuse it in
  other graphs that have saved it. (Inductor doesn't keep the order of operators that are registered as effectful.)
- *Memory.* What a forward keeps for its backward has sizes that follow from counts, which no graph knows. It stays in
  Python, held by the storage of a one-element tensor (`kept`) that the graph saves and frees like any other. Nothing
  kept shares memory with what the graph knows and may use again; weights come from the graph.
- *CUDA graphs.* Inductor may capture what stands around the operators, not them: OUTSIDE_CUDA_GRAPHS.
- *Need.* Whether the result has a gradient is decided when the graph is made. So a rank that would have to take part in
  other ranks' backward alone is refused, on every rank, in the count exchange.

Operators take no objects: a CallSpec comes as the string that call_spec.encode() makes of it, transport and layer come
as handles.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensor

from tritonmoe.config.layer import PerWeight
from tritonmoe.expert_parallel.call import ExpertParallelCall, SavedTensors, run_backward, run_forward
from tritonmoe.expert_parallel.call_spec import CallArguments, decode, encode
from tritonmoe.expert_parallel.halves import current_half
from tritonmoe.expert_parallel.run import run_call
from tritonmoe.expert_parallel.state import refuse
from tritonmoe.experts.adapter_dropout import with_row_seeds
from tritonmoe.experts.arguments import ExpertInputs, Needs
from tritonmoe.experts.flops import FLOP_FORMULAS, Shape, backward_flops, forward_flops, register_flop_formulas
from tritonmoe.experts.operator import gradient_shapes
from tritonmoe.runtime.autograd import refuse_second_derivative, without_autocast
from tritonmoe.runtime.handles import find, hold

__all__ = ["expert_parallel_operator"]

END_OF_WEIGHTS = 5 + len(PerWeight._fields)
"""Of the forward operator's arguments: turn, layer, x, topk_ids and topk_weights come before the weights."""
OUTSIDE_CUDA_GRAPHS = (torch.Tag.cudagraph_unsafe,)
"""Inductor captures the parts around the operators alone (mode="reduce-overhead"): a replay would repeat the splits of
one call, and read and write memory that is given back since."""
IN_GRAPH = (
    "two_batches can't run a model whose expert-parallel layers stand in a compiled graph, which can't be left in its "
    "middle for the other half of the batch: compile the parts around them (torch.compile(block.attention)), or leave "
    "them out (torch.compiler.disable(layer))"
)


class _InOperator:
    """A Runner that keeps what the backward operator needs behind a handle, `kept`."""

    is_compiled = True
    half = 0
    owners = None

    def __init__(self, grad_enabled: bool, needs: list[bool]) -> None:
        self.grad_enabled = grad_enabled
        self._needs = needs
        self.kept = torch.zeros(1, dtype=torch.int64, device="cpu")

    def needs(self, inputs: ExpertInputs, activation_parameters: Sequence[Tensor]) -> Needs:
        return Needs.from_list(self._needs)

    def run(self, call: ExpertParallelCall, inputs: ExpertInputs, activation_parameters: Sequence[Tensor]) -> Tensor:
        out, run, beside = run_forward(call, inputs)
        if beside.plan.needs_any:
            rows = inputs.x.clone() if run.rows is inputs.x else run.rows  # the graph may write over its x
            self.kept = hold((call, beside, rows, run.topk_weights, run.h, run.row_seeds))
        return out


@torch.library.custom_op("tritonmoe::expert_parallel_mlp", mutates_args=(), tags=OUTSIDE_CUDA_GRAPHS)
def _expert_parallel_mlp(
    turn: Tensor,
    layer: Tensor | None,
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up_proj: Tensor,
    gate_up_bias: Tensor | None,
    down_proj: Tensor,
    down_bias: Tensor | None,
    gate_up_a: Tensor | None,
    gate_up_b: Tensor | None,
    down_a: Tensor | None,
    down_b: Tensor | None,
    row_seeds: Tensor | None,
    num_nonfinite_rows: Tensor | None,
    grad_enabled: bool,
    needs: list[bool],
    spec: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Give out (T, D), `kept`, and `turn`. needs: Needs.as_list()."""
    factors = gate_up_a, gate_up_b, down_a, down_b
    weights = PerWeight(gate_up_proj, gate_up_bias, down_proj, down_bias, *factors)
    inputs = ExpertInputs(x, topk_ids, topk_weights, weights, row_seeds)
    calling = None if layer is None else find(layer)
    if current_half() is not None:
        refuse(find(turn))
        raise RuntimeError(IN_GRAPH)
    runner = _InOperator(grad_enabled, needs)
    with torch.no_grad(), without_autocast(x.device):
        out = run_call(CallArguments(decode(spec), find(turn), inputs, calling, num_nonfinite_rows), runner)
    return out, runner.kept, turn.clone()


@_expert_parallel_mlp.register_fake
def _shapes(turn: Tensor, layer: Tensor | None, x: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    register_flop_formulas()  # here, since every graph is made with this
    return x.new_empty(x.shape), turn.new_empty(1), turn.new_empty(())


@torch.library.custom_op("tritonmoe::expert_parallel_mlp_backward", mutates_args=(), tags=OUTSIDE_CUDA_GRAPHS)
def _expert_parallel_mlp_backward(
    after: Tensor | None,
    dout: Tensor,
    kept: Tensor,
    topk_weights: Tensor,
    gate_up_proj: Tensor,
    gate_up_bias: Tensor | None,
    down_proj: Tensor,
    down_bias: Tensor | None,
    gate_up_a: Tensor | None,
    gate_up_b: Tensor | None,
    down_a: Tensor | None,
    down_b: Tensor | None,
    needs: list[bool],
    save: str,
) -> list[Tensor]:
    """Give the gradients of x, topk_weights and the weights, no elements where not wanted, and an `after`.

    needs: Needs.as_list(). save: the forward's, for the count of FLOPs.
    """
    call, beside, rows, received_weights, h, row_seeds = find(kept)
    factors = gate_up_a, gate_up_b, down_a, down_b
    weights = PerWeight(gate_up_proj, gate_up_bias, down_proj, down_bias, *factors)
    saved = SavedTensors(rows, received_weights, weights, h, row_seeds)
    wanted = Needs.from_list(needs)
    with torch.no_grad(), without_autocast(dout.device):
        grads = run_backward(call, beside, saved, dout, wanted.weights)
    dx = grads.x if wanted.x else None
    dtopk_weights = None
    if grads.topk_weights is not None and wanted.topk_weights:
        dtopk_weights = grads.topk_weights.to(topk_weights.dtype)
    given = (dout.new_empty(0) if grad is None else grad for grad in (dx, dtopk_weights, *grads.weights))
    return [*given, kept.clone()]


@_expert_parallel_mlp_backward.register_fake
def _gradient_shapes(after: Tensor | None, dout: Tensor, kept: Tensor, *others: Any) -> list[Tensor]:
    *differentiable, needs, _ = others
    return [*gradient_shapes(dout, differentiable, needs), kept.new_empty(1)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, kept, turn = output
    ctx.mark_non_differentiable(kept, turn)
    ctx.transport = inputs[0]  # for the order alone: backward doesn't read it
    ctx.save = decode(inputs[-1]).experts.save
    ctx.save_for_backward(kept, *inputs[4:END_OF_WEIGHTS])


def _backward(ctx: Any, dout: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad
    needs = [needs[2], *needs[4:END_OF_WEIGHTS]]
    # While a graph is made, its calls on one transport see one FunctionalTensor of its handle, its own.
    is_traced = isinstance(ctx.transport, FunctionalTensor)
    after = getattr(ctx.transport, "after", None) if is_traced else None
    *grads, after = _expert_parallel_mlp_backward(after, dout, *ctx.saved_tensors, needs, ctx.save)
    if is_traced:
        ctx.transport.after = after
    dx, *others = (grad if needed else None for grad, needed in zip(grads, needs, strict=True))
    rest = len(ctx.needs_input_grad) - END_OF_WEIGHTS
    return None, None, dx, None, *others, *(None for _ in range(rest))


_expert_parallel_mlp.register_autograd(_backward, setup_context=_setup_context)
_expert_parallel_mlp_backward.register_autograd(refuse_second_derivative)


def _forward_flops(turn: Shape, layer: Shape | None, x: Shape, topk_ids: Shape, *others: Any, **__: Any) -> int:
    """Give the FLOPs of this rank's own pairs, wherever they are computed: summed over ranks, what all compute.

    Shapes stand for tensors.
    """
    return forward_flops(topk_ids, others[1 : 1 + len(PerWeight._fields)])


def _backward_flops(after: Shape | None, dout: Shape, kept: Shape, topk_weights: Shape, *others: Any, **__: Any) -> int:
    *weights, needs, save = others
    return backward_flops(topk_weights, weights, needs, save == "input")


FLOP_FORMULAS[torch.ops.tritonmoe.expert_parallel_mlp] = _forward_flops
FLOP_FORMULAS[torch.ops.tritonmoe.expert_parallel_mlp_backward] = _backward_flops


def expert_parallel_operator(arguments: CallArguments) -> Tensor:
    """Call the operator tritonmoe::expert_parallel_mlp: (T, D). Fillers are in the graph, and run before it."""
    spec, transport, inputs, layer, num_nonfinite_rows, fillers = arguments
    for filler in fillers:
        filler()
    x, topk_ids, topk_weights, weights, row_seeds = with_row_seeds(inputs, spec.experts.dropout)
    out, _, turn = _expert_parallel_mlp(
        transport.handle,
        None if layer is None else layer.handle,
        x,
        topk_ids,
        topk_weights,
        *weights,
        row_seeds,
        num_nonfinite_rows,
        torch.is_grad_enabled(),
        Needs.of(inputs).as_list(),
        encode(spec),
    )
    transport.handle.copy_(turn)
    return out
