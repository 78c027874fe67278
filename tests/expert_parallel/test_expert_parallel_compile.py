"""An expert-parallel layer under torch.compile: one graph, eager's bits, the program's order, nothing left behind."""

import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from compiled_threads import compiles_in_threads
from functorch.compile import make_boxed_func
from same_bits import assert_same_bits
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import tritonmoe as tm
from tritonmoe.config.overlap import ramp_sizes
from tritonmoe.expert_parallel.call import CallSpec, decode, encode
from tritonmoe.expert_parallel.layer_pass import BackwardPass, ForwardPass
from tritonmoe.experts.spec import expert_spec
from tritonmoe.experts.tensors import NAMES, CallTensors
from tritonmoe.runtime import handles
from tritonmoe.transports import LocalTransport, Transport

T, E, D, FF, K = 9, 6, 16, 8, 3
CONFIG = tm.MoEConfig(
    hidden_size=D, intermediate_size=FF, num_experts=E, top_k=K, bias=True, load_balance_loss_weight=0.1
)
PLAN = tm.OverlapPlan((1, 2), local_start=3, window=1)
SILU = expert_spec()


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> None:
    torch._dynamo.reset()


def draw(transport: Transport, layout: dict[str, bool] | None = None, slots: int = 0) -> dict[str, Tensor]:
    """Return one rank's tokens and experts as leaves, biases included; some pairs are skipped."""
    generator = torch.Generator().manual_seed(transport.rank)
    num_tokens, local = T + transport.rank, slots or E // transport.size
    up, down = ((D, 2 * FF), (FF, D)) if (layout or {}).get("transposed") else ((2 * FF, D), (D, FF))
    shapes = {
        "x": (num_tokens, D),
        "topk_weights": (num_tokens, K),
        "gate_up_proj": (local, *up),
        "down_proj": (local, *down),
        "gate_up_bias": (local, 2 * FF),
        "down_bias": (local, D),
    }
    leaves = {n: (torch.randn(*s, generator=generator) * 0.5).requires_grad_() for n, s in shapes.items()}
    return leaves | {"topk_ids": torch.randint(-1, E + 1, (num_tokens, K), generator=generator)}


def results(call: Callable[..., Tensor], leaves: dict[str, Tensor], **options) -> list[Tensor]:
    """Return the output and the gradient of every leaf."""
    wanted = [leaf for leaf in leaves.values() if leaf.requires_grad]
    y = call(**leaves, **options)
    dout = torch.linspace(-1, 1, y.numel()).view_as(y)
    return [y.detach(), *torch.autograd.grad(y, wanted, dout)]


