"""moe_mlp and MoELayer as PyTorch citizens: operators, torch.compile, export, modes, autocast, main_grad, refusals."""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from quantised_weights import Int4Tensor, Params4bit
from same_bits import assert_same_bits
from tolerance import assert_close_to_exact
from torch import Tensor, nn
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import tritonmoe as tm
from tritonmoe.config.activations import Activation
from tritonmoe.experts.spec import decode, encode, expert_spec
from tritonmoe.experts.tensors import NAMES
from tritonmoe.ops.backends import BACKENDS
from tritonmoe.ops.backends import torch as torch_backend
from tritonmoe.routing import save_topk
from tritonmoe.transports import LocalTransport

T, E, D, FF, K = 9, 5, 16, 8, 3
CONFIG = tm.MoEConfig(hidden_size=D, intermediate_size=FF, num_experts=E, top_k=K, load_balance_loss_weight=0.1)
GATES: dict[str, tuple[Activation, dict[str, bool]]] = {
    "silu": ("silu", {}),
    "gelu_tanh-interleaved": ("gelu_tanh", {"interleaved": True}),
    "relu2-ungated-transposed": ("relu2", {"gated": False, "transposed": True}),
    "gpt_oss": (tm.ClampedSwiGLU(7.0, alpha=1.702, up_offset=1.0), {"interleaved": True, "transposed": True}),
}


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> None:
    torch._dynamo.reset()


