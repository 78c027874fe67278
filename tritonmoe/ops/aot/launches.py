"""The launches of one layer, forward and backward, as a GPU would get them: caught on meta tensors."""

from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from tritonmoe.config.formats import find_format
from tritonmoe.config.layer import NO_WEIGHTS, ExpertLayout, PerWeight, Projection
from tritonmoe.ops.aot.variants import Variant
from tritonmoe.ops.backends import triton as triton_backend
from tritonmoe.ops.backends.encoded import EncodedOperations
from tritonmoe.ops.backends.ops import NO_GRADIENTS, GradientOperands, Operations
from tritonmoe.ops.grouping import Grouping, RowSources
from tritonmoe.ops.kernels import launch
from tritonmoe.ops.kernels.gpus import architecture_like
from tritonmoe.ops.kernels.router_kernels import route, route_grad
from tritonmoe.ops.kernels.tiles import measured_tiles

__all__ = ["record_launches", "source_of"]

operations = cast(Operations, triton_backend)


def record_launches(variant: Variant, target: GPUTarget) -> dict[str, launch.Launch]:
    """Run forward and backward of one layer on meta tensors and give its launches by operation and kernel."""
    if variant.tiles:
        heuristic = replace(variant, tiles={})
        with measured_tiles.asked() as asked:
            record_launches(heuristic, target)
        with measured_tiles.using(dict.fromkeys(asked, variant.tiles)):
            return record_launches(heuristic, target)
    gpu, precision = architecture_like(launch.architecture_of(target)), variant.precision
    if precision is not None and precision.format not in gpu.precisions:
        return {}
    with launch.recording(target) as launches:
        step = _RecordedStep(variant, launches)
        step.run()
    return step.found


