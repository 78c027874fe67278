"""A layer call as one operator that torch.compile can see: `tritonmoe::expert_parallel_mlp` and its backward.

What a graph would otherwise be free to do with an exchange, it must not:

- *Order.* Ranks must make the same exchanges in the same order. The transport's handle goes through every forward, in
  and out (`turn`), and is written back: each call needs the one before it, none is dead, and no two are alike. Each
  backward takes what the one before it gave (`after`): it can't write to the handle, since autograd would refuse it in
  other graphs that have saved it. (Inductor doesn't keep the order of operators that are registered as effectful.)
- *Memory.* What a forward keeps for its backward has sizes that follow from counts, which no graph knows. It stays in
  Python, held by the storage of a one-element tensor (`kept`) that the graph saves and frees like any other. Nothing
  kept shares memory with what the graph knows and may use again; weights come from the graph.
- *Need.* Whether the result has a gradient is decided when the graph is made. So a rank that would have to take part in
  other ranks' backward alone is refused, on every rank, in the count exchange.

Operators take no objects: settings are spelled out, transport and layer come as handles.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensor

from tritonmoe.config.layer import KernelOptions
from tritonmoe.config.overlap import WIRE_DTYPES, OverlapConfig, OverlapPlan
from tritonmoe.dispatch.header import CHUNK_BY
from tritonmoe.dispatch.placement import ExpertPlacement
from tritonmoe.expert_parallel.call import ExpertParallelCall, run_backward, run_forward
from tritonmoe.expert_parallel.run import Needs, run_call
from tritonmoe.expert_parallel.state import LayerCalls
from tritonmoe.experts.arguments import ExpertWeights
from tritonmoe.experts.flops import FLOP_FORMULAS, backward_flops, num_products, register_flop_formulas
from tritonmoe.experts.operator import OperatorSettings, decode_activation, gradient_shapes, refuse_second_derivative
from tritonmoe.runtime.autograd import without_autocast
from tritonmoe.runtime.handles import find, hold
from tritonmoe.transports import Transport

__all__ = ["expert_parallel_operator"]

SHAPES = ("auto", "equal", "ramp", "sizes")


def encode_overlap(overlap: OverlapConfig | OverlapPlan) -> list[int]:
    """Give `overlap` without its capacity as integers: what kind it is, its numbers, chunk sizes last."""
    if isinstance(overlap, OverlapPlan):
        windows = [overlap.local_start, overlap.window, overlap.backward_window]
        numbers, sizes = [1, *windows, CHUNK_BY.index(overlap.chunk_by)], overlap.chunk_sizes
    else:
        num_chunks = 0 if overlap.num_chunks == "auto" else overlap.num_chunks
        sizes = overlap.shape if isinstance(overlap.shape, tuple) else ()
        shape = "sizes" if isinstance(overlap.shape, tuple) else overlap.shape
        chunk_by = len(CHUNK_BY) if overlap.chunk_by == "auto" else CHUNK_BY.index(overlap.chunk_by)
        numbers = [0, num_chunks, SHAPES.index(shape), overlap.memory_budget_bytes or 0, chunk_by]
    flags = [int(overlap.local_first), int(overlap.serial), WIRE_DTYPES.index(overlap.wire_dtype)]
    return [*numbers, *flags, *sizes]


@lru_cache
def decode_overlap(encoded: tuple[int, ...], capacity: float | None) -> OverlapConfig | OverlapPlan:
    is_plan, first, second, third, chunk_by, local_first, serial, wire_dtype, *sizes = encoded
    common: dict[str, Any] = {
        "chunk_by": (*CHUNK_BY, "auto")[chunk_by],
        "local_first": bool(local_first),
        "serial": bool(serial),
        "wire_dtype": WIRE_DTYPES[wire_dtype],
        "capacity": capacity,
    }
    if is_plan:
        return OverlapPlan(tuple(sizes), local_start=first, window=second, backward_window=third, **common)
    shape: Any = tuple(sizes) if SHAPES[second] == "sizes" else SHAPES[second]
    return OverlapConfig(first or "auto", shape=shape, memory_budget_bytes=third or None, **common)


def encode_placement(placement: ExpertPlacement | None) -> list[int]:
    """Give the number of ranks and the experts of all slots; nothing for None."""
    if placement is None:
        return []
    experts = [expert for slots in placement.experts_of_rank for expert in slots]
    return [len(placement.experts_of_rank), *experts]


@lru_cache
def decode_placement(encoded: tuple[int, ...]) -> ExpertPlacement | None:
    if not encoded:
        return None
    size, *experts = encoded
    num_slots = len(experts) // size
    return ExpertPlacement(tuple(tuple(experts[r * num_slots : (r + 1) * num_slots]) for r in range(size)))


@torch.library.custom_op("tritonmoe::expert_parallel_mlp", mutates_args=())
def _expert_parallel_mlp(
    turn: Tensor,
    layer: Tensor | None,
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up_proj: Tensor,
    gate_up_bias: Tensor | None,
    down_proj: Tensor,
    down_bias: Tensor | None,
    num_nonfinite_rows: Tensor | None,
    grad_enabled: bool,
    needs: list[bool],
    num_experts: int,
    overlap: list[int],
    capacity: float | None,
    placement: list[int],
    save: str,
    activation: str,
    limit: float,
    alpha: float,
    up_offset: float,
    gated: bool,
    interleaved: bool,
    transposed: bool,
    backend: str,
    num_sms: int | None,
    batch_invariant: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Give out (T, D), `kept`, and `turn`. needs: of x, topk_weights, and the weights in ExpertWeights's order."""
    transport: Transport = find(turn)
    calls: LayerCalls | None = None if layer is None else find(layer)
    kept = torch.zeros(1, dtype=torch.int64, device="cpu")

    def apply(
        call: ExpertParallelCall,
        topk_ids: Tensor,
        x: Tensor,
        topk_weights: Tensor,
        weights: ExpertWeights,
        parameters: Sequence[Tensor],
    ) -> Tensor:
        nonlocal kept
        out, run, beside = run_forward(call, topk_ids, x, topk_weights, weights)
        if beside.plan.needs_any:
            rows = x.clone() if run.rows is x else run.rows  # the graph may write over its x
            kept = hold((call, beside, rows, run.topk_weights, run.h))
        return out

    with torch.no_grad(), without_autocast(x.device):
        out, report = run_call(
            x,
            topk_ids,
            topk_weights,
            ExpertWeights(gate_up_proj, gate_up_bias, down_proj, down_bias),
            owners=None,
            apply=apply,
            needs=Needs(grad_enabled, *needs),
            num_experts=num_experts,
            transport=transport,
            overlap=decode_overlap(tuple(overlap), capacity),
            placement=decode_placement(tuple(placement)),
            layout_flags=(gated, interleaved, transposed),
            activation=decode_activation(activation, limit, alpha, up_offset),
            backend=backend,
            save=save,  # type: ignore[arg-type]
            options=KernelOptions(num_sms, batch_invariant),
            layer=-1 if calls is None else calls.layer,
            expert_gradients="sum" if calls is None else calls.expert_gradients,
            num_nonfinite_rows=num_nonfinite_rows,
        )
    if calls is not None:
        calls.last_report = report
    return out, kept, turn.clone()


