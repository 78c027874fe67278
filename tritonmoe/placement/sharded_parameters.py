"""Parameters of which each rank holds a part, as DTensors, which optimizers, clipping and checkpoints understand."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tritonmoe.placement.data_parallel import ignore_sharded_parameters
from tritonmoe.placement.dtensor_gaps import fill_dtensor_gaps
from tritonmoe.placement.expert_shards import ExpertShards, Sharding, attach_shards
from tritonmoe.placement.fully_shard import explain_fully_shard
from tritonmoe.placement.marks import mark_mesh
from tritonmoe.placement.mixed_lists import allow_mixed_lists
from tritonmoe.placement.placed_states import (
    StateDict,
    in_slot_order,
    note_order,
    order_of,
    refuse_moved,
    show_in_model_order,
)
from tritonmoe.placement.whole_states import refuse_pickling
from tritonmoe.transports import as_transport
from tritonmoe.transports.base import Transport
from tritonmoe.transports.waiting import Doing

__all__ = [
    "check_expert_gradients",
    "check_replicas",
    "numbers_of_all",
    "rows_here",
    "shard_parameters",
]


def shard_parameters(module: nn.Module, parts: dict[str, Tensor | None], shards: ExpertShards) -> None:
    """Return the module its parameters, of which this rank holds `parts`: DTensors where torch.distributed is.

    Args:
        parts: by name; (rows of this rank, ...), as many on every rank, with requires_grad as the parameter's.
        shards: whose rows every rank's parts are; its names become those of `parts`.
    """
    sharding = shards.sharding
    shards.names = tuple(parts)
    attach_shards(module, shards)
    note_order(module)
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


def _take_loaded(names: Sequence[str], module: nn.Module, state_dict: StateDict, prefix: str, *_: object) -> None:
    """Turn what a state dict has of these parameters into this rank's part of them, before it is loaded."""
    order = order_of(module)
    for name in names:
        if (value := state_dict.get(prefix + name)) is None:
            continue
        parameter = getattr(module, name)
        state_dict[prefix + name] = in_slot_order(value, parameter, order, prefix + name)
