"""The arguments of a model's forward in halves of its batch: which tensors are split, along which dimension."""

import inspect
from typing import Any, TypeAlias

from torch import Tensor

__all__ = ["Arguments", "batch_size", "by_name", "num_targets", "split"]

Arguments: TypeAlias = dict[str, Any]
"""The arguments of a model's forward, by name."""
SPLIT = {
    "input_ids": {2: 0},
    "inputs_embeds": {3: 0},
    "attention_mask": {2: 0, 4: 0},
    "position_ids": {2: 0, 3: 1},  # (3 or 4, B, S) where a model turns by time, height and width
    "token_type_ids": {2: 0},
    "labels": {1: 0, 2: 0},
    "shift_labels": {2: 0},
}
"""The arguments of a model's forward that are split: by how many dimensions they have, which is the batch.

Other tensors can't be split, whatever size their first dimension happens to have.
"""
SHARED = ("num_items_in_batch", "logits_to_keep")
"""Tensors that both halves get as they are."""


def by_name(given: inspect.BoundArguments, signature: inspect.Signature) -> Arguments:
    """Return the arguments by name, those in **kwargs too."""
    flat: Arguments = {}
    for name, value in given.arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            flat |= value
        elif kind is inspect.Parameter.VAR_POSITIONAL and value:
            raise ValueError("two_batches takes the arguments of a model's forward by name: call model(input_ids=...)")
        else:
            flat[name] = value
    return flat


def batch_size(arguments: Arguments) -> int:
    """Return how many sequences the batch has."""
    for name in ("input_ids", "inputs_embeds"):
        if isinstance(arguments.get(name), Tensor):
            return arguments[name].shape[0]
    raise ValueError("two_batches needs input_ids or inputs_embeds to see how many sequences the batch has")


def split(arguments: Arguments, size: int, first: int) -> tuple[Arguments, Arguments]:
    """Return each half's own arguments; those of one sequence are for all."""
    halves: tuple[Arguments, Arguments] = {}, {}
    for name, value in arguments.items():
        if name in SHARED or value is None or isinstance(value, bool | int | float | str):
            continue
        dim = SPLIT.get(name, {}).get(value.dim()) if isinstance(value, Tensor) else None
        if dim is None or value.shape[dim] not in (1, size):
            said = f"a {tuple(value.shape)} tensor" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"two_batches can't split {name} ({said}) of a batch of {size} sequences: it splits "
                f"{', '.join(SPLIT)}, whose first dimension is the batch, and position_ids of three dimensions, whose "
                "second one is"
            )
        if value.shape[dim] == size:
            for half, part in zip(halves, value.tensor_split([first], dim), strict=True):
                half[name] = part
    return halves


def num_targets(arguments: Arguments) -> Tensor | int:
    """Return how many tokens of the whole batch have a target."""
    given = arguments.get("num_items_in_batch")
    if given is not None:
        return given
    targets = arguments.get("shift_labels")
    if targets is None:
        targets = arguments["labels"][..., 1:]
    return (targets != arguments.get("ignore_index", -100)).sum()
