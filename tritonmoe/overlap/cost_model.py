"""What a layer's steps and exchanges cost: measured on a transport, fitted to reports, and read by the simulator."""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import TypeVar

import torch
from torch import Tensor

from ..config import LOCAL_PARTS, OverlapPlan
from ..transports import Transport
from .schedule import Step

__all__ = ["RETURNING_KINDS", "LayerWork", "LinkCosts", "StepCosts", "fit_line", "probe", "step_units"]

Size = TypeVar("Size", float, Tensor)


@dataclass(frozen=True)
class LinkCosts:
    """The link of every rank, the same in both directions.

    With node_size, ranks of one node (node_size neighbours) reach each other at bytes_per_s and others at
    inter_bytes_per_s, through a second port of each rank's own.
    """

    latency_s: float
    bytes_per_s: float
    is_shared: bool = False
    """Whether exchanges under way share the port (gloo) or take their turn (NCCL, emulated ranks)."""
    alone_share: float = 1.0
    """What one exchange alone reaches of bytes_per_s: a large one of gloo about half."""
    node_size: int | None = None
    inter_bytes_per_s: float | None = None

    def __post_init__(self) -> None:
        if not (self.latency_s >= 0 and self.bytes_per_s > 0 and 0 < self.alone_share <= 1):
            raise ValueError(f"latency_s >= 0, bytes_per_s > 0 and 0 < alone_share <= 1 are needed, got {self}")
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
    """Of one row of the forward's dispatch."""
    top_k: int
    other_row_bytes: int | None = None
    """Of one row of the other exchanges of rows, where a wire format makes them differ."""

    @classmethod
    def of(cls, traffic_rows: Tensor, pairs_per_row: float, row_bytes: int, top_k: int) -> "LayerWork":
        """Give the work of a traffic matrix (W, W) whose rows have so many pairs each."""
        rows = traffic_rows.to(torch.float64)
        return cls(rows, rows * pairs_per_row, row_bytes, top_k)

    @property
    def size(self) -> int:
        return self.rows.shape[0]

    def bytes_per_row(self, kind: str) -> int:
        """Give the bytes of one row in an exchange of this kind."""
        if kind == "metadata":
            return 8 * self.top_k  # int32 ids and fp32 weights
        if kind == "routing_backward":
            return 4 * self.top_k
        return self.row_bytes if kind == "dispatch" or self.other_row_bytes is None else self.other_row_bytes

    def segments(self, plan: OverlapPlan) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Give rows sent, rows returned and pairs (W,) of every segment, each chunk its share."""
        own_rows, own_pairs = self.rows.diagonal(), self.pairs.diagonal()
        home, received, pairs = self._sums
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

    def shares(self, plan: OverlapPlan) -> tuple[list[float], list[float]]:
        """Give the share of the travelling rows that leaves with each chunk, and that returns with it.

        With chunks of experts as if every row had the same number of pairs, whose chunks are independent.
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

    @cached_property
    def _sums(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.rows.sum(1), self.rows.sum(0), self.pairs.sum(0)

    def ports(self, link: LinkCosts) -> tuple[Tensor, Tensor]:
        """Give (W,) seconds for which one byte per travelling row occupies each rank's port: out of it, and into it."""
        own = self.rows.diagonal()
        out, into = self._sums[0] - own, self._sums[1] - own
        if link.node_size is None:
            return out / link.bytes_per_s, into / link.bytes_per_s
        assert link.inter_bytes_per_s is not None
        num_nodes = -(-self.size // link.node_size)
        inside_out, inside_in = torch.zeros_like(out), torch.zeros_like(into)
        for node in range(num_nodes):
            ranks = slice(node * link.node_size, (node + 1) * link.node_size)
            inside_out[ranks] = self.rows[ranks, ranks].sum(1) - own[ranks]
            inside_in[ranks] = self.rows[ranks, ranks].sum(0) - own[ranks]
        return (
            torch.maximum(inside_out / link.bytes_per_s, (out - inside_out) / link.inter_bytes_per_s),
            torch.maximum(inside_in / link.bytes_per_s, (into - inside_in) / link.inter_bytes_per_s),
        )


PAIR_KINDS = ("experts", "experts_backward", "group", "weight_grad")
RETURNING_KINDS = ("combine", "dispatch_backward")


def step_units(
    step: Step, num_local: int, home: Sequence[Size], received: Sequence[Size], pairs: Sequence[Size]
) -> Size:
    """Give what a step's cost is proportional to: its pairs, or its rows. The sizes are by segment.

    num_local: how many of the segments are local ones.
    """
    if step.kind in PAIR_KINDS:
        of = pairs
    elif step.kind in RETURNING_KINDS:
        of = received
    else:
        of = home
    if step.chunk is not None and step.kind != "filler":
        return of[num_local + step.chunk]
    total = of[0]
    for size in of[1:]:
        total = total + size
    return total


@dataclass(frozen=True)
class StepCosts:
    """Seconds of the compute lane, by kind of step: fixed_s of one step, and unit_s of each of its pairs or rows.

    A kind that is missing costs nothing, and so does a step without any. For an exchange it is what posting costs:
    packing its rows.
    """

    fixed_s: Mapping[str, float]
    unit_s: Mapping[str, float]

    def seconds(self, kind: str, units: Size) -> Size:
        return units * self.unit_s.get(kind, 0.0) + (units > 0) * self.fixed_s.get(kind, 0.0)

    @classmethod
    def fit(cls, samples: Iterable[tuple[str, float, float]]) -> "StepCosts":
        """Fit a line to (kind, units, seconds) of measured steps, kind by kind; neither part is negative."""
        by_kind: dict[str, list[tuple[float, float]]] = {}
        for kind, units, seconds in samples:
            by_kind.setdefault(kind, []).append((units, seconds))
        lines = {kind: fit_line(points) for kind, points in by_kind.items()}
        return cls({k: fixed for k, (fixed, _) in lines.items()}, {k: unit for k, (_, unit) in lines.items()})


def fit_line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Give (fixed, slope), neither negative, of the line through (x, y) with the least squared error.

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


PROBE_BYTES = (2**10, 2**14, 2**17, 2**19, 2**21, 2**22)
"""Bytes that a rank sends, all its peers together."""
PROBE_ROUNDS = 3
ROW_BYTES = 256
SHARED_RATIO = 0.75
"""Of two exchanges posted together, the first ends after half of the time where they take turns, at the end where they
share the link."""


def probe(transport: Transport, device: torch.device | str = "cpu") -> LinkCosts:
    """Measure latency and bandwidth of a transport; every rank calls it, and all get the same numbers.

    Least squares over six sizes of the shortest of three rounds, each started together, the slowest rank's time.
    On one rank there is no link: infinitely fast.
    """
    size = transport.size
    if size == 1:
        return LinkCosts(0.0, float("inf"))

    def timed(num_bytes: int, count: int) -> list[float]:
        """Post `count` exchanges at once and give when each was over, the slowest rank's time."""
        splits = [0 if k == transport.rank else -(-num_bytes // (ROW_BYTES * (size - 1))) for k in range(size)]
        rows = [torch.zeros(sum(splits), ROW_BYTES, dtype=torch.uint8, device=device) for _ in range(count)]
        _slowest(transport, [0.0])
        started = time.perf_counter()
        pending = [transport.exchange(part, splits, splits) for part in rows]
        ends = []
        for exchange in pending:
            exchange.wait()
            if torch.device(device).type == "cuda":
                torch.cuda.synchronize(device)
            ends.append((exchange.finished_at() or time.perf_counter()) - started)
        return _slowest(transport, ends)

    def shortest(num_bytes: int, count: int) -> list[float]:
        rounds = [timed(num_bytes, count) for _ in range(PROBE_ROUNDS)]
        return [min(times) for times in zip(*rounds, strict=True)]

    timed(PROBE_BYTES[0], 1)  # warm up
    latency_s, byte_s = fit_line([(num_bytes, shortest(num_bytes, 1)[0]) for num_bytes in PROBE_BYTES])
    first, second = shortest(PROBE_BYTES[-1], 2)
    together_s = (second - latency_s) / (2 * PROBE_BYTES[-1])
    alone_share = 1.0
    if 0 < together_s < byte_s:
        alone_share, byte_s = together_s / byte_s, together_s
    return LinkCosts(latency_s, 1 / byte_s if byte_s else float("inf"), first > SHARED_RATIO * second, alone_share)


def _slowest(transport: Transport, seconds: list[float]) -> list[float]:
    """Give the longest of each number over the ranks; every rank waits for all."""
    own = torch.tensor([int(value * 1e9) for value in seconds], dtype=torch.int64)
    everybody = transport.exchange_counts(own.expand(transport.size, -1))
    return [value / 1e9 for value in everybody.max(0).values.tolist()]
