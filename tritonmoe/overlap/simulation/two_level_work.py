"""TwoLevelWork: what a layer call on a TwoLevelTransport sends over each of its levels."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tritonmoe.config.overlap import LOCAL_PARTS, OverlapPlan
from tritonmoe.overlap.simulation.cost_model import LayerWork, LinkCosts
from tritonmoe.overlap.steps import LOCAL_START

__all__ = ["TwoLevelWork"]


@dataclass(frozen=True)
class TwoLevelWork:
    """The work of both levels, on the same W ranks: between nodes as relays see it, and inside them.

    Example:
        4 ranks in nodes of 2; a token of rank 0 that needs ranks 2 and 3 is a row of `outer` from rank 0 to rank 2, and
        two rows of `relayed`: from rank 2 to itself and to rank 3.
    """

    outer: LayerWork
    """Between nodes: the rows from rank i to the rank with its place in each other node, and on the diagonal the rows
    that its own node needs. Pairs stand in the column of the rank that computes them: those of its own node's tokens on
    the diagonal, those of other nodes' tokens anywhere else."""
    own: LayerWork
    """Inside nodes: the rows that a rank sends to the ranks of its own node, and their pairs."""
    relayed: LayerWork
    """Inside nodes: the rows that a relay passes on from other nodes, and their pairs."""
    node_size: int
    link: LinkCosts
    """The link of a rank inside its node."""

    @classmethod
    def of(
        cls, work: LayerWork, rows_to_nodes: Tensor, link: LinkCosts, *, inside_row_bytes: int | None = None
    ) -> "TwoLevelWork":
        """Return the work of both levels.

        Args:
            work: the work of the same routing on one level, which says what each rank needs.
            rows_to_nodes: (W, nodes), how many tokens of each rank need any rank of a node, its own included.
            link: the link of a rank inside its node.
            inside_row_bytes: the bytes of a row there; None is work.row_bytes.
        Raises:
            ValueError: the ranks don't make whole nodes, or a node needs fewer rows than one of its ranks, or more than
                all of them.
        """
        size, num_nodes = rows_to_nodes.shape
        node_size = work.size // num_nodes
        by_node = work.rows.view(size, num_nodes, node_size) if node_size * num_nodes == size == work.size else None
        rows_to_nodes = rows_to_nodes.to(torch.float64)
        if by_node is None or not ((by_node.amax(2) <= rows_to_nodes) & (rows_to_nodes <= by_node.sum(2))).all():
            raise ValueError(
                f"rows_to_nodes {tuple(rows_to_nodes.shape)} must be (W, nodes) for the W = {work.size} ranks of the "
                "work, and lie between what the neediest rank of each node needs and what all of them need: got "
                f"{rows_to_nodes.tolist()} for rows {work.rows.tolist()}"
            )
        rank = torch.arange(size, device="cpu")
        node, place = rank // node_size, rank % node_size
        is_inside = node[:, None] == node
        has_same_place = place[:, None] == place
        outer_rows = torch.where(has_same_place, rows_to_nodes.repeat_interleave(node_size, 1), 0.0)
        own_pairs = torch.where(is_inside, work.pairs, 0.0)
        other_pairs = work.pairs - own_pairs
        outer_pairs = torch.diag(own_pairs.sum(0))
        outer_pairs[(rank + node_size) % size, rank] = other_pairs.sum(0)
        # A relay passes on what the ranks with its place in other nodes have for each rank of its node.
        from_others = torch.where(is_inside, 0.0, work.rows).view(num_nodes, node_size, size).sum(0)
        relayed_rows = torch.where(is_inside, from_others[place], 0.0)
        relayed_pairs = torch.zeros_like(work.pairs)
        relayed_pairs[rank, rank] = other_pairs.sum(0)
        row_bytes = work.row_bytes if inside_row_bytes is None else inside_row_bytes
        return cls(
            replace(work, rows=outer_rows, pairs=outer_pairs, copies=None),
            LayerWork(torch.where(is_inside, work.rows, 0.0), own_pairs, row_bytes, work.top_k),
            LayerWork(relayed_rows, relayed_pairs, row_bytes, work.top_k),
            node_size,
            link,
        )

    @property
    def size(self) -> int:
        return self.outer.size

    @property
    def node_of_rank(self) -> Tensor:
        """(W,): ranks with the same number exchange inside a node."""
        return torch.arange(self.size, device="cpu") // self.node_size

    @property
    def place_of_rank(self) -> Tensor:
        """(W,): ranks with the same number exchange between nodes."""
        return torch.arange(self.size, device="cpu") % self.node_size

    def inside(self, plan: OverlapPlan, chunk: int | None) -> LayerWork:
        """Return the work inside nodes of a chunk or local slice of the outer plan; None for all of them together."""
        whole = LayerWork(
            self.own.rows + self.relayed.rows,
            self.own.pairs + self.relayed.pairs,
            self.own.row_bytes,
            self.own.top_k,
        )
        if chunk is None:
            return whole
        if plan.local_first and chunk < 0:
            part = plan.local_start / LOCAL_PARTS
            return self.own.scaled(part if chunk == LOCAL_START else 1 - part)
        travelling = self.relayed if plan.local_first else whole
        return travelling.scaled(plan.chunk_sizes[chunk] / sum(plan.chunk_sizes))
