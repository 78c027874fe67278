"""Low-rank adapters in moe_mlp against a plain PyTorch loop: outputs, and the gradients of everything."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_experts import (
    ACTIVATIONS,
    LAYOUTS,
    SCALES,
    Case,
    adapters_in,
    check,
    differentiable,
    exact_and_plain,
    gradients,
    run_moe_mlp,
)
from tolerance import assert_close_to_exact
from torch import Tensor

import tritonmoe as tm

BACKENDS = ("torch", "reference")
FROZEN = {"x", "topk_weights", "gate_up_a", "gate_up_b", "down_a", "down_b"}
"""What gets a gradient where the experts themselves are frozen."""


@pytest.mark.sweep(2)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ["silu", "gpt_oss", "relu2"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, activation: str, dtype: torch.dtype, backend: str) -> None:
    if layout.startswith("ungated") and activation == "gpt_oss":
        activation = "gelu"
    case = Case(activation=ACTIVATIONS[activation], up_rank=3, down_rank=5, **LAYOUTS[layout])
    check(case, case.inputs(dtype), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("save", ["hidden", "input"])
@pytest.mark.parametrize("ranks", [(4, 0), (0, 4), (1, 2)], ids=str)
def test_frozen_experts(ranks: tuple[int, int], save: str, backend: str) -> None:
    case = Case(up_rank=ranks[0], down_rank=ranks[1])
    inputs = case.inputs(torch.float32)
    check(case, inputs, backend, only=FROZEN & inputs.keys(), save=save)


@pytest.mark.parametrize("only", ["gate_up_a", "down_b", "x", "gate_up_b down_proj"])
def test_some_gradients_alone(only: str) -> None:
    case = Case(up_rank=2, down_rank=3)
    check(case, case.inputs(), "torch", only=set(only.split()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_tokens", [0, 1, 40, 300, 1200])
def test_blocks_of_every_kind(num_tokens: int, dtype: torch.dtype) -> None:
    """Padded products, one product per expert, rows rounded up, several blocks."""
    case = Case(num_tokens=num_tokens, num_experts=6, hidden=24, intermediate=20, up_rank=3, down_rank=8)
    check(case, case.inputs(dtype), "torch")


@settings(max_examples=25, deadline=None)
@given(
    num_tokens=st.integers(0, 40),
    num_experts=st.integers(1, 7),
    top_k=st.integers(1, 4),
    ranks=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    layout=st.sampled_from(sorted(LAYOUTS)),
    seed=st.integers(0, 99),
)
def test_any_shape(
    num_tokens: int, num_experts: int, top_k: int, ranks: tuple[int, int], layout: str, seed: int
) -> None:
    sizes = {"num_tokens": num_tokens, "num_experts": num_experts, "top_k": top_k}
    case = Case(**sizes, up_rank=ranks[0], down_rank=ranks[1], **LAYOUTS[layout])
    check(case, case.inputs(seed=seed), "torch")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_callable_activation(backend: str) -> None:
    def gate(h: Tensor) -> Tensor:
        first, second = h.chunk(2, dim=1)
        return torch.sigmoid(first) * second

    case = Case(activation=gate, up_rank=3, down_rank=2)
    check(case, case.inputs(), backend)


def test_factors_in_the_order_of_peft() -> None:
    """Strided factors, as views of PEFT's: of A the expert is slowest, of B it is fastest."""
    case = Case(up_rank=3, down_rank=2)
    inputs = case.inputs()
    for name in ("gate_up_b", "down_b"):
        inputs[name] = inputs[name].permute(1, 2, 0).contiguous().permute(2, 0, 1)
        assert not inputs[name].is_contiguous()
    check(case, inputs, "torch")


def test_a_compiled_graph_gives_the_same_bits() -> None:
    case = Case(up_rank=3, down_rank=2, bias=False)
    inputs = case.inputs(torch.float32)
    results = []
    for function in (run_moe_mlp, torch.compile(run_moe_mlp, backend="aot_eager", fullgraph=True)):
        leaves = differentiable(inputs, FROZEN)
        results.append(gradients(function(case, leaves), leaves))
    eager, compiled = results
    for name, value in eager.items():
        assert torch.equal(value, compiled[name]), name


def test_main_grads_of_factors() -> None:
    case = Case(up_rank=3)
    inputs = case.inputs(torch.float32)
    exact, plain = exact_and_plain(case, inputs)
    leaves = differentiable(inputs)
    leaves["gate_up_a"].main_grad = torch.ones_like(leaves["gate_up_a"])
    run_moe_mlp(case, leaves).backward(inputs["dout"])
    assert leaves["gate_up_a"].grad is None
    assert_close_to_exact("main_grad", leaves["gate_up_a"].main_grad - 1, plain["gate_up_a"], exact["gate_up_a"])
    assert leaves["gate_up_b"].grad is not None


def test_main_grad_of_a_scaled_factor_is_refused() -> None:
    leaves = differentiable(Case(up_rank=3).inputs(torch.float32))
    leaves["gate_up_b"].main_grad = torch.zeros_like(leaves["gate_up_b"])
    with pytest.raises(ValueError, match=r"gate_up_b has a main_grad, which .* fold the scale 0.75 into gate_up_b"):
        run_moe_mlp(Case(up_rank=3), leaves)


def test_autocast_narrows_the_factors_too() -> None:
    case = Case(up_rank=3, down_rank=2)
    inputs = case.inputs(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = run_moe_mlp(case, inputs)
    assert out.dtype == torch.bfloat16


BAD = {
    "one factor": ({"gate_up_b": None}, ValueError, "got gate_up_a without gate_up_b"),
    "rank 0": ({"down_a": torch.ones(5, 0, 6), "down_b": torch.ones(5, 7, 0)}, ValueError, "R of at least 1"),
    "two ranks": ({"down_a": torch.ones(5, 3, 6)}, ValueError, r"got \(5, 3, 6\) and \(5, 7, 2\)"),
    "transposed": ({"down_a": torch.ones(5, 6, 2)}, ValueError, r"\(5, R, 6\) and \(5, 7, R\)"),
    "another dtype": ({"down_a": torch.ones(5, 2, 6).double()}, TypeError, "down_a is torch.float64"),
    "a scale": ({"down_scale": float("nan")}, ValueError, "down_scale must be a finite number"),
    "a scale beyond floats": ({"down_scale": 10**400}, ValueError, "down_scale must be a finite number"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_adapters(bad: str) -> None:
    case = Case(up_rank=3, down_rank=2)
    inputs = case.inputs(torch.float32)
    changes, error, message = BAD[bad]
    factors = {name: inputs.pop(name) for name in ("gate_up_a", "gate_up_b", "down_a", "down_b")}
    with pytest.raises(error, match=message):
        run_moe_mlp(case, inputs, adapters=tm.ExpertAdapters(**{**factors, **SCALES, **changes}))


def test_what_is_no_adapters() -> None:
    case = Case()
    with pytest.raises(TypeError, match="adapters must be ExpertAdapters or None, got dict"):
        tm.moe_mlp(**{k: v for k, v in case.inputs().items() if k != "dout"}, adapters={})
    assert adapters_in(case.inputs()) is None
