"""Tiny random models of dense families, and one batch for each."""

from collections.abc import Callable
from typing import Any

import torch
import transformers as tr
from large_weights import draw_large_weights
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

TEXT = {**LLAMA_LIKE, "head_dim": 8}
AUDIO = {**SIZES, "conv_dim": [16, 16], "conv_kernel": [4, 4], "conv_stride": [2, 2], "num_feat_extract_layers": 2}
AUDIO |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
WHISPER = {"num_mel_bins": 8, "max_source_positions": 8, "max_target_positions": 16, "pad_token_id": 0}
WHISPER |= {"bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
GPT_NEO = {"vocab_size": 64, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "window_size": 8}
GPT_NEO |= {"attention_types": [[["global", "local"], 1]], "max_position_embeddings": 64}
GPT_NEO |= {"bos_token_id": None, "eos_token_id": None}
SWIN = {"image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}
DISTILBERT = {"vocab_size": 64, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4}

MORE_INPLACE: dict[str, tuple[Any, Callable[..., Any], dict[str, Any]]] = {
    "gpt_neo": (tr.GPTNeoForCausalLM, tr.GPTNeoConfig, GPT_NEO),
    "gptj": (tr.GPTJForCausalLM, tr.GPTJConfig, {**GPT2_LIKE, "rotary_dim": 4}),
    "codegen": (tr.CodeGenForCausalLM, tr.CodeGenConfig, {**GPT2_LIKE, "rotary_dim": 4}),
    "gpt_bigcode": (tr.GPTBigCodeForCausalLM, tr.GPTBigCodeConfig, GPT2_LIKE),
    "falcon": (tr.FalconForCausalLM, tr.FalconConfig, {**SIZES, "ffn_hidden_size": 48}),
    "starcoder2": (tr.Starcoder2ForCausalLM, tr.Starcoder2Config, LLAMA_LIKE),
    "glm4": (tr.Glm4ForCausalLM, tr.Glm4Config, TEXT),
    "gemma2": (tr.Gemma2ForCausalLM, tr.Gemma2Config, TEXT),
    "gemma3": (tr.Gemma3ForCausalLM, tr.Gemma3TextConfig, TEXT),
    "cohere": (tr.CohereForCausalLM, tr.CohereConfig, LLAMA_LIKE),
    "stablelm": (tr.StableLmForCausalLM, tr.StableLmConfig, LLAMA_LIKE),
    "smollm3": (tr.SmolLM3ForCausalLM, tr.SmolLM3Config, LLAMA_LIKE),
    "olmo": (tr.OlmoForCausalLM, tr.OlmoConfig, LLAMA_LIKE),
    "persimmon": (tr.PersimmonForCausalLM, tr.PersimmonConfig, SIZES),
    "mbart": (tr.MBartModel, tr.MBartConfig, {**BART, "max_position_embeddings": 64}),
    "pegasus": (tr.PegasusModel, tr.PegasusConfig, {**BART, "max_position_embeddings": 64}),
    "mt5": (tr.MT5Model, tr.MT5Config, T5),
    "umt5": (tr.UMT5Model, tr.UMT5Config, T5),
    "roberta": (tr.RobertaModel, tr.RobertaConfig, SIZES),
    "electra": (tr.ElectraModel, tr.ElectraConfig, {**SIZES, "embedding_size": 32}),
    "mpnet": (tr.MPNetModel, tr.MPNetConfig, SIZES),
    "deberta": (tr.DebertaModel, tr.DebertaConfig, SIZES),
    "deberta_v2": (tr.DebertaV2Model, tr.DebertaV2Config, SIZES),
    "distilbert": (tr.DistilBertModel, tr.DistilBertConfig, DISTILBERT),
    "siglip": (tr.SiglipVisionModel, tr.SiglipVisionConfig, VISION),
    "dinov2": (tr.Dinov2Model, tr.Dinov2Config, VISION),
    "dinov3": (tr.DINOv3ViTModel, tr.DINOv3ViTConfig, VISION),
    "beit": (tr.BeitModel, tr.BeitConfig, VISION),
    "swin": (tr.SwinModel, tr.SwinConfig, SWIN),
    "wav2vec2": (tr.Wav2Vec2Model, tr.Wav2Vec2Config, AUDIO),
    "hubert": (tr.HubertModel, tr.HubertConfig, AUDIO),
    "whisper": (tr.WhisperModel, tr.WhisperConfig, {**BART, **WHISPER}),
}
"""The other families that docs/transformers.md names."""


def make_dense(name: str, **changes: Any) -> Any:
    """Build one of the models above, with weights that are large enough for errors to show."""
    model_class, config_class, fields = (NATIVE | INPLACE | MORE_INPLACE)[name]
    torch.manual_seed(0)
    model = model_class(config_class(**{**fields, **changes}))
    draw_large_weights(model, with_vectors=True)
    return model.eval()


def make_batch(model: Any) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
    if model.main_input_name == "input_values":
        return {"input_values": torch.randn(2, 400, generator=generator)}
    ids = torch.randint(3, 64, (2, 11), generator=generator)
    if model.main_input_name == "input_features":
        return {"input_features": torch.randn(2, 8, 16, generator=generator), "decoder_input_ids": ids}
    return {"input_ids": ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})}


def make_tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate(["<pad>", "<s>", "</s>", *map(str, range(61))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
