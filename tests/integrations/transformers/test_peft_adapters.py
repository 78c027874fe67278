"""PEFT's adapters of experts on a patched model: never multiplied out, and equal to what PEFT makes of them."""

import copy
import dataclasses
import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_families import REACHED, make_model, relative_error
from test_transformers_training import qwen3_moe, token_ids
from tiny_models import make_tokenizer
from torch import Tensor, nn

import tritonmoe as tm
from tritonmoe.expert_parallel.state import LayerCalls
from tritonmoe.experts.adapters import notes_on
from tritonmoe.experts.shared_expert import SharedExpert
from tritonmoe.integrations import transformers as tmt
from tritonmoe.integrations.transformers import discovery, patch, peft_adapters, register
from tritonmoe.placement.expert_shards import ExpertShards, Sharding, attach_shards
from tritonmoe.transports import LocalTransport, Transport

peft = pytest.importorskip("peft")
from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402
from peft.tuners.lora.layer import ParamWrapper  # noqa: E402

FAMILIES = ("qwen3_moe", "gpt_oss", "deepseek_v3")
MORE_FAMILIES = ("mixtral", "qwen2_moe", "olmoe", "deepseek_v2", "phimoe", "granitemoe", "ernie4_5_moe", "lfm2_moe")

VERSION = tuple(int(number) for number in peft.__version__.split(".")[:2])
ONE_ADAPTER_BEFORE_0_20 = pytest.mark.skipif(VERSION < (0, 20), reason="PEFT takes one adapter of parameters there")


def targets(model: nn.Module) -> list[str]:
    """Return the names of the experts' projections, as LoraConfig wants them."""
    return sorted(
        {
            f"{name.rpartition('layers.')[2].partition('.')[2]}.{key}"
            for name, experts in discovery.experts_modules(model).items()
            for key, parameter in experts.named_parameters(recurse=False)
            if parameter.dim() == 3
        }
    )


def adapt(model: nn.Module, **settings) -> nn.Module:
    """Return the model with random adapters on its experts."""
    config = {"r": 3, "lora_alpha": 6, "target_modules": [], "target_parameters": targets(model), **settings}
    torch.manual_seed(3)
    return get_peft_model(model, LoraConfig(init_lora_weights=False, **config))


def results(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    output = model(input_ids=token_ids(), labels=token_ids())
    output.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": output.logits.detach().clone(), **grads}


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 2e-5) -> None:
    assert actual.keys() == expected.keys()
    errors = {name: relative_error(actual[name], expected[name]) for name in expected}
    assert max(errors.values()) < tolerance, {n: error for n, error in errors.items() if error >= tolerance}


