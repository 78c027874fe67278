"""What the simulator needs, measured: the link of a transport, and what a layer's steps cost by their size."""

import copy
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from tritonmoe.config.overlap import OverlapPlan
from tritonmoe.expert_parallel.state import LayerCalls
from tritonmoe.layer import GroupedExperts, report_of
from tritonmoe.overlap.report import LayerReport
from tritonmoe.overlap.simulation.cost_model import LinkCosts, StepCosts, fit_line
from tritonmoe.overlap.tuning.measured_calls import median_steps
from tritonmoe.placement.expert_shards import ExpertShards, Sharding, attach_shards
from tritonmoe.runtime.host_device import wait_for_current_stream
from tritonmoe.transports import LocalTransport, PendingExchange, Transport

__all__ = ["probe", "probe_link", "probe_steps", "slowest"]

PROBE_BYTES = (2**10, 2**14, 2**17, 2**19, 2**21, 2**22)
"""Bytes that a rank sends, all its peers together."""
PROBE_ROUNDS = 3
ROW_BYTES = 256
SHARED_RATIO = 0.75
"""Of two exchanges posted together, the first ends after half of the time where they take turns, at the end where they
share the link."""
BESIDE_ROUNDS = 5
BESIDE_S = 0.02
"""How long the matrix products beside an exchange run at most."""
NUM_CALIBRATING = 8
MOST_BESIDE_BYTES = {"cpu": 2**25, "cuda": 2**28}
"""Of the exchange beside which matrix products run; 2^28 bytes last 1.3 ms at 200 GB/s."""
MOST_CONTENTION = 0.9


