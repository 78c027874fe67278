"""HeldStorages: which memory a thread's operations made, and how much of it was held at once; LargestFloats.

keep_what_is_sent() and recycle_nothing() let it see what exchanges hold, and all that is allocated.
"""

from collections.abc import Sequence
from typing import Any

import pytest
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tritonmoe.runtime import cpu_memory
from tritonmoe.transports import PendingExchange, Transport

__all__ = ["HeldStorages", "LargestFloats", "keep_what_is_sent", "recycle_nothing"]


def recycle_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make all memory come from torch's allocator, which is all that HeldStorages sees."""
    monkeypatch.setattr(cpu_memory, "SMALLEST_RECYCLED_BYTES", 2**60)


def keep_what_is_sent(transport: Transport) -> None:
    """Make the exchanges of a transport keep what they send until they are waited for, as a sender must."""
    exchange = transport.exchange
    transport.exchange = lambda rows, *splits, **out: _Kept(exchange(rows, *splits, **out), rows)


class _Kept(PendingExchange):
    def __init__(self, pending: PendingExchange, rows: Tensor) -> None:
        self._pending, self._rows = pending, [rows]

    def wait(self) -> Tensor:
        received = self._pending.wait()
        self._rows.clear()
        return received


class HeldStorages(TorchDispatchMode):
    """Counts the storages that this thread's operations made, after every operation."""

    def __init__(self) -> None:
        super().__init__()
        self.references: dict[int, tuple[int, StorageWeakRef]] = {}
        self.num_bytes: list[int] = []
        self.snapshots: list[set[int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        self.references = {k: v for k, v in self.references.items() if not v[1].expired()}
        for tensor in tree_leaves(result):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            if storage._cdata not in self.references and storage._cdata not in given:
                self.references[storage._cdata] = len(self.num_bytes), StorageWeakRef(storage)
                self.num_bytes.append(storage.nbytes())
        self.snapshots.append({number for number, _ in self.references.values()})
        return result

    def peak(self, results: Sequence[Tensor | None]) -> int:
        """Return the most bytes that were held at once, without those of the results."""
        own = self._numbers(results)
        return max(sum(self.num_bytes[n] for n in held - own) for held in self.snapshots)

    def held_now(self, results: Sequence[Tensor | None]) -> int:
        numbers = {number for number, reference in self.references.values() if not reference.expired()}
        return sum(self.num_bytes[n] for n in numbers - self._numbers(results))

    def _numbers(self, tensors: Sequence[Tensor | None]) -> set[int]:
        keys = {t.untyped_storage()._cdata for t in tensors if t is not None}
        return {number for key, (number, _) in self.references.items() if key in keys}


class LargestFloats(TorchDispatchMode):
    """Notes how many values of two bytes or more this thread's operations made memory for at once, by operation.

    Operations on DTensors are noted as those that they are made of.
    """

    def __init__(self) -> None:
        super().__init__()
        self.num_values: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(one, DTensor) for one in types):
            return NotImplemented
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.itemsize == 1:
                continue
            storage = tensor.untyped_storage()
            if not tensor.is_meta and storage._cdata not in given:
                number = storage.nbytes() // tensor.itemsize
                self.num_values[str(func)] = max(number, self.num_values.get(str(func), 0))
        return result
