"""RecordedRows: all that ranks did in all calls of a recording, as rows of tables: events, exchanges and waits."""

import functools
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tritonmoe.overlap.steps import StepKind, Unit
from tritonmoe.tools.doctor.graph import Key, floats, indices
from tritonmoe.tools.doctor.recorded_steps import COUNTS, Event, Events, PlacedPass, events_of
from tritonmoe.tools.recording.call_recording import RecordedPass, Recording
from tritonmoe.tools.recording.pass_steps import PassSteps, times_of

__all__ = ["MEETING", "PLACES", "Columns", "RecordedRows", "place_in_exchange"]

MEETING = "meeting"
"""The exchange of a pass before which all ranks have waited for each other."""
PLACES = 16
"""So many items of a program, of different sorts, may stand at one event."""


class EventTimes:
    """When the events of passes that consist of the same ones began, by the recording's clock; all of them (Q,)."""

    def __init__(self, passes: Sequence[RecordedPass], events: Events) -> None:
        origin, total_s = (floats([getattr(one, name) for one in passes]) for name in ("origin", "total_s"))
        entered, posted, left = (
            floats([one.origin if one.marks is None else one.marks[n] for one in passes]) for n in range(3)
        )

        def numbers(of: Sequence[PassSteps]) -> Tensor:
            return times_of(of, [range(len(of[0]))])

        steps = {False: numbers([one.steps for one in passes]), True: numbers([one.steps_inside for one in passes])}
        nothing = torch.zeros_like(origin)
        self.start: list[Tensor] = []
        self.body: list[Tensor] = []
        self.units: list[Tensor] = []
        self.loads: list[Tensor] = []
        self.ended: list[Tensor] = []
        """Of every exchange, in the order in which they are posted."""
        self.waited: list[Tensor] = []
        waits: list[Tensor] = []
        """For how long each exchange is waited for."""
        for event in events.events:
            load_s = nothing
            if event.kind is not None:
                start_s, end_s, wait_s, post_s, units, load_s = steps[event.is_inside][:, event.place].unbind(1)
                start, body = origin + start_s, post_s if event.posts >= 0 else (end_s - start_s).clamp(min=0)
                units = 0 * units if event.is_inside and event.kind.is_inside_node else units
            elif event.name == COUNTS:
                start, body, units, wait_s = entered, (posted - entered).clamp(min=0), nothing, left - posted
            elif event.name == "plan":
                start, body, units = left, (origin - left).clamp(min=0), nothing
            else:
                start, body, units = origin + total_s, nothing, nothing
            self.start.append(start)
            self.body.append(body)
            self.units.append(units)
            self.loads.append(load_s)
            if event.posts >= 0:
                self.ended.append(left if event.kind is None else origin + end_s)
                waits.append(wait_s)
            self.waited.append(sum((waits[exchange] for exchange in event.waits), nothing))