def probe_link(transport: Transport, device: torch.device | str = "cpu") -> LinkCosts:
    """Measure latency, bandwidth and contention of a transport; every rank calls it, and all get the same numbers.

    Least squares over six sizes of the shortest of three rounds, each started together, the slowest rank's time; for
    the contention, matrix products alone and beside an exchange, which lasts as long as they. On one rank there is no
    link: infinitely fast.
    """
    size = transport.size
    if size == 1:
        return LinkCosts(0.0, float("inf"))

    def post(num_bytes: int, count: int) -> tuple[float, list[PendingExchange]]:
        """Post `count` exchanges at once when all ranks are ready, and give the time before."""
        splits = [0 if k == transport.rank else -(-num_bytes // (ROW_BYTES * (size - 1))) for k in range(size)]
        rows = [torch.zeros(sum(splits), ROW_BYTES, dtype=torch.uint8, device=device) for _ in range(count)]
        slowest(transport, [0.0])
        started = time.perf_counter()
        return started, [transport.exchange(part, splits, splits) for part in rows]

    def timed(num_bytes: int, count: int) -> list[float]:
        """Return when each of `count` exchanges was over, the slowest rank's time."""
        started, pending = post(num_bytes, count)
        ends = []
        for exchange in pending:
            exchange.wait()
            wait_for_current_stream(device)  # the exchanges behind this one run on another
            ends.append((exchange.finished_at() or time.perf_counter()) - started)
        return slowest(transport, ends)

    def shortest(num_bytes: int, count: int) -> list[float]:
        rounds = [timed(num_bytes, count) for _ in range(PROBE_ROUNDS)]
        return [min(times) for times in zip(*rounds, strict=True)]

    timed(PROBE_BYTES[0], 1)  # warm up
    latency_s, byte_s = fit_line([(num_bytes, shortest(num_bytes, 1)[0]) for num_bytes in PROBE_BYTES])
    first, second = shortest(PROBE_BYTES[-1], 2)
    together_s = (second - latency_s) / (2 * PROBE_BYTES[-1])
    alone_share = 1.0
    if 0 < together_s < byte_s:
        alone_share, byte_s = together_s / byte_s, together_s
    if not byte_s:
        return LinkCosts(latency_s, float("inf"), first > SHARED_RATIO * second)  # too fast to measure, or to be beside
    bytes_per_s = 1 / byte_s
    num_bytes = int(min(MOST_BESIDE_BYTES[torch.device(device).type], 3 * BESIDE_S * bytes_per_s))
    exchange_s = latency_s + num_bytes / bytes_per_s
    count = _num_products(device, min(BESIDE_S, exchange_s))  # of more the jitter would look like what is lost
    shares = []
    for _ in range(BESIDE_ROUNDS):
        slowest(transport, [0.0])
        alone_s = _multiply(count, device)
        _, pending = post(num_bytes, 1)
        lost_s = _multiply(count, device) - alone_s
        pending[0].wait()
        shares.append(lost_s / max(1e-9, min(alone_s + lost_s, exchange_s)))
    (contention,) = slowest(transport, [min(MOST_CONTENTION, max(0.0, statistics.median(shares)))])
    return LinkCosts(latency_s, bytes_per_s, first > SHARED_RATIO * second, alone_share, contention=contention)


def _multiply(count: int, device: torch.device | str) -> float:
    """Return the seconds of so many small matrix products."""
    left, right = torch.ones(256, 512, device=device), torch.ones(512, 512, device=device)
    started = time.perf_counter()
    for _ in range(count):
        product = left @ right
    float(product[0, 0])  # on a GPU, waits for the current stream only
    return time.perf_counter() - started


def _num_products(device: torch.device | str, seconds: float) -> int:
    """Return how many of them take about so long."""
    _multiply(NUM_CALIBRATING, device)
    return max(1, round(NUM_CALIBRATING * seconds / _multiply(NUM_CALIBRATING, device)))


def slowest(transport: Transport, seconds: list[float]) -> list[float]:
    """Return, for every one of this rank's times, the longest of all ranks; every rank waits for all."""
    own = torch.tensor([round(value * 1e9) for value in seconds], dtype=torch.int64, device="cpu")
    everybody = transport.exchange_counts(own.expand(transport.size, -1))
    return [value / 1e9 for value in everybody.max(0).values.tolist()]


STEP_ROUNDS = 5
PROBE_SIZES = 6
"""Numbers of tokens: all, half of them, a quarter and so on."""


def probe(experts: GroupedExperts, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> tuple[LinkCosts, StepCosts]:
    """Measure the link of a layer's transport, and what its steps cost; every rank calls it, with its own batch.

    With both, simulation.simulator prices any plan on any number of ranks whose work is given, and tuning.search.search
    finds the best one, without a further call. On one device there is no link, and nothing to pack for it.

    Args: as in GroupedExperts.forward. Backward, with the gradients of both tensors, is measured unless under no_grad.
    Returns:
        The link, the same on every rank, and this rank's costs: "experts" in seconds of so many pairs, and so on.
    Example:
        link, costs = probe(layer.experts, x, routing.topk_ids, routing.topk_weights)
        work = LayerWork.of(torch.full((64, 64), 32), pairs_per_row=2, row_bytes=4096, top_k=8)
        seconds, plan = search(OverlapConfig(), work, costs, link, backward=True)[0]
    """
    transport = experts.transport
    link = LinkCosts(0.0, float("inf")) if transport is None else probe_link(transport, x.device)
    return link, probe_steps(experts, x, topk_ids, topk_weights)


def probe_steps(experts: GroupedExperts, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> StepCosts:
    """Measure the steps of a layer call with the batch, and with its first half, quarter, ... down to a 32nd.

    Every step runs alone, since an exchange is waited for before anything else starts; the median of five rounds
    counts. What the experts of half of the batch cost is what a chunk of half of it will. Gradients are dropped, but
    where a weight has a main_grad they are added into it.

    Args: as in probe().
    """
    num_tokens = x.shape[0]
    counts = [num_tokens >> n for n in range(PROBE_SIZES)]
    reports: list[list[LayerReport]] = [[] for _ in counts]

    def run(count: int) -> LayerReport:
        leaves = [of[:count].detach().requires_grad_() for of in (x, topk_weights)]
        y = experts(leaves[0], topk_ids[:count], leaves[1])
        if y.requires_grad:
            weights = [weight for weight in experts.parameters() if weight.requires_grad]
            torch.autograd.grad(y, [*leaves, *weights], torch.ones_like(y))
        return report_of(experts)

    with _one_chunk(experts):
        run(num_tokens)
        for _ in range(STEP_ROUNDS):
            for count, own in zip(counts, reports, strict=True):
                own.append(run(count))
    return StepCosts.through(step for own in reports for step in median_steps(own))


@contextmanager
def _one_chunk(experts: GroupedExperts) -> Iterator[None]:
    """Make a layer run all pairs in one chunk, its own too, and nothing beside an exchange."""
    before = experts.expert_shards
    if before is None:
        alone = LocalTransport()
        shards = ExpertShards(Sharding(alone, None), experts.config.num_experts, LayerCalls(alone))
    else:
        shards = copy.copy(before)
    shards.overlap = OverlapPlan(local_first=False, serial=True, wire_dtype=shards.overlap.wire_dtype)
    attach_shards(experts, shards)
    try:
        yield
    finally:
        attach_shards(experts, before)
