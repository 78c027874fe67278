"""MoELayer: a router and its experts as one module."""

from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Literal

import torch
from torch import Tensor, nn

from tritonmoe.config.layer import MoEConfig
from tritonmoe.config.overlap import OverlapConfig, OverlapPlan
from tritonmoe.dispatch.placement import ExpertPlacement
from tritonmoe.expert_parallel.check import check_fillers
from tritonmoe.expert_parallel.state import abort_call
from tritonmoe.experts.adapters import ExpertAdapters, check_hands_over
from tritonmoe.experts.parameters import draw_uniform
from tritonmoe.experts.shared_expert import SharedExpert
from tritonmoe.layer.grouped_experts import GroupedExperts
from tritonmoe.overlap.report import LayerReport
from tritonmoe.placement.data_parallel import mark_own_buffers
from tritonmoe.routing import Routing, RoutingStatistics, TopKRouter, routing_statistics
from tritonmoe.routing.losses import auxiliary_loss
from tritonmoe.routing.nonfinite import NonFiniteCheck
from tritonmoe.routing.unused_loss import UnusedLoss
from tritonmoe.runtime.autograd import put_back_after_recompute
from tritonmoe.runtime.halves import keep_for_this_half
from tritonmoe.runtime.wrappers import innermost
from tritonmoe.transports import Ranks

__all__ = ["MoELayer", "report_of"]


