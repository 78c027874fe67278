"""Routing: which K experts each token goes to and with what weight; the losses and numbers that watch it.

Selection without an auxiliary loss and expert groups as in DeepSeek-V3 (https://arxiv.org/abs/2412.19437); the load
balance loss of Switch Transformers (https://arxiv.org/abs/2101.03961), for any K; the z-loss of ST-MoE
(https://arxiv.org/abs/2202.08906); MaxVio from loss-free balancing (https://arxiv.org/abs/2408.15664).
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from .config import MoEConfig, check_moe_config, is_number

__all__ = [
    "Routing",
    "RoutingStatistics",
    "TopKRouter",
    "expert_load",
    "is_recomputing",
    "load_balance_loss",
    "routing_statistics",
    "save_topk",
    "z_loss",
]


@dataclass(frozen=True, kw_only=True)
class Routing:
    """Where T tokens go, and the scores behind it; made by TopKRouter.

    A token with a non-finite logit has ids -1, weights 0 and scores 0: its K pairs are skipped pairs.
    """

    topk_ids: Tensor
    """(T, K) int64 global expert ids, best first; -1 is a skipped pair."""
    topk_weights: Tensor
    """(T, K) fp32 weights of the chosen experts, differentiable; exactly 0 for skipped pairs."""
    logits: Tensor
    """(T, E) fp32, attached to the graph; non-finite values stay visible here and take no gradient."""
    scores: Tensor
    """(T, E) fp32: softmax or sigmoid of all logits, without the selection bias; differentiable."""
    num_nonfinite_rows: Tensor
    """() int64, on the device: how many tokens were skipped for a non-finite logit."""


def is_recomputing() -> bool:
    """Say whether this forward runs inside a backward: the recompute of activation checkpointing.

    Both kinds of torch.utils.checkpoint call the function again while the autograd engine is at work, and the
    engine's graph task id is -1 at any other time. Things that count calls ask here, so as to count each once.
    """
    if torch.compiler.is_compiling():  # there the partitioner recomputes, not a second call
        return False
    return torch._C._current_graph_task_id() != -1


def save_topk() -> tuple[AbstractContextManager, AbstractContextManager]:
    """Give the contexts in which activation checkpointing keeps every top-k and recomputes everything else.

    A recompute that rounds a score differently would send a near-tie token to other experts than the forward did, and
    its gradients would belong to no forward. The ids are kept, 8 bytes each; the scores are taken anew at these ids, so
    that code which works on them in place (transformers divides them by their sum) does no harm. For users:

        torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False, context_fn=tritonmoe.routing.save_topk)
    """
    if torch.compiler.is_compiling():  # tracers know torch's own contexts only; nothing is in place in a graph
        return create_selective_checkpoint_contexts([torch.ops.aten.topk.default])
    kept: list[Tensor] = []
    return _KeepTopK(kept), _ReuseTopK(kept)


class _KeepTopK(TorchDispatchMode):
    """Keep the ids of every top-k of a forward."""

    def __init__(self, kept: list[Tensor]) -> None:
        super().__init__()
        self.kept = kept

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.topk.default:
            self.kept.append(result[1].clone())
        return result


class _ReuseTopK(TorchDispatchMode):
    """In a recompute of that forward, answer every top-k with the kept ids and the new scores at them."""

    def __init__(self, kept: list[Tensor]) -> None:
        super().__init__()
        self.kept = kept

    def __enter__(self) -> "_ReuseTopK":
        self.position = 0  # a second backward recomputes from the start again
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not torch.ops.aten.topk.default:
            return func(*args, **kwargs)
        if self.position == len(self.kept):
            raise RuntimeError(
                f"the recompute calls torch.topk more often than the forward did ({len(self.kept)} times): a function "
                "under activation checkpointing must do the same each time"
            )
        ids = self.kept[self.position]
        self.position += 1
        dim = args[2] if len(args) > 2 else kwargs.get("dim", -1)
        return args[0].gather(dim, ids), ids.clone()


class _RouterLogits(torch.autograd.Function):
    """(x (T, D), weight (E, D)) -> (logits (T, E), is_finite (T, 1)), in fp32 (fp64 for fp64 inputs).

    Rows with a non-finite logit give zeros to both gradients: plain autograd would give 0 * NaN. That is also why
    x is masked in backward only: masking before the product would need a second pass over x to find the rows.
    """

    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        dtype = _score_dtype(x, weight)
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.to(dtype), weight.to(dtype))
        return logits, logits.isfinite().all(dim=1, keepdim=True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
        is_finite = output[1]
        ctx.mark_non_differentiable(is_finite)
        ctx.save_for_backward(*inputs, is_finite)

    @staticmethod
    def backward(ctx: Any, dlogits: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight, is_finite = ctx.saved_tensors
        dlogits = torch.where(is_finite, dlogits, 0.0)
        dx = dweight = None
        with torch.autocast(x.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                dx = torch.where(is_finite, dlogits @ weight.to(dlogits.dtype), 0.0).to(x.dtype)
            if ctx.needs_input_grad[1]:
                finite_x = torch.where(is_finite, x.to(dlogits.dtype), 0.0)
                dweight = (dlogits.T @ finite_x).to(weight.dtype)
        return dx, dweight


def _score_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (x.dtype, weight.dtype) else torch.float32


class TopKRouter(nn.Module):
    """Chooses K of E experts for each token.

    Args:
        config: scores, renormalisation, scaling, selection bias and expert groups; see MoEConfig.
        reduce_load: sums an (E,) int64 tensor over data-parallel ranks and returns it (in place is fine); called
            by update_selection_bias on every rank. None: this rank's load alone.
        device, dtype: of `weight` (E, D).

    With config.selection_bias there are two buffers: `e_score_correction_bias` (E,), which stays fp32 whatever the
    module is cast to (bf16 would swallow its small steps), and `load` (E,) int64, not saved in checkpoints: pairs
    per expert over the training forwards since the last update. DistributedDataParallel copies buffers from
    rank 0 before each forward, which falsifies `load`: give it broadcast_buffers=False.
    """

    weight: nn.Parameter
    e_score_correction_bias: Tensor | None
    load: Tensor | None

    def __init__(
        self,
        config: MoEConfig,
        *,
        reduce_load: Callable[[Tensor], Tensor] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_moe_config(config)
        self.config = config
        self.reduce_load = reduce_load
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size, device=device, dtype=dtype))
        bias = load = None
        if config.selection_bias:
            bias = torch.zeros(config.num_experts, device=device, dtype=torch.float32)
            load = torch.zeros(config.num_experts, device=device, dtype=torch.int64)
        self.register_buffer("e_score_correction_bias", bias)
        self.register_buffer("load", load, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight from a normal distribution under which unit-variance tokens get unit-variance logits."""
        nn.init.normal_(self.weight, std=self.config.hidden_size**-0.5)
        if self.e_score_correction_bias is not None and self.load is not None:
            self.e_score_correction_bias.zero_()
            self.load.zero_()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "TopKRouter":
        bias = self.e_score_correction_bias
        super()._apply(fn, recurse)
        cast = self.e_score_correction_bias
        if bias is not None and cast is not None and cast.dtype != torch.float32:
            self.e_score_correction_bias = bias.to(cast.device)
        return self

    def extra_repr(self) -> str:
        return (
            f"hidden_size={self.config.hidden_size}, num_experts={self.config.num_experts}, top_k={self.config.top_k}"
        )

    def forward(self, x: Tensor) -> Routing:
        """Route the tokens x (T, D), any floating dtype; logits and everything after are fp32.

        Differentiable in x and weight, through topk_weights, scores and logits; ids carry no gradient.
        fp64 inputs are computed in fp64. Reads nothing on the host.

        Raises:
            ValueError, TypeError: x is not (T, D), not floating point, or not on the weight's device.
        """
        config = self.config
        if not isinstance(x, Tensor) or not x.is_floating_point():
            kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"the router takes a floating-point tensor, got {kind}")
        if x.dim() != 2 or x.shape[1] != config.hidden_size:
            raise ValueError(f"the router takes (T, {config.hidden_size}) tokens, got shape {tuple(x.shape)}")
        if x.device != self.weight.device:
            raise ValueError(f"x is on {x.device} and the router on {self.weight.device}: move them to one device")
        logits, is_finite = _RouterLogits.apply(x, self.weight)
        finite_logits = torch.where(is_finite, logits, 0.0)
        if config.score_function == "softmax":
            scores = finite_logits.softmax(dim=1)
        else:
            scores = finite_logits.sigmoid()

        ranked_by = finite_logits if config.softmax_after_topk else scores
        topk_ids = self._select(ranked_by.detach())
        topk_weights = ranked_by.gather(1, topk_ids)
        if config.softmax_after_topk:
            topk_weights = topk_weights.softmax(dim=1)
        elif config.renormalize:
            # as in DeepSeek-V3; it changes no bit of any sum above 1e-13, so softmax routers keep theirs
            topk_weights = topk_weights / (topk_weights.sum(dim=1, keepdim=True) + 1e-20)
        if config.routed_scaling_factor != 1.0:
            topk_weights = topk_weights * config.routed_scaling_factor

        routing = Routing(
            topk_ids=torch.where(is_finite, topk_ids, -1),
            topk_weights=torch.where(is_finite, topk_weights, 0.0),
            logits=logits,
            scores=torch.where(is_finite, scores, 0.0),
            num_nonfinite_rows=is_finite.logical_not().sum(),
        )
        if self.load is not None and self.training and not is_recomputing():
            self.load += expert_load(routing.topk_ids, config.num_experts)
        return routing

    def _select(self, ranked_by: Tensor) -> Tensor:
        """Give the ids (T, K) of the best experts by `ranked_by` (T, E) plus the selection bias, best first."""
        config = self.config
        if self.e_score_correction_bias is not None:
            ranked_by = ranked_by + self.e_score_correction_bias
        if config.top_k_groups < config.num_expert_groups:
            group_size = config.num_experts // config.num_expert_groups
            grouped = ranked_by.unflatten(1, (config.num_expert_groups, group_size))  # (T, groups, group size)
            group_scores = grouped.topk(min(2, group_size), dim=2).values.sum(dim=2)
            group_ids = group_scores.topk(config.top_k_groups, dim=1).indices
            is_eligible = torch.zeros_like(group_scores, dtype=torch.bool).scatter_(1, group_ids, True)
            ranked_by = grouped.masked_fill(~is_eligible.unsqueeze(2), float("-inf")).flatten(1)
        return ranked_by.topk(config.top_k, dim=1).indices

    @torch.no_grad()
    def update_selection_bias(self, rate: float = 1e-3) -> Tensor:
        """Move every expert's selection bias by `rate` against its load, and start counting anew.

        bias += rate * sign(mean load - load), with the load of all training forwards since the last update, summed
        over data-parallel ranks by `reduce_load`. Call it once per optimiser step, on every rank.

        Returns:
            The load that was used, (E,) int64.
        Raises:
            ValueError: the router has no selection bias, or the rate is no number. TypeError: reduce_load gave no load.
        """
        if self.e_score_correction_bias is None or self.load is None:
            raise ValueError("the router has no selection bias: build it with MoEConfig(selection_bias=True)")
        if not is_number(rate) or rate < 0:
            raise ValueError(f"rate must be finite and not negative, got {rate!r}")
        load = self.load.clone()
        if self.reduce_load is not None:
            load = self.reduce_load(load)
            if not isinstance(load, Tensor) or load.shape != self.load.shape:
                got = tuple(load.shape) if isinstance(load, Tensor) else type(load).__name__
                raise TypeError(
                    f"reduce_load must return the summed load {tuple(self.load.shape)}, got {got}: all_reduce() sums "
                    "in place and returns none, so return the tensor that it was given"
                )
        direction = (load.sum() - load.numel() * load).sign()  # in integers: a balanced expert does not move
        self.e_score_correction_bias += rate * direction.to(self.e_score_correction_bias.dtype)
        self.load.zero_()
        return load


