"""Recording: what layer calls did on every rank, on one clock; `record` writes it, recording_reader.py reads it.

A folder has a file for every rank, rank-0003.jsonl say: a header line, then one line for each call. Times are of the
rank's time.perf_counter(), those of steps count from the origin of their pass. Groups of a job's ranks, each of which
has its own calls, have a folder each in there.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from tritonmoe.config.overlap import OverlapPlan
from tritonmoe.dispatch.count_exchange import CallMarks
from tritonmoe.overlap.simulation.cost_model import LayerWork, LinkCosts
from tritonmoe.overlap.simulation.two_level_work import TwoLevelWork
from tritonmoe.runtime.files import Json
from tritonmoe.tools.recording.pass_steps import PassSteps

__all__ = [
    "FORMAT",
    "SCHEMA",
    "RankCall",
    "RecordedCall",
    "RecordedPass",
    "Recording",
    "by_layer",
    "file_name",
    "folder_name",
    "node_size_of",
    "plain_plan",
]

FORMAT = "tritonmoe recording"
SCHEMA = 1
CALLS_WITH_COPIES = "calls_with_copies"
"""The key of the number of calls that were left out, in the last line of a file."""


def file_name(rank: int) -> str:
    """Return the name of a rank's file: rank-0003.jsonl."""
    return f"rank-{rank:04d}.jsonl"


