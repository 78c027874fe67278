"""Faults: which exchanges of emulated ranks come late or never, by a script, and what that raises."""

from collections.abc import Sequence
from dataclasses import dataclass

from tritonmoe.config.layer import is_number
from tritonmoe.errors import TransportError

__all__ = ["Death", "Delay", "FaultScript", "PeerFailure", "RankStopped"]


@dataclass(frozen=True)
class Delay:
    """A fault: the rank comes to this exchange (counted from 0, count exchanges too) so many seconds late."""

    rank: int
    exchange: int
    seconds: float

    def __post_init__(self) -> None:
        if not (is_number(self.seconds) and self.seconds >= 0):
            raise ValueError(f"seconds must be a finite number that is not negative, got {self.seconds!r}")


@dataclass(frozen=True)
class Death:
    """A fault: the rank stops where it would have made this exchange (counted from 0, count exchanges too)."""

    rank: int
    exchange: int


class RankStopped(BaseException):
    """What a Death raises in its rank's thread; no `except Exception` in the rank's code survives it."""


class PeerFailure(TransportError):
    """An exchange that failed because another rank had failed: never the first cause."""


class FaultScript:
    """Which exchange of which rank comes late, or never.

    It raises TypeError or ValueError for what is no fault, or names a rank or exchange that there can't be.
    """

    def __init__(self, faults: Sequence[Delay | Death], num_ranks: int) -> None:
        for fault in faults:
            if not isinstance(fault, Delay | Death):
                raise TypeError(f"a fault is a Delay or a Death, got {fault!r}")
            if not 0 <= fault.rank < num_ranks or fault.exchange < 0:
                raise ValueError(f"{fault} must name a rank from 0 to {num_ranks - 1} and an exchange from 0 on")
        self._delays = {(fault.rank, fault.exchange): fault.seconds for fault in faults if isinstance(fault, Delay)}
        self._deaths = {(fault.rank, fault.exchange) for fault in faults if isinstance(fault, Death)}

    def death(self, rank: int, exchange: int) -> RankStopped | None:
        """Give what stops the rank where it would have made this exchange."""
        if (rank, exchange) not in self._deaths:
            return None
        return RankStopped(f"rank {rank} was stopped by its fault at exchange {exchange}")

    def delay_s(self, rank: int, exchange: int) -> float | None:
        """Give by how many seconds the rank comes late to this exchange."""
        return self._delays.get((rank, exchange))
