"""Search tile configurations on the GPU that is there: one field at a time, and keep what is really faster."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict

import torch

from tritonmoe.benchmarks.gpu_kernels import operation_calls
from tritonmoe.benchmarks.shapes import LayerShape, draw_inputs
from tritonmoe.benchmarks.timing import interleave
from tritonmoe.kernels.tiles import measured as measured_tiles
from tritonmoe.kernels.tiles.config import GATHERS

__all__ = ["CHOICES", "descend", "tune"]

CHOICES: dict[str, tuple[int, ...] | tuple[str, ...]] = {
    "block_m": (16, 32, 64, 128),
    "block_n": (16, 32, 64, 128, 256),
    "block_k": (32, 64, 128),
    "num_warps": (4, 8),
    "num_stages": (2, 3, 4, 5, 6),
    "group_m": (1, 4, 8, 16),
    "subtiles": (1, 2, 4),
    "persistent": (False, True),
    "tma": (False, True),
    "gather": GATHERS,
}
Fields = Mapping[str, int | str]
"""Some of the fields of a TileConfig, by name."""
LEAST_GAIN = 1.02
"""An entry must be so many times as fast as the heuristic's: less is noise."""
BATCH_S = 0.01


def descend(
    start: Fields, seconds: Callable[[Fields], float | None], passes: int = 2
) -> Iterator[tuple[dict[str, int | str], float | None, dict[str, int | str]]]:
    """Change one field at a time and keep what is fastest; give every try with its time and the best so far.

    Args:
        start: fields of CHOICES; those left out stay as they are.
        seconds: measures one configuration; None where it can't run.
        passes: at most so many rounds over all fields; a round without a gain is the last.
    """
    best = dict(start)
    best_seconds = seconds(best)
    yield dict(best), best_seconds, dict(best)
    tried = {tuple(best.items())}
    for _ in range(passes):
        before = dict(best)
        for name in start:
            for value in CHOICES[name]:
                candidate = {**best, name: value}
                if tuple(candidate.items()) in tried:
                    continue
                tried.add(tuple(candidate.items()))
                taken = seconds(candidate)
                if taken is not None and (best_seconds is None or taken < best_seconds):
                    best, best_seconds = candidate, taken
                yield dict(candidate), taken, dict(best)
        if best == before:
            return


def tune(
    shape: LayerShape, num_tokens: int, dtype: torch.dtype, device: torch.device, progress: Callable[[str], None]
) -> dict[str, dict[str, int | str]]:
    """Give the entries that make this layer's operations faster than the heuristic's: see `kernels.tiles.measured`."""
    calls = operation_calls(draw_inputs(shape, num_tokens, "uniform", dtype, device), "triton")
    entries: dict[str, dict[str, int | str]] = {}
    done: set[str] = set()
    for name, call in calls.items():
        with measured_tiles.using({}), measured_tiles.asked() as found:
            call()
        for key, config in found.items():
            if key in done:
                continue
            done.add(key)
            progress(f"{name}: {key}: {config}")
            start = {field: value for field, value in asdict(config).items() if field in CHOICES and value != ""}

            def seconds(candidate: Fields, call: Callable[[], object] = call, key: str = key) -> float | None:
                with measured_tiles.using({key: candidate}), measured_tiles.asked() as chosen:
                    taken = _seconds(call)
                used = chosen[key]
                if used.gather != candidate.get("gather", "") or used.num_stages != candidate["num_stages"]:
                    return None  # it fell back to pointers, or to loads that are not asynchronous
                return taken

            best = start
            for number, (candidate, taken, so_far) in enumerate(descend(start, seconds), 1):
                best = so_far
                text = "can't run" if taken is None else f"{taken * 1e6:.1f} us"
                progress(f"  {number}: {_changes(start, candidate) or 'heuristic'}: {text}")
            gain = _gain(call, key, best) if best != start and _agrees(call, key, best) else 1.0
            if gain >= LEAST_GAIN:
                entries[key] = {field: value for field, value in best.items() if value != start[field]}
                progress(f"  kept {_changes(start, best)}: {gain:.2f} times as fast")
            else:
                progress("  kept the heuristic's")
    return entries


def _changes(start: Fields, candidate: Fields) -> str:
    return ", ".join(f"{field} {value}" for field, value in candidate.items() if value != start[field])


def _seconds(call: Callable[[], object]) -> float | None:
    """Time one call in a batch; None where its configuration doesn't compile or doesn't fit."""
    try:
        call()
        torch.cuda.synchronize()
        started = time.perf_counter()
        call()
        torch.cuda.synchronize()
        count = max(1, min(100, round(BATCH_S / (time.perf_counter() - started))))
        started = time.perf_counter()
        for _ in range(count):
            call()
        torch.cuda.synchronize()
        return (time.perf_counter() - started) / count
    except Exception:  # out of registers or shared memory, or a tile that the compiler refuses
        return None


def _agrees(call: Callable[[], object], key: str, best: Fields) -> bool:
    """Say whether the results are the heuristic's, up to the rounding of sums: compilers have bugs."""
    with measured_tiles.using({}):
        expected = _tensors(call())
    with measured_tiles.using({key: best}):
        found = _tensors(call())
    return all(
        bool((one.float() - other.float()).abs().max() <= 0.05 * other.float().abs().max())
        for one, other in zip(found, expected, strict=True)
    )


def _tensors(result: object) -> list[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        return [result] if result.is_floating_point() and result.numel() else []
    return [tensor for item in result for tensor in _tensors(item)] if isinstance(result, tuple) else []


def _gain(call: Callable[[], object], key: str, best: Fields) -> float:
    """Compare with the heuristic in the same interleaved rounds."""

    def run(entries: measured_tiles.Entries) -> Callable[[], None]:
        def batch() -> None:
            with measured_tiles.using(entries):
                for _ in range(20):
                    call()

        return batch

    samples = interleave({"heuristic": run({}), "tuned": run({key: best})}, rounds=9)
    rounds = min(map(len, samples.values()))
    pairs = zip(samples["heuristic"][:rounds], samples["tuned"][:rounds], strict=True)
    return statistics.median(before / after for before, after in pairs)