def step(model: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    """Return output, auxiliary losses, and the gradients of a step of `call`, a variant of `model`."""
    x = x.detach().requires_grad_()
    y = call(x)
    losses = [layer.aux_loss for layer in model.modules() if isinstance(layer, tm.MoELayer)]
    grads = torch.autograd.grad(y.square().sum() + sum(losses), [x, *model.parameters()])
    return [y.detach(), *(loss.detach() for loss in losses), *grads]


class TwoLayers(nn.Module):
    def __init__(self, transport: Transport) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        config = replace(CONFIG, shared_intermediate_size=4)
        self.first, self.second = (
            tm.MoELayer(config, transport, tm.OverlapConfig(2), generator=generator) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.second(x + self.first(x))


class SideBySide(nn.Module):
    """Experts whose calls nothing orders but the program; one call is dead, and one is like another."""

    def __init__(self, transport: Transport) -> None:
        super().__init__()
        self.first, self.second = (tm.GroupedExperts(CONFIG, transport, PLAN) for _ in range(2))

    def forward(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        x = torch.sin(x)
        self.second(x, topk_ids, topk_weights)
        left, right = (experts(x, topk_ids, topk_weights) for experts in (self.first, self.second))
        return torch.cos(left) + right + self.first(x, topk_ids, topk_weights)


# One graph, and eager's bits


@compiles_in_threads
@pytest.mark.parametrize(
    ("options", "layout"),
    [
        ({"overlap": tm.OverlapConfig(2, capacity=1.5), "save": "input"}, {}),
        ({"overlap": PLAN, "activation": tm.ClampedSwiGLU(7.0, 1.702, 1.0)}, {"interleaved": True, "transposed": True}),
        pytest.param(
            {"overlap": tm.OverlapConfig(2, wire_dtype=torch.bfloat16, chunk_by="experts"), "activation": "gelu"},
            {},
            marks=pytest.mark.thorough,
        ),
        ({"overlap": PLAN, "placement": tm.ExpertPlacement(((5, 4, 3, 0), (0, 1, 2, 4)))}, {}),
    ],
    ids=["capacity", "plan", "experts", "placement"],
)
def test_fullgraph_gives_the_bits_of_eager(options: dict, layout: dict[str, bool]) -> None:
    def on_rank(transport: Transport) -> None:
        def call(**tensors: Tensor) -> Tensor:
            return tm.expert_parallel_mlp(**tensors, num_experts=E, transport=transport, **options, **layout)

        leaves = draw(transport, layout, options["placement"].num_slots if "placement" in options else 0)
        assert_same_bits(
            results(torch.compile(call, fullgraph=True, backend="aot_eager"), leaves), results(call, leaves)
        )

    tm.run_on_emulated_ranks(on_rank, 2, timeout_s=60)


@pytest.mark.thorough
@compiles_in_threads
def test_fullgraph_of_a_model_with_two_layers() -> None:
    def on_rank(transport: Transport) -> None:
        model = TwoLayers(transport)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        for num_tokens in (5, 8):
            x = torch.randn(num_tokens + transport.rank, D, generator=torch.Generator().manual_seed(num_tokens))
            expected = step(model, model, x)
            first = model.first.last_report
            assert_same_bits(step(model, compiled, x), expected)
            report = model.first.last_report
            assert report is not first
            assert report is not None
            assert report.backward is not None
            with torch.no_grad():
                assert torch.equal(compiled(x), model(x))

    tm.run_on_emulated_ranks(on_rank, 2, timeout_s=60)


@pytest.fixture
def gloo() -> Iterator[dist.ProcessGroup]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_fullgraph_over_gloo(gloo: dist.ProcessGroup) -> None:
    layer = tm.MoELayer(CONFIG, gloo, tm.OverlapConfig(2, local_first=False))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(T, D)
    assert_same_bits(step(layer, compiled, x), step(layer, layer, x))


def test_autocast_under_compile() -> None:
    transport = LocalTransport()

    def call(**tensors: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return tm.expert_parallel_mlp(**tensors, num_experts=E, transport=transport)

    leaves = draw(transport)
    compiled = results(torch.compile(call, fullgraph=True, backend="aot_eager"), leaves)
    assert compiled[0].dtype == torch.bfloat16
    assert_same_bits(compiled, results(call, leaves))


def test_checkpointing_under_compile() -> None:
    transport = LocalTransport()

    def experts(x: Tensor, others: dict[str, Tensor]) -> Tensor:
        return tm.expert_parallel_mlp(x.sin(), **others, num_experts=E, transport=transport, overlap=PLAN)

    def plain(x: Tensor, **others: Tensor) -> Tensor:
        return experts(experts(x, others), others)

    def checkpointed(x: Tensor, **others: Tensor) -> Tensor:
        return checkpoint(experts, checkpoint(experts, x, others, use_reentrant=False), others, use_reentrant=False)

    leaves = draw(transport)
    compiled = torch.compile(checkpointed, fullgraph=True, backend="aot_eager")
    assert_same_bits(results(compiled, leaves), results(plain, leaves))


def test_operators_pass_opcheck() -> None:
    transport = LocalTransport()
    leaves = draw(transport)
    names = ("x", "topk_ids", "topk_weights", "gate_up_proj", "gate_up_bias", "down_proj", "down_bias")
    tensors = [leaves[name] for name in names]
    num_local, width, _ = leaves["gate_up_proj"].shape
    shapes = (num_local, 2, D), (num_local, width, 2), (num_local, 3, FF), (num_local, D, 3)
    tensors += [torch.randn(shape, requires_grad=True) for shape in shapes]
    seeds = torch.randint(-(2**31), 2**31, (T,), dtype=torch.int32)
    spec = CallSpec(SILU.with_dropout(tm.ExpertAdapters(dropout=0.2)), E, tm.OverlapConfig(2))
    arguments = (seeds, None, True, [True] * len(NAMES), encode(spec))
    tensors += [None, None]  # of weights that are not packed
    operator = torch.ops.tritonmoe.expert_parallel_mlp.default
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    opcheck(operator, (transport.handle, None, *tensors, *arguments), test_utils=checks)
    kept = operator(transport.handle, None, *tensors, *arguments)[1]
    backward = torch.ops.tritonmoe.expert_parallel_mlp_backward.default
    saved = CallTensors.unflatten([*tensors, seeds]).without("x", "topk_ids", "row_seeds").map(Tensor.detach).flatten()
    without = ("topk_ids", "down_bias", "gate_up_b", "down_a", "gate_up_scales", "down_scales", "row_seeds")
    needs = [name not in without for name in NAMES]
    opcheck(backward, (None, torch.randn(T, D), kept, *saved, needs, "hidden"), test_utils=checks)


@pytest.mark.parametrize("name", ["expert_parallel_mlp", "expert_parallel_mlp_backward"])
def test_inductor_captures_no_exchange_in_a_cuda_graph(name: str) -> None:
    """By the device of its first tensor, as without the tag, a graph's first backward would be captured."""
    assert torch.Tag.cudagraph_unsafe in getattr(torch.ops.tritonmoe, name).default.tags


@pytest.mark.thorough
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "ungated"])
def test_flop_counter(gated: bool) -> None:
    transport = LocalTransport()
    leaves = draw(transport)
    if not gated:
        for name in ("gate_up_proj", "gate_up_bias"):
            leaves[name] = leaves[name].detach()[:, :FF].clone().requires_grad_()

    def count(save: str) -> list[int]:
        """Return the FLOPs of the graphs of forward and backward."""
        flops = []

        def counted(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., list[Tensor]]:
            def run(*inputs: Tensor) -> list[Tensor]:
                with FlopCounterMode(display=False) as counter:
                    outputs = graph(*inputs)
                flops.append(counter.get_total_flops())
                return outputs

            return make_boxed_func(run)

        def call(**tensors: Tensor) -> Tensor:
            return tm.expert_parallel_mlp(**tensors, num_experts=E, transport=transport, gated=gated, save=save)

        compiled = torch.compile(call, fullgraph=True, backend=aot_autograd(fw_compiler=counted, bw_compiler=counted))
        compiled(**leaves).sum().backward()
        return flops

    up, down = (2 * n * T * K * D * FF for n in (2 if gated else 1, 1))
    assert count("hidden") == [up + down, 2 * (up + down)]
    for name in ("x", "gate_up_proj", "gate_up_bias"):
        leaves[name].requires_grad_(False)
    assert count("input") == [up + down, up + 2 * down]  # h once more, then da and dW2


@pytest.mark.parametrize(
    "overlap",
    [
        tm.OverlapConfig(),
        tm.OverlapConfig(3, shape="ramp", serial=True, local_first=False, chunk_by="experts"),
        tm.OverlapConfig(shape=(1, 2, 1), wire_dtype=torch.float8_e4m3fn, capacity=1.25, chunk_by="tokens"),
        tm.OverlapConfig(memory_budget_bytes=2**40),
        tm.OverlapPlan(),
        tm.OverlapPlan(ramp_sizes(5), False, 2, 3, 4, True, torch.bfloat16, "experts"),
        tm.OverlapPlan((7,), capacity=2.0),
    ],
)
def test_settings_come_out_of_the_operator_as_they_went_in(overlap: tm.OverlapConfig | tm.OverlapPlan) -> None:
    clamped = expert_spec(
        activation=tm.ClampedSwiGLU(7.5, 1.702, 1.0),
        interleaved=True,
        transposed=True,
        backend="torch",
        save="input",
        num_sms=7,
        batch_invariant=True,
    )
    for placement in (None, tm.ExpertPlacement(((0, 1, 2), (3, 2, 0))), tm.ExpertPlacement(((0,), (1,), (0,)))):
        for experts in (SILU, clamped):
            spec = CallSpec(experts, E, overlap, placement)
            assert decode(encode(spec)) == spec
            assert decode(encode(spec)) is decode(encode(replace(spec)))


@pytest.mark.thorough
def test_settings_that_differ_between_layers_under_one_compiled_function() -> None:
    """torch.compile leaves numbers open that it has seen to change; operators take settings as a string."""
    transport = LocalTransport()

    def call(leaves: dict[str, Tensor], activation: tm.ClampedSwiGLU, overlap: tm.OverlapConfig) -> Tensor:
        return tm.expert_parallel_mlp(
            **leaves, num_experts=E, transport=transport, activation=activation, overlap=overlap
        )

    leaves = draw(transport)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for number in range(3):
        settings = tm.ClampedSwiGLU(0.1 + number, 1.3 * number), tm.OverlapConfig(1 + number, capacity=1.1 + number)
        assert torch.equal(compiled(leaves, *settings), call(leaves, *settings))


# What has no operator


@pytest.mark.parametrize("way", ["callable", "main_grad"])
def test_what_an_operator_cannot_take_breaks_the_graph_and_is_right(way: str) -> None:
    transport = LocalTransport()
    options = {"activation": lambda h: F.silu(h[:, :FF]) * h[:, FF:]} if way == "callable" else {}

    def call(**tensors: Tensor) -> Tensor:
        return tm.expert_parallel_mlp(**tensors, num_experts=E, transport=transport, **options).square()

    leaves = draw(transport)
    if way == "main_grad":
        leaves["down_proj"].main_grad = torch.zeros_like(leaves["down_proj"])
    found = []
    for function in (call, torch.compile(call, backend="aot_eager")):
        function(**leaves).sum().backward()
        found.append([leaf.grad for leaf in leaves.values()])
        if way == "main_grad":
            assert leaves["down_proj"].grad is None
            found[-1] = [g for g in found[-1] if g is not None] + [leaves["down_proj"].main_grad]
            leaves["down_proj"].main_grad = torch.zeros_like(leaves["down_proj"])
        for leaf in leaves.values():
            leaf.grad = None
    assert_same_bits(*([g for g in grads if g is not None] for grads in found))
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="_run_callable_or_main_grad"):
        torch.compile(call, backend="aot_eager", fullgraph=True)(**leaves)


# The order of exchanges


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.thorough)])
def test_exchanges_keep_the_order_of_the_program(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = SideBySide(LocalTransport())
    names = {getattr(model, name).gate_up_proj.data_ptr(): name for name in ("first", "second")}
    log: list[str] = []

    def spied(direction: str, function: Callable) -> Callable:
        def spy(*args, **kwargs):
            tensors = getattr(args[2], "received", args[2])  # of Kept
            log.append(f"{direction} {names[tensors.weights.gate_up_proj.data_ptr()]}")
            return function(*args, **kwargs)

        return spy

    for kind in (ForwardPass, BackwardPass):
        monkeypatch.setattr(kind, "__init__", spied(kind.__name__, kind.__init__))
    found = []
    leaves = draw(LocalTransport())
    tokens = {name: leaves[name] for name in ("x", "topk_ids", "topk_weights")}
    for call in (model, torch.compile(model, fullgraph=True, backend=backend)):
        log.clear()
        y = call(**tokens)
        grads = torch.autograd.grad(y.square().sum(), [tokens["x"], tokens["topk_weights"], *model.parameters()])
        found.append(([y, *grads], list(log)))
    (expected, program), (actual, order) = found
    assert program == [
        *(f"ForwardPass {name}" for name in ("second", "first", "second", "first")),
        *(f"BackwardPass {name}" for name in ("first", "second", "first")),
    ]
    assert order == program
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


def test_every_exchange_needs_the_one_before_it() -> None:
    """So that no backend can put them in another order, be it one that this version of Inductor wouldn't choose."""
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    model, leaves = SideBySide(LocalTransport()), draw(LocalTransport())
    compiled = torch.compile(model, fullgraph=True, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep))
    compiled(leaves["x"], leaves["topk_ids"], leaves["topk_weights"]).sum().backward()
    forward, backward = (list(graph.graph.nodes) for graph in graphs)
    for nodes, operator, count in (
        (forward, torch.ops.tritonmoe.expert_parallel_mlp.default, 4),
        (backward, torch.ops.tritonmoe.expert_parallel_mlp_backward.default, 3),
    ):
        calls = [node for node in nodes if node.target is operator]
        assert len(calls) == count
        for earlier, later in pairwise(calls):
            assert isinstance(later.args[0], torch.fx.Node)
            needed = {later.args[0]}
            while earlier not in needed:
                upstream = {node for one in needed for node in one.all_input_nodes}
                assert not upstream <= needed, "the later call would be free to come first"
                needed |= upstream


