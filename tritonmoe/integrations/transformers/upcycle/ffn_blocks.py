"""Find the dense feed-forward blocks of a model, by the names and shapes of their linears, and read their weights."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from tritonmoe.config.activations import Activation
from tritonmoe.integrations.transformers.gates import fused_name
from tritonmoe.integrations.transformers.requirements import WEIGHT_DTYPES, quantisation_method, quantised_kind
from tritonmoe.integrations.transformers.upcycle.expert_init import DenseFFN
from tritonmoe.runtime.wrappers import refuse_computed

__all__ = [
    "FFNBlock",
    "GatedActivation",
    "LayerChoice",
    "find_blocks",
    "parent_and_name",
    "refuse_experts",
    "refuse_quantised",
    "select_blocks",
]

LayerChoice = Literal["all"] | Sequence[int] | Callable[[int, str], bool]


@dataclass(frozen=True)
class _Names:
    """How one group of families names its linears, below the module that holds them all."""

    up: str
    down: str
    gate: str | None = None
    fused: bool = False
    """`up` holds gate and up, one half after the other."""
    whole: bool = False
    """The module computes the block and nothing else, so it is replaced itself; else its linears are."""
    activation: str | None = None
    """The activation where the module has none to look at."""
    shared: bool = False
    """One block serves several layers."""


NAMES = (
    _Names("up_proj", "down_proj", gate="gate_proj", whole=True),  # llama, mistral, qwen, gemma, olmo, granite, cohere
    _Names("gate_up_proj", "down_proj", fused=True, whole=True),  # phi3, glm4
    _Names("w3", "w2", gate="w1", whole=True, activation="silu"),  # lfm2
    _Names("Wi", "Wo", fused=True, whole=True),  # modernbert
    _Names("wi_1", "wo", gate="wi_0", whole=True),  # t5 v1.1, mt5, umt5
    _Names("wi", "wo", whole=True),  # t5
    _Names("fc1", "fc2"),  # phi, clip, siglip, vit; on the layer itself in opt, bart, mbart, pegasus, whisper
    _Names("up_proj", "down_proj"),  # dinov3_vit
    _Names("c_fc", "c_proj"),  # gpt2 (Conv1D), gpt_neo, gpt_bigcode, starcoder2
    _Names("fc_in", "fc_out"),  # gptj, codegen
    _Names("dense_h_to_4h", "dense_4h_to_h"),  # gpt_neox, bloom, persimmon, falcon
    _Names("intermediate_dense", "output_dense"),  # wav2vec2, hubert
    _Names("intermediate.dense", "output.dense"),  # bert, roberta, electra, mpnet, deberta
    _Names("layer_1", "layer_2"),  # xlnet
    _Names("lin1", "lin2"),  # distilbert
    _Names("ffn", "ffn_output", shared=True),  # albert
)
ACTIVATION_ATTRIBUTES = (
    *("act", "act_fn", "activation", "activation_fn", "activation_function", "intermediate_act_fn", "gelu_impl"),
)
INNER_DROPOUT_NAMES = ("activation_dropout", "intermediate_dropout")


class GatedActivation:
    """act(gate) * up on rows that hold the gate's half, then up's; for activations that the kernels don't know."""

    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        self.act = act

    def __call__(self, rows: Tensor) -> Tensor:
        gate, up = rows.chunk(2, dim=-1)
        return self.act(gate) * up


