"""Models from Hugging Face configs are those that the presets say; what is no model with experts is refused by name."""

import json

import pytest

from tritonmoe.diagnosis.model import Attention, LatentAttention
from tritonmoe.diagnosis.model_config import find_model, model_of_config
from tritonmoe.diagnosis.model_presets import MODELS

transformers = pytest.importorskip("transformers")


def test_deepseek_v3_as_transformers_has_it():
    model = model_of_config(transformers.DeepseekV3Config().to_dict(), "config.json")
    preset = MODELS["DeepSeek-V3"]
    assert {**vars(model), "name": ""} == {**vars(preset), "name": ""}
    assert preset.num_parameters == pytest.approx(671e9, rel=0.003)


def test_qwen3_moe():
    config = transformers.Qwen3MoeConfig(num_hidden_layers=48, mlp_only_layers=[0, 3]).to_dict()
    model = model_of_config(config, "config.json")
    assert model.num_dense_layers == 2
    assert model.attention == Attention(32, 4, 64)  # this config has no head_dim: D / heads
    assert (model.num_experts, model.top_k, model.expert_size, model.dense_size) == (128, 8, 768, 6144)
    assert MODELS["Qwen3-30B-A3B"].num_parameters == pytest.approx(30.5e9, rel=0.01)


def test_gpt_oss_has_windows():
    model = model_of_config(transformers.GptOssConfig().to_dict(), "config.json")
    assert {**vars(model), "name": ""} == {**vars(MODELS["gpt-oss-120b"]), "name": ""}


@pytest.mark.parametrize(
    ("kind", "experts", "top_k", "shared"),
    [
        ("MixtralConfig", 8, 2, 0),
        ("OlmoeConfig", 64, 8, 0),
        ("Glm4MoeConfig", 128, 8, 1408),
        ("Qwen2MoeConfig", 60, 4, 5632),
    ],
)
def test_other_families(kind, experts, top_k, shared):
    model = model_of_config(getattr(transformers, kind)().to_dict(), "config.json")
    assert (model.num_experts, model.top_k, model.shared_size) == (experts, top_k, shared)


def test_deepseek_v2():
    assert isinstance(MODELS["DeepSeek-V2"].attention, LatentAttention)
    assert MODELS["DeepSeek-V2"].num_parameters == pytest.approx(236e9, rel=0.005)


def test_a_config_without_experts_is_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(transformers.LlamaConfig().to_dict()))
    with pytest.raises(ValueError, match="llama has no experts"):
        find_model(str(tmp_path))


GOOD = {
    "model_type": "some_moe",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "vocab_size": 100,
}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"hidden_size": None}, "lacks 'hidden_size'"),
        ({"hidden_size": "64"}, "'hidden_size' must be a whole number"),
        ({"hidden_size": 0}, "'hidden_size' must be a whole number of at least 1"),
        ({"num_experts_per_tok": 9}, "a token's 9 experts must be 1 to 8"),
        ({"first_k_dense_replace": 2}, "no layer has experts"),
        ({"n_group": 3}, "can't come from 3 of 3 groups"),
        ({"mlp_only_layers": 3}, "'mlp_only_layers' must be a list"),
        ({"layer_types": ["linear_attention", "full_attention"]}, "linear_attention"),
    ],
)
def test_an_impossible_config_is_refused_with_its_key(change, says):
    model_of_config(GOOD, "a/config.json")
    with pytest.raises(ValueError, match=says) as raised:
        model_of_config({**GOOD, **change}, "a/config.json")
    assert "a/config.json" in str(raised.value)


def test_no_config(tmp_path):
    with pytest.raises(ValueError, match="is no model: give the path"):
        find_model("DeepSeek-V9")
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match="a config is an object"):
        find_model(str(tmp_path / "config.json"))
    (tmp_path / "config.json").write_text('{"hidden_size": ')
    with pytest.raises(ValueError, match="damaged or half written"):
        find_model(str(tmp_path))


def test_a_scaled_model_has_about_so_many_times_the_width():
    half = MODELS["DeepSeek-V3"].scaled(0.5)
    assert (half.hidden_size, half.expert_size, half.num_experts) == (3584, 1024, 256)
    assert all(model.scaled(1.0) == model for model in MODELS.values())
