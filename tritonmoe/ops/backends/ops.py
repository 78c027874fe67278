"""The contract of the seven operations, which every backend module implements, and what the backends share.

A backend is a module with the functions of `Operations`. Arithmetic is done in fp32 for narrower dtypes (fp64 stays
fp64), and each stored tensor is rounded once to the dtype of the rows. Every product takes `options`, which say how it
runs on a GPU: they never change what is computed, and the other backends ignore them.

In short, for a pair of token t with gate weight s, whose expert has the weights W1 and W2 and the biases b1 and b2:
    h = x_t W1 + b1        a = act(h)        y = a W2 + b2        out_t = sum of s*y over the token's pairs
and backward, given dout:
    g  = dout_t W2^T          d(weight) = <g, a> + <dout_t, b2>        da = s*g          dh = act'(h) * da
    dW2 = sum dout_t (s*a)    db2 = sum s*dout_t        dW1 = sum dh x_t       db1 = sum dh       dx_t = sum dh W1

Shapes: R rows of D columns with K experts each, N pairs, E experts of width F on this rank. h has 2F columns, or F
where the experts have no gate ("ungated"). "Storage order" is the order of pairs in the Grouping (grouping.py).
"""

from typing import Literal, NamedTuple, Protocol, overload

import torch
from torch import Tensor

from tritonmoe.config.activations import FusedActivation, find_activation, find_pointwise
from tritonmoe.config.formats import WeightFormat
from tritonmoe.config.layer import NO_WEIGHTS, ExpertLayout, KernelOptions, PerWeight, Projection
from tritonmoe.ops.grouping import Grouping, RowSources

__all__ = [
    "GPU_FACTOR",
    "NO_GRADIENTS",
    "CalledLayer",
    "GradientOperands",
    "Operations",
    "Unchecked",
    "WeightGrads",
    "accumulation_dtype",
    "apply_activation",
    "at_a_time",
    "pairs_at_a_time",
    "required",
    "split_gate",
]


class CalledLayer(NamedTuple):
    """What of a call's layer decides the code of its kernels, beside dtype, number of experts and K."""

    layout: ExpertLayout
    activation: FusedActivation | None
    """None for a callable."""
    hidden_size: int
    intermediate_size: int
    has_bias: bool
    weight_formats: tuple[WeightFormat | None, WeightFormat | None] = (None, None)
    """Of gate_up_proj and down_proj; None for one that is not packed."""


class Unchecked(Exception):
    """Kernels can't be compared with anything now; an error, since no cache keeps one for an answer."""


WeightGrads = PerWeight[Tensor | None]
"""Gradients of the expert weights; None where they were not asked for."""


class GradientOperands(NamedTuple):
    """What the gradients of weights are products and sums of; those that no wanted gradient needs may be None."""

    x: Tensor | None = None
    """(R, D); with dh, of gate_up_proj."""
    dh: Tensor | None = None
    """(N, 2F); also of gate_up_bias."""
    dout: Tensor | None = None
    """(R, D); with scaled_a, of down_proj."""
    scaled_a: Tensor | None = None
    """(N, F): the activations, each times its pair's gate weight."""
    topk_weights: Tensor | None = None
    """(R, K); with dout, of down_bias."""


GPU_FACTOR = 16
"""A GPU has no caches that a block stays in, and each launch costs its host time."""
NO_GRADIENTS: PerWeight[bool] = PerWeight(*(False for _ in PerWeight._fields))
"""No gradient is wanted; NO_GRADIENTS._replace(down_proj=True) asks for one of them."""


def required(tensor: Tensor | None) -> Tensor:
    """Return an operand of a wanted gradient, or a result that was asked for; raise ValueError where there is none."""
    if tensor is None:
        raise ValueError("an operand of a gradient that is wanted, or a result that was asked for, is missing")
    return tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which sums and activations of `dtype` rows are computed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def split_gate(h: Tensor, layout: ExpertLayout) -> tuple[Tensor, Tensor]:
    """Return views of the gate and up halves of h (n, 2F)."""
    if layout.interleaved:
        return h[:, 0::2], h[:, 1::2]
    gate, up_half = h.chunk(2, dim=1)
    return gate, up_half


