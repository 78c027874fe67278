"""Halves: a call of half a batch, as three autograd Functions, between which the other half runs; two_batches().

The first posts the dispatches, the second waits for them, computes the experts and posts the combines, and the third
waits for these. In backward the third posts the adjoints of the combines, the second waits for them, computes, and
posts the adjoints of the dispatches, and the first waits for these. The halves' Functions alternate in forward, and
autograd, which runs the youngest node first, reverses that order.

All inputs are the first Function's, and the third one saves what the backward needs, as the Function of a whole call
does: so the call that activation checkpointing repeats, which is whole, saves the same tensors.
"""

import importlib.util
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.utils.checkpoint import CheckpointFunction

from tritonmoe.config.layer import PerWeight
from tritonmoe.dispatch.header import CallHeader
from tritonmoe.expert_parallel.call import ProposedCall
from tritonmoe.expert_parallel.layer_pass import BackwardPass, ForwardPass
from tritonmoe.expert_parallel.plans.base import PlanKind, PlannedByAnother, PlannedCall, RunForward
from tritonmoe.expert_parallel.state import LayerCalls
from tritonmoe.expert_parallel.whole_call import (
    anchor_of,
    gradients_of_inputs,
    needs_of,
    save_forward,
    saved_forward,
)
from tritonmoe.experts.tensors import CallTensors
from tritonmoe.experts.weight_gradients import SharedWeightGrads
from tritonmoe.overlap.report import LayerReport
from tritonmoe.runtime.autograd import Context, is_recomputing, once_differentiable
from tritonmoe.runtime.halves import Half, NodeOrder, current_half, run_in_turns
from tritonmoe.runtime.transforms import NOT_EXPERT_PARALLEL, is_transformed
from tritonmoe.transports import fail_peers_on_error

__all__ = ["Halves", "two_batches"]

MIXED = "mixed torch.Tensor and DTensor"
"""What PyTorch says of an operation on parameters of which FSDP2 has gathered some only."""
LET_GO = (
    "two_batches met a parameter that isn't gathered. FSDP2 lets go of a block's parameters when the first half leaves "
    "the block, while the second one is still in it: where a block uses parameters behind its experts, shard it with "
    "fully_shard(block, reshard_after_forward=False), or apart from its experts"
)

Part = TypeVar("Part")
Result = TypeVar("Result")


@dataclass(eq=False)
class Halves(PlannedByAnother):
    """A call of half a batch: it is planned and computed by the next kind that plans it, and run in three parts."""

    name = "halves"

    planned_by: PlanKind
    half: Half
    layer: LayerCalls | None

    @classmethod
    def takes(cls, call: ProposedCall) -> bool:
        half = current_half() if call.half else None
        if half is not None:
            _begin_call(half, call)
        return half is not None

    @classmethod
    def plan(cls, call: ProposedCall, header: CallHeader, others: Sequence[type[PlanKind]]) -> PlannedCall:
        half = current_half()
        assert half is not None
        planned = others[0].plan(call, header, others[1:])
        planned.kind = cls(planned.kind, half, call.layer)
        return planned

    def report(self, call: PlannedCall, report: LayerReport) -> None:
        super().report(call, report)
        report.half = self.half.number
        before = None if self.layer is None else self.layer.last_report
        if report.half == 2 and before is not None and before.half == 1:
            report.first_half = before

    def run(self, call: PlannedCall, tensors: CallTensors[Tensor], run_forward: RunForward) -> Tensor:
        if call.first_run is not None:  # a second run, by the counts, is of no use to the other half
            return run_forward(call, tensors)
        return _run_split_call(self.half, call, tensors)

    def plan_again(self, call: ProposedCall, planned: PlannedCall) -> PlannedCall | None:
        again = self.planned_by.plan_again(call, planned)
        if again is not None:
            again.kind = Halves(again.kind, self.half, self.layer)
        return again

    @property
    def repeated(self) -> object:
        return self.planned_by.repeated


@dataclass
class _SplitCall:
    """What the three Functions of one call share."""

    call: PlannedCall
    nodes: NodeOrder
    forward: ForwardPass = field(init=False)
    """The forward that is under way."""
    backward: BackwardPass = field(init=False)
    """The backward that is under way."""
    needs: CallTensors[bool] = field(init=False)
    shared_grads: SharedWeightGrads | None = None
    """With the other half's call, where both have the same weights."""

    @contextmanager
    def in_turn(self, number: int) -> Iterator[None]:
        """Check that the node with this number is the next one of this backward; the other ranks hear of any error.

        They can't go on: the other half's call may be in its middle.
        """
        with fail_peers_on_error(self.call.all_ranks):
            self.nodes.check(number)
            yield


