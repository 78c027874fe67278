"""experts_implementation="tritonmoe" against "eager": whole tiny models, and every experts class of transformers."""

import functools
import importlib
import importlib.metadata
import inspect
import pathlib
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import transformers
from large_weights import draw_large_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DeepseekV3Config, GptOssConfig, MixtralConfig, Qwen3MoeConfig

import tritonmoe as tm
from tritonmoe.config.activations import ClampedSwiGLU, SoftcappedSwiGLU, is_fused
from tritonmoe.integrations.transformers import experts as experts_module
from tritonmoe.integrations.transformers import register
from tritonmoe.integrations.transformers.discovery import experts_classes, is_experts
from tritonmoe.integrations.transformers.gates import CLAMPED_GATES, choose_activation, fused_name, named_activation
from tritonmoe.routing import TopKRouter, save_topk

register()

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts_per_tok": 3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
MODELS: dict[str, Callable] = {
    "mixtral": functools.partial(MixtralConfig, **SIZES, num_local_experts=6),
    "qwen3_moe": functools.partial(Qwen3MoeConfig, **SIZES, num_experts=6, moe_intermediate_size=12),
    "gpt_oss": functools.partial(GptOssConfig, **SIZES, num_local_experts=6),
    "deepseek_v3": functools.partial(
        DeepseekV3Config,
        **{**SIZES, "num_key_value_heads": 4},
        moe_intermediate_size=12,
        n_routed_experts=6,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=None,
        kv_lora_rank=8,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
    ),
}


def make_model(name: str, num_hidden_layers: int = 2, experts_implementation: str = "eager") -> nn.Module:
    torch.manual_seed(0)
    config = MODELS[name](num_hidden_layers=num_hidden_layers)
    model = AutoModelForCausalLM.from_config(config, experts_implementation=experts_implementation)
    draw_large_weights(model, with_vectors=True)
    return model.eval()


def run_model(model: nn.Module, experts_implementation: str, use_autocast: bool = False) -> dict[str, Tensor]:
    """Logits and the gradient of every parameter, by name."""
    model.set_experts_implementation(experts_implementation)
    model.zero_grad()
    torch.manual_seed(1)
    ids = torch.randint(2, 64, (2, 17))
    with torch.autocast("cpu", torch.bfloat16, enabled=use_autocast):
        output = model(input_ids=ids, labels=ids)
    output.loss.backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {"logits": output.logits.detach(), **grads}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    expected = expected.double()
    return ((actual.double() - expected).norm() / expected.norm().clamp(min=1e-30)).item()


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    errors = {name: relative_error(actual[name], expected[name]) for name in expected}
    assert max(errors.values()) < 1e-5, errors


def assert_as_good_as(actual: dict[str, Tensor], plain: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    """At most twice the error that plain PyTorch makes in the same dtype, plus a small floor."""
    assert actual.keys() == plain.keys() == truth.keys()
    for name in truth:
        allowed = 2 * relative_error(plain[name], truth[name]) + 1e-4
        assert relative_error(actual[name], truth[name]) <= allowed, name


@pytest.fixture
def moe_mlp_calls(monkeypatch) -> list[tuple[torch.dtype, object]]:
    """What the experts are run with on one device: (dtype of the rows, activation) of each call."""
    calls = []
    one_device = experts_module.run_experts

    def recorded(spec, tensors):
        calls.append((tensors.x.dtype, spec.activation))
        return one_device(spec, tensors)

    monkeypatch.setattr(experts_module, "run_experts", recorded)
    return calls


# Whole models


@pytest.mark.parametrize("name", MODELS)
def test_logits_gradients_and_generation_equal_eager(name, moe_mlp_calls):
    model = make_model(name)
    expected = run_model(model, "eager")
    prompt = torch.randint(2, 64, (2, 5))
    generate = functools.partial(model.generate, prompt, max_new_tokens=8, do_sample=False)
    expected_tokens = generate()
    assert not moe_mlp_calls
    assert_same(run_model(model, "tritonmoe"), expected)
    assert len(moe_mlp_calls) == (1 if name == "deepseek_v3" else 2)
    fused = ClampedSwiGLU(7.0, alpha=1.702, up_offset=1.0) if name == "gpt_oss" else "silu"
    assert {activation for _, activation in moe_mlp_calls} == {fused}
    assert torch.equal(generate(), expected_tokens)
    assert len(moe_mlp_calls) > 8


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_bf16_models(name):
    # one layer: there both see the same router input, so that no choice of experts can flip between them
    truth = run_model(make_model(name, 1).double(), "eager")
    model = make_model(name, 1).bfloat16()
    assert_as_good_as(run_model(model, "tritonmoe"), run_model(model, "eager"), truth)


def test_autocast_computes_the_experts_in_its_dtype(moe_mlp_calls):
    truth = run_model(make_model("mixtral", 1).double(), "eager")
    model = make_model("mixtral", 1)
    ours = run_model(model, "tritonmoe", use_autocast=True)
    assert [dtype for dtype, _ in moe_mlp_calls] == [torch.bfloat16]
    assert all(grad.dtype == torch.float32 for name, grad in ours.items() if name != "logits")
    assert_as_good_as(ours, run_model(model, "eager", use_autocast=True), truth)


def test_from_config_and_from_pretrained(tmp_path, moe_mlp_calls):
    model = make_model("mixtral", experts_implementation="tritonmoe")
    ids = torch.arange(2, 12)[None]
    expected = model(ids).logits
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="tritonmoe")
    assert torch.equal(loaded(ids).logits, expected)
    assert len(moe_mlp_calls) == 4


