"""A layer call of half a batch: three autograd Functions, between which the other half runs.

The first posts the dispatches, the second waits for them, computes the experts and posts the combines, and the third
waits for these. In backward the third posts the adjoints of the combines, the second waits for them, computes, and
posts the adjoints of the dispatches, and the first waits for these. The halves' Functions alternate in forward, and
autograd, which runs the youngest node first, reverses that order.

All inputs are the first Function's, and the third one saves what the backward needs, as the Function of a whole call
does: so the call that activation checkpointing repeats, which is whole, saves the same tensors.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.utils.checkpoint import CheckpointFunction

from tritonmoe.config.layer import PerWeight
from tritonmoe.expert_parallel.agreed_call import AgreedCall
from tritonmoe.expert_parallel.call_pass import CallBackward, CallForward
from tritonmoe.expert_parallel.halves import Half, NodeOrder
from tritonmoe.expert_parallel.proposed_call import ProposedCall
from tritonmoe.expert_parallel.state import refuse
from tritonmoe.expert_parallel.whole_call import (
    anchor_of,
    gradients_of_inputs,
    needs_of,
    run_whole_call,
    save_forward,
    saved_forward,
)
from tritonmoe.experts.tensors import CallTensors
from tritonmoe.experts.weight_gradients import SharedWeightGrads
from tritonmoe.runtime.autograd import Context, once_differentiable
from tritonmoe.runtime.host_device import is_captured
from tritonmoe.transports import leaving_nobody_waiting

__all__ = ["begin_half_call", "run_split_call"]


@dataclass
class _SplitCall:
    """What the three Functions of one call share."""

    call: AgreedCall
    nodes: NodeOrder
    forward: CallForward = field(init=False)
    """The forward that is under way."""
    backward: CallBackward = field(init=False)
    """The backward that is under way."""
    needs: CallTensors[bool] = field(init=False)
    shared_grads: SharedWeightGrads | None = None
    """With the other half's call, where both have the same weights."""

    @contextmanager
    def in_turn(self, number: int) -> Iterator[None]:
        """Check that the node with this number is the next one of this backward; the other ranks hear of any error.

        They can't go on: the other half's call may be in its middle.
        """
        with leaving_nobody_waiting(self.call.all_ranks):
            self.nodes.check(number)
            yield


class _Post(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, split: _SplitCall, anchor: Tensor | None, *flat: Tensor | None) -> Tensor:
        tensors = CallTensors.unflatten(flat)
        split.needs = needs_of(ctx)
        ctx.split, ctx.number, ctx.weights_dtype = split, split.nodes.next_number(), tensors.topk_weights.dtype
        split.forward = CallForward(split.call, tensors)
        split.forward.begin()
        return _token(tensors.x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, *_: Sequence[Tensor] | Tensor) -> tuple[Tensor | None, ...]:
        with ctx.split.in_turn(ctx.number):
            backward = ctx.split.backward
            del ctx.split.backward
            grads = backward.end()
        return gradients_of_inputs(grads, ctx.weights_dtype)


class _Compute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, split: _SplitCall, token: Tensor) -> Tensor:
        ctx.split, ctx.number = split, split.nodes.next_number()
        split.forward.compute()
        return _token(token)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, _: Sequence[Tensor], token: Tensor) -> tuple[Tensor | None, ...]:
        with ctx.split.in_turn(ctx.number):
            ctx.split.backward.compute()
        return None, _token(token)


class _End(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, split: _SplitCall, token: Tensor) -> tuple[Tensor, Tensor | None]:
        ctx.split, ctx.number = split, split.nodes.next_number()
        # What is saved must be held by autograd alone, which activation checkpointing makes let go.
        forward = split.forward
        del split.forward
        out = forward.end()
        return out, save_forward(ctx, forward, split.needs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, saved: Sequence[Tensor], dout: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        split = ctx.split
        with split.in_turn(ctx.number):
            kept = saved_forward(ctx, saved)
            split.backward = CallBackward(split.call, kept, dout, split.needs.weights, split.shared_grads)
            split.backward.begin()
        return None, _token(dout)


def _token(like: Tensor) -> Tensor:
    """Return what ties two Functions of a call together, on the device where both run."""
    return torch.zeros(1, device=like.device)


def run_split_call(half: Half, call: AgreedCall, tensors: CallTensors[Tensor]) -> Tensor:
    """Run a planned call of half a batch, and the other half between its phases: see RunForward.

    A second run, by the counts, is of no use to the other half: it is one Function.
    """
    if call.first_run is not None:
        return run_whole_call(call, tensors)
    split = _SplitCall(call, half.nodes)
    with leaving_nobody_waiting(call.all_ranks):
        token = _Post.apply(split, anchor_of(call, tensors), *tensors.flatten())
        _share_weight_grads(half, split, tensors.weights, token.grad_fn)
        half.hand_over()
        token = _Compute.apply(split, token)
        half.hand_over()
        out, _ = _End.apply(split, token)
        return out


def _share_weight_grads(half: Half, split: _SplitCall, weights: PerWeight[Tensor], node: Node | None) -> None:
    """Let the second half's backward, which is the earlier one, leave its weights' gradients to the first half's."""
    placement = split.call.placement
    if placement is not None and placement.has_replicas:
        return  # each backward sums its own over the replicas
    if half.number == 1:
        half.leave("call", _Posted(split, weights, node))
        return
    first = half.take("call")
    if not isinstance(first, _Posted):
        return  # this call is run once more, since some rank's rows exceeded the capacity
    if all(weight is other for weight, other in zip(weights, first.weights, strict=True)):
        first.split.shared_grads = SharedWeightGrads()
        split.shared_grads = SharedWeightGrads(first.node, first.split.shared_grads.left)


class _Posted(NamedTuple):
    """What the second half's call needs of the first half's, which has posted its dispatches."""

    split: _SplitCall
    weights: PerWeight[Tensor]
    node: Node | None
    """Of its first Function, which runs last in its backward; None where it needs no gradient."""


def begin_half_call(half: Half, call: ProposedCall) -> None:
    """Check that half a batch can make this call here, before anything of it is sent.

    Raises:
        ValueError: the other half makes another one. RuntimeError: it can't be left in its middle. The other ranks hear
            of either, and raise too.
    """
    layer = -1 if call.layer is None else call.layer.number
    try:
        half.begin_call((call.transport.handle, layer, call.spec.num_experts))
        x = call.tensors.x
        if isinstance(x, Tensor) and is_captured(x.device):
            raise RuntimeError(
                "a CUDA graph can't capture two batches, since it would replay one half's calls with the other "
                "half's states. Call the model without two_batches under capture"
            )
        if _is_inside_reentrant_checkpoint():
            raise RuntimeError(
                "reentrant activation checkpointing calls layers inside an autograd Function, from which a half of "
                "the batch can't hand over to the other half: use torch.utils.checkpoint with use_reentrant=False"
            )
    except Exception:
        refuse(call.transport)
        raise


def _is_inside_reentrant_checkpoint() -> bool:
    """Say whether a caller, up to where this half began, is reentrant checkpointing."""
    code = CheckpointFunction.forward.__code__
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code is code:
            return True
        frame = frame.f_back
    return False
