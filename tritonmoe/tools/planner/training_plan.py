"""plan(): what a training step would take on a cluster, for the best ways to spread a model, and how sure that is."""

import statistics
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

from tritonmoe.config.overlap import OverlapPlan
from tritonmoe.runtime.files import Json
from tritonmoe.tools.planner.cluster import Cluster, Estimate
from tritonmoe.tools.planner.draws import Draw, Drawn, are_unlike, draw, interval, told_by, uncertainties
from tritonmoe.tools.planner.exchange_curve import SERIAL, ExchangeCurve
from tritonmoe.tools.planner.job import Job, Recompute
from tritonmoe.tools.planner.operation_costs import layer_parts
from tritonmoe.tools.planner.plan_search import Free, Spread, Way, left_out, search, with_cluster
from tritonmoe.tools.planner.step import StepTime, step_with
from tritonmoe.tools.planner.transformer_model import flops_per_token

__all__ = [
    "USUAL",
    "Choice",
    "Measured",
    "Plan",
    "Prediction",
    "Sensitivity",
    "expected_time",
    "plan",
    "predict",
    "sensitivities",
    "usd_per_million_tokens",
]


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


NUM_DRAWS = 200
"""So many sets of numbers are drawn from the intervals; the same ones for every choice."""
MORE_DRAWS = 5
"""Where a step was measured: so many times as many, of which it leaves the likely ones."""
CONTENDERS = 6
"""So many of the fastest choices are compared in every draw, and for every estimate."""
MOST_CHOICES = 16
"""So many ways to spread the model are predicted with intervals."""
LEFT_OUT = "what the model leaves out"
"""The part of a step by which published ones were longer."""
USUAL = Draw({}, 0.0, 0.0).error()
"""How many times as long as the model says a step usually takes."""


@dataclass(frozen=True)
class Choice:
    """One way to spread a model and to run its exchanges."""

    tp: int
    pp: int
    ep: int
    recompute: Recompute
    micro_batches: int
    gpus_per_node: int
    """That are used."""
    num_levels: int
    overlap: OverlapPlan

    def __str__(self) -> str:
        sizes = self.overlap.chunk_sizes
        chunks = str(len(sizes)) if len(set(sizes)) == 1 else f"{len(sizes)} ramp"
        levels = "two levels" if self.num_levels == 2 else "one level"
        return f"tp={self.tp}, pp={self.pp}, ep={self.ep}, {levels}, recompute {self.recompute}, chunks {chunks}"


Interval = tuple[float, float]
"""Holds a number four times of five."""


@dataclass(frozen=True)
class Prediction:
    """What is predicted for one choice."""

    choice: Choice
    time: StepTime
    step_interval_s: Interval
    layer_interval_s: Interval
    exchange_s: float
    """All exchanges of rows of a step, hidden or not."""
    exchange_interval_s: Interval
    exposed_interval_s: Interval
    serial_s: float
    """The step if nothing ran beside an exchange."""
    serial_interval_s: Interval
    between_nodes_s: float
    """By how much a step of the same layout would be shorter if whatever travels between nodes took no time."""
    memory_gib: float
    fits: bool
    gpus_used: int
    mfu: float
    """The model's own arithmetic over what the GPUs could do in that time."""
    usd_per_million_tokens: float
    """For all GPUs of the cluster, used or not."""
    draws_s: tuple[float, ...]
    """The step's time in each draw."""

    @property
    def tokens_per_s_per_gpu(self) -> float:
        return self.time.tokens_per_s / self.gpus_used


@dataclass(frozen=True)
class Measured:
    """A step of a job that was run, of any size; its degrees are those of the job."""

    job: Job
    cluster: Cluster
    tokens_per_s: float
    """Of all its GPUs."""

    @property
    def step_s(self) -> float:
        return self.job.tokens_per_step(self.cluster) / self.tokens_per_s

    def narrow(self, draws: Sequence[Draw]) -> list[Draw]:
        """Return draws as likely as the measured step makes them. Raises ValueError where none can be."""
        (one, *_), _ = search(self.job, self.cluster, [self.job.ep])
        curve = ExchangeCurve(one.job, one.cluster, one.num_levels, one.overlap)
        taken = [Drawn.of(of.job(one.job), one.cluster.scaled(of.factors), (curve, curve)) for of in draws]
        return [of for _, of in told_by(draws, [of.time.step_s for of in taken], self.step_s)]


