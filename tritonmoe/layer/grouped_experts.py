"""GroupedExperts: the experts of a layer as parameters, and their call on one device or over ranks."""

import math
import threading
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from tritonmoe.config.activations import is_fused
from tritonmoe.config.layer import MoEConfig, PerWeight, check_moe_config
from tritonmoe.config.overlap import OverlapConfig, OverlapPlan, check_overlap
from tritonmoe.dispatch.placement import ExpertPlacement, check_experts_of_rank
from tritonmoe.expert_parallel.call import buffer_widths
from tritonmoe.expert_parallel.check import check_with_precision
from tritonmoe.expert_parallel.run_call import working_set
from tritonmoe.expert_parallel.state import LayerCalls, abort_call
from tritonmoe.experts.adapters import ExpertAdapters, names_of, noted_factors, notes_on, with_adapters
from tritonmoe.experts.arguments import find_main_grads
from tritonmoe.experts.moe_mlp import run_experts
from tritonmoe.experts.packed_parameters import as_values, check_loaded
from tritonmoe.experts.parameters import PARAMETERS, draw_experts, draw_packed_experts, empty_parameters
from tritonmoe.experts.quantized_weight import is_packed
from tritonmoe.experts.spec import LAYOUT, ExpertSpec, choose_backend, expert_spec
from tritonmoe.experts.tensors import CallTensors
from tritonmoe.ops.backends import check_name
from tritonmoe.overlap.report import LayerReport
from tritonmoe.overlap.tuning.memory_estimate import estimate_bytes
from tritonmoe.placement.data_parallel import is_averaged_by_ddp
from tritonmoe.placement.expert_shards import ATTRIBUTE, ExpertShards, find_sharding
from tritonmoe.placement.grad_scaling import agree_on_overflow
from tritonmoe.placement.offloaded import offloaded_of, runs_outside_graphs
from tritonmoe.placement.sharded_parameters import (
    check_expert_gradients,
    check_replicas,
    rows_here,
    shard_parameters,
)
from tritonmoe.runtime.autograd import leaf_of, outside_graphs
from tritonmoe.runtime.halves import for_both_halves
from tritonmoe.runtime.wrappers import refuse_computed
from tritonmoe.transports import Ranks, Transport, as_transport
from tritonmoe.transports.wire import choose_wires

__all__ = ["GroupedExperts", "experts_of_parameters"]

