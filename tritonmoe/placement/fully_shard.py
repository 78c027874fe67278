"""FSDP2 beside sharded parameters: it says the way out where it can't be right, and what it averages is noted."""

import functools
import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, cast

from torch import nn

from tritonmoe.placement.expert_shards import ExpertShards, sharded_modules, shards_of, warn_of_sums
from tritonmoe.placement.marks import MARK
from tritonmoe.placement.whole_states import note_sharded_by_fsdp, refuse_pickling
from tritonmoe.runtime.wrappers import refuse_computed

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp._fully_shard._fsdp_common import DataParallelMeshInfo
    from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam, ParamModuleInfo
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
    from torch.distributed.tensor import DTensor

__all__ = ["explain_fully_shard"]

IS_TRUE = ("y", "yes", "t", "true", "on", "1")
ACCELERATE_SENDS_WEIGHTS = {"ACCELERATE_USE_FSDP": ("true",), "FSDP_CPU_RAM_EFFICIENT_LOADING": IS_TRUE}
"""What the environment says where Accelerate sends the first rank's weights, and which words it takes for true."""


def explain_fully_shard() -> None:
    """Make FSDP2 name the way out where it can't handle what it is given, and note what it averages, from now on.

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
        shards = shards_of(module)
        if shards is None or not shards.is_spread or name not in shards.names:
            original(self, param, module_info, *arguments, **keywords)
            note_sharded_by_fsdp(self)
            return
        try:
            original(self, param, module_info, *arguments, **keywords)
        except Exception as error:  # FSDP2 raises several kinds, by how the experts are spread
            raise ValueError(
                f"fully_shard can't shard {name} of {type(module).__name__}, whose experts are spread over these ranks "
                "already: pass ignored_params=set(tritonmoe.expert_parameters(module)) (Accelerate's plug-in: "
                "ignored_modules=r'.*\\.experts'), or shard the module of the experts itself over their replicas"
            ) from error
        refuse_pickling(cast("DTensor", self.sharded_param))  # over both dimensions
        replicas = shards.sharding.replicas
        if replicas is not None and set(self.mesh_info.mesh.mesh.flatten().tolist()) == set(replicas.mesh.tolist()):
            shards.averaged = (*shards.averaged, name)

    setattr(init, MARK, True)
    _fsdp_param.FSDPParam.__init__ = init  # type: ignore[method-assign]  # docs/patches.md


def _check_ranks_of_groups(group_class: "type[FSDPParamGroup]") -> None:
    """Make FSDP2's groups of parameters check their ranks when they are made, from now on."""
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
    group_class.__init__ = init  # type: ignore[method-assign]  # docs/patches.md


def _check_ranks(parameters: Iterable[nn.Parameter], modules: Iterable[nn.Module], mesh: "DeviceMesh") -> None:
    """Raise ValueError if FSDP2 would average dense parameters over other ranks than the experts beside them."""
    sharded = [found for module in modules for found in sharded_modules(module)]
    of_experts = {id(getattr(child, name)) for _, child, shards in sharded for name in shards.names}
    if all(id(parameter) in of_experts for parameter in parameters):
        return
    for name, child, shards in sharded:
        refuse_computed(name or type(child).__name__, child, shards.names, "fully_shard")
    _check_loading(sharded)
    ranks = sorted(mesh.mesh.flatten().tolist())
    for name, child, shards in sharded:
        warn_of_sums("fully_shard", name or type(child).__name__, shards)
        members = shards.sharding.members
        if members is not None and sorted(members) != ranks:
            raise ValueError(
                f"fully_shard averages over the ranks {ranks}, but gradients of the experts of {type(child).__name__} "
                f"are averaged over the ranks {sorted(members)}, so the copies of dense parameters would drift "
                "apart: shard those over all of these ranks, and at most the experts alone over their replicas"
            )


def _check_loading(sharded: list[tuple[str, nn.Module, ExpertShards]]) -> None:
    """Raise ValueError if Accelerate is about to send the first rank's weights to all ranks, experts too.

    It moves the model to the meta device before, and only its environment says why.
    """
    if any(os.environ.get(name, "").lower() not in words for name, words in ACCELERATE_SENDS_WEIGHTS.items()):
        return
    for name, child, shards in sharded:
        members = shards.sharding.members
        if members is None or len(members) == 1:
            continue
        if any(getattr(child, own).is_meta for own in shards.names if getattr(child, own) is not None):
            raise ValueError(
                f"Accelerate's cpu_ram_efficient_loading sends the first rank's weights to all ranks, and the experts "
                f"of {name or type(child).__name__} are spread, other ones on each of the ranks "
                f"{sorted(members)}: take FullyShardedDataParallelPlugin(cpu_ram_efficient_loading=False) "
                "(fsdp_cpu_ram_efficient_loading: false in a file of `accelerate config`), with the same weights on "
                "every rank before parallelize()"
            )
