"""Write Python for the operands of PTX instructions: registers, numbers, addresses, and where results go."""

from typing import Any

import numpy as np

from virtual_gpu.nvidia.parser import Address, Kernel, Operand

__all__ = ["FLOATS", "PARAMETER_SPACE", "OperandWriter", "width_of"]

PARAMETER_SPACE = 1 << 30
"""Where the addresses of parameters begin, one for each: no memory is read through them but descriptors."""
FLOATS = {"f16": "f2", "f32": "f4", "f64": "f8"}


def width_of(kind: str) -> int:
    """Give the bits of a type: "s32" 32, "bf16x2" 32, "f32x2" 64."""
    number, _, lanes = kind.lstrip("bfsu").partition("x")
    return int(number) * int(lanes or 1)


class OperandWriter:
    """Collects the lines of one block, and knows how each operand is written in them."""

    def __init__(self, registers: dict[str, int], constants: list[Any], kernel: Kernel):
        self.registers, self.constants, self.kernel = registers, constants, kernel
        self.lines: list[str] = []
        self.mask = "M"
        """What guards the instruction at hand; None at run time where all threads run it."""

    def register(self, name: str) -> int:
        return self.registers.setdefault(name, len(self.registers))

    def is_register(self, operand: Operand) -> bool:
        return isinstance(operand, str) and (operand in self.registers or (operand[0] == "%" and operand[1] in "pr"))

    def constant(self, value: Any) -> str:
        self.constants.append(value)
        return f"K[{len(self.constants) - 1}]"

    def native(self, register: str) -> str:
        """Give the type of a register by its name."""
        if register.startswith("%rs"):
            return "u16"
        return "u64" if register.startswith("%rd") else "u32" if register.startswith("%r") else "pred"

    def value(self, operand: Operand, kind: str) -> str:
        """Write an operand as values of `kind`; bf16 as float32."""
        assert isinstance(operand, str), operand
        if kind == "pred":
            if self.is_register(operand):
                return f"R[{self.register(operand)}]"
            return self.constant(np.bool_(int(operand, 0) != 0))
        width = width_of(kind)
        if operand.startswith("%") and not self.is_register(operand):
            return f"m.special({operand!r})"
        if self.is_register(operand):
            native = self.native(operand)
            text = f"R[{self.register(operand)}]"
            if native == "pred":
                raise NotImplementedError(operand)
            if width_of(native) != width:
                text = f"{text}.astype('u{width // 8}')"
        else:
            text = self.constant(np.array(self.number(operand), np.uint64).astype(f"u{width // 8}")[()])
        return self.typed(text, kind)

    def number(self, text: str) -> int:
        """Give the bits of a literal, or the address of a name."""
        if text.startswith(("0f", "0d")):
            return int(text[2:], 16)
        if text[0].isdigit() or text[0] == "-":
            return int(text.removesuffix("U"), 0) & 0xFFFFFFFFFFFFFFFF
        if text == "global_smem":
            return 0
        index = [parameter.name for parameter in self.kernel.parameters].index(text)
        return PARAMETER_SPACE + index

    @staticmethod
    def typed(text: str, kind: str) -> str:
        if kind == "bf16":
            return f"from_bfloat16({text})"
        if kind == "bf16x2":
            return f"from_bfloat16(np.atleast_1d({text}).view('u2'))"
        if kind in ("f16x2", "f32x2"):
            return f"np.atleast_1d({text}).view('{FLOATS[kind[:3]]}')"
        if kind in FLOATS:
            return f"{text}.view('{FLOATS[kind]}')"
        return f"{text}.view('i{width_of(kind) // 8}')" if kind[0] == "s" else text

    def put(self, destination: Operand, text: str, kind: str) -> None:
        """Store values of `kind` (bf16: float32) in a register."""
        assert isinstance(destination, str), destination
        if destination == "_":
            return
        if kind in ("bf16", "bf16x2"):
            text = f"to_bfloat16({text})"
            text = f"{text}.view('u4')" if kind == "bf16x2" else text
        elif kind != "pred":
            native, width = self.native(destination), width_of(kind)
            target = f"u{width_of(native) // 8}"
            if width_of(native) == width:
                text = f"({text}).view('{target}')" if kind[0] not in "bu" or "x" in kind else text
            else:
                text = f"({text}).astype('{'i' if kind[0] == 's' else 'u'}{target[1:]}').view('{target}')"
        slot = self.register(destination)
        self.lines.append(f"R[{slot}] = {text}" if self.mask == "M" else f"R[{slot}] = pick(G, {text}, R[{slot}])")
        if self.mask == "M":
            # In a divergent block the other threads keep what they have.
            self.lines[-1] = f"T = {text}"
            self.lines.append(f"R[{slot}] = T if M is None else pick(M, T, R[{slot}])")

    def address(self, place: Address) -> str:
        if self.is_register(place.base):
            text = f"R[{self.register(place.base)}]"
            kind = self.native(place.base)
        else:
            text, kind = f"m.fill({self.constant(np.uint32(self.number(place.base)))})", "u32"
        if place.offset:
            text += f" + {self.constant(np.dtype(f'u{width_of(kind) // 8}').type(place.offset % 2 ** width_of(kind)))}"
        return f"({text})"