class _RecordedStep:
    """One layer's operands on the meta device, and the launches of every operation that ran on them."""

    def __init__(self, variant: Variant, launches: list[launch.Launch]) -> None:
        v, rows = variant, variant.num_rows
        self.variant, self.launches, self.operations = variant, launches, operations
        self.found: dict[str, launch.Launch] = {}
        """By operation and kernel."""
        width = 2 * v.intermediate_size if v.layout.gated else v.intermediate_size
        w1_shape, w2_shape = (width, v.hidden_size), (v.hidden_size, v.intermediate_size)
        if v.layout.transposed:
            w1_shape, w2_shape = w1_shape[::-1], w2_shape[::-1]
        self.x, self.dout = self._empty(rows, v.hidden_size), self._empty(rows, v.hidden_size)
        b1 = self._empty(v.num_experts, width) if v.bias else None
        b2 = self._empty(v.num_experts, v.hidden_size) if v.bias else None
        self.gate_up, self.down = self._projection(w1_shape, b1), self._projection(w2_shape, b2)
        self.ids = self._empty(rows, v.top_k, dtype=torch.int64 if v.num_ranks == 1 else torch.int32)
        self.topk_weights = self._empty(rows, v.top_k, dtype=torch.float32)

    def _empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(*shape, dtype=self.variant.dtype if dtype is None else dtype, device="meta")

    def _projection(self, shape: tuple[int, int], bias: Tensor | None) -> Projection:
        """Return a projection whose experts have weights of this shape."""
        v, whole = self.variant, (self.variant.num_experts, *shape)
        if v.weight_format is None:
            return Projection(self._empty(*whole), bias, v.layout)
        values, scales = find_format(v.weight_format).empty(whole, "meta")
        return Projection(values, bias, v.layout, scales=scales)

    def _name(self, operation: str, *, reads_weight: bool = False) -> None:
        """Keep what was launched since the last call as the launches of `operation`, and of the weight's format."""
        precision = self.variant.precision
        stored_as = self.variant.weight_format if precision is None else precision.format
        if reads_weight and stored_as is not None:
            operation = f"{operation} of {stored_as}"
        for item in self.launches:
            key = f"{operation} {item.kernel.__name__.strip('_').removesuffix('_kernel')}"
            assert key not in self.found, key
            self.found[key] = item
        self.launches.clear()

    def run(self) -> None:
        """Run the router and every operation, forward and backward, on one device or as one of several ranks does."""
        v, is_rank = self.variant, self.variant.num_ranks > 1
        if v.precision is not None:
            grouping = operations.group(self.ids, v.num_experts)
            self.launches.clear()
            self._products_of_codes(EncodedOperations(v.precision), grouping)
            return
        self._router()
        grouping = layer = operations.group(self.ids, v.num_experts)
        self._name("group")
        operations.group(self.ids[:8], v.num_experts)
        self._name("group few pairs")
        if is_rank:
            layer = self._group_in_chunks()
        # A chunk's operations launch what those of one chunk do: where a chunk begins is not specialised.
        h, y = self._forward(grouping)
        dh, scaled_a = self._backward(grouping, h, y)
        if v.weight_format is None:
            self._weight_grads(grouping, dh, scaled_a)
        if v.adapter_rank:
            self._adapters(grouping, h, dh, scaled_a)
        if is_rank:
            if v.weight_format is None:
                self._weight_grads(layer, dh, scaled_a, " in chunks")
            home_index = self._empty(v.num_rows, min(v.num_ranks, v.top_k), dtype=torch.int32)
            operations.gather_sum(y, home_index)
            self._name("gather_sum at home")
            operations.gather_sum(self.topk_weights, home_index)
            self._name("gather_sum weights' gradients at home")

    def _products_of_codes(self, encoded: EncodedOperations, grouping: Grouping) -> None:
        """Run what makes codes, and the products of codes."""
        encoded.round_rows(self.x)
        self._name("rounded rows", reads_weight=True)
        for directions in ("forward", "backward"):
            encoded.projection(self.gate_up, directions)
            self._name(f"gate_up_proj {directions}", reads_weight=True)
            encoded.projection(self.down, directions)
            self._name(f"down_proj {directions}", reads_weight=True)
        self.gate_up, self.down = (encoded.projection(of, "both") for of in (self.gate_up, self.down))
        self.launches.clear()
        self.operations = cast(Operations, encoded)
        h, y = self._forward(grouping)
        self._backward(grouping, h, y)

    def _router(self) -> None:
        """Run the router of all ranks' experts, and its backward without losses of its own and with both."""
        v = self.variant
        num_experts, rule = v.num_experts * v.num_ranks, v.routing._replace(top_k=v.top_k)
        weight = self._empty(num_experts, v.hidden_size)
        selection_bias = self._empty(num_experts, dtype=torch.float32) if rule.score_function != "softmax" else None
        routed = route(self.x, weight, selection_bias, rule)
        self._name("router")
        saved = self.x, weight, routed.scores, routed.topk_ids, routed.topk_weights
        for name, losses in (
            ("router_grad", (None, None)),
            ("router_grad with losses", (routed.logits, routed.scores)),
        ):
            route_grad(*saved, (*losses, routed.topk_weights), rule, (True, True))
            self._name(name)

    def _group_in_chunks(self) -> Grouping:
        rows = self.variant.num_rows
        row_offsets = (0, rows - rows // 2, rows)
        grouping = operations.group(
            self.ids,
            self.variant.num_experts,
            chunk_row_offsets=row_offsets,
            chunk_pair_offsets=tuple(self.variant.top_k * row for row in row_offsets),
            row_sources=RowSources((0, 1), torch.tensor([[rows - rows // 2, 0], [0, rows // 2]])),
        )
        self._name("group in chunks")
        return grouping

    def _forward(self, grouping: Grouping) -> tuple[Tensor, Tensor]:
        """Return h and y."""
        activation, options = self.variant.activation, self.variant.options
        arguments = self.x, self.gate_up, grouping
        self.operations.up(*arguments, activation, needs_h=False, options=options)
        self._name("up inference", reads_weight=True)
        h, a = self.operations.up(*arguments, activation, options=options)
        self._name("up", reads_weight=True)
        y = self.operations.down(a, self.down, grouping, options=options)
        self._name("down", reads_weight=True)
        self.operations.gather_sum(y, grouping.inverse, self.topk_weights)
        self._name("gather_sum")
        self.operations.up(*arguments, None, options=options)
        self._name("up for h alone", reads_weight=True)
        return h, y

    def _backward(self, grouping: Grouping, h: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return dh and s*a."""
        activation, options = self.variant.activation, self.variant.options
        dh, scaled_a, _ = self.operations.down_grad(
            self.dout, self.down, h, self.topk_weights, grouping, activation, options=options
        )
        self._name("down_grad", reads_weight=True)
        self.operations.up_grad(dh, self.gate_up, grouping, options=options)
        self._name("up_grad", reads_weight=True)
        self.operations.gather_sum(y, grouping.inverse)
        self._name("gather_sum without weights")
        return dh, scaled_a

    def _weight_grads(self, grouping: Grouping, dh: Tensor, scaled_a: Tensor, suffix: str = "") -> None:
        operands = GradientOperands(self.x, dh, self.dout, scaled_a, self.topk_weights)

        def run(operation: str, accumulate: PerWeight[Tensor | None] = NO_WEIGHTS, **wanted: bool) -> None:
            needs = NO_GRADIENTS._replace(**wanted)
            operations.weight_grad(
                grouping, self.variant.layout, operands, needs, accumulate=accumulate, options=self.variant.options
            )
            self._name(f"{operation}{suffix}")

        def main_grad(projection: Projection) -> Tensor:
            return self._empty(*projection.weight.shape, dtype=torch.float32)

        run("weight_grad W1", gate_up_proj=True)
        run("weight_grad W1 main_grad", PerWeight(main_grad(self.gate_up), None, None, None), gate_up_proj=True)
        run("weight_grad W2", down_proj=True)
        run("weight_grad W2 main_grad", PerWeight(None, None, main_grad(self.down), None), down_proj=True)
        if self.variant.bias:
            run("weight_grad b1", gate_up_bias=True)
            run("weight_grad b2", down_bias=True)

    def _adapters(self, grouping: Grouping, h: Tensor, dh: Tensor, scaled_a: Tensor) -> None:
        """Run what an AdaptedProjection does: products with an addend, and products with the factors of adapters."""
        v = self.variant
        rank, options, activation = v.adapter_rank, v.options, v.activation
        y = self._empty(grouping.num_pairs, v.hidden_size)
        operations.up(self.x, self.gate_up._replace(addend=h), grouping, activation, out_h=h, options=options)
        self._name("up with an addend", reads_weight=True)
        operations.down(scaled_a, self.down._replace(addend=y), grouping, out=y, options=options)
        self._name("down with an addend", reads_weight=True)
        down, out = self.down._replace(addend=scaled_a), (dh, scaled_a)
        operations.down_grad(self.dout, down, h, self.topk_weights, grouping, activation, out=out, options=options)
        self._name("down_grad with an addend", reads_weight=True)
        operations.up_grad(dh, self.gate_up._replace(addend=y), grouping, out=y, options=options)
        self._name("up_grad with an addend", reads_weight=True)
        plain, transposed = ExpertLayout(gated=False), ExpertLayout(gated=False, transposed=True)
        factor_a = Projection(self._empty(v.num_experts, rank, v.hidden_size), None, plain)
        factor_b = Projection(self._empty(v.num_experts, dh.shape[1], rank), None, plain)
        reduced, _ = operations.up(self.x, factor_a, grouping, None, options=options)
        self._name("up by a factor")
        down_b = Projection(self._empty(v.num_experts, v.hidden_size, rank), None, transposed)
        operations.up(self.dout, down_b, grouping, None, options=options)
        self._name("up by a transposed factor")
        operations.down(reduced, factor_b, grouping, options=options)
        self._name("down from the rank")
        operations.down(
            scaled_a, Projection(self._empty(v.num_experts, rank, scaled_a.shape[1]), None, plain), grouping
        )
        self._name("down to the rank")
        operations.up_grad(reduced, factor_a, grouping, options=options)
        self._name("up_grad from the rank")
        operations.up_grad(dh, factor_b, grouping, options=options)
        self._name("up_grad to the rank")
        needs = NO_GRADIENTS._replace(gate_up_proj=True)
        for name, of, layout, pair_values, row_values in (
            ("of a factor A", grouping, plain, reduced, self.x),
            ("of a factor B", grouping.by_pair, plain, dh, reduced),
            ("of a down factor A", grouping.by_pair, plain, reduced, scaled_a),
            ("of a down factor B", grouping, transposed, reduced, self.dout),
        ):
            operands = GradientOperands(x=row_values, dh=pair_values)
            operations.weight_grad(of, layout, operands, needs, options=options)
            self._name(f"weight_grad {name}")


def source_of(item: launch.Launch, target: GPUTarget) -> ASTSource:
    """Describe a launch with the just-in-time compiler's own binder: 1 and None constant, multiples of 16 known."""
    backend = make_backend(target)
    bind = create_function_from_signature(item.kernel.signature, item.kernel.params, backend)
    keywords: dict[str, Any] = {**item.constexprs, **item.options}
    arguments, specialization, _ = bind(*item.args, **keywords)
    _, signature, constants, attributes = item.kernel._pack_args(backend, keywords, arguments, specialization, {})
    return ASTSource(item.kernel, signature, constants, attributes)