def draw(layout: dict[str, bool], num_tokens: int = T, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Return what moe_mlp takes, biases included, as leaves; about 2 in E + 2 pairs are skipped."""
    generator = torch.Generator().manual_seed(num_tokens)
    width = 2 * FF if layout.get("gated", True) else FF
    up, down = ((D, width), (FF, D)) if layout.get("transposed") else ((width, D), (D, FF))
    shapes = {
        "x": (num_tokens, D),
        "topk_weights": (num_tokens, K),
        "gate_up_proj": (E, *up),
        "down_proj": (E, *down),
        "gate_up_bias": (E, width),
        "down_bias": (E, D),
    }
    leaves = {
        name: (torch.randn(*shape, generator=generator) * 0.5)
        .to(torch.float32 if name == "topk_weights" else dtype)
        .requires_grad_()
        for name, shape in shapes.items()
    }
    return leaves | {"topk_ids": torch.randint(-1, E + 1, (num_tokens, K), generator=generator)}


def run(call: Callable[..., Tensor], leaves: dict[str, Tensor], **options) -> dict[str, Tensor]:
    """Return the output and the gradient of every leaf that needs one."""
    leaves = {name: leaf.detach().requires_grad_(leaf.requires_grad) for name, leaf in leaves.items()}
    y = call(**leaves, **options)
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    dout = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    return {"y": y.detach(), **dict(zip(wanted, torch.autograd.grad(y, list(wanted.values()), dout), strict=True))}


def layer_results(layer: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor) -> dict[str, Tensor]:
    """Output, auxiliary loss, and gradients of a step of `call`, a variant of `layer`."""
    x = x.detach().requires_grad_()
    y = call(x)
    loss = y.float().square().sum() + layer.aux_loss
    names, parameters = zip(*layer.named_parameters(), strict=True)
    grads = torch.autograd.grad(loss, [x, *parameters])
    return {"y": y.detach(), "aux_loss": layer.aux_loss.detach(), **dict(zip(("x", *names), grads, strict=True))}


# The operators, and everything that traces


@pytest.mark.sweep(1)
@pytest.mark.parametrize("save", ["hidden", "input"])
@pytest.mark.parametrize("gate", GATES)
def test_operators_pass_opcheck(gate: str, save: str) -> None:
    activation, layout = GATES[gate]
    leaves = draw(layout)
    tensors = [
        leaves[name]
        for name in ("x", "topk_ids", "topk_weights", "gate_up_proj", "gate_up_bias", "down_proj", "down_bias")
    ]
    out_columns, in_columns = (
        leaves["gate_up_bias"].shape[1],
        leaves["down_proj"].shape[1 if layout.get("transposed") else 2],
    )
    factor_shapes = (E, 2, D), (E, out_columns, 2), (E, 3, in_columns), (E, D, 3)
    tensors += [torch.randn(shape, requires_grad=True) for shape in factor_shapes]
    tensors += [None, None, torch.randint(-(2**31), 2**31, (T,), dtype=torch.int32)]  # of weights that are not packed
    spec = expert_spec(activation=activation, save=save, **layout).with_dropout(tm.ExpertAdapters(dropout=0.2))
    assert decode(encode(spec)) == spec
    opcheck(torch.ops.tritonmoe.moe_mlp.default, (*tensors, save == "hidden", encode(spec)))
    tensors = [None if tensor is None else tensor.detach() for tensor in tensors]
    h = torch.randn(T * K, leaves["gate_up_bias"].shape[1]) if save == "hidden" else None
    without = ("topk_ids", "down_bias", "down_a", "gate_up_b", "gate_up_scales", "down_scales", "row_seeds")
    needs = [name not in without for name in NAMES]
    opcheck(torch.ops.tritonmoe.moe_mlp_backward.default, (torch.randn(T, D), *tensors, h, needs, encode(spec)))


@pytest.mark.sweep(1)
@pytest.mark.parametrize("save", ["hidden", "input"])
@pytest.mark.parametrize("gate", GATES)
def test_compile_fullgraph_gives_the_bits_of_eager(gate: str, save: str) -> None:
    activation, layout = GATES[gate]
    options = {"activation": activation, "save": save, **layout}
    compiled = torch.compile(tm.moe_mlp, fullgraph=True, backend="aot_eager")
    leaves = draw(layout)
    assert_same_bits(run(compiled, leaves, **options), run(tm.moe_mlp, leaves, **options))


def test_compile_with_any_number_of_tokens() -> None:
    compilations = []

    def counting(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        compilations.append(graph)
        return graph.forward

    compiled = torch.compile(tm.moe_mlp, fullgraph=True, backend=counting, dynamic=True)
    for num_tokens in (7, 12, 31):
        leaves = draw({}, num_tokens)
        assert_same_bits(run(compiled, leaves), run(tm.moe_mlp, leaves))
    assert len(compilations) == 1
    automatic = torch.compile(tm.moe_mlp, fullgraph=True, backend="aot_eager")
    for num_tokens in (3, 8, 1, 0):
        leaves = draw({}, num_tokens)
        assert_same_bits(run(automatic, leaves), run(tm.moe_mlp, leaves))


@pytest.mark.thorough
def test_inductor_compiles_what_surrounds_it() -> None:
    def block(x: Tensor, **others: Tensor) -> Tensor:
        return x + tm.moe_mlp(F.rms_norm(x, (D,)), **others)

    leaves = draw({})
    actual, expected = run(torch.compile(block, fullgraph=True), leaves), run(block, leaves)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], msg=lambda text, name=name: f"{name}: {text}")


def test_compile_fullgraph_of_a_layer() -> None:
    layer = tm.MoELayer(replace(CONFIG, bias=True, selection_bias=True))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for seed in range(3):
        x = torch.randn(2, 5 + seed, D)
        assert_same_bits(layer_results(layer, compiled, x), layer_results(layer, layer, x))
    assert int(layer.router.load.sum()) == 2 * 2 * (5 + 6 + 7) * K
    assert layer.statistics().num_routed_pairs == 2 * 7 * K


def test_compile_of_a_callable_activation_breaks_the_graph_and_is_right() -> None:
    gate = nn.Linear(2 * FF, FF)
    expected = run(tm.moe_mlp, draw({}), activation=gate)
    compiled = torch.compile(tm.moe_mlp, backend="aot_eager")
    assert_same_bits(run(compiled, draw({}), activation=gate), expected)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="_run_callable_or_main_grad"):
        torch.compile(tm.moe_mlp, backend="aot_eager", fullgraph=True)(**draw({}), activation=gate)


def test_export() -> None:
    layer = tm.MoELayer(CONFIG).eval()
    x = torch.randn(6, D)
    exported = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("T", min=2)},))
    targets = [node.target for node in exported.graph.nodes]
    assert torch.ops.tritonmoe.moe_mlp.default in targets
    more = torch.randn(11, D)
    assert torch.equal(exported.module()(more), layer(more))


def test_meta_tensors_give_shapes() -> None:
    leaves = {name: leaf.detach().to("meta") for name, leaf in draw({}).items()}
    y = tm.moe_mlp(**leaves)
    assert y.is_meta
    assert y.shape == (T, D)


# Modes


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "ungated"])
def test_flop_counter(gated: bool) -> None:
    leaves = draw({"gated": gated})
    leaves["topk_ids"] = leaves["topk_ids"].clamp(0, E - 1)
    forward = (6 if gated else 4) * T * K * D * FF
    with FlopCounterMode(display=False) as counter:
        y = tm.moe_mlp(**leaves, gated=gated)
    assert counter.get_total_flops() == forward
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 2 * forward
    for name in ("x", "gate_up_proj", "gate_up_bias"):
        leaves[name].requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        tm.moe_mlp(**leaves, gated=gated, save="input").sum().backward()
    up, down = (2 * n * T * K * D * FF for n in (2 if gated else 1, 1))
    assert counter.get_total_flops() == forward + up + 2 * down  # h once more, then da and dW2


@pytest.mark.sweep(1)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("save", ["hidden", "input"])
@pytest.mark.parametrize("activation", ["silu", "callable"])
@pytest.mark.parametrize("way", ["one_device", "main_grad", "expert_parallel"])
def test_flop_counter_of_every_backend(way: str, activation: str, save: str, backend: str) -> None:
    """Whether or not a mode sees products, whichever thread they run in, and where it is only there in backward."""
    num_tokens = 400 if backend == "torch" else 40  # enough for several threads
    leaves = draw({}, num_tokens)
    leaves["topk_ids"] = torch.arange(num_tokens * K).view(num_tokens, K) % E
    if way == "main_grad":
        leaves = with_main_grads(leaves, torch.float32)
    options: dict = {"backend": backend, "save": save}
    if activation == "callable":
        options["activation"] = lambda h: F.silu(h[:, :FF]) * h[:, FF:]

    def call() -> Tensor:
        if way == "expert_parallel":
            return tm.expert_parallel_mlp(**leaves, num_experts=E, transport=LocalTransport(), **options)
        return tm.moe_mlp(**leaves, **options)

    forward = 6 * num_tokens * K * D * FF
    again = 4 * num_tokens * K * D * FF if save == "input" and activation == "silu" else 0
    num_threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with FlopCounterMode(display=False) as counter:
            y = call()
        assert counter.get_total_flops() == forward
        for out in (y, call()):
            with FlopCounterMode(display=False) as counter:
                out.sum().backward()
            assert counter.get_total_flops() == 2 * forward + again
    finally:
        torch.set_num_threads(num_threads)


@pytest.mark.parametrize("save", ["hidden", "input"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_flop_counter_of_adapters(backend: str, save: str) -> None:
    """By formula (one device), and by what runs."""
    leaves = draw({}, 40)
    leaves["topk_ids"] = torch.arange(40 * K).view(40, K) % E
    for name in ("gate_up_proj", "gate_up_bias", "down_bias"):
        leaves[name].requires_grad_(False)
    shapes = {"gate_up_a": (E, 2, D), "gate_up_b": (E, 2 * FF, 2), "down_a": (E, 3, FF), "down_b": (E, D, 3)}
    factors = {name: torch.randn(shape, requires_grad=name != "down_a") for name, shape in shapes.items()}
    options: dict = {"backend": backend, "save": save, "adapters": tm.ExpertAdapters(**factors)}
    counted = []
    for call in (tm.moe_mlp, partial(tm.expert_parallel_mlp, num_experts=E, transport=LocalTransport())):
        with FlopCounterMode(display=False) as forward:
            y = call(**leaves, **options)
        with FlopCounterMode(display=False) as backward:
            y.sum().backward()
        counted.append((forward.get_total_flops(), backward.get_total_flops()))
    assert counted[0] == counted[1]
    assert counted[0][0] == 2 * 40 * K * (3 * D * FF + 2 * (D + 2 * FF) + 3 * (FF + D))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mode_changes_no_bit(backend: str) -> None:
    leaves = draw({})
    expected = run(tm.moe_mlp, leaves, backend=backend)
    with FlopCounterMode(display=False):
        assert_same_bits(run(tm.moe_mlp, leaves, backend=backend), expected)


class MadeZeros(TorchDispatchMode):
    """Notes the shape of every tensor of zeros that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if "zeros" in str(func):
            self.shapes.append(tuple(out.shape))
        return out


def test_the_operators_backward_makes_no_gradient_of_what_it_saved() -> None:
    leaves = draw({})
    with MadeZeros() as made:  # the call is the operator
        y = tm.moe_mlp(**leaves, backend="torch")
        y.sum().backward()
    assert (leaves["topk_ids"].numel(), 2 * FF) not in made.shapes


def test_the_operator_takes_no_gradient_for_none() -> None:
    """As one gives that stands behind it and needs none of its own."""

    class Cut(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y: Tensor) -> Tensor:
            return y.clone()

        @staticmethod
        def backward(ctx, grad: Tensor) -> None:
            return None

    leaves = draw({})
    with FlopCounterMode(display=False):
        Cut.apply(tm.moe_mlp(**leaves)).sum().backward()
    assert all(leaf.grad is None for leaf in leaves.values())


# Autocast


@pytest.mark.parametrize("activation", ["silu", "callable"])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_is_casting_by_hand(x_dtype: torch.dtype, activation: str) -> None:
    leaves = draw({})
    leaves["x"] = leaves["x"].detach().to(x_dtype).requires_grad_()
    options = {"activation": (lambda h: F.silu(h[:, :FF]) * h[:, FF:]) if activation == "callable" else activation}

    def with_autocast(**tensors: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return tm.moe_mlp(**tensors, **options)

    def by_hand(topk_ids: Tensor, topk_weights: Tensor, **tensors: Tensor) -> Tensor:
        narrow = {name: tensor.bfloat16() for name, tensor in tensors.items()}
        return tm.moe_mlp(topk_ids=topk_ids, topk_weights=topk_weights, **narrow, **options)

    actual = run(with_autocast, leaves)
    assert actual["y"].dtype == torch.bfloat16
    assert_same_bits(actual, run(by_hand, leaves))


def test_backward_inside_autocast_has_the_bits_of_one_outside() -> None:
    leaves = draw({}, dtype=torch.bfloat16)
    expected = run(tm.moe_mlp, leaves)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_bits(run(tm.moe_mlp, leaves), expected)
        assert_same_bits(run(torch.compile(tm.moe_mlp, backend="aot_eager"), leaves), expected)


def test_autocast_of_layers() -> None:
    x = torch.randn(7, D)
    for transport in (None, LocalTransport()):
        layer = tm.MoELayer(CONFIG, transport)
        narrow = tm.MoELayer(CONFIG, transport)
        narrow.load_state_dict(layer.state_dict())
        narrow.experts.bfloat16()
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        routing = narrow.router(x)
        expected = narrow.experts(x.bfloat16(), routing.topk_ids, routing.topk_weights)
        assert torch.equal(y, expected)
        y.sum().backward()
        expected.sum().backward()
        for name, parameter in layer.experts.named_parameters():
            assert parameter.grad.dtype == torch.float32
            assert torch.equal(parameter.grad, narrow.experts.get_parameter(name).grad.float()), name


def test_autocast_leaves_fp64_alone() -> None:
    leaves = draw({}, dtype=torch.float64)
    expected = run(tm.moe_mlp, leaves)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_bits(run(tm.moe_mlp, leaves), expected)


# main_grad


def with_main_grads(leaves: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return fresh weights that have a main_grad full of ones, the other tensors as they were."""
    fresh = {}
    for name, leaf in leaves.items():
        fresh[name] = leaf.detach().clone().requires_grad_(leaf.requires_grad)
        if "proj" in name or "bias" in name:
            fresh[name].main_grad = torch.ones_like(leaf, dtype=dtype)
    return fresh


@pytest.mark.parametrize("way", ["eager", "autocast", "callable", "mode", "compiled", "expert_parallel"])
def test_gradients_go_to_main_grad(way: str) -> None:
    def call(**tensors: Tensor) -> Tensor:
        if way == "expert_parallel":
            return tm.expert_parallel_mlp(**tensors, num_experts=E, transport=LocalTransport())
        if way == "callable":
            return tm.moe_mlp(**tensors, activation=lambda h: F.silu(h[:, :FF]) * h[:, FF:])
        function = torch.compile(tm.moe_mlp, backend="aot_eager") if way == "compiled" else tm.moe_mlp
        with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
            return function(**tensors)

    leaves = draw({})
    plain = {name: leaf.detach().clone().requires_grad_(leaf.requires_grad) for name, leaf in leaves.items()}
    call(**plain).square().sum().backward()
    accumulated = with_main_grads(leaves, torch.float32)
    for _ in range(2):
        if way == "mode":
            with FlopCounterMode(display=False):
                call(**accumulated).square().sum().backward()
        else:
            call(**accumulated).square().sum().backward()
    for name in ("gate_up_proj", "down_proj", "gate_up_bias", "down_bias"):
        assert accumulated[name].grad is None, name
        expected = 1 + 2 * plain[name].grad
        # Under autocast main_grad gets the fp32 sums, .grad what bf16 leaves of them.
        rtol = 2**-8 if way == "autocast" else 1e-5
        torch.testing.assert_close(accumulated[name].main_grad, expected, rtol=rtol, atol=rtol)
    torch.testing.assert_close(accumulated["x"].grad, 2 * plain["x"].grad)


def test_main_grad_of_a_frozen_weight_stays() -> None:
    leaves = with_main_grads(draw({}), torch.float32)
    leaves["down_proj"].requires_grad_(False)
    tm.moe_mlp(**leaves).sum().backward()
    assert (leaves["down_proj"].main_grad == 1).all()
    assert (leaves["gate_up_proj"].main_grad != 1).any()


def test_a_main_grad_that_does_not_fit() -> None:
    leaves = with_main_grads(draw({}), torch.float32)
    leaves["down_proj"].main_grad = torch.zeros(3)
    with pytest.raises(ValueError, match=r"down_proj.main_grad is \(3,\) on cpu: it must have the weight's shape"):
        tm.moe_mlp(**leaves)


# What is not needed is not done


@pytest.mark.parametrize("parallel", [False, True], ids=["one_device", "expert_parallel"])
@pytest.mark.parametrize("activation", ["silu", "callable"])
@pytest.mark.parametrize(
    ("trained", "expected"),
    [
        ("x", {"up", "down", "gather_sum", "down_grad", "up_grad"}),
        ("topk_weights", {"up", "down", "gather_sum", "down_grad"}),
        ("gate_up_proj", {"up", "down", "gather_sum", "down_grad", "weight_grad"}),
        ("down_proj", {"up", "down", "gather_sum", "down_grad", "weight_grad"}),
        ("", {"up", "down", "gather_sum"}),
    ],
)
def test_frozen_tensors_skip_their_work(
    monkeypatch: pytest.MonkeyPatch, trained: str, expected: set[str], activation: str, parallel: bool
) -> None:
    called: list[str] = []
    sums: list[tuple[bool, bool]] = []

    def spied(name: str, op: Callable) -> Callable:
        def spy(*args, **kwargs):
            called.append(name)
            if name == "weight_grad":
                sums.append((args[3].gate_up_proj, args[3].down_proj))
            return op(*args, **kwargs)

        return spy

    for name in ("up", "down", "gather_sum", "down_grad", "up_grad", "weight_grad"):
        monkeypatch.setattr(torch_backend, name, spied(name, getattr(torch_backend, name)))
    leaves = {name: leaf.detach().requires_grad_(name == trained) for name, leaf in draw({}).items()}
    options: dict = {"activation": (lambda h: F.silu(h[:, :FF]) * h[:, FF:]) if activation == "callable" else "silu"}
    if parallel:
        y = tm.expert_parallel_mlp(**leaves, num_experts=E, transport=LocalTransport(), **options)
    else:
        y = tm.moe_mlp(**leaves, **options)
    if trained:
        y.sum().backward()
        assert leaves[trained].grad is not None
    if not parallel and activation == "callable" and trained in ("topk_weights", "down_proj"):
        assert set(called) == expected
    assert set(called) <= expected
    assert sums in ([], [(trained == "gate_up_proj", trained == "down_proj")])
    if not parallel:
        assert called.count("gather_sum") == (2 if trained == "x" else 1)


# Activation checkpointing


def checkpointed(layer: nn.Module, x: Tensor, **options) -> tuple[Tensor, Tensor]:
    """The output, and aux_loss as an output of the checkpointed function: attached under both kinds."""
    return checkpoint(lambda rows: (layer(rows), layer.aux_loss), x, **options)


@pytest.mark.parametrize("activation", ["silu", "callable"])
@pytest.mark.parametrize(
    "options",
    [{"use_reentrant": False}, {"use_reentrant": True}, {"use_reentrant": False, "context_fn": save_topk}],
    ids=["non_reentrant", "reentrant", "save_topk"],
)
def test_checkpointing_changes_no_bit(options: dict, activation: str) -> None:
    gate = (lambda h: F.silu(h[:, :FF]) * h[:, FF:]) if activation == "callable" else "silu"
    layer = tm.MoELayer(replace(CONFIG, selection_bias=True, activation=gate, z_loss_weight=0.1))
    x = torch.randn(60, D)
    results, loads = [], []
    for call in (lambda rows: (layer(rows), layer.aux_loss), lambda rows: checkpointed(layer, rows, **options)):
        rows = x.clone().requires_grad_()
        y, aux_loss = call(rows)
        (y.square().sum() + aux_loss).backward()
        results.append([y.detach(), aux_loss.detach(), rows.grad, *(p.grad.clone() for p in layer.parameters())])
        loads.append(int(layer.router.load.sum()))
        layer.zero_grad()
    assert loads == [60 * K, 2 * 60 * K]
    for plain, again in zip(*results, strict=True):
        assert torch.equal(plain, again)


def test_save_topk_keeps_near_ties_from_flipping() -> None:
    """A router whose scores come out a little different in the recompute, as another kernel would make them."""

    class Perturbed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = tm.MoELayer(replace(CONFIG, top_k=1, load_balance_loss_weight=0.0))
            self.ids: list[Tensor] = []

        def forward(self, x: Tensor) -> Tensor:
            # The same operations both times: selective checkpointing counts them.
            layer, flip = self.layer, torch.tensor([0.0, 1e-6, 0.0, 0.0, 0.0])
            scores = x @ layer.router.weight.T * 0 + flip * (-1 if self.ids else 1)
            topk_weights, topk_ids = scores.softmax(1).topk(1)
            self.ids.append(topk_ids)
            return layer.experts(x, topk_ids, topk_weights)

    flipped = {}
    for name, options in (("plain", {}), ("save_topk", {"context_fn": save_topk})):
        model = Perturbed()
        x = torch.randn(4, D, requires_grad=True)
        checkpoint(model, x, use_reentrant=False, **options).sum().backward()
        first, again = model.ids
        flipped[name] = not torch.equal(first, again)
    assert flipped == {"plain": True, "save_topk": False}


def test_save_topk_bears_work_in_place_and_a_second_backward() -> None:
    """As transformers' Qwen3-MoE does: the scores that top-k gave are divided in place."""
    layer = tm.MoELayer(replace(CONFIG, load_balance_loss_weight=0.0))

    def block(rows: Tensor) -> Tensor:
        scores, ids = (rows @ layer.router.weight.T).softmax(1).topk(K)
        scores /= scores.sum(1, keepdim=True)
        return layer.experts(rows, ids, scores)

    x = torch.randn(20, D)
    results = []
    for call in (block, lambda rows: checkpoint(block, rows, use_reentrant=False, context_fn=save_topk)):
        rows = x.clone().requires_grad_()
        out = call(rows).square().sum()
        out.backward(retain_graph=True)
        out.backward()
        results.append([rows.grad, *(p.grad.clone() for p in layer.parameters() if p.grad is not None)])
        layer.zero_grad()
    for plain, again in zip(*results, strict=True):
        assert torch.equal(plain, again)


def test_save_topk_says_when_a_recompute_differs() -> None:
    calls: list[int] = []

    def block(rows: Tensor) -> Tensor:
        with torch.no_grad():
            for _ in calls:  # none in the forward, one in the recompute
                rows.topk(2)
        calls.append(1)
        return rows.topk(2)[0].square()

    out = checkpoint(block, torch.randn(3, 4, requires_grad=True), use_reentrant=False, context_fn=save_topk)
    with pytest.raises(RuntimeError, match="more often than the forward did"):
        out.sum().backward()


# Refusals


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize(
    ("quantise", "message"),
    [
        (lambda w: (w * 10).to(torch.int8), "quantised (Tensor of torch.int8)"),
        (lambda w: (w * 10).to(torch.uint8), "quantised (Tensor of torch.uint8)"),
        (lambda w: w.to(torch.float8_e4m3fn), "quantised (Tensor of torch.float8_e4m3fn)"),
        (lambda w: Params4bit(w, requires_grad=False), "quantised (Params4bit of torch.float32)"),
        (lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8), "quantised (Tensor of torch.qint8)"),
        (Int4Tensor, "is a Int4Tensor, not a plain tensor in memory"),
    ],
    ids=["int8", "uint8", "float8", "Params4bit", "qint8", "wrapper"],
)
def test_quantised_weights_are_refused(quantise, message: str, autocast: bool) -> None:
    leaves = {name: leaf.detach() for name, leaf in draw({}).items()}
    for name in ("gate_up_proj", "down_proj"):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), pytest.raises(TypeError) as caught:
            tm.moe_mlp(**{**leaves, name: quantise(leaves[name])})
        assert f"{name} is" in str(caught.value)
        assert message in str(caught.value)
        assert "dequantise" in str(caught.value)


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
def test_batch_invariant_is_refused_where_nobody_can_promise_it(backend: str) -> None:
    with pytest.raises(ValueError, match="batch_invariant=True needs backend='triton'"):
        tm.moe_mlp(**draw({}), batch_invariant=True, backend=backend)


# Scaling and determinism


def test_grad_scaler_steps_and_skips() -> None:
    torch.manual_seed(0)
    layer = tm.MoELayer(CONFIG, dtype=torch.float32)
    before = copy.deepcopy(layer.state_dict())
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    x = torch.randn(6, D)
    for bad in (True, False):
        with torch.autocast("cpu", torch.float16):
            loss = (layer(x) * (torch.inf if bad else 1)).float().square().mean() + layer.aux_loss
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        changed = [name for name, value in layer.state_dict().items() if not torch.equal(value, before[name])]
        assert changed == ([] if bad else list(before))
    assert scaler.get_scale() == 2.0**7


def test_deterministic_algorithms() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        for options in ({}, {"save": "input"}, {"activation": lambda h: F.silu(h[:, :FF]) * h[:, FF:]}):
            leaves = draw({})
            first = run(tm.moe_mlp, leaves, **options)
            assert all(value.isfinite().all() for value in first.values())
            assert_same_bits(run(tm.moe_mlp, leaves, **options), first)
    finally:
        torch.use_deterministic_algorithms(False)


def test_saved_bytes_per_token() -> None:
    """x and h in the dtype of the layer, and at most 24 bytes per pair of indices and weights."""
    num_tokens = 64
    leaves = draw({}, num_tokens, torch.bfloat16)
    saved: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    weights = {leaf.untyped_storage().data_ptr() for name, leaf in leaves.items() if "proj" in name or "bias" in name}
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        y = tm.moe_mlp(**leaves)
    _, grouping = y.grad_fn.kept
    count(grouping.pair_index)
    count(grouping.inverse)
    per_token = sum(size for pointer, size in saved.items() if pointer not in weights) / num_tokens
    assert per_token <= 2 * D + 4 * K * FF + 24 * K
    saved.clear()
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor), FlopCounterMode(display=False):
        tm.moe_mlp(**leaves)
    per_token = sum(size for pointer, size in saved.items() if pointer not in weights) / num_tokens
    assert per_token <= 2 * D + 4 * K * FF + 24 * K


def test_compiled_results_are_within_the_tolerance() -> None:
    """Not only equal to eager: right."""
    leaves = draw({})
    leaves["topk_ids"] = leaves["topk_ids"].clamp(0, E - 1)
    doubled = {n: v.detach().double().requires_grad_() if v.is_floating_point() else v for n, v in leaves.items()}
    exact = run(tm.moe_mlp, doubled, backend="reference")
    plain = run(tm.moe_mlp, leaves, backend="reference")
    compiled = run(torch.compile(tm.moe_mlp, fullgraph=True, backend="aot_eager"), leaves)
    for name, value in exact.items():
        assert_close_to_exact(name, compiled[name], plain[name], value)
