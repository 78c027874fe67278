"""Write Python for the operands of PTX instructions: registers, numbers, addresses, and where results go."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from virtual_gpu.nvidia.parser import Address, Operand, Parameter

__all__ = ["PARAMETER_SPACE", "SPECIAL_REGISTERS", "OperandWriter", "type_of", "width_of"]

PARAMETER_SPACE = 1 << 30
"""Where the addresses of parameters begin, one for each: no memory is read through them but descriptors."""
SPECIAL_REGISTERS = ("%tid.x", "%laneid", *(f"%{name}.{axis}" for name in ("ctaid", "nctaid") for axis in "xyz"))
FLOATS = {"f16": "f2", "f32": "f4", "f64": "f8"}
PACKED = {"f16x2": "f2", "f32x2": "f4", "s16x2": "i2", "u16x2": "u2"}


def width_of(kind: str) -> int:
    """Return the bits of a type: "s32" 32, "bf16x2" 32, "f32x2" 64, "e4m3x2" 16."""
    number, _, lanes = kind.replace("e4m3", "8").lstrip("bfsu").partition("x")
    return int(number) * int(lanes or 1)


def type_of(register: str) -> str:
    """Return the type of a register by its name."""
    if register.startswith("%rs"):
        return "u16"
    return "u64" if register.startswith("%rd") else "u32" if register.startswith("%r") else "pred"


def is_float(kind: str) -> bool:
    """Return whether a type's values are floating-point numbers: its bits can't be cut or extended."""
    return kind[0] in "ef" or kind.startswith("bf")


class OperandWriter:
    """Collects the lines of one block, and knows how each operand is written in them."""

    def __init__(self, parameters: Sequence[Parameter], num_threads: int):
        self.parameters, self.num_threads = parameters, num_threads
        self.constants: list[Any] = []
        self.lines: list[str] = []
        self.mask = "M"
        """What guards the instruction at hand; None at run time where all threads run it."""

    def register(self, name: str) -> str:
        return f"R[{name!r}]"

    def is_register(self, operand: Operand) -> bool:
        return isinstance(operand, str) and operand.startswith(("%p", "%r"))

    def constant(self, value: Any) -> str:
        self.constants.append(value)
        return f"K[{len(self.constants) - 1}]"

    def value(self, operand: Operand, kind: str) -> str:
        """Write an operand as values of `kind`; bf16 and e4m3 as float32."""
        assert isinstance(operand, str), operand
        if kind == "pred":
            if self.is_register(operand):
                return self.register(operand)
            return self.constant(np.bool_(int(operand, 0) != 0))
        width = width_of(kind)
        if operand.startswith("%") and not self.is_register(operand):
            if operand not in SPECIAL_REGISTERS or width != 32:
                raise NotImplementedError(operand)
            return f"m.special({operand!r})"
        if self.is_register(operand):
            native = type_of(operand)
            text = self.register(operand)
            if native == "pred" or (width_of(native) != width and is_float(kind)):
                raise NotImplementedError(operand)
            if width_of(native) != width:
                text = f"{text}.astype('u{width // 8}')"
        else:
            text = self.constant(np.array(self.number(operand), np.uint64).astype(f"u{width // 8}")[()])
            text = f"m.fill({text})" if "x" in kind else text
        return self.typed(text, kind)

    def number(self, text: str) -> int:
        """Return the bits of a literal, or the address of a name."""
        if text.startswith(("0f", "0d")):
            return int(text[2:], 16)
        if text[0].isdigit() or text[0] == "-":
            return int(text.removesuffix("U"), 0) & 0xFFFFFFFFFFFFFFFF
        if text == "global_smem":
            return 0
        index = [parameter.name for parameter in self.parameters].index(text)
        return PARAMETER_SPACE + index

    @staticmethod
    def typed(text: str, kind: str) -> str:
        if kind == "bf16":
            return f"from_bfloat16({text})"
        if kind == "bf16x2":
            return f"from_bfloat16({text}.view('u2'))"
        if kind == "e4m3x2":
            return f"from_fp8(np.ascontiguousarray({text}).view('u1'), 'e4m3')"
        if kind in PACKED:
            return f"{text}.view('{PACKED[kind]}')"
        if kind in FLOATS:
            return f"{text}.view('{FLOATS[kind]}')"
        return f"{text}.view('i{width_of(kind) // 8}')" if kind[0] == "s" else text

    def put(self, destination: Operand, text: str, kind: str) -> None:
        """Store values of `kind` (bf16, e4m3: float32) in a register."""
        assert isinstance(destination, str), destination
        if destination == "_":
            return
        if kind in ("bf16", "bf16x2"):
            text = f"to_bfloat16({text})"
            text = f"{text}.view('u4')" if kind == "bf16x2" else text
        elif kind == "e4m3x2":
            text = f"to_fp8({text}, 'e4m3').view('u2')"
        elif kind != "pred":
            native, width = type_of(destination), width_of(kind)
            target = f"u{width_of(native) // 8}"
            if width_of(native) == width:
                text = f"({text}).view('{target}')" if kind[0] not in "bu" or "x" in kind else text
            elif is_float(kind):
                raise NotImplementedError(destination)
            else:
                text = f"({text}).astype('{'i' if kind[0] == 's' else 'u'}{target[1:]}').view('{target}')"
        slot = self.register(destination)
        if self.mask == "M":  # in a divergent block the other threads keep what they have
            self.lines.append(f"T = {text}")
            self.lines.append(f"{slot} = T if M is None else pick(M, T, {slot})")
        else:
            self.lines.append(f"{slot} = pick(G, {text}, {slot})")

    def address(self, place: Address) -> str:
        if self.is_register(place.base):
            text = self.register(place.base)
            kind = type_of(place.base)
        else:
            text, kind = f"m.fill({self.constant(np.uint32(self.number(place.base)))})", "u32"
        if place.offset:
            text += f" + {self.constant(np.dtype(f'u{width_of(kind) // 8}').type(place.offset % 2 ** width_of(kind)))}"
        return f"({text})"