@dataclass(frozen=True)
class Plan:
    """The predictions for the best choices, the fastest that fits first."""

    job: Job
    cluster: Cluster
    free: Free
    predictions: list[Prediction]
    num_found: int
    """The ways to spread the model that there are, predicted or not."""
    stays_best: float
    """In how many draws the best choice is still the fastest that fits, as a share."""
    sensitivities: list[Sensitivity]
    """What to measure first comes first: what may change the choice, then what may change its time. None where nothing
    fits: there is no choice to change."""
    draws: list[Draw]
    measured: Measured | None = None
    """A step that narrowed the draws."""
    left_out: tuple[str, ...] = ()
    """Which ways to spread the model are not among the predictions, and why."""

    @property
    def best(self) -> Prediction:
        return self.predictions[0]

    def to_json(self) -> Json:
        """Return everything as JSON has it."""
        return {
            "model": self.job.model.name,
            "cluster": self.cluster.name,
            "gpus": self.cluster.num_gpus,
            "usd_per_gpu_hour": self.cluster.usd_per_gpu_hour,
            "job": {name: getattr(self.job, name) for name in JOB_FIELDS},
            "free": vars(self.free),
            "draws": len(self.draws),
            "model_error": vars(self.draws[0].model),
            "choices": [_as_json(one, self.cluster) for one in self.predictions],
            "choices_found": self.num_found,
            "left_out": list(self.left_out),
            "measured_tokens_per_s": None if self.measured is None else self.measured.tokens_per_s,
            "stays_best": self.stays_best,
            "measure_next": [vars(one) for one in self.sensitivities],
            "estimates": {
                one.key: {"value": one.value, "source": one.source, "spread": one.spread}
                for one in uncertainties(self.job, self.cluster)
            },
        }


JOB_FIELDS = (
    *("trainer", "sequence", "micro_batch", "micro_batches", "tp", "pp", "stages_in_turn", "recompute", "dtype"),
    *("wire_dtype", "expert_precision", "two_batches", "sends_pairs", "overlaps_exchange", "zero", "imbalance"),
    *("frozen", "adapter_rank", "cuda_graphs"),
)


def _as_json(one: Prediction, cluster: Cluster) -> Json:
    choice, gpu_s = one.choice, one.gpus_used / one.time.tokens
    low, high = one.step_interval_s
    return {
        "tp": choice.tp,
        "pp": choice.pp,
        "ep": choice.ep,
        "recompute": choice.recompute,
        "micro_batches": choice.micro_batches,
        "levels": choice.num_levels,
        "chunk_sizes": list(choice.overlap.chunk_sizes),
        "step_ms": 1e3 * one.time.step_s,
        "step_interval_ms": _ms(one.step_interval_s),
        "layer_ms": 1e3 * one.time.layer_s,
        "layer_interval_ms": _ms(one.layer_interval_s),
        "exchange_ms": 1e3 * one.exchange_s,
        "exchange_interval_ms": _ms(one.exchange_interval_s),
        "exposed_ms": 1e3 * one.time.exposed_s,
        "exposed_interval_ms": _ms(one.exposed_interval_s),
        "serial_step_ms": 1e3 * one.serial_s,
        "serial_interval_ms": _ms(one.serial_interval_s),
        "between_nodes_ms": 1e3 * one.between_nodes_s,
        "tokens_per_s": one.time.tokens_per_s,
        "tokens_per_s_per_gpu": one.tokens_per_s_per_gpu,
        "tokens_per_s_per_gpu_interval": [1 / (high * gpu_s), 1 / (low * gpu_s)],
        "mfu": one.mfu,
        "mfu_interval": [one.mfu * one.time.step_s / high, one.mfu * one.time.step_s / low],
        "gpus_used": one.gpus_used,
        "memory_gib": one.memory_gib,
        "fits": one.fits,
        "usd_per_million_tokens": one.usd_per_million_tokens,
        "usd_per_hour": cluster.usd_per_gpu_hour * cluster.num_gpus,
        "parts_ms": {name: 1e3 * seconds for name, seconds in one.time.parts.items()},
    }


def _ms(of: Interval) -> list[float]:
    return [1e3 * end for end in of]


def plan(
    job: Job,
    cluster: Cluster,
    degrees: Sequence[int] = (),
    *,
    free: Free | None = None,
    num_draws: int | None = None,
    measured: Measured | None = None,
) -> Plan:
    """Predict a job's step on a cluster for the best ways to spread it.

    Each number of expert-parallel ranks is tried, or those of `degrees`, on one level and, where they cover several
    nodes, on two; what else may be chosen says `free`. Each is predicted with the schedule that is fastest for it.
    measured: a step of this or of another size, which tells how far off the estimates and the model are.

    Raises:
        ValueError: a degree fits no choice, or the job fits the cluster with none; or no estimate explains what was
            measured.
    """
    free = free or Free()
    spreads, num_found = search(job, cluster, degrees, free, most=MOST_CHOICES)
    draws = draw(job, cluster, NUM_DRAWS if num_draws is None else num_draws)
    if measured is not None:
        draws = measured.narrow(draw(job, cluster, MORE_DRAWS * len(draws)))[::MORE_DRAWS]
    curves, without = _Curves(), tuple(left_out(job, cluster, degrees, free, spreads))
    told = None if measured is None else measured.job
    predictions = [predict(spread, cluster, draws, curves, told) for spread in spreads]
    if measured is not None:  # which is the fastest may be another one then
        order = sorted(range(len(spreads)), key=lambda n: (not predictions[n].fits, _s_per_token(predictions[n])))
        spreads, predictions = [spreads[n] for n in order], [predictions[n] for n in order]
    if not predictions[0].fits:
        return Plan(job, cluster, free, predictions, num_found, 0.0, [], draws, measured, without)
    contenders = [n for n, one in enumerate(predictions) if one.fits][:CONTENDERS]
    fastest = [
        min(contenders, key=lambda n, k=k: predictions[n].draws_s[k] / predictions[n].time.tokens)  # type: ignore[misc]
        for k in range(len(draws))
    ]
    stays = sum(n == 0 for n in fastest) / len(draws)
    found = sensitivities([(spreads[n], curves.of(spreads[n], spreads[n].overlap)) for n in contenders])
    return Plan(job, cluster, free, predictions, num_found, stays, found, draws, measured, without)


