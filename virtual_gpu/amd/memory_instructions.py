"""Write instructions on memory: calls of the memory unit (u)."""

import re

import numpy as np

from virtual_gpu.amd.fragments import LANES
from virtual_gpu.amd.operands import OperandWriter

__all__ = ["MemoryWriter"]

SIZES = {"dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16, "ushort": 2, "short": 2, "ubyte": 1, "byte": 1}


class MemoryWriter(OperandWriter):
    """Writes the lines of a block that load and store."""

    def memory(self, name: str, operands: tuple[str, ...]) -> None:
        unit, operation, *rest = name.split("_")
        if name == "ds_swizzle_b32":
            self.swizzle(operands, self.modifiers.pop("offset"))
            return
        offset = int(self.modifiers.pop("offset", "0"), 0)
        if unit == "ds":
            self.shared(operation, rest, operands, offset)
        elif unit == "s":
            count = int(rest[0].removeprefix("dword").removeprefix("x") or 1)
            text = f"{self.value(operands[1], 'u8')} + {self.value(operands[2], 'u4')} + {offset}"
            self.lines.append(f"u.scalar_load({self.number(operands[0])}, {count}, {text}, A)")
        else:
            self.device(unit, operation, rest, operands, offset)

    def swizzle(self, operands: tuple[str, ...], pattern: str) -> None:
        """Write an exchange of lanes between neighbouring groups of some, which shared memory's wires do."""
        found = re.fullmatch(r"swizzle\(SWAP,(1|2|4|8|16)\)", pattern)
        if found is None:
            raise NotImplementedError(pattern)
        addresses = self.constant(((np.arange(LANES) ^ int(found[1])) * 4).astype(np.uint32))
        self.lines.append(
            f"u.permute({self.number(operands[0], 'V')}, {addresses}, {self.value(operands[1], 'u4')}, 0, X, A)"
        )

    def device(
        self,
        unit: str,
        operation: str,
        rest: list[str],
        operands: tuple[str, ...],
        offset: int,
    ) -> None:
        """Write a load or store of global memory, or a load from there to shared memory."""
        to_shared = self.modifiers.pop("lds", None) is not None
        if unit == "global" and rest[0] == "lds":
            to_shared, rest = True, rest[1:]
        size, upper = SIZES[rest[0]], rest[1:] == ["d16", "hi"]
        if rest[1:] and (not upper or operation == "load"):
            raise NotImplementedError("a half of a register")
        places = list(operands)
        register = "None"
        if not to_shared:
            register = str(self.number(places.pop(unit == "global" and operation == "store"), "V"))
        if unit == "buffer":
            by_lane = self.modifiers.pop("offen", None) is not None
            if len(places) != 3 or by_lane != (places[0] != "off"):
                raise NotImplementedError("another way to address a buffer")
            lanes = self.value(places[0], "u4") if by_lane else "0"
            start = self.value(places[2], "u4")
            text = f"*u.buffer({lanes}, {self.number(places[1])}, {start}, {offset}, {size}, X)"
        else:
            base = self.value(places[0], "u8" if places[1] == "off" else "u4")
            if places[1] != "off":
                base = f"{self.value(places[1], 'u8')} + {base}"
            text = f"{base} + {self.constant(np.uint64(offset % 2**64))}, X"
        last = f"X, A, {offset}" if operation == "load" else f"A, {2 * upper}"
        self.lines.append(f"u.{operation}({register}, {size}, {text}, {last})")

    def shared(self, operation: str, rest: list[str], operands: tuple[str, ...], offset: int) -> None:
        kind = rest[0]
        size = int(kind[1:]) // 8
        if operation == "bpermute":
            values = ", ".join(self.value(operand, "u4") for operand in operands[1:])
            self.lines.append(f"u.permute({self.number(operands[0], 'V')}, {values}, {offset}, X, A)")
            return
        if (operation, kind) in (("add", "u32"), ("or", "b32")):
            address, value = (self.value(operand, "u4") for operand in operands)
            function = {"add": "np.add", "or": "np.bitwise_or"}[operation]
            self.lines.append(f"u.shared_atomic({function}, {address}, {offset}, {value}, X, A)")
            return
        found = re.fullmatch(r"(read|write)(2?)(st64)?", operation)
        allowed = [["tr", "b16"]] if operation == "read" and kind == "b64" else []
        allowed += [["d16", "hi"]] if operation == "write" and size < 4 else []
        is_signed = operation == "read" and kind in ("i8", "i16")
        if found is None or (kind[0] not in "bu" and not is_signed) or rest[1:] not in ([], *allowed):
            raise NotImplementedError(operation)
        unit = size * (64 if found[3] else 1)
        offsets = (
            tuple(unit * int(self.modifiers.pop(key, "0"), 0) for key in ("offset0", "offset1"))
            if found[2]
            else (offset,)
        )
        if found[1] == "read":
            transposes = rest[1:2] == ["tr"]
            text = f"{self.number(operands[0], 'V')}, {size}, {self.value(operands[1], 'u4')}, {offsets}"
            self.lines.append(f"u.shared_read({text}, {transposes}, {is_signed}, X, A)")
        else:
            registers = tuple(self.number(operand, "V") for operand in operands[1:])
            shift = 2 if rest[1:] else 0
            text = f"{registers}, {size}, {self.value(operands[0], 'u4')}, {offsets}, {shift}"
            self.lines.append(f"u.shared_write({text}, X, A)")
