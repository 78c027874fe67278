"""Search tile configurations on the GPU that is there: whole tiles, all samples kept, the really faster ones used."""

import statistics
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from tritonmoe.ops.aot import Variant, architecture_named
from tritonmoe.ops.kernels import launch
from tritonmoe.ops.kernels.tiles import measured_tiles
from tritonmoe.runtime.files import Json
from tritonmoe.tools.benchmarks.device_time import TimedCalls, graph_pool, interleaved
from tritonmoe.tools.benchmarks.kept_results import KeptResults, identity, open_results
from tritonmoe.tools.benchmarks.shapes import LayerShape, draw_inputs, operation_calls
from tritonmoe.tools.benchmarks.tile_candidates import Candidate, candidates_of, judge_all, products_of, redundant

__all__ = [
    *("LEAST_GAIN", "agree", "best_entries", "calls_by_key", "candidates_of_layer", "tensors_in", "try_candidate"),
    "tune",
]

LEAST_GAIN = 1.02
"""An entry must be so many times as fast as the table's: less is noise."""
ROUNDS = 7
ROUNDS_AGAIN = 21
BATCH_S = 0.01
Call = Callable[[], object]


def candidates_of_layer(variant: Variant, target_name: str, done: Collection[str] = ()) -> list[Candidate]:
    """Return the tiles to try for every product of a layer's steps but those whose keys are `done`."""
    return [
        Candidate(key, fields)
        for key, config in products_of(variant, target_name).items()
        if key not in done
        for fields in candidates_of(key.split()[2], config, variant.dtype)
    ]


def calls_by_key(calls: Mapping[str, Call]) -> dict[str, Call]:
    """Return for every product's key the first of a layer's operations that asks for its tile."""
    found: dict[str, Call] = {}
    for call in calls.values():
        with measured_tiles.using({}), measured_tiles.asked() as keys:
            call()
        for key in keys:
            found.setdefault(key, call)
    return found


def try_candidate(call: Call, candidate: Candidate, device: torch.device, rounds: int, batch_s: float) -> Json:
    """Measure one tile beside the table's, in the same rounds.

    Returns:
        "samples" in seconds of a call, "table" and "candidate"; "gain", the ratio of their medians; "agrees":
        whether the results are the table's up to the rounding of sums, for compilers have bugs; "tile" as it was used.
        Or "left_out": why it can't run.
    """
    table = _with_entries(call, {})
    tried = _with_entries(call, {candidate.key: candidate.fields})
    expected = tensors_in(table())
    try:
        with measured_tiles.asked() as chosen:
            found = tensors_in(tried())
        pool = graph_pool(device)
        timed = {name: TimedCalls(run, device, batch_s, pool) for name, run in (("table", table), ("candidate", tried))}
    except Exception as error:  # out of registers or shared memory, or a tile that the compiler refuses
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # raises where the device computes nothing more
        return {"left_out": f"{type(error).__name__}: {error}"[:300]}
    samples = interleaved(timed, rounds)
    gain = statistics.median(samples["table"]) / statistics.median(samples["candidate"])
    agrees = all(map(agree, found, expected))
    ways = {name: calls.way for name, calls in timed.items()}
    return {"samples": samples, "gain": gain, "agrees": agrees, "tile": str(chosen[candidate.key]), "timed_by": ways}


def _with_entries(call: Call, entries: measured_tiles.Entries) -> Call:
    def run() -> object:
        with measured_tiles.using(entries):
            return call()

    return run


def agree(found: Tensor, expected: Tensor) -> bool:
    """Return whether each number is off by at most two units in its last place, and what sums in fp32 lose."""
    right = expected.double()
    allowed = (
        2 * torch.finfo(expected.dtype).eps * right.abs() + 64 * torch.finfo(torch.float32).eps * right.abs().max()
    )
    return bool(((found.double() - right).abs() <= allowed).all())


def tensors_in(result: object) -> list[Tensor]:
    """Return the tensors of numbers in what an operation returns."""
    if isinstance(result, Tensor):
        return [result] if result.is_floating_point() and result.numel() else []
    return [tensor for item in result for tensor in tensors_in(item)] if isinstance(result, tuple) else []


