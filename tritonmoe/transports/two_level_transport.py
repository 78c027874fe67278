"""TwoLevelTransport: ranks grouped into nodes, so that rows can cross the slow link between nodes once each."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tritonmoe.runtime.host_device import HostCopy
from tritonmoe.transports.base import MAX_HEADER, MAX_SEGMENTS, PendingExchange, Transport
from tritonmoe.transports.exchange_arguments import as_counts, check_counts, check_exchange

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["GroupView", "TwoLevelTransport", "check_nodes"]


class ExchangeOfRanks(PendingExchange):
    """An exchange of all ranks' transport in which only some ranks take part, as those see it."""

    def __init__(self, pending: PendingExchange, ranks: Sequence[int]) -> None:
        self._pending, self._ranks = pending, list(ranks)

    def wait(self) -> Tensor:
        return self._pending.wait()

    def finished_at(self) -> float | None:
        return self._pending.finished_at()

    def arrivals(self) -> tuple[float | None, ...] | None:
        arrivals = self._pending.arrivals()
        return None if arrivals is None else tuple(arrivals[rank] for rank in self._ranks)


class SelectedRows(ExchangeOfRanks):
    """Counts of all ranks under way, of which those of some ranks are given."""

    _received: Tensor | None = None

    def wait(self) -> Tensor:
        if self._received is None:
            self._received = self._pending.wait()[self._ranks]
        return self._received


class GroupView(Transport):
    """Some ranks of a transport as a transport of their own: the others send each other nothing at the same time.

    Every rank of the world makes the call, in the view that it belongs to.

    Args:
        world: the transport of all ranks. ranks: those of this view, in their order here, this rank among them.
    """

    def __init__(self, world: Transport, ranks: Sequence[int]) -> None:
        self._world = world
        self._ranks = tuple(ranks)
        self.rank, self.size = self._ranks.index(world.rank), len(self._ranks)

    @property
    def job_ranks(self) -> tuple[int, ...] | None:
        of_world = self._world.job_ranks
        if self.size == self._world.size:
            return of_world
        return self._ranks if of_world is None else tuple(of_world[rank] for rank in self._ranks)

    def exchange(
        self,
        rows: Tensor,
        input_splits: Sequence[int],
        output_splits: Sequence[int],
        out: Tensor | None = None,
    ) -> PendingExchange:
        input_splits, output_splits = as_counts(input_splits), as_counts(output_splits)
        out = check_exchange(self, rows, input_splits, output_splits, out)
        splits = self._of_world(input_splits), self._of_world(output_splits)
        return ExchangeOfRanks(self._world.exchange(rows, *splits, out), self._ranks)

    def post_counts(self, counts: Tensor) -> PendingExchange:
        check_counts(self, counts)
        of_world = counts.new_zeros(self._world.size, counts.shape[1])
        of_world[list(self._ranks)] = counts
        return SelectedRows(self._world.post_counts(of_world), self._ranks)

    def wait_for_copy(self, copy: HostCopy) -> list[Tensor]:
        return self._world.wait_for_copy(copy)

    @property
    def generation(self) -> int:  # type: ignore[override]
        return self._world.generation

    @property
    def records_arrivals(self) -> bool:
        return self._world.records_arrivals

    @records_arrivals.setter
    def records_arrivals(self, wanted: bool) -> None:
        self._world.records_arrivals = wanted

    def give_up(self, what: str) -> None:
        self._world.give_up(what)

    def rebuild(self) -> None:
        """Rebuild the transport of all ranks, which all of them must call."""
        self._world.rebuild()

    def uses_rendezvous(self, device: torch.device) -> bool:
        return self._world.uses_rendezvous(device)

    def shares_link(self, device: torch.device) -> bool:
        return self._world.shares_link(device)

    def _of_world(self, splits: Sequence[int]) -> list[int]:
        of_world = [0] * self._world.size
        for rank, count in zip(self._ranks, splits, strict=True):
            of_world[rank] = count
        return of_world


def check_nodes(size: int, node_size: int) -> None:
    """Raise ValueError unless so many ranks make at least two whole nodes of at least two ranks."""
    if not isinstance(node_size, int) or node_size < 2 or size % node_size or size == node_size:
        raise ValueError(
            f"{size} ranks can't be two or more nodes of node_size = {node_size} >= 2 ranks: choose a "
            "node_size that divides the ranks, or use the transport of all ranks itself"
        )


