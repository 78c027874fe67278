"""moe_mlp against a plain PyTorch loop over experts with autograd: outputs and every gradient."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_experts import (
    ACTIVATIONS,
    LAYOUTS,
    Case,
    check,
    differentiable,
    exact_and_plain,
    gradients,
    plain_moe,
    run_moe_mlp,
)
from tolerance import assert_close_to_exact
from torch import Tensor, nn

import tritonmoe as tm
from tritonmoe.config.activations import GateFunction
from tritonmoe.experts.forward_run import ForwardRun

BACKENDS = ("torch", "reference")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("layout", "activation"),
    [
        (layout, activation)
        for layout in LAYOUTS
        for activation in ACTIVATIONS
        if not (layout.startswith("ungated") and isinstance(ACTIVATIONS[activation], GateFunction))
    ],
)
def test_layouts_and_activations(layout: str, activation: str, backend: str) -> None:
    case = Case(activation=ACTIVATIONS[activation], **LAYOUTS[layout])
    check(case, case.inputs(), backend)


SHAPES = {
    "T1-K1-E1": Case(num_tokens=1, top_k=1, num_experts=1),
    "T1-D1-F1": Case(num_tokens=1, hidden=1, intermediate=1),
    "K5-E3": Case(top_k=5, num_experts=3),
    "K16-E60": Case(num_tokens=5, top_k=16, num_experts=60),
    "E61": Case(num_experts=61),
    "T127-D33-F17": Case(num_tokens=127, hidden=33, intermediate=17),
    "no-bias": Case(bias=False),
    "no-bias-ungated": Case(bias=False, gated=False),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape: str, backend: str) -> None:
    check(SHAPES[shape], SHAPES[shape].inputs(), backend)


ROUTINGS = {
    "one-hot-expert": lambda ids, num_experts: torch.full_like(ids, 2),
    "repeated-ids": lambda ids, num_experts: ids[:, :1].expand_as(ids).contiguous(),
    "last-expert-only": lambda ids, num_experts: torch.full_like(ids, num_experts - 1),
    "all-skipped": lambda ids, num_experts: torch.full_like(ids, -1),
    "all-too-large": lambda ids, num_experts: torch.full_like(ids, num_experts),
    "only-last-token": lambda ids, num_experts: torch.where(torch.arange(len(ids))[:, None] == len(ids) - 1, ids, -1),
    "far-out-of-range": lambda ids, num_experts: torch.where(ids == 1, 2**32 + 1, torch.where(ids == 0, -(2**40), ids)),
    "none-skipped": lambda ids, num_experts: ids.clamp(0, num_experts - 1),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_routings(routing: str, dtype: torch.dtype, backend: str) -> None:
    case = Case()
    inputs = case.inputs(dtype)
    inputs["topk_ids"] = ROUTINGS[routing](inputs["topk_ids"], case.num_experts)
    results = check(case, inputs, backend)
    if routing.startswith("all-"):
        assert all((value == 0).all() for value in results.values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_experts_get_zero_gradients(backend: str) -> None:
    case = Case(num_experts=9)
    inputs = case.inputs(torch.float32)
    inputs["topk_ids"] = torch.where(inputs["topk_ids"] % 2 == 0, inputs["topk_ids"], 4)
    results = check(case, inputs, backend)
    for name in ("gate_up_proj", "down_proj", "gate_up_bias", "down_bias"):
        assert (results[name][1::2] == 0).all(), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("top_k", [1, 2])
def test_no_tokens_stay_attached_to_the_graph(top_k: int, backend: str) -> None:
    case = Case(num_tokens=0, top_k=top_k)
    leaves = differentiable(case.inputs(torch.float32))
    out = run_moe_mlp(case, leaves, backend=backend)
    assert out.shape == (0, case.hidden)
    assert out.grad_fn is not None
    out.sum().backward()
    for name, leaf in leaves.items():
        if leaf.requires_grad:
            assert leaf.grad is not None, name
            assert (leaf.grad == 0).all(), name


@pytest.mark.sweep(2)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "relu2", "gpt_oss"])
@pytest.mark.parametrize("layout", ["concatenated", "interleaved", "transposed"])
def test_dtypes(layout: str, activation: str, dtype: torch.dtype, backend: str) -> None:
    case = Case(num_tokens=40, hidden=48, intermediate=40, activation=ACTIVATIONS[activation], **LAYOUTS[layout])
    check(case, case.inputs(dtype), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("weights_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_dtype_of_topk_weights(weights_dtype: torch.dtype, backend: str) -> None:
    case = Case(num_tokens=40)
    inputs = case.inputs(torch.bfloat16)
    inputs["topk_weights"] = inputs["topk_weights"].to(weights_dtype)
    results = check(case, inputs, backend)
    assert results["topk_weights"].dtype == weights_dtype


@pytest.mark.parametrize("backend", BACKENDS)
def test_int32_ids_are_int64_ids(backend: str) -> None:
    case = Case()
    inputs = case.inputs(torch.float32)
    wide = check(case, inputs, backend)
    narrow = check(case, {**inputs, "topk_ids": inputs["topk_ids"].int()}, backend)
    assert all(torch.equal(wide[name], narrow[name]) for name in wide)


class Gate(nn.Module):
    """A callable with parameters: silu(gate * scale) * (up + shift)."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, width, dtype=dtype))
        self.shift = nn.Parameter(torch.tensor(0.25, dtype=dtype))

    def forward(self, h: Tensor) -> Tensor:
        gate, up_half = h.chunk(2, dim=1)
        return F.silu(gate * self.scale) * (up_half + self.shift)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("save", ["hidden", "input"])
