"""Messages: what ranks sent each other in recorded passes, and when it had arrived; of each level, if there are two."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from tritonmoe.overlap.steps import Step, StepKind
from tritonmoe.tools.doctor.graph import floats
from tritonmoe.tools.recording.call_recording import RecordedCall
from tritonmoe.tools.recording.pass_steps import PassSteps, arrivals_of, places_of, times_of

__all__ = ["KEPT_PASSES", "Messages", "Reach", "find_messages", "members", "messages_of", "reaches"]

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
        if self is Reach.ALL or node_size is None:
            return others
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
        columns = []
        for number, of in enumerate(passes):
            shift = APART_S * number - float(of.posted.min()) if len(of.posted) else 0.0
            moments = (moment + shift for moment in (of.posted, of.arrived, of.before))
            columns.append((*moments, of.sent_bytes, of.port_bytes, of.is_first))
        posted, arrived, before, sent, port, is_first = map(torch.cat, zip(*columns, strict=True))
        return cls(posted, arrived, before, sent, port, is_first, any(of.are_told_apart for of in passes))

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


def find_messages(call: RecordedCall, number: int, reach: Reach, node_size: int | None) -> Messages:
    """Return the messages of a pass of a call, in the order in which all ranks posted its exchanges."""
    ranks = [of.passes[number] for of in call.ranks]
    size = len(ranks)
    inside = call.levels if reach is Reach.INSIDE else None
    passes = [one.steps if inside is None else one.steps_inside for one in ranks]
    steps, places = _exchanges_of(passes)
    if not steps:
        nothing = torch.zeros(0, size, size, dtype=torch.float64, device="cpu")
        is_first = torch.zeros(0, dtype=torch.bool, device="cpu")
        return Messages(nothing, nothing, nothing, nothing, nothing, is_first, False)
    is_sent = reach.pairs(size, node_size)
    times = times_of(passes, places)
    if inside is not None:
        works = [inside.inside(call.plan, step.chunk) for step in steps]
        sent = [
            work.rows_to_others(step.kind) * work.bytes_per_row(step.kind.twin)
            for work, step in zip(works, steps, strict=True)
        ]
    else:
        travelling = functools.cache(lambda kind: _travelling(call, kind))
        sent = [_sent_bytes(call, step, times[:, n, 4], travelling) for n, step in enumerate(steps)]
    all_sent = torch.where(is_sent, torch.stack(sent), 0.0)
    peers = torch.tensor([list(members(call, rank, inside is not None)) for rank in range(size)], device="cpu")
    origins = floats([one.origin for one in ranks])
    # Where a peer's moment is not known, all its rows were there at the end of the exchange.
    moments = arrivals_of(passes, places).transpose(0, 1) + origins[:, None]
    arrived = torch.full((len(steps), size, size), torch.nan, dtype=torch.float64, device="cpu")
    arrived = arrived.scatter(2, peers.expand_as(moments), moments).transpose(1, 2)
    arrived = torch.where(all_sent > 0, arrived, torch.nan)
    before = torch.full_like(arrived, -torch.inf)
    for n in range(len(steps) - 1):
        before[n + 1] = torch.where(arrived[n].isnan(), before[n], arrived[n])
    posted = origins[:, None] + (times[:, :, 0] + times[:, :, 3])
    own_posted = posted.T.contiguous()
    tells = [[one.layout.tell_arrivals[n] for n in of] for one, of in zip(passes, places, strict=False)]
    return Messages(
        torch.maximum(own_posted[:, :, None], own_posted[:, None]),
        arrived,
        before,
        all_sent,
        torch.maximum(all_sent.sum(2, keepdim=True), all_sent.sum(1, keepdim=True)),
        torch.arange(len(steps), device="cpu") == 0,
        any(all(of) for of in zip(*tells, strict=True)),
    )


messages_of = functools.lru_cache(maxsize=KEPT_PASSES)(find_messages)
"""find_messages, of which the last passes are kept."""


def _exchanges_of(passes: Sequence[PassSteps]) -> tuple[list[Step], list[list[int]]]:
    """Return the exchanges of rows of a pass, and the places of these steps on every rank."""
    first = passes[0].layout
    steps = [first.steps[n] for n in first.exchanges if first.steps[n].kind is not StepKind.REPLICA_BACKWARD]
    return steps, places_of(passes, steps)


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


def _sent_bytes(call: RecordedCall, step: Step, units: Tensor, travelling: Callable[[StepKind], Tensor]) -> Tensor:
    """Return the bytes (W, W) from rank i to rank k: of all that i sends there its share in this step."""
    work = call.work if call.levels is None else call.levels.outer
    rows = work.rows_to_others(step.kind)
    if step.chunk is not None:
        rows = rows * (units / travelling(step.kind).clamp(min=1))[:, None]
    return rows * work.bytes_per_row(step.kind)


def _travelling(call: RecordedCall, kind: StepKind) -> Tensor:
    """Return (W,) the units of all chunks of a kind of step on each rank."""
    found = torch.zeros(len(call.ranks), dtype=torch.float64, device="cpu")
    for of_pass in call.by_pass:
        passes = [one.steps for one in of_pass]
        steps = [one for one in passes[0].layout.steps if one.kind is kind and one.chunk is not None and one.chunk >= 0]
        if steps:
            found += times_of(passes, places_of(passes, steps))[:, :, 4].sum(1)
    return found
