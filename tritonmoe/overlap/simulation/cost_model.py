"""LayerWork and LinkCosts: what a layer sends and computes, and what its exchanges cost; read by the simulator."""

from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from tritonmoe.config.overlap import LOCAL_PARTS, OverlapPlan
from tritonmoe.overlap.simulation.copy_work import CopyWork, part_share
from tritonmoe.overlap.simulation.step_units import CopyUnits
from tritonmoe.overlap.steps import Step, StepKind, Way

__all__ = ["EachLink", "InsidePorts", "LayerWork", "LinkCosts"]


@dataclass(frozen=True, eq=False)
class InsidePorts:
    """The second port of each rank, over which it reaches the other ranks of its node."""

    node_size: int
    """Ranks of a node are neighbours."""
    out_s: Tensor
    """(W,) float64 seconds for which a byte occupies it on its way out."""
    in_s: Tensor
    """(W,): on its way in."""


@dataclass(frozen=True, eq=False)
class EachLink:
    """What a byte costs on each rank's port and from each rank to each other, where that differs."""

    port_out_s: Tensor
    """(W,) float64 seconds for which a byte occupies a rank's port on its way out."""
    port_in_s: Tensor
    """(W,): on its way in."""
    link_s: Tensor
    """(W, W): for which it occupies the way from rank i (row) to rank k, which other ranks' messages don't use; 0 where
    the ports alone set the speed."""
    latency_s: Tensor
    """(W, W)."""
    inside: InsidePorts | None = None
    """Where ranks of one node reach each other through ports of their own; port_out_s and port_in_s are then those to
    other nodes."""


@dataclass(frozen=True)
class LinkCosts:
    """The link of every rank, the same in both directions.

    With node_size, ranks of one node (node_size neighbours) reach each other at bytes_per_s and others at
    inter_bytes_per_s, through a second port of each rank's own.
    """

    latency_s: float
    bytes_per_s: float
    is_shared: bool = False
    """Whether exchanges that are under way together share the port (MPI) or take turns (NCCL, gloo, emulated ranks)."""
    alone_share: float = 1.0
    """The share of bytes_per_s that one exchange alone reaches: about half where its two directions take turns."""
    node_size: int | None = None
    inter_bytes_per_s: float | None = None
    contention: float = 0.0
    """The share of its speed that compute loses while an exchange is under way, since cores or multiprocessors move the
    rows."""
    each: EachLink | None = None
    """Takes the place of latency_s, bytes_per_s and node_size where links differ."""
    is_rendezvous: bool = False
    """With `each`: whether a message also waits for those before it in the other direction (gloo)."""

    @property
    def each_link(self) -> EachLink:
        """What a byte costs on each link, which the costs of a recorded call always tell."""
        if self.each is None:
            raise ValueError(
                "these costs are the same for all links: give LinkCosts with `each`, as a recorded call has them"
            )
        return self.each

    @property
    def port_node_size(self) -> int | None:
        """The ranks of a node, where each rank has a second port for them."""
        if self.each is None:
            return self.node_size
        return None if self.each.inside is None else self.each.inside.node_size

    def __post_init__(self) -> None:
        if not (self.latency_s >= 0 and self.bytes_per_s > 0 and 0 < self.alone_share <= 1):
            raise ValueError(
                f"latency_s >= 0, bytes_per_s > 0 and 0 < alone_share <= 1 are needed: correct the costs, got {self}"
            )
        if not 0 <= self.contention < 1:
            raise ValueError(f"contention must lie in [0, 1), got {self.contention}")
        if (self.node_size is None) != (self.inter_bytes_per_s is None):
            raise ValueError(f"node_size and inter_bytes_per_s belong together, got {self}")
        if self.node_size is not None and not (self.node_size >= 1 and (self.inter_bytes_per_s or 0) > 0):
            raise ValueError(f"node_size and inter_bytes_per_s must be positive, got {self}")


