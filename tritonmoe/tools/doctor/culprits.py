"""Who is at fault and where: the fewest ranks whose excess explains what a kind of cause costs."""

import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from tritonmoe.tools.doctor.causes import CauseKind, Culprits
from tritonmoe.tools.doctor.graph import Key
from tritonmoe.tools.doctor.pattern import FEW_STEPS, Pattern, costly_steps, pattern_of
from tritonmoe.tools.doctor.replays import Removal, Replays

__all__ = ["culprits_of", "phase_of"]

_Name = TypeVar("_Name", Key, int, str)
EXPLAINED = 0.8
"""Ranks are at fault when without their excess so much of the whole gain is there."""
ALONE = 2.0
"""In a step one rank is at fault alone if its excess is so many times the next one's."""
MOVING = 0.65
"""A cause moves if no rank is at fault in a larger part of the costly steps."""
ONE_PLACE, ONE_PHASE = 0.7, 0.85
ALIKE = 0.7
"""A rank has as much as another if it has at least that part of it."""
OF_FEW = 0.5
"""All ranks are at fault if what each of them has in the same step costs more than that part of the gain."""


def culprits_of(
    replays: Replays, kind: CauseKind, gained: Sequence[float], without: Sequence[CauseKind]
) -> tuple[Culprits, Pattern]:
    """Find who is at fault for a kind of cause, where and when; without: other kinds that hide it, taken out first."""
    graph = replays.graph
    excess = replays.by_rank_and_step(kind)
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
            ranks, gained = _at_fault(
                replays, kind, torch.tensor(excess, dtype=torch.float64, device="cpu").clamp(min=0), gained, without
            )
    tables, of_kind = replays.tables, replays.excess[kind]
    where: dict[Key, float] = defaultdict(float)
    usual_s, excess_s = 0.0, 0.0
    known: set[Key] = set()
    for of_rank, of_key, excess_of, usual in (
        (tables.run_rank, tables.run_key, of_kind.run_s, replays.usual.busy_s),
        (replays.due_to(kind), tables.member_key, of_kind.member_s, replays.usual.transfer_s),
    ):
        known |= {tables.keys[key] for key in of_key.unique().tolist()}
        counts = excess_of > 0
        if ranks:
            counts &= torch.isin(of_rank, torch.tensor(ranks))
        usual_s += float(usual[counts].sum())
        excess_s += float(excess_of[counts].sum())
        sums = torch.zeros(len(tables.keys), dtype=torch.float64).index_add(0, of_key[counts], excess_of[counts])
        for key in sums.nonzero()[:, 0].tolist():
            where[tables.keys[key]] += float(sums[key])
    place = _most(where, lambda key: key, ONE_PLACE) if len(known) > 2 else None
    place = None if _layer_of(place) is not None else place
    layer = _most(where, _layer_of, ONE_PLACE) if len({_layer_of(key) for key in known} - {None}) > 1 else None
    factor = 1 + excess_s / usual_s if usual_s > 0 else 0.0
    phase = _most(where, phase_of, ONE_PHASE) or ""
    return Culprits(ranks, moves, phase, place, factor, layer), pattern_of(gained)


def _most(where: Mapping[Key, float], name_of: Callable[[Key], _Name | None], least: float) -> _Name | None:
    """Return the name whose keys have so large a part of the seconds of all keys; None where none has."""
    sums: dict[_Name, float] = defaultdict(float)
    for key, seconds in where.items():
        name = name_of(key)
        if name is not None:
            sums[name] += seconds
    most = max(sums, key=lambda name: sums[name], default=None)
    return most if most is not None and sums[most] >= least * sum(where.values()) else None


def _layer_of(key: Key | None) -> int | None:
    """Return the layer of a key of a recording of layers, (phase, layer, name, chunk, work); None of others."""
    return key[1] if key is not None and len(key) == 5 and isinstance(key[1], int) else None


def phase_of(key: Key) -> str:
    """Return the phase of the step that a key belongs to: its first word, as far as that is known."""
    word = str(key[0]) if key else ""
    return next((phase for phase in ("forward", "backward") if word.startswith(phase)), "")


def _at_fault(
    replays: Replays, kind: CauseKind, excess_s: Tensor, gained: Sequence[float], without: Sequence[CauseKind]
) -> tuple[tuple[int, ...], Sequence[float]]:
    """Return the fewest ranks whose excess (W, S) explains the gain, none where it is all; and each step's gain.

    What every rank has in the same step, as where a machine has too few cores, is nobody's own: it is taken out first,
    and ranks that have more than that again and again are at fault. Where none has, all of the gain is asked for.
    """
    none = torch.zeros_like(excess_s)
    common_s = excess_s.amin(0)
    if excess_s.shape[1] >= FEW_STEPS and bool(common_s.any()):
        common = torch.where(excess_s > 0, common_s / excess_s, 0.0)
        own_s = excess_s - common_s
        ranks, own_gained = _fewest(replays, kind, own_s, common, without)
        if sum(own_gained) < OF_FEW * sum(gained):
            return (), gained
        if ranks and all(len(costly_steps(own_s[rank].tolist())) >= FEW_STEPS for rank in ranks):
            return ranks, own_gained
    return _fewest(replays, kind, excess_s, none, without)[0], gained


def _fewest(
    replays: Replays, kind: CauseKind, excess_s: Tensor, gone: Tensor, without: Sequence[CauseKind]
) -> tuple[tuple[int, ...], list[float]]:
    """Return the smallest set of ranks (worst first) that explains the gain, and the gain; no ranks mean all of them.

    gone: (W, S), which part of each rank's excess is taken out beforehand.
    """
    num_ranks = len(excess_s)
    sums = excess_s.sum(1).tolist()
    order = sorted(range(num_ranks), key=lambda rank: -sums[rank])

    def removal(count: int) -> Removal:
        parts = gone.clone()
        parts[order[:count]] = 1.0
        return {**dict.fromkeys(without), kind: parts}

    counts = _counts(num_ranks)
    before, *now, after = replays.without([removal(count) for count in (0, *counts, num_ranks)])
    gained = [was - then for was, then in zip(before, after, strict=True)]
    most_s = statistics.fmean(before) - EXPLAINED * statistics.fmean(gained)
    count = next((count for count, left in zip(counts, now, strict=True) if statistics.fmean(left) <= most_s), 0)
    if not count:
        return (), gained
    more = max((fewer for fewer in counts if fewer < count), default=0)
    between = list(range(more + 1, count))  # counts are tried in growing strides
    if between:
        now = replays.without([removal(fewer) for fewer in between])
        left_of = zip(between, now, strict=True)
        count = next((fewer for fewer, left in left_of if statistics.fmean(left) <= most_s), count)
    alike = [rank for rank in order[count:] if sums[rank] >= ALIKE * sums[order[count - 1]] > 0]
    found = (*order[:count], *alike)
    return found if len(found) < num_ranks else (), gained


def _counts(num_ranks: int) -> list[int]:
    counts = list(range(1, min(num_ranks, 5)))
    while counts and counts[-1] * 2 < num_ranks:
        counts.append(counts[-1] * 2)
    return counts
