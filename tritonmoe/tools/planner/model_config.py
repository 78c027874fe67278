"""find_model: a Model of a preset, or from any Hugging Face config.json of a model with experts."""

from collections.abc import Mapping
from pathlib import Path

from tritonmoe.config.numbers import is_integer, is_number
from tritonmoe.runtime.files import Json, read_json
from tritonmoe.tools.planner.transformer_model import Attention, LatentAttention, Model
from tritonmoe.tools.report.terminal import one_line

__all__ = ["MODELS", "expert_load", "find_model", "model_of_config"]

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
        Model(
            *("gpt-oss-20b", 2880, 24, 0, Attention(64, 8, 64), 32, 4, 2880, 0, 2880, 201088),
            window=128,
            num_window_layers=12,
        ),
        Model("Mixtral-8x22B", 6144, 56, 0, Attention(48, 8, 128), 8, 2, 16384, 0, 16384, 32768),
        Model("GLM-4.5", 5120, 92, 3, Attention(96, 8, 128), 160, 8, 1536, 1536, 12288, 151552),
        Model(
            *("DeepSeek-V2-Lite", 2048, 27, 1, LatentAttention(16, 0, 512, 128, 64, 128)),
            *(64, 6, 1408, 2816, 10944, 102400),
        ),
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
        Model(
            *("Kimi-K2", 7168, 61, 1, LatentAttention(64, 1536, 512, 128, 64, 128)),
            *(384, 8, 2048, 2048, 18432, 163840),
        ),
    )
}


