"""The router by kernels as layers use it: which path a call takes, and what surrounds it, in Triton's interpreter.

tests/ops/kernels/test_router_kernels.py compares the kernels themselves.
"""

import math
from collections.abc import Callable

import pytest
import torch
from tolerance import assert_close_to_exact
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("triton")

import tritonmoe as tm
from tritonmoe.config.layer import MoEConfig
from tritonmoe.errors import NonFiniteScores
from tritonmoe.ops.kernels import router_kernels as kernels
from tritonmoe.routing import Routing, RoutingRecording, TopKRouter, load_balance_loss, save_topk, z_loss
from tritonmoe.routing.replay import LayerReplay

T, D, E, K = 20, 24, 12, 3
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUTERS = {
    "softmax": {},
    "groups": {"score_function": "sigmoid", "selection_bias": True, "num_expert_groups": 4, "top_k_groups": 2},
    "sqrtsoftplus": {"score_function": "sqrtsoftplus", "selection_bias": True, "routed_scaling_factor": 1.5},
    "softmax_after_topk": {"softmax_after_topk": True, "routed_scaling_factor": 2.0},
}


def config(**settings) -> MoEConfig:
    return MoEConfig(hidden_size=D, intermediate_size=16, num_experts=E, top_k=K, **settings)


def make_router(backend: str = "triton", dtype: torch.dtype = torch.float32, **settings) -> TopKRouter:
    """A router whose weight, rounded to bf16, is the same in every dtype."""
    torch.manual_seed(0)
    router = TopKRouter(config(**settings), backend=backend, device=DEVICE)
    with torch.no_grad():
        router.weight.copy_(router.weight.bfloat16())
    return router.to(dtype)


def tokens(dtype: torch.dtype = torch.float32, bad_rows: tuple[int, ...] = ()) -> Tensor:
    x = torch.randn(T, D, generator=torch.Generator().manual_seed(1)).bfloat16()
    for row in bad_rows:
        x[row, row] = math.nan
    return x.to(DEVICE, dtype)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of tokens that kernels have routed, call by call."""
    seen: list[int] = []

    def spied(x: Tensor, *others) -> kernels.Routed:
        seen.append(len(x))
        return route(x, *others)

    route = kernels.route
    monkeypatch.setattr(kernels, "route", spied)
    return seen


def loss_of(routing: Routing) -> Tensor:
    coefficients = torch.linspace(-1, 1, routing.topk_weights.numel(), device=DEVICE).view(-1, K)
    return (routing.topk_weights * coefficients).sum() + load_balance_loss(routing, E) + z_loss(routing.logits)


def run(router: TopKRouter, x: Tensor, call: Callable | None = None) -> tuple[Routing, dict[str, Tensor]]:
    """Return the routing, and by name what it is worth and its gradients."""
    x = x.clone().requires_grad_()
    routing = (router if call is None else call)(x)
    loss = loss_of(routing)
    dx, dweight = torch.autograd.grad(loss, (x, router.weight))
    return routing, {"weights": routing.topk_weights.detach(), "loss": loss.detach(), "dx": dx, "dweight": dweight}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ROUTERS)
def test_values_losses_and_gradients(kind: str, dtype: torch.dtype, calls: list[int]) -> None:
    """Two tokens have no finite scores."""
    settings, bad_rows = ROUTERS[kind], (0, 7)
    routing, actual = run(make_router(dtype=dtype, **settings), tokens(dtype, bad_rows))
    assert calls == [T]
    plain_routing, plain = run(make_router("torch", dtype, **settings), tokens(dtype, bad_rows))
    _, exact = run(make_router("torch", torch.float64, **settings), tokens(torch.float64, bad_rows))
    assert calls == [T]
    for name in actual:
        assert_close_to_exact(name, actual[name], plain[name], exact[name])
    for name in ("topk_ids", "load", "num_nonfinite_rows"):
        assert torch.equal(getattr(routing, name), getattr(plain_routing, name)), name
        assert getattr(routing, name).dtype == torch.int64


def test_bf16_tokens_and_an_fp32_weight(calls: list[int]) -> None:
    """As under autocast: the product is made of the tokens' fp32 values, and autocast rounds nothing."""
    router, plain = make_router(), make_router("torch")
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        _, actual = run(router, tokens(torch.bfloat16))
        _, expected = run(plain, tokens(torch.bfloat16))
    assert calls == [T]
    for name in actual:
        assert actual[name].dtype == expected[name].dtype
        torch.testing.assert_close(actual[name], expected[name])


