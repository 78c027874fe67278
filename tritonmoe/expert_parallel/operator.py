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

Operators take no objects: a CallSpec comes as the string that call.encode() makes of it, transport and layer come
as handles.
"""

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensor

from tritonmoe.expert_parallel.call import ProposedCall, decode, encode
from tritonmoe.expert_parallel.layer_pass import BackwardPass, ForwardPass
from tritonmoe.expert_parallel.plans.base import PlannedCall
from tritonmoe.expert_parallel.run_call import run_call
from tritonmoe.expert_parallel.state import abort_call
from tritonmoe.experts.adapter_dropout import with_row_seeds
from tritonmoe.experts.flops import FLOP_FORMULAS, Shape, backward_flops, forward_flops, register_flop_formulas
from tritonmoe.experts.operator import gradient_shapes
from tritonmoe.experts.tensors import NAMES, OF_ROWS, CallTensors, schema
from tritonmoe.runtime.autograd import Context, refuse_second_derivative, save_tensors, saved_by, without_autocast
from tritonmoe.runtime.halves import current_half
from tritonmoe.runtime.handles import find, hold

__all__ = ["expert_parallel_operator"]

OUTSIDE_CUDA_GRAPHS = (torch.Tag.cudagraph_unsafe,)
"""Inductor captures the parts around the operators alone (mode="reduce-overhead"): a replay would repeat the splits of
one call, and read and write memory that is given back since."""
IN_GRAPH = (
    "two_batches can't run a model whose expert-parallel layers stand in a compiled graph, which can't be left in its "
    "middle for the other half of the batch: compile the parts around them (torch.compile(block.attention)), or leave "
    "them out (torch.compiler.disable(layer))"
)


@torch.library.custom_op(
    "tritonmoe::expert_parallel_mlp",
    mutates_args=(),
    tags=OUTSIDE_CUDA_GRAPHS,
    schema=f"(Tensor turn, Tensor? layer, {schema()}, Tensor? nonfinite_scores, bool grad_enabled, bool[] needs, "
    "str spec) -> (Tensor, Tensor, Tensor)",
)
def _expert_parallel_mlp(turn: Tensor, layer: Tensor | None, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return out (T, D), `kept`, and `turn`. needs: flat, as the tensors are."""
    *flat, nonfinite_scores, grad_enabled, needs, spec = arguments
    tensors = CallTensors.unflatten(flat)
    calling = None if layer is None else find(layer)
    if current_half() is not None:
        abort_call(find(turn))
        raise RuntimeError(IN_GRAPH)
    kept = torch.zeros(1, dtype=torch.int64, device="cpu")

    def run_forward(call: PlannedCall, tensors: CallTensors[Tensor]) -> Tensor:
        """Keep what the backward operator needs behind a handle, `kept`: see RunForward."""
        nonlocal kept
        forward = ForwardPass(call, tensors)
        out, experts = forward.run(), forward.experts
        if call.plan.needs_any:
            run, (_, kind_tensors) = experts.own, experts.kept()
            rows = forward.rows_to_keep(CallTensors.unflatten(needs).weights)
            rows = rows.clone() if rows is tensors.x else rows  # the graph may write over its x
            received = run.tensors.only(*OF_ROWS)._replace(x=rows)
            of_call = forward.kept._replace(received=received, h=run.h, kind_tensors=kind_tensors)
            kept = hold((call, of_call))
        return out

    call = ProposedCall(decode(spec), find(turn), tensors, calling, nonfinite_scores, is_compiled=True)
    call.grad_enabled, call.needs = grad_enabled, CallTensors.unflatten(needs)
    with torch.no_grad(), without_autocast(tensors.x.device):
        out = run_call(call, run_forward)
    return out, kept, turn.clone()


