"""ExpertShards: where the experts of a module live, and how a call reaches them; attached once to any such module."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, SupportsIndex
from weakref import WeakSet

import torch
from torch import Tensor, nn

from tritonmoe.config.overlap import OverlapConfig, OverlapPlan
from tritonmoe.dispatch.placement import ExpertPlacement
from tritonmoe.errors import CountMismatch
from tritonmoe.expert_parallel.call import CallSpec, ProposedCall
from tritonmoe.expert_parallel.expert_parallel_mlp import run_expert_parallel
from tritonmoe.expert_parallel.state import LayerCalls
from tritonmoe.experts.spec import ExpertSpec
from tritonmoe.experts.tensors import CallTensors
from tritonmoe.placement.placed_rows import ExpertsOfRank, is_in_model_order
from tritonmoe.placement.watched_collectives import watched_on
from tritonmoe.runtime.autograd import Context
from tritonmoe.runtime.halves import for_both_halves
from tritonmoe.runtime.transforms import NOT_EXPERT_PARALLEL
from tritonmoe.transports import EXPERT, Ranks, Transport, as_transport, is_mesh

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = [
    "ExpertShards",
    "Sharding",
    "attach_shards",
    "find_sharding",
    "no_pickle",
    "sharded_modules",
    "shards_of",
    "warn_of_sums",
]

log = logging.getLogger("tritonmoe")

ATTRIBUTE = "expert_shards"
"""Of a module of experts, and of a factor of adapters on them: its ExpertShards."""
PARAMETERS_OF_A_LAYER = 32
"""More than belong to one layer: of its experts, of adapters that a call gives, and of PEFT's."""
_warned_of: "WeakSet[LayerCalls]" = WeakSet()


