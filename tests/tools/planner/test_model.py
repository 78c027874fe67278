"""Models from Hugging Face configs are those that the presets say; what is no model with experts is refused by name."""

import json
import re
from pathlib import Path

import pytest
import torch

from tritonmoe.tools.planner.model_config import MODELS, find_model, model_of_config
from tritonmoe.tools.planner.transformer_model import Attention, LatentAttention

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


SETTINGS = {
    "cohere2_moe": {"num_shared_experts": 2, "first_k_dense_replace": 2, "prefix_dense_intermediate_size": 4096},
    "deepseek_v2": {"num_experts_per_tok": 6, "first_k_dense_replace": 1},
    "dots1": {"n_routed_experts": 128, "n_shared_experts": 2, "num_experts_per_tok": 6, "first_k_dense_replace": 1},
    "doge": {"is_moe": True},
    "ernie4_5_moe": {"moe_layer_start_index": 3, "moe_layer_end_index": 20, "moe_layer_interval": 2},
    "flint": {"decoder_sparse_step": 2},
    "gemma4_text": {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 512},
    "granitemoe_swa": {"shared_intermediate_size": 1024},
    "granitemoeshared": {"shared_intermediate_size": 1024},
    "hunyuan_v1_moe": {"num_experts": 16, "head_dim": 128},
    "lfm2_moe": {"layer_types": ["conv"] * 31 + ["full_attention"]},
    "llama4_text": {"interleave_moe_layer_step": 3},
    "qwen3_moe": {"mlp_only_layers": [0, 5]},
}
"""What a family's default config leaves out, or doesn't show."""
READ = {
    *("afmoe", "aria_text", "axk1", "beam", "cohere2_moe", "deepseek_v2", "deepseek_v3", "dots1", "ernie4_5_moe"),
    *("exaone_moe", "flex_olmo", "flint", "glm4_moe", "glm4_moe_lite", "gpt_oss", "granitemoe", "granitemoe_swa"),
    *("granitemoeshared", "hunyuan_v1_moe", "hy_v3", "kolibri1", "laguna", "llama4_text", "mellum", "minimax_m2"),
    *("mixtral", "olmoe", "phimoe", "qwen2_moe", "qwen3_moe", "sarvam_mla", "sarvam_moe", "solar_open"),
    *("glm4v_moe_text", "minimax_m3_vl_text", "qwen3_vl_moe_text"),
}
"""The families that must not be refused."""
NOT_COUNTED = re.compile(r"bias|self_attn\.(gate|g)_proj|shared_expert_gate")
"""Nor are norms and other vectors."""


def families_with_experts() -> list[str]:
    """Return transformers' language models whose configs speak of experts, by their sources."""
    auto = transformers.models.auto
    causal, base = auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, auto.modeling_auto.MODEL_MAPPING_NAMES
    folders = Path(transformers.__file__).parent / "models"
    return [
        family
        for family in sorted({*causal, *(family for family in base if family.endswith("_text"))})
        for folder in [folders / auto.configuration_auto.model_type_to_module_name(family)]
        if any("expert" in path.read_text(encoding="utf-8") for path in folder.glob("configuration_*.py"))
        if not hasattr(transformers.AutoConfig.for_model(family), "text_config")  # else that is a family of its own
    ]


def is_refused_by_name(config: dict) -> bool:
    try:
        model_of_config(config, "a/config.json")
    except ValueError as error:
        return bool(re.match(r"a/config\.json: .*'\w+'", str(error)))
    return False


@pytest.mark.thorough
@pytest.mark.parametrize("family", families_with_experts())
def test_a_family_is_read_as_it_is_or_refused_by_name(family):
    config = transformers.AutoConfig.for_model(family, **SETTINGS.get(family, {}))
    given = json.loads(config.to_json_string())
    if family not in READ and is_refused_by_name(given):
        return
    model = model_of_config(given, "a/config.json")
    causal = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    with torch.device("meta"):
        kind = transformers.AutoModelForCausalLM if family in causal else transformers.AutoModel
        real = dict(kind.from_config(config).named_parameters())
    found = sum(one.numel() for one in real.values())
    if kind is transformers.AutoModel and not model.is_tied:
        found += model.vocab_size * model.hidden_size
    experts = sum(one.numel() for one in real.values() if one.dim() == 3)
    not_counted = sum(one.numel() for name, one in real.items() if NOT_COUNTED.search(name) or one.dim() == 1)
    counted = (model.num_layers - model.num_dense_layers) * model.num_experts * model.expert_parameters
    assert counted == experts
    assert model.num_parameters - counted == pytest.approx(found - experts - not_counted, rel=1e-4)
    assert model.num_parameters == pytest.approx(found, rel=0.01)


