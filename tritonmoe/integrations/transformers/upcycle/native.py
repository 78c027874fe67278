"""Native upcycling: transformers has an MoE twin of the dense architecture, which differs in its blocks alone."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tritonmoe.integrations.transformers.accumulated_loss import watch_auxiliary_losses
from tritonmoe.integrations.transformers.upcycle.expert_init import SHARED_SCALE, UpcycleSettings, make_experts
from tritonmoe.integrations.transformers.upcycle.ffn_blocks import FFNBlock
from tritonmoe.runtime.files import Json

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["NATIVE_TARGETS", "NativeConversion", "NativeTarget", "build_model"]


@dataclass(frozen=True)
class NativeTarget:
    """How one dense architecture becomes its twin; `config` gives the fields that differ."""

    model_type: str
    class_prefixes: tuple[str, str]
    """What the names of the dense and of the MoE model classes start with."""
    config: Callable[[UpcycleSettings, int, int], Json]
    """From settings, the dense width F and the expert width F / G."""
    block: str = "mlp"
    router: str = "gate.weight"
    shared: str | None = None
    """Name of the shared expert in the block."""
    shared_is_optional: bool = False
    shared_is_gated: bool = False
    """Its output is multiplied by a sigmoid, which starts at one half."""
    shared_width_is_expert_width: bool = False
    zeros: tuple[str, ...] = ()
    """Further parameters of the block, which start at zero."""
    layers: str | None = None
    """How the twin says which layers stay dense: "list", "range", or not at all."""
    has_aux_loss: bool = True


def _sizes(num_experts: str, expert_width: str, **fixed: bool) -> Callable[[UpcycleSettings, int, int], Json]:
    """Return the fields of a twin that has these names for E and F / G, and further fields of fixed values."""
    return lambda settings, _, width: {num_experts: settings.num_experts, expert_width: width, **fixed}


_mixtral = _sizes("num_local_experts", "intermediate_size")
_qwen_moe = _sizes("num_experts", "moe_intermediate_size", norm_topk_prob=True)


def _qwen2_moe(settings: UpcycleSettings, width: int, expert_width: int) -> Json:
    shared_width = width if settings.shared_expert else expert_width
    return {**_qwen_moe(settings, width, expert_width), "shared_expert_intermediate_size": shared_width}


def _ernie4_5_moe(settings: UpcycleSettings, width: int, expert_width: int) -> Json:
    return {
        "moe_num_experts": settings.num_experts,
        "moe_intermediate_size": expert_width,
        "moe_num_shared_experts": settings.granularity if settings.shared_expert else 0,
    }


NATIVE_TARGETS: dict[str, NativeTarget] = {
    "llama": NativeTarget("mixtral", ("Llama", "Mixtral"), _mixtral),
    "mistral": NativeTarget("mixtral", ("Mistral", "Mixtral"), _mixtral),
    "qwen2": NativeTarget(
        "qwen2_moe",
        ("Qwen2", "Qwen2Moe"),
        _qwen2_moe,
        shared="shared_expert",
        shared_is_gated=True,
        zeros=("shared_expert_gate.weight",),
        layers="list",
    ),
    "qwen3": NativeTarget("qwen3_moe", ("Qwen3", "Qwen3Moe"), _qwen_moe, layers="list"),
    "granite": NativeTarget(
        "granitemoe", ("Granite", "GraniteMoe"), _mixtral, block="block_sparse_moe", router="router.weight"
    ),
    "olmo2": NativeTarget(
        "flex_olmo", ("Olmo2", "FlexOlmo"), _sizes("num_experts", "intermediate_size", norm_topk_prob=True)
    ),
    "ernie4_5": NativeTarget(
        "ernie4_5_moe",
        ("Ernie4_5", "Ernie4_5_Moe"),
        _ernie4_5_moe,
        shared="shared_experts",
        shared_is_optional=True,
        zeros=("gate.moe_statics.e_score_correction_bias",),
        layers="range",
    ),
    "hunyuan_v1_dense": NativeTarget(
        "hunyuan_v1_moe",
        ("HunYuanDenseV1", "HunYuanMoEV1"),
        _sizes("num_experts", "intermediate_size"),
        router="gate.wg.weight",
        shared="shared_mlp",
        shared_width_is_expert_width=True,
        has_aux_loss=False,
    ),
}
"""By the dense config's model_type. The twins of OLMo 1, Phi-3 and GLM-4 differ in norms or attention."""

