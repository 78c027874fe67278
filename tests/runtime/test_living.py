"""live_instances(), modules_with(), owners_of_memory(): what this process holds, without what other threads make."""

import copy
import threading
import time

import pytest
import torch
from torch import nn

from tritonmoe.runtime.living import live_instances, modules_with, owners_of_memory

pytestmark = pytest.mark.usefixtures("few_objects")


class Below(torch.optim.SGD):
    pass


def test_objects_of_a_class_and_of_those_below_it() -> None:
    weight = nn.Parameter(torch.ones(2))
    made = [torch.optim.SGD([weight]), Below([weight])]
    assert [sum(found is one for found in live_instances(torch.optim.Optimizer)) for one in made] == [1, 1]
    assert [any(found is one for found in live_instances(Below)) for one in made] == [False, True]
    assert not any(isinstance(found, torch.optim.Optimizer) for found in live_instances(nn.Linear))


def test_modules_that_have_a_parameter() -> None:
    first, other, third = nn.Linear(2, 3), nn.Linear(2, 3), nn.Linear(2, 3, bias=False)
    third.weight = first.weight
    copied = copy.deepcopy(first)
    around = nn.Sequential(first, other)
    kept = {"_parameters": dict(first._parameters)}, list(around.parameters()), torch.optim.SGD(around.parameters())
    assert {id(found) for found in modules_with([first.weight])} == {id(first), id(third)}
    assert {id(found) for found in modules_with([first.bias, copied.weight])} == {id(first), id(copied)}
    assert modules_with([nn.Parameter(torch.ones(1))]) == []
    del kept


def test_other_threads_fill_tuples_meanwhile() -> None:
    errors: list[SystemError] = []
    has_ended = threading.Event()

    def fill() -> None:
        while not has_ended.is_set():
            try:
                tuple(number for number in range(50))
            except SystemError as error:
                errors.append(error)

    linear = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(linear.parameters())
    thread = threading.Thread(target=fill)
    thread.start()
    try:
        for _ in range(20):
            assert any(found is optimizer for found in live_instances(torch.optim.Optimizer))
            assert any(found is linear for found in modules_with([linear.weight]))
            time.sleep(0.002)  # the thread is in the middle of another
    finally:
        has_ended.set()
        thread.join()
    assert not errors


def test_modules_in_the_memory_of_a_tensor() -> None:
    first, other, flat = nn.Linear(2, 3), nn.Linear(2, 3), torch.zeros(9)
    first.weight.data, first.bias.data = flat[:6].view(3, 2), flat[6:]  # beside each other
    other.weight = nn.Parameter(first.weight.detach()[1:])
    other.register_buffer("kept", flat)
    traced = torch._to_functional_tensor(torch.ones(2))  # has no address, as what a compiler keeps
    with pytest.raises(RuntimeError):
        traced.untyped_storage().data_ptr()
    whole = nn.Linear(2, 3, device="meta")
    tied = nn.ParameterList([whole.weight, nn.Parameter(torch.zeros(3, 2, device="meta")), nn.Parameter(torch.ones(0))])

    def found(*tensors: torch.Tensor) -> set[tuple[int, str, int]]:
        every = [
            {(id(module), name, id(tensor)) for module, name, tensor in owners_of_memory(tensors, known)}
            for known in ((), (first,), (first, whole), (first, other, whole, tied))
        ]
        assert all(one == every[0] for one in every)
        return every[0]

    kept = (id(other), "kept")
    weight, bias = id(first.weight), id(first.bias)
    assert found(first.weight) == {(id(first), "weight", weight), (id(other), "weight", weight), (*kept, weight)}
    assert found(first.bias) == {(id(first), "bias", bias), (*kept, bias)}
    assert found(first.weight, first.bias) == found(first.weight) | found(first.bias)
    assert found(whole.weight) == {(id(whole), "weight", id(whole.weight)), (id(tied), "0", id(whole.weight))}
    assert found() == set()
