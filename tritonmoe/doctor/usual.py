"""usual: what every operation of a run would take if nothing were wrong with it.

Operations of one key do the same work, so they are compared: over steps, and over ranks. Two differences are due to
something: that of a rank whose median is not the others', and that of a single operation that is far out of what
its like differ by anyway. The rest is noise: it would be there after any repair, so it stays. Where ranks fall into two
groups, the faster one tells what is usual: two slow ranks of four are no reason to call their time so. Work that grows
with the rows that a rank got, and exchanges that grow with their bytes, are compared at equal rows and bytes; what
the rows themselves cost is imbalance.
"""

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from tritonmoe.doctor.graph import Graph, Key, Member

__all__ = ["Usual", "level", "slope", "spread", "usual_of"]

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
COMMON = 2.5
"""What scatters over all ranks and steps is no fault; a rank has one in a step with so many times as much of it."""
LEAST_S = 20e-6
"""Differences below that are those of clocks."""


@dataclass
class Usual:
    """Seconds of every Run and Member, in the order of the graph's."""

    busy_s: list[float]
    """What it takes with nothing wrong, at the rank's own rows; noise as it was."""
    idle_s: list[float]
    transfer_s: list[float]
    """The same, at the rank's own bytes."""
    of_rows_s: list[float]
    """What a Run takes longer, or less, than at the mean of the ranks' rows."""
    of_bytes_s: list[float]
    level_busy_s: list[float]
    """What is usual, without noise."""
    level_idle_s: list[float]
    level_transfer_s: list[float]


def spread(values: Sequence[float]) -> float:
    """Give the standard deviation of most values: half of them may be anything."""
    if len(values) < 2:
        return 0.0
    middle = statistics.median(values)
    return 1.4826 * statistics.median(abs(value - middle) for value in values)


def level(medians: Sequence[float], noise: float = 0.0) -> float:
    """Give what is usual of ranks' medians: their median, or that of the faster group's where there are two."""
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


def slope(samples: Iterable[tuple[int, int, float, float]]) -> float:
    """Give how much a value grows with its size, of (rank, step, size, value): the median of pairs, by their distance.

    Pairs are of one rank in two steps, or of two ranks in one step.
    """
    by_rank, by_step = defaultdict(list), defaultdict(list)
    largest = 0.0
    for rank, step, size, value in samples:
        by_rank[rank].append((size, value))
        by_step[step].append((size, value))
        if size > 0:
            largest = max(largest, value / size)
    pairs = []
    for group in (*by_rank.values(), *by_step.values()):
        group.sort()
        for one, other in zip(group, reversed(group), strict=True):
            if other[0] <= one[0]:
                break
            pairs.append(((other[1] - one[1]) / (other[0] - one[0]), other[0] - one[0]))
    if not pairs:
        return 0.0
    pairs.sort()
    half, so_far = sum(weight for _, weight in pairs) / 2, 0.0
    for found, weight in pairs:
        so_far += weight
        if so_far >= half:
            return min(max(0.0, found), largest)
    return 0.0


