"""Model: the sizes of a transformer with experts, of a preset or from any Hugging Face config.json."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tritonmoe.config.layer import is_integer
from tritonmoe.runtime.files import Json, read_json

__all__ = ["MODELS", "Attention", "LatentAttention", "Model", "expert_load", "find_model", "model_of_config"]


@dataclass(frozen=True)
class Attention:
    """Attention with query heads that share key and value heads."""

    num_heads: int
    num_kv_heads: int
    head_dim: int

    def products(self, hidden_size: int) -> list[tuple[int, int]]:
        """Give the (input, output) widths of the projections."""
        kv = self.num_kv_heads * self.head_dim
        queries = self.num_heads * self.head_dim
        return [(hidden_size, queries + 2 * kv), (queries, hidden_size)]

    @property
    def qk_dim(self) -> int:
        return self.head_dim

    @property
    def v_dim(self) -> int:
        return self.head_dim

    @property
    def rope_width(self) -> int:
        """The columns of a token that are rotated, read and written in between."""
        return (self.num_heads + self.num_kv_heads) * self.head_dim


@dataclass(frozen=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek V2 and V3): queries, keys and values come from narrow latents."""

    num_heads: int
    q_rank: int
    """0: queries come from the hidden state itself."""
    kv_rank: int
    nope_dim: int
    rope_dim: int
    v_dim: int

    def products(self, hidden_size: int) -> list[tuple[int, int]]:
        """Give the (input, output) widths of the projections."""
        queries = self.num_heads * self.qk_dim
        down_up = [(hidden_size, self.q_rank), (self.q_rank, queries)] if self.q_rank else [(hidden_size, queries)]
        return [
            *down_up,
            (hidden_size, self.kv_rank + self.rope_dim),
            (self.kv_rank, self.num_heads * (self.nope_dim + self.v_dim)),
            (self.num_heads * self.v_dim, hidden_size),
        ]

    @property
    def qk_dim(self) -> int:
        return self.nope_dim + self.rope_dim

    @property
    def rope_width(self) -> int:
        """The columns of a token that are rotated or put side by side: queries, keys and values of every head."""
        return self.num_heads * (2 * self.qk_dim + self.v_dim)


@dataclass(frozen=True)
class Model:
    """What decides how much a model computes, sends and holds."""

    name: str
    hidden_size: int
    """D."""
    num_layers: int
    num_dense_layers: int
    """Layers with one feed-forward block of dense_size instead of experts; they come first."""
    attention: Attention | LatentAttention
    num_experts: int
    """E."""
    top_k: int
    """K."""
    expert_size: int
    """F."""
    shared_size: int
    """The width of all shared experts together; 0 for none."""
    dense_size: int
    vocab_size: int
    num_groups: int = 1
    """Experts stand in so many groups ..."""
    top_k_groups: int = 1
    """... of which a token's experts may come from so many."""
    is_tied: bool = False
    """Whether the output layer has the embedding's weights."""
    window: int = 0
    """The tokens that a layer with sliding-window attention sees; 0 where there is none."""
    num_window_layers: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(f"{self.name}: a token's {self.top_k} experts must be 1 to {self.num_experts} of them")
        if not 0 <= self.num_dense_layers < self.num_layers:
            raise ValueError(
                f"{self.name}: of {self.num_layers} layers {self.num_dense_layers} are dense: no layer has experts"
            )
        groups, chosen = self.num_groups, self.top_k_groups
        if not 1 <= chosen <= groups or self.num_experts % groups or self.top_k > self.num_experts // groups * chosen:
            raise ValueError(
                f"{self.name}: {self.top_k} of {self.num_experts} experts can't come from {chosen} of {groups} groups"
            )

    @property
    def attention_parameters(self) -> int:
        return sum(inputs * outputs for inputs, outputs in self.attention.products(self.hidden_size))

    @property
    def expert_parameters(self) -> int:
        """The parameters of one expert."""
        return 3 * self.hidden_size * self.expert_size

    @property
    def other_parameters(self) -> int:
        """The parameters of a layer with experts that are no experts: attention, router, shared experts."""
        return self.attention_parameters + self.hidden_size * (self.num_experts + 3 * self.shared_size)

    @property
    def num_parameters(self) -> int:
        sparse = self.num_layers - self.num_dense_layers
        dense = self.attention_parameters + 3 * self.hidden_size * self.dense_size
        return (
            sparse * (self.other_parameters + self.num_experts * self.expert_parameters)
            + self.num_dense_layers * dense
            + (1 if self.is_tied else 2) * self.vocab_size * self.hidden_size
        )

    def scaled(self, factor: float) -> "Model":
        """Give a model of another size: D, F and all other widths so many times as large, multiples of 128."""

        def width(size: int) -> int:
            return max(128, round(size * factor / 128) * 128) if size else 0

        attention = self.attention
        heads = max(1, round(attention.num_heads * factor))
        if isinstance(attention, Attention):
            attention = replace(attention, num_heads=heads, num_kv_heads=min(heads, attention.num_kv_heads))
        else:
            attention = replace(attention, num_heads=heads, q_rank=width(attention.q_rank))
        return replace(
            self,
            name=f"{self.name} x{factor:g}",
            hidden_size=width(self.hidden_size),
            attention=attention,
            expert_size=width(self.expert_size),
            shared_size=width(self.shared_size),
            dense_size=width(self.dense_size),
        )


MODELS = {
    model.name: model
    for model in (
        Model("Qwen3-30B-A3B", 2048, 48, 0, Attention(32, 4, 128), 128, 8, 768, 0, 6144, 151936),
        Model("Qwen3-235B-A22B", 4096, 94, 0, Attention(64, 4, 128), 128, 8, 1536, 0, 12288, 151936),
        Model("Mixtral-8x7B", 4096, 32, 0, Attention(32, 8, 128), 8, 2, 14336, 0, 14336, 32000),
        Model("OLMoE-1B-7B", 2048, 16, 0, Attention(16, 16, 128), 64, 8, 1024, 0, 1024, 50304),
        Model(
            *("gpt-oss-120b", 2880, 36, 0, Attention(64, 8, 64), 128, 4, 2880, 0, 2880, 201088),
            window=128,
            num_window_layers=18,
        ),
        Model("GLM-4.5", 5120, 92, 3, Attention(96, 8, 128), 160, 8, 1536, 1536, 12288, 151552),
        Model(
            *("DeepSeek-V2", 5120, 60, 1, LatentAttention(128, 1536, 512, 128, 64, 128)),
            *(160, 6, 1536, 3072, 12288, 102400),
            num_groups=8,
            top_k_groups=3,
        ),
        Model(
            *("DeepSeek-V3", 7168, 61, 3, LatentAttention(128, 1536, 512, 128, 64, 128)),
            *(256, 8, 2048, 2048, 18432, 129280),
            num_groups=8,
            top_k_groups=4,
        ),
    )
}


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