@_expert_parallel_mlp.register_fake
def _shapes(turn: Tensor, layer: Tensor | None, x: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    register_flop_formulas()  # here, since every graph is made with this
    return x.new_empty(x.shape), turn.new_empty(1), turn.new_empty(())


@torch.library.custom_op("tritonmoe::expert_parallel_mlp_backward", mutates_args=())
def _expert_parallel_mlp_backward(
    after: Tensor | None,
    dout: Tensor,
    kept: Tensor,
    topk_weights: Tensor,
    gate_up_proj: Tensor,
    gate_up_bias: Tensor | None,
    down_proj: Tensor,
    down_bias: Tensor | None,
    needs: list[bool],
    save: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Give the gradients of x, topk_weights and the weights, no elements where not wanted, and an `after`.

    save: the forward's, for the count of FLOPs.
    """
    call, beside, rows, received_weights, h = find(kept)
    weights = ExpertWeights(gate_up_proj, gate_up_bias, down_proj, down_bias)
    needs_x, needs_topk_weights, *needs_weights = needs
    with torch.no_grad(), without_autocast(dout.device):
        dx, dtopk_weights, grads, _ = run_backward(
            call,
            beside,
            rows,
            received_weights,
            weights,
            h,
            dout,
            tuple(needs_weights),  # type: ignore[arg-type]
        )
    if dtopk_weights is not None:
        dtopk_weights = dtopk_weights.to(topk_weights.dtype)
    wanted = (dx if needs_x else None, dtopk_weights if needs_topk_weights else None, *grads)
    dx, dtopk_weights, dw1, db1, dw2, db2 = (dout.new_empty(0) if grad is None else grad for grad in wanted)
    return dx, dtopk_weights, dw1, db1, dw2, db2, kept.clone()


@_expert_parallel_mlp_backward.register_fake
def _gradient_shapes(
    after: Tensor | None,
    dout: Tensor,
    kept: Tensor,
    topk_weights: Tensor,
    gate_up_proj: Tensor,
    gate_up_bias: Tensor | None,
    down_proj: Tensor,
    down_bias: Tensor | None,
    needs: list[bool],
    save: str,
) -> tuple[Tensor, ...]:
    grads = gradient_shapes((dout, topk_weights, gate_up_proj, gate_up_bias, down_proj, down_bias), needs)
    return *grads, kept.new_empty(1)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, kept, turn = output
    ctx.mark_non_differentiable(kept, turn)
    ctx.transport = inputs[0]  # for the order alone: backward doesn't read it
    ctx.save = inputs[16]
    ctx.save_for_backward(kept, *inputs[4:9])


def _backward(ctx: Any, dout: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad
    needs = [needs[2], *needs[4:9]]
    # While a graph is made, its calls on one transport see one FunctionalTensor of its handle, its own.
    is_traced = isinstance(ctx.transport, FunctionalTensor)
    after = getattr(ctx.transport, "after", None) if is_traced else None
    *grads, after = _expert_parallel_mlp_backward(after, dout, *ctx.saved_tensors, needs, ctx.save)
    if is_traced:
        ctx.transport.after = after
    dx, *others = (grad if needed else None for grad, needed in zip(grads, needs, strict=True))
    rest = len(ctx.needs_input_grad) - 9
    return None, None, dx, None, *others, *(None for _ in range(rest))


_expert_parallel_mlp.register_autograd(_backward, setup_context=_setup_context)
_expert_parallel_mlp_backward.register_autograd(refuse_second_derivative)


def _forward_flops(
    turn: Any,
    layer: Any,
    x: Any,
    ids_shape: Any,
    weights_shape: Any,
    up_shape: Any,
    up_bias: Any,
    down_shape: Any,
    *_: Any,
    **__: Any,
) -> int:
    """Give those of this rank's own pairs, whose experts are on any rank: over all ranks it is the sum that they do."""
    return 2 * (num_products(ids_shape, up_shape) + num_products(ids_shape, down_shape))


def _backward_flops(
    after: Any,
    dout: Any,
    kept: Any,
    weights_shape: Any,
    up_shape: Any,
    up_bias: Any,
    down_shape: Any,
    down_bias: Any,
    needs: list[bool],
    save: str,
    **__: Any,
) -> int:
    up, down = num_products(weights_shape, up_shape), num_products(weights_shape, down_shape)
    return backward_flops(up, down, needs, save == "input")


FLOP_FORMULAS[torch.ops.tritonmoe.expert_parallel_mlp] = _forward_flops
FLOP_FORMULAS[torch.ops.tritonmoe.expert_parallel_mlp_backward] = _backward_flops


def expert_parallel_operator(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    weights: ExpertWeights,
    *,
    num_experts: int,
    transport: Transport,
    overlap: OverlapConfig | OverlapPlan,
    placement: ExpertPlacement | None,
    save: str,
    settings: OperatorSettings,
    calls: LayerCalls | None,
    num_nonfinite_rows: Tensor | None,
    fillers: Sequence[Callable[[], None]],
) -> Tensor:
    """Call the operator tritonmoe::expert_parallel_mlp: (T, D). Fillers are in the graph, and run before it."""
    for filler in fillers:
        filler()
    grad_enabled = torch.is_grad_enabled()
    tensors = (x, topk_weights, *weights)
    needs = [grad_enabled and tensor is not None and tensor.requires_grad for tensor in tensors]
    out, _, turn = _expert_parallel_mlp(
        transport.handle,
        None if calls is None else calls.handle,
        x,
        topk_ids,
        topk_weights,
        *weights,
        num_nonfinite_rows,
        grad_enabled,
        needs,
        num_experts,
        encode_overlap(overlap),
        overlap.capacity,
        encode_placement(placement),
        save,
        *settings,
    )
    transport.handle.copy_(turn)
    return out
