"""The layer: a router and its experts as modules, on one device or, through the scheduler, on many ranks."""

import threading
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import zip_longest
from typing import Literal
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from tritonmoe.backends import check_name
from tritonmoe.config.layer import MoEConfig, PerWeight, check_moe_config
from tritonmoe.config.overlap import OverlapConfig, OverlapPlan, check_overlap
from tritonmoe.dispatch.placement import ExpertPlacement
from tritonmoe.expert_parallel.call_spec import CallArguments, CallSpec
from tritonmoe.expert_parallel.check import check_expert_parallel, check_fillers
from tritonmoe.expert_parallel.expert_parallel_mlp import run_expert_parallel
from tritonmoe.expert_parallel.halves import for_both_halves, keep_for_this_half
from tritonmoe.expert_parallel.state import LayerCalls, refuse
from tritonmoe.experts.adapters import ExpertAdapters, check_hands_over, noted_adapters, noted_factors, with_adapters
from tritonmoe.experts.arguments import find_main_grads
from tritonmoe.experts.moe_mlp import run_experts
from tritonmoe.experts.packed_parameters import as_values, check_loaded
from tritonmoe.experts.parameters import PARAMETERS, draw_experts, draw_packed_experts, draw_uniform, empty_parameters
from tritonmoe.experts.quantized_weight import is_packed
from tritonmoe.experts.shared_expert import SharedExpert
from tritonmoe.experts.spec import LAYOUT, ExpertSpec, expert_spec
from tritonmoe.experts.tensors import CallTensors
from tritonmoe.overlap.report import LayerReport
from tritonmoe.routing import Routing, RoutingStatistics, TopKRouter, routing_statistics
from tritonmoe.routing.losses import auxiliary_loss
from tritonmoe.routing.nonfinite import NonFiniteCheck
from tritonmoe.routing.unused_loss import UnusedLoss
from tritonmoe.runtime.autograd import leaf_of, put_back_after_recompute
from tritonmoe.runtime.wrappers import innermost
from tritonmoe.sharding.data_parallel import is_averaged_by_ddp, mark_own_buffers
from tritonmoe.sharding.grad_scaling import agree_on_overflow
from tritonmoe.sharding.sharded_parameters import (
    Sharding,
    check_expert_gradients,
    check_replicas,
    find_sharding,
    local_shard,
    rows_here,
    shard_parameters,
)
from tritonmoe.transports import Ranks, Transport, as_transport

__all__ = ["GroupedExperts", "MoELayer", "experts_of_parameters", "report_of"]

_all_experts: "WeakValueDictionary[str, GroupedExperts]" = WeakValueDictionary()
ADAPTS = "_tritonmoe_adapts"
"""What a factor of a call's adapters notes: the key of the module that was called (no weakref: those forbid swaps)."""
_all_experts_lock = threading.Lock()  # emulated ranks are threads


