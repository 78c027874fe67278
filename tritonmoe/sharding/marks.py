"""Marks of modules whose parameters or buffers are other ones on every rank, and of the meshes that they lie on."""

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakSet

import torch
from torch import nn

from tritonmoe.sharding.placed_rows import ExpertsOfRank

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = [
    "MARK",
    "OWN_BUFFERS",
    "STATE",
    "ShardedNames",
    "is_averaged_by_fsdp",
    "is_marked_mesh",
    "mark_mesh",
    "mark_sharded",
    "own_buffers",
    "sharded_modules",
    "warn_of_sums",
]

log = logging.getLogger("tritonmoe")

MARK = "_tritonmoe_sharded"
OWN_BUFFERS = "_tritonmoe_own_buffers"
STATE = "_tritonmoe_expert_parallel"
"""The attribute of an experts module that an integration has spread: what it left there, with the module's placement.
"""
_warned_of: "WeakSet[nn.Module]" = WeakSet()


class ShardedNames(NamedTuple):
    """What a module says of its own parameters that are other ones on every rank."""

    names: tuple[str, ...]
    members: tuple[int, ...] | None
    """The global ranks among which a gradient of one of them is averaged already; None where torch knows no ranks."""
    replicas: tuple[int, ...]
    """Those of them that hold copies of this rank's parameters."""
    averaged: tuple[str, ...] = ()
    """The parameters whose gradients FSDP2 averages over these replicas, among which it shards them."""
    is_summed: bool = False
    """Whether their gradients stay sums over the ranks, where dense ones are averaged."""
    experts_of_rank: ExpertsOfRank | None = None
    """The expert in each slot of each rank, where state dicts would show them in another order than they should.

    That is the order of the model. Where torch knows no ranks, each rank's own state dicts have the order of `home`.
    """
    home: ExpertsOfRank | None = None
    """The expert in each slot of each rank as the module was made, where torch knows no ranks; None is the model's."""


def mark_sharded(module: nn.Module, marked: ShardedNames) -> None:
    """Mark these parameters of the module itself as others on every rank."""
    setattr(module, MARK, marked)


def is_averaged_by_fsdp(module: nn.Module, parameter: torch.Tensor) -> bool:
    """Say whether FSDP2 averages the gradient of this parameter of the module itself over its replicas."""
    marked = module.__dict__.get(MARK)
    return marked is not None and any(getattr(module, name) is parameter for name in marked.averaged)


def mark_mesh(mesh: "DeviceMesh") -> None:
    """Mark a mesh as one over which experts are spread; it need not be named for them."""
    setattr(mesh, MARK, True)


def is_marked_mesh(mesh: "DeviceMesh") -> bool:
    """Say whether experts are spread over this mesh."""
    return hasattr(mesh, MARK)


def own_buffers(module: nn.Module) -> list[str]:
    """Return the names of what mark_own_buffers() has marked inside `module`."""
    marked = [
        (prefix, name) for prefix, child in module.named_modules() for name in child.__dict__.get(OWN_BUFFERS, ())
    ]
    return [f"{prefix}.{name}".lstrip(".") for prefix, name in marked]


def sharded_modules(module: nn.Module) -> Iterator[tuple[str, nn.Module, ShardedNames]]:
    """Return every module inside `module` that was marked, by name, `module` itself included."""
    for name, child in module.named_modules():
        marked = child.__dict__.get(MARK)
        if marked is not None:
            yield name, child, marked


def warn_of_sums(averages: str, name: str, marked: ShardedNames, child: nn.Module) -> None:
    """Say once of a module that gradients of its experts are sums beside averaged ones."""
    if marked.is_summed and marked.members is not None and len(marked.members) > 1 and child not in _warned_of:
        _warned_of.add(child)
        number = len(marked.members)
        log.warning(
            "%s averages dense gradients over %d ranks, and those of the experts of %s stay sums over them "
            '(expert_gradients="sum"), %d times as large: take expert_gradients="mean", or divide them by %d yourself '
            "before each step, or let a communication hook sum the dense ones",
            averages,
            number,
            name,
            number,
            number,
        )
