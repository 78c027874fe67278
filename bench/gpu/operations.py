"""Single operations: device times beside dense products, the kernels of a step, Python's share, and tiles to try."""

import time
from typing import Any

import torch

from bench.gpu.setting import HEADLINE
from bench.gpu.workbench import Call, Workbench, with_entries
from tritonmoe.experts.moe_mlp import moe_mlp
from tritonmoe.ops.aot import TARGETS
from tritonmoe.ops.kernels import launch
from tritonmoe.ops.kernels.tiles import measured_tiles
from tritonmoe.runtime.files import Json
from tritonmoe.tools.benchmarks.roofline import kernel_work
from tritonmoe.tools.benchmarks.shapes import dense_products
from tritonmoe.tools.benchmarks.tile_candidates import Candidate
from tritonmoe.tools.benchmarks.tuning import try_candidate

__all__ = [
    "OPERATIONS",
    "measure_dense",
    "measure_host",
    "measure_operation",
    "profile_step",
    "remeasure_tile",
    "try_tile",
]

OPERATIONS = (
    *("group", "up", "up, inference", "down", "gather_sum"),
    *("down_grad", "up_grad", "gather_sum_grad", "weight_grad W1", "weight_grad W2"),
)
HOST_CALLS = 100
"""So few launches fit into a GPU's queue: the host never waits."""
MOST_ROWS = 60


def measure_dense(bench: Workbench, size: int) -> Json:
    """Time a square product: the most that a grouped product could reach on this card, today."""
    left, right = (torch.randn(size, size, device=bench.setting.device).to(bench.setting.dtype) for _ in range(2))
    found = bench.time({"product": lambda: left @ right}, "product")
    return {**found, "tflops": 2 * size**3 / found["times"]["product"]["us"] / 1e6}


def measure_operation(bench: Workbench, operation: str, shape: str, num_tokens: int) -> Json:
    """Time one operation in the table's tiles beside a dense product of its FLOPs, where it has one."""
    inputs = bench.inputs(shape, num_tokens, "uniform")
    call = bench.operations(inputs)[operation]
    variants: dict[str, Call] = {"kernel": with_entries(call, {})}
    dense = dense_products(inputs)
    if operation in dense:
        variants["dense product"] = dense[operation]
    found = bench.time(variants, "kernel")
    works = kernel_work(inputs.shape, num_tokens, element_bytes=inputs.x.element_size())
    work = works[operation.removesuffix(", inference")]
    for name, timed in found["times"].items():
        timed["tflops"] = work.flops / timed["us"] / 1e6
        if name == "kernel":
            timed["gb_per_s"] = round(work.num_bytes / timed["us"] / 1e3, 1)
            if operation in dense:
                timed["fraction_of_dense"] = round(found["times"]["dense product"]["us"] / timed["us"], 3)
    return found


def profile_step(bench: Workbench, shape: str, num_tokens: int, entries: Json) -> Json:
    """Return the device's own time of every kernel of a forward and backward, as PyTorch's profiler sees it."""
    inputs = bench.inputs(shape, num_tokens, "uniform")
    leaves = list(inputs.leaves.values())

    def step() -> None:
        y = moe_mlp(
            inputs.x, inputs.topk_ids, inputs.topk_weights, **inputs.arguments, backend=bench.setting.layer_backend
        )
        torch.autograd.grad(y, leaves, inputs.dout)

    run = with_entries(step, entries)
    run()
    is_gpu = bench.setting.device.type == "cuda"
    activity = torch.profiler.ProfilerActivity.CUDA if is_gpu else torch.profiler.ProfilerActivity.CPU
    steps = 3
    started = time.monotonic()
    with torch.profiler.profile(activities=[activity]) as profile:
        for _ in range(steps):
            run()
        if is_gpu:
            torch.cuda.synchronize()

    def own_us(event: Any) -> float:
        return event.self_device_time_total if is_gpu else event.self_cpu_time_total

    events = sorted(profile.key_averages(), key=own_us, reverse=True)
    kernels = [
        {"kernel": event.key[:200], "calls": event.count / steps, "us": round(own_us(event) / steps, 2)}
        for event in events[:MOST_ROWS]
        if own_us(event) > 0
    ]
    total = round(sum(own_us(event) for event in events) / steps, 2)
    return {"kernels": kernels, "total_us": total, "clocks": bench.clocks.since(started)}


def measure_host(bench: Workbench, operation: str, num_tokens: int) -> Json:
    """Return the host's microseconds for a call of an operation, and its launches: few tokens, and nobody waits."""
    inputs = bench.inputs(HEADLINE, num_tokens, "uniform")
    call = bench.operations(inputs)[operation]
    is_gpu = bench.setting.device.type == "cuda"
    samples = []
    with measured_tiles.using({}):
        for _ in range(bench.setting.rounds):
            count = HOST_CALLS if is_gpu else 1
            started = time.perf_counter()
            for _ in range(count):
                call()
            samples.append((time.perf_counter() - started) / count)
            if is_gpu:
                torch.cuda.synchronize()
        target = launch.target_of(bench.setting.device) if is_gpu else None
        with launch.recording(target or TARGETS["sm_90"]) as launches:
            call()
    us = sorted(1e6 * seconds for seconds in samples)
    return {"host_us": round(us[len(us) // 2], 2), "samples_us": us, "launches": len(launches)}


def try_tile(bench: Workbench, key: str, fields: dict[str, int | str], num_tokens: int) -> Json:
    """Measure a tile for one of the headline's products beside the table's."""
    return _try(bench, key, fields, num_tokens, bench.setting.rounds)


def remeasure_tile(bench: Workbench, key: str, entries: Json, num_tokens: int) -> Json:
    """Measure the tile that was the fastest of its product once more, in four times as many rounds."""
    if key not in entries:
        return {"left_out": "no tile was faster than the table's"}
    return {"fields": entries[key], **_try(bench, key, entries[key], num_tokens, 4 * bench.setting.rounds)}


def _try(bench: Workbench, key: str, fields: dict[str, int | str], num_tokens: int, rounds: int) -> Json:
    call = bench.calls_by_key(bench.inputs(HEADLINE, num_tokens, "uniform"))[key]
    started = time.monotonic()
    found = try_candidate(call, Candidate(key, fields), bench.setting.device, rounds, bench.setting.batch_s)
    return {**found, "clocks": bench.clocks.since(started)}
