"""Translate AMDGCN to Python: each block becomes a function that computes all wavefronts at it at once, with NumPy.

A vector register is an array (waves, 64) of 32-bit words, a scalar register one (waves, 1); both have views as signed
integers and float32 (U, I, F and SU, SI, SF in the code), pairs of scalar registers as 64-bit words and as bytes
(SQ, SB). X are the lanes that run an instruction (EXEC of the waves at hand), A those waves; True stands for all.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..control_flow import reverse_postorder
from . import operations
from .instructions import COMPARISONS, IMMEDIATE, NOTHING, SCALAR, VECTOR
from .parser import ENDS_BLOCK, Instruction, Kernel

__all__ = ["EXEC", "M0", "VCC", "BlockCode", "Translation", "translate"]

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
SIZES = {"dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16, "ushort": 2, "short": 2, "ubyte": 1, "byte": 1}


@dataclass(frozen=True)
class BlockCode:
    """A block's function (machine, mask of waves) and how it ends."""

    run: Callable[[Any, Any], None]
    branch: Instruction | None


@dataclass(frozen=True)
class Translation:
    """A kernel's blocks as code."""

    kernel: Kernel
    blocks: tuple[BlockCode, ...]
    order: tuple[int, ...]
    """For each block its place in reverse postorder: before all that come after it, but for loops."""
    constants: list[Any] = field(repr=False)


def translate(kernel: Kernel) -> Translation:
    """Translate all blocks of `kernel`.

    Raises:
        NotImplementedError: for an instruction that the machine doesn't know, with its line.
    """
    constants: list[Any] = []
    sources, branches = [], []
    for number, block in enumerate(kernel.blocks):
        writer = _Writer(constants)
        branch = None
        for instruction in block:
            if instruction.name.startswith(ENDS_BLOCK):
                branch = instruction
            else:
                writer.add(instruction)
        begin = f"def block_{number}(m, A):\n    U, I, F, SU, SI, SF, SQ, SB, SCC = m.views\n    X = m.lanes(A)\n    "
        sources.append(begin + "\n    ".join(writer.lines))
        branches.append(branch)
    names: dict[str, Any] = {
        "np": np,
        "K": constants,
        "copyto": np.copyto,
        **{name: getattr(operations, name) for name in operations.__all__},
    }
    exec(compile("\n".join(sources), f"<{kernel.name}>", "exec"), names)
    blocks = tuple(BlockCode(names[f"block_{number}"], branch) for number, branch in enumerate(branches))
    return Translation(kernel, blocks, reverse_postorder(_following(kernel), kernel.entry), constants)


def _following(kernel: Kernel) -> list[list[int]]:
    """Give for each block those that may come next; one past the last is the end."""
    following = []
    for index, block in enumerate(kernel.blocks):
        name = block[-1].name if block else ""
        after = [] if name in ("s_branch", "s_endpgm") else [index + 1]
        if name.startswith(("s_branch", "s_cbranch")):
            after.append(kernel.labels[block[-1].operands[0]])
        following.append(after)
    return following


def _register(operand: str) -> tuple[str, int, int] | None:
    """Give a register's file ("V" or "S"), its number and how many there are; None for anything else."""
    if operand in SPECIAL:
        return ("S", *SPECIAL[operand])
    found = re.fullmatch(r"([vas])(?:(\d+)|\[(\d+):(\d+)\])", operand)
    if found is None:
        return None
    first = int(found[2] or found[3])
    count = int(found[4]) - first + 1 if found[4] else 1
    return "S" if found[1] == "s" else "V", first + ACCUMULATORS * (found[1] == "a"), count


