"""What the steps of a layer call have to do and what they cost: the one model of tuner, simulator, planner and doctor.

LayerWork and CopyWork have what all ranks send and compute, and step_units() gives one step's part of it. StepCosts has
the seconds of compute steps by their units, LinkCosts those of exchanges by their bytes.
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from typing import Generic, TypeVar

import torch
from torch import Tensor
from typing_extensions import NamedTuple  # typing's is not generic before Python 3.11

from tritonmoe.config.overlap import LOCAL_PARTS, OverlapPlan
from tritonmoe.overlap.schedule import Schedule, build_backward, build_forward
from tritonmoe.overlap.steps import Step, StepKind, Unit, Way

__all__ = [
    "CopyUnits",
    "CopyWork",
    "EachLink",
    "InsidePorts",
    "LayerWork",
    "LinkCosts",
    "StepCosts",
    "backward_with",
    "fit_line",
    "forward_with",
    "gradient_parts",
    "part_share",
    "step_units",
]


@dataclass(frozen=True, eq=False)
class CopyWork:
    """What copies of experts make all ranks of a call send and compute."""

    copied: Tensor
    """(W, W) float64: how many experts of rank i (row) have a copy on rank k."""
    pairs: Tensor
    """(W,) float64: how many pairs each rank's copies compute."""
    expert_bytes: int
    """Of one expert's weights."""
    gradient_bytes: tuple[int, int]
    """Of what comes home of their gradients: first of gate_up_proj, then of down_proj; 0 where nothing does."""
    are_sent_again: bool = False
    """Whether the weights travel once more in the backward."""
    relayed: tuple[Tensor, Tensor] | None = None
    """Where ranks pass pieces of copies on: (W, W) float64, how many experts' weights go from rank i to rank k from
    owners, and then among the ranks that have copies."""

    @property
    def returned(self) -> tuple[int, ...]:
        """Which parts of the gradients come home."""
        return tuple(part for part, num_bytes in enumerate(self.gradient_bytes) if num_bytes)


def forward_with(copies: CopyWork | None, plan: OverlapPlan, num_fillers: int = 0) -> Schedule:
    """Return the schedule of a forward with copies, or without."""
    relays = copies is not None and copies.relayed is not None
    return build_forward(plan, num_fillers, has_copies=copies is not None, relays_copies=relays)


def backward_with(copies: CopyWork | None, plan: OverlapPlan, needs_x: bool, needs_topk_weights: bool) -> Schedule:
    """Return the schedule of the backward of such a forward."""
    needs = {"needs_x": needs_x, "needs_topk_weights": needs_topk_weights}
    if copies is None:
        return build_backward(plan, **needs)
    of_copies = {"has_copies": True, "sends_copies": copies.are_sent_again, "relays_copies": copies.relayed is not None}
    return build_backward(plan, **needs, **of_copies, returned_copies=copies.returned)


def part_share(step: Step, gradient_bytes: tuple[int, int]) -> float:
    """Return the share of copies' gradients that a step of one part computes, sends or adds; 1 for other steps."""
    if not step.kind.is_of_gradient_part:
        return 1.0
    return gradient_bytes[step.chunk or 0] / max(1, sum(gradient_bytes))


def gradient_parts(num_bytes: int) -> tuple[int, int]:
    """Return the parts of the gradients of a gated expert: gate_up_proj has twice the bytes of down_proj."""
    return num_bytes - num_bytes // 3, num_bytes // 3


Size = TypeVar("Size", float, Tensor)


class CopyUnits(NamedTuple, Generic[Size]):
    """What a rank has to do with copies of experts."""

    pairs: Sequence[Size]
    """How many of its pairs belong to copies, by segment."""
    sent: Size
    """How many copies it sends."""
    gradient_bytes: tuple[int, int]
    """As in CopyWork."""


