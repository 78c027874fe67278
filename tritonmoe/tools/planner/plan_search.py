"""search(): the ways to spread a model over a cluster's GPUs that fit its memory, fastest first."""

from bisect import insort
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from operator import itemgetter
from typing import get_args

from tritonmoe.config.overlap import OverlapPlan, candidate_sizes
from tritonmoe.overlap.tuning.search import preferred
from tritonmoe.tools.planner.cluster import Cluster
from tritonmoe.tools.planner.exchange_curve import SERIAL
from tritonmoe.tools.planner.job import Job, Recompute, expert_degrees
from tritonmoe.tools.planner.job_memory import USABLE_MEMORY, memory_gib
from tritonmoe.tools.planner.layer_exchange import ExchangeTime
from tritonmoe.tools.planner.operation_costs import layer_parts
from tritonmoe.tools.planner.step import ONCE_A_STEP, StepTime, exchange_time, layer_exchange, step_with, walked_layers

__all__ = ["OVERLAPS", "Free", "Spread", "Way", "left_out", "search", "ways", "with_cluster"]

OVERLAPS = (SERIAL, *map(OverlapPlan, candidate_sizes()))
"""The schedules that are tried."""
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
class Way:
    """One way to spread a job: with its degrees set, on as many GPUs of each node as it uses."""

    job: Job
    cluster: Cluster
    num_levels: int
    memory_gib: float

    @property
    def fits(self) -> bool:
        return self.memory_gib <= USABLE_MEMORY * self.cluster.gpu.memory_gib

    @property
    def exchange_key(self) -> Hashable:
        """Equal for ways of one search whose layers take equally long for experts and exchanges."""
        job = self.job
        kept = job.recompute if job.recompute in ("experts", "selective") else ""
        return self.cluster.gpus_per_node, job.tp, job.ep, self.num_levels, kept, job.two_batches and walked_layers(job)


@dataclass(frozen=True)
class Spread(Way):
    """A way with the schedule that is fastest for it."""

    overlap: OverlapPlan
    time: StepTime

    @property
    def s_per_token(self) -> float:
        return self.time.step_s / self.time.tokens


def search(
    job: Job, cluster: Cluster, degrees: Sequence[int] = (), free: Free | None = None, *, most: int = 1
) -> tuple[list[Spread], int]:
    """Return the `most` fastest ways to spread a job that fit its cluster, then those that need least memory, and how
    many ways there are.

    No choice makes another one worse: each way is compared with the schedule that is fastest for it. A way is left out
    without trying its schedules only if the time that no schedule can hide is longer already.

    Raises:
        ValueError: as of ways().
    """
    tried = ways(job, cluster, degrees, free)
    schedules = _Schedules()
    found: list[Spread] = []
    for least, way in sorted(((schedules.least_s_per_token(way), way) for way in tried if way.fits), key=itemgetter(0)):
        if len(found) >= most and least >= found[most - 1].s_per_token:
            break
        insort(found, schedules.fastest(way), key=lambda one: one.s_per_token)
    found = found[:most]
    lacking = sorted((way for way in tried if not way.fits), key=lambda way: way.memory_gib)
    return found + [schedules.fastest(way) for way in lacking[: most - len(found)]], len(tried)


def left_out(job: Job, cluster: Cluster, degrees: Sequence[int], free: Free, shown: Sequence[Spread]) -> Iterator[str]:
    """Yield which ways a search has left out and why, beside those that it shows."""
    tried = ways(job, cluster, degrees, free)
    lacking = [way.memory_gib for way in tried if not way.fits]
    if lacking:
        usable = USABLE_MEMORY * cluster.gpu.memory_gib
        yield f"{len(lacking)} need more than {usable:.0f} GiB of a GPU, {min(lacking):.0f} GiB at least"
    best = sum(one.fits for one in shown)
    if len(tried) - len(lacking) > best:
        yield f"{len(tried) - len(lacking) - best} are slower than the best {best}, with any schedule"
    if free.tp or free.pp:
        tensor, stages = min(cluster.gpus_per_node, MOST_TENSOR_RANKS), min(job.model.num_layers, MOST_STAGES)
        yield f"tp and pp that are no powers of two, tp above {tensor} and pp above {stages} are not tried"
    known = {way.job.ep for way in tried}
    divisors = [ep for ep in range(1, job.model.num_experts + 1) if job.model.num_experts % ep == 0]
    if not degrees and (unlike := [ep for ep in divisors if ep not in known]):
        named = ", ".join(map(str, unlike))
        yield f"ep of {named} can't share {cluster.num_gpus} GPUs in nodes of {cluster.gpus_per_node}"


