"""moe_mlp(): the experts on one device, eager or traced."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tritonmoe.config.activations import Activation, is_fused
from tritonmoe.config.layer import NO_WEIGHTS, PerWeight
from tritonmoe.config.precision import ExpertPrecision
from tritonmoe.experts.adapter_dropout import DroppedRows, with_row_seeds
from tritonmoe.experts.adapters import ExpertAdapters, with_adapters
from tritonmoe.experts.arguments import checked_tensors, find_main_grads
from tritonmoe.experts.backward_run import BackwardRun
from tritonmoe.experts.callable_activation import checked_activation, zero_padding
from tritonmoe.experts.flops import count_products
from tritonmoe.experts.one_based_ids import warn_of_one_based_ids
from tritonmoe.experts.operator import moe_mlp_operator, run_backward, run_forward
from tritonmoe.experts.quantized_weight import Weight, given_weights
from tritonmoe.experts.spec import ExpertSettings, ExpertSpec, choose_backend, expert_spec
from tritonmoe.experts.tensors import NO_TENSORS, CallTensors
from tritonmoe.experts.weight_gradients import rows_to_save, weight_gradients
from tritonmoe.ops.backends.ops import GradientOperands
from tritonmoe.ops.grouping import Grouping
from tritonmoe.runtime.autograd import (
    Context,
    keep_beside,
    kept_beside,
    once_differentiable,
    outside_graphs,
    save_tensors,
    without_autocast,
)
from tritonmoe.runtime.transforms import MAIN_GRAD, is_transformed, run_function, unwrapped

__all__ = ["moe_mlp", "run_experts"]

Owners = PerWeight[Tensor | None]
"""The weights as the user holds them (autocast hands over copies): a main_grad hangs on them."""


OF_UP = ("gate_up_proj", "gate_up_bias", "gate_up_a", "gate_up_b", "gate_up_scales")
OF_DOWN = ("down_proj", "down_bias", "down_a", "down_b", "down_scales")
"""The names of what the two projections have."""


class _MoEMLP(torch.autograd.Function):
    """moe_mlp with a fused activation, called eagerly: what the operator (operator.py) does, at a tenth of its cost."""

    @staticmethod
    def forward(ctx: Context, settings: ExpertSettings, owners: Owners, *flat: Tensor | None) -> tuple[Tensor, Tensor]:
        tensors = CallTensors.unflatten(flat)
        out, h, grouping = run_forward(settings, tensors, settings.spec.save == "hidden")
        ctx.settings, ctx.owners = settings, owners
        x = rows_to_save(tensors.x, tensors.weights, _needs(ctx, flat).weights.gate_up_proj, computes_h=h is None)
        mark = keep_beside(ctx, grouping)
        saved: CallTensors[Any] = tensors
        save_tensors(ctx, mark, h, *saved._replace(x=x, topk_ids=None).flatten())
        return out, mark

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, saved: Sequence[Tensor], dout: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        mark, h, *flat = saved
        tensors, grouping = CallTensors.unflatten(flat), kept_beside(ctx, mark)
        run = BackwardRun(ctx.settings, tensors, grouping, h, main_grads=find_main_grads(ctx.owners))
        return None, None, *run_backward(run, dout, _needs(ctx, flat)).flatten()


class _UpHalf(torch.autograd.Function):
    """h = gathered rows x up-projection (+ bias): what a callable activation takes."""

    @staticmethod
    def forward(
        ctx: Context, settings: ExpertSettings, owners: Owners, grouping: Grouping, *flat: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        tensors = CallTensors.unflatten(flat)
        gate_up, _ = settings.projections(tensors.weights, directions="forward")
        tensors = tensors._replace(x=settings.rounded_rows(tensors.x))
        count_products(settings.ops, tensors.x, grouping.num_pairs, lambda: gate_up.num_products)
        h = gate_up.hidden(tensors.x, grouping, _dropped(settings, tensors))
        zero_padding(h, grouping)
        ctx.settings, ctx.owners = settings, owners
        needs_gate_up = _needs(ctx, flat).weights.gate_up_proj
        x = rows_to_save(tensors.x, tensors.weights, needs_gate_up, computes_h=False)
        mark = keep_beside(ctx, grouping)
        save_tensors(ctx, mark, *tensors._replace(x=x).flatten())
        return h, mark

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, saved: Sequence[Tensor], dh: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        (mark, *flat), settings = saved, ctx.settings
        grouping, tensors, needs = kept_beside(ctx, mark), CallTensors.unflatten(flat), _needs(ctx, flat)
        dh = dh.contiguous()
        gate_up, _ = settings.projections(tensors.weights, directions="backward")
        rows, dropped = gate_up.rows(grouping.num_pairs), _dropped(settings, tensors)
        count_products(settings.ops, dh, grouping.num_pairs, lambda: gate_up.num_grad_products(needs.x))
        dx_pairs = gate_up.up_grad(dh, tensors.x, grouping, needs_dx=needs.x, out=None, rows=rows, dropped=dropped)
        dx = None if dx_pairs is None else settings.ops.gather_sum(dx_pairs, grouping.inverse)
        operands, main_grads = GradientOperands(x=tensors.x, dh=dh), find_main_grads(ctx.owners)
        if rows is not None and dropped is not None:
            rows = rows._replace(dropped=dropped.values)
        grads = weight_gradients(settings, grouping, needs.weights, main_grads, operands, adapter_rows=(rows, None))
        return None, None, None, *NO_TENSORS._replace(x=dx, weights=grads).flatten()


class _DownHalf(torch.autograd.Function):
    """Weighted sum per token of a x down-projection (+ bias): what follows a callable activation."""

    @staticmethod
    def forward(
        ctx: Context, settings: ExpertSettings, owners: Owners, grouping: Grouping, *flat: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        tensors = CallTensors.unflatten(flat)
        a, topk_weights = tensors.x, tensors.topk_weights
        _, down = settings.projections(tensors.weights, tensors.row_seeds, "forward")
        count_products(settings.ops, a, grouping.num_pairs, lambda: down.num_products)
        y = down.down(a, grouping)
        ctx.settings, ctx.owners = settings, owners
        mark = keep_beside(ctx, grouping)
        save_tensors(ctx, mark, *flat)
        return settings.ops.gather_sum(y, grouping.inverse, topk_weights), mark

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, saved: Sequence[Tensor], dout: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        (mark, *flat), settings = saved, ctx.settings
        grouping, tensors, needs = kept_beside(ctx, mark), CallTensors.unflatten(flat), _needs(ctx, flat)
        a, topk_weights = tensors.x, tensors.topk_weights
        _, down = settings.projections(tensors.weights, tensors.row_seeds, "backward")
        dout = settings.rounded_rows(dout)
        rows = down.rows(grouping.num_pairs)
        count_products(settings.ops, dout, grouping.num_pairs, down.num_grad_products)
        da, scaled_a, dweights = down.down_grad(dout, a, topk_weights, grouping, None, out=(None, None), rows=rows)
        zero_padding(da, grouping)
        operands = GradientOperands(dout=dout, scaled_a=scaled_a, topk_weights=topk_weights)
        main_grads = find_main_grads(ctx.owners)
        grads = weight_gradients(settings, grouping, needs.weights, main_grads, operands, adapter_rows=(None, rows))
        dtopk_weights = grouping.pairs_to_rows(dweights).to(topk_weights.dtype) if needs.topk_weights else None
        return None, None, None, *NO_TENSORS._replace(x=da, topk_weights=dtopk_weights, weights=grads).flatten()


def _dropped(settings: ExpertSettings, tensors: CallTensors[Tensor]) -> DroppedRows | None:
    """Return all rows as the adapter of the up-projection multiplies them; None for the rows themselves."""
    dropout = settings.adapter_dropout(tensors.row_seeds)
    if dropout is None or tensors.weights.gate_up_a is None:
        return None
    dropped = DroppedRows.like(tensors.x)
    dropout.drop_rows(tensors.x, slice(None), dropped)
    return dropped


def _needs(ctx: Context, flat: Sequence[object]) -> CallTensors[bool]:
    """Return which of a Function's tensors, its last arguments, need a gradient.

    Under a transform, before its backward, all of them do.
    """
    needs = getattr(ctx, "needs_input_grad", None)
    return CallTensors.unflatten([True] * len(flat) if needs is None else needs[-len(flat) :])


def _is_traced(x: Tensor) -> bool:
    """Return whether something other than plain eager autograd watches operations: a tracer or a mode."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or x.is_meta
        or (type(x) is not Tensor and type(x) is not nn.Parameter)
    )


