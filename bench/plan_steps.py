"""Published steps against the planner's intervals, each family of rows predicted with the error that the others say.

A family is what one publication says of one trainer. Nothing is fitted to a row but the model's own error, to the rows
of the other families. HELD_OUT families were not looked at while the model was first made: they are also
predicted from the other ones alone.
"""

import argparse
import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from bench.published_steps import HELD_OUT, PublishedStep, published_steps
from tritonmoe.tools.benchmarks.argument_types import output_file
from tritonmoe.tools.benchmarks.timing import write_json
from tritonmoe.tools.planner.cluster import NORMAL_90
from tritonmoe.tools.planner.cluster_presets import with_network
from tritonmoe.tools.planner.draws import Draw, Drawn, ModelError, are_unlike, draw, interval, told_by
from tritonmoe.tools.planner.exchange_curve import SERIAL, ExchangeCurve
from tritonmoe.tools.planner.job_memory import memory_gib
from tritonmoe.tools.planner.plan_search import Way

__all__ = ["Walked", "fit", "fits", "leave_one_out", "main", "walk"]

NUM_DRAWS = 200
UNKNOWN_NETWORK = ("ms-swift, A800",)
"""Families that don't say over what NCCL ran; where others don't either, their rates are those of RDMA."""


@dataclass(frozen=True)
class Walked:
    """A published step with what is predicted for it, before the model's own error."""

    step: PublishedStep
    expected_s: float
    draws: Sequence[Draw]
    draws_s: Sequence[float]

    @property
    def gpu_s_per_token(self) -> float:
        return self.expected_s * self.step.cluster.num_gpus / self.step.tokens

    @property
    def residual(self) -> float:
        """The logarithm of measured over the middle of the draws."""
        return math.log(self.step.measured_s / statistics.median(self.draws_s))

    def with_error(self, error: ModelError) -> tuple[float, tuple[float, float]]:
        """Return the predicted step and its 80 % interval, in seconds."""
        pairs = zip(self.draws, self.draws_s, strict=True)
        predicted = self.expected_s * Draw({}, 0.0, 0.0).error(error)
        return predicted, interval([seconds * one.error(error) for one, seconds in pairs])


def walk(step: PublishedStep, is_told: bool = False) -> Walked:
    """Predict a published step, which overlaps nothing unless two halves of a batch run in turn.

    is_told: with the kind of network between nodes, where that is known: RDMA.
    """
    if is_told and step.family not in UNKNOWN_NETWORK:
        step = replace(step, cluster=with_network(step.cluster, "rdma"))
    curve = ExchangeCurve(step.job, step.cluster, step.num_levels, SERIAL)
    draws = draw(step.job, step.cluster, NUM_DRAWS)
    taken = [Drawn.of(one.job(step.job), step.cluster.scaled(one.factors), (curve, curve)) for one in draws]
    expected = Drawn.of(step.job, step.cluster, (curve, curve))
    return Walked(step, expected.time.step_s, draws, [one.time.step_s for one in taken])


def fit(rows: Iterable[Walked]) -> ModelError:
    """Fit the model's own error to rows; every family counts the same.

    Of few families the spread of their means is known badly: it is as much larger as Student's t says.
    """
    rows = list(rows)
    families = by_family(rows)
    residuals = [[one.residual for one in own] for own in families.values()]
    means = [statistics.mean(own) for own in residuals]
    count = len(means)
    few = 1 + 0.78 / (count - 1)  # Student's t of count - 1 degrees over the normal's quantile, at 90 %
    own = math.sqrt(statistics.mean(statistics.variance(of) for of in residuals if len(of) > 1))
    middle = statistics.median(means)
    halves = ([one for one in means if one <= middle], [one for one in means if one >= middle])
    faster, slower = (few * math.sqrt(statistics.mean((one - middle) ** 2 for one in half)) for half in halves)
    return ModelError(middle, faster, slower, own, alike_of(rows))


def alike_of(rows: Iterable[Walked]) -> float:
    """Return the standard deviation of one run about another of its job that is spread and computed alike.

    Few are far apart, so that it is told by how far four in five are at most.
    """
    apart = [abs(one.residual - other.residual) for one, other in alike_pairs(rows)]
    return sorted(apart)[int(0.8 * (len(apart) - 1))] / NORMAL_90 / math.sqrt(2) if apart else 0.0


def pairs_of(rows: Iterable[Walked]) -> Iterator[tuple[Walked, Walked]]:
    """Yield every two runs of one family, model and kind of machine, in both orders."""
    for family in by_family(rows).values():
        for one, other in itertools.permutations(family, 2):
            if (one.step.job.model, one.step.cluster.name) == (other.step.job.model, other.step.cluster.name):
                yield one, other


def nearest_of(rows: Iterable[Walked]) -> Iterator[tuple[Walked, Walked]]:
    """Yield for each run the one of its job that is most like it: in recomputation, dtype, and time of a token."""

    def unlike(one: Walked, other: Walked) -> tuple[bool, bool, float]:
        apart = math.log(one.gpu_s_per_token / other.gpu_s_per_token)
        return (
            one.step.job.recompute != other.step.job.recompute,
            one.step.job.dtype != other.step.job.dtype,
            abs(apart),
        )

    others: dict[int, list[tuple[Walked, Walked]]] = {}
    for pair in pairs_of(rows):
        others.setdefault(id(pair[1]), []).append(pair)
    yield from (min(own, key=lambda pair: unlike(*pair)) for own in others.values())


