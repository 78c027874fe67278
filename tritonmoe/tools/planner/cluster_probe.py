"""probe_cluster: a Cluster with what was measured on this machine, for products, memory, the host and links."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch.nn import functional as F

from tritonmoe.config.layer import MoEConfig
from tritonmoe.config.overlap import OverlapPlan
from tritonmoe.experts.moe_mlp import moe_mlp
from tritonmoe.layer import GroupedExperts
from tritonmoe.ops.backends.pair_work import FORWARD, pair_work, products_and_elements
from tritonmoe.tools.planner.cluster import SPREADS, Cluster, Estimate, Gpu, Host, Link
from tritonmoe.tools.planner.job import Job
from tritonmoe.tools.planner.operation_costs import product_s
from tritonmoe.tools.planner.probe_costs import PROBE_BYTES, probe_link, slowest
from tritonmoe.transports import LocalTransport, Transport, TwoLevelTransport

__all__ = ["probe_cluster", "say_scatter", "scatter"]

ROUNDS = 5
SLICE_S = 0.1
COPY_BYTES = 1 << 28
HOST_TOKENS = 16
HOST_CHUNKS = 5
LEAST_SHARE, MOST_SPREAD, LEAST_PEAK = 1e-3, 100.0, 1e9
"""What a cluster's file may say: a share of a peak, how far samples scatter, and peaks, those of a busy CPU."""
MOST_GB_PER_S = 1e5
"""What a link is said to reach that is too fast to be measured."""
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def probe_cluster(
    job: Job,
    base: Cluster,
    transport: Transport | None,
    device: torch.device,
    say: Callable[[str], None],
    node_size: int | None = None,
) -> Cluster:
    """Measure what a plan needs to know; every rank calls it, and all get the slowest rank's numbers.

    Args:
        job: the products that are measured have the sizes of its model, the exchanges those of its rows.
        base: what is not measured: prices, memory, peaks, and on one process the links.
        transport: of all ranks, None for one process; a TwoLevelTransport where there are nodes of several ranks.
        say: gets a line on what was found.
        node_size: the ranks of a node; None is all of them.
    """
    ranks = transport if transport is not None else LocalTransport()

    def slowest_of(seconds: float) -> float:
        return slowest(ranks, [seconds])[0]

    gpu = _probe_gpu(job, base, device, slowest_of, say)
    cluster = replace(base, gpu=gpu)
    host = _probe_host(cluster, ranks, device, slowest_of)
    say(f"host: {host.us_per_layer.value:.0f} us a layer, {host.us_per_chunk.value:.0f} us a chunk")
    cluster = replace(cluster, host=host)
    if transport is None:
        say_scatter(cluster, say)
        say("links: not measured, since there is one process: start it under torchrun")
        return cluster
    node_size = node_size or transport.size
    cluster = replace(cluster, nodes=transport.size // node_size, gpus_per_node=node_size)
    contention = []
    for name, level in _links(transport, node_size).items():
        link, lost = _probe_link(job, getattr(cluster, name), level, device)
        contention.append(lost)
        say(
            f"{name}: {link.gb_per_s * link.efficiency.value:.4g} GB/s, {link.latency_us.value:.0f} us, "
            f"compute beside it loses {lost:.0%}"
        )
        cluster = replace(cluster, **{name: link})  # type: ignore[arg-type]
    cluster = replace(cluster, gpu=replace(cluster.gpu, contention=_probed(max(contention))))
    say_scatter(cluster, say)
    return cluster


def _probed(value: float, spread: float = 0.0) -> Estimate:
    """Return what was measured, as uncertain as a probe's numbers are, or as far as its samples scatter."""
    return Estimate(value, "probe", min(MOST_SPREAD, round(spread, 3)) if spread > SPREADS["probe"] else None)


def _share(value: float, spread: float) -> Estimate:
    """Return the share of a peak that was measured; on a machine that others use it may be next to nothing."""
    return _probed(min(1.0, max(LEAST_SHARE, value)), spread)


def scatter(times: Sequence[float]) -> float:
    """Return the spread of samples: that with which 80 % of them lie about their median."""
    if len(times) < ROUNDS:
        return 0.0
    tenths, middle = statistics.quantiles(times, n=10, method="inclusive"), statistics.median(times)
    return max(tenths[-1] / middle, middle / tenths[0]) - 1 if tenths[0] > 0 else 0.0


def say_scatter(cluster: Cluster, say: Callable[[str], None]) -> None:
    """Print which estimates have samples that scattered."""
    wide = [(key, one.spread) for key, one in cluster.estimates() if one.source == "probe" and one.spread is not None]
    for key, spread in wide:
        say(f"{key}: samples scattered, so its interval is wider: times and over {1 + spread:.2f}")


def _links(transport: Transport, node_size: int) -> dict[str, Transport]:
    """Return the part of a cluster that a link is -> the transport that goes over it."""
    if isinstance(transport, TwoLevelTransport):
        return {"inside": transport.inside_node, "between": transport.between_nodes}
    return {"between" if node_size == 1 else "inside": transport}


def _times(run: Callable[[], object], device: torch.device) -> list[float]:
    """Return the times of a call, for a tenth of a second and at least five calls."""
    times: list[float] = []
    run()
    while len(times) < ROUNDS or sum(times) < SLICE_S:
        _synchronize(device)
        started = time.perf_counter()
        run()
        _synchronize(device)
        times.append(time.perf_counter() - started)
    return times


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _probe_gpu(
    job: Job, base: Cluster, device: torch.device, slowest_of: Callable[[float], float], say: Callable[[str], None]
) -> Gpu:
    """Measure products, attention and copies at the model's sizes, and say what share of the peaks they reach.

    The device's own rates become the peaks where they are larger, or where it is a CPU: a peak is only what shares
    are of.
    """
    model, dtype, tokens = job.model, DTYPES[job.dtype], job.num_tokens

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, device=device).to(dtype)

    with torch.no_grad():
        numbers = torch.zeros(COPY_BYTES // 4 if device.type == "cuda" else COPY_BYTES // 16, device=device)
        copied = torch.empty_like(numbers)
        copies = _times(lambda: copied.copy_(numbers), device)
        memory_rate = 2 * numbers.nbytes / slowest_of(statistics.median(copies))
        inputs, outputs = max(model.attention.products(model.hidden_size), key=lambda shape: shape[0] * shape[1])
        rows, weight = random(tokens, inputs), random(outputs, inputs)
        products = _times(lambda: F.linear(rows, weight), device)
        dense_s = slowest_of(statistics.median(products))
        cores, core_flops = _attention(job, random, device)
        attention_s = slowest_of(statistics.median(cores))
        calls, grouped_flops, moved = _experts(job, random, device)
        grouped_s = slowest_of(statistics.median(calls))
    samples = {"copies": copies, "products": products, "cores": cores, "calls": calls}
    spreads = {name: slowest_of(scatter(times)) for name, times in samples.items()}
    dense_flops = 2 * tokens * inputs * outputs
    dense, core = dense_flops / dense_s, core_flops / attention_s
    # What a plan takes for the operands' bytes comes off, since it will be added again.
    grouped_s = max(0.2 * grouped_s, grouped_s - moved * job.dtype_bytes / memory_rate)
    grouped = grouped_flops / grouped_s
    has_peaks = device.type == "cuda"
    peak = max(dense, core, grouped, job.peak_flops(base) if has_peaks else LEAST_PEAK)
    memory_peak = max(memory_rate, base.gpu.memory_tb_per_s * 1e12 if has_peaks else LEAST_PEAK)
    gpu = replace(
        base.gpu,
        tflops={**(base.gpu.tflops if has_peaks else {}), "bf16": peak / 1e12, job.dtype: peak / 1e12},
        memory_tb_per_s=memory_peak / 1e12,
        gemm_efficiency=_share(dense / peak, spreads["products"]),
        grouped_efficiency=_share(grouped / peak, spreads["calls"]),
        attention_efficiency=_share(core / peak, spreads["cores"]),
        memory_efficiency=_share(memory_rate / memory_peak, spreads["copies"]),
    )
    # The same for the dense product: its share is that with which product_s gives the measured time.
    operands_s = product_s(job, replace(base, gpu=gpu), tokens, inputs, outputs) - dense_s
    share = dense_flops / max(0.2 * dense_s, dense_s - operands_s) / peak
    say(
        f"products {dense / 1e12:.4g} TFLOP/s, experts {grouped_flops / grouped_s / 1e12:.4g}, "
        f"attention {core / 1e12:.4g}; memory {memory_rate / 1e12:.4g} TB/s"
    )
    return replace(gpu, gemm_efficiency=_share(share, spreads["products"]))


def _experts(job: Job, random: Callable[..., torch.Tensor], device: torch.device) -> tuple[list[float], int, int]:
    """Return the seconds of some calls of a rank's experts, and the FLOPs and the operands' numbers of one."""
    model, tokens = job.model, job.num_tokens
    d, f = model.hidden_size, model.expert_size
    own_experts = max(1, model.num_experts // job.ep)
    top_k = min(model.top_k, own_experts)
    gates, ids = torch.rand(tokens, own_experts, device=device).topk(top_k, dim=1)
    up, down, x = random(own_experts, 2 * f, d), random(own_experts, d, f), random(tokens, d)
    calls = _times(lambda: moe_mlp(x, ids, gates, up, down), device)
    flops, elements = products_and_elements(pair_work(d, f), FORWARD)
    num_pairs = tokens * top_k
    return calls, num_pairs * flops, own_experts * model.expert_parameters + num_pairs * elements


def _attention(job: Job, random: Callable[..., torch.Tensor], device: torch.device) -> tuple[list[float], float]:
    """Return the seconds of some causal attentions of one sequence, and the FLOPs of one."""
    of, seen = job.model.attention, min(job.sequence, job.num_tokens)
    q, k = (random(1, of.num_heads, seen, of.qk_dim) for _ in range(2))
    v = random(1, of.num_heads, seen, of.v_dim)
    seconds = _times(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True), device)
    return seconds, 2 * (seen / 2) * seen * of.num_heads * (of.qk_dim + of.v_dim)


def _probe_host(
    cluster: Cluster, transport: Transport, device: torch.device, slowest_of: Callable[[float], float]
) -> Host:
    """Measure a layer so small that only launching it takes time, in one chunk and in several."""
    experts = max(transport.size, 1) * 2
    config = MoEConfig(16, 16, experts, 2)
    layer = GroupedExperts(config, transport).to(device)
    gates, ids = torch.rand(HOST_TOKENS, experts, device=device).topk(2, dim=1)
    x = torch.randn(HOST_TOKENS, 16, device=device, requires_grad=True)

    def run() -> None:
        layer(x, ids, gates).sum().backward()

    def measured(chunks: int) -> list[float]:
        layer.overlap = OverlapPlan((1,) * chunks)
        times = []
        for _ in range(ROUNDS + 1):
            _synchronize(device)
            started = time.perf_counter()
            run()
            times.append(time.perf_counter() - started)
        return times[1:]

    times = measured(1), measured(HOST_CHUNKS)
    one, several = (slowest_of(statistics.median(of)) for of in times)
    return replace(
        cluster.host,
        us_per_layer=_probed(one * 1e6, slowest_of(scatter(times[0]))),
        us_per_chunk=_probed(max(0.0, several - one) * 1e6 / 2 / (HOST_CHUNKS - 1)),  # forward and backward
    )


def _probe_link(job: Job, base: Link, transport: Transport, device: torch.device) -> tuple[Link, float]:
    """Measure the link between all ranks of a transport, and give its contention too.

    Its rate is that of the bytes of the job's rows, whole and a quarter of them; where they are fewer than probe_link
    sends, and so may pass in a burst, that of probe_link's.
    """
    costs = probe_link(transport, device)
    rows = max(1, job.num_tokens // transport.size)
    row_bytes = job.model.hidden_size * job.dtype_bytes
    rate, latency_s, times = costs.bytes_per_s, costs.latency_s, list[float]()
    if rows * row_bytes * (transport.size - 1) > PROBE_BYTES[-1]:
        (few, short), (many, long) = (_exchange_s(transport, device, count, row_bytes) for count in (rows // 4, rows))
        few_s, many_s, times = min(short), min(long), long
        if many_s > few_s:
            rate = (many - few) / (many_s - few_s) / costs.alone_share
            latency_s = min(latency_s, few_s)
    gb_per_s = min(MOST_GB_PER_S, rate / 1e9)
    peak = max(gb_per_s, base.gb_per_s if device.type == "cuda" else 0.0)
    link = replace(
        base,
        gb_per_s=peak,
        efficiency=_share(gb_per_s / peak, scatter(times)),
        latency_us=_probed(latency_s * 1e6),
        us_per_peer=_probed(0.0),  # of these ranks it is within the latency
        alone_share=costs.alone_share,
        is_shared=costs.is_shared,
    )
    return link, costs.contention


def _exchange_s(transport: Transport, device: torch.device, rows: int, row_bytes: int) -> tuple[int, list[float]]:
    """Return the bytes that a rank sends where every peer gets so many rows, and the times of five rounds."""
    splits = [0 if rank == transport.rank else rows for rank in range(transport.size)]
    sent = torch.zeros(sum(splits), row_bytes, dtype=torch.uint8, device=device)
    times = []
    for _ in range(ROUNDS):
        slowest(transport, [0.0])
        started = time.perf_counter()
        transport.exchange(sent, splits, splits).wait()
        _synchronize(device)
        times += slowest(transport, [time.perf_counter() - started])
    return sent.numel(), times