@dataclass(frozen=True)
class Sharding:
    """Over which ranks the parameters of a module are spread, and which other ranks hold copies of them."""

    transport: Transport
    mesh: "DeviceMesh | None"
    """Of one dimension; None where torch.distributed does not know the ranks, and parameters stay plain tensors."""
    replicas: "DeviceMesh | None" = None
    """Of one dimension: the ranks with the same part as this one; None where there is no other."""
    members: tuple[int, ...] | None = None
    """All of these ranks, by their global number."""

    def __deepcopy__(self, memo: dict) -> "Sharding":
        return self

    def __reduce_ex__(self, protocol: SupportsIndex) -> str | tuple[object, ...]:
        """Refuse pickle as the parameters do, which a module's other attributes may come before."""
        if self.transport.size > 1:
            raise no_pickle(self.transport.size)
        return super().__reduce_ex__(protocol)

    def sum_over_ranks(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all of these ranks, those with copies included, in place; give it back."""
        self.transport.all_reduce(tensor)
        if self.replicas is not None:
            as_transport(self.replicas).all_reduce(tensor)
        return tensor


def find_sharding(ranks: Ranks, transport: Transport, device: torch.device) -> Sharding:
    """Return how parameters on this device are spread over `ranks`, whose transport is `transport`.

    Args:
        ranks: what as_transport() takes.
    Raises:
        ValueError: the ranks are fewer than torch.distributed has, and nothing says what the others hold.
    """
    if is_mesh(ranks) and ranks.ndim == 2 and EXPERT in (names := ranks.mesh_dim_names or ()):
        other = next(name for name in names if name != EXPERT)
        replicas = ranks[other] if ranks[other].size() > 1 else None
        _check_order(ranks, names.index(EXPERT))
        return Sharding(transport, ranks[EXPERT], replicas, tuple(ranks.mesh.flatten().tolist()))
    if (group := transport.group) is None:
        return Sharding(transport, None)
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh

    members = dist.get_process_group_ranks(group)
    if len(members) < dist.get_world_size():
        raise ValueError(
            f"the experts would be spread over the ranks {members} of {dist.get_world_size()}, and tritonmoe can't "
            "tell whether the other ranks hold copies, whose gradients must be averaged: pass a DeviceMesh of two "
            f'dimensions, init_device_mesh(..., mesh_dim_names=("replica", "{EXPERT}")), its first of size 1 where '
            "there are no copies"
        )
    if is_mesh(ranks) and ranks.ndim == 1:
        mesh = ranks
        _check_order(mesh, 0)
    else:
        device_type = device.type
        if device_type == "meta":  # they will be where the group's backend is
            has_cuda = torch.cuda.is_available() and "cuda" in dist.get_backend_config(group)
            device_type = "cuda" if has_cuda else "cpu"
        mesh = DeviceMesh.from_group(group, device_type, mesh_dim_names=(EXPERT,))
    return Sharding(transport, mesh, None, tuple(members))


def _check_order(mesh: "DeviceMesh", dim: int) -> None:
    """Raise ValueError unless the ranks stand in the mesh as in their group, whose order says who gets which rows."""
    if bool((mesh.mesh.diff(dim=dim) < 0).any()):
        raise ValueError(
            f"the ranks {mesh.mesh.tolist()} of a DeviceMesh don't ascend along the dimension over which experts are "
            "spread, and every rank would hold other experts than its place in the mesh says: sort them, as "
            "init_device_mesh() does"
        )


@dataclass(eq=False)
class ExpertShards:
    """Where the experts of a module live: on which ranks, in which of its parameters, and how a call reaches them.

    A module of experts has one: GroupedExperts, or experts of transformers. So has a factor of PEFT's adapters on
    these, whose rows are the same experts'.
    """

    sharding: Sharding
    num_experts: int
    """E, over all ranks."""
    calls: LayerCalls
    overlap: OverlapConfig | OverlapPlan = field(default_factory=OverlapConfig)
    placement: ExpertPlacement | None = None
    """Which rank holds which experts; None for E / W contiguous ones each."""
    names: tuple[str, ...] = ()
    """The module's own parameters of which each rank holds the rows of its experts."""
    first_number: int = 0
    """The number of the first of these parameters among all that belong to the experts, factors of adapters too."""
    averaged: tuple[str, ...] = ()
    """Those of them whose gradients FSDP2 averages over the replicas, among which it shards them."""
    gradient_scale: float = field(init=False)
    """What the gradients of experts, sums over the ranks' losses, are multiplied with."""
    expert_ids: tuple[int, ...] = field(init=False)
    """The experts of this rank, in the order of its rows."""
    home: ExpertsOfRank | None = field(init=False)
    """The expert in each slot of each rank whose order state dicts have; None is that of the model.

    Where torch.distributed knows no ranks, a rank's state dict has its own rows, in the order when the module was made.
    """

    def __post_init__(self) -> None:
        size = self.transport.size
        self.gradient_scale = 1 / size if self.calls.expert_gradients == "mean" else 1.0
        self.move(self.placement)
        self.home = self.experts_of_rank if self.sharding.mesh is None else None

    @property
    def transport(self) -> Transport:
        return self.sharding.transport

    @property
    def is_spread(self) -> bool:
        """Whether the parameters are other ones on every rank."""
        return bool(self.names) and (self.sharding.mesh is not None or self.transport.size > 1)

    @property
    def experts_of_rank(self) -> ExpertsOfRank:
        """The expert in each slot of each rank."""
        placement = self.placement
        if placement is None:
            placement = ExpertPlacement.contiguous(self.num_experts, self.transport.size)
        return placement.experts_of_rank

    @property
    def order(self) -> ExpertsOfRank | None:
        """The expert in each slot of each rank, where state dicts would show them in another order than they should."""
        experts_of_rank = self.experts_of_rank
        is_home = is_in_model_order(experts_of_rank) if self.home is None else experts_of_rank == self.home
        return None if is_home else experts_of_rank

    def move(self, placement: ExpertPlacement | None) -> None:
        """Note that the rows are these experts' from now on."""
        self.placement = placement
        self.expert_ids = self.experts_of_rank[self.transport.rank]

    def local(self, module: nn.Module, parameter: Tensor, position: int) -> Tensor:
        """Return this rank's rows of a parameter of the module, to compute with.

        Their gradient is scaled, and averaged over replicas; that is left to FSDP2, with its reduce_dtype, where it
        has sharded the parameter over these.

        Args:
            position: of the parameter among those of the module, by which ranks with the same rows know that they
                average the same gradient.
        """
        make = partial(self._local, module, parameter, position)
        return for_both_halves(parameter, parameter.dtype, make)

    def local_parameter(self, module: nn.Module, name: str) -> Tensor:
        """Return local() of a parameter of the module by its name, and one that all experts share as it is."""
        parameter = getattr(module, name)
        return self.local(module, parameter, self.names.index(name)) if name in self.names else parameter

    def run(
        self,
        spec: ExpertSpec,
        tensors: CallTensors[Tensor],
        num_nonfinite_rows: Tensor | None = None,
        fillers: Sequence[Callable[[], None]] = (),
    ) -> Tensor:
        """Run what expert_parallel_mlp runs over these ranks, as a layer that the ranks know."""
        call_spec = CallSpec(spec, self.num_experts, self.overlap, self.placement)
        return run_expert_parallel(
            ProposedCall(call_spec, self.sharding.transport, tensors, self.calls, num_nonfinite_rows, fillers)
        )

    def _local(self, module: nn.Module, parameter: Tensor, position: int) -> Tensor:
        # FSDP2's hooks hand over gathered parameters: a DTensor where they are spread besides, else a tensor.
        # Under torch.compile hasattr(parameter, "to_local") is False.
        local, scale, replicas = parameter, self.gradient_scale, self.sharding.replicas
        if self.sharding.mesh is not None:
            from torch.distributed.tensor import DTensor

            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if hasattr(parameter, "main_grad"):
            if scale != 1.0 or replicas is not None:
                raise ValueError(
                    "a gradient that was added to a main_grad can't be scaled or averaged any more: make the layer "
                    'with expert_gradients="sum" and without replicas, or leave main_grad to after the backward'
                )
            local.main_grad = parameter.main_grad  # type: ignore[attr-defined]
        if replicas is not None and any(getattr(module, name) is parameter for name in self.averaged):
            replicas = None
        if scale == 1.0 and replicas is None:
            return local
        if torch._C._are_functorch_transforms_active():  # which would say of the Function that it has no setup_context
            raise RuntimeError(NOT_EXPERT_PARALLEL)
        number = PARAMETERS_OF_A_LAYER * self.calls.number + self.first_number + position
        return _ScaledGradient.apply(local, scale, replicas, number)


def no_pickle(num_ranks: int) -> ValueError:
    """Return the error with which pickle is refused what is spread over so many ranks."""
    return ValueError(
        f"torch.save, or pickle, would keep one rank's experts alone of those that are spread over {num_ranks} ranks: "
        "save with torch.distributed.checkpoint; or, where every rank calls state_dict() as under Accelerate, "
        "Lightning and Fabric.save, call tritonmoe.gather_state_dicts(module, optimizer) once, after adapters are made "
        "and before training, which makes its tensors whole; adapters alone: PEFT's save_pretrained() on every rank"
    )


def shards_of(module: nn.Module) -> ExpertShards | None:
    """Return where the experts of a module live; None where all of them are here, and for other modules."""
    shards = module.__dict__.get(ATTRIBUTE)
    return shards if isinstance(shards, ExpertShards) else None


def attach_shards(module: nn.Module, shards: ExpertShards | None) -> None:
    """Note on a module where its experts live."""
    setattr(module, ATTRIBUTE, shards)


def sharded_modules(module: nn.Module) -> Iterator[tuple[str, nn.Module, ExpertShards]]:
    """Return every module inside `module` with parameters that are other ones on every rank, `module` included."""
    for name, child in module.named_modules():
        shards = shards_of(child)
        if shards is not None and shards.is_spread:
            yield name, child, shards


def warn_of_sums(averages: str, name: str, shards: ExpertShards) -> None:
    """Warn once about a module that gradients of its experts are sums beside averaged ones."""
    calls, members, size = shards.calls, shards.sharding.members, shards.transport.size
    if calls.expert_gradients == "sum" and members is not None and size > 1 and calls not in _warned_of:
        _warned_of.add(calls)
        log.warning(
            "%s averages dense gradients over %d ranks, and those of the experts of %s stay sums over the ranks that "
            'hold other experts (expert_gradients="sum"), %d times as large: take expert_gradients="mean", or divide '
            "them by %d yourself before each step, or let a communication hook sum the dense ones",
            averages,
            len(members),
            name,
            size,
            size,
        )


class _ScaledGradient(torch.autograd.Function):
    """The tensor itself; its gradient times a factor, and averaged over replicas."""

    @staticmethod
    def forward(ctx: Context, tensor: Tensor, scale: float, replicas: "DeviceMesh | None", number: int) -> Tensor:
        ctx.scale, ctx.replicas, ctx.number = scale, replicas, number
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.replicas is None:
            # In place, since nobody else has what the experts' backward has just made.
            is_traced = torch.compiler.is_compiling() or torch.is_grad_enabled()
            return grad * ctx.scale if is_traced else grad.mul_(ctx.scale), None, None, None
        _check_number(ctx.number, ctx.replicas, grad.device)
        from torch.distributed._functional_collectives import all_reduce

        # Divided first, so that a sum in a narrow dtype overflows no earlier than its mean.
        total = all_reduce(grad * (ctx.scale / ctx.replicas.size()), "sum", ctx.replicas)
        return total, None, None, None


def _check_number(number: int, replicas: "DeviceMesh", device: torch.device) -> None:
    """Raise CountMismatch unless all replicas are at the same parameter; on a GPU the device reports it."""
    if torch.compiler.is_compiling():  # one graph for all, in one order
        return
    import torch.distributed as dist

    numbers = torch.tensor([number, -number], device=device)
    with watched_on(replicas, "a backward, before the average of experts' gradients over their replicas"):
        dist.all_reduce(numbers, dist.ReduceOp.MAX, group=replicas.get_group())
    said = (
        "the ranks that hold copies of the same experts run the backward of different layers, or of a layer and its "
        "deepcopy: every rank must make the same layers and copies, and run the same backwards, in the same order"
    )
    if device.type == "cpu":
        if int(numbers[0]) != -int(numbers[1]):
            raise CountMismatch(f"{said} (parameters {-int(numbers[1])} to {int(numbers[0])}, here {number})")
    else:
        torch._assert_async(numbers[0] == -numbers[1], said)
