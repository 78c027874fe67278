"""The registers of a program's wavefronts, what lanes exchange, and matrix products."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from virtual_gpu.amd import fragments
from virtual_gpu.amd.fragments import LANES
from virtual_gpu.amd.operands import ACCUMULATORS, EXEC
from virtual_gpu.amd.operations import bits_of_mask, mask_of_bits
from virtual_gpu.amd.parser import Kernel
from virtual_gpu.arithmetic import from_bfloat16
from virtual_gpu.floats import from_e8m0, from_fp8

__all__ = ["Flags", "Registers", "Words"]

Flags = NDArray[np.bool_]
Words = NDArray[np.uint32]


class Registers:
    """Vector registers (number, waves, 64) with the accumulators behind them, and scalar ones (waves, number)."""

    def __init__(self, kernel: Kernel, arguments: NDArray[np.uint8], program: tuple[int, int, int]):
        self.num_waves = kernel.num_threads // LANES
        self.vectors = np.full((2 * ACCUMULATORS, self.num_waves, LANES), 0xFFFFFFFF, np.uint32)  # NaN
        self._scalars = np.full((self.num_waves, EXEC + 2), 0xFFFFFFFF, np.uint32)
        words = [self._scalars[:, i : i + 1] for i in range(EXEC + 2)]
        pairs = [self._scalars[:, i : i + 2] for i in range(EXEC + 1)]
        self.scalars, self.pairs, self._bytes = (
            words,
            [pair.view("u8") for pair in pairs],
            [pair.view("u1") for pair in pairs],
        )
        self.condition = np.zeros((self.num_waves, 1), np.bool_)
        """SCC."""
        self.saturates = False
        """Whether conversions to fp8 give the largest number in place of NaN (FP16_OVFL in MODE)."""
        self.views = (
            *(list(self.vectors.view(kind)) for kind in ("u4", "i4", "f4")),
            words,
            *([word.view(kind) for word in words] for kind in ("i4", "f4")),
            self.pairs,
            self._bytes,
            self.condition,
        )
        """What the translated code calls U, I, F, SU, SI, SF, SQ, SB and SCC."""
        self._start(kernel.directives, arguments, program)

    def _start(self, directives: dict[str, int], arguments: NDArray[np.uint8], program: tuple[int, int, int]) -> None:
        """Set the registers that hold something at the start."""
        scalars = self._scalars
        if directives["user_sgpr_kernarg_segment_ptr"] != 1 or directives["private_segment_fixed_size"]:
            raise NotImplementedError("a kernel without arguments, or with memory of each thread's own")
        number = 2 * (directives["user_sgpr_dispatch_ptr"] + directives["user_sgpr_queue_ptr"])
        scalars[:, number : number + 2] = np.array([arguments.ctypes.data], np.uint64).view(np.uint32)
        number += 2 + 2 * directives["user_sgpr_dispatch_id"]
        words = arguments.view(np.uint32)[directives["user_sgpr_kernarg_preload_offset"] :]
        length = directives["user_sgpr_kernarg_preload_length"]
        scalars[:, number : number + length] = words[:length]
        number += length
        if number > directives["user_sgpr_count"]:
            raise NotImplementedError("more user registers than are counted")
        number = directives["user_sgpr_count"]
        for axis in range(3):
            if directives[f"system_sgpr_workgroup_id_{'xyz'[axis]}"]:
                scalars[:, number] = program[axis]
                number += 1
        self.vectors[0] = np.arange(self.num_waves * LANES).reshape(-1, LANES)

    def lanes(self, active: Any) -> Any:
        """Return the lanes (waves, 64) that instructions run on; True where all do."""
        mask = mask_of_bits(self._bytes[EXEC])
        if active is not True:
            mask &= active
        return True if mask.all() else mask

    def everyone(self, lanes: Any) -> Flags:
        """Write lanes (or True) or waves out as (waves, 64)."""
        return np.broadcast_to(lanes, (self.num_waves, LANES))

    def put_mask(self, number: int, mask: Flags, lanes: Any, active: Any) -> None:
        """Store lanes as the bits of a pair of scalar registers; 0 for lanes that don't run."""
        if number >= EXEC - 1:
            raise NotImplementedError("a comparison into exec")
        mask = np.broadcast_to(mask & lanes, (self.num_waves, LANES))
        np.copyto(self._bytes[number], bits_of_mask(mask), where=active)

    def put_pair(self, number: int, values: NDArray[np.uint64], lanes: Any) -> None:
        """Store 64-bit words in two vector registers."""
        np.copyto(self.vectors[number], values.astype(np.uint32), where=lanes)
        np.copyto(self.vectors[number + 1], (values >> np.uint64(32)).astype(np.uint32), where=lanes)

    def require_saturation(self) -> None:
        """Raise where a conversion to fp8 may overflow to NaN."""
        if not self.saturates:
            raise NotImplementedError("a conversion to fp8 that doesn't saturate")

    def first_lane(self, values: Words, lanes: Any) -> Words:
        """Return the value of each wave's first lane that runs; of lane 0 if none does."""
        first = self.everyone(lanes).argmax(1)
        return values[np.arange(self.num_waves), first][:, None]

    def dpp(self, values: Words, control: str, lanes: Any) -> Words:
        """Return each lane the value of another one; 0 where there is none or it doesn't run."""
        sources, exist = fragments.dpp_sources(control)
        taken = values[:, sources]
        return np.where(exist & (True if lanes is True else lanes[:, sources]), taken, np.uint32(0))

    def swap_lanes(self, left: int, right: int, width: int, lanes: Any, active: Any) -> None:
        """Exchange the odd groups of `width` lanes in one register with the even groups in another."""
        if not (self.everyone(lanes) == self.everyone(active)).all():
            raise NotImplementedError("an exchange between some lanes of a wave")
        a, b = (self.vectors[number].reshape(self.num_waves, -1, 2, width) for number in (left, right))
        odd, even = a[:, :, 1].copy(), b[:, :, 0].copy()
        where = active if active is True else active[:, None]
        np.copyto(a[:, :, 1], even, where=where)
        np.copyto(b[:, :, 0], odd, where=where)

    def matrix_product(
        self,
        operands: tuple[int, tuple[int, int], tuple[int, int], int | None],
        size: int,
        depth: int,
        kind: str,
        active: Any,
        scales: Sequence[Any] = (),
    ) -> None:
        """Run V_MFMA: all lanes take part, whatever EXEC says.

        scales: codes for 32 elements each of A and of B, a lane's (waves, 64): a row each, then the next 32 of all.
        """
        result, a, b, start = operands
        decode, element = _ELEMENTS[kind]
        left, right = (
            decode(fragments.operand_matrix(self.vectors[first : first + count], element, size))
            for first, count in (a, b)
        )
        if left.shape[2] != depth:
            raise NotImplementedError(f"operands of {a[1]} registers")
        if element == "u1":
            left, right = left.astype(np.float64), right.astype(np.float64)
        for matrix, codes in zip((left, right), scales, strict=False):
            blocks = from_e8m0(self.everyone(codes)).reshape(self.num_waves, -1, size).transpose(0, 2, 1)
            matrix *= blocks.repeat(32, 2)
        products = (left @ right.transpose(0, 2, 1)).astype(np.float32)
        values = fragments.accumulator_registers(products)
        floats = self.vectors.view(np.float32)
        if start is not None:
            values = values + floats[start : start + len(values)]
        np.copyto(floats[result : result + len(values)], values, where=active)


_ELEMENTS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "bf16": (from_bfloat16, "u2"),
    "f16": (lambda values: values.astype(np.float32), "f2"),
    "f32": (lambda values: values, "f4"),
    "e4m3": (functools.partial(from_fp8, kind="e4m3"), "u1"),
    "e4m3fnuz": (functools.partial(from_fp8, kind="e4m3fnuz"), "u1"),
}
