"""What a model does otherwise once its experts are spread over ranks: it saves itself gathered, and refuses some calls.

Without that, what only whole experts can do ends in DTensor's own errors, deep inside a forward.
"""

import errno
import functools
import os
from typing import Any

import torch
from torch import nn

from ...errors import TransportError

__all__ = ["bind_to_spread", "refuse_adapted"]

FULL = (errno.ENOSPC, errno.EDQUOT)
MAX_NAMED = 8


def bind_to_spread(model: nn.Module, found: dict[str, nn.Module]) -> None:
    """Give every model of transformers in `model` its own save_pretrained and set_experts_implementation.

    The blocks around the experts check before each forward what can be changed without these.

    Args:
        found: the experts modules, spread already, by their names.
    """
    from torch.distributed.tensor import DTensor

    for module in model.modules():  # a model of transformers may stand inside another, or inside any module
        if hasattr(type(module), "save_pretrained") and any(isinstance(p, DTensor) for p in module.parameters()):
            own: Any = module
            own.save_pretrained = functools.partial(_save_gathered, module)
            if hasattr(type(module), "set_experts_implementation"):  # wrappers, as PEFT's, ask what they wrap
                own.set_experts_implementation = functools.partial(_set_experts_implementation, module)
    for name, experts in found.items():
        block_name, _, own_name = name.rpartition(".")
        if own_name:
            block = model.get_submodule(block_name)
            block.register_forward_pre_hook(functools.partial(_check_experts, name, own_name, experts))


def refuse_adapted(model: nn.Module, found: dict[str, nn.Module]) -> None:
    """Raise ValueError where PEFT adds to expert weights, with whole tensors that can't be added to spread ones."""
    for name in found:
        parts = name.split(".")
        for length in range(len(parts)):
            _check_not_adapted(name, model.get_submodule(".".join(parts[:length])))


def _check_not_adapted(name: str, owner: nn.Module) -> None:
    if type(owner).__name__ == "ParamWrapper":
        raise ValueError(
            f"PEFT adapts {name} itself (target_parameters), and what it adds is not spread over ranks: adapt "
            "other modules (target_modules), or merge_and_unload() the adapter before parallelize()"
        )


def _check_experts(name: str, own_name: str, experts: Any, block: nn.Module, _: Any) -> None:
    _check_not_adapted(name, getattr(block, own_name))
    _check_implementation(name, experts.config._experts_implementation)


def _check_implementation(name: str, implementation: str | None) -> None:
    from . import EXPERTS_IMPLEMENTATION

    if implementation != EXPERTS_IMPLEMENTATION:
        raise ValueError(
            f'the experts of {name} are spread over ranks, and only experts_implementation="{EXPERTS_IMPLEMENTATION}" '
            f"runs such experts, got {implementation!r}: leave it, or load the model again and don't parallelize() it"
        )


def _set_experts_implementation(model: Any, experts_implementation: str | dict[str, str]) -> None:
    """Do what transformers' does, after raising ValueError for an implementation that needs all experts here."""
    by_config = experts_implementation if isinstance(experts_implementation, dict) else {"": experts_implementation}
    for implementation in by_config.values():
        _check_implementation(type(model).__name__, implementation)
    type(model).set_experts_implementation(model, experts_implementation)


def _save_gathered(model: Any, save_directory: Any, **settings: Any) -> None:
    """Save with every DTensor gathered: all ranks call, the first one writes, all raise where it could not."""
    from torch.distributed.tensor import DTensor, Partial

    # Trainer's checkpoints, on one rank: with is_main_process, before transformers 5.24 with state_dict=None.
    if "is_main_process" in settings or settings.get("state_dict", settings) is None:
        raise ValueError(
            "save_pretrained gathers the experts, so every rank must call it, and this is how Trainer saves "
            'checkpoints on one rank: give Trainer save_strategy="no", then call model.save_pretrained(directory) on '
            "every rank, and torch.distributed.checkpoint for what a training goes on from"
        )
    state_dict = settings.pop("state_dict", None) or model.state_dict()
    gathered = {
        name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in state_dict.items()
    }
    # FSDP2 spreads parameters over more ranks than the experts alone.
    meshes = [parameter.device_mesh for parameter in model.parameters() if isinstance(parameter, DTensor)]
    everybody = max(meshes, key=lambda mesh: mesh.size())
    error: Exception | None = None
    if everybody.get_rank() == int(everybody.mesh.min()):
        try:
            _save(model, save_directory, gathered, settings)
        except Exception as caught:
            error = caught
    failed = torch.tensor(int(error is not None), device=everybody.device_type)
    # also a barrier: nobody reads a half-written directory
    num_failed = DTensor.from_local(failed, everybody, [Partial()] * everybody.ndim).full_tensor()
    if error is not None:
        raise error
    if num_failed.item():
        raise TransportError(f"the first rank could not save to {save_directory}: its own error says why")


def _save(model: Any, save_directory: Any, gathered: dict[str, Any], settings: dict[str, Any]) -> None:
    """Raises OSError, saying what is there now, where the disk is full."""
    from safetensors import SafetensorError

    try:
        type(model).save_pretrained(model, save_directory, state_dict=gathered, **settings)
    except (SafetensorError, OSError) as error:  # a disk that is full of weights is the first, and no OSError
        is_full = error.errno in FULL if isinstance(error, OSError) else any(os.strerror(n) in str(error) for n in FULL)
        if not is_full:
            raise
        size = sum(tensor.numel() * tensor.element_size() for tensor in gathered.values())
        there = sorted(os.listdir(save_directory)) if os.path.isdir(save_directory) else []
        more = f" and {len(there) - MAX_NAMED} more" if len(there) > MAX_NAMED else ""
        raise OSError(
            f"could not write the model's {size / 1e9:.2f} GB to {save_directory} ({error}). The directory holds "
            f"{', '.join(there[:MAX_NAMED]) or 'nothing'}{more}, which is not the whole model: make room, or choose a "
            "directory on another disk, and save again"
        ) from error
