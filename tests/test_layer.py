"""MoELayer and GroupedExperts: the same experts for every number of ranks, reports, losses, training."""

import copy
import io
import pickle
from dataclasses import replace

import pytest
import torch
from compiled_threads import compiles_in_threads
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import tritonmoe as tm
from tritonmoe.routing import load_balance_loss, z_loss
from tritonmoe.transports import LocalTransport, Transport

CONFIG = tm.MoEConfig(8, 6, 12, 3)
FORMS = {
    "concatenated": CONFIG,
    "transposed": replace(CONFIG, transposed=True),
    "ungated": replace(CONFIG, gated=False, activation="relu2"),
    "bias": replace(CONFIG, bias=True, interleaved=True),
}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randomise_biases(experts: tm.GroupedExperts) -> None:
    """Return every expert biases that depend on its global number alone."""
    for bias in (experts.gate_up_proj_bias, experts.down_proj_bias):
        if bias is not None:
            for local in range(len(bias)):
                bias.data[local].normal_(generator=seeded(experts.expert_ids[local]))


def batch(rank: int = 0, step: int = 0, num_tokens: int | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    num_tokens = 5 + 4 * rank if num_tokens is None else num_tokens
    return torch.randn(num_tokens, CONFIG.hidden_size, generator=seeded(100 * step + rank)).to(dtype)


@pytest.mark.parametrize("form", FORMS)
def test_parameters(form: str) -> None:
    """Names and shapes are those of transformers."""
    config = FORMS[form]
    expected = {
        "concatenated": {"gate_up_proj": (12, 12, 8), "down_proj": (12, 8, 6)},
        "transposed": {"gate_up_proj": (12, 8, 12), "down_proj": (12, 6, 8)},
        "ungated": {"gate_up_proj": (12, 6, 8), "down_proj": (12, 8, 6)},
        "bias": {
            "gate_up_proj": (12, 12, 8),
            "down_proj": (12, 8, 6),
            "gate_up_proj_bias": (12, 12),
            "down_proj_bias": (12, 8),
        },
    }[form]
    experts = tm.GroupedExperts(config)
    assert {name: tuple(p.shape) for name, p in experts.named_parameters()} == expected
    layer = tm.MoELayer(config)
    assert {name for name, _ in layer.named_parameters()} == {
        "router.weight",
        *(f"experts.{name}" for name in expected),
    }


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 6, 12], ids="W{}".format)
def test_a_seed_gives_the_same_experts_for_every_number_of_ranks(num_ranks: int) -> None:
    whole = tm.MoELayer(CONFIG, generator=seeded())
    parts = tm.run_on_emulated_ranks(lambda t: tm.MoELayer(CONFIG, t, generator=seeded()), num_ranks)
    for part in parts:
        assert torch.equal(part.router.weight, whole.router.weight)
    for name in ("gate_up_proj", "down_proj"):
        joined = torch.cat([getattr(part.experts, name) for part in parts])
        assert torch.equal(joined, getattr(whole.experts, name)), name
    assert [part.experts.expert_ids[0] for part in parts] == [12 // num_ranks * rank for rank in range(num_ranks)]


def test_experts_differ_and_a_new_seed_gives_others() -> None:
    experts = tm.GroupedExperts(CONFIG, generator=seeded())
    assert len({tuple(w.flatten().tolist()) for w in experts.gate_up_proj}) == 12
    others = tm.GroupedExperts(CONFIG, generator=seeded(1))
    assert not torch.equal(experts.gate_up_proj, others.gate_up_proj)
    before = experts.gate_up_proj.detach().clone()
    experts.reset_parameters(seeded())
    assert torch.equal(experts.gate_up_proj, before)


def test_global_generator() -> None:
    torch.manual_seed(3)
    first = tm.MoELayer(CONFIG)
    torch.manual_seed(3)
    second = tm.MoELayer(CONFIG)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_dtype(dtype: torch.dtype) -> None:
    layer = tm.MoELayer(CONFIG, dtype=dtype, generator=seeded())
    assert {p.dtype for p in layer.parameters()} == {dtype}
    y = layer(batch(dtype=dtype).requires_grad_())
    assert y.dtype == dtype
    y.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


def test_the_overlap_of_a_layer_can_be_set_and_its_transport_cannot() -> None:
    config = tm.MoEConfig(hidden_size=8, intermediate_size=4, num_experts=4, top_k=2)

    def on_rank(transport: Transport) -> list[int]:
        experts = tm.GroupedExperts(config, transport, tm.OverlapConfig(1))
        numbers = []
        for chunks in (1, 3):
            experts.overlap = tm.OverlapConfig(chunks)
            experts(torch.ones(4, 8), torch.zeros(4, 2, dtype=torch.int64), torch.ones(4, 2))
            assert experts.last_report is not None
            numbers.append(experts.last_report.overlap.num_chunks)
        with pytest.raises(AttributeError, match="transport"):
            experts.transport = LocalTransport()  # type: ignore[misc]
        with pytest.raises(TypeError, match="overlap"):
            experts.overlap = 3  # type: ignore[assignment]
        return numbers

    assert tm.run_on_emulated_ranks(on_rank, 2, timeout_s=20) == [[1, 3], [1, 3]]
    alone = tm.GroupedExperts(config)
    assert alone.overlap is None
    with pytest.raises(ValueError, match="no exchanges to overlap"):
        alone.overlap = tm.OverlapConfig(2)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 1, 3), (0,), (2, 0)], ids=str)
@pytest.mark.parametrize("transport", [None, LocalTransport()], ids=["one-device", "local"])
def test_leading_dimensions(transport: Transport | None, shape: tuple[int, ...]) -> None:
    layer = tm.MoELayer(CONFIG, transport, generator=seeded())
    x = torch.randn(*shape, 8, generator=seeded()).requires_grad_()
    y = layer(x)
    assert y.shape == x.shape
    flat = layer(x.reshape(-1, 8))
    assert torch.equal(y.reshape(-1, 8), flat)
    y.sum().backward()
    assert x.grad.shape == x.shape