def expert_load(topk_ids: Tensor, num_experts: int) -> Tensor:
    """Count the pairs of each expert: topk_ids of any shape -> (E,) int64; ids outside [0, E) count nowhere."""
    return _pair_counts(topk_ids, num_experts)[:-1]


def _pair_counts(topk_ids: Tensor, num_experts: int) -> Tensor:
    """Give (E+1,) int64: pairs per expert, then skipped pairs. Integer sums: the same on every run."""
    ids = topk_ids.flatten().long()
    ids = torch.where((ids >= 0) & (ids < num_experts), ids, num_experts)
    return ids.new_zeros(num_experts + 1).scatter_add_(0, ids, torch.ones_like(ids))


def load_balance_loss(routing: Routing, num_experts: int) -> Tensor:
    """Give E * sum over e of f_e * P_e, a scalar that is 1.0 under uniform routing for any K.

    f_e is the fraction of the routed (not skipped) pairs that chose expert e, a constant to autograd; P_e is the
    mean over tokens of the score of e, normalised over experts. Switch Transformers' loss, divided by K.
    Tokens with a non-finite logit are left out. T = 0 gives 0, attached to the graph.
    """
    scores = routing.scores  # (T, E)
    if scores.shape[1] != num_experts:
        raise ValueError(f"num_experts is {num_experts}, and the routing has scores of {scores.shape[1]} experts")
    total = scores.sum(dim=1, keepdim=True)
    is_counted = total > 0  # False for NaN as well
    probabilities = torch.where(is_counted, scores, 0.0) / torch.where(is_counted, total, 1.0)
    mean_probability = probabilities.sum(dim=0) / is_counted.sum().clamp(min=1)
    load = expert_load(routing.topk_ids, num_experts).to(scores.dtype)
    fraction = load / load.sum().clamp(min=1)
    return num_experts * (fraction * mean_probability).sum()


