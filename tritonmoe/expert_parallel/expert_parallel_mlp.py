"""expert_parallel_mlp: the experts spread over many ranks, eager or traced."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from tritonmoe.config.activations import Activation, is_fused
from tritonmoe.config.layer import PerWeight
from tritonmoe.config.overlap import OverlapConfig, OverlapPlan
from tritonmoe.dispatch.placement import ExpertPlacement
from tritonmoe.expert_parallel.call import ExpertParallelCall, run_backward, run_forward
from tritonmoe.expert_parallel.call_spec import CallArguments, CallSpec
from tritonmoe.expert_parallel.check import MAX_FILLERS
from tritonmoe.expert_parallel.function_context import (
    gradients_of_inputs,
    needs_of,
    saved_forward,
    tensors_to_save,
)
from tritonmoe.expert_parallel.halves import Half, current_half
from tritonmoe.expert_parallel.operator import expert_parallel_operator
from tritonmoe.expert_parallel.run import run_call
from tritonmoe.expert_parallel.split_call import begin_half_call, run_split_call
from tritonmoe.expert_parallel.state import refuse
from tritonmoe.experts.adapters import ExpertAdapters, with_adapters
from tritonmoe.experts.arguments import cast_for_autocast, find_main_grads
from tritonmoe.experts.one_based_ids import watch_ids
from tritonmoe.experts.spec import expert_spec
from tritonmoe.experts.tensors import CallTensors
from tritonmoe.runtime.autograd import keep_beside, kept_beside, once_differentiable, outside_graphs
from tritonmoe.runtime.transforms import NOT_EXPERT_PARALLEL, is_transformed
from tritonmoe.transports import Transport

__all__ = ["expert_parallel_mlp", "run_expert_parallel"]

DEFAULT_OVERLAP = OverlapConfig()


class _ExpertParallelMLP(torch.autograd.Function):
    """One layer call on one rank; the plan is made before, so that autograd sees what any rank needs."""

    @staticmethod
    def forward(ctx: Any, call: ExpertParallelCall, anchor: Tensor | None, *flat: Any) -> tuple[Tensor, Tensor | None]:
        tensors = CallTensors.unflatten(flat)
        out, run, kept = run_forward(call, tensors)
        ctx.call = call
        ctx.weights_dtype = tensors.topk_weights.dtype
        mark = None
        if kept.plan.needs_any:
            mark = keep_beside(ctx, kept)
            ctx.save_for_backward(*tensors_to_save(run, tensors, needs_of(ctx), mark))
        return out, mark

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, saved: Sequence[Tensor], dout: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        forward, mark = saved_forward(saved)
        grads = run_backward(ctx.call, kept_beside(ctx, mark), forward, dout, needs_of(ctx).weights)
        return gradients_of_inputs(grads, ctx.weights_dtype)


class _AsFunction:
    """A Runner that runs a call as an autograd Function."""

    is_compiled = False
    half = 0

    def __init__(self, owners: PerWeight[Tensor]) -> None:
        self.grad_enabled = torch.is_grad_enabled()
        self.owners = owners

    def needs(self, tensors: CallTensors[Tensor]) -> CallTensors[bool]:
        return tensors.needs()

    def run(self, call: ExpertParallelCall, tensors: CallTensors[Tensor]) -> Tensor:
        # A rank that needs no gradient itself still takes part in the others' backward.
        anchor = tensors.x.new_empty(0).requires_grad_() if call.plan.needs_any else None
        out, _ = _ExpertParallelMLP.apply(call, anchor, *tensors.flatten())
        return out


class _InHalf(_AsFunction):
    """A Runner that runs a call of half a batch in three Functions, and a second run of the same call in one."""

    def __init__(self, owners: PerWeight[Tensor], half: Half) -> None:
        super().__init__(owners)
        self.half = half.number
        self._waiting: Half | None = half

    def run(self, call: ExpertParallelCall, tensors: CallTensors[Tensor]) -> Tensor:
        half, self._waiting = self._waiting, None
        if half is None:
            return super().run(call, tensors)
        return run_split_call(half, call, tensors)


def expert_parallel_mlp(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    *,
    num_experts: int,
    transport: Transport,
    overlap: OverlapConfig | OverlapPlan | None = None,
    placement: ExpertPlacement | None = None,
    activation: Activation = "silu",
    gated: bool = True,
    interleaved: bool = False,
    transposed: bool = False,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    adapters: ExpertAdapters | None = None,
    backend: str = "auto",
    save: Literal["hidden", "input"] = "hidden",
    num_sms: int | None = None,
    batch_invariant: bool = False,
    fillers: Sequence[Callable[[], None]] = (),
) -> Tensor:
    """Do what moe_mlp does with the experts spread over the ranks of `transport`, exchanges hidden behind compute.

    Rank k holds the experts k * E / W .. (k + 1) * E / W. Every rank makes every call, forward and backward; T may
    differ between ranks, zero included. Expert gradients are the sum over all ranks' losses: where dense gradients
    are averaged over W ranks, divide these by W.

    Args:
        x: this rank's tokens (T, D). topk_ids: (T, K) global expert ids. topk_weights: (T, K), used in fp32.
        gate_up_proj, down_proj, gate_up_bias, down_bias, adapters: this rank's E / W experts, shapes as in moe_mlp.
        num_experts: E over all ranks, divisible by transport.size.
        overlap: what to choose the chunks from, or the OverlapPlan to run; the same on every rank. None is
            OverlapConfig().
        placement: which experts this rank's weights are, where not the contiguous ones: gate_up_proj is then
            (slots, 2F, D), and so on. Gradients of replicas are summed over their owners, so that they stay equal.
        fillers: at most two functions that need no exchange (halves of a dense block, the next router): the first is
            called while the first rows are under way, the second while the last are. They run in the caller's grad
            mode and keep what they make; their gradients are ordinary autograd's.
    Returns:
        (T, D) in x.dtype.
    Raises:
        ValueError, TypeError: on the rank whose arguments don't fit; the others raise TransportError. Nothing moves.
        CountMismatch: the ranks make different calls, or, in backward, run the backwards of different calls.
        NonFiniteScores: a rank's topk_weights are not finite.
        TransportError: an exchange failed or timed out.
    """
    if not isinstance(transport, Transport):
        raise TypeError(
            f"transport must be a Transport, got {type(transport).__name__}: for a torch ProcessGroup it is "
            "tritonmoe.transports.ProcessGroupTransport(group)"
        )
    try:
        experts = expert_spec(
            activation=activation,
            gated=gated,
            interleaved=interleaved,
            transposed=transposed,
            backend=backend,
            save=save,
            num_sms=num_sms,
            batch_invariant=batch_invariant,
        )
        weights = with_adapters(PerWeight(gate_up_proj, gate_up_bias, down_proj, down_bias), adapters)
        experts = experts.with_dropout(adapters)
    except Exception:
        refuse(transport)
        raise
    spec = CallSpec(experts, num_experts, DEFAULT_OVERLAP if overlap is None else overlap, placement)
    tensors = CallTensors(x, topk_ids, topk_weights, weights)
    out = run_expert_parallel(CallArguments(spec, transport, tensors, fillers=fillers))
    watch_ids(topk_ids, num_experts)
    return out


def run_expert_parallel(arguments: CallArguments) -> Tensor:
    """Run one layer call: as an operator where torch.compile sees it, otherwise as an autograd Function."""
    if not torch.compiler.is_compiling():
        return _run_eagerly(arguments)
    is_callable, weights = not is_fused(arguments.spec.experts.activation), arguments.tensors.weights
    leaves_graph = is_callable or find_main_grads(weights) is not None or is_transformed()
    if leaves_graph or len(arguments.fillers) > MAX_FILLERS:
        return _run_callable_or_main_grad(arguments)
    return expert_parallel_operator(arguments._replace(tensors=cast_for_autocast(arguments.tensors)))


def _run_eagerly(arguments: CallArguments) -> Tensor:
    if is_transformed():
        refuse(arguments.transport)
        raise RuntimeError(NOT_EXPERT_PARALLEL)
    half = current_half()
    if half is None:
        return run_call(arguments, _AsFunction(arguments.tensors.weights))
    begin_half_call(half, arguments)
    return run_call(arguments, _InHalf(arguments.tensors.weights, half))


@outside_graphs
def _run_callable_or_main_grad(arguments: CallArguments) -> Tensor:
    """Break the graph: an operator takes no callable and returns gradients."""
    return _run_eagerly(arguments)