def test_strided_input() -> None:
    layer = tm.MoELayer(CONFIG, generator=seeded())
    x = torch.randn(3, 8, 4, generator=seeded())
    assert torch.equal(layer(x.mT), layer(x.mT.contiguous()))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("num_ranks", [2, 3], ids="W{}".format)
def test_equals_one_device(num_ranks: int, form: str) -> None:
    config = FORMS[form]
    whole = tm.MoELayer(config, generator=seeded(), dtype=torch.float64)
    randomise_biases(whole.experts)
    xs = [batch(rank, dtype=torch.float64) for rank in range(num_ranks)]
    expected = whole(torch.cat(xs))
    expected.square().sum().backward()

    def on_rank(transport: Transport) -> tuple[Tensor, tm.MoELayer]:
        layer = tm.MoELayer(
            config,
            transport,
            tm.OverlapConfig(2),
            expert_gradients="sum",
            generator=seeded(),
            dtype=torch.float64,
        )
        randomise_biases(layer.experts)
        y = layer(xs[transport.rank])
        y.square().sum().backward()
        return y.detach(), layer

    outs, layers = zip(*tm.run_on_emulated_ranks(on_rank, num_ranks, timeout_s=20), strict=True)
    # The gate weights travel in fp32.
    torch.testing.assert_close(torch.cat(outs), expected.detach(), rtol=1e-5, atol=1e-6)
    router_grad = sum(layer.router.weight.grad for layer in layers)
    torch.testing.assert_close(router_grad, whole.router.weight.grad, rtol=1e-5, atol=1e-6)
    for name, parameter in whole.experts.named_parameters():
        joined = torch.cat([getattr(layer.experts, name).grad for layer in layers])
        torch.testing.assert_close(joined, parameter.grad, rtol=1e-5, atol=1e-6)


SHARED = {
    "gated": replace(CONFIG, shared_intermediate_size=5),
    "transposed": replace(CONFIG, shared_intermediate_size=5, transposed=True, interleaved=True),
    "ungated": replace(CONFIG, shared_intermediate_size=5, gated=False, activation="relu2"),
    "clamped": replace(CONFIG, shared_intermediate_size=5, activation=tm.ClampedSwiGLU(0.3)),
}


@pytest.mark.parametrize("form", SHARED)
def test_shared_expert_is_one_more_expert_of_every_token(form: str) -> None:
    config = SHARED[form]
    layer = tm.MoELayer(config, generator=seeded(), dtype=torch.float64)
    x = batch(dtype=torch.float64).requires_grad_()
    layer(x).square().sum().backward()
    given = [w.detach().unsqueeze(0).requires_grad_() for w in layer.shared_expert.parameters()]
    experts = [w.detach().requires_grad_() for w in layer.experts.parameters()]
    other = x.detach().requires_grad_()
    options = {name: getattr(config, name) for name in ("activation", "gated", "interleaved", "transposed")}
    routing = layer.router(other)
    routed = tm.moe_mlp(other, routing.topk_ids, routing.topk_weights, *experts, backend="reference", **options)
    ids = torch.zeros(len(x), 1, dtype=torch.int64)
    shared = tm.moe_mlp(other, ids, torch.ones(len(x), 1), *given, backend="reference", **options)
    (routed + shared).square().sum().backward()
    torch.testing.assert_close(layer(x), routed + shared)
    torch.testing.assert_close(x.grad, other.grad)
    for own, expected in zip(layer.shared_expert.parameters(), given, strict=True):
        torch.testing.assert_close(own.grad, expected.grad[0])


@pytest.mark.parametrize("num_ranks", [None, 2])
def test_what_hangs_on_calls_of_the_shared_expert_runs(num_ranks: int | None) -> None:
    """Hooks, which pruning and FSDP2 are too, and a forward of the module's own; the gradients reach behind them."""

    def on_rank(transport: Transport | None = None) -> None:
        layer = tm.MoELayer(SHARED["gated"], transport, generator=seeded())
        shared, x = layer.shared_expert, batch()
        plain, part = layer(x), shared(x)
        kinds = "forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"
        seen: list[str] = []
        for kind in kinds:
            handle = getattr(shared, f"register_{kind}")(lambda *_, kind=kind: seen.append(kind))
            layer(x.requires_grad_()).sum().backward()
            assert seen == [kind]
            handle.remove()
            seen.clear()
        shared.forward = lambda x: type(shared).forward(shared, x) * 3  # as Accelerate hangs itself on calls
        torch.testing.assert_close(layer(x), plain + 2 * part)
        del shared.forward
        prune.l1_unstructured(shared, "down_proj", amount=0.5)
        layer(x)
        with torch.no_grad():
            shared.down_proj_orig.zero_()  # as an optimizer writes it
        torch.testing.assert_close(layer(x), plain - part)
        shared.zero_grad()
        layer(x).sum().backward()
        assert shared.down_proj_orig.grad.count_nonzero() == shared.down_proj_mask.sum()

    on_rank() if num_ranks is None else tm.run_on_emulated_ranks(on_rank, num_ranks)


