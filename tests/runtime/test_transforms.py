"""torch.func around moe_mlp and layers: grad, vjp and functional_call give autograd's bits, the others say why not."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from same_bits import assert_same_bits
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacrev, jvp, vjp, vmap

import tritonmoe as tm
from tritonmoe.transports import LocalTransport, Transport

T, E, D, FF, K = 9, 5, 16, 8, 3
CONFIG = tm.MoEConfig(D, FF, E, K, bias=True, load_balance_loss_weight=0.1, selection_bias=True)
NAMES = ("x", "topk_weights", "gate_up_proj", "down_proj", "gate_up_bias", "down_bias")
ACTIVATIONS: dict[str, str | Callable[[Tensor], Tensor]] = {
    "silu": "silu",
    "callable": lambda h: h[:, :FF].relu() * h[:, FF:],  # silu's own derivative rounds otherwise under a transform
}
VMAP = r"can't be vmapped.*flattened batch"
FORWARD_MODE = r"no forward-mode derivative.*torch\.func\.grad or vjp"


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> None:
    torch._dynamo.reset()


def draw() -> tuple[dict[str, Tensor], Tensor]:
    """Return what moe_mlp differentiates, and ids of which some are skipped."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((T, D), (T, K), (E, 2 * FF, D), (E, D, FF), (E, 2 * FF), (E, D))
    tensors = {name: torch.randn(*shape, generator=generator) for name, shape in zip(NAMES, shapes, strict=True)}
    return tensors, torch.randint(-1, E + 1, (T, K), generator=generator)


def loss_of(ids: Tensor, **options) -> Callable[[dict[str, Tensor]], Tensor]:
    return lambda tensors: tm.moe_mlp(topk_ids=ids, **tensors, **options).square().sum()