@pytest.mark.parametrize(
    "options",
    [{"use_reentrant": False}, {"use_reentrant": True}, {"use_reentrant": False, "context_fn": save_topk}],
    ids=["non_reentrant", "reentrant", "save_topk"],
)
def test_activation_checkpointing_gives_the_same_gradients(options):
    model = make_model("qwen3_moe").train()
    expected = run_model(model, "tritonmoe")
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(options)
    else:
        model.gradient_checkpointing_enable(options)
    assert_same(run_model(model, "tritonmoe"), expected)


# Every experts class


class SmallConfig:
    """Has the fields that experts classes read, so that they can be built without their model."""

    num_local_experts = num_experts = n_routed_experts = moe_num_experts = 6
    hidden_size = moe_hidden_size = 16
    intermediate_size = moe_intermediate_size = expert_ffn_hidden_size = 12
    moe_latent_size = None
    hidden_act = hidden_activation = "silu"
    mlp_hidden_act = "relu2"
    swiglu_limit = 0.7
    swiglu_limits = (0.7,)
    limit_after_act = True
    swiglu_alpha = 1.702
    mlp_gate_softcap = mlp_up_softcap = mlp_softcap = 2.0
    post_norm_eps = rms_norm_eps = 1e-6

    def __init__(self) -> None:
        self._experts_implementation = "eager"


SUBCLASSES = {"ErgoExpertProjections": "ErgoExperts"}
"""Of classes that models only have as a base."""


