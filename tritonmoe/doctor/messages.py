"""Messages: what ranks sent each other in recorded passes, and when it had arrived; of each level, if there are two."""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from tritonmoe.diagnosis.call_recording import RecordedCall
from tritonmoe.overlap.steps import Step, StepKind, Way
from tritonmoe.simulation.cost_model import LayerWork

__all__ = ["KEPT_PASSES", "Messages", "Reach", "members", "messages_of", "reaches"]

KEPT_PASSES = 256
"""What so many passes did is kept: calls are fitted in many selections."""
APART_S = 1e4
"""No pass takes so long."""


class Reach(Enum):
    """Which messages: ranks of one node reach each other in another way than those of other nodes."""

    ALL = "of all ranks, where no nodes are known"
    BETWEEN = "from node to node"
    INSIDE = "inside a node"

    def pairs(self, size: int, node_size: int | None) -> Tensor:
        """Return (W, W): whether these messages go from rank i to rank k."""
        others = ~torch.eye(size, dtype=torch.bool, device="cpu")
        if self is Reach.ALL:
            return others
        assert node_size is not None
        node = torch.arange(size, device="cpu") // node_size
        is_inside = node[:, None] == node
        return others & (is_inside if self is Reach.INSIDE else ~is_inside)


def reaches(node_size: int | None) -> tuple[Reach, ...]:
    """Return the kinds of messages that there are with nodes of so many ranks."""
    return (Reach.ALL,) if node_size is None else (Reach.BETWEEN, Reach.INSIDE)


@dataclass(frozen=True)
class Messages:
    """What ranks sent each other in M exchanges, one pass after the other: (M, W, W), from rank i to rank k."""

    posted: Tensor
    """Seconds of the recording's clock: when both ranks had posted the exchange."""
    arrived: Tensor
    """When the rows of rank i were at rank k; NaN where that is not known, or nothing was sent."""
    before: Tensor
    """When those before them in the same pass were there; -inf where there are none."""
    sent_bytes: Tensor
    port_bytes: Tensor
    """Those that the busier of both ports has, which decide how long a message takes."""
    is_first: Tensor
    """(M,): whether the exchange is the first of its pass, which waits for none."""
    are_told_apart: bool
    """Whether it is known when each rank's rows arrived, and not only when all of them were there."""

    @classmethod
    def joined(cls, passes: "Sequence[Messages]") -> "Messages":
        """Put passes one behind the other, far apart: a selection of calls may have the same one twice."""
        shifts = [APART_S * n - float(of.posted.min()) if len(of.posted) else 0.0 for n, of in enumerate(passes)]
        shifted = list(zip(passes, shifts, strict=True))
        return cls(
            torch.cat([of.posted + shift for of, shift in shifted]),
            torch.cat([of.arrived + shift for of, shift in shifted]),
            torch.cat([of.before + shift for of, shift in shifted]),
            torch.cat([of.sent_bytes for of in passes]),
            torch.cat([of.port_bytes for of in passes]),
            torch.cat([of.is_first for of in passes]),
            any(of.are_told_apart for of in passes),
        )

    @property
    def are_known(self) -> Tensor:
        return ~self.arrived.isnan()

    @property
    def num_peers(self) -> int:
        """To how many ranks the rank sends that sends to most."""
        return int((self.sent_bytes > 0).any(0).sum(1).max())

    def begun(self, latency_s: Tensor, uses_rendezvous: bool) -> Tensor:
        """Return from when each message counts: both ranks had posted it, and the one before it on its link had left.

        Where a receiver's word is needed, also the message before that word, in the other direction, had come.
        """
        begin = torch.maximum(self.posted, self.before - latency_s)
        if uses_rendezvous:  # the word may also have left before those rows
            word = self.before.transpose(1, 2)
            begin = torch.where(self.arrived > word, torch.maximum(begin, word), begin)
        return begin


