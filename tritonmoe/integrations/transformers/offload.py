"""offload_experts(): frozen experts of a transformers model stay in files or host memory, where calls read them."""

import importlib
import os
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tritonmoe.integrations.transformers.discovery import ExpertsModule, experts_modules
from tritonmoe.integrations.transformers.experts import PRECISION, weights_of
from tritonmoe.integrations.transformers.packed.packed_experts import (
    is_packed_experts,
    up_name,
    weight_names,
)
from tritonmoe.integrations.transformers.registration import check_patchable, patch
from tritonmoe.integrations.transformers.requirements import check_model
from tritonmoe.layer import GroupedExperts
from tritonmoe.layer.offloading import OF_WEIGHTS, grouped_experts_to_offload
from tritonmoe.placement.expert_shards import shards_of
from tritonmoe.placement.offloaded import (
    ExpertsToOffload,
    Offload,
    check_offloadable,
    check_to,
    offload_modules,
    offloaded_of,
)

__all__ = ["offload_experts"]


def offload_experts(model: nn.Module, to: str | os.PathLike[str], *, resident_bytes: int = 0) -> Offload:
    """Move the experts of a MoE model into files or host memory, and freeze them; it then runs through tritonmoe.

    As tritonmoe.offload_experts(), for models of transformers and for layers of tritonmoe in them. Adapters of PEFT
    (LoraConfig(target_parameters=...)) may be put on the experts before or after; they train, and generate() runs.

    Experts that from_pretrained(device_map=...) has left on the disk are taken from there, one module at a time, so
    that the model never is in memory whole.

    Args:
        to, resident_bytes: as in tritonmoe.offload_experts().
    Raises:
        ValueError, TypeError, ImportError: as patch(); the experts can't be offloaded. OSError, MemoryError: a file
            can't be written, or host memory can't be pinned. Nothing is changed then.
    """
    check_model(model)
    path = check_to(to, resident_bytes)
    of_transformers = experts_modules(model)
    layers = {name: child for name, child in model.named_modules() if isinstance(child, GroupedExperts)}
    if not of_transformers and not layers:
        patch(model)  # it says what is missing
    for name, experts in of_transformers.items():
        _check(name, experts)
    if of_transformers:
        check_patchable(model, of_transformers)
    found = grouped_experts_to_offload(layers)
    found |= {name: _to_offload(experts) for name, experts in of_transformers.items()}
    check_offloadable(found)
    if of_transformers:
        patch(model)
    done = offload_modules(found, path, resident_bytes)
    for experts in of_transformers.values():
        if hasattr(experts, "_hf_hook"):  # it would bring back the parameters that are gone
            importlib.import_module("accelerate.hooks").remove_hook_from_module(experts)
    from transformers import PreTrainedModel

    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.__dict__["save_pretrained"] = _refuse_save
    return done


def _refuse_save(*_: object, **__: object) -> None:
    """Stand in the place of a model's save_pretrained."""
    raise ValueError(
        "the experts of this model stay elsewhere since offload_experts(), and a checkpoint would have none: save the "
        "adapters (of a PEFT model, save_pretrained), or torch.save(model.state_dict()) for all that is left to train"
    )


def _check(name: str, experts: ExpertsModule) -> None:
    where = name or "the module"
    if (record := offloaded_of(experts)) is not None:
        raise ValueError(f"the experts of {where} stay in {record.place} already: call offload_experts() once")
    if getattr(experts, PRECISION, None) is not None:
        raise ValueError(
            f"{getattr(experts, PRECISION)} of {where} is for experts that train, and offloaded ones are frozen: call "
            "set_expert_precision(model, None) first"
        )
    for weight in (up_name(experts), "down_proj"):
        if weight in getattr(experts, "parametrizations", {}):
            raise ValueError(
                f"{weight} of {where} is computed from other parameters (bitsandbytes, a parametrization): load the "
                "model in bf16 and call quantize_experts() before offload_experts()"
            )


@torch.no_grad()
def _to_offload(experts: ExpertsModule) -> ExpertsToOffload:
    names = tuple(name for name in weight_names(experts) if not name.endswith("_bias"))
    on_disk = _disk_of(experts)
    if on_disk is not None:
        own = {"gate_up_proj": up_name(experts), "down_proj": "down_proj"}
        swapped = bool(getattr(experts, "is_transposed", False))
        return ExpertsToOffload(
            experts, lambda: {key: on_disk[name] for key, name in own.items()}, names, swapped, True
        )
    dtype = torch.bfloat16 if is_packed_experts(experts) else experts.get_parameter(up_name(experts)).dtype
    weights, is_transposed = weights_of(experts, dtype, shards_of(experts))
    found = {key: weight for key, weight in weights._asdict().items() if key in OF_WEIGHTS and weight is not None}
    return ExpertsToOffload(experts, lambda: found, names, is_transposed)


def _disk_of(experts: ExpertsModule) -> Mapping[str, Tensor] | None:
    """Return where accelerate keeps the weights of a module that from_pretrained(device_map) has left on a disk."""
    found = getattr(getattr(experts, "_hf_hook", None), "weights_map", None)
    is_meta = experts.get_parameter("down_proj").is_meta if "down_proj" in experts._parameters else False
    return found if is_meta and not is_packed_experts(experts) else None
