"""Every activation that the kernels know: its name, its numbers, what it computes, and its backward.

ops/kernels/activations.py has a kernel function of the same name for each.
"""

from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import TypeIs

from tritonmoe.config.numbers import is_number

__all__ = [
    "ACTIVATION_NAMES",
    "GATE_FUNCTIONS",
    "MAX_NUMBERS",
    "POINTWISE",
    "Activation",
    "ClampedSwiGLU",
    "FusedActivation",
    "GateFunction",
    "PlainActivation",
    "Pointwise",
    "SoftcappedSwiGLU",
    "check_activation",
    "find_activation",
    "find_pointwise",
    "from_plain",
    "is_fused",
    "to_plain",
]

MAX_NUMBERS = 3
"""So many numbers of an activation reach the kernels."""


@dataclass(frozen=True)
class Pointwise:
    """An activation of one value, known by its name; where experts have a gate, the gate's times the up half."""

    name: str
    value: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]
    """(grad, x) -> grad times the slope at x."""
    numbers: ClassVar[tuple[float, ...]] = ()

    def gated(self, gate: Tensor, up_half: Tensor) -> Tensor:
        """Return act(gate, up_half), a new tensor."""
        return self.value(gate) * up_half

    def gated_backward(self, da: Tensor, gate: Tensor, up_half: Tensor, out_gate: Tensor, out_up: Tensor) -> Tensor:
        """Write the gradients of gate and up_half for da, which is overwritten; return act(gate, up_half)."""
        act = self.value(gate)
        if out_up.dtype == gate.dtype:
            torch.mul(da, act, out=out_up)
        else:
            out_up.copy_(da * act)
        out_gate.copy_(self.backward(da.mul_(up_half), gate))
        return act.mul_(up_half)


@dataclass(frozen=True)
class GateFunction:
    """An activation of a gate and an up half that has numbers: its fields, in the order in which kernels take them."""

    name: ClassVar[str]

    def __post_init__(self) -> None:
        for name in self.number_names():
            if not is_number(getattr(self, name)):
                raise ValueError(f"{type(self).__name__} {name} must be a finite number, got {getattr(self, name)!r}")

    def _check_positive(self, *names: str) -> None:
        for name in names:
            number = getattr(self, name)
            if not is_number(number) or number <= 0:
                raise ValueError(f"{type(self).__name__} {name} must be positive and finite, got {number!r}")

    @classmethod
    def number_names(cls) -> tuple[str, ...]:
        return cls.__match_args__  # as fields() says, which torch.compile can't trace

    @property
    def numbers(self) -> tuple[float, ...]:
        """The fields as floats, -0.0 as 0.0: equal activations have the same words and literals."""
        return tuple([0.0 + getattr(self, name) for name in self.number_names()])

    def __str__(self) -> str:
        """Return the call that makes it."""
        said = [
            f"{number}" if field.default is MISSING else f"{field.name}={number}"
            for field, number in zip(fields(self), self.numbers, strict=True)
        ]
        return f"{type(self).__name__}({', '.join(said)})"

    def gated(self, gate: Tensor, up_half: Tensor) -> Tensor:
        """Return act(gate, up_half), a new tensor."""
        raise NotImplementedError

    def gated_backward(self, da: Tensor, gate: Tensor, up_half: Tensor, out_gate: Tensor, out_up: Tensor) -> Tensor:
        """Write the gradients of gate and up_half for da, which is overwritten; return act(gate, up_half)."""
        raise NotImplementedError


@dataclass(frozen=True)
class ClampedSwiGLU(GateFunction):
    """Gated activation with clamped inputs: `g * sigmoid(alpha * g) * (u + up_offset)`.

    g is the gate clamped to at most `limit`; u is the up half clamped to [-limit, limit].
    gpt-oss is `ClampedSwiGLU(7.0, alpha=1.702, up_offset=1.0)`; DeepSeek-V4 is `ClampedSwiGLU(limit)`.
    """

    limit: float
    alpha: float = 1.0
    up_offset: float = 0.0

    name = "clamped_swiglu"

    def __post_init__(self) -> None:
        self._check_positive("limit")
        super().__post_init__()

    def gated(self, gate: Tensor, up_half: Tensor) -> Tensor:
        gate = gate.clamp(max=self.limit)
        up_half = up_half.clamp(-self.limit, self.limit)
        return gate * torch.sigmoid(self.alpha * gate) * (up_half + self.up_offset)

    def gated_backward(self, da: Tensor, gate: Tensor, up_half: Tensor, out_gate: Tensor, out_up: Tensor) -> Tensor:
        clamped = gate.clamp(max=self.limit)
        shifted = up_half.clamp(-self.limit, self.limit) + self.up_offset
        sigmoid = torch.sigmoid(self.alpha * clamped)
        act = clamped * sigmoid
        out_up.copy_((da * act).masked_fill_(up_half.abs() > self.limit, 0))
        slope = sigmoid + self.alpha * act * (1 - sigmoid)
        out_gate.copy_((da * shifted).mul_(slope).masked_fill_(gate > self.limit, 0))
        return act * shifted