@dataclass(frozen=True)
class LayerWork:
    """What all ranks of one layer call send and compute."""

    rows: Tensor
    """(W, W) float64: the size of S_ik, the tokens of rank i (row) that need an expert of rank k."""
    pairs: Tensor
    """(W, W) float64: their routed pairs on rank k."""
    row_bytes: int
    """The bytes of one row in the forward's dispatch."""
    top_k: int
    other_row_bytes: int | None = None
    """The bytes of one row in the other exchanges of rows, where a wire format makes them differ from row_bytes."""
    copies: CopyWork | None = None

    @classmethod
    def of(cls, traffic_rows: Tensor, pairs_per_row: float, row_bytes: int, top_k: int) -> "LayerWork":
        """Return the work of a traffic matrix (W, W) whose rows have so many pairs each."""
        rows = traffic_rows.to(torch.float64)
        return cls(rows, rows * pairs_per_row, row_bytes, top_k)

    def scaled(self, share: float | Tensor) -> "LayerWork":
        """Return the work of a share of the rows and pairs, or of shares (W,) of what each rank computes."""
        return replace(self, rows=self.rows * share, pairs=self.pairs * share)

    @property
    def size(self) -> int:
        return self.rows.shape[0]

    def bytes_per_row(self, kind: StepKind) -> int:
        """Return the bytes of one row, or of one copied expert, in an exchange of this kind."""
        if kind in (StepKind.COPIES, StepKind.SPREAD_COPIES, StepKind.COPIES_BACKWARD):
            copies, goes_home = self.copies, kind is StepKind.COPIES_BACKWARD
            return 0 if copies is None else sum(copies.gradient_bytes) if goes_home else copies.expert_bytes
        if kind is StepKind.METADATA:
            return 8 * self.top_k  # int32 ids and fp32 weights
        if kind is StepKind.ROUTING_BACKWARD:
            return 4 * self.top_k
        if kind is StepKind.DISPATCH or self.other_row_bytes is None:
            return self.row_bytes
        return self.other_row_bytes

    def segments(self, plan: OverlapPlan) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Return rows sent, rows returned and pairs (W,) of every segment, as if each chunk had exactly its share."""
        own_rows, own_pairs = self.rows.diagonal(), self.pairs.diagonal()
        home, received, pairs = self.rows.sum(1), self.rows.sum(0), self.pairs.sum(0)
        slices: list[float] = []
        if plan.local_first:
            home, received, pairs = home - own_rows, received - own_rows, pairs - own_pairs
            slices = [plan.local_start / LOCAL_PARTS, 1 - plan.local_start / LOCAL_PARTS]
        shares = [size / sum(plan.chunk_sizes) for size in plan.chunk_sizes]
        leaving, returning = self.shares(plan)
        return (
            [own_rows * part for part in slices] + [home * share for share in leaving],
            [own_rows * part for part in slices] + [received * share for share in returning],
            [own_pairs * part for part in slices] + [pairs * share for share in shares],
        )

    def copy_units(self, plan: OverlapPlan) -> CopyUnits[Tensor] | None:
        """Return what copies have of every segment, of each the share that they have of all pairs; None without any."""
        if self.copies is None:
            return None
        share = self.copies.pairs / self.pairs.sum(0).clamp(min=1)
        pairs = [size * share for size in self.segments(plan)[2]]
        return CopyUnits(pairs, self.copies.copied.sum(1), self.copies.gradient_bytes)

    def shares(self, plan: OverlapPlan) -> tuple[list[float], list[float]]:
        """Return the share of the travelling rows that leaves with each chunk, and the share that returns with it.

        With chunks of experts these are the shares that there would be if every row had the same number of pairs, in
        chunks that are independent of each other.
        Example:
            Two equal chunks of experts, two pairs per row: (0.75, 0.25) and (0.25, 0.75).
        """
        total = sum(plan.chunk_sizes)
        if plan.chunk_by == "tokens":
            shares = [size / total for size in plan.chunk_sizes]
            return shares, shares
        own_rows, own_pairs = (
            float(of.diagonal().sum()) if plan.local_first else 0.0 for of in (self.rows, self.pairs)
        )
        rows = float(self.rows.sum()) - own_rows
        pairs_per_row = max(1.0, (float(self.pairs.sum()) - own_pairs) / rows) if rows else 1.0
        reached = [size / total for size in accumulate(plan.chunk_sizes, initial=0)]
        leaving = [(1 - first) ** pairs_per_row - (1 - last) ** pairs_per_row for first, last in pairwise(reached)]
        returning = [last**pairs_per_row - first**pairs_per_row for first, last in pairwise(reached)]
        return leaving, returning

    def share_of(self, step: Step, plan: OverlapPlan) -> float:
        """Return the share of what travels in exchanges of its kind that travels in this one."""
        if step.kind.is_of_gradient_part and self.copies is not None:
            return part_share(step, self.copies.gradient_bytes)
        return 1.0 if step.chunk is None else self.shares(plan)[step.kind.way is Way.HOME][step.chunk]

    def travelling(self, way: Way) -> Tensor:
        """Return (W, W) what travels from rank i to rank k in an exchange of all chunks: rows, or copied experts."""
        if way in (Way.TO_EXPERTS, Way.HOME):
            found = self.rows
        elif self.copies is None:
            found = torch.zeros_like(self.rows)
        elif self.copies.relayed is None or way is Way.TO_OWNERS:
            found = torch.zeros_like(self.rows) if way is Way.AMONG_COPIES else self.copies.copied
        else:
            found = self.copies.relayed[way is Way.AMONG_COPIES]
        return found.T if way in (Way.HOME, Way.TO_OWNERS) else found

    def ports(self, link: LinkCosts, way: Way = Way.TO_EXPERTS) -> tuple[Tensor, Tensor]:
        """Return (W,) seconds for which one byte per travelling row occupies each rank's port: out of it, and into it.

        Where ranks of one node have a second port for each other, it is the one to other nodes.
        """
        rows, node_size = self.travelling(way), link.port_node_size
        own = rows.diagonal()
        out, into = rows.sum(1) - own, rows.sum(0) - own
        if node_size is not None:
            inside_out, inside_in = self._inside_rows(node_size, way)
            out, into = out - inside_out, into - inside_in
        if link.each is not None:
            return out * link.each.port_out_s, into * link.each.port_in_s
        rate = link.bytes_per_s if link.inter_bytes_per_s is None else link.inter_bytes_per_s
        return out / rate, into / rate

    def inside_ports(self, link: LinkCosts, way: Way) -> tuple[Tensor, Tensor] | None:
        """Return the same of each rank's port to the others of its node; None where there is one port for all ranks."""
        if link.port_node_size is None:
            return None
        out, into = self._inside_rows(link.port_node_size, way)
        if link.each is not None and link.each.inside is not None:
            return out * link.each.inside.out_s, into * link.each.inside.in_s
        return out / link.bytes_per_s, into / link.bytes_per_s

    def _inside_rows(self, node_size: int, way: Way) -> tuple[Tensor, Tensor]:
        """Return the rows (W,) that each rank sends to the others of its node, and those that come from there."""
        node = torch.arange(self.size, device="cpu") // node_size
        inside = torch.where(node[:, None] == node, self.travelling(way), 0.0).fill_diagonal_(0)
        return inside.sum(1), inside.sum(0)
