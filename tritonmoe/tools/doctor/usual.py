"""usual: what every operation of a run would take if nothing were wrong with it.

Operations of one key do the same work, so they are compared: over steps, and over ranks. Two differences are due to
something: that of a rank whose median is not the others', and that of a single operation that is far out of what
its like differ by anyway. The rest is noise: it would be there after any repair, so it stays. Where ranks fall into two
groups, the faster one tells what is usual: two slow ranks of four are no reason to call their time so. Work that grows
with the rows that a rank got, and exchanges that grow with their bytes, are compared at equal rows and bytes; what
the rows themselves cost is imbalance.
"""

import copy
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tritonmoe.tools.doctor.graph import Graph, indices
from tritonmoe.tools.doctor.pattern import FEW_STEPS, WARMED, grows
from tritonmoe.tools.doctor.samples import Samples, by_step, middle, rows_of, slope

__all__ = ["Usual", "by_key", "nothing_for", "usual_of"]

TIMES = 1.3
"""So many times as long as in other steps is too long ..."""
LEAST = 0.05
"""... and pauses are that are longer by such a share of a step; what is less in the mean of all steps is not shared."""
NEARLY_ALL = 0.25
"""So many of the ranks may have less."""
CLEAR = 0.4
"""Most steps of a stretch are above most others by such a part of what their means differ by."""
ENOUGH_STEPS = 6
VARIED = 1.03
UNEVEN = 1.05
"""Stages, or micro-batches, differ by more than that where their work does."""
CERTAIN = 2.0


@dataclass(frozen=True)
class Shared:
    """Seconds of every Run (N,) and Member (M,) that all ranks share."""

    busy_s: Tensor
    idle_s: Tensor
    transfer_s: Tensor
    stage_s: Tensor
    """(N,): of a pipeline, what a Run takes longer, or less, since its stage does."""
    batch_s: Tensor
    """The same, since its micro-batch does."""

    @property
    def work_s(self) -> Tensor:
        """(N,): all of it that is work."""
        return self.busy_s + self.stage_s + self.batch_s

    def __bool__(self) -> bool:
        return any(bool(of.any()) for of in (self.work_s, self.idle_s, self.transfer_s))


def shared_of(graph: Graph, linked_s: Tensor | None = None) -> Shared:
    """Return what operations take longer than usual on all ranks in the same steps, or ever more.

    linked_s: (M,), of which it is known already that slow links cost it.
    """
    tables = graph.tables
    stage_s, batch_s = _uneven(graph) if graph.stages else [nothing_for(tables.busy_s)] * 2
    busy_s, idle_s, transfer_s = (torch.zeros_like(of) for of in (tables.busy_s, tables.idle_s, tables.transfer_s))
    found = Shared(busy_s, idle_s, transfer_s, stage_s, batch_s)
    if len(graph.steps) < ENOUGH_STEPS or len(graph.ranks) < 2:
        return found
    transfer_s = tables.transfer_s if linked_s is None else tables.transfer_s - linked_s
    step_s = max(sum(graph.measured_s) / len(graph.steps), 1e-9)
    of_runs = tables.run_key, tables.run_rank, tables.run_step
    of_members = tables.member_key, tables.member_rank, tables.member_step
    exchange = tables.member_exchange  # all of its ranks may wait for the one that has most bytes
    fullest = by_step(exchange, tables.num_bytes, "amax", int(exchange.max()) + 1 if len(exchange) else 0)[exchange]
    for values, sizes, into, places in (
        (tables.busy_s - stage_s - batch_s, tables.rows, found.busy_s, of_runs),
        (tables.idle_s, None, found.idle_s, of_runs),
        (transfer_s.clamp(min=0), fullest, found.transfer_s, of_members),
    ):
        if len(values):
            into += _OfOne(graph, values, sizes, places, step_s).excess()
    return found


def nothing_for(times: Tensor) -> Tensor:
    """Return as many zeros, in the memory of one: to be read alone."""
    return times.new_zeros(1).expand(len(times))