@pytest.mark.parametrize("serial", [False, True], ids=["overlapped", "serial"])
@pytest.mark.parametrize("num_ranks", [1, 2, 3], ids="W{}".format)
def test_shared_expert_on_ranks(num_ranks: int, serial: bool) -> None:
    config = SHARED["gated"]
    whole = tm.MoELayer(config, generator=seeded(), dtype=torch.float64)
    xs = [batch(rank, dtype=torch.float64) for rank in range(num_ranks)]
    x_whole = torch.cat(xs).requires_grad_()
    expected = whole(x_whole)
    expected.square().sum().backward()

    def on_rank(transport: Transport) -> tuple[Tensor, Tensor, tm.MoELayer]:
        overlap = tm.OverlapConfig(2, serial=serial)
        layer = tm.MoELayer(config, transport, overlap, generator=seeded(), dtype=torch.float64)
        x = xs[transport.rank].clone().requires_grad_()
        y = layer(x)
        y.square().sum().backward()
        names = [str(timing.step) for timing in layer.last_report.forward.steps]
        assert {"filler 0", "filler 1"} <= set(names)
        with torch.no_grad():
            inference = layer(x)
        assert not inference.requires_grad
        torch.testing.assert_close(inference, y)
        return y.detach(), x.grad, layer

    outs, grads, layers = zip(*tm.run_on_emulated_ranks(on_rank, num_ranks, timeout_s=20), strict=True)
    torch.testing.assert_close(torch.cat(outs), expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.cat(grads), x_whole.grad, rtol=1e-5, atol=1e-6)
    for name, parameter in whole.shared_expert.named_parameters():
        assert all(torch.equal(dict(layer.shared_expert.named_parameters())[name], parameter) for layer in layers)
        total = sum(dict(layer.shared_expert.named_parameters())[name].grad for layer in layers)
        torch.testing.assert_close(total, parameter.grad, rtol=1e-5, atol=1e-6)


def test_fillers_of_the_caller() -> None:
    """They run once each, in order, in the caller's grad mode."""

    def on_rank(transport: Transport) -> list[tuple[str, bool]]:
        seen: list[tuple[str, bool]] = []
        experts = tm.GroupedExperts(CONFIG, transport, tm.OverlapConfig(2))
        ids, weights = torch.zeros(4, 3, dtype=torch.int64), torch.ones(4, 3)
        x = torch.randn(4, 8)
        fillers = [lambda: seen.append(("first", torch.is_grad_enabled())), lambda: seen.append(("second", True))]
        experts(x, ids, weights, fillers=fillers)
        with torch.no_grad():
            experts(x, ids, weights, fillers=fillers[:1])
        with pytest.raises(ValueError, match="at most 2 fillers, got 3"):
            experts(x, ids, weights, fillers=[*fillers, fillers[0]])
        return seen

    expected = [("first", True), ("second", True), ("first", False)]
    assert tm.run_on_emulated_ranks(on_rank, 2, timeout_s=20) == [expected] * 2
    seen: list[str] = []
    tm.GroupedExperts(CONFIG)(
        torch.randn(2, 8), torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 3), fillers=[lambda: seen.append("run")]
    )
    assert seen == ["run"]


@pytest.mark.parametrize("shared", [0, 5])
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_the_scores_of_another_router_as_filler(num_ranks: int, shared: int) -> None:
    """A layer beside or behind this one may route the same tokens while this one's rows travel."""
    config = replace(CONFIG, shared_intermediate_size=shared)

    def on_rank(transport: Transport) -> None:
        seed = torch.Generator().manual_seed(0)
        layer, other = (
            tm.MoELayer(config, transport if num_ranks > 1 else None, tm.OverlapConfig(2), generator=seed)
            for _ in range(2)
        )
        x = torch.randn(5, 8, generator=torch.Generator().manual_seed(transport.rank), requires_grad=True)

        def gradients(y: Tensor, logits: Tensor) -> list[Tensor]:
            parameters = [x, other.router.weight, *layer.parameters()]
            return [y.detach(), logits.detach(), *torch.autograd.grad(y.sum() + logits.square().sum(), parameters)]

        expected = gradients(layer(x), other.router(x).logits)
        for before in ([], [lambda: None]):  # under the first dispatch, under the last combine
            found: list[Tensor] = []
            y = layer(x, fillers=[*before, lambda found=found: found.append(other.router(x).logits)])
            for actual, wanted in zip(gradients(y, found[0]), expected, strict=True):
                torch.testing.assert_close(actual, wanted)
        if num_ranks > 1:
            with pytest.raises(ValueError, match="at most 2 fillers, got 3"):
                layer(x, fillers=[lambda: None] * 3)

    tm.run_on_emulated_ranks(on_rank, num_ranks, timeout_s=20)


@pytest.mark.parametrize("value", [-1, 1.5, "4"])
def test_shared_sizes_that_are_refused(value: object) -> None:
    with pytest.raises(ValueError, match="shared_intermediate_size must be"):
        replace(CONFIG, shared_intermediate_size=value)


def test_aux_loss_is_attached_and_right() -> None:
    config = replace(CONFIG, load_balance_loss_weight=0.5, z_loss_weight=0.25)
    layer = tm.MoELayer(config, generator=seeded())
    assert layer.aux_loss is None
    layer(batch())
    routing = layer.router(batch())
    expected = 0.5 * load_balance_loss(routing, 12) + 0.25 * z_loss(routing.logits)
    assert torch.equal(layer.aux_loss, expected)
    layer.aux_loss.backward()
    (grad,) = torch.autograd.grad(expected, layer.router.weight)
    assert torch.equal(layer.router.weight.grad, grad)
    assert layer.experts.gate_up_proj.grad is None
    balanced = tm.MoELayer(CONFIG)
    y = balanced(batch())
    assert balanced.aux_loss.item() == 0
    (y.sum() + balanced.aux_loss).backward()


