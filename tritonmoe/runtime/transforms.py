"""Our autograd Functions under torch.func's transforms and forward-mode AD: grad and vjp work, the others say why not.

A transform wraps tensors, level by level, and neither kernels nor threads can read wrapped ones. `_Transformed` and
`_TransformedBackward` let it unwrap them all before a Function's own forward and backward run. They are used only where
a transform is active: a Function with setup_context costs several times as much per call.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import NoReturn

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from tritonmoe.runtime.autograd import Context, outside_graphs, refuse_second_derivative, without_autocast

__all__ = [
    "MAIN_GRAD",
    "NOT_EXPERT_PARALLEL",
    "below_transforms",
    "is_transformed",
    "refuse_jvp",
    "refuse_tangents",
    "refuse_vmap",
    "run_function",
    "unwrapped",
]

NO_VMAP = (
    "tritonmoe's experts can't be vmapped: sizes follow from every token's ids. Give all tokens to one call, where "
    "they don't meet: a layer takes (..., D), moe_mlp (T, D) of a flattened batch. For gradients of each sample call "
    "torch.func.grad in a loop, for a Jacobian torch.func.jacrev(..., chunk_size=1)"
)
NO_JVP = (
    "tritonmoe's experts have no forward-mode derivative (torch.func.jvp, jacfwd, hessian, torch.autograd.forward_ad): "
    "use torch.func.grad or vjp, or torch.autograd, which go backward"
)
NOT_EXPERT_PARALLEL = (
    "expert-parallel calls can't run under torch.func's transforms or forward-mode AD: their exchanges follow one "
    "forward and one backward that all ranks make. Take gradients with backward() or torch.autograd.grad; "
    "torch.func.functional_call alone is fine"
)
MAIN_GRAD = (
    "weights with a main_grad can't be used under torch.func's transforms, which give gradients as results and add "
    "none to a main_grad: pass such weights as arguments of the transformed function (functional_call does), or delete "
    "main_grad"
)


def is_transformed() -> bool:
    """Return whether a transform of torch.func, or forward-mode AD, is active."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def unwrapped(tensor: Tensor) -> Tensor:
    """Return the tensor below all transforms, for what has no gradient: ids, counts."""
    if torch.compiler.is_compiling():
        return tensor
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        if torch._C._functorch.is_batchedtensor(tensor):
            raise RuntimeError(NO_VMAP)
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def below_transforms() -> AbstractContextManager:
    """Return a context in which unwrapped() tensors may be written to though a transform captured them."""
    return torch._C._DisableFuncTorch() if is_transformed() else nullcontext()


def refuse_vmap(*_: object) -> NoReturn:
    """Stand as the vmap of a Function that has none, and say so."""
    raise RuntimeError(NO_VMAP)


def refuse_tangents(*tensors: Tensor) -> None:
    """Raise RuntimeError where forward-mode AD is active and one of these has a tangent."""
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise RuntimeError(NO_JVP)


def refuse_jvp(ctx: object, *grad_inputs: object) -> NoReturn:
    """Stand as the jvp of a Function that has none, and say so."""
    raise RuntimeError(NO_JVP)


def run_function(function: type[torch.autograd.Function], *arguments: object) -> Tensor:
    """Apply an autograd Function that gives its output and a mark, and whose backward is once_differentiable."""
    if not is_transformed():
        out, _ = function.apply(*arguments)
        return out
    return _run_transformed(function, *arguments)


@outside_graphs  # where torch.compile compiles what surrounds a transform
def _run_transformed(function: type[torch.autograd.Function], *arguments: object) -> Tensor:
    out, _ = _Transformed.apply(function, *arguments)
    return out


class _Context:
    """What a Function keeps from its forward for its backward, in place of PyTorch's ctx."""

    saved_tensors: tuple[Tensor | None, ...]
    needs_input_grad: tuple[bool, ...]

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors


class _Transformed(torch.autograd.Function):
    """(a Function, its arguments) -> its output, and what it kept, below all transforms."""

    @staticmethod
    def forward(function: type[torch.autograd.Function], *arguments: object) -> tuple[Tensor, _Context]:
        kept = _Context()
        out, _ = function.forward(kept, *arguments)
        return out, kept

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[object, ...], output: tuple[Tensor, _Context]) -> None:
        function, *arguments = inputs
        ctx.function, ctx.kept = function, output[1]
        ctx.save_for_backward(*(argument for argument in arguments if isinstance(argument, Tensor)))

    @staticmethod
    def backward(ctx: Context, dout: Tensor, _: None) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[1:]
        # The tensors are what the gradients depend on, by which a second derivative finds its refusal.
        return None, *_TransformedBackward.apply(ctx.function, ctx.kept, needs, dout, *ctx.saved_tensors)

    vmap = staticmethod(refuse_vmap)
    jvp = staticmethod(refuse_jvp)


class _TransformedBackward(torch.autograd.Function):
    """A Function's own backward, below all transforms."""

    @staticmethod
    @outside_graphs
    def forward(
        function: type[torch.autograd.Function], kept: _Context, needs: tuple[bool, ...], dout: Tensor, *_: Tensor
    ) -> tuple[Tensor | None, ...]:
        kept.needs_input_grad = needs
        with torch.no_grad(), without_autocast(dout.device):
            return function.backward(kept, dout)

    @staticmethod
    def setup_context(ctx: object, inputs: tuple[object, ...], output: tuple[Tensor | None, ...]) -> None:
        pass

    backward = staticmethod(refuse_second_derivative)
    vmap = staticmethod(refuse_vmap)
    jvp = staticmethod(refuse_jvp)
