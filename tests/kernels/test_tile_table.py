"""The table of tiles: what every product of every family of GPUs gets from it, row by row."""

from pathlib import Path

import pytest

from tritonmoe.kernels.tiles import table
from tritonmoe.kernels.tiles.table import tile_of

PINNED = Path(__file__).with_name("tiles_by_rules.txt")
FAMILIES = ("interpreter", "amd", "sm_80", "sm_90", "sm_100", "nvidia")
ELEMENTS = ("half", "fp32", "odd_half", "odd_fp32")
OPERATIONS = ("up", "up_ungated", "down", "down_grad", "weight_grad")
HEIGHTS = (16, 32, 64, 128)


def as_text(tile):
    sizes = f"{tile.block_m}x{tile.block_n}x{tile.block_k}, {tile.num_warps} warps, {tile.num_stages} stages"
    walks = ", walks" if tile.persistent else ""
    return f"{sizes}, {tile.group_m} side by side, {tile.subtiles} pieces{walks}"


def test_every_tile_is_the_pinned_one():
    """Tiles decide the bits of sums: whoever changes one changes this file with it."""
    pinned = [(family, "half") for family in FAMILIES] + [("sm_90", elements) for elements in ELEMENTS[1:]]
    lines = [
        f"{family} {elements} {operation} {height}: {as_text(tile_of(family, elements, operation, height))}"
        for family, elements in pinned
        for operation in OPERATIONS
        for height in HEIGHTS
    ]
    assert lines == PINNED.read_text().splitlines()


@pytest.mark.parametrize("elements", ELEMENTS[1:])
@pytest.mark.parametrize("family", FAMILIES)
def test_other_elements_have_the_same_tiles_on_every_gpu(family, elements):
    same_as = ("interpreter", "half") if family == "interpreter" else ("sm_90", elements)
    for operation in OPERATIONS:
        for height in HEIGHTS:
            assert tile_of(family, elements, operation, height) == tile_of(*same_as, operation, height)


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
        for elements in ELEMENTS
        for operation in OPERATIONS
        for height in HEIGHTS
    }
    assert reached == set(range(len(table._ROWS)))
