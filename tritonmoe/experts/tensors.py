"""CallTensors: the tensors of one call by name, or one value for each: a gradient, or whether one is wanted.

autograd and operators take flat lists; their order is known to flatten() and unflatten() alone.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, TypeVar

import torch
from typing_extensions import NamedTuple  # typing's is not generic before Python 3.11

from tritonmoe.config.layer import NO_WEIGHTS, PerWeight

__all__ = ["NAMES", "NO_TENSORS", "OF_ROWS", "OPTIONAL", "CallTensors", "schema"]

Value = TypeVar("Value")
Other = TypeVar("Other")


class CallTensors(NamedTuple, Generic[Value]):
    """One value for each tensor that the experts of one call take: this rank's tokens, their routing, its experts."""

    x: Value
    """(T, D)."""
    topk_ids: Value
    """(T, K) int32 or int64."""
    topk_weights: Value
    """(T, K)."""
    weights: PerWeight[Value]
    row_seeds: Value | None = None
    """(T,) int32, with dropout on what adapters multiply: see adapter_dropout.py."""
    activation_parameters: Sequence[Value] = ()
    """Of a callable activation."""

    def flatten(self) -> list[Value | None]:
        """Return all values in the order of NAMES, then those of the activation's parameters."""
        x, topk_ids, topk_weights, weights, row_seeds, parameters = self
        return [x, topk_ids, topk_weights, *weights, row_seeds, *parameters]

    @classmethod
    def unflatten(cls, values: "Sequence[Other | None]") -> "CallTensors[Other]":
        """Return the tensors of which flatten() gave the values."""
        x, topk_ids, topk_weights, *weights = values[:_ROW_SEEDS]
        seeds_and_parameters = values[_ROW_SEEDS], values[_ROW_SEEDS + 1 :]
        return CallTensors._make((x, topk_ids, topk_weights, PerWeight._make(weights), *seeds_and_parameters))

    def of_rows(self) -> "list[Value | None]":
        """Return those that belong to the rows of x, in the order of OF_ROWS."""
        return [getattr(self, name) for name in OF_ROWS]

    def map(self, function: Callable[[Value], Other]) -> "CallTensors[Other]":
        """Return function(value) in the place of each value, and None where there is None."""
        return self.unflatten([None if value is None else function(value) for value in self.flatten()])

    def only(self, *names: str) -> "CallTensors[Any]":
        """Return these and the activation's parameters, None for the others."""
        named = [value if name in names else None for name, value in zip(NAMES, self.flatten(), strict=False)]
        return self.unflatten([*named, *self.activation_parameters])

    def without(self, *names: str) -> "CallTensors[Any]":
        """Return all but these, None for these."""
        return self.only(*(name for name in NAMES if name not in names))

    def needs(self) -> "CallTensors[bool]":
        """Return which tensors need a gradient, in the grad mode that is on."""
        is_on = torch.is_grad_enabled()
        values: list[Any] = self.flatten()
        return self.unflatten([is_on and tensor is not None and tensor.requires_grad for tensor in values])

    def needs_any(self) -> bool:
        """Return whether a gradient of one of the tensors is wanted, in the grad mode that is on."""
        if not torch.is_grad_enabled():
            return False
        values: list[Any] = self.flatten()
        # Every call asks, and any() of a generator takes longer.
        return True in [tensor.requires_grad for tensor in values if tensor is not None]


NO_TENSORS: CallTensors[Any] = CallTensors(None, None, None, NO_WEIGHTS)
NAMES = ("x", "topk_ids", "topk_weights", *PerWeight._fields, "row_seeds")
_FIRST_WEIGHT, _ROW_SEEDS = NAMES.index(PerWeight._fields[0]), NAMES.index("row_seeds")
OF_ROWS = ("topk_ids", "topk_weights", "row_seeds")
"""Those that belong to the rows of x, and travel with them: (T, K) or (T,), as int32 or fp32."""
OPTIONAL = frozenset(NAMES) - {"x", "topk_ids", "topk_weights", "gate_up_proj", "down_proj"}


def schema(optional: Iterable[str] = OPTIONAL) -> str:
    """Return the arguments of an operator that takes all tensors, in the order of flatten().

    optional: the names of those that may be None.
    """
    return ", ".join(f"Tensor{'?' if name in optional else ''} {name}" for name in NAMES)
