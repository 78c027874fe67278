"""offload_experts(): the frozen experts of layers stay in files or in host memory, where their calls read them."""

import os
from collections.abc import Mapping

import torch
from torch import nn

from tritonmoe.experts.packed_parameters import as_values
from tritonmoe.experts.parameters import PARAMETERS
from tritonmoe.layer.grouped_experts import GroupedExperts
from tritonmoe.placement.offloaded import (
    ExpertsToOffload,
    Offload,
    check_offloadable,
    check_to,
    offload_modules,
    offloaded_of,
)
from tritonmoe.runtime.wrappers import refuse_computed

__all__ = ["grouped_experts_to_offload", "offload_experts"]

OF_WEIGHTS = ("gate_up_proj", "down_proj", "gate_up_scales", "down_scales")
"""What goes into a file, by PerWeight's names; biases are small, and stay."""


def offload_experts(module: nn.Module, to: str | os.PathLike[str], *, resident_bytes: int = 0) -> Offload:
    """Move the experts of every MoELayer and GroupedExperts in `module` into files or host memory, and freeze them.

    Every call then reads the experts that have tokens, the next ones while it multiplies by the present ones, forward
    and backward, and gives the bits that the torch backend gives with experts in memory. It computes where the rows
    are, on a CPU or on a GPU (CUDA, ROCm); a model may be moved to one afterwards, so that its experts never are there
    as a whole. What else is in the module trains as before: routers, biases, adapters (`ExpertAdapters`), and what
    comes before the layer. The weights are no parameters any more: state_dict(), optimizers, DDP and FSDP2 see what is
    left. Call it after load_state_dict(), quantize_experts() and parallelize(); with expert parallelism every rank
    calls it, and reads its own experts.

    Args:
        to: "cpu", for pinned host memory, from which a GPU copies them; or a folder, for one file of each module
            (safetensors), which must stay as they are: existing ones are replaced.
        resident_bytes: how much of the experts stays in the memory of the device that computes, from call to call,
            those that are used most. Beside it there is memory for two groups, each of one expert more than there are
            threads that compute; a GPU has one.
    Returns:
        What was done and, whenever it is printed, what reading has cost since.
    Raises:
        ValueError, TypeError: there are no such experts, or they can't be offloaded. OSError, MemoryError: a file can't
            be written, or host memory can't be pinned. Nothing is changed then. Calls raise OffloadError where a file
            can't be read, or has changed.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    path = check_to(to, resident_bytes)
    found = grouped_experts_to_offload(
        {name: child for name, child in module.named_modules() if isinstance(child, GroupedExperts)}
    )
    if not found:
        raise ValueError(
            f"{type(module).__name__} has neither MoELayer nor GroupedExperts, so there are no experts to offload: for "
            "a model of transformers call tritonmoe.integrations.transformers.offload_experts"
        )
    check_offloadable(found)
    return offload_modules(found, path, resident_bytes)


def grouped_experts_to_offload(modules: Mapping[str, GroupedExperts]) -> dict[str, ExpertsToOffload]:
    """Return the weights of these modules, as their calls take them.

    Raises:
        ValueError: a module can't give up its weights.
    """
    return {name: _to_offload(name or "the module", experts) for name, experts in modules.items()}


@torch.no_grad()
def _to_offload(name: str, experts: GroupedExperts) -> ExpertsToOffload:
    if (record := offloaded_of(experts)) is not None:
        raise ValueError(f"the experts of {name} stay in {record.place} already: call offload_experts() once")
    refuse_computed(name, experts, PARAMETERS, "offload_experts()")
    if experts.spec.precision is not None:
        raise ValueError(
            f"{experts.spec.precision} of {name} is for experts that train, and offloaded ones are frozen: make the "
            "layer without expert_precision"
        )
    if experts.spec.backend not in ("auto", "torch"):
        raise ValueError(
            f"offloaded experts are computed by the backend 'torch', and {name} has {experts.spec.backend!r}"
        )
    if experts.gate_up_proj.is_meta:
        raise ValueError(f"the experts of {name} are on the meta device, and have no values yet: load them first")
    weights = as_values(experts, experts.config.weight_format, experts._local_weights())
    found = {key: weight for key, weight in weights._asdict().items() if key in OF_WEIGHTS and weight is not None}
    names = tuple(own for own in PARAMETERS if getattr(experts, own) is not None and not own.endswith("_bias"))
    return ExpertsToOffload(experts, lambda: found, names, experts.config.transposed)