class _Curves:
    """The curves of one search's ways, of which many share one."""

    def __init__(self) -> None:
        self._known: dict[tuple[Hashable, OverlapPlan], ExchangeCurve] = {}

    def of(self, way: Way, overlap: OverlapPlan) -> ExchangeCurve:
        key = (way.exchange_key, overlap)
        if key not in self._known:
            self._known[key] = ExchangeCurve(way.job, way.cluster, way.num_levels, overlap)
        return self._known[key]


def predict(
    spread: Spread, cluster: Cluster, draws: Sequence[Draw], curves: _Curves, measured: Job | None = None
) -> Prediction:
    """Predict one way to spread a job, of whose cluster it may use a part of each node's GPUs.

    measured: the job of which a step told what the draws are.
    """
    job, used = spread.job, spread.cluster
    own, serial = (curves.of(spread, overlap) for overlap in (spread.overlap, SERIAL))
    found = [Drawn.of(one.job(job), used.scaled(one.factors), (own, serial)) for one in draws]
    is_unlike = measured is not None and are_unlike(job, measured)
    errors = [one.error(is_unlike=is_unlike) for one in draws]
    expected = Drawn.of(job, used, (own, serial))
    draws_s = [of.time.step_s * by for of, by in zip(found, errors, strict=True)]
    usual = USUAL if draws[0].told is None else statistics.median(draws_s) / expected.time.step_s
    time, exchange_s = expected_time(spread, usual), expected.exchange_s
    if draws[0].told is not None:
        exchange_s = statistics.median(of.exchange_s for of in found)
        time = replace(time, exposed_s=statistics.median(of.time.exposed_s for of in found))
    choice = Choice(
        *(job.tp, job.pp, job.ep, job.recompute, job.micro_batches, used.gpus_per_node),
        *(spread.num_levels, spread.overlap),
    )
    return Prediction(
        choice,
        time,
        interval(draws_s),
        interval([of.time.layer_s * by for of, by in zip(found, errors, strict=True)]),
        exchange_s,
        interval([of.exchange_s for of in found]),
        interval([of.time.exposed_s for of in found]),
        expected.serial.step_s * usual,
        interval([of.serial.step_s * by for of, by in zip(found, errors, strict=True)]),
        _between_nodes_s(spread) * usual,
        spread.memory_gib,
        spread.fits,
        used.num_gpus,
        flops_per_token(job.model, job.sequence, job.adapter_rank)
        * time.tokens_per_s
        / used.num_gpus
        / job.peak_flops(used),
        usd_per_million_tokens(cluster, time),
        tuple(draws_s),
    )


def _s_per_token(one: Prediction) -> float:
    return one.time.step_s / one.time.tokens if one.fits else 0.0


def expected_time(spread: Spread, usual: float = USUAL) -> StepTime:
    """Return a step as long as published ones say, or a measured one: what the model leaves out is one more part."""
    time, more = spread.time, max(0.0, (usual - 1) * spread.time.step_s)
    less = min(1.0, usual)  # what is faster than the model has every part faster
    parts = {name: seconds * less for name, seconds in time.parts.items()} | ({LEFT_OUT: more} if more else {})
    return replace(time, step_s=sum(parts.values()), layer_s=time.layer_s * usual, parts=parts)


def usd_per_million_tokens(cluster: Cluster, time: StepTime) -> float:
    """Return the price of a million tokens, for all GPUs of the cluster."""
    return cluster.usd_per_gpu_hour * cluster.num_gpus * time.step_s / 3600 / (time.tokens / 1e6)


def _between_nodes_s(spread: Spread) -> float:
    """Return by how much a step of the same layout would be shorter if whatever travels between nodes took no time."""
    used, nothing = spread.cluster, Estimate(0.0, "assumed")
    link = replace(used.between, gb_per_s=1e9, latency_us=nothing, us_per_peer=nothing, curve=())
    return spread.time.step_s - with_cluster(spread, replace(used, between=link)).time.step_s
