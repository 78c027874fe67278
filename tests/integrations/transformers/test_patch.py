"""patch(): what is switched is counted and named; where nothing can be, it says so and changes nothing."""

import copy
import functools
import logging
import pickle
import types
from collections.abc import Callable

import pytest
import torch
import transformers
from quantised_weights import Int4Tensor, Params4bit
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from tritonmoe.integrations.transformers import collect_statistics, parallelize, patch, register
from tritonmoe.integrations.transformers import experts as experts_module
from tritonmoe.integrations.transformers.upcycle.conversion import upcycle
from tritonmoe.transports import LocalTransport

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
}


def mixtral() -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(transformers.MixtralConfig(**SIZES, num_local_experts=6))


@pytest.fixture
def num_calls(monkeypatch) -> list[int]:
    """Grows by one for each call of tritonmoe's experts."""
    calls = []
    one_device = experts_module.run_experts
    monkeypatch.setattr(experts_module, "run_experts", lambda *args: calls.append(1) or one_device(*args))
    return calls


def test_it_switches_counts_and_can_be_undone(num_calls):
    model, ids = mixtral(), torch.arange(2, 12)[None]
    expected, names = model(ids).logits, list(model.state_dict())
    report = patch(model)
    assert report.switched == ("model.layers.0.mlp.experts", "model.layers.1.mlp.experts")
    assert (report.num_switched, report.left) == (2, ())
    torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=1e-5)
    assert len(num_calls) == 2
    assert list(model.state_dict()) == names
    assert patch(model) == report
    model.set_experts_implementation("eager")
    model(ids)
    assert len(num_calls) == 2


def test_a_model_inside_another_module(num_calls):
    wrapped = nn.Sequential(mixtral(), nn.Identity())
    assert patch(wrapped).switched[0] == "0.model.layers.0.mlp.experts"
    wrapped[0](torch.arange(2, 12)[None])
    assert len(num_calls) == 2


def test_experts_of_custom_code_are_switched_too(num_calls):
    # transformers looks for its decorator in the source of the model's own file, and would pass this one over
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    class OwnModel(transformers.PreTrainedModel):
        config_class = transformers.MixtralConfig

        def __init__(self, config):
            super().__init__(config)
            self.experts = MixtralExperts(config)
            self.post_init()

    model = OwnModel(transformers.MixtralConfig(**SIZES, num_local_experts=6))
    assert patch(model).switched == ("experts",)
    model.experts(torch.randn(3, 32), torch.tensor([[0], [1], [2]]), torch.ones(3, 1))
    assert len(num_calls) == 1


def llama() -> nn.Module:
    return AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SIZES))


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
    return AutoModelForCausalLM.from_config(config)


def llama4() -> nn.Module:
    config = transformers.Llama4TextConfig(**SIZES, num_local_experts=4, interleave_moe_layer_step=1)
    return AutoModelForCausalLM.from_config(config)


def jetmoe() -> nn.Module:
    sizes = {key: value for key, value in SIZES.items() if key != "num_attention_heads"}
    return AutoModelForCausalLM.from_config(
        transformers.JetMoeConfig(**sizes, kv_channels=8, num_local_experts=4, num_experts_per_tok=2)
    )


def switch() -> nn.Module:
    config = transformers.SwitchTransformersConfig(
        vocab_size=64, d_model=32, d_kv=8, d_ff=24, num_layers=2, num_decoder_layers=2, num_heads=4, num_experts=4,
        num_sparse_encoder_layers=2, num_sparse_decoder_layers=2,
    )  # fmt: skip
    return AutoModelForSeq2SeqLM.from_config(config)


def dbrx() -> nn.Module:
    # the model itself needs a rope setting that its own configuration lacks in some releases
    from transformers.models.dbrx.modeling_dbrx import DbrxFFN

    config = transformers.DbrxConfig(d_model=32, n_heads=4, n_layers=2, vocab_size=64)
    config.ffn_config.hidden_size, config.ffn_config.ffn_hidden_size = 32, 24
    return nn.Sequential(DbrxFFN(config))