def usual_of(graph: Graph) -> Usual:
    """Find what every stretch of work and exchange of a graph would take with nothing wrong."""
    runs, members = graph.runs, graph.members
    busy, idle = graph.busy_s(), graph.idle_s()
    transfers = [member.transfer_s - member.linked_s for member in members]
    found = Usual(
        busy, idle, transfers, [0.0] * len(runs), [0.0] * len(members), list(busy), list(idle), list(transfers)
    )
    scattered_busy, scattered_idle, scattered_transfers = ([0.0] * len(one) for one in (runs, runs, members))
    for stretches in _stretches(graph).values():
        sizes = [float(runs[own[0]].rows or 0) for own in stretches]
        where = [(runs[own[0]].rank, runs[own[0]].step) for own in stretches]
        times = [sum(runs[index].busy_s for index in own) for own in stretches]
        idles = [sum(runs[index].idle_s for index in own) for own in stretches]
        of_busy, of_idle = _Samples(where, sizes, times), _Samples(where, [0.0] * len(where), idles)
        for number, own in enumerate(stretches):
            for index in own:
                part = runs[index].busy_s / times[number] if times[number] > 0 else 1 / len(own)
                busy[index] -= part * of_busy.excess[number]
                scattered_busy[index] = part * of_busy.scattered[number]
                found.of_rows_s[index] = part * of_busy.of_size[number]
                found.level_busy_s[index] = part * of_busy.levels[number]
                part = runs[index].idle_s / idles[number] if idles[number] > 0 else 1 / len(own)
                idle[index] -= part * of_idle.excess[number]
                scattered_idle[index] = part * of_idle.scattered[number]
                found.level_idle_s[index] = part * of_idle.levels[number]
    by_key: dict[Key, list[int]] = defaultdict(list)
    for index, member in enumerate(members):
        by_key[member.key].append(index)
    latency_s = max(
        0.0, min((statistics.median(transfers[one] for one in own) for own in by_key.values()), default=0.0)
    )
    for indices in by_key.values():
        sizes = [_bytes_of(members[index]) for index in indices]
        where = [(members[index].rank, members[index].step) for index in indices]
        fair = _fair_bytes([members[index] for index in indices])
        times = [transfers[index] for index in indices]
        unit_s = None
        if _is_of_the_fullest(where, sizes, times):
            fullest = _by_step(where, sizes, max)
            sizes = [fullest[step] for _, step in where]
            bound = [(time - latency_s) / size for time, size in zip(times, sizes, strict=True) if size]
            unit_s = max(0.0, statistics.median(bound)) if bound else None
        # Two ranks share all links: who of them gets its rows first is no fault of a link.
        samples = _Samples(where, sizes, times, fair, unit_s, can_last=len(graph.ranks) > 2)
        for number, index in enumerate(indices):
            transfers[index] -= samples.excess[number]
            scattered_transfers[index] = samples.scattered[number]
            found.of_bytes_s[index] = samples.of_size[number]
            found.level_transfer_s[index] = samples.levels[number]
    for times, scattered, operations in (
        (busy, scattered_busy, runs), (idle, scattered_idle, runs), (transfers, scattered_transfers, members),
    ):  # fmt: skip
        for index in _common(scattered, [(one.rank, one.step) for one in operations], graph):
            times[index] += scattered[index]
    return found


