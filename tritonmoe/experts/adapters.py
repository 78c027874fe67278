"""Low-rank adapters (LoRA) on experts: their factors, as a caller gives them or a wrapper of a module notes them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tritonmoe.config.layer import PerWeight
from tritonmoe.config.numbers import is_number

__all__ = [
    "FACTORS",
    "HANDS_OVER",
    "NOTES",
    "SHARDS",
    "ExpertAdapters",
    "Note",
    "check_hands_over",
    "factors_of",
    "names_of",
    "noted_factors",
    "notes_on",
    "shard_adapters",
    "with_adapters",
]


@dataclass(frozen=True)
class ExpertAdapters:
    """Low-rank adapters on the experts' projections: x W1 becomes x W1 + gate_up_scale * (x A1) B1, and so for W2.

    For E experts, each projection with a rank R of its own, any integer; what is not adapted has neither factor. The
    factors lie as those of torch.nn.Linear whatever the layout of the weights, and the columns of B1 come in the order
    of the weight's own. With `dropout` A1 multiplies dropout(x), in which a token loses the same columns for all its
    experts, and A2 that of each pair's activation. Source: LoRA (Hu et al., arXiv:2106.09685).

    Example:
        One expert with W1 = [[2]], A1 = [[3]], B1 = [[10]] and scale 0.5 multiplies by 2 + 0.5 * 3 * 10 = 17; with
        dropout 0.5 by 2 + 0.5 * 3 * 10 / (1 - 0.5) = 32 or, for as many tokens, by 2.
    """

    gate_up_a: Tensor | None = None
    """(E, R, D)."""
    gate_up_b: Tensor | None = None
    """(E, 2F, R), F instead of 2F when ungated."""
    down_a: Tensor | None = None
    """(E, R, F)."""
    down_b: Tensor | None = None
    """(E, D, R)."""
    gate_up_scale: float = 1.0
    """alpha / R, or alpha / sqrt(R) (rsLoRA)."""
    down_scale: float = 1.0
    dropout: float = 0.0
    """The probability p, in [0, 1), with which each column of what A multiplies is zero; the others are divided by
    1 - p. Functions apply it in every call, modules in training mode alone. Drawn from torch's generator of x's device.
    """

    def __post_init__(self) -> None:
        for name in ("gate_up_scale", "down_scale"):
            if not is_number(getattr(self, name)):
                raise ValueError(f"{name} must be a finite number, got {getattr(self, name)!r}")
        if not is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be a number of at least 0 and less than 1, got {self.dropout!r}")
        for name in ("gate_up", "down"):
            a, b = getattr(self, f"{name}_a"), getattr(self, f"{name}_b")
            if (a is None) != (b is None):
                given, missing = (f"{name}_b", f"{name}_a") if a is None else (f"{name}_a", f"{name}_b")
                raise ValueError(f"an adapter has two factors, got {given} without {missing}: give both or none")


def with_adapters(weights: PerWeight[Tensor], adapters: ExpertAdapters | None) -> PerWeight[Tensor]:
    """Add the factors of adapters, with their scales, to the weights of a call."""
    if adapters is None:
        return weights
    if not isinstance(adapters, ExpertAdapters):
        raise TypeError(f"adapters must be ExpertAdapters or None, got {type(adapters).__name__}")
    kept = 1 - adapters.dropout
    for name, scale in (("gate_up", adapters.gate_up_scale), ("down", adapters.down_scale)):
        if not hasattr(getattr(adapters, f"{name}_b"), "main_grad"):
            continue
        if adapters.dropout:
            raise ValueError(
                f"{name}_b has a main_grad, and the gradient of {name}_b / (1 - dropout) can't be added to it: set "
                f"main_grad after the backward, or give dropout=0 instead of {adapters.dropout}"
            )
        if scale != 1:
            raise ValueError(
                f"{name}_b has a main_grad, which the gradient of {name}_scale * {name}_b can't be added to: fold the "
                f"scale {scale} into {name}_b and give {name}_scale=1, or leave main_grad to after the backward"
            )
    return weights._replace(
        gate_up_a=adapters.gate_up_a,
        gate_up_b=_scaled(adapters.gate_up_b, adapters.gate_up_scale / kept),
        down_a=adapters.down_a,
        down_b=_scaled(adapters.down_b, adapters.down_scale / kept),
    )


NOTES = "_tritonmoe_factors"
"""The attribute of a module of experts that holds a list of Notes while somebody else's adapters (PEFT's) are in force.
"""
HANDS_OVER = "_tritonmoe_hands_over"
"""The attribute of a class that wraps experts in adapters and makes such notes; it holds what the class did before."""
SHARDS = "_tritonmoe_shards"
"""The attribute of such a class that holds a function of a wrapper, which keeps this rank's factors of spread experts.
"""
FACTORS = "_tritonmoe_factors_of"
"""The attribute of such a class that holds a function of a wrapper: its experts, and the modules with their factors."""
GiveFactors = Callable[[torch.dtype, Sequence[int]], tuple[Tensor, Tensor]]
"""(dtype, ids of experts) -> A and B with its scale, of these experts."""


class Note(NamedTuple):
    """What an adapted parameter of a module of experts has beside its weight."""

    experts: nn.Module
    """Copies of a module may share their list of notes."""
    parameter_name: str
    adapter: str
    """Its name and its scale."""
    give_factors: GiveFactors


def check_hands_over(name: str, wrapper: nn.Module) -> None:
    """Raise ValueError where this is PEFT's wrapper, which adds whole tensors, around spread experts called `name`."""
    if type(wrapper).__name__ == "ParamWrapper" and getattr(type(wrapper), HANDS_OVER, None) is None:
        raise ValueError(
            f"PEFT adapts {name} itself (target_parameters), whose experts are spread over ranks, but PEFT adds "
            "matrices of all experts to them: call tritonmoe.integrations.transformers.register() first, so that "
            "PEFT passes factors instead"
        )


def shard_adapters(module: nn.Module) -> None:
    """Make every wrapper in `module` whose experts are spread over ranks keep this rank's factors alone."""
    for child in module.modules():
        shard = getattr(type(child), SHARDS, None)
        if shard is not None:
            shard(child)


def factors_of(module: nn.Module) -> tuple[nn.Module, list[nn.Module]] | None:
    """Return whose experts a wrapper adapts, and the modules that have the factors; None for any other module."""
    give = getattr(type(module), FACTORS, None)
    return None if give is None else give(module)


def notes_on(experts: nn.Module) -> dict[str, Note]:
    """Return the adapters that are noted on a module of experts, by the name of the parameter that each adapts."""
    notes: list[Note] = experts.__dict__.get(NOTES, [])
    # of threads that run one module all have noted the same
    return {note.parameter_name: note for note in notes if note.experts is experts}


def noted_factors(notes: dict[str, Note], dtype: torch.dtype, expert_ids: Sequence[int]) -> dict[str, Tensor]:
    """Return the factors of the adapters that notes_on() found, by PerWeight's names."""
    found: dict[str, Tensor] = {}
    for parameter_name, note in notes.items():
        name = "down" if parameter_name == "down_proj" else "gate_up"
        found[f"{name}_a"], found[f"{name}_b"] = note.give_factors(dtype, expert_ids)
    return found


def names_of(notes: dict[str, Note]) -> str:
    """Return the names and scales of the adapters that notes_on() found, by which ranks know that they run the same."""
    return " ".join([f"{parameter_name}:{notes[parameter_name].adapter}" for parameter_name in sorted(notes)])


def _scaled(factor: Tensor | None, scale: float) -> Tensor | None:
    return factor if factor is None or scale == 1 else factor * scale
