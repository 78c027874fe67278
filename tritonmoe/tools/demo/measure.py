"""One MoE layer behind an emulated link: forward and backward, serial against overlapped, round by round."""

import statistics
import time
from dataclasses import dataclass

import torch

from tritonmoe.config.layer import MoEConfig
from tritonmoe.config.overlap import OverlapConfig
from tritonmoe.layer import MoELayer, report_of
from tritonmoe.overlap.report import LayerReport, PassReport
from tritonmoe.tools.demo.training import row_bytes_per_layer
from tritonmoe.tools.report.timeline import Timeline, layer_timeline
from tritonmoe.transports import LinkModel, Transport
from tritonmoe.transports.emulated.emulated_ranks import run_on_emulated_ranks

__all__ = ["LATENCY_US", "VARIANTS", "LayerMeasurement", "TimedLayer", "measure_layer"]

NUM_CHUNKS = 4
VARIANTS = {
    "serial": OverlapConfig(num_chunks=NUM_CHUNKS, serial=True),
    "overlapped": OverlapConfig(num_chunks=NUM_CHUNKS),
    "serial, one chunk": OverlapConfig(num_chunks=1, serial=True),
}
"""The same chunks with and without overlap, and the batch in one piece, which may be the faster one in series."""

LATENCY_US = 20.0
CALIBRATION_ROUNDS = 3
MIN_ROUNDS = 3


@dataclass(frozen=True)
class TimedLayer:
    """The layer that is timed, and the tokens of each rank."""

    num_tokens: int
    hidden_size: int
    intermediate_size: int
    num_experts: int = 8
    top_k: int = 2
    dtype: torch.dtype = torch.float32

    @classmethod
    def of_device(cls, device: torch.device) -> "TimedLayer":
        """Return a shape whose products are long beside the cost of starting them."""
        if device.type == "cuda":
            return cls(8192, 1024, 2048, dtype=torch.bfloat16)
        return cls(512, 256, 512)


@dataclass
class LayerMeasurement:
    """What all ranks saw, over the rounds."""

    shape: TimedLayer
    bandwidth_gb_per_s: float
    """The rate of the link, chosen so that the four row exchanges take as long as the layer does without a link."""
    free_link_s: float
    """The seconds of the layer's compute: of forward and backward without a link, in the shortest calibration round."""
    exchange_s: float
    """The seconds that the link needs for the rows of the busiest rank."""
    traffic_rows: list[list[int]]
    """(W, W): how many tokens of rank i rank k needs, in every call that is timed: all have the same batch."""
    total_s: dict[str, list[float]]
    """By variant: the seconds of forward and backward of each round, the longest of the ranks."""
    exposed_share: dict[str, float]
    """By variant: waiting for exchanges / exchanges under way, each summed over ranks and rounds."""
    timelines: dict[str, list[Timeline]]
    """By variant: every rank in the round that took median_s."""

    @property
    def shown(self) -> list[Timeline]:
        """The serial and the overlapped timeline of the rank that was the slowest: they take median_s."""
        return [max(self.timelines[variant], key=lambda one: one.total_s) for variant in ("serial", "overlapped")]

    def median_s(self, variant: str) -> float:
        """Return the seconds of a round that was measured: of an even number of rounds the lower median."""
        return statistics.median_low(self.total_s[variant])

    def speed_ups(self, baseline: str) -> list[float]:
        """Return baseline / overlapped of each round."""
        pairs = zip(self.total_s[baseline], self.total_s["overlapped"], strict=True)
        return [serial / overlapped for serial, overlapped in pairs]

    def speed_up(self, baseline: str) -> float:
        """Return the ratio of the medians; it lies between the smallest and the largest of the rounds' own."""
        return self.median_s(baseline) / self.median_s("overlapped")


