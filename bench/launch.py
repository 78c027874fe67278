"""`python -m bench.launch`: what a launch, an operation and a layer take of the host, without a GPU.

Triton compiles for an H100 and launches through its own launcher, over a driver that runs nothing (stand_in_driver.c),
so that what is left is Python, Triton's launcher and PyTorch's allocator, here the CPU's. A layer of 64 tokens, whose
kernels are shorter than that, waits for the host. Beside it stand transformers' grouped_mm experts, computed by
PyTorch's CPU kernels on a layer so small that arithmetic hardly counts. launch_parts.py says where a call's part goes.
"""

import argparse
import ctypes
import gc
import os
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import launch_parts

__all__ = ["main"]

NUM_TOKENS, NUM_EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 64, 128, 8, 64, 64
PEER_TOKENS, PEER_EXPERTS, PEER_TOP_K, PEER_WIDTH = 1, 2, 1, 16
CALLS = 20
"""Calls that are timed together."""
WHOLE = ("moe_mlp, forward", "moe_mlp, forward+backward")


def take_launches(folder: Path) -> ctypes.c_ulonglong:
    """Compile the stand-in driver into `folder`, let Triton find it there, and give its count of launches."""
    library = folder / "libcuda.so.1"
    source = Path(__file__).with_name("stand_in_driver.c")
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-O1", "-w", "-Wl,-soname,libcuda.so.1", "-o", library, source], check=True
    )
    (folder / "libcuda.so").symlink_to(library)
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    driver_library = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)

    import torch
    from triton.backends.nvidia.driver import CudaDriver
    from triton.runtime.driver import driver

    from tritonmoe.ops import aot
    from tritonmoe.ops.backends import backend_choice
    from tritonmoe.ops.kernels import launch

    class StandIn(CudaDriver):
        """Triton's driver of NVIDIA GPUs where PyTorch sees none."""

        def __init__(self) -> None:
            super().__init__()
            self.get_device_capability = lambda device=0: (9, 0)
            self.get_current_stream = lambda device: 0
            self.get_current_device = lambda: 0
            self.set_current_device = lambda device: None

    driver.set_active(StandIn())
    replaced: list[tuple[Any, str, Any]] = [
        (torch.cuda, "current_device", lambda: None),  # as the index of a tensor on the CPU is
        (launch, "target_of", lambda device: aot.TARGETS["sm_90"]),
        (backend_choice, "_triton_unusable_reason", lambda *_: None),
    ]
    for module, name, value in replaced:
        setattr(module, name, value)
    return ctypes.c_ulonglong.in_dll(driver_library, "num_launches")


def operations() -> dict[str, Callable[[], object]]:
    """Return the layer, forward and with its backward, and every operation alone."""
    import torch

    import tritonmoe as tm
    from tritonmoe.config.layer import ExpertLayout, Projection
    from tritonmoe.ops.backends import triton as ops
    from tritonmoe.ops.backends.ops import NO_GRADIENTS, GradientOperands, required

    generator, layout = torch.Generator().manual_seed(0), ExpertLayout()

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    x = draw(NUM_TOKENS, HIDDEN).requires_grad_()
    w1 = draw(NUM_EXPERTS, 2 * INTERMEDIATE, HIDDEN).requires_grad_()
    w2 = draw(NUM_EXPERTS, HIDDEN, INTERMEDIATE).requires_grad_()
    topk_weights, topk_ids = torch.rand(NUM_TOKENS, NUM_EXPERTS, generator=generator).topk(TOP_K)
    topk_weights.requires_grad_()
    sorts = ops.group

    def group(*args: Any, **keywords: Any) -> Any:
        grouping = sorts(*args, **keywords)
        grouping.inverse.zero_()  # which PyTorch reads; no kernel ran that filled it
        return grouping

    ops.group = group

    def forward() -> torch.Tensor:
        return tm.moe_mlp(x, topk_ids, topk_weights, w1, w2, backend="triton")

    def inference() -> None:
        with torch.no_grad():
            forward()

    def training() -> None:
        y = forward()
        torch.autograd.grad(y, (x, topk_weights, w1, w2), y.detach())

    rows, weights, up, down = x.detach(), topk_weights.detach(), w1.detach(), w2.detach()
    grouping = group(topk_ids, NUM_EXPERTS)
    gate_up, projection = Projection(up, None, layout), Projection(down, None, layout)
    h, a = map(required, ops.up(rows, gate_up, grouping, "silu"))
    y = ops.down(a, projection, grouping)
    needs = NO_GRADIENTS._replace(gate_up_proj=True)
    operands = GradientOperands(x=rows, dh=h)
    return {
        "moe_mlp, forward": inference,
        "moe_mlp, forward+backward": training,
        "group": lambda: group(topk_ids, NUM_EXPERTS),
        "up": lambda: ops.up(rows, gate_up, grouping, "silu"),
        "down": lambda: ops.down(a, projection, grouping),
        "gather_sum": lambda: ops.gather_sum(y, grouping.inverse, weights),
        "down_grad": lambda: ops.down_grad(rows, projection, h, weights, grouping, "silu"),
        "up_grad": lambda: ops.up_grad(h, gate_up, grouping),
        "weight_grad of the up-projection": lambda: ops.weight_grad(grouping, layout, operands, needs),
    }


