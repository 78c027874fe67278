"""What one rank does in the overlap benchmark: every variant once a round, all ranks starting together."""

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..config import MoEConfig, OverlapConfig, OverlapPlan, ramp_sizes
from ..layer import GroupedExperts
from ..overlap.cost_model import LayerWork, StepCosts
from ..overlap.executor import LayerReport, PassReport
from ..overlap.measured import layer_work, median_steps
from ..overlap.search import fixed_plan
from ..overlap.simulator import Simulation, simulate_layer
from ..overlap.tuner import SETTLING_CALLS, PlanChooser
from ..overlap.two_level_work import TwoLevelWork
from ..probe import probe_link
from ..transport_state import state_of
from ..transports import LocalTransport, Transport, TwoLevelTransport
from ..transports.replay import ReplayTransport
from .ranks import barrier, gather, slowest
from .replayed_peers import ReplayedPeers, work_of_one
from .stand_ins import FixedExperts, run_layer_pass
from .timing import Samples
from .workload import Workload, draw_ids

__all__ = [
    "Link",
    "MeasuredLayer",
    "RankMeasurement",
    "Variant",
    "measure_rank",
    "overlapped_variants",
    "predict",
    "run_rounds",
    "variants_of",
]

GROWTHS = (2, 4)
CALIBRATION_ROUNDS = 5
COUNTED_CALLS = 4
SETTLE_S = 0.3
"""Until what a socket has taken has passed the interface's counters."""


@dataclass(frozen=True)
class Variant:
    """One way to run the layer call."""

    kind: str
    """"compute": one chunk, rows there at once. "free transport": the overlapped schedule with rows there at once.
    "communication": the overlapped schedule with experts that compute nothing. "serial", "overlapped", "auto".
    "two levels": overlapped, each token once to every other node."""
    num_chunks: int | None = None
    growth: int = 1
    """Of each chunk over the one before, as in ramp_sizes()."""
    chunk_by: str = "tokens"

    def __str__(self) -> str:
        words = self.kind if self.num_chunks is None or self.kind == "compute" else f"{self.kind} C={self.num_chunks}"
        words = f"{words} ramp x{self.growth}" if self.growth > 1 else words
        return words if self.chunk_by == "tokens" else f"{words} of {self.chunk_by}"

    @property
    def series(self) -> str:
        """What a sweep over chunk counts calls it."""
        return str(replace(self, num_chunks=None))

    def config(self) -> OverlapConfig:
        if self.kind == "auto":
            return OverlapConfig()
        assert self.num_chunks is not None
        chunk_by: Any = self.chunk_by
        is_serial = self.kind in ("serial", "compute")
        sizes = ramp_sizes(self.num_chunks, self.growth)
        return OverlapConfig(serial=is_serial, shape=sizes, chunk_by=chunk_by)


@dataclass
class Link:
    """What rank 0 can do with the link, and what every rank knows of it."""

    set_rate: Callable[[float], None] | None = None
    """Give every rank's link so many bits per second."""
    read_bytes: Callable[[], tuple[int, int]] | None = None
    """This rank's interface counters: bytes received, bytes sent."""
    read_uplinks: Callable[[], list[int]] | None = None
    """Bytes that every node has sent to other nodes."""
    two_levels: TwoLevelTransport | None = None
    peers: ReplayedPeers | None = None
    """Where rank 0 alone is measured."""

    def measured_ranks(self, transport: Transport) -> Transport:
        """Give what the ranks that are measured tell each other their figures over."""
        return transport if self.peers is None else LocalTransport()


