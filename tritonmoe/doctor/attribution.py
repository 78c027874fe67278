"""Attribution: what the steps of a run would gain without what is not usual; how much, who, where and when.

First everything at once: if that gains little, the run is healthy, and nothing else is said. Then the kinds of causes,
each without the others and the others without it, since two causes can hide each other. Then who, where and when. Slow
steps are what a verdict is made of: all steps count.
"""

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tritonmoe.doctor.causes import KINDS, CauseKind, Causes
from tritonmoe.doctor.culprits import Culprits, culprits_of
from tritonmoe.doctor.graph import Graph
from tritonmoe.doctor.pattern import FEW_STEPS, Pattern, pattern_of
from tritonmoe.doctor.usual import usual_of

__all__ = ["Cost", "Finding", "Verdict", "attribute"]

SMALLEST_SHARE = 0.05
"""A smaller share of the step is not spoken of."""
MOST_ERROR = 0.10
"""A replay that is further off than this explains nothing."""
NUM_SELECTIONS = 200
INTERVAL = 0.8


@dataclass(frozen=True)
class Cost:
    """Seconds of a step, the mean over all steps."""

    seconds: float
    low_s: float
    """The interval that holds 80 % of what selections of the steps give."""
    high_s: float

    def share(self, step_s: float) -> float:
        return self.seconds / step_s if step_s else 0.0


@dataclass(frozen=True)
class Finding:
    """A cause, and what it costs."""

    kind: CauseKind
    culprits: Culprits
    when: Pattern
    cost: Cost
    is_hidden: bool
    """Whether mending it alone gains little, since another cause holds up the same steps."""


@dataclass(frozen=True)
class Verdict:
    """Why the steps of a run take as long as they do."""

    graph: Graph
    measured_s: float
    """The mean of all steps."""
    replayed_s: float
    findings: tuple[Finding, ...]
    """By their cost."""
    others: tuple[tuple[CauseKind, float], ...]
    """Kinds that are not spoken of, with their shares."""
    together: Cost
    """Without anything that is not usual."""
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
    def is_healthy(self) -> bool:
        return self.can_compare and self.is_explained and not self.findings


def attribute(graph: Graph) -> Verdict:
    """Say why the steps of a run take as long as they do.

    Raises:
        ValueError: ranks wait for each other in a circle: the files contradict each other.
    """
    causes = Causes(graph, usual_of(graph))
    step_s = statistics.fmean(causes.as_it_was)
    together = causes.gained(KINDS)
    least_s = SMALLEST_SHARE * step_s
    findings, others = [], []
    is_ill = statistics.fmean(together) >= least_s
    healthy = [was - gain for was, gain in zip(causes.as_it_was, together, strict=True)]
    for kind in KINDS:
        if causes.is_nothing(kind):
            others.append((kind, 0.0))
            continue
        alone = causes.gained([kind])
        left = causes.without([other for other in KINDS if other != kind]) if is_ill else causes.as_it_was
        hidden = [with_it - without for with_it, without in zip(left, healthy, strict=True)] if is_ill else alone
        most = max(alone, hidden, key=statistics.fmean)
        cost = _cost(most)
        if is_ill and cost.seconds >= least_s and cost.low_s > 0:
            is_hidden = statistics.fmean(alone) < 0.5 * cost.seconds
            others_first = [other for other in KINDS if other != kind] if most is hidden else []
            culprits = culprits_of(causes, kind, most, others_first)
            if kind == "slow link" and graph.slow_links is not None:
                slow = graph.slow_links
                culprits = replace(culprits, ranks=slow.ranks, moves=False, links=slow.links, words=slow.words)
            findings.append(Finding(kind, culprits, pattern_of(most), cost, is_hidden))
        else:
            others.append((kind, cost.share(step_s)))
    findings.sort(key=lambda one: -one.cost.seconds)
    usual = causes.usual
    quiet = causes.walker.step_times(
        [busy + idle for busy, idle in zip(usual.level_busy_s, usual.level_idle_s, strict=True)], usual.level_transfer_s
    )
    no_transfers = causes.walker.step_times(causes.run_s, [min(0.0, one) for one in causes.transfer_s])
    per_step = len(graph.ranks) * len(graph.steps)
    computing_s, host_s = sum(graph.busy_s()) / per_step, sum(graph.idle_s()) / per_step
    return Verdict(
        graph=graph,
        measured_s=statistics.fmean(graph.measured_s),
        replayed_s=step_s,
        findings=tuple(findings),
        others=tuple(others),
        together=_cost(together),
        noise_s=max(0.0, step_s - statistics.fmean(together) - statistics.fmean(quiet)),
        exposed_s=max(0.0, step_s - statistics.fmean(no_transfers)),
        waiting_s=max(0.0, step_s - computing_s - host_s),
        computing_s=computing_s,
        host_s=host_s,
    )


def _cost(gained: Sequence[float], seed: int = 0) -> Cost:
    draw = random.Random(seed)
    means = sorted(statistics.fmean(draw.choices(gained, k=len(gained))) for _ in range(NUM_SELECTIONS))
    aside = int(NUM_SELECTIONS * (1 - INTERVAL) / 2)
    return Cost(statistics.fmean(gained), means[aside], means[-1 - aside])
