"""Faults: which exchanges of emulated ranks come late or never, by a script, and what that raises."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from tritonmoe.config.numbers import is_integer, is_number

__all__ = ["Death", "Delay", "FaultScript", "RankStopped"]


@dataclass(frozen=True)
class Delay:
    """A fault: the rank makes this exchange (counted from 0, count exchanges too) so many seconds late."""

    rank: int
    exchange: int
    seconds: float

    def __post_init__(self) -> None:
        if not (is_number(self.seconds) and self.seconds >= 0):
            raise ValueError(f"seconds must be a finite number that is not negative, got {self.seconds!r}")


@dataclass(frozen=True)
class Death:
    """A fault: the rank stops instead of making this exchange (counted from 0, count exchanges too)."""

    rank: int
    exchange: int


Fault = TypeVar("Fault", Delay, Death)


class RankStopped(BaseException):
    """What a Death raises in its rank's thread; no `except Exception` in the rank's code survives it."""


class FaultScript:
    """Which exchange of which rank comes late, or never.

    It raises TypeError or ValueError for what is no fault, names what there can't be, or stands twice.
    """

    def __init__(self, faults: Sequence[Delay | Death], num_ranks: int) -> None:
        self._faults: dict[tuple[type, int, int], Delay | Death] = {}
        for fault in faults:
            if not isinstance(fault, Delay | Death):
                raise TypeError(f"a fault is a Delay or a Death, got {fault!r}")
            if not (is_integer(fault.rank) and is_integer(fault.exchange)):
                raise TypeError(f"{fault} must name its rank and its exchange by whole numbers")
            if not 0 <= fault.rank < num_ranks or fault.exchange < 0:
                raise ValueError(f"{fault} must name a rank from 0 to {num_ranks - 1} and an exchange from 0 on")
            key = type(fault), fault.rank, fault.exchange
            if key in self._faults:
                raise ValueError(f"{fault} and {self._faults[key]} are of one exchange of one rank: leave one out")
            self._faults[key] = fault
        self._happened: set[Delay | Death] = set()

    def death(self, rank: int, exchange: int) -> RankStopped | None:
        """Return what stops the rank where it would have made this exchange."""
        if self._take(Death, rank, exchange) is None:
            return None
        return RankStopped(f"rank {rank} was stopped by its fault at exchange {exchange}")

    def delay_s(self, rank: int, exchange: int) -> float | None:
        """Return by how many seconds the rank comes late to this exchange."""
        fault = self._take(Delay, rank, exchange)
        return None if fault is None else fault.seconds

    def never_happened(self, num_exchanges: Sequence[int]) -> list[str]:
        """Return which faults never happened and why, none where a Death has cut the run short.

        Args:
            num_exchanges: by rank, how many it has made; after rebuild() it goes on from the largest of all ranks.
        """
        if any(isinstance(fault, Death) for fault in self._happened):
            return []
        said = []
        for fault in self._faults.values():
            if fault not in self._happened:
                made = num_exchanges[fault.rank]
                why = f"rank {fault.rank} made {made} exchanges, numbers 0 to {made - 1}"
                if made == 0:
                    why = f"rank {fault.rank} made no exchange"
                elif fault.exchange < made:
                    why = f"rebuild() passed over this number on rank {fault.rank}"
                said.append(f"{fault} never happened: {why}")
        return said

    def _take(self, kind: type[Fault], rank: int, exchange: int) -> Fault | None:
        """Return the fault of this kind that happens now, if any."""
        fault = self._faults.get((kind, rank, exchange))
        if not isinstance(fault, kind):
            return None
        self._happened.add(fault)
        return fault
