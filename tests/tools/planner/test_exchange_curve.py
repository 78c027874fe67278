"""What is read off a curve is what a walk gives, on the cluster where it was made and on others like it."""

from dataclasses import replace

import pytest

from tritonmoe.config.overlap import OverlapPlan, equal_sizes
from tritonmoe.tools.planner.cluster_presets import CLUSTERS
from tritonmoe.tools.planner.draws import draw
from tritonmoe.tools.planner.exchange_curve import SERIAL, ExchangeCurve
from tritonmoe.tools.planner.job import Job
from tritonmoe.tools.planner.model_config import MODELS
from tritonmoe.tools.planner.operation_costs import layer_parts
from tritonmoe.tools.planner.step import exchange_time

H100 = CLUSTERS["H100"].with_nodes(8)
QWEN = Job(MODELS["Qwen3-30B-A3B"], recompute="full")
CASES = {
    "one node": (replace(QWEN, ep=8), 1),
    "nodes": (replace(QWEN, ep=32), 1),
    "two levels": (replace(QWEN, ep=32), 2),
    "two batches": (replace(QWEN, ep=8, micro_batch=2, two_batches=True), 1),
}


@pytest.mark.thorough
@pytest.mark.parametrize("overlap", [SERIAL, OverlapPlan(equal_sizes(3))], ids=["serial", "3 chunks"])
@pytest.mark.parametrize("case", CASES)
def test_a_curve_gives_what_a_walk_gives(case, overlap):
    job, levels = CASES[case]
    curve = ExchangeCurve(job, H100, levels, overlap)
    errors = []
    for one in (H100, *(H100.scaled(of.factors) for of in draw(job, H100, 8))):
        parts = layer_parts(job, one)
        walked, read = exchange_time(job, one, levels, overlap, parts), curve.time(job, one, parts)
        errors.append(abs(read.total_s / walked.total_s - 1))
        assert read.again_s == pytest.approx(walked.again_s, rel=0.2)
        assert abs(read.exposed_s - walked.exposed_s) < 0.2 * walked.total_s
    assert errors[0] < 0.03
    assert sum(errors) / len(errors) < (0.02 if overlap == SERIAL else 0.1 if levels == 2 else 0.05)


def test_lanes_are_the_sums_of_a_serial_walk():
    job, _ = CASES["one node"]
    cluster = replace(H100, gpu=replace(H100.gpu, contention=replace(H100.gpu.contention, value=0.0)))
    parts = layer_parts(job, cluster)
    curve = ExchangeCurve(job, cluster, 1, SERIAL)
    forward, backward = curve.lanes(job, cluster, parts)
    walked = exchange_time(job, cluster, 1, SERIAL, parts)
    agreeing = curve.agreeing_s(job, cluster, parts)
    assert forward.sum_s + agreeing == pytest.approx(walked.forward_s, rel=0.02)
    assert backward.sum_s + agreeing == pytest.approx(walked.backward_s, rel=0.02)
