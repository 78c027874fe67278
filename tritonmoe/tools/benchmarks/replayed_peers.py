"""The other ranks of a measurement in which rank 0 computes alone: they take part in the calls that are recorded."""

from collections.abc import Callable
from dataclasses import replace
from queue import SimpleQueue

import torch

from tritonmoe.config.overlap import OverlapPlan
from tritonmoe.overlap.simulation.cost_model import LayerWork, LinkCosts
from tritonmoe.transports.emulated.link_model import LinkModel
from tritonmoe.transports.emulated.link_replay import Port

__all__ = ["ReplayedPeers", "work_of_one"]


class ReplayedPeers:
    """Threads that wait, outside of any exchange, for rank 0 to ask for a call; and the port that stands for them.

    Use it as a context on rank 0: at its end the threads return.
    """

    def __init__(self, num_ranks: int, link: LinkModel) -> None:
        self.port = Port(link)
        """The port of rank 0, in every call that is not recorded."""
        self._plans: list[SimpleQueue[OverlapPlan | None]] = [SimpleQueue() for _ in range(num_ranks)]

    def ask(self, plan: OverlapPlan | None) -> None:
        """Let all peers run a call of this plan, or return."""
        for queue in self._plans[1:]:
            queue.put(plan)

    def serve(self, rank: int, run: Callable[[OverlapPlan], object]) -> None:
        """Run what rank 0 asks for until its measurement is over."""
        while (plan := self._plans[rank].get()) is not None:
            run(plan)

    def link_costs(self) -> LinkCosts:
        """Return the port's link for the simulator."""
        link = self.port.link
        return LinkCosts(link.latency_us * 1e-6, 1 / link.transfer_s(1) if link.transfer_s(1) else float("inf"))

    def __enter__(self) -> "ReplayedPeers":
        return self

    def __exit__(self, *_: object) -> None:
        self.ask(None)


def work_of_one(work: LayerWork, rank: int) -> LayerWork:
    """Return what a call is to a rank whose peers are replayed: they exchange with it, and not with each other."""
    is_own = torch.zeros_like(work.rows)
    is_own[rank] = is_own[:, rank] = 1
    return replace(work, rows=work.rows * is_own, pairs=work.pairs * is_own)