def test_callable_with_parameters(save: str, dtype: torch.dtype, backend: str) -> None:
    activation = Gate(6, dtype)
    case = Case(activation=activation)
    inputs = case.inputs(dtype)
    exact, plain = exact_and_plain(case, inputs, Gate(6, torch.float64))
    leaves = differentiable(inputs)
    out = run_moe_mlp(case, leaves, backend=backend, save=save)
    actual = gradients(out, leaves, tuple(activation.parameters()))
    for name, value in actual.items():
        assert_close_to_exact(name, value, plain[name], exact[name])


@pytest.mark.parametrize("backend", BACKENDS)
def test_parameters_of_a_callable_alone_get_gradients(backend: str) -> None:
    activation = Gate(6, torch.float64)
    case = Case(activation=activation)
    inputs = case.inputs()
    run_moe_mlp(case, inputs, backend=backend).backward(inputs["dout"])
    actual = [p.grad for p in activation.parameters()]
    expected = torch.autograd.grad(plain_moe(case, inputs), list(activation.parameters()), inputs["dout"])
    for mine, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


CALLABLES = {
    "gated": (lambda h: torch.tanh(h[:, : h.shape[1] // 2]) * h[:, h.shape[1] // 2 :], True),
    "ungated": (torch.sin, False),
    "non-contiguous-result": (lambda h: torch.sin(h.T.contiguous()).T, False),
    "view-of-its-input": (lambda h: h[:, ::2], True),
    "identity": (lambda h: h, False),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CALLABLES)
def test_callables(name: str, backend: str) -> None:
    activation, gated = CALLABLES[name]
    case = Case(activation=activation, gated=gated)
    check(case, case.inputs(), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_callable_equals_the_fused_activation(backend: str) -> None:
    """The callable sees h rounded to x.dtype, as the fused activation does, but computes in x.dtype."""
    case = Case()
    inputs = case.inputs()
    fused = check(case, inputs, backend)
    called = replace(case, activation=lambda h: F.silu(h.chunk(2, 1)[0]) * h.chunk(2, 1)[1])
    for name, value in check(called, inputs, backend).items():
        torch.testing.assert_close(value, fused[name], msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_strided_inputs(dtype: torch.dtype, backend: str) -> None:
    """x with strides, weights that are views, ids and weights cut out of wider tensors."""
    case = Case()
    inputs = case.inputs(dtype)
    exact, plain = exact_and_plain(case, inputs)
    leaves = differentiable(inputs)

    def strided(value: Tensor) -> Tensor:
        padded = torch.cat([value, value], dim=-1)
        return padded[..., : value.shape[-1]].mT.contiguous().mT if value.dim() > 1 else value

    views = {name: strided(leaf) for name, leaf in leaves.items()}
    assert not views["x"].is_contiguous()
    out = run_moe_mlp(case, views, backend=backend)
    for name, value in gradients(out, leaves).items():
        assert_close_to_exact(name, value, plain[name], exact[name])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ["silu", "callable"])
def test_expanded_gradient(activation: str, backend: str) -> None:
    """sum() hands backward a gradient of stride 0, and a transposed use one of other strides."""
    case = Case(activation=torch.sin if activation == "callable" else activation, gated=False)
    for loss in (torch.sum, lambda y: (y.T @ torch.arange(11.0, dtype=torch.float64)).sum()):
        leaves, plain_leaves = differentiable(case.inputs()), differentiable(case.inputs())
        loss(run_moe_mlp(case, leaves, backend=backend)).backward()
        loss(plain_moe(case, plain_leaves)).backward()
        for name, leaf in leaves.items():
            if leaf.requires_grad:
                torch.testing.assert_close(leaf.grad, plain_leaves[name].grad, msg=lambda m, name=name: f"{name}: {m}")


DIFFERENTIABLE = ("x", "topk_weights", "gate_up_proj", "down_proj", "gate_up_bias", "down_bias")
SOME_NEED_GRAD = {f"only-{name}": {name} for name in DIFFERENTIABLE} | {
    f"all-but-{name}": set(DIFFERENTIABLE) - {name} for name in DIFFERENTIABLE
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ["gelu", "callable"])
@pytest.mark.parametrize("needs", SOME_NEED_GRAD)
def test_some_inputs_frozen(needs: str, activation: str, backend: str) -> None:
    case = Case(activation=torch.sin if activation == "callable" else activation, gated=False)
    check(case, case.inputs(), backend, only=SOME_NEED_GRAD[needs])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_recomputed_hidden_gives_the_same_bits(dtype: torch.dtype, backend: str) -> None:
    case = Case(num_tokens=33)
    inputs = case.inputs(dtype)
    kept, recomputed = (check(case, inputs, backend, save=save) for save in ("hidden", "input"))
    assert all(torch.equal(kept[name], recomputed[name]) for name in kept)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ["silu", "callable"])
def test_second_derivative_raises(activation: str, backend: str) -> None:
    case = Case(activation=torch.sin if activation == "callable" else activation, gated=False)
    leaves = differentiable(case.inputs())
    (dx,) = torch.autograd.grad(
        run_moe_mlp(case, leaves, backend=backend), leaves["x"], leaves["dout"].requires_grad_(), create_graph=True
    )
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        dx.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("save", ["hidden", "input"])
@pytest.mark.parametrize("activation", ["silu", "callable"])
def test_backward_twice(activation: str, save: str, backend: str) -> None:
    case = Case(activation=torch.sin if activation == "callable" else activation, gated=False)
    leaves = differentiable(case.inputs(torch.float32))
    out = run_moe_mlp(case, leaves, backend=backend, save=save)
    first = gradients(out, leaves, retain_graph=True)
    second = gradients(out, leaves)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
@pytest.mark.parametrize("activation", ["silu", "callable"])
def test_inference_gives_the_bits_of_training(activation: str, mode, backend: str) -> None:
    case = Case(activation=torch.sin if activation == "callable" else activation, gated=False)
    leaves = differentiable(case.inputs(torch.float32))
    trained = run_moe_mlp(case, leaves, backend=backend)
    with mode():
        inferred = run_moe_mlp(case, leaves, backend=backend)
    assert torch.equal(trained, inferred)
    assert not inferred.requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ["silu", "callable"])
def test_inputs_are_never_modified(activation: str, dtype: torch.dtype, backend: str) -> None:
    case = Case(activation=torch.sin if activation == "callable" else activation, gated=False)
    leaves = differentiable(case.inputs(dtype))
    before = {name: (leaf.detach().clone(), leaf._version) for name, leaf in leaves.items()}
    gradients(run_moe_mlp(case, leaves, backend=backend), leaves)
    for name, leaf in leaves.items():
        value, version = before[name]
        assert torch.equal(leaf, value), name
        assert leaf._version == version, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_run_gives_the_same_bits(backend: str) -> None:
    case = Case(num_tokens=200, hidden=24, intermediate=20)
    runs = []
    for _ in range(3):
        leaves = differentiable(case.inputs(torch.float32))
        runs.append(gradients(run_moe_mlp(case, leaves, backend=backend), leaves))
    assert all(torch.equal(run[name], runs[0][name]) for run in runs[1:] for name in run)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ["silu", "callable"])
def test_results_are_the_callers_own(activation: str, backend: str) -> None:
    """Later calls, also nested ones, write to none of the results of an earlier call, nor to what it saved."""
    case = Case(activation=torch.sin if activation == "callable" else activation, gated=False)
    leaves = differentiable(case.inputs(torch.float32))
    out = run_moe_mlp(case, leaves, backend=backend)
    first = gradients(out, leaves, retain_graph=True)
    copies = {name: value.clone() for name, value in first.items()}
    for seed in (1, 2):
        others = differentiable(case.inputs(torch.float32, seed))
        gradients(run_moe_mlp(case, others, backend=backend), others)
    assert all(torch.equal(first[name], copies[name]) for name in first)
    again = gradients(out, leaves)
    assert all(torch.equal(again[name], copies[name]) for name in again)


@pytest.mark.parametrize("backend", BACKENDS)
def test_experts_inside_an_activation(backend: str) -> None:
    """The callable of one layer is itself a layer."""
    inner = Case(num_experts=3, top_k=2, hidden=6, intermediate=4, gated=False, bias=False)
    given_inputs = inner.inputs()

    def activation(run, h: Tensor) -> Tensor:
        count = torch.arange(h.shape[0])
        ids, weights = torch.stack([count % 3, count % 2], 1), torch.full((h.shape[0], 2), 0.5, dtype=h.dtype)
        return run(inner, {**given_inputs, "x": h, "topk_ids": ids, "topk_weights": weights})

    case = Case(activation=lambda h: activation(lambda *a: run_moe_mlp(*a, backend=backend), h), gated=False)
    plain = replace(case, activation=lambda h: activation(plain_moe, h))
    leaves, plain_leaves = differentiable(case.inputs()), differentiable(case.inputs())
    # The inner ids go by storage order: the plain loop must call it once, on all pairs, so one expert is enough.
    for some in (leaves, plain_leaves):
        some["topk_ids"] = torch.full_like(some["topk_ids"][:, :1], 1)
        some["topk_weights"] = some["topk_weights"][:, :1].detach().requires_grad_()
    expected = gradients(plain_moe(replace(plain, num_experts=2), plain_leaves), plain_leaves)
    for name, value in gradients(run_moe_mlp(case, leaves, backend=backend), leaves).items():
        torch.testing.assert_close(value, expected[name], msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_skipped_pair_may_have_any_weight(dtype: torch.dtype, backend: str) -> None:
    case = Case()
    inputs = case.inputs(dtype)
    is_skipped = (inputs["topk_ids"] < 0) | (inputs["topk_ids"] >= case.num_experts)
    assert is_skipped.any()
    expected = check(case, inputs, backend)
    for weight in (math.nan, math.inf):
        spoiled = differentiable({**inputs, "topk_weights": inputs["topk_weights"].masked_fill(is_skipped, weight)})
        actual = gradients(run_moe_mlp(case, spoiled, backend=backend), spoiled)
        assert all(torch.equal(actual[name], expected[name]) for name in actual)


@pytest.mark.sweep(1)
@pytest.mark.parametrize("backend", [*BACKENDS, "triton"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_stays_nan(activation: str, backend: str) -> None:
    """No bound of an activation makes a number of it."""
    case = Case(activation=ACTIVATIONS[activation], bias=False)
    inputs = case.inputs(torch.float32)
    inputs["topk_ids"] = inputs["topk_ids"].clamp(0, case.num_experts - 1)
    for parts in (slice(None, case.intermediate), slice(case.intermediate, None)):
        weight = inputs["gate_up_proj"].clone()
        weight[:, parts] = math.nan
        assert run_moe_mlp(case, {**inputs, "gate_up_proj": weight}, backend=backend).isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_is_never_read_before_it_is_written(backend: str, nan_filled_memory: None) -> None:
    case = Case(num_experts=8)
    for dtype in (torch.float32, torch.bfloat16):
        check(case, case.inputs(dtype), backend)
        check(replace(case, activation=torch.sin, gated=False), replace(case, gated=False).inputs(dtype), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend: str) -> None:
    """Finite differences know nothing of our formulas."""
    case = Case(num_tokens=3, top_k=2, num_experts=3, hidden=2, intermediate=2)
    leaves = differentiable(case.inputs())
    names = [name for name, leaf in leaves.items() if leaf.requires_grad]

    def run(*values: Tensor) -> Tensor:
        return run_moe_mlp(case, {**leaves, **dict(zip(names, values, strict=True))}, backend=backend)

    assert torch.autograd.gradcheck(run, [leaves[name] for name in names])


def test_example_of_the_docstring() -> None:
    out = tm.moe_mlp(
        torch.ones(1, 1),
        torch.tensor([[0, 1]]),
        torch.tensor([[10.0, 100.0]]),
        torch.ones(2, 1, 1),
        torch.tensor([[[2.0]], [[3.0]]]),
        gated=False,
        activation="relu",
    )
    assert out.tolist() == [[320.0]]


@settings(max_examples=40, deadline=None)
@given(
    num_tokens=st.integers(0, 9),
    top_k=st.integers(1, 5),
    num_experts=st.integers(1, 9),
    hidden=st.integers(1, 9),
    intermediate=st.integers(1, 5),
    activation=st.sampled_from(list(ACTIVATIONS)),
    layout=st.sampled_from([name for name in LAYOUTS if not name.startswith("ungated")]),
    bias=st.booleans(),
    seed=st.integers(0, 999),
)
def test_any_shape(num_tokens, top_k, num_experts, hidden, intermediate, activation, layout, bias, seed) -> None:
    case = Case(
        num_tokens, top_k, num_experts, hidden, intermediate, ACTIVATIONS[activation], bias=bias, **LAYOUTS[layout]
    )
    check(case, case.inputs(seed=seed), "torch")


def test_inference_keeps_no_hidden_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that need gradients don't make no_grad allocate h: only `up` into scratch memory."""
    kept: list[bool] = []
    forward = ForwardRun.forward

    def recorded(run: ForwardRun, chunk: int, out: torch.Tensor | None = None) -> torch.Tensor:
        result = forward(run, chunk, out)
        kept.append(run.h is not None)
        return result

    monkeypatch.setattr(ForwardRun, "forward", recorded)
    weights = [torch.randn(3, 8, 6).requires_grad_(), torch.randn(3, 6, 4).requires_grad_()]
    x, ids, topk_weights = torch.randn(5, 6), torch.zeros(5, 2, dtype=torch.int64), torch.rand(5, 2)
    with torch.no_grad():
        tm.moe_mlp(x, ids, topk_weights, *weights)
    tm.moe_mlp(x, ids, topk_weights, *weights)
    assert kept == [False, True]
