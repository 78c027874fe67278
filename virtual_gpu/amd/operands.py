"""How operands of AMD's instructions are written in Python: registers, literals, and what encodings do to them."""

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from virtual_gpu.amd.fragments import LANES, dpp_sources

__all__ = ["ACCUMULATORS", "EXEC", "M0", "VCC", "OperandWriter", "register"]

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
    """Return a register's file ("V" or "S"), its number and how many there are; None for anything else."""
    if operand in SPECIAL:
        return ("S", *SPECIAL[operand])
    found = re.fullmatch(r"([vas])(?:(\d+)|\[(\d+):(\d+)\])", operand)
    if found is None:
        return None
    first = int(found[2] or found[3])
    count = int(found[4]) - first + 1 if found[4] else 1
    return "S" if found[1] == "s" else "V", first + ACCUMULATORS * (found[1] == "a"), count


@dataclass(frozen=True)
class _Lanes:
    """What DPP does: which lane each lane reads its first source from ("row_shr:8"), and the lanes that are written."""

    control: str
    written: NDArray[np.bool_]


def _take_lanes(modifiers: dict[str, str]) -> _Lanes | None:
    """Take the modifiers of DPP, if there are some: without bound_ctrl lanes with none to read keep their value."""
    if modifiers.pop("dpp", None) is None:
        return None
    key = next(key for key in modifiers if key.startswith(("quad", "row")) and key != "row_mask")
    item = modifiers.pop(key)
    control = f"{key}:{item}" if item else key
    lane = np.arange(LANES)
    written = np.ones(LANES, bool)
    for name, group in (("row_mask", lane // 16), ("bank_mask", lane % 16 // 4)):
        written &= int(modifiers.pop(name, "0xf"), 0) >> group & 1 == 1
    bound = modifiers.pop("bound_ctrl", None)
    if bound not in (None, "1"):
        raise NotImplementedError(f"bound_ctrl:{bound}")
    if bound is None:
        written &= dpp_sources(control)[1]
    return _Lanes(control, written)


class OperandWriter:
    """Writes the lines of one block, and the operands in them."""

    def __init__(self) -> None:
        self.constants: list[Any] = []
        self.lines: list[str] = []
        self.modifiers: dict[str, str] = {}
        """Those of the instruction at hand that nothing has taken yet."""
        self.dpp: _Lanes | None = None
        self.part = "DWORD"
        """Of a register which part SDWA writes, the rest as zeros."""

    def begin(self, modifiers: dict[str, str]) -> None:
        """Take up an instruction: whoever writes it takes its modifiers out."""
        self.modifiers = dict(modifiers)
        self.dpp = _take_lanes(self.modifiers)
        self.part = self.modifiers.pop("dst_sel", "DWORD")
        if self.modifiers.pop("dst_unused", "UNUSED_PAD") != "UNUSED_PAD":
            raise NotImplementedError("what is kept of a result's register")

    def finish(self) -> None:
        """Raise where a modifier is left that nothing has taken."""
        if self.modifiers or self.dpp is not None:
            raise NotImplementedError(f"modifiers {self.modifiers or self.dpp}")
        if self.part != "DWORD":
            raise NotImplementedError("a part of a register as the result")

    def take_lanes(self) -> str:
        """Take the lanes that DPP writes: give what says where a result goes."""
        lanes, self.dpp = self.dpp, None
        return "X" if lanes is None or lanes.written.all() else f"X & {self.constant(lanes.written)}"

    def take_part(self, text: str, kind: str) -> tuple[str, str]:
        """Take the part of a register that SDWA writes: give the whole register that has a result there, its kind."""
        part, self.part = self.part, "DWORD"
        if part == "DWORD":
            return text, kind
        word, place = part.split("_")
        width = {"BYTE": 8, "WORD": 16}[word]
        return f"(({text}).view('u4') & {(1 << width) - 1}) << {width * int(place)}", "u4"

    def take_choices(self, key: str, count: int, default: int) -> list[int]:
        """Take the bits of a modifier like op_sel:[1,0]."""
        if key not in self.modifiers:
            return [default] * count
        return [int(item) for item in self.modifiers.pop(key).strip("[]").split(",")]

    @staticmethod
    def kind(text: str) -> str:
        """Return NumPy's name of "i32", "u64", "f32", "b32"."""
        return text[0].replace("b", "u") + str(int(text[1:]) // 8)

    def constant(self, value: Any) -> str:
        self.constants.append(value)
        return f"K[{len(self.constants) - 1}]"

    def number(self, operand: str, file: str = "S") -> int:
        """Return the number of a register, which must be of `file`."""
        found = register(operand)
        if found is None or found[0] != file:
            raise NotImplementedError(operand)
        return found[1]

    def value(self, operand: str, kind: str) -> str:
        """Write an operand as values of `kind` ("u2", "i4", "f8"); floats may be negated; 16 bits are lower halves."""
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
        of_file = "S" * (file == "S")
        if kind[1] == "2":
            return f"{of_file}U[{number}].astype('u2').view('{kind}')"
        if kind[1] == "4":
            return f"{of_file}{kind[0].upper()}[{number}]"
        pair = f"SQ[{number}]" if file == "S" else f"pair(U[{number}], U[{number + 1}])"
        return pair if kind == "u8" else f"{pair}.view('{kind}')"

    @staticmethod
    def literal(text: str, kind: str) -> Any:
        width = 8 * int(kind[1])
        if re.fullmatch(r"-?\d+\.\d+", text):
            if kind[0] == "f":
                return np.dtype(kind).type(text)
            if width == 64:
                raise NotImplementedError(text)
            bits = int(np.float32(text).view(np.uint32))
        elif kind == "f8":
            raise NotImplementedError(text)
        else:
            bits = int(text, 0) % 2**width
        return np.array(bits, f"u{kind[1]}").view(kind)[()]

    def sources(self, operands: tuple[str, ...], kinds: list[str]) -> list[str]:
        """Write vector sources with what the encoding does to them: a lane's neighbour (DPP), or a part (SDWA)."""
        if len(operands) != len(kinds):
            raise NotImplementedError("another number of operands")
        values = []
        for index, (operand, kind) in enumerate(zip(operands, kinds, strict=True)):
            part = self.modifiers.pop(f"src{index}_sel", "DWORD")
            signed = re.fullmatch(r"sext\((.*)\)", operand)
            if kind == "h":
                half = {"DWORD": 0, "WORD_0": 0, "WORD_1": 1}[part]
                values.append(f"halves({self.value(operand, 'u4')}, {half})")
            elif part != "DWORD":
                word, place = part.split("_")
                width = {"BYTE": 8, "WORD": 16}[word]
                text = self.value(signed[1] if signed else operand, "u4")
                text = f"({text} >> {width * int(place)}).astype('{'i' if signed else 'u'}{width // 8}')"
                values.append(f"{text}.astype('{'i' if signed else 'u'}{kind[1]}').view('{kind}')")
            elif index == 0 and self.dpp is not None:
                values.append(f"r.dpp({self.value(operand, 'u4')}, {self.dpp.control!r}, X).view('{kind}')")
            else:
                values.append(self.value(operand, kind))
        return values

    def put(self, operand: str, text: str, kind: str, where: str = "X") -> None:
        """Store vectors of `kind` in a register or a pair."""
        number = self.number(operand, "V")
        if kind[1] == "8":
            words = f"({text}).view('u8')" if kind[0] == "f" else text
            self.lines.append(f"r.put_pair({number}, {words}, {where})")
        else:
            self.lines.append(f"copyto({kind[0].upper()}[{number}], {text}, where={where})")
