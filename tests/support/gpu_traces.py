"""Traces as torch.profiler writes them on a GPU, of exchanges that are called so, made by hand."""

from typing import Any

__all__ = ["DEEP_EP", "LATE_S", "NEW", "OLD", "event", "gpu_trace"]

LATE_S = 0.005
NEW = "ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)"
OLD = "ncclKernel_SendRecv_RING_SIMPLE_Sum_int8_t(ncclDevComm*, unsigned long, ncclWork*)"
DEEP_EP = (
    "void deep_ep::internode::notify_dispatch<false, 4>(int const*, int*)",
    "void deep_ep::internode::dispatch<false, 4, false>(int4*, float*)",
    "void deep_ep::internode::combine<false, 4, __nv_bfloat16>(int4*, float*)",
)


def event(category: str, name: str, start_us: float, us: float, thread: int, **arguments: Any) -> dict[str, Any]:
    return {
        "ph": "X",
        "cat": category,
        "name": name,
        "ts": start_us,
        "dur": us,
        "pid": 0,
        "tid": thread,
        "args": arguments,
    }


def gpu_trace(rank: int, size: int, names: tuple[str, ...], late: int | None, metadata: bool) -> dict[str, Any]:
    """Return a rank's trace of 6 steps: kernels of 2 ms, each followed by an exchange of 1 ms that all wait for."""
    events, correlation = [], 0
    for step in range(6):
        base = 1e6 + step * 40_000.0
        now = base
        events.append(event("user_annotation", f"ProfilerStep#{step}", base - 300, 39_900, 1))
        for count, name in enumerate(names):
            correlation += 1
            launch = {"correlation": correlation}
            events.append(event("cuda_runtime", "cudaLaunchKernel", base - 200 + correlation % 50, 2, 1, **launch))
            start = now + (1e6 * LATE_S if rank == late and count == 0 else 0.0)
            events.append(event("kernel", "sm90_gemm", start, 2000, 7, **launch, stream=7))
            posted = start + 2000
            latest = base + (count + 1) * 2000 + count * 1000 + (1e6 * LATE_S if late is not None else 0.0)
            correlation += 1
            more: dict[str, Any] = {"correlation": correlation, "stream": 20}
            if metadata:
                more |= {
                    "Collective name": "alltoallv", "Process Group Name": "ep", "Group size": size, "dtype": "BFloat16",
                    "Process Group Ranks": str(list(range(size))), "In msg nelems": 64 * size,
                    "In split size": str([64] * size), "Out split size": str([64] * size), "Seq": step * 2 + count,
                }  # fmt: skip
            runtime = event("cuda_runtime", "cudaLaunchKernelExC", base - 200 + correlation % 50, 2, 1)
            events.append({**runtime, "args": {"correlation": correlation}})
            events.append(event("kernel", name, posted, latest + 1000 - posted, 20, **more))
            now = latest + 1000
    about = {"backend": "nccl", "rank": rank, "world_size": size}
    return {"schemaVersion": 1, "distributedInfo": about, "baseTimeNanoseconds": 10**18, "traceEvents": events}
