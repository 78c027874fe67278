"""TopKRouter: a linear layer of scores, and the choice of K experts for each token."""

import functools
import logging
from collections.abc import Callable

import torch
from torch import Tensor, nn

from tritonmoe.config.layer import MoEConfig, check_moe_config
from tritonmoe.config.numbers import is_number
from tritonmoe.config.routing import RoutingRule
from tritonmoe.ops.backends import check_name
from tritonmoe.ops.backends.ops import Unchecked
from tritonmoe.routing.fused import is_fused, route_by_kernels
from tritonmoe.routing.plain import route_by_torch
from tritonmoe.routing.router_check import ROUTERS, check_router
from tritonmoe.routing.statistics import reduce_counts
from tritonmoe.routing.token_routing import Routing, check_token_mask
from tritonmoe.runtime.autograd import is_recomputing
from tritonmoe.runtime.other_ranks import in_dummy_forward
from tritonmoe.runtime.transforms import below_transforms, refuse_tangents, unwrapped
from tritonmoe.runtime.wrappers import refuse_computed

__all__ = ["TopKRouter"]

log = logging.getLogger("tritonmoe")


@functools.cache
def _are_right(device: torch.device, dtype: torch.dtype) -> bool:
    from tritonmoe.ops.backends import first_use  # only where kernels run: a CPU may have no Triton

    checked = next(router for router in ROUTERS if router.dtype == dtype)
    return first_use.are_right(device, dtype, "router", lambda: check_router(checked, device))


def _are_kernels_right(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether "auto" takes the kernels of this GPU, which is asked once it can be."""
    try:
        return _are_right(device, dtype)
    except Unchecked:
        return True


# What torch.compiler.assume_constant_result does, without importing dynamo: tracers can't look into caches and files.
_are_kernels_right._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _warn_of_other_groups(config: MoEConfig) -> None:
    """Warn once which other code would choose other groups of experts by the same numbers."""
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
        parameters = self.weight, self.e_score_correction_bias
        if is_fused(self.backend, x, self.weight) and (self.backend != "auto" or _are_kernels_right(x.device, x.dtype)):
            routing = route_by_kernels(x, *parameters, self._rule)
        else:
            routing = route_by_torch(x, *parameters, config)
        if token_mask is not None:
            routing = routing.of_tokens(token_mask)
        if self.load is not None and self.training and not is_recomputing() and not in_dummy_forward():
            with below_transforms():
                self.load += unwrapped(routing.load)
        return routing

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
