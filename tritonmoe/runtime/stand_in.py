"""StandIn: what a module has under a weight's name where the weight itself is somewhere else, or packed."""

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["StandIn", "make_stand_in"]

DESCRIBES = (
    "__get__",
    "dim",
    "size",
    "numel",
    "__repr__",
    "__deepcopy__",
    "is_floating_point",
    "__reduce_ex__",
    "detach",
)
"""Operations that describe or copy a tensor, and read no value."""
INITIALISES = ("normal_", "zero_", "uniform_", "fill_", "trunc_normal_")
"""Operations by which transformers initialises weights that a checkpoint lacks."""


class StandIn(Tensor):
    """The shape of a weight, on the meta device; computing with it raises ValueError."""

    why: str
    """What is said of the weight, and the way out."""

    def __deepcopy__(self, _: object) -> "StandIn":
        return self

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        name = getattr(func, "__name__", "")
        if name in INITIALISES:
            return args[0] if args else (kwargs or {}).get("tensor")
        if name not in DESCRIBES:
            found = next((one.why for one in args if isinstance(one, cls) and hasattr(one, "why")), "it has no values")
            raise ValueError(
                f"{name or func} is called with a weight of experts of which it can't see the values: {found}"
            )
        return super().__torch_function__(func, types, args, kwargs or {})


def make_stand_in(shape: tuple[int, ...], dtype: torch.dtype, why: str) -> StandIn:
    """Return a tensor of this shape without values."""
    stand_in = torch.empty(shape, dtype=dtype, device="meta").as_subclass(StandIn)
    stand_in.why = why
    return stand_in
