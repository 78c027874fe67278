"""Experts that are spread over four gloo processes, in what users put around them: right, or refused with a way out."""

from pathlib import Path

import pytest
from processes import run_torchrun

WORKER = Path(__file__).parent / "spread_worker.py"
CASES = (
    *("numbers", "selection_bias", "file_of_one_rank", "assigned", "meshes", "fully_shard"),
    *("replicas_averaged_by_fsdp", "clipped_without_gradients"),
    *("drawn_over_replicas", "changed_in_place", "too_late", "replicated_slots", "anomaly_mode", "recorded"),
)
REFUSED_OR_AGREED = (
    "copies_over_replicas",
    "not_spread",
    "bias_without_transport",
    "sums_beside_means",
    "factors_of_a_call",
)


@pytest.mark.thorough
def test_optimizers_on_four_ranks() -> None:
    run_torchrun(4, WORKER, cases=("optimizers", "optimizers_of_single_tensors", "what_takes_no_parts"))


@pytest.mark.thorough
@pytest.mark.parametrize("cases", [CASES, REFUSED_OR_AGREED], ids=["right", "refused or agreed"])
def test_spread_experts_on_four_ranks(cases: tuple[str, ...]) -> None:
    run_torchrun(4, WORKER, cases=cases)
