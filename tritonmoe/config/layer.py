"""Frozen, checked settings: the weights' layout, the layer; and one value for each kind of weight.

Shapes in this project: T tokens on this rank, D model width, F expert width, E experts, E_local experts on one
rank, K experts per token, W ranks, C chunks, N = T*K routed pairs, R received rows. See docs/glossary.md.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Generic, Literal, TypeVar

import torch
from typing_extensions import NamedTuple  # typing's is not generic before Python 3.11

from tritonmoe.config.activations import Activation, check_activation
from tritonmoe.config.formats import WeightFormat, find_format, weight_shape
from tritonmoe.config.numbers import check_flags, is_integer, is_number
from tritonmoe.config.precision import ExpertPrecision, check_precision
from tritonmoe.config.scores import ScoreName, check_score

__all__ = [
    "MAX_PAIRS",
    "NO_WEIGHTS",
    "ExpertLayout",
    "KernelOptions",
    "MoEConfig",
    "PerWeight",
    "Projection",
    "check_moe_config",
]

MAX_TOP_K = 16
MAX_EXPERTS = 1024
MAX_PAIRS = 2**31 - 1
"""Positions of pairs are int32."""


@dataclass(frozen=True)
class ExpertLayout:
    """How the expert weights lie in memory; axis order and names are those of transformers.

    transposed=False: gate_up_proj (E, 2F, D) and down_proj (E, D, F); True: (E, D, 2F) and (E, F, D).
    gated=False: F columns instead of 2F. interleaved=True: gate and up alternate along the 2F axis
    (columns 0, 2, 4, ... are the gate) instead of standing one half after the other.
    """

    gated: bool = True
    interleaved: bool = False
    transposed: bool = False

    def __post_init__(self) -> None:
        check_flags(self, "gated", "interleaved", "transposed")
        if self.interleaved and not self.gated:
            raise ValueError("interleaved=True means alternating gate and up columns: it needs gated=True")

    def intermediate_size(self, hidden_width: int) -> int:
        """Return F from the width of h (2F when gated, F when not)."""
        return hidden_width // 2 if self.gated else hidden_width


Value = TypeVar("Value", covariant=True)
Other = TypeVar("Other")


class PerWeight(NamedTuple, Generic[Value]):
    """One value for each kind of weight that experts have: the weights, their gradients, or what is wanted of them.

    ExpertLayout says which shapes the weights have. What stands for a bias, or for a factor of a low-rank adapter, is
    None where the experts have no such thing.
    """

    gate_up_proj: Value
    gate_up_bias: Value | None
    down_proj: Value
    down_bias: Value | None
    gate_up_a: Value | None = None
    gate_up_b: Value | None = None
    down_a: Value | None = None
    down_b: Value | None = None
    gate_up_scales: Value | None = None
    """Those of a gate_up_proj that is packed, as formats.py says; None for a weight that is not."""
    down_scales: Value | None = None

    def map(self, function: Callable[[Value], Other]) -> "PerWeight[Other]":
        """Return function(value) in the place of each value, and None where there is None."""
        return PerWeight(*(None if value is None else function(value) for value in self))  # type: ignore[arg-type]


NO_WEIGHTS: PerWeight[None] = PerWeight(None, None, None, None)


class Projection(NamedTuple):
    """One of the two projections of the experts on this rank, as operations take it.

    The up-projection is gate_up_proj and gate_up_bias, the down-projection is down_proj and down_bias.
    """

    weight: torch.Tensor
    """(E, 2F, D) or (E, D, F); (E, D, 2F) or (E, F, D) if transposed; F instead of 2F if ungated."""
    bias: torch.Tensor | None
    """(E, 2F) or (E, D); None where the experts have none."""
    layout: ExpertLayout
    """How the weight lies, and what its columns mean."""
    addend: torch.Tensor | None = None
    """A row for each pair, in storage order and in the rows' dtype, which is added to the pair's product: to h or y in
    forward, to g or dx in backward; before the product is rounded, but for some products of the torch backend. It may
    be the memory that the result is written to; of `down_grad`, that of scaled_a."""
    scales: torch.Tensor | None = None
    """Of a packed weight (formats.py); then `weight` has its values, and no kernel reads it. uint8 beside the codes of
    an ExpertPrecision, whose last axis is the one that a product sums over, padded to a multiple of 128."""
    weight_of_gradients: torch.Tensor | None = None
    """In an ExpertPrecision: the weight as it is rounded for the gradients of rows; `weight` is rounded too."""
    scales_of_gradients: torch.Tensor | None = None
    """Those of a weight_of_gradients that is codes."""

    @property
    def for_gradients(self) -> "Projection":
        """The projection by which gradients of rows are multiplied."""
        weight, scales = self.weight_of_gradients, self.scales_of_gradients
        if weight is None:
            return self
        layout = self.layout if scales is None else replace(self.layout, transposed=True)
        return self._replace(
            weight=weight, scales=scales, layout=layout, weight_of_gradients=None, scales_of_gradients=None
        )

    def of_experts(self, experts: slice) -> "Projection":
        """Return the projection of some of the experts."""
        names = "weight", "bias", "scales", "weight_of_gradients", "scales_of_gradients"
        weights = {name: getattr(self, name) for name in names}
        parts: dict[str, Any] = {name: None if one is None else one[experts] for name, one in weights.items()}
        return self._replace(**parts)

    @property
    def is_encoded(self) -> bool:
        """Whether the weight is codes of an ExpertPrecision."""
        scales = self.scales
        is_e4m3 = self.weight.dtype == torch.float8_e4m3fn
        return is_e4m3 and scales is not None and scales.dtype == torch.uint8

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight itself, packed or not; of codes theirs."""
        return tuple(self.weight.shape) if self.is_encoded else weight_shape(self.weight, self.scales)