def test_no_tokens_stay_attached_to_the_graph(calls: list[int]) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        router = make_router(dtype=dtype)
        x = tokens(dtype)[:0].requires_grad_()
        loss_of(router(x)).backward()
        assert x.grad.shape == (0, D)
        assert torch.equal(router.weight.grad, torch.zeros_like(router.weight))
    assert calls == [0, 0]


def test_what_needs_no_gradient_gets_none(calls: list[int]) -> None:
    router, x = make_router(dtype=torch.bfloat16), tokens(torch.bfloat16)
    with torch.no_grad():
        assert not router(x).topk_weights.requires_grad
    loss_of(router(x)).backward()  # x needs none
    assert router.weight.grad.any()
    router.weight.requires_grad_(False)
    x.requires_grad_()
    loss_of(router(x)).backward()
    assert x.grad.any()
    assert calls == [T] * 3


def test_a_second_derivative_is_refused() -> None:
    router, x = make_router(), tokens().requires_grad_()
    for result in ("topk_weights", "scores", "logits"):
        out = getattr(router(x), result)
        dout = torch.ones_like(out).requires_grad_()
        for grad in torch.autograd.grad(out, [x, router.weight], dout, create_graph=True):
            for by in (x, router.weight, dout):
                with pytest.raises(RuntimeError, match=r"routers whose work kernels do.*backend='torch'"):
                    torch.autograd.grad(grad.sum(), by)


# Which path a call takes


@pytest.mark.parametrize(
    ("backend", "dtype"), [("torch", torch.float32), ("reference", torch.float32), ("triton", torch.float64)]
)
def test_other_backends_and_fp64_take_pytorch(backend: str, dtype: torch.dtype, calls: list[int]) -> None:
    make_router(backend, dtype)(tokens(dtype))
    assert calls == []


@pytest.mark.skipif(DEVICE == "cuda", reason="the kernels are what auto takes on a GPU")
def test_auto_takes_pytorch_on_a_cpu(calls: list[int]) -> None:
    make_router("auto")(tokens())
    assert calls == []


def test_a_backend_has_a_name() -> None:
    with pytest.raises(ValueError, match="backend must be one of auto, triton, torch, reference, got 'fast'"):
        TopKRouter(config(), backend="fast")


def test_a_layer_hands_its_backend_to_its_router(calls: list[int]) -> None:
    layer = tm.MoELayer(config(), backend="triton", device=DEVICE)
    plain = tm.MoELayer(config(), backend="torch", device=DEVICE)
    plain.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(tokens()), plain(tokens()))
    assert calls == [T]
    layer(tokens(bad_rows=(3,)))
    with pytest.raises(NonFiniteScores, match="router scores of 1 tokens were NaN or infinite in an earlier forward"):
        layer(tokens())


def test_modes_that_watch_operations_see_pytorch_s(calls: list[int]) -> None:
    router, x = make_router(), tokens()
    with FlopCounterMode(display=False) as counter:
        router(x)
    assert counter.get_total_flops() == 2 * T * D * E
    assert calls == []


def test_transforms_of_torch_func_go_through_pytorch(calls: list[int]) -> None:
    router, x = make_router(), tokens()
    found = torch.func.grad(lambda rows: loss_of(router(rows)))(x)
    assert calls == []
    torch.testing.assert_close(found, run(router, x)[1]["dx"])


