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

    why = "it has no values"
    """What is said of the weight, and the way out."""
    is_initialised = False
    """Whether initialising it is no error, since its values come otherwise."""

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
        one = args[0] if args else (kwargs or {}).get("tensor")
        if name in INITIALISES and isinstance(one, cls) and one.is_initialised:
            return one
        if name not in DESCRIBES:
            given = (*args, *(kwargs or {}).values())
            why = next((one.why for one in given if isinstance(one, cls)), cls.why)
            raise ValueError(
                f"{name or func} is called with a weight of experts of which it can't see the values: {why}"
            )
        found = super().__torch_function__(func, types, args, kwargs or {})
        if isinstance(found, cls) and isinstance(args[0], cls):  # .data, detach()
            found.why, found.is_initialised = args[0].why, args[0].is_initialised
        return found


def make_stand_in(shape: tuple[int, ...], dtype: torch.dtype, why: str, *, is_initialised: bool = False) -> StandIn:
    """Return a tensor of this shape without values."""
    stand_in = torch.empty(shape, dtype=dtype, device="meta").as_subclass(StandIn)
    stand_in.why, stand_in.is_initialised = why, is_initialised
    return stand_in
