"""What a recording of this package's layers tells beyond comparison: what links, host, chunks and contention cost."""

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor

from tritonmoe.tools.doctor.causes import CauseKind, Excess
from tritonmoe.tools.doctor.costs import Costs, fit_costs
from tritonmoe.tools.doctor.graph import Graph
from tritonmoe.tools.doctor.messages import Reach
from tritonmoe.tools.doctor.recorded_graph import RecordedGraph
from tritonmoe.tools.doctor.recorded_links import LinkFault, linked_of
from tritonmoe.tools.doctor.samples import slope
from tritonmoe.tools.doctor.usual import Usual
from tritonmoe.tools.recording.call_recording import RecordedCall, Recording

__all__ = ["Known", "known_of"]

MOST_FITTED = 24
"""Costs are fitted to so many calls, spread over the recording."""
UNLIKE = 1.05
"""Parts of a layer tell what a part costs however small it is if the largest has so many times the smallest's pairs."""


@dataclass(frozen=True)
class Known:
    """What is known of a run beside its graph."""

    linked_s: Tensor
    """(M,): what slow links cost each exchange."""
    fault: LinkFault | None
    pause_s: Tensor
    """(N,): what all ranks do at once between calls, beyond what is usual."""
    step_s: float
    """What a step takes with what lies between its calls."""
    built: RecordedGraph
    costs: Costs
    calls: tuple[RecordedCall, ...]
    """Those that the costs are fitted to."""
    share: float
    """Which part of the time of all calls calls like those take."""

    def excess_of(self, usual: Usual) -> dict[CauseKind, Excess]:
        """Return what all ranks' operations take for reasons that no comparison shows."""
        return _structural(self.built, self.costs, usual)


