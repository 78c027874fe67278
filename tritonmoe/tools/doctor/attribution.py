"""Attribution: what the steps of a run would gain without what is not usual; how much, who, where and when.

First everything at once: if that gains little, the run is healthy, and nothing else is said. Then the kinds of causes,
each without the others and the others without it, since two causes can hide each other. Then who, where and when. Slow
steps are what a verdict is made of: all steps count.
"""

import copy
import functools
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tritonmoe.tools.doctor.causes import CAUSES, CauseKind, Culprits, Known
from tritonmoe.tools.doctor.culprits import Removal, Replays, Share, culprits_of, steady
from tritonmoe.tools.doctor.graph import Graph, LinkFault, floats, indices
from tritonmoe.tools.doctor.pattern import FEW_STEPS, Pattern
from tritonmoe.tools.doctor.usual import Usual, usual_of
from tritonmoe.tools.doctor.walk import Walker

__all__ = ["Cost", "Finding", "Verdict", "attribute", "gain_of_noise"]

SMALLEST_SHARE = 0.05
"""A smaller share of the step is not spoken of."""
LARGE_SHARE = 0.15
"""Whoever could gain so much is not healthy, whatever the noise."""
ANOTHER = 0.5
"""A cause is a finding beside one that explains it only if it costs more than that part of what that one costs."""
HIDDEN = 0.5
"""What mending a cause alone gains is its cost, unless that is less than this part of its gain without the others."""
MOST_ERROR = 0.10
"""A replay that is further off than this explains nothing."""
LEAST_CERTAIN = 0.005
"""A cost whose interval begins below that share of a step, which is shown as 0 %, may be noise."""
NUM_SELECTIONS = 200
INTERVAL = 0.8
MOST_RUNS, FEWEST_RUNS = 8, 2
MOST_OPERATIONS = 1_000_000
"""In all runs together: of many operations each run gains about the same."""


@dataclass(frozen=True)
class Cost:
    """Seconds of a step, the mean over all steps."""

    seconds: float
    low_s: float
    """The interval that holds 80 % of what selections of the steps give."""
    high_s: float

    @classmethod
    def of(cls, gained: Sequence[float]) -> "Cost":
        """Return the cost of what each step would gain."""
        means = sorted(map(statistics.fmean, floats(gained)[_selections(len(gained))].tolist()))
        aside = int(NUM_SELECTIONS * (1 - INTERVAL) / 2)
        return cls(statistics.fmean(gained), means[aside], means[-1 - aside])

    def share(self, step_s: float) -> float:
        return self.seconds / step_s if step_s else 0.0


@functools.lru_cache(maxsize=4)
def _selections(num_steps: int) -> Tensor:
    """Return (selections, steps): which steps each selection of as many steps has, drawn with putting back."""
    draw = random.Random(0)
    drawn = [step for _ in range(NUM_SELECTIONS) for step in draw.choices(range(num_steps), k=num_steps)]
    return indices(drawn).view(NUM_SELECTIONS, num_steps)


@dataclass(frozen=True)
class Finding:
    """A cause, and what it costs."""

    kind: CauseKind
    culprits: Culprits
    when: Pattern
    cost: Cost
    """What mending this alone gains; of a hidden one, what it gains once the others are mended."""
    is_hidden: bool
    """Whether mending it alone gains little, since another cause holds up the same steps."""
    may_be_noise: bool
    """Whether 0 is in the interval of what it costs."""


@dataclass(frozen=True)
class Verdict:
    """Why the steps of a run take as long as they do."""

    graph: Graph
    measured_s: float
    """The mean of all steps."""
    replayed_s: float
    whole_s: float
    """What a step takes with what lies between the calls of a recording, which has no events of that: shares are of
    this."""
    findings: tuple[Finding, ...]
    """By their cost, those that may be noise behind the others."""
    others: tuple[tuple[CauseKind, float], ...]
    """Kinds that are not spoken of, with their shares."""
    together: Cost
    """Without anything that is not usual."""
    mended: Cost
    """What mending all findings gains, and nothing else."""
    healthy_s: float
    """What a healthy step may seem to gain: a share of it, or more where noise alone would seem to gain more."""
    noise_s: float
    """What differences without a pattern cost: nobody's fault, and no repair ends them."""
    exposed_s: float
    """How much of a step nothing but the rows of exchanges is waited for."""
    waiting_s: float
    """How long a rank stands in exchanges in a step, the mean of all ranks."""
    computing_s: float
    host_s: float

    @property
    def error(self) -> float:
        return self.replayed_s / self.measured_s - 1 if self.measured_s else 0.0

    @property
    def is_explained(self) -> bool:
        return abs(self.error) <= MOST_ERROR

    @property
    def can_compare(self) -> bool:
        """Whether there is anything to compare a step with: other ranks, or two other steps."""
        return len(self.graph.steps) >= FEW_STEPS or len(self.graph.ranks) > 1

    @property
    def is_uncertain(self) -> bool:
        """Whether something is not usual, and none of it in so many steps that it is sure to come again."""
        return not self.findings and self.together.seconds >= self.healthy_s

    @property
    def is_untold(self) -> bool:
        """Whether ranks wait for others that the files don't name: for which ones is not known then."""
        return self.graph.alone_s >= SMALLEST_SHARE * self.replayed_s > 0

    @property
    def is_healthy(self) -> bool:
        is_certain = self.can_compare and self.is_explained and not self.is_untold
        return is_certain and not self.findings and not self.is_uncertain