def make_experts(module_name: str, class_name: str) -> nn.Module:
    kind = getattr(importlib.import_module(module_name), SUBCLASSES.get(class_name, class_name))
    of_layer = {"layer_idx": 0} if "layer_idx" in inspect.signature(kind).parameters else {}
    module = kind(SmallConfig(), **of_layer)
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def run_experts(experts: nn.Module, implementation: str, inputs: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
    """Output and the gradients of rows, weights and every parameter, by name."""
    experts.config._experts_implementation = implementation
    x, ids, weights = inputs
    dtype = experts.down_proj.dtype
    x, weights = x.to(dtype).requires_grad_(), weights.clone().requires_grad_()
    out = experts(x, ids, weights)
    names, parameters = zip(*experts.named_parameters(), strict=True)
    dout = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    grads = torch.autograd.grad(out, [x, weights, *parameters], dout)
    assert out.dtype == x.dtype
    return {"out": out.detach(), **dict(zip(["x", "weights", *names], grads, strict=True))}


def make_expert_inputs(num_tokens: int = 11, top_k: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    ids = torch.stack([torch.randperm(6, generator=generator)[:top_k] for _ in range(num_tokens)])
    x = torch.randn(num_tokens, 16, generator=generator)
    return x, ids, torch.rand(num_tokens, top_k, generator=generator)


ALL_CLASSES = [(found.module_name, found.name) for found in experts_classes()]
OVERRIDDEN = [pair for pair in ALL_CLASSES if pair[1] in CLAMPED_GATES]


@pytest.mark.parametrize(("module_name", "class_name"), ALL_CLASSES, ids=[name for _, name in ALL_CLASSES])
def test_every_experts_class_equals_eager(module_name, class_name):
    experts = make_experts(module_name, class_name)
    assert is_experts(experts)
    inputs = make_expert_inputs()
    assert_same(run_experts(experts, "tritonmoe", inputs), run_experts(experts, "eager", inputs))


def test_a_forward_around_the_registered_one_is_one_of_experts():
    """As Ergo's, which has a norm behind it; another forward may do anything."""

    class Doubled(type(find_class("MixtralExperts"))):
        def forward(self, *tensors: Tensor) -> Tensor:
            return 2 * super().forward(*tensors)

    class Other(Doubled):
        def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            return x * weights.sum(1, keepdim=True)

    assert is_experts(Doubled(SmallConfig()))
    assert not is_experts(Other(SmallConfig()))


def test_the_sweep_finds_the_classes():
    models = pathlib.Path(transformers.__file__).parent / "models"
    marks = sum(path.read_text().count("\n@use_experts_impl") for path in models.glob("*/modeling_*.py"))
    assert len(ALL_CLASSES) == marks >= 30


@pytest.mark.parametrize("found", experts_classes(), ids=lambda found: found.name)
def test_what_the_sources_say_of_a_class_is_what_it_does(found):
    experts = make_experts(found.module_name, found.name)
    assert found.is_gated == experts.has_gate
    assert found.is_transposed == experts.is_transposed
    assert found.has_bias == experts.has_bias
    assert found.is_interleaved == (not getattr(experts, "is_concatenated", found.name != "GptOssExperts"))
    assert found.has_post_expert_norm == getattr(experts, "has_post_expert_norm", False)
    activation, _ = choose_activation(experts)
    assert named_activation(found).endswith("fused") == is_fused(activation)


def test_the_sweep_covers_every_kind_of_class():
    assert {"MixtralExperts", "Qwen3MoeExperts", "GptOssExperts", "NemotronHExperts"} <= {n for _, n in ALL_CLASSES}


@pytest.mark.parametrize(("module_name", "class_name"), OVERRIDDEN, ids=[name for _, name in OVERRIDDEN])
def test_clamped_gates_are_fused(module_name, class_name):
    experts = make_experts(module_name, class_name)
    activation, is_interleaved = choose_activation(experts)
    assert isinstance(activation, ClampedSwiGLU)
    assert is_interleaved == (not experts.is_concatenated)


@pytest.mark.parametrize("name", ["Inkling2Experts", "Inkling2LoopExperts"])
def test_softcapped_gates_are_fused(name):
    experts = find_class(name)
    experts.act_fn.gate_softcap.softcap = 1.5
    assert choose_activation(experts) == (SoftcappedSwiGLU(1.5, 2.0), False)
    inputs = make_expert_inputs()
    assert_same(run_experts(experts, "tritonmoe", inputs), run_experts(experts, "eager", inputs))
    experts.act_fn = nn.Bilinear(1, 1, 1)
    assert choose_activation(experts)[0] == experts._apply_gate


def find_class(name: str) -> nn.Module:
    pairs = [pair for pair in ALL_CLASSES if pair[1] == name]
    if not pairs:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    return make_experts(*pairs[0])


@pytest.mark.parametrize("name", ["MixtralExperts", "GptOssExperts", "NemotronHExperts", "BeamExperts"])
def test_bf16_experts(name):
    inputs = make_expert_inputs(num_tokens=40)
    experts = find_class(name).bfloat16()
    experts.limit = 7.0  # the small limit of the sweep cuts many rows, and rounding to bf16 decides which
    ours, plain = (run_experts(experts, implementation, inputs) for implementation in ("tritonmoe", "eager"))
    truth = run_experts(experts.double(), "eager", (inputs[0].bfloat16(), *inputs[1:]))
    assert_as_good_as(ours, plain, truth)


@pytest.mark.parametrize(("module_name", "class_name"), ALL_CLASSES, ids=[name for _, name in ALL_CLASSES])
def test_routes_to_other_ranks_are_skipped(module_name, class_name):
    experts = make_experts(module_name, class_name)
    x, ids, weights = make_expert_inputs()
    is_skipped = torch.zeros_like(ids, dtype=torch.bool)
    is_skipped[0] = is_skipped[1, 2] = is_skipped[5, 0] = True
    expected = run_experts(experts, "eager", (x, ids, weights.masked_fill(is_skipped, 0.0)))
    expected["weights"].masked_fill_(is_skipped, 0.0)
    foreign_ids = ids.masked_fill(is_skipped, 6)
    foreign_ids[0, 1] = -1
    actual = run_experts(experts, "tritonmoe", (x, foreign_ids, weights))
    assert_same(actual, expected)
    assert (actual["weights"][is_skipped] == 0).all()
    assert (actual["x"][0] == 0).all()


@pytest.mark.parametrize("name", ["MixtralExperts", "MuseSparkExperts", "NemotronHExperts", "BeamExperts"])
def test_no_tokens(name):
    outputs = run_experts(find_class(name), "tritonmoe", make_expert_inputs(num_tokens=1))
    empty = run_experts(
        find_class(name), "tritonmoe", (torch.zeros(0, 16), torch.zeros(0, 3, dtype=torch.int64), torch.zeros(0, 3))
    )
    assert empty["out"].shape == (0, 16)
    assert empty.keys() == outputs.keys()
    assert all((grad == 0).all() for grad in empty.values())


# Choosing the activation


def test_a_replaced_gate_is_called_and_not_guessed(monkeypatch):
    inputs = make_expert_inputs()
    experts = find_class("MixtralExperts")
    experts._apply_gate = lambda gate_up: gate_up[:, :12] * 2.0
    assert choose_activation(experts)[0] is experts._apply_gate
    outputs = run_experts(experts, "tritonmoe", inputs)
    experts.config._experts_implementation = "grouped_mm"
    assert_same({"out": outputs["out"]}, {"out": experts(*inputs).detach()})

    class Halved(type(find_class("GptOssExperts"))):
        def _apply_gate(self, gate_up: Tensor) -> Tensor:
            return super()._apply_gate(gate_up) / 2

    halved = Halved(SmallConfig())
    assert choose_activation(halved)[0] == halved._apply_gate

    monkeypatch.setattr(type(experts), "_apply_gate", lambda self, gate_up: gate_up[:, 12:])
    patched = find_class("MixtralExperts")
    assert choose_activation(patched)[0] == patched._apply_gate


@pytest.mark.parametrize(
    ("hidden_act", "expected"),
    [
        ("silu", "silu"),
        ("swish", "silu"),
        ("gelu", "gelu"),
        ("gelu_python", "gelu"),
        ("gelu_pytorch_tanh", "gelu_tanh"),
        ("gelu_new", "gelu_tanh"),
        ("relu", "relu"),
        ("relu2", "relu2"),
        ("mish", None),
        ("quick_gelu", None),
        ("gelu_10", None),
    ],
)
def test_activations_by_name(hidden_act, expected):
    assert fused_name(transformers.activations.ACT2FN[hidden_act]) == expected
    experts = find_class("MixtralExperts")
    experts.act_fn = transformers.activations.ACT2FN[hidden_act]
    inputs = make_expert_inputs()
    assert_same(run_experts(experts, "tritonmoe", inputs), run_experts(experts, "eager", inputs))


def test_unfused_and_foreign_activations():
    assert fused_name(nn.GELU()) == "gelu"
    assert fused_name(nn.GELU(approximate="tanh")) == "gelu_tanh"
    assert fused_name(nn.functional.silu) == "silu"

    class SiLU(nn.Module):
        """Not torch's."""

    assert fused_name(SiLU()) is None
    assert fused_name(None) is None


# Registering


def test_registering_twice_is_fine_and_the_signature_is_theirs():
    register()
    register()
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

    assert ALL_EXPERTS_FUNCTIONS["tritonmoe"] is experts_module.experts_forward
    assert (
        inspect.signature(experts_module.experts_forward).parameters.keys()
        == inspect.signature(grouped_mm_experts_forward).parameters.keys()
    )


@pytest.mark.parametrize("version", ["4.57.6", "5.0.0", "5.6.2"])
def test_old_transformers_are_refused(version, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda _: version)
    with pytest.raises(ImportError, match=rf"transformers {version} is too old.*5\.7 or later"):
        register()


def test_missing_transformers_is_said(monkeypatch):
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(ImportError, match="not installed"):
        register()


@pytest.mark.thorough
def test_importing_the_integration_imports_no_transformers():
    code = "import sys, tritonmoe.integrations.transformers; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_router_chooses_and_weighs_as_deepseek_v4(backend: str) -> None:
    family = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")
    sizes = {"num_experts_per_tok": 3, "num_local_experts": 12, "hidden_size": 16, "routed_scaling_factor": 1.5}
    theirs = family.DeepseekV4TopKRouter(SimpleNamespace(**sizes, scoring_func="sqrtsoftplus"))
    options = {"score_function": "sqrtsoftplus", "selection_bias": True, "routed_scaling_factor": 1.5}
    ours = TopKRouter(tm.MoEConfig(16, 8, num_experts=12, top_k=3, **options), backend=backend)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        theirs.weight.normal_(generator=generator)
        theirs.e_score_correction_bias.normal_(generator=generator)
    ours.load_state_dict(theirs.state_dict(), strict=False)
    x, dout = torch.randn(40, 16, generator=generator), torch.randn(40, 12, generator=generator)

    def spread(ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return torch.zeros(40, 12).scatter(1, ids, weights)

    logits, weights, ids = theirs(x)
    routing = ours(x)
    torch.testing.assert_close(routing.logits, logits)
    expected, actual = spread(ids, weights), spread(routing.topk_ids, routing.topk_weights)
    torch.testing.assert_close(actual, expected)
    grads = [
        torch.autograd.grad((of * dout).sum(), router.weight)[0] for of, router in ((expected, theirs), (actual, ours))
    ]
    torch.testing.assert_close(*grads)
