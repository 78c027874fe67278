"""Sharded parameters under DistributedDataParallel, which leaves them alone, and FSDP2, which has to be told to."""

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from tritonmoe.transports.sharding.whole_states import refuse_pickling

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp._fully_shard._fsdp_common import DataParallelMeshInfo
    from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam, ParamModuleInfo
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

__all__ = [
    "ShardedNames",
    "explain_fully_shard",
    "ignore_sharded_parameters",
    "is_averaged_by_fsdp",
    "is_marked_mesh",
    "mark_mesh",
    "mark_own_buffers",
    "mark_sharded",
    "sharded_modules",
]

MARK = "_tritonmoe_sharded"
OWN_BUFFERS = "_tritonmoe_own_buffers"


class ShardedNames(NamedTuple):
    """What a module says of its own parameters that are other ones on every rank."""

    names: tuple[str, ...]
    members: tuple[int, ...] | None
    """The global ranks among which a gradient of one of them is averaged already; None where torch knows no ranks."""
    replicas: tuple[int, ...]
    """Those of them that hold copies of this rank's parameters."""
    averaged: tuple[str, ...] = ()
    """The parameters whose gradients FSDP2 averages over these replicas, among which it shards them."""


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


def mark_own_buffers(module: nn.Module, names: tuple[str, ...]) -> None:
    """Mark these buffers of the module itself as others on every rank, which are to stay so."""
    setattr(module, OWN_BUFFERS, names)
    ignore_sharded_parameters()


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

    original: Callable[..., None] = DistributedDataParallel.__init__
    if hasattr(original, MARK):
        return
    signature = inspect.signature(original)

    @functools.wraps(original)
    def init(self: DistributedDataParallel, *arguments: object, **keywords: object) -> None:
        given = signature.bind(self, *arguments, **keywords).arguments
        module = given["module"]
        _ignore(module, given.get("process_group"), given.get("device_mesh"))
        if not _averages_nothing(module):
            original(self, *arguments, **keywords)
            return
        original(self, *arguments, **keywords, **_nothing_to_average(module))
        self._lazy_init_ran = True  # what there would be to initialise is not made then

    setattr(init, MARK, True)
    DistributedDataParallel.__init__ = init  # type: ignore[method-assign]


def _averages_nothing(module: nn.Module) -> bool:
    """Say whether everything that is trained is other parameters on every rank, as adapters of experts alone are."""
    ignored = set(getattr(module, "_ddp_params_and_buffers_to_ignore", ()))
    trained = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    return bool(trained) and ignored.issuperset(trained)


def _nothing_to_average(module: nn.Module) -> dict[str, object]:
    """Give the arguments with which DistributedDataParallel takes a module of which it averages nothing.

    It refuses one, though Trainer wraps all, unless it is told of a parameter that somebody else lets it average: one
    here that no module has.
    """
    of_nobody = nn.Parameter(torch.zeros(1, device=next(module.parameters()).device))
    return {"delay_all_reduce_named_params": [("", of_nobody)], "param_to_hook_all_reduce": of_nobody}


