"""shared_of: what is long for no rank's own reason: all ranks in some steps, some stages, some micro-batches.

The sums of each rank's work, pauses and transfers are followed from step to step. Where nearly all ranks have more of
them in one stretch of steps than outside of it, or ever more, each kind of operation has so much too much as nearly all
ranks have of it. A comparison of ranks doesn't see that.

Of a pipeline, what all replicas of a stage take longer for than the mean of the stages is due to the stage, and what
all stages take longer for in a micro-batch than in the mean of its step is due to the micro-batch.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tritonmoe.tools.doctor.graph import Graph, Tables, indices
from tritonmoe.tools.doctor.pattern import FEW_STEPS, WARMED, grows
from tritonmoe.tools.doctor.samples import by_step, middle, rows_of, slope

__all__ = ["Shared", "shared_of"]

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
    none = torch.zeros_like(tables.busy_s)
    stage_s, batch_s = _uneven(graph) if graph.stages else (none, none)
    found = Shared(none.clone(), none.clone(), torch.zeros_like(tables.transfer_s), stage_s, batch_s)
    if len(graph.steps) < ENOUGH_STEPS or len(graph.ranks) < 2:
        return found
    transfer_s = tables.transfer_s if linked_s is None else tables.transfer_s - linked_s
    step_s = max(sum(graph.measured_s) / len(graph.steps), 1e-9)
    for values, sizes, into, places in (
        (tables.busy_s - stage_s - batch_s, tables.rows, found.busy_s, _places_of_runs(tables)),
        (tables.idle_s, None, found.idle_s, _places_of_runs(tables)),
        (transfer_s.clamp(min=0), _fullest_bytes(tables), found.transfer_s, _places_of_members(tables)),
    ):
        if len(values):
            into += _OfOne(graph, values, sizes, places, step_s).excess()
    return found


def _uneven(graph: Graph) -> tuple[Tensor, Tensor]:
    """Return (N,) what each Run takes longer than in the mean stage, and than in the mean micro-batch of its step.

    A replica of a stage may have a slow machine: the fastest one tells what the stage takes.
    """
    tables = graph.tables
    work = ((tables.run_batch >= 0) & (tables.busy_s > 0)).nonzero()[:, 0]
    rank, key, busy_s = tables.run_rank[work], tables.run_key[work], tables.busy_s[work]
    stages, replicas = indices(graph.stages), indices(graph.replicas)
    num_ranks, num_stages, num_replicas = len(stages), 1 + max(graph.stages), 1 + max(graph.replicas)
    of_stage, of_replica = torch.ones_like(busy_s), torch.zeros(num_replicas, dtype=torch.float64)
    longer, own_s = torch.full_like(of_replica, torch.inf), torch.ones_like(busy_s)
    for number in key.unique().tolist():
        own = key == number
        by_rank = torch.full((num_ranks,), torch.inf, dtype=torch.float64)
        by_rank[rank[own].unique()] = middle(rows_of(rank[own], busy_s[own]))
        by_stage = by_step(stages, by_rank, "amin", num_stages)
        ratio = by_stage / by_stage[~by_stage.isinf()].mean()
        of_stage[own] = ratio[stages[rank[own]]] if float(ratio[~ratio.isinf()].max()) > UNEVEN else 1.0
        longer = torch.minimum(longer, by_step(replicas, (by_rank / by_stage[stages]).log(), "amin", num_replicas))
        own_s[own] = by_rank[rank[own]]
    if num_stages > 1:
        of_replica = torch.where(longer > math.log(UNEVEN), longer, 0.0)
    group = (replicas[rank] * len(graph.steps) + tables.run_step[work]) * (int(tables.run_batch.max()) + 1)
    groups, place = (group + tables.run_batch[work]).unique(return_inverse=True)
    apart = (busy_s / own_s).log()
    each = rows_of(place, apart).nanmedian(1).values
    noise = float((apart - each[place]).abs().median()) / (len(apart) / len(groups)) ** 0.5
    each = each if float(each.std(correction=0)) > max(math.log(UNEVEN), CERTAIN * noise) else torch.zeros_like(each)
    times = (each[place] + of_replica[replicas[rank]]).exp()
    mean = by_step(tables.run_step[work], times, "mean", len(graph.steps))[tables.run_step[work]]
    stage_s, batch_s = torch.zeros_like(tables.busy_s), torch.zeros_like(tables.busy_s)
    stage_s[work] = busy_s * (1 - 1 / of_stage)
    batch_s[work] = busy_s / of_stage * (1 - mean / times)
    return stage_s, batch_s


def _places_of_runs(tables: Tables) -> tuple[Tensor, Tensor, Tensor]:
    return tables.run_key, tables.run_rank, tables.run_step


def _places_of_members(tables: Tables) -> tuple[Tensor, Tensor, Tensor]:
    return tables.member_key, tables.member_rank, tables.member_step


def _fullest_bytes(tables: Tables) -> Tensor:
    """Return (M,) the most bytes that a rank has in the exchange, for which all others may wait."""
    exchange = tables.member_exchange
    return by_step(exchange, tables.num_bytes, "amax", int(exchange.max()) + 1 if len(exchange) else 0)[exchange]


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
        for own in self._by_key():
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

    def _by_key(self) -> Iterator[Tensor]:
        order = self.key.argsort(stable=True)
        yield from (own for own in order.split(self.key.bincount().tolist()) if len(own))

    def _at_equal_work(self, sizes: Tensor) -> Tensor:
        """Return the times that all would take with the mean rows or bytes of their key."""
        found = self.values.clone()
        for own in self._by_key():
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