@pytest.fixture
def never_multiplied_out(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Return what makes every later product of adapters with weights an error."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("an adapter was multiplied out")

    return lambda: monkeypatch.setattr(torch.nn.utils.parametrize, "register_parametrization", refuse)


@pytest.mark.parametrize(
    "family", [*FAMILIES, *(pytest.param(family, marks=pytest.mark.thorough) for family in MORE_FAMILIES)]
)
def test_a_family_equals_peft(family: str, tmp_path: Path, never_multiplied_out: Callable[[], None]) -> None:
    if family not in REACHED:
        pytest.skip("in this release of transformers its experts ask no registry")
    plain = adapt(make_model(family)).eval()
    expected = results(plain)
    plain.save_pretrained(tmp_path / "plain")
    merged = copy.deepcopy(plain).merge_and_unload()

    never_multiplied_out()
    base = make_model(family)
    patch(base)
    ours = adapt(base).eval()
    assert sum("lora_" in name for name in expected) >= 4
    assert_equal(results(ours), expected)
    ours.save_pretrained(tmp_path / "ours")
    saved = [(tmp_path / kind / "adapter_model.safetensors").read_bytes() for kind in ("plain", "ours")]
    assert saved[0] == saved[1]
    loaded = PeftModel.from_pretrained(base.__class__(base.config), tmp_path / "plain")  # on other base weights
    loaded.load_state_dict(ours.state_dict())
    patch(loaded)
    unmerged = loaded.eval()(token_ids()).logits
    assert torch.equal(unmerged, ours(token_ids()).logits)
    mine = ours.merge_and_unload()
    for name, parameter in merged.state_dict().items():
        assert torch.equal(mine.state_dict()[name], parameter), name
    assert relative_error(mine(token_ids()).logits, unmerged) < 2e-5


def test_patched_after_peft(never_multiplied_out: Callable[[], None]) -> None:
    model = adapt(qwen3_moe())
    expected = results(model)
    never_multiplied_out()
    assert patch(model).num_switched == 2
    assert_equal(results(model), expected)


def test_chosen_by_name(never_multiplied_out: Callable[[], None]) -> None:
    model = adapt(qwen3_moe())
    expected = results(model)
    register()
    model.set_experts_implementation("tritonmoe")
    never_multiplied_out()
    assert_equal(results(model), expected)


SETTINGS = {
    "rsLoRA": {"use_rslora": True},
    "a rank per projection": {"rank_pattern": {r".*experts\.gate_up_proj": 5, r".*experts\.down_proj": 2}},
    "one projection": {"target_parameters": ["experts.down_proj"]},
    "rank 16 and alpha 3": {"r": 16, "lora_alpha": 3},
    "attention too": {"target_modules": ["q_proj", "v_proj"]},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_settings(setting: str, never_multiplied_out: Callable[[], None]) -> None:
    model = adapt(qwen3_moe(), **SETTINGS[setting])
    expected = results(model)
    never_multiplied_out()
    patch(model)
    assert_equal(results(model), expected)


@ONE_ADAPTER_BEFORE_0_20
def test_several_adapters_and_one_active(never_multiplied_out: Callable[[], None]) -> None:
    base = qwen3_moe()
    config = LoraConfig(r=2, target_modules=[], target_parameters=targets(base), init_lora_weights=False)
    model = adapt(base)
    model.add_adapter("other", config)

    def of_each() -> list[Tensor]:
        found = []
        for name in ("default", "other"):
            model.set_adapter(name)
            found.append(model(token_ids()).logits.detach())
        with model.disable_adapter():
            found.append(model(token_ids()).logits.detach())
        return found

    expected = of_each()
    never_multiplied_out()
    patch(model)
    for actual, wanted in zip(of_each(), expected, strict=True):
        assert relative_error(actual, wanted) < 2e-5
    assert relative_error(expected[0], expected[1]) > 1e-3


@ONE_ADAPTER_BEFORE_0_20
def test_two_active_adapters_run_as_peft_runs_them(caplog: pytest.LogCaptureFixture) -> None:
    model = adapt(qwen3_moe(), target_parameters=["experts.down_proj"])
    config = LoraConfig(r=2, target_modules=[], target_parameters=["experts.down_proj"], init_lora_weights=False)
    model.add_adapter("other", config)
    model.base_model.set_adapter(["default", "other"])
    expected = model(token_ids()).logits.detach()
    patch(model)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert relative_error(model(token_ids()).logits, expected) < 2e-5
    lines = [record.getMessage() for record in caplog.records if "multiplies out" in record.getMessage()]
    assert len(lines) == 2, "one for each of two layers"
    assert "2 adapters are active at once" in lines[0]


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool, never_multiplied_out: Callable[[], None]) -> None:
    model = adapt(qwen3_moe()).train()
    patch(model)
    never_multiplied_out()
    expected = results(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    actual = results(model)
    assert_equal({name: actual[name] for name in expected}, expected, 1e-6)


def test_narrow_weights_and_wide_adapters(never_multiplied_out: Callable[[], None]) -> None:
    """PEFT keeps adapters of a bf16 model in fp32; PEFT's own way rounds the sum of weight and adapter."""
    exact = results(adapt(qwen3_moe().bfloat16().float()))
    models = [adapt(qwen3_moe().bfloat16()) for _ in range(2)]
    patch(models[1])
    plain = results(models[0])
    never_multiplied_out()
    ours = results(models[1])
    for name, value in exact.items():
        assert ours[name].dtype == plain[name].dtype, name
        assert relative_error(ours[name].float(), value) <= 2 * relative_error(plain[name].float(), value) + 1e-3, name


@pytest.mark.thorough
def test_a_compiled_model(never_multiplied_out: Callable[[], None]) -> None:
    model = adapt(qwen3_moe())
    patch(model)
    never_multiplied_out()
    expected = results(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    actual = results(compiled)
    assert_equal({name.removeprefix("_orig_mod."): value for name, value in actual.items()}, expected)


def test_other_implementations_are_left_alone() -> None:
    register()
    model = adapt(qwen3_moe())
    expected = results(model)
    patch(model)
    model.set_experts_implementation("eager")
    actual = results(model)
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


def test_it_says_what_is_trained(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft_adapters, "_said", set())
    model = adapt(qwen3_moe())
    patch(model)
    with caplog.at_level(logging.INFO, "tritonmoe"):
        for _ in range(2):
            model(token_ids())
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("tritonmoe")]
    assert len(lines) == 2, "one for each projection"
    # A (6 * 3, 32) and B (24, 6 * 3) of gate_up_proj (6, 24, 32)
    assert "'default' of rank 3 on Qwen3MoeExperts.gate_up_proj is never multiplied out: it has 1008" in "".join(lines)
    assert "for 6 experts of a layer, which are trained, and the 4608 of the weight itself are frozen" in "".join(lines)


CONFIG = tm.MoEConfig(16, 8, 4, 2)


def adapted_layer(transport: Transport | None = None, placement: tm.ExpertPlacement | None = None) -> nn.Module:
    register()
    torch.manual_seed(0)
    layer = nn.Sequential(tm.MoELayer(CONFIG, transport, placement=placement))
    return adapt(layer, target_parameters=["experts.gate_up_proj", "experts.down_proj"])


def test_experts_in_another_order() -> None:
    """As many slots as experts, and none in its place: the factors go to the experts, not to the slots."""
    x = torch.randn(9, 16, generator=torch.Generator().manual_seed(1))
    found = []
    for arguments in ((), (LocalTransport(), tm.ExpertPlacement(((3, 1, 0, 2),)))):
        model = adapted_layer(*arguments)
        out = model(x)
        out.square().sum().backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        found.append({"out": out.detach(), **grads})
    assert_equal(found[1], found[0], 1e-5)


def test_replicas_train_no_adapters() -> None:
    def on_rank(transport: Transport) -> None:
        model = adapted_layer(transport, tm.ExpertPlacement(((0, 1, 2, 3), (3, 2, 1, 0))))
        with pytest.raises(ValueError, match="several slots of a placement can't be trained"):
            model(torch.randn(3, 16))
        with torch.no_grad():
            model(torch.randn(3, 16))

    tm.run_on_emulated_ranks(on_rank, 2, timeout_s=20)


@ONE_ADAPTER_BEFORE_0_20
def test_ranks_with_other_active_adapters_are_told() -> None:
    """Two adapters alike, so that nothing but their names differs."""
    adapted = adapted_layer()
    parameters = ["experts.gate_up_proj", "experts.down_proj"]
    adapted.add_adapter("other", LoraConfig(r=3, target_modules=[], target_parameters=parameters))

    def on_rank(transport: Transport) -> None:
        model = copy.deepcopy(adapted)
        tm.parallelize(model, transport)
        model.set_adapter("other")
        model(torch.randn(3, 16))
        model.set_adapter(("default", "other")[transport.rank])
        with pytest.raises(tm.CountMismatch, match="which of PEFT's adapters are active"):
            model(torch.randn(3, 16))

    tm.run_on_emulated_ranks(on_rank, 2, timeout_s=20)


def test_ranks_with_another_scale_of_an_adapter_are_told() -> None:
    adapted = adapted_layer()

    def on_rank(transport: Transport) -> None:
        model = copy.deepcopy(adapted)
        tm.parallelize(model, transport)
        wrapper = next(module for module in model.modules() if isinstance(module, ParamWrapper))
        wrapper.scaling["default"] *= 1 + transport.rank
        with pytest.raises(tm.CountMismatch, match="are active in this layer call, and with what scale"):
            model(torch.randn(3, 16))

    tm.run_on_emulated_ranks(on_rank, 2, timeout_s=20)


@pytest.mark.parametrize("implementation", ["grouped_mm", "tritonmoe"])
def test_experts_that_transformers_has_spread_are_refused(implementation: str) -> None:
    """With DistributedConfig(ep_implementation="tritonmoe") they may have any experts_implementation."""
    register()
    adapted = adapt(qwen3_moe())
    adapted.get_base_model().set_experts_implementation(implementation)

    def on_rank(transport: Transport) -> None:
        model = copy.deepcopy(adapted)
        for experts in discovery.experts_modules(model).values():
            shards = ExpertShards(Sharding(transport, None), 2 * experts.num_experts, LayerCalls(transport))
            attach_shards(experts, shards)
        with pytest.raises(ValueError, match=r"adapters of its own experts alone.* instead of ep_implementation"):
            model(token_ids())

    tm.run_on_emulated_ranks(on_rank, 2, timeout_s=20)


def test_experts_that_one_rank_refuses_leave_nobody_waiting() -> None:
    model = qwen3_moe()
    register()
    model.set_experts_implementation("tritonmoe")

    def on_rank(transport: Transport) -> None:
        own = copy.deepcopy(model)
        for experts in discovery.experts_modules(own).values():
            shards = ExpertShards(Sharding(transport, None), 2 * experts.num_experts, LayerCalls(transport))
            attach_shards(experts, shards)
            if transport.rank == 1:
                experts.gate_up_proj = nn.Parameter(experts.gate_up_proj.to(torch.int8), requires_grad=False)
        refused = (TypeError, "int8") if transport.rank else (tm.TransportError, r"ranks \[1\] refused the arguments")
        with pytest.raises(refused[0], match=refused[1]):
            own(token_ids())

    tm.run_on_emulated_ranks(on_rank, 2, timeout_s=20)


def test_other_adapters_beside_those_of_peft_are_refused() -> None:
    model, ours = adapted_layer(), tm.ExpertAdapters(down_a=torch.ones(4, 2, 8), down_b=torch.ones(4, 16, 2))
    with pytest.raises(ValueError, match="experts that PEFT has adapted already"):
        model.base_model.model[0](torch.randn(3, 16), adapters=ours)


@pytest.mark.parametrize(
    "wrapping", [{"target_parameters": ["gate_up_proj", "down_proj"]}, {"modules_to_save": ["shared_expert"]}]
)
def test_a_shared_expert_that_peft_wraps(wrapping: dict) -> None:
    """The names of its parameters are those of the experts', so that targets of these are targets of it."""
    register()
    config = dataclasses.replace(CONFIG, shared_intermediate_size=8)
    layer, x = nn.Sequential(nn.Linear(16, 16), tm.MoELayer(config)), torch.randn(9, 16)
    expected = layer(x)
    settings = LoraConfig(r=2, target_modules=["0"], **wrapping)
    model = get_peft_model(copy.deepcopy(layer), settings)
    assert relative_error(model(x), expected) < 1e-6
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_A" not in name:
                parameter.normal_()
    adapted = model(x)
    adapted.square().sum().backward()
    trained = [p.grad for name, p in model.named_parameters() if "shared_expert" in name and p.requires_grad]
    assert trained
    assert all(grad.any() for grad in trained)
    merged = model.merge_and_unload()
    assert isinstance(merged.get_submodule("1").shared_expert, SharedExpert)
    assert relative_error(merged(x), adapted) < 1e-5


@pytest.mark.parametrize("num_ranks", [None, 2])
def test_experts_that_peft_trains_whole(num_ranks: int | None) -> None:
    """modules_to_save: a copy of the experts stands beside them, and runs while the adapter is in force."""

    def on_rank(transport: Transport | None = None) -> None:
        generator = torch.Generator().manual_seed(0)  # ranks are threads
        plain = nn.Sequential(nn.Linear(16, 16), tm.MoELayer(CONFIG, transport, backend="torch", generator=generator))
        x = torch.randn(9, 16)
        out = plain(x)
        out.square().sum().backward()
        expected = plain[1].experts.gate_up_proj.grad
        model = get_peft_model(plain, LoraConfig(r=2, target_modules=["0"], modules_to_save=["experts"]))
        model(x).square().sum().backward()
        saved = model.get_submodule("base_model.model.1.experts.modules_to_save.default")
        layer = model.get_submodule("base_model.model.1")
        assert layer.grouped_experts is saved
        assert layer.experts.original_module.gate_up_proj.grad is expected
        assert relative_error(saved.gate_up_proj.grad, expected) < 1e-6
        with torch.no_grad():
            saved.down_proj.zero_()
            assert not model(x).any()
            with model.disable_adapter():
                assert relative_error(model(x), out) < 1e-6

    on_rank() if num_ranks is None else tm.run_on_emulated_ranks(on_rank, num_ranks, timeout_s=20)


@pytest.mark.parametrize("wrapping", [{"modules_to_save": ["router"]}, {"target_parameters": ["router.weight"]}])
def test_a_router_that_peft_wraps_sums_its_load(wrapping: dict) -> None:
    """Spread behind PEFT, whose wrapper stands in the router's place."""
    layer = nn.Sequential(nn.Linear(16, 16), tm.MoELayer(dataclasses.replace(CONFIG, selection_bias=True)))
    adapted = get_peft_model(layer, LoraConfig(r=2, target_modules=["0"], **wrapping))

    def on_rank(transport: Transport) -> Tensor:
        model = copy.deepcopy(adapted)
        tm.parallelize(model, transport)
        model(torch.randn(9, 16, generator=torch.Generator().manual_seed(transport.rank)))
        routers = [module for module in model.modules() if isinstance(module, tm.TopKRouter)]
        return sum(router.update_selection_bias() for router in routers)

    first, second = tm.run_on_emulated_ranks(on_rank, 2, timeout_s=20)
    assert torch.equal(first, second)
    assert first.sum() == 2 * 9 * 2


def test_two_calls_at_once_end_in_any_order() -> None:
    """As two threads that serve one model make them."""
    model = adapted_layer()
    wrapper = model.get_submodule("base_model.model.0.experts")
    experts, first, second = wrapper.get_base_layer(), *(wrapper._activate_lora(["default"]) for _ in range(2))
    first.__enter__()
    second.__enter__()
    for ended, still in ((first, True), (second, False)):
        ended.__exit__(None, None, None)
        assert bool(notes_on(experts)) == still


def test_functional_call() -> None:
    model = adapt(qwen3_moe())
    patch(model)
    doubled = {name: 2 * p.detach() if "lora_B" in name else p.detach() for name, p in model.named_parameters()}
    out = torch.func.functional_call(model, doubled, (token_ids(),)).logits
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(2)
        assert relative_error(out, model(token_ids()).logits) < 1e-6


@pytest.mark.slow
def test_trl_prefers_with_adapters(tmp_path: Path) -> None:
    """DPO, whose reference is the same model without its adapters."""
    pytest.importorskip("trl")
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    found = []
    for is_patched in (False, True):
        model = qwen3_moe()
        if is_patched:
            patch(model)
        dataset = Dataset.from_dict({"prompt": ["1 2", "3 4"] * 8, "chosen": ["5 6"] * 16, "rejected": ["7 8"] * 16})
        arguments = DPOConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=4,
            max_steps=4,
            learning_rate=1e-2,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
        )
        config = LoraConfig(r=4, target_modules=[], target_parameters=targets(model))
        trainer = DPOTrainer(
            model, args=arguments, train_dataset=dataset, processing_class=make_tokenizer(), peft_config=config
        )
        trainer.train()
        found.append(torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry]))
    torch.testing.assert_close(found[1], found[0], atol=1e-4, rtol=0)
    assert found[1][-1] < found[1][0]


