"""The experts of one rank: moe_mlp() on one device, and ExpertsRun, the same work a chunk at a time.

Knows nothing of ranks, streams or transports. One device is the case of one chunk.
"""

from dataclasses import dataclass, field
from itertools import pairwise
from types import ModuleType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import backends, cpu_memory
from .backends.reference import WeightGrads
from .config import MAX_PAIRS, Activation, ExpertLayout, KernelOptions, check_activation, is_fused
from .grouping import Grouping, GroupingBlock

__all__ = ["ExpertSettings", "ExpertWeights", "ExpertsRun", "check_arguments", "moe_mlp"]


class ExpertWeights(NamedTuple):
    """The weights of this rank's experts; see ExpertLayout for the shapes."""

    gate_up_proj: Tensor
    gate_up_bias: Tensor | None
    down_proj: Tensor
    down_bias: Tensor | None


class ExpertSettings(NamedTuple):
    """What stays the same from call to call: the ops and how they run, the layout, the activation, what is saved."""

    ops: ModuleType
    layout: ExpertLayout
    activation: Activation
    save: Literal["hidden", "input"] = "hidden"
    options: KernelOptions = KernelOptions()


@dataclass
class ExpertsRun:
    """One call of this rank's experts, chunk by chunk, forward and backward.

    forward(c) needs the rows of chunk c to be in `rows`; backward(c) the same of `dout`. weight_grad() comes after
    the last backward. Tensors that outlive a chunk (h, dh, s*a) are allocated once for the whole layer.
    """

    settings: ExpertSettings
    weights: ExpertWeights
    rows: Tensor
    """(R, D) received rows of all chunks."""
    topk_weights: Tensor
    """(R, K)."""
    grouping: Grouping
    keep_hidden: bool
    """Whether h is kept for a backward; False in inference and with save="input"."""
    h: Tensor | None = None
    """(N, 2F), filled by forward, or given back to a run that only does backward."""
    dh: Tensor | None = None
    scaled_a: Tensor | None = None
    activation_graphs: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Callable activations: chunk -> (h as a leaf, a), the graph that backward goes through."""
    reused: dict[str, Tensor] = field(default_factory=dict)
    """Memory that every chunk, or every block, uses again."""
    activation_parameters: list[Tensor] = field(default_factory=list)
    activation_grads: list[Tensor | None] = field(default_factory=list)
    """Callable activations: the gradients of activation_parameters so far."""

    def __post_init__(self) -> None:
        self.activation_grads = [None] * len(self.activation_parameters)

    def forward(self, chunk: int, out: Tensor | None = None) -> Tensor:
        """Give the weighted partial sums of chunk `chunk`, (R_c, D)."""
        ops, layout, activation = self.settings[:3]
        options = self.settings.options
        grouping = self.grouping.chunk(chunk)
        if grouping.inverse.shape[0] == 0 and self.grouping.num_chunks > 1:
            return self.rows.new_empty(0, self.rows.shape[1]) if out is None else out
        if is_fused(activation):
            if self.keep_hidden and self.h is None:
                self.h = cpu_memory.empty(self.grouping.num_pairs, self._hidden_width, like=self.rows)
            h = None if self.h is None else self.h[self._pairs(chunk)]
            blocks = grouping.blocks(ops.MAX_BLOCK_PAIRS)
            if len(blocks) == 1:
                y = self._forward_block(blocks[0], out_h=h)
            else:
                width, inner = self._hidden_width, layout.intermediate_size(self._hidden_width)
                y = self._chunk_scratch("y", grouping.num_pairs, self.rows.shape[1])
                for block in blocks:
                    self._forward_block(
                        block,
                        out_h=self._block_scratch("h", block, width) if h is None else h[block.positions],
                        out_a=self._block_scratch("a", block, inner),
                        out_y=y[block.positions],
                    )
        else:
            w1, b1, w2, b2 = self.weights
            h, _ = ops.up(self.rows, w1, b1, grouping, layout, None, options=options)
            a = self._call_activation(chunk, h, grouping)
            y = ops.down(a, w2, b2, grouping, layout, options=options)
        return ops.combine(y, grouping.inverse, self.topk_weights[self._row_range(chunk)], out=out)

    def _forward_block(
        self,
        block: GroupingBlock,
        out_h: Tensor | None = None,
        out_a: Tensor | None = None,
        out_y: Tensor | None = None,
    ) -> Tensor:
        ops, layout, activation = self.settings[:3]
        options = self.settings.options
        w1, b1, w2, b2 = self._block_weights(block)
        _, a = ops.up(
            self.rows,
            w1,
            b1,
            block.grouping,
            layout,
            activation,
            needs_h=False,
            out_h=out_h,
            out_a=out_a,
            options=options,
        )
        return ops.down(a, w2, b2, block.grouping, layout, out=out_y, options=options)

    def backward(
        self, chunk: int, dout: Tensor, needs_dx: bool, out: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor]:
        """Give dx (R_c, D), None unless needed, and the gradient of topk_weights (R_c, K) in fp32 for one chunk.

        dout: (R, D) of all chunks.
        """
        ops, layout, activation = self.settings[:3]
        options = self.settings.options
        grouping = self.grouping.chunk(chunk)
        pairs = self._pairs(chunk)
        if self.dh is None or self.scaled_a is None:
            self.dh = self._scratch("dh", self.grouping.num_pairs, self._hidden_width)
            inner = layout.intermediate_size(self._hidden_width)
            self.scaled_a = self._scratch("scaled_a", self.grouping.num_pairs, inner)
        if grouping.inverse.shape[0] == 0 and self.grouping.num_chunks > 1:
            empty = self.rows.new_empty(0, self.rows.shape[1]) if needs_dx and out is None else out
            return empty, self.topk_weights.new_empty(0, grouping.top_k)
        dh, scaled_a = self.dh[pairs], self.scaled_a[pairs]
        dx_pairs = self._chunk_scratch("y", grouping.num_pairs, self.rows.shape[1]) if needs_dx else None
        if is_fused(activation):
            h = None if self.h is None else self.h[pairs]
            blocks = grouping.blocks(ops.MAX_BLOCK_PAIRS)
            parts = [self._backward_block(block, dout, h, dh, scaled_a, dx_pairs) for block in blocks]
            dweights = parts[0] if len(parts) == 1 else torch.cat(parts)
        else:
            w1, _, w2, b2 = self.weights
            a = self.activation_graphs[chunk][1].detach()
            da, _, dweights = ops.down_grad(
                dout, w2, b2, a, self.topk_weights, grouping, layout, None, out_scaled_a=scaled_a, options=options
            )
            dh.copy_(self._activation_backward(chunk, da))
            if dx_pairs is not None:
                ops.up_grad(dh, w1, grouping, layout, out=dx_pairs, options=options)
        dx = None if dx_pairs is None else ops.combine(dx_pairs, grouping.inverse, out=out)
        return dx, grouping.pairs_to_rows(dweights)

    def _backward_block(
        self,
        block: GroupingBlock,
        dout: Tensor,
        h: Tensor | None,
        dh: Tensor,
        scaled_a: Tensor,
        dx_pairs: Tensor | None,
    ) -> Tensor:
        """Fill this block's part of dh, scaled_a and dx_pairs, which are the chunk's; give its dweights."""
        ops, layout, activation = self.settings[:3]
        options = self.settings.options
        w1, b1, w2, b2 = self._block_weights(block)
        positions = block.positions
        if h is None:
            hidden, _ = ops.up(self.rows, w1, b1, block.grouping, layout, None, options=options)
        else:
            hidden = h[positions]
        _, _, dweights = ops.down_grad(
            dout,
            w2,
            b2,
            hidden,
            self.topk_weights,
            block.grouping,
            layout,
            activation,
            out_dh=dh[positions],
            out_scaled_a=scaled_a[positions],
            options=options,
        )
        if dx_pairs is not None:
            ops.up_grad(dh[positions], w1, block.grouping, layout, out=dx_pairs[positions], options=options)
        return dweights

    def _block_weights(self, block: GroupingBlock) -> ExpertWeights:
        if block.grouping.num_experts == self.weights.gate_up_proj.shape[0]:
            return self.weights
        w1, b1, w2, b2 = self.weights
        experts = block.experts
        return ExpertWeights(
            w1[experts], None if b1 is None else b1[experts], w2[experts], None if b2 is None else b2[experts]
        )

    def weight_grad(self, dout: Tensor, needs: ExpertWeights | tuple[bool, bool, bool, bool]) -> WeightGrads:
        """Give the gradients of the weights; needs says which, in the order of ExpertWeights."""
        needs_w1, needs_b1, needs_w2, needs_b2 = needs
        if not any(needs):
            return WeightGrads(None, None, None, None)
        return self.settings.ops.weight_grad(
            self.grouping,
            self.settings.layout,
            x=self.rows if needs_w1 else None,
            dh=self.dh if needs_w1 or needs_b1 else None,
            dout=dout if needs_w2 or needs_b2 else None,
            scaled_a=self.scaled_a if needs_w2 else None,
            topk_weights=self.topk_weights if needs_b2 else None,
            gate_up_bias=bool(needs_b1),
            down_bias=bool(needs_b2),
            options=self.settings.options,
        )

    def _call_activation(self, chunk: int, h: Tensor, grouping: Grouping) -> Tensor:
        """Run a callable activation; under keep_hidden its graph is kept for backward."""
        zero_padding(h, grouping)
        if not self.keep_hidden:
            with torch.no_grad():
                return checked_activation(self.settings, h)
        with torch.enable_grad():
            leaf = h.detach().requires_grad_()
            a = checked_activation(self.settings, leaf.clone())  # cloned: a callable may work in place
        self.activation_graphs[chunk] = (leaf, a)
        return a.detach()

    def _activation_backward(self, chunk: int, da: Tensor) -> Tensor:
        leaf, a = self.activation_graphs[chunk]
        zero_padding(da, self.grouping.chunk(chunk))
        inputs = [leaf, *(p for p in self.activation_parameters if p.requires_grad)]
        # retain_graph: the layer's own backward may run twice, and this graph goes when the layer's does.
        grads = torch.autograd.grad(a, inputs, da, retain_graph=True, allow_unused=True)
        remaining = iter(grads[1:])
        for i, parameter in enumerate(self.activation_parameters):
            grad = next(remaining) if parameter.requires_grad else None
            if grad is not None:
                so_far = self.activation_grads[i]
                self.activation_grads[i] = grad if so_far is None else so_far + grad
        return torch.zeros_like(leaf) if grads[0] is None else grads[0]

    @property
    def _hidden_width(self) -> int:
        """2F, or F when ungated."""
        return self.weights.gate_up_proj.shape[2 if self.settings.layout.transposed else 1]

    def _scratch(self, name: str, num_pairs: int, width: int) -> Tensor:
        """Give (num_pairs, width) of memory that is not needed after this run."""
        if self.rows.device.type != "cpu" or torch.compiler.is_compiling():
            return self.rows.new_empty(num_pairs, width)
        return cpu_memory.scratch.take(self, name, num_pairs, width, self.rows.dtype)

    def _chunk_scratch(self, name: str, num_pairs: int, width: int) -> Tensor:
        """Give (num_pairs, width) of memory that is not needed after this chunk."""
        if name not in self.reused:
            largest = max(last - first for first, last in pairwise(self.grouping.chunk_pair_offsets))
            self.reused[name] = self._scratch(name, largest, width)
        return self.reused[name][:num_pairs]

    def _block_scratch(self, name: str, block: GroupingBlock, width: int) -> Tensor:
        """Give (pairs of the block, width) of memory that is not needed after this block."""
        if name not in self.reused:
            self.reused[name] = self._scratch(name, self.settings.ops.MAX_BLOCK_PAIRS, width)
        return self.reused[name][: block.grouping.num_pairs]

    def _pairs(self, chunk: int) -> slice:
        return slice(*self.grouping.chunk_pair_offsets[chunk : chunk + 2])

    def _row_range(self, chunk: int) -> slice:
        return slice(*self.grouping.chunk_row_offsets[chunk : chunk + 2])


def zero_padding(values: Tensor, grouping: Grouping) -> None:
    """Zero the positions past the last pair, which the kernels never write, before a callable reads them."""
    if values.is_cuda:
        padding = torch.arange(values.shape[0], device=values.device) >= grouping.expert_offsets[-1]
        values.masked_fill_(padding[:, None], 0)


def checked_activation(settings: ExpertSettings, h: Tensor) -> Tensor:
    """Call a callable activation on h (n, 2F) and check that it gives (n, F) in the same dtype."""
    return _call_checked(settings.activation, settings.layout, h)


def _call_checked(activation: Activation, layout: ExpertLayout, h: Tensor) -> Tensor:
    assert callable(activation)
    shape = tuple(h.shape)
    a = activation(h)
    expected = (shape[0], layout.intermediate_size(shape[1]))
    if tuple(a.shape) != expected or a.dtype != h.dtype:
        raise ValueError(
            f"the activation callable must turn {shape} {h.dtype} into {expected} {h.dtype}, "
            f"got {tuple(a.shape)} {a.dtype}"
        )
    return a.contiguous()


def activation_parameters(activation: Activation, gate_up_proj: Tensor, layout: ExpertLayout) -> list[Tensor]:
    """Find the parameters that a callable activation uses, by running it on no rows and walking the graph.

    Raises what checked_activation raises, so that a callable that doesn't fit is found before anything is sent.
    """
    width = gate_up_proj.shape[2 if layout.transposed else 1]
    with torch.enable_grad():
        empty = torch.zeros(0, width, dtype=gate_up_proj.dtype, device=gate_up_proj.device, requires_grad=True)
        out = _call_checked(activation, layout, empty.clone())
    found: dict[int, Tensor] = {}
    seen: set[Any] = set()
    nodes = [] if out.grad_fn is None else [out.grad_fn]
    while nodes:
        node = nodes.pop()
        if node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and leaf is not empty:
            found[id(leaf)] = leaf
        nodes.extend(upstream for upstream, _ in node.next_functions if upstream is not None)
    return list(found.values())


def check_arguments(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    weights: ExpertWeights,
    layout: ExpertLayout,
    activation: Activation,
) -> None:
    """Raise ValueError or TypeError, with the rule and the values, unless these arguments fit together."""
    check_activation(activation, layout.gated)
    if x.dim() != 2:
        raise ValueError(f"x must be (T, D), got shape {tuple(x.shape)}: flatten leading dimensions first")
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, got {x.dtype}")
    if topk_ids.dim() != 2 or topk_ids.shape[0] != x.shape[0]:
        raise ValueError(f"topk_ids must be (T, K) with T = {x.shape[0]} as in x, got {tuple(topk_ids.shape)}")
    if topk_ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"topk_ids must be int32 or int64, got {topk_ids.dtype}")
    if topk_weights.shape != topk_ids.shape:
        raise ValueError(
            f"topk_weights {tuple(topk_weights.shape)} must have the shape of topk_ids {tuple(topk_ids.shape)}"
        )
    if not topk_weights.is_floating_point():
        raise TypeError(f"topk_weights must be floating point, got {topk_weights.dtype}")
    if topk_ids.numel() > MAX_PAIRS:
        raise ValueError(
            f"T*K = {topk_ids.numel()} pairs exceed {MAX_PAIRS}, the range of the int32 positions: "
            "split the batch into several calls"
        )
    w1, b1, w2, b2 = weights
    if w1.dim() != 3 or w2.dim() != 3:
        raise ValueError(f"gate_up_proj and down_proj must have 3 axes, got {tuple(w1.shape)} and {tuple(w2.shape)}")
    num_experts, model_width = w1.shape[0], x.shape[1]
    if num_experts < 1:
        raise ValueError(f"there must be at least one expert, got gate_up_proj {tuple(w1.shape)}")
    width = w1.shape[2 if layout.transposed else 1]
    if layout.gated and width % 2:
        raise ValueError(f"a gated gate_up_proj needs an even 2F axis, got {tuple(w1.shape)}")
    inner = layout.intermediate_size(width)
    two_f = "2F" if layout.gated else "F"
    want_w1 = (num_experts, model_width, width) if layout.transposed else (num_experts, width, model_width)
    want_w2 = (num_experts, inner, model_width) if layout.transposed else (num_experts, model_width, inner)
    form_w1, form_w2 = (f"(E, D, {two_f})", "(E, F, D)") if layout.transposed else (f"(E, {two_f}, D)", "(E, D, F)")
    for name, tensor, want, form in (
        ("gate_up_proj", w1, want_w1, form_w1),
        ("down_proj", w2, want_w2, form_w2),
        ("gate_up_bias", b1, (num_experts, width), f"(E, {two_f})"),
        ("down_bias", b2, (num_experts, model_width), "(E, D)"),
    ):
        if tensor is None:
            continue
        if tuple(tensor.shape) != want:
            raise ValueError(
                f"{name} must be {form} = {want} with D = {model_width} from x and transposed={layout.transposed}, "
                f"gated={layout.gated}; got {tuple(tensor.shape)}"
            )
        if tensor.dtype != x.dtype:
            raise TypeError(f"{name} is {tensor.dtype} and x is {x.dtype}: cast one to the other's dtype")
    for name, tensor in (
        ("topk_ids", topk_ids),
        ("topk_weights", topk_weights),
        ("gate_up_proj", w1),
        ("down_proj", w2),
        ("gate_up_bias", b1),
        ("down_bias", b2),
    ):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device} and x on {x.device}: move them to one device")


class _MoEMLP(torch.autograd.Function):
    """moe_mlp with a fused activation."""

    @staticmethod
    def forward(
        ctx: Any,
        settings: ExpertSettings,
        topk_ids: Tensor,
        x: Tensor,
        topk_weights: Tensor,
        *weights: Tensor | None,
    ) -> Tensor:
        assert weights[0] is not None
        experts = ExpertWeights(*weights)  # type: ignore[arg-type]
        grouping = settings.ops.group(topk_ids, weights[0].shape[0])
        run = ExpertsRun(settings, experts, x, topk_weights, grouping, keep_hidden=settings.save == "hidden")
        out = run.forward(0)
        ctx.settings, ctx.grouping = settings, grouping
        ctx.save_for_backward(x, topk_weights, *weights, run.h)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, topk_weights, *weights, h = ctx.saved_tensors
        _, _, needs_x, needs_topk_weights, *needs = ctx.needs_input_grad
        run = ExpertsRun(ctx.settings, ExpertWeights(*weights), x, topk_weights, ctx.grouping, False, h)
        dx, dweights = run.backward(0, dout, needs_x)
        grads = run.weight_grad(dout, tuple(needs))
        return None, None, dx, dweights.to(topk_weights.dtype) if needs_topk_weights else None, *grads


class _UpHalf(torch.autograd.Function):
    """h = gathered rows x up-projection (+ bias): what a callable activation takes."""

    @staticmethod
    def forward(
        ctx: Any, settings: ExpertSettings, grouping: Grouping, x: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        h, _ = settings.ops.up(x, weight, bias, grouping, settings.layout, None, options=settings.options)
        zero_padding(h, grouping)
        ctx.settings, ctx.grouping = settings, grouping
        ctx.save_for_backward(x, weight)
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), grouping = ctx.saved_tensors, ctx.grouping
        ops, layout, options = ctx.settings.ops, ctx.settings.layout, ctx.settings.options
        _, _, needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        dh = dh.contiguous()
        dx = None
        if needs_x:
            dx = ops.combine(ops.up_grad(dh, weight, grouping, layout, options=options), grouping.inverse)
        grads = ops.weight_grad(
            grouping, layout, x=x if needs_weight else None, dh=dh, gate_up_bias=needs_bias, options=options
        )
        return None, None, dx, grads.gate_up_proj, grads.gate_up_bias


class _DownHalf(torch.autograd.Function):
    """Weighted sum per token of a x down-projection (+ bias): what follows a callable activation."""

    @staticmethod
    def forward(
        ctx: Any,
        settings: ExpertSettings,
        grouping: Grouping,
        a: Tensor,
        topk_weights: Tensor,
        weight: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        y = settings.ops.down(a, weight, bias, grouping, settings.layout, options=settings.options)
        ctx.settings, ctx.grouping = settings, grouping
        ctx.save_for_backward(a, topk_weights, weight, bias)
        return settings.ops.combine(y, grouping.inverse, topk_weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        a, topk_weights, weight, bias = ctx.saved_tensors
        ops, layout, options, grouping = ctx.settings.ops, ctx.settings.layout, ctx.settings.options, ctx.grouping
        _, _, _, needs_topk_weights, needs_weight, needs_bias = ctx.needs_input_grad
        da, scaled_a, dweights = ops.down_grad(
            dout, weight, bias, a, topk_weights, grouping, layout, None, options=options
        )
        zero_padding(da, grouping)
        grads = ops.weight_grad(
            grouping,
            layout,
            dout=dout,
            scaled_a=scaled_a if needs_weight else None,
            topk_weights=topk_weights,
            down_bias=needs_bias,
            options=options,
        )
        dtopk_weights = grouping.pairs_to_rows(dweights).to(topk_weights.dtype) if needs_topk_weights else None
        return None, None, da, dtopk_weights, grads.down_proj, grads.down_bias


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
            An id may stand twice in a row.
        topk_weights: (T, K) floating point; used in fp32.
        gate_up_proj: (E, 2F, D), or (E, D, 2F) with transposed=True; F instead of 2F with gated=False.
        down_proj: (E, D, F), or (E, F, D) with transposed=True.
        activation: silu, gelu, gelu_tanh, relu, relu2, a ClampedSwiGLU, or a callable that takes (n, 2F) rows in
            x.dtype, in the weights' own column order and with the bias added, and gives (n, F).
        gated: whether the up-projection has a gate half. interleaved: gate and up columns alternate.
        gate_up_bias: (E, 2F) or None. down_bias: (E, D) or None.
        backend: "auto" (triton on a GPU, torch elsewhere), "triton", "torch" or "reference".
        save: "hidden" keeps h (T*K, 2F) for backward; "input" recomputes it there.
        num_sms: how many of a GPU's multiprocessors the kernels take; None: all.
        batch_invariant: a token's bits, and its gradients', don't depend on the other tokens of the call.
    Returns:
        (T, D) in x.dtype.
    Raises:
        ValueError, TypeError: the arguments do not fit together; the message has the rule and the values.
    Example:
        Two experts that multiply by 2 and by 3 (D = F = 1, ungated relu), K = 2:
        x = [[1]], topk_ids = [[0, 1]], topk_weights = [[10, 100]] gives [[1 * 2 * 10 + 1 * 3 * 100]] = [[320]].
    """
    layout = ExpertLayout(gated, interleaved, transposed)
    weights = ExpertWeights(gate_up_proj, gate_up_bias, down_proj, down_bias)
    check_arguments(x, topk_ids, topk_weights, weights, layout, activation)
    settings = make_settings(x, layout, activation, backend, save, KernelOptions(num_sms, batch_invariant))
    if is_fused(activation):
        needs_grad = torch.is_grad_enabled() and any(
            tensor is not None and tensor.requires_grad for tensor in (x, topk_weights, *weights)
        )
        if needs_grad:
            return _MoEMLP.apply(settings, topk_ids, x, topk_weights, *weights)
        grouping = settings.ops.group(topk_ids, gate_up_proj.shape[0])
        return ExpertsRun(settings, weights, x, topk_weights, grouping, keep_hidden=False).forward(0)
    grouping = settings.ops.group(topk_ids, gate_up_proj.shape[0])
    h = _UpHalf.apply(settings, grouping, x, gate_up_proj, gate_up_bias)
    a = checked_activation(settings, h)
    return _DownHalf.apply(settings, grouping, a, topk_weights, down_proj, down_bias)


def make_settings(
    x: Tensor,
    layout: ExpertLayout,
    activation: Activation,
    backend: str,
    save: Literal["hidden", "input"],
    options: KernelOptions,
) -> ExpertSettings:
    """Choose the backend for x's device and dtype and check `save` and `options`."""
    if save not in ("hidden", "input"):
        raise ValueError(f"save must be 'hidden' or 'input', got {save!r}")
    return ExpertSettings(backends.choose(backend, x.device, x.dtype), layout, activation, save, options.check())
