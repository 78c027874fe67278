"""expert_parallel_mlp: the experts spread over many ranks, eager or traced."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from tritonmoe.config.activations import Activation, is_fused
from tritonmoe.config.overlap import OverlapConfig, OverlapPlan, check_overlap
from tritonmoe.config.precision import ExpertPrecision
from tritonmoe.dispatch.placement import ExpertPlacement
from tritonmoe.expert_parallel.call import CallSpec, ProposedCall
from tritonmoe.expert_parallel.check import MAX_FILLERS
from tritonmoe.expert_parallel.operator import expert_parallel_operator
from tritonmoe.expert_parallel.run_call import run_call
from tritonmoe.expert_parallel.state import abort_call
from tritonmoe.expert_parallel.whole_call import run_whole_call
from tritonmoe.experts.adapters import ExpertAdapters, with_adapters
from tritonmoe.experts.arguments import cast_for_autocast, find_main_grads
from tritonmoe.experts.one_based_ids import warn_of_one_based_ids
from tritonmoe.experts.quantized_weight import Weight, given_weights
from tritonmoe.experts.spec import expert_spec
from tritonmoe.experts.tensors import CallTensors
from tritonmoe.runtime.autograd import outside_graphs
from tritonmoe.runtime.halves import current_half
from tritonmoe.runtime.transforms import NOT_EXPERT_PARALLEL, is_transformed
from tritonmoe.transports import Transport

__all__ = ["expert_parallel_mlp", "run_expert_parallel"]

DEFAULT_OVERLAP = OverlapConfig()


def expert_parallel_mlp(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up_proj: Weight,
    down_proj: Weight,
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
    precision: ExpertPrecision | None = None,
    backend: str = "auto",
    save: Literal["hidden", "input"] = "hidden",
    num_sms: int | None = None,
    batch_invariant: bool = False,
    fillers: Sequence[Callable[[], None]] = (),
) -> Tensor:
    """Return moe_mlp's result with the experts spread over the ranks of `transport`, exchanges hidden behind compute.

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
            precision=precision,
            backend=backend,
            save=save,
            num_sms=num_sms,
            batch_invariant=batch_invariant,
        )
        weights = with_adapters(given_weights(gate_up_proj, gate_up_bias, down_proj, down_bias), adapters)
        experts = experts.with_dropout(adapters)
        overlap = DEFAULT_OVERLAP if overlap is None else overlap
        check_overlap(overlap)
    except Exception:
        abort_call(transport)
        raise
    spec = CallSpec(experts, num_experts, overlap, placement)
    tensors = CallTensors(x, topk_ids, topk_weights, weights)
    out = run_expert_parallel(ProposedCall(spec, transport, tensors, fillers=fillers))
    warn_of_one_based_ids(topk_ids, num_experts)
    return out


def run_expert_parallel(call: ProposedCall) -> Tensor:
    """Run one layer call: as an operator where torch.compile sees it, otherwise as an autograd Function."""
    if not torch.compiler.is_compiling():
        return _run_eagerly(call)
    is_callable, weights = not is_fused(call.spec.experts.activation), call.tensors.weights
    leaves_graph = is_callable or find_main_grads(weights) is not None or is_transformed()
    if leaves_graph or len(call.fillers) > MAX_FILLERS:
        return _run_callable_or_main_grad(call)
    call.tensors = cast_for_autocast(call.tensors)
    return expert_parallel_operator(call)


def _run_eagerly(call: ProposedCall) -> Tensor:
    if is_transformed():
        abort_call(call.transport)
        raise RuntimeError(NOT_EXPERT_PARALLEL)
    half = current_half()
    call.half = 0 if half is None else half.number
    return run_call(call, run_whole_call)


@outside_graphs
def _run_callable_or_main_grad(call: ProposedCall) -> Tensor:
    """Break the graph: an operator takes no callable and returns gradients."""
    return _run_eagerly(call)
