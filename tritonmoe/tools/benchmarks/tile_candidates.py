"""The whole tiles that `tritonmoe tune` tries for each operation, and which of them are worth a measurement.

The tall ones are those of published kernels of such layers, and the table's own; the low ones, for few pairs per
expert, are all combinations of few values.
"""

import concurrent.futures
import hashlib
import itertools
import multiprocessing
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from tritonmoe.ops.aot import Variant, architecture_named, compile_one, compile_unchecked, record_launches, source_of
from tritonmoe.ops.kernels.launch import Launch
from tritonmoe.ops.kernels.tiles import measured_tiles
from tritonmoe.ops.kernels.tiles.config import TileConfig
from tritonmoe.runtime.processes import ends_with_its_parent

__all__ = ["Candidate", "Fields", "Fitness", "candidates_of", "judge", "judge_all", "products_of", "redundant"]

Fields = dict[str, int | str]
"""Fields of a TileConfig that stand for the table's."""

_COMMON = ("block_m", "block_n", "block_k", "num_warps", "num_stages")
_TALL: dict[str, tuple[tuple[int, ...], ...]] = {
    "up": ((128, 128, 64, 8, 3), (128, 128, 64, 8, 4), (128, 64, 64, 4, 3)),
    "up_ungated": ((128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (128, 128, 64, 4, 3)),
    "down": ((128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (128, 128, 64, 4, 3)),
    "down_grad": (
        *((128, 128, 64, 8, num_stages) for num_stages in (3, 5, 6)),
        *((128, 128, 64, 4, 3), (64, 128, 64, 4, 3), (128, 64, 64, 4, 3)),
    ),
    "weight_grad": (
        *((128, 256, 64, 8, num_stages) for num_stages in (4, 3)),
        *((128, 128, 64, num_warps, num_stages) for num_warps, num_stages in ((4, 3), (8, 4), (8, 6))),
        *((128, 256, block_k, 8, num_stages) for block_k, num_stages in ((32, 6), (128, 2))),
        (256, 128, 64, 8, 4),
    ),
}
"""By operation: block_m, block_n, block_k, num_warps and num_stages, in half precision."""
_DOWN_GRAD_IN_EIGHT: tuple[Fields, ...] = (
    {"block_n": 128, "num_stages": 3, "persistent": True, "programs_per_multiprocessor": 2},
    {"block_n": 128, "num_stages": 3, "persistent": False},
    {"block_n": 256, "num_stages": 3, "persistent": False},
    {"block_n": 256, "num_stages": 4, "persistent": False},
)
"""Tiles of down_grad whose epilogue, in eight pieces, takes so few registers that two programs fit, or more columns."""
_GROUPS = (4, 8, 16)
"""Of the first tile of every product: row tiles side by side."""
_LOW_COLUMNS, _LOW_DEPTHS, _LOW_STAGES = (32, 64, 128), (64, 128), (3, 4, 5)


def _common(sizes: Sequence[int]) -> Fields:
    return dict(zip(_COMMON, sizes, strict=True))


def _walks(fields: Fields) -> Iterator[Fields]:
    """Return a tile whose programs compute one tile each, and one whose programs walk: two an SM if they are small."""
    yield {**fields, "persistent": False}
    programs = 2 if fields["num_warps"] == 4 else 1
    yield {**fields, "persistent": True, "programs_per_multiprocessor": programs}


def _low(height: int) -> Iterator[Fields]:
    for sizes in itertools.product((height,), _LOW_COLUMNS, _LOW_DEPTHS, (4,), _LOW_STAGES):
        yield {**_common(sizes), "persistent": False}


def _tall(operation: str) -> Iterator[Fields]:
    for sizes in _TALL[operation]:
        fields, is_first = _common(sizes), sizes == _TALL[operation][0]
        if operation == "weight_grad":
            groups = (1, 4, 8) if is_first else (8,)
            yield from ({**fields, "group_m": group_m} for group_m in groups)
        elif operation in ("up", "up_ungated") and is_first:
            for gather, group_m, walking in itertools.product(("pointers", "copy"), _GROUPS, _walks(fields)):
                yield {**walking, "group_m": group_m, "gather": gather}
            yield {**fields, "gather": "tma", "persistent": True}
        elif is_first:
            for group_m, walking in itertools.product(_GROUPS, _walks(fields)):
                yield {**walking, "group_m": group_m}
        else:
            yield from _walks(fields)
    if operation == "down_grad":
        common = {"block_m": 128, "block_k": 64, "num_warps": 8, "subtiles": 8}
        yield from ({**common, **fields} for fields in _DOWN_GRAD_IN_EIGHT)


def candidates_of(operation: str, config: TileConfig, dtype: torch.dtype) -> list[Fields]:
    """Return the tiles to try for an operation, as the fields that replace the table's.

    Args:
        operation: as `tile_choice.grouped_matmul_config` takes it. config: the table's tile; no candidate is higher.
        dtype: in fp32 the steps are half as deep, and the tiles half as wide: an element has twice the bytes.
    """
    height = 128 if operation == "weight_grad" else config.block_m
    found = _tall(operation) if height == 128 else _low(height)
    if dtype == torch.float32:
        found = ({**fields, **{name: int(fields[name]) // 2 for name in ("block_n", "block_k")}} for fields in found)
    return list(found)


@dataclass(frozen=True)
class Candidate:
    """One tile for one product."""

    key: str
    """What the product is measured for: see `tiles.measured_tiles.tile_key`."""
    fields: Fields

    @property
    def name(self) -> str:
        return f"{self.key}: " + " ".join(f"{name}={value}" for name, value in self.fields.items())


def products_of(variant: Variant, target_name: str) -> dict[str, TileConfig]:
    """Return the table's tile of every product of a layer's steps on a GPU, by its key."""
    with measured_tiles.using({}), measured_tiles.asked() as found:
        record_launches(variant, architecture_named(target_name).target)
    return found


@dataclass(frozen=True)
class Fitness:
    """What the compiler made of a candidate's kernels."""

    problem: str
    """Why it can't be used: spills, shared memory, a tile that the compiler refuses; empty where it can."""
    binary: str
    """A hash of the machine code and of how many programs run it: candidates with the same one are the same."""
    registers: int
    shared_bytes: int


def judge(variant: Variant, target_name: str, candidate: Candidate) -> Fitness:
    """Compile what a candidate changes in a layer's steps; the kernels stay in Triton's cache."""
    target = architecture_named(target_name).target
    with measured_tiles.using({}):
        plain = record_launches(variant, target)
    with measured_tiles.using({candidate.key: candidate.fields}):
        changed = record_launches(variant, target)
    before = {_describe(launch, target) for launch in plain.values()}
    names = [name for name, launch in changed.items() if _describe(launch, target) not in before]
    if not names:
        return Fitness("it is the table's own tile", "", 0, 0)
    digest, registers, shared_bytes, programs = hashlib.sha256(), 0, 0, 1
    for name in names:
        compiled = compile_one("", name, changed[name], target_name)
        registers, shared_bytes = max(registers, compiled.registers), max(shared_bytes, compiled.shared_bytes)
        if compiled.problem:
            return Fitness(f"{name}: {compiled.problem}", "", registers, shared_bytes)
        assembly = compile_unchecked(changed[name], target).asm
        code = assembly["cubin"] if "cubin" in assembly else assembly["hsaco"]
        digest.update(name.encode() + b"\0" + code + b"\0")
        if changed[name].constexprs.get("FLATTEN"):
            programs = int(candidate.fields.get("programs_per_multiprocessor", 1))
        if programs > compiled.occupancy:
            problem = f"{name}: only {compiled.occupancy} of {programs} programs fit on a multiprocessor"
            return Fitness(problem, "", registers, shared_bytes)
    return Fitness("", f"{digest.hexdigest()[:16]} x {programs}", registers, shared_bytes)


def _describe(launch: Launch, target: Any) -> tuple[str, str]:
    return source_of(launch, target).hash(), str(launch.options)


def redundant(fitness: Mapping[str, Mapping[str, object]]) -> dict[str, str]:
    """Return by candidate's name why some need no measurement: they can't run, or an earlier one has the same code.

    fitness: the fields of every candidate's Fitness, by its name.
    """
    reasons: dict[str, str] = {}
    first: dict[tuple[str, object], str] = {}
    for name, found in fitness.items():
        product = name.partition(": ")[0]
        if found["problem"]:
            reasons[name] = str(found["problem"])
        elif (earlier := first.setdefault((product, found["binary"]), name)) != name:
            reasons[name] = f"the same machine code as {earlier.partition(': ')[2]}"
    return reasons


def _judged(job: tuple[Variant, str, Candidate]) -> tuple[str, dict[str, object]]:
    return job[2].name, asdict(judge(*job))


def judge_all(
    variant: Variant, target_name: str, candidates: Sequence[Candidate]
) -> Iterator[tuple[str, dict[str, object]]]:
    """Compile candidates in as many processes as there are cores; give the name and Fitness of each as it is known."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(
        os.cpu_count(), mp_context=context, initializer=ends_with_its_parent
    ) as pool:
        jobs = [pool.submit(_judged, (variant, target_name, candidate)) for candidate in candidates]
        for job in concurrent.futures.as_completed(jobs):
            yield job.result()
