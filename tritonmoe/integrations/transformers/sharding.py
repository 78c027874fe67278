"""parallelize(): spread the experts of a model over ranks; what its experts then need to know."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...expert_parallel import expert_parallel_mlp
from ...expert_parallel_run import check_expert_parallel
from ...overlap_config import OverlapConfig, check_overlap
from ...transports import Transport, as_transport
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
    transport: Transport
    overlap: OverlapConfig
    gradient_scale: float
    """What the gradients of expert weights, sums over the ranks' losses, are multiplied with."""

    def mlp(self, *arguments: Tensor, **settings: Any) -> Tensor:
        """Run expert_parallel_mlp over these ranks."""
        return expert_parallel_mlp(
            *arguments, num_experts=self.num_experts, transport=self.transport, overlap=self.overlap, **settings
        )

    def local_parameter(self, parameter: Any) -> Tensor:
        """Give this rank's experts of a DTensor parameter; differentiable."""
        from torch.distributed.tensor import DTensor

        # FSDP2's hooks hand over gathered parameters: a DTensor where the experts are spread besides, else a tensor.
        # Under torch.compile hasattr(parameter, "to_local") is False.
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        return local if self.gradient_scale == 1.0 else _ScaledGradient.apply(local, self.gradient_scale)


class _ScaledGradient(torch.autograd.Function):
    """The tensor itself; its gradient times a factor."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


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
    parameters alone: spread the experts over all of its ranks. FSDP2's fully_shard comes after this, over another axis
    for the experts or with them as `ignored_params`: docs/transformers.md.

    Args:
        group_or_mesh: a torch ProcessGroup or a DeviceMesh of one dimension.
        overlap: the chunks; the same on every rank. None is OverlapConfig().
        expert_gradients: "mean": as if averaged over the ranks, which goes with dense gradients that are; "sum": of
            the ranks' losses.
    Raises:
        ValueError: as patch(); the experts of a module can't be divided by the number of ranks, are spread already,
            share weights with another module, or are adapted by PEFT themselves; init_process_group was not called.
            Nothing is changed.
    """
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    if expert_gradients not in ("mean", "sum"):
        raise ValueError(f'expert_gradients must be "mean" or "sum", got {expert_gradients!r}')
    overlap = OverlapConfig() if overlap is None else overlap
    check_overlap(overlap)
    check_model(model)
    if isinstance(group_or_mesh, Transport) or getattr(group_or_mesh, "ndim", 1) != 1:
        raise TypeError(
            "the experts of a model are spread over a ProcessGroup or a DeviceMesh of one dimension, got "
            f"{group_or_mesh!r}"
        )
    if group_or_mesh is None and not torch.distributed.is_initialized():
        raise ValueError(
            "there are no ranks yet, and dist.group.WORLD is None: call torch.distributed.init_process_group() before "
            "parallelize()"
        )
    transport = as_transport(group_or_mesh)
    found: dict[str, Any] = experts_modules(model)
    for name, experts in found.items():
        if isinstance(experts.down_proj, DTensor) or expert_parallel_state(experts) is not None:
            raise ValueError(
                f"the experts of {name} are spread over ranks already: parallelize a model once, and before fully_shard"
            )
        num_experts = experts.down_proj.shape[0]
        check_expert_parallel(num_experts // transport.size, num_experts, transport.size)
    _refuse_tied(model, found)
    refuse_adapted(model, found)
    patch(model)
    mesh = group_or_mesh
    if not isinstance(mesh, DeviceMesh):
        mesh = DeviceMesh.from_group(group_or_mesh, next(model.parameters()).device.type)
    scale = 1 / transport.size if expert_gradients == "mean" else 1.0
    sharded = []
    for name, experts in found.items():
        num_experts = experts.down_proj.shape[0]
        for own_name, parameter in list(experts.named_parameters(recurse=False)):
            if parameter.shape[0] != num_experts:  # no stack of one per expert
                continue
            spread = distribute_tensor(parameter.detach(), mesh, [Shard(0)], src_data_rank=None)
            setattr(experts, own_name, nn.Parameter(spread, requires_grad=parameter.requires_grad))
            sharded.append(f"{name}.{own_name}")
        state = ExpertParallelState(num_experts, transport, overlap, scale)
        setattr(experts, STATE, state)
    attributes: Any = model
    attributes._ddp_params_and_buffers_to_ignore = [
        *getattr(model, "_ddp_params_and_buffers_to_ignore", ()),
        *sharded,
    ]
    bind_to_spread(model, found)
    return len(found)


def _refuse_tied(model: nn.Module, found: dict[str, nn.Module]) -> None:
    """Raise ValueError where an expert weight has a second name, which would keep the whole, unspread weight."""
    own = {f"{name}.{key}" for name, experts in found.items() for key, _ in experts.named_parameters(recurse=False)}
    names: dict[int, str] = {}
    every = (
        (f"{name}.{own_name}", parameter)
        for name, module in model.named_modules()
        for own_name, parameter in module.named_parameters(recurse=False)
    )
    for name, parameter in every:
        first = names.setdefault(id(parameter), name)
        if first != name and (name in own or first in own):
            raise ValueError(
                f"the expert weights {first} and {name} are tied, and spreading would part them: give every module "
                "weights of its own before parallelize()"
            )
