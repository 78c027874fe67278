"""What changes in a model whose experts are spread over ranks: how it saves itself, and what it refuses.

Without that, what only whole experts can do ends in DTensor's own errors, deep inside a forward.
"""

import errno
import functools
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from tritonmoe.errors import CountMismatch, TransportError
from tritonmoe.expert_parallel.state import abort_call
from tritonmoe.experts.adapters import check_hands_over
from tritonmoe.integrations.torch_distributed.parallelize import expert_parameters
from tritonmoe.integrations.transformers.discovery import ExpertsModule
from tritonmoe.integrations.transformers.generation import announce_forwards, patch_generate
from tritonmoe.integrations.transformers.requirements import EXPERTS_IMPLEMENTATION, check_forward
from tritonmoe.placement.expert_shards import sharded_modules, shards_of
from tritonmoe.placement.placed_states import StateDict
from tritonmoe.placement.watched_collectives import full_tensor
from tritonmoe.placement.whole_states import name_in_state, whole, whole_forms
from tritonmoe.transports import Transport
from tritonmoe.transports.torch_groups import own_group

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedModel

__all__ = [
    "STATE_TO_SAVE",
    "bind_to_spread",
    "everybody_of",
    "gathered_state",
    "meet",
    "on_first_rank",
    "refuse_to_meet",
    "save_adapters",
    "saves_adapters",
]

FULL = (errno.ENOSPC, errno.EDQUOT)
MAX_NAMED = 8
STATE_TO_SAVE = "_tritonmoe_state_to_save"
"""The attribute of a model that holds, while it is saved, the state dict that save_pretrained was given."""


def bind_to_spread(model: nn.Module, found: Mapping[str, ExpertsModule]) -> None:
    """Replace save_pretrained and set_experts_implementation of every model of transformers in `model`.

    Its generate() keeps step with the other ranks. The blocks around the experts check before each forward what can be
    changed without these methods.

    Args:
        found: the experts modules, spread already, by their names.
    """
    from torch.distributed.tensor import DTensor

    for own in model.modules():  # a model of transformers may stand inside another, or inside any module
        if hasattr(type(own), "save_pretrained") and any(isinstance(p, DTensor) for p in own.parameters()):
            # a model upcycled in place has a way of its own
            save = own.__dict__.get("save_pretrained", functools.partial(_save_as_its_class, own))
            own.__dict__["save_pretrained"] = functools.partial(_save_gathered, own, save)
            if hasattr(type(own), "set_experts_implementation"):  # wrappers, as PEFT's, ask what they wrap
                own.__dict__["set_experts_implementation"] = functools.partial(_set_experts_implementation, own)
    patch_generate(model)
    announce_forwards(model)
    for name, experts in found.items():
        block_name, _, own_name = name.rpartition(".")
        if own_name:
            block = model.get_submodule(block_name)
            block.register_forward_pre_hook(functools.partial(_check_experts, name, own_name, experts))


def _check_experts(name: str, own_name: str, experts: ExpertsModule, block: nn.Module, _: object) -> None:
    wrapper = getattr(block, own_name)  # the experts, or PEFT's around them
    check_hands_over(name, wrapper)
    for module in (block, wrapper, experts):
        check_forward(name, module)
    _check_implementation(name, experts.config._experts_implementation)


def _check_implementation(name: str, implementation: str | None) -> None:
    if implementation != EXPERTS_IMPLEMENTATION:
        raise ValueError(
            f'the experts of {name} are spread over ranks, and only experts_implementation="{EXPERTS_IMPLEMENTATION}" '
            f"runs such experts, got {implementation!r}: leave the implementation as it is, or load the model again "
            "and don't call parallelize()"
        )


def _set_experts_implementation(model: nn.Module, experts_implementation: str | dict[str, str]) -> None:
    """Set the implementation as transformers does; raise ValueError for one that needs all experts on this rank."""
    by_config = experts_implementation if isinstance(experts_implementation, dict) else {"": experts_implementation}
    for implementation in by_config.values():
        _check_implementation(type(model).__name__, implementation)
    own = cast("PreTrainedModel", model)
    type(own).set_experts_implementation(own, experts_implementation)


def saves_adapters(model: nn.Module) -> bool:
    """Return whether what this model saves is adapters of PEFT, not itself."""
    is_wrapper = any(kind.__name__ == "PeftModel" for kind in type(model).__mro__)
    return is_wrapper or bool(getattr(model, "_hf_peft_config_loaded", False))


def gathered_state(model: nn.Module, state_dict: StateDict | None = None, *, keep: bool) -> StateDict:
    """Return what is to be saved with every DTensor gathered, on the CPU; every rank calls, without `keep` it gets {}.

    Args:
        state_dict: None is the model's. What saves adapters leaves out frozen experts.
    """
    forms = whole_forms(model)
    frozen = {name_in_state(name) for name, parameter in model.named_parameters() if not parameter.requires_grad}
    left_out = frozen - forms.keys() if saves_adapters(model) else set()
    gathered = {}
    for name, value in (model.state_dict() if state_dict is None else state_dict).items():
        if name in left_out and hasattr(value, "full_tensor"):
            continue
        value = whole(value, forms.get(name))
        if keep:
            gathered[name] = value
    return gathered


def on_first_rank(model: nn.Module, write: Callable[[], None], *, is_first: bool, where: str | os.PathLike) -> None:
    """Run `write` where `is_first`, and raise on every rank where it failed; every rank calls, and waits for it."""
    from torch.distributed.tensor import DTensor, Partial

    error: Exception | None = None
    if is_first:
        try:
            write()
        except Exception as caught:  # whatever it is, the other ranks wait for this one
            error = caught
    everybody = everybody_of(model)
    failed = torch.tensor(int(error is not None), device=everybody.device_type)
    # also a barrier: nobody reads a half-written directory
    everybodys = DTensor.from_local(failed, everybody, [Partial()] * everybody.ndim)
    num_failed = full_tensor(everybodys, "save_pretrained, until the first rank has written")
    if error is not None:
        raise error
    if num_failed.item():
        raise TransportError(f"the first rank could not save to {where}: its own error says why")


