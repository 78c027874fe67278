"""Write Python for PTX instructions, on arrays with an entry for every thread.

A register is one array, kept as unsigned integers (predicates: booleans). What is more than arithmetic (memory,
barriers, copies, matrix products) becomes a call of the machine. In the code m is the machine, R are its registers, K
constants, M the threads that run the block (None: all), and G those of them for which an instruction's guard holds.
"""

import numpy as np

from virtual_gpu.nvidia.instruction_set import ARITHMETIC, BARRIERS, CALLS, FENCES, MEMORY, NOTHING, SPECIAL_FORMS
from virtual_gpu.nvidia.operands import PARAMETER_SPACE, OperandWriter, width_of
from virtual_gpu.nvidia.parser import Address, Instruction, Operand
from virtual_gpu.programs import unknown_instructions

__all__ = ["CodeWriter"]

FULL_WARP = ("-1", "0xffffffff")
"""The member masks with which a warp's threads all take part."""
CLAMPS = {"up": ("0",), "down": ("31",), "bfly": ("31",), "idx": ("31",)}
"""With these a warp is one segment of a shuffle."""


class CodeWriter(OperandWriter):
    """Writes the lines of one block."""

    def add(self, instruction: Instruction) -> None:
        self.lines.append(f"m.line = {instruction.line}")
        self.mask = "M"
        with unknown_instructions(instruction.line, ".".join(instruction.parts)):
            if instruction.guard:
                guard = "~" * instruction.guard_negated + self.register(instruction.guard)
                self.lines.append(f"G = {guard} if M is None else {guard} & M")
                self.mask = "G"
            self.write(instruction)

    def write(self, instruction: Instruction) -> None:
        parts, operands = instruction.parts, instruction.operands
        name = ".".join(parts)
        if parts[0] in ("min", "max") and len(operands) == 4:
            name = name.replace(parts[0], f"{parts[0]}3", 1)
        if name in ARITHMETIC:
            formula = ARITHMETIC[name]
            values = [self.value(source, kind) for source, kind in zip(operands[1:], formula.sources, strict=True)]
            self.put(operands[0], formula.expression.format(*values), formula.result)
        elif name in SPECIAL_FORMS:
            self.special(parts, operands)
        elif name in MEMORY:
            self.memory(parts, operands)
        elif name in CALLS:
            self.call(name, parts, operands)
        elif name in BARRIERS:
            self.barrier(operands)
        elif name in FENCES:
            self.lines.append(FENCES[name])
        elif name not in NOTHING:
            raise NotImplementedError(name)

    def barrier(self, operands: tuple[Operand, ...]) -> None:
        """Write a barrier of all threads, whatever its number."""
        number, *count = (self.number(str(operand)) for operand in operands)
        if number > 15 or count not in ([], [self.num_threads]):
            raise NotImplementedError("a barrier of some of the threads")
        self.lines.append(f"m.barrier({self.mask})")

    def memory(self, parts: tuple[str, ...], operands: tuple[Operand, ...]) -> None:
        space = parts[1].split("::")[0]
        kind = parts[-1]
        count = int(parts[-2][1:]) if parts[-2] in ("v2", "v4", "v8") else 1
        if "L2::cache_hint" in parts:
            operands = operands[:-1]  # when a line leaves the cache is no matter of values
        data, place = operands if parts[0] == "ld" else operands[::-1]
        registers = data if isinstance(data, tuple) else (data,)
        if not isinstance(place, Address) or place.coordinates or len(registers) != count:
            raise NotImplementedError("operands of another shape")
        size = width_of(kind) // 8
        if space == "param":
            number = self.number(place.base) - PARAMETER_SPACE
            self.put(registers[0], f"m.parameter({number}, {place.offset}, '{kind}')", kind)
        elif parts[0] == "ld":
            self.lines.append(f"L = m.load('{space}', {self.address(place)}, {size}, {count}, {self.mask})")
            for index, register in enumerate(registers):
                if kind[0] == "s":  # with its sign into a wider register
                    self.put(register, f"L[{index}].view('i{size}')", kind)
                else:
                    self.put(register, f"L[{index}]", f"u{8 * size}")
        else:
            values = ", ".join(self.value(register, f"u{8 * size}") for register in registers)
            self.lines.append(f"m.store('{space}', {self.address(place)}, {size}, ({values},), {self.mask})")

    def call(self, name: str, parts: tuple[str, ...], operands: tuple[Operand, ...]) -> None:
        """Hand an instruction to the machine: results and vectors as names of registers, all else as values."""
        if parts[0] == "tcgen05" and parts[1] == "mma" and isinstance(operands[1], Address):
            raise NotImplementedError("a matrix A in tensor memory")
        arguments = []
        for place, operand in enumerate(operands):
            if isinstance(operand, Address):
                text = self.address(operand)
                if operand.coordinates:
                    text = f"({text}, [{', '.join(self.value(item, 's32') for item in operand.coordinates)}])"
            elif isinstance(operand, tuple):
                text = repr(operand)
            elif place == 0 and parts[0] in ("atom", "mbarrier"):
                text = "None" if operand == "_" else repr(operand)
            elif self.is_register(operand):
                text = self.register(operand)
            else:
                text = str(self.number(operand))
            arguments.append(text)
        call = f"({', '.join(arguments)}{',' * bool(arguments)}), m.threads({self.mask})"
        self.lines.append(f"m.methods[{CALLS[name]!r}]({parts!r}, {call})")

    def special(self, parts: tuple[str, ...], operands: tuple[Operand, ...]) -> None:
        """Write an instruction whose operands are not a result and sources of given kinds."""
        operation, kind = parts[0], parts[-1]
        result, sources = operands[0], operands[1:]
        if operation in ("mov", "cvta"):
            (source,) = sources
            self.move(result, source, kind)
        elif operation == "selp":
            yes, no, condition = sources
            unsigned = f"u{width_of(kind)}"
            values = f"{self.value(yes, unsigned)}, {self.value(no, unsigned)}"
            self.put(result, f"np.where({self.value(condition, 'pred')}, {values})", unsigned)
        elif operation == "createpolicy":
            self.put(result, f"m.fill({self.constant(np.uint64(0))})", "u64")
        else:
            self.exchange(parts, result, sources)

    def exchange(self, parts: tuple[str, ...], result: Operand, sources: tuple[Operand, ...]) -> None:
        """Write an instruction by which the threads of a warp see each other's registers."""
        *sources_before, members = sources
        if self.is_register(members):
            self.lines.append(f"m.require_warps({self.mask}, {self.value(members, 'u32')})")
        elif str(members).lower() in FULL_WARP:
            self.lines.append(f"m.require_warps({self.mask})")
        else:
            raise NotImplementedError("some members of a warp")
        kind = parts[-1]
        if parts[0] == "elect":
            (predicate,) = sources_before
            self.put(result, f"m.fill({self.constant(np.uint32(0))})", "u32")
            self.put(predicate, "m.first_lane", "pred")
        elif parts[0] == "vote":
            (condition,) = sources_before
            self.put(result, f"ballot({self.value(condition, 'pred')})", "u32")
        elif parts[0] == "redux":
            (source,) = sources_before
            leaves_nan_out = kind == "f32" and "NaN" not in parts
            function = f"{'f' * leaves_nan_out}{parts[2]}"
            self.put(result, f"reduce_warps('{function}', {self.value(source, kind)})", kind)
        else:
            *predicate_before, values, amount, clamp = sources_before
            if str(clamp) not in CLAMPS[parts[2]]:
                raise NotImplementedError("segments of a warp")
            self.lines.append(f"S = shuffle('{parts[2]}', {self.value(values, 'u32')}, {self.value(amount, 'u32')})")
            self.put(result, "S[0]", "u32")
            for predicate in predicate_before:
                self.put(predicate, "S[1]", "pred")

    def move(self, result: Operand, source: Operand, kind: str) -> None:
        if isinstance(source, tuple):  # from low to high
            half = f"u{width_of(kind) // len(source)}"
            values = ", ".join(f"np.broadcast_to({self.value(item, half)}, m.num_threads)" for item in source)
            self.put(result, f"np.stack(({values},), 1).view('u{width_of(kind) // 8}')[:, 0]", f"u{width_of(kind)}")
        elif isinstance(result, tuple):
            part = width_of(kind) // len(result) // 8
            self.lines.append(
                f"P = {self.value(source, f'u{width_of(kind)}')}.view('u{part}').reshape(-1, {len(result)})"
            )
            for index, item in enumerate(result):
                self.put(item, f"P[:, {index}]", f"u{8 * part}")
        elif kind == "pred":
            text = self.value(source, "pred")
            self.put(result, text if self.is_register(source) else f"m.fill({text})", "pred")
        else:
            unsigned = f"u{width_of(kind)}"
            text = self.value(source, unsigned)
            self.put(result, text if self.is_register(source) or text.startswith("m.") else f"m.fill({text})", unsigned)