def in_unsloths_order(model: nn.Module, folder: Path) -> None:
    """Rewrite an adapter's file with the expert as the slowest index of lora_B's columns."""
    from safetensors.torch import load_file, save_file

    ranks = {name: (m.num_experts, m.r["default"]) for name, m in model.named_modules() if isinstance(m, ParamWrapper)}
    state = load_file(folder / "adapter_model.safetensors")
    for key, value in state.items():
        if "lora_B" in key:
            num_experts, rank = ranks[key.removesuffix(".lora_B.weight")]
            state[key] = value.unflatten(1, (rank, num_experts)).transpose(1, 2).flatten(1).contiguous()
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def test_an_adapter_with_the_expert_slowest(tmp_path: Path) -> None:
    """Its logits, its merge, its export and its file are those of the same adapter in PEFT's order."""
    model = adapt(make_model("qwen3_moe"))
    patch(model)
    expected = model(token_ids()).logits
    model.save_pretrained(tmp_path / "peft")
    model.save_pretrained(tmp_path / "unsloth")
    in_unsloths_order(model, tmp_path / "unsloth")
    loaded = PeftModel.from_pretrained(make_model("qwen3_moe"), tmp_path / "unsloth")
    patch(loaded)
    assert not torch.allclose(loaded(token_ids()).logits, expected, atol=1e-3)  # scrambled
    tmt.set_lora_B_order(loaded)  # the order is PEFT's: nothing changes
    assert not torch.allclose(loaded(token_ids()).logits, expected, atol=1e-3)
    tmt.set_lora_B_order(loaded, lora_B_order="expert_slowest")
    assert torch.equal(loaded(token_ids()).logits, expected)
    loaded.save_pretrained(tmp_path / "again")
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("peft", "again")]
    assert files[0] == files[1]
    exported, own = dict(tm.export_weights(loaded)), dict(tm.export_weights(model))
    assert all(torch.equal(tensor, own[name]) for name, tensor in exported.items())
    with pytest.raises(ValueError, match="in PEFT's order already"):
        tmt.set_lora_B_order(loaded, "expert_slowest")
    with pytest.raises(ValueError, match='must be "expert_fastest" or "expert_slowest"'):
        tmt.set_lora_B_order(loaded, "grouped_by_expert")
    with pytest.raises(ValueError, match="has no adapter 'other' of experts"):
        tmt.set_lora_B_order(loaded, "expert_slowest", "other")
    fresh = PeftModel.from_pretrained(make_model("qwen3_moe"), tmp_path / "unsloth")
    fresh.merge_adapter()
    with pytest.raises(ValueError, match=r"is merged: call unmerge_adapter\(\) first"):
        tmt.set_lora_B_order(fresh, "expert_slowest")