def _common(scattered: Sequence[float], where: Sequence[tuple[int, int]], graph: Graph) -> list[int]:
    """Give which of these differences are no fault, since nearly all ranks have as much of them in nearly all steps."""
    sums = dict.fromkeys(((rank, step) for rank in range(len(graph.ranks)) for step in range(len(graph.steps))), 0.0)
    for seconds, place in zip(scattered, where, strict=True):
        sums[place] += seconds
    ordered = sorted(sums.values())
    most = COMMON * ordered[(len(ordered) - 1) // 4] if ordered else 0.0
    return [index for index, place in enumerate(where) if scattered[index] and sums[place] <= most]


class _Samples:
    """The times of all operations of one key: what each takes too long, and what its size makes of it."""

    def __init__(
        self,
        where: Sequence[tuple[int, int]],
        sizes: Sequence[float],
        times: Sequence[float],
        fair: dict[int, float] | None = None,
        unit_s: float | None = None,
        can_last: bool = True,
    ) -> None:
        """fair: the size that every rank would have in a step if all had the same; None: the mean of ranks.

        unit_s: what one more of a size costs; None: found by comparison. can_last: whether a rank that always takes
        longer than others is at fault.
        """
        if fair is None:
            fair = _by_step(where, sizes, statistics.fmean)
        mean = statistics.fmean(sizes)
        if unit_s is not None:
            mean = statistics.fmean(fair[step] for _, step in where)
        elif mean > 0 and max(sizes) - min(sizes) > LEAST_VARIED * mean:
            unit_s = slope([(*at, size, time) for at, size, time in zip(where, sizes, times, strict=True)])
        else:
            unit_s = 0.0
        self.of_size = [unit_s * (size - fair[step]) for (_, step), size in zip(where, sizes, strict=True)]
        """Seconds that each takes more than at the mean size of its step."""
        by_rank: dict[int, list[float]] = defaultdict(list)
        rest = [time - unit_s * (size - mean) for time, size in zip(times, sizes, strict=True)]
        for (rank, _), value in zip(where, rest, strict=True):
            by_rank[rank].append(value)
        medians = {rank: statistics.median_low(values) for rank, values in by_rank.items()}
        noise = statistics.median(spread(values) for values in by_rank.values())
        count = len(rest) / len(by_rank)
        uncertain = max(LEAST_S, noise * 1.25 / count**0.5) if count > 1 else max(LEAST_S, 0.0)
        usual = level(list(medians.values()), uncertain)
        residuals = [value - medians[rank] for (rank, _), value in zip(where, rest, strict=True)]
        far = FAR_OUT * _deviation(residuals)
        lasting = {
            rank: middle - usual if can_last and abs(middle - usual) > CERTAIN * uncertain else 0.0
            for rank, middle in medians.items()
        }
        far = max(far, LEAST_S)
        self.excess = [
            lasting[rank] + residual if residual > far
            # What takes far less than its rank's others takes what is usual: nothing is wrong with it.
            else max(lasting[rank] + residual, min(lasting[rank], 0.0)) if residual < -far
            else lasting[rank]
            for (rank, _), residual in zip(where, residuals, strict=True)
        ]  # fmt: skip
        """Seconds above (or below) what is usual, without noise."""
        self.scattered = [residual if residual > far else 0.0 for residual in residuals]
        """What of that is not there in most steps."""
        self.levels = [
            max(0.0, usual + unit_s * (fair[step] - mean) + more)
            for (_, step), more in zip(where, self.of_size, strict=True)
        ]


def _by_step(
    where: Sequence[tuple[int, int]], values: Sequence[float], what: Callable[[Sequence[float]], float]
) -> dict[int, float]:
    """Give the mean, or the largest, of all ranks' values in each step."""
    by_step: dict[int, list[float]] = defaultdict(list)
    for (_, step), value in zip(where, values, strict=True):
        by_step[step].append(value)
    return {step: what(of_step) for step, of_step in by_step.items()}


def _is_of_the_fullest(where: Sequence[tuple[int, int]], sizes: Sequence[float], times: Sequence[float]) -> bool:
    """Say whether an exchange takes about equally long on all ranks though their bytes differ: as the fullest needs."""
    unlike = []
    for values in (sizes, times):
        most, least, mean = (_by_step(where, values, what) for what in (max, min, statistics.fmean))
        unlike.append(statistics.median((most[one] - least[one]) / mean[one] if mean[one] > 0 else 0.0 for one in mean))
    return unlike[0] > UNLIKE_BYTES and unlike[1] < unlike[0] / 2


def _deviation(residuals: Sequence[float]) -> float:
    """Give the standard deviation of noise, of which up to a third of all values above is none."""
    ordered = sorted(residuals)
    count = len(ordered)
    quarter, half, above = (ordered[int((count - 1) * part)] for part in (0.25, 0.5, 0.65))
    below_s, above_s = (half - quarter) / 0.674, (above - half) / 0.385
    return max(below_s, min(above_s, MOST_SKEW * below_s))


def _stretches(graph: Graph) -> dict[Key, list[list[int]]]:
    """Give the indices of the Runs of every stretch, by their key."""
    found: dict[Key, dict[tuple[int, int], list[int]]] = defaultdict(dict)
    for index, run in enumerate(graph.runs):
        place = (run.rank, run.stretch) if run.stretch >= 0 else (-1, index)
        found[run.key].setdefault(place, []).append(index)
    return {key: list(of_key.values()) for key, of_key in found.items()}


def _fair_bytes(members: Sequence[Member]) -> dict[int, float]:
    """Give the bytes that each rank would have in an exchange of each step if all sent and got the same."""
    by_step: dict[int, list[Member]] = defaultdict(list)
    for member in members:
        by_step[member.step].append(member)
    fair = {}
    for step, of_step in by_step.items():
        whole = [(member.sent, member.received) for member in of_step if member.sent and member.received]
        if len(whole) == len(of_step):
            sums = [(sum(sent), sum(received)) for sent, received in whole]
            fair[step] = max(statistics.fmean(one[way] for one in sums) for way in (0, 1))
        else:
            fair[step] = statistics.fmean(_bytes_of(member) for member in of_step)
    return fair


def _bytes_of(member: Member) -> float:
    """Give the bytes that set how long an exchange takes on this rank: those that come or go."""
    if member.sent is None or member.received is None:
        return float(member.num_bytes or 0)
    return float(max(sum(member.sent), sum(member.received)))