class MoELayer(nn.Module):
    """A router and its experts: (..., D) -> (..., D), to stand where a feed-forward block stood.

    With config.shared_intermediate_size, `shared_expert` is added to them: its up half runs under the first dispatch,
    its down half under the last combine, and inside a wrapper or with hooks all of it under the dispatch; backward runs
    it before the exchanges.
    After forward: `aux_loss` (attached, the weighted sum of config's losses, zero where it has none), `last_routing`,
    `statistics()` of this rank's tokens, and with a transport `last_report`. All are those of the last call: where a
    step calls the layer more than once (at several depths, for chunks of a sequence, for accumulated batches, for each
    token of a generation), take them after every call, and add up aux_loss and statistics().counts. `router.load`, of
    which the selection bias is made, counts every call in training mode once. Reentrant checkpointing runs forward
    without a graph: there, make aux_loss a result of the checkpointed function, `lambda x: (layer(x), layer.aux_loss)`;
    functions that run forward in their backward in another way (TiledMLP) train no aux_loss. What a recompute sets is
    for the checkpointed function alone: its backward puts back what was there, but for last_report, which stays that of
    the recompute, whose backward it has.

    The router is the same on every rank and its gradient is this rank's share: average it as any dense parameter's, by
    DistributedDataParallel, say, around the layer or anything that holds it. Expert gradients are averaged by the layer
    itself, see GroupedExperts, whose arguments these are. router.update_selection_bias() sums the load over all ranks
    of the transport, without one over those of a DistributedDataParallel around the layer (router.reduce_load, which
    can be replaced; under FSDP2 it has to be set). On transports other than torch.distributed's, clip all gradients
    with tritonmoe.clip_grad_norm_. num_sms and batch_invariant are for the routed experts: the products of a shared
    expert are PyTorch's, and so are the router's but for bf16 and fp16 where the kernels run; PyTorch's may round a row
    differently with its neighbours.

    check: when a token whose router scores are NaN or infinite, which goes to no expert, raises NonFiniteScores. With a
    transport always in its call, on every rank. On one device "next" says it at the next call, so that no call waits
    for the device, and says nothing in compiled code; "now" waits for the router in every call and raises in the call
    itself, in compiled code (fullgraph too) and exported programs as well, but can't be captured by a CUDA graph.
    """

    _left_by_a_call: tuple[str, ...] = ("_aux_loss", "last_routing")

    def __init__(
        self,
        config: MoEConfig,
        transport: "Ranks | None" = None,
        overlap: OverlapConfig | OverlapPlan | None = None,
        *,
        placement: ExpertPlacement | None = None,
        expert_gradients: Literal["mean", "sum"] = "mean",
        backend: str = "auto",
        num_sms: int | None = None,
        batch_invariant: bool = False,
        check: Literal["next", "now"] = "next",
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.router = TopKRouter(config, backend=backend, device=device, dtype=dtype)
        with torch.no_grad():
            draw_uniform(self.router.weight, config.hidden_size, generator)
        self.experts = GroupedExperts(
            config,
            transport,
            overlap,
            placement=placement,
            expert_gradients=expert_gradients,
            backend=backend,
            num_sms=num_sms,
            batch_invariant=batch_invariant,
            generator=generator,
            device=device,
            dtype=dtype,
        )
        self.experts.take_router(config.load_balance_loss_weight)
        self.router.reduce_load = self.experts.sum_over_ranks
        if config.selection_bias:
            mark_own_buffers(self.router, ("load",))
        self.shared_expert: nn.Module | None = None
        if config.shared_intermediate_size:
            self.shared_expert = SharedExpert(config, generator=generator, device=device, dtype=dtype)
        self._aux_loss: Tensor | None = None
        self._unused_loss = UnusedLoss(bool(config.load_balance_loss_weight or config.z_loss_weight))
        self.last_routing: Routing | None = None
        self._nonfinite = NonFiniteCheck(check)

    def extra_repr(self) -> str:
        weights = {name: getattr(self.config, name) for name in ("load_balance_loss_weight", "z_loss_weight")}
        said = [f"{name}={weight}" for name, weight in weights.items() if weight]
        return ", ".join([*said, f"check={self._nonfinite.when}"])

    @property
    def last_report(self) -> LayerReport | None:
        """Traffic and timings of the last expert-parallel call; None on one device."""
        return self.grouped_experts.last_report

    def statistics(self) -> RoutingStatistics:
        """Return the routing statistics of the last call's tokens on this rank, in training or evaluation mode."""
        if self.last_routing is None:
            raise RuntimeError(
                "this layer has no statistics before the first forward, or where its last forward skipped it: call the "
                "layer first"
            )
        return routing_statistics(self.last_routing.topk_ids, self.config.num_experts)

    def forward(
        self,
        x: Tensor,
        *,
        token_mask: Tensor | None = None,
        adapters: ExpertAdapters | None = None,
        fillers: Sequence[Callable[[], None]] = (),
    ) -> Tensor:
        """Return (..., D) of x (..., D).

        Args:
            token_mask: (...) bool, False for padding: such a row goes to no expert, its output is the shared expert's
                or zero, and it counts in no loss, no load and no statistics. None: every row is a token.
            adapters: as GroupedExperts takes them.
            fillers: functions of your own that run while exchanges are under way, as in expert_parallel_mlp; those of
                the shared expert come before them.
        """
        shards = self.grouped_experts.expert_shards
        try:
            if shards is not None:
                check_hands_over("the experts of this MoELayer", self.experts)
            self._check(x)
            if fillers:
                check_fillers(fillers)
            if shards is None:
                self._nonfinite.raise_earlier()
            flat = x.reshape(-1, x.shape[-1])
            routing = self._route(flat, x.shape[:-1], token_mask)
            topk_ids = routing.topk_ids
            if shards is None:
                topk_ids = self._nonfinite.look(topk_ids, routing.num_nonfinite_rows)
        except Exception:  # whatever this rank refuses, the others wait for its word
            if shards is not None:
                abort_call(shards.transport)
            raise
        halves: list[Tensor] = []
        own_fillers = [] if self.shared_expert is None else self._shared_fillers(flat, halves)
        y = self.experts(
            flat,
            topk_ids,
            routing.topk_weights,
            adapters=adapters,
            num_nonfinite_rows=routing.num_nonfinite_rows,
            fillers=[_one_after_the_other(pair) for pair in zip_longest(own_fillers, fillers)],
        )
        if halves:
            y = y + halves[-1]
        if not torch.compiler.is_compiling():
            put_back_after_recompute(self, self._left_by_a_call, routing.topk_weights)
            if self.training:
                self._unused_loss.watch(routing.topk_weights)
        # Behind the experts' call, in which the ranks have found that all make it: here they may exchange loads.
        self._leave(routing, x.shape[:-1])
        if not torch.compiler.is_compiling():
            keep_for_this_half(self, *self._left_by_a_call)
        # No view for autograd: changed in place (`y += x`), one loses the hook with which FSDP2 gathers for backward.
        return torch.ops.aten._unsafe_view(y, x.shape)

    def _check(self, x: object) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a tensor, got {type(x).__name__}")
        if x.is_nested or x.layout != torch.strided:
            kind = "nested" if x.is_nested else str(x.layout)
            raise TypeError(f"x must be a dense tensor, got a {kind} one: pass its tokens as one (T, D) tensor")
        if x.dim() < 1 or x.shape[-1] != self.config.hidden_size:
            raise ValueError(f"x must be (..., D) with D = {self.config.hidden_size}, got {tuple(x.shape)}")

    def _shared_fillers(self, flat: Tensor, halves: list[Tensor]) -> list[Callable[[], None]]:
        """Return the fillers that run the shared expert, whose result is the last of `halves` then; [] without one."""
        shared = self.shared_expert
        if isinstance(shared, SharedExpert) and not shared.is_hooked:  # a subclass may run one of its own
            return [lambda: halves.append(shared.up(flat)), lambda: halves.append(shared.down(halves[0]))]
        if shared is not None and isinstance(innermost(shared), SharedExpert):  # wrappers and hooks want its call
            return [lambda: halves.append(shared(flat))]
        return []

    def _route(self, flat: Tensor, shape: torch.Size, token_mask: Tensor | None) -> Routing:
        if token_mask is None:
            return self.router(flat)
        if isinstance(token_mask, Tensor) and token_mask.shape != shape:
            raise ValueError(f"token_mask must be {tuple(shape)}, as x is without D, got {tuple(token_mask.shape)}")
        return self.router(flat, token_mask.reshape(-1) if isinstance(token_mask, Tensor) else token_mask)

    def _leave(self, routing: Routing, shape: torch.Size) -> None:
        """Set what a call leaves, of rows of this shape."""
        self.last_routing = routing
        is_global = self.grouped_experts.expert_shards is not None and self.config.load_balance_over == "global"
        reduce_load = self.grouped_experts.sum_over_ranks if is_global else None
        self._aux_loss = auxiliary_loss(routing, self.config, reduce_load)

    @property
    def aux_loss(self) -> Tensor | None:
        """The weighted sum of config's losses of the last forward, attached; None before the first one."""
        self._unused_loss.is_settled = True  # in compiled code as well, whose user reads it there alone
        return self._aux_loss

    @aux_loss.setter
    def aux_loss(self, loss: Tensor | None) -> None:
        self._aux_loss = loss

    @property
    def grouped_experts(self) -> GroupedExperts:
        """The experts themselves, where PEFT, torch.compile or checkpoint_wrapper has wrapped `experts` as well."""
        experts = innermost(self.experts)
        if not isinstance(experts, GroupedExperts):
            raise TypeError(
                f"a {type(experts).__name__} has taken the place of a MoELayer's experts, and the layer only knows "
                "the wrappers of torch.compile, checkpoint_wrapper, FSDP and PEFT: use one of them, or wrap the "
                "whole layer"
            )
        return experts

    def peak_bytes(
        self, num_tokens: int, *, routing: str | Tensor | Sequence[float] = "uniform", num_layers: int = 1
    ) -> int:
        """Return how many bytes calls of such layers are expected to hold at most; see GroupedExperts.peak_bytes."""
        return self.grouped_experts.peak_bytes(num_tokens, routing=routing, num_layers=num_layers)

    def __getstate__(self) -> dict[str, object]:
        # What the last call left is no part of a copy: it hangs on that call's graph.
        return {**self.__dict__, "_aux_loss": None, "last_routing": None}


def _one_after_the_other(fillers: Sequence[Callable[[], None] | None]) -> Callable[[], None]:
    def run() -> None:
        for filler in fillers:
            if filler is not None:
                filler()

    return run


def report_of(layer: "GroupedExperts | MoELayer") -> LayerReport:
    """Return the report of a layer's last call; RuntimeError where there was none over a transport."""
    report = layer.last_report
    if report is None:
        raise RuntimeError(
            f"this {type(layer).__name__} has made no expert-parallel call yet: call it on its ranks first"
        )
    return report