@pytest.mark.parametrize(
    ("changed", "readme", "words"),
    [
        ({}, "", None),
        ({}, "Trained with [Unsloth](https://unsloth.ai)", "names unsloth"),
        ({"base_model_name_or_path": "unsloth/Qwen3-30B-A3B"}, "", "names unsloth"),
        ({"auto_mapping": {"unsloth_fixed": True}}, "", "names unsloth"),
        ({"auto_mapping": {"unsloth_fixed": True}, "lora_B_layout": "rank_major"}, "", None),
        ({"lora_B_layout": "grouped_by_expert"}, "", "says lora_B_layout='grouped_by_expert'"),
        ({"auto_mapping": {"unsloth_fixed": True}, "target_parameters": None}, "", None),
    ],
)
def test_adapters_of_unsloth_are_warned_of(
    changed: dict, readme: str, words: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    register()
    adapt(make_model("qwen3_moe"), target_modules=["q_proj"]).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))
    (tmp_path / "README.md").write_text(readme)
    peft.PeftConfig.from_pretrained(str(tmp_path))
    peft.PeftConfig.from_pretrained(str(tmp_path))
    said = [record.getMessage() for record in caplog.records if "lora_B" in record.getMessage()]
    assert len(said) == (words is not None)  # once
    assert all(words in message and 'tmt.set_lora_B_order(model, "expert_slowest")' in message for message in said)
