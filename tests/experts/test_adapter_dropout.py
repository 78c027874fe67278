"""Dropout on what adapters multiply: what is dropped, and outputs and gradients against a plain loop with that mask."""

from dataclasses import replace

import pytest
import torch
from plain_experts import (
    ACTIVATIONS,
    LAYOUTS,
    Case,
    adapters_in,
    check,
    differentiable,
    gradients,
    kept_columns,
    run_moe_mlp,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tritonmoe as tm

CASE = Case(up_rank=3, down_rank=2, dropout=0.25)
FROZEN = {"x", "topk_weights", "gate_up_a", "gate_up_b", "down_a", "down_b"}


@pytest.mark.parametrize("p", [0.1, 0.5, 0.93])
def test_the_share_of_what_is_dropped(p: float) -> None:
    """By token, by column, and of every pair its own."""
    case = Case(hidden=300, intermediate=200, top_k=3, dropout=p)
    seeds = torch.randint(-(2**31), 2**31, (500,), dtype=torch.int32, generator=torch.Generator().manual_seed(1))
    of_rows, of_pairs = kept_columns(case, seeds)
    for kept in (of_rows, *of_pairs.unbind(1)):
        deviation = (p * (1 - p)) ** 0.5
        assert abs(kept.double().mean() - (1 - p)) < 5 * deviation / kept.numel() ** 0.5
        for dim in (0, 1):  # 500 means of 200 or more, none of which is far from 1 - p
            assert (kept.double().mean(dim) - (1 - p)).abs().max() < 5 * deviation / kept.shape[dim] ** 0.5
    masks = [of_rows[:, :200], *of_pairs.unbind(1)]
    masks += [masks[0].roll(1, 0), masks[0].roll(1, 1)]
    for i, one in enumerate(masks):
        for other in masks[:i]:
            same = (one == other).double().mean()
            assert abs(same - (p**2 + (1 - p) ** 2)) < 5 / one.numel() ** 0.5 * (p * (1 - p)) ** 0.5 * 2


def test_the_expected_output_is_that_without_dropout() -> None:
    case = Case(num_tokens=1, top_k=1, num_experts=1, hidden=8, intermediate=8, gated=False, activation="relu")
    inputs = replace(case, up_rank=2, down_rank=2, bias=False).inputs()
    inputs["down_proj"].abs_(), inputs["gate_up_a"].abs_(), inputs["gate_up_b"].abs_(), inputs["gate_up_proj"].abs_()
    num_tokens = 4000
    inputs |= {"x": inputs["x"].abs().expand(num_tokens, -1), "topk_ids": torch.zeros(num_tokens, 1, dtype=torch.int64)}
    inputs["topk_weights"] = torch.ones(num_tokens, 1, dtype=torch.float64)
    without, dropped = (run_moe_mlp(replace(case, dropout=p), inputs) for p in (0.0, 0.3))
    error = dropped.std(0) / num_tokens**0.5
    assert (error > 0).all()
    assert ((dropped.mean(0) - without[0]).abs() < 5 * error).all()


@pytest.mark.sweep(2)
@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("save", ["hidden", "input"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, save: str, dtype: torch.dtype, backend: str) -> None:
    case = replace(CASE, activation=ACTIVATIONS["relu2" if "ungated" in layout else "silu"], **LAYOUTS[layout])
    check(case, case.inputs(dtype), backend, save=save)


@pytest.mark.parametrize("ranks", [(4, 0), (0, 4), (1, 2)], ids=str)
def test_frozen_experts(ranks: tuple[int, int]) -> None:
    case = replace(CASE, up_rank=ranks[0], down_rank=ranks[1])
    inputs = case.inputs(torch.float32)
    check(case, inputs, "torch", only=FROZEN & inputs.keys())


@pytest.mark.parametrize("num_tokens", [0, 1, 40, 1200])
def test_blocks_of_every_kind(num_tokens: int) -> None:
    case = replace(CASE, num_tokens=num_tokens, num_experts=6, hidden=24, intermediate=20)
    check(case, case.inputs(torch.float32), "torch")


@pytest.mark.parametrize("ranks", [(4, 0), (0, 4), (1, 2)], ids=str)
def test_a_callable_activation(ranks: tuple[int, int]) -> None:
    def gate(h: Tensor) -> Tensor:
        first, second = h.chunk(2, dim=1)
        return torch.sigmoid(first) * second

    case = replace(CASE, activation=gate, up_rank=ranks[0], down_rank=ranks[1])
    check(case, case.inputs(), "torch")


def test_without_gradients_it_drops_too() -> None:
    inputs = CASE.inputs()
    with torch.no_grad():
        dropped = run_moe_mlp(CASE, inputs)
    assert torch.equal(dropped, run_moe_mlp(CASE, differentiable(inputs)))
    assert not torch.equal(dropped, run_moe_mlp(replace(CASE, dropout=0.0), inputs))


def test_no_dropout_changes_no_bit_and_draws_nothing() -> None:
    inputs = CASE.inputs(torch.float32)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    explicit = run_moe_mlp(replace(CASE, dropout=0.0), inputs, adapters=adapters_in(inputs, 0.0))
    assert torch.equal(torch.get_rng_state(), before)
    default = run_moe_mlp(replace(CASE, dropout=0.0), inputs)
    assert torch.equal(explicit, default)


@pytest.mark.parametrize("p", [-0.1, 1.0, 1.5, float("nan"), True, "0.1", None], ids=repr)
def test_what_is_no_dropout(p: object) -> None:
    with pytest.raises(ValueError, match="dropout must be a number of at least 0 and less than 1, got"):
        tm.ExpertAdapters(dropout=p)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("save", ["hidden", "input"])
def test_checkpointing_recomputes_with_the_same_mask(save: str, use_reentrant: bool) -> None:
    inputs, results = CASE.inputs(), []
    for checkpointed in (False, True):
        leaves = differentiable(inputs)
        differ = [leaf for leaf in leaves.values() if leaf.requires_grad]

        def call(*_: Tensor, leaves: dict = leaves) -> Tensor:  # with the generator as it is, forward and recompute
            arguments = {k: v for k, v in leaves.items() if k != "dout" and k[-2:] not in ("_a", "_b")}
            return tm.moe_mlp(**arguments, adapters=adapters_in(leaves, 0.4), save=save)

        torch.manual_seed(3)
        out = checkpoint(call, *differ, use_reentrant=use_reentrant) if checkpointed else call()
        torch.manual_seed(4)  # a backward that drew from the generator itself would not see the forward's
        out.backward(inputs["dout"])
        results.append([out.detach(), *(leaf.grad for leaf in differ)])
    for plain, recomputed in zip(*results, strict=True):
        assert torch.equal(plain, recomputed)


@pytest.mark.thorough
def test_a_compiled_graph_gives_the_same_bits() -> None:
    case = replace(CASE, bias=False)
    inputs = case.inputs(torch.float32)

    def call(leaves: dict[str, Tensor]) -> Tensor:
        arguments = {k: v for k, v in leaves.items() if k != "dout" and k[-2:] not in ("_a", "_b")}
        return tm.moe_mlp(**arguments, adapters=adapters_in(leaves, 0.4))

    results = []
    for function in (call, torch.compile(call, backend="aot_eager", fullgraph=True)):
        leaves = differentiable(inputs, FROZEN)
        torch.manual_seed(3)
        results.append(gradients(function(leaves), leaves))
    eager, compiled = results
    for name, value in eager.items():
        assert torch.equal(value, compiled[name]), name


def test_a_transform_of_torch_func() -> None:
    inputs = CASE.inputs()
    leaves = differentiable(inputs)
    expected = gradients(run_moe_mlp(CASE, leaves), leaves)["gate_up_a"]

    def loss(factor: Tensor) -> Tensor:
        return (run_moe_mlp(CASE, {**inputs, "gate_up_a": factor}) * inputs["dout"]).sum()

    torch.testing.assert_close(torch.func.grad(loss)(inputs["gate_up_a"]), expected)


def test_main_grad_of_a_factor_is_refused() -> None:
    leaves = differentiable(CASE.inputs(torch.float32))
    leaves["down_b"].main_grad = torch.zeros_like(leaves["down_b"])
    with pytest.raises(ValueError, match=r"down_b has a main_grad, and .* give dropout=0 instead of 0.25"):
        run_moe_mlp(CASE, leaves)
    leaves = differentiable(CASE.inputs(torch.float32))
    leaves["gate_up_a"].main_grad = torch.zeros_like(leaves["gate_up_a"])
    expected = differentiable(CASE.inputs(torch.float32))
    run_moe_mlp(CASE, leaves).backward(leaves["dout"])
    run_moe_mlp(CASE, expected).backward(leaves["dout"])
    torch.testing.assert_close(leaves["gate_up_a"].main_grad, expected["gate_up_a"].grad)


CONFIG = tm.MoEConfig(hidden_size=7, intermediate_size=6, num_experts=5, top_k=2)


def test_modules_drop_in_training_mode_alone() -> None:
    torch.manual_seed(0)
    layer, x = tm.MoELayer(CONFIG, dtype=torch.float64), torch.randn(9, 7, dtype=torch.float64)
    adapters = adapters_in(Case(up_rank=3, down_rank=2, top_k=2).inputs(), 0.4)
    expected = layer(x, adapters=replace(adapters, dropout=0.0))
    layer.eval()
    assert torch.equal(layer(x, adapters=adapters), expected)
    layer.train()
    torch.manual_seed(5)
    dropped = layer(x, adapters=adapters)
    assert not torch.allclose(dropped, expected)
    torch.manual_seed(5)
    routing, experts = layer.last_routing, layer.experts
    weights = experts.gate_up_proj, experts.down_proj
    assert torch.equal(tm.moe_mlp(x, routing.topk_ids, routing.topk_weights, *weights, adapters=adapters), dropped)


def test_a_layer_trains_the_adapters_that_it_is_given() -> None:
    torch.manual_seed(0)
    layer, x = tm.MoELayer(CONFIG, dtype=torch.float64).requires_grad_(False), torch.randn(9, 7, dtype=torch.float64)
    factors = {name: nn.Parameter(v) for name, v in Case(down_rank=2).inputs().items() if name.startswith("down_")}
    del factors["down_proj"], factors["down_bias"]
    layer(x, adapters=tm.ExpertAdapters(**factors, dropout=0.5)).sum().backward()
    for name, factor in factors.items():
        assert factor.grad.abs().max() > 0, name


def test_a_layer_refuses_what_is_no_adapters() -> None:
    with pytest.raises(TypeError, match="adapters must be ExpertAdapters or None, got dict"):
        tm.MoELayer(CONFIG)(torch.randn(9, 7), adapters={})
