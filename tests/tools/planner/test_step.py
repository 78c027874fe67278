"""A step's time against sums by hand, and what faster machines must do to it."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tritonmoe.config.overlap import OverlapPlan
from tritonmoe.overlap.steps import StepKind
from tritonmoe.tools.planner.cluster import BetweenLink, Cluster, Estimate, Gpu, Host, Link
from tritonmoe.tools.planner.cluster_presets import CLUSTERS
from tritonmoe.tools.planner.job import Job, expert_degrees
from tritonmoe.tools.planner.job_memory import estimate_layers, memory_gib
from tritonmoe.tools.planner.layer_exchange import LayerExchange
from tritonmoe.tools.planner.model_config import MODELS
from tritonmoe.tools.planner.operation_costs import ATTENTION_BACKWARD, exchange_s, layer_parts, link_costs, product_s
from tritonmoe.tools.planner.plan_search import OVERLAPS
from tritonmoe.tools.planner.step import step_time
from tritonmoe.tools.planner.transformer_model import Attention, Model

TINY = Model("tiny", 16, 2, 0, Attention(2, 1, 8), 4, 2, 32, 0, 48, 64)
SERIAL = OverlapPlan((1,), local_first=False, serial=True)


def measured(value: float) -> Estimate:
    return Estimate(value, "measured")


def bare(nodes: int = 1, gpus: int = 1, *, flops: float = 1e9, inside: float = 1e5, between: float = 1e5) -> Cluster:
    """Return a cluster on which memory, latency and the host cost nothing."""
    nothing, all_of_it = measured(0.0), measured(1.0)
    gpu = Gpu(100, 1e4, {"bf16": flops / 1e12}, all_of_it, all_of_it, all_of_it, all_of_it, nothing)
    link = {"efficiency": all_of_it, "latency_us": nothing, "us_per_peer": nothing}
    return Cluster(
        *("bare", nodes, gpus, 1.0, 0, gpu),
        Link(gb_per_s=inside, **link),
        BetweenLink(gb_per_s=between, **link, decay=nothing),
        Host(nothing, nothing, nothing),
    )


def test_a_step_of_two_layers_is_the_sum_of_its_products():
    t, d, k, f, e, v = 24, 16, 2, 32, 4, 64
    projections = 2 * t * (d * (2 + 2) * 8 + 2 * 8 * d)
    core = 2 * t * (t / 2) * 2 * (8 + 8)
    router, experts, head = 2 * t * d * e, 6 * t * k * d * f, 2 * t * d * v
    layer = 3 * (projections + router + experts) + (1 + ATTENTION_BACKWARD) * core
    time = step_time(Job(TINY, sequence=t, micro_batches=3), bare(), 1, SERIAL)
    assert time.step_s == pytest.approx(3 * (2 * layer + 3 * head) / 1e9, rel=1e-3)
    assert time.layer_s == pytest.approx(layer / 1e9, rel=1e-3)
    assert time.tokens == 3 * t
    assert sum(time.parts.values()) == pytest.approx(time.step_s)


def test_recomputation_adds_a_forward():
    job = Job(TINY, sequence=24)
    plain, full, experts = (
        step_time(replace(job, recompute=how), bare(), 1, SERIAL).layer_s for how in ("none", "full", "experts")
    )
    t, d = 24, 16
    forward = 2 * t * (d * 32 + 16 * d) + 2 * t * 12 * 2 * 16 + 2 * t * d * 4 + 6 * t * 2 * d * 32
    assert full - plain == pytest.approx(forward / 1e9, rel=1e-3)
    assert experts - plain == pytest.approx(4 * t * 2 * d * 32 / 1e9, rel=1e-3)


def test_a_pipeline_waits_for_its_slowest_stage():
    model = replace(TINY, num_layers=5)
    assert Job(model, pp=2).stage_layers() == [(0, 3), (0, 2)]
    job = Job(model, sequence=24, micro_batches=4, pp=2)
    layer, head = 3 * (2 * 24 * 16 * (32 + 16 + 4) + 6 * 24 * 2 * 16 * 32), 6 * 24 * 16 * 64
    layer += (1 + ATTENTION_BACKWARD) * 2 * 24 * 12 * 2 * 16
    stages = sorted([3 * layer, 2 * layer + head])
    expected = (4 * stages[1] + stages[0]) / 1e9
    assert step_time(job, bare(gpus=2), 1, SERIAL).step_s == pytest.approx(expected, rel=1e-3)


def test_dense_layers_come_first():
    model = replace(TINY, num_layers=5, num_dense_layers=3)
    assert Job(model, pp=2).stage_layers() == [(3, 0), (0, 2)]
    assert Job(model, pp=3).stage_layers() == [(2, 0), (1, 1), (0, 1)]


def test_one_exchange_of_two_ranks_by_hand():
    """Every token needs one of two ranks: half of the rows travel, 1 GB/s each way."""
    model = replace(TINY, num_experts=2, top_k=1)
    cluster = bare(gpus=2, flops=1e15, inside=1.0)
    time = LayerExchange(Job(model, sequence=1000, ep=2), cluster, 1).time(SERIAL)
    rows, metadata = 500 * 32 / 1e9, 500 * 8 / 1e9
    assert time.forward_s == pytest.approx(2 * rows + metadata, rel=1e-3)
    assert time.backward_s == pytest.approx(2 * rows + metadata / 2, rel=1e-3)
    assert time.exposed_s == pytest.approx(time.total_s, rel=1e-3)


def test_two_levels_send_a_row_once_to_every_node():
    """4 ranks in nodes of 2, every token needs all experts: over nodes one row leaves instead of two."""
    model = replace(TINY, num_experts=4, top_k=4)
    cluster = bare(nodes=2, gpus=2, flops=1e15, between=1.0)
    one, two = (LayerExchange(Job(model, sequence=1000, ep=4), cluster, levels) for levels in (1, 2))
    travelling = one.work.rows.sum(1) - one.work.rows.diagonal()
    assert travelling.tolist() == [3000, 3000]
    assert (two.work.outer.rows.sum(1) - two.work.outer.rows.diagonal()).tolist() == [1000] * 4
    assert two.work.relayed.rows.sum(1).tolist() == [2000] * 4
    assert two.work.outer.pairs.sum(0).tolist() == [4000] * 4
    times = [exchange.time(SERIAL).forward_s for exchange in (one, two)]
    assert times[0] / times[1] == pytest.approx(2, rel=0.2)  # metadata too is sent twice


def test_the_link_is_the_slower_of_both_with_what_every_peer_costs():
    inside = Link(gb_per_s=100.0, efficiency=measured(0.5), latency_us=measured(10.0), us_per_peer=measured(1.0))
    between = BetweenLink(
        gb_per_s=50.0,
        efficiency=measured(0.8),
        latency_us=measured(30.0),
        us_per_peer=measured(2.0),
        decay=measured(0.5),
    )
    cluster = replace(bare(8, 8), inside=inside, between=between)
    # One node: 10 us + 7 us, 50 GB/s.
    assert exchange_s(cluster, 8, 5e6, 0) == pytest.approx(17e-6 + 1e-4)
    # 8 nodes: (8 / 2) ** -0.5 is half of 40 GB/s; 7 and 56 peers.
    assert exchange_s(cluster, 64, 5e6, 4e6) == pytest.approx((30 + 7 + 112 + 200) * 1e-6)
    assert link_costs(cluster, 64, 5e6, 4e6).bytes_per_s == pytest.approx(9e6 / 2e-4)


def test_overlap_hides_what_it_can():
    job = replace(Job(MODELS["DeepSeek-V3"]), ep=64)
    exchange = LayerExchange(job, CLUSTERS["H100"], 1)
    serial, best = exchange.time(SERIAL), min((exchange.time(one) for one in OVERLAPS), key=lambda time: time.total_s)
    assert best.total_s < 0.95 * serial.total_s
    assert best.exposed_s < 0.8 * serial.exposed_s


def test_two_batches_hide_what_attention_can_cover():
    job = Job(MODELS["DeepSeek-V3"], ep=64, micro_batch=2, micro_batches=4)
    one = step_time(job, CLUSTERS["H100"], 1, OVERLAPS[1])
    two = step_time(replace(job, two_batches=True), CLUSTERS["H100"], 1, OVERLAPS[1])
    assert two.exposed_s < one.exposed_s
    assert two.step_s < one.step_s


def test_two_batches_compute_each_half_again_by_itself():
    """Nothing hides a recomputed half's exchanges: where nothing is fixed, two take as long as a whole batch."""
    job, cluster = Job(TINY, sequence=1000, micro_batch=2, ep=2), bare(gpus=2, inside=0.1)

    def recomputed(two_batches: bool) -> list[float]:
        plain, full = (
            step_time(replace(job, two_batches=two_batches, recompute=how), cluster, 1, OVERLAPS[0])
            for how in ("none", "full")
        )
        return [full.parts["recomputation"], full.exposed_s - plain.exposed_s]

    one, two = recomputed(False), recomputed(True)
    assert one[1] > 0
    assert two == pytest.approx(one, rel=1e-3)


