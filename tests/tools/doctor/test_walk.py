"""Walker: what ranks do together gives what going through all programs item after item gives."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.support.synthetic_runs import Run, write_run
from tritonmoe.tools.doctor.graph import Graph, Kind
from tritonmoe.tools.doctor.reading import read_traces
from tritonmoe.tools.doctor.recorded_graph import graph_of
from tritonmoe.tools.doctor.walk import Walker
from tritonmoe.tools.recording.recording_reader import read_recording

RUN = Run(num_layers=2, is_chained=True, noise=0.1, late_rank=(1, 0.01))
PIPELINE = Path(__file__).parent / "data" / "straggler_ar_two_steps.json.gz"


def graph(folder: Path, run: Run | None) -> Graph:
    if run is None:
        return read_traces(PIPELINE).graph
    return graph_of(read_recording(write_run(folder, [run] * 2))).graph


def item_by_item(of: Graph, run_s: torch.Tensor, transfer_s: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return when ranks ended steps (S, W), and of each exchange of a rank its start, its end and its wait (M,)."""
    tables, seconds, transfers = of.tables, run_s.tolist(), transfer_s.tolist()
    lane, exchange, delay = (values.tolist() for values in (tables.member_lane, tables.member_exchange, tables.delay_s))
    programs = [list(zip(kinds.tolist(), places.tolist(), strict=True)) for kinds, places in tables.programs]
    step_ends = torch.zeros(len(of.steps), len(of.ranks), dtype=torch.float64)
    members = {one: (tables.member_exchange == one).nonzero()[:, 0].tolist() for one in set(exchange)}
    now, spent_s, at, last = list(of.begin_s), [0.0] * len(programs), [0] * len(programs), dict[int, int]()
    before, posted, started, ended, waits = {}, {}, {}, {}, {}
    has_changed = True
    while has_changed:
        has_changed = False
        for rank, program in enumerate(programs):
            while at[rank] < len(program):
                kind, index = program[at[rank]]
                if kind == Kind.RUN:
                    spent_s[rank] += seconds[index]
                    at[rank] += 1
                    continue
                if kind == Kind.WAIT and index not in ended:
                    break
                now[rank] += spent_s[rank]
                spent_s[rank] = 0.0
                if kind == Kind.POST:
                    posted[index], before[index] = now[rank], last.get(lane[index])
                    last[lane[index]] = index
                elif kind == Kind.STEP:
                    step_ends[index, rank] = now[rank]
                else:
                    waits[index] = now[rank]
                    now[rank] = max(now[rank], ended[index])
                at[rank] += 1
                has_changed = True
        for member in posted.keys() - started.keys():
            if before[member] is None or before[member] in ended:
                behind = ended.get(before[member], -math.inf) if of.is_queued_at_start else -math.inf
                started[member] = max(posted[member], behind) + of.is_queued_at_start * delay[member]
        for every in list(members.values()):
            if not all(one in started for one in every):
                continue
            has_changed = True
            del members[exchange[every[0]]]
            for member in every:
                needs = tables.needs.get(member)
                since = max(started[one] for one in needs or every)
                if needs is None and not of.is_queued_at_start:
                    since = max(since, ended.get(before[member], -math.inf))
                ended[member] = since + transfers[member]
    assert at == list(map(len, programs))
    numbers = [[values.get(member, math.nan) for member in range(len(lane))] for values in (started, ended, waits)]
    return step_ends, *torch.tensor(numbers, dtype=torch.float64)


@pytest.mark.parametrize("is_queued", [False, True])
@pytest.mark.parametrize(
    "run", [RUN, replace(RUN, node_size=2, has_two_levels=True), None], ids=["one level", "two levels", "pipeline"]
)
@pytest.mark.thorough
def test_walks_agree(tmp_path: Path, run: Run | None, is_queued: bool) -> None:
    of = graph(tmp_path, run)
    of.is_queued_at_start = is_queued
    tables, draw = of.tables, torch.Generator().manual_seed(1)
    tables.delay_s = torch.rand(len(tables.delay_s), dtype=torch.float64, generator=draw) * 1e-3
    of_last = (tables.member_exchange == tables.member_exchange.max()).nonzero()[:, 0].tolist()
    tables.needs = {of_last[0]: (of_last[0],)}  # one that doesn't wait for the others
    times = tables.run_s * torch.rand(len(tables.run_s), generator=draw), 2 * tables.transfer_s
    walker = Walker(of)
    found = walker.moments(*times)
    for name, expected in zip(
        ("step_ends_s", "started_s", "ended_s", "waits_since_s"), item_by_item(of, *times), strict=True
    ):
        assert torch.equal(getattr(found, name).nan_to_num(nan=-1.0), expected.nan_to_num(nan=-1.0)), name
    several = walker.all_step_times(torch.stack([tables.run_s, times[0]]), torch.stack([tables.transfer_s, times[1]]))
    assert several == [walker.step_times(tables.run_s, tables.transfer_s), found.step_s]


def test_ranks_that_wait_for_each_other_in_a_circle_are_refused(tmp_path: Path) -> None:
    of = graph(tmp_path, RUN)
    kinds, places = of.tables.programs[0]
    post, wait = ((kinds == int(kind)).nonzero()[0, 0] for kind in (Kind.POST, Kind.WAIT))
    order = torch.arange(len(kinds))
    order[post], order[wait] = wait, post  # it waits before it posts
    of.tables.programs[0] = kinds[order], places[order]
    with pytest.raises(ValueError, match="in a circle"):
        Walker(of)
