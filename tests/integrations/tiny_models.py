"""Tiny random models of dense families, and one batch for each."""

from collections.abc import Callable
from typing import Any

import torch
import transformers as tr
from torch import Tensor

from tritonmoe.integrations.transformers.discovery import experts_classes

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
LLAMA_LIKE = {**SIZES, "num_key_value_heads": 2}
GPT2_LIKE = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
GPT2_LIKE |= {"bos_token_id": None, "eos_token_id": None}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION |= {"image_size": 16, "patch_size": 4}
T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
BART = {"vocab_size": 64, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48}
BART |= {"decoder_ffn_dim": 48, "encoder_attention_heads": 4, "decoder_attention_heads": 4}

NATIVE: dict[str, tuple[Any, Callable[..., Any], dict[str, Any]]] = {
    "llama": (tr.LlamaForCausalLM, tr.LlamaConfig, LLAMA_LIKE),
    "mistral": (tr.MistralForCausalLM, tr.MistralConfig, LLAMA_LIKE),
    "qwen2": (tr.Qwen2ForCausalLM, tr.Qwen2Config, LLAMA_LIKE),
    "qwen3": (tr.Qwen3ForCausalLM, tr.Qwen3Config, {**LLAMA_LIKE, "head_dim": 12}),
    "granite": (tr.GraniteForCausalLM, tr.GraniteConfig, {**LLAMA_LIKE, "residual_multiplier": 0.5}),
    "olmo2": (tr.Olmo2ForCausalLM, tr.Olmo2Config, LLAMA_LIKE),
    "ernie4_5": (tr.Ernie4_5ForCausalLM, tr.Ernie4_5Config, {**LLAMA_LIKE, "head_dim": 12}),
    "hunyuan_v1_dense": (tr.HunYuanDenseV1ForCausalLM, tr.HunYuanDenseV1Config, {**LLAMA_LIKE, "head_dim": 12}),
}
if not any(found.model_type == "granitemoe" for found in experts_classes()):
    del NATIVE["granite"]  # in older releases its twin's experts are two stacks of linears that ask no registry
INPLACE: dict[str, tuple[Any, Callable[..., Any], dict[str, Any]]] = {
    "gpt2": (tr.GPT2LMHeadModel, tr.GPT2Config, GPT2_LIKE),
    "bert": (tr.BertModel, tr.BertConfig, SIZES),
    "opt": (
        tr.OPTForCausalLM,
        tr.OPTConfig,
        {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32},
    ),
    "t5": (tr.T5ForConditionalGeneration, tr.T5Config, T5),
    "t5_gated": (tr.T5ForConditionalGeneration, tr.T5Config, {**T5, "feed_forward_proj": "gated-gelu"}),
    "vit": (tr.ViTModel, tr.ViTConfig, VISION),
    "gemma": (tr.GemmaForCausalLM, tr.GemmaConfig, {**LLAMA_LIKE, "head_dim": 8}),
    "phi": (tr.PhiForCausalLM, tr.PhiConfig, LLAMA_LIKE),
    "phi3": (tr.Phi3ForCausalLM, tr.Phi3Config, LLAMA_LIKE),
    "bart": (tr.BartModel, tr.BartConfig, {**BART, "max_position_embeddings": 64}),
    "gpt_neox": (tr.GPTNeoXForCausalLM, tr.GPTNeoXConfig, SIZES),
    "bloom": (tr.BloomForCausalLM, tr.BloomConfig, {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "clip": (tr.CLIPVisionModel, tr.CLIPVisionConfig, VISION),
    "xlnet": (
        tr.XLNetModel,
        tr.XLNetConfig,
        {"vocab_size": 64, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48},
    ),
    "modernbert": (
        tr.ModernBertModel,
        tr.ModernBertConfig,
        {**SIZES, "cls_token_id": 1, "sep_token_id": 2},
    ),
    "lfm2": (tr.Lfm2ForCausalLM, tr.Lfm2Config, {**LLAMA_LIKE, "layer_types": ["conv", "full_attention"]}),
}
"""clip has an activation that no kernel knows, bart and opt loose linears, bloom's block adds the residual itself."""


def make_dense(name: str, **changes: Any) -> Any:
    """Build a model of NATIVE or INPLACE whose weights are large enough for errors to show."""
    model_class, config_class, fields = (NATIVE | INPLACE)[name]
    torch.manual_seed(0)
    model = model_class(config_class(**{**fields, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
            elif parameter.abs().max() == 0:
                parameter.normal_(std=0.1)
    return model.eval()


def make_batch(model: Any) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
    ids = torch.randint(3, 64, (2, 11), generator=generator)
    return {"input_ids": ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})}
