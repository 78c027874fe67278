"""A barrier in shared memory (mbarrier), which counts arrivals of threads and bytes of copies."""

from collections.abc import Callable
from dataclasses import dataclass, field

from virtual_gpu.faults import Deadlock

__all__ = ["Barrier"]


@dataclass
class Barrier:
    """An mbarrier: its phase completes when all arrivals are there, and all bytes of copies."""

    count: int
    pending: int = 0
    num_bytes: int = 0
    phase: int = 0
    copies: list[Callable[[int | None], int]] = field(default_factory=list)
    """What lands the bytes of each copy that was started, given the warp that waits (None: all do)."""

    def __post_init__(self) -> None:
        self.pending = self.count

    def arrive(self, num_bytes: int = 0) -> None:
        self.pending -= 1
        self.num_bytes += num_bytes
        self.complete()

    def complete(self) -> None:
        if self.pending == 0 and self.num_bytes == 0:
            self.phase ^= 1
            self.pending = self.count

    def wait(self, parity: int, waiter: int | None) -> None:
        if self.phase != parity:
            return
        for copy in self.copies:
            self.num_bytes -= copy(waiter)
        self.copies.clear()
        self.complete()
        if self.phase == parity:
            raise Deadlock(f"a barrier waits for {self.pending} arrivals and {self.num_bytes} bytes that never come")
