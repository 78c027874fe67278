"""One layer's experts and exchanges: its schedule, walked by the simulator with costs from sizes and a cluster.

Under uniform routing all ranks do the same, so the walk needs only one rank of each role: two ranks stand for all ranks
of one level, two nodes of two for two levels. What they send and compute is what each of the real ranks does, and the
link is as slow as it is for so many peers and nodes. So 4096 ranks take as long as two.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import comb

import torch

from tritonmoe.config.overlap import OverlapPlan
from tritonmoe.ops.backends.pair_work import (
    BACKWARD,
    FORWARD,
    WEIGHT_GRADS,
    grad_multiplications,
    multiplications,
    pair_work,
    products_and_elements,
)
from tritonmoe.overlap.schedule import build_backward, build_forward
from tritonmoe.overlap.simulation.cost_model import LayerWork, LinkCosts, StepCosts
from tritonmoe.overlap.simulation.simulator import SimulatedStep, Simulation, simulate, simulate_two_batches
from tritonmoe.overlap.simulation.two_level_work import TwoLevelWork
from tritonmoe.overlap.steps import StepKind
from tritonmoe.tools.planner.cluster import Cluster
from tritonmoe.tools.planner.job import Job
from tritonmoe.tools.planner.operation_costs import (
    FP8_SHARE,
    MAIN_GRAD_BYTES,
    QUANTIZING_BYTES,
    copy_s,
    link_costs,
    link_like,
)
from tritonmoe.tools.planner.transformer_model import Model

__all__ = ["ExchangeTime", "LayerExchange", "Needs", "iter_leaf_steps", "needs_of", "probability_needed"]


def probability_needed(held: Sequence[int], group_size: int, top_k_groups: int, top_k: int) -> float:
    """Return how probable it is that a token needs at least one of a place's experts.

    A token's K experts are drawn uniformly from those of top_k_groups groups, which are drawn uniformly before. For one
    group that is 1 - C(E - e, K) / C(E, K) with e experts in the place.

    Args:
        held: for every group, how many of its experts stand in the place.
    Example:
        4 experts in 2 groups, of which 1 is chosen, K = 1, the place holds one expert: 1/4.
    """
    # ways[n][e]: in how many ways n groups are chosen of those seen so far, with e experts of the place among them.
    ways: list[dict[int, int]] = [{0: 1}] + [{} for _ in range(top_k_groups)]
    for experts in held:
        for chosen in range(top_k_groups, 0, -1):
            for before, count in ways[chosen - 1].items():
                ways[chosen][before + experts] = ways[chosen].get(before + experts, 0) + count
    candidates = group_size * top_k_groups
    total = comb(candidates, top_k)
    without = sum(count * comb(candidates - experts, top_k) for experts, count in ways[top_k_groups].items())
    return 1 - without / (total * comb(len(held), top_k_groups))


@dataclass(frozen=True)
class Needs:
    """What a token needs, on average over the ranks; with recorded routing on the busiest rank."""

    of_rank: float
    """How probable it is that it needs one given rank."""
    of_node: float
    """How probable it is that it needs any rank of one given node."""
    imbalance: float = 1.0
    """The pairs of the busiest rank, over the mean."""


@cache
def needs_of(model: Model, num_ranks: int, node_size: int, load: Sequence[float] = ()) -> Needs:
    """Return what tokens need of num_ranks ranks, each with E / num_ranks experts that stand side by side.

    load: the share of all pairs that each expert gets, as recorded; () for uniform routing. A place with a share q of
        the pairs is then taken to be needed with probability 1 - (1 - q) ** K.
    Raises:
        ValueError: the ranks can't share the experts evenly.
    """
    if model.num_experts % num_ranks:
        raise ValueError(
            f"{model.num_experts} experts can't be shared evenly by {num_ranks} ranks: choose a number of ranks that "
            "divides them"
        )
    node_size = min(node_size, num_ranks)
    per_rank = model.num_experts // num_ranks

    def mean(experts: int) -> float:
        """Return the mean over the places that hold so many experts, in order."""
        group_size = model.num_experts // model.num_groups
        places: Counter[tuple[int, ...]] = Counter()
        for start in range(0, model.num_experts, experts):
            ends = ((g * group_size, (g + 1) * group_size) for g in range(model.num_groups))
            held = (max(0, min(start + experts, last) - max(start, first)) for first, last in ends)
            places[tuple(sorted(held))] += 1  # which groups they are makes no difference
        needed = {held: probability_needed(held, group_size, model.top_k_groups, model.top_k) for held in places}
        return sum(count * needed[held] for held, count in places.items()) / places.total()

    if not load:
        return Needs(mean(per_rank), mean(per_rank * node_size))
    shares = [sum(load[start : start + per_rank]) for start in range(0, model.num_experts, per_rank)]
    nodes = [sum(shares[start : start + node_size]) for start in range(0, num_ranks, node_size)]
    rank, node = (1 - (1 - max(of)) ** model.top_k for of in (shares, nodes))
    return Needs(rank, node, max(shares) * num_ranks)


@dataclass(frozen=True)
class ExchangeTime:
    """What a layer's experts take with their exchanges, forward and backward."""

    forward_s: float
    backward_s: float
    exposed_forward_s: float
    """The time in which nothing is computed."""
    exposed_backward_s: float
    again_s: float
    """Of a forward that recompute="full" runs again: each half of two batches by itself, with nothing beside it."""
    exposed_again_s: float

    @property
    def total_s(self) -> float:
        return self.forward_s + self.backward_s

    @property
    def exposed_s(self) -> float:
        return self.exposed_forward_s + self.exposed_backward_s

    def times(self, factor: float) -> "ExchangeTime":
        """Return what takes so many times as long."""
        return ExchangeTime(*(factor * seconds for seconds in vars(self).values()))


