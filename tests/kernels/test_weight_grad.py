"""The weight gradients of every backend: accumulation, hot experts, bits."""

from types import ModuleType

import pytest
import torch
from backward_cases import DEVICE, LAYOUTS, Operands, garbage_memory, random_ids
from tolerance import assert_close_to_exact

from tritonmoe.backends import reference
from tritonmoe.backends import torch as torch_backend
from tritonmoe.backends import triton as triton_backend

BACKENDS = pytest.mark.parametrize(
    "backend", [reference, torch_backend, triton_backend], ids=["reference", "torch", "triton"]
)


@BACKENDS
@pytest.mark.parametrize("into", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["concatenated", "transposed", "ungated"])
def test_gradients_are_added_in_place(layout: str, dtype: torch.dtype, into: torch.dtype, backend: ModuleType) -> None:
    """Twice, as two micro-batches would, and rounded once: from bf16 rows into fp32 no bf16 sum is in between."""
    operands = Operands(random_ids(30, 2, 4), 5, LAYOUTS[layout], dtype)  # expert 4 is empty
    grouping = operands.group()
    exact = operands.double().weight_grad(reference, grouping)
    start = [torch.randn_like(exact.gate_up_proj).to(into), torch.randn_like(exact.down_proj).to(into)]
    sums = [value.clone() for value in start]
    for _ in range(2):
        with garbage_memory():
            grads = operands.weight_grad(backend, grouping, accumulate_gate_up=sums[0], accumulate_down=sums[1])
        assert grads.gate_up_proj is None
        assert grads.down_proj is None
        assert grads.gate_up_bias is not None
        assert grads.down_bias is not None
    # What plain PyTorch gives for fp32 products added to a gradient of this dtype.
    plain = operands.weight_grad(reference, grouping)
    if dtype != torch.float32:
        with pytest.MonkeyPatch.context() as patch:
            for name in ("x", "dh", "dout", "scaled_a"):
                patch.setattr(operands, name, getattr(operands, name).float())
            plain = operands.weight_grad(reference, grouping)
    for name, actual, begin in zip(("gate_up_proj", "down_proj"), sums, start, strict=True):
        expected = begin.clone()
        for _ in range(2):
            expected += getattr(plain, name)
        assert_close_to_exact(name, actual, expected, begin.double() + 2 * getattr(exact, name))
        assert torch.equal(actual[4], begin[4])


@BACKENDS
def test_gradients_are_added_into_views(backend: ModuleType) -> None:
    """A main_grad is a piece of a larger buffer, and may have any strides."""
    operands = Operands(random_ids(9, 2, 3), 3, LAYOUTS["concatenated"])
    grouping = operands.group()
    expected = operands.weight_grad(backend, grouping)
    buffer = torch.zeros(7 + 3 * 24 * 20 + 5, device=DEVICE)
    gate_up, down = buffer[7:-5].view(3, 24, 20), torch.zeros(3, 12, 40, device=DEVICE)[:, :, ::2].mT
    operands.weight_grad(backend, grouping, accumulate_gate_up=gate_up, accumulate_down=down)
    torch.testing.assert_close(gate_up, expected.gate_up_proj)
    torch.testing.assert_close(down, expected.down_proj)
    assert not buffer[:7].any()
    assert not buffer[-5:].any()


@BACKENDS
def test_only_one_of_the_gradients_is_added(backend: ModuleType) -> None:
    operands = Operands(random_ids(9, 2, 3), 3, LAYOUTS["concatenated"])
    grouping = operands.group()
    expected = operands.weight_grad(backend, grouping)
    down = torch.ones_like(expected.down_proj)
    grads = operands.weight_grad(backend, grouping, accumulate_down=down)
    assert grads.down_proj is None
    assert torch.equal(grads.gate_up_proj, expected.gate_up_proj)
    torch.testing.assert_close(down, 1 + expected.down_proj)