@dataclass(frozen=True)
class FFNBlock:
    """One dense block: where its linears are, and what has to become of the modules around them."""

    index: int
    """Position among the model's blocks, in the order of its modules."""
    path: str
    """The module that the MoE layer replaces."""
    up: str
    down: str
    gate: str | None
    fused: bool
    has_conv1d: bool
    """The linears are transformers' Conv1D, whose weight is (in, out)."""
    hidden_size: int
    intermediate_size: int
    has_up_bias: bool
    has_down_bias: bool
    activation: Activation
    act_path: str | None
    """The module attribute that holds the activation; silenced when only linears are replaced."""
    whole: bool
    inner_dropouts: tuple[str, ...]

    @property
    def gated(self) -> bool:
        return self.fused or self.gate is not None

    @property
    def parameter_names(self) -> list[str]:
        """State dict names of the block's weights and biases."""
        linears = [(self.up, self.has_up_bias), (self.down, self.has_down_bias)]
        linears += [(self.gate, self.has_up_bias)] if self.gate else []
        names = [f"{linear}.weight" for linear, _ in linears]
        return names + [f"{linear}.bias" for linear, has_bias in linears if has_bias]

    def read(self, get: Callable[[str], Tensor]) -> DenseFFN:
        """Return the block's weights, `get` being a state dict's lookup: (out, in), gate and up apart."""

        def weight(linear: str) -> Tensor:
            found = get(f"{linear}.weight")
            return found.T if self.has_conv1d else found

        up, gate = weight(self.up), weight(self.gate) if self.gate else None
        up_bias = get(f"{self.up}.bias") if self.has_up_bias else None
        gate_bias = get(f"{self.gate}.bias") if self.gate and self.has_up_bias else None
        if self.fused:
            gate, up = up.chunk(2)
            gate_bias, up_bias = up_bias.chunk(2) if up_bias is not None else (None, None)
        down_bias = get(f"{self.down}.bias") if self.has_down_bias else None
        return DenseFFN(up, weight(self.down), gate, up_bias, gate_bias, down_bias)


def refuse_experts(model: nn.Module) -> None:
    """Raise ValueError where the model is a Mixture of Experts, or was upcycled."""
    for path, module in model.named_modules():
        if path.rpartition(".")[2] == "experts" or type(module).__name__.endswith(("Experts", "MoELayer")):
            raise ValueError(
                f"{type(model).__name__} has experts already (at {path}): upcycling starts from a dense model"
            )


def find_blocks(model: nn.Module) -> list[FFNBlock]:
    """Return every dense feed-forward block of the model, in the order of its modules.

    Raises ValueError, before anything is changed, where upcycling can't work: no block, experts already, quantised
    weights, weights that several layers share.
    """
    name = type(model).__name__
    refuse_quantised(model)
    refuse_experts(model)
    blocks: list[FFNBlock] = []
    for path, module in model.named_modules():
        for names in NAMES:
            block = _match(len(blocks), path, module, names)
            if block is not None:
                if names.shared:
                    raise ValueError(
                        f"{name} shares one feed-forward block ({block.up}) between its layers, so they can't get "
                        "experts of their own; upcycle a model whose layers have weights of their own"
                    )
                blocks.append(block)
                break
    if not blocks:
        known = ", ".join(f"{n.gate + '/' if n.gate else ''}{n.up}/{n.down}" for n in NAMES if not n.shared)
        raise ValueError(
            f"found no dense feed-forward block in {name}: none of its modules holds linears (D to F and F back to D) "
            f"called {known}, and nothing else of width F beside them"
        )
    _refuse_tied(model, blocks)
    return blocks


def select_blocks(blocks: list[FFNBlock], layers: LayerChoice) -> list[FFNBlock]:
    """Return the blocks that `layers` names: "all", a list of positions, or a function of (position, path)."""
    if callable(layers):
        chosen = [block for block in blocks if layers(block.index, block.path)]
    elif isinstance(layers, str):
        if layers != "all":
            raise ValueError(f"layers must be 'all', a list of positions or a function, got {layers!r}")
        chosen = blocks
    else:
        if not isinstance(layers, Iterable) or not all(isinstance(index, int) for index in layers):
            raise ValueError(f"layers must be 'all', a list of positions or a function, got {layers!r}")
        outside = [index for index in layers if not 0 <= index < len(blocks)]
        if outside:
            raise ValueError(f"layers {outside} don't exist: the model has {len(blocks)} blocks, 0..{len(blocks) - 1}")
        chosen = [blocks[index] for index in sorted(set(layers))]
    if not chosen:
        raise ValueError(f"layers chose none of the {len(blocks)} feed-forward blocks")
    return chosen


def parent_and_name(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """Return the module that holds `path`, and the attribute's name there."""
    parent, _, name = path.rpartition(".")
    return model.get_submodule(parent), name


def _submodule(module: nn.Module, path: str) -> nn.Module | None:
    found: object = module
    for part in path.split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, nn.Module) else None


