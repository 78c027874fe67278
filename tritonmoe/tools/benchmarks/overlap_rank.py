"""What one rank does in the overlap benchmark: every variant once a round, all ranks starting together."""

import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tritonmoe.overlap.report import LayerReport
from tritonmoe.overlap.simulation.cost_model import LayerWork, LinkCosts, StepCosts
from tritonmoe.overlap.simulation.simulator import Simulation, simulate_layer
from tritonmoe.overlap.simulation.two_level_work import TwoLevelWork
from tritonmoe.overlap.steps import StepKind, Way
from tritonmoe.overlap.tuning.measured_calls import layer_work, median_steps
from tritonmoe.overlap.tuning.tuner import SETTLING_CALLS
from tritonmoe.runtime.progress import Progress, say
from tritonmoe.tools.benchmarks.measured_layer import Link, MeasuredLayer, work_of_one
from tritonmoe.tools.benchmarks.overlap_variants import Variant, best, variants_of
from tritonmoe.tools.benchmarks.ranks import gather, slowest
from tritonmoe.tools.benchmarks.timing import Samples
from tritonmoe.tools.benchmarks.workload import Workload
from tritonmoe.tools.planner.probe_costs import probe_link
from tritonmoe.tools.recording.recorder import record
from tritonmoe.transports import Transport, TwoLevelTransport

__all__ = ["RankMeasurement", "measure_rank", "predict", "run_rounds"]

CONTENTION_ROUNDS = 7
COUNTED_CALLS = 20
"""TCP now and then sends several kilobytes again."""
SETTLE_S = 0.3
"""How long it takes until what a socket has taken has passed the interface's counters."""


@dataclass
class RankMeasurement:
    """What every rank knows after the rounds."""

    seconds: Samples
    """The slowest rank's seconds, by variant, round by round."""
    traffic_rows: list[list[int]]
    row_bytes: int
    """Bytes of a row in the forward's dispatch."""
    other_row_bytes: int
    """Bytes of a row in the other exchanges."""
    reports: dict[str, list[LayerReport]]
    """This rank's reports, by variant that ran the layer itself, round by round."""
    rate: float | None
    """Bits per second that the link was given for the wished compute ratio."""
    sent_bytes: dict[str, float] | None
    """Bytes that this rank sends in one serial call: computed, and measured by the interface's counters."""
    uplink_bytes: dict[str, list[float]]
    """Bytes over each node's uplink in one serial call; by "one level" and "two levels"."""
    rows_between_nodes: int | None
    """With two levels: rows that this rank sends to other nodes in the forward's dispatch."""
    pass_seconds: dict[str, list[list[float]]]
    """The slowest rank's seconds of forward and, if it runs, backward, by variant of compute and communication alone.
    What a call takes outside its passes (planning, the count exchange, autograd) is in neither."""
    experts_s: dict[str, tuple[list[float], list[float]]]
    """This rank's seconds of experts in the forward, by variant, of the fastest overlapped one and of "auto": beside
    exchanges, and of the same chunks with no exchange beside them, call by call."""
    predicted: dict[str, tuple[float, Sequence[Simulation]]]
    """The simulator's seconds, from this rank's costs, by variant that ran the layer in a given number of chunks."""


