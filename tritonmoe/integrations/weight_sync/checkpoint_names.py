"""What a model's weights are called in its checkpoint: transformers' own conversions, asked on the meta device."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["CheckpointPart", "checkpoint_parts", "converted"]


@dataclass(frozen=True)
class CheckpointPart:
    """Weights that are converted together, and what they become."""

    names: tuple[str, ...]
    """In the model; several where transformers makes one tensor of them."""
    outputs: Mapping[str, Tensor]
    """On the meta device, by their names in the checkpoint, in the order in which they come."""
    by_expert: tuple[str, ...] = ()
    """Where each row of the one weight is an expert with tensors of its own: their names with * for its number."""

    def of_experts(self, model: "PreTrainedModel", rows: Tensor, first: int) -> dict[str, Tensor]:
        """Return the tensors of some experts by their names, in the order of `outputs`: `rows` are from `first` on."""
        found = converted(model, {self.names[0]: rows})
        return {
            name: found[as_first]
            for row in range(len(rows))
            for name, as_first in zip(_names(self.by_expert, first + row), _names(self.by_expert, row), strict=True)
        }


def _names(templates: tuple[str, ...], number: int) -> list[str]:
    return [template.replace("*", str(number)) for template in templates]


def converted(model: "PreTrainedModel", state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors under the names, and in the forms, of the model's checkpoint; views where that is possible."""
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(model, state)


def checkpoint_parts(model: "PreTrainedModel", shapes: Mapping[str, Tensor]) -> list[CheckpointPart]:
    """Return how the weights of a model, of which only shapes and dtypes are read, become those of its checkpoint.

    Raises:
        ValueError: transformers makes nothing of a weight that the others would not be enough for.
    """
    meta = {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in shapes.items()}
    everything = converted(model, meta)
    parts, incomplete = [], []
    for name, tensor in meta.items():
        outputs = _alone(model, {name: tensor})
        if outputs is not None and all(_is_same(everything.get(key), value) for key, value in outputs.items()):
            templates = _templates(model, name, tensor, outputs)
            if templates:  # one expert after the other, however many are gathered at once
                outputs = {key: outputs[key] for row in range(len(tensor)) for key in _names(templates, row)}
            parts.append(CheckpointPart((name,), outputs, templates))
        else:
            incomplete.append(name)
    if incomplete:
        parts += _together(model, meta, incomplete, everything)
    left = everything.keys() - {key for part in parts for key in part.outputs}
    if left:
        raise ValueError(
            f"transformers makes {sorted(left)[:4]} of several weights of {type(model).__name__}, and export_weights "
            "can't tell of which ones: save the model with save_pretrained() instead"
        )
    return parts


def _alone(model: "PreTrainedModel", state: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """Return what these weights become without the others; None where they need them."""
    try:
        return converted(model, state)
    except Exception:  # each of transformers' operations has its own
        return None


def _is_same(expected: Tensor | None, actual: Tensor) -> bool:
    return expected is not None and (expected.shape, expected.dtype) == (actual.shape, actual.dtype)


def _together(
    model: "PreTrainedModel", meta: dict[str, Tensor], incomplete: Iterable[str], everything: Mapping[str, Tensor]
) -> Iterator[CheckpointPart]:
    """Yield the parts of weights that need each other: of one module, or of one of the modules around it."""
    waiting = list(incomplete)
    while waiting:
        name = waiting[0]
        around = name
        while "." in around:
            around = around.rpartition(".")[0]
            names = tuple(other for other in waiting if other.startswith(f"{around}."))
            outputs = _alone(model, {other: meta[other] for other in names})
            if outputs and all(_is_same(everything.get(key), value) for key, value in outputs.items()):
                yield CheckpointPart(names, outputs)
                waiting = [other for other in waiting if other not in names]
                break
        else:
            waiting.remove(name)


def _templates(model: "PreTrainedModel", name: str, tensor: Tensor, outputs: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Return the names of a row's tensors with * for its number; none where rows aren't converted one by one."""
    num_rows = len(tensor) if tensor.dim() else 0
    if len(outputs) <= 1 or num_rows <= 1 or len(outputs) % num_rows:
        return ()
    of_one = _alone(model, {name: tensor[:1]})
    if of_one is None or len(of_one) * num_rows != len(outputs):
        return ()
    templates = []
    for key, value in of_one.items():
        places = [f"{key[: found.start()]}*{key[found.end() :]}" for found in re.finditer(r"(?<![^.])0(?![^.])", key)]
        fitting = [
            template
            for template in places
            if all(_is_same(outputs.get(template.replace("*", str(row))), value) for row in range(num_rows))
        ]
        if len(fitting) != 1:
            return ()
        templates += fitting
    return tuple(templates)