@pytest.mark.parametrize("kind", ["plain", "checkpointed", "compiled"])
def test_rows_that_a_token_mask_calls_padding_count_nowhere(kind: str) -> None:
    """Even NaN in them: everything is that of the tokens alone."""
    losses = {"load_balance_loss_weight": 0.5, "z_loss_weight": 0.25}
    config = replace(CONFIG, **losses, selection_bias=True, score_function="sigmoid", shared_intermediate_size=4)
    masked = tm.MoELayer(config, generator=seeded(), check="now" if kind == "plain" else "next")
    alone = copy.deepcopy(masked)
    x, mask = batch(num_tokens=14).view(2, 7, 8), torch.ones(2, 7, dtype=torch.bool)
    mask[0, 4:] = mask[1, 0] = False
    padded = x.clone().requires_grad_()
    if kind == "plain":
        padded = torch.where(mask.unsqueeze(-1), x, torch.nan).requires_grad_()

    def call(rows: Tensor) -> tuple[Tensor, Tensor]:
        y = masked(rows, token_mask=mask)
        return y, masked.aux_loss

    if kind == "compiled":
        y, aux_loss = torch.compile(call, backend="aot_eager", fullgraph=True)(padded)
    else:
        y, aux_loss = checkpoint(call, padded, use_reentrant=False) if kind == "checkpointed" else call(padded)
    tokens = x[mask].requires_grad_()
    expected = alone(tokens)
    torch.testing.assert_close(y[mask], expected)
    torch.testing.assert_close(aux_loss, alone.aux_loss)
    assert torch.equal(masked.router.load, alone.router.load)
    assert masked.statistics().num_skipped_pairs == 3 * 4
    if kind != "plain":
        torch.testing.assert_close(y[~mask], masked.shared_expert(x[~mask]))
    (y[mask].square().sum() + aux_loss).backward()
    (expected.square().sum() + alone.aux_loss).backward()
    torch.testing.assert_close(padded.grad[mask], tokens.grad)
    assert torch.equal(padded.grad[~mask].nan_to_num(), torch.zeros_like(padded.grad[~mask]))
    torch.testing.assert_close(masked.router.weight.grad, alone.router.weight.grad)
    torch.testing.assert_close(masked.experts.down_proj.grad, alone.experts.down_proj.grad)


def test_token_masks_of_ranks() -> None:
    config = replace(CONFIG, load_balance_loss_weight=1.0, load_balance_over="global")
    xs = [batch(rank) for rank in range(2)]
    masks = [torch.arange(len(x)) < 3 + rank for rank, x in enumerate(xs)]

    def on_rank(transport: Transport) -> list[Tensor]:
        layer = tm.MoELayer(config, transport, generator=seeded())
        y = layer(xs[transport.rank], token_mask=masks[transport.rank])
        found = [y.detach(), transport.all_reduce(layer.aux_loss.detach(), "mean")]
        wrong = masks[0].long() if transport.rank == 0 else masks[1]
        with pytest.raises((TypeError, tm.TransportError)):
            layer(xs[transport.rank], token_mask=wrong)
        return found

    whole = tm.MoELayer(config, generator=seeded())
    expected = whole(torch.cat(xs), token_mask=torch.cat(masks))
    results = tm.run_on_emulated_ranks(on_rank, 2, timeout_s=20)
    torch.testing.assert_close(torch.cat([y for y, _ in results]), expected)
    for _, aux_loss in results:
        torch.testing.assert_close(aux_loss, whole.aux_loss)


def test_token_masks_that_are_refused() -> None:
    layer, x = tm.MoELayer(CONFIG, generator=seeded()), batch(num_tokens=6)
    for mask in (torch.ones(6), [True] * 6):
        with pytest.raises(TypeError, match="token_mask must be a bool tensor, True for tokens, got"):
            layer(x, token_mask=mask)
    with pytest.raises(ValueError, match=r"token_mask must be \(6,\), as x is without D, got \(5,\)"):
        layer(x, token_mask=torch.ones(5, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"whether it is a token, \(6,\) on cpu, got \(2, 3\) on cpu"):
        layer.router(x, torch.ones(2, 3, dtype=torch.bool))


def test_statistics() -> None:
    layer = tm.MoELayer(CONFIG, generator=seeded())
    layer(batch(num_tokens=50))
    statistics = layer.statistics()
    assert statistics.num_routed_pairs == 150
    ids = layer.last_routing.topk_ids
    assert statistics.load.tolist() == [int((ids == e).sum()) for e in range(12)]
    layer(batch(num_tokens=2))
    assert layer.statistics().num_routed_pairs == 6


class Tiled(torch.autograd.Function):
    """Runs chunks of a sequence without a graph, and again, with one, in backward: TiledMLP of other libraries."""

    @staticmethod
    def forward(ctx, layer: tm.MoELayer, x: Tensor) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x)
        return torch.cat([layer(chunk) for chunk in x.chunk(2)])

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[None, Tensor]:
        chunks = [chunk.detach().requires_grad_() for chunk in ctx.saved_tensors[0].chunk(2)]
        for chunk, dpart in zip(chunks, dy.chunk(2), strict=True):
            with torch.enable_grad():
                y = ctx.layer(chunk)
            y.backward(dpart)
        return None, torch.cat([chunk.grad for chunk in chunks])