class LayerExchange:
    """The experts of one layer on one of ep ranks, for one cluster: what they send and compute, and what that costs.

    num_levels: 2 sends a token once to every node, and from there to the ranks of the node.
    tokens: T on each rank; the job's where it is None.
    shared_s: the forward of a shared expert, which runs under the first dispatch and the last combine.
    """

    def __init__(
        self, job: Job, cluster: Cluster, num_levels: int, *, tokens: float | None = None, shared_s: float = 0.0
    ) -> None:
        self.job, self.cluster, self.shared_s = job, cluster, shared_s
        self.tokens = job.num_tokens if tokens is None else tokens
        self.needs = needs_of(job.model, job.ep, cluster.gpus_per_node, job.load)
        if job.sends_pairs:
            per_rank = job.model.top_k / job.ep
            node_size = min(job.ep, cluster.gpus_per_node)
            self.needs = Needs(per_rank, per_rank * node_size, self.needs.imbalance)
        self.num_pairs = self.tokens * job.model.top_k * self.needs.imbalance
        self.work: LayerWork | TwoLevelWork
        self.work, self.link = self._one_level(self.needs) if num_levels == 1 else self._two_levels(self.needs)
        self.costs = self._step_costs()

    @property
    def row_bytes(self) -> int:
        """Of a row in the forward's dispatch."""
        return self.job.wires.row_bytes(self.job.model.hidden_size)[0] + self.cluster.row_header_bytes

    @property
    def gradient_row_bytes(self) -> int:
        """Of a row of the outputs' gradients on its way to the experts."""
        return self.job.wires.row_bytes(self.job.model.hidden_size)[1] + self.cluster.row_header_bytes

    @property
    def wide_row_bytes(self) -> int:
        """Of a row in the other exchanges, and inside a node of two levels: in the job's own dtype."""
        return self.job.wires.row_bytes(self.job.model.hidden_size)[2] + self.cluster.row_header_bytes

    @property
    def num_fillers(self) -> int:
        """How many steps a forward has for the shared expert."""
        return 2 if self.shared_s else 0

    def travelling_s(self) -> tuple[float, float]:
        """Return what the busiest link needs for the rows of a forward and of a backward, however they are cut."""
        levels: list[tuple[tuple[LayerWork, ...], LinkCosts]]
        if isinstance(self.work, TwoLevelWork):
            levels = [((self.work.outer,), self.link), ((self.work.own, self.work.relayed), self.work.link)]
        else:
            levels = [((self.work,), self.link)]

        def busiest_s(*ways: StepKind) -> float:
            return max(
                sum(
                    float((of.rows.sum(1) - of.rows.diagonal()).max()) * of.bytes_per_row(way)
                    for of in works
                    for way in ways
                )
                / link.bytes_per_s
                for works, link in levels
            )

        return (
            busiest_s(StepKind.DISPATCH, StepKind.COMBINE),
            busiest_s(StepKind.COMBINE_BACKWARD, StepKind.DISPATCH_BACKWARD),
        )

    def time(self, plan: OverlapPlan) -> ExchangeTime:
        """Return what the layer takes under a plan."""
        forward = simulate(build_forward(plan, self.num_fillers), plan, self.work, self.costs, self.link)
        backward_schedule = build_backward(plan, needs_x=True, needs_topk_weights=True)
        backward = simulate(backward_schedule, plan, self.work, self.costs, self.link)
        # Ranks agree before each pass: an exchange of a few bytes that nothing hides.
        agreeing = self.link.latency_s if self.job.ep > 1 else 0.0
        seconds = [simulation.total_s + agreeing for simulation in (forward, backward)]
        exposed = [max(0.0, s - _computing_s(of)) for s, of in zip(seconds, (forward, backward), strict=True)]
        again = [seconds[0], exposed[0]]
        return ExchangeTime(*seconds, *exposed, *again)

    def time_of_two_batches(self, plan: OverlapPlan, beside_s: tuple[float, float], num_layers: int) -> ExchangeTime:
        """Return what one of so many layers takes with both halves of a batch, whose tokens are half of the job's.

        What the model computes of a half beside each layer, forward and backward (beside_s), hides exchanges, and is
        not counted.
        """
        walked = simulate_two_batches(
            plan, self.work, self.costs, self.link, beside_s, num_layers, num_fillers=self.num_fillers
        )
        seconds = [of.total_s / num_layers - 2 * beside for of, beside in zip(walked, beside_s, strict=True)]
        exposed = [max(0.0, s - _computing_s(of) / num_layers) for s, of in zip(seconds, walked, strict=True)]
        alone = self.time(plan)
        again = [2 * alone.again_s, 2 * alone.exposed_again_s]
        return ExchangeTime(*seconds, *exposed, *again)

    def _one_level(self, needs: Needs) -> tuple[LayerWork, LinkCosts]:
        ranks, tokens = self.job.ep, self.tokens
        inside_ranks = min(ranks, self.cluster.gpus_per_node)
        row = tokens * needs.of_rank
        inside, cross = (inside_ranks - 1) * row, (ranks - inside_ranks) * row
        link = link_costs(self.cluster, ranks, inside * self.row_bytes, cross * self.row_bytes)
        own_pairs = self.num_pairs / ranks
        if ranks == 1:
            return self._work([[row]], [[own_pairs]]), LinkCosts(0.0, float("inf"))
        return self._work(_mirrored(row, inside + cross), _mirrored(own_pairs, self.num_pairs - own_pairs)), link

    def _two_levels(self, needs: Needs) -> tuple[TwoLevelWork, LinkCosts]:
        ranks, node_size, tokens = self.job.ep, self.cluster.gpus_per_node, self.tokens
        nodes = ranks // node_size
        if nodes < 2 or node_size < 2:
            raise ValueError(f"{ranks} ranks in nodes of {node_size} have no two levels")
        row, to_node = tokens * needs.of_rank, tokens * needs.of_node
        own_pairs = self.num_pairs / ranks
        near, far = own_pairs * node_size, own_pairs * (ranks - node_size)
        # Ranks 0, 1 are one node, 2, 3 another one; the second of each stands for all other ranks of the node.
        outer_rows = [[0.0] * 4 for _ in range(4)]
        outer_pairs = [[0.0] * 4 for _ in range(4)]
        own, relayed, own_inside, relayed_pairs = ([[0.0] * 4 for _ in range(4)] for _ in range(4))
        for rank in range(4):
            twin, beside = (rank + 2) % 4, rank ^ 1
            outer_rows[rank][rank], outer_rows[rank][twin] = to_node, (nodes - 1) * to_node
            outer_pairs[rank][rank], outer_pairs[twin][rank] = near, far
            own[rank][rank], own[rank][beside] = row, (node_size - 1) * row
            own_inside[rank][rank], own_inside[beside][rank] = own_pairs, near - own_pairs
            relayed[rank][rank], relayed[rank][beside] = (nodes - 1) * row, (nodes - 1) * (node_size - 1) * row
            relayed_pairs[rank][rank] = far
        all_rows = nodes * (node_size - 1) * row
        inside = link_costs(self.cluster, node_size, all_rows * self.wide_row_bytes, 0.0)
        cross_bytes = (nodes - 1) * to_node * self.row_bytes
        between = self.cluster.between
        fixed, byte_s = between.line(cross_bytes)
        fixed += (nodes - 1) * between.us_per_peer.value * 1e-6
        rate = 1 / (byte_s * (nodes / 2) ** between.decay.value)
        work = TwoLevelWork(
            self._work(outer_rows, outer_pairs),
            self._inside(self._work(own, own_inside)),
            self._inside(self._work(relayed, relayed_pairs)),
            2,
            inside,
        )
        return work, link_like(between, self.cluster, fixed, rate)

    def _inside(self, work: LayerWork) -> LayerWork:
        """Return the work of rows that travel inside a node."""
        return replace(work, row_bytes=self.wide_row_bytes, gradient_row_bytes=None)

    def _work(self, rows: list[list[float]], pairs: list[list[float]]) -> LayerWork:
        sent, computed = (torch.tensor(of, dtype=torch.float64, device="cpu") for of in (rows, pairs))
        row_bytes = self.row_bytes, self.job.model.top_k, self.wide_row_bytes
        return LayerWork(sent, computed, *row_bytes, gradient_row_bytes=self.gradient_row_bytes)

    def _step_costs(self) -> StepCosts:
        """Return the seconds of every kind of step: weights and launches are fixed, arithmetic and rows per unit."""
        job, gpu = self.job, self.cluster.gpu
        d, f, r, b = job.model.hidden_size, job.model.expert_size, job.adapter_rank, job.dtype_bytes
        flops_s = job.expert_peak_flops(self.cluster) * gpu.grouped_efficiency.value
        weight_flops_s = job.peak_flops(self.cluster) * gpu.grouped_efficiency.value
        quantizing = 0.0
        if job.dtype == "fp8" or job.expert_precision is not None:
            flops_s *= FP8_SHARE
            weight_flops_s *= FP8_SHARE if job.dtype == "fp8" else 1.0
            quantizing = QUANTIZING_BYTES * (d + f)
        num_experts = job.model.num_experts // job.ep
        _, weight_bytes = job.weight_bytes(0.0, num_experts * job.model.expert_parameters)
        if job.expert_precision is not None:  # read, and written and read again as codes of half as many bytes
            weight_bytes *= 2
        trained = num_experts * (job.model.expert_parameters if job.frozen is None else job.expert_adapters)

        def moved(num_bytes: float) -> float:
            return copy_s(self.cluster, num_bytes)

        launch = self.cluster.host.us_per_chunk.value * 1e-6
        of_pair = pair_work(d, f)

        def seconds(names: Sequence[str], flops_s: float, quantizing: float = 0.0) -> float:
            flops, elements = products_and_elements(of_pair, names)
            return flops / flops_s + moved(elements * b + quantizing)

        forward, backward = seconds(FORWARD, flops_s, quantizing), seconds(BACKWARD, flops_s, 2 * quantizing)
        again = seconds(["up"], flops_s) if job.recompute == "experts" else 0.0
        if job.recompute == "selective":
            backward += moved(3 * f * b)
        gradients = seconds(WEIGHT_GRADS, weight_flops_s)
        if job.frozen is not None:
            # Of a pair's adapters: narrow products beside each wide one; what they add is written and read.
            up, down = (0, r * d, r * 2 * f), (0, r * f, r * d)
            through = grad_multiplications(*up, True) + grad_multiplications(*down, True)
            forward += 2 * job.expert_adapters / flops_s + moved(2 * (2 * f + d) * b)
            backward += 2 * through / flops_s + moved(2 * (f + d) * b)
            again += 2 * multiplications(*up) / flops_s + moved(2 * 2 * f * b) if again else 0.0
            gradients = 2 * job.expert_adapters / flops_s + moved((2 * d + 3 * f) * b)
        packing, summing = moved(2 * d * b), moved(d * b)
        moving = moved(job.pair_passes / 2 * d * b)
        return StepCosts(
            {
                StepKind.EXPERTS: launch + moved(weight_bytes),
                StepKind.EXPERTS_BACKWARD: launch + moved(weight_bytes * (1 + (again > 0))),
                StepKind.WEIGHT_GRAD: launch + moved(trained * 2 * MAIN_GRAD_BYTES),
                StepKind.FILLER: self.shared_s / 2,
            },
            {
                StepKind.EXPERTS: forward + moving,
                StepKind.EXPERTS_BACKWARD: backward + again + moving,
                StepKind.WEIGHT_GRAD: gradients,
                StepKind.DISPATCH: packing,
                StepKind.COMBINE_BACKWARD: packing,
                StepKind.REDUCE: summing,
                StepKind.REDUCE_BACKWARD: summing,
            },
        )


def _mirrored(own: float, other: float) -> list[list[float]]:
    return [[own, other], [other, own]]


def _computing_s(simulation: Simulation) -> float:
    """Return what all steps on the compute lane take together, each on its slowest rank."""
    computed = (step for step in iter_leaf_steps(simulation.steps) if step.step.lane == "compute")
    return sum(float((step.end_s - step.start_s).max()) for step in computed)


def iter_leaf_steps(steps: Sequence[SimulatedStep]) -> Iterator[SimulatedStep]:
    """Yield every step that has none inside it: one with steps inside its node is replaced by those."""
    for step in steps:
        if step.inside:
            yield from iter_leaf_steps(step.inside)
        else:
            yield step
