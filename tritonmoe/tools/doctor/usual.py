"""usual: what every operation of a run would take if nothing were wrong with it.

Operations of one key do the same work, so they are compared: over steps, and over ranks. Two differences are due to
something: that of a rank whose median is not the others', and that of a single operation that is far out of what
its like differ by anyway. The rest is noise: it would be there after any repair, so it stays. Where ranks fall into two
groups, the faster one tells what is usual: two slow ranks of four are no reason to call their time so. Work that grows
with the rows that a rank got, and exchanges that grow with their bytes, are compared at equal rows and bytes; what
the rows themselves cost is imbalance.
"""

import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tritonmoe.tools.doctor.drifts import Shared, shared_of
from tritonmoe.tools.doctor.graph import Graph, indices
from tritonmoe.tools.doctor.samples import Samples, by_step, middle

__all__ = ["Usual", "usual_of"]

UNLIKE_BYTES = 0.5
"""Ranks' bytes differ by so many times their mean where one rank is much fuller than others."""
HOT = 1.5
"""A rank's port is hot where it has so many times the bytes that all would have if they had the same."""
COMMON = 2.5
"""What scatters over all ranks and steps is no fault; a rank has one in a step with so many times as much of it."""
LEAST_BYTE_S = 1e-18


@dataclass
class Usual:
    """Seconds of every Run (N,) and Member (M,), in the order of the graph's."""

    busy_s: Tensor
    """What it takes with nothing wrong, at the rank's own rows; noise as it was."""
    idle_s: Tensor
    transfer_s: Tensor
    """The same, at the rank's own bytes."""
    of_rows_s: Tensor
    """What a Run takes longer, or less, than at the mean of the ranks' rows."""
    of_bytes_s: Tensor
    bytes_due_to: Tensor
    """(M,): whose bytes these are: the rank's own, or those of the one hot port that all wait for."""
    level_busy_s: Tensor
    """What is usual, without noise."""
    level_idle_s: Tensor
    level_transfer_s: Tensor
    shared: Shared
    """What all ranks take longer for in the same steps."""


def usual_of(graph: Graph, linked_s: Tensor | None = None) -> Usual:
    """Find what every stretch of work and exchange of a graph would take with nothing wrong.

    linked_s: (M,), of which it is known already that slow links cost it.
    """
    shared = shared_of(graph, linked_s)
    if shared:  # ranks are compared without it
        tables, graph = graph.tables, copy.copy(graph)
        graph.tables = replace(
            tables,
            busy_s=tables.busy_s - shared.work_s,
            idle_s=tables.idle_s - shared.idle_s,
            transfer_s=tables.transfer_s - shared.transfer_s,
        )
    tables, num_steps = graph.tables, len(graph.steps)
    found = Usual(
        busy_s=tables.busy_s.clone(),
        idle_s=tables.idle_s.clone(),
        transfer_s=tables.transfer_s.clone(),
        of_rows_s=torch.zeros_like(tables.busy_s),
        of_bytes_s=torch.zeros_like(tables.transfer_s),
        bytes_due_to=tables.member_rank.clone(),
        level_busy_s=tables.busy_s.clone(),
        level_idle_s=tables.idle_s.clone(),
        level_transfer_s=tables.transfer_s.clone(),
        shared=shared,
    )
    if linked_s is not None:
        found.transfer_s -= linked_s
    _usual_of_runs(graph, found)
    by_key = _by_key(tables.member_key)
    latency_s = max(0.0, min((float(found.transfer_s[own].quantile(0.5)) for own in by_key), default=0.0))
    scattered = torch.zeros_like(found.transfer_s)
    # Two ranks share all links: who of them gets its rows first is no fault of a link, which is compared by the second.
    can_last = linked_s is not None or len(graph.ranks) > 2
    for own in by_key:
        rank, step, sizes = tables.member_rank[own], tables.member_step[own], tables.num_bytes[own]
        fair = _fair_bytes(tables.bytes_out[own], tables.bytes_in[own], sizes, step, num_steps)
        times = found.transfer_s[own]
        fullest, longest = (by_step(step, values, "amax", num_steps) for values in (sizes, times))
        unit_s, are_hot, counts = None, fullest > HOT * fair, torch.ones_like(rank, dtype=torch.bool)
        has_hot = bool(are_hot.any())
        if has_hot:
            # Who of all gets its rows when is up to the hot port: whatever it takes is due to the bytes there.
            unit_s = max(0.0, float(((longest - latency_s) / fullest)[are_hot].median()))
            of_port = torch.minimum(fullest[step], (times - latency_s).clamp(min=0) / max(unit_s, LEAST_BYTE_S))
            is_fullest = sizes == fullest[step]
            hot_rank = torch.zeros(num_steps, dtype=torch.int64, device="cpu")
            hot_rank[step[is_fullest]] = rank[is_fullest]
            found.bytes_due_to[own] = torch.where(are_hot[step], hot_rank[step], rank)
            sizes = torch.where(are_hot[step], of_port, sizes)
        elif _is_of_the_fullest(step, sizes, times, num_steps):
            sizes = fullest[step]
            bound = ((times - latency_s) / sizes)[sizes > 0]
            unit_s = max(0.0, float(middle(bound[None])[0])) if len(bound) else None
        if not can_last and not has_hot:
            counts, times = times == longest[step], longest[step]
        hosts = _shared_hosts(graph, rank)
        samples: Samples | _OfHosts
        if hosts is not None and can_last and not has_hot:
            samples = _OfHosts(hosts, step, sizes, times, num_steps, fair, unit_s)
        else:
            samples = Samples(rank, step, sizes, times, num_steps, fair, unit_s, can_last)
        found.transfer_s[own] -= torch.where(counts, samples.excess, 0.0)
        scattered[own] = torch.where(counts, samples.scattered, 0.0)
        found.of_bytes_s[own] = samples.of_size
        short_s = torch.minimum(found.level_transfer_s[own], samples.levels)
        found.level_transfer_s[own] = torch.where(counts, samples.levels, short_s)
    found.transfer_s += _common(scattered, tables.member_rank, tables.member_step, graph)
    return found


