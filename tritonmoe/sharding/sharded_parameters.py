"""Parameters of which each rank holds a part, as DTensors, which optimizers, clipping and checkpoints understand."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, SupportsIndex

import torch
from torch import Tensor, nn

from tritonmoe.errors import CountMismatch
from tritonmoe.runtime.autograd import Context
from tritonmoe.sharding.data_parallel import ignore_sharded_parameters
from tritonmoe.sharding.dtensor_gaps import fill_dtensor_gaps
from tritonmoe.sharding.fully_shard import explain_fully_shard
from tritonmoe.sharding.marks import ShardedNames, is_averaged_by_fsdp, mark_mesh, mark_sharded
from tritonmoe.sharding.mixed_lists import allow_mixed_lists
from tritonmoe.sharding.placed_rows import ExpertsOfRank
from tritonmoe.sharding.placed_states import (
    StateDict,
    in_slot_order,
    note_order,
    order_of,
    refuse_moved,
    show_in_model_order,
)
from tritonmoe.sharding.watched_collectives import watched_on
from tritonmoe.sharding.whole_states import no_pickle, refuse_pickling
from tritonmoe.transports import EXPERT, Ranks, as_transport, is_mesh
from tritonmoe.transports.base import Transport
from tritonmoe.transports.waiting import Doing

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = [
    "Sharding",
    "check_expert_gradients",
    "check_replicas",
    "find_sharding",
    "local_shard",
    "numbers_of_all",
    "rows_here",
    "shard_parameters",
]


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


def shard_parameters(
    module: nn.Module,
    parts: dict[str, Tensor | None],
    sharding: Sharding,
    experts_of_rank: ExpertsOfRank | None = None,
    is_summed: bool = False,
) -> None:
    """Return the module its parameters, of which this rank holds `parts`: DTensors where torch.distributed is.

    Args:
        parts: by name; (rows of this rank, ...), as many on every rank, with requires_grad as the parameter's.
        experts_of_rank: whose rows every rank's parts are; None where the parts, one behind the other, are the whole.
        is_summed: whether their gradients stay sums over the ranks.
    """
    if sharding.mesh is not None or sharding.transport.size > 1:
        replicas = () if sharding.replicas is None else tuple(sharding.replicas.mesh.tolist())
        home = experts_of_rank if sharding.mesh is None else None
        mark_sharded(module, ShardedNames(tuple(parts), sharding.members, replicas, is_summed=is_summed, home=home))
        if experts_of_rank is not None and sharding.mesh is not None:
            note_order(module, experts_of_rank)
    for name, part in parts.items():
        parameter, before = None if part is None else _as_parameter(part, sharding), module._parameters.get(name)
        if parameter is not None and before is not None:
            vars(parameter).update(vars(before))  # what others have noted on it
        module.register_parameter(name, parameter)
    if sharding.mesh is None:
        if sharding.transport.size > 1:
            module.register_state_dict_pre_hook(refuse_moved)
            module.register_load_state_dict_pre_hook(refuse_moved)
        return
    allow_mixed_lists()
    fill_dtensor_gaps()
    ignore_sharded_parameters()
    explain_fully_shard()
    mark_mesh(sharding.mesh)
    for name in parts:
        if (parameter := getattr(module, name)) is not None:
            refuse_pickling(parameter)
    module.register_state_dict_post_hook(functools.partial(show_in_model_order, tuple(parts)))
    module.register_load_state_dict_pre_hook(functools.partial(_take_loaded, tuple(parts)))


def _as_parameter(part: Tensor, sharding: Sharding) -> nn.Parameter:
    values: Tensor = part.detach()
    if sharding.mesh is not None:
        from torch.distributed.tensor import DTensor, Shard

        values = DTensor.from_local(values, sharding.mesh, [Shard(0)], run_check=False)
    return nn.Parameter(values, requires_grad=part.requires_grad)


def check_expert_gradients(expert_gradients: object) -> None:
    """Raise ValueError unless this says what gradients of experts are."""
    if expert_gradients not in ("mean", "sum"):
        raise ValueError(f'expert_gradients must be "mean" or "sum", got {expert_gradients!r}')


def check_replicas(seed: int, sharding: Sharding) -> None:
    """Raise ValueError unless the ranks that hold the same experts draw them from the same seed; all of them call."""
    if sharding.replicas is not None:
        seeds = numbers_of_all(torch.tensor([seed], device="cpu"), as_transport(sharding.replicas))
        if len(set(seeds.flatten().tolist())) > 1:
            raise ValueError(
                "the ranks that hold copies of the same experts would draw different weights: pass a generator with "
                "the same seed on every rank, or call torch.manual_seed() with it before the layer is made"
            )


def numbers_of_all(numbers: Tensor, transport: Transport) -> Tensor:
    """Return the (L,) int64 numbers of every rank: (W, L)."""
    with Doing(lambda: "the comparison of the ranks' weights"):
        return transport.exchange_counts(numbers.expand(transport.size, -1).contiguous())


def rows_here(parameter: Tensor, rows: Sequence[int]) -> Sequence[int]:
    """Return which of this rank's rows of a parameter are in its memory: a part where FSDP2 shards replicas.

    Raises:
        ValueError: FSDP2 has sharded another dimension than the rows.
    """
    placements = getattr(parameter, "placements", ())[:-1]  # the last one is ours
    for dim, placement in enumerate(placements):
        if placement.is_replicate():
            continue
        if placement.dim != 0:
            raise ValueError(
                f"FSDP2 has sharded dimension {placement.dim} of the experts' weights, and none is whole enough to be "
                "drawn here: leave out fully_shard's shard_placement_fn, or load weights instead of drawing them"
            )
        mesh = parameter.device_mesh  # type: ignore[attr-defined]
        chunks = torch.tensor(rows, device="cpu").chunk(mesh.size(dim))
        rank = mesh.get_local_rank(dim)
        rows = chunks[rank].tolist() if rank < len(chunks) else []
    return rows


def local_shard(module: nn.Module, parameter: Tensor, sharding: Sharding, scale: float, number: int) -> Tensor:
    """Return this rank's rows of a parameter, to compute with; their gradient is scaled and averaged over replicas.

    Where FSDP2 has sharded the parameter over its replicas, the average is left to it, with its reduce_dtype.

    Args:
        module: whose own parameter it is, if any's.
        scale: what the gradient of this rank's rows is multiplied with.
        number: of the parameter, by which ranks with the same rows know that they average the same gradient.
    """
    # FSDP2's hooks hand over gathered parameters: a DTensor where they are spread besides, else a tensor.
    # Under torch.compile hasattr(parameter, "to_local") is False.
    local = parameter
    if sharding.mesh is not None:
        from torch.distributed.tensor import DTensor

        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    if hasattr(parameter, "main_grad"):
        if scale != 1.0 or sharding.replicas is not None:
            raise ValueError(
                "a gradient that was added to a main_grad can't be scaled or averaged any more: make the layer with "
                'expert_gradients="sum" and without replicas, or leave main_grad to after the backward'
            )
        local.main_grad = parameter.main_grad  # type: ignore[attr-defined]
    replicas = sharding.replicas
    if replicas is not None and is_averaged_by_fsdp(module, parameter):
        replicas = None
    if scale == 1.0 and replicas is None:
        return local
    return _ScaledGradient.apply(local, scale, replicas, number)


class _ScaledGradient(torch.autograd.Function):
    """The tensor itself; its gradient times a factor, and averaged over replicas."""

    @staticmethod
    def forward(tensor: Tensor, scale: float, replicas: "DeviceMesh | None", number: int) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[object, ...], output: Tensor) -> None:
        _, ctx.scale, ctx.replicas, ctx.number = inputs

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


def _take_loaded(names: Sequence[str], module: nn.Module, state_dict: StateDict, prefix: str, *_: object) -> None:
    """Turn what a state dict has of these parameters into this rank's part of them, before it is loaded."""
    order = order_of(module)
    for name in names:
        if (value := state_dict.get(prefix + name)) is None:
            continue
        parameter = getattr(module, name)
        state_dict[prefix + name] = in_slot_order(value, parameter, order, prefix + name)
