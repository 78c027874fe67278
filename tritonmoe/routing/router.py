"""TopKRouter: a linear layer of scores, and the choice of K experts for each token."""

import functools
import logging
from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from tritonmoe.backends import check_name
from tritonmoe.backends.ops import Unchecked
from tritonmoe.config.layer import MoEConfig, check_moe_config
from tritonmoe.config.numbers import is_number
from tritonmoe.config.routing import RoutingRule
from tritonmoe.config.scores import SCORES
from tritonmoe.routing.fused import is_fused, route_by_kernels
from tritonmoe.routing.router_check import ROUTERS, check_router
from tritonmoe.routing.statistics import expert_load, reduce_counts
from tritonmoe.routing.token_routing import Routing, check_token_mask
from tritonmoe.runtime.autograd import Context, is_recomputing, without_autocast
from tritonmoe.runtime.helping import is_helping
from tritonmoe.runtime.transforms import (
    below_transforms,
    is_transformed,
    refuse_jvp,
    refuse_tangents,
    refuse_vmap,
    unwrapped,
)
from tritonmoe.runtime.wrappers import refuse_computed

__all__ = ["TopKRouter"]

log = logging.getLogger("tritonmoe")


@functools.cache
def _are_right(device: torch.device, dtype: torch.dtype) -> bool:
    from tritonmoe.backends import first_use  # only where kernels run: a CPU may have no Triton

    checked = next(router for router in ROUTERS if router.dtype == dtype)
    return first_use.are_right(device, dtype, "router", lambda: check_router(checked, TopKRouter, device))


def _are_kernels_right(device: torch.device, dtype: torch.dtype) -> bool:
    """Say whether "auto" takes the kernels of this GPU, which is asked once it can be."""
    try:
        return _are_right(device, dtype)
    except Unchecked:
        return True