def _fitted_calls(built: RecordedGraph) -> tuple[list[RecordedCall], float]:
    """Return calls to fit costs to, of the layers' sizes and plan that take most time, and the share they take."""
    seconds: dict[tuple, float] = defaultdict(float)
    calls: dict[tuple, dict[int, RecordedCall]] = defaultdict(dict)
    for of in built.passes:
        call = of.call
        key = (*call.sizes.values(), call.row_bytes, call.other_row_bytes, call.has_backward, of.work)
        calls[key][call.sequence] = call
        seconds[key] += max(one.end for one in of.of_ranks) - min(one.entered for one in of.of_ranks)
    most = max(seconds, key=lambda key: seconds[key])
    found = list(calls[most].values())
    every = max(1, len(found) // MOST_FITTED) | 1  # odd: layers follow each other
    return found[::every], seconds[most] / sum(seconds.values())


def known_of(recording: Recording, built: RecordedGraph) -> Known:
    """Find what is known of a recording beside its graph."""
    calls, share = _fitted_calls(built)
    costs = fit_costs(calls, recording)
    slow_s, fault = linked_of(recording, built, costs)
    return Known(slow_s, fault, built.pause_s, built.step_s, built, costs, tuple(calls), share)


def _structural(built: RecordedGraph, costs: Costs, usual: Usual) -> dict[CauseKind, Excess]:
    tables = built.graph.tables
    no_runs, no_members = torch.zeros_like(tables.busy_s), torch.zeros_like(tables.transfer_s)
    beside_s = _beside_s(built) if costs.link.contention else no_runs
    contended_s = torch.where(built.kind_in_pass >= 0, costs.link.contention * beside_s, 0.0)
    transfers_s = (usual.transfer_s - usual.of_bytes_s).clamp(min=0)
    latency_s = torch.minimum(transfers_s, _latency_s(built.graph, costs))
    return {
        "bandwidth": Excess(no_runs, transfers_s - latency_s),
        "latency": Excess(no_runs, latency_s),
        "chunk overhead": Excess(_chunks_s(built, usual.busy_s - contended_s), no_members),
        "host overhead": Excess(tables.overhead_s - built.pause_s, no_members),
        "exchange contention": Excess(contended_s, no_members),
        "pause": Excess(built.pause_s, no_members),
    }


def _latency_s(graph: Graph, costs: Costs) -> Tensor:
    """Return (M,) what an exchange takes however small it is."""
    tables, each = graph.tables, costs.link.each
    is_count = torch.tensor([key[2] == "counts" for key in tables.keys])[tables.member_key]
    counts_s = tables.transfer_s[is_count]  # they are as small as any
    most_s = float(counts_s.median().clamp(min=0)) if len(counts_s) else torch.inf
    found = torch.full_like(tables.transfer_s, min(costs.link.latency_s, most_s))
    if each is not None and each.inside is not None:
        is_near = Reach.INSIDE.pairs(len(graph.ranks), each.inside.node_size)
        is_inside = torch.tensor([str(key[2]).startswith("node_") for key in tables.keys])
        found[is_inside[tables.member_key]] = float(each.latency_s[is_near].median())
    return found


def _chunks_s(built: RecordedGraph, busy_s: Tensor) -> Tensor:
    """Return (N,) how much less the parts of a layer would take if all together had the fixed cost of one."""
    tables = built.graph.tables
    found = torch.zeros_like(busy_s)
    of_kind: dict[tuple, list[int]] = defaultdict(list)
    for number, (phase, layer, name, _, work) in enumerate(tables.keys):
        of_kind[phase, layer, name, work].append(number)
    counts_here = (built.kind_in_pass >= 0) & (tables.rows > 0)
    kinds = torch.zeros(len(tables.keys), dtype=torch.int64)
    for number, keys in enumerate(of_kind.values()):
        kinds[keys] = number
    runs = counts_here.nonzero()[:, 0]
    order = runs[kinds[tables.run_key[runs]].argsort(stable=True)]
    for own in order.split(kinds[tables.run_key[runs]].bincount().tolist()) if len(runs) else ():
        if not len(own):
            continue
        in_pass, counts = built.kind_in_pass[own].unique(return_inverse=True, return_counts=True)[1:]
        units, times = tables.rows[own], busy_s[own]
        if int(counts.max()) < 2 or float(units.max()) < UNLIKE * float(units.min()):
            continue
        unit_s = slope(in_pass, torch.arange(len(own)), units, times)
        fixed_s = max(0.0, float((times - unit_s * units).median()))
        found[own] = torch.minimum(fixed_s * (1 - 1 / counts[in_pass]), times)
    return found


def _beside_s(built: RecordedGraph) -> Tensor:
    """Return (N,) for how long of each Run an exchange was under way."""
    tables = built.graph.tables
    found = torch.zeros_like(tables.busy_s)
    for rank in range(len(built.graph.ranks)):
        members, runs = ((of == rank).nonzero()[:, 0] for of in (tables.member_rank, tables.run_rank))
        under_way = _UnderWay(built.since[members], built.end[members])
        begin = built.run_begin[runs]
        found[runs] = (under_way.until(begin + tables.busy_s[runs]) - under_way.until(begin)).clamp(min=0)
    return found


class _UnderWay:
    """When any of a rank's exchanges was under way."""

    def __init__(self, since: Tensor, end: Tensor) -> None:
        since, order = since.sort()
        end = torch.maximum(end[order], since)
        reached = end.cummax(0).values
        self.since = torch.maximum(since, torch.cat([since[:1], reached[:-1]]))
        self.end = torch.maximum(end, self.since)
        self.sums = torch.cat([torch.zeros(1, dtype=torch.float64, device="cpu"), (self.end - self.since).cumsum(0)])

    def until(self, moment: Tensor) -> Tensor:
        """Return the seconds of it before each moment."""
        at = torch.searchsorted(self.since, moment, right=True)
        last = (at - 1).clamp(min=0)
        return torch.where(at > 0, self.sums[at] - (self.end[last] - moment).clamp(min=0), 0.0)
