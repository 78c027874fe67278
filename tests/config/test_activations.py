"""The registry of activations: every entry's backward, its literals and its kernel function, and what is not known."""

import pytest
import torch

from tritonmoe.config.activations import (
    GATE_FUNCTIONS,
    MAX_NUMBERS,
    POINTWISE,
    ClampedSwiGLU,
    SoftcappedSwiGLU,
    find_activation,
    from_plain,
    is_fused,
    to_plain,
)
from tritonmoe.ops.kernels.activations import KERNEL_FUNCTIONS, activation_options

ACTIVATIONS = (*POINTWISE, ClampedSwiGLU(0.5, 1.702, 1.0), SoftcappedSwiGLU(0.7, 1.5))


def test_every_entry_is_tested_and_has_a_kernel_function() -> None:
    names = [find_activation(activation).name for activation in ACTIVATIONS]
    assert names == list(KERNEL_FUNCTIONS) == [*POINTWISE, *GATE_FUNCTIONS]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_gradients_are_those_of_autograd(activation) -> None:
    generator = torch.Generator().manual_seed(0)
    gate, up_half, da = torch.randn(3, 50, 8, generator=generator, dtype=torch.float64).unbind()
    gate.requires_grad_(), up_half.requires_grad_()
    found = find_activation(activation)
    a = found.gated(gate, up_half)
    expected = torch.autograd.grad(a, (gate, up_half), da)
    out = torch.full((2, 50, 8), torch.nan, dtype=torch.float64)
    with torch.no_grad():
        again = found.gated_backward(da.clone(), gate, up_half, *out)
    torch.testing.assert_close(again, a.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out, torch.stack(expected), rtol=1e-12, atol=1e-12)
    assert (out == 0).any() == (activation in ("relu", "relu2") or "Clamped" in str(activation)), "limits are reached"


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_literals_and_numbers_of_kernels(activation) -> None:
    assert is_fused(activation)
    assert from_plain(to_plain(activation)) == activation
    function, numbers = activation_options(activation)
    assert function is KERNEL_FUNCTIONS[find_activation(activation).name]
    assert len(numbers) == MAX_NUMBERS
    assert numbers[: len(find_activation(activation).numbers)] == find_activation(activation).numbers


def test_an_activation_reads_as_the_call_that_makes_it() -> None:
    assert str(ClampedSwiGLU(7.0, 1.702)) == "ClampedSwiGLU(7.0, alpha=1.702, up_offset=0.0)"
    assert str(ClampedSwiGLU(7, -1, -0.0)) == "ClampedSwiGLU(7.0, alpha=-1.0, up_offset=0.0)"


def test_an_unknown_name_is_told_the_known_ones() -> None:
    known = "silu, gelu, gelu_tanh, relu, relu2, a ClampedSwiGLU, a SoftcappedSwiGLU"
    with pytest.raises(ValueError, match=f"'mish' is not known: choose one of {known}, or pass a callable"):
        find_activation("mish")


@pytest.mark.parametrize("cap", [0, -1.0, float("nan"), float("inf"), True, None])
def test_caps_are_positive(cap) -> None:
    with pytest.raises(ValueError, match="SoftcappedSwiGLU up_softcap must be positive and finite"):
        SoftcappedSwiGLU(1.0, cap)