# What torch.compiler.assume_constant_result does, without importing dynamo: tracers can't look into caches and files.
_are_kernels_right._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _warn_of_other_groups(config: MoEConfig) -> None:
    """Say once of which other code the routing would choose other groups of experts, by the same numbers."""
    if config.top_k_groups == config.num_expert_groups:
        return
    size = config.num_experts // config.num_expert_groups
    num_best, of_megatron = min(2, size), min(config.top_k // config.top_k_groups, size)
    if of_megatron != num_best:
        _say_once(
            f"with top_k={config.top_k} and top_k_groups={config.top_k_groups} Megatron-LM scores a group by its "
            f"{of_megatron} best experts, and this router, as DeepSeek-V3's code, by its {num_best}"
        )
    elif num_best > 1 and config.score_function == "softmax" and not config.selection_bias:
        _say_once(
            "DeepSeek-V2 scores a group by its best expert alone, and this router, as DeepSeek-V3's code, by its two "
            "best"
        )


@functools.cache
def _say_once(rule: str) -> None:
    log.warning(
        "%s: a model that was trained there would send tokens to other experts here. Route it by its own code, and "
        "give GroupedExperts the ids and weights; for a new model there is nothing to do. (This is said once)",
        rule,
    )


class _RouterLogits(torch.autograd.Function):
    """(x (T, D), weight (E, D)) -> (logits (T, E), is_finite (T, 1)), in fp32 (fp64 for fp64 inputs).

    Rows with a non-finite logit give zeros to both gradients: plain autograd would give 0 * NaN. That is also why
    x is masked in backward only: masking before the product would need a second pass over x to find the rows.
    """

    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        dtype = _score_dtype(x, weight)
        with without_autocast(x.device):
            logits = F.linear(x.to(dtype), weight.to(dtype))
        return logits, logits.isfinite().all(dim=1, keepdim=True)

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
        is_finite = output[1]
        ctx.mark_non_differentiable(is_finite)
        ctx.save_for_backward(*inputs, is_finite)

    @staticmethod
    def backward(ctx: Context, dlogits: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight, is_finite = ctx.saved_tensors
        dlogits = torch.where(is_finite, dlogits, 0.0)
        dx = dweight = None
        with without_autocast(x.device):
            if ctx.needs_input_grad[0]:
                dx = torch.where(is_finite, dlogits @ weight.to(dlogits.dtype), 0.0).to(x.dtype)
            if ctx.needs_input_grad[1]:
                finite_x = torch.where(is_finite, x.to(dlogits.dtype), 0.0)
                dweight = (dlogits.T @ finite_x).to(weight.dtype)
        return dx, dweight

    vmap = staticmethod(refuse_vmap)


class _TransformedRouterLogits(_RouterLogits):
    """The same under a transform of torch.func, which asks for a jvp; torch.compile takes no Function that has one."""

    jvp = staticmethod(refuse_jvp)


def _score_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (x.dtype, weight.dtype) else torch.float32


class TopKRouter(nn.Module):
    """Chooses K of E experts for each token.

    Args:
        config: scores, renormalisation, scaling, selection bias and expert groups; see MoEConfig.
        reduce_load: sums an (E,) int64 tensor over data-parallel ranks and returns it (in place is fine), as
            Transport.all_reduce does; called by update_selection_bias on every rank. None: this rank's load alone.
        backend: the experts'. With "triton", or "auto" on a GPU, kernels route where they can; the whole rule is
            `is_fused` in routing/fused.py. Where they can't, PyTorch's operations do, and the experts say why.
        device, dtype: of `weight` (E, D).

    With config.selection_bias there are two buffers: `e_score_correction_bias` (E,), which stays fp32 whatever the
    module is cast to (bf16 would swallow its small steps), and `load` (E,) int64, not saved in checkpoints: pairs
    per expert over the training forwards since the last update. DistributedDataParallel copies buffers from
    rank 0 before each forward, which falsifies `load`: where the router stands in no MoELayer, which sees to that and
    to reduce_load, give it broadcast_buffers=False, and the router a reduce_load.
    """

    weight: nn.Parameter
    e_score_correction_bias: Tensor | None
    load: Tensor | None

    def __init__(
        self,
        config: MoEConfig,
        *,
        reduce_load: Callable[[Tensor], Tensor] | None = None,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_moe_config(config)
        check_name(backend)
        self.config = config
        self.reduce_load = reduce_load
        self.backend = backend
        self._rule = RoutingRule.of(config).encode()
        has_no_loss = not (config.load_balance_loss_weight or config.z_loss_weight)
        if config.top_k == 1 and (config.renormalize or config.softmax_after_topk) and has_no_loss:
            log.warning(
                "with top_k=1 a renormalised weight is always 1, and nothing else trains this router: take "
                "renormalize=False with softmax_after_topk=False, or a load_balance_loss_weight, or top_k >= 2"
            )
        _warn_of_other_groups(config)
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size, device=device, dtype=dtype))
        bias = load = None
        if config.selection_bias:
            bias = torch.zeros(config.num_experts, device=device, dtype=torch.float32)
            load = torch.zeros(config.num_experts, device=device, dtype=torch.int64)
        self.register_buffer("e_score_correction_bias", bias)
        self.register_buffer("load", load, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight from a normal distribution under which unit-variance tokens get unit-variance logits.

        Raises:
            ValueError: the weight is computed from other parameters, as by a parametrization.
        """
        refuse_computed(type(self).__name__, self, ("weight",), "reset_parameters()")
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

    def _load_from_state_dict(self, state_dict: dict[str, object], prefix: str, *others: object) -> None:
        super()._load_from_state_dict(state_dict, prefix, *others)
        # `load` isn't saved: to_empty() left it uninitialised, or assign=True on the meta device; and that the bias in
        # whatever dtype was given.
        if self.load is not None and f"{prefix}weight" in state_dict and not self.weight.is_meta:
            self.load = torch.zeros_like(self.load, device=self.weight.device)
        if self.e_score_correction_bias is not None:
            self.e_score_correction_bias = self.e_score_correction_bias.float()

    def extra_repr(self) -> str:
        config = self.config
        said = f"hidden_size={config.hidden_size}, num_experts={config.num_experts}, top_k={config.top_k}"
        return f"{said}, {config.score_function}{', selection_bias' if config.selection_bias else ''}"

    def forward(self, x: Tensor, token_mask: Tensor | None = None) -> Routing:
        """Route the tokens x (T, D), any floating dtype; logits and everything after are fp32.

        Differentiable in x and weight, through topk_weights, scores and logits; ids carry no gradient.
        fp64 inputs are computed in fp64. Reads nothing on the host.

        Args:
            token_mask: (T,) bool; rows where it is False are padding, which Routing.of_tokens leaves out, and which
                `load` does not count. None: every row is a token.
        Raises:
            ValueError, TypeError: x is not (T, D), not floating point, or not on the weight's device; token_mask is no
                such mask.
        """
        config = self.config
        if not isinstance(x, Tensor) or not x.is_floating_point():
            kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"the router takes a floating-point tensor, got {kind}")
        if x.dim() != 2 or x.shape[1] != config.hidden_size:
            raise ValueError(f"the router takes (T, {config.hidden_size}) tokens, got shape {tuple(x.shape)}")
        if x.device != self.weight.device:
            raise ValueError(f"x is on {x.device} and the router on {self.weight.device}: move them to one device")
        if token_mask is not None:
            check_token_mask(token_mask, x)
        refuse_tangents(x, self.weight)
        if is_fused(self.backend, x, self.weight) and (self.backend != "auto" or _are_kernels_right(x.device, x.dtype)):
            routing = self._route_by_kernels(x)
        else:
            routing = self._route(x)
        if token_mask is not None:
            routing = routing.of_tokens(token_mask)
        if self.load is not None and self.training and not is_recomputing() and not is_helping():
            with below_transforms():
                self.load += unwrapped(routing.load)
        return routing

    def _route_by_kernels(self, x: Tensor) -> Routing:
        parts = route_by_kernels(x, self.weight, self.e_score_correction_bias, self._rule)
        logits, scores, topk_ids, topk_weights, counts = parts
        return Routing(
            topk_ids=topk_ids,
            topk_weights=topk_weights,
            logits=logits,
            scores=scores,
            num_nonfinite_rows=counts[-1],
            load=counts[:-1],
        )

    def _route(self, x: Tensor) -> Routing:
        config = self.config
        is_eager = not torch.compiler.is_compiling()
        product = _TransformedRouterLogits if is_eager and is_transformed() else _RouterLogits
        logits, is_finite = product.apply(x, self.weight)
        finite_logits = torch.where(is_finite, logits, 0.0)
        scores = SCORES[config.score_function](finite_logits)

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

        topk_ids = torch.where(is_finite, topk_ids, -1)
        return Routing(
            topk_ids=topk_ids,
            topk_weights=torch.where(is_finite, topk_weights, 0.0),
            logits=logits,
            scores=torch.where(is_finite, scores, 0.0),
            num_nonfinite_rows=is_finite.logical_not().sum(),
            load=expert_load(topk_ids, config.num_experts),
        )

    def _select(self, ranked_by: Tensor) -> Tensor:
        """Return the ids (T, K) of the best experts by `ranked_by` (T, E) plus the selection bias, best first."""
        config = self.config
        if self.e_score_correction_bias is not None:
            ranked_by = ranked_by + self.e_score_correction_bias
        if config.top_k_groups < config.num_expert_groups:
            grouped = rearrange(ranked_by, "token (group expert) -> token group expert", group=config.num_expert_groups)
            group_scores = grouped.topk(min(2, grouped.shape[2]), dim=2).values.sum(dim=2)
            group_ids = group_scores.topk(config.top_k_groups, dim=1).indices
            is_eligible = torch.zeros_like(group_scores, dtype=torch.bool).scatter_(1, group_ids, True)
            eligible = grouped.masked_fill(~is_eligible.unsqueeze(2), float("-inf"))
            ranked_by = rearrange(eligible, "token group expert -> token (group expert)")
        return ranked_by.topk(config.top_k, dim=1).indices

    @torch.no_grad()
    def update_selection_bias(self, rate: float = 1e-3) -> Tensor:
        """Move every expert's selection bias by `rate` against its load, and start counting anew.

        bias += rate * sign(mean load - load), with the load of all training forwards since the last update, summed
        over data-parallel ranks by `reduce_load`. Call it once per optimiser step, on every rank.

        Returns:
            The load that was used, (E,) int64.
        Raises:
            ValueError: the router has no selection bias, or the rate is no number; FSDP2 spreads the router over ranks
            whose load nothing sums. TypeError: reduce_load gave no load.
        """
        if self.e_score_correction_bias is None or self.load is None:
            raise ValueError("the router has no selection bias: build it with MoEConfig(selection_bias=True)")
        if not is_number(rate) or rate < 0:
            raise ValueError(f"rate must be finite and not negative, got {rate!r}")
        load = self.load.clone()
        placements = getattr(self.weight, "placements", ())  # of a DTensor
        if self.reduce_load is None and any(placement.is_shard() for placement in placements):
            raise ValueError(
                "the router's weight is spread over ranks that each count the load of their own tokens, so its "
                "selection bias would become different on each rank: set router.reduce_load to a function that sums "
                "a tensor over the data-parallel ranks and returns it, or spread the layer's experts over these ranks"
            )
        if self.reduce_load is not None:
            load = reduce_counts(load, self.reduce_load)
        direction = (load.sum() - load.numel() * load).sign()  # in integers: a balanced expert does not move
        self.e_score_correction_bias += rate * direction.to(self.e_score_correction_bias.dtype)
        self.load.zero_()
        return load