def _uneven(graph: Graph) -> tuple[Tensor, Tensor]:
    """Return (N,) what each Run takes longer than in the mean stage, and than in the mean micro-batch of its step.

    A replica of a stage may have a slow machine: the fastest one tells what the stage takes.
    """
    tables = graph.tables
    runs = ((tables.run_batch >= 0) & (tables.busy_s > 0)).nonzero()[:, 0]
    if not len(runs):
        return nothing_for(tables.busy_s), nothing_for(tables.busy_s)
    most, of_run = int(tables.run_batch.max()) + 1, tables.busy_s[runs]
    works = (tables.run_rank[runs] * len(graph.steps) + tables.run_step[runs]) * most + tables.run_batch[runs]
    works, work = works.unique(return_inverse=True)
    busy_s = by_step(work, of_run, "sum", len(works))
    step, batch = works // most % len(graph.steps), works % most
    rank = works // most // len(graph.steps)
    stages, replicas = indices(graph.stages), indices(graph.replicas)
    num_ranks, num_stages, num_replicas = len(stages), 1 + max(graph.stages), 1 + max(graph.replicas)
    of_stage, of_replica = torch.ones_like(busy_s), torch.zeros(num_replicas, dtype=torch.float64)
    longer, own_s = torch.full_like(of_replica, torch.inf), torch.ones_like(busy_s)
    for way in (batch % 2).unique():
        own = batch % 2 == way
        by_rank = torch.full((num_ranks,), torch.inf, dtype=torch.float64)
        by_rank[rank[own].unique()] = middle(rows_of(rank[own], busy_s[own]))
        by_stage = by_step(stages, by_rank, "amin", num_stages)
        ratio = by_stage / by_stage[~by_stage.isinf()].mean()
        of_stage[own] = ratio[stages[rank[own]]] if float(ratio[~ratio.isinf()].max()) > UNEVEN else 1.0
        longer = torch.minimum(longer, by_step(replicas, (by_rank / by_stage[stages]).log(), "amin", num_replicas))
        own_s[own] = by_rank[rank[own]]
    if num_stages > 1:
        of_replica = torch.where(longer > math.log(UNEVEN), longer, 0.0)
    groups, place = ((replicas[rank] * len(graph.steps) + step) * most + batch // 2).unique(return_inverse=True)
    apart = (busy_s / own_s).log()
    each = rows_of(place, apart).nanmedian(1).values
    noise = float((apart - each[place]).abs().median()) / (len(apart) / len(groups)) ** 0.5
    each = each if float(each.std(correction=0)) > max(math.log(UNEVEN), CERTAIN * noise) else torch.zeros_like(each)
    times = (each[place] + of_replica[replicas[rank]]).exp()
    mean = by_step(step, times, "mean", len(graph.steps))[step]
    stage_s, batch_s = torch.zeros_like(tables.busy_s), torch.zeros_like(tables.busy_s)
    stage_s[runs] = of_run * (1 - 1 / of_stage)[work]
    batch_s[runs] = of_run * ((1 - mean / times) / of_stage)[work]
    return stage_s, batch_s


class _OfOne:
    """Work, pauses or transfers."""

    def __init__(
        self, graph: Graph, values: Tensor, sizes: Tensor | None, places: tuple[Tensor, Tensor, Tensor], step_s: float
    ) -> None:
        self.values, self.sizes, self.step_s = values, sizes, step_s
        self.key, self.rank, self.step = places
        self.shape = len(graph.ranks), len(graph.steps)

    def excess(self) -> Tensor:
        """Return what each has too much; nothing where that is little, which may be a part of what one rank has."""
        equal = self.values if self.sizes is None else self._at_equal_work(self.sizes)
        course = None if self._course(self.values) is None else self._course(equal)
        if course is None:
            return torch.zeros_like(self.values)
        found = torch.zeros_like(self.values)
        for own in by_key(self.key):
            table = torch.full(self.shape, torch.nan, dtype=torch.float64, device="cpu")
            flat = self.rank[own] * self.shape[1] + self.step[own]
            sums = torch.zeros(table.numel(), dtype=torch.float64, device="cpu").index_add(0, flat, equal[own])
            table.view(-1)[flat] = sums[flat]
            without, with_it = table[:, course <= 0], table[:, course > 0]
            more = (with_it.nanmean(1) - without.nanmedian(1).values) / course[course > 0].mean()
            more = more[~more.isnan()]
            if not len(more):
                continue
            each_s = float(_least(more[:, None])[0]) * course[self.step[own]]
            part = torch.where(sums[flat] > 0, self.values[own] / sums[flat], 0.0)
            found[own] = torch.minimum(each_s.clamp(min=0) * part, self.values[own])
        is_little = float(found.sum()) < LEAST * self.step_s * self.shape[0] * self.shape[1]
        return torch.zeros_like(found) if is_little else found

    def _at_equal_work(self, sizes: Tensor) -> Tensor:
        """Return the times that all would take with the mean rows or bytes of their key."""
        found = self.values.clone()
        for own in by_key(self.key):
            size = sizes[own]
            if float(size.min()) > 0 and float(size.max()) > VARIED * float(size.min()):
                unit_s = slope(self.rank[own], self.step[own], size, self.values[own])
                found[own] -= unit_s * (size - size.mean())
        return found.clamp(min=0)

    def _course(self, values: Tensor) -> Tensor | None:
        """Return (S,) how much of what all ranks share each step has, 1 at most; None where they share nothing."""
        num_ranks, num_steps = self.shape
        sums = torch.zeros(num_ranks * num_steps, dtype=torch.float64, device="cpu")
        sums = sums.index_add(0, self.rank * num_steps + self.step, values).view(self.shape)
        usual = sums.quantile(0.2, dim=1, keepdim=True)
        is_pause = self.sizes is None
        if is_pause:
            more = _least((sums - usual) / self.step_s)
        else:
            counts = usual[:, 0] > 0
            if not bool(counts.any()):
                return None
            more = _least(sums[counts] / usual[counts] - 1)
        return _stretch(more.clamp(min=0), LEAST if is_pause else TIMES - 1)


def _least(values: Tensor) -> Tensor:
    """Return (S,) what nearly all ranks (W, S) have at least."""
    ordered = values.sort(0).values
    return ordered[int(NEARLY_ALL * (len(ordered) - 1))]


def _stretch(more: Tensor, least: float) -> Tensor | None:
    """Return the course (S,) of what is above the usual by so much at least, and clearly: a stretch, or growing."""
    count = len(more)
    sums = torch.cat([torch.zeros(1, dtype=torch.float64), more.cumsum(0)])
    first, last = torch.triu_indices(count + 1, count + 1, 1)
    inside = last - first
    outside = count - inside
    is_warm_up = (first == 0) & (inside <= WARMED * count)
    is_asked = ((inside >= FEW_STEPS) | is_warm_up) & (outside >= FEW_STEPS)
    first, last, inside, outside = (of[is_asked] for of in (first, last, inside, outside))
    own = (sums[last] - sums[first]) / inside
    others = (sums[-1] - (sums[last] - sums[first])) / outside
    # The stretch that leaves the least squares has the largest difference, by its numbers of steps.
    explained = (own - others) * (inside * outside).double().sqrt()
    best = int(explained.argmax())
    course = torch.zeros_like(more)
    course[int(first[best]) : int(last[best])] = 1.0
    high, low = more[course > 0], more[course <= 0]
    apart = float(own[best] - others[best])
    is_clear = float(high.quantile(0.2) - low.quantile(0.8)) > CLEAR * apart
    is_level = bool(high[: (len(high) + 1) // 2].mean() * 1.25 >= high[-((len(high) + 1) // 2) :].mean())
    if int(last[best]) == count and not is_level and grows((more - more.min()).tolist(), 2.0):
        third = max(1, count // 3)
        if float(more[-third:].mean() - more[:third].mean()) < least:
            return None
        return _growth(more)
    return course if is_clear and apart >= least else None


def _growth(more: Tensor) -> Tensor:
    """Return the course of what grows: nothing up to a step, and from there on along a line, with the least squares."""
    steps = torch.arange(len(more), dtype=torch.float64, device="cpu")
    courses = [((steps - since) / (len(more) - 1 - since)).clamp(min=0) for since in range(len(more) // 2)]

    def error(course: Tensor) -> float:
        centred, values = course - course.mean(), more - more.mean()
        return float((values - centred * (centred @ values) / (centred @ centred)).square().sum())

    return min(courses, key=error)


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
    of_keys = by_key(tables.member_key)
    latency_s = max(0.0, min((float(found.transfer_s[own].quantile(0.5)) for own in of_keys), default=0.0))
    scattered = torch.zeros_like(found.transfer_s)
    # Two ranks share all links: who of them gets its rows first is no fault of a link, which is compared by the second.
    can_last = linked_s is not None or len(graph.ranks) > 2
    for own in of_keys:
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


def by_key(keys: Tensor) -> list[Tensor]:
    """Return the places of each key's operations, those of the first one first."""
    order = keys.argsort(stable=True)
    counts = keys.bincount() if len(keys) else keys
    return [own for own in order.split(counts.tolist()) if len(own)]


def _usual_of_runs(graph: Graph, found: Usual) -> None:
    tables, num_steps = graph.tables, len(graph.steps)
    scattered_busy, scattered_idle = torch.zeros_like(tables.busy_s), torch.zeros_like(tables.idle_s)
    for own in by_key(tables.run_key):
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
