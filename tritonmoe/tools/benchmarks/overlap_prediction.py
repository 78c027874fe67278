"""What the simulator says of the schedules that the overlap benchmark has measured."""

import statistics
from collections.abc import Sequence

import torch

from tritonmoe.overlap.report import LayerReport
from tritonmoe.overlap.simulation.cost_model import LayerWork, LinkCosts, StepCosts
from tritonmoe.overlap.simulation.simulator import Simulation, simulate_layer
from tritonmoe.overlap.simulation.two_level_work import TwoLevelWork
from tritonmoe.overlap.tuning.measured_calls import layer_work, median_steps
from tritonmoe.tools.benchmarks.measured_layer import MeasuredLayer
from tritonmoe.tools.benchmarks.overlap_variants import Variant
from tritonmoe.tools.benchmarks.ranks import gather
from tritonmoe.tools.benchmarks.replayed_peers import work_of_one
from tritonmoe.tools.benchmarks.timing import Samples
from tritonmoe.tools.planner.probe_costs import probe_link
from tritonmoe.transports import TwoLevelTransport

__all__ = ["predict"]


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