class TwoLevelTransport(Transport):
    """The ranks of `world`, node by node: rank n * node_size + i is rank i of node n.

    A layer on it sends a token once to every other node that needs it, to the rank with this rank's place in that
    node, and from there to the ranks that need it: fewer bytes between nodes, one more step inside them. The idea is
    that of DeepEP's and HierMoE's (arXiv 2508.09591) two-level dispatch.

    Args:
        world: the transport of all ranks. node_size: ranks per node.
        between_nodes: the transport of the ranks with this one's place in their nodes, inside_node: that of this node's
            ranks. None is a view of `world`, which serves tests; with processes give each a group of its own, since
            a group's exchanges queue behind each other.
    Raises:
        ValueError: the ranks don't make at least two whole nodes of at least two ranks.
    Example:
        World of 4, node_size 2: rank 1 has between_nodes of ranks 1 and 3, inside_node of ranks 0 and 1.
    """

    node_size: int

    def __init__(
        self,
        world: Transport,
        node_size: int,
        *,
        between_nodes: Transport | None = None,
        inside_node: Transport | None = None,
    ) -> None:
        if not isinstance(world, Transport):
            raise TypeError(f"world must be the Transport of all ranks, got {type(world).__name__}")
        check_nodes(world.size, node_size)
        self.world = world
        self.rank, self.size, self.node_size = world.rank, world.size, node_size
        self.num_nodes = world.size // node_size
        node, place = divmod(world.rank, node_size)
        self.between_nodes = between_nodes or GroupView(world, range(place, world.size, node_size))
        self.inside_node = inside_node or GroupView(world, range(node * node_size, (node + 1) * node_size))
        for name, part, rank, size in (
            ("between_nodes", self.between_nodes, node, self.num_nodes),
            ("inside_node", self.inside_node, place, node_size),
        ):
            if (part.rank, part.size) != (rank, size):
                raise ValueError(
                    f"{name} must be rank {rank} of {size} on rank {world.rank} of {world.size} with node_size = "
                    f"{node_size}, got rank {part.rank} of {part.size}"
                )

    @property
    def single_level(self) -> Transport:
        return self.world

    @property
    def group(self) -> "ProcessGroup | None":
        return self.world.group

    @property
    def job_ranks(self) -> tuple[int, ...] | None:
        return self.world.job_ranks

    def exchange(
        self,
        rows: Tensor,
        input_splits: Sequence[int],
        output_splits: Sequence[int],
        out: Tensor | None = None,
    ) -> PendingExchange:
        return self.world.exchange(rows, input_splits, output_splits, out)

    def post_counts(self, counts: Tensor) -> PendingExchange:
        return self.world.post_counts(counts)

    def wait_for_copy(self, copy: HostCopy) -> list[Tensor]:
        return self.world.wait_for_copy(copy)

    @property
    def message_length(self) -> int:
        return MAX_HEADER + 2 * self.size + MAX_SEGMENTS * (3 + self.node_size)

    @property
    def generation(self) -> int:  # type: ignore[override]
        return self.world.generation

    def give_up(self, what: str) -> None:
        for transport in self._levels():
            transport.give_up(what)

    def rebuild(self) -> None:
        """Break the transports of all levels, then rebuild one after the other, each within its timeout."""
        self.give_up("called rebuild()")
        for transport in self._levels():
            transport.rebuild()

    def _levels(self) -> list[Transport]:
        """Return the transports that are no view of another one."""
        levels = (self.world, self.between_nodes, self.inside_node)
        return [level for level in levels if not isinstance(level, GroupView)]

    def uses_rendezvous(self, device: torch.device) -> bool:
        return self.between_nodes.uses_rendezvous(device)

    def shares_link(self, device: torch.device) -> bool:
        return self.between_nodes.shares_link(device)

    @property
    def records_arrivals(self) -> bool:
        return self.world.records_arrivals

    @records_arrivals.setter
    def records_arrivals(self, wanted: bool) -> None:
        for transport in self._levels():
            transport.records_arrivals = wanted

    def close(self) -> None:
        for transport in (self.between_nodes, self.inside_node, self.world):
            transport.close()
