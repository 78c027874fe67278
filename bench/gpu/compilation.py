"""Everything that a day will launch, compiled before the first measurement in as many processes as there are cores."""

import concurrent.futures
import contextlib
import multiprocessing
import os
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import triton

from bench.gpu.setting import HEADLINE, Setting
from tritonmoe.aot import ARCHITECTURES, Variant, compile_unchecked, record_launches, source_of
from tritonmoe.backends.check import CASES
from tritonmoe.benchmarks.kept_results import KeptResults
from tritonmoe.benchmarks.tile_candidates import Candidate, judge
from tritonmoe.benchmarks.tuning import candidates_of_layer
from tritonmoe.kernels.tiles import measured as measured_tiles
from tritonmoe.runtime.files import Json, write_whole
from tritonmoe.runtime.processes import ends_with_its_parent

__all__ = ["Kernel", "compile_missing", "headline_candidates", "kernels_of", "variant_of"]

CHECKED_TILES: tuple[dict[str, int | str], ...] = (
    {},
    {"persistent": False},
    {"tma": False},
    {"gather": "copy"},
)
"""What the checks replace in the table's tiles: each changes how operands arrive, or when a tile is stored."""


@dataclass(frozen=True)
class Kernel:
    """One launch, or all that a candidate changes, to be compiled."""

    name: str
    variant: Variant
    kernel: str = ""
    candidate: Candidate | None = None


def variant_of(setting: Setting, shape: str, num_tokens: int) -> Variant:
    """Give a layer as the compiler is asked for it: in bf16, whatever a rehearsal computes in."""
    return Variant.of(setting.shapes[shape], Variant.dtype, num_tokens)


def headline_candidates(setting: Setting, target_name: str) -> list[Candidate]:
    """Give the tiles to try for the headline's products; in a rehearsal the first few of each."""
    found = candidates_of_layer(variant_of(setting, HEADLINE, setting.headline_tokens), target_name)
    if setting.most_candidates is None:
        return found
    by_key: dict[str, list[Candidate]] = {}
    for candidate in found:
        by_key.setdefault(candidate.key, []).append(candidate)
    return [candidate for each in by_key.values() for candidate in each[: setting.most_candidates]]


def kernels_of(setting: Setting, target_name: str) -> list[Kernel]:
    """Give all that is launched, each once, the headline's and its candidates first."""
    target = ARCHITECTURES[target_name].target
    num_tokens = setting.headline_tokens
    headline = variant_of(setting, HEADLINE, num_tokens)
    layers = {f"{HEADLINE} T={num_tokens} {tiles}": replace(headline, tiles=tiles) for tiles in CHECKED_TILES}
    num_headline = len(layers)
    if not setting.is_rehearsal:
        layers |= {f"small {layer.name}": Variant.of(layer, layer.dtype, layer.num_tokens) for layer in CASES}
    others = [(HEADLINE, tokens) for tokens in setting.sweep_tokens]
    others += [(shape, tokens) for shape in setting.other_shapes for tokens in setting.shape_tokens]
    layers |= {f"{shape} T={tokens}": variant_of(setting, shape, tokens) for shape, tokens in others}
    found: list[Kernel] = []
    seen = set()
    for number, (layer, variant) in enumerate(layers.items()):
        if number == num_headline:
            found += [
                Kernel(f"A compile tile {candidate.name}", headline, candidate=candidate)
                for candidate in headline_candidates(setting, target_name)
            ]
        with measured_tiles.using({}):
            launches = record_launches(variant, target)
        for kernel, launch in launches.items():
            key = source_of(launch, target).hash(), str(launch.options)
            if key not in seen:
                seen.add(key)
                found.append(Kernel(f"A compile {layer}: {kernel}", variant, kernel))
    return found


def _compile(job: tuple[Kernel, str]) -> tuple[str, Json]:
    kernel, target_name = job
    started = time.perf_counter()
    if kernel.candidate is not None:
        found: Json = asdict(judge(kernel.variant, target_name, kernel.candidate))
    else:
        with measured_tiles.using({}):
            launch = record_launches(kernel.variant, ARCHITECTURES[target_name].target)[kernel.kernel]
        try:
            compiled = compile_unchecked(launch, ARCHITECTURES[target_name].target)
            found = {"problem": "", "shared_bytes": compiled.metadata.shared}
        except Exception as error:
            found = {"problem": f"{type(error).__name__}: {error}"[:2000]}
    return kernel.name, {**found, "compile_s": round(time.perf_counter() - started, 2)}


def compile_missing(
    kernels: Sequence[Kernel], target_name: str, results: KeptResults, say: Callable[[str], None]
) -> None:
    """Compile what is in no result, or in another cache than Triton's here: a new machine has an empty one."""
    cache = _cache_token()
    missing = [kernel for kernel in kernels if results.by_case.get(kernel.name, {}).get("cache") != cache]
    started = time.perf_counter()
    if missing:
        context = multiprocessing.get_context("spawn")
        with (
            _without_interpreter(),
            concurrent.futures.ProcessPoolExecutor(
                min(os.cpu_count() or 1, len(missing)), mp_context=context, initializer=ends_with_its_parent
            ) as pool,
        ):
            jobs = [pool.submit(_compile, (kernel, target_name)) for kernel in missing]
            for number, job in enumerate(concurrent.futures.as_completed(jobs), 1):
                name, found = job.result()
                results.add(name, {**found, "cache": cache})
                if found["problem"] or number % 20 == 0:
                    say(f"compiled {number} of {len(missing)}; {name}: {found['problem'] or 'fits'}")
    all_s = sum(results.by_case[kernel.name]["compile_s"] for kernel in kernels)
    say(
        f"{len(kernels)} kernels and tiles are compiled for {target_name}, {len(missing)} of them now, "
        f"in {time.perf_counter() - started:.1f} s by the clock; all together took {all_s:.1f} s of processes"
    )


def _cache_token() -> str:
    """Give what Triton's cache is called in results; a new cache gets a new name."""
    path = Path(triton.knobs.cache.dir) / "bench.gpu"
    with contextlib.suppress(FileNotFoundError):
        return path.read_text()
    token = secrets.token_hex(4)
    write_whole(path, token, "name of Triton's cache")
    return token


@contextlib.contextmanager
def _without_interpreter():
    """Let the processes that start inside compile: where the interpreter is on, they can't."""
    before = os.environ.pop("TRITON_INTERPRET", None)
    try:
        yield
    finally:
        if before is not None:
            os.environ["TRITON_INTERPRET"] = before
