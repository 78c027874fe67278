"""Translate AMDGCN to Python: each block becomes a function that computes all wavefronts at it at once, with NumPy.

A vector register is an array (waves, 64) of 32-bit words, a scalar register one (waves, 1); both have views as signed
integers and float32 (U, I, F and SU, SI, SF in the code), pairs of scalar registers as 64-bit words and as bytes
(SQ, SB). X are the lanes that run an instruction (EXEC of the waves at hand), A those waves; True stands for all.
"""

import functools
import re
from dataclasses import dataclass
from typing import Any

from virtual_gpu.amd import operations
from virtual_gpu.amd.instructions import COMPARISONS, IMMEDIATE, NOTHING, SCALAR, VECTOR
from virtual_gpu.amd.memory_instructions import MemoryWriter
from virtual_gpu.amd.operands import EXEC, register
from virtual_gpu.amd.parser import ENDS_BLOCK, Instruction, Kernel
from virtual_gpu.control_flow import BlockOrder, order_blocks
from virtual_gpu.programs import BlockCode, unknown_instructions

__all__ = ["Translation", "translate"]

PACKED = {
    "v_pk_add_f32": ("{0} + {1}", "{0} + {1}"),
    "v_pk_mul_f32": ("{0} * {1}", "{0} * {1}"),
    "v_pk_fma_f32": ("fused({0}, {1}, {2})", "fused({0}, {1}, {2})"),
    "v_pk_mov_b32": ("{0}", "{1}"),
}
"""Instructions on pairs of 32-bit words, and what the lower and the upper word of the result are."""

SATURATION = ("hwreg(HW_REG_MODE, 23, 1)", "1")
"""What sets FP16_OVFL, which is for fp8 too."""


@dataclass(frozen=True)
class Translation:
    """A kernel's blocks as functions of (machine, mask of waves)."""

    kernel: Kernel
    blocks: tuple[BlockCode[Instruction], ...]
    order: BlockOrder


def translate(kernel: Kernel) -> Translation:
    """Translate all blocks of `kernel`.

    Raises:
        NotImplementedError: for an instruction that the machine doesn't know, with its line.
    """
    fp8 = "e4m3fnuz" if kernel.target == "gfx942" else "e4m3"
    blocks = tuple(_translated(block, fp8) for block in kernel.blocks)
    return Translation(kernel, blocks, order_blocks(_following(kernel), kernel.entry))


@functools.lru_cache(1 << 14)
def _translated(block: tuple[Instruction, ...], fp8: str) -> BlockCode[Instruction]:
    writer = _Writer(fp8)
    branch = None
    for instruction in block:
        if instruction.name.startswith(ENDS_BLOCK):
            branch = instruction
        else:
            writer.add(instruction)
    begin = (
        "def block(m, A):",
        "r, u = m.registers, m.memory_unit",
        "U, I, F, SU, SI, SF, SQ, SB, SCC = r.views",
        "X = r.lanes(A)",
    )
    return BlockCode("\n    ".join((*begin, *writer.lines)), writer.constants, operations, branch)


def _following(kernel: Kernel) -> list[list[int]]:
    """Return for each block those that may come next; one past the last is the end."""
    following = []
    for index, block in enumerate(kernel.blocks):
        name = block[-1].name if block else ""
        after = [] if name in ("s_branch", "s_endpgm") else [index + 1]
        if name.startswith(("s_branch", "s_cbranch")):
            after.append(kernel.labels[block[-1].operands[0]])
        following.append(after)
    return following