def apply_activation(h: Tensor, layout: ExpertLayout, activation: FusedActivation) -> Tensor:
    """Return act(h): (n, 2F) -> (n, F), or (n, F) -> (n, F) when ungated; computed in h's own dtype."""
    if not layout.gated:
        return find_pointwise(activation).value(h)
    return find_activation(activation).gated(*split_gate(h, layout))


def at_a_time(amount: int, device: torch.device) -> int:
    """Return how much is computed at a time on a device where a CPU computes an amount that stays in its caches."""
    return amount if device.type == "cpu" else GPU_FACTOR * amount


def pairs_at_a_time(ops: "Operations", device: torch.device) -> int | None:
    """Return how many pairs callers hand over to operations at a time on a device; None for all."""
    return None if ops.MAX_BLOCK_PAIRS is None else at_a_time(ops.MAX_BLOCK_PAIRS, device)


class Operations(Protocol):
    """What a backend module has: seven functions, and two facts for those who call them."""

    __name__: str

    MAX_BLOCK_PAIRS: int | None
    """How many pairs callers hand over at a time on a CPU, as pairs_at_a_time() says for any device; None for all."""

    def copies_rows(self) -> bool:
        """Return whether `up` may hold a copy of the rows of its pairs, those of a whole chunk."""

    def group(
        self,
        topk_ids: Tensor,
        num_experts: int,
        *,
        chunk_row_offsets: tuple[int, ...] | None = None,
        chunk_pair_offsets: tuple[int, ...] | None = None,
        row_sources: RowSources | None = None,
    ) -> Grouping:
        """Order the pairs of R rows by (chunk, expert, source rank, token) and give the ways back.

        Args:
            topk_ids: (R, K) integers; ids outside [0, num_experts) are skipped pairs. Within a chunk rows come
                by (source rank, token).
            num_experts: E of this rank.
            chunk_row_offsets: host integers, C+1 of them, leading zero; None means one chunk.
            chunk_pair_offsets: the same for pairs that do work; required with several chunks.
            row_sources: which rank sent each row; required with several chunks.
        Returns:
            The Grouping (grouping.py has a worked example).
        """

    @overload
    def up(
        self,
        x: Tensor,
        projection: Projection,
        grouping: Grouping,
        activation: FusedActivation,
        *,
        needs_h: Literal[True] = True,
        out_h: Tensor | None = None,
        options: KernelOptions = KernelOptions(),
    ) -> tuple[Tensor, Tensor]:
        """Gather each pair's row, multiply by its expert's up-projection, add the bias, apply the activation.

        Args:
            x: (R, D) rows, of all chunks (row numbers in `grouping` count from the layer's first row).
            projection: the up-projection.
            grouping: one chunk.
            activation: a fused activation, or None for h alone.
            needs_h: False, with an activation and no out_h: h is not kept, and None is given for it (inference).
            out_h: (N, 2F) where h is written.
        Returns:
            h (N, 2F) in x.dtype, rounded once, and a = act(h) (N, F) computed from the rounded h; None for a without an
            activation.
        """

    @overload
    def up(
        self,
        x: Tensor,
        projection: Projection,
        grouping: Grouping,
        activation: FusedActivation,
        *,
        needs_h: bool,
        out_h: Tensor | None = None,
        options: KernelOptions = KernelOptions(),
    ) -> tuple[Tensor | None, Tensor]: ...

    @overload
    def up(
        self,
        x: Tensor,
        projection: Projection,
        grouping: Grouping,
        activation: None,
        *,
        needs_h: bool = True,
        out_h: Tensor | None = None,
        options: KernelOptions = KernelOptions(),
    ) -> tuple[Tensor, None]: ...

    def down(
        self,
        a: Tensor,
        projection: Projection,
        grouping: Grouping,
        *,
        out: Tensor | None = None,
        options: KernelOptions = KernelOptions(),
    ) -> Tensor:
        """Multiply each pair's activation by its expert's down-projection and add the bias.

        Args:
            a: (N, F) in storage order of `grouping` (one chunk).
            projection: the down-projection.
            out: (N, D) where y is written.
        Returns:
            y (N, D) in a.dtype, storage order.
        """

    def gather_sum(
        self, y: Tensor, index: Tensor, weights: Tensor | None = None, *, out: Tensor | None = None
    ) -> Tensor:
        """Sum rows of y per token, in slot order: out[t] = sum over j of weights[t, j] * y[index[t, j]].

        Args:
            y: (N, D). index: (T, J) int32, -1 where there is nothing to add. weights: (T, J) or None (all one).
            out: (T, D) where the sums are written.
        Returns:
            (T, D) in y.dtype; the sum is kept in fp32 (fp64 for fp64) and rounded once. A row with no terms is zero.
        Example:
            y = [[1], [2], [4]], index = [[0, 2], [-1, 1], [-1, -1]] gives [[5], [2], [0]].
        """

    def down_grad(
        self,
        dout: Tensor,
        projection: Projection,
        hidden: Tensor,
        topk_weights: Tensor,
        grouping: Grouping,
        activation: FusedActivation | None,
        *,
        out: tuple[Tensor | None, Tensor | None] = (None, None),
        options: KernelOptions = KernelOptions(),
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Carry dout back through gather_sum, the down-projection and the activation.

        Args:
            dout: (R, D) rows of all chunks. topk_weights: (R, K) of all chunks.
            projection: the down-projection.
            hidden: h (N, 2F) of this chunk; with activation=None it is a (N, F) instead.
            grouping: one chunk.
            out: (N, 2F) and (N, F), where dh and s*a are written; None for one that is allocated here.
        Returns:
            dh (N, 2F) (activation=None: da (N, F)), s*a (N, F), both in dout.dtype, and the gradient of each
            pair's weight (N,) in fp32 (fp64 for fp64); all in storage order.
        """

    def up_grad(
        self,
        dh: Tensor,
        projection: Projection,
        grouping: Grouping,
        *,
        out: Tensor | None = None,
        options: KernelOptions = KernelOptions(),
    ) -> Tensor:
        """Carry dh back through the up-projection.

        Args:
            dh: (N, 2F) in storage order of `grouping` (one chunk).
            projection: the up-projection, whose bias is not read. out: (N, D) where dx is written.
        Returns:
            dx of each pair (N, D) in dh.dtype, storage order.
        """

    def weight_grad(
        self,
        grouping: Grouping,
        layout: ExpertLayout,
        operands: GradientOperands,
        needs: PerWeight[bool],
        *,
        accumulate: PerWeight[Tensor | None] = NO_WEIGHTS,
        options: KernelOptions = KernelOptions(),
    ) -> WeightGrads:
        """Sum the weight gradients over all pairs of the layer, in source order; empty experts get zeros.

        Args:
            grouping: the whole layer, all chunks.
            operands: of all chunks; those that no wanted gradient needs may be None.
            needs: which gradients are wanted.
            accumulate: of gate_up_proj and down_proj, shaped like the weight, any floating dtype and strides; where one
                is given, a gradient that is wanted is added into it, in fp32 or wider and rounded once to its dtype,
                and None is given back. It is Megatron-LM's `weight.main_grad`, mostly fp32 for bf16 weights, which the
                training loop owns and zeroes. Of the biases it is not read: their gradients are always given back.
        Returns:
            WeightGrads in the layout and dtype of the weights' rows; biases are (E, 2F) and (E, D).
        Example:
            One expert, D = F = 1, ungated, x = [[2]], dh = [[3]]: dW1 is [[[6]]]; with accumulate.gate_up_proj =
            [[[10]]] that becomes [[[16]]] and dW1 is None.
        """