def step_units(
    step: Step,
    num_local_slices: int,
    sent: Sequence[Size],
    returned: Sequence[Size],
    pairs: Sequence[Size],
    *,
    copies: CopyUnits[Size] | None = None,
) -> Size:
    """Return how many of its kind's units (Unit) a step has.

    Args:
        num_local_slices: how many of the segments are local ones.
        sent, returned, pairs: how many rows are sent, how many return, and how many pairs there are, by segment.
    """
    unit = step.kind.unit
    of = pairs if unit is Unit.PAIRS else sent if unit is Unit.SENT_ROWS else returned
    if unit in (Unit.COPY_PAIRS, Unit.COPIES):
        if copies is None:
            return pairs[0] * 0
        share = part_share(step, copies.gradient_bytes)
        if unit is Unit.COPIES:
            return copies.sent * share
        of = [size * share for size in copies.pairs]
    elif copies is not None and step.kind.copy_kind is not None:
        of = [size - of_copies for size, of_copies in zip(pairs, copies.pairs, strict=True)]
    segment = step.segment(num_local_slices)
    if segment is not None:
        return of[segment]
    total = of[0]
    for size in of[1:]:
        total = total + size
    return total


@dataclass(frozen=True)
class StepCosts:
    """The seconds of the compute lane that steps of each kind take: fixed_s of a step, and unit_s of each of its units.

    The kind of a step says what its unit is (steps.Unit). A kind that is missing costs nothing, and so does a step
    without a unit. The cost of an exchange is that of posting it, which packs its rows.
    """

    fixed_s: Mapping[str, float]
    unit_s: Mapping[str, float]
    bends: Mapping[str, Sequence[tuple[float, float]]] = field(default_factory=dict)
    """Where the line of a kind bends: (units, seconds that each unit beyond them costs more, or less), ascending."""
    slowness: Mapping[str, Tensor] = field(default_factory=dict)
    """(W,) how many times as long as that steps of a kind take on each rank; a kind that is missing: once."""

    def on_ranks(self, kind: str, units: Tensor) -> Tensor:
        """Return the seconds (W,) of a step with so many units (W,) on each rank."""
        seconds = torch.as_tensor(self.seconds(kind, units), dtype=torch.float64, device="cpu")
        return seconds * self.slowness[kind] if kind in self.slowness else seconds

    def seconds(self, kind: str, units: Size) -> Size:
        total = units * self.unit_s.get(kind, 0.0) + (units > 0) * self.fixed_s.get(kind, 0.0)
        for bend, unit_s in self.bends.get(kind, ()):
            total = total + (units > bend) * (units - bend) * unit_s
        return total

    def with_copies(self) -> "StepCosts":
        """Return costs in which copies take for their pairs what own experts take for theirs."""
        pairs = [(kind, kind.copy_kind) for kind in StepKind if kind.copy_kind is not None]
        parts = (self.fixed_s, self.unit_s, self.bends, self.slowness)
        return StepCosts(*({**part, **{copies: part[own] for own, copies in pairs if own in part}} for part in parts))

    def of_one_more_chunk(self, kind: str, units: float) -> float:
        """Return the seconds by which two steps of half the units take longer than one step."""
        return 2 * self.seconds(kind, units / 2) - self.seconds(kind, units)

    @classmethod
    def fit(cls, samples: Iterable[tuple[str, float, float]]) -> "StepCosts":
        """Fit a line to (kind, units, seconds) of measured steps, kind by kind; neither part is negative."""
        lines = {kind: fit_line(points) for kind, points in _by_kind(samples).items()}
        return cls({k: fixed for k, (fixed, _) in lines.items()}, {k: unit for k, (_, unit) in lines.items()})

    @classmethod
    def through(cls, samples: Iterable[tuple[str, float, float]]) -> "StepCosts":
        """Join (kind, units, seconds) of measured steps by straight lines, kind by kind.

        More units never cost less. The first and the last line go on beyond the smallest and the largest step, though
        not below zero.
        """
        lines = {kind: _join(points) for kind, points in _by_kind(samples).items()}
        return cls(
            {kind: fixed for kind, (fixed, _) in lines.items()},
            {kind: slopes[0][1] for kind, (_, slopes) in lines.items()},
            {
                kind: [(at, after - before) for (_, before), (at, after) in pairwise(slopes)]
                for kind, (_, slopes) in lines.items()
            },
        )


