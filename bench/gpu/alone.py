"""`python -m bench.gpu.alone`: a world of one rank over NCCL: rows, dropped buffers, a captured call, and a rate.

It prints a line of JSON after each check, with all that was found. With --rehearse the world is gloo's, on the CPU,
where nothing can be captured.
"""

import argparse
import json
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from bench.gpu.setting import DAY, REHEARSAL, SMALL, Setting
from tritonmoe.config.overlap import OverlapConfig
from tritonmoe.expert_parallel.expert_parallel_mlp import expert_parallel_mlp
from tritonmoe.experts.moe_mlp import moe_mlp
from tritonmoe.runtime.files import Json
from tritonmoe.tools.benchmarks.device_time import TimedCalls
from tritonmoe.tools.benchmarks.shapes import LayerInputs, draw_inputs
from tritonmoe.transports import ProcessGroupTransport, Transport

__all__ = ["main"]

TIMEOUT_S = 60.0
NUM_TOKENS = 600
CHUNKS = 3
DROPPED_ROUNDS = 50
Step = Callable[[], list[Tensor]]


def main(argv: Sequence[str] | None = None) -> int:
    """Run all of it, and print what came of each check."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.alone", description=__doc__)
    parser.add_argument("--rehearse", action="store_true", help="over gloo, on this CPU")
    setting = REHEARSAL if parser.parse_args(argv).rehearse else DAY
    on_gpu = setting.device.type == "cuda"
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    transport = ProcessGroupTransport(timeout_s=TIMEOUT_S)
    checks = {
        "rows are those that were sent": _same_rows,
        "dropped buffers are not overwritten": _dropped_buffers,
        "a call has the bits of one device": _call_is_right,
    }
    if on_gpu:
        checks["a captured call replays on other tokens"] = _capture
    found: Json = {"gb_per_s": _gb_per_s(transport, setting), "checks": {}}
    for name, check in checks.items():
        found["checks"][name] = check(transport, setting)
        print(json.dumps(found), flush=True)  # NCCL may end the process in the next one
    transport.close()
    dist.destroy_process_group()
    return 0


def _rows(setting: Setting, num_rows: int, seed: int) -> Tensor:
    generator = torch.Generator(setting.device).manual_seed(seed)
    width = SMALL.hidden_size
    return torch.randn(num_rows, width, generator=generator, device=setting.device).to(setting.dtype)


def _same_rows(transport: Transport, setting: Setting) -> bool:
    rows = _rows(setting, NUM_TOKENS, 0)
    out = torch.full_like(rows, torch.nan)
    received = transport.exchange(rows, [NUM_TOKENS], [NUM_TOKENS], out).wait()
    return received.data_ptr() == out.data_ptr() and torch.equal(received, rows)


def _dropped_buffers(transport: Transport, setting: Setting) -> bool:
    """Drop the rows as soon as they are posted, and fill what the allocator gives next: it must be other memory."""
    is_right = True
    for seed in range(DROPPED_ROUNDS):
        expected = _rows(setting, NUM_TOKENS, seed)
        pending = transport.exchange(expected.clone(), [NUM_TOKENS], [NUM_TOKENS])
        torch.full_like(expected, torch.nan)
        received = pending.wait()
        del pending
        torch.full_like(expected, torch.nan)
        is_right &= torch.equal(received, expected)
    return is_right


def _step(transport: Transport, inputs: LayerInputs, overlap: OverlapConfig, backend: str) -> Step:
    """Return a call that gives y and every gradient."""
    leaves = list(inputs.leaves.values())

    def run() -> list[Tensor]:
        y = expert_parallel_mlp(
            *(inputs.x, inputs.topk_ids, inputs.topk_weights),
            **inputs.arguments,
            num_experts=inputs.shape.num_experts,
            transport=transport,
            overlap=overlap,
            backend=backend,
        )
        return [y.detach(), *torch.autograd.grad(y, leaves, inputs.dout)]

    return run


def _overlap(capacity: float | None = None) -> OverlapConfig:
    """Return chunks that all travel, though this rank owns every expert."""
    return OverlapConfig(CHUNKS, local_first=False, chunk_by="tokens", capacity=capacity)


def _call_is_right(transport: Transport, setting: Setting) -> bool:
    inputs = draw_inputs(SMALL, NUM_TOKENS, "zipf", setting.dtype, setting.device)
    y = moe_mlp(inputs.x, inputs.topk_ids, inputs.topk_weights, **inputs.arguments, backend=setting.layer_backend)
    expected = [y.detach(), *torch.autograd.grad(y, list(inputs.leaves.values()), inputs.dout)]
    return all(map(torch.equal, _step(transport, inputs, _overlap(), setting.layer_backend)(), expected))


def _capture(transport: Transport, setting: Setting) -> bool:
    """Capture a call, exchanges and all, and replay it on other tokens: the bits must be an eager call's."""
    inputs = draw_inputs(SMALL, NUM_TOKENS, "uniform", setting.dtype, setting.device)
    captured, eager = (_step(transport, inputs, _overlap(room), "triton") for room in (2.0, None))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        captured()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = captured()
    is_right = True
    for seed in (1, 2, 3):
        inputs.x.data.copy_(_rows(setting, NUM_TOKENS, seed))
        graph.replay()
        is_right &= all(map(torch.equal, results, eager()))
    return is_right


def _gb_per_s(transport: Transport, setting: Setting) -> float:
    """Return the rate at which rows go to their own rank, in 1e9 bytes a second."""
    num_rows = NUM_TOKENS if setting.is_rehearsal else 1 << 17
    rows = _rows(setting, num_rows, 0)
    out = torch.empty_like(rows)
    run = TimedCalls(lambda: transport.exchange(rows, [num_rows], [num_rows], out).wait(), setting.device, 0.0)
    seconds = sorted(run.seconds() for _ in range(max(3, setting.rounds)))
    return round(rows.numel() * rows.element_size() / seconds[len(seconds) // 2] / 1e9, 2)


if __name__ == "__main__":
    raise SystemExit(main())