@dataclass(frozen=True)
class SoftcappedSwiGLU(GateFunction):
    """Gated activation with bounded factors: `softcap(g) * sigmoid(g) * softcap(u)`, softcap(x) = cap * tanh(x / cap).

    Inkling 2 is `SoftcappedSwiGLU(4.0, 25.0)`.
    """

    gate_softcap: float
    up_softcap: float

    name = "softcapped_swiglu"

    def __post_init__(self) -> None:
        self._check_positive(*self.number_names())

    def gated(self, gate: Tensor, up_half: Tensor) -> Tensor:
        capped_gate = self.gate_softcap * torch.tanh(gate / self.gate_softcap)
        return capped_gate * torch.sigmoid(gate) * (self.up_softcap * torch.tanh(up_half / self.up_softcap))

    def gated_backward(self, da: Tensor, gate: Tensor, up_half: Tensor, out_gate: Tensor, out_up: Tensor) -> Tensor:
        gate_tanh, up_tanh = torch.tanh(gate / self.gate_softcap), torch.tanh(up_half / self.up_softcap)
        sigmoid, capped_up = torch.sigmoid(gate), self.up_softcap * up_tanh
        act = self.gate_softcap * gate_tanh * sigmoid
        out_up.copy_(da * act * (1 - up_tanh.square()))
        out_gate.copy_(da * capped_up * (sigmoid * (1 - gate_tanh.square()) + act * (1 - sigmoid)))
        return act * capped_up


def _gelu(approximate: str) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]:
    backward = partial(torch.ops.aten.gelu_backward.default, approximate=approximate)
    return partial(F.gelu, approximate=approximate), backward


POINTWISE = {
    entry.name: entry
    for entry in (
        Pointwise("silu", F.silu, torch.ops.aten.silu_backward.default),
        Pointwise("gelu", *_gelu("none")),
        Pointwise("gelu_tanh", *_gelu("tanh")),
        Pointwise("relu", F.relu, lambda grad, x: grad * (x > 0)),
        Pointwise("relu2", lambda x: F.relu(x).square(), lambda grad, x: grad * (2 * F.relu(x))),
    )
}
GATE_FUNCTIONS: dict[str, type[GateFunction]] = {entry.name: entry for entry in (ClampedSwiGLU, SoftcappedSwiGLU)}
ACTIVATION_NAMES = tuple(POINTWISE)
_GATE_FUNCTION_NAMES = ", ".join(f"a {entry.__name__}" for entry in GATE_FUNCTIONS.values())

FusedActivation = str | GateFunction
"""An activation that the kernels know: one of ACTIVATION_NAMES, or a ClampedSwiGLU or its like."""

Activation = FusedActivation | Callable[[Tensor], Tensor]
"""A fused activation, or any callable from (n, 2F) rows ((n, F) when ungated) to (n, F) rows."""

PlainActivation = str | tuple[str | float, ...]
"""A fused activation as Python literals: a name, or a name and the numbers."""


def is_fused(activation: Activation) -> TypeIs[FusedActivation]:
    """Return whether the kernels apply this activation themselves."""
    return isinstance(activation, str | GateFunction)


def find_activation(activation: FusedActivation) -> Pointwise | GateFunction:
    """Return what computes this activation; raise ValueError where its name is not known."""
    if isinstance(activation, GateFunction):
        return activation
    if activation not in POINTWISE:
        raise ValueError(
            f"activation {activation!r} is not known: choose one of {', '.join(POINTWISE)}, "
            f"{_GATE_FUNCTION_NAMES}, or pass a callable"
        )
    return POINTWISE[activation]


def find_pointwise(activation: FusedActivation) -> Pointwise:
    """Return what computes this activation of one value; raise ValueError where it needs two."""
    found = find_activation(activation)
    if isinstance(found, GateFunction):
        raise ValueError(f"{type(found).__name__} needs a gate and an up half: use gated=True")
    return found


def check_activation(activation: Activation, gated: bool) -> None:
    """Raise ValueError or TypeError unless `activation` is one that experts can run."""
    if is_fused(activation):
        find_activation(activation) if gated else find_pointwise(activation)
    elif isinstance(activation, type):
        raise TypeError(
            f"activation is the class {activation.__name__}: pass an instance of it, {activation.__name__}()"
        )
    elif not callable(activation):
        raise TypeError(f"activation must be a name, {_GATE_FUNCTION_NAMES} or a callable, got {type(activation)}")


def to_plain(activation: FusedActivation) -> PlainActivation:
    return activation if isinstance(activation, str) else (activation.name, *activation.numbers)


def from_plain(plain: PlainActivation) -> FusedActivation:
    """Return the activation of which to_plain() gave the literals."""
    if isinstance(plain, str):
        return plain
    name, *numbers = plain
    return GATE_FUNCTIONS[str(name)](*numbers)