def place_in_exchange(name: str, is_inside: bool, rank: Tensor, size: int, node_size: int | None) -> Tensor:
    """Return where ranks stand among the members of an exchange, which follow each other by its groups."""
    if node_size is None or name in (COUNTS, MEETING) or is_inside:
        return rank
    return (rank % node_size) * (size // node_size) + rank // node_size


@functools.cache
def _order_of(level: int, size: int, node_size: int | None) -> tuple[Tensor, Tensor, int]:
    """Return the ranks in the order of an exchange's members, the group of each, and how many groups there are.

    level: 0 of an exchange between nodes, 1 inside of them; 2 and more of all ranks.
    """
    rank = torch.arange(size)
    if node_size is None or level > 1:
        return rank, torch.zeros_like(rank), 1
    if level == 1:
        return rank, rank // node_size, size // node_size
    order = place_in_exchange("", False, rank, size, node_size).argsort()  # those at one place of every node
    return order, order % node_size, node_size


class Columns:
    """Columns of a table that grows at its end."""

    def __init__(self) -> None:
        self.parts: dict[str, list[Tensor]] = defaultdict(list)

    def add(self, **values: Tensor) -> None:
        for name, value in values.items():
            self.parts[name].append(value)

    def joined(self) -> dict[str, Tensor]:
        """Return the columns, each in one piece; nothing is left here."""
        return {name: torch.cat(self.parts.pop(name)) for name in list(self.parts)}


class _Where(NamedTuple):
    """Passes on ranks that consist of the same events, Q of them."""

    places: list[int]
    """The places of these passes."""
    place: Tensor
    """(Q,): which of those."""
    rank: Tensor


class RecordedRows:
    """A row for each event of each rank, and for each exchange of each."""

    def __init__(self, recording: Recording, passes: list[PlacedPass]) -> None:
        self.passes = passes
        has_groups = recording.has_two_levels and not recording.levels_meet
        self.size, self.node_size = recording.size, recording.node_size if has_groups else None
        self.keys: dict[Key, int] = {}
        self.num_exchanges, self.num_members, self.num_rows = 0, 0, 0
        self.first_member: dict[tuple[int, int], int] = {}
        self.bytes: dict[tuple[int, StepKind], tuple[Tensor, Tensor]] = {}
        self.members, self.rows, self.waits, self.ends = Columns(), Columns(), Columns(), Columns()
        by_events: dict[Events, list[tuple[int, int]]] = defaultdict(list)
        for place, of in enumerate(self.passes):
            by_shape: dict[tuple, list[int]] = defaultdict(list)
            for rank, one in enumerate(of.of_ranks):
                by_shape[one.steps.layout, one.steps_inside.layout, one.marks is None].append(rank)
            found = [events_of(of.call.plan, of.of_ranks[ranks[0]]) for ranks in by_shape.values()]
            for events, ranks in zip(found, by_shape.values(), strict=True):
                by_events[events] += [(place, rank) for rank in ranks]
            for number, event in enumerate(found[0].exchanges):
                posting = found[0].events[event]
                self.first_member[place, number] = self.add_exchange(
                    place, posting.name, posting.chunk, posting.is_inside
                )
        for events, where in by_events.items():
            self._add_events(events, where)

    def key(self, of: PlacedPass, name: str, chunk: int | None = None) -> int:
        return self.keys.setdefault((of.phase, of.layer, name, chunk, of.work), len(self.keys))

    def add_exchange(self, place: int, name: str, chunk: int | None = None, is_inside: bool = False) -> int:
        """Note the members of an exchange of a pass, one group of ranks behind the other; give the first one."""
        of = self.passes[place]
        level = {COUNTS: 2, MEETING: 3}.get(name, int(is_inside))
        rank, groups, count = _order_of(level, self.size, self.node_size)
        same = torch.ones_like(rank)
        self.members.add(
            rank=rank, exchange=self.num_exchanges + groups, step=of.step * same,
            key=self.key(of, name, chunk) * same, lane=(4 * rank + level) * 4 + of.call.half,
        )  # fmt: skip
        self.num_members += self.size
        self.num_exchanges += count
        return self.num_members - self.size

    def _add_events(self, events: Events, where: Sequence[tuple[int, int]]) -> None:
        """Add all events of passes that consist of the same ones: (place of the pass, rank) of each."""
        times = EventTimes([self.passes[place].of_ranks[rank] for place, rank in where], events)
        place, rank = indices([one for one, _ in where]), indices([one for _, one in where])
        which, of_which = place.unique(return_inverse=True)
        own = _Where(which.tolist(), of_which, rank)
        filled = self._filled(own)
        ended = list(times.ended)
        for number, event in enumerate(events.events):
            for exchange in event.waits:  # what came after its wait was over came with it
                ended[exchange] = torch.minimum(ended[exchange], times.start[number])
        members = [self._members_of(own, n, events.events[number]) for n, number in enumerate(events.exchanges)]
        kinds = {name: number for number, name in enumerate(dict.fromkeys(event.name for event in events.events))}
        same = torch.ones_like(rank)
        for number, event in enumerate(events.events):
            is_of_pairs = event.kind is not None and event.kind.unit is Unit.PAIRS
            name = event.name if event.posts < 0 or event.kind is None else f"posting {event.name}"
            arrived = [ended[exchange] for exchange in event.waits]
            of_kind = (place * PLACES * PLACES + kinds[event.name]) * self.size + rank
            keys = indices([self.key(self.passes[one], name, event.chunk) for one in own.places])
            self.rows.add(
                rank=rank, place=place, number=number * same,
                posts=-same if event.posts < 0 else members[event.posts],
                units=times.units[number] * filled if is_of_pairs else times.units[number],
                start=times.start[number], body=times.body[number], waited=times.waited[number],
                arrived=torch.stack(arrived).amax(0) if arrived else torch.full_like(filled, -torch.inf),
                key=keys[of_which], is_step=int(event.kind is not None) * same, load=times.loads[number],
                kind_in_pass=of_kind if is_of_pairs and event.posts < 0 else -same,
            )  # fmt: skip
            for exchange in event.waits:
                self.waits.add(row=self.num_rows + torch.arange(len(where)), member=members[exchange])
            self.num_rows += len(where)
        for exchange, number in enumerate(events.exchanges):
            out, into = self._bytes_of(events, number, times, own)
            self.ends.add(
                member=members[exchange], end=ended[exchange],
                posted=times.start[number] + times.body[number], out=out, into=into,
            )  # fmt: skip

    def _bytes_of(self, events: Events, number: int, times: EventTimes, own: _Where) -> tuple[Tensor, Tensor]:
        """Return the bytes (Q,) that an exchange takes from each rank to others, and brings it; NaN where not known."""
        event = events.events[number]
        unknown = torch.full_like(times.start[0], torch.nan)
        if event.kind is None or event.kind.way is None or event.is_inside:
            return unknown, unknown
        alike = [n for n, other in enumerate(events.events) if other.kind is event.kind and (other.chunk or 0) >= 0]
        share = times.units[number] / torch.stack([times.units[n] for n in alike]).sum(0).clamp(min=1)
        of_pass = [self._rows_of(one, event.kind) for one in own.places]
        leaving, coming = (torch.stack(of)[own.place, own.rank] for of in zip(*of_pass, strict=True))
        return leaving * share, coming * share

    def _rows_of(self, place: int, kind: StepKind) -> tuple[Tensor, Tensor]:
        """Return the bytes (W,) that leave every rank in the exchanges of a kind, and those that come to it."""
        call = self.passes[place].call
        if (call.sequence, kind) not in self.bytes:
            work = call.work if call.levels is None else call.levels.outer
            sent = work.rows_to_others(kind) * work.bytes_per_row(kind)
            self.bytes[call.sequence, kind] = sent.sum(1), sent.sum(0)
        return self.bytes[call.sequence, kind]

    def _members_of(self, own: _Where, exchange: int, event: Event) -> Tensor:
        first = indices([self.first_member[one, exchange] for one in own.places])[own.place]
        return first + place_in_exchange(event.name, event.is_inside, own.rank, self.size, self.node_size)

    def _filled(self, own: _Where) -> Tensor:
        """Return (Q,) the share of its pairs that a rank computes: with a capacity the rest is room."""
        calls = [self.passes[place].call for place in own.places]
        whole = torch.ones(self.size, dtype=torch.float64, device="cpu")
        shares = torch.stack([whole if call.plan.capacity is None else call.filled for call in calls])
        return shares[own.place, own.rank]