def attribute(graph: Graph, known: Known | None = None) -> Verdict:
    """Return why the steps of a run take as long as they do.

    known: what a recording of this package's layers tells beyond the graph.
    Raises:
        ValueError: ranks wait for each other in a circle: the files contradict each other.
    """
    usual = usual_of(graph, graph.linked_s)
    replays = Replays(graph, usual, known)
    step_s = statistics.fmean(replays.as_it_was)
    whole_s = step_s if known is None else known.step_s
    kinds = [kind for kind in replays.excess if not replays.is_nothing(kind)]
    compared: Removal = dict.fromkeys(kind for kind in kinds if CAUSES[kind].compared)
    alone: list[Removal] = [{kind: None} for kind in kinds]
    # A kind that is compared is left as it was, and the others of these are not; another kind goes too.
    others: list[Removal] = [
        {one: None for one in compared if one != kind} if kind in compared else {**compared, kind: None}
        for kind in kinds
    ]
    healthy, *walked = replays.without([compared, *alone, *others])
    alone_s, others_s = walked[: len(kinds)], walked[len(kinds) :]
    all_gained_s = statistics.fmean(_less(replays.as_it_was, healthy))
    healthy_s = _healthy_s(replays, step_s, all_gained_s)
    is_ill = all_gained_s >= healthy_s
    findings: list[Finding] = []
    small: list[tuple[CauseKind, float]] = [(kind, 0.0) for kind in replays.excess if kind not in kinds]
    for kind, only, other in zip(kinds, alone_s, others_s, strict=True):
        gained = _less(replays.as_it_was, only)
        hidden = _less(other, healthy) if kind in compared else _less(healthy, other)
        if (kind in compared and not is_ill) or CAUSES[kind].ignores_others:
            hidden = gained  # without slow links less would be beside exchanges
        most = max(gained, hidden, key=statistics.fmean)
        at_most = Cost.of(most)
        is_hidden = statistics.fmean(gained) < HIDDEN * at_most.seconds
        cost = at_most if is_hidden else Cost.of(gained)
        is_asked = is_ill or kind not in compared
        of_s = whole_s if CAUSES[kind].is_between_calls else step_s
        least_s = healthy_s if kind in compared else CAUSES[kind].least_share * of_s
        if is_asked and at_most.seconds >= least_s and at_most.low_s > 0:
            others_first = [one for one in compared if one != kind] if most is hidden else []
            shares = culprits_of(replays, kind, most, others_first)
            if len(shares) == 1 or (CAUSES[kind].is_of_links and graph.fault is not None):
                culprits, when, _, _ = shares[0]
                found = Finding(kind, culprits, when, cost, is_hidden, cost.low_s < LEAST_CERTAIN * step_s)
                findings.append(_named(found, graph.fault))
            else:
                findings += _split(replays, kind, shares, SMALLEST_SHARE * step_s)
        else:
            small.append((kind, cost.share(whole_s)))
    findings.sort(key=_place_of)
    findings = _of_one_thing(findings, small, whole_s)
    found_kinds: Removal = {
        kind: None for kind in kinds if any(CAUSES[one.kind].excess_kind == kind for one in findings)
    }
    together, mended = (
        _less(replays.as_it_was, steps_s) for steps_s in replays.without([{**compared, **found_kinds}, found_kinds])
    )
    quiet = replays.walker.step_times(usual.level_busy_s + usual.level_idle_s, usual.level_transfer_s)
    no_transfers = replays.walker.step_times(replays.run_s, replays.transfer_s.clamp(max=0))
    tables, per_step = graph.tables, len(graph.ranks) * len(graph.steps)
    computing_s, host_s = (float(of.sum()) / per_step for of in (tables.busy_s, tables.idle_s + tables.load_s))
    return Verdict(
        graph=graph,
        measured_s=statistics.fmean(graph.measured_s),
        replayed_s=step_s,
        whole_s=whole_s,
        findings=tuple(findings),
        others=tuple(small),
        together=Cost.of(together),
        mended=Cost.of(mended),
        healthy_s=healthy_s,
        noise_s=max(0.0, step_s - statistics.fmean(together) - statistics.fmean(quiet)),
        exposed_s=max(0.0, step_s - statistics.fmean(no_transfers)),
        waiting_s=max(0.0, step_s - computing_s - host_s),
        computing_s=computing_s,
        host_s=host_s,
    )


def _place_of(one: Finding) -> tuple:
    """Return what findings are sorted by: what all ranks have by accident stands behind what some of them have.

    So does what costs all ranks something without being a fault. Waiting for experts is no accident.
    """
    cause, of = CAUSES[one.kind], one.culprits
    is_shared = cause.is_shared and one.when.when != "warm-up"
    is_structural = cause.structural is not None
    is_accident = not (is_structural or is_shared or of.ranks or of.moves or of.links or one.kind == "slow loads")
    return cause.is_between_calls, one.may_be_noise, is_structural, is_accident, not is_shared, -one.cost.seconds


