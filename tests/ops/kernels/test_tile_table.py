"""The table of tiles: what every product of every family of GPUs gets from it, row by row; and the table of GPUs."""

import ast
import re
from pathlib import Path

import pytest

import tritonmoe
from tritonmoe.ops.kernels.gpus import CARDS, architecture_like, architecture_named
from tritonmoe.ops.kernels.tiles import table
from tritonmoe.ops.kernels.tiles.table import tile_of

PINNED = Path(__file__).with_name("tiles_by_rules.txt")
FAMILIES = ("interpreter", "amd", "sm_80", "sm_90", "sm_100", "nvidia")
ELEMENTS = ("half", "fp32", "odd_half", "odd_fp32")
CODES = "e4m3"
OPERATIONS = ("up", "up_ungated", "down", "down_grad", "weight_grad")
HEIGHTS = (16, 32, 64, 128)


def as_text(tile):
    sizes = f"{tile.block_m}x{tile.block_n}x{tile.block_k}, {tile.num_warps} warps, {tile.num_stages} stages"
    walks = ", walks" if tile.persistent else ""
    return f"{sizes}, {tile.group_m} side by side, {tile.subtiles} pieces{walks}"


def test_every_tile_is_the_pinned_one():
    """Tiles decide the bits of sums: whoever changes one changes this file with it."""
    pinned = [(family, "half") for family in FAMILIES] + [("sm_90", elements) for elements in ELEMENTS[1:]]
    pinned += [(family, CODES) for family in ("interpreter", "amd", "sm_90")]
    lines = [
        f"{family} {elements} {operation} {height}: {as_text(tile_of(family, elements, operation, height))}"
        for family, elements in pinned
        for operation in OPERATIONS
        for height in HEIGHTS
        if (elements, operation) != (CODES, "weight_grad")  # its operands are rows
    ]
    assert lines == PINNED.read_text().splitlines()


@pytest.mark.parametrize("elements", ELEMENTS[1:])
@pytest.mark.parametrize("family", FAMILIES)
def test_other_elements_have_the_same_tiles_on_every_gpu(family, elements):
    same_as = ("interpreter", "half") if family == "interpreter" else ("sm_90", elements)
    for operation in OPERATIONS:
        for height in HEIGHTS:
            assert tile_of(family, elements, operation, height) == tile_of(*same_as, operation, height)


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_of_codes_are_as_deep_as_both_formats_allow(family):
    """At least one block of "mxfp8", at most one of "fp8_block"."""
    for operation in OPERATIONS[:-1]:
        for height in HEIGHTS:
            tile = tile_of(family, CODES, operation, height)
            assert tile == tile_of(family if family in ("interpreter", "amd") else "sm_90", CODES, operation, height)
            assert 32 <= tile.block_k <= 128


def test_every_row_is_some_products_first():
    def first_row(*wanted):
        return next(
            number
            for number, row in enumerate(table._ROWS)
            if all(value in fits or fits == ("any",) for value, fits in zip(wanted, row.fits, strict=True))
        )

    reached = {
        first_row(family, elements, operation, str(height))
        for family in FAMILIES
        for elements in (*ELEMENTS, CODES)
        for operation in OPERATIONS
        for height in HEIGHTS
    }
    assert reached == set(range(len(table._ROWS)))


@pytest.mark.parametrize(
    ("name", "family"),
    [
        *(("interpreter", "interpreter"), ("sm_75", "nvidia"), ("sm_80", "sm_80"), ("sm_86", "nvidia")),
        *(("sm_90", "sm_90"), ("sm_103", "sm_100"), ("sm_110", "nvidia"), ("sm_121", "nvidia")),
        *(("gfx803", "amd"), ("gfx942", "amd"), ("gfx1201", "amd")),
    ],
)
def test_every_card_has_tiles_known_or_not(name, family):
    gpu = architecture_like(name)
    assert (gpu.name, gpu.tiles) == (name, family)
    assert gpu.tiles in FAMILIES


def test_every_product_on_the_market_has_a_known_architecture():
    assert {name: architecture_named(card.architecture).name for name, card in CARDS.items()} == {
        name: card.architecture for name, card in CARDS.items()
    }


def test_only_the_tables_name_a_gpu():
    """What one GPU has and others lack is a field of its row, so that a new GPU is a new row."""
    root = Path(tritonmoe.__file__).parent
    named = {
        (path.relative_to(root).as_posix(), node.value)
        for path in root.rglob("*.py")
        if path != root / "ops" / "kernels" / "gpus.py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and re.fullmatch(r"sm_?\d+|gfx\w+", str(node.value))
    }
    # An example for a user without a card, and the room for which the pieces of a stored tile were counted.
    assert named == {("tools/cli/tune.py", "sm_90"), ("ops/kernels/tiles/config.py", "sm_90")}
