"""record_routing() and replay_routing(): every token goes where it was recorded, with the model's own weights."""

import copy
import importlib.util
from collections.abc import Callable

import pytest
import test_families
import torch
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM

import tritonmoe as tm
from tritonmoe.integrations.transformers import record_routing, register, replay_routing, upcycle
from tritonmoe.integrations.transformers.discovery import experts_modules
from tritonmoe.routing import RoutingRecording, save_topk

VERSION = tuple(int(number) for number in transformers.__version__.split(".")[:2])

FIRST_TIER = {"mixtral", "gpt_oss", "deepseek_v2", "deepseek_v3"}
REPLAYED = tuple(family for family in test_families.QUICK if family != "phimoe")
LAYERS = ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]

register()


def batch(num_sequences: int = 2, length: int = 9, seed: int = 1) -> Tensor:
    return torch.randint(2, 64, (num_sequences, length), generator=torch.Generator().manual_seed(seed))


def random_ids(num_tokens: int, num_experts: int = 6, top_k: int = 2, seed: int = 0) -> Tensor:
    """Ids that no router would choose, so that a replay can't be right by chance."""
    scores = torch.rand(num_tokens, num_experts, generator=torch.Generator().manual_seed(seed))
    return scores.topk(top_k, dim=1).indices


def random_recording(*num_tokens: int, layers: list[str] = LAYERS, seed: int = 0) -> RoutingRecording:
    recording = RoutingRecording()
    for call, tokens in enumerate(num_tokens):
        for number, layer in enumerate(layers):
            recording.add(layer, random_ids(tokens, seed=100 * seed + 10 * call + number), 6)
    return recording


def ids_of(recording: RoutingRecording) -> list[list]:
    return [layer.topk_ids.tolist() for layer in recording.layers.values()]


