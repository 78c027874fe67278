"""parallelize(): spread the experts of any module over ranks; expert_parameters(): which parameters those are."""

from collections.abc import Iterable
from typing import Any, Literal

from torch import nn

from .expert_parallel_run import check_expert_parallel
from .layer import GroupedExperts, MoELayer
from .overlap_config import OverlapConfig, OverlapPlan, check_overlap
from .placement import ExpertPlacement
from .transports import as_transport
from .transports.data_parallel import refuse_wrapped, sharded_modules
from .transports.sharding import check_expert_gradients, check_same_weights, find_sharding

__all__ = ["expert_parameters", "parallelize", "refuse_tied", "routed_experts"]


def parallelize(
    module: nn.Module,
    group_or_mesh: Any,
    overlap: OverlapConfig | OverlapPlan | None = None,
    *,
    placement: ExpertPlacement | None = None,
    expert_gradients: Literal["mean", "sum"] = "mean",
) -> int:
    """Spread the experts of every MoELayer and GroupedExperts in `module` over ranks, in place; give their number.

    Every rank calls it with the same weights, and then runs its own batch through the whole module, its own experts
    and, by overlapped exchanges, those of the others. All ranks make the same calls, forward and backward; batches may
    differ in size. Every expert parameter becomes a DTensor, Shard(0) over the dimension "expert", its name and shape
    unchanged: make the optimizer afterwards. DistributedDataParallel around it, or around any module that holds it,
    leaves these parameters alone; fully_shard is told to, by `ignored_params=set(expert_parameters(module))`.
    Optimizers, torch.nn.utils.clip_grad_norm_, GradScaler and torch.distributed.checkpoint take the module as it is.

    Args:
        group_or_mesh: a ProcessGroup or DeviceMesh of all ranks, or a DeviceMesh of a dimension "expert" and one of
            replicas, or what else MoELayer takes as its transport.
        overlap, placement, expert_gradients: as in MoELayer; the same on every rank.
    Raises:
        ValueError: there are no such experts, they are spread already, can't be divided by the ranks, share weights
            with another module, or have other values on another rank. Nothing is changed then.
        TypeError: `group_or_mesh` is none.
    Example:
        E=8 experts of (8, 2F, D) on a mesh of 4 ranks: parameters of global shape (8, 2F, D), two experts on each rank.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    found = routed_experts(module)
    if not found:
        raise ValueError(
            f"{type(module).__name__} has neither MoELayer nor GroupedExperts, so there is nothing to spread: for a "
            "model of transformers it is tritonmoe.integrations.transformers.parallelize"
        )
    check_overlap(OverlapConfig() if overlap is None else overlap)
    check_expert_gradients(expert_gradients)
    transport = as_transport(group_or_mesh)
    size = transport.size
    for name, experts in found.items():
        if experts.transport is not None:
            raise ValueError(f"the experts of {name or 'the module'} are spread over ranks already: parallelize once")
        num_experts = experts.config.num_experts
        num_local = num_experts // size if placement is None else placement.num_slots
        check_expert_parallel(num_local, num_experts, size, placement)
    refuse_wrapped(module, found.values())
    refuse_tied(module, found)
    device = next(iter(found.values())).gate_up_proj.device
    check_same_weights(module, found, find_sharding(group_or_mesh, transport, device))
    for experts in found.values():
        experts.spread_over(group_or_mesh, overlap, placement=placement, expert_gradients=expert_gradients)
    for layer in module.modules():
        if isinstance(layer, MoELayer) and layer.router.reduce_load is None:
            layer.router.reduce_load = layer.experts.sum_over_ranks
    return len(found)


def expert_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Give the parameters in `module` that are other ones on every rank: experts that are spread over ranks.

    What is done to dense parameters on all ranks alike (a broadcast, an average, sharding by FSDP2) leaves these alone.
    """
    found = [getattr(child, name) for _, child, sharded in sharded_modules(module) for name in sharded.names]
    return list({id(parameter): parameter for parameter in found if parameter is not None}.values())


def routed_experts(module: nn.Module) -> dict[str, GroupedExperts]:
    """Give the experts in `module` that tokens are routed to, by name: none that stand beside them for every token."""
    beside = {
        id(layer.shared_expert) for layer in module.modules() if isinstance(layer, MoELayer) and layer.shared_expert
    }
    return {
        name: child
        for name, child in module.named_modules()
        if isinstance(child, GroupedExperts) and id(child) not in beside
    }


def refuse_tied(module: nn.Module, found: "dict[str, Any]") -> None:
    """Raise ValueError where an expert weight has a second name, which would keep the whole, unspread weight."""
    own = {f"{name}.{key}" for name, experts in found.items() for key, _ in experts.named_parameters(recurse=False)}
    names: dict[int, str] = {}
    every: Iterable[tuple[str, nn.Parameter]] = (
        (f"{name}.{own_name}", parameter)
        for name, child in module.named_modules()
        for own_name, parameter in child.named_parameters(recurse=False)
    )
    for name, parameter in every:
        first = names.setdefault(id(parameter), name)
        if first != name and (name in own or first in own):
            raise ValueError(
                f"the expert weights {first} and {name} are tied, and spreading would part them: give every module "
                "weights of its own before parallelize()"
            )
