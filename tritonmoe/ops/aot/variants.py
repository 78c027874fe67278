"""The layers whose kernels are compiled: layouts, activations, formats, shapes and batch sizes of published models."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from tritonmoe.config.activations import ClampedSwiGLU, FusedActivation
from tritonmoe.config.formats import WeightFormat
from tritonmoe.config.layer import ExpertLayout, KernelOptions
from tritonmoe.config.precision import ExpertPrecision
from tritonmoe.config.routing import RoutingRule

__all__ = ["DEFAULT_VARIANTS", "VARIANTS", "Variant"]


@dataclass(frozen=True)
class Variant:
    """One layer whose kernels are compiled; the default is Qwen3-30B-A3B's."""

    dtype: torch.dtype = torch.bfloat16
    layout: ExpertLayout = field(default_factory=ExpertLayout)
    activation: FusedActivation = "silu"
    hidden_size: int = 2048
    intermediate_size: int = 768
    num_experts: int = 128
    top_k: int = 8
    bias: bool = True
    weight_format: WeightFormat | None = None
    """Of packed weights, which have no gradients; None for plain ones."""
    precision: ExpertPrecision | None = None
    """With one, only the products of codes and what makes these, on cards that have the instruction."""
    adapter_rank: int = 0
    """R of low-rank adapters on both projections; 0 for none."""
    routing: RoutingRule = field(default_factory=lambda: RoutingRule(0))
    """How the router chooses; its top_k is replaced by the layer's, and where scores are no softmax it has a bias."""
    num_rows: int = 16384
    """The rows of one device; with several ranks what one rank receives, and num_experts is what it holds."""
    num_ranks: int = 1
    """With several ranks, rows come in chunks, and products run beside exchanges."""
    options: KernelOptions = KernelOptions()
    tiles: Mapping[str, int | str] = field(default_factory=dict)
    """Fields that replace those of the table in every operation's TileConfig, as a measured entry would."""

    @classmethod
    def of(cls, shape: Any, dtype: torch.dtype, num_rows: int) -> "Variant":
        """Return the variant of a `benchmarks.shapes.LayerShape`."""
        names = ("layout", "activation", "hidden_size", "intermediate_size", "num_experts", "top_k", "bias")
        of_shape = {name: getattr(shape, name) for name in (*names, "weight_format")}
        return cls(dtype, num_rows=num_rows, **of_shape)


_CLAMPED = ClampedSwiGLU(7.0, alpha=1.702, up_offset=1.0)
_GPT_OSS = Variant(
    layout=ExpertLayout(interleaved=True, transposed=True),
    activation=_CLAMPED,
    hidden_size=2880,
    intermediate_size=2880,
    num_experts=128,
    top_k=4,
    routing=RoutingRule(0, softmax_after_topk=True),
)
_DEEPSEEK = Variant(
    hidden_size=7168,
    intermediate_size=2048,
    num_experts=256,
    bias=False,
    routing=RoutingRule(0, "sigmoid", routed_scaling_factor=2.5, num_expert_groups=8, top_k_groups=4),
)
_PACKED_GPT_OSS = replace(_GPT_OSS, layout=ExpertLayout(interleaved=True), weight_format="mxfp4")
VARIANTS = {
    "Qwen3-30B-A3B": Variant(bias=False),
    "bf16": Variant(),
    "fp32": Variant(torch.float32),
    "fp16 gelu transposed": Variant(torch.float16, ExpertLayout(transposed=True), "gelu"),
    "gelu_tanh no bias": Variant(activation="gelu_tanh", bias=False, routing=RoutingRule(0, "sqrtsoftplus")),
    "ungated": Variant(layout=ExpertLayout(gated=False), activation="relu2"),
    "interleaved": Variant(layout=ExpertLayout(interleaved=True), activation=_CLAMPED),
    "batch invariant": Variant(options=KernelOptions(batch_invariant=True)),
    # Fewer pairs per expert: every class of `choice.row_class`.
    "1 token": Variant(num_rows=1),
    "1 token fp32": Variant(torch.float32, num_rows=1),
    "128 tokens": Variant(num_rows=128),
    "512 tokens": Variant(num_rows=512),
    "1024 tokens": Variant(num_rows=1024),
    "Mixtral": Variant(hidden_size=4096, intermediate_size=14336, num_experts=8, top_k=2, bias=False),
    "Qwen3-Next": Variant(hidden_size=2048, intermediate_size=512, num_experts=512, top_k=10, bias=False),
    "DeepSeek-V3": _DEEPSEEK,
    "gpt-oss": _GPT_OSS,
    "odd": Variant(hidden_size=1001, intermediate_size=333, num_experts=60, top_k=6),
    "odd fp32": Variant(torch.float32, hidden_size=1001, intermediate_size=333, num_experts=60, top_k=6),
    "tiny": Variant(hidden_size=1, intermediate_size=1, num_experts=1, top_k=1),
    "bf16 of 8 ranks": Variant(num_ranks=8),
    "fp32 of 8 ranks": Variant(torch.float32, num_ranks=8),
    "gpt-oss of 2 ranks": replace(_GPT_OSS, num_experts=64, num_ranks=2),
    "odd of 8 ranks": Variant(hidden_size=1001, intermediate_size=333, num_experts=60, top_k=6, num_ranks=8),
    "adapters": Variant(adapter_rank=16),
    "gpt-oss with adapters": replace(_GPT_OSS, adapter_rank=16),
    # Packed weights: as checkpoints have them, in the other axis order, and where a tile has few rows.
    "mxfp4": _PACKED_GPT_OSS,
    "fp8": replace(_DEEPSEEK, weight_format="fp8"),
    "nf4": Variant(bias=False, weight_format="nf4"),
    "mxfp4 transposed": Variant(layout=ExpertLayout(transposed=True), weight_format="mxfp4"),
    "fp8 transposed": Variant(layout=ExpertLayout(transposed=True), weight_format="fp8"),
    "nf4 transposed": Variant(layout=ExpertLayout(transposed=True), weight_format="nf4"),
    "mxfp4 1 token": replace(_PACKED_GPT_OSS, num_rows=1),
    "fp8 1 token": replace(_DEEPSEEK, weight_format="fp8", num_rows=1),
    "nf4 1 token": Variant(bias=False, weight_format="nf4", num_rows=1),
    "mxfp4 with adapters": replace(_PACKED_GPT_OSS, adapter_rank=16),
    "nf4 of odd halves": Variant(
        layout=ExpertLayout(transposed=True), hidden_size=1024, intermediate_size=333, weight_format="nf4"
    ),
    # Products of codes: Qwen3-30B-A3B's, and where a tile has few rows.
    "fp8_block": Variant(precision=ExpertPrecision("fp8_block")),
    "fp8_block 128 tokens": Variant(precision=ExpertPrecision("fp8_block"), num_rows=128),
    "mxfp8": Variant(precision=ExpertPrecision("mxfp8")),
    "mxfp8 128 tokens": Variant(precision=ExpertPrecision("mxfp8"), num_rows=128),
    "bf16 persistent": Variant(tiles={"persistent": True}),
    "bf16 one tile a program": Variant(tiles={"persistent": False}),
    "bf16 pointers": Variant(tiles={"tma": False}),
    "bf16 gathered by TMA": Variant(tiles={"gather": "tma"}),
    "bf16 rows copied": Variant(tiles={"gather": "copy"}),
}
DEFAULT_VARIANTS = (
    *("bf16", "bf16 one tile a program", "bf16 pointers", "bf16 gathered by TMA", "bf16 rows copied"),
    *("fp8_block", "mxfp8"),
)
