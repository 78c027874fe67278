"""Who is at fault and where: the fewest ranks whose excess explains what a kind of cause costs, by walks without it."""

import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor

from tritonmoe.tools.doctor.causes import CAUSES, CauseKind, Culprits, ExcessTime, Known
from tritonmoe.tools.doctor.graph import Graph, Key
from tritonmoe.tools.doctor.pattern import FEW_STEPS, Pattern, costly_steps, pattern_of
from tritonmoe.tools.doctor.usual import Usual
from tritonmoe.tools.doctor.walk import walker_of

__all__ = ["Removal", "Replays", "Share", "culprits_of", "phase_of", "steady"]

Removal: TypeAlias = Mapping[CauseKind, Collection[int] | Tensor | None]
"""Kinds of causes that are taken out: on some ranks, on all (None), or (W, S) a part on each rank in each step."""


class Replays:
    """A graph with what is usual of it, and walks of it without some of what is not."""

    def __init__(self, graph: Graph, usual: Usual, known: Known | None = None) -> None:
        self.graph, self.usual, self.tables = graph, usual, graph.tables
        self.walker = walker_of(graph)
        self.run_s, self.transfer_s = self.tables.run_s, self.tables.transfer_s
        self.excess: dict[CauseKind, ExcessTime] = {}
        for kind, cause in CAUSES.items():
            if cause.compared is not None:
                self.excess[kind] = cause.compared(graph, usual)
            elif cause.structural is not None and known is not None:
                self.excess[kind] = cause.structural(known, usual)
        self.as_it_was = self.walker.step_times(self.run_s, self.transfer_s)

    def without(self, removals: Sequence[Removal]) -> list[list[float]]:
        """Return the time of each step without causes of some kinds, for each of several sets of them."""
        found: list[list[float]] = []
        for first in range(0, len(removals), self.walker.num_at_once):
            some = removals[first : first + self.walker.num_at_once]
            runs, transfers = (times.repeat(len(some), 1) for times in (self.run_s, self.transfer_s))
            for run_s, transfer_s, removal in zip(runs, transfers, some, strict=True):
                for kind, removed in removal.items():
                    excess = self.excess[kind]
                    of_runs, of_members = self._parts(kind, removed)
                    run_s -= excess.run_s * of_runs
                    transfer_s -= excess.member_s * of_members
            found += self.walker.all_step_times(runs.clamp_(min=0), transfers)
        return found

    def due_to(self, kind: CauseKind) -> Tensor:
        """Return the rank (M,) that the excess of a Member is due to: its own, or the hot one that it waits for."""
        return self.usual.bytes_due_to if CAUSES[kind].is_due_to_bytes else self.tables.member_rank

    def _parts(
        self, kind: CauseKind, removed: Collection[int] | Tensor | None
    ) -> tuple[Tensor | float, Tensor | float]:
        """Return which part of its excess is taken out of each Run (N,) and of each Member (M,)."""
        if removed is None:
            return 1.0, 1.0
        tables, due_to = self.tables, self.due_to(kind)
        if isinstance(removed, Tensor):
            return removed[tables.run_rank, tables.run_step], removed[due_to, tables.member_step]
        of = torch.zeros(len(self.graph.ranks), dtype=torch.float64, device="cpu")
        of[list(removed)] = 1.0
        return of[tables.run_rank], of[due_to]

    def is_nothing(self, kind: CauseKind) -> bool:
        """Whether no operation is above what is usual for this."""
        excess = self.excess[kind]
        return not any(bool((times > 0).any()) for times in (excess.run_s, excess.member_s))

    def by_rank_and_step(self, kind: CauseKind) -> list[list[float]]:
        """Return the seconds above what is usual, by rank and step."""
        tables, excess = self.tables, self.excess[kind]
        shape = len(self.graph.ranks), len(self.graph.steps)
        sums = torch.zeros(*shape, dtype=torch.float64, device="cpu").flatten()
        sums.index_add_(0, tables.run_rank * shape[1] + tables.run_step, excess.run_s)
        sums.index_add_(0, self.due_to(kind) * shape[1] + tables.member_step, excess.member_s)
        return sums.view(shape).tolist()