def _run_eagerly(settings: ExpertSettings, owners: Owners, tensors: CallTensors[Tensor]) -> Tensor:
    """Run the experts as autograd Functions, or as none where no gradient is wanted."""
    transformed = is_transformed()
    if transformed:
        seeds, owners = tensors.row_seeds, NO_WEIGHTS
        seeds = None if seeds is None else unwrapped(seeds)
        tensors = tensors._replace(topk_ids=unwrapped(tensors.topk_ids), row_seeds=seeds)
    if is_fused(settings.spec.activation):
        if transformed or tensors.needs_any():
            return run_function(_MoEMLP, settings, owners, *tensors.flatten())
        out, _, _ = run_forward(settings, tensors, keep_hidden=False)
        return out
    grouping = settings.ops.group(tensors.topk_ids, tensors.weights.gate_up_proj.shape[0])
    h = run_function(_UpHalf, settings, owners, grouping, *tensors.only("x", "row_seeds", *OF_UP).flatten())
    a = checked_activation(settings, h)
    tensors = tensors._replace(x=a).only("x", "topk_weights", "row_seeds", *OF_DOWN)
    return run_function(_DownHalf, settings, owners, grouping, *tensors.flatten())


@outside_graphs
def _run_callable_or_main_grad(spec: ExpertSpec, owners: Owners, tensors: CallTensors[Tensor]) -> Tensor:
    """Break the graph: an operator takes no callable and returns gradients."""
    return _run_eagerly(choose_backend(spec, tensors), owners, tensors)