class GroupedExperts(nn.Module):
    """The experts as parameters, named and shaped as in transformers; runs moe_mlp, or its parallel twin.

    Parameters: gate_up_proj (E, 2F, D), down_proj (E, D, F), and with config.bias gate_up_proj_bias (E, 2F) and
    down_proj_bias (E, D); F instead of 2F when ungated, axes swapped when transposed. With config.weight_format the
    first two are frozen bytes, with gate_up_proj_scales and down_proj_scales beside them, which no cast of the module
    changes. On ranks that torch.distributed knows each is a DTensor, Shard(0) over the dimension "expert"; on other
    transports it is this rank's E / W experts.

    Args:
        config: shapes and activation.
        transport: None for one device; else a Transport, a torch ProcessGroup, or a DeviceMesh of one dimension, or of
            two: one called "expert" and one of replicas, which hold the same experts, or nodes and ranks of a node (a
            TwoLevelTransport).
            Every rank makes the same layers on it, in the same order, by which the ranks know that they call the same;
            and the same deep copies of a layer, each of which is a layer of its own. Weights that
            torch.func.functional_call puts in a layer's place go by the layer's number.
        overlap: how the exchanges overlap; the same on every rank.
        placement: which rank holds which experts; None for E / W contiguous ones each.
        expert_gradients: "mean": gradients are as if averaged over all ranks, replicas included, as
            DistributedDataParallel averages dense ones; "sum": over the ranks of the transport.
        backend, num_sms, batch_invariant: as in moe_mlp.
        generator: draws the weights; the same seed gives the same experts for every number of ranks. None draws
            from torch's global generator, which must then be in the same state on every rank.
    """

    gate_up_proj: nn.Parameter
    down_proj: nn.Parameter
    gate_up_proj_bias: nn.Parameter | None
    down_proj_bias: nn.Parameter | None
    gate_up_proj_scales: nn.Parameter | None
    down_proj_scales: nn.Parameter | None

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
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_moe_config(config)
        self.config = config
        check_name(backend)
        self.spec = expert_spec(
            **{name: getattr(config, name) for name in LAYOUT},
            activation=config.activation,
            backend=backend,
            num_sms=num_sms,
            batch_invariant=batch_invariant,
        )
        """How the experts compute, but for their adapters."""
        self.expert_ids = tuple(range(config.num_experts))
        """The experts of this rank, in the order of its weights."""
        self._load_balance_loss_weight: float | None = None
        self._join(transport, overlap, placement, expert_gradients, torch.empty(0, device=device).device)
        self._hold(empty_parameters(config, len(self.expert_ids), device, dtype))
        self.reset_parameters(generator)
        self.register_load_state_dict_pre_hook(check_loaded)
        self._remember()

    def __setstate__(self, state: dict[str, object]) -> None:
        super().__setstate__(state)
        self._remember()  # this is a copy

    def _remember(self) -> None:
        self._key = uuid.uuid4().hex  # no other process has it: a file of a factor may keep it
        with _all_experts_lock:
            _all_experts[self._key] = self

    def _join(
        self,
        ranks: "Ranks | None",
        overlap: OverlapConfig | OverlapPlan | None,
        placement: ExpertPlacement | None,
        expert_gradients: str,
        device: torch.device,
    ) -> None:
        """Decide which experts are this rank's, and how it meets the other ranks; None for `ranks` is one device."""
        self.overlap = OverlapConfig() if overlap is None else overlap
        check_overlap(self.overlap)
        check_expert_gradients(expert_gradients)
        if placement is not None and ranks is None:
            raise ValueError(
                "placement says which rank holds which experts, so it needs ranks: give a transport, or leave "
                "placement out"
            )
        self.placement = placement
        self.transport = None if ranks is None else as_transport(ranks)
        self._sharding: Sharding | None = None
        self._calls: LayerCalls | None = None
        self._gradient_scale = 1.0
        if ranks is None or self.transport is None:
            return
        rank, size, num_experts = self.transport.rank, self.transport.size, self.config.num_experts
        num_local = num_experts // size if placement is None else placement.num_slots
        check_expert_parallel(num_local, num_experts, size, placement)
        self._sharding = find_sharding(ranks, self.transport, device)
        self._calls = LayerCalls(self.transport, expert_gradients)
        self._calls.load_balance_loss_weight = self._load_balance_loss_weight
        agree_on_overflow(_transports_of)
        if expert_gradients == "mean":
            self._gradient_scale = 1 / size
        first = rank * num_local
        self.expert_ids = tuple(range(first, first + num_local))
        if placement is not None:
            self.expert_ids = placement.experts_of_rank[rank]

    def _hold(self, parts: dict[str, Tensor | None]) -> None:
        """Make parameters of this rank's experts."""
        if self._sharding is None:
            for name, part in parts.items():
                self.register_parameter(name, None if part is None else nn.Parameter(part, part.requires_grad))
            return
        held = None if self.placement is None else self.placement.experts_of_rank
        is_summed = self._calls is not None and self._calls.expert_gradients == "sum"
        shard_parameters(self, parts, self._sharding, held, is_summed)

    def spread_over(
        self,
        group_or_mesh: Ranks,
        overlap: OverlapConfig | OverlapPlan | None = None,
        *,
        placement: ExpertPlacement | None = None,
        expert_gradients: Literal["mean", "sum"] = "mean",
    ) -> None:
        """Keep this rank's experts of all that are here, in place; parallelize() calls it, once it has checked.

        Args: as those of the constructor; group_or_mesh: its `transport`.
        """
        whole: dict[str, Tensor | None] = {name: getattr(self, name) for name in PARAMETERS}
        self._join(group_or_mesh, overlap, placement, expert_gradients, self.gate_up_proj.device)
        ids = list(self.expert_ids)
        self._hold(
            {
                name: None if weight is None else weight.detach()[ids].requires_grad_(weight.requires_grad)
                for name, weight in whole.items()
            }
        )

    @property
    def sum_over_ranks(self) -> Callable[[Tensor], Tensor] | None:
        """A function that sums a tensor over all ranks that train these experts, replicas included, in place.

        None on one device. It holds no experts, so that a copy of a router that has it copies none.
        """
        return None if self._sharding is None else self._sharding.sum_over_ranks

    @property
    def calls(self) -> LayerCalls | None:
        """What its calls over ranks have in common; None on one device."""
        return self._calls

    def take_router(self, load_balance_loss_weight: float) -> None:
        """Note how the router of the layer that has these experts is balanced, for recordings."""
        self._load_balance_loss_weight = load_balance_loss_weight
        if self._calls is not None:
            self._calls.load_balance_loss_weight = load_balance_loss_weight

    def take_placement(self, placement: ExpertPlacement | None) -> None:
        """Note that the rows of the parameters are other experts' from now on: rebalance() has moved them."""
        if self.transport is not None:
            rank, num_local = self.transport.rank, len(self.expert_ids)
            self.placement = placement
            self.expert_ids = tuple(range(rank * num_local, (rank + 1) * num_local))
            if placement is not None:
                self.expert_ids = placement.experts_of_rank[rank]

    @property
    def sharding(self) -> Sharding | None:
        """Over which ranks the experts are spread, and which hold copies of them; None on one device."""
        return self._sharding

    def extra_repr(self) -> str:
        config, transport = self.config, self.transport
        flags = [name for name in ("interleaved", "transposed", "bias") if getattr(config, name)]
        flags += [] if config.weight_format is None else [config.weight_format]
        said = [
            f"hidden_size={config.hidden_size}, intermediate_size={config.intermediate_size}",
            f"num_experts={config.num_experts}, top_k={config.top_k}",
            ", ".join([str(config.activation), "gated" if config.gated else "ungated", *flags]),
            f"backend={self.spec.backend}",
        ]
        if transport is not None:
            held = f"experts {', '.join(map(str, self.expert_ids))}"
            if self.placement is None:
                held = f"experts {self.expert_ids[0]} to {self.expert_ids[-1]}"
            said.append(f"{held} on rank {transport.rank} of {transport.size}, {type(transport).__name__}")
        return "; ".join(said)

    @property
    def is_transposed(self) -> bool:
        """Whether weights are (E, in, out): how experts of transformers say it, and PEFT asks."""
        return self.config.transposed

    @property
    def last_report(self) -> LayerReport | None:
        """Traffic and timings of the last expert-parallel call; None on one device."""
        return None if self._calls is None else self._calls.last_report

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw every expert from a seed of its own, so that its values don't depend on the number of ranks."""
        seed = int(torch.randint(2**62, (), generator=generator, device="cpu"))
        if self.gate_up_proj.is_meta:  # there is no memory to draw into
            return
        if self._sharding is not None:
            check_replicas(seed, self._sharding)
        experts = rows_here(self.gate_up_proj, self.expert_ids)
        weights = self._weights()
        if self.config.weight_format is None:
            draw_experts(weights.gate_up_proj, weights.down_proj, self.config, experts, seed)
        else:
            draw_packed_experts(weights, self.config, experts, seed)
        for bias in (weights.gate_up_bias, weights.down_bias):
            if bias is not None:
                bias.zero_()

    def _weights(self, x: Tensor | None = None, adapters: ExpertAdapters | None = None) -> PerWeight[Tensor]:
        """Return this rank's experts as plain tensors, whose gradients reach the parameters, to compute with x."""
        own: PerWeight[Tensor] = PerWeight(
            self.gate_up_proj,
            self.gate_up_proj_bias,
            self.down_proj,
            self.down_proj_bias,
            gate_up_scales=self.gate_up_proj_scales,
            down_scales=self.down_proj_scales,
        )
        parameters = with_adapters(own, adapters)
        sharding, calls = self._sharding, self._calls
        if sharding is None or calls is None:
            return parameters
        is_trained = torch.is_grad_enabled() and any(p is not None and p.requires_grad for p in parameters)
        if is_trained and sharding.mesh is not None and self.placement is not None and self.placement.has_replicas:
            raise ValueError(
                "experts that stand in several slots of a placement can't be trained as DTensors: clip_grad_norm_ "
                "would count them several times. Use a placement without replicas, freeze them "
                "(requires_grad_(False)), or call expert_parallel_mlp with parameters of your own"
            )
        first = len(parameters) * calls.number
        local = [
            None if parameter is None else self._local_weight(parameter, sharding, first + number)
            for number, parameter in enumerate(parameters)
        ]
        weights: PerWeight[Tensor] = PerWeight(*local)  # type: ignore[arg-type]
        if x is None or not self.narrows_to(x.dtype) or find_main_grads(weights) is not None:
            return weights
        dtype = x.dtype
        return weights.map(lambda weight: for_both_halves(weight, dtype, lambda: weight.to(dtype)))

    def narrows_to(self, dtype: torch.dtype) -> bool:
        """Say whether rows of this dtype get these weights cast to it, but for those with a main_grad.

        So FSDP2's mixed precision casts the parameters that it manages; spread experts it is told to leave alone.
        """
        is_spread = self._sharding is not None and self._sharding.mesh is not None
        return is_spread and self.gate_up_proj.dtype == torch.float32 and dtype in (torch.bfloat16, torch.float16)

    def _adapted_weights(self, x: Tensor | None, adapters: ExpertAdapters | None) -> PerWeight[Tensor]:
        """Return _weights() with these adapters, or the factors of those that are noted here (PEFT's)."""
        weights = as_values(self, self.config.weight_format, self._weights(x, adapters))
        if adapters is not None and self.transport is not None and self.transport.size > 1:
            _note_factors(self, adapters)
        factors = noted_factors(
            self, torch.bfloat16 if is_packed(weights) else weights.gate_up_proj.dtype, self.expert_ids
        )
        if factors and adapters is not None:
            raise ValueError(
                "the call gives adapters to experts that PEFT has adapted already: leave adapters out, or don't wrap "
                "the experts by PEFT"
            )
        is_trained = torch.is_grad_enabled() and any(factor.requires_grad for factor in factors.values())
        if is_trained and self.placement is not None and self.placement.has_replicas:
            raise ValueError(
                "adapters of experts that stand in several slots of a placement can't be trained: every slot would "
                "get the gradient of all of them, and an average over ranks would count it several times. Use a "
                "placement without replicas, or freeze the adapters"
            )
        return weights._replace(**factors)

    def _local_weight(self, parameter: Tensor, sharding: Sharding, number: int) -> Tensor:
        make = partial(local_shard, self, parameter, sharding, self._gradient_scale, number)
        return for_both_halves(parameter, parameter.dtype, make)

    def _spec(self, adapters: ExpertAdapters | None = None) -> ExpertSpec:
        names = noted_adapters(self)
        return (replace(self.spec, adapters=names) if names else self.spec).with_dropout(adapters)

    def forward(
        self,
        x: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        *,
        adapters: ExpertAdapters | None = None,
        num_nonfinite_rows: Tensor | None = None,
        fillers: Sequence[Callable[[], None]] = (),
    ) -> Tensor:
        """Return (T, D) of x (T, D), topk_ids (T, K) and topk_weights (T, K); with several ranks, every rank calls.

        adapters: of this rank's experts; with dropout in training mode alone, with gradients as expert_gradients says.
        num_nonfinite_rows: Routing's count of tokens without a finite score; more than zero raises on every rank.
        fillers: as in expert_parallel_mlp; on one device they are called first.
        """
        if self.transport is None:
            for filler in fillers:
                filler()
            adapters = self._in_mode(adapters)
            weights = self._adapted_weights(None, adapters)
            return run_experts(self._spec(adapters), CallTensors(x, topk_ids, topk_weights, weights))
        try:
            adapters = self._in_mode(adapters)
            spec = CallSpec(self._spec(adapters), self.config.num_experts, self.overlap, self.placement)
            inputs = CallTensors(x, topk_ids, topk_weights, self._adapted_weights(x, adapters))
        except Exception:
            refuse(self.transport)
            raise
        arguments = CallArguments(spec, self.transport, inputs, self._calls, num_nonfinite_rows, fillers)
        return run_expert_parallel(arguments)

    def _in_mode(self, adapters: ExpertAdapters | None) -> ExpertAdapters | None:
        """Return adapters without dropout, but in training mode."""
        if isinstance(adapters, ExpertAdapters) and adapters.dropout and not self.training:
            return replace(adapters, dropout=0.0)
        return adapters


