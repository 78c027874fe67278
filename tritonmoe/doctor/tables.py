"""Tables: the numbers of a graph as tensors, which all that is asked of it is computed on."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tritonmoe.doctor.graph import Graph

__all__ = ["Key", "Tables", "floats", "indices", "tables_of"]

Key: TypeAlias = tuple
"""What operations are compared by: those with the same key do the same work."""


def floats(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device="cpu")


def indices(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device="cpu")


@dataclass
class Tables:
    """N stretches of work and M exchanges as ranks know them; see Run and Member, whose fields these are."""

    keys: list[Key]
    run_rank: Tensor
    run_step: Tensor
    run_key: Tensor
    """A place in `keys`, as member_key is one."""
    run_stretch: Tensor
    """Runs of one number are compared as one."""
    busy_s: Tensor
    idle_s: Tensor
    overhead_s: Tensor
    rows: Tensor
    """0 where that is not known."""
    member_rank: Tensor
    member_step: Tensor
    member_key: Tensor
    member_exchange: Tensor
    member_lane: Tensor
    """A number for each lane of each rank."""
    delay_s: Tensor
    transfer_s: Tensor
    bytes_out: Tensor
    """To other ranks; NaN where that is not known."""
    bytes_in: Tensor
    num_bytes: Tensor
    """Where neither is known; else the larger of both."""
    needs: dict[int, tuple[int, ...]] = field(default_factory=dict)
    """Of the members that don't wait for all of their exchange."""
    programs: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Of each rank: the kinds of its items, and their indices."""

    @property
    def run_s(self) -> Tensor:
        """How long each stretch took."""
        return self.busy_s + self.idle_s + self.overhead_s


def tables_of(graph: "Graph") -> Tables:
    """Return the tables of a graph that was put together row by row."""
    keys: dict[Key, int] = {}
    stretches: dict[tuple[int, int], int] = {}
    runs, members = graph.runs, graph.members

    def stretch(index: int) -> int:
        run = runs[index]
        place = (run.rank, run.stretch) if run.stretch >= 0 else (-1, index)
        return stretches.setdefault(place, len(stretches))

    def total(sizes: tuple[int, ...] | None) -> float:
        return float("nan") if sizes is None else float(sum(sizes))

    bytes_out, bytes_in = (floats([total(of) for of in way]) for way in (_sent(graph), _received(graph)))
    both = torch.maximum(bytes_out, bytes_in)
    alone = floats([float(member.num_bytes or 0) for member in members])
    return Tables(
        run_rank=indices([run.rank for run in runs]),
        run_step=indices([run.step for run in runs]),
        run_key=indices([keys.setdefault(run.key, len(keys)) for run in runs]),
        run_stretch=indices([stretch(index) for index in range(len(runs))]),
        busy_s=floats([run.busy_s for run in runs]),
        idle_s=floats([run.idle_s for run in runs]),
        overhead_s=torch.zeros(len(runs), dtype=torch.float64, device="cpu"),
        rows=floats([float(run.rows or 0) for run in runs]),
        member_rank=indices([member.rank for member in members]),
        member_step=indices([member.step for member in members]),
        member_key=indices([keys.setdefault(member.key, len(keys)) for member in members]),
        member_exchange=indices([member.exchange for member in members]),
        member_lane=indices([member.rank * 1_000_003 + member.lane for member in members]),
        delay_s=floats([member.delay_s for member in members]),
        transfer_s=floats([member.transfer_s for member in members]),
        bytes_out=bytes_out,
        bytes_in=bytes_in,
        num_bytes=torch.where(both.isnan(), alone, both),
        needs={index: member.needs for index, member in enumerate(members) if member.needs is not None},
        programs=[
            (indices([int(kind) for kind, _ in program]), indices([index for _, index in program]))
            for program in graph.programs
        ],
        keys=list(keys),
    )


def _sent(graph: "Graph") -> list[tuple[int, ...] | None]:
    return [member.sent if member.received is not None else None for member in graph.members]


def _received(graph: "Graph") -> list[tuple[int, ...] | None]:
    return [member.received if member.sent is not None else None for member in graph.members]