class _Writer(MemoryWriter):
    """Writes the lines of one block. fp8: what the GPU takes codes of 8 bits for, "e4m3" or "e4m3fnuz"."""

    def __init__(self, fp8: str) -> None:
        super().__init__()
        self.fp8 = fp8

    def add(self, instruction: Instruction) -> None:
        text = f"{instruction.name} {', '.join(instruction.operands)} {instruction.modifiers or ''}".rstrip()
        self.lines.append(f"m.line = {instruction.line}")
        with unknown_instructions(instruction.line, text):
            self.begin(instruction.modifiers)
            self.write(instruction.name, instruction.operands)
            self.finish()

    def write(self, name: str, operands: tuple[str, ...]) -> None:
        if name in NOTHING:
            return
        if name in SCALAR:
            self.scalar(name, operands)
        elif name in VECTOR:
            self.vector(name, operands)
        elif name == "v_cmp_class_f32":
            values, classes = self.sources(operands[1:], ["f4", "u4"])
            self.lines.append(f"r.put_mask({self.number(operands[0])}, is_of_class({values}, {classes}), X, A)")
        elif name.startswith("v_cmp_"):
            _, _, comparison, kind = name.split("_")
            left, right = self.sources(operands[1:], [self.kind(kind)] * 2)
            if self.take_lanes() != "X":
                raise NotImplementedError("lanes that keep their value")
            self.lines.append(f"r.put_mask({self.number(operands[0])}, {COMPARISONS[comparison](left, right)}, X, A)")
        elif name.startswith("s_cmp"):
            _, comparison, kind = name.replace("cmpk", "cmp").removeprefix("s_").split("_")
            left, right = (self.value(operand, self.kind(kind)) for operand in operands)
            self.lines.append(f"copyto(SCC, {COMPARISONS[comparison](left, right)}, where=A)")
        elif name.startswith(("buffer_", "global_", "ds_", "s_load_")):
            self.memory(name, operands)
        else:
            self.special(name, operands)

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
                self.lines.append("X = r.lanes(A)")
        if condition:
            self.lines.append("copyto(SCC, C, where=A)")

    def vector(self, name: str, operands: tuple[str, ...]) -> None:
        kind, kinds, template = VECTOR[name]
        if name == "v_fmac_f32":
            operands = (*operands, operands[0])
        values = self.sources(operands[1:], list(kinds))
        if name == "v_sub_u32" and self.modifiers.pop("clamp", None) is not None:
            template = "subtract_to_zero({0}, {1})"
        table = {"fp8": repr(self.fp8)}
        if "{bitop3}" in template:
            table["bitop3"] = self.modifiers.pop("bitop3")
        if "_fp8" in name:
            upper_source, *others, upper_result = self.take_choices("op_sel", len(operands), 0)
            to_fp8 = "_pk_fp8_" in name
            if any(others) or (upper_source if to_fp8 else upper_result):
                raise NotImplementedError("another half of a register")
            if upper_source:
                values[0] = f"({values[0]} >> 16)"
            if to_fp8:  # the other half of the result's register stays
                self.lines.append("r.require_saturation()")
                number, keep = self.number(operands[0], "V"), 0xFFFF if upper_result else 0xFFFF0000
                template = f"(U[{number}] & {keep}) | ({template}) << {16 * upper_result}"
        self.put(operands[0], *self.take_part(template.format(*values, **table), kind), self.take_lanes())

    def special(self, name: str, operands: tuple[str, ...]) -> None:
        if name == "s_waitcnt":
            counts = [int(self.modifiers.pop(key, 99)) for key in ("vmcnt", "lgkmcnt")]
            self.modifiers.pop("expcnt", None)  # it counts exports of pictures, which compute kernels have none of
            self.lines.append(f"u.wait({counts[0]}, {counts[1]}, A)")
        elif name == "s_setreg_imm32_b32" and operands == SATURATION:
            self.lines.append("r.saturates = True")
        elif name == "v_cndmask_b32":
            no, yes = self.sources(operands[1:3], ["u4", "u4"])
            text = f"np.where(mask_of_bits(SB[{self.number(operands[3])}]), {yes}, {no})"
            self.put(operands[0], text, "u4", self.take_lanes())
        elif name == "v_add_co_u32":
            left, right = (self.value(operand, "u4") for operand in operands[2:])
            self.lines.append(f"C = carries({left}, {right})")
            self.put(operands[0], f"{left} + {right}", "u4")
            self.lines.append(f"r.put_mask({self.number(operands[1])}, C, X, A)")
        elif name == "v_addc_co_u32":
            left, right = (self.value(operand, "u4") for operand in operands[2:4])
            self.lines.append(f"T = mask_of_bits(SB[{self.number(operands[4])}]).astype('u4')")
            self.lines.append(f"C = carries({left}, {right}, T)")
            self.put(operands[0], f"{left} + {right} + T", "u4")
            self.lines.append(f"r.put_mask({self.number(operands[1])}, C, X, A)")
        elif name in ("v_mad_u64_u32", "v_mad_i64_i32"):
            kind = "u" if "u64" in name else "i"
            left, right = (f"{self.value(operand, f'{kind}4')}.astype('{kind}8')" for operand in operands[2:4])
            self.lines.append(f"P = {left} * {right}")
            self.lines.append(f"T = (P + {self.value(operands[4], f'{kind}8')}).view('u8')")
            self.put(operands[0], "T", "u8")
            if kind == "i" and operands[4] != "0":
                raise NotImplementedError("a sum whose sign may overflow")
            self.lines.append(f"r.put_mask({self.number(operands[1])}, T < P.view('u8'), X, A)")
        elif name == "v_div_scale_f32":
            values = ", ".join(self.value(operand, "f4") for operand in operands[2:])
            self.lines.append(f"T, C = divide_scale({values})")
            self.put(operands[0], "T", "f4")
            self.lines.append(f"r.put_mask({self.number(operands[1])}, C, X, A)")
        elif name == "v_readlane_b32":
            lane = int(operands[2])
            text = f"U[{self.number(operands[1], 'V')}][:, {lane}:{lane + 1}]"
            self.lines.append(f"copyto(SU[{self.number(operands[0])}], {text}, where=A)")
        elif name == "v_writelane_b32":
            lane = int(operands[2])
            text = f"U[{self.number(operands[0], 'V')}][:, {lane}:{lane + 1}]"
            self.lines.append(f"copyto({text}, {self.value(operands[1], 'u4')}, where=A)")
        elif name == "v_readfirstlane_b32":
            text = f"r.first_lane(U[{self.number(operands[1], 'V')}], X)"
            self.lines.append(f"copyto(SU[{self.number(operands[0])}], {text}, where=A)")
        elif swap := re.fullmatch(r"v_permlane(16|32)_swap_b32", name):
            left, right = (str(self.number(operand, "V")) for operand in operands)
            self.lines.append(f"r.swap_lanes({left}, {right}, {swap[1]}, X, A)")
        elif product := re.fullmatch(r"v_mfma_(?:scale_)?f32_(\d+)x\1x(\d+)_(bf16|f16|f32|fp8_fp8|f8f6f4)", name):
            a, b = (register(operand) for operand in operands[1:3])
            start: Any = register(operands[3])
            if a is None or b is None or (start is None and operands[3] != "0"):
                raise NotImplementedError("a matrix product of constants")
            kind = self.fp8 if product[3] in ("fp8_fp8", "f8f6f4") else product[3]
            scales = ""
            if name.startswith("v_mfma_scale"):
                low, upper = self.take_choices("op_sel", 3, 0), self.take_choices("op_sel_hi", 3, 1)
                codes = (
                    f"{self.value(operand, 'u4')} >> {8 * (one + 2 * two)} & 0xFF"
                    for operand, one, two in zip(operands[4:], low, upper, strict=False)
                )
                scales = f", ({', '.join(codes)})"
            numbers = self.number(operands[0], "V"), a[1:], b[1:], start and start[1]
            self.lines.append(f"r.matrix_product({numbers}, {product[1]}, {product[2]}, {kind!r}, A{scales})")
        elif name in PACKED:
            self.packed(name, operands)
        elif name in ("v_fma_mix_f32", "v_fma_mixlo_f16", "v_fma_mixhi_f16"):
            self.mixed(name, operands)
        else:
            raise NotImplementedError(name)

    def packed(self, name: str, operands: tuple[str, ...]) -> None:
        """Write an instruction on pairs of 32-bit words; each half of the result chooses halves of the sources."""
        count = len(operands) - 1
        chosen = [self.take_choices(key, count, index) for index, key in enumerate(("op_sel", "op_sel_hi"))]
        negated = [self.take_choices(key, count, 0) for key in ("neg_lo", "neg_hi")]
        moves = name == "v_pk_mov_b32"
        if moves and any(map(any, negated)):
            raise NotImplementedError("a negative of what is moved")
        file, kind = ("U", "u4") if moves else ("F", "f4")
        texts = []
        for half in range(2):
            values = []
            for index, operand in enumerate(operands[1:]):
                found = register(operand)
                upper = chosen[0 if moves else half][index]
                if found is None:
                    if upper:
                        raise NotImplementedError("the upper half of a constant")
                    text = self.value(operand, kind)
                else:
                    text = f"{'S' * (found[0] == 'S')}{file}[{found[1] + upper}]"
                values.append(f"(-{text})" if negated[half][index] else text)
            texts.append(PACKED[name][half].format(*values))
        number = self.number(operands[0], "V")
        self.lines.append(f"T, P = {texts[0]}, {texts[1]}")
        self.lines.append(f"copyto({file}[{number}], T, where=X)")
        self.lines.append(f"copyto({file}[{number + 1}], P, where=X)")

    def mixed(self, name: str, operands: tuple[str, ...]) -> None:
        """Write a fused multiplication and addition whose sources may be float16 each."""
        uppers, narrow = self.take_choices("op_sel", 3, 0), self.take_choices("op_sel_hi", 3, 0)
        values = [
            f"halves({self.value(operand, 'u4')}, {upper})" if half and register(operand) else self.value(operand, "f4")
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