def alike_pairs(rows: Iterable[Walked]) -> Iterator[tuple[Walked, Walked]]:
    """Yield runs of one job that are spread and computed alike."""
    yield from (pair for pair in pairs_of(rows) if not are_unlike(pair[0].step.job, pair[1].step.job))


Pairs = Callable[[Iterable[Walked]], Iterator[tuple[Walked, Walked]]]
"""(run that was measured, run that is predicted)"""


def with_one_measured(rows: Sequence[Walked], pairs: Pairs) -> list[dict[str, Any]]:
    """Return the prediction of runs from another one of their job, with the error that other families say."""
    found = []
    for family, own in by_family(rows).items():
        error = fit(row for row in rows if row.step.family != family)
        for of, row in pairs(own):
            told = told_by(of.draws, of.draws_s, of.step.measured_s, error)
            is_unlike = are_unlike(of.step.job, row.step.job)
            drawn = [row.draws_s[place] * one.error(error, is_unlike=is_unlike) for place, one in told]
            (low, high), measured = interval(drawn), row.step.measured_s
            error_of = statistics.median(drawn) / measured - 1
            found.append({"low_s": low, "high_s": high, "error": error_of, "inside": low <= measured <= high})
    return found


def fits(step: PublishedStep) -> bool:
    """Return whether the planner says that a published step fits into memory, as it did."""
    return Way(step.job, step.cluster, step.num_levels, memory_gib(step.job, step.cluster)).fits


def by_family(rows: Iterable[Walked]) -> dict[str, list[Walked]]:
    families: dict[str, list[Walked]] = {}
    for row in rows:
        families.setdefault(row.step.family, []).append(row)
    return families


def leave_one_out(rows: Sequence[Walked], fitted_to: Sequence[Walked]) -> list[dict[str, Any]]:
    """Return every row's prediction, with the error fitted to the other families of `fitted_to`."""
    found = []
    for family, own in by_family(rows).items():
        error = fit(row for row in fitted_to if row.step.family != family)
        for row in own:
            predicted, (low, high) = row.with_error(error)
            measured = row.step.measured_s
            found.append(
                {
                    "family": family,
                    "source": row.step.source,
                    "what": row.step.what,
                    "measured_s": round(measured, 4),
                    "walked_s": float(f"{row.expected_s:.5g}"),
                    "predicted_s": float(f"{predicted:.5g}"),
                    "low_s": float(f"{low:.5g}"),
                    "high_s": float(f"{high:.5g}"),
                    "error": round(predicted / measured - 1, 4),
                    "inside": low <= measured <= high,
                }
            )
    return found


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return how many rows lie in their intervals, and how wide those are: the upper end over the lower one."""
    return {
        "rows": len(rows),
        "inside": sum(row["inside"] for row in rows),
        "coverage": round(sum(row["inside"] for row in rows) / len(rows), 4),
        "median_width": round(statistics.median(row["high_s"] / row["low_s"] for row in rows), 3),
        "median_error": round(statistics.median(abs(row["error"]) for row in rows), 4),
    }


def main(argv: list[str] | None = None) -> None:
    """Print every row, then how many lie in their interval."""
    parser = argparse.ArgumentParser(prog="python -m bench.plan_steps", description=__doc__)
    parser.add_argument("--open", action="store_true", help="only the families that were looked at, none held out")
    parser.add_argument("--json", type=output_file, help="also write the figures to this file")
    arguments = parser.parse_args(argv)
    steps = [one for one in published_steps() if not arguments.open or one.family not in HELD_OUT]
    rows = [walk(one) for one in steps]
    seen = [row for row in rows if row.step.family not in HELD_OUT]
    held_out = [row for row in rows if row.step.family in HELD_OUT]
    found = leave_one_out(rows, rows)
    for row in found:
        print(
            f"{row['family']}: {row['what']}: measured {row['measured_s']:.3f} s, predicted {row['predicted_s']:.3f} "
            f"({row['low_s']:.3f} - {row['high_s']:.3f}), {row['error']:+.0%}{'' if row['inside'] else ', OUTSIDE'}"
        )
    summaries = {"open families, each left out": summary(leave_one_out(seen, seen))}
    if held_out:
        summaries["held-out families, from the open ones"] = summary(leave_one_out(held_out, seen))
        summaries["all families, each left out"] = summary(found)
    told = [walk(one, is_told=True) for one in steps]
    known = [row for row in told if row.step.family not in UNKNOWN_NETWORK]
    summaries["with the network's kind, each family left out"] = summary(leave_one_out(known, known))
    summaries["with a step measured that is spread and computed alike"] = summary(with_one_measured(told, alike_pairs))
    summaries["with the most similar step of the job measured"] = summary(with_one_measured(told, nearest_of))
    summaries["with any other step of the job measured"] = summary(with_one_measured(told, pairs_of))
    too_large = [one.what for one in steps if not fits(one)]
    print(f"{len(steps) - len(too_large)} of {len(steps)} runs fit; too large: {'; '.join(too_large) or 'none'}")
    error = fit(rows)
    for name, of in summaries.items():
        print(
            f"{name}: {of['inside']} of {of['rows']} inside ({of['coverage']:.0%}), median width x"
            f"{of['median_width']:.2f}, median error {of['median_error']:.0%}"
        )
    print(f"the model's own error, of all these rows: {error}")
    print(f"the same, of those whose network is known: {fit(known)}")
    results = {
        "fit": {"rows": len(steps), "inside": len(steps) - len(too_large)},
        "summaries": summaries,
        "model_error": asdict(error),
        "known_network_error": asdict(fit(known)),
        "rows": found,
    }
    write_json(arguments.json, "plan_steps", results)


if __name__ == "__main__":
    main()
