"""find_model: a Model of a preset, or from any Hugging Face config.json of a model with experts."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tritonmoe.config.layer import is_integer
from tritonmoe.diagnosis.model import Attention, LatentAttention, Model
from tritonmoe.diagnosis.model_presets import MODELS
from tritonmoe.runtime.files import Json, read_json

__all__ = ["expert_load", "find_model", "model_of_config"]


def find_model(name: str) -> Model:
    """Give the model of a preset's name, or of a path to a config.json or its folder.

    Raises:
        ValueError: there is no such preset or file, or the file is no config of a model with experts.
    """
    if name in MODELS:
        return MODELS[name]
    path = Path(name)
    if path.is_dir():
        path = path / "config.json"
    if not path.exists():
        raise ValueError(f"{name!r} is no model: give the path of a config.json, or one of {', '.join(MODELS)}")
    return model_of_config(read_json(path), str(path))


EXPERTS_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
TOP_K_KEYS = ("num_experts_per_tok", "moe_k", "moe_topk")
FULL, WINDOW = "full_attention", "sliding_attention"


def model_of_config(config: Any, path: str) -> Model:
    """Give what a Hugging Face config says of a model's sizes.

    Raises:
        ValueError: it has no experts, lacks a size, or one is impossible. The message names `path` and the key.
    """
    if not isinstance(config, dict):
        raise ValueError(f"{path}: a config is an object of JSON, got {type(config).__name__}")
    text = config.get("text_config")
    config = text if isinstance(text, dict) else config
    read = _Config(config, path)
    kind = config.get("model_type", "a model without model_type")
    experts = next((key for key in EXPERTS_KEYS if config.get(key) is not None), None)
    if experts is None:
        raise ValueError(f"{path}: {kind} has no experts: none of {', '.join(EXPERTS_KEYS)} is there")
    layers = read.size("num_hidden_layers")
    expert_size = read.size("moe_intermediate_size", "intermediate_size")
    dense_layers, window_layers = _dense_layers(read, layers), _window_layers(read, layers)
    shared = read.size("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size", least=0, default=0)
    if not shared:
        shared = read.size("n_shared_experts", "num_shared_experts", least=0, default=0) * expert_size
    groups = read.size("n_group", default=1)
    return Model(
        name=f"{kind} ({path})",
        hidden_size=read.size("hidden_size"),
        num_layers=layers,
        num_dense_layers=dense_layers,
        attention=_attention(read),
        num_experts=read.size(experts),
        top_k=read.size(*TOP_K_KEYS),
        expert_size=expert_size,
        shared_size=shared,
        dense_size=read.size("intermediate_size", default=expert_size),
        vocab_size=read.size("vocab_size"),
        num_groups=groups,
        top_k_groups=read.size("topk_group", default=groups) if groups > 1 else 1,
        is_tied=bool(config.get("tie_word_embeddings", False)),
        window=read.size("sliding_window") if window_layers else 0,
        num_window_layers=window_layers,
    )


class _Config:
    def __init__(self, config: Json, path: str) -> None:
        self.config, self.path = config, path

    def size(self, *keys: str, least: int = 1, default: int | None = None) -> int:
        """Give the whole number under the first of the keys that is there."""
        key = next((key for key in keys if self.config.get(key) is not None), None)
        if key is None:
            if default is None:
                raise ValueError(f"{self.path} lacks {' or '.join(map(repr, keys))}, a whole number")
            return default
        value = self.config[key]
        if not is_integer(value) or not least <= value < 1 << 40:
            raise ValueError(f"{self.path}: {key!r} must be a whole number of at least {least}, got {value!r}")
        return value


def _attention(read: _Config) -> Attention | LatentAttention:
    heads = read.size("num_attention_heads")
    if read.config.get("kv_lora_rank") is not None:
        return LatentAttention(
            heads,
            read.size("q_lora_rank", least=0, default=0),
            read.size("kv_lora_rank"),
            read.size("qk_nope_head_dim"),
            read.size("qk_rope_head_dim"),
            read.size("v_head_dim"),
        )
    head_dim = read.size("head_dim", default=max(1, read.size("hidden_size") // heads))
    return Attention(heads, read.size("num_key_value_heads", default=heads), head_dim)


def _dense_layers(read: _Config, layers: int) -> int:
    """Give how many layers have no experts: the first ones, every n-th, or those of a list."""
    first = read.size("first_k_dense_replace", least=0, default=0)
    listed = read.config.get("mlp_only_layers") or []
    step = read.size("decoder_sparse_step", "moe_layer_freq", default=1)
    if not isinstance(listed, list):
        raise ValueError(f"{read.path}: 'mlp_only_layers' must be a list of layers, got {listed!r}")
    sparse = [n for n in range(layers) if n >= first and n not in listed and (n + 1) % step == 0]
    return layers - len(sparse)


def _window_layers(read: _Config, layers: int) -> int:
    """Give how many layers have attention within a window; ValueError for layers with something else."""
    kinds = read.config.get("layer_types")
    if kinds is None:
        uses = read.config.get("use_sliding_window", read.config.get("model_type") in ("mixtral", "mistral"))
        return layers if uses and read.config.get("sliding_window") else 0
    if not isinstance(kinds, list) or not set(kinds) <= {FULL, WINDOW}:
        others = sorted(map(str, set(kinds) - {FULL, WINDOW})) if isinstance(kinds, list) else kinds
        raise ValueError(f"{read.path}: 'layer_types' has {others}, of which no cost is known; {FULL} and {WINDOW} are")
    return kinds.count(WINDOW)


def expert_load(path: Path, num_experts: int) -> tuple[float, ...]:
    """Give the share of the pairs that each expert gets, from a JSON list of E numbers of pairs.

    Raises:
        ValueError: it is no such list.
    """
    found = read_json(path)
    if isinstance(found, Mapping):
        found = found.get("pairs_per_expert")
    numbers = [of for of in found if isinstance(of, int | float) and of >= 0] if isinstance(found, list) else []
    if len(numbers) != num_experts or not isinstance(found, list) or len(found) != num_experts or not sum(numbers):
        raise ValueError(
            f"{path} must be a list of {num_experts} numbers of pairs, one an expert, not all zero (or an object with "
            "that under pairs_per_expert)"
        )
    return tuple(of / sum(numbers) for of in numbers)