@pytest.mark.parametrize(
    ("way", "num_calls"),
    [("depths", 2), ("chunks", 2), ("tiled", 2), ("checkpoint", 1), ("reentrant", 1), ("accumulated", 2)],
)
def test_what_a_step_of_several_calls_leaves(way: str, num_calls: int) -> None:
    """The last call's routing, and the load of all, recomputes left out."""
    config = replace(CONFIG, selection_bias=True, load_balance_loss_weight=0.1)
    layer = tm.MoELayer(config, generator=seeded())
    calls: list[Tensor] = []
    layer.router.register_forward_hook(lambda _, __, routing: calls.append(routing.topk_ids))
    x = batch(num_tokens=8).requires_grad_()
    if way == "depths":
        y = layer(layer(x))
    elif way == "chunks":
        y = torch.cat([layer(chunk) for chunk in x.chunk(2)])
    elif way == "tiled":
        y = Tiled.apply(layer, x)
    elif way == "accumulated":
        layer(x[:4]).sum().backward()
        y = layer(x[4:])
    else:
        y = checkpoint(layer, x, use_reentrant=way == "reentrant")
    left = layer.last_routing
    y.sum().backward()
    assert len(calls) > num_calls or way in ("depths", "chunks", "accumulated")
    assert layer.last_routing is left
    assert torch.equal(left.topk_ids, calls[num_calls - 1])
    assert layer.statistics().num_routed_pairs == calls[num_calls - 1].numel()
    assert layer.aux_loss.requires_grad == (way not in ("tiled", "reentrant"))
    expected = sum(ids.flatten().bincount(minlength=12) for ids in calls[:num_calls])
    assert torch.equal(layer.router.load, expected)


def test_statistics_are_those_of_this_rank() -> None:
    def on_rank(transport: Transport) -> int:
        layer = tm.MoELayer(CONFIG, transport, generator=seeded())
        layer(batch(transport.rank))
        return layer.statistics().num_routed_pairs

    assert tm.run_on_emulated_ranks(on_rank, 3) == [15, 27, 39]


