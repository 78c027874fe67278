"""Programs that have a run of a few tiles: every tile once, and the same bits in whatever order programs start."""

import functools
import itertools
import math
import random

import pytest
import torch
import triton
import triton.language as tl
from kernel_cases import DEVICE, LAYOUTS, Layer, WithOptions, check_operations, random_ids
from same_bits import assert_same_bits

from bench.tile_runs import runs_of
from tritonmoe.config.layer import KernelOptions
from tritonmoe.ops.kernels import tile_runs
from tritonmoe.ops.kernels.launch import launch
from tritonmoe.ops.kernels.tiles import measured_tiles
from tritonmoe.ops.kernels.tiles.config import TileConfig
from virtual_gpu.programs import programs_of

BESIDE = KernelOptions(beside_exchanges=True)
CONFIG = TileConfig(128, 128, 64, 8, 3, persistent=True)


def at_once(monkeypatch, number):
    """Let the multiprocessors take so many programs at once."""
    monkeypatch.setattr(tile_runs, "num_programs", lambda num_tiles, *_: min(num_tiles, number))


@triton.jit(do_not_specialize=["programs_at_once"])
def _runs_kernel(
    tiles,  # (num_programs, most_tiles + 1, most_tiles) int32: the tiles of each program, in turn, of so many tiles
    programs_at_once,
    most_tiles,
):
    num_tiles = tl.program_id(1)
    place = tiles + (tl.program_id(0) * (most_tiles + 1) + num_tiles) * most_tiles
    first, end, step = tile_runs.tiles_of_program(num_tiles, programs_at_once, True)
    for tile in tl.range(first, end, step):
        tl.store(place, tile)
        place += 1


def tiles_by_program(grid, programs_at_once, most_tiles):
    """Return the tiles of every program in its turn, for each number of tiles up to the most."""
    tiles = torch.full((*grid, most_tiles + 1, most_tiles), -1, dtype=torch.int32)
    launch(_runs_kernel, (*grid, most_tiles + 1), tiles, programs_at_once, most_tiles)
    return [[[tile for tile in row if tile >= 0] for row in rows] for rows in tiles.transpose(0, 1).tolist()]


@pytest.mark.parametrize(
    ("number", "most_tiles"),
    [(1, 9), (2, 7), (3, 31), pytest.param(4, 70, marks=pytest.mark.thorough), (5, 5)],
)
def test_every_tile_is_in_one_run(monkeypatch, number, most_tiles):
    """However many of the tiles there are; what is left behind a run is enough to keep all other programs busy."""
    at_once(monkeypatch, number)
    grid_and_number = tile_runs.grid_of(most_tiles, CONFIG, BESIDE, torch.device("cpu"))
    for num_tiles, runs in enumerate(tiles_by_program(*grid_and_number, most_tiles)):
        assert sorted(itertools.chain(*runs)) == list(range(num_tiles))
        lengths = [len(run) for run in runs]
        if most_tiles > number:
            expected = runs_of(num_tiles, number)
            assert lengths == expected + [0] * (len(runs) - len(expected))
            for program, run in enumerate(runs):
                later = sum(lengths[program // number * number + number :])
                assert len(run) <= 1 or later >= (len(run) - 1) * number


@pytest.mark.parametrize("most_tiles", [0, 1, 3])
def test_few_tiles_have_a_program_each(monkeypatch, most_tiles):
    at_once(monkeypatch, 3)
    grid, programs_at_once = tile_runs.grid_of(most_tiles, CONFIG, BESIDE, torch.device("cpu"))
    assert (grid, programs_at_once) == ((most_tiles,), most_tiles)


@pytest.mark.thorough
@pytest.mark.parametrize("layout", ["concatenated", pytest.param("interleaved", marks=pytest.mark.thorough)])
def test_runs_have_the_bits_of_other_grids(monkeypatch, request, layout):
    """One program after another in a random order, or all tiles in one: a program that starts late changes nothing."""
    gpu = request.config.getoption("--virtual-gpu")
    sizes = {"hidden": 272, "intermediate": 144} if gpu else {"hidden": 48, "intermediate": 32}
    ids = random_ids(600, 3, 5)
    ids[:300, 0] = 1
    layer = Layer(ids if gpu else ids[:40], 6, LAYOUTS[layout], torch.bfloat16, **sizes)
    with measured_tiles.asked() as asked:
        check_operations(layer, "silu")
    grids, grid_of = {}, tile_runs.grid_of

    def noted_grid_of(kernel, *arguments):
        grid, programs_at_once = grid_of(*arguments)
        grids.setdefault(kernel, []).append(math.prod(grid))
        return grid, programs_at_once

    with measured_tiles.using({key: {"persistent": True} for key in asked}):
        expected = check_operations(layer, "silu", WithOptions(KernelOptions(num_sms=1)))
        at_once(monkeypatch, 2)
        for kernel in ("up", "down", "down_grad"):
            monkeypatch.setattr(f"tritonmoe.ops.kernels.{kernel}.grid_of", functools.partial(noted_grid_of, kernel))
        if gpu:
            generator = random.Random(0)
            for maker in ("nvidia", "amd"):
                monkeypatch.setattr(
                    f"virtual_gpu.{maker}.machine.programs_of",
                    lambda grid: generator.sample(list(programs_of(grid)), math.prod(grid)),
                )
        assert_same_bits(check_operations(layer, "silu", WithOptions(BESIDE)), expected)
    if gpu in ("sm_90", "sm_100") or (not gpu and DEVICE == "cpu"):
        assert set(grids) == {"up", "down", "down_grad"}
        assert all(min(num_programs) > 4 for num_programs in grids.values()), grids