_known: "WeakValueDictionary[str, GroupedExperts]" = WeakValueDictionary()
_lock = threading.Lock()  # emulated ranks are threads
BEFORE_SHARDS = ("expert_ids", "overlap", "placement", "transport", "sharding", "calls", "gradient_scale")
"""Attributes that a module of 0.1.0 has in a file."""
ADAPTS = "_tritonmoe_adapts"
"""What a factor of a call's adapters notes: the key of the module that was called (no weakref: those forbid swaps)."""


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
            TwoLevelTransport). Every rank makes the same layers on it, in the same order, by which the ranks know that
            they call the same; and the same deep copies of a layer, each of which is a layer of its own. Weights that
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
    expert_shards: ExpertShards | None
    """Where the experts live, and how a call reaches them; None on one device."""

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
            precision=config.expert_precision,
            backend=backend,
            num_sms=num_sms,
            batch_invariant=batch_invariant,
        )
        """How the experts compute, but for their adapters."""
        self._load_balance_loss_weight: float | None = None
        self._spread(transport, overlap, placement, expert_gradients, torch.empty(0, device=device).device)
        self._hold(empty_parameters(config, len(self.expert_ids), device, dtype))
        self.reset_parameters(generator)
        self.register_load_state_dict_pre_hook(check_loaded)
        self.key = _register(self)

    def __setstate__(self, state: dict[str, object]) -> None:
        super().__setstate__(state)
        if ATTRIBUTE not in state:  # written when the module had attributes of its own for this
            old: dict[str, Any] = {name: self.__dict__.pop(name) for name in BEFORE_SHARDS}
            self.expert_shards = None
            if (calls := old["calls"]) is not None:
                calls.number = calls.copy << 32 | calls.layer
                known = {name: old[name] for name in ("sharding", "calls", "overlap", "placement")}
                self.expert_shards = ExpertShards(num_experts=self.config.num_experts, names=PARAMETERS, **known)
        self.key = _register(self)  # this is a copy

    def _spread(
        self,
        ranks: "Ranks | None",
        overlap: OverlapConfig | OverlapPlan | None,
        placement: ExpertPlacement | None,
        expert_gradients: Literal["mean", "sum"],
        device: torch.device,
    ) -> None:
        """Decide which experts are this rank's, and how calls reach the others; None for `ranks` is one device."""
        overlap = OverlapConfig() if overlap is None else overlap
        check_overlap(overlap)
        check_expert_gradients(expert_gradients)
        self.expert_shards = None
        if ranks is None:
            if placement is not None:
                raise ValueError(
                    "placement says which rank holds which experts, so it needs ranks: give a transport, or leave "
                    "placement out"
                )
            return
        transport, num_experts = as_transport(ranks), self.config.num_experts
        num_local = num_experts // transport.size if placement is None else placement.num_slots
        check_experts_of_rank(num_local, num_experts, transport.size, placement)
        sharding = find_sharding(ranks, transport, device)
        calls = LayerCalls(transport, expert_gradients)
        calls.load_balance_loss_weight = self._load_balance_loss_weight
        agree_on_overflow(_transports_of)
        self.expert_shards = ExpertShards(sharding, num_experts, calls, overlap, placement)

    def _hold(self, parts: dict[str, Tensor | None]) -> None:
        """Make parameters of this rank's experts."""
        if self.expert_shards is not None:
            shard_parameters(self, parts, self.expert_shards)
            return
        for name, part in parts.items():
            self.register_parameter(name, None if part is None else nn.Parameter(part, part.requires_grad))

    @property
    def transport(self) -> Transport | None:
        """The transport that reaches the other ranks; None on one device."""
        return None if self.expert_shards is None else self.expert_shards.transport

    @property
    def overlap(self) -> OverlapConfig | OverlapPlan | None:
        """How the exchanges of the next calls overlap, which may be set, on every rank; None on one device."""
        return None if self.expert_shards is None else self.expert_shards.overlap

    @overlap.setter
    def overlap(self, overlap: OverlapConfig | OverlapPlan) -> None:
        check_overlap(overlap)
        if self.expert_shards is None:
            raise ValueError("experts on one device have no exchanges to overlap: spread them over ranks first")
        self.expert_shards.overlap = overlap

    @property
    def placement(self) -> ExpertPlacement | None:
        """Which rank holds which experts; None for E / W contiguous ones each."""
        return None if self.expert_shards is None else self.expert_shards.placement

    @property
    def expert_ids(self) -> tuple[int, ...]:
        """The experts of this rank, in the order of its weights."""
        return tuple(range(self.config.num_experts)) if self.expert_shards is None else self.expert_shards.expert_ids

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
        self._spread(group_or_mesh, overlap, placement, expert_gradients, self.gate_up_proj.device)
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
        return None if self.expert_shards is None else self.expert_shards.sharding.sum_over_ranks

    def take_router(self, load_balance_loss_weight: float) -> None:
        """Note how the router of the layer that has these experts is balanced, for recordings."""
        self._load_balance_loss_weight = load_balance_loss_weight
        if self.expert_shards is not None:
            self.expert_shards.calls.load_balance_loss_weight = load_balance_loss_weight

    def extra_repr(self) -> str:
        config, transport = self.config, self.transport
        flags = [name for name in ("interleaved", "transposed", "bias") if getattr(config, name)]
        flags += [str(one) for one in (config.weight_format, config.expert_precision) if one is not None]
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
        """Traffic and timings of the last expert-parallel call, of a step's many or a recompute; None on one device."""
        return None if self.expert_shards is None else self.expert_shards.calls.last_report

    def peak_bytes(
        self, num_tokens: int, *, routing: str | Tensor | Sequence[float] = "uniform", num_layers: int = 1
    ) -> int:
        """Return how many bytes calls of such layers are expected to hold at most, on the rank that holds most.

        Counted are the buffers of rows and pairs, and what layers keep for their backwards (under torch.no_grad()
        nothing is kept); not counted are weights, their gradients, optimizers, and inputs and outputs of layers. Rows
        are taken to have the dtype of the weights, bf16 where these are packed. num_chunks="auto" is taken as one
        chunk, which holds most. No collective runs.

        Args:
            num_tokens: T, on every rank.
            routing: "uniform"; "worst": all tokens choose experts of rank 0; or the number of pairs that each expert
                had (E,), such as `layer.statistics().load`.
            num_layers: how many equal layers run one after the other before the first backward.
        Raises:
            ValueError: the layer is on one device, where memory doesn't depend on the routing; or the memory depends
                on what only a call knows: balance, a capacity, replicas, two levels.
        """
        shards = self.expert_shards
        if shards is None:
            raise ValueError(
                "these experts are on one device, where the routing doesn't change how much they hold: spread them "
                "over ranks first"
            )
        if shards.transport.node_size is not None:
            raise ValueError(
                "the memory of experts on a TwoLevelTransport can't be estimated before a call: use a transport of one "
                "level"
            )
        config, overlap, size = self.config, shards.overlap, shards.transport.size
        precision = self.spec.precision
        if precision is not None:
            check_with_precision(overlap, precision)
        weight = self.gate_up_proj
        # Experts in an ExpertPrecision compute in bf16, those with fp32 parameters under torch.autocast.
        dtype = weight.dtype if config.weight_format is None and precision is None else torch.bfloat16
        rows = torch.empty(0, config.hidden_size, dtype=dtype, device=weight.device)
        choices = torch.empty(0, config.top_k, device=weight.device)
        with torch.no_grad():
            inputs = CallTensors(rows, choices.to(torch.int64), choices, self._local_weights())
            settings = choose_backend(self.spec, inputs, beside_exchanges=True)
        widths = buffer_widths(inputs, settings, has_backward=torch.is_grad_enabled())
        widths = replace(widths, working_set=working_set(settings.ops, weight.device), num_tokens=num_tokens)
        found = estimate_bytes(
            routing,
            shards.placement or ExpertPlacement.contiguous(config.num_experts, size),
            num_tokens,
            config.top_k,
            choose_wires(dtype, overlap.wire_dtype, precision).row_bytes(config.hidden_size),
            widths,
            overlap,
            num_layers=num_layers,
            is_fused=is_fused(config.activation),
        )
        return math.ceil(found.peak.max())

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw every expert from a seed of its own, so that its values don't depend on the number of ranks.

        Raises:
            ValueError: a weight is computed from other parameters, as by a parametrization.
        """
        refuse_computed(type(self).__name__, self, PARAMETERS, "reset_parameters()")
        seed = int(torch.randint(2**62, (), generator=generator, device="cpu"))
        if self.gate_up_proj.is_meta:  # there is no memory to draw into
            return
        if self.expert_shards is not None:
            check_replicas(seed, self.expert_shards.sharding)
        experts = rows_here(self.gate_up_proj, self.expert_ids)
        weights = self._local_weights()
        if self.config.weight_format is None:
            draw_experts(weights.gate_up_proj, weights.down_proj, self.config, experts, seed)
        else:
            draw_packed_experts(weights, self.config, experts, seed)
        for bias in (weights.gate_up_bias, weights.down_bias):
            if bias is not None:
                bias.zero_()

    def narrows_to(self, dtype: torch.dtype) -> bool:
        """Return whether these weights are cast to the dtype of the rows, except for weights with a main_grad.

        So FSDP2's mixed precision casts the parameters that it manages; spread experts it is told to leave alone.
        """
        is_spread = self.expert_shards is not None and self.expert_shards.sharding.mesh is not None
        return is_spread and self.gate_up_proj.dtype == torch.float32 and dtype in (torch.bfloat16, torch.float16)

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
        shards = self.expert_shards
        if torch.compiler.is_compiling() and runs_outside_graphs(self):
            return _forward_outside_graphs(
                self,
                x,
                topk_ids,
                topk_weights,
                adapters=adapters,
                num_nonfinite_rows=num_nonfinite_rows,
                fillers=fillers,
            )
        if shards is None:
            for filler in fillers:
                filler()
            spec, weights = self._for_call(x, adapters)
            return run_experts(spec, CallTensors(x, topk_ids, topk_weights, weights))
        try:
            spec, weights = self._for_call(x, adapters)
        except Exception:
            abort_call(shards.transport)
            raise
        return shards.run(spec, CallTensors(x, topk_ids, topk_weights, weights), num_nonfinite_rows, fillers)

    def _local_weights(self, x: Tensor | None = None, adapters: ExpertAdapters | None = None) -> PerWeight[Tensor]:
        """Return this rank's experts as plain tensors, whose gradients reach the parameters, to compute with x."""
        own: PerWeight[Tensor]
        if (offloaded := offloaded_of(self)) is not None:
            own = offloaded.weights(self, x, self.gate_up_proj_bias, self.down_proj_bias)
        else:
            own = PerWeight(
                self.gate_up_proj,
                self.gate_up_proj_bias,
                self.down_proj,
                self.down_proj_bias,
                gate_up_scales=self.gate_up_proj_scales,
                down_scales=self.down_proj_scales,
            )
        parameters = with_adapters(own, adapters)
        shards = self.expert_shards
        if shards is None:
            return parameters
        is_trained = torch.is_grad_enabled() and any(p is not None and p.requires_grad for p in parameters)
        placement = shards.placement
        if is_trained and shards.sharding.mesh is not None and placement is not None and placement.has_replicas:
            raise ValueError(
                "experts that stand in several slots of a placement can't be trained as DTensors: clip_grad_norm_ "
                "would count them several times. Use a placement without replicas, freeze them "
                "(requires_grad_(False)), or call expert_parallel_mlp with parameters of your own"
            )
        local = [None if p is None else shards.local(self, p, position) for position, p in enumerate(parameters)]
        weights: PerWeight[Tensor] = PerWeight(*local)  # type: ignore[arg-type]  # None stands where PerWeight has None
        if x is None or offloaded is not None or not self.narrows_to(x.dtype) or find_main_grads(weights) is not None:
            return weights
        dtype = x.dtype
        return weights.map(lambda weight: for_both_halves(weight, dtype, lambda: weight.to(dtype)))

    def _for_call(self, x: Tensor, adapters: ExpertAdapters | None) -> tuple[ExpertSpec, PerWeight[Tensor]]:
        """Return how the experts compute with these adapters or with those noted of the module (PEFT's), and weights.

        The adapters of the call have dropout in training alone.
        """
        spec, shards = self.spec, self.expert_shards
        if isinstance(adapters, ExpertAdapters) and adapters.dropout:  # what is none is refused with the weights
            adapters = adapters if self.training else replace(adapters, dropout=0.0)
            spec = spec.with_dropout(adapters)
        weights = self._local_weights(x, adapters)
        if self.config.weight_format is not None and offloaded_of(self) is None:
            weights = as_values(self, self.config.weight_format, weights)
        if adapters is not None and shards is not None and shards.transport.size > 1:
            _note_factors(self.key, adapters)
        notes = notes_on(self)
        if not notes:
            return spec, weights
        if adapters is not None:
            raise ValueError(
                "the call gives adapters to experts that PEFT has adapted already: leave adapters out, or don't wrap "
                "the experts by PEFT"
            )
        expert_ids = range(self.config.num_experts) if shards is None else shards.expert_ids
        factors = noted_factors(notes, torch.bfloat16 if is_packed(weights) else weights.gate_up_proj.dtype, expert_ids)
        is_trained = torch.is_grad_enabled() and any(factor.requires_grad for factor in factors.values())
        if is_trained and shards is not None and shards.placement is not None and shards.placement.has_replicas:
            raise ValueError(
                "adapters of experts that stand in several slots of a placement can't be trained: every slot would get "
                "the gradient of all of them, and an average over ranks would count it several times. Use a placement "
                "without replicas, or freeze the adapters"
            )
        return replace(spec, adapters=names_of(notes)), weights._replace(**factors)


