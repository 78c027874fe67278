"""Scenarios of a plain MoE under another trainer: what is wrong with it, and whether a verdict says so."""

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from tritonmoe.doctor.attribution import Verdict

__all__ = ["HELD_OUT", "KINDS", "Fault", "Judgement", "Scenario", "draw", "judge", "table"]


@dataclass(frozen=True)
class Fault:
    """Something that makes steps slow."""

    kind: str
    """slow rank, late rank, slow link or imbalance."""
    ranks: tuple[int, ...]
    """Who; of a slow link sender and receiver; empty: another rank in each step."""
    amount: float
    """slow rank: how many times as long; late rank: seconds; slow link: its rate is so many times less; imbalance: the
    share of all tokens that chooses the rank."""
    when: str = "always"
    """always, growing, periodic, at random."""
    period: int = 0
    phase: str = ""
    """forward or backward alone; empty: both."""
    layer: int | None = None
    """In one layer alone."""

    def level(self, step: int, num_steps: int, rank: int, num_ranks: int, seed: int) -> float:
        """Give how much of the fault there is on a rank in a step, from 0 to 1."""
        draw = random.Random(seed * 1000 + step)
        if not self.ranks:
            if rank != draw.randrange(num_ranks):
                return 0.0
        elif self.kind != "slow link" and rank not in self.ranks:
            return 0.0
        if self.when == "periodic":
            return float(step % self.period == self.period - 1)
        if self.when == "growing":
            return (step + 0.5) / num_steps
        if self.when == "at random":
            return float(draw.random() < 0.3)
        return 1.0


@dataclass(frozen=True)
class Scenario:
    """A run of a plain MoE, with what is wrong with it."""

    name: str
    seed: int
    num_ranks: int = 4
    num_layers: int = 2
    num_steps: int = 12
    faults: tuple[Fault, ...] = field(default=())

    def plain(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def of(plain: dict[str, Any]) -> "Scenario":
        faults = tuple(Fault(**{**one, "ranks": tuple(one["ranks"])}) for one in plain["faults"])
        return Scenario(**{**plain, "faults": faults})


KINDS = (
    "healthy", "slow rank", "late rank", "slow link", "imbalance", "late periodic", "two late", "slow backward",
    "late growing", "late moving", "slow and late", "late in one layer", "two slow", "slow periodic",
    "healthy of many layers",
)  # fmt: skip
HELD_OUT = ("late growing", "two slow", "slow periodic", "late in one layer", "slow and late")
"""Kinds that the method was not made with."""


def draw(kind: str, seed: int, num_ranks: int = 4) -> Scenario:
    """Give a random scenario of a kind."""
    of = random.Random(f"{kind} {seed}")
    one, other = of.sample(range(num_ranks), 2)
    late = of.choice((0.06, 0.1))
    slow = of.choice((2.0, 3.0))
    faults: dict[str, tuple[Fault, ...]] = {
        "slow rank": (Fault("slow rank", (one,), slow),),
        "late rank": (Fault("late rank", (one,), late),),
        "slow link": (Fault("slow link", (one, other), of.choice((4.0, 8.0))),),
        "imbalance": (Fault("imbalance", (one,), 0.7),),
        "late periodic": (Fault("late rank", (one,), 4 * late, "periodic", of.choice((3, 4, 5))),),
        "two late": (Fault("late rank", tuple(sorted((one, other))), late),),
        "slow backward": (Fault("slow rank", (one,), 1 + 1.5 * (slow - 1), phase="backward"),),
        "late growing": (Fault("late rank", (one,), 2 * late, "growing"),),
        "late moving": (Fault("late rank", (), late),),
        "slow and late": (Fault("slow rank", (one,), slow), Fault("late rank", (other,), late)),
        "late in one layer": (Fault("late rank", (one,), late, phase="forward", layer=1),),
        "two slow": (Fault("slow rank", tuple(sorted((one, other))), slow),),
        "slow periodic": (Fault("slow rank", (one,), 2 * slow, "periodic", of.choice((3, 4))),),
    }
    layers = 4 if kind == "healthy of many layers" else of.choice((2, 3))
    return Scenario(kind, seed, num_ranks, layers, faults=faults.get(kind, ()))


@dataclass
class Judgement:
    """Whether a verdict is right."""

    scenario: Scenario
    true_share: float
    """What the step is shorter without all faults."""
    said: str
    cause: bool | None
    """Whether a true cause stands first; of a healthy run whether nothing is found; None: too small to be asked for."""
    culprits: bool | None
    when: bool | None
    gain: bool | None
    promised_share: float


LEAST_SHARE = 0.15
CLOSE = 0.15


def judge(scenario: Scenario, found: Verdict, true_share: float) -> Judgement:
    """Compare a verdict with what was wrong, and with what the steps without it took less."""
    graph = found.graph
    said = "; ".join(
        f"{one.kind} {[graph.ranks[rank] for rank in one.culprits.ranks]}{' moves' if one.culprits.moves else ''} "
        f"{one.when.when} {one.cost.share(found.replayed_s):.0%}"
        for one in found.findings
    )
    which = found.findings[0].cost if len(scenario.faults) == 1 and found.findings else found.together
    promised = which.share(found.replayed_s)
    result = Judgement(scenario, true_share, said or "healthy", None, None, None, None, promised)
    if not scenario.faults:
        result.cause = not found.findings
        return result
    if true_share < LEAST_SHARE:
        return result
    if not found.findings:
        result.cause = False
        return result
    first = found.findings[0]
    fitting = [fault for fault in scenario.faults if fault.kind == first.kind]
    result.cause = bool(fitting)
    if not fitting:
        return result
    fault = fitting[0]
    named = {graph.ranks[rank] for rank in first.culprits.ranks}
    if fault.kind == "slow link":
        result.culprits = bool(named) and named <= set(fault.ranks)
    else:
        result.culprits = first.culprits.moves if not fault.ranks else named == set(fault.ranks)
    if fault.when == "periodic":
        result.when = first.when.when == "periodic" and first.when.period == fault.period
    else:
        result.when = first.when.when == fault.when
    result.gain = abs(promised - true_share) <= CLOSE * true_share
    return result


def table(judged: Sequence[Judgement]) -> str:
    """Give a line for each scenario, and the totals."""
    lines = []
    for one in judged:
        marks = " ".join(
            f"{name} {'-' if value is None else 'right' if value else 'WRONG'}"
            for name, value in (("cause", one.cause), ("who", one.culprits), ("when", one.when), ("gain", one.gain))
        )
        scenario = one.scenario
        lines.append(
            f"{scenario.name} (seed {scenario.seed}, {scenario.num_ranks} ranks): {marks}; true {one.true_share:.0%}, "
            f"promised {one.promised_share:.0%}; said: {one.said}"
        )
    healthy = [one for one in judged if not one.scenario.faults]
    faulty = [one for one in judged if one.scenario.faults]
    asked = [one.cause for one in faulty if one.cause is not None]
    lines.append(
        f"{len(judged)} scenarios: cause of {LEAST_SHARE:.0%} first {_rate(asked)}; "
        f"healthy ones silent {_rate([one.cause for one in healthy])}; "
        f"culprits {_rate([one.culprits for one in faulty])}; pattern in time {_rate([one.when for one in faulty])}; "
        f"gain within {CLOSE:.0%} {_rate([one.gain for one in faulty])}"
    )
    return "\n".join(lines)


def _rate(values: Sequence[bool | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{sum(known)} of {len(known)}"