def z_loss(logits: Tensor) -> Tensor:
    """Give the mean over tokens of logsumexp(logits)**2, a scalar that keeps logits (T, E) small (ST-MoE).

    Rows with a non-finite logit are left out and get zero gradient. T = 0 gives 0, attached to the graph.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    is_finite = logits.isfinite().all(dim=1)
    log_z = torch.where(is_finite.unsqueeze(1), logits, 0.0).logsumexp(dim=1)
    return torch.where(is_finite, log_z.square(), 0.0).sum() / is_finite.sum().clamp(min=1)


@dataclass(frozen=True)
class RoutingStatistics:
    """How evenly a batch of pairs is spread over the experts; made by routing_statistics().

    The counts stay on the device; the first number that is asked for reads them to the host, once.
    With no routed pairs every number is 0 (but num_dead_experts is E).
    """

    counts: Tensor
    """(E+1,) int64: pairs per expert, then skipped pairs."""

    @property
    def load(self) -> Tensor:
        """(E,) int64: pairs per expert, on the device."""
        return self.counts[:-1]

    @cached_property
    def host_counts(self) -> list[int]:
        """The counts as Python integers."""
        return self.counts.tolist()

    @property
    def num_experts(self) -> int:
        return self.counts.shape[0] - 1

    @property
    def num_skipped_pairs(self) -> int:
        """Pairs with an id outside [0, E)."""
        return self.host_counts[-1]

    @property
    def num_routed_pairs(self) -> int:
        return sum(self.host_counts[:-1])

    @property
    def num_dead_experts(self) -> int:
        """Experts that no pair chose."""
        return self.host_counts[:-1].count(0)

    @property
    def mean_load(self) -> float:
        return self.num_routed_pairs / self.num_experts

    @property
    def coefficient_of_variation(self) -> float:
        """Standard deviation of the load (over all E experts) divided by its mean."""
        mean = self.mean_load
        if mean == 0:
            return 0.0
        variance = sum((load - mean) ** 2 for load in self.host_counts[:-1]) / self.num_experts
        return math.sqrt(variance) / mean

    @property
    def max_violation(self) -> float:
        """MaxVio: (largest load - mean load) / mean load; 0 is perfect balance, E - 1 is one expert for all."""
        mean = self.mean_load
        return (max(self.host_counts[:-1]) - mean) / mean if mean else 0.0

    @property
    def entropy(self) -> float:
        """Entropy of the load's distribution over experts, in nats; log E is perfect balance."""
        total = self.num_routed_pairs
        return sum(load / total * math.log(total / load) for load in self.host_counts[:-1] if load)

    @property
    def normalized_entropy(self) -> float:
        """entropy / log E, from 0 to 1; 1 for a single expert that has pairs."""
        if self.num_experts == 1:
            return float(self.num_routed_pairs > 0)
        return self.entropy / math.log(self.num_experts)


def routing_statistics(topk_ids: Tensor, num_experts: int) -> RoutingStatistics:
    """Count how the pairs topk_ids (T, K) are spread over the experts, without a host read.

    Example:
        E=4, topk_ids=[[0, 1], [0, 2], [0, -1]] gives load [3, 1, 1, 0], mean load 1.25, MaxVio
        (3 - 1.25) / 1.25 = 1.4, one dead expert and one skipped pair.
    """
    return RoutingStatistics(_pair_counts(topk_ids, num_experts))
