"""Everything that a day will launch, compiled before it is measured in as many processes as there are cores."""

import contextlib
import os
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path

import triton

from bench.gpu.children import answers
from bench.gpu.setting import HEADLINE, Setting
from tritonmoe.ops.aot import Variant, architecture_named, compile_unchecked, record_launches, source_of
from tritonmoe.ops.backends.kernel_check import CASES
from tritonmoe.ops.kernels.tiles import measured_tiles
from tritonmoe.runtime.files import Json, write_whole
from tritonmoe.tools.benchmarks.kept_results import KeptResults
from tritonmoe.tools.benchmarks.tile_candidates import Candidate, judge
from tritonmoe.tools.benchmarks.tuning import candidates_of_layer

__all__ = ["Kernel", "compile_missing", "headline_candidates", "kernels_of", "variant_of"]

CHECKED_TILES: tuple[dict[str, int | str], ...] = (
    {},
    {"persistent": False},
    {"tma": False},
    {"gather": "copy"},
)
"""What the checks replace in the table's tiles: each changes how operands arrive, or when a tile is stored."""
COMPILE_LIMIT_S = 180.0
"""For one kernel, or one candidate."""


@dataclass(frozen=True)
class Kernel:
    """One launch, or all that a candidate changes, to be compiled."""

    name: str
    """It begins with the letter of the stage before which it is compiled."""
    variant: Variant
    kernel: str = ""
    candidate: Candidate | None = None


def variant_of(setting: Setting, shape: str, num_tokens: int) -> Variant:
    """Return a layer as the compiler is asked for it: in bf16, whatever a rehearsal computes in."""
    return Variant.of(setting.shapes[shape], Variant.dtype, num_tokens)


def headline_candidates(setting: Setting, target_name: str) -> list[Candidate]:
    """Return the tiles to try for the headline's products; in a rehearsal the first few of each."""
    found = candidates_of_layer(variant_of(setting, HEADLINE, setting.headline_tokens), target_name)
    if setting.most_candidates is None:
        return found
    by_key: dict[str, list[Candidate]] = {}
    for candidate in found:
        by_key.setdefault(candidate.key, []).append(candidate)
    return [candidate for each in by_key.values() for candidate in each[: setting.most_candidates]]


def kernels_of(setting: Setting, target_name: str) -> list[Kernel]:
    """Return all that is launched, each once, the headline's first; what only F launches is compiled before F."""
    target = architecture_named(target_name).target
    num_tokens = setting.headline_tokens
    headline = variant_of(setting, HEADLINE, num_tokens)
    layers = {f"A compile {HEADLINE} T={num_tokens} {tiles}": replace(headline, tiles=tiles) for tiles in CHECKED_TILES}
    if not setting.is_rehearsal:
        layers |= {f"A compile small {layer.name}": Variant.of(layer, layer.dtype, layer.num_tokens) for layer in CASES}
    others = [("A", HEADLINE, tokens) for tokens in (*setting.peer_tokens, *setting.few_tokens)]
    others += [("F", HEADLINE, tokens) for tokens in setting.sweep_tokens]
    others += [("F", shape, tokens) for shape in setting.other_shapes for tokens in setting.shape_tokens]
    for stage, shape, tokens in others:
        layers[f"{stage} compile {shape} T={tokens}"] = variant_of(setting, shape, tokens)
    found = [
        Kernel(f"A compile tile {candidate.name}", headline, candidate=candidate)
        for candidate in headline_candidates(setting, target_name)
    ]
    seen = set()
    for layer, variant in layers.items():
        with measured_tiles.using({}):
            launches = record_launches(variant, target)
        for kernel, launch in launches.items():
            key = source_of(launch, target).hash(), str(launch.options)
            if key not in seen:
                seen.add(key)
                found.append(Kernel(f"{layer}: {kernel}", variant, kernel))
    return found


def _compile_each(pipe: Connection) -> None:
    while True:
        pipe.send(_compile(*pipe.recv()))


def _compile(kernel: Kernel, target_name: str) -> Json:
    started = time.perf_counter()
    if kernel.candidate is not None:
        found: Json = asdict(judge(kernel.variant, target_name, kernel.candidate))
    else:
        with measured_tiles.using({}):
            launch = record_launches(kernel.variant, architecture_named(target_name).target)[kernel.kernel]
        try:
            compiled = compile_unchecked(launch, architecture_named(target_name).target)
            found = {"problem": "", "shared_bytes": compiled.metadata.shared}
        except Exception as error:
            found = {"problem": f"{type(error).__name__}: {error}"[:2000]}
    return {**found, "compile_s": round(time.perf_counter() - started, 2)}


def compile_missing(
    kernels: Sequence[Kernel], target_name: str, results: KeptResults, deadline: float, say: Callable[[str], None]
) -> bool:
    """Compile what is in no result, or in another cache than Triton's here: a new machine has an empty one.

    A kernel that ends its compiler, or takes it too long, is a problem of its own, and the others are compiled. Says
    whether all were tried before the deadline, which is on the clock of time.monotonic.
    """
    cache = _cache_token()
    missing = [kernel for kernel in kernels if results.by_case.get(kernel.name, {}).get("cache") != cache]
    started = time.perf_counter()
    number = 0
    with _without_interpreter():
        jobs = [(kernel, target_name) for kernel in missing]
        for number, ((kernel, _), found) in enumerate(answers(_compile_each, jobs, COMPILE_LIMIT_S, deadline), 1):
            if "failed" in found:
                found = {"problem": f"compiling it: {found['failed']}", "compile_s": 0.0}
            results.add(kernel.name, {**found, "cache": cache})
            if found["problem"] or number % 20 == 0:
                say(f"compiled {number} of {len(missing)}; {kernel.name}: {found['problem'] or 'fits'}")
    if number < len(missing):
        say(f"{len(missing) - number} kernels and tiles are not compiled yet")
        return False
    all_s = sum(results.by_case[kernel.name]["compile_s"] for kernel in kernels)
    say(
        f"{len(kernels)} kernels and tiles are compiled for {target_name}, {len(missing)} of them now, "
        f"in {time.perf_counter() - started:.1f} s by the clock; all together took {all_s:.1f} s of processes"
    )
    return True


def _cache_token() -> str:
    """Return what Triton's cache is called in results; a new cache gets a new name."""
    path = Path(triton.knobs.cache.dir) / "bench.gpu"
    with contextlib.suppress(FileNotFoundError):
        return path.read_text()
    token = secrets.token_hex(4)
    write_whole(path, token, "name of Triton's cache")
    return token


@contextlib.contextmanager
def _without_interpreter():
    """Switch the interpreter off for processes that start inside: they compile."""
    before = os.environ.pop("TRITON_INTERPRET", None)
    try:
        yield
    finally:
        if before is not None:
            os.environ["TRITON_INTERPRET"] = before