def explain_fully_shard() -> None:
    """Let FSDP2 say the way out where it is given what it can't make right, and note what it averages, from now on.

    What it can't make right is marked parameters which are spread over its ranks already, and others over fewer ranks
    than these average. What it averages is marked parameters that it shards over their replicas.
    """
    from torch.distributed.fsdp._fully_shard import _fsdp_param, _fsdp_param_group

    _check_ranks_of_groups(_fsdp_param_group.FSDPParamGroup)
    original: Callable[..., None] = _fsdp_param.FSDPParam.__init__
    if hasattr(original, MARK):
        return

    @functools.wraps(original)
    def init(
        self: "FSDPParam", param: nn.Parameter, module_info: "ParamModuleInfo", *arguments: object, **keywords: object
    ) -> None:
        module, name = module_info.module, module_info.param_name
        marked: ShardedNames | None = module.__dict__.get(MARK)
        if marked is None or name not in marked.names:
            original(self, param, module_info, *arguments, **keywords)
            return
        try:
            original(self, param, module_info, *arguments, **keywords)
        except Exception as error:
            raise ValueError(
                f"fully_shard can't shard {name} of {type(module).__name__}, whose experts are spread over these ranks "
                "already: pass ignored_params=set(tritonmoe.expert_parameters(module)), or shard the module of the "
                "experts itself over their replicas"
            ) from error
        refuse_pickling(self.sharded_param.device_mesh)  # type: ignore[attr-defined]  # of both dimensions
        if set(self.mesh_info.mesh.mesh.flatten().tolist()) == set(marked.replicas):
            mark_sharded(module, marked._replace(averaged=(*marked.averaged, name)))

    setattr(init, MARK, True)
    _fsdp_param.FSDPParam.__init__ = init  # type: ignore[method-assign]


def _check_ranks_of_groups(group_class: "type[FSDPParamGroup]") -> None:
    """Let FSDP2's groups of parameters check their ranks when they are made, from now on."""
    original: Callable[..., None] = group_class.__init__
    if hasattr(original, MARK):
        return

    @functools.wraps(original)
    def init(
        self: "FSDPParamGroup",
        params: list[nn.Parameter],
        modules: tuple[nn.Module, ...],
        mesh_info: "DataParallelMeshInfo",
        *arguments: object,
        **keywords: object,
    ) -> None:
        _check_ranks(params, modules, mesh_info.mesh)
        original(self, params, modules, mesh_info, *arguments, **keywords)

    setattr(init, MARK, True)
    group_class.__init__ = init  # type: ignore[method-assign]


def _check_ranks(parameters: Iterable[nn.Parameter], modules: Iterable[nn.Module], mesh: "DeviceMesh") -> None:
    """Raise ValueError if FSDP2 would average dense parameters over other ranks than the experts beside them."""
    sharded = [found for module in modules for found in sharded_modules(module)]
    of_experts = {id(getattr(child, name)) for _, child, marked in sharded for name in marked.names}
    if all(id(parameter) in of_experts for parameter in parameters):
        return
    ranks = sorted(mesh.mesh.flatten().tolist())
    for _, child, marked in sharded:
        if marked.members is not None and sorted(marked.members) != ranks:
            raise ValueError(
                f"fully_shard averages over the ranks {ranks}, but gradients of the experts of {type(child).__name__} "
                f"are averaged over the ranks {sorted(marked.members)}, so the copies of dense parameters would drift "
                "apart: shard those over all of these ranks, and at most the experts alone over their replicas"
            )


def _ignore(module: nn.Module, group: "ProcessGroup | None", mesh: "DeviceMesh | None") -> None:
    """Name what is marked where DistributedDataParallel looks, after checking that it averages as experts do."""
    import torch.distributed as dist

    for name, parameter in module.named_parameters():
        if hasattr(getattr(getattr(parameter, "_st_info", None), "mesh", None), MARK):
            raise ValueError(
                f"torch.distributed's replicate() has made a plain tensor of {name}, of which every rank holds other "
                "experts, and would average them: use DistributedDataParallel"
            )
    ignored = []
    for prefix, child in module.named_modules():
        for name in child.__dict__.get(OWN_BUFFERS, ()):
            ignored.append(f"{prefix}.{name}".lstrip("."))
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
                parameter._ddp_ignored = True  # DistributedDataParallel's mixed precision asks for this mark
                # Both spellings: it joins a module's name and a parameter's with a dot, the name "" of itself too.
                ignored += [f"{prefix}.{name}", f"{prefix}.{name}".lstrip(".")]
    if ignored:
        module._ddp_params_and_buffers_to_ignore = [  # type: ignore[assignment]
            *getattr(module, "_ddp_params_and_buffers_to_ignore", ()),
            *ignored,
        ]
