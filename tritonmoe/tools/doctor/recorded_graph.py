"""graph_of: a recording of this package's layers as the graph that a verdict is found in.

Every rank's program holds all that it did in all calls, in order: what lies between two calls, sending its counts and
hearing from all, each step, what it waits for. Nothing is left out but the time that all ranks usually spend between
two calls together, of which a recording of layers knows nothing.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tritonmoe.tools.doctor.conditions import MET_SHARE
from tritonmoe.tools.doctor.graph import Graph, Kind, Tables, floats, indices
from tritonmoe.tools.doctor.recorded_rows import MEETING, PLACES, Columns, RecordedRows, place_in_exchange
from tritonmoe.tools.doctor.recorded_steps import Event, PlacedPass, placed_passes
from tritonmoe.tools.doctor.samples import LEAST_S, far_out
from tritonmoe.tools.doctor.walk import lane_before
from tritonmoe.tools.recording.call_recording import Recording

__all__ = ["RecordedGraph", "graph_of"]


def _add_between(
    rows: dict[str, Tensor], passes: Sequence[PlacedPass], size: int, has_halves: bool
) -> tuple[Tensor, list[int]]:
    """Find what lies between events (R,), which are in the order of ranks and their times, and add it to their rows.

    began, took: as start and body; where a device is behind the host, what is left when the device has ended the one
        before.
    ended: when the one before it had ended. gap: from there to its start, or where rows are waited for (is_bound), to
        the wait; where they are there already all of it.
    is_first: whether the one before it is of another pass. Of such a one:
        late: by how much the rank comes later than the others, by what it did itself.
        common: between the pieces of two halves what all ranks do there, while exchanges of the other half go on.
        pause: what all ranks did together, beyond what is usual.

    Args:
        has_halves: whether events of two passes take turns.
    Returns:
        What all ranks usually do together before a pass (P,), which is of no interest here. The passes before which
        ranks wait for each other, in an exchange that is not recorded.
    """
    begin = float(rows["start"].min())
    start, body_s = rows["start"].clone(), rows["body"].clone()
    ended, is_first = torch.full_like(start, begin), torch.ones_like(start, dtype=torch.bool)
    for own in torch.arange(len(start)).split(rows["rank"].bincount(minlength=size).tolist()):
        place = rows["place"][own]
        is_first[own[1:]] = place[1:] != place[:-1]
        end = start[own] + body_s[own]
        if not has_halves:
            # Of a device behind the host: what the host does before the device has ended a pass costs nothing.
            reached = end.cummax(0).values
            entry = torch.where(is_first[own], torch.arange(len(own)), 0).cummax(0).values
            device = torch.where(entry > 0, reached[(entry - 1).clamp(min=0)], begin)
            start[own] = torch.maximum(start[own], device)
            body_s[own] = torch.where(
                is_first[own] | (start[own] == device), (end - start[own]).clamp(min=0), body_s[own]
            )
            end = torch.maximum(end, start[own])
        ended[own[1:]] = end[:-1]
    began_wait = torch.maximum(start - rows["waited"], ended)
    rows["began"], rows["took"], rows["ended"], rows["is_first"] = start, body_s, ended, is_first
    rows["is_bound"] = rows["arrived"] > began_wait
    rows["gap"] = (torch.where(rows["is_bound"], began_wait, start) - ended).clamp(min=0)
    return _tell_apart(rows, passes, size, has_halves)


def _tell_apart(
    rows: dict[str, Tensor], passes: Sequence[PlacedPass], size: int, has_halves: bool
) -> tuple[Tensor, list[int]]:
    """Part what lies before passes into what all ranks do, and by how much each comes later."""
    first = rows["is_first"].nonzero()[:, 0]
    is_entry = rows["number"][first] == 0
    place, rank = rows["place"][first], rows["rank"][first]
    ended, entered = (torch.full((len(passes), size), torch.nan, dtype=torch.float64) for _ in range(2))
    ended[place[is_entry], rank[is_entry]] = rows["ended"][first[is_entry]]
    entered[place[is_entry], rank[is_entry]] = rows["began"][first[is_entry]]
    meets = torch.zeros(len(passes), dtype=torch.bool) if has_halves else _meets(ended, entered, passes)
    waited_for = torch.where(meets, ended.amax(1), torch.nan)[:, None]
    own_s = torch.where(meets[:, None], entered - waited_for, (entered - ended).clamp(min=0))
    common_s = own_s.amin(1)
    late = (own_s - common_s[:, None])[place, rank]
    group = place * (int(rows["number"].max()) + 1) + rows["number"][first]
    least = torch.full((int(group.max()) + 1,), torch.inf, dtype=torch.float64)
    least = least.scatter_reduce(0, group, rows["gap"][first], "amin")[group]
    by_work: dict[tuple, list[int]] = defaultdict(list)
    for number, of in enumerate(passes):
        by_work[of.phase, of.layer, of.work, of.call.half].append(number)
    pause_s = torch.zeros(len(passes), dtype=torch.float64)
    for own in by_work.values():
        pause_s[own] = far_out(common_s[own])
    for name, entering, between in (
        ("late", late, rows["gap"][first] - least), ("common", 0.0, least), ("pause", pause_s[place], 0.0),
    ):  # fmt: skip
        rows[name] = torch.zeros_like(rows["start"])
        rows[name][first] = torch.where(is_entry, entering, between)
    return common_s - pause_s, meets.nonzero()[:, 0].tolist()


def _meets(ended: Tensor, entered: Tensor, passes: Sequence[PlacedPass]) -> Tensor:
    """Return before which passes (P,) ranks wait for each other, as in a barrier or a sum of gradients.

    Where they do, a rank whose previous pass ended late enters the next one with the others.
    """
    behind, late = ended - ended.amin(1, keepdim=True), entered - entered.amin(1, keepdim=True)
    most, last = behind.max(1)
    can = (entered.amin(1) >= ended.amax(1)) & (most > LEAST_S)
    has_met = late.gather(1, last[:, None])[:, 0] < MET_SHARE * most
    votes: dict[tuple, float] = defaultdict(float)
    names = [(of.phase, of.layer) for of in passes]
    for name, weight, met, possible in zip(names, most.tolist(), has_met.tolist(), can.tolist(), strict=True):
        votes[name] += weight if met and possible else -weight
    return can & torch.tensor([votes[name] > 0 for name in names])


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
    made = RecordedRows(recording, passes)
    has_halves = any(of.call.half or of.call.part for of in passes)
    rows, waits = _in_order(made, has_halves)
    usual_s, meeting_places = _add_between(rows, passes, made.size, has_halves)
    meeting = torch.full((len(passes),), -1, dtype=torch.int64)
    for place in meeting_places:
        meeting[place] = made.add_exchange(place, MEETING)
    members, ends = made.members.joined(), made.ends.joined()
    for name in ("end", "posted", "out", "into"):
        members[name] = torch.full((made.num_members,), torch.nan, dtype=torch.float64, device="cpu")
        members[name][ends["member"]] = ends[name]
    # Runs: of every event, and what lies before those that begin a pass.
    first = rows["is_first"].nonzero()[:, 0]
    paused = first[rows["pause"][first] > 0]
    run_row = torch.cat([torch.arange(made.num_rows), first, paused])

    def latest(own: Tensor, moments: Tensor) -> Tensor:
        """Return the latest of the moments of each exchange that these members are of."""
        none = torch.full((made.num_exchanges,), -torch.inf, dtype=torch.float64)
        return none.scatter_reduce(0, members["exchange"][own], moments, "amax")[members["exchange"][own]]

    met = first[meeting[rows["place"][first]] >= 0]
    of_meeting = meeting[rows["place"][met]] + rows["rank"][met]
    members["posted"][of_meeting] = rows["ended"][met]
    members["end"][of_meeting] = latest(of_meeting, rows["ended"][met])
    steps = indices([of.step for of in passes])
    step_of_row = steps[rows["place"]]
    programs = _programs(made, rows, waits, step_of_row, first, paused, (met, of_meeting))
    end, posted = members["end"], latest(torch.arange(made.num_members), members["posted"])
    ends_before = torch.cat([end, floats([-torch.inf])])  # where none is before
    since = torch.maximum(posted, ends_before[lane_before(programs, members["lane"])])
    overhead_s, load_s = _overhead_s(rows), torch.minimum(rows["load"], rows["took"])
    nothing, no_pause = (torch.zeros(len(of), dtype=torch.float64) for of in (first, paused))
    before, between = (indices([made.key(of, name) for of in passes]) for name in ("before", "between"))
    tables = Tables(
        keys=list(made.keys),
        run_rank=rows["rank"][run_row],
        run_step=step_of_row[run_row],
        run_key=torch.cat([rows["key"], before[rows["place"][first]], between[rows["place"][paused]]]),
        run_stretch=torch.arange(len(run_row)),
        busy_s=torch.cat([torch.where(rows["is_step"] > 0, rows["took"] - load_s, 0.0), nothing, no_pause]),
        idle_s=torch.cat([0 * overhead_s, rows["late"][first], no_pause]),
        overhead_s=torch.cat([overhead_s + load_s, rows["common"][first], rows["pause"][paused]]),
        load_s=torch.cat([load_s, nothing, no_pause]),
        rows=torch.cat([rows["units"], nothing, no_pause]),
        run_batch=torch.tensor([-1], device="cpu").expand(len(run_row)),
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
    whole = _step_times(step_of_row, rows["start"] + rows["body"], float(rows["start"].min()))
    measured_s = (whole - torch.zeros_like(whole).index_add(0, steps, usual_s)).clamp(min=0)
    graph = Graph(list(range(made.size)), list(range(len(whole))), is_queued_at_start=False)
    graph.begin_s, graph.tables, graph.measured_s = [0.0] * made.size, tables, measured_s.tolist()
    return RecordedGraph(
        graph, passes, notes, run_begin=rows["began"][run_row],
        kind_in_pass=torch.cat([rows["kind_in_pass"], torch.full((len(first) + len(paused),), -1)]),
        pause_s=torch.cat([0 * overhead_s, nothing, rows["pause"][paused]]),
        first_member=made.first_member, since=since, posted=posted, end=end,
        step_s=float(whole.mean()), node_size=made.node_size,
    )  # fmt: skip


def _in_order(made: RecordedRows, has_halves: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the rows of events in the order of ranks and their times, and those of waits, which name theirs."""
    rows, waits, order = made.rows.joined(), made.waits.joined(), torch.arange(made.num_rows)
    for column in ("number", "start" if has_halves else "place", "rank"):
        order = order[rows[column][order].argsort(stable=True)]
    row_at = torch.empty_like(order)
    row_at[order] = torch.arange(made.num_rows)
    waits["row"] = row_at[waits["row"]]
    for name, values in rows.items():  # one after the other: both copies of all of them would be too much
        rows[name] = values[order]
    return rows, waits