def moe_mlp(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up_proj: Weight,
    down_proj: Weight,
    *,
    activation: Activation = "silu",
    gated: bool = True,
    interleaved: bool = False,
    transposed: bool = False,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    adapters: ExpertAdapters | None = None,
    precision: ExpertPrecision | None = None,
    backend: str = "auto",
    save: Literal["hidden", "input"] = "hidden",
    num_sms: int | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    """Run every token through its K chosen experts and give the weighted sum, on one device.

    Differentiable (once) in x, topk_weights and every weight that is not packed; a callable activation's parameters get
    gradients too.

    Args:
        x: tokens (T, D), floating point; T = 0 gives (0, D), still attached to the graph.
        topk_ids: (T, K) int32 or int64; ids outside [0, E) are skipped: no work, zero gradient for their weight.
            An id may stand twice in a row. Where the first ids all lie in [1, E], a warning is logged, once.
        topk_weights: (T, K) floating point; used in fp32.
        gate_up_proj: (E, 2F, D), or (E, D, 2F) with transposed=True; F instead of 2F with gated=False. A
            QuantizedWeight is frozen, and x then bf16; so for down_proj.
        down_proj: (E, D, F), or (E, F, D) with transposed=True.
        activation: silu, gelu, gelu_tanh, relu, relu2, a ClampedSwiGLU, a SoftcappedSwiGLU, or a callable that takes
            (n, 2F) rows in x.dtype, in the weights' own column order and with the bias added, and gives (n, F).
        gated: whether the up-projection has a gate half, which are the first F of its 2F columns.
        interleaved: gate and up columns alternate instead, those of the bias too: 0, 2, 4, ... are the gate.
        transposed: the weights lie the other way round, as in gpt-oss.
        gate_up_bias: (E, 2F) or None.
        down_bias: (E, D) or None.
        adapters: low-rank adapters on the projections, which are never multiplied out; or None.
        precision: how experts that train multiply, e.g. ExpertPrecision("fp8_block"); None: in x.dtype.
        backend: "auto" (triton on a GPU, torch elsewhere), "triton", "torch" or "reference".
        save: "hidden" keeps h (T*K, 2F) for backward; "input" recomputes it there.
        num_sms: how many of a GPU's multiprocessors persistent kernels take: what the collectives of other ranks leave
            free. None: all, and beside other ranks a program ends after a few tiles, so that none waits for one.
        batch_invariant: a token's bits, and its gradients', don't depend on the other tokens of the call.
    Returns:
        (T, D) in x.dtype.
    Raises:
        ValueError, TypeError: the arguments do not fit together; the message has the rule and the values.
    Example:
        Two experts that multiply by 2 and by 3 (D = F = 1, ungated relu), K = 2:
        x = [[1]], topk_ids = [[0, 1]], topk_weights = [[10, 100]] gives [[1 * 2 * 10 + 1 * 3 * 100]] = [[320]].
    """
    spec = expert_spec(
        activation=activation,
        gated=gated,
        interleaved=interleaved,
        transposed=transposed,
        precision=precision,
        backend=backend,
        save=save,
        num_sms=num_sms,
        batch_invariant=batch_invariant,
    )
    weights = with_adapters(given_weights(gate_up_proj, gate_up_bias, down_proj, down_bias), adapters)
    spec = spec.with_dropout(adapters)
    out = run_experts(spec, CallTensors(x, topk_ids, topk_weights, weights))
    warn_of_one_based_ids(topk_ids, gate_up_proj.shape[0])
    return out


def run_experts(spec: ExpertSpec, tensors: CallTensors[Tensor]) -> Tensor:
    """Check the tensors, and run the experts as an operator where something traces, otherwise eagerly."""
    given = tensors.weights
    tensors = with_row_seeds(checked_tensors(tensors, spec.layout, spec.precision), spec.dropout)
    has_main_grads = find_main_grads(given) is not None
    owners: Owners = given if has_main_grads else NO_WEIGHTS  # they may be copies, for autograd alone to keep
    if has_main_grads and is_transformed():
        raise RuntimeError(MAIN_GRAD)
    with without_autocast(tensors.x.device):
        if is_fused(spec.activation) and not has_main_grads and _is_traced(tensors.x) and not is_transformed():
            return moe_mlp_operator(spec.check(), tensors, spec.save == "hidden" and tensors.needs_any())
        if torch.compiler.is_compiling():
            return _run_callable_or_main_grad(spec.check(), owners, tensors)
        return _run_eagerly(choose_backend(spec, tensors), owners, tensors)