@dataclass
class RankMeasurement:
    """What every rank knows after the rounds."""

    seconds: Samples
    """By variant, round by round, the slowest rank's."""
    traffic_rows: list[list[int]]
    row_bytes: int
    reports: dict[str, list[LayerReport]]
    """This rank's, by variant that ran the layer itself, round by round."""
    rate: float | None
    """Bits per second that the link was given for the wished compute ratio."""
    sent_bytes: dict[str, float] | None
    """Of one serial call of this rank: computed, and measured by the interface's counters."""
    uplink_bytes: dict[str, list[float]]
    """Of one serial call, by node; "one level", "two levels"."""
    rows_between_nodes: int | None
    """With two levels: rows that this rank sends to other nodes in the forward's dispatch."""
    pass_seconds: dict[str, list[list[float]]]
    """Of compute and communication, by variant: forward and, if it runs, backward, round by round, the slowest rank's.
    What a call takes outside its passes (planning, the count exchange, autograd) is in neither."""
    predicted: dict[str, tuple[float, Sequence[Simulation]]]
    """By variant that ran the layer in a given number of chunks, on one level or two: the simulator's seconds, from
    this rank's costs."""


class MeasuredLayer:
    """This rank's layer, batch and the ways to run them."""

    def __init__(self, transport: Transport, workload: Workload, device: torch.device, link: Link) -> None:
        self.link = link
        num_experts, top_k, model_width, inner = workload.shape
        rank, size = transport.rank, transport.size
        self.transport, self.workload, self.device = transport, workload, device
        self.measured_ranks = link.measured_ranks(transport)
        self.num_experts = num_experts
        dtype = workload.torch_dtype
        self.experts = GroupedExperts(
            MoEConfig(model_width, inner, num_experts, top_k),
            transport,
            generator=torch.Generator().manual_seed(workload.seed),
            device=device,
            dtype=dtype,
        ).requires_grad_(workload.backward)
        generator = torch.Generator().manual_seed(1000 * workload.seed + rank + 1)
        tokens = (workload.num_tokens, model_width)
        self.x = torch.randn(tokens, generator=generator).to(device, dtype)
        self.dout = torch.randn(tokens, generator=generator).to(device, dtype)
        self.topk_ids = draw_ids(workload, rank, size).to(device)
        self.topk_weights = torch.rand(self.topk_ids.shape, generator=generator).to(device)
        for leaf in (self.x, self.topk_weights):
            leaf.requires_grad_(workload.backward)
        self._replays: dict[Variant, ReplayTransport] = {}
        self._recordings: dict[OverlapPlan, list[torch.Tensor]] = {}
        self.passes: list[PassReport] = []
        """Of the latest run."""

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def run(self, variant: Variant) -> LayerReport | None:
        """Run one variant, forward and, with the workload's backward, backward."""
        return self._run(variant, self._transport_for_next(variant))

    def record(self, plan: OverlapPlan) -> list[torch.Tensor]:
        """Run a call of this plan, as all ranks do at once, and give what this rank received in it."""
        replay = ReplayTransport(self.transport)
        self._run_layer(replay, plan)
        self.synchronize()
        barrier(self.transport)  # from here on no other rank computes
        return replay.received

    def _transport_for_next(self, variant: Variant) -> Transport:
        """Give what the next call of this variant goes over; a call that no peer can answer yet is recorded before."""
        peers = self.link.peers
        if variant.kind == "two levels":
            assert self.link.two_levels is not None
            return self.link.two_levels
        is_free = variant.kind in ("compute", "free transport")
        if peers is None and not is_free:
            return self.transport
        if variant not in self._replays:
            self._replays[variant] = ReplayTransport(self.transport, None if is_free or peers is None else peers.port)
        replay = self._replays[variant]
        if peers is not None:
            plan = self._next_plan(variant, replay)
            if plan not in self._recordings:
                peers.ask(plan)
                self._recordings[plan] = self.record(plan)
            replay.received = self._recordings[plan]
        replay.rewind()
        return replay

    def _next_plan(self, variant: Variant, transport: Transport) -> OverlapPlan:
        """Give the plan of the next call; that of "auto" depends on the calls before it on this transport."""
        size = self.transport.size
        if variant.num_chunks is not None:
            return fixed_plan(variant.config(), variant.num_chunks, size)
        choosers = state_of(transport).choosers.values()
        return next(iter(choosers), PlanChooser(variant.config(), size)).plan()

    def _run(self, variant: Variant, transport: Transport) -> LayerReport | None:
        if variant.kind == "communication":
            self._communicate(variant, transport)
            return None
        return self._run_layer(transport, variant.config())

    def _run_layer(self, transport: Transport, overlap: OverlapConfig | OverlapPlan) -> LayerReport:
        experts = self.experts
        experts.transport, experts.overlap = transport, overlap
        if self.workload.backward:
            experts(self.x, self.topk_ids, self.topk_weights).backward(self.dout)
            experts.zero_grad(set_to_none=True)
            self.x.grad = self.topk_weights.grad = None
        else:
            with torch.no_grad():
                experts(self.x, self.topk_ids, self.topk_weights)
        report = experts.last_report
        assert report is not None
        self.passes = [one for one in (report.forward, report.backward) if one is not None]
        return report

    def timed(self, variant: Variant) -> tuple[float, LayerReport | None]:
        """Run a variant when all ranks are ready, and give this rank's seconds."""
        transport = self._transport_for_next(variant)
        self.synchronize()
        barrier(self.measured_ranks)
        started = time.perf_counter()
        report = self._run(variant, transport)
        self.synchronize()
        seconds = time.perf_counter() - started
        for layer_pass in self.passes:
            _ = layer_pass.steps  # read now: until then they hold on to the device's events
        return seconds, report

    def median_s(self, variant: Variant) -> float:
        """Give the slowest rank's median over a few runs."""
        self.run(variant)
        samples = slowest(self.measured_ranks, [self.timed(variant)[0] for _ in range(CALIBRATION_ROUNDS)])
        return statistics.median(samples)

    @torch.no_grad()
    def _communicate(self, variant: Variant, transport: Transport) -> None:
        self.passes = run_layer_pass(
            transport,
            fixed_plan(variant.config(), variant.num_chunks or 1, self.transport.size),
            self.x,
            self.topk_ids,
            self.topk_weights,
            self.num_experts,
            lambda rows, plan: FixedExperts(0.0, plan.receive_offsets, rows, self.topk_ids.shape[1]),
            self.dout if self.workload.backward else None,
        )


