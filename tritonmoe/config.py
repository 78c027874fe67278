"""Frozen, checked settings: the weights' layout, the activation, the layer, the overlap.

Shapes in this project: T tokens on this rank, D model width, F expert width, E experts, E_local experts on one
rank, K experts per token, W ranks, C chunks, N = T*K routed pairs, R received rows. See docs/glossary.md.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

__all__ = [
    "ACTIVATION_NAMES",
    "MAX_CHUNKS",
    "MAX_PAIRS",
    "Activation",
    "ClampedSwiGLU",
    "ExpertLayout",
    "FusedActivation",
    "KernelOptions",
    "MoEConfig",
    "OverlapConfig",
    "check_activation",
    "is_fused",
]

MAX_CHUNKS = 32
MAX_TOP_K = 16
MAX_EXPERTS = 1024
MAX_PAIRS = 2**31 - 1
"""Positions of pairs are int32."""
ACTIVATION_NAMES = ("silu", "gelu", "gelu_tanh", "relu", "relu2")


@dataclass(frozen=True)
class ClampedSwiGLU:
    """Gated activation with clamped inputs: `g * sigmoid(alpha * g) * (u + up_offset)`.

    g is the gate clamped to at most `limit`; u is the up half clamped to [-limit, limit].
    gpt-oss is `ClampedSwiGLU(7.0, alpha=1.702, up_offset=1.0)`; DeepSeek-V4 is `ClampedSwiGLU(limit)`.
    """

    limit: float
    alpha: float = 1.0
    up_offset: float = 0.0

    def __post_init__(self) -> None:
        if not self.limit > 0:
            raise ValueError(f"ClampedSwiGLU limit must be positive, got {self.limit}")


FusedActivation = str | ClampedSwiGLU
"""An activation that the kernels know: one of ACTIVATION_NAMES, or a ClampedSwiGLU."""

Activation = str | ClampedSwiGLU | Callable[[torch.Tensor], torch.Tensor]
"""A fused activation, or any callable from (n, 2F) rows ((n, F) when ungated) to (n, F) rows."""


def is_fused(activation: Activation) -> bool:
    """Say whether the kernels apply this activation themselves (a name or a ClampedSwiGLU)."""
    return isinstance(activation, (str, ClampedSwiGLU))


def check_activation(activation: Activation, gated: bool) -> None:
    """Raise ValueError or TypeError unless `activation` is one that experts can run."""
    if isinstance(activation, str):
        if activation not in ACTIVATION_NAMES:
            raise ValueError(
                f"activation {activation!r} is not known: choose one of {', '.join(ACTIVATION_NAMES)}, "
                "a ClampedSwiGLU, or pass a callable"
            )
    elif isinstance(activation, ClampedSwiGLU):
        if not gated:
            raise ValueError("ClampedSwiGLU needs a gate and an up half: use gated=True")
    elif not callable(activation):
        raise TypeError(f"activation must be a name, a ClampedSwiGLU or a callable, got {type(activation)}")


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
        if self.interleaved and not self.gated:
            raise ValueError("interleaved=True means alternating gate and up columns: it needs gated=True")

    def intermediate_size(self, hidden_width: int) -> int:
        """Give F from the width of h (2F when gated, F when not)."""
        return hidden_width // 2 if self.gated else hidden_width


class KernelOptions(NamedTuple):
    """How the operations run, whatever they compute; the same for every operation of a layer.

    Shapes, dtypes and values of results don't depend on it beyond the rounding of sums.
    """

    num_sms: int | None = None
    """On a GPU: how many multiprocessors persistent kernels take, the rest stays free (for exchanges, say); None: all.
    """
    batch_invariant: bool = False
    """A row's bits in every result that has rows don't depend on what else is in the batch."""

    def check(self) -> "KernelOptions":
        """Raise TypeError or ValueError unless the fields can be used; give itself."""
        is_integer = isinstance(self.num_sms, int) and not isinstance(self.num_sms, bool)
        if self.num_sms is not None and (not is_integer or self.num_sms < 1):
            raise ValueError(f"num_sms must be None (all) or an integer of at least 1, got {self.num_sms!r}")
        if not isinstance(self.batch_invariant, bool):
            raise TypeError(f"batch_invariant must be True or False, got {self.batch_invariant!r}")
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
    gated: bool = True
    interleaved: bool = False
    transposed: bool = False
    bias: bool = False
    """Whether experts have gate_up_bias (E, 2F) and down_bias (E, D)."""
    score_function: Literal["softmax", "sigmoid"] = "softmax"
    softmax_after_topk: bool = False
    """Softmax over the K chosen logits (Granite, gpt-oss) instead of over all E."""
    renormalize: bool = True
    """Divide the K chosen scores by their sum."""
    routed_scaling_factor: float = 1.0
    """Multiplies the weights last (DeepSeek-V3 uses 2.5)."""
    selection_bias: bool = False
    """DeepSeek-V3: a per-expert bias added for selection only, updated from the load, without a loss."""
    num_expert_groups: int = 1
    """Group-limited routing: experts are split into this many groups ..."""
    top_k_groups: int = 1
    """... and only the best this many groups are eligible for a token."""
    load_balance_loss_weight: float = 0.0
    z_loss_weight: float = 0.0

    def __post_init__(self) -> None:
        for name in ("hidden_size", "intermediate_size", "num_experts", "top_k"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
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
        if self.score_function not in ("softmax", "sigmoid"):
            raise ValueError(f"score_function must be 'softmax' or 'sigmoid', got {self.score_function!r}")
        if self.softmax_after_topk and self.score_function != "softmax":
            raise ValueError("softmax_after_topk=True needs score_function='softmax'")
        if self.num_expert_groups < 1 or self.num_experts % self.num_expert_groups:
            raise ValueError(
                f"num_experts ({self.num_experts}) must be divisible by num_expert_groups ({self.num_expert_groups})"
            )
        if not 1 <= self.top_k_groups <= self.num_expert_groups:
            raise ValueError(
                f"top_k_groups ({self.top_k_groups}) must lie between 1 and "
                f"num_expert_groups ({self.num_expert_groups})"
            )
        eligible = self.num_experts // self.num_expert_groups * self.top_k_groups
        if self.top_k > eligible:
            raise ValueError(
                f"top_k ({self.top_k}) exceeds the {eligible} experts in top_k_groups={self.top_k_groups} "
                f"groups of {self.num_experts // self.num_expert_groups}"
            )

    @property
    def layout(self) -> ExpertLayout:
        return ExpertLayout(self.gated, self.interleaved, self.transposed)


@dataclass(frozen=True)
class OverlapConfig:
    """How a batch is cut into chunks and how the chunks' exchanges meet the compute.

    Raises ValueError for a chunk count outside 1..32.
    """

    num_chunks: int | Literal["auto"] = "auto"
    """Chunks of tokens per call; "auto" measures the first calls and then uses the closed form."""
    local_first: bool = True
    """Run the pairs that this rank owns itself while the first exchange is under way."""
    serial: bool = False
    """Wait for every exchange where it is posted: the non-overlapped baseline of the same chunks."""

    def __post_init__(self) -> None:
        if self.num_chunks == "auto":
            return
        is_integer = isinstance(self.num_chunks, int) and not isinstance(self.num_chunks, bool)
        if not is_integer or not 1 <= self.num_chunks <= MAX_CHUNKS:
            raise ValueError(f"num_chunks must be 'auto' or 1..{MAX_CHUNKS}, got {self.num_chunks!r}")