class _Writer:
    """Writes the lines of one block."""

    def __init__(self, constants: list[Any]):
        self.constants = constants
        self.lines: list[str] = []

    def add(self, instruction: Instruction) -> None:
        if instruction.name in NOTHING:
            return
        self.lines.append(f"m.line = {instruction.line}")
        try:
            self.write(instruction)
        except (KeyError, ValueError, NotImplementedError) as error:
            raise NotImplementedError(
                f"line {instruction.line}: the machine doesn't know {instruction.name} "
                f"{', '.join(instruction.operands)} {instruction.modifiers}"
            ) from error

    def write(self, instruction: Instruction) -> None:
        name, operands = instruction.name, instruction.operands
        if name in SCALAR:
            self.scalar(name, operands)
        elif name in VECTOR:
            self.vector(instruction)
        elif name.startswith("v_cmp_"):
            _, _, comparison, kind = name.split("_")
            left, right = self.sources(instruction, operands[1:], [self.kind(kind)] * 2)
            self.lines.append(f"m.put_mask({self.number(operands[0])}, {COMPARISONS[comparison](left, right)}, X, A)")
        elif name.startswith("s_cmp"):
            _, comparison, kind = name.replace("cmpk", "cmp").removeprefix("s_").split("_")
            left, right = (self.value(operand, self.kind(kind)) for operand in operands)
            self.lines.append(f"copyto(SCC, {COMPARISONS[comparison](left, right)}, where=A)")
        elif name.startswith(("buffer_", "global_", "ds_", "s_load_")):
            self.memory(name, operands, instruction.modifiers)
        else:
            self.special(instruction)

    # Registers, numbers and results.

    @staticmethod
    def kind(text: str) -> str:
        """Give NumPy's name of "i32", "u64", "f32", "b32"."""
        return text[0].replace("b", "u") + str(int(text[1:]) // 8)

    def constant(self, value: Any) -> str:
        self.constants.append(value)
        return f"K[{len(self.constants) - 1}]"

    def number(self, operand: str, file: str = "S") -> int:
        """Give the number of a register, which must be of `file`."""
        found = _register(operand)
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
        found = _register(operand)
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
                if instruction.modifiers.get("bound_ctrl") != "1" or instruction.modifiers["bank_mask"] != "0xf":
                    raise NotImplementedError("lanes that keep their value")
                control = next(
                    f"{key}:{item}" if item else key
                    for key, item in instruction.modifiers.items()
                    if key.startswith(("quad", "row")) and key != "row_mask"
                )
                values.append(f"m.dpp({self.value(operand, 'u4')}, {control!r}, X).view('{kind}')")
            else:
                values.append(self.value(operand, kind))
        return values

    def put(self, operand: str, text: str, kind: str, where: str = "X") -> None:
        """Store vectors of `kind` in a register or a pair."""
        number = self.number(operand, "V")
        if kind[1] == "8":
            self.lines.append(f"m.put_pair({number}, {text}, X)")
        else:
            self.lines.append(f"copyto({kind[0].upper()}[{number}], {text}, where={where})")

    # Instructions.

    def scalar(self, name: str, operands: tuple[str, ...]) -> None:
        kind, kinds, template, condition = SCALAR[name]
        if name.endswith("saveexec_b64"):
            operands = (operands[0], operands[1], "exec")
        if name in IMMEDIATE:
            immediate = (int(operands[-1], 0) & 0xFFFF ^ 0x8000) - 0x8000
            operands = (operands[0], *operands[:1] * (name != "s_movk_i32"), str(immediate))
        inputs = operands[1:] if kind else operands
        values = [self.value(operand, one) for operand, one in zip(inputs, kinds, strict=True)]
        self.lines.append(f"T = {template.format(*values)}")
        if condition:
            self.lines.append(f"C = {condition.format(*values)}")
        if kind:
            number = self.number(operands[0])
            if name.endswith("saveexec_b64"):
                self.lines.append(f"copyto(SQ[{number}], SQ[{EXEC}], where=A)")
                number = EXEC
            view = "SQ" if kind == "u8" else f"S{kind[0].upper()}"
            self.lines.append(f"copyto({view}[{number}], T, where=A)")
            if number in (EXEC, EXEC + 1):
                self.lines.append("X = m.lanes(A)")
        if condition:
            self.lines.append("copyto(SCC, C, where=A)")

    def vector(self, instruction: Instruction) -> None:
        kind, kinds, template = VECTOR[instruction.name]
        modifiers = instruction.modifiers
        if "clamp" in modifiers and instruction.name != "v_sub_u32" or "op_sel" in modifiers:
            raise NotImplementedError("a modifier")
        if modifiers.get("dst_sel", "DWORD") != "DWORD":
            raise NotImplementedError("a part of a register as the result")
        operands = instruction.operands
        if instruction.name == "v_fmac_f32":
            operands = (*operands, operands[0])
        values = self.sources(instruction, operands[1:], list(kinds))
        if "clamp" in modifiers:
            template = "subtract_to_zero({0}, {1})"
        where = "X"
        if modifiers.get("row_mask", "0xf") != "0xf":
            rows = np.repeat([int(modifiers["row_mask"], 0) >> row & 1 == 1 for row in range(4)], 16)
            where = f"X & {self.constant(rows)}"
        text = template.format(*values, **modifiers)
        self.put(operands[0], text, kind, where)

    def special(self, instruction: Instruction) -> None:
        name, operands, modifiers = instruction.name, instruction.operands, instruction.modifiers
        if name == "s_waitcnt":
            counts = [int(modifiers.get(key, 99)) for key in ("vmcnt", "lgkmcnt")]
            self.lines.append(f"m.wait({counts[0]}, {counts[1]}, A)")
        elif name == "v_cndmask_b32":
            no, yes = self.sources(instruction, operands[1:3], ["u4", "u4"])
            self.put(operands[0], f"np.where(mask_of_bits(SB[{self.number(operands[3])}]), {yes}, {no})", "u4")
        elif name == "v_addc_co_u32":
            left, right = (self.value(operand, "u4") for operand in operands[2:4])
            self.lines.append(f"T = mask_of_bits(SB[{self.number(operands[4])}]).astype('u4')")
            self.lines.append(f"C = carries({left}, {right}, T)")
            self.put(operands[0], f"{left} + {right} + T", "u4")
            self.lines.append(f"m.put_mask({self.number(operands[1])}, C, X, A)")
        elif name in ("v_mad_u64_u32", "v_mad_i64_i32"):
            kind = "u" if "u64" in name else "i"
            left, right = (f"{self.value(operand, f'{kind}4')}.astype('{kind}8')" for operand in operands[2:4])
            self.lines.append(f"P = {left} * {right}")
            self.lines.append(f"T = (P + {self.value(operands[4], f'{kind}8')}).view('u8')")
            self.put(operands[0], "T", "u8")
            if kind == "i" and operands[4] != "0":
                raise NotImplementedError("a sum whose sign may overflow")
            self.lines.append(f"m.put_mask({self.number(operands[1])}, T < P.view('u8'), X, A)")
        elif name == "v_div_scale_f32":
            values = ", ".join(self.value(operand, "f4") for operand in operands[2:])
            self.lines.append(f"T, C = divide_scale({values})")
            self.put(operands[0], "T", "f4")
            self.lines.append(f"m.put_mask({self.number(operands[1])}, C, X, A)")
        elif name == "v_readlane_b32":
            lane = int(operands[2])
            text = f"U[{self.number(operands[1], 'V')}][:, {lane}:{lane + 1}]"
            self.lines.append(f"copyto(SU[{self.number(operands[0])}], {text}, where=A)")
        elif name == "v_writelane_b32":
            lane = int(operands[2])
            text = f"U[{self.number(operands[0], 'V')}][:, {lane}:{lane + 1}]"
            self.lines.append(f"copyto({text}, {self.value(operands[1], 'u4')}, where=A)")
        elif name == "v_readfirstlane_b32":
            text = f"m.first_lane(U[{self.number(operands[1], 'V')}], X)"
            self.lines.append(f"copyto(SU[{self.number(operands[0])}], {text}, where=A)")
        elif swap := re.fullmatch(r"v_permlane(16|32)_swap_b32", name):
            left, right = (str(self.number(operand, "V")) for operand in operands)
            self.lines.append(f"m.swap_lanes({left}, {right}, {swap[1]}, X, A)")
        elif product := re.fullmatch(r"v_mfma_f32_(\d+)x\1x(\d+)_(bf16|f16|f32)", name):
            a, b = (_register(operand) for operand in operands[1:3])
            start: Any = _register(operands[3])
            if a is None or b is None or modifiers or (start is None and operands[3] != "0"):
                raise NotImplementedError("a matrix product of constants")
            numbers = self.number(operands[0], "V"), a[1:], b[1:], start and start[1]
            self.lines.append(f"m.matrix_product({numbers}, {product[1]}, {product[2]}, {product[3]!r}, A)")
        elif name.startswith("v_pk_"):
            self.packed(name, operands, modifiers)
        elif name.startswith("v_fma_mix"):
            self.mixed(name, operands, modifiers)
        else:
            raise NotImplementedError(name)

    @staticmethod
    def choices(modifiers: dict[str, str], key: str, count: int, default: int) -> list[int]:
        """Give the bits of a modifier like op_sel:[1,0]."""
        if key not in modifiers:
            return [default] * count
        return [int(item) for item in modifiers[key].strip("[]").split(",")]

    def packed(self, name: str, operands: tuple[str, ...], modifiers: dict[str, str]) -> None:
        """Write an instruction on pairs of float32; each half of the result chooses halves of the sources."""
        count = len(operands) - 1
        chosen = [self.choices(modifiers, key, count, index) for index, key in enumerate(("op_sel", "op_sel_hi"))]
        negated = [self.choices(modifiers, key, count, 0) for key in ("neg_lo", "neg_hi")]
        texts = []
        for half in range(2):
            values = []
            for index, operand in enumerate(operands[1:]):
                found = _register(operand)
                upper = chosen[half][index]
                if name == "v_pk_mov_b32":
                    upper = chosen[0][index]
                if found is None:
                    if upper:
                        raise NotImplementedError("the upper half of a constant")
                    text = self.value(operand, "f4")
                else:
                    text = f"{'S' * (found[0] == 'S')}F[{found[1] + upper}]"
                values.append(f"(-{text})" if negated[half][index] else text)
            template = {"add": "{0} + {1}", "mul": "{0} * {1}", "fma": "fused({0}, {1}, {2})", "mov": f"+{{{half}}}"}
            texts.append(template[name.split("_")[2]].format(*values))
        number = self.number(operands[0], "V")
        self.lines.append(f"T, P = {texts[0]}, {texts[1]}")
        self.lines.append(f"copyto(F[{number}], T, where=X)")
        self.lines.append(f"copyto(F[{number + 1}], P, where=X)")

    def mixed(self, name: str, operands: tuple[str, ...], modifiers: dict[str, str]) -> None:
        """Write a fused multiplication and addition whose sources may be float16 each."""
        uppers, narrow = self.choices(modifiers, "op_sel", 3, 0), self.choices(modifiers, "op_sel_hi", 3, 0)
        values = [
            f"halves({self.value(operand, 'u4')}, {upper})"
            if half and _register(operand)
            else self.value(operand, "f4")
            for operand, upper, half in zip(operands[1:], uppers, narrow, strict=True)
        ]
        text = f"({values[0]}.astype('f8') * {values[1]} + {values[2]})"
        if name == "v_fma_mix_f32":
            self.put(operands[0], f"{text}.astype('f4')", "f4")
        else:
            number = self.number(operands[0], "V")
            rounded = f"{text}.astype('f2').view('u2').astype('u4')"
            keep, shift = (0xFFFF, 16) if name == "v_fma_mixhi_f16" else (0xFFFF0000, 0)
            self.put(operands[0], f"(U[{number}] & {keep}) | ({rounded} << {shift})", "u4")

    def memory(self, name: str, operands: tuple[str, ...], modifiers: dict[str, str]) -> None:
        unit, operation, *rest = name.split("_")
        offset = int(modifiers.get("offset", "0"), 0)
        if unit == "ds":
            self.shared(operation, rest, operands, offset, modifiers)
        elif unit == "s":
            count = int(rest[0].removeprefix("dword").removeprefix("x") or 1)
            text = f"{self.value(operands[1], 'u8')} + {self.value(operands[2], 'u4')} + {offset}"
            self.lines.append(f"m.scalar_load({self.number(operands[0])}, {count}, {text}, A)")
        else:
            self.device(unit, operation, rest, operands, offset, modifiers)

    def device(
        self,
        unit: str,
        operation: str,
        rest: list[str],
        operands: tuple[str, ...],
        offset: int,
        modifiers: dict[str, str],
    ) -> None:
        """Write a load or store of global memory, or a load from there to shared memory."""
        to_shared = "lds" in modifiers or rest[0] == "lds"
        size = SIZES[rest[to_shared and unit == "global"]]
        upper = rest[-1] == "hi"
        if set(modifiers) - {"offset", "offen", "lds"} or (upper and operation == "load"):
            raise NotImplementedError("a modifier")
        places = list(operands)
        register = "None"
        if not to_shared:
            register = str(self.number(places.pop(unit == "global" and operation == "store"), "V"))
        if unit == "buffer":
            lanes = "0" if places[0] == "off" else self.value(places[0], "u4")
            start = self.value(places[2], "u4")
            text = f"*m.buffer({lanes}, {self.number(places[1])}, {start}, {offset}, {size}, X)"
        else:
            base = self.value(places[0], "u8" if places[1] == "off" else "u4")
            if places[1] != "off":
                base = f"{self.value(places[1], 'u8')} + {base}"
            text = f"{base} + {self.constant(np.uint64(offset % 2**64))}, X"
        last = f"X, A, {offset}" if operation == "load" else f"A, {2 * upper}"
        self.lines.append(f"m.{operation}({register}, {size}, {text}, {last})")

    def shared(
        self, operation: str, rest: list[str], operands: tuple[str, ...], offset: int, modifiers: dict[str, str]
    ) -> None:
        kind = rest[0]
        size = int(kind[1:]) // 8
        if operation == "bpermute":
            values = ", ".join(self.value(operand, "u4") for operand in operands[1:])
            self.lines.append(f"m.permute({self.number(operands[0], 'V')}, {values}, {offset}, X, A)")
            return
        if operation in ("add", "or"):
            address, value = (self.value(operand, "u4") for operand in operands)
            function = {"add": "np.add", "or": "np.bitwise_or"}[operation]
            self.lines.append(f"m.shared_atomic({function}, {address}, {offset}, {value}, X, A)")
            return
        found = re.fullmatch(r"(read|write)(2?)(st64)?", operation)
        if found is None or rest[1:] not in ([], ["tr", "b16"], ["d16", "hi"]):
            raise NotImplementedError(operation)
        unit = size * (64 if found[3] else 1)
        offsets = (
            tuple(unit * int(modifiers.get(key, "0"), 0) for key in ("offset0", "offset1")) if found[2] else (offset,)
        )
        if found[1] == "read":
            transposes = rest[1:2] == ["tr"]
            text = f"{self.number(operands[0], 'V')}, {size}, {self.value(operands[1], 'u4')}, {offsets}, {transposes}"
            self.lines.append(f"m.shared_read({text}, X, A)")
        else:
            registers = tuple(self.number(operand, "V") for operand in operands[1:])
            shift = 2 if rest[1:] else 0
            text = f"{registers}, {size}, {self.value(operands[0], 'u4')}, {offsets}, {shift}"
            self.lines.append(f"m.shared_write({text}, X, A)")
