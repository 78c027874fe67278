"""Sharded parameters under DistributedDataParallel, which leaves them alone, and FSDP2, which has to be told to."""

import functools
import inspect
import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

from tritonmoe.transports import EXPERT

__all__ = ["ShardedNames", "explain_fully_shard", "ignore_sharded_parameters", "mark_sharded", "sharded_modules"]

logger = logging.getLogger("tritonmoe")

MARK = "_tritonmoe_sharded"

_known_members: set[tuple[int, ...]] = set()
"""Of all modules that were marked."""


class ShardedNames(NamedTuple):
    """What a module says of its own parameters that are other ones on every rank."""

    names: tuple[str, ...]
    members: tuple[int, ...] | None
    """The global ranks among which a gradient of one of them is averaged already; None where torch knows no ranks."""


def mark_sharded(module: nn.Module, names: tuple[str, ...], members: tuple[int, ...] | None) -> None:
    """Say that these parameters of the module itself are other ones on every rank."""
    setattr(module, MARK, ShardedNames(names, members))
    if members is not None:
        _known_members.add(members)


def sharded_modules(module: nn.Module) -> Iterator[tuple[str, nn.Module, ShardedNames]]:
    """Give every module inside `module` that was marked, by name, `module` itself included."""
    for name, child in module.named_modules():
        marked = child.__dict__.get(MARK)
        if marked is not None:
            yield name, child, marked


def ignore_sharded_parameters() -> None:
    """Let DistributedDataParallel neither broadcast nor average parameters that are marked, from now on.

    It reads the names to ignore from the module that it is given, which knows nothing of marks inside it.
    """
    from torch.nn.parallel import DistributedDataParallel

    original: Any = DistributedDataParallel.__init__
    if hasattr(original, MARK):
        return
    signature = inspect.signature(original)

    @functools.wraps(original)
    def init(self: Any, *arguments: Any, **keywords: Any) -> None:
        given = signature.bind(self, *arguments, **keywords).arguments
        _ignore(given["module"], given.get("process_group"), given.get("device_mesh"))
        original(self, *arguments, **keywords)

    setattr(init, MARK, True)
    DistributedDataParallel.__init__ = init  # type: ignore[method-assign]


def explain_fully_shard() -> None:
    """Let FSDP2 say the way out where it is given marked parameters that it can't shard, from now on."""
    from torch.distributed.fsdp._fully_shard import _fsdp_param

    original: Any = _fsdp_param.FSDPParam.__init__
    if hasattr(original, MARK):
        return

    @functools.wraps(original)
    def init(self: Any, param: Any, module_info: Any, *arguments: Any, **keywords: Any) -> None:
        try:
            original(self, param, module_info, *arguments, **keywords)
        except Exception as error:
            marked = module_info.module.__dict__.get(MARK)
            if marked is None or module_info.param_name not in marked.names:
                raise
            raise ValueError(
                f"fully_shard can't shard {module_info.param_name} of {type(module_info.module).__name__}, whose "
                "experts are spread over these ranks already: pass "
                "ignored_params=set(tritonmoe.expert_parameters(module)), or shard the module of the experts itself "
                "over their replicas"
            ) from error
        _warn_of_fewer_ranks(param, self.mesh_info.mesh, module_info)

    setattr(init, MARK, True)
    _fsdp_param.FSDPParam.__init__ = init  # type: ignore[method-assign]


def _warn_of_fewer_ranks(param: Any, mesh: Any, module_info: Any) -> None:
    """Log once where FSDP2 averages a dense parameter over a part of the ranks over which experts are averaged."""
    ranks = set(mesh.mesh.flatten().tolist())
    if hasattr(param, "device_mesh") or MARK in module_info.module.__dict__:
        return
    for members in [members for members in _known_members if ranks < set(members)]:
        _known_members.discard(members)
        logger.warning(
            "fully_shard averages the gradient of %s of %s over the ranks %s, but experts' gradients are averaged over "
            "the ranks %s: where both are of one model that every rank runs on tokens of its own, pass a mesh of all "
            "of these ranks, or dense parameters drift apart",
            module_info.param_name,
            type(module_info.module).__name__,
            sorted(ranks),
            sorted(members),
        )


def _ignore(module: Any, group: Any, mesh: Any) -> None:
    """Name the marked parameters where DistributedDataParallel looks, after checking that it averages as they do."""
    import torch.distributed as dist

    for name, parameter in module.named_parameters():
        names = getattr(getattr(getattr(parameter, "_st_info", None), "mesh", None), "mesh_dim_names", None)
        if EXPERT in (names or ()):
            raise ValueError(
                f"torch.distributed's replicate() has made a plain tensor of {name}, of which every rank holds other "
                "experts, and would average them: use DistributedDataParallel"
            )
    ignored = []
    for prefix, child, marked in sharded_modules(module):
        if marked.members is None:
            raise ValueError(
                f"the experts of {prefix or type(child).__name__} are spread over ranks that torch.distributed does "
                "not know, and DistributedDataParallel would mix the experts of its ranks: make the layer with a "
                "ProcessGroup or a DeviceMesh"
            )
        ranks = dist.get_process_group_ranks(mesh.get_group() if mesh is not None else group)
        if set(ranks) != set(marked.members):
            raise ValueError(
                f"DistributedDataParallel averages over the ranks {sorted(ranks)}, but gradients of the experts of "
                f"{prefix or type(child).__name__} are averaged over the ranks {sorted(marked.members)}: spread them "
                'over the same ranks, with a DeviceMesh of the dimensions "replica" and "expert" where each expert '
                "has copies"
            )
        for name in marked.names:
            parameter = getattr(child, name)
            if parameter is not None:
                parameter._ddp_ignored = True  # what its mixed precision asks
                # Both spellings: it joins a module's name and a parameter's with a dot, the name "" of itself too.
                ignored += [f"{prefix}.{name}", f"{prefix}.{name}".lstrip(".")]
    if ignored:
        module._ddp_params_and_buffers_to_ignore = [
            *getattr(module, "_ddp_params_and_buffers_to_ignore", ()),
            *ignored,
        ]
