"""What autograd Functions of this package share: no autocast inside, one derivative only, things kept beside tensors.

A second derivative is refused in words, and what is kept survives activation checkpointing.
"""

import inspect
import itertools
import sys
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial, wraps
from types import FrameType
from typing import Any, NoReturn, Protocol

import torch
import torch.utils.checkpoint
from torch import Tensor

from tritonmoe.runtime.streamed import find_streamed, known_handles
from tritonmoe.runtime.thread_state import saved_tensors_hooks

__all__ = [
    "Context",
    "caller_autocast",
    "checkpointed_calls",
    "checkpointed_region",
    "is_autocast_on",
    "is_recomputing",
    "keep_beside",
    "kept_beside",
    "leaf_of",
    "once_differentiable",
    "outside_graphs",
    "put_back_after_recompute",
    "refuse_second_derivative",
    "save_tensors",
    "saved_by",
    "without_autocast",
]

SECOND_DERIVATIVE = (
    "the gradients of tritonmoe's experts, and of routers whose work kernels do, cannot be differentiated again: their "
    "backward is one operation without a derivative of its own, in every backend. For a gradient penalty or a Hessian "
    "write the experts in plain PyTorch; a router with backend='torch' has second derivatives"
)


class Context(Protocol):
    """What an autograd Function, or the gradient formula of an operator, keeps from its forward for its backward."""

    needs_input_grad: tuple[bool, ...]
    saved_tensors: tuple[Tensor, ...]

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...

    def mark_non_differentiable(self, *tensors: Tensor) -> None: ...

    def set_materialize_grads(self, value: bool) -> None: ...

    def __getattr__(self, name: str) -> Any: ...

    def __setattr__(self, name: str, value: object) -> None: ...


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Return a context in which autocast casts nothing: dtypes are decided before, and sums stay in fp32."""
    return torch.autocast(device.type, enabled=False) if is_autocast_on(device) else nullcontext()


def is_autocast_on(device: torch.device) -> bool:
    # Not torch.amp.is_autocast_available, which torch 2.10's dynamo can't trace; meta tensors have no autocast.
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def caller_autocast(device: torch.device) -> Callable[[], AbstractContextManager]:
    """Return a function that gives a context with the autocast that is on now, for code that is to run inside later."""
    if not is_autocast_on(device):
        return nullcontext
    dtype, is_cached = torch.get_autocast_dtype(device.type), torch.is_autocast_cache_enabled()
    return lambda: torch.autocast(device.type, dtype, cache_enabled=is_cached)


outside_graphs = torch._disable_dynamo
"""Wrap a function that torch.compile calls but does not look into: torch.compiler.disable without importing dynamo.

