"""moe_mlp(): the experts on one device, eager or traced."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tritonmoe.backends.ops import NO_GRADIENTS, GradientOperands
from tritonmoe.config.layer import NO_WEIGHTS, Activation, PerWeight, is_fused
from tritonmoe.experts.adapter_dropout import DroppedRows, with_row_seeds
from tritonmoe.experts.adapters import ExpertAdapters, with_adapters
from tritonmoe.experts.arguments import (
    ExpertInputs,
    Needs,
    cast_for_autocast,
    check_arguments,
    check_tensors,
    find_main_grads,
)
from tritonmoe.experts.callable_activation import checked_activation, zero_padding
from tritonmoe.experts.flops import count_products
from tritonmoe.experts.one_based_ids import watch_ids
from tritonmoe.experts.operator import SavedForward, moe_mlp_operator, run_backward, run_forward
from tritonmoe.experts.spec import ExpertSettings, ExpertSpec, choose_backend, expert_spec
from tritonmoe.experts.weight_gradients import rows_to_save, weight_gradients
from tritonmoe.grouping import Grouping
from tritonmoe.runtime.autograd import keep_beside, kept_beside, once_differentiable, outside_graphs, without_autocast
from tritonmoe.runtime.transforms import MAIN_GRAD, is_transformed, run_function, unwrapped

__all__ = ["moe_mlp", "run_experts"]

Owners = PerWeight[Tensor | None]
"""The weights as the user holds them (autocast hands over copies): a main_grad hangs on them."""
OF_UP = ("gate_up_proj", "gate_up_bias", "gate_up_a", "gate_up_b")
OF_DOWN = ("down_proj", "down_bias", "down_a", "down_b")
"""The names in PerWeight of what the two projections have."""


class _MoEMLP(torch.autograd.Function):
    """moe_mlp with a fused activation, called eagerly: what the operator (operator.py) does, at a tenth of its cost."""

    @staticmethod
    def forward(
        ctx: Any,
        settings: ExpertSettings,
        owners: Owners,
        topk_ids: Tensor,
        row_seeds: Tensor | None,
        x: Tensor,
        topk_weights: Tensor,
        *weights: Any,
    ) -> tuple[Tensor, Tensor]:
        inputs = ExpertInputs(x, topk_ids, topk_weights, PerWeight(*weights), row_seeds)
        out, h, grouping = run_forward(settings, inputs, settings.save == "hidden")
        ctx.settings, ctx.owners = settings, owners
        x = rows_to_save(x, inputs.weights, _needs_gate_up(ctx, 6), computes_h=h is None)
        mark = keep_beside(ctx, grouping)
        ctx.save_for_backward(x, topk_weights, *weights, h, row_seeds, mark)
        return out, mark

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, tensors: Sequence[Tensor], dout: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, topk_weights, *weights, h, row_seeds, mark = tensors
        saved = SavedForward(x, topk_weights, PerWeight(*weights), kept_beside(ctx, mark), h, row_seeds)
        needs = Needs.from_list(ctx.needs_input_grad[4:])
        return None, None, None, None, *run_backward(ctx.settings, saved, dout, needs, find_main_grads(ctx.owners))


class _UpHalf(torch.autograd.Function):
    """h = gathered rows x up-projection (+ bias): what a callable activation takes."""

    @staticmethod
    def forward(
        ctx: Any,
        settings: ExpertSettings,
        owners: Owners,
        grouping: Grouping,
        row_seeds: Tensor | None,
        x: Tensor,
        *weights: Any,
    ) -> tuple[Tensor, Tensor]:
        of_up = _among(NO_WEIGHTS, OF_UP, weights)
        gate_up, _ = settings.projections(of_up)
        count_products(settings.ops, x, grouping.num_pairs, lambda: gate_up.num_products)
        h, _ = gate_up.up(x, grouping, None, dropped=_dropped(settings, of_up, x, row_seeds))
        assert h is not None
        zero_padding(h, grouping)
        ctx.settings, ctx.owners = settings, owners
        x = rows_to_save(x, of_up, _needs_gate_up(ctx, 5), computes_h=False)
        mark = keep_beside(ctx, grouping)
        ctx.save_for_backward(x, *weights, row_seeds, mark)
        return h, mark

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, saved: Sequence[Tensor], dh: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        (x, *weights, row_seeds, mark), settings = saved, ctx.settings
        grouping = kept_beside(ctx, mark)
        _, _, _, _, needs_x, *needs_weights = ctx.needs_input_grad
        dh = dh.contiguous()
        of_up = _among(NO_WEIGHTS, OF_UP, weights)
        gate_up, _ = settings.projections(of_up)
        rows, dropped = gate_up.rows(grouping.num_pairs), _dropped(settings, of_up, x, row_seeds)
        count_products(settings.ops, dh, grouping.num_pairs, lambda: gate_up.num_up_grad_products(needs_x))
        dx_pairs = gate_up.up_grad(dh, x, grouping, needs_dx=needs_x, out=None, rows=rows, dropped=dropped)
        dx = None if dx_pairs is None else settings.ops.gather_sum(dx_pairs, grouping.inverse)
        needs, operands = _among(NO_GRADIENTS, OF_UP, needs_weights), GradientOperands(x=x, dh=dh)
        main_grads = find_main_grads(ctx.owners)
        if rows is not None and dropped is not None:
            rows = rows._replace(dropped=dropped.values)
        grads = weight_gradients(settings, grouping, needs, main_grads, operands, adapter_rows=(rows, None))
        return None, None, None, None, dx, *(getattr(grads, name) for name in OF_UP)


class _DownHalf(torch.autograd.Function):
    """Weighted sum per token of a x down-projection (+ bias): what follows a callable activation."""

    @staticmethod
    def forward(
        ctx: Any,
        settings: ExpertSettings,
        owners: Owners,
        grouping: Grouping,
        row_seeds: Tensor | None,
        a: Tensor,
        topk_weights: Tensor,
        *weights: Any,
    ) -> tuple[Tensor, Tensor]:
        _, down = settings.projections(_among(NO_WEIGHTS, OF_DOWN, weights), row_seeds)
        count_products(settings.ops, a, grouping.num_pairs, lambda: down.num_products)
        y = down.down(a, grouping)
        ctx.settings, ctx.owners = settings, owners
        mark = keep_beside(ctx, grouping)
        ctx.save_for_backward(a, topk_weights, *weights, row_seeds, mark)
        return settings.ops.gather_sum(y, grouping.inverse, topk_weights), mark

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, saved: Sequence[Tensor], dout: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        (a, topk_weights, *weights, row_seeds, mark), settings = saved, ctx.settings
        grouping = kept_beside(ctx, mark)
        _, _, _, _, _, needs_topk_weights, *needs_weights = ctx.needs_input_grad
        _, down = settings.projections(_among(NO_WEIGHTS, OF_DOWN, weights), row_seeds)
        rows = down.rows(grouping.num_pairs)
        count_products(settings.ops, dout, grouping.num_pairs, lambda: down.num_down_grad_products)
        da, scaled_a, dweights = down.down_grad(dout, a, topk_weights, grouping, None, out=(None, None), rows=rows)
        zero_padding(da, grouping)
        needs = _among(NO_GRADIENTS, OF_DOWN, needs_weights)
        operands = GradientOperands(dout=dout, scaled_a=scaled_a, topk_weights=topk_weights)
        main_grads = find_main_grads(ctx.owners)
        grads = weight_gradients(settings, grouping, needs, main_grads, operands, adapter_rows=(None, rows))
        dtopk_weights = grouping.pairs_to_rows(dweights).to(topk_weights.dtype) if needs_topk_weights else None
        return None, None, None, None, da, dtopk_weights, *(getattr(grads, name) for name in OF_DOWN)


def _dropped(
    settings: ExpertSettings, weights: PerWeight[Any], x: Tensor, row_seeds: Tensor | None
) -> DroppedRows | None:
    """Give all rows as the adapter of the up-projection multiplies them; None for the rows themselves."""
    dropout = settings.adapter_dropout(row_seeds)
    if dropout is None or weights.gate_up_a is None:
        return None
    dropped = DroppedRows.like(x)
    dropout.drop_rows(x, slice(None), dropped)
    return dropped


def _needs_gate_up(ctx: Any, place: int) -> bool:
    """Say whether the gradient of the forward's input `place`, gate_up_proj, is wanted; under a transform it may be."""
    return getattr(ctx, "needs_input_grad", (True,) * (place + 1))[place]