REFUSED = {
    llama: r"LlamaForCausalLM: it has no experts, only dense .*model\.layers\.0\.mlp \(LlamaMLP\)",
    gpt2: r"GPT2LMHeadModel: it has no experts, only dense .*transformer\.h\.0\.mlp \(GPT2MLP\)",
    llama4: r"model\.layers\.0\.feed_forward \(Llama4TextMoe\).*do not ask transformers' experts registry",
    jetmoe: r"model\.layers\.0\.mlp \(JetMoeMoE\).* and \d+ more do not ask",
    switch: r"encoder\.block\.0\.layer\.1\.mlp \(SwitchTransformersSparseMLP\).*do not ask",
    dbrx: r"\(DbrxExperts\).*do not ask",
}


@pytest.mark.parametrize("make", REFUSED, ids=lambda make: make.__name__)
def test_where_nothing_can_be_switched_the_modules_are_named(make):
    model = make()
    config = getattr(model, "config", None)
    before = getattr(config, "_experts_implementation", None)
    with pytest.raises(ValueError, match=REFUSED[make]):
        patch(model)
    assert getattr(config, "_experts_implementation", None) == before


QUANTISED = {
    "Parameter of torch.float8_e4m3fn": lambda w: nn.Parameter(w.to(torch.float8_e4m3fn), requires_grad=False),
    "Params4bit of torch.uint8": lambda w: Params4bit(w.to(torch.uint8), requires_grad=False),
    "Int4Tensor of torch.float32": lambda w: nn.Parameter(Int4Tensor(w), requires_grad=False),
}


@pytest.fixture
def group():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kind", QUANTISED)
def test_quantised_experts_are_refused_and_nothing_is_changed(kind, group):
    model = mixtral()
    before = model.config._experts_implementation
    experts = model.model.layers[1].mlp.experts
    experts.down_proj = QUANTISED[kind](experts.down_proj.detach())
    message = rf"layers\.1\.mlp\.experts \(MixtralExperts\) are quantised \({kind}\)"
    for change in (patch, lambda model: parallelize(model, group)):
        with pytest.raises(ValueError, match=message):
            change(model)
        assert model.config._experts_implementation == before
        assert type(experts.gate_up_proj) is nn.Parameter


def replace_forward(module: nn.Module) -> None:
    """As Liger, in Trainer.train(), and `kernels`, for use_kernels=True, do."""

    def forward(self: nn.Module, hidden_states: torch.Tensor, *_: object) -> torch.Tensor:
        return hidden_states

    module.forward = types.MethodType(forward, module)


REPLACED = r"layers\.1\.mlp\.experts can't run through tritonmoe: \S+forward has taken the place of .* of "


@pytest.mark.parametrize(
    ("path", "kind"),
    [("model.layers.1.mlp", "MixtralSparseMoeBlock"), ("model.layers.1.mlp.experts", "MixtralExperts")],
)
def test_a_replaced_forward_is_refused_when_patched_and_when_spread(path, kind, group):
    model, ids = mixtral(), torch.arange(2, 12)[None]
    before = model.config._experts_implementation
    replace_forward(model.get_submodule(path))
    for change in (patch, lambda model: parallelize(model, group)):
        with pytest.raises(ValueError, match=rf"{REPLACED}{kind}\..*liger_kernel_config"):
            change(model)
    assert model.config._experts_implementation == before
    model = mixtral()
    parallelize(model, group)
    model(ids)
    replace_forward(model.get_submodule(path))
    with pytest.raises(ValueError, match=REPLACED + kind):
        model(ids)


def test_a_replaced_forward_of_pefts_wrapper_is_refused(group):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    model = peft.get_peft_model(mixtral(), config)
    replace_forward(model.base_model.model.model.layers[1].mlp.experts)
    with pytest.raises(ValueError, match="has taken the place of the forward of ParamWrapper"):
        patch(model)
    model = mixtral()
    parallelize(model, group)
    adapted = peft.get_peft_model(model, config)
    adapted(torch.arange(2, 12)[None])
    replace_forward(model.model.layers[1].mlp.experts)
    with pytest.raises(ValueError, match="has taken the place of the forward of ParamWrapper"):
        adapted(torch.arange(2, 12)[None])


