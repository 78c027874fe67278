"""Write Python for PTX instructions, on arrays with an entry for every thread.

A register is one array, kept as unsigned integers (predicates: booleans). What is more than arithmetic (memory,
barriers, copies, matrix products) becomes a call of the machine. In the code m is the machine, R are its registers, K
constants, M the threads that run the block (None: all), and G those of them for which an instruction's guard holds.
"""

import numpy as np

from virtual_gpu.nvidia.operands import FLOATS, PARAMETER_SPACE, OperandWriter, width_of
from virtual_gpu.nvidia.parser import Address, Instruction, Operand

__all__ = ["CodeWriter"]

COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="} | {
    "lo": "<",
    "ls": "<=",
    "hi": ">",
    "hs": ">=",
}
BINARY = {"add": "{0} + {1}", "sub": "{0} - {1}", "and": "{0} & {1}", "or": "{0} | {1}", "xor": "{0} ^ {1}"}
NOTHING = (
    "bar.warp",
    "fence.acq_rel",
    "griddepcontrol",
    "membar",
    "wgmma.fence",
    "tcgen05.relinquish_alloc_permit",
    "tcgen05.fence",
)
"""What orders or announces something that this machine does in order anyway."""


class CodeWriter(OperandWriter):
    """Writes the lines of one block."""

    def add(self, instruction: Instruction) -> None:
        self.lines.append(f"m.line = {instruction.line}")
        self.mask = "M"
        if instruction.guard:
            guard = f"{'~' * instruction.guard_negated}R[{self.register(instruction.guard)}]"
            self.lines.append(f"G = {guard} if M is None else {guard} & M")
            self.mask = "G"
        try:
            self.write(instruction)
        except (KeyError, NotImplementedError) as error:
            name = ".".join(instruction.parts)
            raise NotImplementedError(f"line {instruction.line}: the machine doesn't know {name}") from error

    def write(self, instruction: Instruction) -> None:
        parts, operands = instruction.parts, instruction.operands
        name = ".".join(parts)
        if name.startswith(NOTHING):
            return
        if name.startswith(("fence.proxy.async",)):
            self.lines.append("m.shared.fence()")
        elif parts[0] in ("ld", "st"):
            self.memory(parts, operands)
        elif parts[0] in ("bar", "barrier"):
            self.lines.append(f"m.barrier({self.mask})")
        elif parts[0] in ("cp", "mbarrier", "wgmma", "mma", "ldmatrix", "stmatrix", "tcgen05", "atom"):
            self.call(parts, operands)
        else:
            self.arithmetic(parts, operands)

    def memory(self, parts: tuple[str, ...], operands: tuple[Operand, ...]) -> None:
        space = next(part.split("::")[0] for part in parts if part.split("::")[0] in ("param", "global", "shared"))
        kind = parts[-1]
        count = next((int(part[1]) for part in parts if part in ("v2", "v4", "v8")), 1)
        data, place = operands[:2] if parts[0] == "ld" else (operands[1], operands[0])
        registers = data if isinstance(data, tuple) else (data,)
        assert isinstance(place, Address), place
        assert len(registers) == count, operands
        size = width_of(kind) // 8
        if space == "param":
            self.put(
                registers[0],
                f"m.parameter({self.number(place.base) - PARAMETER_SPACE}, {place.offset}, '{kind}')",
                kind,
            )
        elif parts[0] == "ld":
            self.lines.append(f"L = m.load('{space}', {self.address(place)}, {size}, {count}, {self.mask})")
            for index, register in enumerate(registers):
                self.put(register, f"L[{index}]", f"u{8 * size}")
        else:
            values = ", ".join(self.value(register, f"u{8 * size}") for register in registers)
            self.lines.append(f"m.store('{space}', {self.address(place)}, {size}, ({values},), {self.mask})")

    def call(self, parts: tuple[str, ...], operands: tuple[Operand, ...]) -> None:
        """Hand an instruction to the machine: results and vectors as numbers of registers, all else as values."""
        arguments = []
        for place, operand in enumerate(operands):
            if isinstance(operand, Address):
                text = self.address(operand)
                if operand.coordinates:
                    text = f"({text}, [{', '.join(self.value(item, 's32') for item in operand.coordinates)}])"
            elif isinstance(operand, tuple):
                text = repr(tuple(self.register(item) for item in operand))
            elif place == 0 and parts[0] in ("atom", "mbarrier"):
                text = "None" if operand == "_" else str(self.register(operand))
            elif self.is_register(operand):
                text = f"R[{self.register(operand)}]"
            else:
                text = str(self.number(operand))
            arguments.append(text)
        self.lines.append(f"m.call({parts!r}, ({', '.join(arguments)}{',' * bool(arguments)}), {self.mask})")

    def arithmetic(self, parts: tuple[str, ...], operands: tuple[Operand, ...]) -> None:
        operation, kind = parts[0], parts[-1]
        result, sources = operands[0], operands[1:]
        if operation in ("mov", "cvta"):
            self.move(result, sources[-1], kind)
        elif operation == "cvt":
            self.convert(parts, result, sources)
        elif operation == "setp":
            left, right = (self.value(source, kind) for source in sources)
            comparison = parts[1]
            if comparison in COMPARISONS:
                text = f"{left} {COMPARISONS[comparison]} {right}"
            elif comparison in ("num", "nan"):
                text = f"{'~' * (comparison == 'num')}(np.isnan({left}) | np.isnan({right}))"
            else:
                text = f"({left} {COMPARISONS[comparison[:-1]]} {right}) | np.isnan({left}) | np.isnan({right})"
            self.put(result, text, "pred")
        elif operation == "selp":
            yes, no = (self.value(source, "u" + kind.lstrip("bsuf")) for source in sources[:2])
            self.put(result, f"np.where({self.value(sources[2], 'pred')}, {yes}, {no})", f"u{kind.lstrip('bsuf')}")
        elif operation == "elect":
            self.put(sources[0], "m.first_lane", "pred")
        elif operation == "createpolicy":
            self.put(result, f"m.fill({self.constant(np.uint64(0))})", "u64")
        elif operation == "shfl":
            predicate = sources[0] if self.is_register(sources[0]) and self.native(str(sources[0])) == "pred" else None
            values, amount = sources[1:3] if predicate else sources[:2]
            self.lines.append(f"S = shuffle('{parts[2]}', {self.value(values, 'u32')}, {self.value(amount, 'u32')})")
            self.put(result, "S[0]", "u32")
            if predicate:
                self.put(predicate, "S[1]", "pred")
        elif operation == "vote":  # a lane's own bit everywhere else
            self.put(result, f"ballot({self.value(sources[0], 'pred')})", "u32")
        elif operation == "redux":
            self.put(result, f"reduce_warps('{parts[2]}', {self.value(sources[0], kind)})", kind)
        elif operation == "bfe":
            text = ", ".join([self.value(sources[0], kind), *(self.value(source, "s32") for source in sources[1:])])
            self.put(result, f"bits_of_field({text})", kind)
        elif operation == "prmt":
            self.put(result, f"byte_permutation({', '.join(self.value(source, 'u32') for source in sources)})", "u32")
        elif operation in ("shl", "shr"):
            function = "shift_left" if operation == "shl" else "shift_right"
            self.put(result, f"{function}({self.value(sources[0], kind)}, {self.value(sources[1], 'u32')})", kind)
        elif "wide" in parts:
            double = f"{kind[0]}{2 * width_of(kind)}"
            left, right = (
                f"{self.value(source, kind)}.astype('{kind[0].replace('s', 'i')}{width_of(kind) // 4}')"
                for source in sources[:2]
            )
            text = f"{left} * {right}" + (f" + {self.value(sources[2], double)}" if operation == "mad" else "")
            self.put(result, text, double)
        else:
            self.plain(parts, operation, kind, result, sources)

    def plain(
        self, parts: tuple[str, ...], operation: str, kind: str, result: Operand, sources: tuple[Operand, ...]
    ) -> None:
        mixed = len(parts) > 2 and parts[-2] in FLOATS and kind in ("bf16", "f16")  # fma.rn.f32.bf16: c and d are f32
        kinds = [kind] * len(sources)
        if mixed:
            kinds[-1] = parts[-2]
            kind = parts[-2]
        values = [self.value(source, one) for source, one in zip(sources, kinds, strict=True)]
        if mixed:
            values[:-1] = [f"{value}.astype('f4')" for value in values[:-1]]
        floating = kind[0] == "f" or kind.startswith("bf")
        if (operation in BINARY and kind != "pred") or operation in ("and", "or", "xor"):
            text = BINARY[operation].format(*values)
        elif operation == "mul" and (floating or "lo" in parts):
            text = f"{values[0]} * {values[1]}"
        elif operation == "mul" and "hi" in parts:
            letter, width = kind[0].replace("s", "i"), width_of(kind)
            double = " * ".join(f"{value}.astype('{letter}{width // 4}')" for value in values)
            text = f"(({double}) >> {width}).astype('{letter}{width // 8}')"
        elif operation == "mad":
            text = f"{values[0]} * {values[1]} + {values[2]}"
        elif operation == "fma":
            # A product of two float32 is exact in float64.
            out = "f2" if kind.startswith("f16") else "f4"
            text = f"({values[0]}.astype('f8') * {values[1]} + {values[2]}).astype('{out}')"
        elif operation in ("min", "max"):
            text = f"np.{'f' * floating}{operation}{'imum' * (not floating)}({values[0]}, {values[1]})"
        elif operation in ("div", "rem"):
            text = (
                f"{values[0]} / {values[1]}"
                if floating
                else f"{'quotient' if operation == 'div' else 'remainder'}({', '.join(values)})"
            )
        else:
            unary = {
                "neg": "-{0}",
                "abs": "abs({0})",
                "not": "~{0}",
                "popc": "population({0})",
                "ex2": "np.exp2({0})",
                "lg2": "np.log2({0})",
                "rcp": "1 / {0}",
                "sqrt": "np.sqrt({0})",
                "rsqrt": "1 / np.sqrt({0})",
                "tanh": "np.tanh({0})",
            }
            text = unary[operation].format(*values)
        self.put(result, text, kind)

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

    def convert(self, parts: tuple[str, ...], result: Operand, sources: tuple[Operand, ...]) -> None:
        target, kind = parts[-2:]
        if target in ("bf16x2", "f16x2"):  # the second operand is the low half
            high, low = (self.value(source, kind) for source in sources)
            text = f"np.stack(np.broadcast_arrays({low}, {high}), 1).reshape(-1)"
            self.put(result, text if target == "bf16x2" else f"{text}.astype('f2')", target)
            return
        value = self.value(sources[0], kind)
        floats = {"bf16": "f4", **FLOATS}
        if target in floats:
            self.put(result, f"{value}.astype('{floats[target]}')", target)
        elif kind in floats:
            rounding = {"rni": "np.rint", "rzi": "np.trunc", "rmi": "np.floor", "rpi": "np.ceil"}
            function = rounding[next(part for part in parts if part in rounding)]
            self.put(
                result, f"{function}({value}).astype('{target[0].replace('s', 'i')}{width_of(target) // 8}')", target
            )
        else:
            letter = "i" if kind[0] == "s" else "u"
            width = width_of(target)
            text = f"{value}.astype('{letter}{width // 8}')"
            self.put(result, f"{text}.view('u{width // 8}')" if letter == "i" else text, f"u{width}")