def test_the_families_that_are_read_are_many():
    assert len(READ.intersection(families_with_experts())) >= 25


@pytest.mark.parametrize(
    ("change", "num_dense"),
    [
        ({"moe_layer_freq": 2, "first_k_dense_replace": 1}, 4),
        ({"moe_layer_freq": [0, 1, 1, 0, 1, 1]}, 2),
        ({"moe_layers": [1, 4]}, 4),
        ({"moe_layer_start_index": 1, "moe_layer_end_index": 3}, 3),
        ({"moe_layer_end_index": -1}, 0),
        ({"num_dense_layers": 2, "mlp_only_layers": [1, 5]}, 3),
        ({"mlp_layer_types": ["dense", "sparse"] * 3, "first_k_dense_replace": 1}, 3),
    ],
)
def test_layers_without_experts(change, num_dense):
    model = model_of_config({**GOOD, "num_hidden_layers": 6, **change}, "a/config.json")
    assert model.num_dense_layers == num_dense


def test_a_token_sees_half_of_a_chunk():
    chunks = {"layer_types": ["chunked_attention", "full_attention"], "attention_chunk_size": 8192}
    model = model_of_config({**GOOD, **chunks}, "a/config.json")
    assert (model.window, model.num_window_layers) == (4096, 1)


def test_the_whole_model_says_whether_its_output_layer_is_tied():
    text = {**GOOD, "tie_word_embeddings": True}
    assert model_of_config({"text_config": text}, "a/config.json").is_tied
    assert not model_of_config({"text_config": text, "tie_word_embeddings": False}, "a/config.json").is_tied


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
        ({"hidden_size": 0}, "'hidden_size' must be a whole number of 1 to 1099511627775, got 0"),
        ({"num_hidden_layers": 10_001}, "'num_hidden_layers' must be a whole number of 1 to 10000, got 10001"),
        ({"num_experts_per_tok": 9}, "a token's 9 experts must be 1 to 8"),
        ({"first_k_dense_replace": 2}, "no layer has experts"),
        ({"n_group": 3}, "can't come from 3 of 3 groups"),
        ({"mlp_only_layers": 3}, "'mlp_only_layers' must be a list"),
        ({"layer_types": ["linear_attention", "full_attention"]}, "linear_attention"),
        ({"layer_types": ["full_attention"]}, "'layer_types' must be a list of 2 layers"),
        ({"layer_types": ["chunked_attention", "sliding_attention"]}, "at most one of them"),
        ({"mlp_layer_types": ["moe", "hash_moe"]}, "'mlp_layer_types' has hash_moe, moe"),
        ({"layers_block_type": ["mamba", "attention"]}, "'layers_block_type' has mamba"),
        ({"attn_type_list": [0, 1]}, "'attn_type_list' has 0"),
        ({"num_attention_heads_per_layer": [4, 8]}, "'num_attention_heads_per_layer' has 8"),
        ({"moe_layers": [2]}, "'moe_layers' must be a list of layers below 2"),
        ({"sliding_window": 128}, "for which layers 'sliding_window' is"),
        ({"v_head_dim": 8}, "'v_head_dim' 8 is not the 16 columns"),
        ({"hybrid_override_pattern": "ME*-"}, "layers without attention .*'hybrid_override_pattern'"),
        ({"num_experts": None, "ffn_config": {"moe_num_experts": 4}}, "the experts of some_moe are in 'ffn_config'"),
        ({"num_experts": None, "a": {"b": {"num_experts": 4}}}, "the experts of some_moe are in 'a'"),
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