# What is kept


def held() -> int:
    gc.collect()
    return sum(isinstance(found, handles._Memory) for found in handles._objects.values())


@pytest.mark.thorough
def test_what_a_forward_keeps_goes_with_its_graph() -> None:
    before = held()
    transport = LocalTransport()
    leaves = draw(transport)
    wanted = [leaf for leaf in leaves.values() if leaf.requires_grad]

    def call(**tensors: Tensor) -> Tensor:
        return tm.expert_parallel_mlp(**tensors, num_experts=E, transport=transport).square()

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    y = compiled(**leaves)
    assert held() == before + 1
    first = torch.autograd.grad(y.sum(), wanted, retain_graph=True)
    assert held() == before + 1
    assert_same_bits(list(torch.autograd.grad(y.sum(), wanted)), list(first))
    assert held() == before
    y = compiled(**leaves)
    assert held() == before + 1
    del y
    assert held() == before
    with torch.no_grad():
        compiled(**leaves)
    assert held() == before


def test_a_handle_of_something_gone_raises() -> None:
    transport = LocalTransport()
    handle, kept = transport.handle, handles.hold("value")
    copies = handle.clone(), kept.clone()
    assert handles.find(copies[0]) is transport
    assert handles.find(copies[1]) == "value"
    del transport, kept
    gc.collect()
    for copied in (*copies, torch.zeros(1, dtype=torch.int64)):
        with pytest.raises(RuntimeError, match="a transport, a layer or a forward that no longer exists"):
            handles.find(copied)


