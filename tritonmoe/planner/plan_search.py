"""search(): the ways to spread a model over a cluster's GPUs that fit its memory, fastest first."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import get_args

from tritonmoe.config.overlap import OverlapPlan, equal_sizes, ramp_sizes
from tritonmoe.planner.cluster import Cluster
from tritonmoe.planner.exchange_curve import SERIAL
from tritonmoe.planner.job import Job, Recompute, expert_degrees
from tritonmoe.planner.job_memory import USABLE_MEMORY, memory_gb
from tritonmoe.planner.layer_exchange import ExchangeTime
from tritonmoe.planner.layer_parts import layer_parts
from tritonmoe.planner.step import exchange_time, step_with
from tritonmoe.tuning.search import preferred

__all__ = ["OVERLAPS", "Free", "Spread", "best_overlap", "search"]

OVERLAPS = (
    SERIAL,
    *(OverlapPlan(equal_sizes(count)) for count in (1, 2, 3, 4, 6, 8, 12)),
    *(OverlapPlan(ramp_sizes(count)) for count in (4, 6, 8)),
)
"""The schedules that are tried."""
FIRST_TRIED = OverlapPlan(equal_sizes(3))
"""The one with which ways to spread a model are compared before all are tried."""
MOST_STAGES, MOST_TENSOR_RANKS = 32, 8


@dataclass(frozen=True)
class Free:
    """What may be chosen beside the number of expert-parallel ranks; what may not is as the job has it."""

    tp: bool = False
    pp: bool = False
    recompute: bool = False

    def jobs(self, job: Job, cluster: Cluster) -> Iterator[Job]:
        """Return the job with every choice, all with as many tokens a step, the least recomputation first."""
        tps = _powers(min(cluster.gpus_per_node, MOST_TENSOR_RANKS)) if self.tp else [job.tp]
        pps = _powers(min(job.model.num_layers, MOST_STAGES, cluster.num_gpus)) if self.pp else [job.pp]
        recomputes: Sequence[Recompute] = get_args(Recompute) if self.recompute else [job.recompute]
        if job.trainer != "ours":  # keeping only the experts' input is this package's own
            recomputes = [how for how in recomputes if how != "experts" or not self.recompute]
        for tp, pp, recompute in product(tps, pps, recomputes):
            more = tp * pp / (job.tp * job.pp)
            if job.sequence * job.micro_batch >= tp and pp * job.stages_in_turn <= job.model.num_layers:
                count = max(1, round(job.micro_batches * more))
                yield replace(job, tp=tp, pp=pp, recompute=recompute, micro_batches=count)


def _powers(most: int) -> list[int]:
    return [1 << n for n in range(most.bit_length())]


@dataclass(frozen=True)
class Spread:
    """One way to spread a job: with its degrees set, on as many GPUs of each node as it uses."""

    job: Job
    cluster: Cluster
    num_levels: int
    memory_gb: float
    tokens_per_s: float
    """With the first schedule that is tried."""

    @property
    def fits(self) -> bool:
        return self.memory_gb <= USABLE_MEMORY * self.cluster.gpu.memory_gb


def search(job: Job, cluster: Cluster, degrees: Sequence[int] = (), free: Free | None = None) -> list[Spread]:
    """Return the ways to spread a job that fit its cluster, fastest first, then those that lack memory, least first.

    Of those that differ in recomputation alone only the first that fits is given, or the one that needs least.
    degrees: the numbers of expert-parallel ranks; () is all that can be.

    Raises:
        ValueError: the GPUs can't be shared so.
    """
    free = free or Free()
    found: dict[tuple[int, ...], Spread] = {}
    known: dict[tuple[object, ...], ExchangeTime] = {}
    refused: ValueError | None = None
    for used in _used(cluster):
        for one in free.jobs(job, used):
            try:
                spreads = _levels(one, used, degrees)
            except ValueError as error:
                refused = refused or error
                continue
            for spread, num_levels in spreads:
                key = (used.gpus_per_node, spread.tp, spread.pp, spread.ep, num_levels)
                if (before := found.get(key)) and before.fits:
                    continue
                memory = memory_gb(spread, used)
                if before is None or memory < before.memory_gb:
                    found[key] = Spread(
                        spread, used, num_levels, memory, _tokens_per_s(spread, used, num_levels, known)
                    )
    if not found:
        raise refused or ValueError(f"no number of expert-parallel ranks fits {job.model.num_experts} experts")
    return sorted(found.values(), key=lambda one: (not one.fits, -one.tokens_per_s if one.fits else one.memory_gb))


def _used(cluster: Cluster) -> list[Cluster]:
    """Return the cluster, and where its nodes have 72 GPUs or so, the one that uses a power of two of each."""
    power = 1 << (cluster.gpus_per_node.bit_length() - 1)
    return [cluster] if power == cluster.gpus_per_node else [cluster, replace(cluster, gpus_per_node=power)]


def _levels(job: Job, cluster: Cluster, degrees: Sequence[int]) -> list[tuple[Job, int]]:
    """Return every (job with its ep, levels) that is tried; ValueError where none can be."""
    if degrees:
        jobs = [replace(job, ep=ep) for ep in sorted(set(degrees))]
        for one in jobs:
            one.dp(cluster)
    else:
        jobs = [replace(job, ep=ep) for ep in expert_degrees(job, cluster)]
        if not jobs:
            replace(job, ep=1).dp(cluster)
    node = cluster.gpus_per_node
    two_levels = job.overlaps_exchange and not job.sends_pairs
    return [(one, n) for one in jobs for n in ((1, 2) if one.ep > node > 1 and two_levels else (1,))]


def _tokens_per_s(job: Job, cluster: Cluster, num_levels: int, known: dict[tuple[object, ...], ExchangeTime]) -> float:
    parts = layer_parts(job, cluster)
    same = job.recompute if job.recompute in ("experts", "selective") else ""
    key = (cluster.gpus_per_node, job.tp, job.ep, num_levels, same, min(job.pp, 2) if job.two_batches else 1)
    if key not in known:
        known[key] = exchange_time(job, cluster, num_levels, _overlaps(job, [FIRST_TRIED])[0], parts)
    return step_with(job, cluster, parts, known[key]).tokens_per_s


def best_overlap(spread: Spread) -> OverlapPlan:
    """Return the schedule whose layer is fastest; of those that are about as fast the one with fewest chunks."""
    job = spread.job
    parts = layer_parts(job, spread.cluster)
    tried = _overlaps(job, OVERLAPS)
    if len(tried) == 1:
        return tried[0]
    found = [(exchange_time(job, spread.cluster, spread.num_levels, one, parts).total_s, one) for one in tried]
    return preferred(found)[0][1]


def _overlaps(job: Job, tried: Sequence[OverlapPlan]) -> Sequence[OverlapPlan]:
    """Return the schedules that a job can run, of those tried."""
    if not job.overlaps_exchange:
        return [SERIAL]
    return tried if job.ep > 1 else OVERLAPS[:1]
