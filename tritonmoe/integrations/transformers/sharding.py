"""parallelize(): spread the experts of a model over ranks; what its experts then need to know."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...arguments import ExpertWeights
from ...config import Activation, KernelOptions
from ...expert_parallel import run_expert_parallel
from ...expert_parallel_run import check_expert_parallel
from ...overlap_config import OverlapConfig, check_overlap
from ...spread import parallelize as parallelize_layers
from ...spread import refuse_tied, routed_experts
from ...transport_state import LayerCalls
from ...transports import Transport, as_transport
from ...transports.data_parallel import refuse_wrapped
from ...transports.sharding import (
    Sharding,
    check_expert_gradients,
    check_same_weights,
    find_sharding,
    local_shard,
    shard_parameters,
)
from .discovery import experts_modules
from .patching import patch
from .requirements import check_model
from .sharded_model import bind_to_spread, refuse_adapted

__all__ = ["ExpertParallelState", "expert_parallel_state", "parallelize"]

STATE = "_tritonmoe_expert_parallel"


@dataclass(frozen=True)
class ExpertParallelState:
    """Who holds the other experts of a module, and how rows go there."""

    num_experts: int
    """E, over all ranks."""
    sharding: Sharding
    overlap: OverlapConfig
    gradient_scale: float
    """What the gradients of expert weights, sums over the ranks' losses, are multiplied with."""
    calls: LayerCalls
    names: tuple[str, ...]
    """The parameters of which each rank holds its experts."""

    def mlp(
        self,
        x: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        gate_up_proj: Tensor,
        down_proj: Tensor,
        *,
        activation: Activation,
        gated: bool,
        interleaved: bool,
        transposed: bool,
        gate_up_bias: Tensor | None,
        down_bias: Tensor | None,
    ) -> Tensor:
        """Run what expert_parallel_mlp runs over these ranks, as a layer that the ranks know."""
        return run_expert_parallel(
            x,
            topk_ids,
            topk_weights,
            ExpertWeights(gate_up_proj, gate_up_bias, down_proj, down_bias),
            num_experts=self.num_experts,
            transport=self.sharding.transport,
            overlap=self.overlap,
            placement=None,
            layout_flags=(gated, interleaved, transposed),
            activation=activation,
            backend="auto",
            save="hidden",
            options=KernelOptions(),
            calls=self.calls,
        )

    def local(self, experts: nn.Module) -> Callable[[str], Tensor]:
        """Give the function that gives this rank's experts of a parameter, by its name; differentiable."""
        first = len(self.names) * self.calls.layer

        def local_parameter(name: str) -> Tensor:
            parameter = getattr(experts, name)
            if name not in self.names:
                return parameter
            return local_shard(parameter, self.sharding, self.gradient_scale, first + self.names.index(name))

        return local_parameter


def expert_parallel_state(experts: nn.Module) -> ExpertParallelState | None:
    """Give what parallelize() left on an experts module; None where its experts are all here."""
    return experts.__dict__.get(STATE)


def parallelize(
    model: nn.Module,
    group_or_mesh: Any,
    overlap: OverlapConfig | None = None,
    *,
    expert_gradients: Literal["mean", "sum"] = "mean",
) -> int:
    """Spread the experts of a transformers model over ranks, in place; give the number of experts modules.

    Every rank calls it with the same weights, and then runs its own batch through the whole model, its own experts and,
    by overlapped exchanges, those of the others. All ranks make the same calls, forward and backward; batches may
    differ in size. Every expert parameter becomes a DTensor, Shard(0) over the ranks, with its name unchanged: make
    the optimizer afterwards (a parameter group of their own, where its fused implementations mix no DTensors with
    tensors). torch.distributed.checkpoint reads such checkpoints back over any number of ranks.
    `model.save_pretrained` gathers, so every rank must call it; the first one writes. Ranks whose texts end at
    different lengths call `generate(..., synced_gpus=True)`. DistributedDataParallel, and so Trainer, leaves expert
    parameters alone, in whatever module the model stands. FSDP2's fully_shard comes after this, over the replicas for
    the experts or with `ignored_params=set(tritonmoe.expert_parameters(model))`: docs/transformers.md. The layers of a
    model upcycled in place are spread too.

    Args:
        group_or_mesh: a torch ProcessGroup or DeviceMesh of all ranks, or a DeviceMesh of two dimensions, one called
            "expert" and one of replicas, over which the gradients of each expert are averaged too.
        overlap: the chunks; the same on every rank. None is OverlapConfig().
        expert_gradients: "mean": as if averaged over the ranks, which goes with dense gradients that are; "sum": of
            the ranks' losses.
    Raises:
        ValueError: as patch(); the experts of a module can't be divided by the number of ranks, are spread already,
            share weights with another module, or are adapted by PEFT themselves; init_process_group was not called.
            Nothing is changed.
    """
    from torch.distributed.tensor import DTensor

    check_expert_gradients(expert_gradients)
    overlap = OverlapConfig() if overlap is None else overlap
    check_overlap(overlap)
    check_model(model)
    if isinstance(group_or_mesh, Transport):
        raise TypeError(f"the experts of a model are spread over a ProcessGroup or a DeviceMesh, got {group_or_mesh!r}")
    if group_or_mesh is None and not torch.distributed.is_initialized():
        raise ValueError(
            "there are no ranks yet, and dist.group.WORLD is None: call torch.distributed.init_process_group() before "
            "parallelize()"
        )
    transport = as_transport(group_or_mesh)
    found: dict[str, Any] = experts_modules(model)
    layers = routed_experts(model)
    for name, experts in found.items():
        if isinstance(experts.down_proj, DTensor) or expert_parallel_state(experts) is not None:
            raise ValueError(
                f"the experts of {name} are spread over ranks already: parallelize a model once, and before fully_shard"
            )
        num_experts = experts.down_proj.shape[0]
        check_expert_parallel(num_experts // transport.size, num_experts, transport.size)
    refuse_wrapped(model, found.values())
    refuse_tied(model, found)
    refuse_adapted(model, found)
    if layers and not found:
        num_layers = parallelize_layers(model, group_or_mesh, overlap, expert_gradients=expert_gradients)
        bind_to_spread(model, {})
        return num_layers
    patch(model)
    sharding = find_sharding(group_or_mesh, transport, next(model.parameters()).device)
    check_same_weights(model, found, sharding)
    scale = 1 / transport.size if expert_gradients == "mean" else 1.0
    for experts in found.values():
        num_experts = experts.down_proj.shape[0]
        own: dict[str, Tensor | None] = {
            name: _own_experts(parameter, transport)
            for name, parameter in experts.named_parameters(recurse=False)
            if parameter.shape[0] == num_experts  # a stack of one per expert
        }
        shard_parameters(experts, own, sharding)
        state = ExpertParallelState(num_experts, sharding, overlap, scale, LayerCalls(transport), tuple(own))
        setattr(experts, STATE, state)
    bind_to_spread(model, found)
    if layers:
        parallelize_layers(model, group_or_mesh, overlap, expert_gradients=expert_gradients)
    return len(found) + len(layers)


def _own_experts(parameter: nn.Parameter, transport: Transport) -> Tensor:
    """Give a copy of this rank's experts."""
    part = parameter.detach().tensor_split(transport.size)[transport.rank]
    return part.clone(memory_format=torch.contiguous_format).requires_grad_(parameter.requires_grad)