def test_the_host_adds_to_a_layer():
    cluster = CLUSTERS["H100"]
    host = replace(cluster.host, us_per_layer=measured(1e6))
    job, none = Job(TINY, ep=1), replace(cluster.host, us_per_layer=measured(0.0))
    slow, fast = (step_time(job, replace(cluster, host=of), 1, SERIAL) for of in (host, none))
    assert slow.layer_s == pytest.approx(1 + fast.layer_s)
    assert slow.parts["waiting for the host"] == pytest.approx(TINY.num_layers)
    assert slow.step_s == pytest.approx(TINY.num_layers + fast.step_s)
    graphs = step_time(replace(job, cuda_graphs=True), replace(cluster, host=host), 1, SERIAL)
    assert graphs.step_s == pytest.approx(TINY.num_layers / 4 + fast.step_s)


def test_degrees_that_fit():
    assert expert_degrees(Job(MODELS["DeepSeek-V3"]), CLUSTERS["H100"]) == [1, 2, 4, 8, 16, 32, 64]
    with pytest.raises(ValueError, match="64 GPUs can't be shared by tp=1 x pp=3"):
        Job(MODELS["DeepSeek-V3"], pp=3).dp(CLUSTERS["H100"])
    with pytest.raises(ValueError, match="256 experts can't be shared evenly by ep=3"):
        Job(MODELS["DeepSeek-V3"], ep=3)
    with pytest.raises(ValueError, match="tp=16 ranks are more than a node's 8"):
        Job(MODELS["DeepSeek-V3"], tp=16).dp(CLUSTERS["H100"])