def best_entries(tried: Mapping[str, Json]) -> dict[str, dict[str, int | str]]:
    """Return each key's fields of its fastest tile, where that is really faster than the table's and as right.

    tried: what `try_candidate` gave, with "key" and "fields".
    """
    best: dict[str, Json] = {}
    for result in tried.values():
        gain = result["gain"] if result.get("agrees") else 0.0
        if gain >= LEAST_GAIN and gain > best.get(result["key"], {"gain": 0.0})["gain"]:
            best[result["key"]] = result
    return {key: dict(result["fields"]) for key, result in best.items()}


def tune(
    shape: LayerShape,
    num_tokens: int,
    dtype: torch.dtype,
    samples_file: Path,
    progress: Callable[[str], None],
    done: set[str],
) -> Iterator[dict[str, dict[str, int | str]]]:
    """Return the entries that make this layer's operations faster than the table's, again after every product.

    The fastest tile of a product is measured a second time, in more rounds, and must be faster then too.

    done: keys that were measured with other tokens, and are not again; this call's are added.
    What was measured before, with the same card, driver, versions and sources, stands in `samples_file` and is not
    measured again.
    Raises what `open_results` does.
    """
    device = torch.device("cuda")
    target_name = launch.architecture_of(launch.target_of(device))
    architecture_named(target_name)
    variant = replace(Variant.of(shape, dtype, num_tokens), precision=shape.precision)
    candidates = candidates_of_layer(variant, target_name, done)
    entries: dict[str, dict[str, int | str]] = {}
    with open_results(samples_file, identity()) as results:
        search = _Search(results, f"{shape} T={num_tokens}", device, progress)
        reasons = search.compile(variant, target_name, candidates)
        calls = calls_by_key(operation_calls(draw_inputs(shape, num_tokens, "uniform", dtype, device), "triton"))
        for key in dict.fromkeys(candidate.key for candidate in candidates):
            if key in calls:
                entries |= search.fastest(calls[key], [one for one in candidates if one.key == key], reasons)
            done.add(key)
            yield dict(entries)


class _Search:
    """The measurements of one layer, those of earlier calls among them."""

    def __init__(self, results: KeptResults, layer: str, device: torch.device, progress: Callable[[str], None]) -> None:
        self.results, self.layer, self.device, self.progress = results, layer, device, progress

    def compile(self, variant: Variant, target_name: str, candidates: Sequence[Candidate]) -> dict[str, str]:
        """Compile what was not compiled before, and give the candidates that need no measurement, and why."""
        cases = {candidate.name: f"{self.layer} compile {candidate.name}" for candidate in candidates}
        missing = [candidate for candidate in candidates if cases[candidate.name] not in self.results.by_case]
        for number, (name, found) in enumerate(judge_all(variant, target_name, missing), 1):
            self.results.add(cases[name], found)
            self.progress(f"compiled {number}/{len(missing)} {name}: {found['problem'] or 'fits'}")
        return redundant({name: self.results.by_case[case] for name, case in cases.items()})

    def fastest(
        self, call: Call, candidates: Sequence[Candidate], reasons: Mapping[str, str]
    ) -> dict[str, dict[str, int | str]]:
        """Return the entry of a product's fastest tile, or none where the table's is as fast."""
        tried = {}
        for number, candidate in enumerate(candidates, 1):
            if candidate.name not in reasons:
                tried[candidate.name] = self._measured("", call, candidate, ROUNDS)
            outcome = reasons.get(candidate.name) or _outcome(tried[candidate.name])
            self.progress(f"{number}/{len(candidates)} {candidate.name}: {outcome}")
        entries = best_entries(tried)
        for key, fields in entries.items():
            again = self._measured(" again", call, Candidate(key, fields), ROUNDS_AGAIN)
            self.progress(f"again {Candidate(key, fields).name}: {_outcome(again)}")
            if not best_entries({"": again}):
                return {}
        return entries

    def _measured(self, suffix: str, call: Call, candidate: Candidate, rounds: int) -> Json:
        case = f"{self.layer}{suffix} {candidate.name}"
        if case not in self.results.by_case:
            found = try_candidate(call, candidate, self.device, rounds, BATCH_S)
            self.results.add(case, {"key": candidate.key, "fields": candidate.fields, **found})
        return self.results.by_case[case]


def _outcome(result: Json) -> str:
    if "gain" not in result:
        return result["left_out"]
    wrong = "" if result["agrees"] else ", WRONG"
    table_us, candidate_us = (1e6 * statistics.median(result["samples"][name]) for name in ("table", "candidate"))
    return f"{candidate_us:.1f} us beside the table's {table_us:.1f}, {result['gain']:.3f} times as fast{wrong}"