class KernelOptions(NamedTuple):
    """How the operations run, whatever they compute; the same for every operation of a layer.

    Shapes, dtypes and values of results don't depend on it beyond the rounding of sums.
    """

    num_sms: int | None = None
    """On a GPU: how many multiprocessors persistent kernels take, the rest stays free (for exchanges, say); None: all.
    """
    batch_invariant: bool = False
    """A row's bits in every result that has rows don't depend on what else is in the batch."""
    beside_exchanges: bool = False
    """Exchanges or other collectives may hold multiprocessors: without num_sms nobody knows how many are free, and a
    program computes a few tiles at most."""

    def check(self) -> "KernelOptions":
        """Raise TypeError or ValueError unless the fields can be used; give itself."""
        if self.num_sms is not None and (not is_integer(self.num_sms) or self.num_sms < 1):
            raise ValueError(f"num_sms must be None (all) or an integer of at least 1, got {self.num_sms!r}")
        check_flags(self, "batch_invariant")
        return self


@dataclass(frozen=True)
class MoEConfig:
    """Shape, experts and routing of one Mixture-of-Experts layer.

    Raises ValueError, with the rule and the values, for any combination that no layer can run.
    """

    hidden_size: int
    """D, the model width."""
    intermediate_size: int
    """F, the width of one expert."""
    num_experts: int
    """E, over all ranks; at most 1024."""
    top_k: int
    """K, experts per token; at most 16 and at most E."""
    activation: Activation = "silu"
    """silu, gelu, gelu_tanh, relu, relu2, a ClampedSwiGLU, a SoftcappedSwiGLU, or a callable from (n, 2F) rows to
    (n, F)."""
    gated: bool = True
    """Whether the up-projection has a gate half, the first F of its 2F columns."""
    interleaved: bool = False
    """Whether gate and up columns alternate instead: 0, 2, 4, ... are the gate."""
    transposed: bool = False
    """Whether weights are (E, D, 2F) and (E, F, D) instead of (E, 2F, D) and (E, D, F)."""
    bias: bool = False
    """Whether experts have the parameters gate_up_proj_bias (E, 2F) and down_proj_bias (E, D)."""
    expert_precision: ExpertPrecision | None = None
    """How experts that train multiply, e.g. ExpertPrecision("fp8_block"); None: in the dtype of their rows."""
    weight_format: WeightFormat | None = None
    """How gate_up_proj and down_proj are packed, frozen: "mxfp4", "fp8" or "nf4" (see QuantizedWeight); None: not."""
    score_function: ScoreName = "softmax"
    """Of the router's logits: "softmax" over all E experts, or of each one "sigmoid" (DeepSeek-V3) or "sqrtsoftplus",
    the square root of log(1 + exp(logit)) (DeepSeek-V4)."""
    softmax_after_topk: bool = False
    """Softmax over the K chosen logits (Granite, gpt-oss) instead of over all E."""
    renormalize: bool = True
    """Divide the K chosen scores by their sum."""
    routed_scaling_factor: float = 1.0
    """Multiplies the weights last (DeepSeek-V3 uses 2.5)."""
    selection_bias: bool = False
    """DeepSeek-V3: a per-expert bias added for selection only, updated from the load, without a loss."""
    shared_intermediate_size: int = 0
    """F of a shared expert that every token passes, added to the routed ones; 0 for none."""
    num_expert_groups: int = 1
    """Group-limited routing: experts are split into this many groups of neighbours ..."""
    top_k_groups: int = 1
    """... and a token goes only to experts of the best this many groups. A group's score is the sum of its two best
    experts, selection bias included, as in the code of DeepSeek-V3, of GLM-4.5 and dots.llm1 in transformers and of
    torchtitan. Megatron-LM (moe_router_group_topk) sums the K // top_k_groups best instead, which is the same for
    2 * top_k_groups <= K < 3 * top_k_groups alone; DeepSeek-V2 (group_limited_greedy) takes the one best."""
    load_balance_loss_weight: float = 0.0
    """Times the load balance loss in MoELayer.aux_loss; 0.01 is usual."""
    load_balance_over: Literal["rank", "global"] = "rank"
    """Whose tokens the load balance loss keeps balanced: each rank's own, or together those of all ranks of the layer's
    transport, as on one device that has them all (one small all_reduce per forward)."""
    z_loss_weight: float = 0.0
    """Times the router's z-loss in MoELayer.aux_loss."""

    def __post_init__(self) -> None:
        for name in (
            *("hidden_size", "intermediate_size", "num_experts", "top_k"),
            *("num_expert_groups", "top_k_groups"),
        ):
            value = getattr(self, name)
            if not is_integer(value) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        shared = self.shared_intermediate_size
        if not is_integer(shared) or shared < 0:
            raise ValueError(f"shared_intermediate_size must be a positive integer, or 0 for none, got {shared!r}")
        if self.num_experts > MAX_EXPERTS:
            raise ValueError(f"num_experts must be at most {MAX_EXPERTS}, got {self.num_experts}")
        if self.top_k > self.num_experts:
            raise ValueError(
                f"top_k ({self.top_k}) must not exceed num_experts ({self.num_experts}): "
                "a token cannot choose more experts than there are"
            )
        if self.top_k > MAX_TOP_K:
            raise ValueError(f"top_k must be at most {MAX_TOP_K}, got {self.top_k}")
        check_activation(self.activation, self.gated)
        ExpertLayout(self.gated, self.interleaved, self.transposed)
        check_precision(self.expert_precision)
        self._check_format()
        check_flags(self, "bias", "softmax_after_topk", "renormalize", "selection_bias")
        if not is_number(self.routed_scaling_factor) or self.routed_scaling_factor <= 0:
            raise ValueError(f"routed_scaling_factor must be positive and finite, got {self.routed_scaling_factor!r}")
        for name in ("load_balance_loss_weight", "z_loss_weight"):
            if not is_number(getattr(self, name)) or getattr(self, name) < 0:
                raise ValueError(f"{name} must be finite and not negative, got {getattr(self, name)!r}")
        if self.load_balance_over not in ("rank", "global"):
            raise ValueError(f"load_balance_over must be 'rank' or 'global', got {self.load_balance_over!r}")
        check_score(self.score_function)
        if self.softmax_after_topk and self.score_function != "softmax":
            raise ValueError("softmax_after_topk=True needs score_function='softmax'")
        if self.num_experts % self.num_expert_groups:
            raise ValueError(
                f"num_experts ({self.num_experts}) must be divisible by num_expert_groups ({self.num_expert_groups})"
            )
        if self.top_k_groups > self.num_expert_groups:
            raise ValueError(
                f"top_k_groups ({self.top_k_groups}) must not exceed num_expert_groups ({self.num_expert_groups})"
            )
        eligible = self.num_experts // self.num_expert_groups * self.top_k_groups
        if self.top_k > eligible:
            raise ValueError(
                f"top_k ({self.top_k}) exceeds the {eligible} experts in top_k_groups={self.top_k_groups} "
                f"groups of {self.num_experts // self.num_expert_groups}"
            )

    def _check_format(self) -> None:
        if self.weight_format is None:
            return
        if self.expert_precision is not None:
            raise ValueError(
                f"expert_precision is for experts that train, and weight_format={self.weight_format!r} packs frozen "
                "ones: leave one of them out"
            )
        packed = find_format(self.weight_format)
        for shape in self.weight_shapes:
            packed.scales_shape((1, *shape))
        packed.check_width(self.intermediate_size, "choose another intermediate_size, or another weight_format")

    @property
    def weight_shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """The shapes of one expert's gate_up_proj and down_proj."""
        model_width, inner = self.hidden_size, self.intermediate_size
        width = 2 * inner if self.gated else inner
        return (
            ((model_width, width), (inner, model_width))
            if self.transposed
            else ((width, model_width), (model_width, inner))
        )

    @property
    def layout(self) -> ExpertLayout:
        return ExpertLayout(self.gated, self.interleaved, self.transposed)


def check_moe_config(config: object) -> None:
    """Raise TypeError unless this is a MoEConfig."""
    if not isinstance(config, MoEConfig):
        raise TypeError(f"config must be a MoEConfig, got {config!r}: use tritonmoe.MoEConfig(hidden_size=..., ...)")