def num_other(recording: RoutingRecording, ids: Tensor) -> int:
    """Of how many of these pairs the experts are not among those that were recorded of the layer."""
    (own,) = recording.layers.values()
    return sum(len({*row} - {*chosen}) for row, chosen in zip(ids.tolist(), own.topk_ids.tolist(), strict=True))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            actual[name], expected[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


# Families


def check_family(family: str) -> None:
    if family not in test_families.REACHED:
        pytest.skip(f"transformers {transformers.__version__} doesn't reach the experts of {family}")
    model, ids = test_families.make_model(family).eval(), batch(8, 128)
    with record_routing(model) as recording:
        loss = model(input_ids=ids, labels=ids).loss
    with replay_routing(model, recording) as counts:
        assert torch.equal(model(input_ids=ids, labels=ids).loss, loss)
    assert counts.num_replayed_tokens == ids.numel() * len(recording.layers)
    assert (counts.num_pairs > 0, counts.num_changed_pairs) == (True, 0)
    noisy = copy.deepcopy(model).bfloat16()
    with record_routing(noisy) as own, torch.no_grad():
        noisy(input_ids=ids)
    with replay_routing(noisy, recording) as counts, record_routing(noisy) as replayed:
        noisy(input_ids=ids, labels=ids).loss.backward()
    assert 0 < counts.num_changed_pairs / counts.num_pairs < 0.1
    before, after = recording.agreement(own), recording.agreement(replayed)
    print(family, {layer: f"{share:.2%} -> {after[layer]:.0%}" for layer, share in before.items()})
    assert 0.9 < min(before.values()) < 1
    assert ids_of(replayed) == ids_of(recording)
    assert set(after.values()) == {1.0}
    routers = [p for name, p in noisy.named_parameters() if p.dim() == 2 and p.shape[0] == 6 and "experts" not in name]
    assert routers
    assert all(router.grad.norm() > 0 for router in routers)


@pytest.mark.parametrize(
    "family",
    [pytest.param(family, marks=() if family in FIRST_TIER else pytest.mark.thorough) for family in REPLAYED],
)
def test_bf16_chooses_other_experts_and_a_replay_does_not(family):
    check_family(family)


@pytest.mark.slow
@pytest.mark.parametrize("family", test_families.SLOW)
def test_more_families(family):
    check_family(family)


@pytest.mark.skipif("phimoe" not in test_families.REACHED, reason="its experts ask no registry")
def test_a_router_without_topk_is_refused():
    model = test_families.make_model("phimoe").eval()
    with (
        pytest.raises(
            ValueError, match=r"model\.layers\.0\.mlp\.experts got other ids than the recorded ones: its router"
        ),
        replay_routing(model, random_recording(18)),
    ):
        model(batch())
    with record_routing(model) as recording:
        logits = model(batch()).logits
    with replay_routing(model, recording):  # the same ids by themselves
        assert torch.equal(model(batch()).logits, logits)


@pytest.mark.parametrize("context", [torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize(
    "shift",
    [lambda ids: (ids + 1) % 6, lambda ids: ids.add_(1).remainder_(6), lambda ids: ids.flip(1)],
    ids=["another", "in_place", "order"],
)
def test_ids_changed_behind_the_topk_are_refused(shift, context):
    model = test_families.make_model("mixtral")
    shifted = model.model.layers[1].mlp.gate.register_forward_hook(
        lambda _, __, result: (*result[:2], shift(result[2]))
    )
    with (
        context(),
        pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.experts got other ids .* or changes the ids"),
        replay_routing(model, random_recording(18)),
    ):
        model(batch())
    shifted.remove()
    model.set_experts_implementation("tritonmoe")  # eager takes int64 only
    model.model.layers[1].mlp.gate.register_forward_hook(lambda _, __, result: (*result[:2], result[2].int()))
    with context(), replay_routing(model, random_recording(18)):  # other tensors of the same ids are fine
        model(batch())


# Weights and gradients


def softmax_weights(logits: Tensor, ids: Tensor) -> Tensor:
    weights = logits.softmax(dim=1).gather(1, ids)
    return weights / weights.sum(dim=1, keepdim=True)


def sigmoid_weights(logits: Tensor, ids: Tensor) -> Tensor:
    weights = logits.sigmoid().gather(1, ids)
    return 2.5 * weights / (weights.sum(dim=1, keepdim=True) + 1e-20)


def plain_weights(logits: Tensor, ids: Tensor) -> Tensor:
    return logits.softmax(dim=1).gather(1, ids)


@pytest.mark.parametrize(
    ("family", "settings", "weigh"),
    [
        ("mixtral", {}, softmax_weights),
        ("deepseek_v3", {"n_group": 3, "topk_group": 2, "routed_scaling_factor": 2.5}, sigmoid_weights),
        pytest.param(
            "deepseek_v2",
            {"n_group": 3, "topk_group": 2, "topk_method": "group_limited_greedy"},
            plain_weights,
            marks=pytest.mark.skipif(VERSION < (5, 17), reason="its own group-limited routing raises in 5.7"),
        ),
    ],
)
def test_weights_and_gradients_are_those_of_the_own_scores(family, settings, weigh, monkeypatch):
    if family not in test_families.REACHED:
        pytest.skip(f"transformers {transformers.__version__} doesn't reach the experts of {family}")
    monkeypatch.setitem(test_families.OWN, family, {**test_families.OWN.get(family, {}), **settings})
    layer = test_families.make_model(family).model.layers[1]
    block, ids = layer.mlp, random_ids(18)
    recording = RoutingRecording()
    recording.add("mlp.experts", ids, 6)
    x = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(5)).requires_grad_()
    dout = torch.randn(x.shape, generator=torch.Generator().manual_seed(6))
    with record_routing(layer) as own, torch.no_grad():
        block(x)
    with replay_routing(layer, recording) as counts:
        out = block(x)
    assert (counts.num_replayed_tokens, counts.num_pairs) == (18, 36)
    assert counts.num_changed_pairs == num_other(own, ids)
    out.backward(dout)
    actual = {"out": out.detach(), "x": x.grad.clone(), **gradients(block)}
    x.grad = None
    rows = x.flatten(0, 1)
    expected_out = block.experts(rows, ids, weigh(nn.functional.linear(rows, block.gate.weight), ids)).view(x.shape)
    if hasattr(block, "shared_experts"):
        expected_out = expected_out + block.shared_experts(x)
    expected_out.backward(dout)
    expected = {"out": expected_out.detach(), "x": x.grad, **gradients(block)}
    assert expected["gate.weight"].norm() > 1e-2
    assert_close(actual, expected)


@pytest.mark.parametrize("implementation", ["tritonmoe", "eager", "grouped_mm"])
def test_every_implementation_gets_the_recorded_ids(implementation):
    model = test_families.make_model("mixtral")
    model.set_experts_implementation(implementation)
    recording = random_recording(18, 18)
    with replay_routing(model, recording), record_routing(model, weights=True) as replayed:
        model(batch())
        model(batch(seed=2))
    assert ids_of(replayed) == ids_of(recording)
    assert replayed.num_tokens == [18, 18]
    weights = replayed.layers[LAYERS[0]].topk_weights
    assert weights.shape == (36, 2)
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(36))
    own = model(batch()).logits  # the context has ended
    with record_routing(model) as recording:
        assert torch.equal(model(batch()).logits, own)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("selection_bias", [False, True])
def test_layers_of_our_own(selection_bias):
    torch.manual_seed(0)
    config = tm.MoEConfig(16, 16, num_experts=6, top_k=2, num_expert_groups=3, top_k_groups=2, renormalize=True)
    if selection_bias:
        config = tm.MoEConfig(16, 16, num_experts=6, top_k=2, selection_bias=True, score_function="sigmoid")
    layer, x = tm.MoELayer(config), torch.randn(10, 16)
    recording = RoutingRecording()
    recording.add("experts", random_ids(10), 6)
    with record_routing(layer) as own:
        layer(x)
    with replay_routing(layer, recording) as counts:
        layer(x)
    assert counts.num_changed_pairs == num_other(own, random_ids(10)) > 0
    assert torch.equal(layer.last_routing.topk_ids, random_ids(10))
    scores = layer.last_routing.scores.gather(1, random_ids(10))
    torch.testing.assert_close(layer.last_routing.topk_weights, scores / scores.sum(dim=1, keepdim=True))


def test_tokens_without_finite_scores_say_so_themselves():
    layer, x = tm.MoELayer(tm.MoEConfig(16, 16, num_experts=6, top_k=2)), torch.randn(10, 16)
    x[3] = float("nan")
    recording = RoutingRecording()
    recording.add("experts", random_ids(10), 6)
    with replay_routing(layer, recording):
        layer(x)
    is_skipped = torch.arange(10).unsqueeze(1) == 3
    assert torch.equal(layer.last_routing.topk_ids, random_ids(10).masked_fill(is_skipped, -1))
    with pytest.raises(tm.NonFiniteScores):
        layer(x)


def test_padding_that_a_mask_names_is_not_recorded(tmp_path):
    torch.manual_seed(0)
    layer, x = tm.MoELayer(tm.MoEConfig(16, 16, num_experts=6, top_k=2)), torch.randn(2, 5, 16)
    mask = torch.tensor([[True, True, True, False, False], [True] * 5])
    with record_routing(layer, weights=True, path=tmp_path / "routing.pt") as recording:
        y = layer(x, token_mask=mask)
        ids = layer.last_routing.topk_ids
        layer(x[1:])
    recorded = recording.layers["experts"]
    assert recorded.is_recorded.tolist() == [*mask.flatten().tolist(), *[True] * 5]
    assert torch.equal(recorded.topk_ids[:10].long(), ids.clamp(min=0))
    again = RoutingRecording.load(tmp_path / "routing.pt")
    assert again.layers["experts"].is_recorded.tolist() == recorded.is_recorded.tolist()
    with replay_routing(layer, again) as counts:
        assert torch.equal(layer(x, token_mask=mask), y)
        layer(x[1:])
    assert (counts.num_replayed_tokens, counts.num_pairs, counts.num_changed_pairs) == (13, 26, 0)
    with record_routing(layer) as whole:
        layer(x)
    assert whole.layers["experts"].is_recorded is None
    x[0, 0] = float("nan")
    with pytest.raises(ValueError, match="router had NaN scores"), record_routing(layer):
        layer(x, token_mask=mask)


def test_every_rank_hears_of_a_recording_that_does_not_fit():
    def run(transport: tm.transports.Transport) -> str:
        torch.manual_seed(0)
        layer = tm.MoELayer(tm.MoEConfig(16, 16, num_experts=6, top_k=2), transport)
        recording, own = RoutingRecording(), 10 + transport.rank
        recording.add("experts", random_ids(own), 6)
        with replay_routing(layer, recording):
            layer(torch.randn(own, 16)).sum().backward()
        assert torch.equal(layer.last_routing.topk_ids, random_ids(own))
        try:
            with replay_routing(layer, recording):
                layer(torch.randn(11, 16))
        except (ValueError, tm.TransportError) as error:
            return str(error)
        return ""

    first, second = tm.run_on_emulated_ranks(run, num_ranks=2)
    assert first.startswith("call 0 of experts was recorded with 10 tokens and 2 ids each, and this forward has 11")
    assert "ranks [0] refused the arguments of this layer call" in second


def test_models_upcycled_in_place():
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
    model = upcycle(AutoModelForCausalLM.from_config(config), 6, 2)
    layers = [f"transformer.h.{number}.mlp.c_fc.experts" for number in range(2)]
    recording = random_recording(18, layers=layers)
    with replay_routing(model, recording), record_routing(model) as replayed:
        model(batch(), labels=batch()).loss.backward()
    assert list(replayed.layers) == layers
    assert ids_of(replayed) == ids_of(recording)
    assert model.transformer.h[0].mlp.c_fc.router.weight.grad.norm() > 0


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="PEFT is not installed")
@pytest.mark.parametrize(
    "targets",
    [
        {"target_modules": ["q_proj"]},
        {"target_parameters": ["down_proj"]},
        *({"target_modules": ["q_proj"], "modules_to_save": [name]} for name in ("gate", "experts", "mlp")),
    ],
)
def test_adapted_models_take_recordings_of_plain_ones(targets):
    from peft import LoraConfig, get_peft_model

    model = test_families.make_model("mixtral")
    with record_routing(model) as recording:
        model(batch())
    adapted = get_peft_model(model, LoraConfig(r=2, **targets))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora" in name:
                parameter.normal_(std=0.3)
    with record_routing(adapted) as own:
        adapted(input_ids=batch())
    with replay_routing(adapted, recording), record_routing(adapted) as replayed:
        adapted(input_ids=batch(), labels=batch()).loss.backward()
    assert list(own.layers) == LAYERS
    assert recording.agreement(own)[LAYERS[1]] < 1
    assert ids_of(replayed) == ids_of(recording)


