"""graph_of: a recording of this package's layers as the graph that a verdict is found in.

Every rank's program holds all that it did in all calls, in order: what lies between two calls, sending its counts and
hearing from all, each step, what it waits for. Nothing is left out but the time that all ranks usually spend between
two calls together, of which a recording of layers knows nothing.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tritonmoe.diagnosis.call_recording import Recording
from tritonmoe.doctor.event_times import EventTimes
from tritonmoe.doctor.graph import Graph, Kind
from tritonmoe.doctor.recorded_between import Between, between_of
from tritonmoe.doctor.recorded_steps import COUNTS, Event, Events, PlacedPass, events_of, placed_passes
from tritonmoe.doctor.tables import Key, Tables, floats, indices
from tritonmoe.overlap.steps import StepKind, Unit, Way

__all__ = ["RecordedGraph", "graph_of"]

_MEETING = "meeting"
PLACES = 16
"""So many items of a program, of different sorts, may stand at one event."""


@dataclass
class RecordedGraph:
    """A recording's graph, and what else is known of its parts."""

    graph: Graph
    passes: list[PlacedPass]
    notes: list[str]
    run_begin: Tensor
    """(N,): when each Run began, by the recording's clock."""
    kind_in_pass: Tensor
    """(N,): Runs of one number are the parts of one kind of step in one pass on one rank; -1: it computes no pairs."""
    pause_s: Tensor
    """(N,): for how long all ranks together did something else before a call, where that is not usual."""
    first_member: dict[tuple[int, int], int]
    """By the place of a pass and the number of its exchange: its first member."""
    since: Tensor
    """(M,): from when an exchange counts: all of its ranks have posted it, and the rank's one before it is over."""
    posted: Tensor
    """(M,): when the last of its ranks had posted it."""
    end: Tensor
    """(M,)."""
    step_s: float
    """What a step takes with all that lies between its calls, the mean."""
    node_size: int | None
    """Of two levels."""

    def place_in_exchange(self, event: Event, rank: Tensor) -> Tensor:
        """Return where the ranks stand among the members of the exchange that an event posts."""
        return place_in_exchange(event.name, event.is_inside, rank, len(self.graph.ranks), self.node_size)


