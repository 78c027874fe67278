"""Causes: by how much each operation differs from what is usual, by what it is due to."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal, TypeAlias

from tritonmoe.doctor.graph import Graph, Key
from tritonmoe.doctor.usual import Usual
from tritonmoe.doctor.walk import Walker

__all__ = ["KINDS", "CauseKind", "Causes"]

CauseKind: TypeAlias = Literal["slow rank", "late rank", "slow link", "imbalance"]
KINDS: tuple[CauseKind, ...] = ("slow rank", "late rank", "slow link", "imbalance")


@dataclass
class Excess:
    """Seconds above (or below) what is usual, of every Run and Member."""

    run_s: list[float]
    member_s: list[float]


class Causes:
    """A graph with what is usual of it, and walks of it without some of what is not."""

    def __init__(self, graph: Graph, usual: Usual) -> None:
        self.graph, self.usual = graph, usual
        self.walker = Walker(graph)
        runs, members = graph.runs, graph.members
        self.run_s = [run.busy_s + run.idle_s for run in runs]
        self.transfer_s = graph.transfers_s()
        none_of_runs, none_of_members = [0.0] * len(runs), [0.0] * len(members)
        self.excess: dict[CauseKind, Excess] = {
            "slow rank": Excess(
                [run.busy_s - own for run, own in zip(runs, usual.busy_s, strict=True)], none_of_members
            ),
            "late rank": Excess(
                [run.idle_s - own for run, own in zip(runs, usual.idle_s, strict=True)], none_of_members
            ),
            "slow link": Excess(
                none_of_runs, [one.transfer_s - own for one, own in zip(members, usual.transfer_s, strict=True)]
            ),
            "imbalance": Excess(usual.of_rows_s, usual.of_bytes_s),
        }
        self.as_it_was = self.walker.step_times(self.run_s, self.transfer_s)

    def without(
        self,
        kinds: Collection[CauseKind],
        ranks: Collection[int] | None = None,
        keys: Callable[[Key], bool] | None = None,
    ) -> list[float]:
        """Give the time of each step without causes of these kinds, on all ranks or some, of all operations or some."""
        graph = self.graph
        run_s, transfer_s = list(self.run_s), list(self.transfer_s)
        for kind in kinds:
            excess = self.excess[kind]
            for index, (run, more) in enumerate(zip(graph.runs, excess.run_s, strict=True)):
                if more and (ranks is None or run.rank in ranks) and (keys is None or keys(run.key)):
                    run_s[index] = max(0.0, run_s[index] - more)
            for index, (member, more) in enumerate(zip(graph.members, excess.member_s, strict=True)):
                if more and (ranks is None or member.rank in ranks) and (keys is None or keys(member.key)):
                    transfer_s[index] -= more
        return self.walker.step_times(run_s, transfer_s)

    def is_nothing(self, kind: CauseKind) -> bool:
        """Whether no operation is above what is usual for this."""
        excess = self.excess[kind]
        return not any(more > 0 for times in (excess.run_s, excess.member_s) for more in times)

    def gained(self, kinds: Collection[CauseKind], ranks: Collection[int] | None = None) -> list[float]:
        """Give what each step is shorter without these causes."""
        return [was - now for was, now in zip(self.as_it_was, self.without(kinds, ranks), strict=True)]

    def by_rank_and_step(self, kind: CauseKind) -> list[list[float]]:
        """Give the seconds above what is usual, by rank and step."""
        graph, excess = self.graph, self.excess[kind]
        sums = [[0.0] * len(graph.steps) for _ in graph.ranks]
        for run, more in zip(graph.runs, excess.run_s, strict=True):
            sums[run.rank][run.step] += more
        for member, more in zip(graph.members, excess.member_s, strict=True):
            sums[member.rank][member.step] += more
        return sums
