"""Lay the arguments of a launch out as the kernel's metadata says."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from virtual_gpu.amd.parser import Kernel

__all__ = ["argument_segment"]


def argument_segment(
    kernel: Kernel, values: Sequence[int], grid: tuple[int, int, int], shared_bytes: int
) -> NDArray[np.uint8]:
    """Return the bytes of the argument segment: `values` in order (missing ones 0), and what the launcher adds."""
    hidden = {
        "hidden_group_size_x": kernel.num_threads,
        "hidden_group_size_y": 1,
        "hidden_group_size_z": 1,
        "hidden_grid_dims": 1 + max(axis for axis in range(3) if axis == 0 or grid[axis] > 1),
        "hidden_dynamic_lds_size": shared_bytes,
        **{f"hidden_block_count_{name}": count for name, count in zip("xyz", grid, strict=True)},
    }
    segment = bytearray(-(-kernel.directives["kernarg_size"] // 8) * 8)
    given = iter(values)
    for argument in kernel.arguments:
        value = hidden.get(argument.kind, 0) if argument.kind.startswith("hidden_") else next(given, 0)
        number = value % 2 ** (8 * argument.size)
        segment[argument.offset : argument.offset + argument.size] = number.to_bytes(argument.size, "little")
    if next(given, None) is not None:
        raise ValueError(f"{kernel.name} takes fewer arguments than {len(values)}")
    return np.frombuffer(segment, np.uint8)
