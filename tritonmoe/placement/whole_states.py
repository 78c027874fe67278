"""State dicts of spread parameters: no file of one rank's part, and whole tensors where every rank asks."""

import functools
import sys
import weakref
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tritonmoe.placement.expert_shards import no_pickle
from tritonmoe.placement.placed_rows import ExpertsOfRank, placed_rows_of
from tritonmoe.placement.placed_states import StateDict, part_of, shown_state, states_of
from tritonmoe.placement.watched_collectives import full_tensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
    from torch.distributed.tensor import DTensor

__all__ = [
    "gather_optimizer",
    "give_whole_as",
    "name_in_state",
    "note_sharded_by_fsdp",
    "refuse_pickling",
    "whole",
    "whole_forms",
]

MARK = "_tritonmoe_refused_meshes"
FORM = "_tritonmoe_whole_form"


def refuse_pickling(spread: "DTensor") -> None:
    """Make pickle, and so torch.save, reject this DTensor over several ranks and tensors derived from it, from now on.

    A pickled DTensor holds one rank's part, and on the rank that reads it claims to be that rank's.
    """
    from torch.distributed.tensor import DTensor

    if not hasattr(DTensor, MARK):
        original: Callable = DTensor.__reduce_ex__
        refused: dict[DeviceMesh, set[torch.Size]] = {}

        @functools.wraps(original)
        def reduce(tensor: Tensor, protocol: object) -> str | tuple[object, ...]:
            assert isinstance(tensor, DTensor)
            shapes = refused.get(tensor.device_mesh)
            is_placed = placed_rows_of(tensor) is not None and tensor.device_mesh.size() > 1
            is_spread = is_placed or (shapes and _is_made_of(tensor, shapes))
            if is_spread and not _is_sent_to_checkpointer():
                raise no_pickle(tensor.device_mesh.size())
            return original(tensor, protocol)

        setattr(DTensor, MARK, refused)
        DTensor.__reduce_ex__ = reduce  # type: ignore[method-assign]  # docs/patches.md
    if spread.device_mesh.size() > 1:
        getattr(DTensor, MARK).setdefault(spread.device_mesh, set()).update(_shapes_of_states(spread.shape))


def _is_made_of(tensor: "DTensor", shapes: "set[torch.Size]") -> bool:
    """Return whether a DTensor on the mesh of spread parameters of these shapes is one, its gradient or its state.

    A state has the parameter's shape, or one of its last two dimensions is 1 (factors of rows and of columns). What
    lies in the memory of a parameter that FSDP2 shards, and is no spread one, is none of these, whatever its shape.
    """
    return tensor.shape in shapes and not _is_sharded_by_fsdp(tensor)


def _shapes_of_states(shape: torch.Size) -> set[torch.Size]:
    """Return the shapes that a parameter, its gradient and its states have."""
    if len(shape) < 2:
        return {shape}
    return {shape, torch.Size([*shape[:-1], 1]), torch.Size([*shape[:-2], 1, shape[-1]])}


def note_sharded_by_fsdp(parameter: "FSDPParam") -> None:
    """Allow pickling of this parameter, which FSDP2 shards and which is no spread one."""
    _sharded_by_fsdp.add(parameter)


_sharded_by_fsdp: "weakref.WeakSet[FSDPParam]" = weakref.WeakSet()


def _is_sharded_by_fsdp(tensor: "DTensor") -> bool:
    """Return whether it lies in the memory of a parameter that FSDP2 shards and that is no spread one."""
    memory = tensor.to_local().untyped_storage().data_ptr()
    return any(
        parameter._sharded_param_data.untyped_storage().data_ptr() == memory != 0 for parameter in _sharded_by_fsdp
    )


def _is_sent_to_checkpointer() -> bool:
    """Return whether torch.distributed.checkpoint sends a rank's part to the process that writes it."""
    executor = sys.modules.get("torch.distributed.checkpoint._async_process_executor")
    if executor is None:
        return False
    send = executor._AsyncCheckpointProcess._send.__code__
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code is not send:
        frame = frame.f_back
    return frame is not None


def give_whole_as(module: nn.Module, convert: Callable[[Tensor], Tensor]) -> None:
    """Make the weight of a module be saved as `convert` gives it, once gathered: adapters, in PEFT's format."""
    setattr(module, FORM, convert)


def whole_forms(module: nn.Module) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return the names in module.state_dict() of such weights, and what converts each."""
    return {
        name_in_state(f"{name}.weight".lstrip(".")): child.__dict__[FORM]
        for name, child in module.named_modules()
        if FORM in child.__dict__
    }


def name_in_state(name: str) -> str:
    """Return a parameter's name in state_dict(), in which torch's checkpoint_wrapper hides itself."""
    return name.replace("_checkpoint_wrapped_module.", "")


def whole(value: object, form: Callable[[Tensor], Tensor] | None = None) -> object:
    """Return a DTensor gathered, on the CPU, in this form, and anything else as it is; every rank of its mesh calls."""
    if not isinstance(value, Tensor) or not hasattr(value, "full_tensor"):
        return value
    gathered = full_tensor(value, "the gathering of spread experts in state_dict()").cpu()
    return gathered if form is None else form(gathered)


def gather_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Make the optimizer's state_dict() whole, and let its load_state_dict() take what is whole."""
    optimizer.register_state_dict_post_hook(_gathered_state)
    optimizer.register_load_state_dict_pre_hook(_divided_state)


def _gathered_state(optimizer: torch.optim.Optimizer, state_dict: StateDict) -> StateDict:
    shown = shown_state(optimizer, state_dict)
    state = {number: {name: whole(value) for name, value in own.items()} for number, own in shown["state"].items()}
    return {**state_dict, "state": state}


def _divided_state(optimizer: torch.optim.Optimizer, state_dict: StateDict) -> StateDict:
    state = {}
    for number, own, parameter, order in states_of(optimizer, state_dict):
        state[number] = {name: _divided(value, parameter, order) for name, value in own.items()}
    return {**state_dict, "state": state}


def _divided(value: object, parameter: Tensor | None, order: ExpertsOfRank | None) -> object:
    """Return this rank's part of a whole tensor of an optimizer's state, and anything else as it is."""
    from torch.distributed.tensor import DTensor

    if isinstance(value, Tensor) and not isinstance(value, DTensor) and value.dim() and isinstance(parameter, DTensor):
        return part_of(value, parameter, order)
    return value