_forward_outside_graphs = outside_graphs(GroupedExperts.forward)


def _register(module: GroupedExperts) -> str:
    """Remember a module as long as it lives, and return its key, which no other process has: a file may keep it."""
    key = uuid.uuid4().hex
    with _lock:
        _known[key] = module
    return key


def experts_of_parameters(parameters: Iterable[Tensor]) -> list[GroupedExperts | None]:
    """Return, for each parameter, the GroupedExperts over ranks of which it is a plain tensor; None for all others.

    The living modules are asked. A note on their parameters would be lost where they are exchanged for others: by
    deepcopy, load_state_dict with assign=True, parametrizations. Factors of adapters that were given to an eager call
    over ranks, themselves or cast, reshaped or scaled, count as parameters of the module that was called.
    """
    with _lock:
        modules = dict(_known.items())
    shards = {module: module.expert_shards for module in modules.values()}
    plain = [module for module, found in shards.items() if found is not None and found.sharding.mesh is None]
    own = {id(parameter): module for module in plain for parameter in module.parameters()}
    return [own.get(id(parameter)) or modules.get(vars(parameter).get(ADAPTS, "")) for parameter in parameters]


def _transports_of(parameters: Iterable[Tensor]) -> list[Transport]:
    """Return the transports over which some of these parameters are spread as plain tensors, in their order."""
    modules = experts_of_parameters(parameter for parameter in parameters if not hasattr(parameter, "device_mesh"))
    spread = [module.transport for module in modules if module is not None and module.transport is not None]
    return [transport for transport in dict.fromkeys(spread) if transport.size > 1]


def _note_factors(key: str, adapters: ExpertAdapters) -> None:
    """Remember the parameters of a call's adapters, which are this rank's alone as its experts are.

    Args:
        key: of the module that is called, from _register().
    Raises:
        ValueError: DistributedDataParallel averages a factor over ranks.
    """
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
        if getattr(leaf, ADAPTS, None) != key:
            setattr(leaf, ADAPTS, key)
