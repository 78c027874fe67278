"""Replays: walks of a graph without some of its causes."""

from collections.abc import Collection, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from tritonmoe.tools.doctor.causes import CAUSES, CauseKind, ExcessTime, Known
from tritonmoe.tools.doctor.graph import Graph
from tritonmoe.tools.doctor.usual import Usual
from tritonmoe.tools.doctor.walk import walker_of

__all__ = ["Removal", "Replays"]

Removal: TypeAlias = Mapping[CauseKind, Collection[int] | Tensor | None]
"""Kinds of causes that are taken out: on some ranks, on all (None), or (W, S) a part on each rank in each step."""


class Replays:
    """A graph with what is usual of it, and walks of it without some of what is not."""

    def __init__(self, graph: Graph, usual: Usual, known: Known | None = None) -> None:
        self.graph, self.usual, self.tables = graph, usual, graph.tables
        self.walker = walker_of(graph)
        self.run_s, self.transfer_s = self.tables.run_s, self.tables.transfer_s
        self.excess: dict[CauseKind, ExcessTime] = {}
        for kind, cause in CAUSES.items():
            if cause.compared is not None:
                self.excess[kind] = cause.compared(graph, usual)
            elif cause.structural is not None and known is not None:
                self.excess[kind] = cause.structural(known, usual)
        self.as_it_was = self.walker.step_times(self.run_s, self.transfer_s)

    def without(self, removals: Sequence[Removal]) -> list[list[float]]:
        """Return the time of each step without causes of some kinds, for each of several sets of them."""
        found: list[list[float]] = []
        for first in range(0, len(removals), self.walker.num_at_once):
            some = removals[first : first + self.walker.num_at_once]
            runs, transfers = (times.repeat(len(some), 1) for times in (self.run_s, self.transfer_s))
            for run_s, transfer_s, removal in zip(runs, transfers, some, strict=True):
                for kind, removed in removal.items():
                    excess = self.excess[kind]
                    of_runs, of_members = self._parts(kind, removed)
                    run_s -= excess.run_s * of_runs
                    transfer_s -= excess.member_s * of_members
            found += self.walker.all_step_times(runs.clamp_(min=0), transfers)
        return found

    def due_to(self, kind: CauseKind) -> Tensor:
        """Return the rank (M,) that the excess of a Member is due to: its own, or the hot one that it waits for."""
        return self.usual.bytes_due_to if CAUSES[kind].is_due_to_bytes else self.tables.member_rank

    def _parts(
        self, kind: CauseKind, removed: Collection[int] | Tensor | None
    ) -> tuple[Tensor | float, Tensor | float]:
        """Return which part of its excess is taken out of each Run (N,) and of each Member (M,)."""
        if removed is None:
            return 1.0, 1.0
        tables, due_to = self.tables, self.due_to(kind)
        if isinstance(removed, Tensor):
            return removed[tables.run_rank, tables.run_step], removed[due_to, tables.member_step]
        of = torch.zeros(len(self.graph.ranks), dtype=torch.float64, device="cpu")
        of[list(removed)] = 1.0
        return of[tables.run_rank], of[due_to]

    def is_nothing(self, kind: CauseKind) -> bool:
        """Whether no operation is above what is usual for this."""
        excess = self.excess[kind]
        return not any(bool((times > 0).any()) for times in (excess.run_s, excess.member_s))

    def by_rank_and_step(self, kind: CauseKind) -> list[list[float]]:
        """Return the seconds above what is usual, by rank and step."""
        tables, excess = self.tables, self.excess[kind]
        shape = len(self.graph.ranks), len(self.graph.steps)
        sums = torch.zeros(*shape, dtype=torch.float64, device="cpu").flatten()
        sums.index_add_(0, tables.run_rank * shape[1] + tables.run_step, excess.run_s)
        sums.index_add_(0, self.due_to(kind) * shape[1] + tables.member_step, excess.member_s)
        return sums.view(shape).tolist()