def peer() -> dict[str, Callable[[], object]]:
    """Return transformers' grouped_mm experts, forward and with their backward."""
    import torch

    from tritonmoe.integrations.transformers.bench_model import experts_function

    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    x = draw(PEER_TOKENS, PEER_WIDTH).requires_grad_()
    w1 = torch.nn.Parameter(draw(PEER_EXPERTS, 2 * PEER_WIDTH, PEER_WIDTH))
    w2 = torch.nn.Parameter(draw(PEER_EXPERTS, PEER_WIDTH, PEER_WIDTH))
    topk_weights, topk_ids = torch.rand(PEER_TOKENS, PEER_EXPERTS, generator=generator).bfloat16().topk(PEER_TOP_K)
    topk_weights.requires_grad_()
    experts = experts_function("grouped_mm", w1, w2)

    def inference() -> None:
        with torch.no_grad():
            experts(x, topk_ids, topk_weights)

    def training() -> None:
        y = experts(x, topk_ids, topk_weights)
        torch.autograd.grad(y, (x, topk_weights, w1, w2), y.detach())

    return {"grouped_mm, forward": inference, "grouped_mm, forward+backward": training}


def repeated(run: Callable[[], object]) -> Callable[[], None]:
    def calls() -> None:
        for _ in range(CALLS):
            run()

    return calls


def parts_of(tops: Sequence[launch_parts.Part], costs: Mapping[str, float]) -> dict[str, list[dict[str, Any]]]:
    """Print and return where each call's part goes; costs: as add_up() takes them."""
    tables = {}
    for top in tops:
        tables[top.what] = rows = launch_parts.add_up(top, costs)
        print(f"{top.what}: own, and launches")
        for row in rows:
            print(f"  {row['what']:32} {row['calls'] or '-':>3} {row['own']:12,.1f} {row['launches']:12,.1f}")
    return tables


def time_here(rounds: int) -> list[dict[str, Any]]:
    """Return a row for every operation, with the time that it takes of the host."""
    from tritonmoe.tools.benchmarks.timing import interleave, summarize

    with tempfile.TemporaryDirectory() as folder:
        num_launches = take_launches(Path(folder))
        results, own = [], operations()
        for runs in (own, peer()):
            for name, run in runs.items():
                run()
                before = num_launches.value
                run()
                launches = num_launches.value - before
                gc.freeze()  # what the compiler has left would be looked through again and again
                (seconds,) = interleave({name: repeated(run)}, rounds).values()
                result = {"what": name, "launches": launches, **summarize([1e3 * time / CALLS for time in seconds])}
                results.append({key.replace("_ms", "_us"): value for key, value in result.items()})
                print(results[-1], flush=True)
        tops = [launch_parts.watched(name, own[name]) for name in WHOLE]
        runs = {launch_parts.NOTHING: launch_parts.nothing()}
        for top in tops:
            runs |= top.walk()
        seconds_of = launch_parts.thread_times(runs, rounds)
        parts_of(tops, {name: 1e6 * statistics.median(seconds) for name, seconds in seconds_of.items()})
    return results


def time_beside(trees: Mapping[str, Path], rounds: int) -> list[dict[str, Any]]:
    """Return a row for each whole call: the time of each tree's, in turn with the others', and the quotients."""
    from tritonmoe.tools.benchmarks.timing import quartiles

    results = []
    for name, seconds in launch_parts.times_of_trees(trees, WHOLE, rounds).items():
        here, beside = seconds["here"], seconds["beside"]
        quotients = [one / other for one, other in zip(here, beside, strict=True)]
        lower, upper = quartiles(quotients)
        results.append(
            {
                "what": name,
                "us": {label: round(1e6 * statistics.median(times), 1) for label, times in seconds.items()},
                "quotient": round(statistics.median(here) / statistics.median(beside), 4),
                "quotients": [round(quartile, 4) for quartile in (lower, statistics.median(quotients), upper)],
                "rounds": rounds,
                "load": os.getloadavg()[0],
            }
        )
        print(results[-1], flush=True)
    return results


def count(trees: Mapping[str, Path]) -> list[dict[str, Any]]:
    """Return a row for every operation of each tree, with its instructions; here also those of its parts."""
    counts = {label: launch_parts.count_instructions(tree, label == "here") for label, tree in trees.items()}
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        take_launches(Path(folder))
        runs = operations()
        parts = parts_of([launch_parts.watched(name, runs[name]) for name in WHOLE], counts["here"])
    for name in runs:
        result: dict[str, Any] = {"what": name, **{label: round(found[name]) for label, found in counts.items()}}
        if "beside" in counts:
            result["quotient"] = round(counts["here"][name] / counts["beside"][name], 4)
        results.append(result | ({"parts": parts[name]} if name in parts else {}))
        print({key: value for key, value in result.items() if key != "parts"}, flush=True)
    return results


def main() -> None:
    from tritonmoe.tools.benchmarks.timing import add_arguments, write_json

    parser = argparse.ArgumentParser(prog="python -m bench.launch", description=__doc__)
    add_arguments(parser, rounds=21)
    parser.add_argument("--beside", type=Path, metavar="TREE", help="compare with another source tree, in turn with it")
    parser.add_argument("--instructions", action="store_true", help="count instructions by valgrind instead of time")
    arguments = parser.parse_args()
    trees = {"here": Path(__file__).parents[1]}
    if arguments.beside is not None:
        trees["beside"] = arguments.beside.resolve()
    if arguments.instructions:
        write_json(arguments.json, "launch_instructions", count(trees))
    elif arguments.beside is not None:
        write_json(arguments.json, "launch_beside", time_beside(trees, arguments.rounds))
    else:
        write_json(arguments.json, "launch", time_here(arguments.rounds))


if __name__ == "__main__":
    main()