def report_of(layer: "GroupedExperts | MoELayer") -> LayerReport:
    """Return the report of a layer's last call; RuntimeError where there was none over a transport."""
    report = layer.last_report
    if report is None:
        raise RuntimeError(
            f"this {type(layer).__name__} has made no expert-parallel call yet: call it on its ranks first"
        )
    return report


def experts_of_parameters(parameters: Iterable[Tensor]) -> list[GroupedExperts | None]:
    """Return, for each parameter, the GroupedExperts over ranks of which it is a plain tensor; None for all others.

    The living modules are asked. A note on their parameters would be lost where they are exchanged for others: by
    deepcopy, load_state_dict with assign=True, parametrizations. Factors of adapters that were given to an eager call
    over ranks, themselves or cast, reshaped or scaled, count as parameters of the module that was called.
    """
    with _all_experts_lock:
        modules = dict(_all_experts.items())
    spread = [
        m for m in modules.values() if m.transport is not None and (m.sharding is None or m.sharding.mesh is None)
    ]
    own = {id(parameter): module for module in spread for parameter in module.parameters()}
    return [own.get(id(parameter)) or modules.get(vars(parameter).get(ADAPTS, "")) for parameter in parameters]


def _transports_of(parameters: Iterable[Tensor]) -> list[Transport]:
    """Return the transports over which some of these parameters are spread as plain tensors, in their order."""
    modules = experts_of_parameters(parameter for parameter in parameters if not hasattr(parameter, "device_mesh"))
    spread = [module.transport for module in modules if module is not None and module.transport is not None]
    return [transport for transport in dict.fromkeys(spread) if transport.size > 1]