def measure_rank(
    transport: Transport,
    workload: Workload,
    chunks: list[int],
    rounds: int,
    *,
    link: Link,
    compute_ratio: float | None = None,
    device: torch.device | str = "cpu",
    record_to: Path | None = None,
) -> RankMeasurement:
    """Measure every variant in `rounds` interleaved rounds; every rank makes the same call.

    Args:
        compute_ratio: give the link the rate at which compute takes so many times as long as communication.
        record_to: the folder for a recording of as many more calls, of the plan that "auto" has settled on.
    """
    rank = MeasuredLayer(transport, workload, torch.device(device), link)
    report = rank.run_layer(Variant("serial", 1))
    rate = None if compute_ratio is None else _choose_rate(rank, report, compute_ratio, link)
    variants = variants_of(chunks, workload.shape[0] // transport.size, link.two_levels is not None)
    rounds_run = run_rounds(rank, variants, rounds)
    seconds, reports = rounds_run.seconds, rounds_run.reports
    if record_to is not None:
        # Ranks that are threads share what is recorded: no call of another variant may be under way.
        rank.measured_ranks.barrier()
        with record(record_to):
            for _ in range(rounds):
                rank.timed(Variant("auto"))
            rank.measured_ranks.barrier()
    slowest_s = {name: slowest(rank.measured_ranks, values) for name, values in seconds.items()}
    fastest = best(slowest_s, "overlapped")
    experts_s = {
        str(variant): _experts_s(rank, variant, min(rounds, CONTENTION_ROUNDS))
        for variant in variants
        if str(variant) in (fastest, "auto")
    }
    sent_bytes, uplinks = _count_bytes(rank, report, Variant("serial", 2))
    uplink_bytes = {"one level": uplinks} if uplinks else {}
    rows_between_nodes = None
    if link.two_levels is not None:
        _, uplink_bytes["two levels"] = _count_bytes(rank, report, Variant("two levels", 2))
        rows_between_nodes = rank.run_layer(Variant("two levels", 2)).rows_between_nodes
    return RankMeasurement(
        seconds=slowest_s,
        traffic_rows=report.traffic_rows.tolist(),
        row_bytes=report.row_bytes,
        other_row_bytes=layer_work(report).bytes_per_row(StepKind.COMBINE),
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
        experts_s=experts_s,
        predicted=predict(rank, variants, seconds, reports),
    )


def _experts_s(rank: MeasuredLayer, variant: Variant, rounds: int) -> tuple[list[float], list[float]]:
    """Return the experts' seconds in the forward of calls of a variant, and of their plans' steps alone, in turn."""
    beside, alone = [], []
    for _ in range(rounds):
        _, report = rank.timed(variant)
        assert report is not None, "an overlapped variant runs the layer itself"
        beside.append(report.forward.compute_s)
        # Against one chunk that has all rows, each of several chunks would look slow for being small.
        alone.append(rank.run_at_once(report.overlap).forward.compute_s)
    return beside, alone


@dataclass
class Rounds:
    """This rank's figures by variant, round by round."""

    seconds: Samples
    pass_seconds: dict[str, list[list[float]]]
    reports: dict[str, list[LayerReport]]


def run_rounds(rank: MeasuredLayer, variants: list[Variant], rounds: int) -> Rounds:
    """Run every variant in every round, after the calls that each needs to settle."""
    settling = {variant: SETTLING_CALLS if variant.num_chunks is None else 1 for variant in variants}
    progress = Progress(
        f"measuring {len(variants)} schedules in {rounds} rounds",
        sum(settling.values()) + rounds * len(variants),
        speaks=rank.transport.rank == 0,
    )
    for variant, num_calls in settling.items():
        for _ in range(num_calls):
            rank.run(variant)
            progress.advance()
    order = list(variants)
    run = Rounds({str(variant): [] for variant in variants}, {str(variant): [] for variant in variants}, {})
    shuffle = random.Random(rank.workload.seed).shuffle  # the same order on every rank
    for _ in range(rounds):
        shuffle(order)
        for variant in order:
            elapsed, report = rank.timed(variant)
            progress.advance()
            run.seconds[str(variant)].append(elapsed)
            run.pass_seconds[str(variant)].append([one.total_s for one in rank.passes])
            if report is not None:
                run.reports.setdefault(str(variant), []).append(report)
    return run


def _choose_rate(rank: MeasuredLayer, report: LayerReport, compute_ratio: float, link: Link) -> float:
    """Set the rate from compute alone and the bytes of the busiest port, then correct it by what that rate gives."""
    if rank.transport.rank == 0:
        say(f"choosing the link's rate for compute that takes {compute_ratio:g} times as long as communication ...")
    compute = Variant("compute", 1)
    exchanges = 4 if rank.workload.backward else 2
    bytes_between = report.traffic_bytes
    busiest = max(int(bytes_between.sum(0).max()), int(bytes_between.sum(1).max()))
    if busiest == 0:
        raise ValueError(
            "no rows travel between the ranks: --compute-ratio needs a routing that sends rows to other ranks"
        )
    rate = 8 * exchanges * busiest * compute_ratio / rank.median_s(compute)
    for correct in (True, True, False):
        if rank.transport.rank == 0:
            link.change_rate(rate)
        rank.measured_ranks.barrier()
        if correct:
            communication_s = min(rank.median_s(Variant("communication", num_chunks)) for num_chunks in (2, 4))
            rate *= compute_ratio * communication_s / rank.median_s(compute)
    return rate


def _count_bytes(
    rank: MeasuredLayer, report: LayerReport, variant: Variant
) -> tuple[dict[str, float] | None, list[float]]:
    """Count the bytes of one call; computed are the rows, ids, weights and gradients of weights of one level."""
    link, read_bytes = rank.link, rank.link.read_bytes
    if read_bytes is None:
        return None, []

    def counters() -> tuple[int, list[int]]:
        rank.transport.barrier()
        time.sleep(SETTLE_S)
        return read_bytes()[1], link.read_uplinks() if link.read_uplinks is not None else []

    rank.run(variant)
    sent, uplinks = counters()
    for _ in range(COUNTED_CALLS):
        rank.run(variant)
    sent_after, uplinks_after = counters()
    own = rank.transport.rank
    rows = report.traffic_rows.clone().fill_diagonal_(0)
    to_others, from_others = int(rows[own].sum()), int(rows[:, own].sum())
    bytes_per_row = layer_work(report).bytes_per_row
    num_rows: dict[Way | None, int] = {Way.TO_EXPERTS: to_others, Way.HOME: from_others}

    def exchanged_bytes(*kinds: StepKind) -> int:
        return sum(num_rows[kind.way] * bytes_per_row(kind) for kind in kinds)

    row_bytes = exchanged_bytes(StepKind.DISPATCH, StepKind.COMBINE)
    metadata_bytes = exchanged_bytes(StepKind.METADATA)
    if rank.workload.backward:
        row_bytes += exchanged_bytes(StepKind.COMBINE_BACKWARD, StepKind.DISPATCH_BACKWARD)
        metadata_bytes += exchanged_bytes(StepKind.ROUTING_BACKWARD)
    measured = (sent_after - sent) / COUNTED_CALLS
    sent_bytes = {"rows": row_bytes, "metadata": metadata_bytes, "measured": measured}
    uplink_bytes = [(after - before) / COUNTED_CALLS for before, after in zip(uplinks, uplinks_after, strict=True)]
    return sent_bytes, uplink_bytes


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
    of_two_levels: dict[str, tuple[TwoLevelWork, LinkCosts]] = {}
    if rank.link.two_levels is not None:
        between_nodes = probe_link(rank.link.two_levels.between_nodes, rank.device)
        of_two_levels["two levels"] = _two_level_work(rank, reports, rank.link.two_levels), between_nodes
    predicted: dict[str, tuple[float, Sequence[Simulation]]] = {}
    for variant in variants:
        if variant.kind in ("serial", "overlapped", "two levels"):
            report = reports[str(variant)][-1]
            of_layer = layer_work(report)
            work: LayerWork | TwoLevelWork = of_layer if peers is None else work_of_one(of_layer, report.rank)
            over = link
            if variant.kind == "two levels":
                work, over = of_two_levels["two levels"]
            passes = simulate_layer(
                report.overlap, work, costs[variant.chunk_by], over, backward=rank.workload.backward
            )
            total_s = statistics.median(outside) + sum(one.total_s for one in passes)
            predicted[str(variant)] = total_s, passes
    return predicted


def _two_level_work(
    rank: MeasuredLayer, reports: dict[str, list[LayerReport]], transport: TwoLevelTransport
) -> TwoLevelWork:
    """Return what two levels send; every rank takes part."""
    node_of_expert = torch.arange(rank.num_experts) * transport.num_nodes // rank.num_experts
    nodes = node_of_expert[rank.topk_ids.cpu()]
    needed = [int((nodes == node).any(1).sum()) for node in range(transport.num_nodes)]
    inside_link = probe_link(transport.inside_node, rank.device)
    return TwoLevelWork.of(layer_work(reports["compute"][-1]), torch.tensor(gather(transport, needed)), inside_link)