def test_products_in_a_dtype_of_which_the_cluster_says_nothing():
    with pytest.raises(
        ValueError, match=r"H100 has no rate of products in fp32: add it to gpu\.tflops, which has bf16, fp16, fp8"
    ):
        step_time(Job(TINY, dtype="fp32"), CLUSTERS["H100"], 1, SERIAL)


def test_fp8_products_leave_rows_and_weights_in_bf16():
    wide, narrow = (Job(MODELS["DeepSeek-V3"], dtype=dtype, ep=8) for dtype in ("bf16", "fp8"))
    assert memory_gib(wide, CLUSTERS["H100"]) == memory_gib(narrow, CLUSTERS["H100"])
    times = [step_time(job, CLUSTERS["H100"], 1, SERIAL).layer_s for job in (wide, narrow)]
    assert 0.5 < times[1] / times[0] < 0.9


def test_experts_in_a_precision():
    wide = Job(MODELS["DeepSeek-V3"], ep=64)
    narrow = replace(wide, expert_precision="fp8_block")
    of_wide, of_narrow = (LayerExchange(job, CLUSTERS["H100"], 1) for job in (wide, narrow))
    ways = (StepKind.DISPATCH, StepKind.COMBINE, StepKind.COMBINE_BACKWARD, StepKind.DISPATCH_BACKWARD)
    codes = 7168 + 56
    assert [of_narrow.work.bytes_per_row(way) for way in ways] == [codes, 14336, codes, 14336]
    assert [of_wide.work.bytes_per_row(way) for way in ways] == [14336] * 4
    per_pair, wide_per_pair = of_narrow.costs.unit_s, of_wide.costs.unit_s
    assert 0.5 < per_pair[StepKind.EXPERTS] / wide_per_pair[StepKind.EXPERTS] < 0.8
    assert per_pair[StepKind.WEIGHT_GRAD] == wide_per_pair[StepKind.WEIGHT_GRAD]
    kept = [memory_gib(job, CLUSTERS["H100"]) for job in (wide, narrow)]
    rows = wide.num_tokens * 64 * of_wide.needs.of_rank * 58  # layers with experts
    assert kept[0] - kept[1] == pytest.approx(rows * (14336 - codes) / 2**30, rel=1e-6)
    of_layers = [float(estimate_layers(job, "uniform").kept.max()) / 2**30 for job in (wide, narrow)]
    assert of_layers[0] - of_layers[1] == pytest.approx(kept[0] - kept[1], rel=0.1)


@pytest.mark.parametrize(
    ("cluster", "options", "words"),
    [
        ("H100", {"expert_precision": "mxfp8"}, "H100 has no rate of products of mxfp8's codes"),
        ("MI300X", {"expert_precision": "fp8_block"}, "leave expert_precision out"),
        ("B200", {"expert_precision": "fp4"}, "one of fp8_block, mxfp8"),
        ("B200", {"expert_precision": "mxfp8", "wire_dtype": "fp8"}, "leave wire_dtype='fp8' out"),
        ("B200", {"expert_precision": "mxfp8", "dtype": "fp8"}, "leave dtype='fp8' out"),
        ("B200", {"expert_precision": "mxfp8", "frozen": "nf4", "adapter_rank": 4}, "leave frozen='nf4' out"),
        ("B200", {"expert_precision": "mxfp8", "trainer": "megatron"}, "leave trainer='megatron' out"),
    ],
)
def test_precisions_that_no_plan_has(cluster, options, words):
    with pytest.raises(ValueError, match=words):
        step_time(Job(MODELS["DeepSeek-V3"], ep=8, **options), CLUSTERS[cluster], 1, SERIAL)


