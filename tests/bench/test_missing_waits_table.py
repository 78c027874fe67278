"""The committed table of python -m bench.missing_waits: every deletion is noticed, or redundant for a reason."""

import json
from pathlib import Path

import pytest

from bench import codegen, missing_waits
from virtual_gpu import VIRTUAL_GPUS

TABLE = json.loads((Path(__file__).parents[2] / missing_waits.RESULT).read_text())
ROWS = TABLE["results"]
REASONS = {"what is left keeps the order", "others keep the order", "never runs"}
KERNELS = {"up", "grouped_matmul", "down_grad", "outer_sums"}


def test_the_table_is_of_these_sources():
    assert TABLE["source_hash"] == codegen.source_hash(), "stale: run python -m bench.missing_waits"


@pytest.mark.parametrize("gpu", VIRTUAL_GPUS)
def test_every_deletion_is_accounted_for(gpu):
    rows = [row for row in ROWS if row["target"] == gpu]
    plain = [row for row in rows if "format" not in row]
    assert {row["kernel"] for row in plain} >= KERNELS
    for kernel in KERNELS:
        of_kernel = [row for row in plain if row["kernel"] == kernel]
        assert {"barrier"} < {row["kind"] for row in of_kernel}
        assert sum("noticed" in row for row in of_kernel) > len(of_kernel) / 3
    for row in rows:
        assert bool(row.get("noticed")) != (row.get("redundant") in REASONS), row
        if row.get("redundant") == "others keep the order":
            assert row["others"], row
            assert row["without"], row


@pytest.mark.parametrize("gpu", ["sm_90", "sm_100"])
def test_waits_for_stores_by_tma_are_all_noticed(gpu):
    rows = [row for row in ROWS if (row["target"], row["kind"]) == (gpu, "wait for bulk stores")]
    assert {row["kernel"] for row in rows} == {"grouped_matmul"}
    assert all("noticed" in row for row in rows)


@pytest.mark.parametrize("gpu", ["sm_90", "sm_100", "sm_120"])
def test_fences_and_waits_for_copies_and_products_are_all_noticed(gpu):
    """What is redundant is barriers, and the wait for products that follows the loop which has waited for them."""
    kinds = {row["kind"] for row in ROWS if row["target"] == gpu and "noticed" not in row}
    assert kinds <= {"barrier", "wait for wgmma"}


@pytest.mark.parametrize("weight_format", missing_waits.PACKED)
def test_products_of_packed_weights_are_tried(weight_format):
    """They have no gradients of weights; what is redundant is barriers."""
    rows = [row for row in ROWS if row.get("format") == weight_format]
    assert {row["target"] for row in rows} == {*missing_waits.PACKED[weight_format]}
    assert {row["kernel"] for row in rows} >= KERNELS - {"outer_sums"}
    assert {row["kind"] for row in rows if "noticed" not in row} <= {"barrier"}