def _programs(
    made: RecordedRows,
    rows: Mapping[str, Tensor],
    waits: Mapping[str, Tensor],
    step_of_row: Tensor,
    first: Tensor,
    paused: Tensor,
    met: tuple[Tensor, Tensor],
) -> list[tuple[Tensor, Tensor]]:
    """Return every rank's program: the kinds of its items, and which Run, member or step each of them is.

    Args:
        first, paused: the rows that begin a pass, and those of them before which there is a pause; their Runs follow
            those of the rows. met: the rows behind meetings, and their members there.
    """
    items, every, num_first = Columns(), torch.arange(made.num_rows), len(first)

    def add(row: Tensor, sub: int, kind: Kind, index: Tensor) -> None:
        items.add(at=row * PLACES + sub, rank=rows["rank"][row], kind=torch.full_like(row, int(kind)), index=index)

    add(met[0], 0, Kind.POST, met[1])
    add(met[0], 1, Kind.WAIT, met[1])
    add(paused, 2, Kind.RUN, made.num_rows + num_first + torch.arange(len(paused)))
    add(first, 3, Kind.RUN, made.num_rows + torch.arange(num_first))
    add(waits["row"], 4, Kind.WAIT, waits["member"])
    add(every, 5, Kind.RUN, every)
    posting = every[rows["posts"] >= 0]
    add(posting, 6, Kind.POST, rows["posts"][posting])
    each_step = torch.arange(int(step_of_row.max()) + 1)
    for of_rank in every.split(rows["rank"].bincount(minlength=made.size).tolist()):
        reached = step_of_row[of_rank].cummax(0).values
        last = torch.searchsorted(reached, each_step, right=True) - 1
        add(of_rank[last], 7, Kind.STEP, each_step)
    joined = items.joined()
    order = joined["at"].argsort(stable=True)
    counts = joined["rank"].bincount(minlength=made.size).tolist()
    return list(zip(joined["kind"][order].split(counts), joined["index"][order].split(counts), strict=True))


def _overhead_s(rows: Mapping[str, Tensor]) -> Tensor:
    """Return what lies between each event and what it waits for, or the event before, and what is no step itself."""
    waiting_s = torch.where(rows["is_first"], 0.0, rows["gap"])
    overhead_s = torch.where(rows["is_bound"], rows["start"] - rows["arrived"], waiting_s)
    return overhead_s + torch.where(rows["is_step"] > 0, 0.0, rows["took"])


def _step_times(step: Tensor, ends: Tensor, begin: float) -> Tensor:
    """Return how long each step takes, by the ends of its events, from when the one before had ended."""
    of_steps = torch.full((int(step.max()) + 1,), -torch.inf, dtype=torch.float64)
    of_steps = of_steps.scatter_reduce(0, step, ends, "amax").cummax(0).values
    return of_steps.diff(prepend=floats([begin]))