_Name = TypeVar("_Name", Key, int, str)
EXPLAINED = 0.8
"""Ranks are at fault when without their excess so much of the whole gain is there."""
ALONE = 2.0
"""In a step one rank is at fault alone if its excess is so many times the next one's."""
MOVING = 0.65
"""Ranks take turns if none of them is at fault in a larger part of the costly steps."""
FEW_OF = 1 / 3
"""If at most such a part of the ranks take turns, they are named."""
ONE_PLACE, ONE_PHASE = 0.7, 0.85
ALIKE = 0.7
"""A rank has as much as another if it has at least that part of it."""
ENOUGH_STEPS = 6
LEAST_STEADY = 0.03
"""What a rank has in nearly every step is its own from such a share of a step on, however much others have in few."""
OF_FEW = 0.5
"""All ranks are at fault if what each of them has in the same step costs more than that part of the gain."""


class Share(NamedTuple):
    """A part of what a kind of cause costs: of some ranks, in some steps."""

    culprits: Culprits
    when: Pattern
    gained: Sequence[float]
    """What mending it gains in each step, once what hides it is mended."""
    removal: Tensor | None
    """(W, S): what mending it takes out of each rank's excess; None: all."""


def culprits_of(
    replays: Replays, kind: CauseKind, gained: Sequence[float], without: Sequence[CauseKind]
) -> list[Share]:
    """Find who is at fault for a kind of cause, where and when; without: other kinds that hide it, taken out first.

    Ranks whose faults are of other passes or other steps are told apart, and so is what all ranks have in few steps
    from what some have in many.
    """
    graph = replays.graph
    excess = replays.by_rank_and_step(kind)
    if len(graph.ranks) == 1 or CAUSES[kind].is_shared:
        return [_share(replays, kind, (), gained)]
    takers, is_once_each = _taking_turns(excess, gained)
    if not is_once_each and len(takers) > max(1.0, FEW_OF * len(graph.ranks)):
        return [_share(replays, kind, (), gained, moves=True)]
    excess_s = torch.tensor(excess, dtype=torch.float64, device="cpu").clamp(min=0)
    ranks, own_gained, gone = _at_fault(replays, kind, excess_s, gained, without)
    if is_once_each:
        ranks = ranks or takers
    elif takers and (not ranks or set(takers) <= set(ranks)):
        return [_share(replays, kind, takers, gained, moves=True)]
    shares = [
        _share(replays, kind, own, _gained_by(replays, kind, own, gone, without), removal=_only(own, gone))
        for own in _apart(replays, kind, ranks, excess_s, gone)
    ]
    if len(shares) < 2:
        shares = [_share(replays, kind, ranks, own_gained, removal=_only(ranks, gone) if ranks else None)]
    crowded = [all_of - own for all_of, own in zip(gained, own_gained, strict=True)]
    if ranks and statistics.fmean(crowded) > LEAST_STEADY * statistics.fmean(replays.as_it_was):
        shares.append(_share(replays, kind, (), crowded, removal=gone))
    return shares


def _taking_turns(excess: Sequence[Sequence[float]], gained: Sequence[float]) -> tuple[tuple[int, ...], bool]:
    """Return the ranks that are at fault one after the other, each alone in a step, and whether each is only once.

    There are none where one rank mostly is at fault.
    """
    costly = costly_steps(gained)
    worst = []
    for step in costly:
        ordered = sorted(range(len(excess)), key=lambda rank, step=step: -excess[rank][step])  # type: ignore[misc]
        first, second = (excess[rank][step] for rank in ordered[:2])
        if first > ALONE * max(second, 0.0):
            worst.append(ordered[0])
    counts = Counter(worst)
    if len(worst) < max(FEW_STEPS, ONE_PLACE * len(costly)) or max(counts.values()) > MOVING * len(worst):
        return (), False
    num_changes = sum(before != after for before, after in pairwise(worst))
    return tuple(counts), num_changes < len(counts) and min(counts.values()) >= FEW_STEPS


def _only(ranks: Sequence[int], gone: Tensor) -> Tensor:
    """Return (W, S) all that these ranks have beside what is gone already."""
    parts = torch.zeros_like(gone)
    parts[list(ranks)] = 1 - gone[list(ranks)]
    return parts


def _gained_by(
    replays: Replays, kind: CauseKind, ranks: Sequence[int], gone: Tensor, without: Sequence[CauseKind]
) -> list[float]:
    """Return what mending these ranks gains in each step, behind all others of this kind."""
    others = torch.ones_like(gone)
    others[list(ranks)] = gone[list(ranks)]
    before, after = replays.without([{**dict.fromkeys(without), kind: of} for of in (others, torch.ones_like(gone))])
    return [was - then for was, then in zip(before, after, strict=True)]