def variants_of(chunks: list[int], num_local_experts: int, two_levels: bool = False) -> list[Variant]:
    """Give everything that is measured for these chunk counts."""
    variants = [Variant("compute", 1), Variant("auto")]
    for num_chunks in chunks:
        variants += [Variant(kind, num_chunks) for kind in ("communication", "serial")]
        if two_levels:
            variants.append(Variant("two levels", num_chunks))
    return variants + overlapped_variants(chunks, num_local_experts)


def overlapped_variants(chunks: list[int], num_local_experts: int) -> list[Variant]:
    """Give every overlapped plan of these chunk counts, and the free transport that tells what its steps cost."""
    variants = []
    for num_chunks in chunks:
        variants += [Variant("overlapped", num_chunks), Variant("free transport", num_chunks)]
        if num_chunks > 2:
            variants += [Variant("overlapped", num_chunks, growth) for growth in GROWTHS]
    of_experts = [num_chunks for num_chunks in chunks if 1 < num_chunks <= num_local_experts]
    variants += [Variant("overlapped", num_chunks, chunk_by="experts") for num_chunks in of_experts]
    if of_experts:
        variants += [Variant("free transport", n, chunk_by="experts") for n in (1, max(of_experts))]
    return variants


def measure_rank(
    transport: Transport,
    workload: Workload,
    chunks: list[int],
    rounds: int,
    *,
    link: Link,
    compute_ratio: float | None = None,
    device: torch.device | str = "cpu",
) -> RankMeasurement:
    """Measure every variant in `rounds` interleaved rounds; every rank makes the same call.

    compute_ratio: give the link the rate at which compute takes so many times as long as communication.
    """
    rank = MeasuredLayer(transport, workload, torch.device(device), link)
    report = rank.run(Variant("serial", 1))
    assert report is not None
    rate = None if compute_ratio is None else _choose_rate(rank, report, compute_ratio, link)
    variants = variants_of(chunks, workload.shape[0] // transport.size, link.two_levels is not None)
    rounds_run = run_rounds(rank, variants, rounds)
    seconds, reports = rounds_run.seconds, rounds_run.reports
    sent_bytes, uplinks = _count_bytes(rank, report, Variant("serial", 2))
    uplink_bytes = {"one level": uplinks} if uplinks else {}
    rows_between_nodes = None
    if link.two_levels is not None:
        _, uplink_bytes["two levels"] = _count_bytes(rank, report, Variant("two levels", 2))
        two_levels = rank.run(Variant("two levels", 2))
        assert two_levels is not None
        rows_between_nodes = two_levels.rows_between_nodes
    return RankMeasurement(
        seconds={name: slowest(rank.measured_ranks, values) for name, values in seconds.items()},
        traffic_rows=report.traffic_rows.tolist(),
        row_bytes=report.row_bytes,
        reports=reports,
        pass_seconds={
            name: [slowest(rank.measured_ranks, list(of_pass)) for of_pass in zip(*passes, strict=True)]
            for name, passes in rounds_run.pass_seconds.items()
            if name.startswith(("compute", "communication"))
        },
        rate=rate,
        sent_bytes=sent_bytes,
        uplink_bytes=uplink_bytes,
        rows_between_nodes=rows_between_nodes,
        predicted=predict(rank, variants, seconds, reports),
    )


@dataclass
class Rounds:
    """This rank's figures by variant, round by round."""

    seconds: Samples
    pass_seconds: dict[str, list[list[float]]]
    reports: dict[str, list[LayerReport]]


def run_rounds(rank: MeasuredLayer, variants: list[Variant], rounds: int) -> Rounds:
    """Run every variant in every round, after the calls that each needs to settle."""
    for variant in variants:
        for _ in range(SETTLING_CALLS if variant.kind == "auto" else 1):
            rank.run(variant)
    order = list(variants)
    run = Rounds({str(variant): [] for variant in variants}, {str(variant): [] for variant in variants}, {})
    shuffle = random.Random(rank.workload.seed).shuffle  # the same order on every rank
    for _ in range(rounds):
        shuffle(order)
        for variant in order:
            elapsed, report = rank.timed(variant)
            run.seconds[str(variant)].append(elapsed)
            run.pass_seconds[str(variant)].append([one.total_s for one in rank.passes])
            if report is not None:
                run.reports.setdefault(str(variant), []).append(report)
    return run


def predict(
    rank: MeasuredLayer,
    variants: list[Variant],
    seconds: Samples,
    reports: dict[str, list[LayerReport]],
) -> dict[str, tuple[float, Sequence[Simulation]]]:
    """Simulate the schedules that were measured; every rank takes part, since the link is probed.

    What steps cost comes from the runs with a free transport; what a call takes outside its schedule (planning, the
    count exchange, autograd) is that of compute alone. With replayed peers the link is the model that they follow.
    """
    peers = rank.link.peers
    link = probe_link(rank.transport, rank.device) if peers is None else peers.link_costs()
    free = [variant for variant in variants if variant.kind == "free transport"]
    costs = {
        chunk_by: StepCosts.through(
            median_steps([one for v in free if v.chunk_by == chunk_by for one in reports[str(v)]])
        )
        for chunk_by in {variant.chunk_by for variant in free}
    }
    outside = [
        elapsed - sum(p.total_s for p in (report.forward, report.backward) if p is not None)
        for elapsed, report in zip(seconds["compute"], reports["compute"], strict=True)
    ]
    between_nodes, two_levels = link, None
    if rank.link.two_levels is not None:
        between_nodes = probe_link(rank.link.two_levels.between_nodes, rank.device)
        two_levels = _two_level_work(rank, reports, rank.link.two_levels)
    predicted: dict[str, tuple[float, Sequence[Simulation]]] = {}
    for variant in variants:
        if variant.kind in ("serial", "overlapped", "two levels"):
            report = reports[str(variant)][-1]
            of_layer = layer_work(report)
            work: LayerWork | TwoLevelWork = of_layer if peers is None else work_of_one(of_layer, report.rank)
            over = link
            if variant.kind == "two levels":
                assert two_levels is not None
                work, over = two_levels, between_nodes
            passes = simulate_layer(
                report.overlap, work, costs[variant.chunk_by], over, backward=rank.workload.backward
            )
            total_s = statistics.median(outside) + sum(one.total_s for one in passes)
            predicted[str(variant)] = total_s, passes
    return predicted


def _two_level_work(
    rank: MeasuredLayer, reports: dict[str, list[LayerReport]], transport: TwoLevelTransport
) -> TwoLevelWork:
    """Give what two levels send; every rank takes part."""
    node_of_expert = torch.arange(rank.num_experts) * transport.num_nodes // rank.num_experts
    nodes = node_of_expert[rank.topk_ids.cpu()]
    needed = [int((nodes == node).any(1).sum()) for node in range(transport.num_nodes)]
    inside_link = probe_link(transport.inside_node, rank.device)
    return TwoLevelWork.of(layer_work(reports["compute"][-1]), torch.tensor(gather(transport, needed)), inside_link)


def _choose_rate(rank: MeasuredLayer, report: LayerReport, compute_ratio: float, link: Link) -> float:
    """Set the rate from compute alone and the bytes of the busiest port, then correct it by what that rate gives."""
    compute = Variant("compute", 1)
    exchanges = 4 if rank.workload.backward else 2
    bytes_between = report.traffic_bytes
    busiest = max(int(bytes_between.sum(0).max()), int(bytes_between.sum(1).max()))
    if busiest == 0:
        raise ValueError("no rows travel between the ranks: a compute ratio needs a routing that sends some")
    rate = 8 * exchanges * busiest * compute_ratio / rank.median_s(compute)
    for correct in (True, True, False):
        if rank.transport.rank == 0:
            assert link.set_rate is not None
            link.set_rate(rate)
        barrier(rank.measured_ranks)
        if correct:
            communication_s = min(rank.median_s(Variant("communication", num_chunks)) for num_chunks in (2, 4))
            rate *= compute_ratio * communication_s / rank.median_s(compute)
    return rate


def _count_bytes(
    rank: MeasuredLayer, report: LayerReport, variant: Variant
) -> tuple[dict[str, float] | None, list[float]]:
    """Count the bytes of one call; computed are the rows, ids, weights and gradients of weights of one level."""
    link = rank.link
    if link.read_bytes is None:
        return None, []

    def counters() -> tuple[int, list[int]]:
        barrier(rank.transport)
        time.sleep(SETTLE_S)
        assert link.read_bytes is not None
        return link.read_bytes()[1], link.read_uplinks() if link.read_uplinks is not None else []

    rank.run(variant)
    sent, uplinks = counters()
    for _ in range(COUNTED_CALLS):
        rank.run(variant)
    sent_after, uplinks_after = counters()
    own = rank.transport.rank
    rows = report.traffic_rows.clone().fill_diagonal_(0)
    to_others, from_others = int(rows[own].sum()), int(rows[:, own].sum())
    top_k = rank.topk_ids.shape[1]
    row_bytes = (to_others + from_others) * report.row_bytes  # dispatch there, combine back
    metadata_bytes = 8 * top_k * to_others
    if rank.workload.backward:
        row_bytes *= 2
        metadata_bytes += 4 * top_k * from_others
    measured = (sent_after - sent) / COUNTED_CALLS
    sent_bytes = {"rows": row_bytes, "metadata": metadata_bytes, "measured": measured}
    uplink_bytes = [(after - before) / COUNTED_CALLS for before, after in zip(uplinks, uplinks_after, strict=True)]
    return sent_bytes, uplink_bytes
