"""Marks of buffers that are other ones on every rank, and of meshes over which experts are spread."""

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["MARK", "OWN_BUFFERS", "is_marked_mesh", "mark_mesh", "own_buffers"]

MARK = "_tritonmoe_sharded"
OWN_BUFFERS = "_tritonmoe_own_buffers"


def mark_mesh(mesh: "DeviceMesh") -> None:
    """Mark a mesh as one over which experts are spread; it need not be named for them."""
    setattr(mesh, MARK, True)


def is_marked_mesh(mesh: "DeviceMesh") -> bool:
    """Return whether experts are spread over this mesh."""
    return hasattr(mesh, MARK)


def own_buffers(module: nn.Module) -> list[str]:
    """Return the names of what mark_own_buffers() has marked inside `module`."""
    marked = [
        (prefix, name) for prefix, child in module.named_modules() for name in child.__dict__.get(OWN_BUFFERS, ())
    ]
    return [f"{prefix}.{name}".lstrip(".") for prefix, name in marked]