def _note_factors(module: GroupedExperts, adapters: ExpertAdapters) -> None:
    """Remember the parameters of a call's adapters, which are this rank's alone as its experts are."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return
    for factor in (adapters.gate_up_a, adapters.gate_up_b, adapters.down_a, adapters.down_b):
        leaf = None if factor is None else leaf_of(factor)
        if leaf is None or hasattr(leaf, "device_mesh"):
            continue
        if is_averaged_by_ddp(leaf):
            raise ValueError(
                "a factor of adapters is this rank's experts' alone, and DistributedDataParallel averages it with the "
                "factors of the other ranks' experts: keep it outside of the module that is wrapped, or name it in "
                "that module's _ddp_params_and_buffers_to_ignore before wrapping (a parameter of the module itself as "
                '"name" and ".name")'
            )
        if getattr(leaf, ADAPTS, None) != module._key:
            setattr(leaf, ADAPTS, module._key)


class MoELayer(nn.Module):
    """A router and its experts: (..., D) -> (..., D), to stand where a feed-forward block stood.

    With config.shared_intermediate_size, `shared_expert` is added to them: its up half runs under the first dispatch,
    its down half under the last combine, and inside a wrapper or with hooks all of it under the dispatch; backward runs
    it before the exchanges.
    After forward: `aux_loss` (attached, the weighted sum of config's losses, zero where it has none), `last_routing`,
    `statistics()` of this rank's tokens, and with a transport `last_report`. Reentrant checkpointing runs forward
    without a graph: there, make aux_loss a result of the checkpointed function, `lambda x: (layer(x), layer.aux_loss)`.
    What a recompute sets is for the checkpointed function alone: its backward puts back what was there.

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
        """Return the routing statistics of the last forward's tokens on this rank."""
        if self.last_routing is None:
            raise RuntimeError("there are no statistics before the first forward: call the layer first")
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
        grouped_experts = self.grouped_experts
        one_device = grouped_experts.transport is None
        try:
            if not one_device:
                check_hands_over("the experts of this MoELayer", self.experts)
            if not isinstance(x, Tensor):
                raise TypeError(f"x must be a tensor, got {type(x).__name__}")
            if x.is_nested or x.layout != torch.strided:
                kind = "nested" if x.is_nested else str(x.layout)
                raise TypeError(f"x must be a dense tensor, got a {kind} one: pass its tokens as one (T, D) tensor")
            if x.dim() < 1 or x.shape[-1] != self.config.hidden_size:
                raise ValueError(f"x must be (..., D) with D = {self.config.hidden_size}, got {tuple(x.shape)}")
            check_fillers(fillers)
            if one_device:
                self._nonfinite.raise_earlier()
            flat = x.reshape(-1, x.shape[-1])
            routing = self._route(flat, x.shape[:-1], token_mask)
            topk_ids = routing.topk_ids
            if one_device:
                topk_ids = self._nonfinite.look(topk_ids, routing.num_nonfinite_rows)
        except Exception:
            if grouped_experts.transport is not None:
                refuse(grouped_experts.transport)
            raise
        halves: list[Tensor] = []
        own_fillers: list[Callable[[], None]] = []
        shared = self.shared_expert
        if isinstance(shared, SharedExpert) and not shared.is_hooked:  # a subclass may run one of its own
            own_fillers = [lambda: halves.append(shared.up(flat)), lambda: halves.append(shared.down(halves[0]))]
        elif shared is not None and isinstance(innermost(shared), SharedExpert):  # wrappers and hooks want its call
            own_fillers = [lambda: halves.append(shared(flat))]
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

    def _route(self, flat: Tensor, shape: torch.Size, token_mask: Tensor | None) -> Routing:
        if token_mask is None:
            return self.router(flat)
        if isinstance(token_mask, Tensor) and token_mask.shape != shape:
            raise ValueError(f"token_mask must be {tuple(shape)}, as x is without D, got {tuple(token_mask.shape)}")
        return self.router(flat, token_mask.reshape(-1) if isinstance(token_mask, Tensor) else token_mask)

    def _leave(self, routing: Routing, shape: torch.Size) -> None:
        """Set what a call leaves, of rows of this shape."""
        self.last_routing = routing
        is_global = self.grouped_experts.transport is not None and self.config.load_balance_over == "global"
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

    def __getstate__(self) -> dict[str, object]:
        # What the last call left is no part of a copy: it hangs on that call's graph.
        return {**self.__dict__, "_aux_loss": None, "last_routing": None}


def _one_after_the_other(fillers: Sequence[Callable[[], None] | None]) -> Callable[[], None]:
    def run() -> None:
        for filler in fillers:
            if filler is not None:
                filler()

    return run