_HARMLESS_FIELDS = (
    "architectures",
    "max_window_layers",
    "pretraining_tp",
    "transformers_version",
)


def build_model(
    model_class: "type[PreTrainedModel]", config: "PreTrainedConfig", dtype: torch.dtype, device: str
) -> "PreTrainedModel":
    """Build a model without drawing its weights: they hold anything until they are loaded."""
    from transformers.initialization import no_init_weights

    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device), no_init_weights():
            return model_class(config)
    finally:
        torch.set_default_dtype(previous)


class NativeConversion:
    """Names and tensors of the MoE twin, given those of the dense model; the dense model may be on the meta device.

    Raises ValueError where the twin can't say what the dense model says.
    """

    def __init__(
        self, dense: "PreTrainedModel", settings: UpcycleSettings, blocks: list[FFNBlock], chosen: list[FFNBlock]
    ) -> None:
        import transformers

        self.settings = settings
        self.blocks = chosen
        self.target = target = NATIVE_TARGETS[dense.config.model_type]
        name = type(dense).__name__
        prefix, moe_prefix = target.class_prefixes
        model_class = getattr(transformers, moe_prefix + name.removeprefix(prefix), None)
        if not name.startswith(prefix) or model_class is None:
            raise ValueError(f"{target.model_type} has no class like {name}; {_INSTEAD}")
        self.model_class = model_class
        # the loss is made from recorded logits; Granite's twin records none in 5.7 and 5.17, among others
        records_logits = "router_logits" in (getattr(model_class, "_can_record_outputs", None) or {})
        self.has_aux_loss = target.has_aux_loss and records_logits
        width = chosen[0].intermediate_size
        for block in blocks:
            if not block.path.endswith(".mlp") or block.intermediate_size != width or block.has_up_bias:
                raise ValueError(f"{target.model_type} has no experts like {name}'s {block.path}; {_INSTEAD}")
        if settings.shared_expert and target.shared is None:
            raise ValueError(f"{target.model_type} has no shared expert; {_INSTEAD}")
        if settings.shared_expert and target.shared_width_is_expert_width and settings.granularity > 1:
            raise ValueError(
                f"{target.model_type} gives its shared expert the width of an expert, so with granularity > 1 it can't "
                f"hold the block; {_INSTEAD}"
            )
        self.config = self._make_config(dense.config, len(blocks), settings.expert_width(width), width)
        self.dtype = next(dense.parameters()).dtype
        self.skeleton = build_model(self.model_class, self.config, self.dtype, "meta")
        self._check_names(dense, name)

    def _make_config(
        self, dense: "PreTrainedConfig", num_layers: int, expert_width: int, width: int
    ) -> "PreTrainedConfig":
        target = self.target
        config_class = self.model_class.config_class
        defaults = config_class()
        known = defaults.to_dict()
        declared = type(dense)().to_dict()  # what else a file brought into its config, the model doesn't read
        own = {key: value for key, value in dense.to_dict().items() if key in declared and key != "model_type"}
        known |= {"head_dim": None}  # the attention of every twin looks for it, declared or not
        if set(own.get("layer_types") or ()) == {"full_attention"} and "layer_types" not in known:
            del own["layer_types"]
        unknown = [key for key, value in own.items() if key not in known and value and key not in _HARMLESS_FIELDS]
        if unknown:
            named = ", ".join(f"{key}={own[key]!r}" for key in unknown)
            raise ValueError(f"{target.model_type} can't express {named}; {_INSTEAD}")
        fields = {key: value for key, value in own.items() if key in known and key not in _HARMLESS_FIELDS}
        wanted = target.config(self.settings, width, expert_width)
        missing = [name for name in wanted if not hasattr(defaults, name)]
        if missing:  # a config takes any field, and its model would not look at these
            raise ValueError(
                f"{target.model_type} of this transformers has no {', '.join(missing)}, so its experts could not be "
                f"set up to equal the block; {_INSTEAD}, or another release of transformers"
            )
        fields |= wanted
        if self.has_aux_loss:
            fields["output_router_logits"] = True
        layers = [block.index for block in self.blocks]
        if target.layers == "range" and layers == list(range(layers[0], layers[-1] + 1)):
            fields |= {"moe_layer_start_index": layers[0], "moe_layer_end_index": layers[-1], "moe_layer_interval": 1}
        elif target.layers == "list":
            fields |= {"mlp_only_layers": [i for i in range(num_layers) if i not in layers], "decoder_sparse_step": 1}
        elif len(layers) != num_layers:
            raise ValueError(f"{target.model_type} can't keep layers other than {layers} dense; {_INSTEAD}")
        config = config_class(**fields)
        config.num_experts_per_tok = self.settings.top_k  # some have another name for it, which this reaches
        config._attn_implementation = dense._attn_implementation
        return config

    def _check_names(self, dense: nn.Module, name: str) -> None:
        replaced = {parameter for block in self.blocks for parameter in block.parameter_names}
        given = {key: tuple(t.shape) for key, t in dense.state_dict().items() if key not in replaced}
        made = {key for block in self.blocks for key in self.block_names(block)}
        wanted = {key: tuple(t.shape) for key, t in self.skeleton.state_dict().items()}
        differing = sorted(key for key in (given.keys() | made) ^ wanted.keys())
        differing += sorted(key for key in given.keys() & wanted.keys() if given[key] != wanted[key])
        if differing:
            raise ValueError(
                f"{name} and {self.model_class.__name__} differ in {', '.join(differing[:4])} "
                f"({len(differing)} tensors); {_INSTEAD}"
            )

    def _prefix(self, block: FFNBlock) -> str:
        return block.path.removesuffix("mlp") + self.target.block + "."

    def _has_shared(self) -> bool:
        return self.target.shared is not None and (self.settings.shared_expert or not self.target.shared_is_optional)

    def block_names(self, block: FFNBlock) -> list[str]:
        """Return the state dict names of the MoE block that stands for `block`."""
        names = [self.target.router, "experts.gate_up_proj", "experts.down_proj", *self.target.zeros]
        if self._has_shared():
            names += [f"{self.target.shared}.{part}_proj.weight" for part in ("gate", "up", "down")]
        return [self._prefix(block) + name for name in names]

    @torch.no_grad()
    def block_state(self, block: FFNBlock, get: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """Return the tensors of the MoE block, `get` being a lookup in the dense state dict."""
        dense, target = block.read(get), self.target
        router, experts = make_experts(self.settings, block.index, dense)
        state = {
            target.router: router,
            "experts.gate_up_proj": experts.gate_up_proj,
            "experts.down_proj": experts.down_proj,
        }
        skeleton, prefix = self.skeleton.state_dict(), self._prefix(block)
        for name in target.zeros:
            state[name] = torch.zeros(skeleton[prefix + name].shape, device=dense.up.device)
        if self._has_shared():
            shared_width = skeleton[f"{prefix}{target.shared}.up_proj.weight"].shape[0]
            scale = (1.0 if target.shared_is_gated else SHARED_SCALE) if self.settings.shared_expert else 0.0
            for name, weight in (("gate_proj", dense.gate), ("up_proj", dense.up)):
                if weight is not None:
                    state[f"{target.shared}.{name}.weight"] = weight[:shared_width].clone()
            state[f"{target.shared}.down_proj.weight"] = dense.down[:, :shared_width] * scale
        return {prefix + name: tensor.to(skeleton[prefix + name].dtype) for name, tensor in state.items()}

    @torch.no_grad()
    def convert(self, dense: "PreTrainedModel") -> nn.Module:
        """Return the MoE model, which shares no memory with the dense one."""
        source = dense.state_dict()
        replaced = {name for block in self.blocks for name in block.parameter_names}
        state = {name: tensor.clone() for name, tensor in source.items() if name not in replaced}
        for block in self.blocks:
            state |= self.block_state(block, source.__getitem__)
        model = build_model(self.model_class, self.config, self.dtype, "cpu")
        model.load_state_dict(state, strict=True, assign=True)
        model.tie_weights()
        if getattr(dense, "generation_config", None) is not None:
            model.generation_config = copy.deepcopy(dense.generation_config)
        watch_auxiliary_losses(model)
        converted: nn.Module = model
        return converted.to(next(dense.parameters()).device).train(dense.training)


_INSTEAD = "use target='inplace', which replaces the blocks in a copy of this model"