def test_graphs_on_one_transport_in_any_order() -> None:
    """Another graph's forward, and the same one's, between a forward and its backward; the oldest backward first."""
    transport = LocalTransport()

    def first(**tensors: Tensor) -> Tensor:
        return tm.expert_parallel_mlp(**tensors, num_experts=E, transport=transport, overlap=PLAN)

    def second(**tensors: Tensor) -> Tensor:
        return tm.expert_parallel_mlp(**tensors, num_experts=E, transport=transport, overlap=PLAN).square()

    leaves = draw(transport)
    wanted = [leaf for leaf in leaves.values() if leaf.requires_grad]
    found = []
    for calls in ((first, second), [torch.compile(f, fullgraph=True, backend="aot_eager") for f in (first, second)]):
        outs = [call(**leaves) for call in (*calls, calls[0])]
        found.append([grad for y in outs for grad in torch.autograd.grad(y.sum(), wanted)])
    assert_same_bits(*found)


# Ranks that don't fit together


@pytest.mark.thorough
@compiles_in_threads
def test_a_rank_without_needs_is_refused_on_every_rank() -> None:
    def on_rank(transport: Transport) -> None:
        layer = tm.GroupedExperts(CONFIG, transport)
        if transport.rank == 1:
            layer.requires_grad_(False)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        leaves = draw(transport)
        with pytest.raises(tm.CountMismatch, match=r"ranks \[1\] run this layer call in a compiled graph"):
            compiled(leaves["x"].detach(), leaves["topk_ids"], leaves["topk_weights"].detach())

    tm.run_on_emulated_ranks(on_rank, 2, timeout_s=60)