def _apart(
    replays: Replays, kind: CauseKind, ranks: Sequence[int], excess_s: Tensor, gone: Tensor
) -> list[tuple[int, ...]]:
    """Return ranks in groups: those with faults of one pass, and of the same steps where these are a stretch."""
    groups: dict[tuple, list[int]] = defaultdict(list)
    own_s = excess_s * (1 - gone)
    for rank in ranks:
        when = pattern_of(own_s[rank].tolist(), range(excess_s.shape[1]))
        phase = _where(replays, kind, (rank,))[0]
        near = [of for of in groups if of[0] == phase and _is_near(of[1], when.since) and _is_near(of[2], when.until)]
        groups[near[0] if near else (phase, when.since, when.until)].append(rank)
    is_apart = {"forward", "backward"} <= {phase for phase, _, _ in groups} or len({of[1:] for of in groups}) > 1
    return [tuple(own) for own in groups.values()] if is_apart else [tuple(ranks)]


def _is_near(one: int | None, other: int | None) -> bool:
    return one == other or (one is not None and other is not None and abs(one - other) <= 1)


def _share(
    replays: Replays,
    kind: CauseKind,
    ranks: tuple[int, ...],
    gained: Sequence[float],
    moves: bool = False,
    removal: Tensor | None = None,
) -> Share:
    phase, place, layer, factor = _where(replays, kind, ranks)
    ranks = tuple(sorted(ranks))
    culprits = Culprits(ranks, moves, phase, place, factor, layer)
    return Share(culprits, pattern_of(gained, replays.graph.steps), gained, removal)


def _where(replays: Replays, kind: CauseKind, ranks: Sequence[int]) -> tuple[str, Key | None, int | None, float]:
    """Return the pass, the place and the layer that have most of these ranks' excess, and how much it is; all: none."""
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
    return _most(where, phase_of, ONE_PHASE) or "", place, layer, factor


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
) -> tuple[tuple[int, ...], Sequence[float], Tensor]:
    """Return the fewest ranks whose excess (W, S) explains the gain, none where it is all; and each step's gain.

    What every rank has in the same step, as where a machine has too few cores, is nobody's own: it is taken out first
    (W, S), and ranks that have more than that again and again are at fault. Where none has, all of the gain is asked
    for; of ranks that have some in nearly every step, and others not, what they have in nearly every step.
    """
    none, common_s = torch.zeros_like(excess_s), excess_s.amin(0)
    ranks: tuple[int, ...] = ()
    own_gained: Sequence[float] = gained
    is_common = excess_s.shape[1] >= FEW_STEPS and bool(common_s.any())
    if is_common:
        common = torch.where(excess_s > 0, common_s / excess_s, 0.0)
        own_s = excess_s - common_s
        ranks, own_gained = _fewest(replays, kind, own_s, common, without)
        is_of_few = sum(own_gained) >= OF_FEW * sum(gained)
        if is_of_few and ranks and all(len(costly_steps(own_s[rank].tolist())) >= FEW_STEPS for rank in ranks):
            return ranks, own_gained, common
        ranks, own_gained = ((), gained) if not is_of_few else _fewest(replays, kind, excess_s, none, without)
    else:
        ranks, own_gained = _fewest(replays, kind, excess_s, none, without)
    own, steady_s = steady(excess_s, LEAST_STEADY * statistics.fmean(replays.as_it_was))
    if not own or set(ranks) == set(own):
        return ranks, own_gained if ranks else gained, none
    gone = torch.where(excess_s > 0, 1 - steady_s / excess_s, 1.0)
    return own, _gained_by(replays, kind, own, gone, without), gone


def steady(excess_s: Tensor, least_s: float) -> tuple[tuple[int, ...], Tensor]:
    """Return the ranks that have so much excess in nearly every step, where most have not, and that excess (W, S)."""
    count = excess_s.shape[1]
    floors = excess_s.sort(1).values[:, count // 5] if count >= ENOUGH_STEPS else torch.zeros(len(excess_s)).double()
    own = (floors >= max(float(floors.amax()) / 2, least_s)).nonzero()[:, 0].tolist()
    if len(own) * 2 > len(excess_s):
        own = []
    return tuple(own), torch.minimum(excess_s, floors[:, None])


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