# The order of calls


CHECKPOINTS = {
    "non_reentrant": {"use_reentrant": False},
    "reentrant": {"use_reentrant": True},
    "save_topk": {"use_reentrant": False, "context_fn": save_topk},
}


@pytest.mark.parametrize("is_inside", [True, False], ids=["inside", "behind"])
@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_a_recompute_takes_the_ids_of_its_forward(kind, is_inside):
    model = test_families.make_model("qwen3_moe").train()
    model.enable_input_require_grads()
    recording = random_recording(18, 18)

    def losses() -> tuple[Tensor, Tensor]:
        first, second = (model(input_ids=batch(seed=seed), labels=batch(seed=seed)).loss for seed in (1, 2))
        return first, second

    with replay_routing(model, recording):
        first, second = losses()
        (first + 3 * second).backward()
    expected = gradients(model)
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(CHECKPOINTS[kind])
    for order in (1, -1):
        with replay_routing(model, recording), record_routing(model) as replayed:
            first, second = losses()
            if is_inside:
                for loss in (first, 3 * second)[::order]:
                    loss.backward()
        if not is_inside:
            model(input_ids=batch(seed=3))  # of no replay any more
            for loss in (first, 3 * second)[::order]:
                loss.backward(retain_graph=kind != "reentrant")
            if kind != "reentrant":
                gradients(model)
                (first + 3 * second).backward()
        assert replayed.num_tokens == [18, 18]
        assert_close(gradients(model), expected)
        del first, second, loss
        model(input_ids=batch(seed=3), labels=batch(seed=3)).loss.backward()
        gradients(model)
        assert not any(module._forward_pre_hooks for module in model.model.layers.modules())