@compiles_in_threads
def test_refused_arguments_reach_the_other_ranks() -> None:
    def on_rank(transport: Transport) -> None:
        def call(**tensors: Tensor) -> Tensor:
            return tm.expert_parallel_mlp(**tensors, num_experts=E + transport.rank, transport=transport)

        refused = pytest.raises(ValueError, match="must be divisible")
        heard = pytest.raises(tm.TransportError, match=r"ranks \[1\] refused")
        with refused if transport.rank else heard:
            torch.compile(call, fullgraph=True, backend="aot_eager")(**draw(transport))

    tm.run_on_emulated_ranks(on_rank, 2, timeout_s=60)


@pytest.mark.thorough
@compiles_in_threads
def test_backward_of_another_call_is_refused_on_every_rank() -> None:
    def on_rank(transport: Transport) -> None:
        layers = [tm.GroupedExperts(CONFIG, transport) for _ in range(2)]
        compiled = [torch.compile(layer, fullgraph=True, backend="aot_eager") for layer in layers]
        leaves = draw(transport)

        def losses() -> list[Tensor]:
            return [call(leaves["x"], leaves["topk_ids"], leaves["topk_weights"]).sum() for call in compiled]

        with pytest.raises(tm.CountMismatch, match="rank 0: backward of layer 0, call 0; rank 1: backward of layer 1"):
            losses()[transport.rank].backward()
        sum(losses()).backward()

    tm.run_on_emulated_ranks(on_rank, 2, timeout_s=60)