def _by_kind(samples: Iterable[tuple[str, float, float]]) -> dict[str, list[tuple[float, float]]]:
    """Return (units, seconds) by kind."""
    by_kind: dict[str, list[tuple[float, float]]] = {}
    for kind, units, seconds in samples:
        by_kind.setdefault(kind, []).append((units, seconds))
    return by_kind


ALIKE = 1.05
"""Two numbers of units are taken for the same one if the larger is at most this many times the smaller."""


def _join(points: Sequence[tuple[float, float]]) -> tuple[float, list[tuple[float, float]]]:
    """Return seconds at zero units, and a curve's slopes through the points as (units from which, seconds per unit).

    Points of about the same number of units (ALIKE) are taken as one with their median time, of two with the shorter
    one: the slope of a line through them would be noise.

    Example:
        _join([(2, 3), (4, 4), (8, 12)]) gives (2, [(0, 0.5), (4, 2)]).
    """
    alike: list[list[tuple[float, float]]] = []
    for point in sorted(point for point in points if point[0] > 0):
        if alike and point[0] <= ALIKE * alike[-1][0][0]:
            alike[-1].append(point)
        else:
            alike.append([point])
    if not alike:
        return 0.0, [(0.0, 0.0)]
    sizes = [statistics.mean(units for units, _ in group) for group in alike]
    times = list(accumulate((statistics.median_low([seconds for _, seconds in group]) for group in alike), max))
    slopes = [(b - a) / (v - u) for (u, v), (a, b) in zip(pairwise(sizes), pairwise(times), strict=True)]
    fixed = max(0.0, times[0] - slopes[0] * sizes[0]) if slopes else 0.0
    first = (times[0] - fixed) / sizes[0]
    joined = [(0.0, first), *zip(sizes, slopes, strict=False)]
    return fixed, [piece for n, piece in enumerate(joined) if n == 0 or piece[1] != joined[n - 1][1]]


def fit_line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return (fixed, slope), neither negative, of the line through (x, y) with the least squared error.

    Example:
        fit_line([(0, 1), (2, 2), (4, 3)]) gives (1, 0.5).
    """
    count = len(points)
    mean_x, mean_y = sum(x for x, _ in points) / count, sum(y for _, y in points) / count
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else 0.0
    fixed = mean_y - slope * mean_x
    if slope <= 0 or not spread:
        # All alike, or falling: with nothing to tell them apart, the cost is proportional where it can be.
        return (0.0, max(0.0, mean_y / mean_x)) if mean_x > 0 and not spread else (max(0.0, mean_y), 0.0)
    if fixed < 0:
        squares = sum(x * x for x, _ in points)
        return 0.0, sum(x * y for x, y in points) / squares
    return fixed, slope


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
    gradient_row_bytes: int | None = None
    """The bytes of one row in the adjoint of combine, where they differ from those of the other exchanges."""

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
        if kind is StepKind.COMBINE_BACKWARD and self.gradient_row_bytes is not None:
            return self.gradient_row_bytes
        if kind is StepKind.DISPATCH or self.other_row_bytes is None:
            return self.row_bytes
        return self.other_row_bytes

    def rows_to_others(self, kind: StepKind) -> Tensor:
        """Return (W, W) the rows from rank i to each other rank k in all steps of a kind."""
        rows = self.rows if kind.way is Way.TO_EXPERTS else self.rows.T
        return rows.clone().fill_diagonal_(0)

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
