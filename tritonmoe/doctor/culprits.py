"""Who is at fault and where: the fewest ranks whose excess explains what a kind of cause costs."""

import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from tritonmoe.doctor.causes import CauseKind, Causes
from tritonmoe.doctor.graph import Key, Member, Run
from tritonmoe.doctor.pattern import costly_steps

__all__ = ["Culprits", "culprits_of"]

EXPLAINED = 0.8
"""Ranks are at fault when without their excess so much of the whole gain is there."""
ALONE = 2.0
"""In a step one rank is at fault alone if its excess is so many times the next one's."""
MOVING = 0.65
"""A cause moves if no rank is at fault in a larger part of the costly steps."""
ONE_PLACE = 0.7


@dataclass(frozen=True)
class Culprits:
    """Who and where."""

    ranks: tuple[int, ...]
    """Indices of ranks, the worst first; empty where it is all of them, or each in turn."""
    moves: bool
    """Whether it is another rank from step to step."""
    phase: str
    """forward or backward, where nearly all of it is there."""
    place: Key | None
    """The one key that has most of it, where there are several."""
    factor: float
    """How many times what is usual these ranks' operations take."""
    links: tuple[tuple[int, int], ...] = ()
    """Sender and receiver of slow links, where they are known."""
    words: str = ""
    """Which end of a link it is, where it is known."""


def culprits_of(causes: Causes, kind: CauseKind, gained: Sequence[float], without: Sequence[CauseKind]) -> Culprits:
    """Find who is at fault for a kind of cause, and where; without: other kinds that hide it, taken out first."""
    graph = causes.graph
    excess = causes.by_rank_and_step(kind)
    ranks: tuple[int, ...] = ()
    moves = False
    if len(graph.ranks) > 1:
        costly = costly_steps(gained)
        worst = []
        for step in costly:
            ordered = sorted(range(len(graph.ranks)), key=lambda rank, step=step: -excess[rank][step])  # type: ignore[misc]
            first, second = (excess[rank][step] for rank in ordered[:2])
            if first > ALONE * max(second, 0.0):
                worst.append(ordered[0])
        if len(worst) >= max(3, ONE_PLACE * len(costly)):
            most = max(worst.count(rank) for rank in set(worst))
            moves = most <= MOVING * len(worst)
        if not moves:
            ranks = _fewest(causes, kind, excess, gained, without)
    where: dict[Key, float] = defaultdict(float)
    usual_s, excess_s = 0.0, 0.0
    of_kind = causes.excess[kind]
    operations: list[tuple[Run | Member, float, float]] = [
        *zip(graph.runs, of_kind.run_s, causes.usual.busy_s, strict=True),
        *zip(graph.members, of_kind.member_s, causes.usual.transfer_s, strict=True),
    ]
    for operation, more, usual in operations:
        if more > 0 and (not ranks or operation.rank in ranks):
            where[operation.key] += more
            excess_s += more
            usual_s += usual
    total = sum(where.values())
    phases: dict[str, float] = defaultdict(float)
    for key, seconds in where.items():
        phases[phase_of(key)] += seconds
    phase = max(phases, key=lambda name: phases[name], default="")
    phase = phase if total > 0 and phases[phase] >= 0.85 * total else ""
    place = max(where, key=lambda key: where[key], default=None)
    known = {operation.key for operation, _, _ in operations}
    is_one = place is not None and len(known) > 2 and where[place] >= ONE_PLACE * total
    return Culprits(ranks, moves, phase, place if is_one else None, 1 + excess_s / usual_s if usual_s > 0 else 0.0)


def phase_of(key: Key) -> str:
    """Give the phase of the step that a key belongs to: its first word, as far as that is known."""
    word = str(key[0]) if key else ""
    return next((phase for phase in ("forward", "backward") if word.startswith(phase)), "")


def _fewest(
    causes: Causes,
    kind: CauseKind,
    excess: Sequence[Sequence[float]],
    gained: Sequence[float],
    without: Sequence[CauseKind],
) -> tuple[int, ...]:
    """Give the fewest ranks whose excess explains the gain, the worst first; none where it takes nearly all."""
    num_ranks = len(excess)
    sums = [sum(max(0.0, one) for one in of_rank) for of_rank in excess]
    order = sorted(range(num_ranks), key=lambda rank: -sums[rank])
    wanted = EXPLAINED * statistics.fmean(gained)
    before = statistics.fmean(causes.without(without)) if without else statistics.fmean(causes.as_it_was)
    for count in _counts(num_ranks):
        chosen = set(order[:count])
        now = statistics.fmean(_without_both(causes, kind, chosen, without))
        if before - now >= wanted:
            while count > 1:  # counts are tried in growing strides
                fewer = set(order[: count - 1])
                if before - statistics.fmean(_without_both(causes, kind, fewer, without)) < wanted:
                    break
                count -= 1
            alike = [rank for rank in order[count:] if sums[rank] >= 0.7 * sums[order[count - 1]] > 0]
            found = (*order[:count], *alike)
            return found if len(found) < num_ranks else ()
    return ()


def _counts(num_ranks: int) -> list[int]:
    counts = list(range(1, min(num_ranks, 5)))
    while counts and counts[-1] * 2 < num_ranks:
        counts.append(counts[-1] * 2)
    return counts


def _without_both(causes: Causes, kind: CauseKind, ranks: set[int], without: Sequence[CauseKind]) -> list[float]:
    """Give steps without some kinds, and without one more on some ranks."""
    graph, excess = causes.graph, causes.excess
    run_s, transfer_s = list(causes.run_s), list(causes.transfer_s)
    for index, run in enumerate(graph.runs):
        more = sum(excess[other].run_s[index] for other in without)
        if run.rank in ranks:
            more += excess[kind].run_s[index]
        run_s[index] = max(0.0, run_s[index] - more)
    for index, member in enumerate(graph.members):
        transfer_s[index] -= sum(excess[other].member_s[index] for other in without)
        if member.rank in ranks:
            transfer_s[index] -= excess[kind].member_s[index]
    return causes.walker.step_times(run_s, transfer_s)
