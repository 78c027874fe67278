"""usual: what every operation of a run would take if nothing were wrong with it.

Operations of one key do the same work, so they are compared: over steps, and over ranks. Two differences are due to
something: that of a rank whose median is not the others', and that of a single operation that is far out of what
its like differ by anyway. The rest is noise: it would be there after any repair, so it stays. Where ranks fall into two
groups, the faster one tells what is usual: two slow ranks of four are no reason to call their time so. Work that grows
with the rows that a rank got, and exchanges that grow with their bytes, are compared at equal rows and bytes; what
the rows themselves cost is imbalance.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tritonmoe.doctor.graph import Graph
from tritonmoe.doctor.pattern import grows

__all__ = ["LEAST_S", "Usual", "far_out", "level", "middle", "slope", "usual_of"]

JUMP = 1.12
"""Ranks whose medians are further apart than that, and than their noise, are two groups."""
LEAST_FAST = 0.25
"""Such a part of the ranks must be fast for it to be known that it can be done."""
LEAST_VARIED = 0.03
"""Rows that differ by a smaller part of their mean say nothing of what a row costs."""
CERTAIN = 3.0
"""A rank's median is another one if it is so many times its own uncertainty away."""
FAR_OUT = 4.5
"""One operation is out of the noise if it is so many standard deviations away."""
MOST_SKEW = 3.0
"""So much wider than below its median may noise be above it."""
UNLIKE_BYTES = 0.5
"""Ranks' bytes differ by so many times their mean where one rank is much fuller than others."""
HOT = 1.5
"""A rank's port is hot where it has so many times the bytes that all would have if they had the same."""
COMMON = 2.5
"""What scatters over all ranks and steps is no fault; a rank has one in a step with so many times as much of it."""
LEAST_BYTE_S = 1e-18
LEAST_S = 20e-6
"""Differences below that are those of clocks."""


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


