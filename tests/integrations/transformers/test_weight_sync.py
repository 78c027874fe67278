"""Exported weights are those of save_pretrained, byte for byte, on any number of ranks, and can be loaded again."""

import copy
import importlib.metadata
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_torchrun
from test_families import QUICK, REACHED, SLOW, make_model
from tiny_models import make_dense
from torch import Tensor, nn
from torch.nn.utils import prune

import tritonmoe as tm
from tritonmoe.integrations import transformers as tmt

WORKER = Path(__file__).parent / "weight_sync_worker.py"
FAMILIES = ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "olmoe")
HAS_PEFT = importlib.util.find_spec("peft") is not None
VERSION = tuple(int(number) for number in importlib.metadata.version("transformers").split(".")[:2])


def saved(model: nn.Module, directory: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    model.save_pretrained(directory)  # type: ignore[operator]
    return {name: value for path in directory.glob("*.safetensors") for name, value in load_file(path).items()}


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=() if name in FAMILIES else pytest.mark.thorough)
        for name in (*QUICK, *SLOW)
        if name in REACHED
    ],
)
def test_a_family_on_one_process(family: str, tmp_path: Path) -> None:
    model = make_model(family)
    expected = saved(model, tmp_path)
    shapes = dict(tm.export_weights(model, only_shapes=True))
    for bucket_bytes in (1, 5000, 2**30):
        found = dict(tm.export_weights(model, bucket_bytes=bucket_bytes))
        assert list(found) == list(shapes)
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            assert torch.equal(tensor, expected[name]), name
            assert (shapes[name].shape, shapes[name].dtype) == (tensor.shape, expected[name].dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.zero_()
    tm.load_weights(model, expected.items())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_what_is_exported_is_not_trained() -> None:
    model = make_model("mixtral")
    iterator = tm.export_weights(model)
    assert torch.is_grad_enabled()
    _, first = next(iterator)
    assert torch.is_grad_enabled()
    assert not first.requires_grad


@pytest.mark.skipif(not HAS_PEFT, reason="peft is not installed")
def test_adapters_that_cannot_be_merged_one_by_one_are_refused() -> None:
    from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model

    def adapted(config: object) -> nn.Module:
        return get_peft_model(make_model("mixtral"), config)

    dora = adapted(LoraConfig(target_modules=["q_proj"], use_dora=True))
    with pytest.raises(ValueError, match=r"self_attn.q_proj is more than two factors \(DoRA, .*merge_and_unload"):
        tm.export_weights(dora)
    ia3 = adapted(IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    with pytest.raises(ValueError, match=r"q_proj has an adapter of peft.tuners.ia3.*Linear, and only LoRA"):
        tm.export_weights(ia3)
    with pytest.raises(ValueError, match="prompt learning of PEFT changes no weight"):
        tm.export_weights(adapted(PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")))
    tokens = adapted(LoraConfig(target_modules=["q_proj"], trainable_token_indices=[3, 4]))
    with pytest.raises(ValueError, match=r"embed_tokens is a TrainableTokensWrapper of PEFT.*merge_and_unload"):
        tm.export_weights(tokens)


def tied_mixtral(*, is_tied: bool = True) -> Any:
    from transformers import AutoModelForCausalLM

    config = make_model("mixtral").config
    config.tie_word_embeddings = is_tied
    torch.manual_seed(5)
    return AutoModelForCausalLM.from_config(config)


IDS = torch.arange(12).view(2, 6)


@pytest.mark.skipif(not HAS_PEFT, reason="peft is not installed")
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["lm_head"]},
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["lm_head", "embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    ],
    ids=str,
)
def test_adapters_that_untie_tied_weights_are_refused(settings: Any) -> None:
    """An engine whose configuration ties them, as vLLM's, skips lm_head: it would generate with another model."""
    from peft import LoraConfig, get_peft_model

    model: Any = get_peft_model(tied_mixtral(), LoraConfig(init_lora_weights=False, **settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter += 0.1
    base = {name: tensor.clone() for name, tensor in tm.export_weights(tied_mixtral())}
    for call in (
        lambda: tm.export_weights(model),
        lambda: tm.export_weights(model, only_shapes=True),
        lambda: tm.load_weights(model, base.items()),
    ):
        with pytest.raises(ValueError, match=r"lm_head.weight and model.embed_tokens.weight are tied .*ensure_weight"):
            call()
    with model.disable_adapter():
        found = dict(tm.export_weights(model))
    assert found.keys() == base.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in base.items())
    model.config.tie_word_embeddings = False  # as an engine is told, which then has two weights
    engine = tied_mixtral(is_tied=False)
    tm.load_weights(engine, tm.export_weights(model))
    torch.testing.assert_close(engine(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-3)


@pytest.mark.skipif(not HAS_PEFT, reason="peft is not installed")
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"target_modules": ["q_proj"], "use_rslora": True},
        {"target_modules": ["q_proj"], "bias": "all"},
    ],
    ids=str,
)
def test_adapters_that_keep_weights_tied_are_merged(settings: Any) -> None:
    from peft import LoraConfig, get_peft_model

    if "ensure_weight_tying" not in LoraConfig.__dataclass_fields__:
        pytest.skip("this PEFT can't tie adapters")
    model: Any = get_peft_model(tied_mixtral(), LoraConfig(init_lora_weights=False, **settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.01
    engine = tied_mixtral()
    tm.load_weights(engine, tm.export_weights(model))
    torch.testing.assert_close(engine(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-3)


@pytest.mark.skipif(not HAS_PEFT, reason="peft is not installed")
def test_a_bf16_router_is_merged_as_the_model_in_training_computes_it() -> None:
    """PEFT rounds what it adds to a parameter, in its forward and in its merge; the sum is rounded again."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=["q_proj"], target_parameters=["gate.weight"], init_lora_weights=False)
    model: Any = get_peft_model(make_model("mixtral").bfloat16(), config)
    found = {name: tensor.clone() for name, tensor in tm.export_weights(model) if "gate.weight" in name}
    computed = []
    for layer in model.get_base_model().model.layers:
        wrapper = layer.mlp.gate
        with wrapper._activate_lora(wrapper.active_adapters):
            computed.append(wrapper.get_base_layer().weight.detach().clone())
    merged = {name: tensor for name, tensor in tm.export_weights(model.merge_and_unload()) if name in found}
    assert len(found) == len(merged) == len(computed) > 0
    for own, (name, tensor) in zip(computed, found.items(), strict=True):
        assert torch.equal(tensor, merged[name])
        assert torch.equal(tensor, own)


def test_what_is_no_checkpoint_is_refused() -> None:
    with pytest.raises(TypeError, match="Linear is no model of transformers"):
        tm.export_weights(nn.Linear(2, 2))
    model = make_model("mixtral")
    for wrong in (0, 2.5, True):
        with pytest.raises(ValueError, match="bucket_bytes must be a positive number of bytes"):
            tm.export_weights(model, bucket_bytes=wrong)  # type: ignore[arg-type]
    upcycled = tmt.upcycle(make_dense("gpt2"), num_experts=4, top_k=2)
    with pytest.raises(ValueError, match="is a layer of tritonmoe, upcycled in place, which no inference engine has"):
        tm.export_weights(upcycled)
    torch.nn.utils.parametrizations.weight_norm(model.model.layers[0].self_attn.q_proj)
    with pytest.raises(ValueError, match=r"weight of .*self_attn.q_proj is computed from other parameters"):
        tm.export_weights(model)
    quantised = make_model("mixtral")
    experts = quantised.model.layers[1].mlp.experts
    experts.down_proj = nn.Parameter(experts.down_proj.detach().to(torch.float8_e4m3fn), requires_grad=False)
    for call in (lambda: tm.export_weights(quantised), lambda: tm.load_weights(quantised, [])):
        with pytest.raises(
            ValueError, match=r"layers.1.mlp.experts.down_proj is quantised \(Parameter of torch.float8"
        ):
            call()


@pytest.mark.parametrize("where", ["attention", "experts"])
@pytest.mark.parametrize("compute", [nn.utils.weight_norm, nn.utils.spectral_norm, prune.identity])
def test_weights_that_hooks_compute_are_neither_exported_nor_loaded(compute: Any, where: str) -> None:
    """Exported, they would be weight_orig, weight_mask and the like, which no checkpoint has."""
    model = make_model("mixtral")
    weights = [(name, tensor.clone()) for name, tensor in tm.export_weights(model)]
    layer = model.model.layers[0]
    module, name = (layer.self_attn.q_proj, "weight") if where == "attention" else (layer.mlp.experts, "down_proj")
    compute(module, name)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for call in (lambda: list(tm.export_weights(model)), lambda: tm.load_weights(model, weights)):
        with pytest.raises(ValueError, match=rf"{name} of .*layers\.0.* is computed from other parameters"):
            call()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_what_does_not_fit_is_not_loaded() -> None:
    model = make_model("mixtral")
    weights = dict(tm.export_weights(model))
    name = "model.layers.1.block_sparse_moe.experts.5.w3.weight"
    with pytest.raises(
        ValueError, match=r"the checkpoint of MixtralForCausalLM has no model.layers.1.mlp.experts.gate"
    ):
        tm.load_weights(model, [("model.layers.1.mlp.experts.gate_up_proj", weights[name])])
    with pytest.raises(ValueError, match=r"w3.weight must be torch.float32, .* of \(24, 32\), got .* of \(32, 24\)"):
        tm.load_weights(model, [(name, weights[name].T)])
    with pytest.raises(ValueError, match=r"got torch.int8 of \(24, 32\)"):
        tm.load_weights(model, [(name, weights[name].to(torch.int8))])
    others = [item for item in weights.items() if item[0] != name]
    loaded = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    changed = [(key, tensor + 1) for key, tensor in others]
    with pytest.raises(ValueError, match=rf"nothing was loaded, since the weights given lack {name}: one call"):
        tm.load_weights(model, changed)
    assert all(torch.equal(tensor, loaded[key]) for key, tensor in model.state_dict().items())
    with pytest.raises(ValueError, match=rf"has {len(others)} new weights beside old ones, .* lack {name}: one call"):
        tm.load_weights(model, iter(others))


def test_what_is_no_pair_is_not_loaded() -> None:
    """What stands in a list is looked at before anything is loaded, what an iterator gives as it comes."""
    model = make_model("mixtral")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    new = {name: tensor + 1 for name, tensor in tm.export_weights(model)}
    (name, tensor), *others = new.items()
    for wrong, got in (
        *((one, f"got {type(one).__name__}") for one in (None, 3, model)),
        *((one, "got str") for one in (new, "a path", iter(new), [*new.items(), name])),
        (tensor, "got Tensor"),
        *(([*others, (name, one)], f"got str, {type(one).__name__}") for one in ("text", None, 3, tensor.numpy())),
        ([*others, (name, tensor, 2)], "got str, Tensor, int"),
        ([(3, tensor)], "got int, Tensor"),
    ):
        with pytest.raises(TypeError, match=rf"weights must be pairs \(name, dense tensor\), .*{got}$"):
            tm.load_weights(model, wrong)
    for one in (tensor.to("meta"), tensor.to_sparse()):
        with pytest.raises(TypeError, match=f"{name} must be a dense tensor with values, got torch"):
            tm.load_weights(model, [*others, (name, one)])
    for unfit in (("another", tensor), (name, tensor[:1])):
        for given in ([*others, unfit], dict([*others, unfit]).items()):
            with pytest.raises(ValueError, match=r"has no another|must be torch"):
                tm.load_weights(model, given)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.skipif(not HAS_PEFT, reason="peft is not installed")
def test_layers_that_share_their_weights_are_refused() -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(target_modules=["q_proj"], layer_replication=[[0, 2], [1, 2]], init_lora_weights=False)
    model: Any = get_peft_model(make_model("mixtral"), config)
    for call in (lambda: tm.export_weights(model), lambda: tm.load_weights(model.unload(), [])):
        with pytest.raises(
            ValueError, match=r"layers\.1\.\S+ and model\.layers\.2\.\S+ share their numbers, .*deepcopy"
        ):
            call()
    model = get_peft_model(make_model("mixtral"), config).eval()
    layers = model.get_base_model().model.layers
    layers[2] = copy.deepcopy(layers[2])  # as the message says
    engine = type(model.get_base_model())(model.config).eval()
    tm.load_weights(engine, tm.export_weights(model))
    torch.testing.assert_close(engine(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-3)


def test_whole_models_on_emulated_ranks(tmp_path: Path) -> None:
    """Ranks that are threads export and load at the same time, each its own model."""
    expected = saved(make_model("mixtral"), tmp_path)
    models = [make_model("mixtral") for _ in range(4)]

    def run(transport: tm.transports.Transport) -> list[str]:
        model = models[transport.rank]
        tmt.patch(model)
        found = {name: tensor.clone() for name, tensor in tm.export_weights(model, bucket_bytes=5000)}
        transport.barrier()
        tm.load_weights(model, ((name, tensor + transport.rank) for name, tensor in expected.items()))
        loaded = dict(tm.export_weights(model))
        assert all(torch.equal(loaded[name], tensor + transport.rank) for name, tensor in expected.items())
        return [name for name, tensor in found.items() if torch.equal(tensor, expected[name])]

    assert tm.run_on_emulated_ranks(run, num_ranks=4) == [list(dict(tm.export_weights(models[0])))] * 4
    assert len(expected) == len(dict(tm.export_weights(models[0], only_shapes=True)))


def test_experts_spread_over_emulated_ranks_are_refused() -> None:
    """One rank's experts have the names of all of them: they are neither sent nor overwritten, and no rank waits."""

    def run(transport: tm.transports.Transport) -> None:
        model = make_dense("llama")
        config = tm.MoEConfig(hidden_size=model.config.hidden_size, intermediate_size=16, num_experts=8, top_k=2)
        model.model.layers[1].mlp = tm.MoELayer(config, transport)
        own = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
        for call in (
            lambda: tm.export_weights(model),
            lambda: tm.export_weights(model, only_shapes=True),
            lambda: tm.load_weights(model, own.items()),
        ):
            with pytest.raises(ValueError, match=r"layers.1.mlp.experts has this rank's experts alone.*transport=None"):
                call()
        assert model.model.layers[1].mlp.experts.down_proj.any()
        with pytest.raises(TypeError, match=r"got EmulatedTransport: start processes with torchrun"):
            tmt.parallelize(make_model("mixtral"), transport)

    tm.run_on_emulated_ranks(run, num_ranks=2)


@pytest.mark.thorough
def test_on_two_processes(tmp_path: Path) -> None:
    run_torchrun(2, WORKER, str(tmp_path), cases=["exported:mixtral", "moved:mixtral", "refused:"])


@pytest.mark.thorough
@pytest.mark.parametrize("size", [1, 2, 4])
def test_families_on_more_processes(size: int, tmp_path: Path) -> None:
    cases = [f"exported:{family}" for family in FAMILIES] + ["moved:gpt_oss"] * (size > 1)
    if HAS_PEFT and size < 4:
        cases += ["moved:mixtral_adapted"] * (size > 1)
        cases += ["adapted:mixtral", "adapted:gpt_oss", "adapted:mixtral_bf16", "bounded:mixtral", "bounded:gpt_oss"]
    run_torchrun(size, WORKER, str(tmp_path), cases=cases)


@pytest.mark.thorough
@pytest.mark.skipif(not HAS_PEFT, reason="peft is not installed")
def test_beside_fsdp(tmp_path: Path) -> None:
    run_torchrun(4, WORKER, str(tmp_path), cases=["fully_sharded:qwen3_moe", "sharded_adapters:qwen3_moe"])


@pytest.mark.thorough
@pytest.mark.skipif(VERSION < (5, 23), reason="EPImplementationInterface came in 5.23")
def test_spread_by_transformers(tmp_path: Path) -> None:
    run_torchrun(4, WORKER, str(tmp_path), cases=["ep_implementation:qwen3_moe"])