def autograd_of(loss: Callable[[dict[str, Tensor]], Tensor], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    return dict(zip(leaves, torch.autograd.grad(loss(leaves), list(leaves.values())), strict=True))


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("save", ["hidden", "input"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_grad_and_vjp_have_the_bits_of_autograd(activation: str, save: str, backend: str) -> None:
    tensors, ids = draw()
    loss = loss_of(ids, activation=ACTIVATIONS[activation], save=save, backend=backend)
    expected = autograd_of(loss, tensors)
    assert_same_bits(grad(loss)(tensors), expected)
    value, pull = vjp(loss, tensors)
    assert torch.equal(value, loss(tensors))
    for factor in (1.0, 1.0):  # a pullback can run twice
        assert_same_bits(pull(torch.tensor(factor))[0], expected)


def test_some_tensors_are_transformed_and_others_captured() -> None:
    tensors, ids = draw()
    expected = autograd_of(loss_of(ids), tensors)
    for name in NAMES:
        others = {other: tensor for other, tensor in tensors.items() if other != name}
        found = grad(lambda own, name=name, others=others: loss_of(ids)({**others, name: own}))(tensors[name])
        assert torch.equal(found, expected[name]), name


def test_captured_leaves_get_their_gradients_from_autograd() -> None:
    tensors, ids = draw()
    expected = autograd_of(loss_of(ids), tensors)
    weight = tensors["down_proj"].clone().requires_grad_()
    value, pull = vjp(lambda x: loss_of(ids)({**tensors, "x": x, "down_proj": weight}), tensors["x"])
    assert torch.equal(pull(torch.tensor(1.0))[0], expected["x"])
    value.backward()
    assert torch.equal(weight.grad, expected["down_proj"])


def test_jacrev_row_by_row() -> None:
    tensors, ids = draw()

    def first_rows(x: Tensor) -> Tensor:
        return tm.moe_mlp(topk_ids=ids, **{**tensors, "x": x})[:2, :3]

    expected = torch.autograd.functional.jacobian(first_rows, tensors["x"])
    assert torch.equal(jacrev(first_rows, chunk_size=1)(tensors["x"]), expected)
    with pytest.raises(RuntimeError, match=VMAP):
        jacrev(first_rows)(tensors["x"])


@pytest.mark.parametrize("shared", [0, 6])
def test_functional_call_of_a_layer(shared: int) -> None:
    layer = tm.MoELayer(replace(CONFIG, activation="relu", shared_intermediate_size=shared))
    x = torch.randn(2, 5, D)
    parameters = {name: torch.randn_like(p) for name, p in layer.named_parameters()}

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return functional_call(layer, parameters, (x,)).square().sum() + layer.aux_loss

    expected = autograd_of(loss, parameters)
    assert int(layer.router.load.sum()) == 10 * K
    assert_same_bits(grad(loss)(parameters), expected)
    assert int(layer.router.load.sum()) == 2 * 10 * K  # a training forward like any other
    assert layer.statistics().num_routed_pairs == 10 * K
    layer(x).sum().backward()  # what the transform left does no harm
    assert all(p.grad is not None for p in layer.experts.parameters())


def test_nonfinite_scores_under_a_transform_are_reported() -> None:
    layer = tm.MoELayer(CONFIG)
    x = torch.full((3, D), torch.nan)
    grad(lambda x: layer(x).sum())(x)
    with pytest.raises(tm.NonFiniteScores, match="3 tokens"):
        layer(x)


def test_autocast_under_a_transform() -> None:
    tensors, ids = draw()

    def loss(tensors: dict[str, Tensor]) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return tm.moe_mlp(topk_ids=ids, **tensors).float().square().sum()

    assert_same_bits(grad(loss)(tensors), autograd_of(loss, tensors))


def test_compile_leaves_its_graph_for_a_transform() -> None:
    tensors, ids = draw()
    expected = autograd_of(loss_of(ids), tensors)
    assert_same_bits(torch.compile(grad(loss_of(ids)), backend="aot_eager")(tensors), expected)
    assert_same_bits(grad(torch.compile(loss_of(ids), backend="aot_eager"))(tensors), expected)


def test_main_grad() -> None:
    """Weights that are arguments of the function give their gradient; of captured ones it would have two places."""
    tensors, ids = draw()
    weight = nn.Parameter(tensors["down_proj"].clone())
    weight.main_grad = torch.zeros_like(weight)
    expected = autograd_of(loss_of(ids), tensors)
    assert_same_bits(grad(loss_of(ids))({**tensors, "down_proj": weight}), expected)
    assert not weight.main_grad.any()
    with pytest.raises(RuntimeError, match=r"weights with a main_grad .* as arguments of the transformed function"):
        grad(lambda x: loss_of(ids)({**tensors, "x": x, "down_proj": weight}))(tensors["x"])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("captured", ["x", "x and dout"])
def test_a_second_derivative_is_refused(captured: str, activation: str) -> None:
    tensors, ids = draw()

    def inner(x: Tensor) -> Tensor:
        y = tm.moe_mlp(topk_ids=ids, activation=ACTIVATIONS[activation], **{**tensors, "x": x})
        return y.sum() if captured == "x" else y.square().sum()

    with pytest.raises(RuntimeError, match=r"cannot be differentiated again.*plain PyTorch"):
        grad(lambda x: grad(inner)(x).sum())(tensors["x"])
    with pytest.raises(RuntimeError, match=FORWARD_MODE):
        hessian(inner)(tensors["x"])


@pytest.mark.parametrize("way", ["moe_mlp", "callable", "ids", "no_grad", "layer"])
def test_vmap_is_refused(way: str) -> None:
    tensors, ids = draw()
    x = tensors.pop("x").detach()
    batch = torch.stack([x, x])

    def call(x: Tensor, ids: Tensor = ids) -> Tensor:
        return tm.moe_mlp(x, ids, **tensors, activation=ACTIVATIONS["callable" if way == "callable" else "silu"])

    calls = {
        "layer": lambda: vmap(tm.MoELayer(CONFIG))(batch),
        "ids": lambda: vmap(lambda ids: call(x, ids))(torch.stack([ids, ids])),
    }
    with pytest.raises(RuntimeError, match=VMAP), torch.set_grad_enabled(way != "no_grad"):
        calls.get(way, lambda: vmap(call)(batch))()
    with pytest.raises(RuntimeError, match=VMAP):
        vmap(grad(lambda x: call(x).sum()))(batch)


@pytest.mark.parametrize("way", ["dual", "dual_of_weights", "layer"])
def test_forward_mode_is_refused(way: str) -> None:
    """Also where no tensor needs a gradient: a tangent would be lost."""
    tensors, ids = draw()
    x = tensors.pop("x")
    weight = tensors["down_proj"]
    calls = {
        "dual": lambda: tm.moe_mlp(forward_ad.make_dual(x, x), ids, **tensors),
        "dual_of_weights": lambda: tm.moe_mlp(x, ids, **{**tensors, "down_proj": forward_ad.make_dual(weight, weight)}),
        "layer": lambda: tm.MoELayer(CONFIG)(forward_ad.make_dual(x, x)),
    }
    with pytest.raises(RuntimeError, match=FORWARD_MODE), forward_ad.dual_level():
        calls[way]()
    with pytest.raises(RuntimeError, match=FORWARD_MODE):
        jvp(lambda x: tm.moe_mlp(x, ids, **tensors), (x,), (x,))


@pytest.mark.parametrize("shared", [0, 6])
def test_forward_mode_around_a_gradient_of_a_layer_is_refused(shared: int) -> None:
    """The gradient's own level hides the tangents, and the router's product comes before the experts."""
    layer, x = tm.MoELayer(replace(CONFIG, shared_intermediate_size=shared)), torch.randn(4, D)

    def loss(x: Tensor) -> Tensor:
        return layer(x).square().sum()

    def in_dual_level() -> None:
        with forward_ad.dual_level():
            grad(loss)(forward_ad.make_dual(x, x))

    for transformed in (
        lambda: hessian(loss)(x),
        lambda: hessian(layer)(x),
        lambda: jvp(grad(loss), (x,), (x,)),
        lambda: grad(lambda x: jvp(loss, (x,), (x,))[1])(x),
        lambda: hessian(lambda x: layer.router(x).topk_weights.square().sum())(x),
        in_dual_level,
    ):
        with pytest.raises(RuntimeError, match=FORWARD_MODE):
            transformed()
    # Another tensor's tangent is no concern of the layer's, and only routers of kernels have no second derivative.
    expected = 2 * x.sum() * grad(lambda x: layer(x).sum())(x)
    found = grad(lambda y: jvp(lambda z: layer(y).sum() * z.square().sum(), (x,), (torch.ones_like(x),))[1])(x)
    torch.testing.assert_close(found, expected)
    grad(lambda x: grad(lambda x: layer.router(x).topk_weights.square().sum())(x).sum())(x)


def test_expert_parallel_calls_are_refused_on_every_rank() -> None:
    config = tm.MoEConfig(D, FF, 4, 2)

    def on_rank(transport: Transport) -> str:
        layer = tm.MoELayer(config, transport, generator=torch.Generator().manual_seed(0))
        x = torch.randn(3, D)
        functional_call(layer, dict(layer.named_parameters()), (x,)).sum().backward()
        heard = []
        for transformed in (lambda: grad(lambda x: layer(x).sum())(x), lambda: vmap(layer)(x[None])):
            with pytest.raises(RuntimeError) as caught:
                transformed() if transport.rank == 0 else layer(x)
            heard.append(str(caught.value))
        layer(x)
        return "; ".join(heard)

    transformed, plain = tm.run_on_emulated_ranks(on_rank, 2, timeout_s=20)
    assert "expert-parallel calls can't run under torch.func's transforms" in transformed
    assert "can't be vmapped" in transformed
    assert plain.count("ranks [0] refused") == 2


def test_expert_parallel_calls_on_one_rank() -> None:
    tensors, ids = draw()
    options = {"num_experts": E, "transport": LocalTransport()}
    for call in (
        lambda: grad(lambda x: tm.expert_parallel_mlp(topk_ids=ids, **{**tensors, "x": x}, **options).sum()),
        lambda: torch.compile(
            grad(lambda x: tm.expert_parallel_mlp(topk_ids=ids, **{**tensors, "x": x}, **options).sum()),
            backend="aot_eager",
        ),
    ):
        with pytest.raises(RuntimeError, match=r"torch\.autograd\.grad; torch\.func\.functional_call alone is fine"):
            call()(tensors["x"])