def middle(table: Tensor) -> Tensor:
    """Return the median of each row of (G, L), of which NaN are no values; of an even number the mean of both."""
    ordered = table.sort(1).values  # NaN last
    counts = (~table.isnan()).sum(1)
    low, high = (((counts - 1 + more) // 2).clamp(min=0) for more in (0, 1))
    return (ordered.gather(1, low[:, None])[:, 0] + ordered.gather(1, high[:, None])[:, 0]) / 2


def level(medians: Sequence[float], noise: float = 0.0) -> float:
    """Return what is usual of ranks' medians: their median, or that of the faster group's where there are two."""
    ordered = sorted(medians)
    best, cut = 1.0, 0
    for place in range(1, len(ordered)):
        low, high = ordered[place - 1], ordered[place]
        if place < LEAST_FAST * len(ordered) or high - low <= CERTAIN * noise:
            continue
        jump = high / low if low > 0 else float("inf")
        if jump > max(JUMP, best):
            best, cut = jump, place
    return statistics.median(ordered[:cut] if cut else ordered)


def _rows_of(groups: Tensor, values: Tensor) -> Tensor:
    """Put values (n,) of groups into (G, L), a row for each group that there is, in their order; NaN where it ends."""
    kept, number, counts = groups.unique(return_inverse=True, return_counts=True)
    order = number.argsort(stable=True)
    place = torch.arange(len(order)) - (counts.cumsum(0) - counts)[number[order]]
    table = torch.full((len(kept), int(counts.max())), torch.nan, dtype=torch.float64, device="cpu")
    table[number[order], place] = values[order]
    return table


def slope(rank: Tensor, step: Tensor, size: Tensor, value: Tensor) -> float:
    """Return how much values (n,) grow with their sizes: the median of pairs, by their distance.

    Pairs are of one rank in two steps, or of two ranks in one step.
    """
    largest = float((value / size).nan_to_num(posinf=0.0, neginf=0.0).clamp(min=0).max()) if len(size) else 0.0
    found, weights = [], []
    for groups in (rank, step):
        sizes, values = _rows_of(groups, size), _rows_of(groups, value)
        by_value = values.argsort(dim=1, stable=True)
        order = by_value.gather(1, sizes.gather(1, by_value).argsort(dim=1, stable=True))
        sizes, values = sizes.gather(1, order), values.gather(1, order)
        counts = (~sizes.isnan()).sum(1, keepdim=True)
        first = torch.arange(sizes.shape[1])[None].expand_as(sizes)
        last = (counts - 1 - first).clamp(min=0)
        distance, height = sizes.gather(1, last) - sizes, values.gather(1, last) - values
        counts_here = (distance > 0) & (first < last)
        found.append((height / distance)[counts_here])
        weights.append(distance[counts_here])
    slopes, distances = torch.cat(found), torch.cat(weights)
    if not len(slopes):
        return 0.0
    ordered, order = slopes.sort()
    reached = distances[order].cumsum(0)
    return min(max(0.0, float(ordered[int((reached >= reached[-1] / 2).to(torch.int8).argmax())])), largest)


def usual_of(graph: Graph, linked_s: Tensor | None = None) -> Usual:
    """Find what every stretch of work and exchange of a graph would take with nothing wrong.

    linked_s: (M,), of which it is known already that slow links cost it.
    """
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
        fullest, longest = (_by_step(step, values, "amax", num_steps) for values in (sizes, times))
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
        samples = _Samples(rank, step, sizes, times, num_steps, fair, unit_s, can_last)
        found.transfer_s[own] -= torch.where(counts, samples.excess, 0.0)
        scattered[own] = torch.where(counts, samples.scattered, 0.0)
        found.of_bytes_s[own] = samples.of_size
        short_s = torch.minimum(found.level_transfer_s[own], samples.levels)
        found.level_transfer_s[own] = torch.where(counts, samples.levels, short_s)
    found.transfer_s += _common(scattered, tables.member_rank, tables.member_step, graph)
    return found


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
            samples = _Samples(rank, step, sizes if of_rows is not None else 0 * sizes, whole, num_steps)
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


class _Samples:
    """The times of all operations of one key: what each takes too long, and what its size makes of it."""

    def __init__(
        self,
        rank: Tensor,
        step: Tensor,
        sizes: Tensor,
        times: Tensor,
        num_steps: int,
        fair: Tensor | None = None,
        unit_s: float | None = None,
        can_last: bool = True,
    ) -> None:
        """fair: the size that every rank would have in a step if all had the same; None: the mean of ranks.

        unit_s: what one more of a size costs; None: found by comparison. can_last: whether a rank that always takes
        longer than others is at fault.
        """
        if fair is None:
            fair = _by_step(step, sizes, "mean", num_steps)
        mean = float(sizes.mean())
        if unit_s is not None:
            mean = float(fair[step].mean())
        elif mean > 0 and float(sizes.max() - sizes.min()) > LEAST_VARIED * mean:
            unit_s = slope(rank, step, sizes, times)
        else:
            unit_s = 0.0
        self.of_size = unit_s * (sizes - fair[step])
        """Seconds that each takes more than at the mean size of its step."""
        rest = times - unit_s * (sizes - mean)
        table = _rows_of(rank, rest)
        medians = table.nanmedian(1).values
        noise = float(middle(1.4826 * middle((table - middle(table)[:, None]).abs())[None])[0])
        count = len(rest) / len(medians)
        uncertain = max(LEAST_S, noise * 1.25 / count**0.5, _uncertainty(table)) if count > 1 else LEAST_S
        usual = level(medians.tolist(), uncertain)
        of_rank = rank.unique(return_inverse=True)[1]
        residuals = rest - medians[of_rank]
        far = max(FAR_OUT * _deviation(residuals), LEAST_S)
        if len(medians) == 1 and grows(rest.tolist(), JUMP):  # no other rank tells what is usual: its first steps do
            usual = float(rest[: len(rest) // 3].min())
            medians, residuals, far = medians.new_full((1,), usual), rest - usual, LEAST_S
        is_certain = can_last & ((medians - usual).abs() > CERTAIN * uncertain)
        lasting = torch.where(is_certain, medians - usual, 0.0)[of_rank]
        # What takes far less than its rank's others takes what is usual: nothing is wrong with it.
        less = torch.maximum(lasting + residuals, lasting.clamp(max=0))
        self.excess = torch.where(residuals > far, lasting + residuals, torch.where(residuals < -far, less, lasting))
        """Seconds above (or below) what is usual, without noise."""
        self.scattered = torch.where(residuals > far, residuals, 0.0)
        """What of that is not there in most steps."""
        self.levels = (usual + unit_s * (fair[step] - mean) + self.of_size).clamp(min=0)


def _uncertainty(table: Tensor) -> float:
    """Return how far medians of the rows of (G, L) may be off, in the middle of all rows; NaN are no values.

    Where values are now of one kind and now of another, as if drawn, medians are too: the values beside them tell.
    """
    ordered, counts = table.sort(1).values, (~table.isnan()).sum(1)
    low, high = ((counts - 1) / 2 + side * counts.sqrt() / 2 for side in (-1, 1))
    last = (counts - 1).clamp(min=0)
    low, high = (of.round().to(torch.int64).clamp(min=0).minimum(last) for of in (low, high))
    widths = ordered.gather(1, high[:, None]) - ordered.gather(1, low[:, None])
    return float(middle(widths.T / 2)[0])


def _by_step(step: Tensor, values: Tensor, what: str, num_steps: int) -> Tensor:
    """Return the mean, or the largest (amax) or smallest (amin), of all ranks' values in each step (S,); else NaN."""
    found = torch.full((num_steps,), torch.nan, dtype=torch.float64, device="cpu")
    return found.scatter_reduce(0, step, values, what, include_self=False)


def _is_of_the_fullest(step: Tensor, sizes: Tensor, times: Tensor, num_steps: int) -> bool:
    """Say whether an exchange takes about equally long on all ranks though their bytes differ: as the fullest needs."""
    unlike = []
    for values in (sizes, times):
        most, least, mean = (_by_step(step, values, what, num_steps) for what in ("amax", "amin", "mean"))
        apart = torch.where(mean > 0, (most - least) / mean, 0.0)[~mean.isnan()]
        unlike.append(float(middle(apart[None])[0]))
    return unlike[0] > UNLIKE_BYTES and unlike[1] < unlike[0] / 2


def _deviation(residuals: Tensor) -> float:
    """Return the standard deviation of noise, of which up to a third of all values above is none."""
    ordered = residuals.sort().values
    quarter, half, above = (float(ordered[int((len(ordered) - 1) * part)]) for part in (0.25, 0.5, 0.65))
    below_s, above_s = (half - quarter) / 0.674, (above - half) / 0.385
    return max(below_s, min(above_s, MOST_SKEW * below_s))


def far_out(values: Tensor) -> Tensor:
    """Return by how much values (n,) are above the middle one where that is more than noise, else 0."""
    more = values - values.nanmedian()
    return torch.where(more > max(FAR_OUT * _deviation(more), LEAST_S), more, 0.0)


def _fair_bytes(bytes_out: Tensor, bytes_in: Tensor, sizes: Tensor, step: Tensor, num_steps: int) -> Tensor:
    """Return the bytes that each rank would have in an exchange of each step if all sent and got the same."""
    out, into = (_by_step(step, way, "mean", num_steps) for way in (bytes_out, bytes_in))  # NaN where one is not known
    whole = torch.maximum(out, into)
    return torch.where(whole.isnan(), _by_step(step, sizes, "mean", num_steps), whole)