def _shared_hosts(graph: Graph, rank: Tensor) -> Tensor | None:
    """Return the host of each of these exchanges' ranks, as a number, where several hosts have several of them."""
    if not graph.hosts:
        return None
    names = sorted(set(graph.hosts))
    numbers = indices([names.index(host) for host in graph.hosts])
    counts = numbers[rank.unique()].bincount()
    return numbers[rank] if int((counts > 1).sum()) > 1 else None


class _OfHosts:
    """What Samples has, of an exchange between hosts: they are compared by the last of their ranks.

    Who of a host's ranks gets its rows first is no fault of a link: they may share one.
    """

    def __init__(
        self, host: Tensor, step: Tensor, sizes: Tensor, times: Tensor, num_steps: int, fair: Tensor,
        unit_s: float | None,
    ) -> None:  # fmt: skip
        num_hosts = int(host.max()) + 1
        place, of = (step * num_hosts + host).unique(return_inverse=True)
        longest, mean_size = (
            by_step(of, values, how, len(place)) for values, how in ((times, "amax"), (sizes, "mean"))
        )
        samples = Samples(place % num_hosts, place // num_hosts, mean_size, longest, num_steps, fair, unit_s)
        is_last, excess = times == longest[of], samples.excess[of]
        above = (times - (longest[of] - excess)).clamp(min=0)
        self.excess = torch.where(is_last, excess, torch.where(excess > 0, above, 0.0))
        self.scattered = torch.minimum(samples.scattered[of], self.excess.clamp(min=0))
        self.of_size = samples.of_size[of]
        self.levels = torch.where(is_last, samples.levels[of], torch.minimum(times, samples.levels[of]))


def _by_key(keys: Tensor) -> list[Tensor]:
    """Return the places of each key's operations, those of the first one first."""
    order = keys.argsort(stable=True)
    counts = keys.bincount() if len(keys) else keys
    return [own for own in order.split(counts.tolist()) if len(own)]


def _usual_of_runs(graph: Graph, found: Usual) -> None:
    tables, num_steps = graph.tables, len(graph.steps)
    scattered_busy, scattered_idle = torch.zeros_like(tables.busy_s), torch.zeros_like(tables.idle_s)
    for own in _by_key(tables.run_key):
        _, number, counts = tables.run_stretch[own].unique(return_inverse=True, return_counts=True)
        first = torch.full((len(counts),), len(own), dtype=torch.int64, device="cpu")
        first = own[first.scatter_reduce(0, number, torch.arange(len(own)), "amin")]
        rank, step, sizes = tables.run_rank[first], tables.run_step[first], tables.rows[first]
        for measured, usual, levels, of_rows, scattered in (
            (tables.busy_s, found.busy_s, found.level_busy_s, found.of_rows_s, scattered_busy),
            (tables.idle_s, found.idle_s, found.level_idle_s, None, scattered_idle),
        ):
            if not bool(measured[own].any()):
                continue
            whole = torch.zeros(len(counts), dtype=torch.float64, device="cpu").index_add(0, number, measured[own])
            samples = Samples(rank, step, sizes if of_rows is not None else None, whole, num_steps)
            part = torch.where(whole[number] > 0, measured[own] / whole[number], 1 / counts[number])
            usual[own] -= part * samples.excess[number]
            scattered[own] = part * samples.scattered[number]
            levels[own] = part * samples.levels[number]
            if of_rows is not None:
                of_rows[own] = part * samples.of_size[number]
    found.busy_s += _common(scattered_busy, tables.run_rank, tables.run_step, graph)
    found.idle_s += _common(scattered_idle, tables.run_rank, tables.run_step, graph)


def _common(scattered: Tensor, rank: Tensor, step: Tensor, graph: Graph) -> Tensor:
    """Return what of these differences is no fault, since nearly all ranks have as much of them in nearly all steps."""
    place, num_places = rank * len(graph.steps) + step, len(graph.ranks) * len(graph.steps)
    sums = torch.zeros(num_places, dtype=torch.float64, device="cpu").index_add(0, place, scattered)
    most = COMMON * float(sums.sort().values[(num_places - 1) // 4]) if num_places else 0.0
    return torch.where(sums[place] <= most, scattered, 0.0)


def _is_of_the_fullest(step: Tensor, sizes: Tensor, times: Tensor, num_steps: int) -> bool:
    """Return whether an exchange takes all ranks about as long as the fullest rank needs, though their bytes differ."""
    unlike = []
    for values in (sizes, times):
        most, least, mean = (by_step(step, values, what, num_steps) for what in ("amax", "amin", "mean"))
        apart = torch.where(mean > 0, (most - least) / mean, 0.0)[~mean.isnan()]
        unlike.append(float(middle(apart[None])[0]))
    return unlike[0] > UNLIKE_BYTES and unlike[1] < unlike[0] / 2


def _fair_bytes(bytes_out: Tensor, bytes_in: Tensor, sizes: Tensor, step: Tensor, num_steps: int) -> Tensor:
    """Return the bytes that each rank would have in an exchange of each step if all sent and got the same."""
    out, into = (by_step(step, way, "mean", num_steps) for way in (bytes_out, bytes_in))  # NaN where one is not known
    whole = torch.maximum(out, into)
    return torch.where(whole.isnan(), by_step(step, sizes, "mean", num_steps), whole)