def everybody_of(model: nn.Module) -> "DeviceMesh":
    """Return the mesh of all ranks that hold the experts or copies of them, or dense shards."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

    # FSDP2 spreads parameters over more ranks than the experts alone.
    meshes = [parameter.device_mesh for parameter in model.parameters() if isinstance(parameter, DTensor)]
    largest = max(meshes, key=lambda mesh: mesh.size())
    num_members = len({rank for _, _, shards in sharded_modules(model) for rank in shards.sharding.members or ()})
    if num_members > largest.size() and num_members == dist.get_world_size():  # with copies, on a mesh of two axes
        return DeviceMesh.from_group(own_group(None), largest.device_type)
    return largest


def _save_gathered(
    model: nn.Module, save: Callable[..., None], save_directory: str | os.PathLike, **settings: object
) -> None:
    """Save with every DTensor gathered: all ranks call, the first one writes, all raise where it could not.

    A state dict of whole tensors is written by whoever calls, as `save`, the model's own way, does.
    """
    state_dict = cast("StateDict | None", settings.get("state_dict"))
    is_whole = state_dict and not any(hasattr(value, "full_tensor") for value in state_dict.values())
    is_dense = saves_adapters(model) and not any(p.requires_grad for p in expert_parameters(model))
    if is_whole or (is_dense and not whole_forms(model)):
        with _told(model, state_dict):
            _save(save, save_directory, settings)
        return
    # As one rank alone calls: with is_main_process, and Trainer before transformers 5.24 with state_dict=None.
    if state_dict is None and ("is_main_process" in settings or "state_dict" in settings):
        raise ValueError(
            "save_pretrained gathers the experts, so every rank must call it, and a call with is_main_process or "
            "state_dict=None may come from one rank alone: call model.save_pretrained(directory) on every rank, or "
            "trainer.save_model(directory), as Trainer's own checkpoints do"
        )
    meet(model, "save_pretrained")
    everybody = everybody_of(model)
    is_first = everybody.get_rank() == int(everybody.mesh.min())
    state = gathered_state(model, state_dict, keep=is_first)
    settings = {**settings, "state_dict": state, "is_main_process": True}
    with _told(model, state):
        on_first_rank(model, lambda: _save(save, save_directory, settings), is_first=is_first, where=save_directory)


@contextmanager
def _told(model: nn.Module, state_dict: StateDict | None) -> Iterator[None]:
    """Keep the state dict that save_pretrained was given where quantizers find it: transformers asks these for one."""
    outer = model.__dict__.get(STATE_TO_SAVE)  # of a PEFT model that was spread: its class's own save gathers too
    model.__dict__[STATE_TO_SAVE] = state_dict
    try:
        yield
    finally:
        model.__dict__[STATE_TO_SAVE] = outer


def meet(model: nn.Module, what: str) -> None:
    """Wait for the other ranks; unlike a gather, this fails at once where another rank calls a layer instead.

    Args:
        what: every rank has to call.
    Raises, on every rank:
        TransportError: not all of them do.
    """
    for transport in _transports(model):
        try:
            transport.barrier()
        except (CountMismatch, TransportError) as error:
            raise TransportError(
                f"{what} gathers weights that are spread over ranks, so every rank must call it, but some rank didn't, "
                "or raised in it: call it on every rank, not only on the first, and look for other ranks' errors"
            ) from error


def refuse_to_meet(model: nn.Module) -> None:
    """Make meet() fail on the other ranks; called by a rank that raises before its own meet()."""
    for transport in _transports(model):
        abort_call(transport)


def _transports(model: nn.Module) -> list[Transport]:
    return list(dict.fromkeys(shards.transport for module in model.modules() if (shards := shards_of(module))))


def save_adapters(
    save: Callable[..., None], model: nn.Module, save_directory: str | os.PathLike, **settings: object
) -> None:
    """Save a model of PEFT by `save`, its class's own method, with adapters gathered that are spread over ranks."""
    own = functools.partial(save, model)
    if whole_forms(model):
        _save_gathered(model, own, save_directory, **settings)
    else:
        own(save_directory, **settings)


def _save_as_its_class(model: nn.Module, save_directory: str | os.PathLike, **settings: object) -> None:
    save: Callable[..., None] = cast("type[PreTrainedModel]", type(model)).save_pretrained
    save(model, save_directory, **settings)


def _save(save: Callable[..., None], save_directory: str | os.PathLike, settings: dict[str, object]) -> None:
    """Call `save`; where the disk is full, raise OSError that says what is there now."""
    from safetensors import SafetensorError

    try:
        save(save_directory, **settings)
    except (SafetensorError, OSError) as error:  # a disk that is full of weights is the first, and no OSError
        is_full = error.errno in FULL if isinstance(error, OSError) else any(os.strerror(n) in str(error) for n in FULL)
        if not is_full:
            raise
        tensors = cast(StateDict, settings.get("state_dict") or {}).values()
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        there = sorted(os.listdir(save_directory)) if os.path.isdir(save_directory) else []
        more = f" and {len(there) - MAX_NAMED} more" if len(there) > MAX_NAMED else ""
        raise OSError(
            f"could not write the model's {size / 1e9:.2f} GB to {save_directory} ({error}). The directory holds "
            f"{', '.join(there[:MAX_NAMED]) or 'nothing'}{more}, which is not the whole model: make room, or choose a "
            "directory on another disk, and save again"
        ) from error