def _healthy_s(replays: Replays, step_s: float, all_gained_s: float) -> float:
    """Return what a healthy run may gain without what is compared: a share of a step, or what noise alone gains.

    What a rank has in nearly every step, and most have not, is no noise.
    """
    healthy_s, compared = SMALLEST_SHARE * step_s, [kind for kind in replays.excess if CAUSES[kind].compared]
    is_steady = any(steady(floats(replays.by_rank_and_step(kind)), healthy_s)[0] for kind in compared)
    if is_steady or not healthy_s <= all_gained_s < LARGE_SHARE * step_s:
        return healthy_s
    return max(healthy_s, gain_of_noise(replays.graph, replays.usual, replays.walker))


def _split(replays: Replays, kind: CauseKind, shares: Sequence[Share], least_s: float) -> list[Finding]:
    """Return a finding of each part of a kind's cost that is worth a word, at least of the largest one."""
    step_s = statistics.fmean(replays.as_it_was)
    ordered = sorted(shares, key=lambda share: -statistics.fmean(share.gained))
    found = []
    for place, share in enumerate(ordered):
        (now,) = replays.without([{kind: share.removal}])
        alone, behind = Cost.of(_less(replays.as_it_was, now)), Cost.of(share.gained)
        is_hidden = alone.seconds < HIDDEN * behind.seconds
        cost = behind if is_hidden else alone
        if place == 0 or (cost.seconds >= least_s and cost.low_s > 0):
            is_noise = cost.low_s < LEAST_CERTAIN * step_s
            found.append(Finding(kind, share.culprits, share.when, cost, is_hidden, is_noise))
    return found


def _named(finding: Finding, fault: LinkFault | None) -> Finding:
    """Return a finding with its links, and which of their ends are slow, where that is known."""
    if fault is None or not CAUSES[finding.kind].is_of_links:
        return finding
    culprits = replace(finding.culprits, ranks=fault.ranks, links=fault.links, moves=not fault.ranks, words=fault.words)
    return replace(finding, kind=fault.kind, culprits=culprits)


def _of_one_thing(findings: list[Finding], others: list[tuple[CauseKind, float]], whole_s: float) -> list[Finding]:
    """Return the findings without those that another one explains, such as the links' rate where one link is slow."""
    kept = []
    for one in findings:
        explained_s = sum(of.cost.seconds for of in findings if one.kind in CAUSES[of.kind].explains)
        if one.cost.seconds < ANOTHER * explained_s:
            others.append((one.kind, one.cost.share(whole_s)))
        else:
            kept.append(one)
    return kept


def _less(was: Sequence[float], now: Sequence[float]) -> list[float]:
    return [before - after for before, after in zip(was, now, strict=True)]


def gain_of_noise(graph: Graph, usual: Usual, walker: Walker) -> float:
    """Return the seconds of a step that removing all causes gains in runs of the same noise and of no cause.

    In such a run every operation takes what is usual, and the noise of another operation of its kind: what operations
    differ by, without what is due to something, is dealt out anew among the ranks, of each key in each step.
    """
    tables, draw = graph.tables, torch.Generator(device="cpu").manual_seed(0)
    num_steps = len(graph.steps)
    run_places = tables.run_key * num_steps + tables.run_step
    member_places = tables.member_key * num_steps + tables.member_step
    level_busy_s, level_transfer_s = usual.level_busy_s - usual.of_rows_s, usual.level_transfer_s - usual.of_bytes_s
    gains = []
    for _ in range(max(FEWEST_RUNS, min(MOST_RUNS, MOST_OPERATIONS // max(1, len(tables.run_key))))):
        run_of, member_of = (_dealt(places, draw) for places in (run_places, member_places))
        busy_s = (level_busy_s + (usual.busy_s - usual.level_busy_s)[run_of]).clamp(min=0)
        idle_s = (usual.level_idle_s + (usual.idle_s - usual.level_idle_s)[run_of]).clamp(min=0)
        transfer_s = level_transfer_s + (usual.transfer_s - usual.level_transfer_s)[member_of]
        healthy = copy.copy(graph)
        healthy.tables = replace(tables, busy_s=busy_s, idle_s=idle_s, transfer_s=transfer_s)
        found = usual_of(healthy)
        as_it_is = walker.step_times(healthy.tables.run_s, transfer_s)
        without = walker.step_times(
            (found.busy_s - found.of_rows_s + found.idle_s + tables.overhead_s).clamp(min=0),
            found.transfer_s - found.of_bytes_s,
        )
        gains.append(statistics.fmean(as_it_is) - statistics.fmean(without))
    return max(0.0, *gains)


def _dealt(places: Tensor, draw: torch.Generator) -> Tensor:
    """Return for each operation another one (or itself) of the same place, drawn without putting back."""
    shuffled = torch.randperm(len(places), generator=draw)
    found = torch.empty_like(places)
    found[places.argsort(stable=True)] = shuffled[places[shuffled].argsort(stable=True)]
    return found