JOBS = st.builds(
    Job,
    st.sampled_from([MODELS["DeepSeek-V3"], MODELS["Qwen3-30B-A3B"]]),
    sequence=st.sampled_from([512, 4096]),
    micro_batch=st.just(2),
    micro_batches=st.sampled_from([1, 8]),
    pp=st.sampled_from([1, 2]),
    ep=st.sampled_from([8, 16, 32]),
    recompute=st.sampled_from(["none", "experts", "full"]),
    two_batches=st.booleans(),
)
FASTER = (
    "gpu.gemm_efficiency",
    "gpu.grouped_efficiency",
    "gpu.attention_efficiency",
    "gpu.memory_efficiency",
    "inside.efficiency",
    "between.efficiency",
)
SLOWER = ("inside.latency_us", "between.latency_us", "between.us_per_peer", "between.decay", "host.us_per_layer")


@pytest.mark.thorough
@settings(max_examples=25, deadline=None)
@given(
    JOBS,
    st.sampled_from([*CLUSTERS.values()]),
    st.sampled_from([1, 2]),
    st.sampled_from(OVERLAPS),
    st.sampled_from([*FASTER, *SLOWER]),
    st.floats(1.05, 1.5),
)
def test_a_faster_machine_never_takes_longer(job, cluster, num_levels, overlap, key, factor):
    """Without contention: with it an exchange that ends earlier can put compute beside the next one, and slow it."""
    cluster = replace(cluster, gpu=replace(cluster.gpu, contention=Estimate(0.0, "assumed")))
    cluster = replace(cluster, gpus_per_node=min(64, cluster.gpus_per_node))
    num_levels = num_levels if job.ep > cluster.gpus_per_node else 1
    other = cluster.scaled({key: factor if key in FASTER else 1 / factor})
    slow, fast = (step_time(job, one, num_levels, overlap).step_s for one in (cluster, other))
    assert fast <= slow * (1 + 1e-9)


def test_selective_recomputation_runs_the_up_projections_of_latents_again():
    """Of a layer queries, keys and values go, raw and rotated, with two of the four rows that norms and sums keep."""
    model, cluster = MODELS["DeepSeek-V3"], CLUSTERS["H100"]
    job = Job(model, sequence=1024, tp=1, pp=1, ep=8)
    selective = replace(job, recompute="selective")
    queries, keys_and_values = 128 * 192, 128 * 256
    rotated = 128 * (2 * 192 + 128)
    freed = 1024 * 2 * (2 * 7168 + rotated + queries + keys_and_values) * model.num_layers
    assert memory_gib(job, cluster) - memory_gib(selective, cluster) == pytest.approx(freed / 2**30)
    again = layer_parts(selective, cluster)
    up = sum(product_s(selective, cluster, 1024, i, o) for i, o in ((1536, queries), (512, keys_and_values)))
    assert again["latents' up-projections"] == (pytest.approx(up), 0.0)
    without = step_time(job, cluster, 1, SERIAL).parts
    with_it = step_time(selective, cluster, 1, SERIAL).parts
    assert with_it["recomputation"] == pytest.approx(model.num_layers * (up + again["norms and rotations"][0]))
    assert "recomputation" not in without


def test_memory_by_hand():
    """Weights in bf16 and gradients in fp32 of every rank, the optimizer's twelve bytes shared by two ranks."""
    job = Job(TINY, sequence=24, recompute="full")
    attention, experts = 16 * 32 + 16 * 16, 4 * 3 * 16 * 32
    parameters = 2 * (attention + 16 * 4 + experts) + 2 * 64 * 16
    held = parameters * 6 + 12 * parameters / 2 + 2 * 24 * 16 * 2 + 24 * 64 * 6
    assert memory_gib(job, bare(gpus=2)) == pytest.approx(held / 2**30)


def test_more_expert_parallel_ranks_hold_less():
    held = [memory_gib(Job(MODELS["DeepSeek-V3"], ep=ep, pp=4), CLUSTERS["H100"]) for ep in (1, 4, 16)]
    assert held == sorted(held, reverse=True)