@_expert_parallel_mlp.register_fake
def _shapes(turn: Tensor, layer: Tensor | None, x: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    register_flop_formulas()  # here, since every graph is made with this
    return x.new_empty(x.shape), turn.new_empty(1), turn.new_empty(())


@torch.library.custom_op(
    "tritonmoe::expert_parallel_mlp_backward",
    mutates_args=(),
    tags=OUTSIDE_CUDA_GRAPHS,
    schema=f"(Tensor? after, Tensor dout, Tensor kept, {schema(optional=NAMES)}, bool[] needs, str save) -> Tensor[]",
)
def _expert_parallel_mlp_backward(after: Tensor | None, dout: Tensor, kept: Tensor, *arguments: Any) -> list[Tensor]:
    """Return the gradients in the order of flatten(), no elements where not wanted, and an `after`.

    The tensors are those that _at_home() leaves. needs: flat, as they are. save: the forward's, to count FLOPs.
    """
    *flat, needs, _ = arguments
    tensors, wanted = CallTensors.unflatten(flat), CallTensors.unflatten(needs)
    call, of_call = find(kept)
    of_call = of_call._replace(received=of_call.received._replace(weights=tensors.weights))
    with torch.no_grad(), without_autocast(dout.device):
        grads = BackwardPass(call, of_call, dout, wanted.weights).run()
    dtopk_weights = None
    if grads.topk_weights is not None and wanted.topk_weights:
        dtopk_weights = grads.topk_weights.to(tensors.topk_weights.dtype)
    grads = grads._replace(x=grads.x if wanted.x else None, topk_weights=dtopk_weights, activation_parameters=())
    return [*(dout.new_empty(0) if grad is None else grad for grad in grads.flatten()), kept.clone()]


@_expert_parallel_mlp_backward.register_fake
def _gradient_shapes(after: Tensor | None, dout: Tensor, kept: Tensor, *arguments: Any) -> list[Tensor]:
    *flat, needs, _ = arguments
    tensors = CallTensors.unflatten(flat)._replace(x=dout)  # of one shape and dtype
    return [*gradient_shapes(dout, tensors.flatten(), needs), kept.new_empty(1)]


def _at_home(tensors: CallTensors[Tensor]) -> CallTensors[Tensor | None]:
    """Return those that a backward takes from the graph; `kept` holds what came of the others."""
    return tensors.without("x", *(name for name in OF_ROWS if name != "topk_weights"))


def _setup_context(ctx: Context, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    turn, _, *flat, _, _, _, spec = inputs
    _, kept, *_ = output
    ctx.mark_non_differentiable(*output[1:])
    ctx.transport = turn  # for the order alone: backward doesn't read it
    ctx.save = decode(spec).experts.save
    save_tensors(ctx, kept, *_at_home(CallTensors.unflatten(flat)).flatten())


def _backward(ctx: Context, dout: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[2:-4])
    # While a graph is made, its calls on one transport see one FunctionalTensor of its handle, its own.
    is_traced = isinstance(ctx.transport, FunctionalTensor)
    after = getattr(ctx.transport, "after", None) if is_traced else None
    kept, *tensors = saved_by(ctx)
    *grads, after = _expert_parallel_mlp_backward(after, dout, kept, *tensors, needs, ctx.save)
    if is_traced:
        ctx.transport.after = after
    grads = [grad if needed else None for grad, needed in zip(grads, needs, strict=True)]
    return None, None, *grads, None, None, None, None


_expert_parallel_mlp.register_autograd(_backward, setup_context=_setup_context)
_expert_parallel_mlp_backward.register_autograd(refuse_second_derivative)


def _forward_flops(turn: Shape, layer: Shape | None, *arguments: Any, **_: object) -> int:
    """Return the FLOPs of this rank's own pairs, wherever they are computed: summed over ranks, what all compute.

    Shapes stand for tensors.
    """
    *shapes, _, _, _, _ = arguments
    return forward_flops(CallTensors.unflatten(shapes))


def _backward_flops(after: Shape | None, dout: Shape, kept: Shape, *arguments: Any, **_: object) -> int:
    *shapes, needs, save = arguments
    return backward_flops(CallTensors.unflatten(shapes), CallTensors.unflatten(needs), save == "input")


FLOP_FORMULAS[torch.ops.tritonmoe.expert_parallel_mlp] = _forward_flops
FLOP_FORMULAS[torch.ops.tritonmoe.expert_parallel_mlp_backward] = _backward_flops


def expert_parallel_operator(call: ProposedCall) -> Tensor:
    """Call the operator tritonmoe::expert_parallel_mlp: (T, D). Fillers are in the graph, and run before it."""
    for filler in call.fillers:
        filler()
    spec, transport, layer = call.spec, call.transport, call.layer
    out, _, turn = _expert_parallel_mlp(
        transport.handle,
        None if layer is None else layer.handle,
        *with_row_seeds(call.tensors, spec.experts.dropout).flatten(),
        call.nonfinite_scores,
        torch.is_grad_enabled(),
        call.tensors.needs().flatten(),
        encode(spec),
    )
    transport.handle.copy_(turn)
    return out