def folder_name(job_ranks: Sequence[int]) -> str:
    """Return the name of the folder of some of a job's ranks: ranks-0004-to-0007, or ranks-0001-to-0005-by-4.

    One of ranks that are not evenly spaced ends in a checksum of them.
    """
    first, last = job_ranks[0], job_ranks[-1]
    step = max(1, (last - first) // max(1, len(job_ranks) - 1))
    name = f"ranks-{first:04d}-to-{last:04d}" + (f"-by-{step}" if step > 1 else "")
    is_even = list(job_ranks) == list(range(first, last + 1, step))
    return name if is_even else f"{name}-{zlib.crc32(str(tuple(job_ranks)).encode()):08x}"


def plain_plan(plan: OverlapPlan) -> Json:
    """Return a plan as JSON has it."""
    wire_dtype = None if plan.wire_dtype is None else str(plan.wire_dtype).removeprefix("torch.")
    values = {field.name: getattr(plan, field.name) for field in fields(plan)}
    return {**values, "chunk_sizes": list(plan.chunk_sizes), "wire_dtype": wire_dtype}


@dataclass(frozen=True, slots=True)
class RecordedPass:
    """One pass of a call on one rank, in seconds of the recording's clock."""

    marks: CallMarks | None
    """None where the pass began without hearing from the other ranks."""
    origin: float
    """The start of its first step."""
    total_s: float
    steps: PassSteps
    steps_inside: PassSteps
    """On two levels: what some of the steps did inside the node."""

    @property
    def end(self) -> float:
        return self.origin + self.total_s

    @property
    def entered(self) -> float:
        return self.origin if self.marks is None else self.marks.entered


@dataclass(frozen=True, slots=True)
class RankCall:
    """One call on one rank."""

    rows: Sequence[int]
    """(W,): the tokens of this rank that need an expert of each rank; with a capacity the room, which travels."""
    pairs: Sequence[int]
    """(W,): their routed pairs; with a capacity the room for them."""
    pairs_per_expert: Sequence[int]
    """Of this rank's experts, in the order of its slots."""
    forward: RecordedPass
    backward: RecordedPass | None
    rows_to_nodes: Sequence[int] | None = None
    """On two levels, by node: the tokens of this rank that need any of its ranks."""
    load_balance_loss_weight: float | None = None
    """Of the layer; None where that is not recorded."""

    @property
    def passes(self) -> tuple[RecordedPass, ...]:
        return (self.forward,) if self.backward is None else (self.forward, self.backward)


@dataclass(frozen=True, eq=False)
class RecordedCall:
    """One call on all ranks."""

    sequence: int
    """Its number among the calls on the transport."""
    layer: int
    """The number of its layer there; -1 for the function."""
    is_recompute: bool
    half: int
    """Which half of a batch in two_batches it is of, 1 or 2; 0 for a whole batch."""
    part: int
    """Which part of a call with a memory budget it is, counted from 1; 0 for a whole call."""
    plan: OverlapPlan
    row_bytes: int
    gradient_row_bytes: int
    other_row_bytes: int
    top_k: int
    sizes: Mapping[str, int]
    """num_experts (slots, with a placement), hidden_size, intermediate_size."""
    ranks: tuple[RankCall, ...]

    @cached_property
    def work(self) -> LayerWork:
        """What all ranks sent and computed: with a capacity the room for the rows, and the pairs that are in it."""
        rows, pairs = _matrix([of.rows for of in self.ranks]), _matrix([of.pairs for of in self.ranks])
        of_forward = self.row_bytes, self.top_k, self.other_row_bytes
        return LayerWork(rows, pairs * self.filled, *of_forward, gradient_row_bytes=self.gradient_row_bytes)

    @cached_property
    def filled(self) -> Tensor:
        """(W,): the share of its pairs that each rank computes; with a capacity the rest is padding."""
        room = _matrix([of.pairs for of in self.ranks]).sum(0)
        if self.plan.capacity is None:
            return torch.ones_like(room)
        return _matrix([[sum(of.pairs_per_expert)] for of in self.ranks])[:, 0] / room.clamp(min=1)

    @property
    def rows_to_nodes(self) -> Tensor | None:
        """(W, nodes) on two levels: the tokens of each rank that need any rank of each node."""
        rows = [of.rows_to_nodes for of in self.ranks if of.rows_to_nodes is not None]
        return _matrix(rows) if rows else None

    @property
    def inside_row_bytes(self) -> int:
        """The bytes of a row inside a node, where rows have no wire format."""
        if self.plan.wire_dtype is torch.bfloat16:
            return 4 * self.sizes["hidden_size"]
        return self.other_row_bytes

    @cached_property
    def levels(self) -> TwoLevelWork | None:
        """What all ranks sent and computed on each of two levels; None on one."""
        to_nodes = self.rows_to_nodes
        if to_nodes is None:
            return None
        return TwoLevelWork.of(self.work, to_nodes, FREE, inside_row_bytes=self.inside_row_bytes)

    @cached_property
    def has_backward(self) -> bool:
        return all(of.backward is not None for of in self.ranks)

    @cached_property
    def by_pass(self) -> list[tuple[RecordedPass, ...]]:
        """The passes that every rank ran, all ranks' of each."""
        found = [tuple(of.forward for of in self.ranks)]
        backward = tuple(of.backward for of in self.ranks if of.backward is not None)
        return [*found, backward] if self.has_backward else found


FREE = LinkCosts(0.0, float("inf"))
"""Of work whose links are told by what was recorded."""


def node_size_of(hosts: Sequence[str]) -> int | None:
    """Return how many neighbours share a host, by the hosts of all ranks; None where they are no equal nodes."""
    node_size, size = hosts.count(hosts[0]), len(hosts)
    nodes = [hosts[first : first + node_size] for first in range(0, size, node_size)]
    are_alike = all(len(node) == node_size and len(set(node)) == 1 for node in nodes)
    return node_size if are_alike and 1 < node_size < size and len(set(hosts)) == len(nodes) else None


def _matrix(rows: Sequence[Sequence[int]]) -> Tensor:
    return torch.tensor([list(row) for row in rows], dtype=torch.float64, device="cpu")


def by_layer(calls: Sequence[RecordedCall]) -> dict[int, list[RecordedCall]]:
    """Return the calls of every layer."""
    found: dict[int, list[RecordedCall]] = {}
    for call in calls:
        found.setdefault(call.layer, []).append(call)
    return found


@dataclass(frozen=True)
class Recording:
    """What all ranks recorded, on the clock of rank 0."""

    path: Path
    headers: tuple[Json, ...]
    """Of every rank."""
    calls: tuple[RecordedCall, ...]
    """Those that every rank has recorded, in their order."""
    notes: tuple[str, ...]
    """What is to be known of it: lines left out, clocks that were aligned."""

    @property
    def size(self) -> int:
        """W."""
        return len(self.headers)

    @property
    def transport(self) -> str:
        """Its class; "own transport" where that has a private name, as in recordings of earlier versions."""
        name = str(self.headers[0]["transport"])
        return "own transport" if name.startswith("_") else name

    @property
    def node_size(self) -> int | None:
        """How many neighbours are a node: as a transport of two levels says, else those on one host; None: no nodes."""
        if self.has_two_levels:
            return int(self.headers[0]["node_size"])
        return node_size_of([str(header["host"]) for header in self.headers])

    @property
    def has_two_levels(self) -> bool:
        return self.headers[0].get("node_size") is not None

    @property
    def levels_meet(self) -> bool:
        """Whether an exchange of some ranks ends when all have posted it: emulated ranks make each one together."""
        return self.has_two_levels and self.headers[0].get("world") == "EmulatedTransport"

    @property
    def uses_rendezvous(self) -> bool:
        """As Transport.uses_rendezvous says."""
        return bool(self.headers[0]["uses_rendezvous"])

    @property
    def shares_link(self) -> bool:
        """As Transport.shares_link says."""
        return bool(self.headers[0]["shares_link"])

    @property
    def has_arrivals(self) -> bool:
        """Whether it is known of some exchange when each rank's rows had arrived."""
        passes = (layer_pass for call in self.calls for of in call.ranks for layer_pass in of.passes)
        return any(any(layer_pass.steps.layout.tell_arrivals) for layer_pass in passes)
