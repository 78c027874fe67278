"""Experts spread over gloo processes inside what users put around them: equal to one device, or refused with a way out.

A failing test names its cell: the row (what is around), the column (what holds the experts) and the ranks. `python
tests/integrations/torch_distributed/training_table/table_ranks.py` prints the table.
"""

import functools
import json
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("peft")
pytest.importorskip("transformers")

import table_ranks

sys.path.insert(0, str(Path(__file__).parents[3] / "support"))
from processes import run_forks

CELLS = [cell for _, cells in table_ranks.passes() for cell in cells]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Any:
    @functools.cache
    def run(which: str) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp("training_table")
        _, ended = run_forks([[table_ranks.__file__, str(folder), which]], 3000.0, is_group=False)
        assert not any(ended.statuses), ended.output[-3000:]
        return json.loads((folder / "results.json").read_text())

    return run


@pytest.mark.parametrize(
    "cell",
    [pytest.param(cell, id="-".join(cell), marks=getattr(pytest.mark, table_ranks.tier(cell))) for cell in CELLS],
)
def test_cell(cell: table_ranks.Cell, results: Any) -> None:
    outcomes, _ = results(table_ranks.run_of(cell))["|".join(cell)]
    for outcome in outcomes:
        assert table_ranks.is_expected(cell, outcome), outcomes
