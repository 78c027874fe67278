"""The model of programs that get their tiles, and the changed copies of kernels beside it."""

import ast
import json
import math
from pathlib import Path

import pytest

from bench import codegen, tile_runs

TABLE = json.loads((Path(__file__).parents[2] / tile_runs.RESULT).read_text())


def test_the_table_is_of_these_sources():
    assert TABLE["source_hash"] == codegen.source_hash(), "stale: run python -m bench.tile_runs"


@pytest.mark.parametrize("name", ["up", "down", "down_grad"])
def test_loops_over_tiles_are_changed(name):
    text = (codegen.ROOT / "ops" / "kernels" / f"{name}.py").read_text()
    as_it_is, one_tile, by_one, by_four = (edit(text) for edit in tile_runs.EDITS.values())
    for changed in (one_tile, by_one, by_four):
        ast.parse(changed)
    assert as_it_is == text
    assert '"FLATTEN": False' in one_tile
    assert by_one.count("tile = tl.atomic_add(row_tiles + 19, 1)") == 2
    assert by_four.count("taken = tl.atomic_add(row_tiles + 19, 4)") == 2
    assert "tiles_of_program(" not in by_one + by_four


def test_programs_begin_where_a_multiprocessor_is_free():
    """Of two multiprocessors one is held until 3: the programs run from 0, from 2 and from 3 on."""
    assert tile_runs.ends_of([2, 2, 2], [0.0, 3.0], 0.0) == 5.0
    assert tile_runs.ends_of([2, 2, 2], [0.0, 3.0], 0.5) == 5.5
    assert tile_runs.ends_of([2, 2, 0], [0.0, math.inf], 0.5) == 5.0


def test_every_tile_is_in_a_run():
    for grid in tile_runs.GRIDS.values():
        for num_tiles in (0, 1, 131, 132, 133, 1000, 5000):
            runs = grid(num_tiles, 8)
            assert sum(runs) == num_tiles
            assert runs == sorted(runs, reverse=True)


def test_no_run_delays_a_product():
    """With one tile a program it ends no sooner, whatever is held, in what was drawn."""
    for row in TABLE["model"]:
        if row["way"] in tile_runs.RUN_GRIDS:
            assert row["most"] <= 1
            assert row["mean"] < 0.97


@pytest.mark.thorough
def test_the_model_is_that_of_the_table():
    assert list(tile_runs.model_rows()) == TABLE["model"]