def place_in_exchange(name: str, is_inside: bool, rank: Tensor, size: int, node_size: int | None) -> Tensor:
    """Return where ranks stand among the members of an exchange, which follow each other by its groups."""
    if node_size is None or name in (COUNTS, _MEETING) or is_inside:
        return rank
    return (rank % node_size) * (size // node_size) + rank // node_size


class _Columns:
    """Columns of a table that grows at its end."""

    def __init__(self) -> None:
        self.parts: dict[str, list[Tensor]] = defaultdict(list)

    def add(self, **values: Tensor) -> None:
        for name, value in values.items():
            self.parts[name].append(value)

    def joined(self) -> dict[str, Tensor]:
        """Return the columns, each in one piece; nothing is left here."""
        return {name: torch.cat(self.parts.pop(name)) for name in list(self.parts)}


def graph_of(recording: Recording) -> RecordedGraph:
    """Return the graph of a recording.

    Raises:
        ValueError: there is no call that all ranks have recorded, or only one rank.
    """
    if recording.size < 2:
        raise ValueError(
            f"{recording.path} is a recording of one rank, which makes no exchanges: record two ranks or more"
        )
    if not recording.calls:
        raise ValueError(f"{recording.path}: there is no call that all ranks have recorded")
    passes, notes = placed_passes(recording)
    return _Builder(recording, passes, notes).build()


class _Where(NamedTuple):
    """Passes on ranks that consist of the same events, Q of them."""

    places: list[int]
    """The places of these passes."""
    place: Tensor
    """(Q,): which of those."""
    rank: Tensor


class _Builder:
    """Puts the graph together: a row for each event of each rank, then what they are in its program."""

    def __init__(self, recording: Recording, passes: list[PlacedPass], notes: list[str]) -> None:
        self.recording, self.passes, self.notes = recording, passes, notes
        self.size, self.node_size = recording.size, recording.node_size if recording.has_two_levels else None
        self.keys: dict[Key, int] = {}
        self.orders: dict[int, tuple[Tensor, Tensor, int]] = {}
        """By the level of an exchange's lane."""
        self.num_exchanges, self.num_members, self.num_rows = 0, 0, 0
        self.first_member: dict[tuple[int, int], int] = {}
        self.bytes: dict[tuple[int, StepKind], tuple[Tensor, Tensor]] = {}
        self.members, self.rows, self.waits, self.ends = _Columns(), _Columns(), _Columns(), _Columns()

    def build(self) -> RecordedGraph:
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
                self.first_member[place, number] = self._add_exchange(
                    place, posting.name, posting.chunk, posting.is_inside
                )
        for events, where in by_events.items():
            self._add_events(events, where)
        return self._joined()

    def _key(self, of: PlacedPass, name: str, chunk: int | None = None) -> int:
        return self.keys.setdefault((of.phase, of.layer, name, chunk, of.work), len(self.keys))

    def _place_in_exchange(self, name: str, is_inside: bool, rank: Tensor) -> Tensor:
        return place_in_exchange(name, is_inside, rank, self.size, self.node_size)

    def _add_exchange(self, place: int, name: str, chunk: int | None = None, is_inside: bool = False) -> int:
        """Note the members of an exchange of a pass, one group of ranks behind the other; give the first one."""
        of = self.passes[place]
        level = {COUNTS: 2, _MEETING: 3}.get(name, int(is_inside))
        if level not in self.orders:
            self.orders[level] = self._order_of(name, is_inside)
        rank, groups, count = self.orders[level]
        same = torch.ones_like(rank)
        self.members.add(
            rank=rank, exchange=self.num_exchanges + groups, step=of.step * same,
            key=self._key(of, name, chunk) * same, lane=(4 * rank + level) * 4 + of.call.half,
        )  # fmt: skip
        self.num_members += self.size
        self.num_exchanges += count
        return self.num_members - self.size

    def _order_of(self, name: str, is_inside: bool) -> tuple[Tensor, Tensor, int]:
        """Return the ranks in the order of an exchange's members, the group of each, and how many groups there are."""
        rank = torch.arange(self.size)
        groups, count = torch.zeros_like(rank), 1
        if self.node_size is not None and is_inside:
            groups, count = rank // self.node_size, self.size // self.node_size
        elif self.node_size is not None and name not in (COUNTS, _MEETING):
            groups, count = rank % self.node_size, self.node_size  # those at one place of every node
        order = self._place_in_exchange(name, is_inside, rank).argsort()
        return rank[order], groups[order], count

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
            keys = indices([self._key(self.passes[one], name, event.chunk) for one in own.places])
            self.rows.add(
                rank=rank, place=place, number=number * same,
                posts=-same if event.posts < 0 else members[event.posts],
                units=times.units[number] * filled if is_of_pairs else times.units[number],
                start=times.start[number], body=times.body[number], waited=times.waited[number],
                arrived=torch.stack(arrived).amax(0) if arrived else torch.full_like(filled, -torch.inf),
                key=keys[of_which],
                is_step=int(event.kind is not None) * same,
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
            rows = work.rows if kind.way is Way.TO_EXPERTS else work.rows.T
            rows = rows.clone().fill_diagonal_(0) * work.bytes_per_row(kind)
            self.bytes[call.sequence, kind] = rows.sum(1), rows.sum(0)
        return self.bytes[call.sequence, kind]

    def _members_of(self, own: _Where, exchange: int, event: Event) -> Tensor:
        first = indices([self.first_member[one, exchange] for one in own.places])[own.place]
        return first + self._place_in_exchange(event.name, event.is_inside, own.rank)

    def _filled(self, own: _Where) -> Tensor:
        """Return (Q,) the share of its pairs that a rank computes: with a capacity the rest is room."""
        calls = [self.passes[place].call for place in own.places]
        whole = torch.ones(self.size, dtype=torch.float64, device="cpu")
        shares = torch.stack([whole if call.plan.capacity is None else call.filled for call in calls])
        return shares[own.place, own.rank]

    def _joined(self) -> RecordedGraph:
        rows = self.rows.joined()
        has_halves = any(of.call.half for of in self.passes)
        order = torch.arange(self.num_rows)
        for column in ("number", "start" if has_halves else "place", "rank"):
            order = order[rows[column][order].argsort(stable=True)]
        for name, values in rows.items():
            rows[name] = values[order]
        between = between_of(rows, self.passes, self.size, has_halves)
        meeting = {place: self._add_exchange(place, _MEETING) for place in between.meeting_places}
        members, ends, waits = self.members.joined(), self.ends.joined(), self.waits.joined()
        for name in ("end", "posted", "out", "into"):
            members[name] = torch.full((self.num_members,), torch.nan, dtype=torch.float64, device="cpu")
            members[name][ends["member"]] = ends[name]
        row_at = torch.empty_like(order)
        row_at[order] = torch.arange(self.num_rows)
        waits["row"] = row_at[waits["row"]]
        return self._assembled(rows, members, waits, between, meeting)

    def _assembled(
        self,
        rows: dict[str, Tensor],
        members: dict[str, Tensor],
        waits: dict[str, Tensor],
        between: Between,
        meeting: dict[int, int],
    ) -> RecordedGraph:
        end, posted = members["end"], members["posted"]
        steps = indices([of.step for of in self.passes])
        num_steps = int(steps.max()) + 1
        # Runs: of every event, and what lies before those that begin a pass.
        first = between.is_first.nonzero()[:, 0]
        paused = first[between.pause_s[first] > 0]
        every = torch.arange(self.num_rows)
        run_row = torch.cat([every, first, paused])
        is_step = rows["is_step"] > 0
        overhead_s = _overhead_s(rows, between)
        nothing, no_pause = torch.zeros(len(first), dtype=torch.float64), torch.zeros(len(paused), dtype=torch.float64)
        names = {name: indices([self._key(of, name) for of in self.passes]) for name in ("before", "between")}
        met = self._meet(rows, members, between, meeting, first)
        step_of_row = steps[rows["place"]]
        programs = self._programs(rows, waits, step_of_row, first, paused, met)
        posted = self._latest(members["exchange"], posted)[members["exchange"]]
        since = torch.maximum(posted, _ends_before(programs, members["lane"], end))
        run_step = steps[rows["place"]][run_row]
        key = torch.cat([rows["key"], names["before"][rows["place"][first]], names["between"][rows["place"][paused]]])
        tables = Tables(
            keys=list(self.keys),
            run_rank=rows["rank"][run_row],
            run_step=run_step,
            run_key=key,
            run_stretch=torch.arange(len(run_row)),
            busy_s=torch.cat([torch.where(is_step, between.body_s, 0.0), nothing, no_pause]),
            idle_s=torch.cat([0 * overhead_s, between.late_s[first], no_pause]),
            overhead_s=torch.cat([overhead_s, nothing, between.pause_s[paused]]),
            rows=torch.cat([rows["units"], nothing, no_pause]),
            member_rank=members["rank"],
            member_step=members["step"],
            member_key=members["key"],
            member_exchange=members["exchange"],
            member_lane=members["lane"],
            delay_s=torch.zeros_like(end),
            transfer_s=end - since,
            bytes_out=members["out"],
            bytes_in=members["into"],
            num_bytes=torch.maximum(members["out"], members["into"]).nan_to_num(nan=0.0),
            programs=programs,
        )
        whole = _step_times(step_of_row, rows["start"] + rows["body"], between.begin)
        usual_s = torch.zeros(num_steps, dtype=torch.float64).index_add(0, steps, between.usual_s)
        return RecordedGraph(
            _graph(self.size, tables, (whole - usual_s).clamp(min=0)), self.passes, self.notes,
            run_begin=between.start[run_row],
            kind_in_pass=torch.cat([rows["kind_in_pass"], torch.full((len(first) + len(paused),), -1)]),
            pause_s=torch.cat([0 * overhead_s, nothing, between.pause_s[paused]]),
            first_member=self.first_member, since=since, posted=posted, end=end,
            step_s=float(whole.mean()), node_size=self.node_size,
        )  # fmt: skip

    def _meet(
        self,
        rows: dict[str, Tensor],
        members: dict[str, Tensor],
        between: Between,
        meeting: dict[int, int],
        first: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Say when ranks came to meetings, and when these ended; give the rows behind them, and their members."""
        meeting_of = torch.full((len(self.passes),), -1, dtype=torch.int64)
        for place, member in meeting.items():
            meeting_of[place] = member
        met = first[meeting_of[rows["place"][first]] >= 0]
        own = meeting_of[rows["place"][met]] + rows["rank"][met]
        of_meeting = self._latest(members["exchange"][own], between.ended[met])
        members["posted"][own], members["end"][own] = between.ended[met], of_meeting[members["exchange"][own]]
        return met, own

    def _latest(self, exchange: Tensor, moments: Tensor) -> Tensor:
        """Return the latest of the moments of each exchange."""
        none = torch.full((self.num_exchanges,), -torch.inf, dtype=torch.float64)
        return none.scatter_reduce(0, exchange, moments, "amax")

    def _programs(
        self,
        rows: dict[str, Tensor],
        waits: dict[str, Tensor],
        step_of_row: Tensor,
        first: Tensor,
        paused: Tensor,
        met: tuple[Tensor, Tensor],
    ) -> list[tuple[Tensor, Tensor]]:
        """Return every rank's program: the kinds of its items, and which Run, member or step each of them is.

        Args:
            first, paused: the rows that begin a pass, and those of them before which there is a pause; their Runs
                follow those of the rows. met: what _meet() gave.
        """
        items, every, num_first = _Columns(), torch.arange(self.num_rows), len(first)

        def add(row: Tensor, sub: int, kind: Kind, index: Tensor) -> None:
            items.add(at=row * PLACES + sub, rank=rows["rank"][row], kind=torch.full_like(row, int(kind)), index=index)

        add(met[0], 0, Kind.POST, met[1])
        add(met[0], 1, Kind.WAIT, met[1])
        add(paused, 2, Kind.RUN, self.num_rows + num_first + torch.arange(len(paused)))
        add(first, 3, Kind.RUN, self.num_rows + torch.arange(num_first))
        add(waits["row"], 4, Kind.WAIT, waits["member"])
        add(every, 5, Kind.RUN, every)
        posting = every[rows["posts"] >= 0]
        add(posting, 6, Kind.POST, rows["posts"][posting])
        each_step = torch.arange(int(step_of_row.max()) + 1)
        for of_rank in every.split(rows["rank"].bincount(minlength=self.size).tolist()):
            reached = step_of_row[of_rank].cummax(0).values
            last = torch.searchsorted(reached, each_step, right=True) - 1
            add(of_rank[last], 7, Kind.STEP, each_step)
        joined = items.joined()
        order = joined["at"].argsort(stable=True)
        counts = joined["rank"].bincount(minlength=self.size).tolist()
        return list(zip(joined["kind"][order].split(counts), joined["index"][order].split(counts), strict=True))


def _graph(size: int, tables: Tables, measured_s: Tensor) -> Graph:
    graph = Graph(list(range(size)), list(range(len(measured_s))), is_queued_at_start=False)
    graph.begin_s, graph.tables, graph.measured_s = [0.0] * size, tables, measured_s.tolist()
    return graph


def _overhead_s(rows: dict[str, Tensor], between: Between) -> Tensor:
    """Return what lies between each event and what it waits for, or the event before, and what is no step itself."""
    waiting_s = torch.where(between.is_first, 0.0, between.gap_s)
    overhead_s = torch.where(between.is_bound, rows["start"] - rows["arrived"], waiting_s)
    return overhead_s + torch.where(rows["is_step"] > 0, 0.0, between.body_s)


def _step_times(step: Tensor, ends: Tensor, begin: float) -> Tensor:
    """Return how long each step takes, by the ends of its events, from when the one before had ended."""
    of_steps = torch.full((int(step.max()) + 1,), -torch.inf, dtype=torch.float64)
    of_steps = of_steps.scatter_reduce(0, step, ends, "amax").cummax(0).values
    return of_steps.diff(prepend=floats([begin]))


def _ends_before(programs: Sequence[tuple[Tensor, Tensor]], lane: Tensor, end: Tensor) -> Tensor:
    """Return when the exchange before each one in its lane had ended, in the order in which they are posted."""
    before = torch.full_like(end, -torch.inf)
    for kinds, places in programs:
        posted = places[kinds == int(Kind.POST)]
        order = posted[lane[posted].argsort(stable=True)]
        follows = lane[order][1:] == lane[order][:-1]
        before[order[1:][follows]] = end[order[:-1][follows]]
    return before
