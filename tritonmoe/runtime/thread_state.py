"""ThreadState: what PyTorch keeps for a whole thread, so that code which takes turns there finds its own again.

Grad mode, autocast, hooks on saved tensors, the modes that see functions and operators, the generators of random
numbers, and whether torch.compile is at work belong to a thread. Where a context manager of the one has been entered
and not left yet when the other goes on, each must find what it has left, and nothing else.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._C._dynamo import eval_frame

__all__ = ["ThreadState", "saved_tensors_hooks"]

Hooks = tuple[Callable[[Tensor], object], Callable[[object], Tensor]]


@dataclass(frozen=True)
class ThreadState:
    """The state of the calling thread at one moment."""

    grad_enabled: bool
    inference_mode: bool
    autocast: tuple[tuple[str, bool, torch.dtype], ...]
    """Of each kind of device: its name, whether autocast is on, and its dtype."""
    autocast_cache: bool
    saved_tensors_hooks: tuple[Hooks, ...]
    """The outermost first, as in the next two."""
    function_modes: tuple[object, ...]
    dispatch_modes: tuple[object, ...]
    compiler: Any
    """What torch.compile has put in the place of the interpreter's own way to run a frame."""
    generators: tuple[tuple[torch.Generator, Tensor], ...]
    """The global generators of random numbers, of the CPU and of the current CUDA device, and their states."""

    @classmethod
    def take(cls) -> "ThreadState":
        """Return the present state, and leave it as it is."""
        devices = ("cpu", "cuda") if torch.cuda.is_initialized() else ("cpu",)
        return cls(
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            tuple((name, torch.is_autocast_enabled(name), torch.get_autocast_dtype(name)) for name in devices),
            torch.is_autocast_cache_enabled(),
            saved_tensors_hooks(),
            tuple(map(torch._C._get_function_stack_at, range(torch._C._len_torch_function_stack()))),
            tuple(map(torch._C._get_dispatch_stack_at, range(torch._C._len_torch_dispatch_stack()))),
            eval_frame.get_eval_frame_callback(),
            tuple((generator, generator.get_state()) for generator in _generators()),
        )

    def put(self) -> None:
        """Make this the state of the calling thread.

        Raises:
            RuntimeError: inference mode was entered or left in between, which only its own context manager can do.
        """
        if self.inference_mode != torch.is_inference_mode_enabled():
            raise RuntimeError(
                "a half of a batch can't enter or leave torch.inference_mode() between handovers: enter it around "
                "both halves"
            )
        torch.set_grad_enabled(self.grad_enabled)
        for name, is_enabled, dtype in self.autocast:
            torch.set_autocast_enabled(name, is_enabled)
            torch.set_autocast_dtype(name, dtype)
        torch.set_autocast_cache_enabled(self.autocast_cache)
        _put_saved_tensors_hooks(self.saved_tensors_hooks)
        _put_modes(
            self.function_modes,
            torch._C._len_torch_function_stack,
            torch._C._get_function_stack_at,
            torch._C._pop_torch_function_stack,
            torch._C._push_on_torch_function_stack,
        )
        _put_modes(
            self.dispatch_modes,
            torch._C._len_torch_dispatch_stack,
            torch._C._get_dispatch_stack_at,
            partial(torch._C._pop_torch_dispatch_stack, None),
            torch._C._push_on_torch_dispatch_stack,
        )
        if eval_frame.get_eval_frame_callback() is not self.compiler:
            eval_frame.set_eval_frame(self.compiler)
        for generator, state in self.generators:
            generator.set_state(state)

    def with_other_numbers(self) -> "ThreadState":
        """Return this state with generators of other numbers, whose seeds are drawn from the CPU's global one."""
        fresh = []
        for generator, _ in self.generators:
            seed = int(torch.randint(2**62, (), device="cpu"))
            fresh.append((generator, torch.Generator(generator.device).manual_seed(seed).get_state()))
        return replace(self, generators=tuple(fresh))


def _generators() -> list[torch.Generator]:
    generators = [torch.default_generator]
    if torch.cuda.is_initialized():
        generators.append(torch.cuda.default_generators[torch.cuda.current_device()])
    return generators


def saved_tensors_hooks() -> tuple[Hooks, ...]:
    """Return all hooks on saved tensors; PyTorch shows the innermost only."""
    hooks = _take_saved_tensors_hooks()
    for pair in hooks:
        torch._C._autograd._push_saved_tensors_default_hooks(*pair)
    return hooks


def _take_saved_tensors_hooks() -> tuple[Hooks, ...]:
    taken = []
    while (pair := torch._C._autograd._top_saved_tensors_default_hooks(True)) is not None:
        torch._C._autograd._pop_saved_tensors_default_hooks()
        taken.append(pair)
    return tuple(reversed(taken))


def _put_saved_tensors_hooks(hooks: tuple[Hooks, ...]) -> None:
    if hooks or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        _take_saved_tensors_hooks()
        for pair in hooks:
            torch._C._autograd._push_saved_tensors_default_hooks(*pair)


def _put_modes(
    modes: tuple[object, ...],
    length: Callable[[], int],
    at: Callable[[int], object],
    pop: Callable[[], object],
    push: Callable[[Any], None],
) -> None:
    """Make these the modes of a stack, which the other arguments read and change."""
    same = 0
    while same < min(length(), len(modes)) and at(same) is modes[same]:
        same += 1
    while length() > same:
        pop()
    for mode in modes[same:]:
        push(mode)
