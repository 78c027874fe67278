"""Boxes that TMA stores: from shared to global memory, in groups that each thread has for itself and waits for.

A store reads shared memory as late as the waits of its thread allow, and writes global memory as late too: at the
latest when the program ends, by when it must have read all.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from virtual_gpu.faults import MemoryFault
from virtual_gpu.nvidia.tensor_map import TensorMap
from virtual_gpu.shared_memory import Pieces

if TYPE_CHECKING:
    from virtual_gpu.nvidia.machine import Machine

__all__ = ["BulkStores"]


@dataclass
class _Store:
    """One box under way."""

    tensor_map: TensorMap
    coordinates: list[int]
    places: Pieces
    values: NDArray[np.uint8] | None = None
    """What it read; None before."""


class BulkStores:
    """The stores of one program."""

    def __init__(self, machine: "Machine"):
        self._machine = machine
        self._groups: dict[int, list[list[_Store]]] = {}
        """By thread; the last group is not committed yet."""
        self.methods: dict[str, Callable[[tuple[str, ...], tuple[Any, ...], NDArray[np.bool_]], None]] = {
            "tensor_store": self._store,
            "store_commit": self._commit,
            "store_wait": self._wait,
        }
        """By the names that `instruction_set.CALLS` gives them."""

    def end(self) -> None:
        """Make all stores arrive: the program ends."""
        for groups in self._groups.values():
            for store in itertools.chain.from_iterable(groups):
                if store.values is None:
                    raise MemoryFault("the program ends while a bulk store reads its shared memory")
                self._write(store)

    def _store(self, parts: tuple[str, ...], operands: tuple[Any, ...], mask: NDArray[np.bool_]) -> None:
        ((maps, coordinates), sources) = operands
        if len(coordinates) != int(parts[4][0]):
            raise NotImplementedError(f"{'.'.join(parts)} at {len(coordinates)} coordinates")
        for thread in map(int, np.nonzero(mask)[0]):
            tensor_map, start = self._machine.box_of(maps, coordinates, thread)
            places = tensor_map.places(int(sources[thread]))
            self._machine.shared.begin_bulk_read(places, int(self._machine.warps[thread]))
            self._groups.setdefault(thread, [[]])[-1].append(_Store(tensor_map, start, places))

    def _commit(self, parts: tuple[str, ...], operands: tuple[Any, ...], mask: NDArray[np.bool_]) -> None:
        for thread, groups in self._groups.items():
            if mask[thread]:
                groups.append([])

    def _wait(self, parts: tuple[str, ...], operands: tuple[Any, ...], mask: NDArray[np.bool_]) -> None:
        (num_left,) = operands
        for thread, groups in self._groups.items():
            if not mask[thread]:
                continue
            num_ended = max(len(groups) - 1 - num_left, 0)
            for store in itertools.chain.from_iterable(groups[:num_ended]):
                if store.values is None:
                    store.values = self._machine.shared.end_matrix_read(store.places, int(self._machine.warps[thread]))
                if "read" not in parts:
                    self._write(store)
            if "read" not in parts:
                del groups[:num_ended]

    def _write(self, store: _Store) -> None:
        machine = self._machine
        assert store.values is not None
        store.tensor_map.write(machine.memory, machine.program_number, store.coordinates, store.values)