class _Post(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, split: _SplitCall, anchor: Tensor | None, *flat: Tensor | None) -> Tensor:
        tensors = CallTensors.unflatten(flat)
        split.needs = needs_of(ctx)
        ctx.split, ctx.number, ctx.weights_dtype = split, split.nodes.next_number(), tensors.topk_weights.dtype
        split.forward = ForwardPass(split.call, tensors)
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
            split.backward = BackwardPass(split.call, kept, dout, split.needs.weights, split.shared_grads)
            split.backward.begin()
        return None, _token(dout)


def _token(like: Tensor) -> Tensor:
    """Return what ties two Functions of a call together, on the device where both run."""
    return torch.zeros(1, device=like.device)


def _run_split_call(half: Half, call: PlannedCall, tensors: CallTensors[Tensor]) -> Tensor:
    """Run a planned call of half a batch, and the other half between its phases: see RunForward."""
    split = _SplitCall(call, half.nodes)
    with fail_peers_on_error(call.all_ranks):
        token = _Post.apply(split, anchor_of(call, tensors), *tensors.flatten())
        _share_weight_grads(half, split, tensors.weights, token.grad_fn)
        half.hand_over()
        token = _Compute.apply(split, token)
        half.hand_over()
        out, _ = _End.apply(split, token)
        return out


def _share_weight_grads(half: Half, split: _SplitCall, weights: PerWeight[Tensor], node: Node | None) -> None:
    """Make the second half's backward, which runs first, leave its weights' gradients to the first half's."""
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


def _begin_call(half: Half, call: ProposedCall) -> None:
    """Check that half a batch can make this call here.

    Raises:
        ValueError: the other half makes another one. RuntimeError: it can't be left in its middle.
    """
    layer = -1 if call.layer is None else call.layer.number
    half.begin_call((call.transport.handle, layer, call.spec.num_experts))
    if call.is_captured:
        raise RuntimeError(
            "a CUDA graph can't capture two batches, since it would replay one half's calls with the other "
            "half's states. Call the model without two_batches under capture"
        )
    if _is_inside_reentrant_checkpoint():
        raise RuntimeError(
            "reentrant activation checkpointing calls layers inside an autograd Function, from which a half of "
            "the batch can't hand over to the other half: use torch.utils.checkpoint with use_reentrant=False"
        )


def _is_inside_reentrant_checkpoint() -> bool:
    """Return whether a caller, up to where this half began, is reentrant checkpointing."""
    code = CheckpointFunction.forward.__code__
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code is code:
            return True
        frame = frame.f_back
    return False


def two_batches(function: Callable[[Part], Result], *halves: Part) -> tuple[Result, ...]:
    """Return function(half) of both halves of a batch, computed in turns: one while rows of the other are under way.

    The function may be any model's forward, or a part of it, with expert-parallel layers in it. It runs in two
    greenlets that hand over to each other inside these layers, at fixed places; so does the backward of what both give,
    where one backward() goes through both, as that of the sum of two losses. Results and gradients are those of two
    calls. A layer's aux_loss and last_routing are, inside the function, those of the half that reads them, and None
    afterwards.

    Random numbers: the first half goes on with the global generators, the second one has its own, seeded from them.
    Every rank makes the call alike; how large its halves are is its own matter.

    Args:
        function: takes a half, calls the same layers in the same order for both, and changes nothing that the other
            half's call reads.
        halves: two. One alone is just computed.
    Raises:
        ValueError: there are no halves or more than two, or they call different layers.
        RuntimeError: this can't be done inside a half, in the backward of activation checkpointing, under torch.func's
            transforms, in a CUDA graph, or with the layers in a compiled graph or under reentrant checkpointing.
        ImportError: the package greenlet is not installed.
    Example:
        first, second = tm.two_batches(lambda x: model(x).square().sum(), x[:4], x[4:])
        (first + second).backward()
    """
    if not 1 <= len(halves) <= 2:
        raise ValueError(
            f"two_batches takes two halves of a batch, got {len(halves)}: while one half computes, the rows of the "
            "other travel, so a third would hide nothing more"
        )
    if len(halves) == 1:
        return (function(halves[0]),)
    if current_half() is not None:
        raise RuntimeError("two_batches was called inside half a batch: call it once, around the whole model")
    if is_recomputing():
        raise RuntimeError(
            "activation checkpointing around two_batches would run it again in a backward, which it can't do: put "
            "the checkpoints inside the function that two_batches calls"
        )
    if is_transformed():
        raise RuntimeError(NOT_EXPERT_PARALLEL)
    if importlib.util.find_spec("greenlet") is None:
        raise ImportError("two_batches needs the package greenlet: pip install 'tritonmoe[two-batches]'")
    try:
        return run_in_turns([partial(function, half) for half in halves])
    except RuntimeError as error:
        if MIXED in str(error):
            raise RuntimeError(LET_GO) from error
        raise
