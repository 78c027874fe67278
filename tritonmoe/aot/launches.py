"""The launches of one layer, forward and backward, as a GPU would get them: caught on meta tensors."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from tritonmoe.backends import triton as operations
from tritonmoe.config.layer import ClampedSwiGLU, ExpertLayout, FusedActivation, KernelOptions
from tritonmoe.grouping import Grouping, RowSources
from tritonmoe.kernels import launch
from tritonmoe.kernels.tiles import measured as measured_tiles

__all__ = ["DEFAULT_VARIANTS", "VARIANTS", "Variant", "record_launches", "source_of"]


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
    num_rows: int = 16384
    """Of one device; with several ranks those that one of them receives, as num_experts are those that it holds."""
    num_ranks: int = 1
    """With several, rows come in chunks, beside exchanges."""
    options: KernelOptions = KernelOptions()
    tiles: Mapping[str, int | str] = field(default_factory=dict)
    """Fields that replace the heuristic's in every operation's TileConfig, as a measured entry would."""

    @classmethod
    def of(cls, shape: Any, dtype: torch.dtype, num_rows: int) -> "Variant":
        """Give the variant of a `benchmarks.shapes.LayerShape`."""
        names = ("layout", "activation", "hidden_size", "intermediate_size", "num_experts", "top_k", "bias")
        return cls(dtype, num_rows=num_rows, **{name: getattr(shape, name) for name in names})


_CLAMPED = ClampedSwiGLU(7.0, alpha=1.702, up_offset=1.0)
VARIANTS = {
    "bf16": Variant(),
    "fp32": Variant(torch.float32),
    "fp16 gelu transposed": Variant(torch.float16, ExpertLayout(transposed=True), "gelu"),
    "gelu_tanh no bias": Variant(activation="gelu_tanh", bias=False),
    "ungated": Variant(layout=ExpertLayout(gated=False), activation="relu2"),
    "interleaved": Variant(layout=ExpertLayout(interleaved=True), activation=_CLAMPED),
    "batch invariant": Variant(options=KernelOptions(batch_invariant=True)),
    # Fewer pairs per expert: every class of `tile_choice.row_class`.
    "1 token": Variant(num_rows=1),
    "1 token fp32": Variant(torch.float32, num_rows=1),
    "128 tokens": Variant(num_rows=128),
    "512 tokens": Variant(num_rows=512),
    "1024 tokens": Variant(num_rows=1024),
    "Mixtral": Variant(hidden_size=4096, intermediate_size=14336, num_experts=8, top_k=2, bias=False),
    "Qwen3-Next": Variant(hidden_size=2048, intermediate_size=512, num_experts=512, top_k=10, bias=False),
    "DeepSeek-V3": Variant(hidden_size=7168, intermediate_size=2048, num_experts=256, top_k=8, bias=False),
    "gpt-oss": Variant(
        layout=ExpertLayout(interleaved=True, transposed=True),
        activation=_CLAMPED,
        hidden_size=2880,
        intermediate_size=2880,
        num_experts=128,
        top_k=4,
    ),
    "odd": Variant(hidden_size=1001, intermediate_size=333, num_experts=60, top_k=6),
    "odd fp32": Variant(torch.float32, hidden_size=1001, intermediate_size=333, num_experts=60, top_k=6),
    "tiny": Variant(hidden_size=1, intermediate_size=1, num_experts=1, top_k=1),
    "bf16 of 8 ranks": Variant(num_ranks=8),
    "fp32 of 8 ranks": Variant(torch.float32, num_ranks=8),
    "gpt-oss of 2 ranks": Variant(
        layout=ExpertLayout(interleaved=True, transposed=True),
        activation=_CLAMPED,
        hidden_size=2880,
        intermediate_size=2880,
        num_experts=64,
        top_k=4,
        num_ranks=2,
    ),
    "odd of 8 ranks": Variant(hidden_size=1001, intermediate_size=333, num_experts=60, top_k=6, num_ranks=8),
    "bf16 persistent": Variant(tiles={"persistent": True}),
    "bf16 one tile a program": Variant(tiles={"persistent": False}),
    "bf16 pointers": Variant(tiles={"tma": False}),
    "bf16 gathered by TMA": Variant(tiles={"gather": "tma"}),
    "bf16 rows copied": Variant(tiles={"gather": "copy"}),
}
DEFAULT_VARIANTS = ("bf16", "bf16 one tile a program", "bf16 pointers", "bf16 gathered by TMA", "bf16 rows copied")


def record_launches(variant: Variant, target: GPUTarget) -> dict[str, launch.Launch]:
    """Run forward and backward of one layer on meta tensors and give its launches by operation and kernel."""
    if variant.tiles:
        heuristic = replace(variant, tiles={})
        with measured_tiles.asked() as asked:
            record_launches(heuristic, target)
        with measured_tiles.using(dict.fromkeys(asked, variant.tiles)):
            return record_launches(heuristic, target)
    v, rows, options = variant, variant.num_rows, variant.options
    width = 2 * v.intermediate_size if v.layout.gated else v.intermediate_size
    w1_shape, w2_shape = (width, v.hidden_size), (v.hidden_size, v.intermediate_size)
    if v.layout.transposed:
        w1_shape, w2_shape = w1_shape[::-1], w2_shape[::-1]

    def empty(*shape: int, dtype: torch.dtype = v.dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    x, dout = empty(rows, v.hidden_size), empty(rows, v.hidden_size)
    w1, w2 = empty(v.num_experts, *w1_shape), empty(v.num_experts, *w2_shape)
    b1 = empty(v.num_experts, width) if v.bias else None
    b2 = empty(v.num_experts, v.hidden_size) if v.bias else None
    ids = empty(rows, v.top_k, dtype=torch.int64 if v.num_ranks == 1 else torch.int32)
    weights = empty(rows, v.top_k, dtype=torch.float32)
    found: dict[str, launch.Launch] = {}

    with launch.recording(target) as launches:

        def name(operation: str) -> None:
            for item in launches:
                key = f"{operation} {item.kernel.__name__.strip('_').removesuffix('_kernel')}"
                assert key not in found, key
                found[key] = item
            launches.clear()

        def weight_grads(grouping: Grouping, suffix: str = "") -> None:
            def run(operation: str, **arguments: Any) -> None:
                operations.weight_grad(grouping, v.layout, options=options, **arguments)
                name(f"{operation}{suffix}")

            run("weight_grad W1", x=x, dh=dh)
            run("weight_grad W1 main_grad", x=x, dh=dh, accumulate_gate_up=empty(*w1.shape, dtype=torch.float32))
            run("weight_grad W2", dout=dout, scaled_a=scaled_a)
            main_grad = empty(*w2.shape, dtype=torch.float32)
            run("weight_grad W2 main_grad", dout=dout, scaled_a=scaled_a, accumulate_down=main_grad)
            if v.bias:
                run("weight_grad b1", dh=dh, gate_up_bias=True)
                run("weight_grad b2", dout=dout, topk_weights=weights, down_bias=True)

        grouping = layer = operations.group(ids, v.num_experts)
        name("group")
        operations.group(ids[:8], v.num_experts)
        name("group few pairs")
        if v.num_ranks > 1:
            options = options._replace(beside_exchanges=True)
            sources = RowSources((0, 1), torch.tensor([[rows - rows // 2, 0], [0, rows // 2]]))
            row_offsets = (0, rows - rows // 2, rows)
            layer = operations.group(
                ids,
                v.num_experts,
                chunk_row_offsets=row_offsets,
                chunk_pair_offsets=tuple(v.top_k * row for row in row_offsets),
                row_sources=sources,
            )
            name("group in chunks")
        # A chunk's operations launch what those of one chunk do: where a chunk begins is not specialised.
        operations.up(x, w1, b1, grouping, v.layout, v.activation, needs_h=False, options=options)
        name("up inference")
        h, a = operations.up(x, w1, b1, grouping, v.layout, v.activation, options=options)
        name("up")
        assert h is not None
        assert a is not None
        y = operations.down(a, w2, b2, grouping, v.layout, options=options)
        name("down")
        operations.gather_sum(y, grouping.inverse, weights)
        name("gather_sum")
        operations.gather_sum(y, grouping.inverse, weights, x)
        name("gather_sum with a shared expert")
        operations.up(x, w1, b1, grouping, v.layout, None, options=options)
        name("up for h alone")
        dh, scaled_a, _ = operations.down_grad(
            dout, w2, b2, h, weights, grouping, v.layout, v.activation, options=options
        )
        name("down_grad")
        operations.up_grad(dh, w1, grouping, v.layout, options=options)
        name("up_grad")
        operations.gather_sum(y, grouping.inverse)
        name("gather_sum without weights")
        weight_grads(grouping)
        if v.num_ranks > 1:
            weight_grads(layer, " in chunks")
            home_index = empty(rows, min(v.num_ranks, v.top_k), dtype=torch.int32)
            operations.gather_sum(y, home_index)
            name("gather_sum at home")
            operations.gather_sum(weights, home_index)
            name("gather_sum weights' gradients at home")
    return found


def source_of(item: launch.Launch, target: GPUTarget) -> ASTSource:
    """Describe a launch with the just-in-time compiler's own binder: 1 and None constant, multiples of 16 known."""
    backend = make_backend(target)
    bind = create_function_from_signature(item.kernel.signature, item.kernel.params, backend)
    keywords: dict[str, Any] = {**item.constexprs, **item.options}
    arguments, specialization, _ = bind(*item.args, **keywords)
    _, signature, constants, attributes = item.kernel._pack_args(backend, keywords, arguments, specialization, {})
    return ASTSource(item.kernel, signature, constants, attributes)
