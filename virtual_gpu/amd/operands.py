"""How operands of AMD's instructions are written in Python: registers, literals, and what encodings do to them."""

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from virtual_gpu.amd.fragments import LANES, dpp_sources
from virtual_gpu.amd.parser import Instruction

__all__ = ["ACCUMULATORS", "EXEC", "M0", "VCC", "OperandWriter", "dpp_lanes", "register"]

VCC, M0, EXEC = 106, 124, 126
"""Where the named scalar registers are among the numbered ones."""
SPECIAL = {
    "vcc": (VCC, 2),
    "vcc_lo": (VCC, 1),
    "vcc_hi": (VCC + 1, 1),
    "m0": (M0, 1),
    "exec": (EXEC, 2),
    "exec_lo": (EXEC, 1),
    "exec_hi": (EXEC + 1, 1),
}
ACCUMULATORS = 256
"""Where registers a0, a1, ... are among the vector registers."""


def register(operand: str) -> tuple[str, int, int] | None:
    """Give a register's file ("V" or "S"), its number and how many there are; None for anything else."""
    if operand in SPECIAL:
        return ("S", *SPECIAL[operand])
    found = re.fullmatch(r"([vas])(?:(\d+)|\[(\d+):(\d+)\])", operand)
    if found is None:
        return None
    first = int(found[2] or found[3])
    count = int(found[4]) - first + 1 if found[4] else 1
    return "S" if found[1] == "s" else "V", first + ACCUMULATORS * (found[1] == "a"), count


def dpp_control(instruction: Instruction) -> str:
    """Give which lane each lane reads from, as assembly names it ("row_shr:8")."""
    return next(
        f"{key}:{item}" if item else key
        for key, item in instruction.modifiers.items()
        if key.startswith(("quad", "row")) and key != "row_mask"
    )


def dpp_lanes(instruction: Instruction) -> NDArray[np.bool_]:
    """Give the lanes that a DPP instruction writes: of its rows and banks; no bound_ctrl: those with a lane to read."""
    lane = np.arange(LANES)
    lanes = np.ones(LANES, bool)
    for key, group in (("row_mask", lane // 16), ("bank_mask", lane % 16 // 4)):
        lanes &= int(instruction.modifiers.get(key, "0xf"), 0) >> group & 1 == 1
    if instruction.modifiers.get("bound_ctrl") != "1":
        lanes &= dpp_sources(dpp_control(instruction))[1]
    return lanes


class OperandWriter:
    """Writes the lines of one block, and the operands in them."""

    def __init__(self, constants: list[Any]):
        self.constants = constants
        self.lines: list[str] = []

    @staticmethod
    def kind(text: str) -> str:
        """Give NumPy's name of "i32", "u64", "f32", "b32"."""
        return text[0].replace("b", "u") + str(int(text[1:]) // 8)

    def constant(self, value: Any) -> str:
        self.constants.append(value)
        return f"K[{len(self.constants) - 1}]"

    def number(self, operand: str, file: str = "S") -> int:
        """Give the number of a register, which must be of `file`."""
        found = register(operand)
        if found is None or found[0] != file:
            raise NotImplementedError(operand)
        return found[1]

    def value(self, operand: str, kind: str) -> str:
        """Write an operand as values of `kind`: "u4", "i4", "f4", "u8" or "i8"; float32 may be negated."""
        if kind[0] == "f":
            if inner := re.fullmatch(r"-(?=[vas|])(.*)|neg\((.*)\)", operand):
                return f"(-{self.value(inner[1] or inner[2], kind)})"
            if inner := re.fullmatch(r"\|(.*)\|", operand):
                return f"abs({self.value(inner[1], kind)})"
        found = register(operand)
        if found is None:
            return self.constant(self.literal(operand, kind))
        file, number, count = found
        if count != (2 if kind[1] == "8" else 1):
            raise NotImplementedError(operand)
        if file == "S":
            if kind[1] == "8":
                return f"SQ[{number}]" + ".view('i8')" * (kind == "i8")
            return f"S{kind[0].upper()}[{number}]"
        if kind[1] == "8":
            return f"pair(U[{number}], U[{number + 1}])" + ".view('i8')" * (kind == "i8")
        return f"{kind[0].upper()}[{number}]"

    @staticmethod
    def literal(text: str, kind: str) -> Any:
        width = 8 * int(kind[1])
        if re.fullmatch(r"-?\d+\.\d+", text):
            if width == 64:
                raise NotImplementedError(text)
            bits = int(np.float32(text).view(np.uint32))
        else:
            bits = int(text, 0) % 2**width
        return np.array(bits, f"u{kind[1]}").view(kind)[()]

    def sources(self, instruction: Instruction, operands: tuple[str, ...], kinds: list[str]) -> list[str]:
        """Write vector sources with what the encoding does to them: a lane's neighbour (DPP), or a part (SDWA)."""
        if len(operands) != len(kinds):
            raise NotImplementedError("another number of operands")
        values = []
        for index, (operand, kind) in enumerate(zip(operands, kinds, strict=True)):
            part = instruction.modifiers.get(f"src{index}_sel", "DWORD")
            if kind == "h":
                values.append(f"halves({self.value(operand, 'u4')}, {int(part == 'WORD_1')})")
            elif part != "DWORD":
                word, place = part.split("_")
                width = {"BYTE": 8, "WORD": 16}[word]
                text = self.value(operand, "u4")
                values.append(f"(({text} >> {width * int(place)}) & {2**width - 1}).view('{kind}')")
            elif index == 0 and "dpp" in instruction.modifiers:
                control = dpp_control(instruction)
                values.append(f"r.dpp({self.value(operand, 'u4')}, {control!r}, X).view('{kind}')")
            else:
                values.append(self.value(operand, kind))
        return values

    def put(self, operand: str, text: str, kind: str, where: str = "X") -> None:
        """Store vectors of `kind` in a register or a pair."""
        number = self.number(operand, "V")
        if kind[1] == "8":
            self.lines.append(f"r.put_pair({number}, {text}, X)")
        else:
            self.lines.append(f"copyto({kind[0].upper()}[{number}], {text}, where={where})")