def with_cluster(spread: Spread, cluster: Cluster) -> Spread:
    """Return the fastest schedule of the same layout on another cluster, on one level or on as many as it has."""
    schedules = _Schedules()
    ways = [Way(spread.job, cluster, levels, spread.memory_gib) for levels in sorted({1, spread.num_levels})]
    return min(map(schedules.fastest, ways), key=lambda one: one.s_per_token)


def ways(job: Job, cluster: Cluster, degrees: Sequence[int] = (), free: Free | None = None) -> list[Way]:
    """Return every way to spread a job over its cluster, on one level, or on two where its ranks cover several nodes.

    Of those that differ in recomputation alone only the first that fits is given, or the one that needs least.
    degrees: the numbers of expert-parallel ranks, each with the choices that it fits; () is all that can be.

    Raises:
        ValueError: one of the degrees fits no choice, or nothing does.
    """
    free = free or Free()
    found: dict[Hashable, Way] = {}
    refused: dict[int, ValueError] = {}
    for used in _used(cluster):
        for one in free.jobs(job, used):
            for ep in sorted(set(degrees)) or expert_degrees(one, used) or [1]:
                try:
                    spread = replace(one, ep=ep)
                    spread.dp(used)
                except ValueError as error:
                    refused.setdefault(ep, error)
                    continue
                two_levels = ep > used.gpus_per_node > 1 and job.overlaps_exchange and not job.sends_pairs
                for num_levels in (1, 2) if two_levels else (1,):
                    key = (used.gpus_per_node, spread.tp, spread.pp, ep, num_levels)
                    if (before := found.get(key)) and before.fits:
                        continue
                    way = Way(spread, used, num_levels, memory_gib(spread, used))
                    if before is None or way.memory_gib < before.memory_gib:
                        found[key] = way
    for ep in set(refused) - {way.job.ep for way in found.values()}:
        raise refused[ep]
    return list(found.values())


def _used(cluster: Cluster) -> list[Cluster]:
    """Return the cluster, and where its nodes have 72 GPUs or so, the one that uses a power of two of each."""
    power = 1 << (cluster.gpus_per_node.bit_length() - 1)
    return [cluster] if power == cluster.gpus_per_node else [cluster, replace(cluster, gpus_per_node=power)]


class _Schedules:
    """What the schedules take of the ways of one search, each walked once."""

    def __init__(self) -> None:
        self._known: dict[tuple[Hashable, OverlapPlan], ExchangeTime] = {}

    def fastest(self, way: Way) -> Spread:
        """Return the schedule whose layer is fastest; of those that are about as fast the one with fewest chunks."""
        tried = OVERLAPS if way.job.ep > 1 and way.job.overlaps_exchange else (SERIAL,)
        overlap = preferred([(self._time(way, one).total_s, one) for one in tried])[0][1]
        return Spread(**vars(way), overlap=overlap, time=self._step(way, self._time(way, overlap)))

    def least_s_per_token(self, way: Way) -> float:
        """Return a time of a step, over its tokens, which no schedule is faster than.

        Nothing computes less than one chunk with no exchange beside it. All rows pass the busiest link, except that
        those of two batches may do so beside what the rest of the model computes.
        """
        job, serial, travelling_s = way.job, self._time(way, SERIAL), (0.0, 0.0)
        if not job.two_batches:
            parts = layer_parts(job, way.cluster)
            travelling_s = layer_exchange(job, way.cluster, way.num_levels, parts).travelling_s()
        forward_s = max(serial.forward_s - serial.exposed_forward_s, travelling_s[0])
        backward_s = max(serial.backward_s - serial.exposed_backward_s, travelling_s[1])
        again_s = max(serial.again_s - serial.exposed_again_s, travelling_s[0])
        time = self._step(way, ExchangeTime(forward_s, backward_s, 0.0, 0.0, again_s, 0.0))
        # A longer backward hides more of the reduction; with interleaved stages by more than it is longer.
        hidden_s = time.parts.get(ONCE_A_STEP[0], 0.0) if way.job.stages_in_turn > 1 else 0.0
        return (time.step_s - hidden_s) / time.tokens

    def _time(self, way: Way, overlap: OverlapPlan) -> ExchangeTime:
        key = (way.exchange_key, overlap)
        if key not in self._known:
            parts = layer_parts(way.job, way.cluster)
            self._known[key] = exchange_time(way.job, way.cluster, way.num_levels, overlap, parts)
        return self._known[key]

    def _step(self, way: Way, exchange: ExchangeTime) -> StepTime:
        return step_with(way.job, way.cluster, layer_parts(way.job, way.cluster), exchange)