def measure_layer(
    shape: TimedLayer, num_ranks: int, device: torch.device, *, seed: int, rounds: int, time_limit_s: float
) -> LayerMeasurement:
    """Pick a link for this machine, then time the variants in turn on one batch.

    It stops before `rounds` where time_limit_s is over, though not before three rounds.
    """

    def run(variants: dict[str, OverlapConfig], num_rounds: int, link: LinkModel | None) -> list[_Reports]:
        return run_on_emulated_ranks(
            lambda transport: _run_rank(transport, shape, variants, device, seed, num_rounds, time_limit_s),
            num_ranks,
            device=device,
            link=link,
            timeout_s=120.0,
        )

    calibration = run({"overlapped": VARIANTS["overlapped"]}, CALIBRATION_ROUNDS, None)
    free_link_s = min(_longest_s(calibration, "overlapped"))
    first = calibration[0]["overlapped"][0]
    busiest_bytes = max(row_bytes_per_layer(first.traffic_bytes, rank) for rank in range(num_ranks))
    bandwidth_gb_per_s = busiest_bytes / free_link_s / 1e9
    measured = run(VARIANTS, rounds, LinkModel(bandwidth_gb_per_s, LATENCY_US))
    total_s = {variant: _longest_s(measured, variant) for variant in VARIANTS}
    typical = {variant: seconds.index(statistics.median_low(seconds)) for variant, seconds in total_s.items()}
    return LayerMeasurement(
        shape=shape,
        bandwidth_gb_per_s=bandwidth_gb_per_s,
        free_link_s=free_link_s,
        exchange_s=busiest_bytes / (bandwidth_gb_per_s * 1e9),
        traffic_rows=measured[0]["overlapped"][typical["overlapped"]].traffic_rows.tolist(),
        total_s=total_s,
        exposed_share={variant: _exposed_share(measured, variant) for variant in VARIANTS},
        timelines={
            variant: [layer_timeline(variant, reports[variant][typical[variant]]) for reports in measured]
            for variant in VARIANTS
        },
    )


_Reports = dict[str, list[LayerReport]]
"""By variant: one rank's report of every round."""


def _run_rank(
    transport: Transport,
    shape: TimedLayer,
    variants: dict[str, OverlapConfig],
    device: torch.device,
    seed: int,
    num_rounds: int,
    time_limit_s: float,
) -> _Reports:
    config = MoEConfig(shape.hidden_size, shape.intermediate_size, shape.num_experts, shape.top_k)
    layers = {
        variant: MoELayer(
            config,
            transport,
            overlap,
            generator=torch.Generator().manual_seed(seed),
            device=device,
            dtype=shape.dtype,
        )
        for variant, overlap in variants.items()
    }
    generator = torch.Generator().manual_seed(seed * 1009 + transport.rank + 1)
    size = (shape.num_tokens, shape.hidden_size)
    x = torch.randn(size, generator=generator).to(device, shape.dtype).requires_grad_()
    dout = torch.randn(size, generator=generator).to(device, shape.dtype)
    reports: _Reports = {variant: [] for variant in variants}
    started = time.perf_counter()
    for number in range(num_rounds + 1):
        for variant, layer in layers.items():
            _barrier(transport, device)
            y = layer(x)
            # A rank that comes late to the backward would make the others' waiting look like communication.
            _barrier(transport, device)
            y.backward(dout)
            x.grad = None
            layer.zero_grad(set_to_none=True)
            report = report_of(layer)
            for layer_pass in _passes(report):
                _ = layer_pass.steps  # read now: until then they hold the exchanges' rows
            if number > 0:  # the first round warms up
                reports[variant].append(report)
        is_over = number >= MIN_ROUNDS and time.perf_counter() - started > time_limit_s
        if _any_rank(transport, is_over):
            break
    return reports


def _any_rank(transport: Transport, flag: bool) -> bool:
    """Return whether the value is True on any rank; every rank waits for all."""
    flags = torch.full((transport.size, 1), int(flag), dtype=torch.int64)
    return bool(transport.exchange_counts(flags).any())


def _barrier(transport: Transport, device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    transport.barrier()


def _passes(report: LayerReport) -> list[PassReport]:
    return [report.forward] if report.backward is None else [report.forward, report.backward]


def _longest_s(ranks: list[_Reports], variant: str) -> list[float]:
    """Return forward and backward of each round, the longest of the ranks."""
    by_rank = [[sum(p.total_s for p in _passes(report)) for report in reports[variant]] for reports in ranks]
    return [max(seconds) for seconds in zip(*by_rank, strict=True)]


def _exposed_share(ranks: list[_Reports], variant: str) -> float:
    passes = [p for reports in ranks for report in reports[variant] for p in _passes(report)]
    communication_s = sum(p.communication_s for p in passes)
    # A thread that is woken late, on busy cores, has waited for longer than its exchange took.
    exposed_s = sum(min(p.exposed_communication_s, p.communication_s) for p in passes)
    return exposed_s / communication_s if communication_s else 0.0