def hooked_by_accelerate(module: nn.Module) -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    hooks.add_hook_to_module(module, hooks.ModelHook())


def spread_at_loading(module: nn.Module) -> None:
    expert_parallel = pytest.importorskip("transformers.distributed.expert_parallel")  # transformers 5.23
    expert_parallel.ExpertParallelLayer().install_forward(module, None)


def wrapped(module: nn.Module) -> None:
    forward = module.forward
    module.forward = functools.wraps(forward)(lambda *args: forward(*args))


@pytest.mark.parametrize("wrap", [hooked_by_accelerate, spread_at_loading, wrapped])
def test_a_forward_that_calls_that_of_the_class_is_none_of_another(wrap: Callable, num_calls, group):
    model, ids = mixtral(), torch.arange(2, 12)[None]
    for module in (model.model.layers[1].mlp, model.model.layers[1].mlp.experts):
        wrap(module)
    assert patch(model).num_switched == 2
    assert len(model(ids).logits) == 1
    assert len(num_calls) == 2
    parallelize(model, group)
    model(ids)


@pytest.mark.thorough
def test_experts_that_are_compiled_alone_are_switched_and_spread(group):
    for change in (patch, lambda model: parallelize(model, group)):
        model = mixtral()
        block = model.model.layers[1].mlp
        block.experts = torch.compile(block.experts, backend="eager")
        change(model)
        model(torch.arange(2, 12)[None])


def test_computed_experts_are_refused_and_nothing_is_changed(group):
    model = mixtral()
    experts = model.model.layers[1].mlp.experts
    nn.utils.parametrize.register_parametrization(experts, "down_proj", nn.Identity())
    before = model.config._experts_implementation
    with pytest.raises(ValueError, match=r"down_proj of .*layers\.1\.mlp\.experts is computed from other parameters"):
        parallelize(model, group)
    assert model.config._experts_implementation == before
    assert type(model.model.layers[0].mlp.experts.down_proj) is nn.Parameter


def with_shared_scale(size: int, holder: nn.Module | None = None) -> tuple[nn.Module, nn.Parameter]:
    """Return a model of 6 experts with F = 24, the gates of whose second layer multiply by a parameter (size,).

    holder: the module that has the parameter, inside the experts; None for the experts themselves.
    """
    model, scale = mixtral(), nn.Parameter(torch.full((size,), 2.0))
    experts = model.model.layers[1].mlp.experts
    if holder is not None:
        experts.shared = holder
    (experts if holder is None else holder).scale = scale
    gate = experts._apply_gate
    experts._apply_gate = lambda rows: gate(rows) * scale.mean()
    return model, scale


def test_a_parameter_that_all_experts_share_is_never_cut(group):
    """Its first size may be the number of experts by chance."""
    model, _ = with_shared_scale(6)
    before, parameters = model.config._experts_implementation, dict(model.named_parameters())
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts\.scale is \(6,\).*nothing says whether scale"):
        parallelize(model, group)
    assert model.config._experts_implementation == before
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    ids = torch.arange(2, 12)[None]
    for size, holder in ((6, nn.Module()), (24, None)):
        model, scale = with_shared_scale(size, holder)
        parallelize(model, group)
        model(ids).logits.sum().backward()
        assert type(scale) is nn.Parameter
        assert scale.grad.any()
    model = mixtral()
    model.model.layers[1].mlp.experts.scale = nn.Parameter(torch.ones(()))
    parallelize(model, group)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda _: patch("mixtral"), r"model must be a model of transformers, got 'mixtral': load it first"),
        (lambda _: patch(None), "model must be a model of transformers, got None"),
        (lambda _: collect_statistics(None).__enter__(), "model must be a model of transformers, got None"),
        (lambda _: upcycle("dense", 4, 2), "model must be a model of transformers, got 'dense': load it first"),
        (lambda _: parallelize(None, torch.distributed.group.WORLD), "model must be a model of transformers, got None"),
        (lambda model: parallelize(model, torch.distributed.group.WORLD, 4), "overlap must be .*got 4"),
        (lambda _: register(4), "overlap must be .*got 4"),
        (lambda model: parallelize(model, LocalTransport()), "over a ProcessGroup or a DeviceMesh"),
        (lambda model: parallelize(model, "world"), "transport must be a Transport, a ProcessGroup or a DeviceMesh"),
    ],
)
def test_what_is_no_model_and_no_group_is_refused_and_nothing_is_changed(change, message, group):
    model = mixtral()
    with pytest.raises(TypeError, match=message):
        change(model)
    assert model.config._experts_implementation != "tritonmoe"