def find_model(name: str) -> Model:
    """Return the model of a preset's name, or of a path to a config.json or its folder.

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


MAX_LAYERS = 10_000
"""Far beyond any model: published ones have some 100. Their list is built, and walked through."""
EXPERTS_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
TOP_K_KEYS = ("num_experts_per_tok", "moe_k", "moe_topk")
SHARED_SIZE_KEYS = (
    "shared_expert_intermediate_size",
    "moe_shared_expert_intermediate_size",
    "shared_intermediate_size",
    "share_expert_dim",
)
NUM_SHARED_KEYS = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")
DENSE_SIZE_KEYS = (
    "intermediate_size_mlp",
    "prefix_dense_intermediate_size",
    "dense_intermediate_size",
    "intermediate_size",
)
ALWAYS_SHARED = ("hunyuan_v1_moe", "llama4_text")
"""Families whose layers have one shared expert more than any key says."""
FULL = "full_attention"
WINDOWS = {"sliding_attention": ("sliding_window", 1), "chunked_attention": ("attention_chunk_size", 2)}
"""Layers with a window -> the key of its size, and what that is divided by: a token sees half a chunk, in the mean."""
SPARSE, DENSE = "sparse", "dense"
CHANGES = {
    "layers without attention": (
        *("attn_layer_period", "conv_L_cache", "full_attention_interval", "hybrid_override_pattern"),
        *("layer_group_size", "linear_attn_config", "linear_conv_kernel_dim", "mamba_d_state", "ssm_state_size"),
    ),
    "attention to chosen tokens": ("compress_ratios", "index_topk", "keep_window_size", "sparse_attention_config"),
    "attention that differs between layers": (
        *("hybrid_layer_pattern", "per_layer_config", "swa_head_dim", "swa_num_attention_heads"),
    ),
    "attention that has experts": ("kv_channels",),
    "experts of a width of their own": ("moe_hidden_size", "moe_latent_size"),
    "experts that compute nothing": ("zero_expert_num",),
    "experts beside a dense block": ("enable_moe_block",),
    "experts in some layers by a rule of its own": ("expert_layer_period", "moe_layers_enum"),
    "several residual streams": ("hc_count", "hc_mult"),
    "layers that run several times": ("loop_num_passes",),
    "an encoder": ("is_encoder_decoder",),
}
"""What a step's model doesn't know -> the keys that say that a model has it."""
CHANGED_KINDS = {"ergo": "experts without a gate", "minicpm5_moe": "attention with a gate"}
"""Families that have what a step's model doesn't know, and no key that says so."""
ALL_WINDOW = ("mixtral", "mistral", "phimoe")
"""Families of which every layer has the window, where there is one."""


def model_of_config(config: object, path: str) -> Model:
    """Return what a Hugging Face config says of a model's sizes.

    Raises:
        ValueError: it has no experts, or what a step's model doesn't know; it lacks a size, or one is impossible. The
            message names `path` and the key.
    """
    if not isinstance(config, dict):
        raise ValueError(f"{path}: a config is an object of JSON, got {type(config).__name__}")
    text = config.get("text_config")
    if isinstance(text, dict):
        config = {**text, "tie_word_embeddings": config.get("tie_word_embeddings", text.get("tie_word_embeddings"))}
    read = _Config(config, path)
    kind, path = one_line(config.get("model_type", "a model without model_type")), one_line(path)
    for what, keys in CHANGES.items():
        if there := [key for key in keys if config.get(key)]:
            raise ValueError(
                f"{path}: {kind} has {what} ({there[0]!r}), and the planner doesn't know its cost: give a model "
                "without it"
            )
    if change := CHANGED_KINDS.get(kind):
        raise ValueError(
            f"{path}: {kind!r} has {change}, and the planner doesn't know its cost: give a model without it"
        )
    experts = next((key for key in EXPERTS_KEYS if config.get(key) is not None), None)
    if experts is None:
        if inside := next(filter(lambda key: _has_experts(config[key]), config), None):
            raise ValueError(
                f"{path}: the experts of {kind} are in {inside!r}, and the planner reads only configs with the "
                "experts at the top: give that part as a config"
            )
        raise ValueError(f"{path}: {kind} has no experts: none of {', '.join(EXPERTS_KEYS)} is there")
    layers = read.size("num_hidden_layers")
    expert_size = read.size("moe_intermediate_size", "intermediate_size")
    window, window_layers = _window(read, layers)
    shared = read.size(*SHARED_SIZE_KEYS, least=0, default=0)
    if not shared:
        shared = (read.size(*NUM_SHARED_KEYS, least=0, default=0) + (kind in ALWAYS_SHARED)) * expert_size
    groups = read.size("n_group", default=1)
    return Model(
        name=f"{kind} ({path})",
        hidden_size=read.size("hidden_size"),
        num_layers=layers,
        num_dense_layers=_dense_layers(read, layers),
        attention=_attention(read),
        num_experts=read.size(experts),
        top_k=read.size(*TOP_K_KEYS),
        expert_size=expert_size,
        shared_size=shared,
        dense_size=read.size(*DENSE_SIZE_KEYS, default=expert_size),
        vocab_size=read.size("vocab_size"),
        num_groups=groups,
        top_k_groups=read.size("topk_group", default=groups) if groups > 1 else 1,
        is_tied=bool(config.get("tie_word_embeddings", False)),
        window=window,
        num_window_layers=window_layers,
    )


def _has_experts(of: object) -> bool:
    """Return whether a part of a config speaks of experts."""
    return isinstance(of, dict) and (not of.keys().isdisjoint(EXPERTS_KEYS) or any(map(_has_experts, of.values())))


class _Config:
    def __init__(self, config: Json, path: str) -> None:
        self.config, self.path = config, path

    def size(self, *keys: str, least: int = 1, default: int | None = None) -> int:
        """Return the whole number under the first of the keys that is there."""
        key = next((key for key in keys if self.config.get(key) is not None), None)
        if key is None:
            if default is None:
                raise ValueError(f"{self.path} lacks {' or '.join(map(repr, keys))}, a whole number")
            return default
        value = self.config[key]
        most = MAX_LAYERS if key == "num_hidden_layers" else (1 << 40) - 1
        if not is_integer(value) or not least <= value <= most:
            raise ValueError(f"{self.path}: {key!r} must be a whole number of {least} to {most}, got {value!r}")
        return value

    def layers(self, key: str, *known: object) -> list[object]:
        """Return what the list under a key says of each layer, [] where there is none; `known` is what it can say."""
        found, number = self.config.get(key), self.size("num_hidden_layers")
        if not found:
            return []
        if not isinstance(found, list) or len(found) != number:
            raise ValueError(f"{self.path}: {key!r} must be a list of {number} layers, got {found!r}")
        if others := sorted({str(one) for one in found if one not in known}):
            said = ", ".join(map(str, known))
            raise ValueError(f"{self.path}: {key!r} has {', '.join(others)}, whose cost isn't known; known are {said}")
        return found

    def listed(self, key: str) -> set[int]:
        """Return the layers in the list under a key."""
        found, number = self.config.get(key) or [], self.size("num_hidden_layers")
        if not isinstance(found, list) or not all(is_integer(one) and 0 <= one < number for one in found):
            raise ValueError(f"{self.path}: {key!r} must be a list of layers below {number}, got {found!r}")
        return set(found)


def _attention(read: _Config) -> Attention | LatentAttention:
    heads = read.size("num_attention_heads")
    read.layers("attn_type_list", 1)  # 1 is attention
    read.layers("num_attention_heads_per_layer", heads)
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
    if read.size("v_head_dim", default=head_dim) != head_dim:
        raise ValueError(
            f"{read.path}: 'v_head_dim' {read.config['v_head_dim']} is not the {head_dim} columns of a head, which "
            "without 'kv_lora_rank' a step's model doesn't know"
        )
    return Attention(heads, read.size("num_key_value_heads", default=heads), head_dim)


def _dense_layers(read: _Config, layers: int) -> int:
    """Return how many layers have no experts: by a list of all, or those before the first, listed, or not the n-th."""
    if kinds := read.layers("mlp_layer_types", SPARSE, DENSE):
        return kinds.count(DENSE)
    if isinstance(read.config.get("moe_layer_freq"), list):
        return read.layers("moe_layer_freq", 0, 1).count(0)
    if sparse := read.listed("moe_layers"):
        return layers - len(sparse)
    first = read.size("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index", least=0, default=0)
    last = read.size("moe_layer_end_index", least=-1, default=-1)
    step = read.size("decoder_sparse_step", "moe_layer_interval", "interleave_moe_layer_step", default=1)
    frequency = read.size("moe_layer_freq", default=1)
    candidates = range(first, layers if last == -1 else min(last + 1, layers))
    sparse = {n for n in candidates if (n + 1) % step == 0 and n % frequency == 0}
    return layers - len(sparse - read.listed("mlp_only_layers"))


def _window(read: _Config, layers: int) -> tuple[int, int]:
    """Return the tokens that attention within a window sees, and how many layers have it; twice 0 where none has."""
    read.layers("layers_block_type", "attention", FULL)
    if kinds := read.layers("layer_types", FULL, *WINDOWS):
        there = [kind for kind in WINDOWS if kind in kinds]
        if len(there) > 1:
            raise ValueError(
                f"{read.path}: 'layer_types' has {' and '.join(there)}: the planner knows at most one of them in a "
                "model"
            )
        return (read.size(WINDOWS[there[0]][0]) // WINDOWS[there[0]][1], kinds.count(there[0])) if there else (0, 0)
    uses = read.config.get("use_sliding_window", read.config.get("model_type") in ALL_WINDOW or None)
    for key, _ in WINDOWS.values():
        if uses is None and read.config.get(key):
            raise ValueError(
                f"{read.path}: for which layers {key!r} is, no 'layer_types' says; transformers writes it: "
                "AutoConfig.from_pretrained(...).save_pretrained(...)"
            )
    return (read.size("sliding_window"), layers) if uses and read.config.get("sliding_window") else (0, 0)


def expert_load(path: Path, num_experts: int) -> tuple[float, ...]:
    """Return the share of the pairs that each expert gets, from a JSON list of E numbers of pairs.

    Raises:
        ValueError: it is no such list.
    """
    found = read_json(path)
    if isinstance(found, Mapping):
        found = found.get("pairs_per_expert")
    numbers = [of for of in found if is_number(of) and of >= 0] if isinstance(found, list) else []
    if len(numbers) != num_experts or not isinstance(found, list) or len(found) != num_experts or not sum(numbers):
        raise ValueError(
            f"{path} must be a list of {num_experts} numbers of pairs, one an expert, not all zero (or an object that "
            "has this list under pairs_per_expert)"
        )
    return tuple(of / sum(numbers) for of in numbers)