def _linear_shape(module: object) -> tuple[int, int] | None:
    """Return (in, out) of a Linear or Conv1D, None for anything else."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, Conv1D):
        return module.weight.shape[0], module.weight.shape[1]
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return None


def _match(index: int, path: str, module: nn.Module, names: _Names) -> FFNBlock | None:
    up, down = _submodule(module, names.up), _submodule(module, names.down)
    gate = _submodule(module, names.gate) if names.gate else None
    up_shape, down_shape = _linear_shape(up), _linear_shape(down)
    if up is None or down is None:
        return None
    if up_shape is None or down_shape is None or (names.gate and _linear_shape(gate) != up_shape):
        return None
    model_width, width = up_shape[0], up_shape[1] // 2 if names.fused else up_shape[1]
    if down_shape != (width, model_width) or (not names.whole and _holds_more(module, names, width)):
        return None
    if names.whole and {id(p) for p in module.parameters()} != {
        id(p) for linear in (up, down, gate) if linear is not None for p in linear.parameters()
    }:
        return None  # it computes something else as well
    for name, linear in ((names.up, up), (names.down, down), (names.gate, gate)):
        if linear is not None:
            refuse_computed(f"{path}.{name}", linear, ("weight", "bias"), "upcycle()")
    prefix = f"{path}." if path else ""
    holder_path = f"{prefix}{names.up}".rpartition(".")[0]
    holder = _submodule(module, names.up.rpartition(".")[0]) if "." in names.up else module
    act_name = next((name for name in ACTIVATION_ATTRIBUTES if callable(getattr(holder, name, None))), None)
    act = names.activation if act_name is None else getattr(holder, act_name)
    if act is None:
        return None
    if isinstance(act, nn.Module) and next(act.parameters(), None) is not None:
        raise ValueError(f"the activation of {path} has parameters, which experts would share: it can't be upcycled")
    gated = names.fused or gate is not None
    activation = act if isinstance(act, str) else fused_name(act) or (GatedActivation(act) if gated else act)
    dropouts = tuple(f"{prefix}{name}" for name in INNER_DROPOUT_NAMES if hasattr(module, name))
    return FFNBlock(
        index=index,
        path=path if names.whole else f"{prefix}{names.up}",
        up=f"{prefix}{names.up}",
        down=f"{prefix}{names.down}",
        gate=f"{prefix}{names.gate}" if names.gate else None,
        fused=names.fused,
        has_conv1d=not isinstance(up, nn.Linear),
        hidden_size=model_width,
        intermediate_size=width,
        has_up_bias=up.bias is not None,
        has_down_bias=down.bias is not None,
        activation=activation,
        act_path=None if act_name is None else f"{holder_path}.{act_name}" if holder_path else act_name,
        whole=names.whole,
        inner_dropouts=dropouts,
    )


def _holds_more(module: nn.Module, names: _Names, width: int) -> bool:
    """Return whether another parameter has the width between `up` and `down`, as a norm between them or a gate has.

    It is looked for where the linears are and one module below: deeper, an attention's may have that width by chance.
    """
    for holder in {"", names.up.rpartition(".")[0], names.down.rpartition(".")[0]}:
        linears = tuple(f"{name.removeprefix(holder).lstrip('.')}." for name in (names.up, names.down))
        for name, parameter in module.get_submodule(holder).named_parameters():
            if name.count(".") <= 1 and not name.startswith(linears) and width in parameter.shape:
                return True
    return False


def refuse_quantised(model: nn.Module) -> None:
    """Raise ValueError where the model's config or a parameter says that its weights are quantised."""
    method = quantisation_method(model)
    reason = None if method is None else f"quantization_config in its config: {method}"
    for name, parameter in model.named_parameters():
        kind = quantised_kind(parameter)
        if kind is not None:
            reason = f"{name} is {kind}"
            break
    if reason:
        raise ValueError(
            f"{type(model).__name__} is quantised ({reason}): load it dequantised, in one of "
            f"{', '.join(map(str, WEIGHT_DTYPES))}, and quantise the result"
        )


def _refuse_tied(model: nn.Module, blocks: list[FFNBlock]) -> None:
    seen: dict[int, str] = {}
    own = {name for block in blocks for name in block.parameter_names}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        other = seen.setdefault(id(parameter), name)
        if other != name and (name in own or other in own):
            raise ValueError(
                f"the feed-forward weights {other} and {name} are tied, so their blocks can't get experts of their own"
            )