@pytest.mark.parametrize("kind", QUANTISED)
def test_quantised_experts_never_run_not_even_under_autocast(kind):
    """experts_implementation="tritonmoe" asks no patch(), and a cast would take bits for values."""
    register()
    model = mixtral()
    experts = model.model.layers[1].mlp.experts
    experts.down_proj = QUANTISED[kind](experts.down_proj.detach())
    model.set_experts_implementation("tritonmoe")
    for dtype in (None, torch.bfloat16):
        with (
            torch.autocast("cpu", dtype, enabled=dtype is not None),
            pytest.raises(TypeError, match=r"down_proj is (quantised|a Int4Tensor, not a plain tensor)"),
        ):
            model(torch.arange(2, 12)[None])


def test_quantised_experts_classes_are_refused():
    from transformers.integrations.finegrained_fp8 import FP8Experts

    config = transformers.MixtralConfig(**SIZES, num_local_experts=6, hidden_act="silu")
    with pytest.raises(ValueError, match=r"0 \(FP8Experts\) are quantised"):
        patch(nn.Sequential(FP8Experts(config, block_size=(8, 8))))


def test_mxfp4_experts_on_a_gpu_which_have_no_quantised_parameter_are_refused():
    from transformers.integrations.mxfp4 import Mxfp4GptOssExperts

    config = transformers.GptOssConfig(**SIZES, head_dim=8, num_local_experts=4)
    model = transformers.GptOssForCausalLM(config)
    for layer in model.model.layers:
        experts = layer.mlp.experts = Mxfp4GptOssExperts(config)
        for name in ("gate_up_proj", "down_proj"):
            del experts._parameters[name]
            setattr(experts, name, object())  # a tensor of Triton's
    model.config.quantization_config = transformers.Mxfp4Config()
    for whole in (model, nn.Sequential(model)):
        with pytest.raises(
            ValueError, match=r"Mxfp4GptOssExperts.* are quantised \(mxfp4\).*Mxfp4Config\(dequantize=True"
        ):
            patch(whole)


def test_a_model_upcycled_in_place_runs_tritonmoe_already():
    with pytest.raises(ValueError, match="was upcycled in place, and its experts are tritonmoe's already"):
        patch(upcycle(gpt2(), 4, 2))


def test_experts_that_are_left_are_reported(caplog):
    both = nn.ModuleDict({"mixtral": mixtral(), "llama4": llama4()})
    with caplog.at_level(logging.WARNING, logger="tritonmoe"):
        report = patch(both)
    assert report.num_switched == 2
    assert report.left == ("llama4.model.layers.0.feed_forward", "llama4.model.layers.1.feed_forward")
    assert "left llama4.model.layers.0.feed_forward (Llama4TextMoe)" in caplog.text


def test_a_pickled_patched_model_registers_where_it_is_loaded(monkeypatch):
    """The registry is as in a process that has not heard of tritonmoe."""
    from transformers.integrations.moe import ExpertsInterface

    model = mixtral().eval()
    patch(model)
    ids = torch.arange(6).view(2, 3)
    expected = model(ids).logits
    pickled = pickle.dumps(model)
    monkeypatch.delitem(ExpertsInterface._global_mapping, "tritonmoe")
    with pytest.raises(KeyError, match="tritonmoe"):
        model(ids)
    assert torch.equal(pickle.loads(pickled)(ids).logits, expected)
    assert torch.equal(copy.deepcopy(model)(ids).logits, expected)


def test_parallelize_before_there_are_ranks():
    with pytest.raises(ValueError, match=r"call torch\.distributed\.init_process_group\(\) before parallelize"):
        parallelize(mixtral(), torch.distributed.group.WORLD)
