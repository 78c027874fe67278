"""ThreadState: what is taken is put back, whatever was entered in between and not left."""

from contextlib import ExitStack

import pytest
import torch
from torch.overrides import BaseTorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tritonmoe.runtime.thread_state import ThreadState


class Counts(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.num_calls = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.num_calls += 1
        return function(*arguments, **(keywords or {}))


def pack(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


ENTERED = {
    "grad mode": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "no cache": lambda: torch.autocast("cpu", torch.bfloat16, cache_enabled=False),
    "hooks": lambda: torch.autograd.graph.saved_tensors_hooks(pack, pack),
    "function mode": BaseTorchFunctionMode,
    "dispatch mode": Counts,
    "random numbers": lambda: torch.random.fork_rng(devices=[]),
}


@pytest.mark.parametrize("names", [[name] for name in ENTERED] + [list(ENTERED), list(reversed(ENTERED))], ids=str)
def test_two_that_take_turns(names: list[str]) -> None:
    """Both enter the same, one after the other, and leave in the same order, as no stack would have it."""
    before = ThreadState.take()
    states, stacks = [before, before], [ExitStack(), ExitStack()]
    for name in names:
        for number in range(2):
            states[number].put()
            stacks[number].enter_context(ENTERED[name]())
            torch.rand(number + 1)
            states[number] = ThreadState.take()
    for number in range(2):
        states[number].put()
        assert len(ThreadState.take().dispatch_modes) == names.count("dispatch mode")
        stacks[number].close()
        if "random numbers" in names:  # which leaving it has put back
            before = ThreadState.take()
        after = ThreadState.take()
        for field in ("grad_enabled", "autocast", "autocast_cache", "function_modes", "dispatch_modes"):
            assert getattr(after, field) == getattr(before, field), field
        assert after.saved_tensors_hooks == ()


def test_a_mode_sees_its_own_calls_only() -> None:
    before, mode = ThreadState.take(), Counts()
    with mode:
        torch.zeros(1) + 1
        inside = ThreadState.take()
        before.put()
        seen = mode.num_calls
        torch.zeros(1) + 1
        assert mode.num_calls == seen
        inside.put()
        torch.zeros(1) + 1
        assert mode.num_calls > seen


def test_random_numbers_go_on_where_they_were() -> None:
    torch.manual_seed(3)
    state = ThreadState.take()
    other = state.with_other_numbers()
    state.put()
    expected = torch.rand(4)
    other.put()
    others = torch.rand(4)
    state.put()
    assert torch.equal(torch.rand(4), expected)
    other.put()
    assert torch.equal(torch.rand(4), others)
    assert not torch.equal(others, expected)
    torch.manual_seed(3)
    assert torch.equal(ThreadState.take().with_other_numbers().generators[0][1], other.generators[0][1])


def test_inference_mode_cannot_be_changed_in_between() -> None:
    state = ThreadState.take()
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode"):
        state.put()
