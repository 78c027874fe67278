"""sensitivities(): what it would change if one estimate were at an end of its interval."""

from collections.abc import Sequence
from dataclasses import dataclass

from tritonmoe.tools.planner.draws import Draw, uncertainties
from tritonmoe.tools.planner.exchange_curve import ExchangeCurve
from tritonmoe.tools.planner.layer_parts import layer_parts
from tritonmoe.tools.planner.plan_search import Spread
from tritonmoe.tools.planner.step import step_with

__all__ = ["Sensitivity", "sensitivities"]


@dataclass(frozen=True)
class Sensitivity:
    """What one estimate does to the best choice."""

    key: str
    source: str
    swing: float
    """The best choice's time at the slower end less that at the faster end, over the faster one's."""
    regret: float
    """How much longer than the best choice there the choice made now would take, at the worse end, over its time."""
    ends_s: tuple[float, float]
    """What a token takes at the lower and at the upper end, with the choice that is the best there."""


def sensitivities(contenders: Sequence[tuple[Spread, ExchangeCurve]]) -> list[Sensitivity]:
    """Move each estimate to both ends of its interval, and see what the contenders, best first, take there."""

    def seconds_per_token(one: Spread, curve: ExchangeCurve, draw: Draw) -> float:
        job, cluster = draw.job(one.job), one.cluster.scaled(draw.factors)
        parts = layer_parts(job, cluster)
        time = step_with(job, cluster, parts, curve.time(job, cluster, parts))
        return time.step_s / time.tokens

    found = []
    first = contenders[0][0]
    for number in uncertainties(first.job, first.cluster):
        ends = [
            [seconds_per_token(one, curve, Draw({number.key: factor}, 0.0, 0.0)) for one, curve in contenders]
            for factor in (1 / (1 + number.spread), 1 + number.spread)
        ]
        swing = abs(ends[0][0] - ends[1][0]) / min(ends[0][0], ends[1][0])
        regret = max(own[0] / min(own) - 1 for own in ends)
        low_s, high_s = map(min, ends)
        found.append(Sensitivity(number.key, number.source, swing, regret, (low_s, high_s)))
    return sorted(found, key=lambda one: (one.regret, one.swing), reverse=True)
