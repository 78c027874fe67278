"""ExpertParallelState: what parallelize() leaves on an experts module, by which it reaches the other ranks."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor, nn

from tritonmoe.config.overlap import OverlapConfig
from tritonmoe.dispatch.placement import ExpertPlacement
from tritonmoe.expert_parallel.call import CallSpec, ProposedCall
from tritonmoe.expert_parallel.expert_parallel_mlp import run_expert_parallel
from tritonmoe.expert_parallel.state import LayerCalls
from tritonmoe.experts.spec import ExpertSpec
from tritonmoe.experts.tensors import CallTensors
from tritonmoe.layer import GroupedExperts
from tritonmoe.runtime.halves import for_both_halves
from tritonmoe.sharding.marks import STATE
from tritonmoe.sharding.sharded_parameters import Sharding, local_shard
from tritonmoe.transports import Transport

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["STATE", "ExpertParallelState", "expert_parallel_state", "note_transport", "replicas_of", "transport_of"]

TRANSPORT = "_tritonmoe_transport"
"""The attribute of one that was spread when transformers loaded it, which holds the transport of its rows."""


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
    placement: ExpertPlacement | None = None
    """Which rank holds which experts; None for E / W contiguous ones each."""

    def run(self, spec: ExpertSpec, inputs: CallTensors[Tensor]) -> Tensor:
        """Run what expert_parallel_mlp runs over these ranks, as a layer that the ranks know."""
        call_spec = CallSpec(spec, self.num_experts, self.overlap, self.placement)
        return run_expert_parallel(ProposedCall(call_spec, self.sharding.transport, inputs, self.calls))

    @property
    def expert_ids(self) -> Sequence[int]:
        """The experts of this rank, in the order of its weights."""
        if self.placement is not None:
            return self.placement.experts_of_rank[self.sharding.transport.rank]
        num_local = self.num_experts // self.sharding.transport.size
        first = self.sharding.transport.rank * num_local
        return range(first, first + num_local)

    def placed(self, placement: ExpertPlacement | None) -> "ExpertParallelState":
        """Return the same with another placement."""
        return replace(self, placement=placement)

    def local_parameter(self, experts: nn.Module, name: str) -> Tensor:
        """Return this rank's experts of a parameter of the module, by its name; differentiable."""
        parameter = getattr(experts, name)
        if name not in self.names:
            return parameter
        number = len(self.names) * self.calls.number + self.names.index(name)
        make = partial(local_shard, experts, parameter, self.sharding, self.gradient_scale, number)
        return for_both_halves(parameter, parameter.dtype, make)


def expert_parallel_state(experts: nn.Module) -> ExpertParallelState | None:
    """Return what parallelize() left on an experts module; None where its experts are all here."""
    return experts.__dict__.get(STATE)


def note_transport(experts: nn.Module, transport: Transport) -> None:
    """Note over what the rows of experts go that transformers has spread (ep_implementation)."""
    experts.__dict__[TRANSPORT] = transport


def transport_of(experts: nn.Module) -> Transport | None:
    """Return over what the rows of an experts module go; None where its experts are all here, and for other modules."""
    if isinstance(experts, GroupedExperts):
        return experts.transport
    state = expert_parallel_state(experts)
    return experts.__dict__.get(TRANSPORT) if state is None else state.sharding.transport


def replicas_of(experts: nn.Module) -> "DeviceMesh | None":
    """Return the ranks that hold copies of this rank's experts of a module; None where there are none."""
    if isinstance(experts, GroupedExperts):
        sharding = experts.sharding
    else:
        state = expert_parallel_state(experts)
        sharding = None if state is None else state.sharding
    return None if sharding is None else sharding.replicas
