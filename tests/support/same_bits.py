"""What tests mean by the same results: tensors that are equal to the bit."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Tensors = Tensor | Sequence[Tensor] | Mapping[str, Tensor]


def bits_of(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format).view(-1, 1).view(torch.uint8)


def assert_same_bits(actual: Tensors, expected: Tensors, where: object = "") -> None:
    """Compare dtypes, shapes, devices and every bit, a NaN's and the sign of a zero included."""
    if isinstance(expected, Tensor):
        actual, expected = {"": actual}, {"": expected}
    elif not isinstance(expected, Mapping):
        actual, expected = dict(enumerate(actual)), dict(enumerate(expected))
    assert actual.keys() == expected.keys(), (where, actual.keys() ^ expected.keys())
    for name, value in actual.items():
        wanted = expected[name]
        properties, wanted_properties = ((t.dtype, t.shape, t.device) for t in (value, wanted))
        assert properties == wanted_properties, (where, name)
        assert torch.equal(bits_of(value), bits_of(wanted)), (where, name, value, wanted)