@functools.lru_cache(maxsize=KEPT_PASSES)
def messages_of(call: RecordedCall, number: int, reach: Reach, node_size: int | None) -> Messages:
    """Return the messages of a pass of a call, in the order in which all ranks posted its exchanges."""
    ranks = [of.passes[number] for of in call.ranks]
    size = len(ranks)
    inside = call.levels if reach is Reach.INSIDE else None
    steps = [
        {
            step.step: step
            for step in (one.steps_inside if inside is not None else one.steps)
            if step.step.lane == "comm"
        }
        for one in ranks
    ]
    is_sent = reach.pairs(size, node_size)
    peers = torch.tensor([list(members(call, rank, inside is not None)) for rank in range(size)], device="cpu")
    origins = torch.tensor([[one.origin] for one in ranks], dtype=torch.float64, device="cpu")
    travelling = functools.cache(lambda kind: _travelling(call, kind))
    posted, arrived, before, sent_bytes, are_told_apart = [], [], [], [], False
    latest = torch.full((size, size), -torch.inf, dtype=torch.float64, device="cpu")
    for step in steps[0]:
        if step.kind is StepKind.REPLICA_BACKWARD:
            continue
        own = [of[step] for of in steps]
        if inside is not None:
            sent = _bytes_inside(inside.inside(call.plan, step.chunk), step.kind)
        else:
            sent = _sent_bytes(call, step, [one.units for one in own], travelling)
        sent_bytes.append(torch.where(is_sent, sent, 0.0))
        # Where a peer's moment is not known, all its rows were there at the end of the exchange.
        moments = [
            [one.end_s] * peers.shape[1]
            if one.arrivals_s is None
            else [math.nan if moment is None else moment for moment in one.arrivals_s]
            for one in own
        ]
        at = torch.full((size, size), torch.nan, dtype=torch.float64, device="cpu")
        at = at.scatter(1, peers, torch.tensor(moments, dtype=torch.float64, device="cpu") + origins).T
        at = torch.where(sent_bytes[-1] > 0, at, torch.nan)
        since = torch.tensor([one.start_s + one.post_s for one in own], dtype=torch.float64, device="cpu")
        posted.append(origins[:, 0] + since)
        arrived.append(at)
        before.append(latest)
        latest = torch.where(at.isnan(), latest, at)
        are_told_apart |= all(one.arrivals_s is not None for one in own)
    if not posted:
        nothing = torch.zeros(0, size, size, dtype=torch.float64, device="cpu")
        is_first = torch.zeros(0, dtype=torch.bool, device="cpu")
        return Messages(nothing, nothing, nothing, nothing, nothing, is_first, False)
    own_posted, all_sent = torch.stack(posted), torch.stack(sent_bytes)
    return Messages(
        torch.maximum(own_posted[:, :, None], own_posted[:, None]),
        torch.stack(arrived),
        torch.stack(before),
        all_sent,
        torch.maximum(all_sent.sum(2, keepdim=True), all_sent.sum(1, keepdim=True)),
        torch.arange(len(posted), device="cpu") == 0,
        are_told_apart,
    )


def members(call: RecordedCall, rank: int, is_inside: bool) -> range:
    """Return the ranks that take part in an exchange of a rank, in the order of its arrivals.

    is_inside: whether the exchange is one inside a node, on two levels.
    """
    size = len(call.ranks)
    if call.levels is None:
        return range(size)
    node_size = call.levels.node_size
    first = rank - rank % node_size
    return range(first, first + node_size) if is_inside else range(rank % node_size, size, node_size)


def _sent_bytes(
    call: RecordedCall, step: Step, units: Sequence[float], travelling: Callable[[StepKind], Tensor]
) -> Tensor:
    """Return the bytes (W, W) from rank i to rank k: of all that i sends there its share in this step."""
    work = call.work if call.levels is None else call.levels.outer
    rows = work.rows if step.kind.way is Way.TO_EXPERTS else work.rows.T
    rows = rows.clone().fill_diagonal_(0)
    if step.chunk is not None:
        of_rank = torch.tensor(units, dtype=torch.float64, device="cpu")
        rows = rows * (of_rank / travelling(step.kind).clamp(min=1))[:, None]
    return rows * work.bytes_per_row(step.kind)


def _bytes_inside(work: LayerWork, kind: StepKind) -> Tensor:
    """Return the bytes (W, W) from rank i to rank k of its node in a step, by the work of its chunk there."""
    rows = work.rows if kind.way is Way.TO_EXPERTS else work.rows.T
    return rows.clone().fill_diagonal_(0) * work.bytes_per_row(kind.twin)


def _travelling(call: RecordedCall, kind: StepKind) -> Tensor:
    """Return (W,) the units of all chunks of a kind of step on each rank."""
    of_ranks = [
        sum(
            other.units
            for one in of.passes
            for other in one.steps
            if other.step.kind is kind and other.step.chunk is not None and other.step.chunk >= 0
        )
        for of in call.ranks
    ]
    return torch.tensor(of_ranks, dtype=torch.float64, device="cpu")