def test_a_checkpoint_inside_another_is_refused():
    layer = tm.MoELayer(tm.MoEConfig(16, 16, num_experts=6, top_k=2))
    recording = RoutingRecording()
    recording.add("experts", random_ids(10), 6)
    for outer, inner in ((False, False), (True, False), (False, True), (True, True)):

        def run(x: Tensor, inner: bool = inner) -> Tensor:
            return checkpoint(layer, x, use_reentrant=inner)

        def step(run: Callable[[Tensor], Tensor] = run, outer: bool = outer) -> None:
            with replay_routing(layer, recording):
                out = checkpoint(run, torch.randn(10, 16, requires_grad=True), use_reentrant=outer)
            out.sum().backward()

        with pytest.raises(ValueError, match="experts stands in a checkpoint inside another one"):
            step()


def test_tensors_saved_on_the_cpu_hide_no_checkpoint():
    torch.manual_seed(0)
    layer, x = tm.MoELayer(tm.MoEConfig(16, 16, num_experts=6, top_k=2)), torch.randn(10, 16, requires_grad=True)
    recording = RoutingRecording()
    recording.add("experts", random_ids(10), 6)

    def run(x: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return layer(x)

    found = []
    for function in (run, lambda x: checkpoint(run, x, use_reentrant=False)):
        with replay_routing(layer, recording):
            out = function(x)
        out.square().sum().backward()
        found.append({"x": x.grad, **gradients(layer)})
        x.grad = None
    assert_close(found[1], found[0])


def test_a_recompute_of_a_forward_before_the_replay_is_refused():
    model = test_families.make_model("mixtral").train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    loss = model(input_ids=batch(), labels=batch()).loss
    with (
        pytest.raises(ValueError, match=r"recomputes a forward of .* of which the replay knows nothing"),
        replay_routing(model, random_recording(18)),
    ):
        loss.backward()


def test_generated_tokens_are_trained_on_in_other_layouts():
    model = test_families.make_model("qwen3_moe").eval()
    prompts, mask = batch(2, 5), torch.ones(2, 5, dtype=torch.int64)
    mask[1, :2] = 0  # padded on the left
    with record_routing(model) as rollout:
        tokens = model.generate(prompts, attention_mask=mask, max_new_tokens=4, do_sample=False)
    assert rollout.num_tokens == [10, 2, 2, 2]  # the last token was never an input
    index = torch.cat([rollout.token_index(2), torch.full((2, 1), -1)], dim=1)
    noisy = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in noisy.parameters():
            parameter += (
                0.3 * parameter.std() * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
            )
    ids = [layer.topk_ids for layer in rollout.layers.values()]

    right_index = torch.stack([index[0], torch.cat([index[1, 2:], torch.full((2,), -1)])])
    right_tokens = torch.stack([tokens[0], torch.cat([tokens[1, 2:], torch.zeros(2, dtype=torch.int64)])])
    right_mask = torch.tensor([[1] * 9, [1] * 7 + [0] * 2])
    packed_index = torch.cat([index[0], index[1, 2:]])
    packed_tokens = torch.cat([tokens[0], tokens[1, 2:]]).unsqueeze(0)
    positions = torch.cat([torch.arange(9), torch.arange(7)]).unsqueeze(0)
    for new, inputs in (
        (right_index, {"input_ids": right_tokens, "attention_mask": right_mask}),
        (packed_index, {"input_ids": packed_tokens, "position_ids": positions}),
    ):
        recording, flat = rollout.rearranged(new), new.flatten()
        with replay_routing(noisy, recording), record_routing(noisy) as replayed:
            noisy(**inputs)
        with record_routing(noisy) as own:
            noisy(**inputs)
        assert set(recording.agreement(replayed).values()) == {1.0}
        assert min(recording.agreement(own).values()) < 1
        for layer, recorded in zip(replayed.layers.values(), ids, strict=True):
            assert torch.equal(layer.topk_ids[flat >= 0], recorded[flat[flat >= 0]])
        first, first_own = replayed.layers[LAYERS[0]].topk_ids, own.layers[LAYERS[0]].topk_ids
        assert torch.equal(first[flat < 0], first_own[flat < 0])  # they chose by themselves


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_a_rollout_as_engines_return_it_is_replayed(family):
    """Ids that no router would choose, in the form of an engine, are those of the replay, and its logits theirs."""
    model = test_families.make_model(family).eval()
    tokens, mask = batch(2, 9), torch.ones(2, 9, dtype=torch.int64)
    mask[1, :3] = 0  # padded on the left
    with record_routing(model) as own, torch.no_grad():
        expected_logits = model(tokens, attention_mask=mask).logits
    is_dense = family == "deepseek_v3"  # its first layer, which vLLM fills with zeros
    layers = list(own.layers)
    ids = [torch.stack([random_ids(n, seed=10 * n + k) for k in range(len(layers))], dim=1) for n in (8, 5)]
    dense = [rows.new_zeros(len(rows), 1, 2) for rows in ids]
    engine = [torch.cat([zeros, rows], dim=1) if is_dense else rows for zeros, rows in zip(dense, ids, strict=True)]
    routed_experts = [engine[0].to(torch.int16).numpy(), [engine[1][:2], engine[1][2:]]]
    has_experts = [False, True] if is_dense else None
    recording = RoutingRecording.from_rollout(routed_experts, mask, own, has_experts=has_experts)
    with replay_routing(model, recording), record_routing(model) as replayed, torch.no_grad():
        logits = model(tokens, attention_mask=mask).logits
    for number, layer in enumerate(replayed.layers.values()):
        assert layer.topk_ids[:8].tolist() == ids[0][:, number].tolist()
        assert layer.topk_ids[12:17].tolist() == ids[1][:, number].tolist()

    forced = RoutingRecording()  # the same by hand
    for number, name in enumerate(layers):
        chosen = replayed.layers[name].topk_ids.clone()
        chosen[:8], chosen[12:17] = ids[0][:, number], ids[1][:, number]
        forced.add(name, chosen, 6)
    with replay_routing(model, forced), torch.no_grad():
        assert torch.equal(model(tokens, attention_mask=mask).logits, logits)
    assert not torch.allclose(logits, expected_logits, atol=1e-2)


def test_a_shifted_rollout_is_refused_by_the_models_own_choice():
    model = test_families.make_model("qwen3_moe").eval()
    tokens = batch(4, 20)
    rollout_model = copy.deepcopy(model).bfloat16()
    with record_routing(rollout_model) as rollout, torch.no_grad():
        rollout_model(tokens)
    with record_routing(model) as own, torch.no_grad():
        model(tokens)
    rows = torch.stack([layer.topk_ids for layer in rollout.layers.values()], dim=1).view(4, 20, 2, 2)
    mask = torch.ones_like(tokens)
    RoutingRecording.from_rollout(list(rows[:, :-1]), mask, own)
    with pytest.raises(ValueError, match="those of the token after, so the rows are shifted by one"):
        RoutingRecording.from_rollout(list(rows[:, 1:]), mask, own)
    with pytest.raises(ValueError, match=r"must have 19 rows of routed_experts .*, got 18"):
        RoutingRecording.from_rollout(list(rows[:, 1:-1]), mask, own)


# What is refused


def test_mismatches_are_refused_before_the_experts_run(monkeypatch):
    model = test_families.make_model("mixtral")
    ran = []
    for experts in experts_modules(model).values():
        experts.register_forward_hook(lambda *_: ran.append(1))

    def replay(recording: RoutingRecording, num_forwards: int) -> None:
        with replay_routing(model, recording):
            for _ in range(num_forwards):
                model(batch())

    def refused(match: str, recording: RoutingRecording, num_forwards: int = 1) -> None:
        with pytest.raises(ValueError, match=match):
            replay(recording, num_forwards)

    refused(
        r"call 0 of model\.layers\.0\.mlp\.experts was recorded with 17 tokens and 2 .* 18 tokens", random_recording(17)
    )
    other_k = RoutingRecording()
    other_e = RoutingRecording()
    for layer in LAYERS:
        other_k.add(layer, random_ids(18, top_k=3), 6)
        other_e.add(layer, random_ids(18, 5), 5)
    refused("18 tokens and 3 ids each, and this forward has 18 tokens and 2 ids", other_k)
    refused(r"same experts: model\.layers\.0\.mlp\.experts has 6 in this MixtralForCausalLM, and 5", other_e)
    refused(
        "MixtralForCausalLM has no model.layers.2.mlp.experts",
        random_recording(18, layers=[*LAYERS, "model.layers.2.mlp.experts"]),
    )
    refused(r"the recording has no model\.layers\.1\.mlp\.experts", random_recording(18, layers=LAYERS[:1]))
    assert not ran
    refused("has 1 calls of model.layers.0.mlp.experts, and this is one more", random_recording(18), 2)
    refused(r"has 3 calls of .*, and 2 were replayed: run as many forwards", random_recording(18, 18, 18), 2)
    assert len(ran) == 6
    with pytest.raises(TypeError, match="must be a RoutingRecording, got dict"), replay_routing(model, {}):
        pass
    with (
        pytest.raises(ValueError, match="called outside of its block"),
        replay_routing(model, random_recording(18)),
    ):
        model.model.layers[0].mlp.experts(torch.zeros(18, 32), random_ids(18), torch.ones(18, 2))
    model(batch())  # as ever
    assert len(torch.overrides._get_current_function_mode_stack()) == 0


def test_a_forward_that_failed_ends_the_replay():
    model = test_families.make_model("mixtral")
    broken = model.model.layers[1].self_attn.register_forward_pre_hook(lambda *_: 1 / 0)
    replay = replay_routing(model, random_recording(18, 18))
    replay.__enter__()
    with pytest.raises(ZeroDivisionError):
        model(batch())
    broken.remove()
    with pytest.raises(ValueError, match="a forward has failed in this replay") as raised:
        model(batch())
    assert not replay.__exit__(ValueError, raised.value, None)
    model(batch())


def test_a_replay_inside_another_is_refused():
    model = test_families.make_model("mixtral")
    first, second = random_recording(18, seed=1), random_recording(18, seed=2)
    with (
        pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.experts takes the ids of another replay already"),
        replay_routing(model, first),
        replay_routing(model, second),
    ):
        model(batch())
    for recording in (first, second):
        with replay_routing(model, recording), record_routing(model) as replayed:
            model(batch())
        assert ids_of(replayed) == ids_of(recording)


def test_copies_of_a_model_go_their_own_way():
    """Hooks are copied with a model, a reference model say."""
    model = test_families.make_model("mixtral")
    with record_routing(model) as recording:
        model(batch())
        copied = copy.deepcopy(model)
        copied(batch(seed=2))
    copied(batch(seed=2))
    assert recording.num_tokens == [18]
    own = copied(batch()).logits
    with replay_routing(model, random_recording(18)):
        copied = copy.deepcopy(model)
        assert torch.equal(copied(batch()).logits, own)
        with pytest.raises(IndexError):
            copied(batch() + 64)
        assert not torch.equal(model(batch()).logits, own)
    assert torch.equal(copied(batch()).logits, own)


@pytest.mark.slow
def test_compiled_models_are_refused():
    model = test_families.make_model("mixtral")
    compiled = torch.compile(model, backend="eager")
    recording = random_recording(18)
    for make in (lambda: record_routing(compiled), lambda: replay_routing(compiled, recording)):
        with pytest.raises(ValueError, match=r"the model \(OptimizedModule\) is compiled: compiled code"), make():
            pass
    with pytest.raises(RuntimeError, match=r"use the model without torch\.compile"), replay_routing(model, recording):
        compiled(batch())
    compiled(batch())  # now there is code without hooks
    with pytest.raises((RuntimeError, ValueError), match=r"without torch\.compile"), record_routing(model):
        compiled(batch())
    torch._dynamo.reset()
    model.model.layers[0].compile(backend="eager")
    with pytest.raises(ValueError, match=r"model\.layers\.0 \(\w+\) is compiled"), record_routing(model):
        pass


def test_recordings_of_nothing_are_refused(tmp_path):
    model = test_families.make_model("mixtral")
    nothing = record_routing(model, path=tmp_path / "routing.pt")
    with pytest.raises(ValueError, match="no experts of MixtralForCausalLM were called"), nothing:
        pass
    assert not list(tmp_path.iterdir())
    with record_routing(model, path=tmp_path / "routing.pt") as recording:
        model(batch())
    assert ids_of(RoutingRecording.load(tmp_path / "routing.pt")) == ids_of(recording)
    with pytest.raises(ValueError, match="has no experts"), record_routing(nn.Linear(2, 2)):
        pass
