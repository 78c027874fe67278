"""Recycled memory: whose it is, when it comes back, how much of it is kept."""

import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tritonmoe.runtime import cpu_memory
from tritonmoe.runtime.cpu_memory import SMALLEST_RECYCLED_BYTES, recycled

LIKE = torch.empty(0)
MEGABYTE = SMALLEST_RECYCLED_BYTES // LIKE.itemsize
"""Elements."""


@pytest.fixture(autouse=True)
def nothing_recycled() -> Iterator[None]:
    recycled.clear()
    yield
    recycled.clear()


def empty(megabytes: float) -> Tensor:
    return cpu_memory.empty(int(megabytes * MEGABYTE), like=LIKE)


def unused_megabytes() -> list[float]:
    recycled.take(0)  # which takes in what came back
    return [block.nbytes / SMALLEST_RECYCLED_BYTES for block in recycled.unused]


def test_memory_comes_back_with_its_last_tensor() -> None:
    whole = empty(2)
    address, view = whole.data_ptr(), whole[-10:].view(2, 5)
    view.fill_(1.0)
    del whole
    other = empty(2).fill_(2.0)
    assert other.data_ptr() != address
    assert view.eq(1.0).all()
    del view
    assert empty(2).data_ptr() == address


def test_shapes_dtypes_and_devices() -> None:
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        tensor = cpu_memory.empty(2, 3, 2**18, like=torch.empty(0, dtype=dtype))
        assert (tensor.shape, tensor.dtype, tensor.is_contiguous()) == ((2, 3, 2**18), dtype, True)
        tensor.fill_(1.0)
        assert not tensor.requires_grad
    assert cpu_memory.empty(0, 3, like=LIKE).shape == (0, 3)
    assert cpu_memory.empty(2**30, 2**30, like=torch.empty(0, device="meta")).is_meta


def test_a_gradient_comes_back_when_it_is_set_to_none() -> None:
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx, dout: Tensor) -> Tensor:
            return torch.mul(dout, 2, out=cpu_memory.empty(*dout.shape, like=dout))

    parameter = torch.nn.Parameter(torch.ones(2 * MEGABYTE))
    addresses = set()
    for _ in range(3):
        Double.apply(parameter).sum().backward()
        assert parameter.grad is not None
        assert parameter.grad.eq(2.0).all()
        addresses.add(parameter.grad.data_ptr())
        torch.optim.SGD([parameter], lr=0.0).zero_grad(set_to_none=True)
    assert len(addresses) == 1


def test_no_more_is_kept_than_was_in_use_at_once() -> None:
    for megabytes in (2, 3, 4, 6):
        empty(megabytes)
        assert unused_megabytes() == [megabytes]  # what it outgrew is gone
    assert empty(5).untyped_storage().nbytes() == 5 * SMALLEST_RECYCLED_BYTES  # of 6
    assert unused_megabytes() == [6]
    empty(2)  # 6 would be too much of a waste
    assert unused_megabytes() == [2, 6]
    both = empty(2), empty(6)
    assert unused_megabytes() == []
    del both
    assert unused_megabytes() == [2, 6]


def test_threads_never_share_memory() -> None:
    wrong: list[int] = []

    def take(number: int) -> None:
        for _ in range(50):
            tensor = empty(1).fill_(number)
            if not tensor.eq(number).all():
                wrong.append(number)

    threads = [threading.Thread(target=take, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(unused_megabytes()) <= 2 * 4  # a thread has its last one while it takes the next