def test_a_replay_gives_its_ids_and_the_scores_of_the_router(calls: list[int]) -> None:
    router, x = make_router(), tokens()
    recorded = (router(x).topk_ids.flip(1) + 1) % E
    recording = RoutingRecording()
    recording.add("layer", recorded, E)
    replay = LayerReplay("layer", recording.layers["layer"])
    replay.start()
    routing = router(x)
    replay.finish(routing.topk_ids, allow_skipped=True)
    assert calls == [T]  # before the replay
    assert torch.equal(routing.topk_ids, recorded)
    chosen = routing.scores.gather(1, recorded)
    torch.testing.assert_close(routing.topk_weights, chosen / chosen.sum(dim=1, keepdim=True))
    router(x)
    assert calls == [T, T]


# Recomputes and compiled code


@pytest.mark.parametrize(
    ("options", "num_calls"),
    [
        ({"use_reentrant": False}, 2),
        ({"use_reentrant": True}, 2),
        ({"use_reentrant": False, "context_fn": save_topk}, 0),
    ],
    ids=["non_reentrant", "reentrant", "save_topk"],
)
def test_checkpointing(options: dict, num_calls: int, calls: list[int]) -> None:
    """A recompute chooses the same experts, and no token is counted twice."""
    router, x = make_router(**ROUTERS["groups"]), tokens(bad_rows=(5,))
    _, expected = run(router, x)
    router.load.zero_()
    calls.clear()
    chosen: list[Tensor] = []

    def forward(rows: Tensor) -> Tensor:
        routing = router(rows)
        chosen.append(routing.topk_ids)
        return loss_of(routing)

    rows = x.clone().requires_grad_()
    loss = checkpoint(forward, rows, **options)
    loss.backward()
    assert len(calls) == num_calls
    assert torch.equal(*chosen)
    assert int(router.load.sum()) == (T - 1) * K
    for name, value in (("loss", loss.detach()), ("dx", rows.grad), ("dweight", router.weight.grad)):
        torch.testing.assert_close(value, expected[name])


@pytest.mark.thorough
def test_compiled_code_has_the_same_bits(calls: list[int]) -> None:
    router, x = make_router(dtype=torch.bfloat16, **ROUTERS["groups"]), tokens(torch.bfloat16, (5,))
    routing, expected = run(router, x)
    compiled = torch.compile(router, fullgraph=True, backend="aot_eager")
    found, actual = run(router, x, compiled)
    assert calls == [T, T]
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name
    assert torch.equal(found.topk_ids, routing.topk_ids)
    assert int(router.load.sum()) == 2 * (T - 1) * K

    def weights_alone(call: Callable) -> tuple[Tensor, ...]:
        return torch.autograd.grad(call(x).topk_weights.square().sum(), router.weight)

    assert torch.equal(*weights_alone(router), *weights_alone(compiled))


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("context", "num_calls"), [({}, 2), ({"context_fn": save_topk}, 1)], ids=["plain", "save_topk"]
)
def test_a_compiled_recompute_keeps_the_choice_where_it_is_asked_to(
    context: dict, num_calls: int, calls: list[int]
) -> None:
    router, x = make_router(), tokens().requires_grad_()

    def forward(rows: Tensor) -> Tensor:
        return loss_of(router(rows.sin()))

    expected = torch.autograd.grad(forward(x), (x, router.weight))
    calls.clear()
    compiled = torch.compile(
        lambda rows: checkpoint(forward, rows, use_reentrant=False, **context),
        fullgraph=True,
        backend="aot_eager_decomp_partition",
    )
    actual = torch.autograd.grad(compiled(x), (x, router.weight))
    assert len(calls) == num_calls
    for value, right in zip(actual, expected, strict=True):
        torch.testing.assert_close(value, right)


@pytest.mark.thorough
def test_the_operator_is_one_that_pytorch_can_trace() -> None:
    for dtype, bias in ((torch.bfloat16, None), (torch.float32, torch.zeros(E, device=DEVICE))):
        router = make_router(dtype=dtype)
        arguments = tokens(dtype).requires_grad_(), router.weight, bias, router._rule
        torch.library.opcheck(torch.ops.tritonmoe.route.default, arguments)
