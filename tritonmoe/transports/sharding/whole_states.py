"""State dicts of spread parameters: no file of one rank's part, and whole tensors where every rank asks."""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

__all__ = [
    "StateDict",
    "gather_optimizer",
    "give_whole_as",
    "name_in_state",
    "no_pickle",
    "part_of",
    "refuse_pickling",
    "whole",
    "whole_forms",
]

StateDict: TypeAlias = dict[str, Any]
"""What state_dict() of a module or an optimizer gives: tensors, and whatever else a class keeps by name."""

MARK = "_tritonmoe_refused_meshes"
FORM = "_tritonmoe_whole_form"


def no_pickle(num_ranks: int) -> ValueError:
    """Give the error with which pickle is refused what is spread over so many ranks."""
    return ValueError(
        f"torch.save, or pickle, would keep one rank's experts alone of those that are spread over {num_ranks} ranks: "
        "save with torch.distributed.checkpoint; or, where every rank calls state_dict() as under Accelerate and "
        "Lightning, call tritonmoe.gather_state_dicts(module, optimizer) before training, which makes its tensors whole"
    )


def refuse_pickling(mesh: "DeviceMesh") -> None:
    """Let pickle, and so torch.save, raise for DTensors over this mesh of several ranks, from now on.

    A pickled DTensor holds one rank's part, and on the rank that reads it claims to be that rank's.
    """
    from torch.distributed.tensor import DTensor

    if not hasattr(DTensor, MARK):
        original: Callable = DTensor.__reduce_ex__
        refused: set[DeviceMesh] = set()

        @functools.wraps(original)
        def reduce(tensor: Tensor, protocol: object) -> str | tuple[object, ...]:
            assert isinstance(tensor, DTensor)
            if tensor.device_mesh in refused:
                raise no_pickle(tensor.device_mesh.size())
            return original(tensor, protocol)

        setattr(DTensor, MARK, refused)
        DTensor.__reduce_ex__ = reduce  # type: ignore[method-assign]
    if mesh.size() > 1:
        getattr(DTensor, MARK).add(mesh)


def give_whole_as(module: nn.Module, convert: Callable[[Tensor], Tensor]) -> None:
    """Let the weight of a module be saved as `convert` gives it, once it is gathered: adapters, in PEFT's format."""
    setattr(module, FORM, convert)


def whole_forms(module: nn.Module) -> dict[str, Callable[[Tensor], Tensor]]:
    """Give the names in module.state_dict() of such weights, and what converts each."""
    return {
        name_in_state(f"{name}.weight".lstrip(".")): child.__dict__[FORM]
        for name, child in module.named_modules()
        if FORM in child.__dict__
    }


def name_in_state(name: str) -> str:
    """Give a parameter's name in state_dict(), in which torch's checkpoint_wrapper hides itself."""
    return name.replace("_checkpoint_wrapped_module.", "")


def whole(value: object, form: Callable[[Tensor], Tensor] | None = None) -> object:
    """Give a DTensor gathered, on the CPU, in this form, and anything else as it is; every rank of its mesh calls."""
    if not hasattr(value, "full_tensor"):
        return value
    gathered = value.full_tensor().cpu()
    return gathered if form is None else form(gathered)


def part_of(value: Tensor, parameter: "DTensor") -> Tensor:
    """Give this rank's part of a whole tensor, as a DTensor like the parameter.

    Raises:
        ValueError: the parameter is sharded over several dimensions of a mesh.
    """
    from torch.distributed.tensor import DTensor, Shard

    if parameter.placements != (Shard(0),):
        raise ValueError(
            f"a whole tensor can't be divided as {parameter.placements}: load with torch.distributed.checkpoint"
        )
    mesh = parameter.device_mesh
    parts, rank = value.chunk(mesh.size()), mesh.get_local_rank()  # as DTensor and FSDP2 divide
    part = (parts[rank] if rank < len(parts) else value[:0]).clone()  # a view would keep the whole
    if not parameter.is_meta:
        part = part.to(parameter.to_local().device)
    return DTensor.from_local(part, mesh, [Shard(0)], run_check=False, shape=value.shape, stride=value.stride())


def gather_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Make the optimizer's state_dict() whole, and let its load_state_dict() take what is whole."""
    optimizer.register_state_dict_post_hook(_gathered_state)
    optimizer.register_load_state_dict_pre_hook(_divided_state)


def _gathered_state(_: torch.optim.Optimizer, state_dict: StateDict) -> StateDict:
    state = {number: {name: whole(value) for name, value in own.items()} for number, own in state_dict["state"].items()}
    return {**state_dict, "state": state}


def _divided_state(optimizer: torch.optim.Optimizer, state_dict: StateDict) -> StateDict:
    parameters = {
        number: parameter
        for saved, group in zip(state_dict["param_groups"], optimizer.param_groups, strict=False)
        for number, parameter in zip(saved["params"], group["params"], strict=False)
    }  # torch says what differs in length
    state = {}
    for number, own in state_dict["state"].items():
        parameter = parameters.get(number)
        state[number] = {name: _divided(value, parameter) for name, value in own.items()}
    return {**state_dict, "state": state}


def _divided(value: object, parameter: Tensor | None) -> object:
    """Give this rank's part of a whole tensor of an optimizer's state, and anything else as it is."""
    from torch.distributed.tensor import DTensor

    if isinstance(value, Tensor) and not isinstance(value, DTensor) and value.dim() and isinstance(parameter, DTensor):
        return part_of(value, parameter)
    return value
