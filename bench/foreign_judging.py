"""Whether a verdict on another trainer's run is right: against what was wrong, and what steps without it took."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bench.foreign_scenarios import Scenario, is_held_out
from tritonmoe.tools.doctor.attribution import Verdict

__all__ = ["CLOSE", "LEAST_SHARE", "Judgement", "judge", "lines", "totals"]

LEAST_SHARE = 0.15
CLOSE = 0.15
SAME = {"host overhead": ("late rank", "host overhead")}
"""What passes between operations is one thing, in one place or in many."""


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
    two_levels: bool | None = None
    """Of two hosts: whether two levels are offered where they help alone."""

    def plain(self) -> dict[str, Any]:
        return asdict(self)


def judge(scenario: Scenario, found: Verdict, true_share: float) -> Judgement:
    """Compare a verdict with what was wrong, and with what the steps without it took less."""
    graph = found.graph
    said = "; ".join(
        f"{one.kind} {[graph.ranks[rank] for rank in one.culprits.ranks]}{' moves' if one.culprits.moves else ''} "
        f"{one.when.when}{f' {one.when.period}' if one.when.period else ''} {one.cost.share(found.replayed_s):.0%}"
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
    first = found.findings[0] if found.findings else None
    fitting = [fault for fault in scenario.faults if first and first.kind in SAME.get(fault.kind, (fault.kind,))]
    result.cause = bool(fitting)
    if first is None or not fitting:
        return result
    named = {graph.ranks[rank] for rank in first.culprits.ranks} or set(graph.ranks)
    meant = set().union(*(fault.ranks for fault in fitting))
    if first.kind == "slow link":
        result.culprits = bool(first.culprits.ranks) and named <= meant
    else:
        result.culprits = first.culprits.moves if not meant else named == meant
    fault = fitting[0]
    result.when = first.when.when == fault.when and (fault.when != "periodic" or first.when.period == fault.period)
    result.gain = abs(promised - true_share) <= CLOSE * true_share
    return result


def lines(judged: Sequence[Judgement]) -> list[str]:
    """Return a line for each scenario."""
    found = []
    for one in judged:
        marks = " ".join(
            f"{name} {'-' if value is None else 'right' if value else 'WRONG'}"
            for name, value in (
                ("cause", one.cause),
                ("who", one.culprits),
                ("when", one.when),
                ("gain", one.gain),
                ("two levels", one.two_levels),
            )
            if name != "two levels" or value is not None
        )
        scenario = one.scenario
        found.append(
            f"{scenario.trainer}: {scenario.name} (seed {scenario.seed}, {scenario.num_ranks} ranks): {marks}; "
            f"true {one.true_share:.0%}, promised {one.promised_share:.0%}; said: {one.said}"
        )
    return found


def totals(judged: Sequence[Judgement]) -> list[dict[str, Any]]:
    """Return the figures of each trainer, of the kinds held out, and of all: (right, asked) of each question."""
    groups = {trainer: [one for one in judged if one.scenario.trainer == trainer] for trainer in _trainers(judged)}
    groups["kinds held out"] = [one for one in judged if is_held_out(one.scenario.name)]
    groups["all"] = list(judged)
    found = []
    for name, own in groups.items():
        faulty = [one for one in own if one.scenario.faults]
        found.append({
            "of": name,
            "scenarios": len(own),
            "cause": _rate([one.cause for one in faulty]),
            "ranks": _rate([one.culprits for one in faulty]),
            "when": _rate([one.when for one in faulty]),
            "healthy silent": _rate([one.cause for one in own if not one.scenario.faults]),
            "gain": _rate([one.gain for one in faulty]),
        })  # fmt: skip
        if any(one.two_levels is not None for one in own):
            found[-1]["two levels"] = _rate([one.two_levels for one in own])
    return found


def _trainers(judged: Sequence[Judgement]) -> list[str]:
    return list(dict.fromkeys(one.scenario.trainer for one in judged))


def _rate(values: Sequence[bool | None]) -> list[int]:
    known = [value for value in values if value is not None]
    return [sum(known), len(known)]