def _among(others: PerWeight[Any], names: tuple[str, ...], values: Sequence[Any]) -> PerWeight[Any]:
    """Give values by name, and those of `others` for the other names."""
    return others._replace(**dict(zip(names, values, strict=True)))


def _is_traced(x: Tensor) -> bool:
    """Say whether something other than plain eager autograd watches operations: a tracer or a mode."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or x.is_meta
        or (type(x) is not Tensor and type(x) is not nn.Parameter)
    )


def _run_eagerly(settings: ExpertSettings, owners: Owners, inputs: ExpertInputs) -> Tensor:
    """Run the experts as autograd Functions, or as none where no gradient is wanted."""
    x, topk_ids, topk_weights, weights, row_seeds = inputs
    transformed = is_transformed()
    if transformed:
        topk_ids, owners = unwrapped(topk_ids), NO_WEIGHTS
        row_seeds = None if row_seeds is None else unwrapped(row_seeds)
    if is_fused(settings.activation):
        if transformed or Needs.of(inputs).any:
            return run_function(_MoEMLP, settings, owners, topk_ids, row_seeds, x, topk_weights, *weights)
        out, _, _ = run_forward(settings, inputs, keep_hidden=False)
        return out
    of_up, of_down = ([getattr(weights, name) for name in names] for names in (OF_UP, OF_DOWN))
    grouping = settings.ops.group(topk_ids, weights.gate_up_proj.shape[0])
    h = run_function(_UpHalf, settings, owners, grouping, row_seeds, x, *of_up)
    a = checked_activation(settings, h)
    return run_function(_DownHalf, settings, owners, grouping, row_seeds, a, topk_weights, *of_down)


@outside_graphs
def _run_callable_or_main_grad(spec: ExpertSpec, owners: Owners, inputs: ExpertInputs) -> Tensor:
    """Break the graph: an operator takes no callable and returns gradients."""
    return _run_eagerly(choose_backend(spec, inputs), owners, inputs)


def moe_mlp(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    *,
    activation: Activation = "silu",
    gated: bool = True,
    interleaved: bool = False,
    transposed: bool = False,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    adapters: ExpertAdapters | None = None,
    backend: str = "auto",
    save: Literal["hidden", "input"] = "hidden",
    num_sms: int | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    """Run every token through its K chosen experts and give the weighted sum, on one device.

    Differentiable (once) in x, topk_weights and every weight; a callable activation's parameters get gradients too.

    Args:
        x: tokens (T, D), floating point; T = 0 gives (0, D), still attached to the graph.
        topk_ids: (T, K) int32 or int64; ids outside [0, E) are skipped: no work, zero gradient for their weight.
            An id may stand twice in a row. Where the first ids all lie in [1, E], a warning is logged, once.
        topk_weights: (T, K) floating point; used in fp32.
        gate_up_proj: (E, 2F, D), or (E, D, 2F) with transposed=True; F instead of 2F with gated=False.
        down_proj: (E, D, F), or (E, F, D) with transposed=True.
        activation: silu, gelu, gelu_tanh, relu, relu2, a ClampedSwiGLU, or a callable that takes (n, 2F) rows in
            x.dtype, in the weights' own column order and with the bias added, and gives (n, F).
        gated: whether the up-projection has a gate half, which are the first F of its 2F columns.
        interleaved: gate and up columns alternate instead, those of the bias too: 0, 2, 4, ... are the gate.
        transposed: the weights lie the other way round, as in gpt-oss.
        gate_up_bias: (E, 2F) or None.
        down_bias: (E, D) or None.
        adapters: low-rank adapters on the projections, which are never multiplied out; or None.
        backend: "auto" (triton on a GPU, torch elsewhere), "triton", "torch" or "reference".
        save: "hidden" keeps h (T*K, 2F) for backward; "input" recomputes it there.
        num_sms: how many of a GPU's multiprocessors persistent kernels take; None: all, and where torch.distributed has
            other ranks, whose collectives hold some, no kernel is persistent. Give what the collectives leave free.
        batch_invariant: a token's bits, and its gradients', don't depend on the other tokens of the call.
    Returns:
        (T, D) in x.dtype.
    Raises:
        ValueError, TypeError: the arguments do not fit together; the message has the rule and the values.
    Example:
        Two experts that multiply by 2 and by 3 (D = F = 1, ungated relu), K = 2:
        x = [[1]], topk_ids = [[0, 1]], topk_weights = [[10, 100]] gives [[1 * 2 * 10 + 1 * 3 * 100]] = [[320]].
    """
    spec = expert_spec(activation, gated, interleaved, transposed, backend, save, num_sms, batch_invariant)
    weights = with_adapters(PerWeight(gate_up_proj, gate_up_bias, down_proj, down_bias), adapters)
    spec = spec.with_dropout(adapters)
    out = run_experts(spec, ExpertInputs(x, topk_ids, topk_weights, weights))
    watch_ids(topk_ids, gate_up_proj.shape[0])
    return out


def run_experts(spec: ExpertSpec, inputs: ExpertInputs) -> Tensor:
    """Check the tensors, and run the experts as an operator where something traces, otherwise eagerly."""
    check_tensors(inputs)
    given, inputs = inputs.weights, cast_for_autocast(inputs)
    check_arguments(inputs, spec.layout)
    inputs = with_row_seeds(inputs, spec.dropout)
    has_main_grads = find_main_grads(given) is not None
    owners: Owners = given if has_main_grads else NO_WEIGHTS  # they may be copies, for autograd alone to keep
    if has_main_grads and is_transformed():
        raise RuntimeError(MAIN_GRAD)
    with without_autocast(inputs.x.device):
        if is_fused(spec.activation) and not has_main_grads and not is_transformed() and _is_traced(inputs.x):
            return moe_mlp_operator(spec.check(), inputs, spec.save == "hidden" and Needs.of(inputs).any)
        if torch.compiler.is_compiling():
            return _run_callable_or_main_grad(spec.check(), owners, inputs)
        return _run_eagerly(choose_backend(spec, inputs), owners, inputs)
