"""Callable activations between the two products: padding, callables that work in place, parameters over chunks."""

import pytest
import torch
from torch import Tensor, nn

from tritonmoe.config.layer import ExpertLayout, KernelOptions
from tritonmoe.experts.callable_activation import run_activation, with_activation_parameters
from tritonmoe.experts.spec import ExpertSettings, ExpertSpec
from tritonmoe.experts.tensors import NO_TENSORS
from tritonmoe.ops.backends import reference
from tritonmoe.ops.backends.ops import CalledLayer

LAYOUT = ExpertLayout(gated=False)
GROUPING = reference.group(torch.tensor([[0, 1], [1, -1]]), 2)
NUM_PAIRS = 3
"""Of the four positions."""


def settings(activation) -> ExpertSettings:
    layer = CalledLayer(LAYOUT, None, hidden_size=1, intermediate_size=5, has_bias=False)
    return ExpertSettings(reference, ExpertSpec(LAYOUT, activation), KernelOptions(), layer)


def test_a_callable_never_sees_what_no_pair_wrote() -> None:
    h = torch.full((4, 5), float("nan"))
    h[:NUM_PAIRS] = 2.0
    a, _ = run_activation(settings(lambda rows: rows - 2.0), h, GROUPING, keep_graph=False)
    assert a.tolist() == [[0.0] * 5] * NUM_PAIRS + [[-2.0] * 5]


@pytest.mark.parametrize("is_in_place", [False, True])
def test_graph(is_in_place: bool) -> None:
    """By hand, twice, since a layer's backward may run twice; h stays what the operations gave."""
    activation = Tensor.square_ if is_in_place else Tensor.square
    h = torch.arange(20.0).view(4, 5)
    h[NUM_PAIRS:] = 0
    expected = 2 * h
    a, graph = run_activation(settings(activation), h, GROUPING, keep_graph=True)
    assert not a.requires_grad
    assert torch.equal(a, h.square())
    for _ in range(2):
        assert torch.equal(graph.backward(torch.ones_like(a), [], []), expected)


def test_gradients_of_parameters_add_up_over_chunks() -> None:
    scale, frozen = nn.Parameter(torch.tensor(3.0)), nn.Parameter(torch.tensor(5.0), requires_grad=False)
    unused = nn.Parameter(torch.tensor(7.0))
    h = torch.ones(4, 5)

    def activation(rows: Tensor) -> Tensor:
        return rows * scale + frozen

    tensors = with_activation_parameters(NO_TENSORS._replace(x=torch.zeros(2, 6)), settings(activation))
    assert tensors.activation_parameters == [scale]
    grads: list[Tensor | None] = [None, None, None]
    for _ in range(2):
        a, graph = run_activation(settings(activation), h, GROUPING, keep_graph=True)
        assert graph.backward(torch.ones_like(a), [unused, frozen, scale], grads).eq(3.0).all()
    assert grads[:2] == [None, None]
    assert grads[2].item() == 2 * 5 * NUM_PAIRS


def test_a_callable_that_ignores_its_rows() -> None:
    constant = torch.ones(4, 5, requires_grad=True)
    a, graph = run_activation(settings(lambda rows: constant * 2), torch.ones(4, 5), GROUPING, keep_graph=True)
    assert torch.equal(graph.backward(torch.ones_like(a), [], []), torch.zeros(4, 5))