torch.compiler.disable imports it where a function is defined, which would make `import tritonmoe` take seconds; this
does so at the first call. Callers ask torch.compiler.is_compiling() before they come here, so eager calls never do.
"""


def refuse_second_derivative(ctx: Context, *_: Tensor) -> NoReturn:
    """Stand as the backward of what gives gradients, and say that there is none."""
    raise RuntimeError(SECOND_DERIVATIVE)


class _FirstDerivative(torch.autograd.Function):
    """Hands gradients on, attached to what they depend on by a node that raises when they are differentiated."""

    @staticmethod
    def forward(ctx: object, grads: Sequence[Tensor | None], *_: Tensor) -> tuple[Tensor | None, ...]:
        return tuple(None if grad is None else grad.detach() for grad in grads)

    backward = staticmethod(refuse_second_derivative)


def save_tensors(ctx: Context, *tensors: Tensor | None) -> None:
    """Save tensors for a backward, which takes them from saved_by().

    Handles of experts that stay elsewhere are kept beside them: hooks that take saved tensors to a CPU (save_on_cpu,
    TRL's activation_offloading) would bring back others, as large as weights, that nobody knows.
    """
    if not known_handles:  # as in almost every call
        ctx.save_for_backward(*tensors)
        return
    ctx.handles = {place: one for place, one in enumerate(tensors) if one is not None and find_streamed(one)}
    ctx.save_for_backward(*(None if place in ctx.handles else one for place, one in enumerate(tensors)))


def saved_by(ctx: Context) -> tuple[Tensor, ...]:
    """Return what save_tensors() has saved."""
    handles: dict[int, Tensor] | None = getattr(ctx, "handles", None)
    if not handles:
        return ctx.saved_tensors
    return tuple([handles.get(place, one) for place, one in enumerate(ctx.saved_tensors)])


def once_differentiable(backward: Callable[..., tuple]) -> Callable[..., tuple]:
    """Wrap a Function's backward(ctx, saved, *douts): no graph, no autocast inside; a second derivative raises.

    saved: of save_tensors(), which activation checkpointing gives once. autograd finds the error only where it stands
    between a gradient and what that is differentiated by: so gradients hang on all that is saved and on `douts`. Of an
    input that isn't saved the way leads through the mark of keep_beside(), which is an output of the Function.
    torch.autograd.function.once_differentiable raises only where `douts` need a gradient, and names nobody.
    """

    @wraps(backward)
    def once(ctx: Context, *douts: Tensor | None) -> tuple:
        saved = saved_by(ctx)
        device = next(dout.device for dout in douts if dout is not None)
        if not torch.is_grad_enabled():
            with without_autocast(device):
                return backward(ctx, saved, *douts)
        with torch.no_grad(), without_autocast(device):
            grads = backward(ctx, saved, *douts)
        causes = (tensor for tensor in (*douts, *saved) if tensor is not None and tensor.requires_grad)
        return _FirstDerivative.apply(grads, *causes)

    return once


_numbers = itertools.count()
_CPU = torch.device("cpu")
_kept_by_recomputes: dict[int, object] = {}


def keep_beside(ctx: Context, value: object) -> Tensor:
    """Keep what is no tensor and belongs to the saved ones (a grouping, a plan), and give the mark to save with them.

    The Function gives the mark as an output too: once_differentiable says why.

    Non-reentrant checkpointing hands the backward of the first forward's node the tensors that a recompute saved. Their
    rows are in the recompute's order, which need not be the first one's: the plan may have changed since, and near-tie
    tokens may have gone to other experts. By the mark, kept_beside() finds what the recompute kept.
    """
    number = next(_numbers)
    ctx.kept = number, value
    if is_recomputing():
        _kept_by_recomputes[number] = value

        def forget() -> None:
            _kept_by_recomputes.pop(number, None)

        torch.autograd.Variable._execution_engine.queue_callback(forget)  # when this backward ends
    return torch.scalar_tensor(number, dtype=torch.float64, device=_CPU)  # of a dtype that has gradients


def kept_beside(ctx: Context, mark: Tensor) -> Any:
    """Return what keep_beside() kept in the forward that saved these tensors; `mark` is one of them."""
    number, (own_number, own) = int(mark.item()), ctx.kept
    recomputed = _kept_by_recomputes.pop(number, None)
    if number == own_number:
        return own
    if recomputed is None:
        raise RuntimeError("the tensors of a recompute are used in another backward than it was made in")
    return recomputed


def is_recomputing() -> bool:
    """Return whether this forward runs inside a backward: the recompute of activation checkpointing.

    Both kinds of torch.utils.checkpoint call the function again while the autograd engine is at work, and the
    engine's graph task id is -1 at any other time. Things that count calls ask here, so as to count each once.
    """
    if torch.compiler.is_compiling():  # there the partitioner recomputes, not a second call
        return False
    return torch._C._current_graph_task_id() != -1


def checkpointed_region() -> "weakref.ref[object] | None":
    """Return what tells apart the calls of non-reentrant checkpointing: the same in a forward and in its recompute.

    PyTorch says it only in the closures of the hooks that it lays on saved tensors.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return None if hooks is None else _region_of(hooks[0])


def _region_of(pack: Callable[[Tensor], object]) -> "weakref.ref[object] | None":
    pack = inspect.unwrap(pack)
    if not inspect.isfunction(pack) or pack.__module__ != torch.utils.checkpoint.__name__:
        return None
    closure = dict(zip(pack.__code__.co_freevars, pack.__closure__ or (), strict=True))
    if "target_frame_ref" in closure:
        return closure["target_frame_ref"].cell_contents
    return weakref.ref(closure["frame"].cell_contents) if "frame" in closure else None


def checkpointed_calls() -> list[object]:
    """Return what stands for each call of torch.utils.checkpoint, of either kind, inside of which this runs.

    They are the same objects in a forward and in its recompute, and live no longer than the graph that may recompute
    it. Reentrant checkpointing says it only in the frames of its Function.
    """
    regions = [_region_of(pack) for pack, _ in saved_tensors_hooks()]
    calls = [region() for region in regions if region is not None]
    function = torch.utils.checkpoint.CheckpointFunction
    codes = function.forward.__code__, function.backward.__code__
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code in codes:
            calls.append(frame.f_locals["ctx"])
        frame = frame.f_back
    return calls


_before_recomputes: "weakref.WeakKeyDictionary[object, dict[str, object]]" = weakref.WeakKeyDictionary()
"""By object: the attributes that a recompute has set, as they were before it."""


def put_back_after_recompute(owner: object, names: Sequence[str], used: Tensor) -> None:
    """Keep attributes that a recompute is about to set for the checkpointed function alone.

    They are what they were before once `used`, a tensor of that forward, has its gradient: by then the function has
    ended. Whoever held a part of the graph that non-reentrant checkpointing recomputes, which never runs backward,
    would hold all that it saved.
    """
    is_again = is_recomputing()
    if not is_again:
        _before_recomputes.pop(owner, None)  # of a backward that raised
    elif owner not in _before_recomputes:
        _before_recomputes[owner] = {name: getattr(owner, name) for name in names}
    # Of non-reentrant checkpointing the graph of the first forward runs backward, of reentrant that of the recompute.
    if used.requires_grad and (is_again or checkpointed_region() is not None):
        used.register_hook(partial(_put_back, weakref.ref(owner)))


def _put_back(owner_ref: "weakref.ref[object]", _: Tensor) -> None:
    owner = owner_ref()
    if owner is not None:
        for name, value in _before_recomputes.pop(owner, {}).items():
            setattr(owner, name, value)


def leaf_of(tensor: Tensor) -> Tensor | None:
    """Return the leaf that a tensor is, or that it is a cast, view or multiple of; None where it is something else."""
    if tensor.grad_fn is None:
        return tensor if tensor.requires_grad else None
    node: Any = tensor.grad_fn
    while not hasattr(node, "variable"):
        before = [one for one, _ in node.next_functions if one is not None]
        if len(before) != 1:
            return None
        node = before[0]
    return node.variable if node.variable.numel() == tensor.numel() else None