@pytest.mark.parametrize("local_first", [True, False], ids=["local_first", "all_travel"])
def test_last_report(local_first: bool) -> None:
    def on_rank(transport: Transport):
        layer = tm.MoELayer(CONFIG, transport, tm.OverlapConfig(2, local_first), generator=seeded())
        assert layer.last_report is None
        y = layer(batch(transport.rank))
        assert layer.last_report.backward is None
        y.sum().backward()
        return layer.last_report, layer.last_routing.topk_ids

    reports, ids = zip(*tm.run_on_emulated_ranks(on_rank, 3, link=tm.LinkModel(1.0, latency_us=300)), strict=True)
    traffic = [[int((rows // 4 == k).any(1).sum()) for k in range(3)] for rows in ids]
    for rank, report in enumerate(reports):
        assert (report.rank, report.num_chunks, report.row_bytes) == (rank, 2, 32)
        assert report.traffic_rows.tolist() == traffic
        expected = [[32 * n if i != k else 0 for k, n in enumerate(row)] for i, row in enumerate(traffic)]
        assert report.traffic_bytes.tolist() == expected
        kinds = {t.step.kind for t in report.forward.steps}
        assert kinds == {"metadata", "dispatch", "group", "experts", "combine", "reduce"}
        assert {t.step.kind for t in report.backward.steps} >= {"combine_backward", "experts_backward", "weight_grad"}
        for timings in (report.forward, report.backward):
            assert 0 <= timings.exposed_communication_s <= timings.total_s
            assert 0 < timings.compute_s <= timings.total_s
            assert 0.0003 <= timings.communication_s <= timings.total_s
            assert all(0 <= t.start_s <= t.end_s <= timings.total_s for t in timings.steps)


def test_one_device_has_no_report() -> None:
    layer = tm.MoELayer(CONFIG)
    layer(batch())
    assert layer.last_report is None


def train(layer: nn.Module, xs: list[Tensor], num_ranks: int = 1, reduce=None, num_steps: int = 4) -> list[float]:
    """Plain SGD on a mean over all ranks' tokens; give the losses of this rank's share."""
    losses = []
    num_tokens = sum(len(x) for x in xs)
    for _ in range(num_steps):
        loss = torch.zeros((), dtype=torch.float64)
        for x in xs if reduce is None else xs[reduce[0] : reduce[0] + 1]:
            loss = loss + (layer(x) - x.flip(1)).square().sum() / num_tokens
        # Data parallel: each rank's loss counts W times, dense gradients are averaged, expert gradients divided by W.
        (loss * num_ranks).backward()
        with torch.no_grad():
            if reduce is not None:
                layer.router.weight.grad = reduce[1](layer.router.weight.grad) / num_ranks
                for parameter in layer.experts.parameters():
                    parameter.grad /= num_ranks
            for parameter in layer.parameters():
                parameter -= 0.5 * parameter.grad
                parameter.grad = None
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("num_chunks", [2, "auto"], ids=str)
def test_training_on_two_ranks_is_training_on_one(num_chunks) -> None:
    xs = [batch(rank, dtype=torch.float64) for rank in range(2)]
    whole = tm.MoELayer(CONFIG, generator=seeded(), dtype=torch.float64)
    expected = train(whole, xs)
    assert expected[-1] < expected[0]

    def on_rank(transport: Transport) -> list[float]:
        layer = tm.MoELayer(
            CONFIG,
            transport,
            tm.OverlapConfig(num_chunks),
            expert_gradients="sum",
            generator=seeded(),
            dtype=torch.float64,
        )
        return train(layer, xs, 2, (transport.rank, transport.all_reduce))

    shares = tm.run_on_emulated_ranks(on_rank, 2, timeout_s=20)
    assert [sum(step) for step in zip(*shares, strict=True)] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_activation_checkpointing(use_reentrant: bool) -> None:
    config = replace(CONFIG, load_balance_loss_weight=0.1, selection_bias=True)
    results = []
    for checkpointed in (False, True):
        layer = tm.MoELayer(config, generator=seeded())
        x = batch().requires_grad_()
        y = checkpoint(layer, x, use_reentrant=use_reentrant) if checkpointed else layer(x)
        loss = y.square().sum() + (0 if use_reentrant else layer.aux_loss)
        loss.backward()
        results.append([y.detach(), x.grad, *(p.grad for p in layer.parameters())])
        assert int(layer.router.load.sum()) == x.shape[0] * 3
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_activation_checkpointing_on_two_ranks() -> None:
    """The recompute is a call like any other: every rank makes it, in the order of the backwards."""

    def on_rank(transport: Transport) -> bool:
        results = []
        for checkpointed in (False, True):
            layers = [tm.MoELayer(CONFIG, transport, tm.OverlapConfig(2), generator=seeded(s)) for s in range(2)]
            x = batch(transport.rank).requires_grad_()
            y = x
            for layer in layers:
                y = y + (checkpoint(layer, y, use_reentrant=False) if checkpointed else layer(y))
            y.square().sum().backward()
            results.append([y.detach(), x.grad, *(p.grad for layer in layers for p in layer.parameters())])
        return all(torch.equal(a, b) for a, b in zip(*results, strict=True))

    assert tm.run_on_emulated_ranks(on_rank, 2, timeout_s=20) == [True, True]


@pytest.mark.parametrize(
    "kind",
    ["plain", "non-reentrant", "reentrant", pytest.param("compiled", marks=(compiles_in_threads, pytest.mark.slow))],
)
def test_load_balance_over_all_ranks(kind: str) -> None:
    """A step with it, in every way that a layer is run, is a step of one device with all tokens."""
    torch._dynamo.reset()
    config = replace(CONFIG, load_balance_loss_weight=3.0, load_balance_over="global", score_function="sigmoid")
    xs = [batch(rank, dtype=torch.float64) for rank in range(2)]

    def step(layer: tm.MoELayer, x: Tensor, kind: str, weight: int) -> tuple[Tensor, Tensor]:
        def call(x: Tensor) -> tuple[Tensor, Tensor]:
            y = layer(x)
            return y, layer.aux_loss

        x = x.clone().requires_grad_()
        if kind == "compiled":
            y, aux_loss = torch.compile(call, backend="aot_eager")(x)
        else:
            y, aux_loss = call(x) if kind == "plain" else checkpoint(call, x, use_reentrant=kind == "reentrant")
        (y.square().sum() + weight * aux_loss).backward()
        return aux_loss.detach(), x.grad

    def on_rank(transport: Transport) -> list[Tensor]:
        layer = tm.MoELayer(config, transport, tm.OverlapConfig(2), generator=seeded(), dtype=torch.float64)
        aux_loss, dx = step(layer, xs[transport.rank], kind, 1)
        return [transport.all_reduce(aux_loss, "mean"), dx, transport.all_reduce(layer.router.weight.grad)]

    results = tm.run_on_emulated_ranks(on_rank, 2, timeout_s=60)
    whole = tm.MoELayer(config, generator=seeded(), dtype=torch.float64)
    aux_loss, dx = step(whole, torch.cat(xs), "plain", len(xs))  # the sum over the ranks is W times the mean
    dx_of_ranks = torch.cat([result[1] for result in results])
    for mean_loss, _, router_grad in results:
        torch.testing.assert_close(mean_loss, aux_loss)
        torch.testing.assert_close(router_grad, whole.router.weight.grad)
    torch.testing.assert_close(dx_of_ranks, dx)


@pytest.mark.parametrize("odd", [{"load_balance_over": "rank"}, {"load_balance_loss_weight": 0.0}], ids=str)
def test_ranks_that_balance_over_other_tokens_hear_of_it(odd: dict) -> None:
    config = replace(CONFIG, load_balance_loss_weight=0.1, load_balance_over="global")

    def on_rank(transport: Transport) -> None:
        layer = tm.MoELayer(replace(config, **odd) if transport.rank else config, transport, generator=seeded())
        with pytest.raises(tm.TransportError):
            layer(layer(batch()))

    tm.run_on_emulated_ranks(on_rank, 2, timeout_s=2)


def test_the_selection_bias_of_ranks_is_that_of_one_device() -> None:
    config = replace(CONFIG, selection_bias=True)
    whole = tm.MoELayer(config, generator=seeded())
    whole(torch.cat([batch(rank) for rank in range(3)]))
    load = whole.router.update_selection_bias()

    def on_rank(transport: Transport) -> tuple[Tensor, Tensor]:
        layer = copy.deepcopy(tm.MoELayer(config, transport, generator=seeded()))
        layer(batch(transport.rank))
        return layer.router.update_selection_bias(), layer.router.e_score_correction_bias

    for summed, bias in tm.run_on_emulated_ranks(on_rank, 3):
        assert torch.equal(summed, load)
        assert torch.equal(bias, whole.router.e_score_correction_bias)


@pytest.mark.parametrize(
    ("wrap", "num_ranks"),
    [
        ("checkpoint_wrapper", None),
        ("checkpoint_wrapper", 2),
        ("compile", None),
        pytest.param("compile", 2, marks=compiles_in_threads),
    ],
)
def test_wrapped_experts(wrap: str, num_ranks: int | None) -> None:
    config = replace(CONFIG, shared_intermediate_size=4)

    def on_rank(transport: Transport | None = None) -> None:
        one_plan = tm.OverlapConfig(num_chunks=2)
        plain, wrapped = (tm.MoELayer(config, transport, one_plan, generator=seeded()) for _ in range(2))
        for name in ("experts", "shared_expert"):
            inside = getattr(wrapped, name)
            wrapper = checkpoint_wrapper(inside) if wrap != "compile" else torch.compile(inside, backend="eager")
            setattr(wrapped, name, wrapper)
        assert isinstance(wrapped.grouped_experts, tm.GroupedExperts)
        inputs = [batch(0).requires_grad_() for _ in range(2)]
        for layer, x in zip((plain, wrapped), inputs, strict=True):
            layer(x).square().sum().backward()
        assert torch.equal(inputs[0].grad, inputs[1].grad)
        for expected, actual in zip(plain.parameters(), wrapped.parameters(), strict=True):
            assert torch.equal(actual.grad, expected.grad)

    on_rank() if num_ranks is None else tm.run_on_emulated_ranks(on_rank, num_ranks, timeout_s=60)


def test_what_is_no_wrapper_of_experts() -> None:
    layer = tm.MoELayer(CONFIG)
    layer.experts = nn.Sequential(layer.experts)
    with pytest.raises(TypeError, match="a Sequential has taken the place of a MoELayer's experts"):
        layer(batch(0))


def test_a_copy_of_a_router_alone_holds_no_experts() -> None:
    """PEFT's modules_to_save makes one."""

    def on_rank(transport: Transport) -> None:
        layer = tm.MoELayer(replace(CONFIG, selection_bias=True), transport, generator=seeded())
        router = copy.deepcopy(layer.router)
        router(batch(transport.rank))
        layer.router(batch(transport.rank))
        assert torch.equal(router.update_selection_bias(), layer.router.update_selection_bias())
        assert not isinstance(getattr(router.reduce_load, "__self__", None), nn.Module)

    tm.run_on_emulated_ranks(on_rank, 2)


def test_load_balance_over_needs_to_be_known() -> None:
    with pytest.raises(ValueError, match="load_balance_over must be 'rank' or 'global', got 'node'"):
        replace(CONFIG, load_balance_over="node")


def test_state_dict_of_one_device_loads_on_ranks_by_slicing() -> None:
    whole = tm.MoELayer(replace(CONFIG, bias=True), generator=seeded())
    state = whole.state_dict()

    def on_rank(transport: Transport) -> bool:
        layer = tm.MoELayer(replace(CONFIG, bias=True), transport, generator=seeded(5))
        mine = {
            name: value[6 * transport.rank : 6 * transport.rank + 6] if name.startswith("experts.") else value
            for name, value in state.items()
        }
        layer.load_state_dict(mine)
        x = batch()
        return torch.allclose(layer(x), whole(x), atol=1e-6)

    with torch.no_grad():
        assert tm.run_on_emulated_ranks(on_rank, 2, timeout_s=20) == [True, True]


def test_compiled_layer_gives_the_same_numbers() -> None:
    """torch.compile breaks its graph inside, and must not change a value."""
    layer = tm.MoELayer(tm.MoEConfig(hidden_size=32, intermediate_size=16, num_experts=6, top_k=2))
    x = torch.randn(21, 32, requires_grad=True)
    expected = layer(x)
    (expected_grad,) = torch.autograd.grad(expected.square().sum(), x)
    compiled = torch.compile(layer, backend="aot_eager")
    for _ in range(2):
        y = compiled(x)
        (grad,) = torch.autograd.grad(y.square().sum(), x)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(grad, expected_grad)


def test_a_copy_of_a_layer_after_a_step() -> None:
    layer = tm.MoELayer(tm.MoEConfig(hidden_size=8, intermediate_size=4, num_experts=2, top_k=1))
    x = torch.randn(5, 8)
    layer(x).sum().backward()
    duplicate = copy.deepcopy(layer)
    torch.testing.assert_close(duplicate(x), layer(x), rtol=0, atol=0)


def test_repr_says_sizes_ranks_and_backend() -> None:
    config = replace(CONFIG, transposed=True, shared_intermediate_size=5, load_balance_loss_weight=0.5)
    assert repr(tm.MoELayer(config, backend="reference", check="now")).split("\n")[1:-1] == [
        "  load_balance_loss_weight=0.5, check=now",
        "  (router): TopKRouter(hidden_size=8, num_experts=12, top_k=3, softmax)",
        "  (experts): GroupedExperts(hidden_size=8, intermediate_size=6; num_experts=12, top_k=3; "
        "silu, gated, transposed; backend=reference)",
        "  (shared_expert): SharedExpert(hidden_size=8, intermediate_size=5; silu, gated)",
    ]
    said = tm.run_on_emulated_ranks(lambda t: repr(tm.GroupedExperts(replace(CONFIG, gated=False), t)), 3)
    assert "experts 4 to 7 on rank 1 of 3, EmulatedTransport" in said[1]
    assert "silu, ungated" in said[1]
    placement = tm.ExpertPlacement(((1, *range(2, 7)), (0, *range(7, 12))))
    said = tm.run_on_emulated_ranks(lambda t: repr(tm.GroupedExperts(CONFIG, t, placement=placement)), 2)
    assert "experts 0, 7, 8, 9, 10, 11 on rank 1 of 2" in said[1]


def test_meta_device_and_to_empty() -> None:
    """Every module with weights of its own can draw them, as whoever materialises a model asks it to."""
    config = replace(CONFIG, bias=True, selection_bias=True, shared_intermediate_size=5)
    layer = tm.MoELayer(config, device="meta")
    assert layer(torch.randn(4, 8, device="meta")).is_meta
    assert layer(torch.randn(4, 8, device="meta")).is_meta
    layer.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*layer.parameters(), *layer.buffers()):
            tensor.fill_(99)
    for module in layer.modules():
        if any(True for _ in module.parameters(recurse=False)):
            module.reset_parameters()
    assert all((tensor.abs() < 10).all() for tensor in (*layer.parameters(), *layer.buffers()))
    layer(batch()).sum().backward()


def test_assigning_a_state_dict_to_a_meta_layer() -> None:
    """What is not in it must not stay on the meta device, where counts are lost without a word."""
    config = replace(CONFIG, selection_bias=True)
    source = tm.MoELayer(config, generator=seeded())
    state = source.state_dict()
    state["router.e_score_correction_bias"] = state["router.e_score_correction_bias"].bfloat16()
    layer = tm.MoELayer(config, device="meta")
    layer.load_state_dict(state, assign=True)
    assert layer.router.e_score_correction_bias.dtype == torch.float32
    assert torch.equal(layer(batch()), source(batch()))
    assert int(layer.router.load.sum()) == 5 * 3
    assert torch.equal(layer.router.update_selection_bias(), source.router.update_selection_bias())


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_have_the_bits_of_the_layer(way: str) -> None:
    config = replace(CONFIG, selection_bias=True, shared_intermediate_size=5, load_balance_loss_weight=0.1)
    for transport in (None, LocalTransport()):
        layer = tm.MoELayer(config, transport, check="now")
        layer(batch()).sum().backward()
        file = io.BytesIO()
        if way == "torch.save":
            torch.save(layer, file)
            file.seek(0)
        copies = {
            "deepcopy": lambda layer=layer: copy.deepcopy(layer),
            "pickle": lambda layer=layer: pickle.loads(pickle.dumps(layer)),
            "torch.save": lambda file=file: torch.load(file, weights_only=False),
        }
        duplicate = copies[way]()
        assert torch.equal(duplicate(batch()), layer(batch()))
        duplicate.router.weight.data.zero_()
        assert layer.router.weight.any()
        assert repr(duplicate) == repr(layer)


def test_parametrised_and_tied_weights() -> None:
    class Halved(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight / 2

    first, second, plain = (tm.MoELayer(CONFIG, generator=seeded()) for _ in range(3))
    second.experts.gate_up_proj = first.experts.gate_up_proj
    (first(batch()) + second(batch())).square().sum().backward()
    (2 * plain(batch())).square().sum().backward()
    torch.testing.assert_close(first.experts.gate_up_proj.grad, plain.experts.gate_up_proj.grad)
    plain.zero_grad()
    halved = tm.MoELayer(CONFIG, generator=seeded())
    nn.utils.parametrize.register_parametrization(halved.experts, "gate_up_proj", Halved())
    with torch.no_grad():
        plain.experts.gate_up_proj /= 2
    y = halved(batch())
    assert torch.equal(y, plain(batch()))
    y.sum().backward()
    plain(batch()).sum().backward()
    original = halved.experts.parametrizations.gate_up_proj.original
    torch.testing.assert_close(original.grad, plain.experts.gate_up_proj.grad / 2)


@pytest.mark.parametrize("how", ["parametrization", "pruning"])
def test_computed_weights_are_not_spread(how: str) -> None:
    layers = nn.ModuleList(tm.MoELayer(CONFIG, generator=seeded()) for _ in range(2))
    experts = layers[1].experts
    if how == "parametrization":
        nn.utils.parametrize.register_parametrization(experts, "down_proj", nn.Identity())
    else:
        prune.identity(experts, "down_proj")
    before = dict(layers.named_parameters())
    with pytest.raises(ValueError, match=r"down_proj of 1\.experts is computed from other parameters"):
        tm.parallelize(layers, LocalTransport())
    assert all(layer.experts.transport is None for layer in layers)
    assert all(parameter is before[name] for name, parameter in layers.named_parameters())
    if how == "parametrization":
        nn.utils.parametrize.remove_parametrizations(experts, "down_proj")
    else:
        prune.remove(experts, "down_proj")
    assert tm.parallelize(layers, LocalTransport()) == 2


@pytest.mark.parametrize("how", ["weight_norm", "older weight_norm", "pruning"])
def test_computed_weights_are_not_drawn(how: str) -> None:
    """The values would be lost at the next call."""
    compute = {
        "weight_norm": nn.utils.parametrizations.weight_norm,
        "older weight_norm": nn.utils.weight_norm,
        "pruning": prune.identity,
    }[how]
    layer = tm.MoELayer(replace(CONFIG, shared_intermediate_size=6), generator=seeded())
    for module, name in ((layer.router, "weight"), (layer.experts, "down_proj"), (layer.shared_expert, "gate_up_proj")):
        compute(module, name)
        before = {name: parameter.clone() for name, parameter in module.named_parameters()}
        with pytest.raises(ValueError, match=f"{name} of .* is computed from other parameters .* reset_parameters"):
            module.reset_parameters()
        assert all(torch.equal(parameter, before[name]) for name, parameter in module.named_parameters())


def test_hooks_frozen_layers_and_inference_mode() -> None:
    layer = tm.MoELayer(replace(CONFIG, load_balance_loss_weight=0.1), generator=seeded())
    expected = layer(2 * batch()).detach()
    seen: list[tuple[str, tuple[int, ...]]] = []
    layer.register_forward_pre_hook(lambda _, inputs: (2 * inputs[0],))
    layer.experts.register_forward_hook(lambda _, inputs, y: seen.append(("forward", tuple(y.shape))))
    layer.register_full_backward_hook(lambda _, dx, dy: seen.append(("backward", tuple(dx[0].shape))))
    layer.experts.register_full_backward_hook(lambda _, dx, dy: seen.append(("experts", tuple(dx[0].shape))))
    x = batch().requires_grad_()
    y = layer(x)
    assert torch.equal(y, expected)
    y.sum().backward()
    assert seen == [(name, (5, 8)) for name in ("forward", "experts", "backward")]
    with torch.inference_mode():
        assert torch.equal(layer(batch()), expected)
    layer(batch().requires_grad_()).sum().backward()  # what inference left does no harm
    layer.requires_grad_(False)
    assert not layer(batch()).requires_grad
    assert not layer.aux_loss.requires_grad


def test_state_dicts_of_ranks_that_torch_does_not_know_are_not_gathered():
    def on_rank(transport: Transport) -> None:
        with pytest.raises(ValueError, match=r"not torch\.distributed's.*state_dict\(\) has only this rank's"):
            tm.gather_state_dicts(nn.Sequential(tm.MoELayer(CONFIG, transport)))

    tm.run_on_emulated_ranks(on_rank, 2, timeout_s=20)
